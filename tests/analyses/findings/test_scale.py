"""Scale: planted power laws, with and without a floor or any dependence on size, and planted gaps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analyses.findings import question
from analyses.findings.scale import answer, published_sizes, scale, size_of
from analyses.statistics.power_law import fit_line, fit_power_law
from reflowlens.errors import ReflowlensError
from reflowlens.models import build_model
from tests.support.tiny import CONFIGS

SIZES = (8e5, 2.2e6, 4.8e6)


def runs(
    loss: Callable[[float], float],
    gap: Callable[[float], float],
    sizes: tuple[float, ...] = SIZES,
    seeds: int = 2,
    noise: float = 0.004,
) -> pd.DataFrame:
    rng, rows = np.random.default_rng(0), []
    for size in sizes:
        for seed in range(seeds):
            shared = loss(size) + noise * rng.standard_normal()  # what the two of a pair have alike
            for name, more in (("reflow", gap(size) + 0.1 * noise * rng.standard_normal()), ("gpt2_new", 0.0)):
                row = {"arm": f"{name}_{size:.0f}", "seed": seed, "size": size, "parameters": 2 * size}
                rows.append({**row, "factored": name == "reflow", "loss": shared + more})
    return pd.DataFrame(rows)


def power(size: float) -> float:
    return 30 * size**-0.13


def test_a_planted_power_law_is_found_again() -> None:
    result = answer(runs(power, lambda n: 0.0), {}, [], 1000)
    low, high = result.intervals["exponent_other"]
    assert low <= 0.13 <= high
    assert high - low < 0.02
    fits = result.frames["fits"].set_index("family")
    assert fits.df.to_dict() == {"reflow": 4, "other": 4}  # 6 runs, two parameters
    assert (fits.bootstrap_low < fits.exponent).all()
    assert (fits.bootstrap_high - fits.bootstrap_low < fits.high - fits.low).all()
    assert (fits.floor == 0).all()
    predictions = result.frames["predictions"].set_index("model")
    assert predictions["size"].to_dict() == {
        "reflow_1_small": 20_453_888, "reflow_1": 411_108_352, "reflow_1_big": 462_496_768,
    }  # fmt: skip
    expected = power(411_108_352)
    assert predictions.other_low["reflow_1"] < expected < predictions.other_high["reflow_1"]
    assert predictions.other["reflow_1"] == pytest.approx(expected, rel=0.02)
    assert any("c is 0" in note for note in result.notes)


def test_a_loss_that_does_not_depend_on_size() -> None:
    low, high = answer(runs(lambda n: 5.0, lambda n: 0.0), {}, [], 1000).intervals["exponent_reflow"]
    assert low <= 0 <= high


def test_a_planted_floor_is_found_from_four_sizes_on() -> None:
    sizes = tuple(np.geomspace(1e5, 1e8, 6))
    result = answer(runs(lambda n: 2.0 + 200 * n**-0.4, lambda n: 0.0, sizes, noise=1e-3), {}, [], 200)
    fit = result.frames["fits"].set_index("family").loc["other"]
    assert fit.floor == pytest.approx(2.0, abs=0.02)
    assert fit.low <= 0.4 <= fit.high
    assert fit.df == 9
    assert result.frames["predictions"].other[2] == pytest.approx(2.0 + 200 * 462_496_768**-0.4, abs=0.03)


def test_a_family_whose_loss_rises_with_size_decides_nothing() -> None:
    failed = runs(power, lambda n: 0.0)
    failed.loc[(failed["size"] == SIZES[-1]) & ~failed["factored"], "loss"] += 1.0
    result = answer(failed, {}, [], 100)
    assert result.intervals["gap_slope"][1] < -0.02
    assert result.verdicts["gap_slope"] == "underpowered"
    assert any("the loss of GPT-2-New rises with size" in note for note in result.notes)


@pytest.mark.parametrize(
    ("gap", "seeds", "verdict"),
    [
        (lambda n: 0.1 - 0.1 * np.log10(n / SIZES[0]), 2, "supported"),
        (lambda n: 0.05, 2, "not supported"),
        (lambda n: 0.1 - 0.02 * np.log10(n / SIZES[0]), 2, "underpowered"),  # by the smallest effect itself
        (lambda n: 0.1 - 0.1 * np.log10(n / SIZES[0]), 1, "underpowered"),
    ],
)
def test_whether_a_planted_gap_shrinks(gap: Callable[[float], float], seeds: int, verdict: str) -> None:
    result = answer(runs(power, gap, seeds=seeds), {}, [], 100)
    assert result.verdicts["gap_slope"] == verdict
    for size in SIZES:
        assert result.metrics[f"gap_{size:.0f}"] == pytest.approx(gap(size), abs=3e-3)
    assert result.metrics["gap_at_reflow_1_big"] == pytest.approx(gap(462_496_768), abs=0.02)


def test_a_gap_in_three_seeds_and_one_too_noisy_to_extrapolate() -> None:
    sure = answer(runs(power, lambda n: 0.1, seeds=3), {}, [], 100)
    assert {sure.verdicts[f"gap_{size:.0f}"] for size in SIZES} == {"supported"}
    assert not sure.frames["predictions"].too_wide.any()
    noisy = answer(runs(power, lambda n: 0.1, noise=0.5), {}, [], 100)
    assert noisy.frames["predictions"].too_wide.all()
    assert any("too wide to tell" in note and "reflow_1_big" in note for note in noisy.notes)


def test_a_line_and_its_prediction_interval_are_those_of_least_squares() -> None:
    rng = np.random.default_rng(1)
    x, y = np.repeat([0.0, 1.0, 3.0], 2), rng.standard_normal(6)
    X = np.stack([np.ones(6), x], axis=1)
    beta = np.linalg.solve(X.T @ X, X.T @ y)
    s2 = ((y - X @ beta) ** 2).sum() / 4
    at = np.array([1.0, 5.0])
    half = 2.776445105 * (s2 * (1 + at @ np.linalg.inv(X.T @ X) @ at)) ** 0.5  # t of 4 degrees of freedom
    value, interval = fit_line(x, y).at(5.0)
    assert (value, *interval) == pytest.approx((at @ beta, at @ beta - half, at @ beta + half))
    slope = 2.776445105 * (s2 * np.linalg.inv(X.T @ X)[1, 1]) ** 0.5
    assert fit_line(x, y).interval == pytest.approx((beta[1] - slope, beta[1] + slope))


def test_a_folder_of_runs_is_read(tmp_path: Path) -> None:
    table = runs(power, lambda n: 0.05)
    table.assign(complete=True, tokens=1, val_loss=table["loss"])[
        ["arm", "seed", "complete", "tokens", "val_loss"]
    ].to_csv(tmp_path / "runs.csv", index=False)
    (tmp_path / "measured").mkdir()
    kept = table.assign(factored=table["factored"].astype(float), weights="")
    kept[["arm", "seed", "weights", "size", "parameters", "factored"]].to_csv(
        tmp_path / "measured/sizes.csv", index=False
    )
    result = question("scale")(tmp_path)
    assert result.metrics == answer(table, {}, [], 1000).metrics
    assert set(result.figures) == {"loss", "gap"}
    broken = pd.read_csv(tmp_path / "runs.csv").query("arm.str.startswith('reflow')")
    broken.to_csv(tmp_path / "runs.csv", index=False)
    with pytest.raises(ReflowlensError, match="needs reFlow and GPT-2-New of the same seeds at two sizes"):
        scale(tmp_path)


def test_two_arms_of_one_size_are_no_mean() -> None:
    """As of a study that varies k, or a rate: none of them is *the* reFlow of that size."""
    table = runs(power, lambda n: 0.05)
    other = table[(table["factored"]) & (table["size"] == SIZES[0])].assign(arm="top_8", loss=9.0)
    with pytest.raises(ReflowlensError, match="and reflow_800000, top_8 are as large as another of their family"):
        answer(pd.concat([table, other], ignore_index=True), {}, [], 10)


def test_sizes_leave_out_both_ends() -> None:
    for name in ("reflow", "gpt2_new", "llama_untied"):
        cfg = CONFIGS[name]
        width = cfg.n_heads * cfg.d_head
        layer = 2 * cfg.d_model * (width + cfg.kv_heads * cfg.d_head) + 3 * cfg.d_model * cfg.d_mlp + 2 * cfg.d_model
        layer += (width + 2 * cfg.kv_heads * cfg.d_head) * cfg.qkv_bias
        assert size_of(build_model(cfg)) == cfg.n_layers * layer + cfg.d_model
    assert published_sizes()["reflow_1_small"] == 20_453_888


def test_what_is_no_power_law() -> None:
    with pytest.raises(ReflowlensError, match="at least two sizes"):
        fit_power_law([1e6, 1e6], [3.0, 3.1])
    with pytest.raises(ReflowlensError, match="above 0"):
        fit_power_law([1e5, 1e6], [3.0, -3.1])
    with pytest.raises(ReflowlensError, match="at least 3 runs"):
        fit_line([1, 2], [1, 2])
