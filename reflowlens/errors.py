"""The one error type that means "the input was wrong", shown by the command line without a traceback, and how the
nearest right choice is named in its message."""

from __future__ import annotations

import difflib
from typing import Any


class ReflowlensError(ValueError):
    """Bad input: names the thing, what was expected, and the nearest right choice."""


def nearest(name: Any, candidates: list[str]) -> str:
    """A clause such as ``; did you mean 'd_model'?``, or nothing when no candidate is near."""
    if not isinstance(name, str):  # what was given in its place is in the message
        return ""
    matches = difflib.get_close_matches(name, candidates, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, matches))}?" if matches else ""
