"""Docstrings as Markdown: what they take from Sphinx and from doctest, a page would otherwise show as it stands."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):`~?([^`]+)`")
_EXAMPLE = re.compile(r"^Example:\n", re.MULTILINE)
_TABLE = re.compile(r"^(=+(?:  +=+)+)\n(.+)\n\1\n((?:.+\n)+?)\1$", re.MULTILINE)
_FIELDS = re.compile(r"^`\w+`[^:\n]*: ", re.MULTILINE)
_FIELD = re.compile(r"[`\w][`\w, ]*: \S")


class Roles(griffe.Extension):
    """Rewrites the docstrings of whatever is loaded."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)


def to_markdown(text: str) -> str:
    """A docstring's text, cleaned of indentation, in Markdown.

    >>> to_markdown("See :func:`reflowlens.sweep`.")
    'See `reflowlens.sweep`.'
    """
    text = _ROLE.sub(r"`\1`", text)
    text = _EXAMPLE.sub("Examples:\n", text)
    text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
    text = _TABLE.sub(_table, text)
    return "\n\n".join(map(_paragraph, text.split("\n\n")))


def _paragraph(text: str) -> str:
    if text.startswith(">>> "):
        return f"```pycon\n{text}\n```"
    if _FIELDS.match(text):
        return _FIELDS.sub(r"* \g<0>", text)
    outer = [line for line in text.split("\n") if not line.startswith(" ")]
    if len(outer) > 1 and all(map(_FIELD.match, outer)):
        return re.sub(r"^(?=\S)", "* ", text, flags=re.MULTILINE)
    return text


def _table(match: re.Match[str]) -> str:
    """A simple table of reStructuredText; a row whose first cell is empty goes on with the one above."""
    ruler, head, body = match.groups()
    spans = [run.span() for run in re.finditer("=+", ruler)]

    def cells(line: str) -> list[str]:
        ends = [*(start for start, _ in spans[1:]), None]
        return [line[start:end].strip().replace("``", "`") for (start, _), end in zip(spans, ends, strict=True)]

    rows: list[list[str]] = []
    for line in body.rstrip("\n").split("\n"):
        row = cells(line)
        if row[0] or not rows:
            rows.append(row)
        else:
            rows[-1] = [f"{above} {more}".strip() for above, more in zip(rows[-1], row, strict=True)]
    lines = [cells(head), ["---"] * len(spans), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
