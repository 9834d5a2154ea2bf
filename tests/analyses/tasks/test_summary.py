"""Summaries of sweeps: each cell is that of its own prompts, by other means; what is not known is not said."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import reflowlens as rl
from analyses.statistics.intervals import bootstrap_band
from analyses.statistics.pvalues import benjamini_hochberg, holm, paired_permutation_pvalue
from analyses.tasks.summary import summarise
from reflowlens.figures import effect_grid
from reflowlens.sweeps.patching_result import PatchingResult

N = 10
PROMPTS = rl.Prompts.of([{"clean": "a" * (1 + i), "group": "even" if i % 2 == 0 else "odd"} for i in range(N)])


@pytest.fixture(scope="module")
def result() -> PatchingResult:
    """Two layers of three positions; the last is missing in all prompts but one, the one before it in some."""
    drawn = np.random.default_rng(0).normal(size=(2, 3, N)) + np.array([[0.0], [1.0], [5.0]])
    missing = np.zeros((2, 3, N), dtype=bool)
    missing[:, 1, :4] = missing[:, 2, 1:] = True
    values, baseline = torch.tensor(drawn).masked_fill(torch.tensor(missing), torch.nan), torch.full((N,), 2.0)
    index = pd.DataFrame([(layer, pos) for layer in range(2) for pos in range(3)], columns=["layer", "pos"])
    return PatchingResult(
        values + 2.0, ["layer", "pos"], index, ["m"], reduced=False, baseline=baseline, missing=torch.tensor(missing)
    )


def test_a_cell_is_that_of_its_own_prompts(result: PatchingResult) -> None:
    frame = summarise(result, PROMPTS, seed=3)
    assert frame.columns.tolist() == ["layer", "pos", "group", "prompts", "mean", "low", "high", "p", "p_adjusted"]
    assert frame.group.tolist() == ["all"] * 6 + ["even"] * 6 + ["odd"] * 6
    effects = result.effect().numpy()
    rows = {"all": range(N), "even": range(0, N, 2), "odd": range(1, N, 2)}
    for row in frame.itertuples():
        own = effects[row.layer, row.pos, list(rows[row.group])]
        own = own[~np.isnan(own)]
        assert row.prompts == len(own)
        np.testing.assert_allclose(row.mean, own.mean() if len(own) else np.nan)
        if len(own) < 2:
            assert np.isnan([row.low, row.high, row.p, row.p_adjusted]).all()
            continue
        np.testing.assert_allclose(row.p, paired_permutation_pvalue(own, "two-sided"))
        low, high = bootstrap_band(own[:, None], resamples=4000, seed=1)
        np.testing.assert_allclose([row.low, row.high], [low[0], high[0]], atol=0.12)
    of_all = frame[(frame.group == "all") & frame.p.notna()]
    np.testing.assert_allclose(of_all.p_adjusted, holm(of_all.p))
    other = summarise(result, adjust="bh")
    np.testing.assert_allclose(other.p_adjusted.dropna(), benjamini_hochberg(other.p.dropna()))


def test_what_cannot_be_summarised(result: PatchingResult) -> None:
    with pytest.raises(rl.ReflowlensError, match="of 10 prompts, but 2 are given"):
        summarise(result, PROMPTS.select([0, 1]))
    with pytest.raises(rl.ReflowlensError, match="'holm' or 'bh'"):
        summarise(result, adjust="bonferroni")  # type: ignore[arg-type]
    undefined = dataclasses.replace(result, values=result.values.clone())
    undefined.values[1, 0, 7] = torch.nan
    with pytest.raises(rl.ReflowlensError, match="prompt 7: the effect of cell 3 is nan"):
        summarise(undefined)
    with pytest.warns(UserWarning, match="from the left"):
        summarise(dataclasses.replace(result, misaligned=True))


def test_it_begins_with_whether_the_model_does_the_task(tiny_models: dict[str, Any]) -> None:
    model, texts = tiny_models["gpt2"], ["the cat", "a dog", "go"] * 4
    with torch.no_grad():
        best = [int(model(text)[0, -1, :256].argmax()) for text in texts]
    rows = zip(texts, best, strict=True)
    right = rl.Prompts.of([{"clean": text, "answer": top, "wrong_answer": (top + 1) % 256} for text, top in rows])
    wrong = rl.Prompts.of(right.frame.rename(columns={"answer": "wrong_answer", "wrong_answer": "answer"}))
    cells = [rl.Ablate("mlp_out", layer=0)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frame = summarise(rl.sweep(model, right, cells=cells, metric=rl.metrics.logit_diff(right)), right, model=model)
    assert frame.attrs["performance"].startswith("accuracy 1.000")
    with pytest.warns(UserWarning, match="does not do this task"):
        frame = summarise(rl.sweep(model, wrong, cells=cells, metric=rl.metrics.logit_diff(wrong)), wrong, model=model)
    assert frame.attrs["performance"].endswith("not to be read")


def test_a_figure_marks_what_is_found_and_greys_what_is_not_there(result: PatchingResult) -> None:
    frame = summarise(result)
    frame.loc[frame.pos == 2, "mean"] = np.nan
    frame.loc[0, "p_adjusted"] = 0.2
    frame.loc[1, "p_adjusted"] = 0.01
    figure = effect_grid(frame, "pos", "layer")
    grid, absent = figure.data
    assert grid.text[0].tolist() == ["", "●", ""]
    assert grid.zmax == -grid.zmin == pytest.approx(frame["mean"].abs().max())
    assert "p adjusted" in grid.customdata[0][1]
    assert "prompts: 6" in grid.customdata[0][1]
    assert np.isnan(np.asarray(absent.z)).tolist() == [[True, True, False]] * 2
    assert absent.hovertemplate.startswith("no such position")
    with pytest.raises(rl.ReflowlensError, match="one row a cell"):
        effect_grid(summarise(result, PROMPTS), "pos", "layer")
