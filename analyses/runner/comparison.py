"""The same experiments on several models, through several views: headline metrics side by side, with their controls."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from analyses.experiments.crystallisation_boundary import boundary_figure, compared_boundaries
from analyses.registry import EXPERIMENTS, Experiment, parse_selection
from analyses.report.messages import NAMES, in_language, language, recognise, translate
from analyses.report.metric_table import number, scroll_box, verdict_chip, words
from analyses.report.page import figure_html, footer, plotly_script, template, template_text
from analyses.result.spreadsheets import guarded
from analyses.runner.suite import check_seed, failure_message, run_experiment
from reflowlens.errors import ReflowlensError
from reflowlens.progress import bar
from reflowlens.storage.atomic import replacing

if TYPE_CHECKING:
    from reflowlens.models.base import HookedModel

UNTRAINED = "untrained"
TABLE_FILE = "comparison.csv"
_KEYS = ["experiment", "metric"]


def compare_models(
    models: Sequence[str] | Mapping[str, HookedModel],
    views: Sequence[str] = ("native",),
    experiments: str | int | Iterable[str | int] = "all",
    *,
    seed: int = 0,
    quick: bool = False,
    device: str = "cpu",
    cache: bool = False,
    progress: bool = False,
) -> pd.DataFrame:
    """Run experiments on every model through every view.

    Args:
        models: names or paths that `reflowlens.load_model` opens, or models by name. The name "untrained" stands for
            the first model's architecture at initialisation.
        views: of `reflowlens.signals.VIEWS`, or names or folders of dictionaries, whose features are read; results in
            these are not kept. "native" is each model's own: the residual axes of one without signals.
        experiments, seed, quick, cache: as in `run_suite`.

    Returns:
        A row a model, view, experiment, metric and control, with the columns of `Result.summary`, `error`: why an
        experiment has no result for a model and view (its other columns are empty), and `seed`, `quick` and
        `model_hash`. An experiment that takes no view is run once a model, and `view` is "".

    Raises:
        ReflowlensError: an experiment, model or view that does not exist, a model that is given twice, or a seed out of
            range; before anything is run.

    Example: `side_by_side(compare_models(["reflow-nano", "untrained"], ["native", "rotated"], [2, 9], quick=True))`
    """
    from analyses.result.kept import may_be_kept
    from analyses.result.model_identity import known_hash
    from reflowlens.checkpoints import model_hash
    from reflowlens.dictionaries.files import holds_dictionary
    from reflowlens.signals import VIEWS

    views = list(dict.fromkeys(views))
    for view in views:
        if view not in VIEWS and not holds_dictionary(view):
            raise ReflowlensError(
                f"no view {view!r}: some of {', '.join(VIEWS)}, or names or folders of dictionaries, were expected"
            )
    check_seed(seed)
    selected = [EXPERIMENTS[i] for i in parse_selection(experiments)]
    opened = dict(models) if isinstance(models, Mapping) else _open(models, seed, device)
    tasks = [
        (name, model, view, experiment)
        for name, model in opened.items()
        for experiment in selected
        for view in (views if _takes_view(experiment) else [""])
    ]
    hashes = {name: model_hash(model) for name, model in opened.items()}
    keys = {name: hashes[name] if cache and may_be_kept(model) else "" for name, model in opened.items()}
    frames = []
    steps = bar(tasks, show=progress, named=True, unit="experiment")
    for name, model, view, experiment in steps:
        steps.set_description(" ".join(filter(None, (name, view, experiment.name))))
        options = {"seed": seed, "quick": quick} | ({"view": None if view == "native" else view} if view else {})
        place = {"model": name, "view": view, "experiment": experiment.name}
        try:
            with known_hash(model, hashes[name]):
                own_key = keys[name] if view in ("", *VIEWS) else ""
                result = run_experiment(experiment, model, options, own_key)[0]
            summary = result.summary().assign(error="")
            if summary.empty:
                summary = _nothing("; ".join(result.notes) or "no metrics")
        except Exception as error:
            summary = _nothing(failure_message(error))
        frames.append(summary.assign(**place, seed=seed, quick=quick, model_hash=hashes[name]))
    table = pd.concat(frames, ignore_index=True)
    return table[["model", "view", *_KEYS, *(name for name in table if name not in ("model", "view", *_KEYS))]]


def _nothing(why: str) -> pd.DataFrame:
    """The row of an experiment without a result."""
    return pd.DataFrame([{"metric": "", "control": "", "verdict": "", "error": why}])


def side_by_side(comparison: pd.DataFrame) -> pd.DataFrame:
    """The headline of a comparison for people: a row an experiment and metric, a column a model and view.

    A cell reads "value (low to high); control value, ...; verdict". Metrics are those that some model has a verdict or
    controls for; an experiment without a result says why in a row of its own.
    """
    rows = _headline(comparison)
    cells = [
        {**dict(zip([*_KEYS, "column"], place, strict=True)), "cell": _cell(part)}
        for place, part in rows.groupby([*_KEYS, "column"], sort=False)
    ]
    table = pd.DataFrame(cells).pivot(index=_KEYS, columns="column", values="cell").fillna("")
    return table.reindex(
        index=pd.MultiIndex.from_frame(rows[_KEYS].drop_duplicates()), columns=list(dict.fromkeys(rows["column"]))
    )


def write_comparison(
    comparison: pd.DataFrame, folder: str | Path, *, lang: str = "en", spreadsheet: bool = False
) -> Path:
    """Write the rows as `comparison.csv` and, for people, `comparison.html`; return the latter's path.

    The page opens without a network. It has a row a metric and a column a model and view, and above them, where an
    experiment found one, the crystallisation boundaries of the models. `lang`: "en" or "zh", of the page alone.
    `spreadsheet`: of the CSV, as in `Result.save`.
    """
    folder = Path(folder)
    with in_language(lang):
        page = _page(comparison)
    with replacing(folder / TABLE_FILE) as path:
        (guarded(comparison) if spreadsheet else comparison).to_csv(path, index=False)
    with replacing(folder / "comparison.html") as path:
        path.write_text(page, encoding="utf-8", errors="replace")
    return folder / "comparison.html"


def _page(comparison: pd.DataFrame) -> str:
    boundaries = {name: rows for name, rows in compared_boundaries(comparison).items() if rows["share"].notna().any()}
    models = list(dict.fromkeys(comparison["model"]))
    return template("comparison.html").substitute(
        language=language(),
        lead=escape(", ".join(models)),
        settings=escape(_settings(comparison)),
        figure=figure_html("boundary", boundary_figure(boundaries)) if boundaries else "",
        table=_table(comparison),
        footer=footer(),
        style=template_text("report.css"),
        script=template_text("report.js"),
        plotly=plotly_script() if boundaries else "",
    )


def _settings(comparison: pd.DataFrame) -> str:
    """Which weights the models have, and how the experiments were run."""
    models = comparison.drop_duplicates("model")
    weights = [f"{name} {digest[:12]}" for name, digest in zip(models["model"], models["model_hash"], strict=True)]
    quick = ["--quick"] if models["quick"].any() else []
    return " · ".join([*weights, f"--seed {models['seed'].iloc[0]}", *quick])


def _table(comparison: pd.DataFrame) -> str:
    """`side_by_side` as a table of the report's look."""
    rows = _headline(comparison)
    columns = list(dict.fromkeys(rows["column"]))
    cells = {place: _html_cell(part) for place, part in rows.groupby([*_KEYS, "column"], sort=False)}
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    lines, heading = [], ""
    for experiment, metric in rows[_KEYS].drop_duplicates().itertuples(index=False):
        if experiment != heading:
            title = next((known.title for known in EXPERIMENTS.values() if known.name == experiment), experiment)
            lines.append(f'<tr><th scope="rowgroup" colspan="{len(columns) + 1}">{escape(translate(title))}</th></tr>')
            heading = experiment
        shown = "".join(
            f'<td data-column="{escape(column)}">{cells.get((experiment, metric, column), "")}</td>'
            for column in columns
        )
        name = recognise(words(metric), *NAMES) if metric else translate("No result")
        lines.append(f'<tr><th scope="row">{escape(name)}</th>{shown}</tr>')
    table = f"<thead><tr><th></th>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return scroll_box(f'<table class="compared">{table}</table>', translate("Results at a glance"))


def _html_cell(part: pd.DataFrame) -> str:
    """One metric of one model: value, interval, controls and verdict below each other."""
    first = part.iloc[0]
    if first["error"]:
        return f'<span class="failure">{escape(str(first["error"]))}</span>'
    lines = [f"<b>{number(first['value'])}</b>"]
    if not pd.isna(first["low"]):
        ends = translate("{low} to {high}", low=number(first["low"]), high=number(first["high"]))
        lines.append(f'<span class="interval">{ends}</span>')
    for control, value in _controls(part):
        name = escape(recognise(words(control), *NAMES))
        lines.append(f'<span class="interval">{name} {number(value)}</span>')
    return "<br>".join([*lines, *([verdict_chip(first["verdict"])] if first["verdict"] else [])])


def _headline(comparison: pd.DataFrame) -> pd.DataFrame:
    """The rows that are told, with the `column` they stand in."""
    told = comparison["error"].ne("") | comparison["control"].ne("") | comparison["verdict"].ne("")
    rows = comparison[told]
    return rows.assign(column=(rows["model"] + " " + rows["view"]).str.strip())


def _open(names: Sequence[str], seed: int, device: str) -> dict[str, HookedModel]:
    from analyses.claims import UNTRAINED as DRAWS
    from analyses.controls.nulls import untrained_model
    from reflowlens.checkpoints import load_model

    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise ReflowlensError(f"{twice[0]} is given twice, and a model is compared with others")
    if not names or names[0] == UNTRAINED:
        raise ReflowlensError("a comparison begins with a trained model, whose architecture 'untrained' then means")
    opened = {name: load_model(name, device=device) for name in names if name != UNTRAINED}
    # None of the experiments' own untrained models: the column would be its own control.
    fresh = untrained_model(opened[names[0]], seed, number=len(DRAWS) + 1) if UNTRAINED in names else None
    return {name: fresh if name == UNTRAINED and fresh else opened[name] for name in names}


def _takes_view(experiment: Experiment) -> bool:
    return "view" in inspect.signature(experiment.load()).parameters


def _cell(part: pd.DataFrame) -> str:
    """One metric of one model: its rows differ in their controls."""
    first = part.iloc[0]
    if first["error"]:
        return str(first["error"])
    interval = "" if pd.isna(first["low"]) else f" ({number(first['low'])} to {number(first['high'])})"
    controls = ", ".join(f"{name} {number(value)}" for name, value in _controls(part))
    return "; ".join(text for text in (f"{number(first['value'])}{interval}", controls, first["verdict"]) if text)


def _controls(part: pd.DataFrame) -> list[tuple[str, float]]:
    """Names and values of the controls of one metric of one model."""
    pairs = zip(part["control"].tolist(), part["control_value"].tolist(), strict=True)
    return [(name, value) for name, value in pairs if name]
