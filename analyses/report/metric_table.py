"""Metrics as a table of HTML: a row a metric, drawn and in numbers, with its controls, published value and verdict."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from html import escape

from analyses.claims import claim_of
from analyses.report.explanations import deciding, glossed
from analyses.report.messages import NAMES, recognise, translate
from analyses.result.finding import Finding
from analyses.result.result import Result
from analyses.statistics.verdicts import Verdict

COLUMNS = {
    "Metric": "metric",
    "Value": "value",
    "Controls": "controls",
    "Published": "number published",
    "Verdict": "judged",
}
_SORTED_AS = {"Metric": "text", "Value": "number", "Verdict": "number"}  # by report.js
_SHAPES = (  # of controls, about their middle
    "m0-6v12",
    "m-4 3.5l4-7 4 7z",
    "m-3.5-3.5h7v7h-7z",
    "m-4-4l8 8m0-8l-8 8",
    "m-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0",
    "m-4-3.5l4 7 4-7z",
)
_SIGNS = {"supported": "✓", "underpowered": "?", "not supported": "✗"}


def metric_table(bodies: Sequence[str], label: str) -> str:
    """The table around groups of `metric_rows`; `label` names it for screen readers. report.js makes it sortable."""
    head = "".join(
        f'<th scope="col" class="{kind}"{_sorted_as(name)}>{translate(name)}</th>' for name, kind in COLUMNS.items()
    )
    groups = "".join(f"<tbody>{body}</tbody>" for body in bodies)
    return scroll_box(f'<table class="metrics"><thead><tr>{head}</tr></thead>{groups}</table>', label)


def group_row(title: str) -> str:
    """A row that heads a group; `title` is HTML."""
    return f'<tr><th colspan="{len(COLUMNS)}" scope="rowgroup">{title}</th></tr>'


def metric_rows(result: Result, metrics: Iterable[str]) -> str:
    """A row for each of the metrics."""
    return "\n".join(_row(result, metric) for metric in metrics)


def key() -> str:
    """What the marks in a row's drawing mean."""
    marks = {
        "value, 95% interval": '<path class="interval" d="M2 7h22"/><circle class="value" cx="13" cy="7" r="4"/>',
        "controls": '<path class="control" d="M13 1v12"/>',
        "published": '<path class="published" d="M13 1l6 6-6 6-6-6z"/>',
    }
    return "".join(f"<span>{_svg(26, 14, [mark])} {translate(name)}</span>" for name, mark in marks.items())


def verdict_chip(verdict: Verdict, text: str = "") -> str:
    """A verdict in its colour, with a sign and in words."""
    shown = escape(text or translate(verdict))
    return f'<span class="verdict {verdict.replace(" ", "-")}">{_SIGNS[verdict]} {shown}</span>'


def scroll_box(content: str, label: str) -> str:
    """A box that scrolls sideways by itself, with the keyboard too, so that the page never does."""
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}">{content}</div>'


def number(value: float) -> str:
    """Whole numbers in full, others to four digits.

    >>> number(9123456), number(0.12345678), number(True)
    ('9,123,456', '0.1235', 'yes')
    """
    if isinstance(value, bool):
        return translate("yes" if value else "no")
    if math.isnan(value):
        return "–"
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e15 else f"{value:.4g}"


def definition_id(experiment: str, metric: str) -> str:
    """Where in the report a metric is defined."""
    return anchor(f"{experiment}-is-{metric}")


def anchor(name: str) -> str:
    """A name as an id of the page and behind the # of a link, whatever is in it."""
    return escape(re.sub(r"\s", "_", name))


def words(name: str) -> str:
    """An identifier for people."""
    return name.replace("_", " ")


def _sorted_as(column: str) -> str:
    return f' data-sort="{_SORTED_AS[column]}"' if column in _SORTED_AS else ""


def _row(result: Result, metric: str) -> str:
    finding = result.findings[metric]
    value, interval = number(finding.value), ""
    if finding.interval:
        low, high = map(number, finding.interval)
        interval = f' <span class="interval">{translate("{low} to {high}", low=low, high=high)}</span>'
    decisive = deciding(result, metric)
    controls = "".join(
        f"<li{' class=decides' if name in decisive else ''}><span>{_svg(12, 12, [_control(i, 6, 6)])} "
        f"{glossed(recognise(words(name), *NAMES))}</span> <b>{number(control)}</b></li>"
        for i, (name, control) in enumerate(finding.controls.items())
    )
    published = "" if finding.published is None else number(finding.published)
    verdict = verdict_chip(finding.verdict) + _demand(result.name, metric) if finding.verdict else ""
    order = f' data-order="{[*_SIGNS].index(finding.verdict)}"' if finding.verdict else ""
    name = escape(recognise(words(metric), *NAMES))
    return (
        f'<tr><th scope="row"><a href="#{definition_id(result.name, metric)}">{name}</a></th>'
        f'<td class="value" data-order="{finding.value!r}"><div>{value}{interval}</div>'
        f"{_drawing(finding)}</td>"
        f'<td class="controls">{f"<ul>{controls}</ul>" if controls else ""}</td>'
        f'<td class="number published">{published}</td>'
        f'<td class="judged"{order}>{verdict}</td></tr>'
    )


def _demand(experiment: str, metric: str) -> str:
    """The smallest effect that matters, below a verdict."""
    claim = claim_of(experiment, metric)
    if claim is None or not claim.smallest:
        return ""
    return f' <span class="interval">{translate("by {amount} at least", amount=claim.amount)}</span>'


def _drawing(finding: Finding) -> str:
    """The numbers of a row on an axis of their own; hidden from screen readers, which read the numbers."""
    controls = list(finding.controls.values())
    published = [] if finding.published is None else [finding.published]
    numbers = [finding.value, *(finding.interval or ()), *controls, *published]
    low, high = min(numbers), max(numbers)
    if low == high:
        return ""

    def at(x: float) -> str:
        return f"{8 + 134 * (x - low) / (high - low):.1f}"

    marks = ['<path class="axis" d="M2 11h146"/>', *(_control(i, at(x), 11) for i, x in enumerate(controls))]
    if finding.interval:
        marks.append('<path class="interval" d="M{} 11H{}"/>'.format(*map(at, finding.interval)))
    marks.append(f'<circle class="value" cx="{at(finding.value)}" cy="11" r="4.5"/>')
    marks += [f'<path class="published" d="M{at(x)} 3l8 8-8 8-8-8z"/>' for x in published]
    return _svg(150, 22, marks)


def _control(i: int, x: float | str, y: float) -> str:
    """The mark of the i-th control of a metric: a shape and a colour (report.css) of its own."""
    i %= len(_SHAPES)
    return f'<path class="control c{i}" d="M{x} {y}{_SHAPES[i]}"/>'


def _svg(width: int, height: int, marks: Iterable[str]) -> str:
    return f'<svg class="strip" viewBox="0 0 {width} {height}" aria-hidden="true">{"".join(marks)}</svg>'
