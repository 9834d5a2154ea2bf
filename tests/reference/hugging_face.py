"""The same weights in the `transformers` library's GPT-2 and Llama, to compare logits and gradients with.

Each parameter there is a rearrangement of ours; a rearrangement carries gradients over as it carries values, so
``LAYOUT[name](ours)`` serves for both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from reflowlens.config import ModelConfig

Layout = dict[str, Callable[[dict[str, Tensor]], Tensor]]


def gpt2(cfg: ModelConfig) -> tuple[GPT2LMHeadModel, Layout]:
    hf = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=cfg.d_vocab,
            n_positions=cfg.n_ctx,
            n_embd=cfg.d_model,
            n_layer=cfg.n_layers,
            n_head=cfg.n_heads,
            n_inner=cfg.d_mlp,
            activation_function="gelu",
            layer_norm_epsilon=cfg.eps,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            attn_implementation="eager",
        )
    )
    for name, parameter in hf.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.zeros_(parameter)
    layout: Layout = {
        "transformer.wte.weight": lambda w: w["embed.W_E"],
        "transformer.wpe.weight": lambda w: w["pos_embed.W_pos"],
        "transformer.ln_f.weight": lambda w: w["ln_final.w"],
    }
    for i in range(cfg.n_layers):
        ours, theirs = f"blocks.{i}", f"transformer.h.{i}"
        layout |= {
            f"{theirs}.ln_1.weight": _get(f"{ours}.ln1.w"),
            f"{theirs}.ln_2.weight": _get(f"{ours}.ln2.w"),
            f"{theirs}.attn.c_attn.weight": lambda w, at=ours: torch.cat(
                [_heads_as_columns(w[f"{at}.attn.W_{name}"]) for name in "QKV"], dim=1
            ),
            f"{theirs}.attn.c_proj.weight": lambda w, at=ours: w[f"{at}.attn.W_O"].flatten(0, 1),
            f"{theirs}.mlp.c_fc.weight": _get(f"{ours}.mlp.W_in"),
            f"{theirs}.mlp.c_proj.weight": _get(f"{ours}.mlp.W_out"),
        }
    return hf, layout


def llama(cfg: ModelConfig) -> tuple[LlamaForCausalLM, Layout]:
    """Llama turns channels (i, i + d_head / 2) together; where ours are (2i, 2i + 1) those of q and k are permuted."""
    hf = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=cfg.d_vocab,
            max_position_embeddings=cfg.n_ctx,
            hidden_size=cfg.d_model,
            intermediate_size=cfg.d_mlp,
            num_hidden_layers=cfg.n_layers,
            num_attention_heads=cfg.n_heads,
            num_key_value_heads=cfg.kv_heads,
            head_dim=cfg.d_head,
            rms_norm_eps=cfg.eps,
            rope_parameters={"rope_type": "default", "rope_theta": cfg.rotary_base},
            tie_word_embeddings=True,
            attn_implementation="eager",
        )
    )
    channels = torch.arange(cfg.d_head)
    if cfg.rotary_adjacent_pairs:
        channels = torch.cat([channels[0::2], channels[1::2]])
    layout: Layout = {"model.embed_tokens.weight": merged_embedding, "model.norm.weight": lambda w: w["ln_final.w"]}
    for i in range(cfg.n_layers):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        for name in "QK":
            layout[f"{theirs}.self_attn.{name.lower()}_proj.weight"] = lambda w, at=f"{ours}.attn.W_{name}": (
                _heads_as_columns(w[at][:, :, channels]).T
            )
        layout |= {
            f"{theirs}.self_attn.v_proj.weight": lambda w, at=ours: _heads_as_columns(w[f"{at}.attn.W_V"]).T,
            f"{theirs}.self_attn.o_proj.weight": lambda w, at=ours: w[f"{at}.attn.W_O"].flatten(0, 1).T,
            f"{theirs}.mlp.gate_proj.weight": _get(f"{ours}.mlp.W_gate", transposed=True),
            f"{theirs}.mlp.up_proj.weight": _get(f"{ours}.mlp.W_in", transposed=True),
            f"{theirs}.mlp.down_proj.weight": _get(f"{ours}.mlp.W_out", transposed=True),
            f"{theirs}.input_layernorm.weight": _get(f"{ours}.ln1.w"),
            f"{theirs}.post_attention_layernorm.weight": _get(f"{ours}.ln2.w"),
        }
    return hf, layout


def load(hf: Any, layout: Layout, weights: dict[str, Tensor]) -> None:
    """Copy the weights; every parameter of the other model but the biases (zero) must be in the layout."""
    parameters = dict(hf.named_parameters())
    assert set(layout) == {name for name in parameters if not name.endswith(".bias")}
    with torch.no_grad():
        for name, arrange in layout.items():
            parameters[name].copy_(arrange(weights))


def merged_embedding(weights: dict[str, Tensor]) -> Tensor:
    return weights["embed.W_E"] if "embed.W_E" in weights else weights["embed.W_recipe"] @ weights["embed.W_basis"]


def _heads_as_columns(W: Tensor) -> Tensor:
    """[head, d_model, d_head] -> [d_model, head * d_head]."""
    return torch.cat(list(W), dim=1)


def _get(name: str, transposed: bool = False) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda w: w[name].T if transposed else w[name]
