"""TTT-Linear with a FlowRefiner: a small decoder whose last step learns from the text that it reads.

From the bottom up, every RMSNorm without weights::

    x    = RMSNorm(E[token] + bigram(token, the one before))        :mod:`reflowlens.models.token_parts`
    x    = (1 − σ(g)) x_t + σ(g) x_{t−1}                            SmearGate;  x₀ = x
    for each block l:                                               :mod:`reflowlens.models.refined_block`
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

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from reflowlens.config import ModelConfig
from reflowlens.errors import ReflowlensError
from reflowlens.models.architecture import FLOAT32
from reflowlens.models.attention import KeyValueCache
from reflowlens.models.checked_pass import Pass
from reflowlens.models.flow_refiner import FlowRefiner
from reflowlens.models.hooking import AXES
from reflowlens.models.parts import HookPoint
from reflowlens.models.past import ReadPositions
from reflowlens.models.places import Places
from reflowlens.models.refined_block import FixedNorm, RefinedBlock
from reflowlens.models.residual import Embed, FormedReadout, Readout, ResidualModel, Unembed
from reflowlens.models.text import TextInput
from reflowlens.models.token_parts import Bigram, SmearGate, TokenValues, continues
from reflowlens.models.ttt_linear import InnerState, TTTLinear, each_text_alone
from reflowlens.ttt_flow_config import TTTFlowConfig

_EMBED_STD = 0.005


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
        **dict.fromkeys(("hook_value", "hook_token_values", "hook_excluded"), ("batch", "pos", "head", "d_head")),
        "hook_W": ("batch", "head", "key", "value"),
        "hook_c": ("batch", "head", "value"),
        "hook_grad": ("batch", "head", "pos_in_chunk", "value"),
        "hook_out": ("batch", "pos", "head", "value"),
        "hook_latent": ("batch", "pos", "flow"),
        "hook_velocity": ("batch", "pos", "flow"),
        **dict.fromkeys(("hook_flow_pre", "hook_flow_post"), ("batch", "pos", "flow_hidden")),
        "hook_logits_pre_cap": ("batch", "pos", "d_vocab"),
    }

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__(cfg)
        own = cast(TTTFlowConfig, cfg.ttt_flow)
        self.embed = Embed(cfg)
        self.unembed = Unembed(self, own.logit_cap)
        self.hook_embed = HookPoint()  # [batch, pos, d_model]
        self.bigram = Bigram(own, cfg.d_model)
        self.ln_embed = FixedNorm(cfg)
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
        goes_on = continues(positions, tokens.device)
        pairs = self.bigram(tokens, None if before is None else before[0], goes_on)
        x = self.ln_embed(self.embed_tokens(tokens, weights, positions) + pairs)
        first = self.smear(x, None if before is None else before[1], goes_on)
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

    def final_stream(
        self, input: TextInput, *, segments: Int[Tensor, "batch pos"] | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """The refined stream: refiners see more than a position's own stream.

        Raises:
            ReflowlensError: something is attached to ``unembed.hook_logits_pre_cap``; or as of :meth:`forward`.
        """
        return cast(Tensor, self(input, _features, segments=segments))

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


def _features(readout: Readout) -> Float[Tensor, "batch pos d_model"]:
    if isinstance(readout, FormedReadout):
        raise ReflowlensError(
            "a final stream comes before what is attached to 'unembed.hook_logits_pre_cap': call the model itself"
        )
    return readout.features


def _mean_chunk(context: int, chunk: int) -> float:
    """How many tokens the mini-batch of a token has, the mean over a text."""
    whole, rest = divmod(context, chunk)
    return (whole * chunk**2 + rest**2) / context


class TTTFlowCache(KeyValueCache):
    """Keys and values of each block, the last token and its vector before the smear, and the inner learner's state."""

    def __init__(self, cfg: ModelConfig, batch: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(cfg, batch, dtype)
        self.last_token = torch.zeros(self.batch, dtype=torch.long, device=cfg.device)
        self.last_vector = torch.zeros(self.batch, cfg.d_model, dtype=dtype, device=cfg.device)
        self.inner: InnerState | None = None
