"""Arguments that callers give as numbers or names, as plain Python values; without importing torch."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from reflowlens.errors import ReflowlensError


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
