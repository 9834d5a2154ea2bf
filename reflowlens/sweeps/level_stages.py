"""The pass of a model of levels: each is a stage, and what a patched run attends to is the state of the unpatched one.

Attention of a level is linear, so all that a suffix needs of the text before it is a sum: the state
``ρ_p = Σ_{s<p} k_sᵀ x_s`` in front of its first position p, k the level's keys. The positions of the unpatched run are
read into the state in order, and each suffix takes it where it begins.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reflowlens.models.linear_attention import attend_in_chunks, chunks_are_cheaper, remembered
from reflowlens.models.numerics import weighted_sum
from reflowlens.models.places import Places, Positions
from reflowlens.models.products import products
from reflowlens.sweeps.block_stages import BlockStages
from reflowlens.sweeps.suffixes import Layout, is_anything_hooked, only


class Level(Protocol):
    """A block that writes once, at ``hook_mlp_out``, and attends to earlier positions by ``past.attend``."""

    def __call__(
        self, resid: Float[Tensor, "1 token d_model"], places: Places, past: StateBefore | Suffixes
    ) -> Float[Tensor, "1 token d_model"]: ...

    def write(
        self, x: Float[Tensor, "*batch d_model"], out: Float[Tensor, "*batch d_model"]
    ) -> Float[Tensor, "*batch d_model"]:
        """The stream after the level, from what it read and what came out of it."""
        ...

    def keys(
        self, x: Float[Tensor, "batch pos d_model"], positions: Positions
    ) -> Float[Tensor, "head batch pos neuron"]:
        """What later positions compare themselves with."""
        ...


class LevelStages(BlockStages):
    """The :class:`~reflowlens.sweeps.stages.Stages` of a model of levels: stage l is level l, the last one the readout.

    The model has ``first_stream``, what the first level reads of an embedding.
    """

    whole_rows = False

    def stage(self, name: str) -> int | None:
        if name == "hook_embed":
            return 0
        return None if name.endswith(".hook_attn_scores") else super().stage(name)  # a suffix forms no square of scores

    def entry_stage(self, name: str) -> int | None:
        if name == "hook_embed":
            return 0
        return super().entry_stage(name.replace("hook_mlp_out", "hook_resid_post"))

    def needed_for_entry(self, name: str) -> list[str]:
        return [name.replace("hook_mlp_out", "hook_resid_pre")] if name.endswith("hook_mlp_out") else []

    def entry(
        self, name: str, patched: Float[Tensor, "cell prompt pos d_model"], cache: Mapping[str, Tensor]
    ) -> Float[Tensor, "cell prompt pos d_model"]:
        if name == "hook_embed":
            return cast(Any, self.model).first_stream(patched)
        if name.endswith("hook_mlp_out"):
            (before,) = self.needed_for_entry(name)
            return self._level(int(name.split(".")[1])).write(cache[before], patched)
        return patched

    def run(
        self,
        stage: int,
        resid: Float[Tensor, "1 token d_model"],
        layout: Layout,
        cache: Mapping[str, Tensor],
        asked: Bool[Tensor, " token"] | None = None,
        differs: Bool[Tensor, " token"] | None = None,
    ) -> Float[Tensor, "1 asked d_model"]:
        level, before = self._level(stage), StateBefore(layout, cache[self.streams[stage]], self._level(stage))
        # What is edited in a level is whole suffixes.
        if asked is None or bool(asked.all()) or is_anything_hooked(cast(Any, level)):
            return only(asked, level(resid, Places(layout.position[None]), before))
        keys = level.keys(resid, layout.position[None])[:, 0]
        past = Suffixes(before, keys, resid[0], asked)
        return level(resid[:, asked], Places(layout.position[None, asked]), past)

    def _level(self, layer: int) -> Level:
        return cast(Level, self.model.blocks[layer])


@dataclass(frozen=True)
class StateBefore:
    """What packed suffixes of a level attend to.

    Args:
        layout: which positions of which rows the tokens are.
        stream: the unpatched run's residual stream in front of the level.
        level: whose keys these positions are compared by.
    """

    layout: Layout
    stream: Float[Tensor, "prompt pos d_model"]
    level: Level

    def attend(
        self, layer: int, q: Float[Tensor, "1 head token neuron"], x: Float[Tensor, "1 token d_model"]
    ) -> Float[Tensor, "1 head token d_model"]:
        """Attention of each row's suffix to its prefix, by the state in front of it, and to itself."""
        d_model, out = x.shape[-1], x.new_empty(*q.shape[:3], x.shape[-1])
        for state, tokens in self.groups(q.dtype):
            rows, values = q[0][:, tokens], x[0][tokens]
            before = products(rows.flatten(1, 2), state).unflatten(1, tokens.shape)
            each = rows.transpose(0, 1)
            if chunks_are_cheaper(tokens.shape[1], q.shape[3], d_model):
                within = attend_in_chunks(each, values, chunk=d_model)[0]
            else:
                within = weighted_sum(products(each, each.mT).tril(-1), values[:, None])
            out[0][:, tokens] = before + within.transpose(0, 1)
        return out

    def groups(
        self, dtype: torch.dtype
    ) -> Iterator[tuple[Float[Tensor, "head neuron d_model"], Int[Tensor, "row pos"]]]:
        """Rows of one prompt that begin at the same position: the state there, and where their tokens lie."""
        layout = self.layout
        row, lengths = torch.unique_consecutive(layout.row, return_counts=True)
        begins = lengths.cumsum(0) - lengths
        prompt, start = layout.prompt[row], layout.position[begins]
        for p in prompt.unique().tolist():
            starts = start[prompt == p].unique().tolist()  # in order
            keys, values = self._read(p, starts[-1])
            state, read = keys.new_zeros(1, len(keys), keys.shape[-1], values.shape[-1]), 0
            for first in starts:
                state = remembered(state, keys[None, :, read:first], values[read:first].expand(1, len(keys), -1, -1))
                read = first
                mine = (prompt == p) & (start == first)
                offset = torch.arange(int(lengths[mine][0]), device=mine.device)  # one prompt's rows end together
                yield state[0].to(dtype), begins[mine, None] + offset

    def _read(self, prompt: int, end: int) -> tuple[Float[Tensor, "head pos neuron"], Float[Tensor, "pos d_model"]]:
        """The keys and the stream of the unpatched run, up to a position."""
        values = self.stream[prompt, :end]
        return self.level.keys(values[None], slice(0, end))[:, 0], values


@dataclass(frozen=True)
class Suffixes:
    """What some tokens of packed suffixes attend to: the state in front of their row's suffix, and the suffix.

    Args:
        before: the states.
        keys, values: of all tokens.
        asked: the tokens that attend.
    """

    before: StateBefore
    keys: Float[Tensor, "head token neuron"]
    values: Float[Tensor, "token d_model"]
    asked: Bool[Tensor, " token"]

    def attend(
        self, layer: int, q: Float[Tensor, "1 head asked neuron"], x: Float[Tensor, "1 asked d_model"]
    ) -> Float[Tensor, "1 head asked d_model"]:
        out = x.new_empty(*q.shape[:3], x.shape[-1])
        number = self.asked.cumsum(0) - 1  # of an asked token among those
        for state, tokens in self.before.groups(q.dtype):
            asking = self.asked[tokens[0]].nonzero()[:, 0]  # the same places in every row: they are of one prompt
            mine = number[tokens[:, asking]]
            queries = q[0][:, mine]
            is_earlier = torch.arange(tokens.shape[1], device=asking.device) < asking[:, None]
            scores = products(queries, self.keys[:, tokens].mT).where(is_earlier, 0.0)
            found = products(queries.flatten(1, 2), state).unflatten(1, mine.shape)
            out[0][:, mine] = found + weighted_sum(scores, self.values[tokens])
        return out
