"""BDH, the Dragon Hatchling (Kosowski et al., 2025, arXiv 2509.26507): linear attention of sparse positive neurons.

A level reads the residual stream x through rectified neurons twice. The first reading, ``x_sparse``, is query and key
at once: a position attends to those *before* it by how alike their turned neurons are, without softmax or scale. What
it finds is read by the second rectified map, ``y_sparse``, and the product of both readings writes to the stream::

    x_sparse = relu(x Dx)                                     [head, neuron]
    a_t      = Σ_{s<t} <R_t x_sparse_t, R_s x_sparse_s> x_s     R_t: rotary turn of position t
    y_sparse = relu(LN(a) Dy)
    x        = LN(x + LN((x_sparse ⊙ y_sparse) E))

Dx, Dy and E are shared by all levels; LN has neither weight nor bias. The sum over s is computed as a square, in
chunks, or from the state ρ = Σ_s R_s x_sparse_sᵀ x_s that generation keeps (:mod:`reflowlens.models.linear_attention`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar, Protocol, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from reflowlens.config import ModelConfig
from reflowlens.errors import ReflowlensError
from reflowlens.models.architecture import FLOAT32
from reflowlens.models.hooking import AXES
from reflowlens.models.linear_attention import Alikeness, attend_in_chunks, chunks_are_cheaper
from reflowlens.models.numerics import weighted_sum, wide
from reflowlens.models.parts import HookPoint, Norm, is_hooked
from reflowlens.models.past import ReadPositions
from reflowlens.models.places import Places, Positions
from reflowlens.models.products import products
from reflowlens.models.residual import Embed, OwnUnembed, ResidualModel

_NEURONS = ("batch", "pos", "head", "neuron")
_PER_HEAD = ("batch", "pos", "head", "d_model")


class BDH(ResidualModel):
    """The architecture; ``cfg.d_mlp`` neurons a level in ``cfg.n_heads`` heads, ``cfg.n_layers`` levels.

    The last level leaves the stream normalised, so that logits are read off it as it is, and off every earlier level
    too: ``ln_final`` changes nothing. ``hook_embed`` is the embedding before its norm.

    Example:
        >>> from reflowlens.config import ModelConfig
        >>> from reflowlens.models import build_model
        >>> tiny = ModelConfig(architecture="bdh", n_layers=2, d_model=16, n_heads=2, d_head=32, d_mlp=64, d_vocab=256,
        ...                    n_ctx=64, tie_word_embeddings=False, tokenizer_name="bytes")
        >>> logits, cache = build_model(tiny).run_with_cache("To be")
        >>> cache["xy_sparse", 1].shape, bool((cache["xy_sparse", 1][0, 0] == 0).all())
        (torch.Size([1, 5, 2, 32]), True)
    """

    point_axes = AXES | {
        **dict.fromkeys(("hook_x_pre", "hook_x_sparse", "hook_y_pre", "hook_y_sparse", "hook_xy_sparse"), _NEURONS),
        **dict.fromkeys(("hook_attn_out", "hook_attn_norm"), _PER_HEAD),
    }

    stages = "levels"
    units: ClassVar[Mapping[str, str | None]] = {
        "hook_x_sparse": None,
        "hook_y_sparse": None,
        "hook_xy_sparse": "neurons.W_out",
    }
    blocks_share_weights = True

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__(cfg)
        self.build_embedding(cfg)
        self.hook_embed = HookPoint()
        self.neurons = Neurons(cfg)
        self.blocks = nn.ModuleList([Level(cfg, layer, self._shared) for layer in range(cfg.n_layers)])
        self.ln_final = cast(Norm, Unnormalised(cfg))
        self.setup()

    def build_embedding(self, cfg: ModelConfig) -> None:
        self.embed = Embed(cfg)
        self.unembed = OwnUnembed(self)

    def _shared(self) -> Neurons:
        return self.neurons

    def embed_tokens(
        self, tokens: Int[Tensor, "batch pos"], weights: tuple[Tensor, ...], positions: Positions
    ) -> Float[Tensor, "batch pos d_model"]:
        return self.first_stream(super().embed_tokens(tokens, weights, positions))

    def first_stream(self, embedding: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """What the first level reads of an embedding."""
        return normalized(embedding, self.cfg.eps)

    @classmethod
    def forward_flops(cls, cfg: ModelConfig, context: int, batch: int) -> dict[str, float]:
        """Attention in its square form: a position is compared with those before it, (context - 1) / 2 of them."""
        before = (context - 1) / 2
        levels = {
            "attention_mixing": 2.0 * cfg.n_layers * (cfg.d_mlp + cfg.n_heads * cfg.d_model) * before,
            "neurons": 2.0 * cfg.n_layers * 3 * cfg.d_model * cfg.d_mlp,
        }
        return levels | super().forward_flops(cfg, context, batch)

    @classmethod
    def activation_bytes(cls, cfg: ModelConfig, n: int, width: int) -> tuple[float, float]:
        """Both rectified readings, the turned neurons and the product of both, one more where some are dropped; a
        head's find with its norm, and the stream. Scores and tables of angles, which depend on how the positions are
        cut into texts, are left out: together a few percent.
        """
        neurons = cfg.d_mlp * width * (4 + (cfg.dropout > 0))
        narrow = cfg.d_model * (cfg.n_heads * (FLOAT32 + 2 * width) + 3 * FLOAT32 + width)
        model = n * (cfg.n_layers * (neurons + narrow) + FLOAT32 * 2 * cfg.d_model)
        return float(model), float(FLOAT32 * cfg.d_model * (n + cfg.d_vocab))

    def make_cache(self, batch: int, dtype: torch.dtype = torch.float32) -> RecurrentState:
        return RecurrentState(self.cfg, batch, dtype)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Every matrix N(0, initializer_range²)."""
        for parameter in self.parameters():
            parameter.normal_(0.0, self.cfg.initializer_range, generator=generator)


class Neurons(nn.Module):
    """The three matrices that all levels share, and the turn of a position."""

    frequency: Tensor

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        shape = (cfg.n_heads, cfg.d_model, cfg.d_head)
        self.W_x = nn.Parameter(torch.empty(shape))  # Dx
        self.W_y = nn.Parameter(torch.empty(shape))  # Dy
        self.W_out = nn.Parameter(torch.empty(cfg.n_heads, cfg.d_head, cfg.d_model))  # E, a row a neuron
        exponent = torch.arange(0, cfg.d_head, 2, device="cpu", dtype=torch.float32) / cfg.d_head
        frequency = 1 / cfg.rotary_base**exponent / (2 * torch.pi)
        self.register_buffer("frequency", frequency, persistent=False)  # turns a position, of each pair of channels

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Neurons:
        frequency = self.frequency
        super()._apply(fn, recurse)
        self.frequency = frequency.to(self.frequency.device)  # a 16-bit model turns by exact angles
        return self

    def turn(
        self, x_sparse: Float[Tensor, "batch pos head neuron"], positions: Positions
    ) -> Float[Tensor, "head batch pos neuron"]:
        """Each pair of adjacent channels rotated by its phase at the position; phases are float32, as published."""
        x = rearrange(x_sparse, "batch pos head neuron -> head batch pos neuron")
        if isinstance(positions, slice):
            positions = torch.arange(positions.start, positions.stop, device=x.device)[None]
        phase = (positions[..., None].float() * self.frequency).frac() * (2 * torch.pi)
        cos, sin, pairs = phase.cos(), phase.sin(), wide(x).unflatten(-1, (-1, 2))
        if torch.compiler.is_compiling():  # which makes one pass of these, and knows no complex numbers
            even, odd = pairs.unbind(-1)
            turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
        else:
            turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.complex(cos, sin))
        return turned.flatten(-2).to(x.dtype)


class Level(nn.Module):
    """One level: attention between neurons, their second reading, and the write."""

    hook_out_is_single_residual_stream = True  # what TransformerLens's logit lens asks of a block

    def __init__(self, cfg: ModelConfig, layer: int, neurons: Callable[[], Neurons]) -> None:
        super().__init__()
        self.cfg, self.layer = cfg, layer
        self.neurons = neurons
        self.hook_resid_pre = HookPoint()  # [batch, pos, d_model]
        self.hook_x_pre = HookPoint()  # [batch, pos, head, neuron]
        self.hook_x_sparse = HookPoint()  # [batch, pos, head, neuron]
        self.hook_attn_scores = HookPoint()  # [batch, head, query_pos, key_pos], 0 where not allowed
        self.hook_attn_out = HookPoint()  # [batch, pos, head, d_model]
        self.hook_attn_norm = HookPoint()  # [batch, pos, head, d_model]
        self.hook_y_pre = HookPoint()  # [batch, pos, head, neuron]
        self.hook_y_sparse = HookPoint()  # [batch, pos, head, neuron]
        self.hook_xy_sparse = HookPoint()  # [batch, pos, head, neuron]
        self.hook_mlp_out = HookPoint()  # [batch, pos, d_model], before its norm
        self.hook_resid_post = HookPoint()  # [batch, pos, d_model]

    def forward(
        self, resid: Float[Tensor, "batch pos d_model"], places: Places, past: Past | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        neurons, eps = self.neurons(), self.cfg.eps
        x = self.hook_resid_pre(resid)
        x_pre = per_head(x[:, :, None], neurons.W_x)
        x_sparse = self.hook_x_sparse(F.relu(self.hook_x_pre(x_pre)))
        turned = neurons.turn(x_sparse, places.positions)
        found = rearrange(self.attend(turned, x, places.mask, past), "head batch pos d_model -> batch pos head d_model")
        a = self.hook_attn_norm(normalized(self.hook_attn_out(found), eps))
        y_sparse = self.hook_y_sparse(F.relu(self.hook_y_pre(per_head(a, neurons.W_y))))
        xy_sparse = F.dropout(self.hook_xy_sparse(x_sparse * y_sparse), self.cfg.dropout, self.training)
        out = self.hook_mlp_out(per_head(xy_sparse, neurons.W_out).sum(dim=2))
        return self.hook_resid_post(self.write(x, out))

    def write(
        self, x: Float[Tensor, "*#batch d_model"], out: Float[Tensor, "*#batch d_model"]
    ) -> Float[Tensor, "*#batch d_model"]:
        """The stream after the level, from what it read and what came out of it."""
        return normalized(x + normalized(out, self.cfg.eps), self.cfg.eps)

    def keys(
        self, x: Float[Tensor, "batch pos d_model"], positions: Positions
    ) -> Float[Tensor, "head batch pos neuron"]:
        """What later positions compare themselves with."""
        neurons = self.neurons()
        return neurons.turn(F.relu(per_head(x[:, :, None], neurons.W_x)), positions)

    def attend(
        self,
        q: Float[Tensor, "head batch pos neuron"],
        x: Float[Tensor, "batch pos d_model"],
        mask: Bool[Tensor, "batch 1 query_pos key_pos"] | None,
        past: Past | None,
    ) -> Float[Tensor, "head batch pos d_model"]:
        """Σ of x over the positions before each, weighted by how alike the turned neurons are; 0 at the first."""
        hooked = is_hooked(self.hook_attn_scores)
        if past is not None:
            if hooked:
                raise ReflowlensError(
                    "attn_scores exist where the whole text is read at once: pass no past_kv_cache to hook them"
                )
            return past.attend(self.layer, q.transpose(0, 1), x).transpose(0, 1)
        if not hooked and mask is None and chunks_are_cheaper(q.shape[2], q.shape[3], x.shape[2]):
            return attend_in_chunks(q.transpose(0, 1), x, chunk=x.shape[2])[0].transpose(0, 1)
        scores = Alikeness.apply(q).tril(-1).transpose(0, 1)
        if mask is not None:
            scores = scores.masked_fill(~mask, 0.0)
        return weighted_sum(self.hook_attn_scores(scores).transpose(0, 1), x)


def per_head(
    x: Float[Tensor, "batch pos head_or_1 rows"], weight: Float[Tensor, "head rows columns"]
) -> Float[Tensor, "batch pos head columns"]:
    """Each head's matrix times its part of ``x``.

    In memory the heads stay outermost, as the matrix products leave them: whatever follows keeps that order, and
    nothing as large as the neurons is ever copied into another (an einsum would, and copy the weights for each byte).
    """
    out = products(rearrange(x, "batch pos head rows -> head (batch pos) rows"), weight)
    return rearrange(out, "head (batch pos) columns -> batch pos head columns", batch=len(x))


class Past(Protocol):
    """What positions attend to before those of the pass."""

    def attend(
        self, layer: int, q: Float[Tensor, "batch head pos neuron"], x: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch head pos d_model"]:
        """Attention of a pass's positions to earlier ones and among themselves."""
        ...


class RecurrentState(ReadPositions):
    """ρ of every level, Σ_s R_s x_sparse_sᵀ x_s over the positions that were read: its size does not grow with them.

    Example: ``past = model.make_cache(1); model("To b", past_kv_cache=past); model("e", past_kv_cache=past)`` gives the
    logits of the last byte alone.
    """

    def __init__(self, cfg: ModelConfig, batch: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(cfg, batch, dtype)
        shape = (self.batch, cfg.n_heads, cfg.d_head, cfg.d_model)
        self.states: list[Float[Tensor, "batch head neuron d_model"]] = [
            torch.zeros(shape, dtype=dtype, device=cfg.device) for _ in range(cfg.n_layers)
        ]

    @classmethod
    def sizes_for(cls, cfg: ModelConfig) -> tuple[int, ...]:
        return cfg.n_layers, cfg.n_heads, cfg.d_head, cfg.d_model  # whatever n_ctx is

    def attend(
        self, layer: int, q: Float[Tensor, "batch head pos neuron"], x: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch head pos d_model"]:
        """Attention of the new positions of a level to all before them; they are read into the state."""
        state = self.states[layer]
        out, self.states[layer] = attend_in_chunks(q, x, chunk=x.shape[2], state=state)
        return out


def normalized(x: Float[Tensor, "*batch d_model"], eps: float) -> Float[Tensor, "*batch d_model"]:
    """LayerNorm without weight and bias, in float32 at least, and left in it under autocast; of a vector of zeros 0."""
    normal = F.layer_norm(wide(x), x.shape[-1:], eps=eps)
    return normal if torch.is_autocast_enabled(x.device.type) else normal.to(x.dtype)


class Unnormalised(nn.Module):
    """Stands where other models have their final norm, of weight ``w`` 1: this stream is read as it is."""

    w: Tensor

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.register_buffer("w", torch.ones(cfg.d_model), persistent=False)

    def forward(self, x: Float[Tensor, "*batch d_model"], hooked: bool = True) -> Float[Tensor, "*batch d_model"]:
        return x
