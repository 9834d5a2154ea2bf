"""The decoder that all attention architectures share: embed, blocks, final norm, readout through the embedding."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reflowlens.config import ModelConfig
from reflowlens.models.architecture import FLOAT32, HEADS_AND_MLPS
from reflowlens.models.attention import KeyValueCache
from reflowlens.models.components import Block, ParallelBlock
from reflowlens.models.parts import HookPoint, Norm, is_bias, plus
from reflowlens.models.residual import ResidualModel
from reflowlens.models.stacked_weights import SHARED, StackedWeights, per_query_head

_IN_QK_NORM = re.compile(r"\.attn\.[qk]_norm\.")


class Decoder(StackedWeights, ResidualModel):
    """Causal decoder, pre-norm and its embedding tied unless the configuration says otherwise.

    As it is, architecture ``decoder``, it is the public families with rotary positions: what they differ in are the
    options of the configuration (:class:`~reflowlens.decoder_options.DecoderOptions`).

    An architecture overrides what is its own: :meth:`build_embedding`, :meth:`tied_weights` and :meth:`embed_tokens`.

    Example:
        >>> from reflowlens.config import ModelConfig
        >>> from reflowlens.models import build_model
        >>> tiny = ModelConfig(architecture="reflow", n_layers=1, d_model=16, n_heads=2, d_head=8, d_mlp=32,
        ...                    d_vocab=256, n_ctx=8, n_signals=16, tokenizer_name="bytes")
        >>> build_model(tiny)("Hi").shape
        torch.Size([1, 2, 256])
    """

    stages = "halves"
    sublayers = HEADS_AND_MLPS
    units: ClassVar[Mapping[str, str | None]] = {"mlp.hook_post": "blocks.{layer}.mlp.W_out"}

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__(cfg)
        if cfg.has_post_norms:  # which W_out's rows pass before they are added
            self.units = {"mlp.hook_post": None}  # type: ignore[misc] # of this model
        self.build_embedding(cfg)
        self.hook_embed = HookPoint()
        block = ParallelBlock if cfg.parallel_attn_mlp else Block
        self.blocks = nn.ModuleList([block(cfg, layer) for layer in range(cfg.n_layers)])
        self.ln_final = Norm(cfg)
        self.setup()

    def make_cache(self, batch: int, dtype: torch.dtype = torch.float32) -> KeyValueCache:
        return KeyValueCache(self.cfg, batch, dtype)

    def hook_axes(self, name: str) -> tuple[str, ...]:
        axes = super().hook_axes(name)
        if not _IN_QK_NORM.search(name):
            return axes
        width = "one" if axes[-1] == "one" else "heads" if self.cfg.qk_norm_over_heads else "d_head"
        return ("batch", "pos", width) if self.cfg.qk_norm_over_heads else ("batch", "pos", "head", width)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """N(0, initializer_range²); residual projections divided by √(2 n_layers), as in GPT-2, unless told not to."""
        std = self.cfg.initializer_range
        residual_std = std / (2 * self.cfg.n_layers) ** 0.5 if self.cfg.scale_residual_init else std
        for name, parameter in self.named_parameters():
            if name.endswith(".w"):
                parameter.fill_(1.0)
            elif is_bias(name):
                parameter.zero_()
            else:
                residual = name.endswith(("attn.W_O", "mlp.W_out"))
                parameter.normal_(0.0, residual_std if residual else std, generator=generator)

    @classmethod
    def table_bytes(cls, cfg: ModelConfig) -> int:
        """A cosine and a sine for every position and channel that turns, of every layer that does."""
        if cfg.positional_embedding_type != "rotary":
            return 0
        return 8 * sum(map(cfg.turns, range(cfg.n_layers))) * cfg.n_ctx * (cfg.rotary_dim or cfg.d_head)

    @classmethod
    def forward_flops(cls, cfg: ModelConfig, context: int, batch: int) -> dict[str, float]:
        width, mlp_matrices = cfg.n_heads * cfg.d_head, 3 if cfg.gated_mlp else 2
        projections = cfg.d_model * (2 * width + 2 * cfg.kv_heads * cfg.d_head)
        seen = sum(_mean_seen(context, cfg.window_of(layer)) for layer in range(cfg.n_layers))
        blocks = {
            "attention_projections": 2.0 * cfg.n_layers * projections,
            "attention_mixing": 2.0 * 2 * width * seen,
            "mlp": 2.0 * cfg.n_layers * mlp_matrices * cfg.d_model * cfg.d_mlp,
        }
        return blocks | super().forward_flops(cfg, context, batch)

    @classmethod
    def activation_bytes(cls, cfg: ModelConfig, n: int, width: int) -> tuple[float, float]:
        """Counted for the blocks as they are written, attention by a kernel that keeps no scores.

        Per position and layer: each norm keeps its input, what it made of it and its scale in float32; each matrix
        product its input in ``width`` bytes, for which autocast copies it anew; attention queries, keys, values, its
        output and a float32 sum a head, of capped scores these themselves; the MLP every activation of width ``d_mlp``;
        dropout what it multiplied both outputs by. The readout's loss keeps its gradients by its two factors.
        """
        d, heads, key_values = cfg.d_model, cfg.n_heads * cfg.d_head, cfg.kv_heads * cfg.d_head
        norm = FLOAT32 * (2 * d + 1)
        n_norms = (0 if cfg.use_normalization_after_only else 2) + 2 * cfg.has_post_norms
        normalised = FLOAT32 * 2 * (heads + key_values) * cfg.use_qk_norm
        # Scores, their cap and the pattern, of as many keys as a position may see.
        scores = 3 * FLOAT32 * cfg.n_heads * min(n, cfg.n_ctx) * (cfg.attn_scores_soft_cap is not None)
        readers = 3 + (2 if cfg.gated_mlp else 1)  # of the two norms' outputs; a float32 one is kept once for all
        copies = readers if width < FLOAT32 else 2
        block = (
            n_norms * norm
            + normalised
            + scores
            + copies * width * d
            + width * (2 * heads + 2 * key_values)
            + FLOAT32 * cfg.n_heads
            + width * cfg.d_mlp * (4 if cfg.gated_mlp else 2)
            + width * 2 * d * (cfg.dropout > 0)
        )
        ends = norm + 2 * 8  # the final norm, and the ids of inputs and targets
        return float(n * (cfg.n_layers * block + ends)), float(FLOAT32 * d * (n + cfg.d_vocab))

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        total = super().accumulated_bias(layer, mlp_input, include_mlp_biases)
        before_mlp = bool(mlp_input) and not self.cfg.parallel_attn_mlp
        for i, block in enumerate(cast("list[Block]", self.blocks[: layer + before_mlp])):
            total = plus(total, block.attn.b_O if block.ln1_post is None else block.ln1_post.b)
            if include_mlp_biases and i < layer:
                total = plus(total, block.mlp.b_out if block.ln2_post is None else block.ln2_post.b)
        return total

    def tl_parameters(self) -> dict[str, Tensor]:
        parameters = super().tl_parameters()
        for name, parameter in parameters.items():
            if name.endswith(SHARED):
                parameters[name] = per_query_head(parameter, self.cfg)
        return parameters


def _mean_seen(context: int, window: int | None) -> float:
    """How many positions one of a text sees, the mean over the text: itself, and those before it within the window."""
    near = min(context, window or context)
    return near * (context - (near - 1) / 2) / context
