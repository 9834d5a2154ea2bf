"""GPT-2: learned positions, LayerNorm, GELU, tied embedding (Radford et al., 2019).

The preset is bias-free, as nanoGPT trains it; OpenAI's weights have a bias everywhere, which the configuration says.
"""

from __future__ import annotations

from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from reflowlens.config import ModelConfig
from reflowlens.models.decoder import Decoder
from reflowlens.models.parts import HookPoint, through_copy
from reflowlens.models.places import Positions


class PosEmbed(nn.Module):
    """One learned vector a position."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.W_pos = nn.Parameter(torch.empty(cfg.n_ctx, cfg.d_model))


class GPT2(Decoder):
    """The baseline with learned positions added to the embedding."""

    def build_embedding(self, cfg: ModelConfig) -> None:
        super().build_embedding(cfg)
        self.pos_embed = PosEmbed(cfg)
        self.hook_pos_embed = HookPoint()  # [batch, pos, d_model]

    @property
    def W_pos(self) -> Float[Tensor, "n_ctx d_model"]:
        """The learned positions."""
        return self.pos_embed.W_pos

    @property
    def W_E_pos(self) -> Float[Tensor, "vocab_and_ctx d_model"]:
        """W_E above W_pos: all that the stream can begin with, a sum of one row of each."""
        return torch.cat([cast(Tensor, self.W_E), self.W_pos])

    def embed_tokens(
        self, tokens: Int[Tensor, "batch pos"], weights: tuple[Tensor, ...], positions: Positions
    ) -> Float[Tensor, "batch pos d_model"]:
        vectors = self.pos_embed.W_pos[positions].expand(tokens.shape[0], -1, -1)
        return super().embed_tokens(tokens, weights, positions) + through_copy(self.hook_pos_embed, vectors)
