"""The families, a table each."""

from __future__ import annotations

from typing import Any

from reflowlens.conversion.families.family import Family
from reflowlens.conversion.families.traits import (
    ATTENTION_CAP,
    GPT2_CONTEXT,
    GPT_NEO_WINDOWS,
    GPTJ_ROTARY,
    LOGIT_SCALE,
    LOGITS_CAP,
    MULTIPLIERS,
    PARALLEL,
    QUERY_SCALAR,
    SCALED_EMBEDDING,
    SOME_LAYERS_TURN,
    SWITCHED_WINDOWS,
    TWO_BASES,
    WINDOW,
    WINDOWS_BY_LAYER,
    bias,
    gemma_activation,
    head_width,
    rotary,
)

# --------------------------------------------------------------------------------------------------- Llama and its kin

_LLAMA: dict[str, Any] = {
    "architecture": "decoder",
    "stem": "model.",
    "ends": {"embed": "model.embed_tokens", "ln_final": "model.norm", "unembed": "lm_head"},
    "layers": "model.layers.{}",
    "parts": {
        "ln1": "input_layernorm",
        "attn.Q": "self_attn.q_proj",
        "attn.K": "self_attn.k_proj",
        "attn.V": "self_attn.v_proj",
        "attn.O": "self_attn.o_proj",
        "ln2": "post_attention_layernorm",
        "mlp.gate": "mlp.gate_proj",
        "mlp.in": "mlp.up_proj",
        "mlp.out": "mlp.down_proj",
    },
    "fields": {
        "n_layers": "num_hidden_layers",
        "d_model": "hidden_size",
        "n_heads": "num_attention_heads",
        "n_key_value_heads": "num_key_value_heads",
        "d_mlp": "intermediate_size",
        "d_vocab": "vocab_size",
        "n_ctx": "max_position_embeddings",
        "act_fn": "hidden_act",
        "eps": "rms_norm_eps",
        "tie_word_embeddings": "tie_word_embeddings",
    },
    "constants": {"attention_dropout": 0.0},
}
_QK_NORMS = {"attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm"}
_ATTENTION_BIAS = bias("attention_bias", "qkv_bias", "attn_out_bias")
_HEADS = head_width()

LLAMA = Family(
    **_LLAMA | {"architecture": "llama"},
    class_name="LlamaForCausalLM",
    model_type="llama",
    traits=(_HEADS, rotary(), _ATTENTION_BIAS, bias("mlp_bias", "mlp_bias")),
)
MISTRAL = Family(
    **_LLAMA | {"architecture": "llama"},
    class_name="MistralForCausalLM",
    model_type="mistral",
    traits=(_HEADS, rotary(), WINDOW),
)
QWEN2 = Family(
    **_LLAMA | {"architecture": "llama"},
    class_name="Qwen2ForCausalLM",
    model_type="qwen2",
    fixed={"qkv_bias": True},
    traits=(_HEADS, rotary(), SWITCHED_WINDOWS),
)
QWEN3 = Family(
    **_LLAMA | {"parts": _LLAMA["parts"] | _QK_NORMS},
    class_name="Qwen3ForCausalLM",
    model_type="qwen3",
    fixed={"use_qk_norm": True},
    traits=(_HEADS, rotary(), _ATTENTION_BIAS, SWITCHED_WINDOWS),
)
SMOLLM3 = Family(
    **_LLAMA,
    class_name="SmolLM3ForCausalLM",
    model_type="smollm3",
    traits=(rotary(), _ATTENTION_BIAS, bias("mlp_bias", "mlp_bias"), SWITCHED_WINDOWS, SOME_LAYERS_TURN),
)
_AFTER = {"ln1_post": "post_attention_layernorm", "ln2_post": "post_feedforward_layernorm"}
OLMO2 = Family(
    **_LLAMA
    | {"parts": {part: name for part, name in _LLAMA["parts"].items() if "ln" not in part} | _QK_NORMS | _AFTER},
    class_name="Olmo2ForCausalLM",
    model_type="olmo2",
    fixed={"use_qk_norm": True, "qk_norm_over_heads": True, "use_normalization_after_only": True},
    traits=(rotary(), _ATTENTION_BIAS),
)
PHI3 = Family(
    **_LLAMA
    | {
        "parts": {
            "ln1": "input_layernorm",
            "attn.QKV": "self_attn.qkv_proj",
            "attn.O": "self_attn.o_proj",
            "ln2": "post_attention_layernorm",
            "mlp.gate in": "mlp.gate_up_proj",
            "mlp.out": "mlp.down_proj",
        },
        "constants": {"attention_dropout": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    },
    class_name="Phi3ForCausalLM",
    model_type="phi3",
    traits=(rotary(partial=True), WINDOW),
)

_RESIDUAL = ("attn.W_O", "attn.b_O", "mlp.W_out", "mlp.b_out")  # what a block writes is linear in them
GRANITE = Family(
    **_LLAMA,
    class_name="GraniteForCausalLM",
    model_type="granite",
    traits=(rotary(), _ATTENTION_BIAS, bias("mlp_bias", "mlp_bias"), MULTIPLIERS),
    folded=dict.fromkeys(_RESIDUAL, lambda hf: hf.residual_multiplier)
    | {"ln_final.w": lambda hf: 1 / hf.logits_scaling},
)
COHERE = Family(
    **_LLAMA
    | {
        "parts": {part: name for part, name in _LLAMA["parts"].items() if part != "ln2"},
        "fields": _LLAMA["fields"] | {"eps": "layer_norm_eps"},
    },
    class_name="CohereForCausalLM",
    model_type="cohere",
    fixed={"normalization_type": "LN", "parallel_attn_mlp": True, "parallel_shared_ln": True}
    | {"rotary_adjacent_pairs": True},
    required={"use_qk_norm": False},
    traits=(rotary(), _ATTENTION_BIAS, LOGIT_SCALE),
    folded={"ln_final.w": lambda hf: hf.logit_scale},
)

# -------------------------------------------------------------------------------------------------------------- Gemma

_GEMMA = _LLAMA | {"norm_shift": -1.0, "required": {"use_bidirectional_attention": False}}
_GEMMA_2 = _GEMMA | {
    "parts": _LLAMA["parts"] | {"ln2": "pre_feedforward_layernorm"} | _AFTER,
    "fields": _LLAMA["fields"] | {"act_fn": "hidden_activation"},
}
GEMMA = Family(
    **_GEMMA,
    class_name="GemmaForCausalLM",
    model_type="gemma",
    traits=(_HEADS, rotary(), _ATTENTION_BIAS, SCALED_EMBEDDING, gemma_activation("hidden_act", "hidden_activation")),
)
_GEMMA_TRAITS = (_HEADS, _ATTENTION_BIAS, SCALED_EMBEDDING, WINDOWS_BY_LAYER, QUERY_SCALAR, LOGITS_CAP)
GEMMA2 = Family(
    **_GEMMA_2,
    class_name="Gemma2ForCausalLM",
    model_type="gemma2",
    fixed={"use_normalization_before_and_after": True},
    traits=(*_GEMMA_TRAITS, ATTENTION_CAP, rotary(), gemma_activation("hidden_activation")),
)
GEMMA3 = Family(
    **_GEMMA_2 | {"parts": _GEMMA_2["parts"] | _QK_NORMS},
    class_name="Gemma3ForCausalLM",
    model_type="gemma3_text",
    fixed={"use_normalization_before_and_after": True, "use_qk_norm": True},
    # Its configuration has attn_logit_softcapping as well, which transformers does not apply.
    traits=(*_GEMMA_TRAITS, TWO_BASES, gemma_activation("hidden_activation")),
)

# ----------------------------------------------------------------------------------------- GPT-2 and those after it

_BIASED = dict.fromkeys(("norm_bias", "qkv_bias", "attn_out_bias", "mlp_bias"), True)
_LAYER_NORM = {"normalization_type": "LN", "gated_mlp": False}
_GPT2: dict[str, Any] = {
    "architecture": "gpt2",
    "stem": "transformer.",
    "ends": {
        "embed": "transformer.wte",
        "pos_embed": "transformer.wpe",
        "ln_final": "transformer.ln_f",
        "unembed": "lm_head",
    },
    "layers": "transformer.h.{}",
    "parts": {
        "ln1": "ln_1",
        "attn.QKV": "attn.c_attn",
        "attn.O": "attn.c_proj",
        "ln2": "ln_2",
        "mlp.in": "mlp.c_fc",
        "mlp.out": "mlp.c_proj",
    },
    "fields": {
        "n_layers": "n_layer",
        "d_model": "n_embd",
        "n_heads": "n_head",
        "d_mlp": "n_inner",
        "d_vocab": "vocab_size",
        "n_ctx": "n_positions",
        "act_fn": "activation_function",
        "eps": "layer_norm_epsilon",
        "tie_word_embeddings": "tie_word_embeddings",
    },
    "constants": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "buffers": r".*\.attn\.(attention\.)?(bias|masked_bias)",  # the causal mask, stored by old versions
}
_PROJECTIONS = {f"attn.{kind}": f"{kind.lower()}_proj" for kind in "QKV"} | {"attn.O": "out_proj"}


def _at(place: str, modules: dict[str, str]) -> dict[str, str]:
    return {part: f"{place}.{module}" for part, module in modules.items()}


GPT2 = Family(
    **_GPT2,
    class_name="GPT2LMHeadModel",
    model_type="gpt2",
    stored_transposed=True,
    fixed=_BIASED,
    required={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    traits=(GPT2_CONTEXT,),
)
GPT_NEO = Family(
    **_GPT2
    | {
        "parts": {part: module for part, module in _GPT2["parts"].items() if "attn" not in part}
        | _at("attn.attention", _PROJECTIONS),
        "fields": _GPT2["fields"]
        | {
            "n_layers": "num_layers",
            "d_model": "hidden_size",
            "n_heads": "num_heads",
            "d_mlp": "intermediate_size",
            "n_ctx": "max_position_embeddings",
        },
        "constants": {"attention_dropout": 0.0, "embed_dropout": 0.0, "resid_dropout": 0.0},
    },
    class_name="GPTNeoForCausalLM",
    model_type="gpt_neo",
    fixed={"norm_bias": True, "attn_out_bias": True, "mlp_bias": True, "qkv_bias": False, "attn_scale": 1.0},
    traits=(GPT_NEO_WINDOWS,),
)
GPTJ = Family(
    **_GPT2
    | {
        "architecture": "decoder",
        "ends": {part: module for part, module in _GPT2["ends"].items() if part != "pos_embed"},
        "parts": {"ln1": "ln_1", "mlp.in": "mlp.fc_in", "mlp.out": "mlp.fc_out"} | _at("attn", _PROJECTIONS),
        "fields": {ours: theirs for ours, theirs in _GPT2["fields"].items() if ours != "tie_word_embeddings"},
    },
    class_name="GPTJForCausalLM",
    model_type="gptj",
    fixed=_LAYER_NORM
    | {"norm_bias": True, "mlp_bias": True, "unembed_bias": True, "qkv_bias": False, "attn_out_bias": False}
    | {"parallel_attn_mlp": True, "parallel_shared_ln": True}
    | {"rotary_adjacent_pairs": True, "tie_word_embeddings": False},
    required={"tie_word_embeddings": False},
    traits=(GPTJ_ROTARY,),
)
GPT_NEOX = Family(
    architecture="decoder",
    class_name="GPTNeoXForCausalLM",
    model_type="gpt_neox",
    stem="gpt_neox.",
    ends={"embed": "gpt_neox.embed_in", "ln_final": "gpt_neox.final_layer_norm", "unembed": "embed_out"},
    aliases={"lm_head.weight": "embed_out.weight"},
    layers="gpt_neox.layers.{}",
    parts={
        "ln1": "input_layernorm",
        "attn.QKV by head": "attention.query_key_value",
        "attn.O": "attention.dense",
        "ln2": "post_attention_layernorm",
        "mlp.in": "mlp.dense_h_to_4h",
        "mlp.out": "mlp.dense_4h_to_h",
    },
    fields={ours: theirs for ours, theirs in _LLAMA["fields"].items() if ours != "n_key_value_heads"}
    | {"eps": "layer_norm_eps"},
    fixed=_LAYER_NORM | {"norm_bias": True, "mlp_bias": True},
    constants={"attention_dropout": 0.0, "hidden_dropout": 0.0},
    traits=(PARALLEL, rotary(partial=True), _ATTENTION_BIAS),
    buffers=r".*\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
)
PHI = Family(
    **_LLAMA
    | {
        "ends": _LLAMA["ends"] | {"ln_final": "model.final_layernorm"},
        "parts": {"ln1": "input_layernorm", "mlp.in": "mlp.fc1", "mlp.out": "mlp.fc2"}
        | _at("self_attn", _PROJECTIONS | {"attn.O": "dense"}),
        "fields": {ours: theirs for ours, theirs in _LLAMA["fields"].items() if ours != "tie_word_embeddings"}
        | {"eps": "layer_norm_eps"},
        "constants": {"attention_dropout": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    },
    class_name="PhiForCausalLM",
    model_type="phi",
    fixed=_LAYER_NORM
    | _BIASED
    | {"parallel_attn_mlp": True, "parallel_shared_ln": True, "unembed_bias": True, "tie_word_embeddings": False},
    required={"qk_layernorm": False, "tie_word_embeddings": False},
    traits=(rotary(partial=True),),
)
OPT = Family(
    architecture="gpt2",
    class_name="OPTForCausalLM",
    model_type="opt",
    stem="model.",
    ends={
        "embed": "model.decoder.embed_tokens",
        "pos_embed": "model.decoder.embed_positions",
        "ln_final": "model.decoder.final_layer_norm",
        "unembed": "lm_head",
    },
    position_rows=2,
    layers="model.decoder.layers.{}",
    parts={"ln1": "self_attn_layer_norm", "ln2": "final_layer_norm", "mlp.in": "fc1", "mlp.out": "fc2"}
    | _at("self_attn", _PROJECTIONS),
    fields={
        "n_layers": "num_hidden_layers",
        "d_model": "hidden_size",
        "n_heads": "num_attention_heads",
        "d_mlp": "ffn_dim",
        "d_vocab": "vocab_size",
        "n_ctx": "max_position_embeddings",
        "act_fn": "activation_function",
        "tie_word_embeddings": "tie_word_embeddings",
    },
    fixed=_BIASED | {"eps": 1e-5},
    required={
        "do_layer_norm_before": True,
        "word_embed_proj_dim": "=hidden_size",
        "_remove_final_layer_norm": False,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
    },
    constants={"dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0},
)

# In the order in which a model that says nothing of its origin finds its class on export.
FAMILIES = (
    *(LLAMA, MISTRAL, QWEN2, GPT2, QWEN3, SMOLLM3, OLMO2, PHI3),
    *(GEMMA, GEMMA2, GEMMA3, GPT_NEO, GPTJ, GPT_NEOX, PHI, OPT, GRANITE, COHERE),
)
