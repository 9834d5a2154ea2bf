"""reFlow: the embedding is a product E = R B of a recipe R (d_vocab x S) and a signal basis B (S x d_model).

A token enters as its recipe mixed from the basis, ``x = R[t] B``, and leaves the same way: the last residual is read
against the basis, ``a = B norm(x)``, and ``logits = R a``. Every logit is a sum over S named signals.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens import FactoredMatrix

from reflowlens.config import ModelConfig
from reflowlens.models.architecture import FLOAT32
from reflowlens.models.decoder import Decoder
from reflowlens.models.parts import HookPoint, is_hooked, through_copy
from reflowlens.models.places import Positions
from reflowlens.models.products import product
from reflowlens.models.residual import Readout, Unembed


class RecipeEmbed(nn.Module):
    """Which signals make up each token, and what the signals are."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.W_recipe = nn.Parameter(torch.empty(cfg.d_vocab, cfg.n_signals or 0))
        self.W_basis = nn.Parameter(torch.empty(cfg.n_signals or 0, cfg.d_model))


class RecipeUnembed(Unembed):
    """``logits = (x Bᵀ) Rᵀ``: two thin products; E is formed only where that costs less."""

    def __init__(self, model: Decoder) -> None:
        super().__init__(model)
        self.hook_signal = HookPoint()  # [batch, pos, S], a = B norm(x)

    def readout(self, x: Float[Tensor, "batch pos d_model"], weights: tuple[Tensor, ...]) -> Readout:
        recipe, basis = weights
        if not is_hooked(self.hook_signal) and forming_is_cheaper(x.shape[0] * x.shape[1], recipe, basis):
            return Readout(x, product(recipe, basis), None)
        return Readout(self.hook_signal(product(x, basis.T)), recipe, None)


def forming_is_cheaper(n: int, recipe: Float[Tensor, "d_vocab S"], basis: Float[Tensor, "S d_model"]) -> bool:
    """Whether reading n positions through E = R B takes fewer multiplications than through B and then R."""
    (d_vocab, S), d_model = recipe.shape, basis.shape[1]
    factored = n * (d_model * S + S * d_vocab)
    formed = d_vocab * S * d_model + n * d_model * d_vocab
    return formed < factored


class ReFlow(Decoder):
    """The base architecture: no constraint on the recipe."""

    embed: RecipeEmbed

    def build_embedding(self, cfg: ModelConfig) -> None:
        self.embed = RecipeEmbed(cfg)
        self.unembed = RecipeUnembed(self)
        self.hook_recipe = HookPoint()  # [batch, pos, S], the token's effective recipe
        self.hook_basis = HookPoint()  # [S, d_model], the basis as this pass uses it, at both ends

    @classmethod
    def forms(cls, cfg: ModelConfig, n: int) -> bool:
        """Whether a pass over n positions, to whose signals nothing is attached, reads them through E = R B."""
        recipe = torch.empty(cfg.d_vocab, cfg.n_signals or 0, device="meta")
        return forming_is_cheaper(n, recipe, torch.empty(cfg.n_signals or 0, cfg.d_model, device="meta"))

    @classmethod
    def forward_flops(cls, cfg: ModelConfig, context: int, batch: int) -> dict[str, float]:
        """R[t] B at the input; at the output (x Bᵀ) Rᵀ, or x Eᵀ and E = R B once (``forming``) for all positions."""
        parts, signals, n = super().forward_flops(cfg, context, batch), cfg.n_signals or 0, batch * context
        mixing = 2.0 * signals * cfg.d_model
        if cls.forms(cfg, n):
            return parts | {"embedding": mixing, "forming": mixing * cfg.d_vocab / n}
        return parts | {"embedding": mixing, "readout": mixing + 2.0 * signals * cfg.d_vocab}

    @classmethod
    def activation_bytes(cls, cfg: ModelConfig, n: int, width: int) -> tuple[float, float]:
        """The tokens' recipes too, and the readout's factors: x and E, or x, its signals and R."""
        (model, _), signals, d = super().activation_bytes(cfg, n, width), cfg.n_signals or 0, cfg.d_model
        model += n * width * signals
        if cls.forms(cfg, n):
            return model, float(FLOAT32 * d * n + width * d * cfg.d_vocab)
        return model + width * d * n, float(width * signals * n + FLOAT32 * signals * cfg.d_vocab)

    def signals_of(self, readout: Readout) -> Float[Tensor, "batch pos S"]:
        """The signals a = B norm(x) of a pass's readout, whichever product it reads logits through; no hook runs."""
        recipe, basis, features = self.embed.W_recipe, self.embed.W_basis, readout.features
        is_read = is_hooked(cast(RecipeUnembed, self.unembed).hook_signal)
        formed = not is_read and forming_is_cheaper(features.shape[0] * features.shape[1], recipe, basis)
        return features @ basis.T if formed else features

    def effective_recipe(self) -> Float[Tensor, "d_vocab S"]:
        """R as logits are read with it."""
        return self.embed.W_recipe

    def input_recipe(self) -> Float[Tensor, "d_vocab S"]:
        """R as tokens enter with it."""
        return self.effective_recipe()

    def input_rows(
        self, tokens: Int[Tensor, "batch pos"], effective: Float[Tensor, "d_vocab S"]
    ) -> Float[Tensor, "batch pos S"]:
        """The tokens' rows of :meth:`input_recipe`, given :meth:`effective_recipe`, which it need not compute again."""
        return F.embedding(tokens, effective)

    def tied_weights(self) -> tuple[Tensor, ...]:
        return self.effective_recipe(), through_copy(self.hook_basis, self.embed.W_basis)

    def embed_tokens(
        self, tokens: Int[Tensor, "batch pos"], weights: tuple[Tensor, ...], positions: Positions
    ) -> Float[Tensor, "batch pos d_model"]:
        recipe, basis = weights
        mixed = product(self.hook_recipe(self.input_rows(tokens, recipe)), basis)
        # Under autocast the product is 16 bits wide; the residual stream stays as wide as the parameters.
        return self.hook_embed(mixed.to(basis.dtype))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """As the decoder's, but with an orthogonal basis, so that E has the standard deviation of R."""
        super().init_weights(generator)
        if self.cfg.basis_init == "orthogonal":
            nn.init.orthogonal_(self.embed.W_basis, generator=generator)

    @property
    def W_E(self) -> FactoredMatrix:
        return FactoredMatrix(self.input_recipe(), self.embed.W_basis)

    @property
    def unembedding(self) -> FactoredMatrix:
        return FactoredMatrix(self.effective_recipe(), self.embed.W_basis)
