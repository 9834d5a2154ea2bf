"""What a sweep is about, however its values are found: its prompts, and its cells with the clean run's activations."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from reflowlens.activations.cache import ActivationCache
from reflowlens.errors import ReflowlensError
from reflowlens.interventions.apply import source_cache
from reflowlens.interventions.selectors import hook_names
from reflowlens.interventions.values import Patch
from reflowlens.models.base import HookedModel
from reflowlens.models.text import TextInput
from reflowlens.sweeps.grids import Cell, Cells, CellSpec, make_cells
from reflowlens.sweeps.run_prompts import RunPrompts


@dataclass(frozen=True)
class Setup:
    """A sweep's prompts and cells: with the clean run's activations bound, and as they were asked for."""

    model: HookedModel
    prompts: RunPrompts
    cells: Cells
    asked: list[Cell]


def prepare_sweep(model: HookedModel, clean: TextInput | None, corrupted: TextInput, spec: CellSpec) -> Setup:
    """Check the prompts, make the cells and give patches without a prompt the clean run's activations."""
    prompts = RunPrompts.of(model, corrupted) if clean is None else RunPrompts.pair(model, clean, corrupted)
    cells = make_cells(model, spec, prompts.tokens.shape[1])
    asked = cells.cells
    unbound = {name for cell in cells.cells for part in cell if _is_unbound(part) for name in hook_names(model, part)}
    if unbound:
        if prompts.clean is None:
            raise ReflowlensError("these cells patch from the clean run: give the clean prompts")
        cache = source_cache(model, prompts.clean, unbound)
        clean_run = ActivationCache(dict(cache), model, tokens=prompts.clean, lengths=prompts.lengths)
        bound = [tuple(_bound(part, clean_run) for part in cell) for cell in cells.cells]
        cells = dataclasses.replace(cells, cells=bound)
    return Setup(model, prompts, cells, asked)


def _is_unbound(part: Any) -> bool:
    return isinstance(part, Patch) and part.prompt is None


def _bound(part: Any, cache: ActivationCache) -> Any:
    return dataclasses.replace(part, prompt=cache) if _is_unbound(part) else part
