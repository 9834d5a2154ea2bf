"""Tables that grow by a row at a time: a benchmark's row is printed as soon as it is measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

Row: TypeAlias = "dict[str, Any]"  # column -> a number, or a text
_WIDTH = 10


def lines(rows: Iterable[Row], numbers: Sequence[str], texts: Sequence[str]) -> Iterator[str]:
    """A header, then a line for each row as it comes.

    Args:
        numbers: columns in front, ``-`` where a row has none.
        texts: columns at the end, joined by commas, so that a long text moves no number.

    Example:
        >>> print(*lines([{"ratio": 11.62, "case": "reflow-nano", "sweep": "heads"}], ["ratio"], ["case", "sweep"]),
        ...       sep="\\n")
             ratio  case, sweep
             11.62  reflow-nano, heads
    """
    widths = {column: max(_WIDTH, len(column)) for column in numbers}
    yield "  ".join([*(f"{column:>{width}}" for column, width in widths.items()), ", ".join(texts)])
    for row in rows:
        cells = [f"{_shown(row.get(column)):>{width}}" for column, width in widths.items()]
        yield "  ".join([*cells, named(row, texts)])


def named(row: Mapping[str, Any], texts: Sequence[str]) -> str:
    """What a row is of."""
    return ", ".join(str(row[column]) for column in texts if column in row)


def _shown(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
