"""Activation patching over many cells: exact, or estimated by gradients.

A sweep runs the corrupted prompts once for every cell, with the cell's intervention, and measures a metric. In exact
mode nothing is computed that the intervention cannot change: a patched run enters at its layer and position
(:mod:`reflowlens.sweeps.suffixes`), as many of them at once as the memory budget holds, and only the logits
that the metric reads are formed. The numbers are those of one whole forward pass a cell.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from reflowlens.circuits.gradients import estimate_cells, steps_of
from reflowlens.dictionaries.splice import identity_of
from reflowlens.errors import ReflowlensError
from reflowlens.interventions.values import to_json
from reflowlens.metrics import Metric, check_metric
from reflowlens.models.residual import ResidualModel
from reflowlens.models.text import TextInput
from reflowlens.models.threads import changing
from reflowlens.models.unwrapping import guarded, hooked_model
from reflowlens.processes import processes
from reflowlens.prompts import Prompts
from reflowlens.sweeps.alignment import Positions
from reflowlens.sweeps.grids import CellSpec
from reflowlens.sweeps.patching_result import PatchingResult, joined
from reflowlens.sweeps.reading import Reader, attached_points
from reflowlens.sweeps.results_file import ResultsFile
from reflowlens.sweeps.runs import PackedRuns, WholeRuns
from reflowlens.sweeps.setup import Setup, prepare_sweep

Mode = Literal["exact", "gradient", "integrated"]
PROMPTS_AT_ONCE = 128  # of a grid over more
MODES: tuple[Mode, ...] = ("exact", "gradient", "integrated")


@guarded(changing)
def sweep(
    model: Any,
    clean: TextInput | Prompts | None,
    corrupted: TextInput | None = None,
    cells: CellSpec = (),
    metric: Metric | None = None,
    *,
    positions: Positions = None,
    mode: Mode = "exact",
    steps: int = 8,
    memory: float | None = None,
    results: str | Path | None = None,
    progress: bool | None = None,
) -> PatchingResult:
    """Measure a metric of the corrupted run under each of many interventions.

    Args:
        model: a hooked model.
        clean: the prompts that patches take their activations from; None when no cell does. Of
            :class:`reflowlens.Prompts` both columns are used and ``corrupted`` is left out (what follows is then given
            by name): ``rl.sweep(model, prompts, cells="resid_pre", metric=rl.metrics.logit_diff(prompts))``. Without a
            column ``corrupted`` the clean ones are run. A grid over more than 128 prompts runs 128 at a time, unless it
            keeps ``results``.
        corrupted: the prompts that are run; as many tokens as ``clean``, unless ``positions`` aligns the two.
        cells: a grid's name (``"resid_pre"``, ``"attn_head_out"``, ..., :data:`reflowlens.sweeps.grids.GRIDS`),
            several names, or a list of interventions, of which a sublist makes one cell. ``Patch`` without a prompt
            takes the clean run's activation.
        metric: one of :mod:`reflowlens.metrics`.
        positions: what an axis of positions is, for prompts of several lengths: ``"left"``, 0, 1, ... of each;
            ``"right"``, ..., -2, -1, from each prompt's own end; or a list of roles, columns of the prompts (the last
            token of that text, of ``"subject:first"`` the first), ``"last"`` and indices: the axis is then ``role``.
            None is ``"left"``, and means over prompts of several lengths warn.
        mode: ``"exact"`` performs every intervention; ``"gradient"`` estimates it as the metric's gradient at the
            corrupted run times the change (attribution patching: Nanda, 2023); ``"integrated"`` takes the mean gradient
            over ``steps`` runs on the way from the corrupted embeddings to the clean ones (Hanna et al., 2024).
        memory: bytes that the folded runs may take; default: a share of what is free. Halved when memory runs out.
        results: a file of JSON lines that keeps an exact sweep's finished cells; a sweep that is started again with it
            continues, cells in the batches that they would have had: on one machine to the same values, bit for bit,
            unless memory ran out or ``memory`` is another. Under torchrun every process but the first puts its rank
            before the suffix.
        progress: show a bar; by default on a terminal.

    Returns:
        TransformerLens's ``PatchingResult``: ``values`` [*grid axes, prompt], ``baseline`` [prompt], the metric of the
        corrupted run. A prompt that lacks a cell's position has NaN there, and is left out of means. Under torchrun the
        cells are shared by the processes and every one returns them all.

    Raises:
        ReflowlensError: clean and corrupted differ in length and nothing aligns them, a cell or the metric does not fit
            the model, or the memory does not hold a single cell's run.

    Example:
        >>> import reflowlens as rl
        >>> model = rl.load_model("reflow-nano")
        >>> result = rl.sweep(model, "The king of France", "The king of China", "resid_pre", rl.metrics.kl())
        >>> result.values.shape, result.axis_names
        (torch.Size([6, 4, 1]), ['layer', 'pos'])
    """
    if mode not in MODES:
        raise ReflowlensError(f"mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}")
    hooked = hooked_model(model)
    metric = check_metric(metric)
    if results is not None and mode != "exact":
        raise ReflowlensError(f"results keeps the cells of an exact sweep: mode={mode!r} estimates them all at once")
    is_long = isinstance(clean, Prompts) and len(clean) > PROMPTS_AT_ONCE
    if is_long and results is None and _are_names(cells) and metric.takes_parts:
        options: dict[str, Any] = {"mode": mode, "steps": steps, "memory": memory, "progress": progress}
        return _in_parts(model, cast(Prompts, clean), corrupted, cells, metric, positions, options)
    setup = prepare_sweep(hooked, clean, corrupted, cells, positions)
    if mode == "exact":
        values, baseline = _exact(setup, metric, memory, results, progress)
    else:
        values, baseline = estimate_cells(setup, metric, steps_of(mode, steps), memory)
    table, missing = setup.cells, setup.missing.to(values.device)
    return PatchingResult(
        values=values.masked_fill(missing, torch.nan).reshape(*table.shape, -1),
        axis_names=table.axis_names,
        index_df=table.index,
        metric_names=[metric.name],
        reduced=False,
        baseline=baseline,
        patch_type_names=table.grids,
        missing=missing.reshape(*table.shape, -1) if bool(missing.any()) else None,
        misaligned=setup.misaligned,
    )


def _are_names(cells: CellSpec) -> bool:
    return isinstance(cells, str) or (isinstance(cells, Sequence) and all(isinstance(cell, str) for cell in cells))


def _in_parts(
    model: Any,
    prompts: Prompts,
    corrupted: TextInput | None,
    cells: CellSpec,
    metric: Metric,
    positions: Positions,
    options: dict[str, Any],
) -> PatchingResult:
    """A grid over many prompts, some at a time: what is kept of the unpatched run does not grow with their number."""
    n, parts = len(prompts), []
    for start in range(0, n, PROMPTS_AT_ONCE):
        rows = range(start, min(start + PROMPTS_AT_ONCE, n))
        own = dataclasses.replace(metric, rows=(rows, n))
        parts.append(sweep(model, prompts.select(rows), corrupted, cells, own, positions=positions, **options))
    whole = joined(parts)
    differ = any(part.misaligned for part in parts) or len({part.values.shape[:-1] for part in parts}) > 1
    return dataclasses.replace(whole, misaligned=positions is None and differ)


@torch.no_grad()
def _exact(
    setup: Setup, metric: Metric, memory: float | None, results: str | Path | None, progress: bool | None
) -> tuple[Float[Tensor, "cell prompt"], Float[Tensor, " prompt"]]:
    runs = _runs(setup, metric)
    n = len(setup.cells.cells)
    rank, world_size = processes()
    mine = range(rank, n, world_size)
    values = torch.zeros(n, len(setup.prompts), device=runs.baseline.device, dtype=runs.baseline.dtype)
    show = sys.stderr.isatty() if progress is None else progress
    identity = "" if results is None else _identity(setup, metric, runs)
    size = runs.batch_size(mine, memory)
    with (
        ResultsFile(results, identity, size, rank) as file,
        tqdm(total=len(mine), unit="cell", disable=not show) as bar,
    ):
        finished = {cell: row for cell, row in file.finished.items() if cell in mine}  # it may be of fewer processes
        for cell, row in finished.items():
            values[cell] = torch.tensor(row, dtype=values.dtype)
        bar.update(len(finished))
        size = file.batch_size if memory is None else size
        for cells, part in runs.values(mine, memory, size=size, finished=finished):
            new = [i for i, cell in enumerate(cells) if cell not in finished]
            cells = [cells[i] for i in new]
            part = part[new].masked_fill(setup.missing[cells].to(part.device), torch.nan)
            values[cells] = part
            file.add(cells, part)
            bar.update(len(cells))
    if world_size > 1:
        dist.all_reduce(values)
    return values, runs.baseline


def _runs(setup: Setup, metric: Metric) -> PackedRuns | WholeRuns:
    """Packed runs, or whole forward passes where something is attached to the model: hooks expect whole activations."""
    kind = WholeRuns if attached_points(setup.model) else PackedRuns
    model = cast(ResidualModel, setup.model)  # the readout that every architecture here has
    return kind(setup.cells.cells, Reader(model, metric, setup.prompts))


def _identity(setup: Setup, metric: Metric, runs: PackedRuns | WholeRuns) -> str:
    """What decides a sweep's values; the metric's targets show in its baseline, or in the ends of a recovery, whose
    baseline is 0 whatever they are."""
    prompts = [None if tokens is None else tokens.tolist() for tokens in (setup.prompts.clean, setup.prompts.tokens)]
    what = [
        identity_of(setup.model),
        prompts,
        metric.name,
        metric.position,
        [values.tolist() for values in runs.reader.ends or (runs.baseline,)],
        *map(to_json, setup.asked),
    ]
    return json.dumps(what)
