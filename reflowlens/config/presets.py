"""The published configurations by name."""

from __future__ import annotations

import dataclasses
from typing import Any

from reflowlens.config.model import ModelConfig
from reflowlens.errors import ReflowlensError, nearest


def _published(architecture: str, n_layers: int, **fields: Any) -> ModelConfig:
    sizes: dict[str, Any] = {
        "d_model": 1024,
        "n_heads": 16,
        "d_head": 64,
        "d_mlp": 2816,
        "d_vocab": 50304,
        "n_ctx": 1024,
    }
    return ModelConfig(architecture=architecture, n_layers=n_layers, **(sizes | fields))


def _ttt_flow(n_layers: int) -> ModelConfig:
    return ModelConfig(
        architecture="ttt_flow",
        n_layers=n_layers,
        d_model=512,
        n_heads=8,
        n_key_value_heads=4,
        d_head=64,
        d_mlp=1536,
        d_vocab=1024,
        n_ctx=2048,
        tokenizer_name="gpt2_1k",
    )


# The seven published configurations of the reFlow family, BDH's, and the GPT that TinyTranscoder explains. The family's
# published parameter counts determine the sizes; head counts do not show in a count and follow nanoGPT (head width 64).
PRESETS: dict[str, ModelConfig] = {
    "gpt2": _published("gpt2", 36, d_mlp=4096),
    "gpt2_new": _published("gpt2_new", 36),
    "reflow_1": _published("reflow", 32, n_signals=1024),
    "reflow_1_big": _published("reflow", 36, n_signals=1024),
    "reflow_1_topk_big": _published("reflow_topk", 36, n_signals=1024, topk=64),
    "reflow_1_lite": _published("reflow_lite", 32, n_signals=1024, n_key_value_heads=4),
    "reflow_1_small": _published("reflow", 6, d_model=512, n_heads=8, d_mlp=1536, n_signals=512),
    # Any text length would do: n_ctx bounds what is read at once.
    "bdh": ModelConfig(
        architecture="bdh",
        n_layers=6,
        d_model=256,
        n_heads=4,
        d_head=8192,
        d_mlp=32_768,
        d_vocab=256,
        n_ctx=4096,
        rotary_base=65_536.0,
        dropout=0.1,
        tie_word_embeddings=False,
        tokenizer_name="bytes",
    ),
    "tiny_transcoder_gpt": ModelConfig(
        architecture="gpt2",
        n_layers=2,
        d_model=512,
        n_heads=12,
        d_head=42,  # 512 // 12: the heads are 504 channels together
        d_mlp=2048,
        d_vocab=50_257,
        n_ctx=64,
        act_fn="relu",
        norm_bias=True,
        attn_out_bias=True,
        mlp_bias=True,
        tie_word_embeddings=False,
        unembed_bias=True,
        dropout=0.1,
        scale_residual_init=False,
    ),
    "ttt_flow_10l": _ttt_flow(10),
    "ttt_flow_11l": _ttt_flow(11),
}


def preset(name: str) -> ModelConfig:
    """A published configuration by name.

    Raises:
        ReflowlensError: there is no such preset; the message lists them.
    """
    if name not in PRESETS:
        raise ReflowlensError(f"unknown preset {name!r}{nearest(name, list(PRESETS))} Presets: {', '.join(PRESETS)}")
    return dataclasses.replace(PRESETS[name], model_name=name)
