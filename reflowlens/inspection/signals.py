"""What a recipe and a basis look like as stored, held against what a dense Gaussian recipe of that size would show."""

from __future__ import annotations

import math

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from reflowlens.config import ModelConfig
from reflowlens.errors import ReflowlensError
from reflowlens.inspection.weights import Weights
from reflowlens.tokenizers.by_name import get_tokenizer

RECIPE, BASIS = "embed.W_recipe", "embed.W_basis"


def matrix_effective_rank(basis: Float[Tensor, "S d_model"]) -> float:
    """exp of the entropy of the squared singular values as shares of their sum.

    Roy and Vetterli (2007), on the energies σ² instead of the singular values: 1 for a matrix of rank one,
    min(S, d_model) for an orthogonal one, NaN where a value is not finite.

    >>> round(matrix_effective_rank(torch.eye(4)), 6)
    4.0
    """
    if not torch.isfinite(basis).all():
        return math.nan
    energy = torch.linalg.svdvals(basis.double()).square()
    share = energy / energy.sum()
    return torch.special.entr(share).sum().exp().item()


def signals_frame(weights: Weights, cfg: ModelConfig) -> pd.DataFrame:
    """Sparsity of the recipe and effective rank of the basis: ``measure``, ``value``, ``gaussian``, ``definition``.

    The recipe is the one that logits are read with (of a reFlow-TopK, what ReLU and top-k leave unless ``topk_ends`` is
    ``"input"``), its rows those of real tokens.
    ``gaussian`` is what independent normal entries give: a figure near it is no evidence of sparsity.
    """
    from reflowlens.models.reflow_topk import topk_rows

    S, rows_left = weights.tensors[RECIPE].shape[1], _real_tokens(weights, cfg)
    active = participation = zeros = 0.0
    rows = alive = 0
    used = torch.zeros(S, dtype=torch.bool)
    for chunk in weights.chunks(RECIPE):
        recipe = chunk[: max(0, rows_left - rows)].double()
        if cfg.topk is not None and cfg.topk_ends != "input":
            recipe = topk_rows(recipe, cfg.topk)
        size, squares = recipe.abs(), recipe.square()
        filled = squares.sum(1) > 0
        active += float((size > 2 * size.mean(1, keepdim=True)).sum())
        participation += float((squares.sum(1)[filled].square() / squares.square().sum(1)[filled]).sum())
        zeros += float((recipe == 0).sum())
        used |= (recipe != 0).any(0)
        rows, alive = rows + len(recipe), alive + int(filled.sum())
    found = [
        ("active share", active / (rows * S), math.erfc(2 / math.pi**0.5), "|x| > 2 mean|x| of the token's recipe"),
        (
            "participation ratio",
            participation / max(alive, 1) / S,
            (S + 2) / (3 * S),
            "(Σx²)² / Σx⁴ / S, mean over tokens",
        ),
        ("exact zeros", zeros / (rows * S), 0.0, "share of entries"),
        ("dead signals", float((~used).sum()), 0.0, "signals that no token has"),
        (
            "effective rank",
            matrix_effective_rank(weights.whole(BASIS)),
            _gaussian_rank(*weights.tensors[BASIS].shape),
            "of the basis: exp of the entropy of σ² / Σσ²",
        ),
    ]
    return pd.DataFrame(found, columns=["measure", "value", "gaussian", "definition"])


def _real_tokens(weights: Weights, cfg: ModelConfig) -> int:
    """Rows of the recipe that a token reaches; all of them where the tokenizer is not known."""
    rows = weights.tensors[RECIPE].shape[0]
    try:
        return min(rows, get_tokenizer(cfg.tokenizer_name).n_vocab)
    except ReflowlensError:
        return rows


def _gaussian_rank(rows: int, columns: int) -> float:
    return matrix_effective_rank(
        torch.randn(rows, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    )
