"""Results by group of prompts: as each group alone has them, and in the measures of a task."""

from __future__ import annotations

import numpy as np
import pytest

from analyses.statistics.intervals import bootstrap_interval, rate_interval
from analyses.tasks.by_group import group_figures, group_frames
from analyses.tasks.head_ablation import head_ablation
from analyses.tasks.logit_attribution import direct_logit_attribution
from reflowlens.prompts import Prompts
from tests.support.planted_tasks import copying_model, copying_prompts

VALUES = np.array([0.0, 1.0, 1.0, 4.0, 0.5])
PROMPTS = Prompts.of([{"clean": "x", "answer": "y", "group": name} for name in "abbac"])


def test_groups_are_what_each_is_alone():
    frames = group_frames(PROMPTS, {"effect": VALUES, "right": VALUES.round() > 0}, seed=3, rates=["right"])
    table = frames["groups"].set_index(["group", "metric"])
    assert list(dict.fromkeys(frames["groups"]["group"])) == ["all", "a", "b", "c"]
    row = table.loc[("a", "effect")]
    assert (row["prompts"], row["value"]) == (2, 2.0)
    assert (row["low"], row["high"]) == bootstrap_interval([0.0, 4.0], seed=3)
    assert tuple(table.loc[("b", "right"), ["low", "high"]]) == rate_interval([1, 1])
    assert table.loc[("c", "effect"), ["low", "high"]].isna().all()
    assert table.loc[("all", "effect"), "value"] == VALUES.mean()
    some = group_frames(PROMPTS, {"effect": VALUES[[3, 4]]}, seed=3, rows=[3, 4])["groups"]
    assert some.set_index("group")["value"].to_dict() == {"all": 2.25, "a": 4.0, "c": 0.5}
    without = Prompts.of(PROMPTS.frame.drop(columns="group"))
    assert group_figures(group_frames(without, {"effect": VALUES}, seed=3), "Effects") == {}


def test_several_values_of_a_unit_count_as_one():
    """Units 0 and 1 in group a, 1 again in b: each is averaged where it is before groups are."""
    values = {"right": np.array([1.0, 0.0, 1.0, 0.0, 1.0])}
    found = group_frames(PROMPTS, values, seed=3, rows=[0, 0, 3, 1, 2], units=[0, 0, 1, 1, 1], rates=["right"])
    table = found["groups"].set_index("group")
    assert table["prompts"].to_dict() == {"all": 2, "a": 2, "b": 1}
    assert table["value"].to_dict() == pytest.approx({"all": (0.5 + 2 / 3) / 2, "a": 0.75, "b": 0.5})
    assert table["low"].isna().to_dict() == {"all": False, "a": False, "b": True}


@pytest.mark.parametrize("measure", [direct_logit_attribution, head_ablation])
def test_measures_of_a_task_tell_their_results_by_group(measure):
    prompts = copying_prompts(12)
    grouped = Prompts.of(prompts.frame.assign(group=["first", "second"] * 6))
    result = measure(copying_model(noise=0.01), grouped, progress=False)
    groups = result.frames["groups"].set_index(["group", "metric"])["value"]
    assert "groups" in result.figures
    if measure is head_ablation:
        assert groups["all", "largest_drop"] == pytest.approx(result.metrics["largest_drop"])
    else:
        by_prompt = result.frames["prompts"].groupby("group")["logit_diff"].mean()
        assert groups.xs("logit_diff", level="metric")[["first", "second"]].tolist() == pytest.approx(list(by_prompt))
        assert groups["all", "from_heads"] == pytest.approx(result.metrics["from_heads"])
    alone = measure(copying_model(noise=0.01), Prompts.of(prompts.frame.drop(columns="group")), progress=False)
    assert "groups" not in {*alone.frames, *alone.figures}
