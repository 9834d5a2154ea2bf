"""A tiny random model of each public family, as transformers has it, and ours as imported from its folder."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from reflowlens.conversion import import_hf
from reflowlens.models.base import HookedModel

CONTEXT = 32
_SIZES: dict[str, Any] = {
    "vocab_size": 288,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": CONTEXT,
}
_GROUPED = _SIZES | {"num_key_value_heads": 2}
_GPT: dict[str, Any] = {"n_embd": 32, "n_head": 4, "n_layer": 3, "n_inner": 48, "n_positions": CONTEXT}
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"
_WINDOWS = {"sliding_window": 3, "layer_types": [_LOCAL, _GLOBAL, _LOCAL]}
_TWO_BASES = {
    _LOCAL: {"rope_type": "default", "rope_theta": 100.0},
    _GLOBAL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
}


@dataclass(frozen=True)
class Family:
    """One of the table: its ``model_type`` and the fields that are not transformers' defaults.

    Args:
        shift: what is added to the weights of its norms to make them those that multiply.
    """

    model_type: str
    fields: dict[str, Any] = field(default_factory=dict)
    shift: float = 0.0


TABLE: dict[str, Family] = {
    "llama": Family("llama", _GROUPED),
    "llama_linear": Family("llama", _GROUPED | {"rope_parameters": _TWO_BASES[_GLOBAL]}),
    "mistral_windowed": Family("mistral", _GROUPED | {"sliding_window": 3}),
    "qwen2_windowed": Family("qwen2", _GROUPED | {"use_sliding_window": True, **_WINDOWS}),
    "qwen3": Family("qwen3", _GROUPED | {"head_dim": 12}),
    "smollm3": Family("smollm3", _GROUPED | {"no_rope_layers": [1, 0, 1], "rope_theta": 100.0}),
    "olmo2": Family("olmo2", _GROUPED),
    "phi3": Family("phi3", _GROUPED | {"sliding_window": 4, "partial_rotary_factor": 0.5}),
    "gemma": Family("gemma", _GROUPED | {"head_dim": 12}, shift=1.0),
    "gemma2": Family("gemma2", _GROUPED | {"head_dim": 8, "query_pre_attn_scalar": 20, **_WINDOWS}, shift=1.0),
    "gemma3": Family("gemma3_text", _GROUPED | {"head_dim": 8, "rope_parameters": _TWO_BASES, **_WINDOWS}, shift=1.0),
    "gpt2": Family("gpt2", _GPT),
    "gpt_neo": Family(
        "gpt_neo",
        {
            "hidden_size": 32,
            "num_heads": 4,
            "num_layers": 3,
            "intermediate_size": 48,
            "max_position_embeddings": CONTEXT,
            "attention_types": [[["global", "local", "global"], 1]],
            "window_size": 3,
        },
    ),
    "gptj": Family("gptj", _GPT | {"rotary_dim": 4}),
    "gpt_neox": Family("gpt_neox", _SIZES | {"rotary_pct": 0.25}),
    "gpt_neox_sequential": Family("gpt_neox", _SIZES | {"use_parallel_residual": False, "rotary_pct": 1.0}),
    "phi": Family("phi", _GROUPED | {"partial_rotary_factor": 0.5}),
    "granite": Family(
        "granite",
        _GROUPED
        | {"embedding_multiplier": 3.0, "residual_multiplier": 0.22, "logits_scaling": 7.0, "attention_multiplier": 0.4}
        | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "cohere": Family("cohere", _GROUPED | {"logit_scale": 0.3}),
    "opt": Family("opt", _SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
}
NAMES = list(TABLE)


@functools.cache
def theirs(name: str) -> Any:
    """Every parameter random, norms and biases included, so that a tensor that is not read shows."""
    family = TABLE[name]
    fields = family.fields | dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")) | {"vocab_size": 288}
    config = AutoConfig.for_model(family.model_type, **fields)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                noise = 0.3 * noise + (1 - family.shift if key.endswith("weight") else 0)
            parameter.copy_(noise if parameter.ndim == 1 else noise * parameter.shape[-1] ** -0.5)
    return model


@functools.cache
def ours(name: str) -> HookedModel:
    """The same, imported from the folder that transformers saves."""
    with tempfile.TemporaryDirectory() as folder, quiet():
        theirs(name).save_pretrained(folder)
        return import_hf(Path(folder), tokenizer="bytes")


@contextlib.contextmanager
def quiet() -> Any:
    """Without transformers' bars."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
