"""The report: one HTML file that holds everything, opens without a network and draws its figures when seen."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from html import escape, unescape
from importlib import resources
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any, get_args

import pandas as pd

from analyses.metric_table import group_row, key, metric_rows, metric_table, number, scroll_box, verdict_chip, words
from analyses.registry import EXPERIMENTS, Experiment
from analyses.result import Result
from analyses.statistics import Verdict
from reflowlens.files import replacing

if TYPE_CHECKING:
    import plotly.graph_objects as go

FIRST_ROWS = 10
_OWN = "Other experiments"


def write_report(
    results: Sequence[Result], errors: Mapping[str, str], model_card: Mapping[str, Any], path: str | Path
) -> Path:
    """Write one self-contained HTML file and return its path.

    `results` appear in the order given. `errors`: experiment's name -> why it has no result. `model_card`: facts about
    the model by their names for people, "name" among them (`analyses.suite.model_card`). Frames are linked to their CSV
    files where `Result.save` put them beside the report, in a folder of the experiment's name.

    Example: `write_report([layer_evolution(model)], {}, {"name": "reflow-nano"}, "out/report.html")`
    """
    from plotly.offline import get_plotlyjs

    path = Path(path)
    verdicts = [verdict for result in results for verdict in result.verdicts.values()]
    page = _template("report.html").substitute(
        title=escape(str(model_card.get("name", "model"))),
        lead=_lead(results, errors),
        tally=_tally(verdicts),
        contents=_contents(results, errors),
        card="\n".join(_fact(name, value) for name, value in model_card.items() if name != "name"),
        headline=_headline(results),
        experiments="\n".join([*(_section(r, path.parent) for r in results), *map(_failure, errors, errors.values())]),
        footer=_footer(),
        style=_text("report.css"),
        script=_text("report.js"),
        plotly=get_plotlyjs().replace("</script", "<\\/script"),
    )
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")
    return path


# -- the top of the page ----------------------------------------------------------------------------------------------


def _lead(results: Sequence[Result], errors: Mapping[str, str]) -> str:
    seconds = sum(result.seconds or 0.0 for result in results)
    parts = [
        f"{len(results)} experiment{'' if len(results) == 1 else 's'}",
        f"{len(errors)} without a result" if errors else "",
        f"{seconds:.0f} s" if seconds >= 1 else "",
        f"{datetime.now():%d %B %Y, %H:%M}",
    ]
    return " · ".join(part for part in parts if part)


def _tally(verdicts: Iterable[Verdict]) -> str:
    """How many claims were supported and how many not."""
    counts = Counter(verdicts)
    return " ".join(
        verdict_chip(verdict, f"{counts[verdict]} {verdict}") for verdict in get_args(Verdict) if counts[verdict]
    )


def _contents(results: Sequence[Result], errors: Mapping[str, str]) -> str:
    entries = [(_experiment(r.name), r.name, r.title, "") for r in results]
    entries += [(_experiment(name), name, _title(name), ' class="failed"') for name in errors]
    lines, group = [], ""
    for experiment, name, title, attributes in entries:
        own = experiment.group if experiment else _OWN
        if own != group:
            lines.append(f"<span>{escape(own)}</span>")
            group = own
        lines.append(f'<a href="#{name}"{attributes}>{_numbered(experiment, title)}</a>')
    return "\n".join(lines)


def _fact(name: str, value: Any) -> str:
    text = number(value) if isinstance(value, int | float) else str(value)
    shown = f"<code>{escape(text)}</code>" if name in ("hash", "command") else escape(text)
    return f"<div{' class=wide' if len(text) > 40 else ''}><dt>{escape(name)}</dt><dd>{shown}</dd></div>"


def _headline(results: Sequence[Result]) -> str:
    """What was judged or published of each experiment; all metrics of one that has neither."""
    measured = [result for result in results if result.metrics]
    if not measured:
        return "<p>No experiment returned a metric.</p>"
    bodies = []
    for result in measured:
        told = [metric for metric in result.metrics if metric in result.verdicts or metric in result.published]
        link = f'<a href="#{result.name}">{_numbered(_experiment(result.name), result.title)}</a>'
        bodies.append(group_row(link) + metric_rows(result, told or result.metrics))
    note = "<span>every row has its own scale; the remaining metrics are with their experiments</span>"
    return metric_table(bodies, "Results at a glance") + f'<p class="key">{key()}{note}</p>'


def _footer() -> str:
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("reflowlens", "torch", "plotly")]
    return escape(" · ".join([*versions, f"Python {platform.python_version()}"]))


# -- one experiment ---------------------------------------------------------------------------------------------------


def _section(result: Result, folder: Path) -> str:
    experiment = _experiment(result.name)
    definitions = "\n".join(
        _definition(result, metric) for metric in dict.fromkeys([*result.definitions, *result.metrics])
    )
    notes = "\n".join(f"<li>{escape(note)}</li>" for note in result.notes)
    params = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(str(value))}</td></tr>'
        for name, value in result.params.items()
    )
    metrics = metric_table([metric_rows(result, result.metrics)], f"{result.title}: all metrics")
    frames = "\n".join(_frame(result.name, name, frame, folder) for name, frame in result.frames.items())
    return _template("experiment.html").substitute(
        name=result.name,
        group=escape(experiment.group if experiment else _OWN),
        heading=_numbered(experiment, result.title),
        question=escape(experiment.question if experiment else ""),
        tally=_tally(result.verdicts.values()),
        figures="\n".join(_figure(f"{result.name}-{name}", figure) for name, figure in result.figures.items()),
        definitions=f'<h3>Definitions used</h3><dl class="definitions">{definitions}</dl>' if definitions else "",
        notes=f'<h3>Notes</h3><ul class="notes">{notes}</ul>' if notes else "",
        metrics=_folded("All metrics", f"{len(result.metrics)}", metrics) if result.metrics else "",
        frames=frames,
        params=_folded("Parameters", "", scroll_box(f"<table>{params}</table>", "Parameters")) if params else "",
    )


def _failure(name: str, error: str) -> str:
    experiment = _experiment(name)
    group = escape(experiment.group if experiment else _OWN)
    heading = f'<p class="group">{group}</p><h2>{_numbered(experiment, _title(name))}</h2>'
    text = f'<p class="failure">No result: {escape(error)}</p>'
    return f'<section id="{escape(name)}" class="experiment">{heading}{text}</section>'


def _definition(result: Result, metric: str) -> str:
    value = number(result.metrics[metric]) if metric in result.metrics else "not computed"
    text = escape(result.definitions.get(metric, ""))
    return f"<dt>{escape(words(metric))} <b>{value}</b></dt><dd>{text}</dd>"


def _figure(identifier: str, figure: go.Figure) -> str:
    """A place of the figure's size and its data; its title becomes a caption, which wraps on a narrow screen."""
    import plotly.graph_objects as go

    copy = go.Figure(figure)
    title = unescape(re.sub(r"<[^>]*>", " ", copy.layout.title.text or ""))
    title = title or words(identifier.split("-", 1)[1]).capitalize()
    copy.update_layout(title=None, margin_t=None)
    height = copy.layout.height or 420
    width = copy.layout.meta.get("min_width", 0) if isinstance(copy.layout.meta, dict) else 0
    data = copy.to_json().replace("<", "\\u003c")  # no "</script>" and no comment can begin inside
    canvas = f'<div class="canvas" style="height:{height:.0f}px;min-width:{width:.0f}px"></div>'
    script = f'<script type="application/json">{data}</script>'
    caption = f"<figcaption>{escape(title)}</figcaption>"
    return f'<figure id="{identifier}">{caption}{scroll_box(canvas, title)}{script}</figure>'


def _frame(experiment: str, name: str, frame: pd.DataFrame, folder: Path) -> str:
    """The first rows, folded away; a link to all of them where they were saved."""
    numeric = [pd.api.types.is_numeric_dtype(frame[column]) and frame[column].dtype != bool for column in frame]
    head = "".join(
        f'<th scope="col"{_kind(n)}>{escape(words(str(c)))}</th>' for c, n in zip(frame, numeric, strict=True)
    )
    rows = "".join(
        "<tr>" + "".join(f"<td{_kind(n)}>{_cell(value)}</td>" for value, n in zip(row, numeric, strict=True)) + "</tr>"
        for row in frame.head(FIRST_ROWS).itertuples(index=False)
    )
    file = f"{experiment}/frames/{name}.csv"
    link = f'<a href="{file}">{file}</a>' if (folder / file).is_file() else "the saved result"
    more = f"<p>The first {FIRST_ROWS} rows; all of them are in {link}.</p>" if len(frame) > FIRST_ROWS else ""
    table = scroll_box(f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>", f"{name}, first rows")
    return _folded(words(name).capitalize(), f"{len(frame):,} rows, {frame.shape[1]} columns", table + more)


def _folded(title: str, note: str, content: str) -> str:
    return f"<details><summary>{escape(title)} <small>{escape(note)}</small></summary>{content}</details>"


# -- small pieces -----------------------------------------------------------------------------------------------------


def _experiment(name: str) -> Experiment | None:
    return next((experiment for experiment in EXPERIMENTS.values() if experiment.name == name), None)


def _title(name: str) -> str:
    experiment = _experiment(name)
    return experiment.title if experiment else words(name)


def _numbered(experiment: Experiment | None, title: str) -> str:
    return f"{experiment.number}. {escape(title)}" if experiment else escape(title)


def _cell(value: Any) -> str:
    return number(value) if isinstance(value, int | float) else escape(str(value))


def _kind(numeric: bool) -> str:
    return ' class="number"' if numeric else ""


def _template(name: str) -> Template:
    return Template(_text(name))


def _text(name: str) -> str:
    return (resources.files("analyses") / "templates" / name).read_text(encoding="utf-8")
