"""Which verdicts are a way of training's, and which a single run's: on tables that say so, and on planted models."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analyses.claims import CLAIMS
from analyses.experiments.sparsity_profile import sparsity_profile
from analyses.findings.claims_over_seeds import claims_over_seeds
from analyses.result import Result
from analyses.statistics.intervals import rate_interval, t_interval
from reflowlens.checkpoints import save_model
from reflowlens.cli import main
from reflowlens.errors import ReflowlensError
from tests.support.planted import empty_model, sparse_model

PLACES = [(experiment, metric) for experiment, claims in CLAIMS.items() for metric in claims if "*" not in metric]


def study_of(folder: Path, verdict_of: Callable[[int, int], str], seeds: int = 3) -> Path:
    """A study's tables, without a checkpoint: the verdict on every claim and seed; values of 1 + seed / 10 beside
    controls of 0.5, negated where less is claimed."""
    rows = [{"arm": "a", "seed": seed, "complete": True, "tokens": 1, "val_loss": 4.0} for seed in range(seeds)]
    pd.DataFrame(rows).to_csv(folder / "runs.csv", index=False)
    (folder / "measured").mkdir()
    for experiment, claims in CLAIMS.items():
        found = []
        for number, (name, metric) in enumerate(PLACES):
            if name == experiment:
                sign, controls = claims[metric].sign, {f"control_{each}": 0.5 for each in claims[metric].beats}
                row = {"arm": "a", "weights": "", "metric": metric, **{key: sign * x for key, x in controls.items()}}
                found += [
                    row | {"seed": seed, "value": sign * (1 + seed / 10), "verdict": verdict_of(number, seed)}
                    for seed in range(seeds)
                ]
        pd.DataFrame(found).to_csv(folder / "measured" / f"{experiment}_quick_0.csv", index=False)
    return folder


def every_other(number: int, seed: int) -> str:
    return "supported" if number % 2 else "not supported"


def at_random(number: int, seed: int) -> str:
    return "supported" if np.random.default_rng((number, seed)).random() < 0.5 else "not supported"


def test_verdicts_that_all_seeds_share_are_the_arms(tmp_path: Path) -> None:
    result = claims_over_seeds(str(study_of(tmp_path, every_other)))
    share = result.findings["stable_share"]
    assert (share.value, share.verdict) == (1.0, "supported")
    assert share.interval == rate_interval(np.ones(len(PLACES)))
    assert share.controls["shuffled_claims"] == pytest.approx(0.25, abs=0.05)  # of three coins all alike
    assert result.metrics["supported_on_all"] == pytest.approx(0.5, abs=0.02)
    assert result.metrics["supported_on_some"] == 0
    claims = result.frames["claims"]
    assert set(claims["verdict"]) == {"supported", "not supported"}
    row = claims.set_index("metric").loc["leading_share"]
    low, high = t_interval([1.0, 1.1, 1.2])[0]
    assert (row["value"], row["low"], row["high"]) == pytest.approx((1.1, low, high))
    assert row["margin"] == pytest.approx(1.1 - 0.5 - 0.05)  # 0.05 is the smallest effect that matters
    less = claims.set_index("metric").loc["leading_since"]
    assert less["margin"] == pytest.approx(1.1 - 0.5 - 0.05)
    assert (less["margin_low"], less["margin_high"]) == pytest.approx((low - 0.55, high - 0.55))


def test_verdicts_that_change_with_the_seed_are_not(tmp_path: Path) -> None:
    result = claims_over_seeds(str(study_of(tmp_path, at_random)))
    share = result.findings["stable_share"]
    assert share.verdict == "not supported"
    assert abs(share.value - share.controls["shuffled_claims"]) < 0.2
    differing = result.frames["claims"].query("verdict == 'differs'")
    assert differing["supported"].between(1, 2).all()
    assert len(differing) == round(result.metrics["supported_on_some"] * len(PLACES))


def test_a_seed_without_a_verdict_is_one_that_differs(tmp_path: Path) -> None:
    study = study_of(tmp_path, every_other)
    kept = study / "measured" / "signal_flow_quick_0.csv"
    pd.read_csv(kept).query("seed != 2").to_csv(kept, index=False)
    with kept.open("a") as file:
        file.write("a,,,,,2,,\n")  # an experiment that refused this seed's model
    refused = study / "measured" / "causal_ablation_quick_0.csv"  # and one that refused all of them
    pd.DataFrame({"arm": "a", "seed": range(3), "weights": ""}).to_csv(refused, index=False)
    claims = claims_over_seeds(str(study)).frames["claims"].set_index("experiment")
    assert (claims.loc["signal_flow", "verdict"] == "differs").all()
    assert (claims.loc["signal_flow", "seeds"] == 3).all()
    assert "causal_ablation" not in claims.index
    assert (claims.loc["sparsity_profile", "verdict"] != "differs").all()


def test_two_seeds_are_too_few(tmp_path: Path) -> None:
    result = claims_over_seeds(str(study_of(tmp_path, every_other, seeds=2)))
    assert result.findings["stable_share"].verdict == "underpowered"


def test_a_claim_that_is_true_of_every_model_and_one_that_is_of_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFLOWLENS_CACHE", str(tmp_path / "cache"))
    rows = []
    for seed in range(2):
        for arm, build in (("planted", partial(sparse_model, 3)), ("empty", empty_model)):
            save_model(tmp_path / f"seed_{seed}_{arm}" / "step_0000001", build(seed))
            rows.append({"arm": arm, "seed": seed, "complete": True, "tokens": 1, "val_loss": 4.0})
    pd.DataFrame(rows).to_csv(tmp_path / "runs.csv", index=False)
    other = sparse_model(3, seed=5)
    asked = {"experiments": ["sparsity_profile"], "models": {"another": other}}
    found = {arm: claims_over_seeds(str(tmp_path), arm=arm, **asked) for arm in ("planted", "empty")}
    for arm, verdict in (("planted", "supported"), ("empty", "not supported")):
        active = found[arm].frames["claims"].set_index("metric").loc["active_share"]
        assert (active["verdict"], active["supported"]) == (verdict, 2 * (arm == "planted"))
        assert (active["margin"] > 0) == (arm == "planted")
    assert found["empty"].metrics["supported_on_all"] == 0
    beside = found["empty"].frames["verdicts"].query("run == 'another'").set_index("metric")
    own = sparsity_profile(other, quick=True)
    assert beside["value"]["active_share"] == own.metrics["active_share"]
    assert beside["verdict"].to_dict() == dict(own.verdicts)
    assert list(found["empty"].figures["verdicts"].layout.xaxis.ticktext) == ["seed 0", "seed 1", "another"]
    with pytest.raises(ReflowlensError, match=r"an arm has to be named: .* has planted, empty"):
        claims_over_seeds(str(tmp_path), **asked)
    with pytest.raises(ReflowlensError, match=r"no arm 'own': .* has planted, empty"):
        claims_over_seeds(str(tmp_path), arm="own", **asked)


def test_the_command_asks_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = study_of(tmp_path, every_other)
    assert main(["findings", "claims_over_seeds", "--runs", str(study), "--out", str(tmp_path / "out")]) == 0
    assert "stable_share 1 " in capsys.readouterr().out
    assert len(Result.load(tmp_path / "out").frames["claims"]) == len(PLACES)
