"""Rows of patched runs on their way through a model's stages, each from where it enters (:mod:`.suffixes`)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.sweeps.stages import stages_of
from reflowlens.sweeps.suffixes import Layout


@dataclass(frozen=True)
class Packed:
    """Rows under way.

    Args:
        layout: which positions of which rows the tokens are, the rows' suffixes end to end.
        cell: whose each row is: the number of a cell, a signal or an injection.
        resid: the residual stream of the tokens.
    """

    layout: Layout
    cell: Int[Tensor, " row"]
    resid: Float[Tensor, "1 token d_model"]

    @classmethod
    def suffixes(
        cls,
        cell: Int[Tensor, " row"],
        prompt: Int[Tensor, " row"],
        start: Int[Tensor, " row"],
        resid: Float[Tensor, "row pos d_model"],
    ) -> Packed:
        """Each row from its position ``start`` on, of its whole stream."""
        layout = Layout.of_suffixes(prompt, start, resid.shape[1])
        return cls(layout, cell, layout.of_rows(resid))

    @property
    def token_prompt(self) -> Int[Tensor, " token"]:
        """The prompt of each token."""
        return self.layout.prompt[self.layout.row]

    def differs(self, unpatched: Float[Tensor, "prompt pos d_model"]) -> Bool[Tensor, " token"] | None:
        """The tokens whose stream is not the unpatched run's; None if they all are."""
        differs = (self.resid != self.layout.of_prompts(unpatched))[0].any(dim=-1)
        return None if bool(differs.all()) else differs

    def extended(self, other: Packed) -> Packed:
        """With the rows of another behind."""
        cell, resid = torch.cat([self.cell, other.cell]), torch.cat([self.resid, other.resid], dim=1)
        return Packed(self.layout.extended(other.layout), cell, resid)


Hooking: TypeAlias = "Callable[[int, Packed], AbstractContextManager[Any]]"


def _no_hooks(stage: int, packed: Packed) -> AbstractContextManager[Any]:
    return contextlib.nullcontext()


class UnpatchedRun:
    """The run that patched ones differ from: what is reused of it, and how they go on from where they differ.

    Args:
        points: where patched runs may enter; their activations are kept, and what entering there takes.

    Attributes:
        stages: of the model's pass.
        cache: activations, among them the residual stream in front of each stage.
        final: the last residual stream.
    """

    @torch.no_grad()
    def __init__(self, model: HookedModel, tokens: Int[Tensor, "prompt pos"], points: Iterable[str] = ()) -> None:
        self.stages, self.n_positions = stages_of(model), tokens.shape[1]
        points = set(points)
        needed = {point for name in points for point in self.stages.needed_for_entry(name)}
        names = sorted({*points, *needed, *self.stages.streams, *self.stages.remembered})
        self.cache: dict[str, Tensor]
        _, self.cache = model.run_with_cache(tokens, names_filter=names, return_type=None, return_cache_object=False)
        self.final: Float[Tensor, "prompt pos d_model"] = self.cache[self.stages.streams[-1]]

    def resid(self, layer: int) -> Float[Tensor, "prompt pos d_model"]:
        """The residual stream that a block reads; of layer ``n_layers`` the last."""
        return self.cache[self.stages.streams[self.first_stage(layer)]]

    def first_stage(self, layer: int) -> int:
        """The stage that a block begins with; of layer ``n_layers`` the readout.

        Raises:
            ReflowlensError: a pass of this model cannot start from its middle.
        """
        if not self.stages.per_block:
            raise ReflowlensError(
                f"this runs the model from a block on, and a pass of a {type(self.stages.model).__name__} starts from "
                "tokens"
            )
        return layer * self.stages.per_block

    def finish(
        self,
        entering: Mapping[int, Sequence[Packed]],
        *,
        is_read: Bool[Tensor, "prompt pos"] | None = None,
        hooking: Hooking = _no_hooks,
    ) -> Packed:
        """Take rows through the stages to the readout.

        Args:
            entering: rows by the stage that they enter at.
            is_read: positions whose last stream is asked for; the others' tokens are dropped when nothing attends to
                them any more. Default: all stay.
            hooking: called with each stage and the rows in it, gives what is to be attached while it runs.

        Raises:
            ReflowlensError: rows enter in the middle of a pass whose later parts need its earlier ones.
        """
        nobody = torch.empty(0, dtype=torch.long, device=self.final.device)
        layout = Layout.empty(self.n_positions, self.final.device)
        packed = Packed(layout, nobody, self.final.new_empty(1, 0, self.final.shape[-1]))
        readout = len(self.stages.streams) - 1
        if not self.stages.suffixes_hold and any(stage < readout for stage in entering):
            raise ReflowlensError(
                "this runs the model from the middle, and a dictionary that stands in for parts of it (error=False) "
                "needs what earlier layers read: splice it with its error term"
            )
        for stage in range(readout + 1):
            for rows in entering.get(stage, ()):
                packed = packed.extended(rows)
            if stage == readout or not len(packed.layout.row):
                continue
            asked = None
            if is_read is not None and stage == self.stages.last_mixing:
                asked = is_read[packed.token_prompt, packed.layout.position]
            differs = None
            if entering.get(stage) or entering.get(stage - 1):  # of two stages one lets positions see each other
                differs = packed.differs(self.cache[self.stages.streams[stage]])
            with hooking(stage, packed):
                packed = self._through(stage, packed, asked, differs)
        return packed

    def _through(
        self,
        stage: int,
        packed: Packed,
        asked: Bool[Tensor, " token"] | None,
        differs: Bool[Tensor, " token"] | None,
    ) -> Packed:
        """Rows behind a stage; of them the tokens that are asked for."""
        layout, resid = packed.layout, packed.resid
        resid = self.stages.run(stage, resid, layout, self.cache, asked, differs)
        return Packed(layout if asked is None else layout.kept(asked), packed.cell, resid)
