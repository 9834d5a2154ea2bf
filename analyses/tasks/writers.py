"""What heads and MLPs write into the residual stream, read off a pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from analyses.tasks.answered import Answered
from reflowlens.errors import ReflowlensError
from reflowlens.figures.heatmap import heatmap
from reflowlens.models.architecture import HEADS_AND_MLPS
from reflowlens.models.base import HookedModel
from reflowlens.models.components import Block
from reflowlens.models.parts import Norm, plus


def check_heads_and_mlps(model: HookedModel, what: str) -> None:
    """Raise unless every block is heads and an MLP that are added to the stream."""
    if model.sublayers != HEADS_AND_MLPS:
        raise ReflowlensError(
            f"{what} is of heads and MLPs that are added to a residual stream, and a {type(model).__name__} is not "
            "made of these"
        )


def component_names(model: HookedModel, ends: bool = False) -> pd.DataFrame:
    """A row a head and MLP, layer by layer: ``component``, ``kind``, ``layer`` and ``head``, -1 for none.

    Args:
        ends: with ``embedding`` in front and ``biases`` behind, in the order of `Writers.parts`.
    """
    rows = [("embedding", "embedding", -1, -1)] * ends
    for layer in range(model.cfg.n_layers):
        rows += [(f"L{layer}H{head}", "head", layer, head) for head in range(model.cfg.n_heads)]
        rows.append((f"MLP {layer}", "mlp", layer, -1))
    return pd.DataFrame([*rows, *[("biases", "bias", -1, -1)] * ends], columns=["component", "kind", "layer", "head"])


def layers_by_writers(frame: pd.DataFrame, z: str, hover: Sequence[str], title: str, z_title: str) -> go.Figure:
    """A heatmap of heads and MLPs, a line a layer, from a frame with the columns of `component_names`."""
    cells = frame[frame["layer"] >= 0]
    cells = cells.assign(writer=np.where(cells["kind"] == "mlp", "MLP", "head " + cells["head"].astype(str)))
    return heatmap(cells, "writer", "layer", z, hover=hover, title=title, x_title="writer", z_title=z_title)


def held(
    norm: Norm | None, x: Float[Tensor, "*place d_model"], scale: Tensor | None
) -> Float[Tensor, "*place d_model"]:
    """What a norm makes of a part of its input, its divisor held: a linear map. Where there is no norm, the part."""
    if norm is None or scale is None:
        return x
    return (x - x.mean(dim=-1, keepdim=True) if norm.centered else x) / scale * norm.w


def written_by_heads(
    block: Block, z: Float[Tensor, "*place head d_head"], scale: Float[Tensor, "*place one"] | None
) -> Float[Tensor, "*place head d_model"]:
    """What each head of a block adds to the stream, of the points ``attn.hook_z``.

    Args:
        scale: the divisor of the norm behind attention (``ln1_post.hook_scale``), which is held; None where there is
            none.
    """
    written = torch.einsum("...he,hed->...hd", z, block.attn.W_O)
    return held(block.ln1_post, written, None if scale is None else scale.unsqueeze(-2))


def divisor_behind(block: Block, layer: int) -> list[str]:
    """The point of the divisor of the norm behind attention, where there is one."""
    return [] if block.ln1_post is None else [f"blocks.{layer}.ln1_post.hook_scale"]


@dataclass(frozen=True, eq=False)
class Writers:
    """What is added up to the stream that prompts end in, at their last tokens.

    Args:
        parts: embedding (with learned positions), then each layer's heads and its MLP, then attention's biases.
        final: their sum, [prompt, d_model].
        scale: the final norm's divisor, [prompt, 1].
    """

    model: HookedModel
    parts: list[Float[Tensor, "prompt d_model"]]
    final: Float[Tensor, "prompt d_model"]
    scale: Float[Tensor, "prompt 1"]

    @classmethod
    @torch.no_grad()
    def at_last(cls, answered: Answered) -> Writers:
        """Of one pass over prompts."""
        model, layers = answered.model, range(answered.model.cfg.n_layers)
        points = ("attn.hook_z", "hook_mlp_out")
        first, last, scale = "blocks.0.hook_resid_pre", f"blocks.{layers[-1]}.hook_resid_post", "ln_final.hook_scale"
        blocks = cast("list[Block]", list(model.blocks))
        behind = {layer: name for layer in layers for name in divisor_behind(blocks[layer], layer)}
        names = [first, last, scale, *(f"blocks.{layer}.{point}" for layer in layers for point in points)]
        _, cache = model.run_with_cache(
            answered.tokens, return_type=None, names_filter=[*names, *behind.values()], return_cache_object=False
        )
        at_end = {name: x[answered.each, answered.last].float() for name, x in cache.items()}
        parts, biases = [at_end[first]], torch.zeros_like(at_end[first])
        for layer, block in enumerate(blocks):
            divisor = at_end[behind[layer]] if layer in behind else None
            heads = written_by_heads(block, at_end[f"blocks.{layer}.attn.hook_z"], divisor)
            parts += [*heads.unbind(dim=1), at_end[f"blocks.{layer}.hook_mlp_out"]]
            if block.attn.b_O is not None:
                biases = biases + held(block.ln1_post, block.attn.b_O, divisor)
            if block.ln1_post is not None:
                biases = plus(biases, block.ln1_post.b)
        return cls(model, [*parts, biases], at_end[last], at_end[scale])

    def normalised(self) -> list[Float[Tensor, "prompt d_model"]]:
        """The parts as the final norm passes them on, its divisor held: before its weight and without its bias."""
        norm = self.model.ln_final
        return [(x - x.mean(dim=-1, keepdim=True) if norm.centered else x) / self.scale for x in self.parts]
