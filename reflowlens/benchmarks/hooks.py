"""What HookPoints cost where nothing is attached to them, and what keeping activations costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from reflowlens.benchmarks.table import Row
from reflowlens.benchmarks.timing import comparison
from reflowlens.benchmarks.variants import NANO, without_hook_points
from reflowlens.config import ModelConfig
from reflowlens.models import build_model

_SHAPES = ((1, 16), (8, 128))  # [batch, context]: one where Python's share of a pass shows, and one as in training


def bench_hooks(
    cfg: ModelConfig = NANO,
    shapes: Sequence[tuple[int, int]] = _SHAPES,
    *,
    compiled: bool = True,
    rounds: int = 25,
) -> Iterator[Row]:
    """A forward pass and a training step with HookPoints against the same weights without them, and ``run_with_cache``
    at its default points against the forward pass.

    Args:
        compiled: measure the first two through ``torch.compile`` too, which takes minutes, at the last shape.

    Yields:
        A row a comparison: ``ours_ms`` and ``other_ms`` (medians), ``ratio`` (median of other / ours over the rounds:
        above 1 ours is faster), ``difference`` (largest between losses, gradients or logits) and ``of``.
    """
    ours, bare = build_model(cfg), without_hook_points(build_model(cfg))
    for batch, context in shapes:
        tokens = torch.randint(cfg.d_vocab, (batch, context), generator=torch.Generator().manual_seed(0))
        what = f"batch {batch} × {context}, {cfg.architecture}"
        yield from _against_bare(ours, bare, tokens, f"eager, {what}", rounds)
        forward = partial(torch.no_grad()(ours), tokens)
        cached = partial(torch.no_grad()(ours.run_with_cache), tokens)
        gap = float((cached()[0] - forward()).abs().max())
        yield comparison(f"run_with_cache against the forward pass, {what}", cached, forward, rounds, difference=gap)
    if compiled:
        with_points, without = torch.compile(ours), torch.compile(bare)
        yield from _against_bare(with_points, without, tokens, f"compiled, {what}", rounds)
        torch.compiler.reset()


def _against_bare(ours: Any, bare: Any, tokens: Tensor, what: str, rounds: int) -> Iterator[Row]:
    def forward(model: Callable[..., Tensor]) -> Tensor:
        with torch.no_grad():
            return model(tokens, "loss")

    def step(model: Any) -> list[Tensor]:
        model.zero_grad()
        model(tokens, "loss").backward()
        return [parameter.grad for parameter in model.parameters()]

    loss = float((forward(ours) - forward(bare)).abs())
    gradient = max(float((a - b).abs().max()) for a, b in zip(step(ours), step(bare), strict=True))
    for name, call, gap in (("forward pass", forward, loss), ("training step", step, gradient)):
        of = f"{name} with HookPoints against none, {what}"
        yield comparison(of, partial(call, ours), partial(call, bare), rounds, difference=gap)
