"""What a run minimises: next-token cross-entropy, or a student's losses (:mod:`pretraining.distillation.objective`)."""

from __future__ import annotations

from typing import TypeAlias

from jaxtyping import Float, Int
from torch import Tensor, nn

from reflowlens.models.base import HookedModel

Losses: TypeAlias = "dict[str, Float[Tensor, '']]"


class Objective:
    """Next-token cross-entropy."""

    def prepare(self, model: HookedModel) -> None:
        """Give a fresh model what it begins with, and freeze what it is not to change."""

    def losses(self, model: HookedModel, x: Int[Tensor, "batch pos"], y: Int[Tensor, "batch pos"]) -> Losses:
        """``loss``, which is minimised, and what it is made of, means over the batch."""
        return {"loss": model(x, "loss", targets=y)}


class Learner(nn.Module):
    """A model and its objective as one module: what is compiled, and whose passes processes have in common."""

    def __init__(self, model: HookedModel, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, x: Int[Tensor, "batch pos"], y: Int[Tensor, "batch pos"]) -> Losses:
        return self.objective.losses(self.model, x, y)
