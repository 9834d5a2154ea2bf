"""The report: one HTML file that holds everything, opens without a network and draws its figures when seen."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any, get_args
from urllib.parse import quote

import pandas as pd

from analyses.experiments.crystallisation_boundary import BOUNDARY
from analyses.registry import EXPERIMENTS, Experiment
from analyses.report.explanations import figure_explanation, glossary, glossed, reading
from analyses.report.figure_code import figure_code
from analyses.report.messages import (
    NAMES,
    in_language,
    is_without_signals,
    language,
    plain,
    recognise,
    translate,
    translate_figure,
    without_signals,
)
from analyses.report.metric_table import (
    anchor,
    definition_id,
    group_row,
    key,
    metric_rows,
    metric_table,
    number,
    scroll_box,
    verdict_chip,
    words,
)
from analyses.result.result import Result
from analyses.statistics.verdicts import Verdict
from reflowlens.storage.atomic import replacing

if TYPE_CHECKING:
    import plotly.graph_objects as go

FIRST_ROWS = 10
_OWN, _ACROSS = "Other experiments", "Across the experiments"
_MESSAGE = re.compile(r"\{\{(.+?)\}\}")  # in templates


def write_report(
    results: Sequence[Result],
    errors: Mapping[str, str],
    model_card: Mapping[str, Any],
    path: str | Path,
    *,
    lang: str = "en",
) -> Path:
    """Write one self-contained HTML file and return its path.

    `results` appear in the order given. `errors`: experiment's name -> why it has no result. `model_card`: facts about
    the model by their names for people, "name" among them (`analyses.runner.suite.model_card`). Frames are linked to
    their CSV files where `Result.save` put them beside the report, in a folder of the experiment's name. `lang`: "en"
    or "zh"; what the catalogue (`messages.py` beside) does not have stays in English, and so do the saved results.

    Example: `write_report([layer_evolution(model)], {}, {"name": "reflow-nano"}, "out/report.html")`
    """
    path = Path(path)
    views = {result.params["view"] for result in results if "view" in result.params}
    with in_language(lang), without_signals(views == {"identity"}):
        page = _page(results, errors, model_card, path.parent)
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")
    return path


def _page(results: Sequence[Result], errors: Mapping[str, str], model_card: Mapping[str, Any], folder: Path) -> str:
    verdicts = [verdict for result in results for verdict in result.verdicts.values()]
    name = str(model_card.get("name", "model"))
    return template("report.html").substitute(
        language=language(),
        title=escape(name),
        lead=_lead(results, errors),
        tally=_tally(verdicts),
        contents=_contents(results, errors),
        card="\n".join(_fact(name, value) for name, value in model_card.items() if name != "name"),
        headline=_headline(results),
        experiments="\n".join([*(_section(r, folder, name) for r in results), *map(_failure, errors, errors.values())]),
        glossary=_glossary(),
        footer=footer(),
        style=template_text("report.css"),
        script=template_text("report.js"),
        plotly=plotly_script(),
    )


# -- the top of the page ----------------------------------------------------------------------------------------------


def _lead(results: Sequence[Result], errors: Mapping[str, str]) -> str:
    seconds = sum(result.seconds or 0.0 for result in results)
    count = sum(result.name != BOUNDARY for result in results)
    parts = [
        translate("1 experiment") if count == 1 else translate("{count} experiments", count=count),
        translate("{count} without a result", count=len(errors)) if errors else "",
        translate("{seconds} s", seconds=f"{seconds:.0f}") if seconds >= 1 else "",
        translate("read along the axes of the residual stream") if is_without_signals() else "",
        datetime.now().strftime(translate("%d %B %Y, %H:%M")),
    ]
    return " · ".join(part for part in parts if part)


def _tally(verdicts: Iterable[Verdict]) -> str:
    """How many claims were supported and how many not."""
    counts = Counter(verdicts)
    return " ".join(
        verdict_chip(verdict, f"{counts[verdict]} {translate(verdict)}")
        for verdict in get_args(Verdict)
        if counts[verdict]
    )


def _contents(results: Sequence[Result], errors: Mapping[str, str]) -> str:
    entries = [(_experiment(r.name), r.name, r.title, "") for r in results]
    entries += [(_experiment(name), name, _title(name), ' class="failed"') for name in errors]
    lines, group = [], ""
    for experiment, name, title, attributes in entries:
        if _group(name) != group:
            group = _group(name)
            lines.append(f"<span>{group}</span>")
        lines.append(f'<a href="#{anchor(name)}"{attributes}>{_numbered(experiment, title)}</a>')
    return "\n".join(lines)


def _fact(name: str, value: Any) -> str:
    text = number(value) if isinstance(value, int | float) else str(value)
    shown = f"<code>{escape(text)}</code>" if name in ("hash", "command") else escape(text)
    return f"<div{' class=wide' if len(text) > 40 else ''}><dt>{escape(translate(name))}</dt><dd>{shown}</dd></div>"


def _headline(results: Sequence[Result]) -> str:
    """What was judged or published of each experiment; all metrics of one that has neither."""
    measured = [result for result in results if result.metrics]
    if not measured:
        return f"<p>{translate('No experiment returned a metric.')}</p>"
    bodies = []
    for result in measured:
        told = [metric for metric in result.metrics if metric in result.verdicts or metric in result.published]
        link = f'<a href="#{anchor(result.name)}">{_numbered(_experiment(result.name), result.title)}</a>'
        bodies.append(group_row(link) + metric_rows(result, told or result.metrics))
    note = translate("every row has its own scale; the remaining metrics are with their experiments")
    table = metric_table(bodies, translate("Results at a glance"))
    deciding = translate("bold controls decide the verdict, the others are shown for scale")
    meaning = translate("point at a name, or go to it with the keyboard, for what it means")
    reading = "".join(f"<span>{text}</span>" for text in (deciding, meaning, note))
    return f'{table}<p class="key">{key()}{reading}</p>'


def _glossary() -> str:
    return "\n".join(f"<dt>{escape(term)}</dt><dd>{escape(meaning)}</dd>" for term, meaning in glossary().items())


def footer() -> str:
    """Which software made the page."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("reflowlens", "torch", "plotly")]
    return escape(" · ".join([*versions, f"Python {platform.python_version()}"]))


# -- one experiment ---------------------------------------------------------------------------------------------------


def _section(result: Result, folder: Path, model_name: str) -> str:
    experiment = _experiment(result.name)
    definitions = "\n".join(
        _definition(result, metric) for metric in dict.fromkeys([*result.definitions, *result.metrics])
    )
    notes = "\n".join(f"<li>{escape(recognise(note, 'notes'))}</li>" for note in result.notes)
    params = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(str(value))}</td></tr>'
        for name, value in result.params.items()
    )
    parameters = translate("Parameters")
    metrics = metric_table([metric_rows(result, result.metrics)], translate("All metrics"))
    frames = "\n".join(_frame(result.name, name, frame, folder) for name, frame in result.frames.items())
    return template("experiment.html").substitute(
        name=anchor(result.name),
        group=_group(result.name),
        heading=_numbered(experiment, result.title),
        question=escape(translate(experiment.question) if experiment else ""),
        tally=_tally(result.verdicts.values()),
        figures="\n".join(
            figure_html(
                f"{result.name}-{name}",
                figure,
                figure_code(result, name, model_name),
                figure_explanation(result.name, name),
            )
            for name, figure in result.figures.items()
        ),
        definitions=_headed("Definitions used", f'<dl class="definitions">{definitions}</dl>') if definitions else "",
        notes=_headed("Notes", f'<ul class="notes">{notes}</ul>') if notes else "",
        metrics=_folded(translate("All metrics"), f"{len(result.metrics)}", metrics) if result.metrics else "",
        frames=frames,
        params=_folded(parameters, "", scroll_box(f'<table class="params">{params}</table>', parameters))
        if params
        else "",
    )


def _headed(heading: str, content: str) -> str:
    return f"<h3>{escape(translate(heading))}</h3>{content}"


def _failure(name: str, error: str) -> str:
    experiment = _experiment(name)
    heading = f'<p class="group">{_group(name)}</p><h2>{_numbered(experiment, _title(name))}</h2>'
    reason = escape(translate("No result: {reason}", reason=translate(error)))
    text = f'<p class="failure">{reason}</p>'
    return f'<section id="{anchor(name)}" class="experiment">{heading}{text}</section>'


def _definition(result: Result, metric: str) -> str:
    value = number(result.metrics[metric]) if metric in result.metrics else translate("not computed")
    defined = glossed(recognise(result.definitions.get(metric, ""), "definitions"))
    told = " ".join(map(glossed, reading(result, metric)))
    text = "".join(f'<p class="{kind}">{part}</p>' for kind, part in (("says", told), ("exact", defined)) if part)
    name = escape(recognise(words(metric), *NAMES))
    return f'<dt id="{definition_id(result.name, metric)}">{name} <b>{value}</b></dt><dd>{text}</dd>'


def figure_html(identifier: str, figure: go.Figure, code: str = "", says: str = "") -> str:
    """A place of the figure's size and its data, which report.js draws; its title becomes a caption, which wraps on a
    narrow screen. `code`: what made it, folded away below. `says`: how it is to be read."""
    copy = translate_figure(figure)
    title = plain(copy.layout.title.text or "") or words(identifier.split("-", 1)[1]).capitalize()
    copy.update_layout(title=None, margin_t=None)
    height = copy.layout.height or 420
    width = copy.layout.meta.get("min_width", 0) if isinstance(copy.layout.meta, dict) else 0
    data = copy.to_json().replace("<", "\\u003c")  # no "</script>" and no comment can begin inside
    canvas = f'<div class="canvas" style="height:{height:.0f}px;min-width:{width:.0f}px"></div>'
    script = f'<script type="application/json">{data}</script>'
    told = f"<small>{glossed(says)}</small>" if says else ""
    caption = f"<figcaption>{escape(title)}{told}</figcaption>"
    return f'<figure id="{anchor(identifier)}">{caption}{scroll_box(canvas, title)}{script}{_code(code)}</figure>'


def _code(code: str) -> str:
    if not code:
        return ""
    summary = f"<summary>{translate('Code of this figure')}</summary>"
    return f'<details class="code">{summary}<pre tabindex="0"><code>{escape(code)}</code></pre></details>'


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
    link = (
        f'<a href="{escape(quote(file))}">{escape(file)}</a>'
        if (folder / file).is_file()
        else translate("the saved result")
    )
    more = translate("The first {rows} rows; all of them are in {place}.", rows=FIRST_ROWS, place=link)
    table = scroll_box(f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>", words(name))
    size = translate("{rows} rows, {columns} columns", rows=f"{len(frame):,}", columns=frame.shape[1])
    return _folded(words(name).capitalize(), size, table + (f"<p>{more}</p>" if len(frame) > FIRST_ROWS else ""))


def _folded(title: str, note: str, content: str) -> str:
    return f"<details><summary>{escape(title)} <small>{escape(note)}</small></summary>{content}</details>"


# -- small pieces -----------------------------------------------------------------------------------------------------


def _experiment(name: str) -> Experiment | None:
    return next((experiment for experiment in EXPERIMENTS.values() if experiment.name == name), None)


def _group(name: str) -> str:
    """The heading above an experiment in the contents, as HTML."""
    experiment = _experiment(name)
    return escape(translate(experiment.group if experiment else _ACROSS if name == BOUNDARY else _OWN))


def _title(name: str) -> str:
    experiment = _experiment(name)
    return experiment.title if experiment else words(name)


def _numbered(experiment: Experiment | None, title: str) -> str:
    shown = escape(translate(title))
    return f"{experiment.number}. {shown}" if experiment else shown


def _cell(value: Any) -> str:
    return number(value) if isinstance(value, int | float) else escape(str(value))


def _kind(numeric: bool) -> str:
    return ' class="number"' if numeric else ""


def plotly_script() -> str:
    """plotly.js itself, as the content of a script element."""
    from plotly.offline import get_plotlyjs

    return get_plotlyjs().replace("</script", "<\\/script")


def template(name: str) -> Template:
    """A page of the report with places for its parts."""
    return Template(template_text(name))


def template_text(name: str) -> str:
    """A file of the report, its {{messages}} in the language of now."""
    text = (resources.files("analyses.report") / "templates" / name).read_text(encoding="utf-8")
    return _MESSAGE.sub(lambda match: escape(translate(match[1])), text)
