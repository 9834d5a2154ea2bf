"""Editing weights for a while: afterwards they are what they were, to the bit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from reflowlens.config import nearest
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel

Indices: TypeAlias = "int | str | Sequence[int] | Sequence[str] | None"


@dataclass(frozen=True)
class SetWeights:
    """Put values into rows and columns of a parameter.

    Args:
        parameter: its name, e.g. ``embed.W_recipe`` (a row a token, a column a signal) or ``embed.W_basis`` (a row a
            signal).
        value: a number, or a tensor that fits the selected part.
        rows: indices of the first axis; of an embedding or a recipe also words of one token. None is all.
        columns: indices of the last axis.
    """

    parameter: str
    value: float | Float[Tensor, "*shape"]
    rows: Indices = None
    columns: Indices = None

    def new(self, part: Tensor) -> Tensor:
        return _fit(self.value, part)


@dataclass(frozen=True)
class AddWeights(SetWeights):
    """Add a value to rows and columns of a parameter."""

    def new(self, part: Tensor) -> Tensor:
        return part + _fit(self.value, part)


@dataclass(frozen=True)
class ScaleWeights(SetWeights):
    """Multiply rows and columns of a parameter: by 0 silences a signal, by 2 doubles it."""

    def new(self, part: Tensor) -> Tensor:
        return part * _fit(self.value, part)


@dataclass(frozen=True)
class SwapWeights:
    """Exchange two rows of a parameter, or two columns: two words' recipes, two signals."""

    parameter: str
    rows: tuple[int | str, int | str] | None = None
    columns: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if (self.rows is None) == (self.columns is None):
            raise ReflowlensError("SwapWeights takes two rows or two columns")

    def new(self, part: Tensor) -> Tensor:
        return part.flip(0 if self.rows is not None else -1)


WeightEdit: TypeAlias = "SetWeights | SwapWeights"


@contextlib.contextmanager
def edit(model: Any, edits: Sequence[WeightEdit] | WeightEdit) -> Iterator[HookedModel]:
    """Change weights for the duration of a ``with`` block, in the order of the list.

    On exit, also after an exception or Ctrl-C, every parameter is bit for bit what it was.

    Raises:
        ReflowlensError: there is no such parameter, row or column, or a value does not fit; then nothing has changed.

    Example:
        >>> import reflowlens as rl
        >>> model = rl.load_model("reflow-nano")
        >>> before = rl.model_hash(model)
        >>> with rl.edit(model, rl.SwapWeights("embed.W_recipe", rows=(" king", " queen"))):
        ...     logits = model("The king")
        >>> rl.model_hash(model) == before
        True
    """
    model = getattr(model, "_orig_mod", model)
    edits = [edits] if isinstance(edits, (SetWeights, SwapWeights)) else list(edits)
    places = [_place(model, change) for change in edits]
    kept: list[Tensor] = []
    try:
        for (parameter, index), change in zip(places, edits, strict=True):
            with torch.no_grad():
                part = parameter[index]
                new = change.new(part)
                kept.append(part.clone())
                parameter[index] = new
        yield model
    finally:
        with torch.no_grad():
            for (parameter, index), part in reversed(list(zip(places, kept, strict=False))):
                parameter[index] = part


def _place(model: HookedModel, change: WeightEdit) -> tuple[Tensor, tuple[Any, ...]]:
    parameters = dict(model.named_parameters())
    name = change.parameter
    if name not in parameters:
        raise ReflowlensError(f"no parameter {name!r}{nearest(name, list(parameters))}")
    parameter = parameters[name]
    words = parameter.shape[0] == model.cfg.d_vocab
    rows = _indices(model, "row", name, change.rows, parameter.shape[0], words)
    columns = _indices(model, "column", name, change.columns, parameter.shape[-1], words=False)
    if parameter.ndim == 1:
        if change.columns is not None:
            raise ReflowlensError(f"{name!r} is a vector: choose its entries with rows=")
        return parameter, (rows,)
    middle = (slice(None),) * (parameter.ndim - 2)
    if isinstance(rows, Tensor) and isinstance(columns, Tensor):
        if middle:
            raise ReflowlensError(f"{name!r} has {parameter.ndim} axes: choose rows or columns, not both")
        return parameter, (rows[:, None], columns)  # their product, not pairs
    return parameter, (rows, *middle, columns)


def _indices(
    model: HookedModel, what: str, name: str, chosen: Indices | tuple[int | str, ...], size: int, words: bool
) -> slice | Tensor:
    if chosen is None:
        return slice(None)
    items = [chosen] if isinstance(chosen, (int, str)) else list(chosen)
    indices = []
    for item in items:
        if isinstance(item, str):
            if not words:
                raise ReflowlensError(f"{what}s of {name!r} are not tokens: give numbers, not {item!r}")
            item = model.to_single_token(item)
        if not -size <= item < size:
            raise ReflowlensError(f"{what} {item} of {name!r} is out of range: 0 to {size - 1}")
        indices.append(item % size)
    if not indices or len(set(indices)) < len(indices):
        raise ReflowlensError(f"{what}s of {name!r} must be different and at least one, got {items}")
    return torch.tensor(indices)


def _fit(value: Any, part: Tensor) -> Tensor:
    tensor = torch.as_tensor(value, dtype=part.dtype, device=part.device)
    if tensor.ndim > part.ndim or any(a not in (1, b) for a, b in zip(tensor.shape[::-1], part.shape[::-1])):  # noqa: B905
        raise ReflowlensError(f"a value of shape {list(tensor.shape)} does not fit a part of shape {list(part.shape)}")
    return tensor.expand_as(part)
