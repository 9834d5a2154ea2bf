"""Streaming counts of units against the whole table of activations, and the analysis on planted units."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformer_lens.hook_points import HookPoint

from analyses import unit_statistics
from analyses.held_out import as_stream, shuffled, tiles, windows
from analyses.unit_counts import SHARES, count_units
from analyses.unit_statistics import context_of, default_points, unit_report
from reflowlens.errors import ReflowlensError
from reflowlens.models import build_model
from reflowlens.models.base import HookedModel
from tests.test_bdh import CONFIG, random_bdh
from tests.tiny import random_model

TEXT = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf8")


@pytest.fixture(scope="module")
def model() -> HookedModel:
    return random_bdh()


@torch.no_grad()
def test_counts_are_those_of_the_whole_table(model: HookedModel) -> None:
    """In batches that do not divide the rows, of two points of one pass; percentiles are numpy's."""
    tokens = tiles(as_stream(model, TEXT[:2400]), 48)[:21]
    points = ["blocks.0.hook_x_sparse", "blocks.2.hook_xy_sparse"]
    found = count_units(model, tokens, points, batch_size=4)
    _, cache = model.run_with_cache(tokens, names_filter=points)
    for name in points:
        values = cache[name].flatten(2).flatten(0, 1)
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
        assert torch.allclose(counts.row_rates, (cache[name] > 0).double().flatten(1).mean(1))


def test_the_result_says_what_the_counts_say(model: HookedModel) -> None:
    result = unit_statistics(model, TEXT, n_batches=3, batch_size=8, context=48, top=5)
    levels = result.frames["levels"].query("model == 'model'")
    assert result.params["positions"] == 3 * 8 * 48
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
    again = unit_statistics(build_model(CONFIG, seed=1), TEXT, n_batches=4, context=48)
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
    stream = unit_statistics(model, TEXT, ["blocks.1.hook_resid_post"], n_batches=2, batch_size=4, context=24)
    assert set(stream.frames["top_units"]["head"]) <= {-1}
    with pytest.raises(ReflowlensError, match="units are of"):
        unit_statistics(model, TEXT, ["blocks.0.attn.hook_pattern"], context=24)
    with pytest.raises(ReflowlensError, match="no hook"):
        unit_statistics(model, TEXT, ["blocks.7.mlp.hook_post"], context=24)


def test_held_out_text_in_rows(model: HookedModel) -> None:
    stream = as_stream(model, "abcdefghij")
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
