"""Arguments that callers give as numbers or names, as plain Python values; without importing torch."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from reflowlens.errors import ReflowlensError

MOST_RUNS = 1_000_000


def integer(value: Any) -> int | None:
    """An integer of Python, NumPy or torch as Python's; None where it is none (a truth value is none)."""
    if not _is_scalar(value):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def real(value: Any) -> float | None:
    """A number of Python, NumPy or torch as Python's; None where it is none, or beyond the largest float."""
    if isinstance(value, str | bytes) or not _is_scalar(value):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None


def _is_scalar(value: Any) -> bool:
    """Whether it may be a number: no truth value, and no array or tensor with axes."""
    is_truth_value = isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")
    return not is_truth_value and not getattr(value, "ndim", 0)


def is_one_of(value: Any, choices: Sequence[str | None]) -> bool:
    """Whether a value is one of some names, or the None among them: an array is none, and compared with nothing."""
    return (value is None or isinstance(value, str)) and value in choices


def random_seed(value: Any) -> int:
    """A seed that every generator of torch takes, also with a row's or a batch's number added.

    Raises:
        ReflowlensError: it is no integer, or needs more than 63 bits and a sign.
    """
    seed = integer(value)
    if seed is None or not -(2**63) <= seed < 2**63:
        raise ReflowlensError(f"seed must be an integer from -2**63 to 2**63 - 1, got {value!r}")
    return seed


def number_of_runs(value: Any, name: str, least: int) -> int:
    """An argument that says how many runs, rows or draws are made: no more than anybody can wait for.

    Raises:
        ReflowlensError: it is no integer, or out of range.
    """
    number = whole_number(value, name, least)
    if number > MOST_RUNS:
        raise ReflowlensError(f"{name} must be at most {MOST_RUNS:,}, got {value!r}")
    return number


def whole_number(value: Any, name: str, least: int) -> int:
    """An argument that counts something.

    Raises:
        ReflowlensError: it is no integer, or below the least.
    """
    number = integer(value)
    if number is None or number < least:
        raise ReflowlensError(f"{name} must be an integer and at least {least}, got {value!r}")
    return number


def real_number(value: Any, name: str) -> float:
    """An argument that measures something.

    Raises:
        ReflowlensError: it is no number, or NaN.
    """
    number = real(value)
    if number is None or math.isnan(number):
        raise ReflowlensError(f"{name} must be a number, got {value!r}")
    return number


def names_given(value: Any, name: str) -> list[str]:
    """One name or several as a list.

    Raises:
        ReflowlensError: they are no names.
    """
    several = isinstance(value, Iterable) and not isinstance(value, str) and getattr(value, "ndim", 1) != 0
    names = list(value) if several else [value]
    if not all(isinstance(one, str) for one in names):
        raise ReflowlensError(f"{name} must be a name or a list of names, got {value!r}")
    return names


def path_given(value: Any, name: str) -> Path:
    """Where a file or folder is.

    Raises:
        ReflowlensError: it is no path.
    """
    if not isinstance(value, str | os.PathLike):
        raise ReflowlensError(f"{name} must be a path, got {value!r}")
    return Path(value)
