"""Which positions of several prompts make one cell: counted from the left, from the right, or by role.

Prompts of several lengths share a word's role and not its index. An axis of positions is a list of labels, each with a
position in every corrupted prompt, which is changed, and in every clean one, which is read; a prompt may lack it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from reflowlens.arguments import integer
from reflowlens.errors import ReflowlensError
from reflowlens.interventions.apply import at_role
from reflowlens.interventions.values import Intervention, Patch
from reflowlens.models.base import HookedModel
from reflowlens.sweeps.run_prompts import RunPrompts

Positions: TypeAlias = "Literal['left', 'right'] | Sequence[str | int] | None"


@dataclass(frozen=True)
class PositionAxis:
    """The positions that a grid goes over.

    Args:
        name: of the axis, ``"pos"`` or ``"role"``.
        labels: of its places.
        selectors: of a patch at each place: ``position``, and ``from_position`` where the clean prompt's is another.
        from_left: whether places are indices from the left.
    """

    name: str
    labels: Sequence[int | str]
    selectors: Sequence[dict[str, Any]]
    from_left: bool = False


def position_axis(model: HookedModel, prompts: RunPrompts, positions: Positions) -> PositionAxis:
    """The axis that is asked for.

    Args:
        positions: ``"left"`` (or None), 0, 1, ... of each prompt; ``"right"``, ..., -2, -1, counted from each prompt's
            own end; or roles: columns of the prompts, ``"last"``, and indices.

    Raises:
        ReflowlensError: it is none of these, one is named twice, or a prompt has no such position.
    """
    if positions is None or (isinstance(positions, str) and positions == "left"):
        return from_left(prompts.tokens.shape[1])
    if isinstance(positions, str) and positions == "right":
        both = max(map(min, prompts.lengths, prompts.clean_lengths or prompts.lengths))  # what some pair has
        ends = range(-both, 0)
        return PositionAxis("pos", ends, [_from_end(prompts, p) for p in ends])
    roles = list(positions) if isinstance(positions, Iterable) and not isinstance(positions, str) else []
    if not roles or not all(isinstance(role, str) or integer(role) is not None for role in roles):
        raise ReflowlensError(
            "positions are 'left', 'right', or a list of roles (columns of rl.Prompts, 'last', indices), "
            f"got {positions!r}"
        )
    if twice := [role for role in roles if roles.count(role) > 1]:
        raise ReflowlensError(f"positions name {twice[0]!r} twice")
    return PositionAxis("role", roles, [_at(model, prompts, role) for role in roles])


def from_left(n_positions: int) -> PositionAxis:
    """Positions 0, 1, ... of every prompt."""
    labels = range(n_positions)
    return PositionAxis("pos", labels, [{"position": p} for p in labels], from_left=True)


def with_roles(model: HookedModel, prompts: RunPrompts, part: Intervention) -> Intervention:
    """An intervention whose position is a role, with each prompt's own position instead."""
    table = prompts.table
    moved = part if table is None else at_role(model, table, part, "clean" if prompts.clean is None else "corrupted")
    if moved is part or prompts.clean is None:
        return moved
    if isinstance(part, Patch) and part.prompt is None and part.from_position is None:
        return dataclasses.replace(part, **_at(model, prompts, part.position))
    return moved


def _at(model: HookedModel, prompts: RunPrompts, at: Any) -> dict[str, Any]:
    """Selectors of a role, of ``"last"`` or of an index."""
    index = -1 if at == "last" else integer(at)
    if index is not None:
        sides = [_within(lengths, index) for lengths in (prompts.lengths, prompts.clean_lengths)]
        return _selectors(prompts, *sides)
    if prompts.table is None:
        raise ReflowlensError(f"the role {at!r} is a column of rl.Prompts: give these as the prompts")
    if prompts.clean is None:
        return _selectors(prompts, prompts.table.positions(model, at), ())
    return _selectors(prompts, prompts.table.positions(model, at, "corrupted"), prompts.table.positions(model, at))


def _within(lengths: Sequence[int], index: int) -> list[int]:
    for row, length in enumerate(lengths):
        if not -length <= index < length:
            raise ReflowlensError(f"row {row}: there is no position {index}, the prompt has {length} tokens")
    return [index % length for length in lengths]


def _from_end(prompts: RunPrompts, position: int) -> dict[str, Any]:
    both = (prompts.lengths, prompts.clean_lengths)
    corrupted, clean = ([n + position if n + position >= 0 else None for n in lengths] for lengths in both)
    return _selectors(prompts, corrupted, clean)


def _selectors(prompts: RunPrompts, corrupted: Sequence[int | None], clean: Sequence[int | None]) -> dict[str, Any]:
    """Selectors of a patch from a position of each clean prompt to one of each corrupted; None: there is none."""
    if prompts.clean is None or (prompts.is_even and list(clean) == list(corrupted)):
        return {"position": [[] if p is None else [p] for p in corrupted]}
    pairs = list(zip(corrupted, clean, strict=True))
    return {
        "position": [[] if p is None or q is None else [p] for p, q in pairs],
        "from_position": [0 if p is None or q is None else q for p, q in pairs],
    }
