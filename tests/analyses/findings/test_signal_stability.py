"""Whether another seed finds the same signals: the same ones in another order and sign, and the same rotated."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from analyses.findings.signal_stability import agreement, answer, pseudovalues, signal_stability
from analyses.findings.transfer import by_recipe, recipe_agreement
from reflowlens.checkpoints import save_model
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.rotations import rotate_signals
from reflowlens.signals import random_rotation, signal_view
from tests.support.planted import sparse_model


def planted() -> HookedModel:
    return sparse_model(3, 0)


def reordered(model: HookedModel) -> HookedModel:
    """The same signals in another order, every third with the other sign."""
    n = model.cfg.n_signals or 0
    signs = torch.where(torch.arange(n) % 3 == 0, -1.0, 1.0)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    return rotate_signals(model, torch.eye(n)[order] * signs)


def rotated(model: HookedModel) -> HookedModel:
    return rotate_signals(model, random_rotation(model.cfg.n_signals or 0, seed=5))


def test_the_same_signals_are_found_whatever_their_order_and_sign() -> None:
    model = planted()
    one, other = signal_view(model), signal_view(reordered(model))
    correlations = recipe_agreement(one, other, by_recipe(one, other))
    assert torch.allclose(correlations, torch.ones_like(correlations), atol=1e-5)
    found = agreement(one, other, rotations=3)
    assert found["words"] == pytest.approx(1.0)
    assert found["words_gap"] > 0.4
    assert found["recipes_gap"] == pytest.approx(found["recipes"] - found["recipes_rotated"])


def test_a_rotation_has_none_of_them() -> None:
    model = planted()
    found = agreement(signal_view(model), signal_view(rotated(model)), rotations=4)
    assert abs(found["words_gap"]) < 0.1
    assert abs(found["recipes_gap"]) < 0.1


def stored(folder: Path, models: dict[tuple[str, int], HookedModel]) -> Path:
    rows = []
    for (arm, seed), model in models.items():
        save_model(folder / f"seed_{seed}_{arm}" / "step_0000001", model)
        rows.append({"arm": arm, "seed": seed, "complete": True, "step": 1, "tokens": 8, "val_loss": 4.0, "seconds": 1})
    pd.DataFrame(rows).to_csv(folder / "runs.csv", index=False)
    return folder


def test_every_run_is_compared_with_the_next_seed(tmp_path: Path) -> None:
    model = planted()
    same = {("same", seed): reordered(model) if seed else model for seed in range(3)}
    turned = {("turned", seed): rotated(model) if seed else model for seed in range(2)}
    result = signal_stability(stored(tmp_path, same | turned), progress=False)
    pairs = result.frames["pairs"]
    assert pairs[["arm", "seed", "next_seed"]].to_numpy().tolist() == [
        ["same", 0, 1],
        ["same", 1, 2],
        ["same", 2, 0],
        ["turned", 0, 1],
    ]
    assert (pairs.loc[pairs["arm"] == "same", "words"] == 1).all()
    assert result.verdicts == {"words_same": "supported", "words_turned": "underpowered"}
    assert signal_stability(tmp_path, progress=False).metrics == result.metrics
    alone = pd.read_csv(tmp_path / "runs.csv").query("arm == 'turned' and seed == 0")
    alone.to_csv(tmp_path / "runs.csv", index=False)
    with pytest.raises(ReflowlensError, match="has two seeds, whose signals could be compared"):
        signal_stability(tmp_path, progress=False)


def test_a_pair_is_compared_anew_where_either_run_is_another(tmp_path: Path) -> None:
    model = planted()

    def pairs(seeds: dict[int, HookedModel]) -> list[list[float]]:
        folder = stored(tmp_path, {("dense", seed): each for seed, each in seeds.items()})
        found = signal_stability(folder, progress=False).frames["pairs"]
        return found[["seed", "next_seed", "words"]].round(1).to_numpy().tolist()

    assert pairs({0: model, 2: reordered(model)}) == [[0, 2, 1]]
    assert pairs({0: model, 1: model, 2: reordered(model)}) == [[0, 1, 1], [1, 2, 1], [2, 0, 1]]
    (_, _, first), (_, _, second), (_, _, third) = pairs({0: model, 1: rotated(model), 2: reordered(model)})
    assert max(first, second) < 0.7
    assert third == 1


@pytest.mark.parametrize(("gap", "verdict"), [(0.3, "supported"), (0.02, "not supported"), (0.1, "underpowered")])
def test_the_rule(gap: float, verdict: str) -> None:
    values = np.array([-0.01, 0.0, 0.01])
    columns = {f"{m}{what}": 0.5 + values for m in ("words", "recipes") for what in ("", "_rotated")}
    gaps = {f"{m}_gap": gap + values for m in ("words", "recipes")}
    pairs = pd.DataFrame({"arm": "dense", "seed": range(3), "next_seed": [1, 2, 0], **columns, **gaps})
    assert answer(pairs, {}).verdicts == {"words_dense": verdict}


def test_the_unit_is_the_run() -> None:
    """Of gaps that are sums of what each run has, the jackknife finds what each has."""
    own = np.array([0.1, 0.4, 0.2])
    pairs = pd.DataFrame({"arm": "dense", "seed": range(3), "next_seed": [1, 2, 0], "words_gap": own + own[[1, 2, 0]]})
    found = pseudovalues(pairs, ["words_gap"])["words_gap"]
    assert found.to_list() == pytest.approx(list(2 * own))
    assert found.mean() == pytest.approx(pairs["words_gap"].mean())
