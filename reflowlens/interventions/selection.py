"""A part of an activation, which can be read and changed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Bool
from torch import Tensor

from reflowlens.errors import ReflowlensError

Where: TypeAlias = "slice | Tensor"  # contiguous, or indices [n]; positions may be indices per row [batch, n]


@dataclass(frozen=True)
class Selection:
    """A part of an activation, as [batch, pos, (head), feature]: ``get`` reads it, ``put`` gives a changed copy.

    What a row has once, as the state of a learner, is at one position; other axes may lie between head and feature.

    Args:
        counted: of the positions, which ``put`` changes in each row; None for all of them.
        counted_keys: the same of the keys of an attention square, whose padding stays as it is.
        uneven: axes along which prompts have different numbers of selected places; rows are filled up with others.
    """

    axes: tuple[str, ...]
    positions: Where
    heads: Where
    features: Where
    counted: Bool[Tensor, "batch n"] | None = None
    counted_keys: Bool[Tensor, "batch n_features"] | None = None
    uneven: tuple[str, ...] = ()

    def get(self, activation: Tensor) -> Tensor:
        return self._arranged(activation)[self._indices(activation)]

    def put(self, activation: Tensor, part: Tensor) -> Tensor:
        changed = activation.clone()
        part = self.where_counted(part.to(activation), self.get(activation))
        self._arranged(changed)[self._indices(changed)] = part
        return changed

    def where_counted(self, part: Tensor, otherwise: Tensor | float) -> Tensor:
        """A selected part, and ``otherwise`` at the places of a row that ``put`` leaves unchanged."""
        between = [1] * (part.ndim - 2)
        if self.counted is not None:
            counted = self.counted.to(part.device)
            part = torch.where(counted.reshape(*counted.shape, *between), part, otherwise)
        if self.counted_keys is not None:
            counted = self.counted_keys.to(part.device)
            part = torch.where(counted.reshape(len(counted), *between, -1), part, otherwise)
        return part

    def in_own_order(self, part: Tensor) -> Tensor:
        """A view of a selected part with the point's own axes, :meth:`hook_axes`."""
        if "batch" not in self.axes:
            return part[0, 0].movedim(-1, 0)
        return part.movedim(1, self.axes.index("pos")) if "pos" in self.axes else part[:, 0]

    def from_own_order(self, part: Tensor) -> Tensor:
        """The inverse of :meth:`in_own_order`."""
        return self._arranged(part)

    def in_source(self, source: Tensor, activation: Tensor, offset: int, same_positions: bool) -> Tensor:
        """These heads and features of another run; at these positions, or at all of its own.

        Args:
            activation: what is selected from here, and ``offset`` the position of its first token.

        Raises:
            ReflowlensError: the source has not the positions, or as an attention square another number of keys.
        """
        if "key_pos" in self.axes and source.shape[-1] != activation.shape[-1]:
            raise ReflowlensError(f"the source has {source.shape[-1]} key positions, the run {activation.shape[-1]}")
        if "pos" not in self.axes and source.shape[1:] != activation.shape[1:]:
            raise ReflowlensError(
                f"the source is {list(source.shape[1:])} in each row, the run {list(activation.shape[1:])}"
            )
        if not same_positions or "pos" not in self.axes:  # a source of other prompts has rows of its own
            return dataclasses.replace(self, positions=slice(None)).get(source)
        axis = self.axes.index("pos")
        n, end = activation.shape[axis], source.shape[axis]
        wanted = torch.arange(n)[self.positions] + offset
        if int(wanted.max()) >= end:
            raise ReflowlensError(f"the source has {end} tokens, but position {int(wanted.max())} is asked of it")
        here = source.narrow(axis, offset, min(n, end - offset)).expand(activation.shape[0], *[-1] * (source.ndim - 1))
        if isinstance(self.positions, slice):  # the source may be shorter than the run
            first, stop, step = self.positions.indices(n)
            return dataclasses.replace(self, positions=slice(first, stop, step)).get(here)
        return self.get(here)

    def _arranged(self, activation: Tensor) -> Tensor:
        """A view with positions on axis 1, whatever the point's own order."""
        if "batch" not in self.axes:
            return activation[None, None].movedim(2, -1)  # hook_basis: its rows are its features
        return activation.movedim(self.axes.index("pos"), 1) if "pos" in self.axes else activation[:, None]

    def _indices(self, activation: Tensor) -> tuple[Where, ...]:
        view = self._arranged(activation)
        between = [self.heads, *[slice(None)] * (view.ndim - 4)] if view.ndim >= 4 else []
        where = (self.positions, *between, self.features)
        lists = [w for w in where if isinstance(w, Tensor)]
        if not lists or (len(lists) == 1 and lists[0].ndim == 1):
            return (slice(None), *where)
        # Several lists would be matched up element by element: an open mesh selects their product instead.
        mesh: list[Tensor] = [torch.arange(view.shape[0], device=view.device)]
        for size, w in zip(view.shape[1:], where, strict=True):
            mesh.append(w if isinstance(w, Tensor) else torch.arange(size, device=view.device)[w])
        n = view.ndim
        opened = [index.reshape(*[1] * axis, -1, *[1] * (n - axis - 1)) for axis, index in enumerate(mesh)]
        if isinstance(self.positions, Tensor) and self.positions.ndim == 2:
            opened[1] = self.positions.reshape(*self.positions.shape, *[1] * (n - 2))
        if isinstance(self.features, Tensor) and self.features.ndim == 2:
            opened[-1] = self.features.reshape(len(self.features), *[1] * (n - 2), -1)
        return tuple(opened)
