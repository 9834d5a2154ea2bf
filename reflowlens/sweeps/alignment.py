"""Which positions of several prompts make one cell: counted from the left, from the right, or by role.

Prompts of several lengths share a word's role and not its index. An axis of positions is a list of labels, each with a
position in every corrupted prompt, which is changed, and in every clean one, which is read; a prompt may lack it.

Where all positions of a run are replaced at once (edges, paths, circuits, the way of integrated gradients) the same
labels say which position of one run each position of the other stands for; one that stands for none keeps what it has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reflowlens.arguments import integer
from reflowlens.errors import ReflowlensError
from reflowlens.interventions.apply import at_role
from reflowlens.interventions.values import Intervention, Patch
from reflowlens.models.base import HookedModel
from reflowlens.prompts import Text
from reflowlens.sweeps.run_prompts import RunPrompts, of_one_length

Positions: TypeAlias = "Literal['left', 'right'] | Sequence[str | int] | None"
Places: TypeAlias = "tuple[Sequence[int | None], Sequence[int | None]]"  # of a label in corrupted and in clean prompts
SAY_WHICH = "positions='right', or roles, positions=['subject', 'last'], say which correspond"


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
    if is_left(positions):
        return from_left(prompts.tokens.shape[1])
    both = max(map(min, prompts.lengths, prompts.clean_lengths or prompts.lengths))  # what some pair has
    labels, places = _labelled(model, prompts, positions, both)
    name = "pos" if isinstance(positions, str) else "role"
    return PositionAxis(name, labels, [_selectors(prompts, *place) for place in places])


def partners(
    model: HookedModel, prompts: RunPrompts, positions: Positions, of: Text = "corrupted"
) -> Int[Tensor, "prompt pos"] | None:
    """The position of the other prompt of a pair that each position of a run stands for, -1 where there is none.

    Args:
        positions: as of :func:`position_axis`; None and ``"left"`` are for pairs of equal length.
        of: the run whose positions these are.

    Returns:
        None where every token stands for the token of the same number.

    Raises:
        ReflowlensError: a pair differs in length and nothing aligns it, or a position stands for two.
    """
    if is_left(positions):
        if not prompts.is_even:
            raise of_one_length(prompts.clean_lengths, prompts.lengths, SAY_WHICH)
        return None
    labels, places = _labelled(model, prompts, positions, max(map(min, prompts.lengths, prompts.clean_lengths)))
    if of == "clean":
        places = [(clean, corrupted) for corrupted, clean in places]
    run = prompts.tokens if of == "corrupted" else prompts.clean
    assert run is not None
    return _table(labels, places, run)


def places_of_means(
    model: HookedModel, prompts: RunPrompts, positions: Positions
) -> tuple[Int[Tensor, "label corrupted"], Int[Tensor, "clean pos"] | None]:
    """Where each label stands in corrupted prompts, of which there may be any number, -1 where it does not.

    Returns:
        also the number of the label that each clean position has, -1 for none; None where it is the position's own.

    Raises:
        ReflowlensError: prompts differ in length and nothing aligns them, or a position has two labels.
    """
    assert prompts.clean is not None
    if positions is None and len({*prompts.lengths, *prompts.clean_lengths}) > 1:
        raise of_one_length(prompts.clean_lengths, prompts.lengths, SAY_WHICH)
    labels, places = _labelled(model, prompts, positions, min(max(prompts.lengths), max(prompts.clean_lengths)))
    where = torch.tensor([[-1 if p is None else p for p in corrupted] for corrupted, _ in places])
    where = where.to(prompts.tokens.device)
    if positions is None:
        return where, None
    numbered = [(clean, [number] * len(clean)) for number, (_, clean) in enumerate(places)]
    return where, _table(labels, numbered, prompts.clean)


def mean_at(
    activation: Float[Tensor, "prompt pos *rest"], where: Int[Tensor, "label prompt"]
) -> Float[Tensor, "1 label *rest"]:
    """The mean at each label over the prompts that have it."""
    rows = torch.arange(len(activation), device=activation.device)
    has = (where >= 0).reshape(*where.shape, *[1] * (activation.ndim - 2))
    taken = activation[rows, where.clamp(min=0)].masked_fill(~has, 0.0)  # [label, prompt, *rest]
    return (taken.sum(dim=1) / has.sum(dim=1))[None]


def at_partners(
    own: Float[Tensor, "prompt pos *rest"],
    other: Float[Tensor, "#prompt other *rest"],
    partner: Int[Tensor, "prompt pos"] | None,
) -> Float[Tensor, "prompt pos *rest"]:
    """An activation of another run at the positions that a run's stand for; its own where there is none."""
    if partner is None:
        return other
    rows = torch.arange(len(own), device=own.device)[:, None]
    taken = other.expand(len(own), *other.shape[1:])[rows, partner.clamp(min=0)]
    return torch.where((partner >= 0).reshape(*partner.shape, *[1] * (own.ndim - 2)), taken, own)


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
        return dataclasses.replace(part, **_selectors(prompts, *_place(model, prompts, part.position)))
    return moved


def is_left(positions: Positions) -> bool:
    """Whether positions are counted from the left, asked for or not."""
    return positions is None or (isinstance(positions, str) and positions == "left")


def _labelled(
    model: HookedModel, prompts: RunPrompts, positions: Positions, n: int
) -> tuple[Sequence[int | str], list[Places]]:
    """Labels, and where each stands; of positions counted from an end, ``n``."""
    if is_left(positions):
        return range(n), [_counted(prompts, p) for p in range(n)]
    if isinstance(positions, str) and positions == "right":
        return range(-n, 0), [_counted(prompts, p) for p in range(-n, 0)]
    roles = list(positions) if isinstance(positions, Iterable) and not isinstance(positions, str) else []
    if not roles or not all(isinstance(role, str) or integer(role) is not None for role in roles):
        raise ReflowlensError(
            "positions are 'left', 'right', or a list of roles (columns of rl.Prompts, 'last', indices), "
            f"got {positions!r}"
        )
    if twice := [role for role in roles if roles.count(role) > 1]:
        raise ReflowlensError(f"positions name {twice[0]!r} twice")
    return roles, [_place(model, prompts, role) for role in roles]


def _place(model: HookedModel, prompts: RunPrompts, at: Any) -> Places:
    """Where a role, ``"last"`` or an index stands."""
    index = -1 if at == "last" else integer(at)
    if index is not None:
        return _within(prompts.lengths, index), _within(prompts.clean_lengths, index)
    if prompts.table is None:
        raise ReflowlensError(f"the role {at!r} is a column of rl.Prompts: give these as the prompts")
    if prompts.clean is None:
        return prompts.table.positions(model, at), ()
    return prompts.table.positions(model, at, "corrupted"), prompts.table.positions(model, at)


def _within(lengths: Sequence[int], index: int) -> list[int]:
    for row, length in enumerate(lengths):
        if not -length <= index < length:
            raise ReflowlensError(f"row {row}: there is no position {index}, the prompt has {length} tokens")
    return [index % length for length in lengths]


def _counted(prompts: RunPrompts, position: int) -> Places:
    """A position counted from an end of each prompt, which may lack it."""
    corrupted, clean = (
        [position % n if -n <= position < n else None for n in lengths]
        for lengths in (prompts.lengths, prompts.clean_lengths)
    )
    return corrupted, clean


def _selectors(prompts: RunPrompts, corrupted: Sequence[int | None], clean: Sequence[int | None]) -> dict[str, Any]:
    """Selectors of a patch from a position of each clean prompt to one of each corrupted; None: there is none."""
    if prompts.clean is None or (prompts.is_even and list(clean) == list(corrupted)):
        return {"position": [[] if p is None else [p] for p in corrupted]}
    pairs = list(zip(corrupted, clean, strict=True))
    return {
        "position": [[] if p is None or q is None else [p] for p, q in pairs],
        "from_position": [0 if p is None or q is None else q for p, q in pairs],
    }


def _table(
    labels: Sequence[int | str], places: Sequence[Places], run: Int[Tensor, "prompt pos"]
) -> Int[Tensor, "prompt pos"]:
    """What each position of a run stands for; of every label its places in this run and in the other."""
    table = [[-1] * run.shape[1] for _ in run]
    for label, (here, there) in zip(labels, places, strict=True):
        for row, (p, q) in enumerate(zip(here, there, strict=True)):
            if p is None or q is None:
                continue
            if table[row][p] not in (-1, q):
                raise ReflowlensError(
                    f"row {row}: position {p} is {label!r} and another of positions={list(labels)}, which stand for "
                    "different tokens of the other run: leave one out, or the row"
                )
            table[row][p] = q
    return torch.tensor(table, device=run.device)
