from __future__ import annotations

import dataclasses
import errno
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from analyses.costs import Sizes, Speed, Work
from analyses.experiments.crystallisation_boundary import boundary_figure, crystallisation_boundary
from analyses.measures.depth import layer_grid
from analyses.measures.lens import lens_points
from analyses.registry import EXPERIMENTS, Experiment
from analyses.result import kept as result_cache
from analyses.result.finding import Finding
from analyses.result.result import Result
from analyses.runner import schedule, suite
from analyses.runner.comparison import compare_models
from analyses.runner.suite import model_card, parse_selection, run_suite
from reflowlens import checkpoints
from reflowlens.config import ModelConfig
from reflowlens.errors import ReflowlensError
from reflowlens.models import build_model
from reflowlens.storage.atomic import sole_writer
from tests.support.planted import empty_model
from tests.support.processes import in_a_process
from tests.support.tiny import tiny_config

ALL = ["semantic_algebra", "layer_evolution", "causal_ablation"]


@pytest.fixture
def three():
    """The suite with three experiments, however many there are."""
    all_of_them = dict(EXPERIMENTS)
    for number in all_of_them.keys() - {5, 7, 9}:
        del EXPERIMENTS[number]
    yield
    EXPERIMENTS.clear()
    EXPERIMENTS.update(all_of_them)


@pytest.fixture(scope="module")
def tiny():
    return build_model(tiny_config("reflow", model_name="tiny model/1"))


@pytest.fixture
def stubs(three, monkeypatch, tmp_path):
    """Experiments that record how they were called, by name; a test replaces those that should do something else."""
    calls = {}

    def stub(name):
        def experiment(model, *, seed=0, quick=False, progress=False):
            calls[name] = {"seed": seed, "quick": quick, "progress": progress}
            frame = pd.DataFrame({"layer": [0, 1]})
            return Result(name, name.title(), metrics={"accuracy": 0.5}, frames={"layers": frame})

        return experiment

    functions = {name: stub(name) for name in ALL}
    functions["calls"] = calls
    monkeypatch.setattr(Experiment, "load", lambda self: functions[self.name])
    monkeypatch.setenv("REFLOWLENS_CACHE", str(tmp_path / "cache"))
    return functions


def metrics(run):
    return json.loads((run.folder / "results.json").read_text(encoding="utf-8"))


# -- the registry -----------------------------------------------------------------------------------------------------


def test_numbers_names_and_functions_of_the_registry_agree():
    assert [EXPERIMENTS[number].name for number in (5, 7, 9)] == ALL
    assert list(EXPERIMENTS) == sorted(EXPERIMENTS)
    for number, experiment in EXPERIMENTS.items():
        assert experiment.number == number
        function = experiment.load()
        assert function.__name__ == experiment.name
        assert {"seed", "quick", "progress"} <= inspect.signature(function).parameters.keys()


@pytest.mark.parametrize(
    ("selection", "numbers"),
    [
        ("all", [5, 7, 9]),
        (["all"], [5, 7, 9]),
        (["7", "5"], [5, 7]),
        ("5,7", [5, 7]),
        ("9, layer_evolution", [7, 9]),
        ([9, "causal_ablation", "9"], [9]),
        (7, [7]),
    ],
)
def test_parse_selection(three, selection, numbers):
    assert parse_selection(selection) == numbers


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ("6", "no experiment '6'; there are 5 semantic_algebra, 7 layer_evolution, 9 causal_ablation, or 'all'"),
        ("layer_evolutoin", r"did you mean 'layer_evolution'\? There are 5 semantic_algebra"),
        (["5", "x"], "no experiment 'x'"),
        ([], "no experiment is selected: 'all' or some of 5 semantic_algebra"),
        (" , ", "no experiment is selected"),
    ],
)
def test_a_wrong_selection_names_what_there_is(three, selection, message):
    with pytest.raises(ReflowlensError, match=message):
        parse_selection(selection)


# -- running ----------------------------------------------------------------------------------------------------------


def test_everything_is_saved_below_the_given_folder(tiny, stubs, tmp_path, capsys):
    run = run_suite(tiny, out=tmp_path / "report", seed=3, quick=True)
    assert list(run.results) == ALL
    assert (run.errors, run.interrupted) == ({}, False)
    assert stubs["calls"] == {name: {"seed": 3, "quick": True, "progress": False} for name in ALL}
    assert run.folder == tmp_path / "report"
    assert run.report == tmp_path / "report" / "report.html"
    assert {path.name for path in run.folder.iterdir()} == {"report.html", "results.json", *ALL}
    assert Result.load(run.folder / "layer_evolution").metrics == {"accuracy": 0.5}
    entry = metrics(run)["layer_evolution"]
    assert entry["metrics"] == run.results["layer_evolution"].to_json_metrics()
    assert entry["error"] is None
    assert entry["seconds"] == run.seconds["layer_evolution"] >= run.results["layer_evolution"].seconds >= 0
    assert capsys.readouterr() == ("", ""), "quiet where there is no terminal"


def test_without_a_folder_every_run_gets_its_own(tiny, stubs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = run_suite(tiny, 7), run_suite(tiny, 7)
    assert first.folder != second.folder
    assert re.fullmatch(r"out/tiny_model_1/\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d(_\d+)?", second.folder.as_posix())
    assert list(metrics(second)) == ["layer_evolution"]
    assert run_suite(tiny, 7, model_name="nano").folder.parts[:2] == ("out", "nano")


def test_a_failing_experiment_does_not_stop_the_others(tiny, stubs, tmp_path):
    def too_few(model, **options):
        raise ReflowlensError("fewer than 10 questions <b>")

    def broken(model, **options):
        raise KeyError("layer")

    stubs["semantic_algebra"], stubs["causal_ablation"] = too_few, broken
    run = run_suite(tiny, out=tmp_path)
    assert list(run.results) == ["layer_evolution"]
    assert run.errors["semantic_algebra"] == "fewer than 10 questions <b>"
    assert re.fullmatch(r"KeyError: 'layer' \(test_suite.py, line \d+\)", run.errors["causal_ablation"])
    assert "Traceback" in (tmp_path / "causal_ablation" / "error.txt").read_text()
    assert metrics(run)["causal_ablation"] == {
        "metrics": {},
        "seconds": run.seconds["causal_ablation"],
        "error": run.errors["causal_ablation"],
    }
    page = run.report.read_text(encoding="utf-8")
    assert "fewer than 10 questions &lt;b&gt;" in page
    assert "KeyError: &#x27;layer&#x27;" in page


def test_a_refusal_is_no_failure_where_others_have_results(tiny, stubs, tmp_path):
    def lacks(model, **options):
        raise ReflowlensError("needs heads")

    stubs["semantic_algebra"] = lacks
    run = run_suite(tiny, [5, 7], out=tmp_path / "a")
    assert (run.refused, run.failed) == ({"semantic_algebra"}, False)
    assert run_suite(tiny, [5], out=tmp_path / "b").failed
    stubs["causal_ablation"] = lambda model, **options: 1 / 0
    broken = run_suite(tiny, [5, 7, 9], out=tmp_path / "c")
    assert (broken.refused, broken.failed) == ({"semantic_algebra"}, True)


def test_a_success_clears_the_error_of_an_earlier_run(tiny, stubs, tmp_path):
    working = stubs["layer_evolution"]
    stubs["layer_evolution"] = lambda model, **options: 1 / 0
    assert run_suite(tiny, 7, out=tmp_path).errors
    stubs["layer_evolution"] = working
    assert not run_suite(tiny, 7, out=tmp_path).errors
    assert not (tmp_path / "layer_evolution" / "error.txt").exists()


def test_a_result_that_cannot_be_saved_is_an_error(tiny, stubs, tmp_path):
    def spoiled(model, **options):
        result = Result("layer_evolution", "Layer Evolution")
        result.findings["late"] = Finding(float("nan"))
        return result

    stubs["layer_evolution"] = spoiled
    run = run_suite(tiny, 7, out=tmp_path)
    assert run.results == {}
    assert "late" in run.errors["layer_evolution"]


def test_ctrl_c_reports_what_is_done(tiny, stubs, tmp_path, capsys):
    def interrupt(model, **options):
        raise KeyboardInterrupt

    stubs["layer_evolution"] = interrupt
    run = run_suite(tiny, out=tmp_path)
    assert run.interrupted
    assert list(run.results) == ["semantic_algebra"]
    assert list(run.errors) == ["layer_evolution", "causal_ablation"]
    assert "causal_ablation" not in stubs["calls"]
    assert "interrupted: no result for layer_evolution, causal_ablation" in capsys.readouterr().err
    assert [entry["error"] for entry in metrics(run).values()] == [
        None,
        "interrupted before it was done",
        "not started",
    ]
    page = run.report.read_text(encoding="utf-8")
    assert "interrupted before it was done" in page
    assert "No result: not started" in page


def test_a_second_call_goes_on_where_ctrl_c_stopped_the_first(tiny, stubs, tmp_path, capsys):
    calls = counted(stubs, *ALL)
    works, interrupted = stubs["layer_evolution"], lambda model, **options: (_ for _ in ()).throw(KeyboardInterrupt)
    stubs["layer_evolution"] = interrupted
    assert run_suite(tiny, out=tmp_path, resume=True).interrupted
    assert f"with --out {tmp_path} goes on" in capsys.readouterr().err
    stubs["layer_evolution"] = works
    second = run_suite(tiny, out=tmp_path, resume=True)
    assert calls == ALL, "each once"
    assert (second.cached, second.errors, second.interrupted) == ({"semantic_algebra"}, {}, False)
    assert list(metrics(second)) == ALL
    written = second.report.stat().st_mtime_ns
    third = run_suite(tiny, out=tmp_path, resume=True)
    assert (third.cached, sorted(third.results)) == ({*ALL}, sorted(ALL))
    assert (calls, third.report.stat().st_mtime_ns) == (ALL, written), "there is nothing to do"
    assert "透镜" not in second.report.read_text(encoding="utf-8")
    run_suite(tiny, out=tmp_path, resume=True, lang="zh")
    assert 'lang="zh"' in second.report.read_text(encoding="utf-8")
    assert calls == ALL


def test_what_was_made_otherwise_is_run_again(tiny, stubs, tmp_path, monkeypatch):
    calls = counted(stubs, "layer_evolution")

    def run(model=tiny, **options):
        run_suite(model, 7, out=tmp_path / "out", **{"resume": True} | options)
        return len(calls)

    assert [run(), run(seed=1), run(quick=True), run(quick=True), run(resume=False, quick=True)] == [1, 2, 3, 3, 4]
    assert run(build_model(tiny.cfg, seed=1), quick=True) == 5
    monkeypatch.setattr(result_cache, "code_version", lambda: "other")
    assert run(build_model(tiny.cfg, seed=1), quick=True) == 6


def test_again_computes_anew_what_the_cache_has_and_keeps_that(tiny, stubs, tmp_path):
    counted(stubs, "layer_evolution")
    found = [
        run_suite(tiny, 7, out=tmp_path / name, cache=True, again=again).results["layer_evolution"].metrics["calls"]
        for name, again in (("a", False), ("b", True), ("c", False))
    ]
    assert found == [1, 2, 2]


# -- what it costs ----------------------------------------------------------------------------------------------------


@pytest.fixture
def priced(stubs, monkeypatch):
    """Experiments that say what they cost in seconds, full and quick, and take ``pace`` times as long by the clock."""
    seconds = {"semantic_algebra": (50.0, 20.0), "layer_evolution": (10.0, 10.0), "causal_ablation": (100.0, 30.0)}
    clock = SimpleNamespace(now=0.0, pace=1.0, forms={}, perf_counter=lambda: clock.now)
    for module in (schedule, suite):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(schedule, "measure_speed", lambda model: Speed(0, 0, 0, 0))
    for number, known in EXPERIMENTS.items():

        def experiment(model, *, quick=False, progress=False, name=known.name):
            clock.forms[name] = quick
            clock.now += clock.pace * seconds[name][quick]
            return Result(name, name.title())

        def cost(sizes, name=known.name):
            return Work("3 prompts × 2 layers", beside=seconds[name][sizes.quick])

        stubs[known.name] = experiment
        EXPERIMENTS[number] = dataclasses.replace(known, cost=cost)
    return clock


@pytest.mark.parametrize(
    ("budget", "quick", "left_out"),
    [
        (None, [False, False, False], []),
        (161, [False, False, False], []),
        (100, [False, False, True], []),
        (62, [True, False, True], []),
        (35, [True, False], ["causal_ablation"]),
        (15, [False], ["semantic_algebra", "causal_ablation"]),
    ],
)
def test_a_budget_makes_experiments_quick_and_leaves_out_the_most_expensive_last(
    tiny, priced, tmp_path, budget, quick, left_out
):
    run = run_suite(tiny, out=tmp_path, budget=budget)
    assert [*priced.forms.values()] == quick
    assert [*run.results] == [name for name in ALL if name not in left_out]
    assert run.errors == dict.fromkeys(left_out, "left out: it does not fit into the time that was given")
    assert not run.interrupted
    assert priced.now <= (budget or 160)


@pytest.mark.parametrize(("pace", "quick"), [(2, [False, False, True]), (0.5, [False, False, False])])
def test_the_plan_follows_what_has_been_run(tiny, priced, tmp_path, pace, quick):
    priced.pace = pace
    run_suite(tiny, out=tmp_path, budget=175)
    assert [*priced.forms.values()] == quick


def test_a_run_says_what_it_costs_and_how_far_it_is(tiny, priced, tmp_path, capsys):
    run_suite(tiny, out=tmp_path, budget=62, progress=True)
    assert capsys.readouterr().err.splitlines() == [
        "  5  Semantic Algebra: quick, about 00:20; 3 prompts × 2 layers",
        "  7  Layer Evolution: about 00:10; 3 prompts × 2 layers",
        "  9  Causal Ablation: quick, about 00:30; 3 prompts × 2 layers",
        "about 01:00 in all, estimated from timed passes",
        "0/3 experiments, Semantic Algebra (quick), 00:00 elapsed, about 01:00 left",
        "1/3 experiments, Layer Evolution, 00:20 elapsed, about 00:40 left",
        "2/3 experiments, Causal Ablation (quick), 00:30 elapsed, about 00:30 left",
        "3/3 experiments, 01:00 elapsed",
    ]
    run_suite(tiny, 9, out=tmp_path / "other", budget=20, progress=True)
    assert "Causal Ablation: does not fit into the time" in capsys.readouterr().err


def test_every_experiment_states_its_cost():
    speed = Speed(token=1e-3, read=1e-3, product=1.0, row=1e-3)
    for experiment in EXPERIMENTS.values():
        sizes = {
            (n, quick): Sizes(n, len(layer_grid(n, quick=quick)), len(lens_points(n)), 256, True, quick)
            for n in (12, 24, 48)
            for quick in (False, True)
        }
        seconds = {key: experiment.cost(each).seconds(speed) for key, each in sizes.items()}
        assert 0 < seconds[12, True] <= seconds[12, False]
        assert seconds[48, False] <= 2.1 * seconds[24, False], "not with the square of the depth"
        assert re.search(r"\d", experiment.cost(sizes[12, True]).told)


# -- what is written --------------------------------------------------------------------------------------------------


def test_metrics_are_written_while_the_run_goes_on(tiny, stubs, tmp_path):
    def look(model, **options):
        assert list(json.loads((tmp_path / "results.json").read_text())) == ["semantic_algebra"]
        return Result("layer_evolution", "Layer Evolution")

    stubs["layer_evolution"] = look
    assert not run_suite(tiny, [5, 7], out=tmp_path).errors


def test_analogies_go_to_the_experiment_that_takes_them(tiny, stubs, tmp_path):
    def algebra(model, *, analogies=None, seed=0, quick=False, progress=False):
        return Result("semantic_algebra", "Semantic Algebra", {"analogies": str(analogies)})

    stubs["semantic_algebra"] = algebra
    path = tmp_path / "questions-words.txt"
    path.write_text(": family\nking queen man woman\n")
    run = run_suite(tiny, out=tmp_path, analogies=str(path))
    assert run.results["semantic_algebra"].params == {"analogies": str(path)}


def test_analogies_that_cannot_be_read_are_found_before_anything_runs(tiny, stubs, tmp_path):
    with pytest.raises(ReflowlensError, match=r"cannot read .*nowhere\.txt"):
        run_suite(tiny, out=tmp_path / "out", analogies=tmp_path / "nowhere.txt")
    assert stubs["calls"] == {}
    assert not (tmp_path / "out").exists()


def test_a_bar_is_shown_when_asked_for(tiny, stubs, tmp_path, capsys):
    run_suite(tiny, out=tmp_path, progress=True)
    assert "3/3" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_found_before_anything_runs(tiny, stubs, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ReflowlensError, match=r"cannot write into .*file"):
        run_suite(tiny, out=tmp_path / "file")
    assert stubs["calls"] == {}


def own(model, name="layer_evolution", **metrics):
    """A result that knows which model it is of, as those of the experiments do."""
    params = {"model_hash": checkpoints.model_hash(model)}
    return Result(name, name, params, metrics=metrics, frames={"layers": pd.DataFrame({"layer": [0, 1]})})


def test_a_second_run_into_a_folder_keeps_what_the_first_left_there(tiny, stubs, tmp_path):
    stubs["causal_ablation"] = lambda model, **options: own(model, "causal_ablation", effect=2.5)
    stubs["semantic_algebra"] = lambda model, **options: 1 / 0
    first = run_suite(tiny, [5, 9], out=tmp_path / "out")
    second = run_suite(tiny, 7, out=tmp_path / "out")
    assert (list(second.results), second.errors) == (["layer_evolution"], {}), "a run is what it did itself"
    recorded = metrics(second)
    assert list(recorded) == ALL, "in the order of the experiments"
    assert recorded["causal_ablation"] == metrics(first)["causal_ablation"]
    assert "division by zero" in recorded["semantic_algebra"]["error"]
    page = second.report.read_text(encoding="utf-8")
    assert "2 experiments · 1 without a result" in page
    assert "2.5" in page
    third = run_suite(tiny, 9, out=tmp_path / "out")
    assert metrics(third)["layer_evolution"]["metrics"]["accuracy"]["value"] == 0.5


def test_an_interrupted_repetition_keeps_the_result_there_was(tiny, stubs, tmp_path):
    run_suite(tiny, out=tmp_path / "out")

    def interrupt(model, **options):
        raise KeyboardInterrupt

    stubs["layer_evolution"] = interrupt
    run = run_suite(tiny, [5, 7], out=tmp_path / "out")
    assert run.interrupted
    assert {name: entry["error"] for name, entry in metrics(run).items()} == dict.fromkeys(ALL)
    assert not run_suite(tiny, 9, out=tmp_path / "out").interrupted


def test_results_of_two_models_do_not_share_a_report(tiny, stubs, tmp_path):
    stubs["layer_evolution"] = lambda model, **options: own(model)
    other = build_model(tiny.cfg, seed=1)
    run_suite(tiny, 7, out=tmp_path / "out")
    with pytest.raises(ReflowlensError, match="holds the results of another model"):
        run_suite(other, 9, out=tmp_path / "out")
    assert list(metrics(run_suite(other, 7, out=tmp_path / "out"))) == ["layer_evolution"], "which it replaces"


def test_a_result_that_is_gone_matters_only_if_it_is_not_computed_again(tiny, stubs, tmp_path):
    run_suite(tiny, [5, 7], out=tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "layer_evolution")
    with pytest.raises(ReflowlensError, match="no result in"):
        run_suite(tiny, 5, out=tmp_path / "out")
    assert list(metrics(run_suite(tiny, 7, out=tmp_path / "out"))) == ALL[:2]


def test_two_runs_do_not_write_into_one_folder(tiny, stubs, tmp_path):
    with (
        sole_writer(tmp_path, "writing results into"),
        pytest.raises(ReflowlensError, match="another process is writing results into"),
    ):
        run_suite(tiny, out=tmp_path)
    assert not stubs["calls"]
    assert not list(tmp_path.iterdir())
    assert run_suite(tiny, out=tmp_path).report.is_file()


def test_a_full_disk_is_one_clear_error(tiny, stubs, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Result, "save", full)
    monkeypatch.setattr(suite, "replacing", full)
    with pytest.raises(ReflowlensError, match=r"cannot write into .*out: No space left on device"):
        run_suite(tiny, 7, out=tmp_path / "out")


@pytest.mark.parametrize("seed", [-1, 2**31])
def test_a_seed_that_not_every_generator_takes_is_an_error_before_anything_runs(tiny, stubs, tmp_path, seed):
    for call in (lambda: run_suite(tiny, out=tmp_path, seed=seed), lambda: compare_models({"tiny": tiny}, seed=seed)):
        with pytest.raises(ReflowlensError, match="seed must lie between 0 and"):
            call()
    assert stubs["calls"] == {}


def test_a_damaged_record_is_an_error_before_anything_runs(tiny, stubs, tmp_path):
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ReflowlensError, match=r"results\.json is damaged"):
        run_suite(tiny, out=tmp_path)
    assert stubs["calls"] == {}


# -- the cache --------------------------------------------------------------------------------------------------------


def counted(stubs, *names):
    """Experiments that count their calls."""
    calls = []

    def count(name):
        def experiment(model, *, seed=0, quick=False, analogies=None, progress=False):
            calls.append(name)
            return Result(name, name.title(), metrics={"calls": len(calls)}, frames={"x": pd.DataFrame({"x": [0.1]})})

        return experiment

    stubs |= {name: count(name) for name in names}
    return calls


def test_a_second_run_takes_its_results_from_the_cache(tiny, stubs, tmp_path):
    calls = counted(stubs, *ALL)
    first = run_suite(tiny, out=tmp_path / "a", cache=True)
    second = run_suite(tiny, out=tmp_path / "b", cache=True)
    assert calls == ALL
    assert (first.cached, second.cached) == (set(), {*ALL})
    assert metrics(second) == {
        name: entry | {"seconds": second.results[name].seconds} for name, entry in metrics(first).items()
    }
    assert second.results["layer_evolution"].frames["x"].equals(first.results["layer_evolution"].frames["x"])
    assert (tmp_path / "b" / "layer_evolution" / "result.json").is_file()
    assert not list((tmp_path / "cache").rglob("*.html")), "nor plotly.js, which is large"


def test_what_a_result_depends_on_is_computed_anew(tiny, stubs, tmp_path, monkeypatch):
    calls = counted(stubs, "layer_evolution")
    analogies = tmp_path / "questions-words.txt"
    analogies.write_text(": family\nking queen man woman\n")
    other = build_model(tiny.cfg, seed=1)
    runs = [(tiny, {}), (tiny, {"seed": 1}), (tiny, {"quick": True}), (tiny, {"analogies": analogies}), (other, {})]
    for _ in range(2):
        for model, options in runs:
            run_suite(model, 7, out=tmp_path / "out", cache=True, **options)
    assert len(calls) == len(runs)
    analogies.write_text(": family\nking queen boy girl\n")
    run_suite(tiny, 7, out=tmp_path / "out", cache=True, analogies=str(analogies))
    assert len(calls) == len(runs) + 1
    monkeypatch.setattr(result_cache, "code_version", lambda: "other")
    run_suite(tiny, 7, out=tmp_path / "out", cache=True)
    assert len(calls) == len(runs) + 2


def test_without_the_cache_nothing_is_read_or_kept(tiny, stubs, tmp_path):
    calls = counted(stubs, "layer_evolution")
    for _ in range(2):
        assert run_suite(tiny, 7, out=tmp_path / "out").cached == set()
    assert len(calls) == 2
    assert not (tmp_path / "cache").exists()


def test_a_hooked_model_is_not_the_one_of_its_hash(tiny, stubs, tmp_path):
    calls = counted(stubs, "layer_evolution")
    tiny.add_hook("hook_embed", lambda value, hook: 0 * value)
    run_suite(tiny, 7, out=tmp_path / "a", cache=True)
    tiny.reset_hooks()
    assert run_suite(tiny, 7, out=tmp_path / "b", cache=True).cached == set()
    assert len(calls) == 2


def test_a_model_that_drops_at_random_is_not_the_one_of_its_hash(stubs, tmp_path):
    calls = counted(stubs, "layer_evolution")
    sizes = {"n_layers": 1, "d_model": 8, "n_heads": 2, "d_head": 16, "d_mlp": 32, "d_vocab": 256, "n_ctx": 96}
    cfg = ModelConfig(architecture="bdh", **sizes, tie_word_embeddings=False, tokenizer_name="bytes", dropout=0.5)
    model = build_model(cfg)
    for training in (True, True, False, False):
        run_suite(model.train(training), 7, out=tmp_path / "out", cache=True)
    assert len(calls) == 3


def test_what_code_that_changed_meanwhile_has_made_is_not_kept(tiny, stubs, tmp_path, monkeypatch):
    calls = counted(stubs, "layer_evolution")
    result_cache.code_version()
    with monkeypatch.context() as edited:
        edited.setattr(result_cache, "_LIBRARIES", ())  # as good as another source
        run_suite(tiny, 7, out=tmp_path / "a", cache=True)
    assert run_suite(tiny, 7, out=tmp_path / "b", cache=True).cached == set()
    assert len(calls) == 2


def test_errors_and_damaged_entries_are_not_taken_from_the_cache(tiny, stubs, tmp_path):
    stubs["layer_evolution"] = lambda model, **options: 1 / 0
    assert run_suite(tiny, 7, out=tmp_path / "a", cache=True).errors
    calls = counted(stubs, "layer_evolution")
    assert not run_suite(tiny, 7, out=tmp_path / "b", cache=True).errors
    (manifest,) = (tmp_path / "cache").rglob("result.json")
    manifest.write_text("{")
    assert run_suite(tiny, 7, out=tmp_path / "c", cache=True).cached == set()
    assert run_suite(tiny, 7, out=tmp_path / "d", cache=True).cached == {"layer_evolution"}
    assert len(calls) == 2


def test_a_cache_that_cannot_be_written_does_no_harm(tiny, stubs, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REFLOWLENS_CACHE", str(tmp_path / "file"))
    assert not run_suite(tiny, 7, out=tmp_path / "out", cache=True).errors


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("REFLOWLENS_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert result_cache.cache_folder() == tmp_path / ".cache" / "reflowlens"
    with monkeypatch.context() as homeless:
        homeless.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home directory")))
        assert result_cache.cache_folder() == Path(tempfile.gettempdir()) / f"reflowlens-{os.getuid()}"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert result_cache.cache_folder() == tmp_path / "xdg" / "reflowlens"
    monkeypatch.setenv("REFLOWLENS_CACHE", str(tmp_path / "own"))
    assert result_cache.cache_folder() == tmp_path / "own"


def test_the_code_version_knows_every_source_that_computes(monkeypatch, tmp_path):
    version = result_cache.code_version.__wrapped__
    assert version() == version()
    for name in ("analyses/measures/lens.py", "reflowlens/models/base.py", "reflowlens/assets/lexicon.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
        assert (result_cache._PACKAGES / name).is_file()
    monkeypatch.setattr(result_cache, "_PACKAGES", tmp_path)
    seen = {version()}
    for path in [path for path in tmp_path.rglob("*.*") if path.is_file()]:
        path.write_text("2")
        seen.add(version())
    assert len(seen) == 4


# -- languages, and what is known across experiments ------------------------------------------------------------------


def test_the_report_speaks_the_language_asked_for_and_the_results_do_not(tiny, stubs, tmp_path):
    run = run_suite(tiny, 7, out=tmp_path / "out", lang="zh")
    assert "预测从哪一层起已成定局？" in run.report.read_text(encoding="utf-8")
    assert list(metrics(run)["layer_evolution"]["metrics"]) == ["accuracy"]
    with pytest.raises(ReflowlensError, match="no language 'fr'"):
        run_suite(tiny, 7, out=tmp_path / "other", lang="fr")
    assert not (tmp_path / "other").exists()


def readings(**changes):
    """The three results that the boundary is read from."""
    metrics = {"crystallisation_share": 0.6, "last_effective_share": 0.4, "point_of_no_return": 0.8} | changes
    names = ("layer_evolution", "emotion_surgery", "concept_inception")
    results = {}
    for name, (metric, value) in zip(names, metrics.items(), strict=True):
        found = {} if value is None else {metric: value}
        intervals = {metric: (value - 0.1, value + 0.15) for metric, value in found.items()}
        results[name] = Result(name, name, metrics=found, intervals=intervals, published={metric: 0.5})
    return results


def test_the_boundary_overlays_three_readings_with_their_intervals():
    boundary = crystallisation_boundary(readings())
    frame = boundary.frames["boundaries"].set_index("metric")
    assert frame["share"].to_dict() == {
        "crystallisation_share": 0.6,
        "last_effective_share": 0.4,
        "point_of_no_return": 0.8,
    }
    dots = boundary.figures["boundary"].data[0]
    assert list(dots.x) == [0.6, 0.4, 0.8]
    assert list(dots.error_x.array) == pytest.approx([0.15] * 3)
    assert list(dots.error_x.arrayminus) == pytest.approx([0.1] * 3)


def test_a_boundary_that_does_not_exist_is_told():
    boundary = crystallisation_boundary(readings(point_of_no_return=None))
    assert len(boundary.figures["boundary"].data[0].x) == 2
    assert boundary.notes == ["no boundary found: no strength implants a concept any more"]
    nothing = crystallisation_boundary(readings(**dict.fromkeys(
        ("crystallisation_share", "last_effective_share", "point_of_no_return"))))  # fmt: skip
    assert nothing.figures == {}
    assert len(nothing.notes) == 3


def test_the_boundary_needs_two_of_the_experiments():
    results = readings()
    for name in results:
        assert crystallisation_boundary({name: results[name]}) is None
        others = crystallisation_boundary({other: results[other] for other in results if other != name})
        assert len(others.frames["boundaries"]) == 2


def test_the_untrained_models_boundary_stands_beside_the_models():
    results = readings()
    findings = results["layer_evolution"].findings
    controls = {"untrained": 0.1, "shuffled_norm": 0.9}
    findings["crystallisation_share"] = dataclasses.replace(findings["crystallisation_share"], controls=controls)
    traces = {trace.name: trace for trace in crystallisation_boundary(results).figures["boundary"].data}
    assert list(traces) == ["model", "untrained", "published"]
    assert list(traces["untrained"].x) == [0.1]


def test_the_boundaries_of_models_in_one_figure():
    frames = {name: crystallisation_boundary(readings()).frames["boundaries"] for name in ("one", "a<b")}
    figure = boundary_figure(frames)
    assert [trace.name for trace in figure.data] == ["one", "a&lt;b", "published"]
    for trace in figure.data[:2]:
        assert list(trace.error_x.array) == pytest.approx([0.15] * 3)


# -- the model card ---------------------------------------------------------------------------------------------------


def test_model_card_tells_sizes_and_single_facts(tiny):
    manifest = {"format": "reflowlens-1", "tokens_seen": 1000, "val_loss": 3.7, "training": {"lr": 1}, "step": None}
    card = model_card(tiny, "tiny", manifest)
    assert card["name"] == "tiny"
    assert card["parameters"] == tiny.n_parameters
    assert card["signals"] == tiny.cfg.n_signals
    assert (card["tokens seen"], card["validation loss"]) == (1000, 3.7)
    assert card["hash"] == checkpoints.model_hash(tiny)
    assert not {"format", "training", "step", "signals kept (top-k)"} & card.keys()


def test_a_packaged_models_manifest_is_told_of_that_model_alone(tiny, stubs, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "ASSETS", tmp_path / "assets")
    checkpoints.save_model(tmp_path / "assets" / "nano", tiny, {"val_loss": 3.75})
    other = build_model(tiny.cfg, seed=1)
    assert "3.75" in _card(run_suite(tiny, 7, out=tmp_path / "a", model_name="nano"))
    assert "3.75" not in _card(run_suite(other, 7, out=tmp_path / "b", model_name="nano"))
    assert "3.25" in _card(run_suite(other, 7, out=tmp_path / "c", manifest={"val_loss": 3.25}))


def _card(run):
    return re.search(r'<dl class="card">(.*?)</dl>', run.report.read_text(encoding="utf-8"), re.S).group(1)


# -- the package ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "before",
    [
        "",
        "import analyses.experiments.layer_evolution.experiment",
        "import analyses.runner.suite; from analyses.registry import EXPERIMENTS; EXPERIMENTS[7].load()",
    ],
)
def test_an_experiments_name_is_its_function_whatever_was_imported_first(before):
    code = f"""if True:
        import sys
        assert "analyses" not in sys.modules
        import analyses, inspect
        {before}
        from analyses import layer_evolution
        assert inspect.isfunction(layer_evolution)
        from analyses.experiments.layer_evolution import layer_evolution as again
        assert analyses.layer_evolution is layer_evolution is again
    """
    in_a_process(exec, code)


def test_importing_the_package_and_choosing_experiments_is_light():
    code = """if True:
        import sys, analyses, analyses.registry
        analyses.registry.parse_selection("all")
        assert not {"torch", "plotly", "pandas", "transformer_lens"} & sys.modules.keys()
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_packages_names():
    import analyses

    assert analyses.run_suite is suite.run_suite
    assert analyses.Result is Result
    assert {*ALL, "run_suite", "load_lexicon", "Result", "EXPERIMENTS"} <= set(dir(analyses))
    assert analyses.load_lexicon().version
    with pytest.raises(AttributeError, match="module 'analyses' has no attribute 'recipe_atlass'"):
        analyses.recipe_atlass  # noqa: B018


def test_a_run_hashes_its_model_once(three, monkeypatch, tmp_path):
    model, hashed, model_hash = empty_model(), [], checkpoints.model_hash
    monkeypatch.setattr(checkpoints, "model_hash", lambda model: hashed.append(model) or model_hash(model))
    run = run_suite(model, [5, 7], out=tmp_path, quick=True)
    assert sum(each is model for each in hashed) == 1
    assert {result.params["model_hash"] for result in run.results.values()} == {model_hash(model)}
    with torch.no_grad():
        model.embed.W_basis[0] *= 2
    again = EXPERIMENTS[5].load()(model, quick=True)
    assert again.params["model_hash"] == model_hash(model) != run.results["semantic_algebra"].params["model_hash"]
