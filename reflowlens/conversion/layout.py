"""How another library lays out the same weights: a table of rearrangements, written once and read both ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from einops import rearrange
from torch import Tensor

from reflowlens.config import ModelConfig
from reflowlens.errors import ReflowlensError, nearest
from reflowlens.models import check_memory, parameter_shapes
from reflowlens.models.numerics import only_finite, wide
from reflowlens.models.parts import is_bias
from reflowlens.storage.opening import shown

Reader: TypeAlias = "Callable[[], Tensor]"
SAME, TRANSPOSED, VECTOR = "rows columns -> rows columns", "rows columns -> columns rows", "width -> width"


@dataclass(frozen=True)
class Piece:
    """One parameter of ours inside a tensor of theirs.

    Args:
        ours: our name.
        pattern: einops pattern from our axes to theirs.
        sizes: lengths of the axes that the pattern splits, for either direction.
        shift: what theirs is more than ours.
        rows_before: rows of theirs that are nothing of ours, zeros on the way out.

    >>> piece = Piece("W", "head d_model (pair two) -> (head two pair) d_model", {"head": 2, "two": 2})
    >>> ours = torch.arange(24.0).reshape(2, 3, 4)
    >>> piece.to_theirs(ours).shape, bool((piece.to_ours(piece.to_theirs(ours)) == ours).all())
    (torch.Size([8, 3]), True)
    """

    ours: str
    pattern: str
    sizes: Mapping[str, int] = field(default_factory=dict)
    shift: float = 0.0
    rows_before: int = 0

    def to_theirs(self, tensor: Tensor) -> Tensor:
        tensor = rearrange(tensor, self.pattern, **self.sizes)
        if self.rows_before:
            tensor = torch.cat([tensor.new_zeros(self.rows_before, *tensor.shape[1:]), tensor])
        return wide(tensor) + self.shift if self.shift else tensor

    def to_ours(self, tensor: Tensor) -> Tensor:
        ours, theirs = self.pattern.split("->")
        tensor = rearrange(tensor[self.rows_before :], f"{theirs} -> {ours}", **self.sizes)
        return wide(tensor) - self.shift if self.shift else tensor


@dataclass(frozen=True)
class Entry:
    """A tensor of theirs: one piece, or several side by side along ``axis``.

    Args:
        joined: einops pattern from the pieces side by side to the tensor, where more is to be done.
        sizes: lengths of the axes that it joins.
    """

    theirs: str
    pieces: Sequence[Piece]
    axis: int = 0
    joined: str = ""
    sizes: Mapping[str, int] = field(default_factory=dict)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The tensor, of what its pieces are there."""
        tensor = torch.cat(list(parts), dim=self.axis)
        return rearrange(tensor, self.joined, **self.sizes) if self.joined else tensor

    def split(self, tensor: Tensor, widths: Sequence[int]) -> Sequence[Tensor]:
        """What its pieces are in the tensor, so wide along ``axis``."""
        if self.joined:
            apart, whole = self.joined.split("->")
            tensor = rearrange(tensor, f"{whole} -> {apart}", **self.sizes)
        return tensor.split(list(widths), dim=self.axis)


def entry(theirs: str, ours: str, pattern: str, **sizes: int) -> Entry:
    """An entry of one piece."""
    return Entry(theirs, [Piece(ours, pattern, sizes)])


def check_type(tensor: Tensor, what: str) -> None:
    """Raise unless a tensor holds its numbers as numbers, one by one."""
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise ReflowlensError(
            f"{what} is {tensor.dtype}; quantised weights cannot be read: give float32, float16 or bfloat16"
        )
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta:
        raise ReflowlensError(f"{what} is sparse, nested or without numbers: give a plain tensor")


def times(weight: Tensor, factor: float) -> Tensor:
    """A weight times a number, rounded once."""
    return weight if factor == 1 else wide(weight) * factor


def same(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors hold the same numbers, in types that may differ."""
    if one.dtype == two.dtype:
        return torch.equal(one, two)  # without a copy
    return one.shape == two.shape and bool((one == two).all())


def to_theirs(layout: Sequence[Entry], weights: Mapping[str, Tensor], cfg: ModelConfig) -> dict[str, Tensor]:
    """Our weights, all of them, under their names; a bias that the model does without is zero."""
    shapes = parameter_shapes(cfg)

    def ours(name: str) -> Tensor:
        absent = is_bias(name) and name not in weights
        return torch.zeros(shapes[name], dtype=torch.float32) if absent else weights[name]

    return {item.theirs: item.join([piece.to_theirs(ours(piece.ours)) for piece in item.pieces]) for item in layout}


def to_ours(
    layout: Sequence[Entry], readers: Mapping[str, Reader], cfg: ModelConfig, where: str
) -> Iterator[tuple[str, Tensor]]:
    """Their tensors as our weights, by name; every one must have its place.

    Args:
        readers: functions that return the tensors. All are asked for their shapes and types at once, and then each
            again when the one before was taken: a file, mapped into memory anew each time, is never held whole.
        where: what holds the tensors, for messages.

    Raises:
        ReflowlensError: a tensor is missing, has no place, has another shape or type, or holds NaN or infinite values.
    """
    expected = {item.theirs for item in layout}
    if missing := sorted(expected - set(readers)):
        raise ReflowlensError(f"{where} lacks {missing[0]!r} ({len(missing)} tensors missing)")
    if extra := sorted(set(readers) - expected):
        near = nearest(extra[0], sorted(expected))
        raise ReflowlensError(
            f"{where} holds {shown(extra[0])}, which has no place in a {cfg.architecture!r} model{near}"
        )
    check_memory(cfg, torch.float16)  # the least that it takes
    shapes = parameter_shapes(cfg)  # once it is known that the file has a tensor for every layer
    widths: dict[str, list[int]] = {}
    for item in layout:
        tensor = readers[item.theirs]()
        parts = [piece.to_theirs(torch.empty(shapes[piece.ours], device="meta")) for piece in item.pieces]
        shape = item.join(parts).shape
        if tensor.shape != shape:
            raise ReflowlensError(f"{where}: {item.theirs} has shape {list(tensor.shape)}, expected {list(shape)}")
        check_type(tensor, f"{where}: {item.theirs}")
        widths[item.theirs] = [part.shape[item.axis] for part in parts]

    def weights() -> Iterator[tuple[str, Tensor]]:
        for item in layout:
            tensor = readers[item.theirs]()
            if not only_finite(tensor):
                raise ReflowlensError(f"{where}: {item.theirs} holds NaN or infinite values")
            for piece, part in zip(item.pieces, item.split(tensor, widths[item.theirs]), strict=True):
                yield piece.ours, piece.to_ours(part)

    return weights()
