"""What a sweep is about, however its values are found: its prompts, and its cells with the clean run's activations."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool
from torch import Tensor

from reflowlens.activations.cache import ActivationCache
from reflowlens.errors import ReflowlensError
from reflowlens.interventions.apply import source_cache
from reflowlens.interventions.selectors import hook_names, is_each, rows_reached
from reflowlens.interventions.values import Patch
from reflowlens.models.base import HookedModel
from reflowlens.models.text import TextInput
from reflowlens.prompts import Prompts
from reflowlens.sweeps.alignment import Positions, position_axis, with_roles
from reflowlens.sweeps.grids import Cell, Cells, CellSpec, make_cells
from reflowlens.sweeps.run_prompts import RunPrompts, of_one_length


@dataclass(frozen=True)
class Setup:
    """A sweep's prompts and cells: with the clean run's activations bound, and as they were asked for.

    Args:
        missing: prompts that lack what a cell intervenes on, a position behind their end: it says nothing of them.
        misaligned: whether a cell is at positions from the left of prompts of several lengths, without being asked to.
        positions: what aligns clean and corrupted prompts, as it was given.
    """

    model: HookedModel
    prompts: RunPrompts
    cells: Cells
    asked: list[Cell]
    missing: Bool[Tensor, "cell prompt"]
    misaligned: bool
    positions: Positions


def prepare_sweep(
    model: HookedModel,
    clean: TextInput | Prompts | None,
    corrupted: TextInput | None,
    spec: CellSpec,
    positions: Positions = None,
) -> Setup:
    """Check the prompts, make the cells and give patches without a prompt the clean run's activations."""
    prompts = _run_prompts(model, clean, corrupted)
    axis = position_axis(model, prompts, positions)
    cells = make_cells(model, spec, axis)
    asked = [tuple(with_roles(model, prompts, part) for part in cell) for cell in cells.cells]
    cells = dataclasses.replace(cells, cells=asked)
    unbound = [part for cell in asked for part in cell if _is_unbound(part)]
    if unbound:
        if prompts.clean is None:
            raise ReflowlensError("these cells patch from the clean run: give the clean prompts")
        if not prompts.is_even and any(part.takes_same_positions for part in unbound):
            hint = "patch where both have a position: positions='right', or by role, positions=['subject', 'last']"
            raise of_one_length(prompts.clean_lengths, prompts.lengths, hint)
        cache = source_cache(model, prompts.clean, {name for part in unbound for name in hook_names(model, part)})
        clean_run = ActivationCache(dict(cache), model, tokens=prompts.clean, lengths=list(prompts.clean_lengths))
        bound = [tuple(_bound(part, clean_run) for part in cell) for cell in asked]
        cells = dataclasses.replace(cells, cells=bound)
    from_left = any(_counts_from_left(part.position) for cell in asked for part in cell)
    misaligned = positions is None and prompts.is_padded and from_left
    return Setup(model, prompts, cells, asked, _missing(model, prompts, asked), misaligned, positions)


def _run_prompts(model: HookedModel, clean: TextInput | Prompts | None, corrupted: TextInput | None) -> RunPrompts:
    if isinstance(clean, Prompts) and corrupted is None and "corrupted" not in clean.frame:
        return RunPrompts.of(model, clean)
    if clean is None and corrupted is not None and not isinstance(corrupted, Prompts):
        return RunPrompts.of(model, corrupted)
    return RunPrompts.pair(model, cast(Any, clean), corrupted)


def _missing(model: HookedModel, prompts: RunPrompts, cells: Sequence[Cell]) -> Bool[Tensor, "cell prompt"]:
    """Prompts in which one of a cell's interventions has no place."""
    read, known = prompts.as_pass(), dict[str, Tensor]()

    def reached(part: Any, name: str) -> Tensor:
        index = part.index if model.hook_axes(name)[-1] == "key_pos" else None
        key = repr((part.position, index, model.hook_axes(name)))
        if key not in known:
            known[key] = rows_reached(model, part, name, read)
        return known[key]

    everywhere = torch.zeros(len(cells), len(prompts), dtype=torch.bool)
    for i, cell in enumerate(cells):
        for part in cell if prompts.is_padded or any(is_each(part.position) for part in cell) else ():
            for name in hook_names(model, part):
                everywhere[i] |= ~reached(part, name)
    return everywhere


def _counts_from_left(position: Any) -> bool:
    """Whether a selector names a position behind the first by its number from the left, the same in all prompts."""
    if position is None or isinstance(position, str) or is_each(position):
        return False
    ends = (position.start, position.stop) if isinstance(position, slice) else position
    return any(end is not None and end > 0 for end in ([ends] if isinstance(ends, int) else ends))


def _is_unbound(part: Any) -> bool:
    return isinstance(part, Patch) and part.prompt is None


def _bound(part: Any, cache: ActivationCache) -> Any:
    return dataclasses.replace(part, prompt=cache) if _is_unbound(part) else part
