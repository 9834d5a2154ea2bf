"""reFlow-TopK: hard sparsity on the recipe, R' = TopK(ReLU(R)) row by row, in every forward and at both ends."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from reflowlens.config import ModelConfig
from reflowlens.models.architecture import FLOAT32
from reflowlens.models.reflow import ReFlow


class ReFlowTopK(ReFlow):
    """Each token keeps its ``cfg.topk`` largest positive signals; gradients reach kept entries only."""

    recipe_is_stored = False

    @classmethod
    def activation_bytes(cls, cfg: ModelConfig, n: int, width: int) -> tuple[float, float]:
        """The rectified recipe too, where its largest entries are, and, if no 16-bit copy stands for it, the pruned."""
        model, readout = super().activation_bytes(cfg, n, width)
        copies = 2 if width == FLOAT32 else 1
        return model + cfg.d_vocab * (FLOAT32 * (cfg.n_signals or 0) * copies + 8 * (cfg.topk or 0)), readout

    def effective_recipe(self) -> Float[Tensor, "d_vocab S"]:
        return topk_rows(self.embed.W_recipe, self.cfg.topk or 0)


def topk_rows(recipe: Float[Tensor, "d_vocab S"], k: int) -> Float[Tensor, "d_vocab S"]:
    """ReLU, then zero all but the k largest entries of each row.

    >>> topk_rows(torch.tensor([[3.0, -5.0, 2.0, 1.0]]), 2)
    tensor([[3., 0., 2., 0.]])
    """
    values, indices = recipe.relu().topk(k, dim=-1)
    return torch.zeros_like(recipe).scatter(-1, indices, values)
