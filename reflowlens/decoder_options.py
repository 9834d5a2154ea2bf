"""What decoders differ in beside their sizes: how a block is wired, how attention scores, how the two ends read."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import Any, TypeGuard

from reflowlens.errors import ReflowlensError

ATTN_TYPES = ("global", "local")


@dataclass(frozen=True, kw_only=True)
class RotaryScaling:
    """How Llama 3.1 and later stretch rotary positions beyond the context of their pretraining.

    A channel pair whose wavelength exceeds ``original_context / low_freq_factor`` turns ``factor`` times slower, one
    below ``original_context / high_freq_factor`` turns as before, and those between are interpolated (transformers'
    rope type ``llama3``).

    Raises:
        ReflowlensError: a value is not a positive number, or the factors are not in order.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not is_positive(value):
                raise ReflowlensError(f"rotary_scaling.{name} must be a positive number, got {value!r}")
        if not self.low_freq_factor < self.high_freq_factor:
            raise ReflowlensError(
                f"rotary_scaling.low_freq_factor must be below high_freq_factor={self.high_freq_factor}, "
                f"got {self.low_freq_factor}"
            )


@dataclass(frozen=True, kw_only=True)
class DecoderOptions:
    """Choices of public decoders, each of which leaves a model as it is unless it is given.

    Names are TransformerLens's where it has one. Where layers differ, a tuple gives them in turn and is repeated: one
    entry per layer, or a pattern.

    Args:
        parallel_attn_mlp: attention and MLP both read the stream in front of the block, which has no ``resid_mid``
            (GPT-J, GPT-NeoX, Phi).
        parallel_shared_ln: of such a block the MLP reads it through attention's norm, ``ln1`` (GPT-J, Phi).
        use_normalization_before_and_after: what attention and MLP write passes a norm of its own, ``ln1_post`` and
            ``ln2_post``, before it is added (Gemma 2 and 3).
        use_normalization_after_only: the same, and what they read passes none (OLMo 2).
        use_qk_norm: queries and keys are normalised, each head alone, by ``attn.q_norm`` and ``attn.k_norm`` before
            they are turned (Qwen3, Gemma 3).
        qk_norm_over_heads: over the width of all heads together instead (OLMo 2).
        attn_scale: scores are q · k divided by this; None: √d_head. GPT-Neo's is 1.
        attn_scores_soft_cap: scores are ``cap * tanh(scores / cap)`` before the mask (Gemma 2); None: as they are.
        output_logits_soft_cap: the same of logits.
        window_size: a position sees itself and the ``window_size - 1`` before it in layers whose attention is local.
        attn_types: ``"global"`` or ``"local"`` of the layers in turn; None with a window: all are local.
        rotary_dim: channels of a head that turn, the first ones; None: all.
        rotary_layers: whether a layer's queries and keys turn, of the layers in turn; None: all do (SmolLM3's not).
        rotary_linear_factor: pairs turn so many times slower (transformers' rope type ``linear``; Gemma 3's).
        rotary_base_local: θ of local layers, which are not rescaled then (Gemma 3); None: as in global ones.
        embed_scale: what an embedding is multiplied by as the stream begins (Gemma's √d_model), not as it ends.
    """

    parallel_attn_mlp: bool = False
    parallel_shared_ln: bool = False
    use_normalization_before_and_after: bool = False
    use_normalization_after_only: bool = False
    use_qk_norm: bool = False
    qk_norm_over_heads: bool = False
    attn_scale: float | None = None
    attn_scores_soft_cap: float | None = None
    output_logits_soft_cap: float | None = None
    window_size: int | None = None
    attn_types: tuple[str, ...] | None = None
    rotary_dim: int | None = None
    rotary_layers: tuple[bool, ...] | None = None
    rotary_linear_factor: float = 1.0
    rotary_base_local: float | None = None
    embed_scale: float = 1.0

    def window_of(self, layer: int) -> int | None:
        """How many positions a layer's attention sees, its own among them; None: all before it."""
        local = self.attn_types is None or self.attn_types[layer % len(self.attn_types)] == "local"
        return self.window_size if local else None

    def turns(self, layer: int) -> bool:
        """Whether rotary positions turn a layer's queries and keys."""
        return self.rotary_layers is None or self.rotary_layers[layer % len(self.rotary_layers)]

    @property
    def has_post_norms(self) -> bool:
        """Whether what attention and MLP write is normalised before it is added to the stream."""
        return self.use_normalization_before_and_after or self.use_normalization_after_only

    def check_options(self, *, d_head: int, is_rotary: bool, is_factored: bool) -> None:
        """Raise where options exclude each other or the rest of a configuration.

        Raises:
            ReflowlensError: a field has a value that is not allowed; the message names the field and the allowed ones.
        """
        for name in ("attn_types", "rotary_layers"):  # lists, as JSON and TOML have them
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        for name in ("attn_scale", "attn_scores_soft_cap", "output_logits_soft_cap", "rotary_base_local"):
            if not (getattr(self, name) is None or is_positive(getattr(self, name))):
                raise ReflowlensError(f"{name} must be None or a positive number, got {getattr(self, name)!r}")
        for name in ("embed_scale", "rotary_linear_factor"):
            if not is_positive(getattr(self, name)):
                raise ReflowlensError(f"{name} must be a positive number, got {getattr(self, name)!r}")
        self._check_layers()
        size = self.rotary_dim
        if size is not None and not (is_integer(size) and size % 2 == 0 and 2 <= size <= d_head):
            raise ReflowlensError(f"rotary_dim must be None or an even number from 2 to d_head={d_head}, got {size!r}")
        for name, needed, holds in (
            ("parallel_shared_ln", "parallel_attn_mlp=True", self.parallel_attn_mlp),
            ("qk_norm_over_heads", "use_qk_norm=True", self.use_qk_norm),
            (
                "use_normalization_after_only",
                "use_normalization_before_and_after=False",
                not self.use_normalization_before_and_after,
            ),
            ("attn_types", "a window_size", self.window_size is not None),
            ("rotary_base_local", "a window_size", self.window_size is not None),
            ("use_qk_norm", "rotary positions", is_rotary),
            ("rotary_dim", "rotary positions", is_rotary),
            ("rotary_layers", "rotary positions", is_rotary),
            ("rotary_linear_factor", "rotary positions", is_rotary),
            ("output_logits_soft_cap", "an embedding that is not factored", not is_factored),
            ("embed_scale", "an embedding that is not factored", not is_factored),
        ):
            if getattr(self, name) != OPTIONS[name] and not holds:
                raise ReflowlensError(f"{name} must be {OPTIONS[name]!r} without {needed}, got {getattr(self, name)!r}")

    def _check_layers(self) -> None:
        if not (self.window_size is None or (is_integer(self.window_size) and self.window_size >= 1)):
            raise ReflowlensError(f"window_size must be None or a positive integer, got {self.window_size!r}")
        types = self.attn_types
        if types is not None and not (isinstance(types, tuple) and types and set(types) <= set(ATTN_TYPES)):
            raise ReflowlensError(f"attn_types must be None or a tuple of 'global' and 'local', got {types!r}")
        turn = self.rotary_layers
        if turn is not None and not (isinstance(turn, tuple) and turn and all(isinstance(x, bool) for x in turn)):
            raise ReflowlensError(f"rotary_layers must be None or a tuple of True and False, got {turn!r}")


OPTIONS: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(DecoderOptions)}


def is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def is_positive(value: object) -> bool:
    return (is_integer(value) or isinstance(value, float)) and 0 < value <= sys.float_info.max
