"""Cells of interventions run on prompts: whole, or packed as differences from the unpatched run (:mod:`.suffixes`)."""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterator, Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from reflowlens.interventions.apply import bind_all, intervene
from reflowlens.sweeps.batching import in_batches, items_within, measure_peak
from reflowlens.sweeps.grids import Cell
from reflowlens.sweeps.packed import Packed, UnpatchedRun
from reflowlens.sweeps.plans import Edit, Plan, make_plan
from reflowlens.sweeps.reading import Reader
from reflowlens.sweeps.stages import READOUT_SIGNAL
from reflowlens.sweeps.suffixes import Layout


class WholeRuns:
    """Runs a cell as one whole forward pass: what every other way has to equal."""

    def __init__(self, cells: Sequence[Cell], reader: Reader) -> None:
        self.model, self.prompts, self.cells, self.reader = reader.model, reader.prompts, cells, reader

    @property
    def baseline(self) -> Float[Tensor, " prompt"]:
        """The metric of the unpatched run."""
        return self.reader.of_logits(self.model(self.prompts.tokens))

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
            with intervene(self.model, self.cells[cell], lengths=self.prompts.lengths):
                logits = self.model(self.prompts.tokens)
            yield [cell], self.reader.of_logits(logits)[None]

    def batch_size(self, cells: Sequence[int], memory: float | None = None) -> int:
        return 1


class PackedRuns:
    """Runs cells as suffixes of the unpatched run.

    Args:
        cells: every cell that may be run.
        reader: what is read off a run.
    """

    def __init__(self, cells: Sequence[Cell], reader: Reader) -> None:
        self.model, self.reader = reader.model, reader
        self.whole = WholeRuns(cells, reader)
        bound = bind_all(self.model, cells)
        self.unpatched = UnpatchedRun(self.model, reader.prompts.tokens, {part.name for cell in bound for part in cell})
        self.baseline = reader.of_final(self.unpatched.final)
        stages, cache, prompt = self.unpatched.stages, self.unpatched.cache, reader.prompts.as_pass()
        self.plans = [make_plan(stages, cell, cache, prompt) for cell in bound]

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
        size, device = size or self.batch_size(cells, memory), self.unpatched.final.device
        run = lambda batch: self.run([plans[cell] for cell in batch])  # noqa: E731
        yield from in_batches(planned, run, device, size=size, finished=finished)
        yield from self.whole.values([cell for cell in cells if cell not in plans], finished=finished)

    def batch_size(self, cells: Sequence[int], memory: float | None = None) -> int:
        """How many cells run together, of those that are given."""
        plans = self._plans_of(cells)
        if not plans:
            return 1
        return items_within(memory, self.unpatched.final.device, self._bytes_per_cell(list(plans.values())))

    def _plans_of(self, cells: Sequence[int]) -> dict[int, Plan]:
        return {cell: plan for cell in cells if (plan := self.plans[cell]) is not None}

    def _bytes_per_cell(self, plans: Sequence[Plan]) -> int:
        """Most memory that a cell takes in a block, measured on the last one with nothing left out."""
        unpatched, stages, final = self.unpatched, self.unpatched.stages, self.unpatched.final
        squares = [edit for plan in plans for edit in plan.fired if self._is_square(edit.name)]
        points = [self.model.hook_dict[edit.name] for edit in squares[:1]]
        layout = Layout.of_suffixes(self.reader.each, torch.zeros_like(self.reader.each), final.shape[1])
        block = int(squares[0].name.split(".")[1]) if squares else self.model.cfg.n_layers - 1
        of_block = range(unpatched.first_stage(block), unpatched.first_stage(block + 1))

        def one_cell() -> Tensor:
            rows = final[layout.row, layout.position][None]
            for stage in of_block:
                rows = stages.run(stage, rows, layout, unpatched.cache)
            return rows

        for point in points:  # scores and patterns exist only when something is attached
            point.add_hook(lambda activation, hook: activation.clone())
        features = [unpatched.cache[plan.leading.name] for plan in plans if "feature" in self._axes_of(plan)]
        patched = 3 * max((activation.nbytes for activation in features), default=0)  # far wider than a block's points
        try:
            return measure_peak(one_cell, final.device)[1] + len(final) * final[0].nbytes + patched
        finally:
            for point in points:
                point.remove_hooks()

    def run(self, plans: Sequence[Plan]) -> Float[Tensor, "cell prompt"]:
        """The reader's value of each cell and prompt; the unpatched run's where the intervention changes nothing."""
        values = self.baseline.repeat(len(plans), 1)
        at_readout = [i for i, plan in enumerate(plans) if plan.leading.name == READOUT_SIGNAL]
        if at_readout:
            values[at_readout] = self._of_signals([plans[i] for i in at_readout])
        packed = self.unpatched.finish(
            self._entering(plans), is_read=self.reader.is_read, hooking=partial(self._firing, plans)
        )
        if len(packed.cell):
            prompt, resid = packed.layout.prompt, self.reader.read_packed(self.unpatched.final, packed)
            values[packed.cell, prompt] = self.reader.of_residual(resid, prompt)
        return values

    def _of_signals(self, plans: Sequence[Plan]) -> Float[Tensor, "cell prompt"]:
        """Values of cells that change the readout's signals alone."""
        patched = torch.stack([plan.leading.apply(self.unpatched.cache[READOUT_SIGNAL]) for plan in plans])
        values = self.reader.of_signals(patched.flatten(0, 1), self.reader.each.repeat(len(plans)))
        return values.unflatten(0, patched.shape[:2])

    def _entering(self, plans: Sequence[Plan]) -> dict[int, list[Packed]]:
        """The rows that differ from the unpatched run, by the stage at which they enter."""
        groups: dict[tuple[int, str, bool], list[int]] = {}  # cells whose leading edits are performed together
        for i, plan in enumerate(plans):
            if plan.leading.name != READOUT_SIGNAL:
                groups.setdefault((plan.stage, plan.leading.name, plan.direct), []).append(i)
        entering: dict[int, list[Packed]] = {}
        for (stage, _, _), cells in groups.items():
            if rows := self._rows(cells, [plans[i] for i in cells]):
                entering.setdefault(stage, []).append(rows)
        return entering

    def _rows(self, cells: list[int], plans: Sequence[Plan]) -> Packed | None:
        """Rows of cells with the same leading point, those in which a position that matters is changed."""
        unpatched, name = self.unpatched, plans[0].leading.name
        before = unpatched.cache[name]
        tried = [(cell, plan, plan.leading.change(before)) for cell, plan in zip(cells, plans, strict=True)]
        some = [(cell, plan, part) for cell, plan, part in tried if part is not None or plan.others]
        if not some:
            return None
        cells, plans = [cell for cell, _, _ in some], [plan for _, plan, _ in some]
        patched = torch.stack(
            [before if part is None else plan.leading.selection.put(before, part) for _, plan, part in some]
        )
        start = self._first_change(name, before, patched)
        for i, plan in enumerate(plans):
            for edit in plan.others:
                first = edit.first_position(len(before), unpatched.n_positions)
                start[i] = torch.minimum(start[i], first.to(start.device))
        member, prompt = (start <= self.reader.last_position).nonzero(as_tuple=True)
        if not len(member):
            return None
        if plans[0].direct:
            resid = unpatched.stages.entry(name, patched, unpatched.cache).flatten(0, 1)
            resid = resid.index_select(0, member * patched.shape[1] + prompt)
        else:
            resid = unpatched.cache[unpatched.stages.streams[plans[0].stage]].index_select(0, prompt)
        cell = torch.tensor(cells, device=member.device)[member]
        return Packed.suffixes(cell, prompt, start[member, prompt], resid)

    def _first_change(
        self, name: str, before: Float[Tensor, "prompt *rest"], after: Float[Tensor, "cell prompt *rest"]
    ) -> Int[Tensor, "cell prompt"]:
        """The first position where an activation differs; behind the last where it does not."""
        axis = 1 + self.model.hook_axes(name).index("pos")
        changed = (before != after).movedim(axis, 2).flatten(3).any(dim=-1)
        return torch.where(changed.any(dim=-1), changed.int().argmax(dim=-1), self.unpatched.n_positions)

    @contextlib.contextmanager
    def _firing(self, plans: Sequence[Plan], stage: int, packed: Packed) -> Iterator[None]:
        """Attach the edits that fire in a stage, each to its own rows of the packed activation."""
        present = set(packed.cell.tolist()) if any(plan.fired for plan in plans) else set()
        edits: dict[str, list[tuple[int, Edit]]] = {}  # by their point, each with its cell
        for cell in sorted(present):
            for edit in plans[cell].fired:
                if self.unpatched.stages.stage(edit.name) == stage:
                    edits.setdefault(edit.name, []).append((cell, edit))
        points = [self.model.hook_dict[name] for name in edits]
        for point, of_point in zip(points, edits.values(), strict=True):
            point.add_hook(partial(self._edited, of_point, packed))
        try:
            yield
        finally:
            for point in points:
                point.remove_hooks()

    def _edited(self, edits: list[tuple[int, Edit]], packed: Packed, activation: Tensor, hook: HookPoint) -> Tensor:
        """A packed activation with each cell's edit, which is performed on the point as a whole pass would have it."""
        changed, layout = activation.clone(), packed.layout
        rows_of, tokens_of, prompt = _spans(packed.cell), _spans(packed.cell[layout.row]), packed.token_prompt
        for cell, edit in edits:
            rows, tokens = rows_of[cell], tokens_of[cell]
            whole = self.unpatched.cache[edit.name].clone()
            if self.unpatched.stages.whole_rows or self._is_square(edit.name):
                whole[layout.prompt[rows]] = changed[rows]
                changed[rows] = edit.apply(whole)[layout.prompt[rows]]
            else:
                places = prompt[tokens], layout.position[tokens]
                whole[places] = changed[0, tokens]
                changed[0, tokens] = edit.apply(whole)[places]
        return changed

    def _axes_of(self, plan: Plan) -> tuple[str, ...]:
        return self.model.hook_axes(plan.leading.name)

    def _is_square(self, name: str) -> bool:
        return "key_pos" in self.model.hook_axes(name)


def _spans(owner: Int[Tensor, " item"]) -> dict[int, slice]:
    """Where the items of each owner lie; they lie together.

    >>> _spans(torch.tensor([4, 4, 2]))
    {4: slice(0, 2, None), 2: slice(2, 3, None)}
    """
    owners, counts = (x.tolist() for x in torch.unique_consecutive(owner, return_counts=True))
    ends = torch.tensor(counts).cumsum(0).tolist()
    return {key: slice(end - count, end) for key, count, end in zip(owners, counts, ends, strict=True)}
