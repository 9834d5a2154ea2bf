"""Editing weights for a while: afterwards they are what they were, to the bit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from reflowlens.arguments import integer
from reflowlens.errors import ReflowlensError, nearest
from reflowlens.interventions.fields import fit
from reflowlens.models.base import HookedModel
from reflowlens.models.threads import changing
from reflowlens.models.unwrapping import hooked_model

Indices: TypeAlias = "int | str | slice | Sequence[int] | Sequence[str] | None"


@dataclass(frozen=True)
class SetWeights:
    """Set rows and columns of a parameter.

    Args:
        parameter: its name, e.g. ``embed.W_recipe`` [d_vocab, signal] or ``embed.W_basis`` [signal, d_model].
        value: a number, or numbers that broadcast to the selected part.
        rows: an index, a slice or indices along the first axis, or, if that axis is the vocabulary, words of one token
            each; None: all.
        columns: an index, a slice or indices along the last axis; None: all.

    Example: ``rl.SetWeights("embed.W_recipe", 0.0, rows=" king", columns=[3, 5])``
    """

    parameter: str
    value: float | Float[Tensor, "*shape"]
    rows: Indices = None
    columns: Indices = None

    def new(self, part: Tensor) -> Tensor:
        return fit(self.value, part, f"{type(self).__name__}.value")


@dataclass(frozen=True)
class AddWeights(SetWeights):
    """Add ``value`` to rows and columns of a parameter; arguments as for :class:`SetWeights`.

    Example: ``rl.AddWeights("embed.W_recipe", 1.0, rows=" king", columns=3)``
    """

    def new(self, part: Tensor) -> Tensor:
        return part + fit(self.value, part, f"{type(self).__name__}.value")


@dataclass(frozen=True)
class ScaleWeights(SetWeights):
    """Multiply rows and columns of a parameter by ``value``; arguments as for :class:`SetWeights`.

    Example: ``rl.ScaleWeights("embed.W_basis", 0, rows=3)`` silences signal 3.
    """

    def new(self, part: Tensor) -> Tensor:
        return part * fit(self.value, part, f"{type(self).__name__}.value")


@dataclass(frozen=True)
class SwapWeights:
    """Exchange two rows of a parameter, or two columns.

    Args:
        parameter: its name.
        rows: two indices along the first axis, or, if that axis is the vocabulary, two words of one token each.
        columns: two indices along the last axis, in place of ``rows``.

    Raises:
        ReflowlensError: not exactly two rows or two columns are given.

    Example: ``rl.SwapWeights("embed.W_recipe", rows=(" king", " queen"))``
    """

    parameter: str
    rows: tuple[int | str, int | str] | None = None
    columns: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if (self.rows is None) == (self.columns is None):
            raise ReflowlensError("SwapWeights takes two rows or two columns")
        pair = self.rows if self.rows is not None else self.columns
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise ReflowlensError(f"SwapWeights exchanges two rows or two columns, got {pair!r}")

    def new(self, part: Tensor) -> Tensor:
        return part.flip(0 if self.rows is not None else -1)


WeightEdit: TypeAlias = "SetWeights | SwapWeights"
_Kept: TypeAlias = "list[tuple[Tensor, tuple[Any, ...], Tensor]]"  # a parameter, where it was changed, what was there
_OPEN: WeakKeyDictionary[HookedModel, list[_Kept]] = WeakKeyDictionary()


@contextlib.contextmanager
def edit(model: Any, edits: Sequence[WeightEdit] | WeightEdit) -> Iterator[HookedModel]:
    """Change weights for the duration of a ``with`` block.

    On exit, also after an exception or Ctrl-C, every parameter is bit for bit what it was. Blocks that overlap must be
    closed in the reverse of the order in which they were opened, as nested ones are. A pass in another thread, which
    would see the edited weights, is an error.

    Args:
        model: a hooked model, compiled or not.
        edits: one or several, applied in order.

    Yields:
        The hooked model.

    Raises:
        ReflowlensError: there is no such parameter, row or column, or a value does not fit, or another thread is using
            the model; then nothing has changed. Or the block was closed before one that was opened later, which is then
            undone with it.

    Example:
        >>> import reflowlens as rl
        >>> model = rl.load_model("reflow-nano")
        >>> before = rl.model_hash(model)
        >>> with rl.edit(model, rl.SwapWeights("embed.W_recipe", rows=(" king", " queen"))):
        ...     logits = model("The king")
        >>> rl.model_hash(model) == before
        True
    """
    model = hooked_model(model)
    edits = [edits] if isinstance(edits, (SetWeights, SwapWeights)) or not isinstance(edits, Iterable) else list(edits)
    for change in edits:
        if not isinstance(change, (SetWeights, SwapWeights)):
            raise ReflowlensError(
                f"{change!r} is no edit of weights such as rl.ScaleWeights('embed.W_basis', 0, rows=3)"
            )
    places = [_place(model, change) for change in edits]
    kept: _Kept = []
    with changing(model):
        open_blocks = _OPEN.setdefault(model, [])
        open_blocks.append(kept)
        try:
            for (parameter, index), change in zip(places, edits, strict=True):
                with torch.no_grad():
                    part = parameter[index]
                    new = change.new(part).clone()  # it may be a view of the very parameter
                    kept.append((parameter, index, part.clone()))
                    parameter[index] = new
            yield model
        finally:
            later = _undo(open_blocks, kept)
    if later:
        raise ReflowlensError(
            "this rl.edit was closed before one that was opened later, which is undone with it: close blocks in the "
            "reverse of the order in which they were opened"
        )


def _undo(open_blocks: list[_Kept], kept: _Kept) -> int:
    """Undo a block, and before it those that were opened later; returns how many these are."""
    later = 0
    while any(block is kept for block in open_blocks):  # unless an earlier one has undone it
        block = open_blocks.pop()
        later += block is not kept
        with torch.no_grad():
            for parameter, index, part in reversed(block):
                parameter[index] = part
    return later


def _place(model: HookedModel, change: WeightEdit) -> tuple[Tensor, tuple[Any, ...]]:
    parameters = dict(model.named_parameters())
    name = change.parameter
    if not isinstance(name, str) or name not in parameters:
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
    if isinstance(chosen, slice):
        chosen = range(size)[chosen]
    items = list(chosen) if isinstance(chosen, Iterable) and not isinstance(chosen, str) else [chosen]
    indices = []
    for item in items:
        if isinstance(item, str):
            if not words:
                raise ReflowlensError(f"{what}s of {name!r} are not tokens: give numbers, not {item!r}")
            item = model.to_single_token(item)
        index = integer(item)
        if index is None:
            raise ReflowlensError(f"{what}s of {name!r} are chosen by index, a slice or indices, got {chosen!r}")
        if not -size <= index < size:
            raise ReflowlensError(f"{what} {index} of {name!r} is out of range: 0 to {size - 1}")
        indices.append(index % size)
    if not indices or len(set(indices)) < len(indices):
        raise ReflowlensError(f"{what}s of {name!r} must be different and at least one, got {items}")
    return torch.tensor(indices)
