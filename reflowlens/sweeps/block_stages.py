"""The pass of a model of which no more is known than that block follows block: a stage is a block, on whole rows."""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Bool, Float
from torch import Tensor

from reflowlens.models.places import Places
from reflowlens.models.residual import ResidualModel
from reflowlens.sweeps.suffixes import Layout, only


class BlockStages:
    """Any model's :class:`~reflowlens.sweeps.stages.Stages`: stage l is block l, the last one the readout.

    Blocks before a patch are left out, positions before it are not: a block may need them.
    """

    per_block = 1
    whole_rows = True
    suffixes_hold = True

    def __init__(self, model: ResidualModel) -> None:
        self.model = model
        n_layers = model.cfg.n_layers
        self.streams = [f"blocks.{layer}.hook_resid_pre" for layer in range(n_layers)]
        self.streams.append(f"blocks.{n_layers - 1}.hook_resid_post")
        self.remembered: list[str] = []
        self.last_mixing = n_layers - 1

    def stage(self, name: str) -> int | None:
        if not name.startswith("blocks.") or not {"batch", "pos"} <= set(self.model.hook_axes(name)):
            return None
        return int(name.split(".")[1])

    def entry_stage(self, name: str) -> int | None:
        if not name.startswith("blocks."):
            return None
        _, layer, point = name.split(".", 2)
        return {"hook_resid_pre": int(layer), "hook_resid_post": int(layer) + 1}.get(point)

    def needed_for_entry(self, name: str) -> list[str]:
        return []

    def entry(
        self, name: str, patched: Float[Tensor, "cell prompt pos d_model"], cache: Mapping[str, Tensor]
    ) -> Float[Tensor, "cell prompt pos d_model"]:
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
        rows = layout.over(cache[self.streams[stage]], resid)
        out = self.model.blocks[stage](rows, Places(slice(0, layout.n_positions)))
        return only(asked, layout.of_rows(out))
