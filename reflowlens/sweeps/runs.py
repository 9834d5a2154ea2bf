"""Cells of interventions run on prompts: whole, or packed as differences from the unpatched run (:mod:`.suffixes`)."""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from reflowlens.interventions.apply import bind_all, intervene
from reflowlens.interventions.selectors import Prompt
from reflowlens.models.base import HookedModel
from reflowlens.models.residual import ResidualModel
from reflowlens.sweeps.batching import in_batches, items_within, measure_peak
from reflowlens.sweeps.grids import Cell
from reflowlens.sweeps.plans import Edit, Plan, make_plan
from reflowlens.sweeps.reading import Reader
from reflowlens.sweeps.stages import READOUT_SIGNAL, stages_of
from reflowlens.sweeps.suffixes import Layout


class Rows(NamedTuple):
    """Rows that enter a pass together: whose they are, where they begin, and the residual stream there in full."""

    cell: Int[Tensor, " row"]
    prompt: Int[Tensor, " row"]
    start: Int[Tensor, " row"]
    resid: Float[Tensor, "row pos d_model"]


class WholeRuns:
    """Runs a cell as one whole forward pass: what every other way has to equal."""

    def __init__(
        self,
        model: HookedModel,
        tokens: Int[Tensor, "prompt pos"],
        lengths: Sequence[int],
        cells: Sequence[Cell],
        reader: Reader,
    ) -> None:
        self.model, self.tokens, self.lengths, self.cells, self.reader = model, tokens, lengths, cells, reader

    @property
    def baseline(self) -> Float[Tensor, " prompt"]:
        """The metric of the unpatched run."""
        return self.reader.of_logits(self.model(self.tokens))

    def values(
        self,
        cells: Sequence[int],
        memory: float | None = None,
        *,
        size: int | None = None,
        finished: Container[int] = (),
    ) -> Iterator[tuple[list[int], Float[Tensor, "cell prompt"]]]:
        """Values of some cells, those that are not known, one after the other."""
        for cell in cells:
            if cell in finished:
                continue
            with intervene(self.model, self.cells[cell], lengths=self.lengths):
                logits = self.model(self.tokens)
            yield [cell], self.reader.of_logits(logits)[None]

    def batch_size(self, cells: Sequence[int], memory: float | None = None) -> int:
        return 1


class PackedRuns:
    """Runs cells as suffixes of the unpatched run.

    Args:
        cells: every cell that may be run.
        reader: what is read off a run.
    """

    def __init__(
        self,
        model: ResidualModel,
        tokens: Int[Tensor, "prompt pos"],
        lengths: Sequence[int],
        cells: Sequence[Cell],
        reader: Reader,
    ) -> None:
        self.model, self.reader = model, reader
        self.whole = WholeRuns(model, tokens, lengths, cells, reader)
        self.n_positions = tokens.shape[1]
        self.stages = stages_of(model)
        bound = bind_all(model, cells)
        patched = {part.name for cell in bound for part in cell}
        needed = {point for name in patched for point in self.stages.needed_for_entry(name)}
        names = sorted({*patched, *needed, *self.stages.streams, *self.stages.remembered})
        _, self.cache = model.run_with_cache(tokens, names_filter=names, return_type=None, return_cache_object=False)
        self.final = self.cache[self.stages.streams[-1]]
        self.baseline = reader.of_residual(reader.read(self.final), reader.prompts)
        prompt = Prompt(self.n_positions, tokens, lengths)
        self.plans = [make_plan(self.stages, cell, self.cache, prompt) for cell in bound]

    def values(
        self,
        cells: Sequence[int],
        memory: float | None = None,
        *,
        size: int | None = None,
        finished: Container[int] = (),
    ) -> Iterator[tuple[list[int], Float[Tensor, "cell prompt"]]]:
        """Values of some cells, a batch at a time.

        Args:
            memory: bytes of a batch.
            size: cells of a batch; default: as many as ``memory`` holds (:meth:`batch_size`).
            finished: cells whose values are known; a batch with others among them is run whole.
        """
        plans = self._plans_of(cells)
        planned = sorted(plans, key=lambda cell: plans[cell].stage)
        size, device = size or self.batch_size(cells, memory), self.final.device
        run = lambda batch: self.run([plans[cell] for cell in batch])  # noqa: E731
        yield from in_batches(planned, run, device, size=size, finished=finished)
        yield from self.whole.values([cell for cell in cells if cell not in plans], finished=finished)

    def batch_size(self, cells: Sequence[int], memory: float | None = None) -> int:
        """How many cells run together, of those that are given."""
        plans = self._plans_of(cells)
        return items_within(memory, self.final.device, self._bytes_per_cell(list(plans.values()))) if plans else 1

    def _plans_of(self, cells: Sequence[int]) -> dict[int, Plan]:
        return {cell: plan for cell in cells if (plan := self.plans[cell]) is not None}

    def _bytes_per_cell(self, plans: Sequence[Plan]) -> int:
        """Most memory that a cell takes in a block, measured on the last one with nothing left out."""
        n_prompts = len(self.final)
        squares = [edit for plan in plans for edit in plan.fired if self._is_square(edit.name)]
        points = [self.model.hook_dict[edit.name] for edit in squares[:1]]
        layout = Layout.of_suffixes(self.reader.prompts, torch.zeros_like(self.reader.prompts), self.n_positions)
        block = int(squares[0].name.split(".")[1]) if squares else self.model.cfg.n_layers - 1
        stages = range(block * self.stages.per_block, (block + 1) * self.stages.per_block)

        def one_cell() -> Tensor:
            rows = self.final[layout.row, layout.position][None]
            for stage in stages:
                rows = self.stages.run(stage, rows, layout, self.cache)
            return rows

        for point in points:  # scores and patterns exist only when something is attached
            point.add_hook(lambda activation, hook: activation.clone())
        try:
            return measure_peak(one_cell, self.final.device)[1] + n_prompts * self.final[0].nbytes
        finally:
            for point in points:
                point.remove_hooks()

    def run(self, plans: Sequence[Plan]) -> Float[Tensor, "cell prompt"]:
        """The reader's value of each cell and prompt; the unpatched run's where the intervention changes nothing."""
        values = self.baseline.repeat(len(plans), 1)
        entering = self._entering(plans, values)
        layout = Layout.empty(self.n_positions, self.final.device)
        cell, resid = layout.prompt, self.final.new_empty(1, 0, self.final.shape[-1])
        readout = len(self.stages.streams) - 1
        for at in range(readout + 1):
            for rows in entering.get(at, []):
                joining = Layout.of_suffixes(rows.prompt, rows.start, self.n_positions)
                layout, cell = layout.extended(joining), torch.cat([cell, rows.cell])
                resid = torch.cat([resid, rows.resid[joining.row, joining.position][None]], dim=1)
            if at == readout or not len(cell):
                continue
            with self._edits(at, plans, layout, cell):
                resid = self.stages.run(at, resid, layout, self.cache)
            if at == self.stages.last_mixing:  # what follows treats each position by itself: only those read matter
                keep = self.reader.column[layout.prompt[layout.row], layout.position] >= 0
                layout, resid = layout.kept(keep), resid[:, keep]
        if len(cell):
            values[cell, layout.prompt] = self.reader.of_residual(self._read(layout, resid), layout.prompt)
        return values

    def _entering(self, plans: Sequence[Plan], values: Float[Tensor, "cell prompt"]) -> dict[int, list[Rows]]:
        """Rows by the stage at which they enter; those that are decided at the readout go into ``values`` at once."""
        groups: dict[tuple[int, str, bool], list[int]] = {}
        for i, plan in enumerate(plans):
            groups.setdefault((plan.stage, plan.leading.name, plan.direct), []).append(i)
        entering: dict[int, list[Rows]] = {}
        for (at, name, direct), members in groups.items():
            before = self.cache[name]
            patched = torch.stack([plans[i].leading.apply(before) for i in members])
            if name == READOUT_SIGNAL:
                signals = patched.flatten(0, 1)
                prompts = self.reader.prompts.repeat(len(members))
                values[members] = self.reader.of_signals(signals, prompts).unflatten(0, patched.shape[:2])
                continue
            start = self._first_change(name, before, patched)
            for place, i in enumerate(members):
                for edit in plans[i].others:
                    first = edit.first_position(len(before), self.n_positions)
                    start[place] = torch.minimum(start[place], first.to(start.device))
            row, prompt = (start <= self.reader.last_position).nonzero(as_tuple=True)
            if not len(row):
                continue
            if direct:
                resid = self.stages.entry(name, patched, self.cache)[row, prompt]
            else:
                resid = self.cache[self.stages.streams[at]][prompt]
            cell = torch.tensor(members, device=row.device)[row]
            entering.setdefault(at, []).append(Rows(cell, prompt, start[row, prompt], resid))
        return entering

    def _first_change(
        self, name: str, before: Float[Tensor, "prompt *rest"], after: Float[Tensor, "cell prompt *rest"]
    ) -> Int[Tensor, "cell prompt"]:
        """The first position where an activation differs; behind the last where it does not."""
        axis = 1 + self.model.hook_axes(name).index("pos")
        changed = (before != after).movedim(axis, 2).flatten(3).any(dim=-1)
        return torch.where(changed.any(dim=-1), changed.int().argmax(dim=-1), self.n_positions)

    @contextlib.contextmanager
    def _edits(self, at: int, plans: Sequence[Plan], layout: Layout, cell: Int[Tensor, " row"]) -> Iterator[None]:
        """Attach the edits that fire in a stage, each to its own rows of the packed activation."""
        present = set(cell.tolist()) if any(plan.fired for plan in plans) else set()
        fired: dict[str, list[tuple[int, Edit]]] = {}
        for i in sorted(present):
            for edit in plans[i].fired:
                if self.stages.stage(edit.name) == at:
                    fired.setdefault(edit.name, []).append((i, edit))
        points = [self.model.hook_dict[name] for name in fired]
        for point, edits in zip(points, fired.values(), strict=True):
            point.add_hook(partial(self._apply, edits, layout, cell))
        try:
            yield
        finally:
            for point in points:
                point.remove_hooks()

    def _apply(
        self,
        edits: list[tuple[int, Edit]],
        layout: Layout,
        cell: Int[Tensor, " row"],
        activation: Tensor,
        hook: HookPoint,
    ) -> Tensor:
        changed = activation.clone()
        rows_of = _spans(cell)
        tokens_of = _spans(cell[layout.row])
        for i, edit in edits:
            rows, tokens = rows_of[i], tokens_of[i]
            whole = self.cache[edit.name].clone()
            if self.stages.whole_rows or self._is_square(edit.name):
                whole[layout.prompt[rows]] = changed[rows]
                changed[rows] = edit.apply(whole)[layout.prompt[rows]]
            else:
                places = layout.prompt[layout.row[tokens]], layout.position[tokens]
                whole[places] = changed[0, tokens]
                changed[0, tokens] = edit.apply(whole)[places]
        return changed

    def _is_square(self, name: str) -> bool:
        return "key_pos" in self.model.hook_axes(name)

    def _read(self, layout: Layout, resid: Float[Tensor, "1 token d_model"]) -> Float[Tensor, "row read d_model"]:
        """The last residual stream of each row at the positions that are read."""
        whole = self.final[layout.prompt[:, None], self.reader.positions[layout.prompt]]
        column = self.reader.column[layout.prompt[layout.row], layout.position]
        is_read = column >= 0
        whole[layout.row[is_read], column[is_read]] = resid[0, is_read]
        return whole


def _spans(owner: Int[Tensor, " item"]) -> dict[int, slice]:
    """Where the items of each owner lie; they lie together.

    >>> _spans(torch.tensor([4, 4, 2]))
    {4: slice(0, 2, None), 2: slice(2, 3, None)}
    """
    owners, counts = (x.tolist() for x in torch.unique_consecutive(owner, return_counts=True))
    ends = torch.tensor(counts).cumsum(0).tolist()
    return {key: slice(end - count, end) for key, count, end in zip(owners, counts, ends, strict=True)}
