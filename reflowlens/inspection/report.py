"""What an inspection returns, and how it reads: as text, as HTML in a notebook, as JSON."""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from itertools import islice
from typing import Any

import pandas as pd

WIDTH = 120
_MOST_ROWS = 60  # of a frame in text; all of them are in the frame
_DEEPEST = 50  # tables in tables of a foreign file; what lies deeper is left out
_LONGEST = 2000  # characters of a fact as text; all of it is in the facts


@dataclass(frozen=True, eq=False)
class Inspection:
    """What a path holds.

    Args:
        path: what was inspected.
        kind: what it is, in words.
        facts: name -> a number, a text, or a table of such by name (a configuration, a manifest).
        frames: name -> DataFrame, those that apply of ``files`` (name, kind, bytes), ``parts`` (part, tensors,
            parameters, share), ``signals`` (measure, value, gaussian, definition), ``tensors`` (name, part, shape,
            dtype, parameters, mean, std, norm, min, max, zeros, nan, infinite), ``splits`` (of prepared data),
            ``layers`` (of a dictionary: reads, writes, norms, what was measured), ``curve`` (step, tokens, loss,
            val_loss, …: means over windows of steps) and ``differences`` (name, shape, other_shape, state, relative,
            max_abs).
        notes: what was left unread, and why.
        problems: what is damaged; empty of a sound path.
    """

    path: str
    kind: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    frames: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    def to_text(self, *, all_tensors: bool = False) -> str:
        """A page of text.

        Args:
            all_tensors: a line for each tensor; otherwise tensors that differ in their layer's number alone share one,
                with the ranges that their statistics span.
        """
        blocks = [f"{self.path}: {self.kind}", *(_sentences("problem", self.problems))]
        if self.facts:
            blocks.append("\n".join(_fact_lines(self.facts)))
        for name, frame in self.frames.items():
            shown = frame if all_tensors or name not in _BY_KIND else _BY_KIND[name](frame)
            blocks.append(f"{name}\n{_table(shown, None if all_tensors else _MOST_ROWS)}")
        blocks += _sentences("note", self.notes)
        return _printable("\n\n".join(blocks))

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON can hold it; a number that is not finite becomes None."""
        frames = {name: frame.to_dict("records") for name, frame in self.frames.items()}
        fields = {"path": self.path, "kind": self.kind, "facts": dict(self.facts), "frames": frames}
        whole: dict[str, Any] = _plain(fields | {"notes": self.notes, "problems": self.problems})
        return whole

    def to_json(self) -> str:
        """:meth:`to_dict` as a text."""
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        return text.encode("utf8", "backslashreplace").decode()  # of half a surrogate pair, which UTF-8 has not

    def _repr_html_(self) -> str:
        head = f"<b>{escape(self.path)}</b>: {escape(self.kind)}"
        lists = "".join(f"<p>{label}: {escape(text)}</p>" for label, text in self._labelled())
        facts = "".join(
            f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in _shown(self.facts).items()
        )
        tables = "".join(
            f"<details{'' if name == 'tensors' else ' open'}><summary>{escape(name)}</summary>"
            f"{frame.to_html(index=False, float_format=_short, border=0)}</details>"
            for name, frame in self.frames.items()
        )
        return f"{head}{lists}<table>{facts}</table>{tables}"

    def _labelled(self) -> list[tuple[str, str]]:
        return [("problem", text) for text in self.problems] + [("note", text) for text in self.notes]


def _sentences(label: str, texts: tuple[str, ...]) -> list[str]:
    lines = [textwrap.fill(f"{label}: {text}", WIDTH, subsequent_indent="  ") for text in texts]
    return ["\n".join(lines)] if lines else []


def _fact_lines(facts: Mapping[str, Any]) -> list[str]:
    shown = _shown(facts)
    indent = 2 + max(len(name) for name in shown)
    return [
        textwrap.fill(f"{name:<{indent}}{value}", WIDTH, subsequent_indent=" " * indent, break_on_hyphens=False)
        for name, value in shown.items()
    ]


def _shown(facts: Mapping[str, Any]) -> dict[str, str]:
    """Facts as text, no more and no longer than a page holds."""
    texts = {name: _inline(value) for name, value in islice(facts.items(), _MOST_ROWS)}
    cut = {name: f"{text[:_LONGEST]} …" if len(text) > _LONGEST else text for name, text in texts.items()}
    return cut | ({"…": f"and {len(facts) - len(cut):,} more"} if len(facts) > len(cut) else {})


def _printable(text: str) -> str:
    """What a terminal may be given of a foreign file: characters that would steer it are spelt out."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def _inline(value: Any, depth: int = 0) -> str:
    """A value in one line: a table as ``name=value`` pairs."""
    if depth > _DEEPEST:
        return "…"
    if isinstance(value, Mapping):
        return ", ".join(
            f"{k} ({_inline(v, depth + 1)})" if isinstance(v, Mapping) else f"{k}={_inline(v, depth + 1)}"
            for k, v in value.items()
        )
    if isinstance(value, list | tuple):
        return ", ".join(_inline(entry, depth + 1) for entry in value)
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return _short(value) if isinstance(value, float) else str(value)


def _short(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4g}"


def _table(frame: pd.DataFrame, most: int | None) -> str:
    """Columns of text to the left, numbers to the right."""
    shown = frame if most is None else frame.head(most)
    columns = []
    for name in shown:
        cells = [str(name), *map(_inline, shown[name].tolist())]
        width = max(map(len, cells))
        is_number = pd.api.types.is_numeric_dtype(shown[name])
        columns.append([cell.rjust(width) if is_number else cell.ljust(width) for cell in cells])
    lines = ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]
    left = len(frame) - len(shown)
    return "\n".join([*lines, *([f"… and {left} more"] if left else [])])


def _without_layers(names: pd.Series) -> pd.Series:
    """Names with the number of their layer (or shard of experts) as ``*``."""
    return names.map(lambda name: re.sub(r"(?<![^.])\d+(?![^.])", "*", name))


def _tensor_kinds(tensors: pd.DataFrame) -> pd.DataFrame:
    groups = tensors.groupby([_without_layers(tensors["name"]), "shape", "dtype"], sort=False)
    rows = [
        {
            "name": name,
            "tensors": len(group),
            "shape": shape,
            "dtype": dtype,
            "parameters": group["parameters"].sum(),
            **{column: _span(group[column]) for column in ("mean", "std", "norm")},
            "zeros": float((group["zeros"] * group["parameters"]).sum() / max(1, group["parameters"].sum())),
            "nan": group["nan"].sum(),
            "infinite": group["infinite"].sum(),
        }
        for (name, shape, dtype), group in groups
    ]
    kinds = pd.DataFrame(rows)
    return kinds if kinds[["nan", "infinite"]].any(axis=None) else kinds.drop(columns=["nan", "infinite"])


def _difference_kinds(differences: pd.DataFrame) -> pd.DataFrame:
    groups = differences.groupby([_without_layers(differences["name"]), "shape", "other_shape", "state"], sort=False)
    rows = [
        {
            "name": name,
            "tensors": len(group),
            "shape": shape,
            "other_shape": other,
            "state": state,
            **{column: _span(group[column]) for column in ("relative", "max_abs")},
        }
        for (name, shape, other, state), group in groups
    ]
    return pd.DataFrame(rows)


def _span(values: pd.Series) -> str:
    low, high = _short(values.min()), _short(values.max())
    return low if low == high else f"{low} … {high}"


_BY_KIND = {"tensors": _tensor_kinds, "differences": _difference_kinds}


def _plain(value: Any, depth: int = 0) -> Any:
    if depth > _DEEPEST:
        return "…"
    if isinstance(value, Mapping):
        return {str(name): _plain(entry, depth + 1) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry, depth + 1) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value.item() if hasattr(value, "item") else value
