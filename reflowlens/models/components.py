"""The parts of a decoder block, each with its named activation points.

Points whose activations would cost memory nobody asked for (attention scores and patterns, per-head results, per-head
copies of the residual stream) are computed only when something is attached to them; the numbers are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from reflowlens.config import ModelConfig, RotaryScaling
from reflowlens.models.past import ReadPositions

ACTIVATIONS = {"gelu": F.gelu, "gelu_new": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu, "silu": F.silu}


def is_hooked(*points: HookPoint) -> bool:
    """Whether anything is attached to one of the points."""
    return any(point.fwd_hooks or point.bwd_hooks for point in points)


def through_copy(point: HookPoint, x: Tensor) -> Tensor:
    """Pass a tensor that others read too: a hook that writes in place then changes only what this point feeds."""
    return point(x.clone() if is_hooked(point) else x)


def _bias(present: bool, *shape: int) -> nn.Parameter | None:
    return nn.Parameter(torch.zeros(shape)) if present else None


def is_bias(name: str) -> bool:
    """Whether a parameter is a bias, by TransformerLens's names: ``ln1.b``, ``attn.b_Q``, ``mlp.b_in``."""
    last = name.rsplit(".", 1)[-1]
    return last == "b" or last.startswith("b_")


def wide(x: Tensor) -> Tensor:
    """In float32 at least: what sums over many entries is not left to 16 bits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def all_finite(*tensors: Tensor) -> bool:
    """Whether there is neither an infinity nor NaN; taken for granted in a compiled graph, which asking would break."""
    if torch.compiler.is_compiling() or any(x.is_meta for x in tensors):
        return True
    # One pass over the numbers; a sum that overflows sends its caller the longer way, to the same result.
    return math.isfinite(sum(x.detach().sum(dtype=torch.promote_types(x.dtype, torch.float32)) for x in tensors))


def weighted_sum(
    weights: Float[Tensor, "*batch query key"], values: Float[Tensor, "*#batch key feature"]
) -> Float[Tensor, "*batch query feature"]:
    """``weights @ values``, to which a key of weight 0 adds nothing even if its values are infinite or NaN.

    In a product they would: 0 · inf is NaN, and one position's overflow would reach the positions before it.
    """
    if all_finite(values):
        return weights @ values
    sign, infinity = wide(weights.sign()), wide(values.sign().where(values.isinf(), 0.0))
    either, balance = sign.abs() @ infinity.abs(), sign @ infinity
    unknown = sign.abs() @ values.isnan().to(sign)
    out = weights @ values.where(values.isfinite(), 0.0)
    for reached, value in ((either + balance, torch.inf), (either - balance, -torch.inf), (unknown, torch.nan)):
        out = out + torch.zeros_like(out).masked_fill(reached > 0, value)
    return out


def without_autocast(x: Tensor) -> torch.autocast:
    """Products in the types of their factors, on a tensor's device: autocast is for passes, not for what reads them."""
    return torch.autocast(x.device.type, enabled=False)


def plus(x: Tensor, bias: Tensor | None) -> Tensor:
    """Add a bias where there is one."""
    return x if bias is None else x + bias


class Norm(nn.Module):
    """LayerNorm or RMSNorm with a weight, and a bias where the configuration has one; statistics in float32 at least.

    ``hook_scale`` is the divisor [batch, pos, 1]; ``hook_normalized`` is ``(x - mean) / scale`` before the weight.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.centered = cfg.normalization_type == "LN"
        self.eps = cfg.eps
        self.w = nn.Parameter(torch.ones(cfg.d_model))
        self.b = _bias(cfg.norm_bias, cfg.d_model)
        self.hook_scale = HookPoint()
        self.hook_normalized = HookPoint()

    def forward(
        self, x: Float[Tensor, "batch pos *head d_model"], hooked: bool = True
    ) -> Float[Tensor, "batch pos *head d_model"]:
        stream = wide(x)
        if self.centered:
            stream = stream - stream.mean(-1, keepdim=True)
        scale = (stream.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()
        normalized = self.hook_normalized(stream / self.hook_scale(scale)) if hooked else stream / scale
        return plus(normalized * self.w, self.b).to(x.dtype)


Positions: TypeAlias = "slice | Int[Tensor, 'batch pos']"


class Places(NamedTuple):
    """Where the tokens of a pass stand in their texts, and which keys each may look at (None: all up to itself)."""

    positions: Positions
    mask: Bool[Tensor, "batch 1 query_pos key_pos"] | None = None


def packed_places(segments: Int[Tensor, "batch pos"]) -> Places:
    """Texts that share a row unseen by each other: one is a run of equal ids, and its positions start at 0.

    >>> packed_places(torch.tensor([[5, 5, 5, 7, 7]])).positions
    tensor([[0, 1, 2, 0, 1]])
    """
    starts = segments != segments.roll(1, dims=1)
    starts[:, 0] = True
    text = starts.cumsum(dim=1)
    index = torch.arange(segments.shape[1], device=segments.device)
    positions = index - torch.where(starts, index, 0).cummax(dim=1).values
    return Places(positions, (text[:, :, None] == text[:, None, :]).tril()[:, None])


class Rotary(nn.Module):
    """Rotary positions: channel pair i of position p turns by ``p * base ** (-2 i / d_head)`` (Su et al., 2021).

    Llama 3.1 slows the slow pairs down: see :class:`reflowlens.config.RotaryScaling`.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.adjacent = bool(cfg.rotary_adjacent_pairs)
        frequency = cfg.rotary_base ** (-torch.arange(0, cfg.d_head, 2, dtype=torch.float64, device="cpu") / cfg.d_head)
        if cfg.rotary_scaling is not None:
            frequency = scaled(frequency, cfg.rotary_scaling)
        angle = torch.outer(torch.arange(cfg.n_ctx, dtype=torch.float64, device="cpu"), frequency)
        pairs = angle.repeat_interleave(2, -1) if self.adjacent else angle.repeat(1, 2)
        self.register_buffer("cos", pairs.cos().float(), persistent=False)
        self.register_buffer("sin", pairs.sin().float(), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:
        cos, sin = self.cos, self.sin
        super()._apply(fn, recurse)
        self.cos, self.sin = cos.to(self.cos.device), sin.to(self.sin.device)  # a 16-bit model turns by exact angles
        return self

    def forward(
        self, x: Float[Tensor, "batch pos head d_head"], positions: Positions
    ) -> Float[Tensor, "batch pos head d_head"]:
        cos, sin = self.cos[positions].unsqueeze(-2), self.sin[positions].unsqueeze(-2)
        pairs = wide(x)
        if self.adjacent:
            even, odd = pairs[..., 0::2], pairs[..., 1::2]
            quarter_turn = torch.stack((-odd, even), dim=-1).flatten(-2)
        else:
            first, second = pairs.chunk(2, dim=-1)
            quarter_turn = torch.cat((-second, first), dim=-1)
        return (pairs * cos + quarter_turn * sin).to(x.dtype)


def scaled(frequency: Float[Tensor, " pair"], scaling: RotaryScaling) -> Float[Tensor, " pair"]:
    """Radians a position, divided by ``scaling.factor`` where a wavelength is long and kept where it is short."""
    turns = scaling.original_context * frequency / (2 * torch.pi)  # over the context of the pretraining
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return frequency * torch.lerp(torch.full_like(kept, 1 / scaling.factor), torch.ones_like(kept), kept.clamp(0, 1))


class Past(Protocol):
    """Keys and values that a pass attends to beside its own."""

    def mix(self, attn: Attention, q: Tensor, k: Tensor, v: Tensor) -> Float[Tensor, "batch pos head d_head"]:
        """Attention of a pass's queries to earlier positions and its own."""
        ...


class KeyValueCache(ReadPositions):
    """Keys (already rotated) and values of the positions a model has read, one pair a layer.

    Example: ``past = KeyValueCache(model.cfg, batch=1); model(tokens[:, :5], past_kv_cache=past);
    model(tokens[:, 5:6], past_kv_cache=past)`` gives the logits of position 5 alone.
    """

    def __init__(self, cfg: ModelConfig, batch: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(cfg, batch, dtype)
        shape = (self.batch, cfg.n_ctx, cfg.kv_heads, cfg.d_head)
        # Room for n_ctx positions; once a gradient may be asked for, as many as were read.
        self.keys: list[Float[Tensor, "batch room kv_head d_head"]] = [
            torch.empty(shape, dtype=dtype, device=cfg.device) for _ in range(cfg.n_layers)
        ]
        self.values = [torch.empty_like(keys) for keys in self.keys]

    @classmethod
    def sizes_for(cls, cfg: ModelConfig) -> tuple[int, ...]:
        return cfg.n_layers, cfg.n_ctx, cfg.kv_heads, cfg.d_head

    def mix(
        self,
        attn: Attention,
        q: Float[Tensor, "batch pos head d_head"],
        k: Float[Tensor, "batch pos kv_head d_head"],
        v: Float[Tensor, "batch pos kv_head d_head"],
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Attention of the new positions to all so far."""
        return attn.mix(q, *self.extend(attn.layer, k, v), mask=None)

    def extend(
        self, layer: int, k: Float[Tensor, "batch pos kv_head d_head"], v: Float[Tensor, "batch pos kv_head d_head"]
    ) -> tuple[Float[Tensor, "batch all_pos kv_head d_head"], Float[Tensor, "batch all_pos kv_head d_head"]]:
        """Store the new positions of one layer and return all of its positions so far."""
        self.keys[layer] = self._extended(self.keys[layer], k)
        self.values[layer] = self._extended(self.values[layer], v)
        end = self.length + k.shape[1]
        return self.keys[layer][:, :end].to(k.dtype), self.values[layer][:, :end].to(v.dtype)

    def _extended(
        self, kept: Float[Tensor, "batch room kv_head d_head"], new: Float[Tensor, "batch pos kv_head d_head"]
    ) -> Float[Tensor, "batch room kv_head d_head"]:
        """In place where there is room and no backward pass needs what it saved unchanged."""
        end = self.length + new.shape[1]
        if torch.is_grad_enabled() or kept.requires_grad or kept.shape[1] < end:
            return torch.cat([kept[:, : self.length], new.to(kept.dtype)], dim=1)
        kept[:, self.length : end] = new
        return kept


def _head_matrix(n_heads: int, d_model: int, d_head: int) -> nn.Parameter:
    """[n_heads, d_model, d_head], laid out in memory so that all heads are one [d_model, n_heads * d_head] matrix."""
    return nn.Parameter(torch.empty(d_model, n_heads, d_head).permute(1, 0, 2))


class Attention(nn.Module):
    """Causal self-attention, grouped-query when ``n_key_value_heads`` is smaller than ``n_heads``."""

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self.cfg, self.layer = cfg, layer
        self.W_Q = _head_matrix(cfg.n_heads, cfg.d_model, cfg.d_head)
        self.W_K = _head_matrix(cfg.kv_heads, cfg.d_model, cfg.d_head)
        self.W_V = _head_matrix(cfg.kv_heads, cfg.d_model, cfg.d_head)
        self.W_O = nn.Parameter(torch.empty(cfg.n_heads, cfg.d_head, cfg.d_model))
        self.b_Q = _bias(cfg.qkv_bias, cfg.n_heads, cfg.d_head)
        self.b_K = _bias(cfg.qkv_bias, cfg.kv_heads, cfg.d_head)
        self.b_V = _bias(cfg.qkv_bias, cfg.kv_heads, cfg.d_head)
        self.b_O = _bias(cfg.attn_out_bias, cfg.d_model)
        self.hook_q_input = HookPoint()  # [batch, pos, head, d_model], before ln1
        self.hook_k_input = HookPoint()  # [batch, pos, kv_head, d_model], before ln1
        self.hook_v_input = HookPoint()  # [batch, pos, kv_head, d_model], before ln1
        self.hook_q = HookPoint()  # [batch, pos, head, d_head]
        self.hook_k = HookPoint()  # [batch, pos, kv_head, d_head]
        self.hook_v = HookPoint()  # [batch, pos, kv_head, d_head]
        if cfg.positional_embedding_type == "rotary":
            self.rotary = Rotary(cfg)
            self.hook_rot_q = HookPoint()  # [batch, pos, head, d_head]
            self.hook_rot_k = HookPoint()  # [batch, pos, kv_head, d_head]
        self.hook_attn_scores = HookPoint()  # [batch, head, query_pos, key_pos], -inf where not allowed
        self.hook_pattern = HookPoint()  # [batch, head, query_pos, key_pos]
        self.hook_z = HookPoint()  # [batch, pos, head, d_head]
        self.hook_result = HookPoint()  # [batch, pos, head, d_model]

    def forward(
        self, resid: Float[Tensor, "batch pos d_model"], ln1: Norm, places: Places, past: Past | None
    ) -> Float[Tensor, "batch pos d_model"]:
        q, k, v = self.queries_keys_values(resid, ln1)
        if self.cfg.positional_embedding_type == "rotary":
            q = self.hook_rot_q(self.rotary(q, places.positions))
            k = self.hook_rot_k(self.rotary(k, places.positions))
        mixed = self.mix(q, k, v, places.mask) if past is None else past.mix(self, q, k, v)
        return self.output(self.hook_z(mixed))

    def output(self, z: Float[Tensor, "batch pos head d_head"]) -> Float[Tensor, "batch pos d_model"]:
        """What the heads add to the residual stream."""
        if is_hooked(self.hook_result):
            return plus(self.hook_result(torch.einsum("bphe,hed->bphd", z, self.W_O)).sum(dim=2), self.b_O)
        return plus(z.flatten(2) @ rearrange(self.W_O, "head d_head d_model -> (head d_head) d_model"), self.b_O)

    def queries_keys_values(
        self, resid: Float[Tensor, "batch pos d_model"], ln1: Norm
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values; from per-head copies of the residual stream where one of those is hooked."""
        x = ln1(resid)
        q = plus(self._project(x, self.W_Q, self.hook_q_input, resid, ln1), self.b_Q)
        k = plus(self._project(x, self.W_K, self.hook_k_input, resid, ln1), self.b_K)
        v = plus(self._project(x, self.W_V, self.hook_v_input, resid, ln1), self.b_V)
        return self.hook_q(q), self.hook_k(k), self.hook_v(v)

    def _project(
        self,
        x: Float[Tensor, "batch pos d_model"],
        W: Float[Tensor, "head d_model d_head"],
        fork: HookPoint,
        resid: Float[Tensor, "batch pos d_model"],
        ln1: Norm,
    ) -> Float[Tensor, "batch pos head d_head"]:
        if not is_hooked(fork):
            return (x @ rearrange(W, "head d_model d_head -> d_model (head d_head)")).unflatten(-1, W.shape[::2])
        copies = fork(resid.unsqueeze(2).repeat(1, 1, W.shape[0], 1))
        # What ln1's own points made of the stream is x, and they run once: an edited copy adds what it changes.
        change = ln1(copies, hooked=False) - ln1(resid, hooked=False).unsqueeze(2)
        return torch.einsum("bphd,hde->bphe", x.unsqueeze(2) + change, W)

    def mix(
        self,
        q: Float[Tensor, "batch pos head d_head"],
        k: Float[Tensor, "batch all_pos kv_head d_head"],
        v: Float[Tensor, "batch all_pos kv_head d_head"],
        mask: Bool[Tensor, "batch 1 query_pos key_pos"] | None,
    ) -> Float[Tensor, "batch pos head d_head"]:
        """softmax(q kᵀ / √d_head) v over the positions up to each query's own, or those that the mask allows."""
        q, k, v = (rearrange(x, "batch pos head d_head -> batch head pos d_head") for x in (q, k, v))
        new, total = q.shape[2], k.shape[2]
        if is_hooked(self.hook_attn_scores, self.hook_pattern) or (new > 1 and not all_finite(k, v)):
            allowed = _causal(new, total, q.device) if mask is None else mask
            group = self.cfg.n_heads // self.cfg.kv_heads
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
            scores = wide(q @ k.transpose(-1, -2)) / self.cfg.d_head**0.5
            scores = scores.masked_fill(~allowed, float("-inf"))
            pattern = self.hook_pattern(self.hook_attn_scores(scores).softmax(dim=-1))
            z = weighted_sum(pattern.to(v.dtype), v)
        else:
            if mask is None and new not in (1, total):
                mask = _causal(new, total, q.device)
            grouped = self.cfg.kv_heads != self.cfg.n_heads
            z = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None and new > 1, enable_gqa=grouped
            )
        return rearrange(z, "batch head pos d_head -> batch pos head d_head")


def _causal(new: int, total: int, device: torch.device) -> Tensor:
    """[new, total] mask, True where one of the last ``new`` positions may look."""
    return torch.ones(new, total, dtype=torch.bool, device=device).tril(total - new)


class MLP(nn.Module):
    """``act(x W_in) W_out``."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.act = ACTIVATIONS[cfg.act_fn]
        self.W_in = nn.Parameter(torch.empty(cfg.d_model, cfg.d_mlp))
        self.W_out = nn.Parameter(torch.empty(cfg.d_mlp, cfg.d_model))
        self.b_in = _bias(cfg.mlp_bias, cfg.d_mlp)
        self.b_out = _bias(cfg.mlp_bias, cfg.d_model)
        self.hook_pre = HookPoint()  # [batch, pos, d_mlp]
        self.hook_post = HookPoint()  # [batch, pos, d_mlp]

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        return plus(self.hook_post(self.act(self.hook_pre(plus(x @ self.W_in, self.b_in)))) @ self.W_out, self.b_out)


class GatedMLP(nn.Module):
    """``(act(x W_gate) * x W_in) W_out``: SwiGLU when the activation is SiLU (Shazeer, 2020)."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.act = ACTIVATIONS[cfg.act_fn]
        self.W_gate = nn.Parameter(torch.empty(cfg.d_model, cfg.d_mlp))
        self.W_in = nn.Parameter(torch.empty(cfg.d_model, cfg.d_mlp))
        self.W_out = nn.Parameter(torch.empty(cfg.d_mlp, cfg.d_model))
        self.b_gate = _bias(cfg.mlp_bias, cfg.d_mlp)
        self.b_in = _bias(cfg.mlp_bias, cfg.d_mlp)
        self.b_out = _bias(cfg.mlp_bias, cfg.d_model)
        self.hook_pre = HookPoint()  # [batch, pos, d_mlp], x W_gate
        self.hook_pre_linear = HookPoint()  # [batch, pos, d_mlp], x W_in
        self.hook_post = HookPoint()  # [batch, pos, d_mlp], their product after the activation

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        gate = self.hook_pre(plus(x @ self.W_gate, self.b_gate))
        linear = self.hook_pre_linear(plus(x @ self.W_in, self.b_in))
        return plus(self.hook_post(self.act(gate) * linear) @ self.W_out, self.b_out)


class Block(nn.Module):
    """A pre-norm block: attention, then the MLP, each added to the residual stream."""

    hook_out_is_single_residual_stream = True  # what TransformerLens's logit lens asks of a block

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self.ln1 = Norm(cfg)
        self.attn = Attention(cfg, layer)
        self.ln2 = Norm(cfg)
        self.mlp = GatedMLP(cfg) if cfg.gated_mlp else MLP(cfg)
        self.hook_mlp_in = HookPoint()
        self.hook_resid_pre = HookPoint()
        self.hook_attn_out = HookPoint()
        self.hook_resid_mid = HookPoint()
        self.hook_mlp_out = HookPoint()
        self.hook_resid_post = HookPoint()

    def forward(
        self, resid: Float[Tensor, "batch pos d_model"], places: Places, past: Past | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        return self.feed(self.attend(resid, places, past))

    def attend(
        self, resid: Float[Tensor, "batch pos d_model"], places: Places, past: Past | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """The attention half: ``resid_pre`` to ``resid_mid``."""
        resid = self.hook_resid_pre(resid)
        return self.hook_resid_mid(resid + self.hook_attn_out(self.attn(resid, self.ln1, places, past)))

    def feed(self, resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """The MLP half: ``resid_mid`` to ``resid_post``."""
        return self.hook_resid_post(
            resid + self.hook_mlp_out(self.mlp(self.ln2(through_copy(self.hook_mlp_in, resid))))
        )
