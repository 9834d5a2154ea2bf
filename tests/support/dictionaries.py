"""Dictionaries small enough for every test, every one of whose weights shows if it is left out."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from reflowlens.dictionaries.config import WITH_K, DictionaryConfig
from reflowlens.dictionaries.dictionary import Dictionary
from reflowlens.models.base import HookedModel

Kind = Literal["sae", "plt", "clt", "skip"]
KINDS: tuple[Kind, ...] = ("sae", "plt", "clt", "skip")


def dictionary_of(
    model: HookedModel, kind: Kind = "plt", activation: str = "topk", n_features: int = 40, seed: int = 0, **fields: Any
) -> Dictionary:
    """Random, over all blocks of a model: autoencoders of its stream, or transcoders of its MLPs."""
    blocks = range(model.cfg.n_layers)
    writes = tuple(f"blocks.{b}.hook_{'resid_post' if kind == 'sae' else 'mlp_out'}" for b in blocks)
    reads = writes if kind == "sae" else tuple(f"blocks.{b}.ln2.hook_normalized" for b in blocks)
    chosen: dict[str, Any] = {
        "reads": reads,
        "writes": writes,
        "activation": activation,
        "k": 6 if activation in WITH_K else None,
        "cross_layer": kind == "clt",
        "skip": kind == "skip",
    }
    width = model.cfg.d_model
    cfg = DictionaryConfig(d_in=width, d_out=width, n_features=n_features, **chosen | fields)
    dictionary = Dictionary.fresh(cfg, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in dictionary.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 0.3 if name.endswith(("b_enc", "b_dec", "threshold")) else width**-0.5
            parameter.copy_(noise.abs() * scale if name.endswith("threshold") else noise * scale)
    return dictionary.requires_grad_(False)


def ragged_documents(n: int = 5, seed: int = 0, longest: int = 17) -> list[Int[Tensor, " _token"]]:
    """Documents of byte tokens, 3 to ``longest`` of them each."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, longest + 1, (n,), generator=generator).tolist()
    return [torch.randint(0, 256, (length,), generator=generator) for length in lengths]


def features_for(model: HookedModel, grid: str) -> AbstractContextManager[Any]:
    """What a grid needs in a model: a dictionary, of one of features."""
    if not grid.startswith("features"):
        return contextlib.nullcontext()
    return dictionary_of(model, "plt", "relu", n_features=6).spliced(model)
