"""Whether the features of a block depend on what its MLP reads as the MLP does.

A dictionary can say what an MLP writes and be wrong about why: a cross-layer one may write it from features of earlier
blocks, so that a step of the computation is missing from its graphs (Lange et al., 2026). Then the derivative shows it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from analyses.statistics import bootstrap_interval, derive_generator
from reflowlens.circuits.attribution.linear.replacement import blocks_of
from reflowlens.dictionaries.belonging import check_belongs
from reflowlens.dictionaries.dictionary import Dictionary, DictionaryLayer
from reflowlens.errors import ReflowlensError
from reflowlens.models.components import Block
from reflowlens.models.decoder import Decoder
from reflowlens.models.parts import plus


@torch.no_grad()
def jacobian_match(
    model: Decoder, dictionary: Dictionary, texts: Sequence[str], *, probes: int = 4, seed: int = 0
) -> pd.DataFrame:
    """The derivative of what each MLP writes with respect to what it reads, of the dictionary against the model's.

    The derivative is taken at every position along differences to what is read at other positions of the text. Of a
    dictionary it is that of the block's own features (and skip): what features of earlier blocks write there does not
    depend on what is read.

    Args:
        dictionary: of transcoders, a layer each or cross-layer.
        texts: of two tokens or more.
        probes: directions a position.

    Returns:
        A row a block: ``layer``; ``unexplained``: Σ‖(J − Ĵ)v‖² / Σ‖Jv‖² of each text, the mean over texts, with its
        95% interval ``low``, ``high``; ``cosine`` of Jv and Ĵv, and ``texts``. Where the features of a block read
        nothing, ``unexplained`` is 1. Texts on which an MLP does not depend on what it reads are left out.

    Raises:
        ReflowlensError: the dictionary is none of the model's MLPs, or a text is a single token.
    """
    check_belongs(dictionary, model)
    blocks, generator = blocks_of(dictionary), derive_generator(seed, "jacobians")
    unexplained: list[list[float]] = [[] for _ in blocks]
    cosines: list[list[float]] = [[] for _ in blocks]
    for text in texts:
        points = [f"blocks.{block}.ln2.hook_normalized" for block in blocks]
        cache = model.run_with_cache(text, names_filter=points)[1]
        n = len(cache[points[0]][0])
        if n < 2:
            raise ReflowlensError(f"the derivative needs texts of two tokens at least, got {text!r}")
        others = torch.stack([torch.randperm(n - 1, generator=generator) for _ in range(probes)]) + 1
        shifted = (torch.arange(n) + others[:, :1]) % n  # by 1 to n - 1 positions: never to the position itself
        for i, (block, layer) in enumerate(zip(blocks, dictionary.each_layer(), strict=True)):
            x = cache[points[i]][0]
            v = x[shifted.to(x.device)] - x
            own, said = mlp_derivative(cast(Block, model.blocks[block]), x, v), features_derivative(layer, x, v)
            size = own.norm(dim=-1)
            if not bool(size.any()):
                continue
            unexplained[i].append(float((own - said).square().sum() / own.square().sum()))
            cosine = (own * said).sum(-1) / (size * said.norm(dim=-1)).clamp_min(1e-30)
            cosines[i].append(float(cosine[size > 0].mean()))
    rows = []
    for block, left, cosine in zip(blocks, unexplained, cosines, strict=True):
        low, high = bootstrap_interval(left) if len(left) > 1 else (math.nan, math.nan)
        means = [float(np.mean(values)) if values else math.nan for values in (left, cosine)]
        rows.append((block, means[0], low, high, means[1], len(left)))
    return pd.DataFrame(rows, columns=["layer", "unexplained", "low", "high", "cosine", "texts"])


def mlp_derivative(
    block: Block, x: Float[Tensor, "pos d_model"], v: Float[Tensor, "probe pos d_model"]
) -> Float[Tensor, "probe pos d_model"]:
    """Of a block's MLP along ``v``, where it reads ``x`` at ``ln2.hook_normalized``."""

    def written(normalized: Tensor) -> Tensor:
        return cast(Tensor, block.mlp(plus(normalized * block.ln2.w, block.ln2.b)))

    return cast(Tensor, torch.func.jvp(written, (x.expand_as(v).clone(),), (v,))[1])


def features_derivative(
    layer: DictionaryLayer, x: Float[Tensor, "pos d_model"], v: Float[Tensor, "probe pos d_model"]
) -> Float[Tensor, "probe pos d_model"]:
    """The same of what a layer's features write in their own block: active ones have slope 1, all others 0."""
    active = layer.encode(x) > 0
    written = layer.write((v @ layer.W_enc.T) * active)
    return written if layer.W_skip is None else written + v @ layer.W_skip.T
