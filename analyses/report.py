"""The report: one HTML file that holds everything, opens without a network and draws its figures when seen."""

from __future__ import annotations

import importlib.metadata
import math
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

from analyses.registry import EXPERIMENTS, Experiment
from analyses.result import Result
from analyses.statistics import Verdict
from reflowlens.files import replacing

if TYPE_CHECKING:
    import plotly.graph_objects as go

FIRST_ROWS = 10
_SIGNS = {"supported": "✓", "not supported": "✗", "underpowered": "?"}
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
    return " ".join(_chip(verdict, f"{counts[verdict]} {verdict}") for verdict in get_args(Verdict) if counts[verdict])


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
    text = _number(value) if isinstance(value, int | float) else str(value)
    shown = f"<code>{escape(text)}</code>" if name in ("hash", "command") else escape(text)
    return f"<div{' class=wide' if len(text) > 40 else ''}><dt>{escape(name)}</dt><dd>{shown}</dd></div>"


def _footer() -> str:
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("reflowlens", "torch", "plotly")]
    return escape(" · ".join([*versions, f"Python {platform.python_version()}"]))


# -- the headline table -----------------------------------------------------------------------------------------------

_KEYS = {
    "value, 95% interval": '<path class="interval" d="M2 7h22"/><circle class="value" cx="13" cy="7" r="4"/>',
    "controls": '<path class="control" d="M13 1v12"/>',
    "published": '<path class="published" d="M13 1l6 6-6 6-6-6z"/>',
}


def _headline(results: Sequence[Result]) -> str:
    """Every metric with its interval, controls beside it, the published value and the verdict."""
    heads = ("Metric", "Value", "", "Controls", "Published", "Verdict")
    kinds = ("", ' class="number"', "", "", ' class="number"', "")
    head = "".join(f'<th scope="col"{kind}>{name}</th>' for name, kind in zip(heads, kinds, strict=True))
    bodies = "\n".join(_headline_rows(result) for result in results if result.metrics)
    if not bodies:
        return "<p>No experiment returned a metric.</p>"
    table = f'<table class="headline"><thead><tr>{head}</tr></thead>\n{bodies}\n</table>'
    keys = "".join(f"<span>{_svg(26, 14, marks)} {name}</span>" for name, marks in _KEYS.items())
    return _scroll(table, "Results at a glance") + f'<p class="key">{keys}<span>every row has its own scale</span></p>'


def _headline_rows(result: Result) -> str:
    title = _numbered(_experiment(result.name), result.title)
    rows = [f'<tr><th colspan="6" scope="rowgroup"><a href="#{result.name}">{title}</a></th></tr>']
    for metric, entry in result.to_json_metrics().items():
        interval = entry["interval"]
        controls = "".join(
            f"<li>{escape(_words(name))} <b>{_number(value)}</b></li>" for name, value in entry["controls"].items()
        )
        cells = [
            f'<th scope="row">{escape(_words(metric))}</th>',
            f'<td class="number value">{_number(entry["value"])}'
            + (
                f'<br><span class="interval">{_number(interval[0])} to {_number(interval[1])}</span>'
                if interval
                else ""
            )
            + "</td>",
            f'<td class="drawn">{_strip(entry)}</td>',
            f'<td class="controlled"><ul class="controls">{controls}</ul></td>' if controls else "<td></td>",
            f'<td class="number published">{"" if entry["published"] is None else _number(entry["published"])}</td>',
            f'<td class="verdict-of">{_chip(entry["verdict"]) if entry["verdict"] else ""}</td>',
        ]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return "<tbody>" + "\n".join(rows) + "</tbody>"


def _strip(entry: Mapping[str, Any]) -> str:
    """The row drawn on its own axis; the numbers stand beside it, so that it is hidden from screen readers."""
    published = [] if entry["published"] is None else [entry["published"]]
    numbers = [entry["value"], *(entry["interval"] or ()), *entry["controls"].values(), *published]
    low, high = min(numbers), max(numbers)
    if not high > low:
        return ""

    def at(number: float) -> str:
        return f"{8 + 134 * (number - low) / (high - low):.1f}"

    marks = ['<line class="axis" x1="2" x2="148" y1="11" y2="11"/>']
    marks += [f'<line class="control" x1="{at(x)}" x2="{at(x)}" y1="4" y2="18"/>' for x in entry["controls"].values()]
    if entry["interval"]:
        left, right = map(at, entry["interval"])
        marks.append(f'<line class="interval" x1="{left}" x2="{right}" y1="11" y2="11"/>')
    marks.append(f'<circle class="value" cx="{at(entry["value"])}" cy="11" r="4.5"/>')
    marks += [f'<path class="published" d="M{at(x)} 3l8 8-8 8-8-8z"/>' for x in published]
    return _svg(150, 22, "".join(marks))


def _svg(width: int, height: int, marks: str) -> str:
    return f'<svg class="strip" viewBox="0 0 {width} {height}" aria-hidden="true">{marks}</svg>'


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
        frames=f"<h3>Data</h3>{frames}" if frames else "",
        params=f"<details><summary>Parameters</summary>{_scroll(f'<table>{params}</table>', 'Parameters')}</details>"
        if params
        else "",
    )


def _failure(name: str, error: str) -> str:
    experiment = _experiment(name)
    group = escape(experiment.group if experiment else _OWN)
    heading = f'<p class="group">{group}</p><h2>{_numbered(experiment, _title(name))}</h2>'
    text = f'<p class="failure">No result: {escape(error)}</p>'
    return f'<section id="{escape(name)}" class="experiment">{heading}{text}</section>'


def _definition(result: Result, metric: str) -> str:
    value = _number(result.metrics[metric]) if metric in result.metrics else "not computed"
    text = escape(result.definitions.get(metric, ""))
    return f"<dt>{escape(_words(metric))} <b>{value}</b></dt><dd>{text}</dd>"


def _figure(identifier: str, figure: go.Figure) -> str:
    """A place of the figure's size and its data; its title becomes a caption, which wraps on a narrow screen."""
    import plotly.graph_objects as go

    copy = go.Figure(figure)
    title = re.sub(r"<[^>]*>", " ", copy.layout.title.text or "")
    copy.update_layout(title=None, margin_t=None)
    height = copy.layout.height or 420
    width = (copy.layout.meta or {}).get("min_width", 0)
    data = copy.to_json().replace("<", "\\u003c")  # no "</script>" and no comment can begin inside
    caption = escape(unescape(title)) or escape(_words(identifier.split("-", 1)[1]))
    canvas = f'<div class="canvas" style="height:{height:.0f}px;min-width:{width:.0f}px"></div>'
    script = f'<script type="application/json">{data}</script>'
    return f'<figure id="{identifier}"><figcaption>{caption}</figcaption>{_scroll(canvas, caption)}{script}</figure>'


def _frame(experiment: str, name: str, frame: pd.DataFrame, folder: Path) -> str:
    """The first rows, folded away; a link to all of them where they were saved."""
    numeric = [pd.api.types.is_numeric_dtype(frame[column]) and frame[column].dtype != bool for column in frame]
    head = "".join(
        f'<th scope="col"{_kind(n)}>{escape(_words(str(c)))}</th>' for c, n in zip(frame, numeric, strict=True)
    )
    rows = "".join(
        "<tr>" + "".join(f"<td{_kind(n)}>{_cell(value)}</td>" for value, n in zip(row, numeric, strict=True)) + "</tr>"
        for row in frame.head(FIRST_ROWS).itertuples(index=False)
    )
    file = f"{experiment}/frames/{name}.csv"
    link = f'<a href="{file}">{file}</a>' if (folder / file).is_file() else "the saved result"
    more = f"<p>The first {FIRST_ROWS} rows; all of them are in {link}.</p>" if len(frame) > FIRST_ROWS else ""
    table = _scroll(f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>", f"{name}, first rows")
    summary = f"{escape(_words(name))} <small>{len(frame):,} rows, {frame.shape[1]} columns</small>"
    return f"<details><summary>{summary}</summary>{table}{more}</details>"


# -- small pieces -----------------------------------------------------------------------------------------------------


def _experiment(name: str) -> Experiment | None:
    return next((experiment for experiment in EXPERIMENTS.values() if experiment.name == name), None)


def _title(name: str) -> str:
    experiment = _experiment(name)
    return experiment.title if experiment else _words(name)


def _numbered(experiment: Experiment | None, title: str) -> str:
    return f"{experiment.number}. {escape(title)}" if experiment else escape(title)


def _chip(verdict: Verdict, text: str = "") -> str:
    kind = verdict.replace(" ", "-")
    return f'<span class="verdict {kind}">{_SIGNS[verdict]} {escape(text or verdict)}</span>'


def _scroll(content: str, label: str) -> str:
    """A box that scrolls sideways by itself, with the keyboard too, so that the page never does."""
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}">{content}</div>'


def _cell(value: Any) -> str:
    return _number(value) if isinstance(value, int | float) else escape(str(value))


def _kind(numeric: bool) -> str:
    return ' class="number"' if numeric else ""


def _number(value: float) -> str:
    """Whole numbers in full, others to four digits."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if math.isnan(value):
        return "–"
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e15 else f"{value:.4g}"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _template(name: str) -> Template:
    return Template(_text(name))


def _text(name: str) -> str:
    return (resources.files("analyses") / "templates" / name).read_text(encoding="utf-8")
