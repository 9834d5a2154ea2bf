"""GPT-2 in transformers' format: every matrix stored [in, out], queries, keys and values side by side."""

from __future__ import annotations

import dataclasses
from typing import Any

from reflowlens.config import ModelConfig
from reflowlens.conversion.layout import SAME, TRANSPOSED, VECTOR, Entry, Piece, entry
from reflowlens.errors import ReflowlensError

PREFIX, EMBEDDING = "transformer.", "transformer.wte.weight"
BUFFERS = r".*\.attn\.(bias|masked_bias)"  # the causal mask, stored by old versions
_ACTIVATIONS = {"gelu_new": "gelu_new", "gelu_pytorch_tanh": "gelu_new", "gelu": "gelu", "relu": "relu", "silu": "silu"}


def fits(cfg: ModelConfig) -> bool:
    """Whether the decoder is a GPT-2 but for its embedding and absent biases."""
    return (
        cfg.normalization_type == "LN"
        and cfg.positional_embedding_type == "standard"
        and cfg.kv_heads == cfg.n_heads
        and cfg.n_heads * cfg.d_head == cfg.d_model
        and not cfg.gated_mlp
        and not cfg.unembed_bias
    )


def as_family(cfg: ModelConfig) -> ModelConfig:
    """The GPT-2 that a model is: it has every bias, zero where the model has none."""
    return dataclasses.replace(
        cfg,
        architecture="gpt2",
        n_signals=None,
        topk=None,
        norm_bias=True,
        qkv_bias=True,
        attn_out_bias=True,
        mlp_bias=True,
    )


def layout(cfg: ModelConfig) -> list[Entry]:
    """Where each tensor of a GPT2LMHeadModel is in our model."""
    head = {"head": cfg.n_heads}
    entries = [
        entry(EMBEDDING, "embed.W_E", SAME),
        entry("transformer.wpe.weight", "pos_embed.W_pos", SAME),
        entry("transformer.ln_f.weight", "ln_final.w", VECTOR),
        entry("transformer.ln_f.bias", "ln_final.b", VECTOR),
    ]
    if not cfg.tie_word_embeddings:
        entries.append(entry("lm_head.weight", "unembed.W_U", TRANSPOSED))
    for layer in range(cfg.n_layers):
        ours, theirs = f"blocks.{layer}", f"transformer.h.{layer}"
        W = [Piece(f"{ours}.attn.W_{name}", "head d_model d_head -> d_model (head d_head)", head) for name in "QKV"]
        b = [Piece(f"{ours}.attn.b_{name}", "head d_head -> (head d_head)", head) for name in "QKV"]
        entries += [
            Entry(f"{theirs}.attn.c_attn.weight", W, axis=1),
            Entry(f"{theirs}.attn.c_attn.bias", b),
            entry(
                f"{theirs}.attn.c_proj.weight",
                f"{ours}.attn.W_O",
                "head d_head d_model -> (head d_head) d_model",
                **head,
            ),
            entry(f"{theirs}.attn.c_proj.bias", f"{ours}.attn.b_O", VECTOR),
            entry(f"{theirs}.mlp.c_fc.weight", f"{ours}.mlp.W_in", SAME),
            entry(f"{theirs}.mlp.c_fc.bias", f"{ours}.mlp.b_in", VECTOR),
            entry(f"{theirs}.mlp.c_proj.weight", f"{ours}.mlp.W_out", SAME),
            entry(f"{theirs}.mlp.c_proj.bias", f"{ours}.mlp.b_out", VECTOR),
        ]
        for their_norm, our_norm in (("ln_1", "ln1"), ("ln_2", "ln2")):
            entries.append(entry(f"{theirs}.{their_norm}.weight", f"{ours}.{our_norm}.w", VECTOR))
            entries.append(entry(f"{theirs}.{their_norm}.bias", f"{ours}.{our_norm}.b", VECTOR))
    return entries


def hf_config(cfg: ModelConfig) -> dict[str, Any]:
    """``config.json`` of the model."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": cfg.d_vocab,
        "n_positions": cfg.n_ctx,
        "n_ctx": cfg.n_ctx,
        "n_embd": cfg.d_model,
        "n_layer": cfg.n_layers,
        "n_head": cfg.n_heads,
        "n_inner": cfg.d_mlp,
        "activation_function": cfg.act_fn,
        "layer_norm_epsilon": cfg.eps,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "initializer_range": cfg.initializer_range,
        "tie_word_embeddings": cfg.tie_word_embeddings,
    }


def model_config(hf: Any) -> ModelConfig:
    """The shape of a GPT-2 from transformers' configuration object.

    Raises:
        ReflowlensError: it scales attention in another way, or has an activation that our models do not know.
    """
    if not hf.scale_attn_weights or hf.scale_attn_by_inverse_layer_idx or hf.add_cross_attention:
        raise ReflowlensError(
            "only GPT-2's own attention can be read: scale_attn_weights true, scale_attn_by_inverse_layer_idx and "
            "add_cross_attention false"
        )
    if hf.activation_function not in _ACTIVATIONS:
        raise ReflowlensError(f"activation {hf.activation_function!r} is not known: {', '.join(_ACTIVATIONS)} are")
    return ModelConfig(
        architecture="gpt2",
        n_layers=hf.n_layer,
        d_model=hf.n_embd,
        n_heads=hf.n_head,
        d_head=hf.n_embd // hf.n_head,
        d_mlp=hf.n_inner or 4 * hf.n_embd,
        d_vocab=hf.vocab_size,
        n_ctx=hf.n_positions,
        act_fn=_ACTIVATIONS[hf.activation_function],
        eps=hf.layer_norm_epsilon,
        norm_bias=True,
        qkv_bias=True,
        attn_out_bias=True,
        mlp_bias=True,
        tie_word_embeddings=hf.tie_word_embeddings,
    )
