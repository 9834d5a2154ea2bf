"""The pass of a model that dictionaries are spliced into: its own stages, with the points that these add."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from jaxtyping import Bool, Float
from torch import Tensor

from reflowlens.dictionaries.splice import spliced_layers
from reflowlens.dictionaries.spliced_layer import SplicedLayer
from reflowlens.sweeps.suffixes import Layout, only

if TYPE_CHECKING:
    from reflowlens.sweeps.stages import Stages


class SplicedStages:
    """The :class:`~reflowlens.sweeps.stages.Stages` of a model with dictionaries in it.

    A layer that reads and writes within one stage runs there, on packed suffixes as on rows, and what its features
    change is added to what it writes. One that does not, or that writes to other layers too, takes whole passes: a
    suffix would lack what was read before it. Where its reconstruction stands in for what the model writes, no suffix
    holds at all.

    Attributes:
        replaced: by stage, the point where a reconstruction stands in for what the model writes.
    """

    def __init__(self, stages: Stages, layers: Sequence[SplicedLayer]) -> None:
        self.stages, self.model = stages, stages.model
        self.streams, self.remembered, self.per_block = stages.streams, stages.remembered, stages.per_block
        self.last_mixing, self.whole_rows = stages.last_mixing, stages.whole_rows
        self.layer_of = {name: layer for layer in layers for name in layer.points}
        self.replaced = {stages.stage(layer.write): layer.write for layer in layers if not layer.keeps_error}
        self.suffixes_hold = all(layer.keeps_error or self._is_local(layer) for layer in layers)

    def _is_local(self, layer: SplicedLayer) -> bool:
        """Whether a layer reads and writes within a stage, and behind the point that the stage starts from."""
        at = self.stages.stage(layer.write)
        if layer.is_cross_layer or at is None:
            return False
        return self.stages.stage(layer.read) == at != self.stages.entry_stage(layer.write)

    def stage(self, name: str) -> int | None:
        layer = self.layer_of.get(name)
        at = self.stages.stage(name if layer is None else layer.write)
        if layer is not None and not self._is_local(layer):
            return None
        is_readout = at == len(self.streams) - 1
        return at if self.suffixes_hold or is_readout else None

    def entry_stage(self, name: str) -> int | None:
        layer = self.layer_of.get(name)
        if layer is not None:
            return self.stages.entry_stage(layer.write)
        leads_to, at = self.stages.entry_stage(name), self.stages.stage(name)
        if leads_to != at and self.replaced.get(at, name) != name:
            return None  # a reconstruction may stand between the point and the end of its stage: it has to run
        return leads_to

    def needed_for_entry(self, name: str) -> list[str]:
        layer = self.layer_of.get(name)
        if layer is None:
            return self.stages.needed_for_entry(name)
        return [layer.write, *self.stages.needed_for_entry(layer.write)] if layer.writes else []

    def entry(
        self, name: str, patched: Float[Tensor, "cell prompt pos *rest"], cache: Mapping[str, Tensor]
    ) -> Float[Tensor, "cell prompt pos d_model"]:
        layer = self.layer_of.get(name)
        if layer is None:
            return self.stages.entry(name, patched, cache)
        change, before = patched - cache[name], cache[layer.write]
        if layer.points[name] is layer.features:
            change = layer.decoded(change)
        return self.stages.entry(layer.write, (before + change).to(before.dtype), cache)

    def run(
        self,
        stage: int,
        resid: Float[Tensor, "1 token d_model"],
        layout: Layout,
        cache: Mapping[str, Tensor],
        asked: Bool[Tensor, " token"] | None = None,
        differs: Bool[Tensor, " token"] | None = None,
    ) -> Float[Tensor, "1 asked d_model"]:
        return only(asked, self.stages.run(stage, resid, layout, cache))


def with_dictionaries(stages: Stages) -> Stages:
    """The stages of a model's pass as it is now, with what is spliced into it."""
    layers = spliced_layers(stages.model)
    return SplicedStages(stages, layers) if layers else stages
