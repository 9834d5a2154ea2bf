"""Directions of the residual stream as targets: a probe's weight, a feature's encoder row, a steering vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reflowlens.errors import ReflowlensError

PLACES = {
    "resid_pre": "hook_resid_pre",
    "ln1.hook_normalized": "ln1.hook_normalized",
    "resid_mid": "hook_resid_mid",
    "ln2.hook_normalized": "ln2.hook_normalized",
    "resid_post": "hook_resid_post",
}
MIDDLE = ("resid_mid", "ln2.hook_normalized")


@dataclass(frozen=True, eq=False)
class DirectionAt:
    """A direction of the stream at a position, as a target: its value is vector · stream there.

    Args:
        vector: [d_model], of any length: a probe's weight, what an encoder reads, a steering vector.
        layer: the block.
        position: of the prompt; negative counts from the end.
        at: what is read: ``"resid_pre"``, ``"resid_mid"`` or ``"resid_post"`` of the block, or what its norms make of
            the stream before their weight, ``"ln1.hook_normalized"`` or ``"ln2.hook_normalized"``; of BDH
            ``"resid_pre"`` or ``"resid_post"``.
        name: of its node, ``direction:{layer}.{name}@{position}``; by default its number among the targets.

    Example: ``rl.attribute(model, "The capital of", targets=rl.DirectionAt(probe.weight, layer=2, name="city"))``
    """

    vector: Any
    layer: int
    position: int = -1
    at: str = "resid_post"
    name: str = ""

    @property
    def point(self) -> str:
        """The hook point that is read."""
        return f"blocks.{self.layer}.{PLACES[self.at]}"

    @property
    def passed(self) -> tuple[int, bool]:
        """How many blocks lie before it, and whether it reads the next one in its middle, behind attention."""
        return self.layer + (self.at == "resid_post"), self.at in MIDDLE

    @property
    def node(self) -> str:
        return f"direction:{self.layer}.{self.name}@{self.position}"


@dataclass(frozen=True)
class Directions:
    """Directions of one place and block, that are targets.

    Args:
        positions: in ascending order.
        value: vector · stream, by the forward pass.
    """

    at: str
    layer: int
    asked: Sequence[DirectionAt]
    rows: Float[Tensor, "target d_model"]
    positions: Int[Tensor, " target"]
    value: Float[Tensor, " target"]


def checked(direction: DirectionAt, places: Sequence[str], like: Float[Tensor, " d_model"]) -> DirectionAt:
    """The same with its vector as a tensor.

    Args:
        places: of the architecture.
        like: of the type and device that it is to have.

    Raises:
        ReflowlensError: there is no such place, or the vector is not d_model finite numbers, or all are zero.
    """
    if direction.at not in places:
        raise ReflowlensError(f"a direction is read at {', '.join(places)}, got at={direction.at!r}")
    try:
        row = torch.as_tensor(direction.vector).detach().to(like)
    except (TypeError, ValueError, RuntimeError):
        row = like.new_zeros(())
    if row.shape != like.shape or not bool(row.isfinite().all()) or not bool(row.any()):
        raise ReflowlensError(
            f"a direction is a vector of d_model={len(like)} finite numbers that are not all zero; that of "
            f"{direction.node!r} is not"
        )
    return replace(direction, vector=row)


def directions_of(asked: Sequence[DirectionAt], cache: Mapping[str, Tensor]) -> list[Directions]:
    """Targets of a prompt, those of one place together, in the order of the pass.

    Args:
        asked: vectors and positions checked.
        cache: the points that they read.
    """
    places = list(PLACES)
    groups: dict[tuple[int, int], list[DirectionAt]] = {}
    for each in sorted(asked, key=lambda direction: direction.position):
        groups.setdefault((each.layer, places.index(each.at)), []).append(each)
    found = []
    for (layer, place), group in sorted(groups.items()):
        rows = torch.stack([each.vector for each in group])
        positions = torch.tensor([each.position for each in group], device=rows.device)
        value = (rows * cache[group[0].point][0, positions]).sum(1)
        found.append(Directions(places[place], layer, group, rows, positions, value))
    return found
