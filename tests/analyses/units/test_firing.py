"""Streaming counts of units against the whole table of activations, and the analysis on planted units."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformer_lens.hook_points import HookPoint

import reflowlens as rl
from analyses import unit_statistics
from analyses.controls.nulls import untrained_model
from analyses.result.result import Result
from analyses.statistics.resampling import moving_block_weights
from analyses.units.comparison import compare_units
from analyses.units.counts import SHARES, count_units, firing_overlap
from analyses.units.figures import firing_by_level
from analyses.units.frames import context_of
from analyses.units.held_out import as_stream, shuffled, tiles, windows
from analyses.units.intervals import mean_interval, near_silent_interval, unit_rate_intervals
from analyses.units.points import default_points, kind_of, points_named
from analyses.units.terminal import unit_report
from pretraining.data import prepare
from reflowlens.cli import main
from reflowlens.errors import ReflowlensError
from reflowlens.models import build_model
from reflowlens.models.base import HookedModel
from tests.reflowlens.models.test_bdh import CONFIG, random_bdh
from tests.support import ROOT
from tests.support.tiny import random_model, tiny_config

TEXT = (ROOT / "README.md").read_text(encoding="utf8")


@pytest.fixture(scope="module")
def model() -> HookedModel:
    return random_bdh()


@torch.no_grad()
def test_counts_are_those_of_the_whole_table(model: HookedModel) -> None:
    """In batches that do not divide the rows, of two points of one pass; percentiles are numpy's."""
    tokens = tiles(as_stream(model, TEXT[:2400]), 48)[:21]
    points = ["blocks.0.hook_x_sparse", "blocks.2.hook_xy_sparse"]
    found = count_units(model, tokens, points, batch_size=4)
    caches = [model.run_with_cache(rows, names_filter=points)[1] for rows in tokens.split(4)]
    for name in points:
        activation = torch.cat([cache[name] for cache in caches])
        values = activation.flatten(2).flatten(0, 1)
        counts = found[name]
        assert counts.n == 21 * 48
        assert counts.unit_shape == (2, 24)
        assert torch.equal(counts.events, (values > 0).sum(0))
        assert torch.allclose(counts.total, values.double().sum(0))
        assert torch.allclose(counts.square, values.double().square().sum(0))
        assert torch.allclose(counts.largest, values.max(0).values, rtol=1e-6)
        fires = counts.events > 0
        assert torch.allclose(values[counts.where, range(48)], counts.largest, rtol=1e-6)
        percentile = np.percentile(values.numpy(), 99.9, axis=0)
        np.testing.assert_allclose(counts.percentile.numpy(), percentile, rtol=1e-5)
        for share, above in zip(SHARES, counts.above, strict=True):
            assert (above - (values > share * torch.from_numpy(percentile)).sum(0)).abs().max() <= 1
        assert torch.allclose(counts.rate, (values > 0).double().mean(0))
        mean = values.double().mean(0)
        assert torch.allclose(counts.selectivity[fires], (values.max(0).values / mean)[fires], rtol=1e-5)
        active = values.double().sum(0) / counts.events
        assert torch.allclose(counts.max_over_active[fires], (values.max(0).values / active)[fires], rtol=1e-5)
        per_position = (values > 0).sum(1).double()
        assert counts.active_mean == pytest.approx(float(per_position.mean()))
        assert counts.active_cv == pytest.approx(float(per_position.std(correction=0) / per_position.mean()))
        assert torch.allclose(counts.row_rates, (activation > 0).double().flatten(1).mean(1))
        assert torch.equal(counts.stretch_events.sum(0), counts.events)
        assert int(counts.stretch_positions.sum()) == counts.n
        at = [values[i].double() for i in range(0, counts.n, 17) if (values[i] > 0).any()]
        assert counts.sparsity["gini"] == pytest.approx(np.mean([plain_gini(row) for row in at]))
        assert counts.sparsity["hoyer"] == pytest.approx(np.mean([plain_hoyer(row) for row in at]))
        if name.endswith("xy_sparse"):
            writes = [row * model.neurons.W_out.detach().double().norm(dim=-1).flatten() for row in at]
            ratios = [float((row**2).sum() ** 2 / (row**4).sum() / len(row)) for row in writes]
            assert counts.sparsity["participation"] == pytest.approx(np.mean(ratios), rel=1e-5)
        else:
            assert np.isnan(counts.sparsity["participation"])


def plain_gini(row: torch.Tensor) -> float:
    """Half the mean difference of all pairs, in means."""
    return float((row[:, None] - row).abs().mean() / (2 * row.mean()))


def plain_hoyer(row: torch.Tensor) -> float:
    root = len(row) ** 0.5
    return float((root - row.sum() / row.square().sum().sqrt()) / (root - 1))


@torch.no_grad()
def test_the_positions_of_a_unit_at_two_levels(model: HookedModel) -> None:
    """Sets of positions, unit by unit; of rates alone, what units that know nothing of each other share."""
    tokens = tiles(as_stream(model, TEXT[:1200]), 48)
    first, second = "blocks.0.hook_xy_sparse", "blocks.2.hook_xy_sparse"
    found = firing_overlap(model, tokens, [(first, second)], batch_size=4)[first, second]
    _, cache = model.run_with_cache(tokens, names_filter=[first, second])
    a, b = ((cache[name].flatten(2).flatten(0, 1) > 0).numpy() for name in (first, second))
    for unit in range(48):
        one, other = (set(np.flatnonzero(fires[:, unit])) for fires in (a, b))
        if one | other:
            assert float(found[unit]) == pytest.approx(len(one & other) / len(one | other))


def test_a_unit_of_a_repeated_level_is_itself() -> None:
    """Without anything written the stream is the same at every level, and so is every unit."""
    model = random_bdh()
    with torch.no_grad():
        model.neurons.W_out.zero_()
    alike = unit_statistics(model, TEXT, ["x_sparse"], n_batches=1, context=48, controls=False).frames["alike"]
    np.testing.assert_allclose(alike[["spearman", "jaccard"]], 1.0, rtol=1e-6)
    assert (alike["jaccard_chance"] < 0.9).all()


# -- intervals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "block"), [(12, 3), (12, 1), (12, 12), (20, 5)])
def test_moving_blocks_have_the_moments_of_all_blocks(n: int, block: int) -> None:
    """The mean of a resample is one of n / block independent draws among the n - block + 1 block means."""
    values = np.random.default_rng(3).normal(size=n).cumsum()
    weights = moving_block_weights(n, block=block, resamples=40_000, seed=1)
    assert (weights.sum(axis=1) == n).all()
    means = weights @ values / n
    blocks = np.array([values[start : start + block].mean() for start in range(n - block + 1)])
    assert means.mean() == pytest.approx(blocks.mean(), abs=5 * means.std() / 200 + 1e-6)
    assert means.var() == pytest.approx(blocks.var() / (n // block), rel=0.05, abs=1e-9)


def test_an_interval_knows_that_neighbours_are_alike() -> None:
    """Of rows in runs of eight a bootstrap of single rows is too sure: its intervals miss the mean far too often."""
    generator = np.random.default_rng(0)
    missed = {4: 0, 1: 0}
    for trial in range(100):
        rows = np.repeat(generator.normal(size=16), 8)
        missed[4] += not (mean_interval(rows, trial).low <= 0 <= mean_interval(rows, trial).high)
        single = moving_block_weights(128, block=1, resamples=300, seed=trial) @ rows / 128
        missed[1] += not (np.quantile(single, 0.025) <= 0 <= np.quantile(single, 0.975))
    assert missed[4] < 0.75 * missed[1]
    assert missed[4] < 30


def test_intervals_of_rates_by_hand(model: HookedModel) -> None:
    """Every resample as a list of rows, its rates as means over them."""
    name, tokens = "blocks.1.hook_xy_sparse", tiles(as_stream(model, TEXT[:1200]), 48)
    part = count_units(model, tokens, [name], batch_size=8)[name]
    with torch.no_grad():
        caches = [model.run_with_cache(rows, names_filter=name)[1] for rows in tokens.split(8)]
    fires = (torch.cat([cache[name] for cache in caches]).flatten(2) > 0).double().mean(1).numpy()
    weights = moving_block_weights(len(tokens), seed=5)
    rates = np.stack([np.repeat(fires, row.astype(int), axis=0).mean(axis=0) for row in weights])
    low, high = np.quantile(rates, [0.025, 0.975], axis=0)
    for unit, interval in enumerate(unit_rate_intervals(part, torch.arange(48), seed=5)):
        assert interval == pytest.approx((low[unit], high[unit]), abs=1e-6)
    silent = np.quantile((rates < 0.2).mean(axis=1), [0.025, 0.975])
    assert near_silent_interval([part], 0.2, seed=5) == pytest.approx(tuple(silent), abs=0.03)
    level = np.quantile(rates.mean(axis=1), [0.025, 0.975])
    assert mean_interval(part.row_rates, seed=5) == pytest.approx(tuple(level), abs=1e-6)


def test_long_texts_are_counted_in_stretches(model: HookedModel) -> None:
    tokens = tiles(as_stream(model, TEXT[: 300 * 8]), 8)
    part = count_units(model, tokens, ["blocks.0.hook_x_sparse"], batch_size=7)["blocks.0.hook_x_sparse"]
    assert part.stretch_positions.tolist() == [24] * 100
    with torch.no_grad():  # the first batch: whether a unit fires hangs on the last bit, which is that of one shape
        _, cache = model.run_with_cache(tokens[:7], names_filter="blocks.0.hook_x_sparse")
    fires = cache["blocks.0.hook_x_sparse"][:3] > 0
    assert torch.equal(part.stretch_events[0].long(), fires.flatten(2).sum((0, 1)))


# -- several models ---------------------------------------------------------------------------------------------------


def test_models_side_by_side(model: HookedModel) -> None:
    """Differences are of the same rows: none to itself; a control of another architecture has units of its own."""
    models = {"one": model, "again": model, "fresh": build_model(CONFIG, seed=2), "other": random_model("reflow")}
    frame = compare_units(models, TEXT[:3000], n_batches=3, context=24)
    rows = frame.set_index(["model", "kind"])
    assert rows.loc[("again", "xy_sparse"), "difference"] == 0
    alone = unit_statistics(model, TEXT[:3000], n_batches=3, context=24, controls=False)
    for kind in ("x_sparse", "xy_sparse"):
        one, fresh = rows.loc[("one", kind)], rows.loc[("fresh", kind)]
        assert one["firing_rate"] == pytest.approx(alone.metrics[f"{kind}_firing_rate"])
        assert one["low"] < one["firing_rate"] < one["high"]
        assert fresh["difference"] == pytest.approx(fresh["firing_rate"] - one["firing_rate"])
        assert fresh["difference_low"] <= fresh["difference"] <= fresh["difference_high"]
        assert 0 < fresh["p"] <= 1
    assert np.isnan(rows.loc[("other", "mlp_post"), "difference"])
    with pytest.raises(ReflowlensError, match="reads 'gpt2_16k' tokens and the first model 'bytes'"):
        compare_units(
            {"one": model, "gpt": random_model(tiny_config("gpt2", tokenizer_name="gpt2_16k", d_vocab=16_768))}, TEXT
        )
    with pytest.raises(ReflowlensError, match="no model is given: a firing rate needs one"):
        compare_units({}, TEXT)


def test_only_the_first_model_is_a_reference(model: HookedModel) -> None:
    """It has no MLP: two others that have one are not held against each other."""
    models = {"bdh": model, "A": random_model("reflow"), "B": random_model("reflow", seed=1)}
    frame = compare_units(models, TEXT[:3000], n_batches=3, context=24)
    others = frame[frame["kind"] == "mlp_post"]
    assert others["model"].tolist() == ["A", "B"]
    assert others[["difference", "difference_low", "difference_high", "p"]].isna().all(axis=None)


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(model: HookedModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A checkpoint and a text file."""
    folder = tmp_path_factory.mktemp("units")
    (folder / "val.txt").write_text(TEXT[:3000], encoding="utf8")
    return str(rl.save_model(folder / "bdh", model)), str(folder / "val.txt")


def test_the_command_prints_the_report_and_keeps_everything(
    saved: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], model: HookedModel
) -> None:
    checkpoint, text = saved
    out = tmp_path / "units"
    command = ["units", checkpoint, "--data", text, "--hook", "xy_sparse", "blocks.1.hook_x_sparse", "--quick"]
    assert main([*command, "--context", "48", "--top", "3", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "768 positions" in printed
    assert "published 0.03" in printed
    kept = Result.load(out)
    expected = unit_statistics(
        model, TEXT[:3000], ["xy_sparse", "blocks.1.hook_x_sparse"], context=48, top=3, quick=True
    )
    assert kept.metrics == pytest.approx(expected.metrics)
    assert set(kept.figures) == set(expected.figures)
    assert unit_report(expected, top=3) in printed
    assert kept.params["points"] == [
        *(f"blocks.{level}.hook_xy_sparse" for level in range(3)),
        "blocks.1.hook_x_sparse",
    ]


def test_the_command_reads_prepared_data_and_compares(
    saved: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, text = saved
    (tmp_path / "train.txt").write_text("To be, or not to be.")
    train = tmp_path / "train.txt"
    prepare(train, tmp_path / "data", tokenizer="bytes", val_sources=[text], workers=1, progress=False)
    options = ["--data", str(tmp_path / "data"), "--context", "32", "--sampling", "tiles"]
    assert main(["units", checkpoint, *options, "--against", "untrained", "--out", str(tmp_path / "table")]) == 0
    assert "xy_sparse" in capsys.readouterr().out
    kept = pd.read_csv(tmp_path / "table" / "units.csv").set_index(["model", "kind"])
    assert len(kept) == 6
    assert kept.loc[("untrained", "xy_sparse"), "firing_rate"] == pytest.approx(0.25, abs=0.06)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hook", "xy_spars"], "no kind of units 'xy_spars'; did you mean 'xy_sparse' or"),
        (["--hook", "blocks.9.hook_xy_sparse"], "this model has blocks 0 to 2"),
        (["--hook", "words"], "no kind of units 'words'; there are embed, resid_pre"),
        (["--context", "0"], "--context must be at least 1"),
        (["--data", "nowhere.txt"], "cannot read nowhere.txt"),
        (["--against", "untrained", "untrained"], "--against: untrained is given twice"),
        (["--against", "untrained", "--quick"], "--quick is not for --against"),
        (["--against", "untrained", "--no-controls"], "--no-controls is not for --against"),
    ],
)
def test_what_the_command_cannot_do(
    saved: tuple[str, str], capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    checkpoint, text = saved
    assert main(["units", checkpoint, "--data", text, *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_command_compares_no_model_with_itself(saved: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, text = saved
    assert main(["units", checkpoint, "--data", text, "--against", "untrained", checkpoint]) == 2
    assert f"--against: {checkpoint} is given twice" in capsys.readouterr().err


# -- the result -------------------------------------------------------------------------------------------------------


def test_the_result_says_what_the_counts_say(model: HookedModel) -> None:
    result = unit_statistics(model, TEXT, n_batches=3, batch_size=8, context=48, top=5)
    levels = result.frames["levels"].query("model == 'model'")
    assert result.params["positions"] == 3 * 8 * 48
    assert {"top": 5, "controls": True, "untrained": 3}.items() <= result.params.items()
    assert set(levels["kind"]) == {"x_sparse", "y_sparse", "xy_sparse"}
    by_kind = levels.groupby("kind")
    for kind, group in by_kind:
        assert result.metrics[f"{kind}_firing_rate"] == pytest.approx(group["firing_rate"].mean())
        assert result.metrics[f"{kind}_near_silent"] == pytest.approx(group["near_silent"].mean())
        assert (group["firing_rate"] >= group["firing_rate_01"]).all()
        assert (group["firing_rate_01"] >= group["firing_rate_10"]).all()
        assert set(result.controls[f"{kind}_firing_rate"]) == {"untrained", "shuffled_text"}
    x, xy = (levels.query(f"kind == '{kind}'").set_index("level")["firing_rate"] for kind in ("x_sparse", "xy_sparse"))
    opened = levels.query("kind == 'xy_sparse'").set_index("level")["open_given_x"]
    np.testing.assert_allclose(opened, xy / x)
    rates = result.frames["rates"].query("model == 'model'").groupby(["kind", "level"])["share"].sum()
    np.testing.assert_allclose(rates, 1.0)
    assert {(a, b) for a, b in result.frames["alike"][["level", "other_level"]].to_numpy()} == {(0, 1), (0, 2), (1, 2)}
    assert {"firing", "rates_xy_sparse", "selectivity_xy_sparse"} <= set(result.figures)
    units = result.frames["top_units"]
    assert (units["events"] >= 20).all()
    assert (units.groupby("kind").size() <= 5).all()
    report = unit_report(result)
    assert "xy_sparse_firing_rate" in report
    assert "⟦" in report
    assert "published 0.03" in report


def test_an_untrained_model_is_its_own_control() -> None:
    """At initialisation nothing is learned: no claim is supported, and selectivity is already far from 1."""
    fresh = build_model(CONFIG, seed=5)
    result = unit_statistics(fresh, TEXT, n_batches=4, context=48)
    assert result.metrics["xy_sparse_firing_rate"] == pytest.approx(0.25, abs=0.06)
    assert result.metrics["xy_sparse_selectivity"] > 10
    again = unit_statistics(untrained_model(fresh, seed=0), TEXT, n_batches=4, context=48, untrained=1)
    for metric, value in again.metrics.items():
        assert again.controls[metric]["untrained"] == value
    assert set(again.verdicts.values()) == {"not supported"}


def test_units_that_fire_once_are_not_ranked(model: HookedModel) -> None:
    """One event among P positions has the largest selectivity there is; the floor of events leaves it out."""
    name, unit = "blocks.0.hook_x_sparse", 3
    tokens = torch.full((4, 48), ord("e"))
    tokens[2, 7] = ord("@")

    def plant(activation: torch.Tensor, hook: HookPoint) -> torch.Tensor:
        return torch.cat([activation[..., :unit], planted(activation), activation[..., unit + 1 :]], dim=-1)

    def planted(activation: torch.Tensor) -> torch.Tensor:
        column = torch.zeros_like(activation[..., :1])
        if len(activation) == 4:
            column[2, 7] = 0.5
        return column

    with model.hooks(fwd_hooks=[("blocks.0.hook_x_sparse", plant)]):
        counts = count_units(model, tokens, [name])[name]
        found = unit_statistics(model, tokens.flatten(), [name], sampling="tiles", context=48, controls=False)
    for head in (0, 1):
        assert int(counts.events[24 * head + unit]) == 1
        assert float(counts.selectivity[24 * head + unit]) == pytest.approx(4 * 48)
        assert float(counts.max_over_active[24 * head + unit]) == pytest.approx(1.0)
    assert unit not in found.frames["top_units"]["unit"].tolist()
    assert len(found.frames["top_units"])


def test_any_point_of_any_model_can_be_counted() -> None:
    """MLP neurons of a decoder, signals of a reFlow; of what can be negative the positive part."""
    for name, points in (("gpt2_new", 2), ("reflow", 3)):
        model = random_model(name)
        assert len(default_points(model)) == points
        result = unit_statistics(model, TEXT, n_batches=2, batch_size=4, context=24)
        assert 0.3 < result.metrics["mlp_post_firing_rate"] < 0.7
        assert ("unembed_signal_firing_rate" in result.metrics) == (name == "reflow")
        assert "alike" not in result.frames  # blocks with weights of their own have no unit in common
        assert "the same unit" not in unit_report(result)
    stream = unit_statistics(model, TEXT, ["blocks.1.hook_resid_post"], n_batches=2, batch_size=4, context=24)
    assert set(stream.frames["top_units"]["head"]) <= {-1}
    with pytest.raises(ReflowlensError, match="units are of"):
        unit_statistics(model, TEXT, ["blocks.0.attn.hook_pattern"], context=24)
    with pytest.raises(ReflowlensError, match="no hook"):
        unit_statistics(model, TEXT, ["blocks.7.mlp.hook_post"], context=24)
    with pytest.raises(ReflowlensError, match="at least 1, got 0: controls=False leaves them out"):
        unit_statistics(model, TEXT, context=24, untrained=0)


def test_one_name_is_one_point_or_kind(model: HookedModel) -> None:
    """Not its letters."""
    assert points_named(model, "xy_sparse") == [f"blocks.{level}.hook_xy_sparse" for level in range(3)]
    assert points_named(model, "blocks.1.hook_x_sparse") == ["blocks.1.hook_x_sparse"]


@pytest.mark.parametrize(
    ("given", "what"),
    [
        (["To be", "or not"], "list"),
        ([[1, 2], [3]], "list"),
        (b"To be", "bytes"),
        (Path("val.txt"), "Path"),
        (np.array([1.7]), r"float64 \[1\]"),
        (torch.tensor([1.7]), r"torch.float32 \[1\]"),
        (np.ones((2, 3), dtype=int), r"torch.int64 \[2, 3\]"),
    ],
)
def test_a_text_is_one_text_or_its_tokens(model: HookedModel, given: Any, what: str) -> None:
    with pytest.raises(ReflowlensError, match=f"one text or its token ids .* were expected, got .*{what}"):
        as_stream(model, given)


def test_held_out_text_in_rows(model: HookedModel) -> None:
    stream = as_stream(model, "abcdefghij")
    for ids in (stream, list(stream), stream.tolist(), stream.numpy().astype(np.uint16)):
        assert torch.equal(as_stream(model, ids), stream)
    assert tiles(stream, 4).tolist() == [list(b"abcd"), list(b"efgh")]
    drawn = windows(stream, 50, 4, seed=0)
    assert torch.equal(drawn, windows(stream, 50, 4, seed=0))
    assert {bytes(row.tolist()) for row in drawn} <= {b"abcdefghij"[i : i + 4] for i in range(7)}
    assert sorted(shuffled(stream, 1).tolist()) == stream.tolist()
    assert unit_statistics(model, TEXT, sampling="tiles", context=96, quick=True).params["positions"] == 16 * 96
    for rows in (lambda: tiles(stream, 11), lambda: windows(stream, 1, 11, 0)):
        with pytest.raises(ReflowlensError, match="too few"):
            rows()
    with pytest.raises(ReflowlensError, match="'windows' or 'tiles'"):
        unit_statistics(model, TEXT, sampling="rows")  # type: ignore[arg-type]


def test_a_window_shows_what_stands_around_the_peak(model: HookedModel) -> None:
    tokens = torch.tensor([list(b"x" * 30), list(b"To be,\nor not to be: that is t")])
    assert context_of(model, tokens, 30 + 7) == "To be,\\n⟦o⟧r not to"
    assert context_of(model, tokens, 0) == "⟦x⟧xxxxxxxx"
    assert len(context_of(model, tokens, 29)) == 24 + 3


def test_the_figure_of_firing_rates_has_the_intervals_of_the_seed(model: HookedModel) -> None:
    tokens = windows(as_stream(model, TEXT), 8, 48, seed=0)
    counts = {"model": count_units(model, tokens, points_named(model, "xy_sparse"), batch_size=8)}
    bands = [firing_by_level(counts, kind_of, seed).to_json() for seed in (1, 1, 2)]
    assert bands[0] == bands[1] != bands[2]
