"""Which part of an activation an intervention acts on: its selectors resolved against one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard, cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformer_lens.utilities.components_utils import get_act_name

from reflowlens.errors import ReflowlensError
from reflowlens.interventions.selection import Selection, Where
from reflowlens.interventions.values import Intervention, Position, Selector
from reflowlens.models.hook_names import point_name

if TYPE_CHECKING:
    from reflowlens.models.base import HookedModel


def hook_names(model: HookedModel, intervention: Intervention) -> list[str]:
    """Full names of the points that an intervention acts on.

    Raises:
        ReflowlensError: a point or a layer does not exist, or a short name comes without its layer.
    """
    hook, layer, n_layers = intervention.hook, intervention.layer, model.cfg.n_layers
    if layer is None:
        name = hook if hook in model.hook_dict else point_name(get_act_name(hook))
        in_blocks = (_in_block(hook, i) in model.hook_dict for i in range(n_layers))
        if name not in model.hook_dict and any(in_blocks):
            raise ReflowlensError(f"{hook!r} is in every block: say which with layer= (0 to {n_layers - 1}, or 'all')")
        model.check_hook_name(name if name in model.hook_dict else hook)
        return [name]
    layers = range(n_layers) if isinstance(layer, str) else [layer] if isinstance(layer, int) else layer
    for index in layers:
        if not -n_layers <= index < n_layers:
            raise ReflowlensError(f"layer={index!r} is out of range: this model has blocks 0 to {n_layers - 1}")
    if hook in model.hook_dict:
        raise ReflowlensError(f"{hook!r} is a point's full name: give it without layer=, or its short name")
    names = [_in_block(hook, index % n_layers) for index in layers]
    if len(set(names)) < len(names):
        raise ReflowlensError(f"layer={layer!r} names a block twice: this model has blocks 0 to {n_layers - 1}")
    for name in names:
        model.check_hook_name(name)
    return names


def _in_block(hook: str, layer: int) -> str:
    """A point's full name: ``blocks.3.hook_resid_pre`` of ``resid_pre``, ``blocks.3.attn.hook_z`` of ``z``."""
    return point_name(f"blocks.{layer}.{hook}" if "hook_" in hook else get_act_name(hook, layer))


@dataclass(frozen=True)
class Prompt:
    """What a forward pass reads, as far as selectors ask: its tokens, if it starts from tokens, and where it is.

    Args:
        lengths: of each row, how many tokens are its own; empty for all.
    """

    n_positions: int
    tokens: Int[Tensor, "batch pos"] | None = None
    lengths: Sequence[int] = ()
    offset: int = 0
    cached: bool = False  # earlier positions, and perhaps later ones, belong to other passes
    ready: Bool[Tensor, " batch"] | None = None  # rows whose newest token is their last so far; None for all

    @property
    def padded(self) -> bool:
        """Whether some rows end in padding."""
        return not self.cached and any(length < self.n_positions for length in self.lengths)


def select(
    model: HookedModel, intervention: Intervention, name: str, shape: torch.Size, prompt: Prompt
) -> Selection | None:
    """Resolve an intervention's selectors at one point.

    Returns:
        The selection, or None when generation has a position in another pass than this one.

    Raises:
        ReflowlensError: a selector is out of range, or selects along an axis that the activation does not have.
    """
    axes = model.hook_axes(name)
    uneven: list[str] = []
    positions, counted = _at(model, intervention.position, name, prompt)
    if positions is None:
        return None
    if counted is not None and not prompt.cached:
        uneven += ["pos"] * (not bool(counted.all()))
    if intervention.head is not None and "head" not in axes:
        raise ReflowlensError(f"{name!r} has no heads, but head={intervention.head!r} was given")
    heads = _indices("head", intervention.head, shape[axes.index("head")], name) if "head" in axes else slice(None)
    size = shape[len(axes) - 1 if "batch" in axes else 0]
    reached = intervention.index
    if axes[-1] == "key_pos" and prompt.cached and reached is not None and not _counts_from_end(reached):
        reached = _reached(reached, range(size), model.cfg.n_ctx)
        if not reached:
            return None
    features, counted_keys = _keys_or_features(reached, size, axes, name, prompt)
    if counted_keys is not None and _counts_from_end(intervention.index):
        uneven += ["key_pos"] * (not bool(counted_keys.all()))
    return Selection(axes, positions, heads, features, counted, counted_keys, tuple(uneven))


def _at(
    model: HookedModel, position: Position, name: str, prompt: Prompt
) -> tuple[Where | None, Bool[Tensor, "batch n"] | None]:
    """The positions that a selector chooses, and which of them count in each row; None of them all do."""
    if position is None:
        return slice(None), None
    if "pos" not in model.hook_axes(name):
        raise ReflowlensError(f"{name!r} has no positions, but position={position!r} was given")
    if is_each(position):
        return _of_each(position, prompt, model.cfg.n_ctx)
    position = cast("int | slice | Sequence[int] | str", position)
    if prompt.cached and isinstance(position, str):
        here = _in_this_pass(model, position, prompt)
        columns = here.any(dim=0).nonzero()[:, 0]
        return columns if len(columns) else None, here[:, columns]
    if prompt.padded and _counts_from_end(position):
        return _from_own_end("position", position, prompt)
    return _positions(model, position, prompt), None


def _keys_or_features(
    index: Selector, size: int, axes: Sequence[str], name: str, prompt: Prompt
) -> tuple[Where, Bool[Tensor, "batch n_features"] | None]:
    """Entries of the last axis, and which of them count in each row: of keys those that are no padding."""
    if axes[-1] != "key_pos" or not prompt.padded:
        return _indices("index", index, size, name), None
    if _counts_from_end(index):
        return _from_own_end("index", index, prompt)
    features = _indices("index", index, size, name)
    return features, torch.arange(size)[features] < torch.tensor(prompt.lengths)[:, None]


def rows_reached(model: HookedModel, intervention: Intervention, name: str, prompt: Prompt) -> Bool[Tensor, " batch"]:
    """Which rows of a whole pass have a place that an intervention acts on: of padded prompts a shorter one may not.

    Args:
        name: a point of the intervention's.
        prompt: with the length of every row.
    """
    axes, lengths = model.hook_axes(name), torch.tensor(prompt.lengths)[:, None]
    positions, counted = _at(model, intervention.position, name, prompt)
    assert positions is not None  # None is for generation
    reached = torch.arange(prompt.n_positions)[positions] < lengths
    if counted is not None:
        reached &= counted
    found = reached.any(dim=1)
    if axes[-1] == "key_pos":
        _, counted_keys = _keys_or_features(intervention.index, prompt.n_positions, axes, name, prompt)
        found &= True if counted_keys is None else counted_keys.any(dim=1)
    return found


def _indices(what: str, selector: int | slice | Sequence[int] | None, size: int, name: str) -> Where:
    if selector is None or isinstance(selector, slice):
        chosen = slice(None) if selector is None else selector
        if not range(size)[chosen]:
            raise ReflowlensError(f"{what}={selector} selects nothing: {name!r} has {size}")
        return chosen if (chosen.step or 1) > 0 else torch.tensor(list(range(size)[chosen]))
    items = [selector] if isinstance(selector, int) else selector
    for item in items:
        if not -size <= item < size:
            raise ReflowlensError(f"{what}={item} is out of range at {name!r}: 0 to {size - 1}")
    items = [item % size for item in items]
    if len(items) == 1:
        return slice(items[0], items[0] + 1)
    return torch.tensor(items)


def _positions(model: HookedModel, position: int | slice | Sequence[int] | str, prompt: Prompt) -> Where | None:
    n, offset = prompt.n_positions, prompt.offset
    if isinstance(position, str):
        return _last(prompt) if position == "last" else _occurrences(model, position, prompt)
    if not prompt.cached:
        return _indices("position", position, n, "the prompt")
    # With a key-value cache positions count from the start of the text, and this pass holds a window of them.
    if _counts_from_end(position):
        raise ReflowlensError("negative positions have no meaning while text is generated; use 'last'")
    here = _reached(position, range(offset, offset + n), model.cfg.n_ctx)
    return torch.tensor(here) - offset if here else None


def _reached(selector: int | slice | Sequence[int], places: range, n_ctx: int) -> list[int]:
    """Those of the places that a pass holds of a text which a selector points at, counting from the text's start."""
    if isinstance(selector, slice):
        wanted: Sequence[int] = range(*selector.indices(n_ctx))
    else:
        wanted = [selector] if isinstance(selector, int) else selector
    return [place for place in wanted if place in places]


def _last(prompt: Prompt) -> Where:
    lengths = prompt.lengths or [prompt.n_positions]
    if len(set(lengths)) == 1:
        return slice(lengths[0] - 1, lengths[0])
    return torch.tensor(lengths)[:, None] - 1


def is_each(position: Position) -> TypeGuard[Sequence[Sequence[int]]]:
    """Whether it is a list of positions for each prompt."""
    return isinstance(position, Sequence) and not isinstance(position, str) and not isinstance(position[0], int)


def _of_each(
    position: Sequence[Sequence[int]], prompt: Prompt, n_ctx: int
) -> tuple[Int[Tensor, "batch n"] | None, Bool[Tensor, "batch n"]]:
    """Each row's own positions."""
    n, offset = prompt.n_positions, prompt.offset
    n_rows = len(position if prompt.tokens is None else prompt.tokens)
    if len(position) != n_rows:
        raise ReflowlensError(f"positions are given for {len(position)} prompts, but this pass has {n_rows}")
    if prompt.cached:
        if any(_counts_from_end(row) for row in position):
            raise ReflowlensError("negative positions have no meaning while text is generated; use 'last'")
        rows = [[p - offset for p in _reached(row, range(offset, offset + n), n_ctx)] for row in position]
        return (None, torch.zeros(n_rows, 0, dtype=torch.bool)) if not any(rows) else _filled(rows, n)
    lengths = prompt.lengths or [n] * n_rows
    for i, (row, length) in enumerate(zip(position, lengths, strict=True)):
        if outside := [p for p in row if not -length <= p < length]:
            raise ReflowlensError(f"position={outside[0]} is out of range: prompt {i} has {length} tokens")
    return _filled([[p % length for p in row] for row, length in zip(position, lengths, strict=True)], n)


def _filled(rows: Sequence[Sequence[int]], n_positions: int) -> tuple[Int[Tensor, "batch n"], Bool[Tensor, "batch n"]]:
    """Places of rows that have different numbers of them, filled up with others, and which are the row's own."""
    n = max(1, *map(len, rows))
    everywhere = frozenset(range(n_positions))
    filled = torch.tensor([[*row, *sorted(everywhere.difference(row))[: n - len(row)]] for row in rows])
    return filled, torch.arange(n) < torch.tensor(list(map(len, rows)))[:, None]


def _counts_from_end(selector: int | slice | Sequence[int] | str | None) -> TypeGuard[int | slice | Sequence[int]]:
    if selector is None or isinstance(selector, str):
        return False
    if isinstance(selector, slice) and selector.start is None and (selector.step or 1) < 0:
        return True
    parts = (selector.start, selector.stop) if isinstance(selector, slice) else selector
    return any(part is not None and part < 0 for part in ([parts] if isinstance(parts, int) else parts))


def _from_own_end(
    what: str, selector: int | slice | Sequence[int], prompt: Prompt
) -> tuple[Int[Tensor, "batch n"], Bool[Tensor, "batch n"]]:
    """Where a selector that counts from the end points in each prompt, as if the prompt were alone.

    A slice may be of fewer places in a shorter prompt: its row is filled up with others, which are not counted.
    """
    rows = []
    for i, length in enumerate(prompt.lengths):
        if isinstance(selector, slice):
            row = list(range(length)[selector])
            if not row:
                raise ReflowlensError(f"{what}={selector} selects nothing: prompt {i} has {length} tokens")
        else:
            wanted = [selector] if isinstance(selector, int) else list(selector)
            if not all(-length <= p < prompt.n_positions for p in wanted):
                raise ReflowlensError(f"{what}={selector} is out of range: a prompt has {length} tokens")
            row = [p if p >= 0 else length + p for p in wanted]
        rows.append(row)
    filled, selected = _filled(rows, prompt.n_positions)
    return filled, selected & (filled < torch.tensor(prompt.lengths)[:, None])  # a list may name padding too


def _in_this_pass(model: HookedModel, text: str, prompt: Prompt) -> Bool[Tensor, "batch pos"]:
    """Where a pass of generation has a token, in which rows may differ, or each row's newest one."""
    assert prompt.tokens is not None  # a cache goes with whole passes
    tokens = prompt.tokens.cpu()
    if text != "last":
        return tokens == model.to_single_token(text)
    newest = torch.zeros(tokens.shape, dtype=torch.bool)
    newest[:, -1] = True if prompt.ready is None else prompt.ready.cpu()
    return newest


def _occurrences(model: HookedModel, text: str, prompt: Prompt) -> Where:
    if prompt.tokens is None:
        raise ReflowlensError(f"position={text!r} needs tokens, but this pass starts from a residual stream")
    token, rows = model.to_single_token(text), prompt.tokens.cpu()
    lengths = prompt.lengths or [rows.shape[1]] * len(rows)
    found = [(row[:n] == token).nonzero()[:, 0].tolist() for row, n in zip(rows, lengths, strict=True)]
    counts = {len(places) for places in found}
    if counts == {0} or 0 in counts:
        raise ReflowlensError(f"position={text!r}: the token does not occur in {_row(found, 0)}")
    if len(counts) > 1:
        raise ReflowlensError(f"position={text!r}: the token occurs a different number of times in each prompt")
    return torch.tensor(found)


def _row(found: list[list[int]], count: int) -> str:
    return "the prompt" if len(found) == 1 else f"prompt {next(i for i, f in enumerate(found) if len(f) == count)}"
