"""TTT-Linear with a FlowRefiner: a small decoder whose last step learns from the text that it reads.

From the bottom up, every RMSNorm without weights::

    x    = RMSNorm(E[token] + bigram(token, the one before))
    x    = (1 − σ(g)) x_t + σ(g) x_{t−1}                            SmearGate;  x₀ = x
    for each block l:
        x += w_j ⊙ (output of block n/2 − 1 − j)                      of block n/2 + j: U-Net
        x  = m₀ ⊙ x + m₁ ⊙ x₀
        x += a ⊙ Attention(RMSNorm(x) / √(l + 1))
        x += b ⊙ MLP(RMSNorm(x) / √(l + 1))                           LeakyReLU(0.5)²
    x    = RMSNorm(x)
    x   += σ(γ) TTT(x)                                               :mod:`reflowlens.models.ttt_linear`
    x   += σ(γ) Flow(x)                                              :mod:`reflowlens.models.flow_refiner`
    logits = 30 tanh(x Eᵀ / 30)

Whatever reaches from one token to another, the pair of the bigram, the smear, attention and the inner learner, begins
anew with every text that ``segments`` tells apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from reflowlens.config import ModelConfig
from reflowlens.errors import ReflowlensError
from reflowlens.models.architecture import FLOAT32
from reflowlens.models.attention import Attention, KeyValueCache, Past, Rotary
from reflowlens.models.checked_pass import Pass, checked_pass
from reflowlens.models.components import MLP
from reflowlens.models.flow_refiner import FlowRefiner
from reflowlens.models.hooking import AXES
from reflowlens.models.numerics import wide
from reflowlens.models.parts import Norm, is_hooked, through_copy
from reflowlens.models.past import ReadPositions
from reflowlens.models.places import Places, Positions
from reflowlens.models.residual import Embed, FormedReadout, Readout, ResidualModel, Unembed
from reflowlens.models.text import TextInput
from reflowlens.models.threads import reading_forward
from reflowlens.models.ttt_linear import InnerState, TTTLinear, each_text_alone
from reflowlens.ttt_flow_config import TTTFlowConfig

_EMBED_STD, _VALUE_STD = 0.005, 0.01
_GAIN, _BIGRAM_SCALE, _VALUE_SCALE = 1.5, 0.05, 0.1
_HASH = 36_313, 27_191
_PER_HEAD = ("batch", "pos", "head", "d_head")


class TTTFlow(ResidualModel):
    """The architecture; what it has beside a decoder's sizes is ``cfg.ttt_flow``.

    The stream between blocks is not all that later blocks read: they go back to x₀ and to outputs of earlier blocks. A
    pass therefore starts at the first block. Behind the last the stream is normalised and then refined
    (:meth:`features_of`), by what was read before too: logits do not follow from a position's last residual stream.

    Example:
        >>> from reflowlens.models import build_model
        >>> build_model("ttt_flow_10l", device="meta").n_parameters
        25749398
    """

    stages = "whole"
    blocks_are_alike: ClassVar[bool] = False
    reads_last_stream: ClassVar[bool] = False
    units: ClassVar[Mapping[str, str | None]] = {"mlp.hook_post": None}  # W_out's rows are scaled by w_mlp
    point_axes = AXES | {
        **dict.fromkeys(("hook_value", "hook_token_values"), ("batch", "pos", "head", "d_head")),
        "hook_W": ("batch", "head", "key", "value"),
        "hook_c": ("batch", "head", "value"),
        "hook_grad": ("batch", "head", "pos_in_chunk", "value"),
        "hook_out": ("batch", "pos", "head", "value"),
        "hook_latent": ("batch", "pos", "flow"),
        "hook_velocity": ("batch", "pos", "flow"),
        "hook_logits_pre_cap": ("batch", "pos", "d_vocab"),
    }

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__(cfg)
        own = cast(TTTFlowConfig, cfg.ttt_flow)
        self.embed = Embed(cfg)
        self.unembed = CappedUnembed(self, own.logit_cap)
        self.hook_embed = HookPoint()  # [batch, pos, d_model]
        self.bigram = Bigram(own, cfg.d_model)
        self.smear = SmearGate(cfg)
        self.values = TokenValues(own, cfg) if own.value_layers else None
        self.blocks = nn.ModuleList([RefinedBlock(cfg, layer) for layer in range(cfg.n_layers)])
        self.ln_final = FixedNorm(cfg)
        self.ttt = TTTLinear(own, cfg.d_model, cfg.n_ctx) if own.ttt else None
        self.flow = FlowRefiner(own, cfg.d_model) if own.flow else None
        self.hook_refined = HookPoint()  # [batch, pos, d_model], what logits are read off
        self.setup()

    def resid_of(
        self, asked: Pass, weights: tuple[Tensor, ...], past: ReadPositions | None
    ) -> Float[Tensor, "batch pos d_model"]:
        if asked.starts_from_stream:
            raise ReflowlensError(
                "a pass of a TTTFlow starts from tokens: blocks read the first stream and earlier outputs too"
            )
        tokens, (positions, _) = asked.input, asked.places
        cache = cast("TTTFlowCache | None", past)
        before = None if cache is None or not cache.length else (cache.last_token, cache.last_vector)
        continues = _continues(positions, tokens.device)
        pairs = self.bigram(tokens, None if before is None else before[0], continues)
        x = rms_norm(self.embed_tokens(tokens, weights, positions) + pairs, self.cfg.eps)
        first = self.smear(x, None if before is None else before[1], continues)
        if cache is not None:
            cache.last_token, cache.last_vector = tokens[:, -1], x[:, -1]
        values = None if self.values is None else self.values(tokens)
        outputs: list[Tensor] = []
        resid, half = first, self.cfg.n_layers // 2
        for layer, block in enumerate(cast("list[RefinedBlock]", list(self.blocks[: asked.stop]))):
            earlier = outputs.pop() if half <= layer and outputs else None
            of_tokens = None if values is None or self.values is None else self.values.of_block(values, layer)
            resid = block(resid, asked.places, past, first=first, earlier=earlier, of_tokens=of_tokens)
            if layer < half:
                outputs.append(resid)
        return resid

    def features_of(
        self, resid: Float[Tensor, "batch pos d_model"], places: Places, past: ReadPositions | None
    ) -> Float[Tensor, "batch pos d_model"]:
        x = self.ln_final(resid)
        if self.ttt is not None:
            x = self._learned(self.ttt, x, places, cast("TTTFlowCache | None", past))
        if self.flow is not None:
            x = self.flow(x)
        return self.hook_refined(x)

    @reading_forward
    def final_stream(
        self, input: TextInput, *, segments: Int[Tensor, "batch pos"] | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """The refined stream: refiners see more than a position's own stream."""
        asked = checked_pass(self, input, None, None, None, None, None, segments)
        return self.features_of(self.resid_of(asked, self.tied_weights(), None), asked.places, None)

    def read_final(
        self, stream: Float[Tensor, "batch pos d_model"], weights: tuple[Tensor, ...] | None = None
    ) -> Readout:
        return self.unembed.readout(stream, self.tied_weights() if weights is None else weights)

    def _learned(
        self, ttt: TTTLinear, x: Float[Tensor, "batch pos d_model"], places: Places, cache: TTTFlowCache | None
    ) -> Float[Tensor, "batch pos d_model"]:
        if cache is not None:
            x, cache.inner = ttt(x, cache.inner, cache.length)
            return x
        if isinstance(places.positions, slice):
            return ttt(x)[0]
        return ttt(x, texts=each_text_alone(places.positions))[0]

    def make_cache(self, batch: int, dtype: torch.dtype = torch.float32) -> TTTFlowCache:
        return TTTFlowCache(self.cfg, batch, dtype)

    @classmethod
    def table_bytes(cls, cfg: ModelConfig) -> int:
        """A cosine and a sine for every layer, position and channel that turns."""
        return 8 * cfg.n_layers * cfg.n_ctx * cast(TTTFlowConfig, cfg.ttt_flow).rotary_channels

    @classmethod
    def forward_flops(cls, cfg: ModelConfig, context: int, batch: int) -> dict[str, float]:
        """Mini-batches are counted whole: each token with all of its own, as it is computed."""
        own, d = cast(TTTFlowConfig, cfg.ttt_flow), cfg.d_model
        heads, key_values = cfg.n_heads * cfg.d_head, cfg.kv_heads * cfg.d_head
        products = {
            "bigram": own.bigram_width * d,
            "token_values": own.value_width * key_values * (own.value_layers > 0),
            "attention_projections": cfg.n_layers * d * 2 * (heads + key_values),
            "attention_mixing": cfg.n_layers * 2 * heads * (context + 1) / 2,
            "mlp": cfg.n_layers * 2 * d * cfg.d_mlp,
            "ttt_projections": own.ttt * 4 * d * d,
            "ttt_steps": own.ttt * d * (3 * d // own.ttt_heads + 2 * _mean_chunk(context, own.ttt_chunk)),
            "flow": own.flow * 2 * own.flow_width * (d + own.flow_hidden),
        }
        return {part: 2.0 * n for part, n in products.items()} | super().forward_flops(cfg, context, batch)

    @classmethod
    def activation_bytes(cls, cfg: ModelConfig, n: int, width: int) -> tuple[float, float]:
        """To a tenth: numbers a position, fitted to what autograd keeps, of which most are in matrix products' type."""
        own, d = cast(TTTFlowConfig, cfg.ttt_flow), cfg.d_model
        heads, key_values = cfg.n_heads * cfg.d_head, cfg.kv_heads * cfg.d_head
        blocks = (
            cfg.n_layers * (5.5 * d + 4.4 * (heads + key_values) + 3 * cfg.d_mlp) + 2.2 * own.exclusive_layers * heads
        )
        state = 2 * d * (d / own.ttt_heads) / own.ttt_chunk + own.ttt_chunk * own.ttt_heads
        refiners = own.ttt * (18 * d + state) + own.flow * (d + 2 * own.flow_hidden + 6 * own.flow_width)
        numbers = blocks + 13 * d + refiners
        return n * numbers * (0.37 * FLOAT32 + 0.63 * width), float(FLOAT32 * d * (n + cfg.d_vocab))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Queries, keys, values and W_in orthogonal, all that is added at first 0, the embedding N(0, 0.005²)."""
        cast(Embed, self.embed).W_E.normal_(0.0, _EMBED_STD, generator=generator)
        parts: list[Any] = [self.bigram, self.smear, self.values, *self.blocks, self.ttt, self.flow]
        for part in filter(None, parts):
            part.init_weights(generator)


def _mean_chunk(context: int, chunk: int) -> float:
    """How many tokens the mini-batch of a token has, the mean over a text."""
    whole, rest = divmod(context, chunk)
    return (whole * chunk**2 + rest**2) / context


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
        self.W_pairs.zero_()
        self.W_up.zero_()
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


def _continues(positions: Positions, device: torch.device) -> Bool[Tensor, "#batch pos"]:
    """Whether a token has one before it in its text."""
    if isinstance(positions, slice):
        return (torch.arange(positions.start, positions.stop, device=device) > 0)[None]
    return positions > 0


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
        return None if layer < self.first else self.layer_scale[layer - self.first] * values


class RefinedAttention(Attention):
    """Attention with normalised queries and keys, of which positions turn a few channels, and a gain a head.

    In the last blocks a head's output loses what lies along the position's own value (exclusive self-attention).
    """

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__(cfg, layer)
        own = cast(TTTFlowConfig, cfg.ttt_flow)
        self.is_exclusive = layer >= cfg.n_layers - own.exclusive_layers
        self.gain = nn.Parameter(torch.empty(cfg.n_heads))
        self.rotary = Rotary(cfg, own.rotary_channels, _slowed(cfg.rotary_base, cfg.n_ctx, own))
        self.hook_value = HookPoint()  # [batch, pos, kv_head, d_head], values with those of the tokens

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
        q, k = (self._turned(rms_norm(x, self.cfg.eps), places.positions) for x in (q, k))
        q, k = self.hook_rot_q(q * self.gain[:, None]), self.hook_rot_k(k)
        z = self.mix(q, k, v, places.mask) if past is None else past.mix(self, q, k, v)
        if self.is_exclusive:
            own = F.normalize(v, dim=-1).repeat_interleave(self.cfg.n_heads // self.cfg.kv_heads, dim=2)
            z = z - (z * own).sum(-1, keepdim=True) * own
        return self.output(self.hook_z(z))

    def _turned(
        self, x: Float[Tensor, "batch pos head d_head"], positions: Positions
    ) -> Float[Tensor, "batch pos head d_head"]:
        n = self.rotary.cos.shape[-1]
        return torch.cat([self.rotary(x[..., :n], positions), x[..., n:]], dim=-1)


def _slowed(base: float, n_ctx: int, own: TTTFlowConfig) -> float:
    """NTK scaling, of the longest text that a model reads, so that a turn does not depend on the text at hand."""
    n = own.rotary_channels
    return base if n_ctx <= own.rotary_context else base * (n_ctx / own.rotary_context) ** (n / (n - 2))


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


class CappedUnembed(Unembed):
    """The tied readout, its logits held between ±cap."""

    def __init__(self, model: ResidualModel, cap: float) -> None:
        super().__init__(model)
        self.cap = cap
        self.hook_logits_pre_cap = HookPoint()  # [batch, pos, d_vocab]

    def readout(self, x: Float[Tensor, "batch pos d_model"], weights: tuple[Tensor, ...]) -> Readout:
        (W_E,) = weights
        if is_hooked(self.hook_logits_pre_cap):
            unread = W_E[:, :1].expand(-1, len(W_E))  # where others have a matrix; it takes no memory
            return FormedReadout(self.hook_logits_pre_cap(x @ W_E.T), unread, None, self.cap)
        return Readout(x, W_E, None, self.cap)


class TTTFlowCache(KeyValueCache):
    """Keys and values of each block, the last token and its vector before the smear, and the inner learner's state."""

    def __init__(self, cfg: ModelConfig, batch: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(cfg, batch, dtype)
        self.last_token = torch.zeros(self.batch, dtype=torch.long, device=cfg.device)
        self.last_vector = torch.zeros(self.batch, cfg.d_model, dtype=dtype, device=cfg.device)
        self.inner: InnerState | None = None
