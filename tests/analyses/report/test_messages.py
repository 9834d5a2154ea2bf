"""No message is missing: of the report, the menu, and of what the experiments leave in their results."""

from __future__ import annotations

import ast
import json
import re
from string import Formatter

import numpy as np
import plotly.graph_objects as go
import pytest

import reflowlens as rl
from analyses.registry import EXPERIMENTS
from analyses.report.messages import (
    FIGURE_TEXTS,
    LANGUAGES,
    NAMES,
    has_translation,
    in_language,
    plain,
    read_catalogue,
    recognise,
    translate,
    translate_figure,
    without_signals,
)
from analyses.report.metric_table import COLUMNS, words
from analyses.runner import suite
from analyses.runner.suite import model_card
from reflowlens.errors import ReflowlensError
from reflowlens.figures.export import read_figure, save_figure
from tests.support import ROOT
from tests.support.tiny import random_model

ANALYSES = ROOT / "analyses"
TREES = {
    ".".join(path.relative_to(ANALYSES.parent).with_suffix("").parts): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(ANALYSES.rglob("*.py"))
}
TITLES = ("title", "x_title", "y_title", "z_title")
# Their legends are tokens, not names.
TOKENS = {("layer_evolution", "probability")}
FOREIGN = [language for language in LANGUAGES if language != "en"]


def fields(text):
    return sorted({name for _, name, _, _ in Formatter().parse(text) if name})


@pytest.mark.parametrize("language", FOREIGN)
def test_a_translation_has_the_fields_of_its_key(language):
    for entries in read_catalogue(language).values():
        for text, shown in entries.items():
            assert fields(text) == fields(shown), text
            assert shown.strip()


@pytest.mark.parametrize("language", FOREIGN)
def test_a_text_has_one_translation_and_no_two_series_of_a_figure_become_one(language):
    catalogue = read_catalogue(language)
    found = {}
    for entries in catalogue.values():
        for text, shown in entries.items():
            assert found.setdefault(text, shown) == shown, text
    names = list(catalogue["series"].values())
    assert len(names) == len(set(names))


def shown_by_the_code():
    """The texts given to `translate`, those of the templates, and those that are translated by their variable."""
    calls = (node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.Call))
    for call in calls:
        if getattr(call.func, "id", "") in ("translate", "_headed"):
            yield from (
                node.value
                for node in ast.walk(call.args[0])
                if isinstance(node, ast.Constant) and isinstance(node.value, str)
            )
    for path in (ANALYSES / "report" / "templates").iterdir():
        if path.suffix != ".json":
            yield from re.findall(r"\{\{(.+?)\}\}", path.read_text(encoding="utf-8"))
    for experiment in EXPERIMENTS.values():
        yield from (experiment.title, experiment.group, experiment.question)
    yield from filter(None, COLUMNS)
    yield suite.INTERRUPTED
    yield from model_card(random_model("reflow_topk"), "name", {"tokens_seen": 1, "val_loss": 1.0}).keys() - {"name"}


@pytest.mark.parametrize("language", FOREIGN)
def test_every_text_that_the_code_shows_has_a_translation(language):
    texts = set(shown_by_the_code())
    assert {"No result: {reason}", "Light / dark", "Semantic Algebra", "Model [{default}]: ", "Metric"} <= texts
    catalogue = read_catalogue(language)
    known = {text for section in ("report", "menu", "experiments") for text in catalogue[section]}
    assert missing(language, texts - known, "report, menu, experiments") == ""


def titles(tree):
    """What is given as a title of a figure or an axis; what an f-string fills in is written as {…}."""
    for call in ast.walk(tree):
        draws = isinstance(call, ast.Call) and getattr(call.func, "id", "") not in ("Result", "Experiment")
        for given in call.keywords if draws else ():
            if given.arg in TITLES and isinstance(given.value, ast.Constant) and given.value.value:
                yield given.value.value
            elif given.arg in TITLES and isinstance(given.value, ast.JoinedStr):
                yield "".join(p.value if isinstance(p, ast.Constant) else "{…}" for p in given.value.values)


def modules_of(experiment):
    """The experiment's module and those of this package that it imports."""
    home = f"analyses.experiments.{experiment}"
    own = home if home in TREES else f"{home}.experiment"
    imported = {node.module for node in ast.walk(TREES[own]) if isinstance(node, ast.ImportFrom) and node.module}
    return [own, *sorted(imported & TREES.keys())]


@pytest.mark.parametrize("language", FOREIGN)
@pytest.mark.parametrize(
    "experiment", [*(experiment.name for experiment in EXPERIMENTS.values()), "crystallisation_boundary"]
)
def test_every_title_in_an_experiments_code_has_a_translation(experiment, language):
    found = {text for module in modules_of(experiment) for text in titles(TREES[module])}
    assert found, "an experiment draws something"
    assert missing(language, {text for text in found if not known_in(language, text, *FIGURE_TEXTS)}, "figures") == ""


def known_in(language, text, *sections):
    with in_language(language):
        return has_translation(text, *sections)


def missing(language, texts, sections):
    """What to add, and where."""
    return "".join(f"\nmessages_{language}.json ({sections}) lacks {text!r}" for text in sorted(texts))


# -- what a run leaves ------------------------------------------------------------------------------------------------


def texts_of(result):
    """section(s) -> texts of a result that a report shows."""
    figures, series = set(), set()
    for name, figure in result.figures.items():
        axes = [axis.title for axis in (*figure.select_xaxes(), *figure.select_yaxes())]
        scales = [trace.colorbar.title for trace in figure.data if "colorbar" in trace]
        figures |= {plain(title.text) for title in (figure.layout.title, *axes, *scales) if title.text}
        if (result.name, name) not in TOKENS:
            series |= {words(plain(trace.name)) for trace in figure.data if trace.name}
    controls = {words(name) for values in result.controls.values() for name in values}
    metrics = {words(name) for name in (*result.metrics, *result.definitions)}
    return {FIGURE_TEXTS: figures, ("series",): series | controls, NAMES: metrics}


@pytest.mark.slow
@pytest.mark.by_hand
@pytest.mark.parametrize("language", FOREIGN)
@pytest.mark.parametrize("number", EXPERIMENTS)
def test_every_text_of_a_quick_run_has_a_translation(number, language, tmp_path):
    experiment = EXPERIMENTS[number]
    run = suite.run_suite(rl.load_model("reflow-nano"), number, quick=True, out=tmp_path, manifest={}, cache=True)
    assert run.errors == {}
    told = ""
    for sections, texts in texts_of(run.results[experiment.name]).items():
        unknown = {text for text in texts if not known_in(language, text, *sections)}
        told += missing(language, unknown, " or ".join(sections))
    assert told == ""


# -- translating ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_text_of_a_model_without_signals_speaks_of_signals(language):
    for section, entries in read_catalogue("zh").items():
        for text, translation in entries.items():
            with in_language(language), without_signals():
                shown = translate(text) if section != "notes" else recognise(text, section)
            assert not re.search(r"(?<![\w{])(?:[Ss]ignals?|[Rr]ecipes?)(?![\w}])|信号|配方", shown), shown
            assert set(re.findall(r"{\w+}", shown)) == set(re.findall(r"{\w+}", translation))
    with in_language(language):
        assert translate("Signal Flow") == ("Signal Flow" if language == "en" else "信号流")


def test_english_is_as_it_is_written():
    assert translate("{count} experiments", count=2) == "2 experiments"
    assert recognise("{left} as it is", "figures") == "{left} as it is"
    figure = go.Figure(layout_title_text="Every pair")
    assert translate_figure(figure) == figure


def test_fields_are_recognised_and_what_they_hold_is_translated_where_it_is_known():
    with in_language("zh"):
        assert recognise("What the lens expects after “a {b} (c\nd”", "figures") == "透镜在“a {b} (c\nd”之后的预期"
        assert recognise("accuracy at 1 mul", *NAMES) == "准确率@1，相乘"
        assert recognise("accuracy at 1", *NAMES) == "准确率@1"
        assert recognise("from 1 to 3", "notes") == "from 1 to 3", "texts of the report are not looked for in notes"


def test_the_language_is_that_of_the_block():
    with in_language("zh"):
        with in_language("en"):
            assert translate("Metric") == "Metric"
        assert translate("Metric") == "指标"
    assert translate("Metric") == "Metric"
    with pytest.raises(ReflowlensError, match="no language 'de': one of en, zh was expected"), in_language("de"):
        pass


def test_a_figures_texts_are_translated_and_its_data_is_not():
    figure = go.Figure(layout={"title_text": "Who writes the prediction", "yaxis_title_text": "share of<br>prompts"})
    figure.add_bar(x=["shuffled_recipe", " the", "<b>"], y=[1, 2, 3], name="untrained")
    figure.add_heatmap(z=[[1.0]], colorbar={"title": {"text": "logit"}}, name="model’s")
    figure.add_annotation(text="block")
    figure.update_xaxes(categoryarray=["shuffled_recipe", " the"])
    with in_language("zh"):
        shown = translate_figure(figure)
    assert shown.layout.title.text == "预测由谁写入"
    assert shown.layout.yaxis.title.text == "提示的份额"
    assert list(shown.data[0].x) == ["打乱配方", " the", "<b>"]
    assert list(shown.layout.xaxis.categoryarray) == ["打乱配方", " the"]
    assert (shown.data[0].name, shown.data[1].name) == ("未训练", "model’s")
    assert list(shown.data[0].y) == [1, 2, 3]
    assert shown.layout.annotations[0].text == "块"
    assert figure.layout.title.text == "Who writes the prediction", "the given one is left alone"


def test_numbers_of_a_figure_that_was_saved_survive_its_translation(tmp_path):
    figure = go.Figure(go.Scatter(x=np.arange(3.0), y=np.array([1.0, 4.0, 9.0]), name="untrained"))
    figure.add_bar(x=np.arange(3), y=["shuffled_recipe", "E", "R"], orientation="h")
    figure.add_vrect(0.0, 1.0, name="95% of random pairs as frequent", showlegend=True)
    saved = read_figure(save_figure(figure, tmp_path / "figure.json"))
    with in_language("zh"):
        shown = translate_figure(saved)
    assert json.loads(shown.to_json())["data"][0]["y"] == json.loads(saved.to_json())["data"][0]["y"]
    assert shown.data[0].name == "未训练"
    assert list(shown.data[1].y) == ["打乱配方", "E", "R"]
    assert re.search("[\u4e00-\u9fff]", shown.layout.shapes[0].name)
