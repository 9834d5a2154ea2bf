"""Text that a spreadsheet would compute: a token "=1+2", or worse a formula that calls a program, is data here."""

from __future__ import annotations

import pandas as pd

_COMPUTED = ("=", "+", "-", "@", "\t", "\r", "\n")  # how a cell begins that Excel, LibreOffice or Sheets reads as one
_GUARD = "'"


def guarded(frame: pd.DataFrame) -> pd.DataFrame:
    """A copy that a spreadsheet shows as it is: text that begins like a formula has an apostrophe before it.

    Text that begins with an apostrophe gets another, so that `unguarded` gives every text back. Numbers are left alone.

    >>> guarded(pd.DataFrame({"token": ["=1+2", " a", "'s"], "p": [-0.5, 0.1, 0.2]}))["token"].tolist()
    ["'=1+2", ' a', "''s"]
    """
    return frame.apply(_guarded_column).rename(columns=_guard)


def unguarded(cells: pd.DataFrame) -> pd.DataFrame:
    """What `guarded` was given, from the cells that it has written, all read as text."""
    return cells.apply(lambda column: column.str.removeprefix(_GUARD)).rename(columns=lambda c: c.removeprefix(_GUARD))


def _guarded_column(column: pd.Series) -> pd.Series:
    return column if pd.api.types.is_numeric_dtype(column) else column.map(_guard)


def _guard(text: object) -> object:
    risky = isinstance(text, str) and text.lstrip(" ").startswith((*_COMPUTED, _GUARD))
    return f"{_GUARD}{text}" if risky else text
