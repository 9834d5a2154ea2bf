"""The pass of a model that cannot be continued from its middle: its only stage is the readout of the final stream."""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Bool, Float
from torch import Tensor

from reflowlens.models.residual import ResidualModel
from reflowlens.sweeps.suffixes import Layout


class WholeStages:
    """The :class:`~reflowlens.sweeps.stages.Stages` of such a model: no point belongs to a stage, and every patched run
    is a whole pass."""

    per_block = 0
    whole_rows = True
    suffixes_hold = False
    last_mixing = 0

    def __init__(self, model: ResidualModel) -> None:
        self.model = model
        self.streams = ["hook_refined"]
        self.remembered: list[str] = []

    def stage(self, name: str) -> int | None:
        return None

    def entry_stage(self, name: str) -> int | None:
        return None

    def needed_for_entry(self, name: str) -> list[str]:
        return []

    def entry(
        self, name: str, patched: Float[Tensor, "cell prompt pos *rest"], cache: Mapping[str, Tensor]
    ) -> Float[Tensor, "cell prompt pos d_model"]:
        raise NotImplementedError

    def run(
        self,
        stage: int,
        resid: Float[Tensor, "1 token d_model"],
        layout: Layout,
        cache: Mapping[str, Tensor],
        asked: Bool[Tensor, " token"] | None = None,
        differs: Bool[Tensor, " token"] | None = None,
    ) -> Float[Tensor, "1 asked d_model"]:
        raise NotImplementedError
