"""What statistics of activations, a loss and counts of units cost beside the forward passes that they take."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor

from reflowlens.activations.collect import collect
from reflowlens.benchmarks.table import Row
from reflowlens.benchmarks.timing import comparison
from reflowlens.benchmarks.variants import NANO
from reflowlens.config import ModelConfig
from reflowlens.models import build_model
from reflowlens.models.base import HookedModel

_ROWS = 8  # that `reflowlens units` reads at once


def bench_collection(cfg: ModelConfig = NANO, batch: int = 16, batches: int = 4, rounds: int = 5) -> Iterator[Row]:
    """``collect``, evaluation and ``units`` over random batches of a full context, and bare forward passes over the
    same.

    Yields:
        Rows as of :func:`~reflowlens.benchmarks.timing.comparison`: the ratio is that of tokens a second, a bare pass's
        being 1. The bare pass of ``collect`` ends at the layer whose activations are kept; that of the evaluation has
        a loss; of units, which read a text twice, it is two passes. ``difference`` is that of the means, of the losses,
        and of the firing rates.
    """
    model, generator = build_model(cfg).eval(), torch.Generator().manual_seed(0)
    tokens = torch.randint(cfg.d_vocab, (batches, batch, cfg.n_ctx + 1), generator=generator)
    inputs, targets = tokens[..., :-1].contiguous(), tokens[..., 1:].contiguous()
    point = f"blocks.{cfg.n_layers // 2}.hook_resid_post"

    @torch.no_grad()
    def bare() -> None:
        for x in inputs:
            model(x, stop_at_layer=cfg.n_layers // 2 + 1)

    @torch.no_grad()
    def losses() -> Tensor:
        return torch.stack([model(x, "loss", targets=y) for x, y in zip(inputs, targets, strict=True)])

    with torch.no_grad():
        streams = [model.run_with_cache(x, return_type=None, names_filter=point)[1][point] for x in inputs]
    expected = torch.cat(streams).flatten(0, 1).double().mean(0)
    kept = partial(collect, model, names=point, progress=False)
    gap = float((torch.as_tensor(kept(iter(inputs), statistics="mean")[point].mean) - expected).abs().max())
    what = f"{batches} batches of {batch} × {cfg.n_ctx}, {cfg.architecture}"
    yield comparison(
        f"collect, mean, {what}", lambda: kept(iter(inputs), statistics="mean"), bare, rounds, difference=gap
    )
    yield comparison(f"collect, covariance, {what}", lambda: kept(iter(inputs), statistics="covariance"), bare, rounds)
    yield comparison(f"collect, top, {what}", lambda: kept(iter(inputs), statistics="top"), bare, rounds)
    evaluated = partial(_evaluated, model, inputs, targets)
    gap = abs(evaluated() - float(losses().mean()))
    yield comparison(f"evaluate, {what}", evaluated, losses, rounds, difference=gap)
    yield _units(model, inputs, rounds, what)


def _evaluated(model: HookedModel, inputs: Tensor, targets: Tensor) -> float:
    from pretraining.evaluate import summed_loss

    total, n = summed_loss(model, zip(inputs, targets, strict=True))
    return total / n


def _units(model: HookedModel, inputs: Int[Tensor, "batches batch pos"], rounds: int, what: str) -> Row:
    from analyses.units.counts import count_units
    from analyses.units.points import default_points

    points, rows = default_points(model), inputs.flatten(0, 1)
    counted = partial(count_units, model, rows, points, batch_size=_ROWS)

    @torch.no_grad()
    def bare() -> None:
        for x in 2 * rows.split(_ROWS):
            model(x, return_type=None)

    with torch.no_grad():
        caches = [model.run_with_cache(x, return_type=None, names_filter=points)[1] for x in inputs]
    found = counted()
    gap = max(
        float((torch.stack([(cache[point] > 0).double().mean((0, 1)) for cache in caches]).mean(0) - rates).abs().max())
        for point, rates in ((point, found[point].rate) for point in points)
    )
    return comparison(f"units, {what}", counted, bare, rounds, difference=gap)
