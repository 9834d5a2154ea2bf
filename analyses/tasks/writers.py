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


def block_of(model: HookedModel, layer: int) -> Block:
    """A block of a model that is made of heads and MLPs."""
    return cast(Block, model.blocks[layer])


def divisor_behind(block: Block, layer: int) -> list[str]:
    """The point of the divisor of the norm behind attention, where there is one."""
    return [] if block.ln1_post is None else [f"blocks.{layer}.ln1_post.hook_scale"]


def at_last_tokens(answered: Answered, names: Sequence[str]) -> dict[str, Float[Tensor, "prompt *rest"]]:
    """Activations at each prompt's last token, of one pass; with the divisors of norms behind attention."""
    blocks = enumerate(cast("list[Block]", list(answered.model.blocks)))
    wanted = [*names, *(name for layer, block in blocks for name in divisor_behind(block, layer))]
    _, cache = answered.model.run_with_cache(
        answered.tokens, return_type=None, names_filter=wanted, return_cache_object=False
    )
    return {name: x[answered.each, answered.last].float() for name, x in cache.items()}


def heads_of(
    model: HookedModel, layer: int, at_end: dict[str, Tensor]
) -> tuple[Float[Tensor, "prompt head d_model"], Float[Tensor, " d_model"] | Float[Tensor, "prompt d_model"]]:
    """What the heads of a layer add to the stream, and what attention's biases do, of `at_last_tokens`."""
    block = block_of(model, layer)
    divisor = at_end.get(f"blocks.{layer}.ln1_post.hook_scale")
    heads = written_by_heads(block, at_end[f"blocks.{layer}.attn.hook_z"], divisor)
    biases = plus(torch.zeros_like(heads[0, 0]), block.attn.b_O)
    if block.ln1_post is not None:
        biases = plus(held(block.ln1_post, biases, divisor), block.ln1_post.b)
    return heads, biases


@torch.no_grad()
def mean_head_outputs(
    answered: Answered,
) -> tuple[Float[Tensor, "layer head d_head"], Float[Tensor, "layer head d_model"]]:
    """Means over prompts, at their last tokens, of ``attn.hook_z`` and of what heads add to the stream."""
    model, layers = answered.model, range(answered.model.cfg.n_layers)
    points = [f"blocks.{layer}.attn.hook_z" for layer in layers]
    z, written = [], []
    for batch in answered.batches():
        at_end = at_last_tokens(batch, points)
        z.append(torch.stack([at_end[point] for point in points], dim=1))
        written.append(torch.stack([heads_of(model, layer, at_end)[0] for layer in layers], dim=1))
    return torch.cat(z).mean(dim=0), torch.cat(written).mean(dim=0)


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
        first, last, scale = "blocks.0.hook_resid_pre", f"blocks.{layers[-1]}.hook_resid_post", "ln_final.hook_scale"
        points = [f"blocks.{layer}.{point}" for layer in layers for point in ("attn.hook_z", "hook_mlp_out")]
        at_end = at_last_tokens(answered, [first, last, scale, *points])
        parts, biases = [at_end[first]], torch.zeros_like(at_end[first])
        for layer in layers:
            heads, own = heads_of(model, layer, at_end)
            parts += [*heads.unbind(dim=1), at_end[f"blocks.{layer}.hook_mlp_out"]]
            biases = biases + own
        return cls(model, [*parts, biases], at_end[last], at_end[scale])

    def normalised(self) -> list[Float[Tensor, "prompt d_model"]]:
        """The parts as the final norm passes them on, its divisor held: before its weight and without its bias."""
        norm = self.model.ln_final
        return [(x - x.mean(dim=-1, keepdim=True) if norm.centered else x) / self.scale for x in self.parts]
