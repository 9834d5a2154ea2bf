"""What HookPoints cost."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from reflowlens.benchmarks.timing import comparison
from reflowlens.benchmarks.variants import NANO, without_hook_points
from reflowlens.models import build_model


def bench_hooks(batch: int = 8, context: int = 128) -> list[dict[str, Any]]:
    """A forward and a training step of a nano-sized reFlow with HookPoints against the same weights without them."""
    tokens = torch.randint(NANO.d_vocab, (batch, context), generator=torch.Generator().manual_seed(0))
    rows = []
    for compiled in (False, True):
        models = [build_model(NANO), without_hook_points(build_model(NANO))]
        calls = [torch.compile(model) if compiled else model for model in models]
        name = "compiled" if compiled else "eager"

        def forward(call: Callable[..., Tensor]) -> None:
            with torch.no_grad():
                call(tokens, "loss")

        def step(call: Callable[..., Tensor]) -> None:
            call(tokens, "loss").backward()

        what = f"HookPoints against none, nano reFlow, batch {batch}x{context}"
        for kind, function in (("forward", forward), ("training step", step)):
            ours, other = (partial(function, call) for call in calls)
            rows.append(comparison(f"{name} {kind}", what, ours, other))
        torch.compiler.reset()
    return rows
