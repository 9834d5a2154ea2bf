"""Models small enough for every test, with weights large enough that a wrong sign anywhere shows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from reflowlens.config import ModelConfig, RotaryScaling
from reflowlens.models import build_model
from reflowlens.models.base import HookedModel

T = TypeVar("T")
_SIZES: dict[str, Any] = {
    "n_layers": 2,
    "d_model": 32,
    "n_heads": 4,
    "d_head": 8,
    "d_mlp": 48,
    "d_vocab": 288,  # 256 bytes and some padding
    "n_ctx": 24,
    "tokenizer_name": "bytes",
}
CONFIGS: dict[str, ModelConfig] = {
    "gpt2": ModelConfig(architecture="gpt2", **_SIZES),
    "gpt2_new": ModelConfig(architecture="gpt2_new", **_SIZES),
    "reflow": ModelConfig(architecture="reflow", n_signals=32, **_SIZES),
    "reflow_wide": ModelConfig(architecture="reflow", n_signals=40, **_SIZES),
    "reflow_topk": ModelConfig(architecture="reflow_topk", n_signals=40, topk=6, **_SIZES),
    "reflow_topk_input": ModelConfig(architecture="reflow_topk", n_signals=48, topk=6, topk_ends="input", **_SIZES),
    "reflow_lite": ModelConfig(architecture="reflow_lite", n_signals=24, n_key_value_heads=2, **_SIZES),
    # What public models have that the presets do not.
    "gpt2_biased": ModelConfig(
        architecture="gpt2",
        act_fn="gelu_new",
        norm_bias=True,
        qkv_bias=True,
        attn_out_bias=True,
        mlp_bias=True,
        **_SIZES,
    ),
    "llama_untied": ModelConfig(
        architecture="llama",
        n_key_value_heads=2,
        tie_word_embeddings=False,
        qkv_bias=True,
        rotary_base=500.0,
        rotary_scaling=RotaryScaling(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=12),
        **_SIZES,
    ),
    # Heads that do not make up d_model, and a readout with a bias.
    "gpt2_own_readout": ModelConfig(
        architecture="gpt2",
        act_fn="relu",
        norm_bias=True,
        attn_out_bias=True,
        mlp_bias=True,
        tie_word_embeddings=False,
        unembed_bias=True,
        **_SIZES | {"d_head": 7},
    ),
}
NAMES = list(CONFIGS)
FACTORED = [name for name in NAMES if name.startswith("reflow")]


def in_turn(cases: Iterable[T], always: Sequence[str] = ("reflow_lite", "llama_untied")) -> list[tuple[str, T]]:
    """(model, case): every case on the models of ``always``, and on one of the others in turn.

    For facts in which the two do not interact. The two of the default are those with most that a plain model has not:
    rotary positions, grouped keys and values, a factored readout; biases and a readout of their own.
    """
    others = [name for name in NAMES if name not in always]
    return [(name, case) for i, case in enumerate(cases) for name in (*always, others[i % len(others)])]


def tiny_config(name: str, **changes: Any) -> ModelConfig:
    return dataclasses.replace(CONFIGS[name], **changes)


def random_model(cfg: ModelConfig | str, seed: int = 0) -> HookedModel:
    """Every parameter random, norms included: fresh weights are too near zero, or one, to tell a mistake by."""
    model = build_model(CONFIGS[cfg] if isinstance(cfg, str) else cfg, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if name.endswith(".w") else noise * parameter.shape[-1:].numel() ** -0.5)
    return model


def random_tokens(cfg: ModelConfig, batch: int = 2, pos: int = 7, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (batch, pos), generator=torch.Generator().manual_seed(seed))


def bias(parameter: Tensor | None) -> Tensor:
    """A bias that a model may not have, as the zero that it then is."""
    return torch.zeros(1) if parameter is None else parameter.detach()


def assert_close(actual: Tensor, expected: Tensor, relative: float = 1e-5, what: str = "") -> None:
    """The largest difference is below ``relative`` times the largest expected value."""
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} != {tuple(expected.shape)}"
    difference, scale = (actual - expected).abs().max().item(), expected.abs().max().item()
    assert difference <= relative * scale, f"{what}: differs by {difference:.3g} where values reach {scale:.3g}"
