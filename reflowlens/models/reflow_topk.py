"""reFlow-TopK: hard sparsity on the recipe, R' = TopK(ReLU(R)) row by row, in every forward and at both ends."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from reflowlens.models.reflow import ReFlow


class ReFlowTopK(ReFlow):
    """Each token keeps its ``cfg.topk`` largest positive signals; gradients reach kept entries only."""

    def effective_recipe(self) -> Float[Tensor, "d_vocab S"]:
        return topk_rows(self.embed.W_recipe, self.cfg.topk or 0)


def topk_rows(recipe: Float[Tensor, "d_vocab S"], k: int) -> Float[Tensor, "d_vocab S"]:
    """ReLU, then zero all but the k largest entries of each row.

    >>> topk_rows(torch.tensor([[3.0, -5.0, 2.0, 1.0]]), 2)
    tensor([[3., 0., 2., 0.]])
    """
    values, indices = recipe.relu().topk(k, dim=-1)
    return torch.zeros_like(recipe).scatter(-1, indices, values)
