"""Benchmarks: each a ratio of two ways of doing one thing, alternated in one process so that both meet one machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from reflowlens.config import ModelConfig
from reflowlens.models import build_model
from reflowlens.models.base import HookedModel
from reflowlens.models.components import KeyValueCache
from reflowlens.models.decoder import Unembed
from reflowlens.models.reflow import ReFlow

NANO = ModelConfig(
    architecture="reflow",
    n_layers=6,
    d_model=256,
    n_heads=4,
    d_head=64,
    d_mlp=704,
    d_vocab=16768,
    n_ctx=256,
    n_signals=256,
    tokenizer_name="gpt2_16k",
)


def run_benchmarks(which: str = "all") -> pd.DataFrame:
    """Run ``hooks``, ``decode`` or ``all``.

    Returns:
        One row a comparison: ``benchmark``, ``ours_ms``, ``other_ms`` (medians), ``ratio`` (other / ours: above 1 we
        are faster) and ``of``, what was compared.
    """
    rows: list[dict[str, Any]] = []
    if which in ("hooks", "all"):
        rows += bench_hooks()
    if which in ("decode", "all"):
        rows.append(bench_decode())
    return pd.DataFrame(rows)


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
            rows.append(_row(f"{name} {kind}", what, ours, other))
        torch.compiler.reset()
    return rows


def bench_decode(steps: int = 24) -> dict[str, Any]:
    """Decoding at batch 1 with a key-value cache, reflow_1_small: R and B in turn against forming E at each step."""
    ours = build_model("reflow_1_small")
    published = FormingReFlow(ours.cfg).eval()
    published.load_state_dict(ours.state_dict())
    prompt = torch.arange(16)[None]

    def decode(model: HookedModel) -> Tensor:
        past, tokens = KeyValueCache(model.cfg, 1), prompt
        with torch.no_grad():
            for _ in range(steps):
                tokens = model(tokens, past_kv_cache=past)[:, -1:].argmax(-1)
        return tokens

    what = f"factored readout against forming E = R B at each of {steps} steps, reflow_1_small, batch 1"
    return _row("decode", what, lambda: decode(ours), lambda: decode(published), repeats=3)


class FormingReFlow(ReFlow):
    """reFlow the published way: every pass forms E = R B and uses it at both ends."""

    def build_embedding(self, cfg: ModelConfig) -> None:
        super().build_embedding(cfg)
        self.unembed = Unembed(self)

    def tied_weights(self) -> tuple[Tensor, ...]:
        return (self.embed.W_recipe @ self.embed.W_basis,)

    def embed_tokens(self, tokens: Tensor, weights: tuple[Tensor, ...], offset: int) -> Tensor:
        return self.hook_embed(F.embedding(tokens, weights[0]))


def without_hook_points(model: HookedModel) -> HookedModel:
    """Replace every HookPoint by a bare function call, the least that can stand in its place."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, HookPoint):
                del module._modules[name]
                object.__setattr__(module, name, _Nothing())
    return model


class _Nothing:
    fwd_hooks = bwd_hooks = ()

    def __call__(self, x: Tensor) -> Tensor:
        return x


def _row(
    benchmark: str, of: str, ours: Callable[[], object], other: Callable[[], object], repeats: int = 9
) -> dict[str, Any]:
    """Medians of alternating calls after one warm-up of each."""
    times: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats + 1):
        for function, record in zip((ours, other), times, strict=True):
            began = time.perf_counter()
            function()
            if repeat:
                record.append(time.perf_counter() - began)
    a, b = (1000 * statistics.median(record) for record in times)
    return {"benchmark": benchmark, "ours_ms": round(a, 2), "other_ms": round(b, 2), "ratio": round(b / a, 3), "of": of}
