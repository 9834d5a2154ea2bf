"""The cells of a sweep: grids by name, or a list of interventions.

A grid patches one kind of activation from the clean run into the corrupted one, cell by cell. Key/value grids of a
grouped-query model have one cell a key/value head; grids of features one a block that a dictionary is spliced into.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import pandas as pd

from reflowlens.dictionaries.splice import spliced_layers
from reflowlens.errors import ReflowlensError, nearest
from reflowlens.interventions.values import Intervention, Patch
from reflowlens.models.base import HookedModel
from reflowlens.sweeps.alignment import PositionAxis

Cell: TypeAlias = "tuple[Intervention, ...]"
CellSpec: TypeAlias = "str | Intervention | Sequence[str] | Sequence[Intervention | Sequence[Intervention]]"

_POINTS = {
    "resid_pre": ("hook_resid_pre", ("layer", "pos")),
    "resid_mid": ("hook_resid_mid", ("layer", "pos")),
    "resid_post": ("hook_resid_post", ("layer", "pos")),
    "attn_out": ("hook_attn_out", ("layer", "pos")),
    "mlp_out": ("hook_mlp_out", ("layer", "pos")),
    "attn_head_out": ("attn.hook_z", ("layer", "head")),
    "attn_head_out_by_pos": ("attn.hook_z", ("layer", "pos", "head")),
    "attn_head_q": ("attn.hook_q", ("layer", "head")),
    "attn_head_q_by_pos": ("attn.hook_q", ("layer", "pos", "head")),
    "attn_head_k": ("attn.hook_k", ("layer", "head")),
    "attn_head_k_by_pos": ("attn.hook_k", ("layer", "pos", "head")),
    "attn_head_v": ("attn.hook_v", ("layer", "head")),
    "attn_head_v_by_pos": ("attn.hook_v", ("layer", "pos", "head")),
    "attn_head_pattern": ("attn.hook_pattern", ("layer", "head")),
    "attn_head_pattern_by_pos": ("attn.hook_pattern", ("layer", "head", "dest_pos")),
    "attn_head_pattern_dest_src_pos": ("attn.hook_pattern", ("layer", "head", "dest_pos", "src_pos")),
    "mlp_neurons": ("mlp.hook_post", ("layer", "neuron")),
    "recipe": ("hook_recipe", ("pos", "signal")),
    "signal": ("unembed.hook_signal", ("signal",)),
    "tokens": ("hook_embed", ("pos",)),
    "features": ("hook_features", ("layer", "feature")),
    "features_by_pos": ("hook_features", ("layer", "pos", "feature")),
}
GRIDS = tuple(_POINTS)
_SELECTORS = {
    "layer": "layer",
    "dest_pos": "position",
    "head": "head",
    "neuron": "index",
    "signal": "index",
    "feature": "index",
    "src_pos": "index",
}


@dataclass(frozen=True)
class Cells:
    """What a sweep runs, in order.

    Args:
        cells: interventions of each cell; ``Patch`` without a prompt takes the clean run.
        index: one row a cell.
        axis_names, shape: of the result; a flat list has one axis ``cell`` that TransformerLens leaves unnamed.
        grids: names of the grids where several of one shape are stacked (axis ``patch_type``).
    """

    cells: list[Cell]
    index: pd.DataFrame
    axis_names: list[str]
    shape: tuple[int, ...]
    grids: list[str] | None = None


def make_cells(model: HookedModel, spec: CellSpec, axis: PositionAxis) -> Cells:
    """The cells that a user asks for: a grid's name, several names, or interventions (a list is one cell).

    Args:
        axis: the positions of a grid that has such an axis.

    Raises:
        ReflowlensError: a grid does not exist, this model has no such point, or there are no cells.
    """
    if isinstance(spec, str):
        return _grid(model, spec, axis)
    items: list[Any] = list(spec) if isinstance(spec, Iterable) else [spec]
    if not items:
        raise ReflowlensError("a sweep needs at least one cell")
    if all(isinstance(item, str) for item in items):
        return _several([_grid(model, str(name), axis) for name in items], [str(name) for name in items])
    cells: list[Cell] = []
    for item in items:
        cell = tuple(item) if isinstance(item, Sequence) and not isinstance(item, str) else (item,)
        if not cell or not all(isinstance(part, Intervention) for part in cell):
            raise ReflowlensError("cells must be a grid's name, several names, or a list of interventions")
        cells.append(cell)
    index = pd.DataFrame({"cell": range(len(cells)), "interventions": [_describe(cell) for cell in cells]})
    return Cells(cells, index, [], (len(cells),))


def _grid(model: HookedModel, name: str, positions: PositionAxis) -> Cells:
    if name not in _POINTS:
        raise ReflowlensError(f"no grid {name!r}{nearest(name, list(GRIDS))}; grids: {', '.join(GRIDS)}")
    point, axes = _POINTS[name]
    blocks, n_features = _features(model) if "feature" in axes else (list(range(model.cfg.n_layers)), 0)
    model.check_hook_name(f"blocks.{blocks[0]}.{point}" if "layer" in axes else point)
    if not positions.from_left and "pos" not in axes:
        by_position = [grid for grid, (_, its) in _POINTS.items() if "pos" in its]
        raise ReflowlensError(
            f"the grid {name!r} has no axis of positions to align; these have: {', '.join(by_position)}"
        )
    cfg, n_positions = model.cfg, len(positions.labels)
    shared = point in ("attn.hook_k", "attn.hook_v")
    sizes = {
        "dest_pos": n_positions,
        "src_pos": n_positions,
        "head": cfg.kv_heads if shared else cfg.n_heads,
        "neuron": cfg.d_mlp,
        "signal": cfg.n_signals or 0,
        "feature": n_features,
    }
    ranges = [blocks if axis == "layer" else range(n_positions if axis == "pos" else sizes[axis]) for axis in axes]
    shape = tuple(map(len, ranges))
    cells: list[Cell] = []
    rows = []
    for place in itertools.product(*ranges):
        of = dict(zip(axes, place, strict=True))
        chosen: dict[str, Any] = {_SELECTORS[axis]: where for axis, where in of.items() if axis != "pos"}
        cells.append((Patch(point, **chosen, **(positions.selectors[of["pos"]] if "pos" in of else {})),))
        rows.append([positions.labels[where] if axis == "pos" else where for axis, where in of.items()])
    names = [positions.name if axis == "pos" else axis for axis in axes]
    return Cells(cells, pd.DataFrame(rows, columns=names), names, shape)


def _features(model: HookedModel) -> tuple[list[int], int]:
    """The blocks that dictionaries have features in, and how many."""
    layers = spliced_layers(model)
    if not layers:
        raise ReflowlensError("this model has no features: splice a dictionary first, with dictionary.spliced(model)")
    counts = {layer.n_features for layer in layers}
    if len(counts) > 1:
        several = " and ".join(map(str, sorted(counts)))
        raise ReflowlensError(f"dictionaries of {several} features a layer make no grid: give their cells as a list")
    return [layer.block for layer in layers], counts.pop()


def _several(grids: list[Cells], names: list[str]) -> Cells:
    cells = [cell for grid in grids for cell in grid.cells]
    frames = [grid.index.assign(patch_type=i) for i, grid in enumerate(grids)]
    index = pd.concat(frames, ignore_index=True)
    index = index[["patch_type", *(column for column in index.columns if column != "patch_type")]]
    if len({(grid.shape, tuple(grid.axis_names)) for grid in grids}) > 1:
        return Cells(cells, index, [], (len(cells),), names)
    return Cells(cells, index, ["patch_type", *grids[0].axis_names], (len(grids), *grids[0].shape), names)


def _describe(cell: Cell) -> str:
    parts = []
    for intervention in cell:
        where = {name: getattr(intervention, name) for name in ("layer", "position", "head", "index")}
        chosen = ", ".join(f"{name}={value!r}" for name, value in where.items() if value is not None)
        parts.append(f"{intervention.kind} {intervention.hook}" + (f" ({chosen})" if chosen else ""))
    return " + ".join(parts)
