"""reFlow-TopK: hard sparsity on the recipe, R' = TopK(ReLU(R)) row by row, in every forward and at both ends.

What of its effect is which: ``topk_ends`` prunes at one end alone, ``topk_gradient`` lets all entries learn.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from reflowlens.config import ModelConfig
from reflowlens.models.architecture import FLOAT32
from reflowlens.models.reflow import ReFlow


class ReFlowTopK(ReFlow):
    """Each token keeps its ``topk`` largest positive signals.

    Attributes:
        topk: ``cfg.topk``; training with ``run.topk_anneal_fraction`` keeps more for a while.
    """

    recipe_is_stored = False

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__(cfg)
        self.topk = cfg.topk or 0

    def prune(self, recipe: Float[Tensor, "*rows S"]) -> Float[Tensor, "*rows S"]:
        """What is kept of recipes, with the gradient that ``cfg.topk_gradient`` says."""
        if self.cfg.topk_gradient == "straight_through":
            return recipe + (topk_rows(recipe.detach(), self.topk) - recipe.detach())  # kept entries, or 0, exactly
        return topk_rows(recipe, self.topk)

    def effective_recipe(self) -> Float[Tensor, "d_vocab S"]:
        stored = self.embed.W_recipe
        return stored if self.cfg.topk_ends == "input" else self.prune(stored)

    def input_recipe(self) -> Float[Tensor, "d_vocab S"]:
        stored = self.embed.W_recipe
        return stored if self.cfg.topk_ends == "output" else self.prune(stored)

    def input_rows(
        self, tokens: Int[Tensor, "batch pos"], effective: Float[Tensor, "d_vocab S"]
    ) -> Float[Tensor, "batch pos S"]:
        if self.cfg.topk_ends == "both":
            return F.embedding(tokens, effective)
        rows = F.embedding(tokens, self.embed.W_recipe)
        return rows if self.cfg.topk_ends == "output" else self.prune(rows)

    @classmethod
    def activation_bytes(cls, cfg: ModelConfig, n: int, width: int) -> tuple[float, float]:
        """Of what is pruned, the vocabulary's rows or the tokens': the rectified rows and where their largest entries
        are, unless gradients pass straight through; of the vocabulary's also the result, if no 16-bit copy stands for
        it."""
        model, readout = super().activation_bytes(cfg, n, width)
        rows, signals = n if cfg.topk_ends == "input" else cfg.d_vocab, cfg.n_signals or 0
        if cfg.topk_gradient == "kept":
            model += rows * (FLOAT32 * signals + 8 * (cfg.topk or 0))
        if cfg.topk_ends != "input" and width == FLOAT32:
            model += rows * FLOAT32 * signals
        return model, readout


def topk_rows(recipe: Float[Tensor, "*rows S"], k: int) -> Float[Tensor, "*rows S"]:
    """ReLU, then zero all but the k largest entries of each row.

    >>> topk_rows(torch.tensor([[3.0, -5.0, 2.0, 1.0]]), 2)
    tensor([[3., 0., 2., 0.]])
    """
    values, indices = recipe.relu().topk(k, dim=-1)
    return torch.zeros_like(recipe).scatter(-1, indices, values)
