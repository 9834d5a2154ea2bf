"""The fields of interventions: selectors and numbers checked, compared, and written as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from reflowlens.arguments import integer, real
from reflowlens.errors import ReflowlensError


def selector(value: Any, name: str) -> int | slice | list[int] | list[list[int]] | str | None:
    """A selector as plain Python, so that it compares, prints and is written as one."""
    if value is None or type(value) is int:
        return value
    if isinstance(value, str):
        if name.endswith(".position") or (name.endswith(".layer") and value == "all"):
            return value
    elif isinstance(value, slice):
        start, stop, step = (part if part is None else integer(part) for part in (value.start, value.stop, value.step))
        if step != 0 and (start, stop, step) == (value.start, value.stop, value.step) and not name.endswith(".layer"):
            return slice(start, stop, step)
    elif (one := integer(value)) is not None:
        return one
    elif isinstance(value, Sequence | Tensor | np.ndarray) and len(value):
        several = integers(value)
        if several is not None:
            return several
        if name.endswith(".position"):
            each = [integers(row) for row in value]
            if None not in each:
                return cast(list[list[int]], each)
    shown = f"a mask or list like {value[:3]!r}..." if isinstance(value, list) and len(value) > 3 else repr(value)
    of_positions = ", a list of these for each prompt, 'last', or the text of a token"
    words = {"layer": ", or 'all'", "position": of_positions}.get(name.rsplit(".", 1)[-1], "")
    ranges = "" if name.endswith(".layer") else ", a slice"
    raise ReflowlensError(f"{name} must be an index{ranges}, or several indices (no mask){words}; got {shown}")


def integers(value: Any) -> list[int] | None:
    """Several integers, of whatever kind, as Python's; None where they are something else."""
    if (
        isinstance(value, str)
        or not isinstance(value, Sequence | Tensor | np.ndarray)
        or getattr(value, "ndim", 1) != 1
    ):
        return None
    found = [index for index in map(integer, value) if index is not None]
    return found if len(found) == len(value) else None


def check_number(value: Any, name: str) -> None:
    is_number = isinstance(value, int | float) and real(value) is not None
    if not (is_number or isinstance(value, np.number) or _is_scalar(value)):
        raise ReflowlensError(f"{name} must be a number, got {value!r}")


def as_factor(number: float | Tensor) -> float | Tensor:
    """A tensor as it is, for its gradient; torch takes no Python integer of more than 64 bits."""
    return float(number) if isinstance(number, int) else number


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray) and value.ndim == 0


def same(one: Any, other: Any) -> bool:
    """Equality of two fields; of tensors and arrays that of type, shape and values, of caches identity."""
    if one is other:
        return True
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one.cpu(), other.cpu())
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    not_values = (Tensor, np.ndarray, Mapping)
    return not isinstance(one, not_values) and not isinstance(other, not_values) and bool(one == other)


def to_plain(value: Any, name: str) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if isinstance(value, Tensor):
        return {"tensor": value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, slice):
        return {"slice": [value.start, value.stop, value.step]}
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, Sequence):
        return list(value)
    raise ReflowlensError(f"{name} is a cache of activations and cannot be JSON: give its text or tokens instead")


def from_plain(value: Any) -> Any:
    if isinstance(value, dict) and "slice" in value:
        return slice(*value["slice"])
    if isinstance(value, dict) and "tensor" in value:
        return torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"]))
    return value


def fit(value: Any, part: Tensor, name: str) -> Tensor:
    """A number, or numbers that broadcast to the selected part, in its shape and type.

    Raises:
        ReflowlensError: they are no numbers, or do not fit.
    """
    try:
        tensor = torch.as_tensor(value, dtype=part.dtype, device=part.device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ReflowlensError(f"{name} must be numbers, got {value!r}") from error
    try:
        return tensor.expand_as(part)
    except RuntimeError as error:
        raise ReflowlensError(f"{name} has shape {list(tensor.shape)}, the selected part {list(part.shape)}") from error
