"""What scoring sentences of all lengths costs beside a forward pass with a loss over rows without padding."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from reflowlens.benchmarks.table import Row
from reflowlens.benchmarks.timing import alternate, ratio
from reflowlens.benchmarks.variants import NANO
from reflowlens.config import ModelConfig
from reflowlens.models import build_model
from reflowlens.scoring.score import score

_LENGTHS = (8, 40)  # tokens of a sentence
_ROWS = 32  # tokens of a row of the bare pass


def bench_score(cfg: ModelConfig = NANO, sentences: int = 200, batch: int = 32, rounds: int = 5) -> Iterator[Row]:
    """``rl.score`` of random sentences of 8 to 40 tokens, and ``model(tokens, "loss")`` of as many tokens in full rows.

    Yields:
        A row: ``tokens`` of all sentences, ``ours_tokens_per_s`` and ``bare_tokens_per_s`` (medians), ``ratio`` (of
        tokens a second, ours / bare) and ``difference``, the largest from each sentence's loss by itself, in nats.
    """
    model, rng = build_model(cfg), np.random.default_rng(0)
    rows = [rng.integers(cfg.d_vocab, size=n).tolist() for n in rng.integers(*_LENGTHS, size=sentences)]
    total = sum(map(len, rows))
    full = torch.from_numpy(rng.integers(cfg.d_vocab, size=(total // _ROWS, _ROWS)))

    @torch.no_grad()
    def bare() -> None:
        for part in full.split(batch):
            model(part, "loss")

    times = alternate({"ours": lambda: score(model, rows, progress=False), "bare": bare}, rounds)
    found = score(model, rows[:20], progress=False).texts["mean"]
    with torch.no_grad():
        alone = [-model(torch.tensor([row]), "loss").item() for row in rows[:20]]
    speed = {name: n / float(np.median(times[name])) for name, n in (("ours", total), ("bare", full.numel()))}
    yield {
        "tokens": total,
        "ours_tokens_per_s": round(speed["ours"]),
        "bare_tokens_per_s": round(speed["bare"]),
        "ratio": round(ratio(times["bare"], times["ours"]) * total / full.numel(), 3),
        "difference": float(np.abs(found - alone).max()),
        "of": f"{sentences} sentences of {_LENGTHS[0]} to {_LENGTHS[1]} tokens, {cfg.architecture}",
    }
