"""What decoding with R and B in turn gains over forming E = R B."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from reflowlens.benchmarks.table import Row
from reflowlens.benchmarks.timing import comparison
from reflowlens.benchmarks.variants import forming
from reflowlens.models import build_model
from reflowlens.models.attention import KeyValueCache
from reflowlens.models.base import HookedModel


def bench_decode(steps: int = 24, rounds: int = 3) -> Iterator[Row]:
    """Decoding at batch 1 with a key-value cache, reflow_1_small: R and B in turn against forming E at each step.

    Yields:
        A row as of :func:`~reflowlens.benchmarks.timing.comparison`; ``difference`` between the last logits.
    """
    ours = build_model("reflow_1_small")
    published = forming(ours).eval()
    prompt = torch.arange(16)[None]

    def decode(model: HookedModel) -> Tensor:
        past, tokens = KeyValueCache(model.cfg, 1), prompt
        with torch.no_grad():
            for _ in range(steps):
                logits = model(tokens, past_kv_cache=past)[:, -1:]
                tokens = logits.argmax(-1)
        return logits

    gap = float((decode(ours) - decode(published)).abs().max())
    what = f"factored readout against forming E = R B at each of {steps} steps, reflow_1_small, batch 1"
    yield comparison(what, lambda: decode(ours), lambda: decode(published), rounds, difference=gap)
