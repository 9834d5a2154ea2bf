"""The pass of a BDH in stages: a level is one, and what a patched run attends to is the state of the unpatched one.

Attention of a BDH is linear, so all that a suffix needs of the text before it is a sum: the state
``ρ_p = Σ_{s<p} R_s x_sparse_sᵀ x_s`` in front of its first position p. The positions of the unpatched run are read into
the state in order, and each suffix takes it where it begins.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from reflowlens.models.bdh import (
    BDH,
    Level,
    Neurons,
    attend_in_chunks,
    chunks_are_cheaper,
    normalized,
    per_head,
    remembered,
)
from reflowlens.models.components import Places, weighted_sum
from reflowlens.sweeps.suffixes import Layout


class LevelStages:
    """A BDH's :class:`~reflowlens.sweeps.stages.Stages`: stage l is level l, the last one the readout."""

    per_block = 1

    def __init__(self, model: BDH) -> None:
        self.model = model
        n_levels = model.cfg.n_layers
        self.streams = [f"blocks.{level}.hook_resid_pre" for level in range(n_levels)]
        self.streams.append(f"blocks.{n_levels - 1}.hook_resid_post")
        self.remembered: list[str] = []
        self.last_mixing = n_levels - 1

    def stage(self, name: str) -> int | None:
        if name == "hook_embed":
            return 0
        if not name.startswith("blocks."):
            return None
        _, level, point = name.split(".", 2)
        return None if point == "hook_attn_scores" else int(level)  # a suffix forms no square of scores

    def entry_stage(self, name: str) -> int | None:
        if not name.startswith("blocks."):
            return self.stage(name)
        _, level, point = name.split(".", 2)
        if point in ("hook_mlp_out", "hook_resid_post"):
            return int(level) + 1
        return int(level) if point == "hook_resid_pre" else None

    def needed_for_entry(self, name: str) -> list[str]:
        return [name.replace("hook_mlp_out", "hook_resid_pre")] if name.endswith("hook_mlp_out") else []

    def entry(
        self, name: str, patched: Float[Tensor, "cell prompt pos d_model"], cache: Mapping[str, Tensor]
    ) -> Float[Tensor, "cell prompt pos d_model"]:
        eps = self.model.cfg.eps
        if name == "hook_embed":
            return normalized(patched, eps)
        if name.endswith("hook_mlp_out"):
            (before,) = self.needed_for_entry(name)
            return normalized(cache[before] + normalized(patched, eps), eps)
        return patched

    def run(
        self, stage: int, resid: Float[Tensor, "1 token d_model"], layout: Layout, cache: Mapping[str, Tensor]
    ) -> Float[Tensor, "1 token d_model"]:
        level = cast(Level, self.model.blocks[stage])
        past = StateBefore(layout, cache[self.streams[stage]], self.model.neurons)
        return level(resid, Places(layout.position[None]), past)


@dataclass(frozen=True)
class StateBefore:
    """What packed suffixes of a level attend to.

    Args:
        layout: which positions of which rows the tokens are.
        stream: the unpatched run's residual stream in front of the level.
        neurons: of the model.
    """

    layout: Layout
    stream: Float[Tensor, "prompt pos d_model"]
    neurons: Neurons

    def attend(
        self, layer: int, q: Float[Tensor, "1 head token neuron"], x: Float[Tensor, "1 token d_model"]
    ) -> Float[Tensor, "1 head token d_model"]:
        """Attention of each row's suffix to its prefix, by the state in front of it, and to itself."""
        d_model, out = x.shape[-1], x.new_empty(*q.shape[:3], x.shape[-1])
        for state, tokens in self._groups(q.dtype):
            rows, values = q[0][:, tokens], x[0][tokens]
            before = (rows.flatten(1, 2) @ state).unflatten(1, tokens.shape)
            each = rows.transpose(0, 1)
            if chunks_are_cheaper(tokens.shape[1], q.shape[3], d_model):
                within = attend_in_chunks(each, values, chunk=d_model)[0]
            else:
                within = weighted_sum((each @ each.mT).tril(-1), values[:, None])
            out[0][:, tokens] = before + within.transpose(0, 1)
        return out

    def _groups(
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
        """The turned neurons and the stream of the unpatched run, up to a position."""
        values = self.stream[prompt, :end]
        x_sparse = F.relu(per_head(values[None, :, None], self.neurons.W_x))
        keys = self.neurons.turn(rearrange(x_sparse, "1 pos head neuron -> head 1 pos neuron"), slice(0, end))
        return keys[:, 0], values
