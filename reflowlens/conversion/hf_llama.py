"""Models that are a Llama in transformers' format: GPT-2-New, every reFlow with E merged, and the public family.

transformers turns channels (i, i + d_head / 2) of a head together. Where ours turn (2i, 2i + 1), the channels of
queries and keys are put in that order: scores are sums over channels, so the model stays the same.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from reflowlens.config import ModelConfig, RotaryScaling
from reflowlens.conversion.layout import SAME, TRANSPOSED, VECTOR, Entry, entry
from reflowlens.errors import ReflowlensError

PREFIX, EMBEDDING = "model.", "model.embed_tokens.weight"
BUFFERS = r".*\.rotary_emb\.inv_freq"  # stored by old versions, computed by all
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
}
_ACTIVATIONS |= {"relu": "relu"}


def fits(cfg: ModelConfig) -> bool:
    """Whether the decoder is a Llama but for its embedding."""
    return (
        cfg.architecture != "gpt2"  # which adds learned positions to the embedding
        and cfg.normalization_type == "RMS"
        and not cfg.norm_bias
        and cfg.positional_embedding_type == "rotary"
        and bool(cfg.gated_mlp)
        and not cfg.unembed_bias
        and cfg.d_model % cfg.n_heads == 0
    )


def as_family(cfg: ModelConfig) -> ModelConfig:
    """The Llama that a model is: one embedding matrix, and a bias on all of attention if it has one on a part."""
    bias = cfg.qkv_bias or cfg.attn_out_bias
    return dataclasses.replace(cfg, architecture="llama", n_signals=None, topk=None, qkv_bias=bias, attn_out_bias=bias)


def layout(cfg: ModelConfig) -> list[Entry]:
    """Where each tensor of a LlamaForCausalLM is in our model."""
    turned = "(pair two)" if cfg.rotary_adjacent_pairs else "(two pair)"
    heads = {"Q": cfg.n_heads, "K": cfg.kv_heads, "V": cfg.kv_heads}
    entries = [
        entry(EMBEDDING, "embed.W_E", SAME),
        entry("model.norm.weight", "ln_final.w", VECTOR),
    ]
    if not cfg.tie_word_embeddings:
        entries.append(entry("lm_head.weight", "unembed.W_U", TRANSPOSED))
    for layer in range(cfg.n_layers):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        entries += [
            entry(f"{theirs}.input_layernorm.weight", f"{ours}.ln1.w", VECTOR),
            entry(f"{theirs}.post_attention_layernorm.weight", f"{ours}.ln2.w", VECTOR),
            entry(
                f"{theirs}.self_attn.o_proj.weight",
                f"{ours}.attn.W_O",
                "head d_head d_model -> d_model (head d_head)",
                head=cfg.n_heads,
            ),
        ]
        for name, head in heads.items():
            # A value's channels are not turned: any order that both ends agree on will do, and theirs is ours.
            channels = "(two pair)" if name == "V" else turned
            at, sizes = f"{theirs}.self_attn.{name.lower()}_proj", {"head": head, "two": 2}
            pattern = f"head d_model {channels} -> (head two pair) d_model"
            entries.append(entry(f"{at}.weight", f"{ours}.attn.W_{name}", pattern, **sizes))
            if cfg.qkv_bias:
                pattern = f"head {channels} -> (head two pair)"
                entries.append(entry(f"{at}.bias", f"{ours}.attn.b_{name}", pattern, **sizes))
        if cfg.attn_out_bias:
            entries.append(entry(f"{theirs}.self_attn.o_proj.bias", f"{ours}.attn.b_O", VECTOR))
        for their_name, our_name in (("gate_proj", "gate"), ("up_proj", "in"), ("down_proj", "out")):
            entries.append(entry(f"{theirs}.mlp.{their_name}.weight", f"{ours}.mlp.W_{our_name}", TRANSPOSED))
            if cfg.mlp_bias:
                entries.append(entry(f"{theirs}.mlp.{their_name}.bias", f"{ours}.mlp.b_{our_name}", VECTOR))
    return entries


def hf_config(cfg: ModelConfig) -> dict[str, Any]:
    """``config.json`` of the model; transformers 4 reads ``rope_theta`` and ``rope_scaling``, 5 ``rope_parameters``."""
    scaling = None
    if cfg.rotary_scaling is not None:
        scaling = {
            "rope_type": "llama3",
            "factor": cfg.rotary_scaling.factor,
            "low_freq_factor": cfg.rotary_scaling.low_freq_factor,
            "high_freq_factor": cfg.rotary_scaling.high_freq_factor,
            "original_max_position_embeddings": cfg.rotary_scaling.original_context,
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": cfg.d_vocab,
        "hidden_size": cfg.d_model,
        "intermediate_size": cfg.d_mlp,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.kv_heads,
        "head_dim": cfg.d_head,
        "hidden_act": cfg.act_fn,
        "max_position_embeddings": cfg.n_ctx,
        "rms_norm_eps": cfg.eps,
        "rope_theta": cfg.rotary_base,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_type": "default", **(scaling or {}), "rope_theta": cfg.rotary_base},
        "attention_bias": cfg.qkv_bias,
        "attention_dropout": 0.0,
        "mlp_bias": cfg.mlp_bias,
        "initializer_range": cfg.initializer_range,
        "tie_word_embeddings": cfg.tie_word_embeddings,
    }


def model_config(hf: Any) -> ModelConfig:
    """The shape of a Llama, Mistral or Qwen2 from transformers' configuration object.

    Within a sliding window full attention is the same, so the window bounds ``n_ctx``.

    Raises:
        ReflowlensError: rotary positions are scaled in a way, or an activation is used, that our models do not know.
    """
    if hf.hidden_act not in _ACTIVATIONS:
        raise ReflowlensError(f"activation {hf.hidden_act!r} is not known: {', '.join(_ACTIVATIONS)} are")
    bias = bool(getattr(hf, "attention_bias", False))
    base, scaling = _rotary(hf.rope_parameters or {})
    return ModelConfig(
        architecture="llama",
        n_layers=hf.num_hidden_layers,
        d_model=hf.hidden_size,
        n_heads=hf.num_attention_heads,
        n_key_value_heads=None if hf.num_key_value_heads == hf.num_attention_heads else hf.num_key_value_heads,
        d_head=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        d_mlp=hf.intermediate_size,
        d_vocab=hf.vocab_size,
        n_ctx=min(hf.max_position_embeddings, getattr(hf, "sliding_window", None) or hf.max_position_embeddings),
        act_fn=_ACTIVATIONS[hf.hidden_act],
        eps=hf.rms_norm_eps,
        rotary_base=base,
        rotary_scaling=scaling,
        qkv_bias=bias or hf.model_type == "qwen2",
        attn_out_bias=bias,
        mlp_bias=bool(getattr(hf, "mlp_bias", False)),
        tie_word_embeddings=hf.tie_word_embeddings,
    )


def _rotary(rope: dict[str, Any]) -> tuple[float, RotaryScaling | None]:
    kind = rope.get("rope_type", "default")
    if rope.get("partial_rotary_factor") not in (None, 1.0):
        raise ReflowlensError("rotary positions on a part of a head (partial_rotary_factor) cannot be read")
    if kind not in ("default", "llama3"):
        raise ReflowlensError(f"rotary scaling {kind!r} cannot be read: plain rotary positions and 'llama3' can")
    base = float(rope.get("rope_theta") or 10_000.0)
    if kind == "default":
        return base, None
    return base, RotaryScaling(
        factor=rope["factor"],
        low_freq_factor=rope["low_freq_factor"],
        high_freq_factor=rope["high_freq_factor"],
        original_context=rope["original_max_position_embeddings"],
    )
