"""Causal softmax attention with rotary or learned positions, and its key-value cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from reflowlens.config import ModelConfig
from reflowlens.decoder_options import RotaryScaling
from reflowlens.models.loss import capped
from reflowlens.models.numerics import all_finite, weighted_sum, wide
from reflowlens.models.parts import HookPoint, Norm, bias, is_hooked, plus, through_copy
from reflowlens.models.past import ReadPositions
from reflowlens.models.places import Places, Positions
from reflowlens.models.products import product


class Rotary(nn.Module):
    """Rotary positions: channel pair i of position p turns by ``p * base ** (-2 i / d_head)`` (Su et al., 2021).

    Llama 3.1 slows the slow pairs down: see :class:`reflowlens.config.RotaryScaling`.

    Attributes:
        cos, sin: [n_ctx, 1, n] of each position's angles, for all heads; ``sin`` negative at a pair's first channel.

    Args:
        n_channels: of a head that turn, the first ones, where they are not the configuration's ``rotary_dim``.
        base: θ, where it is not the configuration's ``rotary_base``; such angles are not rescaled.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, cfg: ModelConfig, n_channels: int | None = None, base: float | None = None) -> None:
        super().__init__()
        self.adjacent = bool(cfg.rotary_adjacent_pairs)
        n = n_channels or cfg.rotary_dim or cfg.d_head
        frequency = (base or cfg.rotary_base) ** (-torch.arange(0, n, 2, dtype=torch.float64, device="cpu") / n)
        if cfg.rotary_scaling is not None and base is None:
            frequency = scaled(frequency, cfg.rotary_scaling)
        if base is None:
            frequency = frequency / cfg.rotary_linear_factor
        angle = torch.outer(torch.arange(cfg.n_ctx, dtype=torch.float64, device="cpu"), frequency)
        pairs = angle.repeat_interleave(2, -1) if self.adjacent else angle.repeat(1, 2)
        is_first = torch.arange(n, device="cpu") % 2 == 0 if self.adjacent else torch.arange(n, device="cpu") < n // 2
        self.register_buffer("cos", pairs.cos().float()[:, None], persistent=False)
        self.register_buffer("sin", torch.where(is_first, -1, 1) * pairs.sin().float()[:, None], persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:
        cos, sin = self.cos, self.sin
        super()._apply(fn, recurse)
        self.cos, self.sin = cos.to(self.cos.device), sin.to(self.sin.device)  # a 16-bit model turns by exact angles
        return self

    def forward(
        self, x: Float[Tensor, "batch pos head d_head"], positions: Positions
    ) -> Float[Tensor, "batch pos head d_head"]:
        n = self.cos.shape[-1]
        if n < x.shape[-1]:
            return torch.cat([self(x[..., :n], positions), x[..., n:]], dim=-1)
        pairs = wide(x)
        swapped = pairs.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) if self.adjacent else pairs.roll(n // 2, -1)
        return (pairs * self.cos[positions] + swapped * self.sin[positions]).to(x.dtype)


def scaled(frequency: Float[Tensor, " pair"], scaling: RotaryScaling) -> Float[Tensor, " pair"]:
    """Radians per position: divided by ``scaling.factor`` for long wavelengths, unchanged for short ones."""
    turns = scaling.original_context * frequency / (2 * torch.pi)  # over the context of the pretraining
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return frequency * torch.lerp(torch.full_like(kept, 1 / scaling.factor), torch.ones_like(kept), kept.clamp(0, 1))


class Past(Protocol):
    """Earlier keys and values that a pass attends to beside its own."""

    def mix(self, attn: Attention, q: Tensor, k: Tensor, v: Tensor) -> Float[Tensor, "batch pos head d_head"]:
        """Attention of a pass's queries to earlier positions and its own."""
        ...


class KeyValueCache(ReadPositions):
    """Keys (already rotated) and values of the positions that a model has read, a pair per layer.

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
    ) -> Float[Tensor, "batch new_room kv_head d_head"]:
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
        self.cfg, self.layer, self.window = cfg, layer, cfg.window_of(layer)
        self.W_Q = _head_matrix(cfg.n_heads, cfg.d_model, cfg.d_head)
        self.W_K = _head_matrix(cfg.kv_heads, cfg.d_model, cfg.d_head)
        self.W_V = _head_matrix(cfg.kv_heads, cfg.d_model, cfg.d_head)
        self.W_O = nn.Parameter(torch.empty(cfg.n_heads, cfg.d_head, cfg.d_model))
        self.b_Q = bias(cfg.qkv_bias, cfg.n_heads, cfg.d_head)
        self.b_K = bias(cfg.qkv_bias, cfg.kv_heads, cfg.d_head)
        self.b_V = bias(cfg.qkv_bias, cfg.kv_heads, cfg.d_head)
        self.b_O = bias(cfg.attn_out_bias, cfg.d_model)
        # [batch, pos, head, d_model], before ln1: of heads that have keys and values of their own
        self.hook_attn_in = HookPoint() if cfg.kv_heads == cfg.n_heads else None
        self.hook_q_input = HookPoint()  # [batch, pos, head, d_model], before ln1
        self.hook_k_input = HookPoint()  # [batch, pos, kv_head, d_model], before ln1
        self.hook_v_input = HookPoint()  # [batch, pos, kv_head, d_model], before ln1
        self.hook_q = HookPoint()  # [batch, pos, head, d_head]
        self.hook_k = HookPoint()  # [batch, pos, kv_head, d_head]
        self.hook_v = HookPoint()  # [batch, pos, kv_head, d_head]
        self.divisor = cfg.attn_scale or cfg.d_head**0.5  # of scores
        self.q_norm: Norm | None = None
        self.k_norm: Norm | None = None
        self.rotary: Rotary | None = None
        if cfg.use_qk_norm:
            n_q, n_k = (cfg.n_heads, cfg.kv_heads) if cfg.qk_norm_over_heads else (1, 1)
            self.q_norm, self.k_norm = Norm(cfg, n_q * cfg.d_head), Norm(cfg, n_k * cfg.d_head)
        if cfg.positional_embedding_type == "rotary":
            base = None if self.window is None else cfg.rotary_base_local
            self.rotary = Rotary(cfg, base=base) if cfg.turns(layer) else None
            self.hook_rot_q = HookPoint()  # [batch, pos, head, d_head]
            self.hook_rot_k = HookPoint()  # [batch, pos, kv_head, d_head]
        self.hook_attn_scores = HookPoint()  # [batch, head, query_pos, key_pos], -inf where not allowed
        self.hook_pattern = HookPoint()  # [batch, head, query_pos, key_pos]
        self.hook_z = HookPoint()  # [batch, pos, head, d_head]
        self.hook_result = HookPoint()  # [batch, pos, head, d_model]

    def forward(
        self, resid: Float[Tensor, "batch pos d_model"], ln1: Norm, places: Places, past: Past | None
    ) -> Float[Tensor, "batch mixed_pos d_model"]:
        """``mixed_pos`` is ``pos``, unless ``past`` has queries of its own: a sweep reads anew only what differs."""
        q, k, v = self.queries_keys_values(resid, ln1)
        q, k = self.placed(q, k, places.positions)
        mixed = self.mix(q, k, v, places.mask) if past is None else past.mix(self, q, k, v)
        return self.output(self.hook_z(mixed))

    def placed(
        self,
        q: Float[Tensor, "batch pos head d_head"],
        k: Float[Tensor, "batch pos kv_head d_head"],
        positions: Positions,
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys as scores are products of them: normalised where the model does so, and turned."""
        if self.q_norm is not None:
            q = self._normalised(self.q_norm, q)
        if self.cfg.positional_embedding_type == "rotary":
            q = self.hook_rot_q(q if self.rotary is None else self.rotary(q, positions))
        return q, self._placed_keys(k, positions)

    def _placed_keys(
        self, k: Float[Tensor, "batch pos kv_head d_head"], positions: Positions
    ) -> Float[Tensor, "batch pos kv_head d_head"]:
        if self.k_norm is not None:
            k = self._normalised(self.k_norm, k)
        if self.cfg.positional_embedding_type == "rotary":
            k = self.hook_rot_k(k if self.rotary is None else self.rotary(k, positions))
        return k

    def keys_values(
        self, resid: Float[Tensor, "batch pos d_model"], ln1: Norm, positions: Positions
    ) -> tuple[Float[Tensor, "batch pos kv_head d_head"], Float[Tensor, "batch pos kv_head d_head"]]:
        """Keys, placed, and values of positions that do not ask; what forks the stream for one of them is not seen."""
        x = ln1(resid)
        k, v = (product(x, _as_matrix(W)).unflatten(-1, W.shape[::2]) for W in (self.W_K, self.W_V))
        return self._placed_keys(self.hook_k(plus(k, self.b_K)), positions), self.hook_v(plus(v, self.b_V))

    def _normalised(self, norm: Norm, x: Float[Tensor, "batch pos head d_head"]) -> Tensor:
        """Each head alone, or all of them as one vector."""
        return norm(x.flatten(2)).view_as(x) if self.cfg.qk_norm_over_heads else norm(x)

    def output(self, z: Float[Tensor, "batch pos head d_head"]) -> Float[Tensor, "batch pos d_model"]:
        """What the heads add to the residual stream."""
        if is_hooked(self.hook_result):
            return plus(self.hook_result(torch.einsum("bphe,hed->bphd", z, self.W_O)).sum(dim=2), self.b_O)
        return plus(product(z.flatten(2), self.W_O.flatten(0, 1)), self.b_O)

    def queries_keys_values(
        self, resid: Float[Tensor, "batch pos d_model"], ln1: Norm
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values; from per-head copies of the residual stream where one of those is hooked."""
        x, copies = ln1(resid), None
        if self.hook_attn_in is not None and is_hooked(self.hook_attn_in):
            copies = self.hook_attn_in(resid.unsqueeze(2).repeat(1, 1, self.cfg.n_heads, 1))
        q = plus(self._project(x, self.W_Q, self.hook_q_input, resid, copies, ln1), self.b_Q)
        k = plus(self._project(x, self.W_K, self.hook_k_input, resid, copies, ln1), self.b_K)
        v = plus(self._project(x, self.W_V, self.hook_v_input, resid, copies, ln1), self.b_V)
        return self.hook_q(q), self.hook_k(k), self.hook_v(v)

    def _project(
        self,
        x: Float[Tensor, "batch pos d_model"],
        W: Float[Tensor, "head d_model d_head"],
        fork: HookPoint,
        resid: Float[Tensor, "batch pos d_model"],
        copies: Float[Tensor, "batch pos head d_model"] | None,
        ln1: Norm,
    ) -> Float[Tensor, "batch pos head d_head"]:
        if copies is None:
            if not is_hooked(fork):
                return product(x, _as_matrix(W)).unflatten(-1, W.shape[::2])
            copies = resid.unsqueeze(2).expand(-1, -1, W.shape[0], -1)
        copies = through_copy(fork, copies)
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
        """softmax(q kᵀ / √d_head) v over the positions up to each query's own, or those that the mask allows.

        Of them a layer with a window sees the last. In training some entries of the pattern are dropped, and scores are
        scaled and capped, as the configuration says.
        """
        dropped = self.cfg.dropout if self.training else 0.0
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [batch, head, pos, d_head]
        new, total = q.shape[2], k.shape[2]
        mask = self._near(new, total, mask, q.device)
        scale, cap = self.cfg.attn_scale, self.cfg.attn_scores_soft_cap
        hidden = new > 1 or mask is not None  # whether there are keys that a query must not see
        if is_hooked(self.hook_attn_scores, self.hook_pattern) or cap is not None or (hidden and not all_finite(k, v)):
            pattern = self.hook_pattern(self.hook_attn_scores(self._scores(q, k, mask)).softmax(dim=-1))
            v = v.repeat_interleave(self.cfg.n_heads // self.cfg.kv_heads, dim=1)
            z = weighted_sum(F.dropout(pattern.to(v.dtype), dropped), v)
        else:
            if mask is None and new not in (1, total):
                mask = _causal(new, total, q.device)
            grouped = self.cfg.kv_heads != self.cfg.n_heads
            z = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                dropout_p=dropped,
                is_causal=mask is None and new > 1,
                scale=None if scale is None else 1 / scale,
                enable_gqa=grouped,
            )
        return z.transpose(1, 2)

    def pattern_of(
        self, q: Float[Tensor, "batch pos head d_head"], k: Float[Tensor, "batch pos kv_head d_head"]
    ) -> Float[Tensor, "batch head pos pos"]:
        """The pattern of queries and keys of whole texts, whatever is attached to the model."""
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        return self._scores(q, k, self._near(q.shape[2], k.shape[2], None, q.device)).softmax(dim=-1)

    def _near(
        self, new: int, total: int, mask: Bool[Tensor, "batch 1 query_pos key_pos"] | None, device: torch.device
    ) -> Tensor | None:
        """Which keys a query may see, by the layer's window too; None: all up to its own position."""
        if self.window is None or total <= self.window:
            return mask
        near = _causal(new, total, device).triu(total - new - self.window + 1)
        return near if mask is None else mask & near

    def _scores(
        self,
        q: Float[Tensor, "batch head query_pos d_head"],
        k: Float[Tensor, "batch kv_head key_pos d_head"],
        mask: Tensor | None,
    ) -> Float[Tensor, "batch head query_pos key_pos"]:
        """Scaled and capped products, -inf where a key may not be seen."""
        allowed = _causal(q.shape[2], k.shape[2], q.device) if mask is None else mask
        k = k.repeat_interleave(self.cfg.n_heads // self.cfg.kv_heads, dim=1)
        scores = capped(wide(q @ k.transpose(-1, -2)) / self.divisor, self.cfg.attn_scores_soft_cap)
        return scores.masked_fill(~allowed, float("-inf"))


def _causal(new: int, total: int, device: torch.device) -> Tensor:
    """[new, total] mask, True where one of the last ``new`` positions may look."""
    return torch.ones(new, total, dtype=torch.bool, device=device).tril(total - new)


def _as_matrix(W: Float[Tensor, "head d_model d_head"]) -> Float[Tensor, "d_model head_and_d_head"]:
    """The heads' matrices side by side: a view, see :func:`_head_matrix`."""
    return W.transpose(0, 1).flatten(1)
