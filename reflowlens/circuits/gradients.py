"""Attribution patching: what an intervention would do, from gradients instead of performing it.

To first order an intervention that changes an activation from a to a' changes the metric by (a' - a) · ∂metric/∂a. One
forward and one backward pass give the gradient at every point, so thousands of cells cost as much as one (Nanda, 2023,
"Attribution Patching: Activation Patching At Industrial Scale"). Taken at the corrupted run alone, the gradient misses
what saturates on the way to the clean run; the mean over runs whose input lies between the two does not (integrated
gradients: Hanna et al., 2024, arXiv 2403.17806, the variant that interpolates inputs). Of a pair of equal length every
token's input goes on the way; of another, those at the positions that align the two, and the others stay as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from reflowlens.arguments import number_of_runs
from reflowlens.errors import ReflowlensError
from reflowlens.interventions.apply import Bound, apply, bind_all, new_part, resolve
from reflowlens.interventions.selection import Selection
from reflowlens.interventions.selectors import Prompt, is_each
from reflowlens.interventions.values import Ablate, Patch, Replace, Scale
from reflowlens.metrics import Metric
from reflowlens.models.decoder import Decoder
from reflowlens.sweeps.alignment import SAY_WHICH, Positions, at_partners, is_left, partners
from reflowlens.sweeps.batching import in_batches
from reflowlens.sweeps.reading import Reader, check_readout_is_free
from reflowlens.sweeps.run_prompts import RunPrompts
from reflowlens.sweeps.setup import Setup

Row = tuple[int, float]  # a prompt, and how far its input is on the way from the corrupted one (0) to the clean one (1)


@torch.inference_mode(False)
def estimate_cells(
    setup: Setup, metric: Metric, steps: int | None, memory: float | None = None
) -> tuple[Float[Tensor, "cell prompt"], Float[Tensor, " prompt"]]:
    """The metric under each cell's interventions, to first order around the corrupted run.

    The value of a cell is ``baseline + Σ (after - before) · gradient`` over the points that it intervenes on, where
    ``before`` is the corrupted run's activation and ``after`` the same with the cell's interventions on it.

    Args:
        steps: number of runs between corrupted and clean inputs whose gradients are averaged; None takes the gradient
            at the corrupted run.

    Returns:
        values [cell, prompt], NaN where a prompt lacks the cell's position, and baseline [prompt], the metric of the
        corrupted run.

    Raises:
        ReflowlensError: there is nothing to interpolate to, or a selector does not fit.
    """
    model = cast(Decoder, setup.model)
    runs = GradientRuns(model, metric, setup.prompts, setup.positions)
    cells = bind_all(model, setup.cells.cells)
    names = sorted({bound.name for cell in cells for bound in cell})
    gradients = runs.mean_gradients(names, steps, memory)
    with torch.no_grad():
        tokens = setup.prompts.tokens
        _, cache = model.run_with_cache(tokens, names_filter=names, return_type=None, return_cache_object=False)
        points = {name: Slope(model, name, cache[name], gradients[name]) for name in names}
        prompt = setup.prompts.as_pass()
        values = [runs.baseline + _estimate(model, cell, points, prompt) for cell in cells]
    found = torch.stack(values)
    return found.masked_fill(setup.missing.to(found.device), torch.nan), runs.baseline


def _estimate(
    model: Decoder, cell: Sequence[Bound], points: dict[str, Slope], prompt: Prompt
) -> Float[Tensor, " prompt"] | float:
    by_point: dict[str, list[tuple[Bound, Selection]]] = {}
    for bound in cell:
        selection = resolve(model, bound, points[bound.name].activation.shape, prompt)
        assert selection is not None  # None is for generation
        by_point.setdefault(bound.name, []).append((bound, selection))
    return sum(points[name].estimate(edits) for name, edits in by_point.items())


class Slope:
    """The corrupted run's activation at a point, and the metric's gradient there.

    Args:
        activation: as the point has it; gradient: the same with the prompt as its first axis.
    """

    def __init__(self, model: Decoder, name: str, activation: Tensor, gradient: Float[Tensor, "prompt *rest"]) -> None:
        self.axes, self.activation, self.gradient = model.hook_axes(name), activation, gradient
        self._products: dict[tuple[Any, ...], Tensor] = {}

    def estimate(self, edits: Sequence[tuple[Bound, Selection]]) -> Float[Tensor, " prompt"]:
        """The first-order effect of interventions, one after the other."""
        bound, selection = edits[0]
        if len(edits) == 1 and "batch" in self.axes and _acts_place_by_place(bound, self.activation):
            return selection.where_counted(selection.get(self._product(bound)), 0.0).flatten(1).sum(dim=1)
        if len(edits) == 1 and is_each(bound.intervention.position):  # a few places: not the whole point
            part = new_part(bound, selection, self.activation)
            before, slope = selection.get(self.activation), selection.get(self.gradient)
            return selection.where_counted(_change(part, before, slope), 0.0).flatten(1).sum(dim=1)
        after = self.activation
        for bound, selection in edits:
            after = apply(bound, selection, after)
        return self._times_gradient(after).flatten(1).sum(dim=1)

    def _product(self, bound: Bound) -> Tensor:
        """(after - before) · gradient where the intervention acts on the whole point; a cell's estimate sums a part."""
        intervention, source = bound.intervention, bound.source
        what = (getattr(intervention, name, None) for name in ("by", "from_position", "factor", "value"))
        key = (intervention.kind, id(source), *what)
        if key not in self._products:
            everything = Selection(self.axes, slice(None), slice(None), slice(None))
            self._products[key] = self._times_gradient(apply(bound, everything, self.activation))
        return self._products[key]

    def _times_gradient(self, after: Tensor) -> Float[Tensor, "prompt *rest"]:
        return _change(after, self.activation, self.gradient)


def _change(after: Tensor, before: Tensor, gradient: Tensor) -> Tensor:
    """(after - before) · gradient, element by element; a masked score of -inf has no gradient."""
    return torch.where(gradient == 0, 0.0, (after.float() - before.float()) * gradient)


def _acts_place_by_place(bound: Bound, activation: Tensor) -> bool:
    """Whether the new value at a place is the same whatever else is selected."""
    intervention, source = bound.intervention, bound.source
    if is_each(intervention.position):
        return False
    if source is not None and source.shape[-1] != activation.shape[-1]:  # squares of prompts of another length
        return False
    if isinstance(intervention, Patch):
        assert source is not None
        return intervention.from_position is not None or source.shape[1:] == activation.shape[1:]
    if isinstance(intervention, Ablate):
        return intervention.by != "resample"
    if isinstance(intervention, Replace):
        return isinstance(intervention.value, int | float)
    return isinstance(intervention, Scale)


@dataclass(frozen=True)
class InputPath:
    """The straight way from the corrupted inputs to the clean ones, at the first point that is linear in the embedding.

    Args:
        point: ``hook_recipe`` where there is one (the embedding is linear in the recipe), else ``hook_embed``.
    """

    point: str
    corrupted: Float[Tensor, "prompt pos feature"]
    clean: Float[Tensor, "prompt pos feature"] | None

    def at(self, prompts: Int[Tensor, " row"], shares: Float[Tensor, " row"]) -> Float[Tensor, "row pos feature"]:
        start = self.corrupted[prompts]
        if self.clean is None:
            return start
        return torch.lerp(start, self.clean[prompts], shares.to(start.dtype)[:, None, None])


def steps_of(mode: str, steps: int) -> int | None:
    """How many runs are averaged: those of integrated gradients, none of a gradient.

    Raises:
        ReflowlensError: they are no positive integer.
    """
    return number_of_runs(steps, "steps of integrated gradients", 1) if mode == "integrated" else None


class GradientRuns:
    """Gradients of a metric with respect to activations, at the corrupted run or on the way to the clean one.

    Args:
        positions: what aligns clean and corrupted prompts; see :mod:`reflowlens.sweeps.alignment`.

    Attributes:
        baseline: the metric of the corrupted run, [prompt].
    """

    @torch.no_grad()
    def __init__(self, model: Decoder, metric: Metric, prompts: RunPrompts, positions: Positions = None) -> None:
        self.model, self.metric, self.tokens = model, metric, prompts.tokens
        check_readout_is_free(model)
        self.reader = Reader(model, metric, prompts)
        point = "hook_recipe" if "hook_recipe" in model.hook_dict else "hook_embed"
        cache, hooks, _ = model.get_caching_hooks(point)
        with model.hooks(hooks):
            self.baseline = self.reader.of_final(model.final_stream(self.tokens))
        target, self.is_aligned = None, prompts.is_even or not is_left(positions)
        if prompts.clean is not None and self.is_aligned:
            _, clean = model.run_with_cache(prompts.clean, names_filter=point, return_type=None, stop_at_layer=0)
            target = at_partners(cache[point], clean[point], _on_the_way(model, prompts, positions))
        self.path = InputPath(point, cache[point], target)

    def rows(self, steps: int | None) -> list[Row]:
        """The runs of every prompt: the corrupted one, or the midpoints of ``steps`` equal parts of the way.

        Raises:
            ReflowlensError: there is no clean run to go to.
        """
        if steps is None:
            return [(prompt, 0.0) for prompt in range(len(self.tokens))]
        if not self.is_aligned:
            raise ReflowlensError(
                "integrated gradients go from the corrupted input to the clean one, and these differ in length: "
                f"{SAY_WHICH}; mode='gradient' and 'exact' need no way between them"
            )
        if self.path.clean is None:
            raise ReflowlensError("integrated gradients go from the corrupted prompts to the clean ones: give these")
        if self.model.stages == "whole":
            raise ReflowlensError(
                f"integrated gradients go along {self.path.point!r}, and blocks of a {type(self.model).__name__} read "
                "tokens elsewhere too: use mode='gradient', or 'exact'"
            )
        return [(prompt, (step + 0.5) / steps) for step in range(steps) for prompt in range(len(self.tokens))]

    def mean_gradients(
        self, names: Sequence[str], steps: int | None, memory: float | None = None
    ) -> dict[str, Float[Tensor, "prompt ..."]]:
        """Gradients at some points, averaged over each prompt's runs; the prompt comes first on every point."""
        totals: dict[str, Tensor] = {}
        device, n_prompts = self.tokens.device, len(self.tokens)
        for rows, gradients in in_batches(self.rows(steps), lambda rows: self.gradients(names, rows), device, memory):
            prompts = torch.tensor([prompt for prompt, _ in rows], device=device)
            for name, gradient in gradients.items():
                total = totals.setdefault(
                    name, torch.zeros(n_prompts, *gradient.shape[1:], device=device, dtype=torch.float32)
                )
                total.index_add_(0, prompts, gradient.float() / (steps or 1))
        return totals

    def gradients(self, names: Sequence[str], rows: Sequence[Row]) -> dict[str, Float[Tensor, "row ..."]]:
        """The gradient of each row's own metric at some points."""
        prompts = torch.tensor([prompt for prompt, _ in rows], device=self.tokens.device)
        shares = torch.tensor([share for _, share in rows], device=self.tokens.device, dtype=torch.float32)
        shared = [name for name in names if "batch" not in self.model.hook_axes(name)]  # one activation for all rows
        own = [name for name in names if name not in shared]
        values, fired = self._values(names, prompts, shares, basis_is_wanted=bool(shared))
        tensors = [tensor for name in own for tensor in fired[name]]
        found = torch.autograd.grad(values.sum(), tensors, retain_graph=True, materialize_grads=True) if own else ()
        gradients = dict(zip(own, found, strict=True))
        for name in own:
            if name.startswith(("ln_final.", "unembed.")):  # they saw the positions that are read
                gradients[name] = _at_positions(gradients[name], self.reader.positions[prompts], self.tokens.shape[1])
        for name in shared:  # a backward pass for each row
            each = [torch.autograd.grad(value, fired[name], retain_graph=True) for value in values]
            gradients[name] = torch.stack([torch.stack(parts).sum(dim=0) for parts in each])
        return gradients

    def _values(
        self,
        names: Sequence[str],
        prompts: Int[Tensor, " row"],
        shares: Float[Tensor, " row"],
        basis_is_wanted: bool,
    ) -> tuple[Float[Tensor, " row"], dict[str, list[Tensor]]]:
        """Each row's metric, and the activations of some points that autograd can go back to from it.

        Positions behind the last that a metric reads cannot matter, and are zeros here: what overflows there would come
        back from a norm or a softmax as 0 · inf, and through attention to the positions before it.
        """
        model = self.model
        behind = torch.arange(self.tokens.shape[1], device=prompts.device) > self.reader.last_position[prompts, None]
        inputs = self.path.at(prompts, shares).masked_fill(behind[..., None], 0.0).requires_grad_()
        fired: dict[str, list[Tensor]] = {name: [] for name in names}

        def start(activation: Tensor, hook: HookPoint) -> Tensor:
            return inputs

        def finite(stream: Tensor, hook: HookPoint) -> Tensor:
            return stream.masked_fill(behind[..., None], 0.0)

        def keep(activation: Tensor, hook: HookPoint) -> Tensor:
            kept = activation if activation.requires_grad else activation.detach().requires_grad_()
            fired[str(hook.name)].append(kept)
            return kept

        streams = [name for name in model.hook_dict if name.endswith((".hook_resid_pre", ".hook_resid_mid"))]
        hooks = [(self.path.point, start), *[(name, finite) for name in streams if bool(behind.any())]]
        hooks += [(name, keep) for name in names]
        with torch.enable_grad(), model.hooks(hooks):
            final = model.final_stream(self.tokens[prompts])
            reader = copy.copy(self.reader)
            if basis_is_wanted:  # it is used at both ends of a run
                reader.weights = model.tied_weights()
            values = reader.of_residual(reader.read(final, prompts), prompts)
        if not values.requires_grad:
            raise ReflowlensError(f"{self.metric.name} has no gradient: use mode='exact', or a smooth metric")
        return values, fired


def _on_the_way(model: Decoder, prompts: RunPrompts, positions: Positions) -> Int[Tensor, "prompt pos"] | None:
    """The clean position whose input each corrupted one goes to, pair by pair, so that each is as it is alone."""
    if prompts.is_even:
        return None
    device = prompts.tokens.device
    aligned, index = partners(model, prompts, positions), torch.arange(prompts.tokens.shape[1], device=device)
    assert aligned is not None  # None is for pairs of equal length
    lengths, clean_lengths = (torch.tensor(x, device=device)[:, None] for x in (prompts.lengths, prompts.clean_lengths))
    token_by_token = index.expand(len(lengths), -1).masked_fill(index >= lengths, -1)
    return torch.where(lengths == clean_lengths, token_by_token, aligned)


def _at_positions(
    gradient: Float[Tensor, "row read feature"], read: Int[Tensor, "row read"], n_positions: int
) -> Float[Tensor, "row pos feature"]:
    whole = gradient.new_zeros(len(gradient), n_positions, gradient.shape[-1])
    return whole.scatter(1, read[..., None].expand_as(gradient), gradient)
