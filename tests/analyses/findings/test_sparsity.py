"""Sparsity against semantics: folders with a planted frontier, and recipes whose measures are known."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from analyses.findings import question
from analyses.findings.contrasts import contrast
from analyses.findings.recipes import dead_share, embedding_rank, null_space_share, recipe_measures
from analyses.findings.runs import TrainedRun
from analyses.findings.sparsity import GAPS, answer, sparsity
from reflowlens.errors import ReflowlensError
from reflowlens.signals import SignalView, rotate, signal_view
from tests.support.tiny import random_model, tiny_config

NOISE = (-0.002, 0.0005, 0.0015)  # of three seeds
DENSE = {"loss": 4.0, "neighbours": 0.7, "purity": 0.0, "topk": 0, "kept": 128, "prunes": 0}
PRUNED = {"loss": 4.5, "neighbours": 0.1, "purity": 0.05, "topk": 8, "kept": 8, "prunes": 1}


def folder(path: Path, arms: Mapping[str, Mapping[str, Any]], seeds: int = 3) -> Path:
    """What a study leaves, tables alone, with the values of each arm planted in all seeds but for a little noise."""
    runs, recipes = [], []
    kept: dict[str, list[dict[str, Any]]] = {experiment: [] for experiment, *_ in GAPS.values()}
    for seed in range(seeds):
        for number, (arm, planted) in enumerate(arms.items()):
            noise = NOISE[(seed + number) % 3]
            named = {"arm": arm, "seed": seed}
            settings = {name: value for name, value in planted.items() if "." in name}
            runs.append({**named, "complete": True, "tokens": 1, "val_loss": planted["loss"] + noise, **settings})
            sizes = {"n_signals": 128, "d_model": 128, "dead": 0.0, "null_space": 0.0, "embedding_rank": 90.0}
            own = {name: planted[name] for name in ("topk", "kept", "prunes")}
            sizes |= {name: planted[name] for name in sizes if name in planted}
            recipes.append({**named, "weights": "", **sizes, **own})
            for name, (experiment, metric, control, sign) in GAPS.items():
                value = planted.get(name, 0.3) + noise
                beside = {} if control is None else {f"control_{control}": 0.2}
                value = value if control is None else 0.2 + sign * value
                kept[experiment].append({**named, "weights": "", "metric": metric, "value": value, **beside})
    (path / "measured").mkdir(parents=True)
    pd.DataFrame(runs).to_csv(path / "runs.csv", index=False)
    pd.DataFrame(recipes).to_csv(path / "measured" / "recipes.csv", index=False)
    for experiment, rows in kept.items():
        pd.DataFrame(rows).to_csv(path / "measured" / f"{experiment}_quick_0.csv", index=False)
    return path


def test_a_planted_arm_that_has_both_is_found(tmp_path: Path) -> None:
    arms = {"dense": DENSE, "top_8": PRUNED, "top_32": PRUNED | {"neighbours": 0.6, "loss": 4.005, "topk": 32}}
    result = question("sparsity")(folder(tmp_path / "study", arms))
    assert result.metrics["arms_with_both"] == 1
    assert result.verdicts["arms_with_both"] == "supported"
    assert any("has both: top_32; refuted: top_8; undecided: none" in note for note in result.notes)
    assert result.metrics["kept_top_32"] == pytest.approx(0.6 / 0.7, abs=0.01)
    assert result.metrics["purity_top_8"] == pytest.approx(0.05, abs=1e-3)
    assert result.metrics["cost_top_8"] == pytest.approx(0.5, abs=1e-3)
    assert result.verdicts["cost_top_8"] == "supported"
    assert result.verdicts["cost_top_32"] == "not supported"
    assert result.verdicts["purity_dense"] == "not supported"
    assert set(result.figures) == {"frontier", "meaning", "purity", "silhouette", "cosine"}
    assert len(result.frames["runs"]) == 9
    assert result.frames["runs"].knockout[0] == pytest.approx(0.3 + NOISE[0])  # less is more: the sign is turned


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({"neighbours": 0.1}, "not supported"),  # meaning is gone
        ({"neighbours": 0.65, "purity": 0.0}, "not supported"),  # it is not, but signals are as any rotation's
        ({"neighbours": 0.352}, "underpowered"),  # about half of it is left
    ],
)
def test_a_frontier_without_such_an_arm(tmp_path: Path, changed: Mapping[str, float], verdict: str) -> None:
    result = sparsity(folder(tmp_path / "study", {"dense": DENSE, "top_8": PRUNED | changed}))
    assert (result.metrics["arms_with_both"], result.verdicts["arms_with_both"]) == (0, verdict)


def test_two_seeds_decide_nothing_and_no_meaning_is_not_lost(tmp_path: Path) -> None:
    arms = {"dense": DENSE, "top_8": PRUNED | {"neighbours": 0.6}}
    assert set(sparsity(folder(tmp_path / "two", arms, seeds=2)).verdicts.values()) == {"underpowered"}
    assert sparsity(folder(tmp_path / "one", arms, seeds=1)).intervals == {}
    poor = {"dense": DENSE | {"neighbours": 0.01}, "top_8": PRUNED | {"neighbours": 0.01}}
    result = sparsity(folder(tmp_path / "poor", poor))
    assert "kept_top_8" not in result.metrics
    assert result.verdicts["arms_with_both"] == "underpowered"
    assert any("nothing is said of meaning" in note for note in result.notes)
    with pytest.raises(ReflowlensError, match="no arm 'dense'"):
        answer(pd.DataFrame([{"arm": "top_8"}]), {}, [])


def test_what_of_the_damage_is_training(tmp_path: Path) -> None:
    """Annealing spares a planted half of it, the straight-through gradient nothing."""
    arms = {
        "dense": DENSE,
        "top_8": PRUNED,
        "annealed": PRUNED | {"loss": 4.25, "run.topk_anneal_fraction": 0.5},
        "straight_through": PRUNED | {"loss": 4.5, "model.topk_gradient": "straight_through"},
        "top_4": PRUNED | {"loss": 4.9, "topk": 4},
    }
    result = sparsity(folder(tmp_path / "study", arms))
    assert result.metrics["spared_annealed"] == pytest.approx(0.5, abs=0.01)
    assert result.verdicts["spared_annealed"] == "supported"
    assert result.metrics["spared_straight_through"] == pytest.approx(0.0, abs=0.01)
    assert result.verdicts["spared_straight_through"] == "not supported"
    assert not {"spared_top_4", "spared_top_8", "spared_dense"} & result.metrics.keys()


def test_damage_is_that_of_the_arm_that_is_alike_in_all_else(tmp_path: Path) -> None:
    """Of three arms with k = 8 as published one has other sizes and one another rate: neither is the annealed arm's."""
    arms = {
        "dense": DENSE,
        "top_8": PRUNED,
        "annealed": PRUNED | {"loss": 4.25, "run.topk_anneal_fraction": 0.5, "run.compile": False},
        "wide": PRUNED | {"loss": 4.3, "n_signals": 256},
        "slow": PRUNED | {"loss": 5.0, "optimizer.learning_rate": 0.001},
        "slow_annealed": PRUNED | {"loss": 4.9, "optimizer.learning_rate": 0.001, "run.topk_anneal_fraction": 0.5},
        "alone": PRUNED | {"loss": 4.2, "optimizer.learning_rate": 0.1, "model.topk_ends": "input"},
    }
    found = sparsity(folder(tmp_path / "study", arms)).metrics
    assert found["spared_annealed"] == pytest.approx(0.5, abs=0.02)
    assert found["spared_slow_annealed"] == pytest.approx(0.1, abs=0.02)
    assert "spared_alone" not in found


def test_contrasts_are_those_of_students_t() -> None:
    found = contrast([0.3, 0.5, 0.4], smallest=0.1)
    half = 4.302653 * np.std([0.3, 0.5, 0.4], ddof=1) / 3**0.5
    assert found[:3] == pytest.approx((0.4, 0.4 - half, 0.4 + half))
    assert found.verdict() == "supported"
    assert found.verdict(p=0.2) == "underpowered"
    assert contrast([0.0, 0.01, 0.02], smallest=0.1).verdict() == "not supported"


def test_contrasts_of_what_is_nan_or_all_alike() -> None:
    unknown = contrast([0.5, np.nan, 0.5, 0.5], smallest=0.1)
    assert unknown.interval is None
    assert np.isnan(unknown.p)
    assert {unknown.verdict(), unknown.verdict(p=0.0), unknown.verdict(p=1.0)} == {"underpowered"}
    assert contrast([0.1, 0.1, 0.1], smallest=0.1)[1:4] == (0.1, 0.1, 1.0)
    alike = {value: contrast([value] * 3, smallest=0.1).verdict() for value in (0.0, 0.1, 0.2)}
    assert alike == {0.0: "not supported", 0.1: "underpowered", 0.2: "supported"}
    assert contrast([0.2, 0.2], smallest=0.1).verdict() == "underpowered"


def planted_view(recipe: torch.Tensor, basis: torch.Tensor) -> SignalView:
    model = random_model(tiny_config("reflow", n_signals=basis.shape[0], d_model=basis.shape[1]))
    with torch.no_grad():
        model.embed.W_recipe[:], model.embed.W_basis[:] = recipe, basis
    return signal_view(model)


def test_recipes_with_nothing_free_and_with_much() -> None:
    """A basis of rank 32 for 40 signals: recipes in its row space, along its null space, and of neither."""
    generator = torch.Generator().manual_seed(0)
    basis, recipe = (torch.randn(n, d, generator=generator) for n, d in ((40, 32), (288, 40)))
    seen = torch.linalg.qr(basis).Q
    assert null_space_share(planted_view(recipe @ seen @ seen.T, basis)) == pytest.approx(0, abs=1e-6)
    assert null_space_share(planted_view(recipe - recipe @ seen @ seen.T, basis)) == pytest.approx(1, abs=1e-6)
    assert null_space_share(planted_view(recipe, basis)) == pytest.approx(8 / 40, abs=0.02)
    narrow = planted_view(recipe[:, :8], torch.eye(32)[:8])
    assert null_space_share(narrow) == pytest.approx(0, abs=1e-9)
    assert 7 < embedding_rank(narrow) <= 8
    assert embedding_rank(planted_view(recipe[:, :32], torch.eye(32))) > 28


def test_dead_signals_however_they_are_scaled() -> None:
    recipe = torch.randn(288, 32, generator=torch.Generator().manual_seed(0))
    recipe[:, :8] *= 1e-3
    scale = torch.linspace(0.1, 10, 32)
    for view in (planted_view(recipe, torch.eye(32)), planted_view(recipe * scale, torch.diag(1 / scale))):
        assert dead_share(view) == 0.25
        turned = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(1))).Q
        assert dead_share(rotate(view, turned)) == 0  # a rotation shares what there is out among all


@pytest.mark.parametrize(
    ("ends", "kept", "prunes"), [("both", 6, 1), ("input", 40, 0), ("output", 6, 1), (None, 32, 0)]
)
def test_sizes_are_those_of_the_recipe_that_is_read(ends: Any, kept: int, prunes: int) -> None:
    run = TrainedRun(arm="a", seed=0, val_loss=1.0, tokens=1, settings={})
    model = random_model(tiny_config("reflow") if ends is None else tiny_config("reflow_topk", topk_ends=ends))
    found = recipe_measures(model, run)
    assert (found["kept"], found["prunes"]) == (kept, prunes)
    assert found["dead_untrained"] == 0
    assert found["null_space"] == pytest.approx(found["null_space_untrained"], abs=0.05)
