from __future__ import annotations

import math
import re

import pandas as pd
import pytest

from analyses.controls.nulls import untrained_view
from analyses.experiments.crystallisation_boundary import compared_boundaries
from analyses.registry import Experiment
from analyses.result.finding import Finding
from analyses.result.result import Result
from analyses.runner.comparison import compare_models, side_by_side, write_comparison
from reflowlens.checkpoints import model_hash, save_model
from reflowlens.cli import main
from reflowlens.errors import ReflowlensError
from reflowlens.signals import signal_view
from tests.support.tiny import random_model


@pytest.fixture
def stubs(monkeypatch):
    """Experiment 7 takes a view and says which; 9 takes none and fails on a GPT-2."""
    calls = []

    def layer_evolution(model, *, view=None, seed=0, quick=False, progress=False):
        calls.append((model.cfg.architecture, view, seed, quick))
        value = {None: 1.0, "svd": 0.25, "rotated": 0.125}[view]
        controls = {"untrained": 0.5, "shuffled_norm": 2.0}
        share = Finding(value, (value / 2, value * 2), controls, "supported")
        return Result("layer_evolution", "Layer Evolution", findings={"share": share, "plain": Finding(1.0)})

    def causal_ablation(model, *, seed=0, quick=False, progress=False):
        if model.cfg.architecture == "gpt2":
            raise ReflowlensError("no signals")
        return Result("causal_ablation", "Causal Ablation", metrics={"area": 3.0}, controls={"area": {"random": 1.0}})

    functions = {"layer_evolution": layer_evolution, "causal_ablation": causal_ablation}
    monkeypatch.setattr(Experiment, "load", lambda self: functions[self.name])
    return calls


def test_a_row_a_model_view_metric_and_control(stubs):
    models = {"ours": random_model("reflow"), "theirs": random_model("gpt2")}
    table = compare_models(models, ["native", "svd"], [7, 9], seed=3, quick=True)
    assert stubs == [(name, view, 3, True) for name in ("reflow", "gpt2") for view in (None, "svd")]
    rows = table.query("model == 'ours' and view == 'svd' and metric == 'share'")
    assert rows[["experiment", "value", "low", "high", "verdict"]].drop_duplicates().to_numpy().tolist() == [
        ["layer_evolution", 0.25, 0.125, 0.5, "supported"]
    ]
    assert dict(zip(rows["control"], rows["control_value"], strict=True)) == {"untrained": 0.5, "shuffled_norm": 2.0}
    (failed,) = table.query("error != ''").to_dict("records")
    assert (failed["model"], failed["experiment"], failed["error"]) == ("theirs", "causal_ablation", "no signals")
    assert math.isnan(failed["value"])


def test_models_stand_side_by_side(stubs):
    models = {"ours": random_model("reflow"), "theirs": random_model("gpt2")}
    shown = side_by_side(compare_models(models, ["native", "rotated"], [7, 9]))
    assert list(shown.columns) == ["ours native", "ours rotated", "ours", "theirs native", "theirs rotated", "theirs"]
    assert list(shown.index) == [("layer_evolution", "share"), ("causal_ablation", "area"), ("causal_ablation", "")]
    share = shown.loc[("layer_evolution", "share")]
    assert share["ours native"] == "1 (0.5 to 2); untrained 0.5, shuffled_norm 2; supported"
    assert share["theirs rotated"] == "0.125 (0.0625 to 0.25); untrained 0.5, shuffled_norm 2; supported"
    assert shown.loc[("causal_ablation", "area"), "ours"] == "3; random 1"
    assert shown.loc[("causal_ablation", ""), "theirs"] == "no signals"
    assert shown.loc[("layer_evolution", "share"), "ours"] == ""


def test_the_untrained_model_is_the_first_ones_architecture(stubs, tmp_path):
    path = str(save_model(tmp_path / "model", random_model("reflow_lite"), {}))
    table = compare_models([path, "untrained"], experiments=7)
    assert list(dict.fromkeys(table["model"])) == [path, "untrained"]
    assert [architecture for architecture, *_ in stubs] == ["reflow_lite", "reflow_lite"]
    with pytest.raises(ReflowlensError, match="untrained is given twice"):
        compare_models([path, "untrained", "untrained"], experiments=7)
    with pytest.raises(ReflowlensError, match="begins with a trained model"):
        compare_models(["untrained", path], experiments=7)
    with pytest.raises(ReflowlensError, match="no view 'spun'"):
        compare_models([path], ["spun"], experiments=7)


def test_the_untrained_model_is_not_its_own_control(monkeypatch):
    def layer_evolution(model, *, view=None, seed=0, quick=False, progress=False):
        control = untrained_view(signal_view(model), seed).model
        norm = Finding(model.W_E.A.norm().item(), controls={"untrained": control.W_E.A.norm().item()})
        return Result("layer_evolution", "Layer Evolution", findings={"norm": norm})

    monkeypatch.setattr(Experiment, "load", lambda self: layer_evolution)
    table = compare_models(["reflow-nano", "untrained"], experiments=7).set_index("model")
    assert table.loc["untrained", "value"] != table.loc["untrained", "control_value"]
    assert table.loc["reflow-nano", "control_value"] == table.loc["untrained", "control_value"]


def test_a_view_that_is_named_twice_is_one(stubs):
    once, twice = (compare_models({"m": random_model("reflow")}, views, 7) for views in (["svd"], ["svd", "svd"]))
    pd.testing.assert_frame_equal(once, twice)


def test_a_result_without_metrics_says_why(monkeypatch):
    def layer_evolution(model, *, progress=False):
        return Result("layer_evolution", "Layer Evolution", notes=["nothing to measure"])

    monkeypatch.setattr(Experiment, "load", lambda self: layer_evolution)
    shown = side_by_side(compare_models({"m": random_model("reflow")}, experiments=7))
    assert shown.loc[("layer_evolution", ""), "m"] == "nothing to measure"


def test_the_page_says_how_it_was_made(stubs, tmp_path):
    model = random_model("reflow")
    table = compare_models({"ours": model}, ["svd"], 7, seed=3, quick=True)
    page = write_comparison(table, tmp_path).read_text(encoding="utf-8")
    assert f"<p>ours {model_hash(model)[:12]} · --seed 3 · --quick</p>" in page
    (settings,) = pd.read_csv(tmp_path / "comparison.csv")[["seed", "quick", "model_hash"]].drop_duplicates().to_numpy()
    assert settings.tolist() == [3, True, model_hash(model)]


def test_the_command_writes_a_table_to_read_and_one_to_compute_with(stubs, tmp_path, capsys):
    path, out = str(save_model(tmp_path / "model", random_model("reflow"), {})), tmp_path / "out"
    arguments = [
        "run",
        path,
        "7",
        "--compare",
        "untrained",
        "--views",
        "native",
        "svd",
        "--out",
        str(out),
        "--no-cache",
    ]
    assert main(arguments) == 0
    assert capsys.readouterr().out.strip() == str(out / "comparison.html")
    page = (out / "comparison.html").read_text(encoding="utf-8")
    assert "untrained svd" in page
    cell = re.search(r"<td[^>]*><b>0\.25</b>(.*?)</td>", page, re.S).group(1)
    assert re.sub(r"<[^>]*>", "|", cell) == "||0.125 to 0.5|||untrained 0.5|||shuffled norm 2|||✓ supported|"
    assert "http" not in re.sub(r"<script>.*?</script>", "", page, flags=re.S), "it opens without a network"
    assert set(pd.read_csv(out / "comparison.csv")["view"]) == {"native", "svd"}


def test_a_comparison_without_any_result_is_a_failure(stubs, tmp_path, capsys):
    path = str(save_model(tmp_path / "model", random_model("gpt2"), {}))
    command = ["run", path, "9", "--compare", "untrained", "--out", str(tmp_path / "out"), "--no-cache"]
    assert main(command) == 1
    assert "untrained  causal_ablation: no signals" in capsys.readouterr().err
    assert "no signals" in (tmp_path / "out" / "comparison.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--views", "svd"], "--compare"), (["--compare", "untrained", "--analogies", "words.txt"], "--analogies")],
)
def test_an_option_that_would_do_nothing_is_an_error(options, message, stubs, tmp_path, capsys):
    path = str(save_model(tmp_path / "model", random_model("reflow"), {}))
    assert main(["run", path, "7", *options, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert stubs == []


def test_text_of_an_error_is_not_markup(tmp_path):
    row = {"model": "m", "view": "", "experiment": "x", "metric": "", "control": "", "verdict": "", "error": "<b>"}
    row |= {"model_hash": "0" * 64, "seed": 0, "quick": False}
    path = write_comparison(pd.DataFrame([row]), tmp_path)
    assert "&lt;b&gt;" in path.read_text(encoding="utf-8")


def row_of(model, value, control=math.nan):
    row = {"model": model, "view": "native", "experiment": "layer_evolution", "metric": "crystallisation_share"}
    row |= {"value": value, "low": value - 0.1, "high": value + 0.1, "published": 0.5, "verdict": "supported"}
    return row | {"control": "untrained", "control_value": control, "error": ""}


def test_the_boundaries_of_the_models_are_drawn_through_their_native_views(tmp_path):
    rows = [row_of("ours", 0.75, 0.25), row_of("theirs", 0.5, 0.25), row_of("ours", 0.1, 0.2) | {"view": "svd"}]
    comparison = pd.DataFrame(rows).assign(model_hash="0", seed=0, quick=False)
    found = compared_boundaries(comparison)
    assert {name: frame["share"].tolist() for name, frame in found.items()} == {"ours": [0.75], "theirs": [0.5]}
    assert found["ours"]["untrained"].tolist() == [0.25]
    page = write_comparison(comparison, tmp_path, lang="zh").read_text(encoding="utf-8")
    assert '<html lang="zh">' in page
    assert "预测在何处成定局" in page
    assert "结晶深度份额" in page
