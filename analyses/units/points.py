"""The hook points that hold units, and the kind of units of a point."""

from __future__ import annotations

import re
from collections.abc import Sequence

from reflowlens.errors import ReflowlensError, nearest
from reflowlens.models.base import HookedModel


def default_points(model: HookedModel) -> list[str]:
    """The units that an architecture is made of."""
    if not model.units:
        raise ReflowlensError(f"{model.cfg.architecture!r} has no usual units: give points, see model.hook_dict")
    points = [f"blocks.{layer}.{kind}" for kind in model.units for layer in range(model.cfg.n_layers)]
    return points + [name for name in ("unembed.hook_signal",) if name in model.hook_dict]


def written_by(model: HookedModel, point: str) -> str | None:
    """The parameter whose rows are what a point's units write into the residual stream; None if they write nothing.

    >>> from reflowlens.models import build_model
    >>> written_by(build_model("reflow_1_small", device="meta"), "blocks.2.mlp.hook_post")
    'blocks.2.mlp.W_out'
    """
    layer, _, kind = point.removeprefix("blocks.").partition(".")
    weight = model.units.get(kind) if point.startswith("blocks.") else None
    return None if weight is None else weight.format(layer=layer)


def points_named(model: HookedModel, names: str | Sequence[str]) -> list[str]:
    """The hook points of some names.

    Args:
        names: one or several, each a hook point, or a kind of units (`kind_of`), which stands for the points of that
            kind at every level.

    Returns:
        Hook points, each once, in the order of the names.

    Raises:
        ReflowlensError: the model has no such point or kind, or the point has no positions.

    Example: ``points_named(model, "xy_sparse")`` is ``["blocks.0.hook_xy_sparse", ...]``.
    """
    kinds: dict[str, list[str]] = {}
    for point in model.hook_dict:
        if model.hook_axes(point)[:2] == ("batch", "pos"):
            kinds.setdefault(kind_of(point), []).append(point)
    found = []
    for name in [names] if isinstance(names, str) else names:
        if name in kinds:
            found += kinds[name]
            continue
        if "hook" not in name:
            hint = nearest(name, list(kinds))
            raise ReflowlensError(
                f"no kind of units {name!r}{hint}{' There' if hint else '; there'} are {', '.join(kinds)}"
            )
        if model.hook_axes(name)[:2] != ("batch", "pos"):
            raise ReflowlensError(f"{name!r} has axes {model.hook_axes(name)}: units are of [batch, pos, ...]")
        found.append(name)
    return list(dict.fromkeys(found))


def kind_of(point: str) -> str:
    """The kind of units of a point: its name without block number and "hook".

    >>> kind_of("blocks.3.hook_xy_sparse"), kind_of("blocks.0.mlp.hook_post"), kind_of("unembed.hook_signal")
    ('xy_sparse', 'mlp_post', 'unembed_signal')
    """
    return re.sub(r"^blocks\.\d+\.", "", point).replace("hook_", "").replace(".", "_")


def level_of(point: str) -> int:
    """The index of the block that a point is in; -1 outside the blocks."""
    return int(point.split(".")[1]) if point.startswith("blocks.") else -1
