"""HTML for notebooks: escaping, tables, pages, and views that several on one page cannot confuse.

Nothing is fetched, and no colour of the page is assumed: text inherits it, lines and grounds are transparent tints, so
that the same output reads on a light and on a dark page, in JupyterLab, VS Code and exported HTML.
"""

from __future__ import annotations

import html
import itertools
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reflowlens.storage.atomic import replacing

ID = "RL-VIEW-ID"  # stands for a view's own name in its markup
_NUMBERS = itertools.count(1)
_CELL = "padding:.15em .8em .15em 0;border-bottom:1px solid rgba(128,128,128,.28);text-align:{align};vertical-align:top"
_PAGE = (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
    '<meta name="viewport" content="width=device-width, initial-scale=1"><style>:root{{color-scheme:light dark}}'
    "body{{margin:1.5rem;font:15px/1.5 system-ui,sans-serif;background:light-dark(#fff,#14161a);"
    "color:light-dark(#1d2129,#e4e6ea)}}</style></head><body>{body}</body></html>\n"
)


def escape(text: object) -> str:
    """Text as HTML shows it literally, in attributes too."""
    return html.escape(str(text))


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table of text and numbers; numbers to four digits, flush right.

    >>> "0.3333</td>" in table(["share"], [[1 / 3]])
    True
    """
    head = "".join(f'<th scope="col" style="{_CELL.format(align="left")}">{escape(column)}</th>' for column in columns)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return (
        '<table style="border-collapse:collapse;font-size:.92em;background:none;margin:.3em 0">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )


def folded(summary: str, content: str) -> str:
    """Content behind a line that opens it."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def titled(kind: str, facts: str, *parts: str) -> str:
    """A line that says what this is, and parts below it."""
    return f"<div><div><b>{escape(kind)}</b> {escape(facts)}</div>{''.join(parts)}</div>"


@dataclass(frozen=True)
class HtmlView:
    """Something to look at: in a notebook it shows itself, and it saves itself as a page that opens offline.

    Args:
        summary: one line, as a terminal shows it.
        markup: HTML, with :data:`ID` where a name that no other view on the page has is needed.
    """

    summary: str
    markup: str

    def __repr__(self) -> str:
        return self.summary

    def _repr_html_(self) -> str:
        # the number tells apart views of one session, the sum of their content those of several on one page
        return self.markup.replace(ID, f"rl-view-{next(_NUMBERS)}-{zlib.crc32(self.markup.encode()):08x}")

    def save(self, path: str | Path) -> Path:
        """Write a self-contained HTML page and return its path.

        Example: ``rl.show_tokens(["a", " b"], [0.5, -1.0]).save("out/tokens.html")``
        """
        path = Path(path)
        with replacing(path) as temporary:
            page = _PAGE.format(title=escape(self.summary), body=self._repr_html_())
            temporary.write_text(page, encoding="utf-8")
        return path


def selectable(names: Sequence[str], panels: Sequence[str]) -> str:
    """Panels of which one is shown, chosen by buttons above them: radio buttons and CSS alone, no script.

    Where a page drops styles, all panels are shown, each under its name.
    """
    if len(panels) == 1:
        return panels[0]
    buttons = "".join(
        f'<input type="radio" name="{ID}" id="{ID}-{i}"{" checked" if i == 0 else ""}>'
        f'<label for="{ID}-{i}">{escape(name)}</label>'
        for i, name in enumerate(names)
    )
    shown = ",".join(f"#{ID}-{i}:checked~.rl-{i}" for i in range(len(panels)))
    style = (
        f"#{ID} input{{position:absolute;opacity:0;pointer-events:none}}"
        f"#{ID} label{{display:inline-block;margin:0 .3em .3em 0;padding:0 .6em;border:1px solid rgba(128,128,128,.45);"
        "border-radius:1em;cursor:pointer;font-size:.85em}"
        f"#{ID} input:checked+label{{background:rgba(128,128,128,.3);font-weight:600}}"
        f"#{ID} input:focus-visible+label{{outline:2px solid rgb(0,114,178)}}"
        f"#{ID} .rl-panel,#{ID} .rl-name{{display:none}}{shown}{{display:block}}"
    )
    body = "".join(
        f'<div class="rl-panel rl-{i}"><div class="rl-name"><b>{escape(name)}</b></div>{panel}</div>'
        for i, (name, panel) in enumerate(zip(names, panels, strict=True))
    )
    return f"<style>{style}</style>{buttons}{body}"


def view(summary: str, title: str, notes: Sequence[str], content: str) -> HtmlView:
    """A view of a title, its content and small print."""
    head = f'<div style="font-weight:600;margin-bottom:.3em">{escape(title)}</div>' if title else ""
    small = "".join(f'<div style="font-size:.82em;opacity:.75">{escape(note)}</div>' for note in notes)
    return HtmlView(summary, f'<div id="{ID}" style="position:relative;line-height:1.5">{head}{content}{small}</div>')


def _cell(value: object) -> str:
    numeric = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    shown = f"{value:.4g}" if isinstance(value, float | np.floating) else f"{value:,}" if numeric else value
    return f'<td style="{_CELL.format(align="right" if numeric else "left")}">{escape(shown)}</td>'
