"""The block of a TTTFlow: attention and MLP, each behind a norm without weights, and scaled channel by channel."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from reflowlens.config import ModelConfig
from reflowlens.models.attention import Attention, Past, Rotary
from reflowlens.models.components import MLP
from reflowlens.models.numerics import wide
from reflowlens.models.parts import HookPoint, Norm, through_copy
from reflowlens.models.places import Places, Positions
from reflowlens.ttt_flow_config import TTTFlowConfig

_GAIN = 1.5


class RefinedBlock(nn.Module):
    """A block that reads the first stream, and of the second half an earlier output, beside what comes in."""

    hook_out_is_single_residual_stream = True  # what TransformerLens's logit lens asks of a block

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        has_skip = cfg.n_layers // 2 <= layer < 2 * (cfg.n_layers // 2)
        self.w_skip = nn.Parameter(torch.empty(cfg.d_model)) if has_skip else None  # w_j
        self.w_stream, self.w_first = (nn.Parameter(torch.empty(cfg.d_model)) for _ in range(2))  # m₀, m₁
        self.w_attn, self.w_mlp = (nn.Parameter(torch.empty(cfg.d_model)) for _ in range(2))  # a, b
        factor = (layer + 1) ** -0.5
        self.ln1, self.attn = FixedNorm(cfg, factor), RefinedAttention(cfg, layer)
        self.ln2, self.mlp = FixedNorm(cfg, factor), MLP(cfg)
        self.hook_resid_pre = HookPoint()  # [batch, pos, d_model], the output of the block before
        if has_skip:
            self.hook_skip = HookPoint()  # [batch, pos, d_model], what is added of an earlier output
        self.hook_resid_in = HookPoint()  # [batch, pos, d_model], mixed with the first stream: what attention reads
        self.hook_attn_out = HookPoint()  # [batch, pos, d_model], scaled
        self.hook_resid_mid = HookPoint()  # [batch, pos, d_model]
        self.hook_mlp_in = HookPoint()  # [batch, pos, d_model], a copy of the stream when something is attached
        self.hook_mlp_out = HookPoint()  # [batch, pos, d_model], scaled
        self.hook_resid_post = HookPoint()  # [batch, pos, d_model]

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        for weight in (self.w_skip, self.w_stream, self.w_attn, self.w_mlp):
            if weight is not None:
                weight.fill_(1.0)
        self.w_first.zero_()
        self.attn.init_weights(generator)
        nn.init.orthogonal_(self.mlp.W_in, generator=generator)
        self.mlp.W_out.zero_()

    def forward(
        self,
        resid: Float[Tensor, "batch pos d_model"],
        places: Places,
        past: Past | None = None,
        *,
        first: Float[Tensor, "batch pos d_model"],
        earlier: Float[Tensor, "batch pos d_model"] | None,
        of_tokens: Float[Tensor, "batch pos kv_head d_head"] | None,
    ) -> Float[Tensor, "batch pos d_model"]:
        x = self.hook_resid_pre(resid)
        if self.w_skip is not None and earlier is not None:
            x = x + self.hook_skip(self.w_skip * earlier)
        x = self.hook_resid_in(self.w_stream * x + self.w_first * first)
        x = self.hook_resid_mid(x + self.hook_attn_out(self.w_attn * self.attn(x, self.ln1, places, past, of_tokens)))
        written = self.mlp(self.ln2(through_copy(self.hook_mlp_in, x)))
        return self.hook_resid_post(x + self.hook_mlp_out(self.w_mlp * written))


class RefinedAttention(Attention):
    """Attention with normalised queries and keys, of which positions turn a few channels, and a gain a head.

    In the last blocks a head's output loses what lies along the position's own value (exclusive self-attention).
    """

    rotary: Rotary

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__(cfg, layer)
        own = cast(TTTFlowConfig, cfg.ttt_flow)
        self.is_exclusive = layer >= cfg.n_layers - own.exclusive_layers
        self.gain = nn.Parameter(torch.empty(cfg.n_heads))
        self.rotary = Rotary(cfg, own.rotary_channels, _slowed(cfg.rotary_base, cfg.n_ctx, own))
        self.hook_value = HookPoint()  # [batch, pos, kv_head, d_head], values with those of the tokens
        if self.is_exclusive:
            self.hook_excluded = HookPoint()  # [batch, pos, kv_head, d_head], the direction that heads lose

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        for weight in (self.W_Q, self.W_K, self.W_V):
            flat = torch.empty(weight.shape[1], weight.shape[0] * weight.shape[2])
            nn.init.orthogonal_(flat, generator=generator)
            weight.copy_(rearrange(flat, "d_model (head d_head) -> head d_model d_head", head=len(weight)))
        self.W_O.zero_()
        self.gain.fill_(_GAIN)

    def forward(
        self,
        resid: Float[Tensor, "batch pos d_model"],
        ln1: Norm,
        places: Places,
        past: Past | None,
        of_tokens: Float[Tensor, "batch pos kv_head d_head"] | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        q, k, v = self.queries_keys_values(resid, ln1)
        v = self.hook_value(v if of_tokens is None else v + of_tokens)
        q, k = (self.turned(rms_norm(x, self.cfg.eps), places.positions) for x in (q, k))
        q, k = self.hook_rot_q(q * self.gain[:, None]), self.hook_rot_k(k)
        z = self.mix(q, k, v, places.mask) if past is None else past.mix(self, q, k, v)
        if self.is_exclusive:
            own = self.hook_excluded(F.normalize(v, dim=-1))
            own = own.repeat_interleave(self.cfg.n_heads // self.cfg.kv_heads, dim=2)
            z = z - (z * own).sum(-1, keepdim=True) * own
        return self.output(self.hook_z(z))

    def turned(
        self, x: Float[Tensor, "batch pos head d_head"], positions: Positions
    ) -> Float[Tensor, "batch pos head d_head"]:
        """The first channels of each head by their position, the others as they are."""
        n = self.rotary.cos.shape[-1]
        return torch.cat([self.rotary(x[..., :n], positions), x[..., n:]], dim=-1)


def _slowed(base: float, n_ctx: int, own: TTTFlowConfig) -> float:
    """NTK scaling, of the longest text that a model reads, so that a turn does not depend on the text at hand."""
    n = own.rotary_channels
    return base if n_ctx <= own.rotary_context else base * (n_ctx / own.rotary_context) ** (n / (n - 2))


class FixedNorm(Norm):
    """RMSNorm without weights: ``w`` is a constant, 1 or what a block multiplies the norm by."""

    w: Tensor  # type: ignore[assignment] # no parameter

    def __init__(self, cfg: ModelConfig, factor: float = 1.0) -> None:
        super().__init__(cfg)
        del self.w
        self.register_buffer("w", torch.full((cfg.d_model,), factor), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FixedNorm:
        """Moved to other devices, and in float32 whatever the model's type is."""
        exact = self.w
        super()._apply(fn, recurse)
        if self.w.dtype != torch.float32:
            self.w = exact.to(self.w.device)
        return self


def rms_norm(x: Float[Tensor, "*batch width"], eps: float) -> Float[Tensor, "*batch width"]:
    """Without weights, statistics in float32 at least."""
    stream = wide(x)
    return (stream * (stream.pow(2).mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)
