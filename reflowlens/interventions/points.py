"""Where in a decoder's pass a hook point lies, and what follows from its activation without running a block.

A pass of L blocks has 2 L half-blocks. Stage 2 l is the attention half of block l, which starts from its resid_pre;
stage 2 l + 1 is its MLP half, which starts from its resid_mid; stage 2 L is the readout, which starts from the last
resid_post.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

# Points of a block that reach the rest of the pass only through the residual stream, and the stage, counted from the
# block's first, whose start they determine.
_AT_STAGE = {
    "hook_resid_pre": 0,
    "attn.hook_z": 1,
    "attn.hook_result": 1,
    "hook_attn_out": 1,
    "hook_resid_mid": 1,
    "mlp.hook_post": 2,
    "hook_mlp_out": 2,
    "hook_resid_post": 2,
}
_NEEDED = {
    "attn.hook_z": ("hook_resid_pre",),
    "attn.hook_result": ("hook_resid_pre", "hook_attn_out"),
    "hook_attn_out": ("hook_resid_pre",),
    "mlp.hook_post": ("hook_resid_mid", "hook_mlp_out"),
    "hook_mlp_out": ("hook_resid_mid",),
}
_FIRES_IN_MLP_HALF = ("ln2.", "mlp.", "hook_mlp_in", "hook_mlp_out", "hook_resid_post")
EMBEDDINGS = ("hook_embed", "hook_pos_embed", "hook_recipe")
READOUT_SIGNAL = "unembed.hook_signal"


def stage(name: str, n_layers: int) -> int | None:
    """The half-block that a point fires in; embeddings count as stage 0, the readout as 2 L.

    None for points that belong to no row alone (``hook_basis``), or that no half-block owns.

    >>> stage("blocks.3.attn.hook_q", 6), stage("blocks.3.mlp.hook_post", 6), stage("hook_basis", 6)
    (6, 7, None)
    """
    if name in EMBEDDINGS:
        return 0
    if name == READOUT_SIGNAL:
        return 2 * n_layers
    if not name.startswith("blocks."):
        return None
    _, layer, point = name.split(".", 2)
    return 2 * int(layer) + point.startswith(_FIRES_IN_MLP_HALF)


def needed_for_entry(name: str) -> list[str]:
    """Points of the unpatched run that :func:`entry` reads beside the point itself."""
    if name in EMBEDDINGS:
        return ["blocks.0.hook_resid_pre"]
    if not name.startswith("blocks."):
        return []
    prefix, point = _split(name)
    return [f"{prefix}.{needed}" for needed in _NEEDED.get(point, ())]


def entry_stage(name: str, n_layers: int) -> int | None:
    """The stage whose start a point's activation determines; None if a half-block has to run from it.

    >>> entry_stage("blocks.3.mlp.hook_post", 6), entry_stage("blocks.3.mlp.hook_pre", 6)
    (8, None)
    """
    if name in EMBEDDINGS:
        return 0
    if name == READOUT_SIGNAL:
        return 2 * n_layers
    prefix, point = _split(name)
    return None if point not in _AT_STAGE else 2 * int(prefix.removeprefix("blocks.")) + _AT_STAGE[point]


def entry(
    model: Any, name: str, patched: Float[Tensor, "cell prompt pos *rest"], cache: Mapping[str, Tensor]
) -> Float[Tensor, "cell prompt pos d_model"]:
    """The residual stream at a point's :func:`entry_stage`.

    Args:
        patched: the point's activation after each cell's intervention.
        cache: the unpatched run's activations [prompt, ...] of the point and of :func:`needed_for_entry`.
    """
    if name in EMBEDDINGS:
        change = patched - cache[name]
        return cache["blocks.0.hook_resid_pre"] + (change @ model.W_E.B if name == "hook_recipe" else change)
    prefix, point = _split(name)
    if point.startswith("hook_resid"):
        return patched
    block = model.get_submodule(prefix)
    stream = cache[f"{prefix}.{_NEEDED[point][0]}"]
    if point == "attn.hook_z":
        return stream + block.attn.output(patched.flatten(0, 1)).unflatten(0, patched.shape[:2])
    if point == "attn.hook_result":
        return stream + (cache[f"{prefix}.hook_attn_out"] + (patched - cache[name]).sum(dim=-2))
    if point == "mlp.hook_post":
        return stream + (cache[f"{prefix}.hook_mlp_out"] + (patched - cache[name]) @ block.mlp.W_out)
    return stream + patched


def _split(name: str) -> tuple[str, str]:
    _, layer, point = name.split(".", 2)
    return f"blocks.{layer}", point
