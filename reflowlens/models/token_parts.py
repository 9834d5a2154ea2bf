"""What a TTTFlow makes of tokens before its blocks: pairs, the smear, and values that the last blocks add.

Each of them is the token's own, or its own and that of the token before it in the same text.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from reflowlens.config import ModelConfig
from reflowlens.models.parts import HookPoint
from reflowlens.models.places import Positions
from reflowlens.ttt_flow_config import TTTFlowConfig

_VALUE_STD = 0.01
_BIGRAM_SCALE, _VALUE_SCALE = 0.05, 0.1
_HASH = 36_313, 27_191


class Bigram(nn.Module):
    """A vector for each pair of a token and the one before it; pairs share the slots of a table by a hash."""

    def __init__(self, own: TTTFlowConfig, d_model: int) -> None:
        super().__init__()
        self.W_pairs = nn.Parameter(torch.empty(own.bigram_slots, own.bigram_width))
        self.W_up = nn.Parameter(torch.empty(own.bigram_width, d_model))
        self.scale = nn.Parameter(torch.empty(1))
        self.hook_bigram = HookPoint()  # [batch, pos, d_model]

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """W_up orthogonal: were it 0 as the table is, the gradient of either would be 0 for ever."""
        self.W_pairs.zero_()
        nn.init.orthogonal_(self.W_up, generator=generator)
        self.scale.fill_(_BIGRAM_SCALE)

    def slots(
        self,
        tokens: Int[Tensor, "batch pos"],
        last: Int[Tensor, " batch"] | None,
        continues: Bool[Tensor, "#batch pos"],
    ) -> Int[Tensor, "batch pos"]:
        """Rows of the table: ``36313 token xor 27191 before``, modulo all but the last, which is for first tokens."""
        n, (this, other) = len(self.W_pairs) - 1, _HASH
        pair = (this * tokens) ^ (other * _shifted(tokens, last))
        return (pair % n).where(continues, n)

    def forward(
        self,
        tokens: Int[Tensor, "batch pos"],
        last: Int[Tensor, " batch"] | None,
        continues: Bool[Tensor, "#batch pos"],
    ) -> Float[Tensor, "batch pos d_model"]:
        pairs = F.embedding(self.slots(tokens, last, continues), self.W_pairs)
        return self.hook_bigram(self.scale * (pairs @ self.W_up))


class SmearGate(nn.Module):
    """Some of the vector before, channel by channel: (1 − σ(g)) x_t + σ(g) x_{t−1}; 0 is before the first."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.empty(cfg.d_model))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        self.gate.zero_()

    def forward(
        self,
        x: Float[Tensor, "batch pos d_model"],
        last: Float[Tensor, "batch d_model"] | None,
        continues: Bool[Tensor, "#batch pos"],
    ) -> Float[Tensor, "batch pos d_model"]:
        before = _shifted(x, last).masked_fill(~continues[..., None], 0.0)
        return torch.lerp(x, before, self.gate.sigmoid())


def _shifted(x: Tensor, last: Tensor | None) -> Tensor:
    """What stands before each position; before the first ``last``, or anything."""
    return torch.cat([x[:, -1:] if last is None else last[:, None].to(x.dtype), x[:, :-1]], dim=1)


class TokenValues(nn.Module):
    """What the last blocks add to the values of each token: a table that they share, each with a scale of its own."""

    def __init__(self, own: TTTFlowConfig, cfg: ModelConfig) -> None:
        super().__init__()
        self.first, self.kv_heads = cfg.n_layers - own.value_layers, cfg.kv_heads
        self.W_values = nn.Parameter(torch.empty(cfg.d_vocab, own.value_width))
        self.W_up = nn.Parameter(torch.empty(own.value_width, cfg.kv_heads * cfg.d_head))
        self.scale = nn.Parameter(torch.empty(1))
        self.layer_scale = nn.Parameter(torch.empty(own.value_layers))
        self.hook_token_values = HookPoint()  # [batch, pos, kv_head, d_head], before the scale of a block

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        self.W_values.normal_(0.0, _VALUE_STD, generator=generator)
        self.W_up.zero_()
        self.scale.fill_(_VALUE_SCALE)
        self.layer_scale.fill_(1.0)

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos kv_head d_head"]:
        values = self.scale * (F.embedding(tokens, self.W_values) @ self.W_up)
        return self.hook_token_values(values.unflatten(-1, (self.kv_heads, -1)))

    def of_block(
        self, values: Float[Tensor, "batch pos kv_head d_head"], layer: int
    ) -> Float[Tensor, "batch pos kv_head d_head"] | None:
        """Those that a block adds; None of a block that adds none."""
        scale = self.scale_of(layer)
        return None if scale is None else scale * values

    def scale_of(self, layer: int) -> Float[Tensor, ""] | None:
        """What a block multiplies them with; None of a block that adds none."""
        return None if layer < self.first else self.layer_scale[layer - self.first]


def continues(positions: Positions, device: torch.device) -> Bool[Tensor, "#batch pos"]:
    """Whether a token has one before it in its text."""
    if isinstance(positions, slice):
        return (torch.arange(positions.start, positions.stop, device=device) > 0)[None]
    return positions > 0
