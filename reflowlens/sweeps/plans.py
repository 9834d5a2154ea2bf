"""Where in a model's pass each cell of a sweep enters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reflowlens.interventions.apply import Bound, apply, new_part, resolve
from reflowlens.interventions.selection import Selection
from reflowlens.interventions.selectors import Prompt
from reflowlens.models.base import HookedModel
from reflowlens.sweeps.stages import EMBEDDINGS, READOUT_SIGNAL, Stages


@dataclass(frozen=True)
class Edit:
    """A bound intervention with its selectors resolved."""

    bound: Bound
    selection: Selection

    @property
    def name(self) -> str:
        """The hook point."""
        return self.bound.name

    def apply(self, activation: Float[Tensor, "prompt *rest"]) -> Float[Tensor, "prompt *rest"]:
        """The point's activation after the intervention."""
        return apply(self.bound, self.selection, activation)

    def change(self, activation: Float[Tensor, "prompt *rest"]) -> Tensor | None:
        """The new value of the selected part, for ``selection.put``; None if it is the value that is there."""
        part = new_part(self.bound, self.selection, activation)
        before = self.selection.get(activation)
        after = self.selection.where_counted(part.to(activation), before)
        return None if torch.equal(after.broadcast_to(before.shape), before) else part

    def first_position(self, n_prompts: int, n_positions: int) -> Int[Tensor, " prompt"]:
        """The first position of each prompt that is selected."""
        where = self.selection.positions
        if isinstance(where, Tensor) and where.ndim == 2:
            return where.min(dim=1).values
        return torch.arange(n_positions)[where].min().expand(n_prompts)


@dataclass(frozen=True)
class Plan:
    """How a cell is run.

    Args:
        stage: where it enters (:mod:`reflowlens.sweeps.stages`).
        leading: the edit that is performed first.
        direct: whether ``leading`` gives the residual stream at ``stage`` by itself; otherwise it is performed, like
            the others, when its point fires.
        others: edits that are performed when their points fire.
    """

    stage: int
    leading: Edit
    direct: bool
    others: tuple[Edit, ...]

    @property
    def fired(self) -> tuple[Edit, ...]:
        """Every edit that waits for its point."""
        return self.others if self.direct else (self.leading, *self.others)


def make_plan(stages: Stages, bound: Sequence[Bound], cache: Mapping[str, Tensor], prompt: Prompt) -> Plan | None:
    """The plan of a cell; None when one of its points belongs to no stage, and the cell has to be run whole.

    Args:
        stages: of the model's pass.
        bound: the cell's interventions.
        cache: the unpatched run's activations of their points.
    """
    fires = [at for part in bound if (at := stages.stage(part.name)) is not None]
    if len(fires) < len(bound):
        return None
    edits = [Edit(part, _selection(stages.model, part, cache[part.name], prompt)) for part in bound]
    order = sorted(range(len(edits)), key=fires.__getitem__)  # points fire in the order of the pass
    leading, *others = (edits[i] for i in order)
    if any(edit.name in (READOUT_SIGNAL, *EMBEDDINGS) for edit in others):
        return None
    leads_to = stages.entry_stage(leading.name)
    if leads_to is not None and all(fires[i] >= leads_to for i in order[1:]):
        return Plan(leads_to, leading, True, tuple(others))
    return None if leading.name in EMBEDDINGS else Plan(fires[order[0]], leading, False, tuple(others))


def _selection(model: HookedModel, bound: Bound, activation: Tensor, prompt: Prompt) -> Selection:
    selection = resolve(model, bound, activation.shape, prompt)
    assert selection is not None  # None is for generation, where a position may belong to another pass
    return selection
