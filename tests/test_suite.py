from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys

import pandas as pd
import pytest

from analyses import suite
from analyses.registry import EXPERIMENTS, Experiment
from analyses.result import Result
from analyses.suite import model_card, parse_selection, run_suite
from reflowlens import checkpoints
from reflowlens.errors import ReflowlensError
from reflowlens.models import build_model
from tests.tiny import tiny_config

ALL = ["semantic_algebra", "layer_evolution", "causal_ablation"]


@pytest.fixture(scope="module")
def tiny():
    return build_model(tiny_config("reflow", model_name="tiny model/1"))


@pytest.fixture
def stubs(monkeypatch):
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
    return functions


def metrics(run):
    return json.loads((run.folder / "results.json").read_text(encoding="utf-8"))


# -- the registry -----------------------------------------------------------------------------------------------------


def test_numbers_names_and_functions_of_the_registry_agree():
    assert [(e.number, e.name) for e in EXPERIMENTS.values()] == list(zip([5, 7, 9], ALL, strict=True))
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
def test_parse_selection(selection, numbers):
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
def test_a_wrong_selection_names_what_there_is(selection, message):
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
        result.metrics["late"] = float("nan")
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
    assert [entry["error"] is None for entry in metrics(run).values()] == [True, False, False]
    assert "interrupted before it was done" in run.report.read_text(encoding="utf-8")


def test_metrics_are_written_while_the_run_goes_on(tiny, stubs, tmp_path):
    def look(model, **options):
        assert list(json.loads((tmp_path / "results.json").read_text())) == ["semantic_algebra"]
        return Result("layer_evolution", "Layer Evolution")

    stubs["layer_evolution"] = look
    assert not run_suite(tiny, [5, 7], out=tmp_path).errors


def test_analogies_go_to_the_experiment_that_takes_them(tiny, stubs, tmp_path):
    def algebra(model, *, analogies=None, seed=0, quick=False, progress=False):
        return Result("semantic_algebra", "Semantic Algebra", {"analogies": analogies})

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


def check(code):
    """Run in a fresh interpreter: what is imported first matters here."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "before",
    [
        "",
        "import analyses.layer_evolution",
        "analyses.layer_evolution",
        "from analyses.layer_evolution import DEFINITIONS",
        "import analyses.suite; from analyses.registry import EXPERIMENTS; EXPERIMENTS[7].load()",
        "import importlib; module = importlib.import_module('analyses.layer_evolution'); assert module.DEFINITIONS",
    ],
)
def test_an_experiments_name_is_its_function_whatever_was_imported_first(before, tmp_path):
    (tmp_path / "layer_evolution.py").write_text("DEFINITIONS = {1: 1}\ndef layer_evolution(model): ...\n")
    check(f"""if True:
        import analyses
        analyses.__path__.insert(0, {str(tmp_path)!r})  # a module that is quick to import
        {before}
        from analyses import layer_evolution
        import inspect
        assert inspect.isfunction(layer_evolution)
        assert analyses.layer_evolution is layer_evolution
        import analyses.layer_evolution
        assert analyses.layer_evolution is layer_evolution
        from analyses.layer_evolution import layer_evolution as again
        assert again is layer_evolution
    """)


def test_importing_the_package_and_choosing_experiments_is_light():
    check("""if True:
        import sys, analyses, analyses.registry
        analyses.registry.parse_selection("all")
        assert not {"torch", "plotly", "pandas", "transformer_lens"} & sys.modules.keys()
    """)


def test_the_packages_names():
    import analyses

    assert analyses.run_suite is suite.run_suite
    assert analyses.Result is Result
    assert {*ALL, "run_suite", "load_lexicon", "Result", "EXPERIMENTS"} <= set(dir(analyses))
    assert analyses.load_lexicon().version
    with pytest.raises(AttributeError, match="module 'analyses' has no attribute 'recipe_atlas'"):
        analyses.recipe_atlas  # noqa: B018
