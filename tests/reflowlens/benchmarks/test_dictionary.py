from __future__ import annotations

import pandas as pd
import pytest

from reflowlens.benchmarks import dictionary as bench


def test_the_variants_take_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses after the optimiser has acted are those of the dense step: so are the gradients."""
    for name, value in (("N_LAYERS", 2), ("WIDTH", 16), ("K", 4), ("POSITIONS", 64)):
        monkeypatch.setattr(bench, name, value)
    losses = {
        variant: [step() for _ in range(3)] for variant in bench.VARIANTS for step in [bench.training_step(variant, 48)]
    }
    assert losses["dense"][2] < losses["dense"][0]
    assert losses["sparse"] == pytest.approx(losses["dense"], rel=1e-6)
    assert losses["sparse, compared in bfloat16"] == pytest.approx(losses["dense"], rel=1e-2)


def test_a_row_a_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("N_LAYERS", 1), ("WIDTH", 16), ("K", 4), ("POSITIONS", 64)):
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(bench, "_peak_memory", lambda variant, features: features * 2**20)
    frame = pd.DataFrame(bench.bench_dictionary(n_features=(32, 64), rounds=2))
    assert frame["features"].tolist() == [32] * 3 + [64] * 3
    assert frame["peak_mb"].tolist() == [32] * 3 + [64] * 3
    assert frame.loc[frame["step"] == "dense", "against_dense"].tolist() == [1.0, 1.0]
    assert (frame["tokens_per_s"] > 0).all()
