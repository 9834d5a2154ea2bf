"""What the name of an architecture says of a model: the fields it gives, those it fixes, and the choices of each."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from reflowlens.decoder_options import OPTIONS

_DECODER: dict[str, Any] = {
    "act_fn": "silu",
    "gated_mlp": True,
    "normalization_type": "RMS",
    "eps": 1e-6,
    "positional_embedding_type": "rotary",
    "rotary_adjacent_pairs": False,
}
_REFLOW = _DECODER | {"rotary_adjacent_pairs": True}
_GPT2 = {
    "act_fn": "gelu",
    "gated_mlp": False,
    "normalization_type": "LN",
    "eps": 1e-5,
    "positional_embedding_type": "standard",
    "rotary_adjacent_pairs": False,
}
_BDH = {
    "act_fn": "relu",
    "gated_mlp": False,
    "normalization_type": "LN",
    "eps": 1e-5,
    "positional_embedding_type": "rotary",
    "rotary_adjacent_pairs": True,
}
_TTT_FLOW = _DECODER | {"act_fn": "leaky_relu_squared", "gated_mlp": False, "rotary_adjacent_pairs": False}
# What the name of an architecture gives a field unless a configuration says otherwise. nanoGPT's GPT-2 has learned
# positions, LayerNorm and an ungated exact GELU; the decoders after it RMSNorm, SwiGLU and rotary positions. reFlow's
# public model file rotates adjacent channels; GPT-2-New and Llama, as transformers stores it, rotate halves. "decoder"
# is what else is read from transformers' folders: its options say which family it is.
DEFAULTS = {
    "gpt2": _GPT2,
    "gpt2_new": _DECODER,
    "llama": _DECODER,
    "decoder": _DECODER,
    "reflow": _REFLOW,
    "reflow_topk": _REFLOW,
    "reflow_lite": _REFLOW,
    "bdh": _BDH,
    "ttt_flow": _TTT_FLOW,
}
ARCHITECTURES = tuple(DEFAULTS)
FACTORED = ("reflow", "reflow_topk", "reflow_lite")
UNPRUNED = {"topk": None, "topk_ends": "both", "topk_gradient": "kept"}
NEURONS_IN_HEADS = ("bdh",)  # heads share out a block's neurons
_BIASES = ("norm_bias", "qkv_bias", "attn_out_bias", "mlp_bias", "unembed_bias")
# What an architecture is made of, and no configuration changes.
FIXED: dict[str, dict[str, Any]] = {
    "decoder": {"positional_embedding_type": "rotary"},
    "bdh": {name: value for name, value in _BDH.items() if name != "eps"}
    | {"n_key_value_heads": None, "tie_word_embeddings": False, "rotary_scaling": None}
    | dict.fromkeys(_BIASES, False)
    | OPTIONS,
    "ttt_flow": {name: value for name, value in _TTT_FLOW.items() if name != "eps"}
    | {"tie_word_embeddings": True, "rotary_scaling": None, "dropout": 0.0}
    | dict.fromkeys(_BIASES, False)
    | OPTIONS,
}
CHOICES: dict[str, Collection[object]] = {
    "architecture": DEFAULTS.keys(),
    "act_fn": ("gelu", "gelu_new", "relu", "silu", "leaky_relu_squared"),
    "normalization_type": ("LN", "RMS"),
    "positional_embedding_type": ("standard", "rotary"),
    "tokenizer_name": ("gpt2", "gpt2_16k", "gpt2_1k", "bytes"),
    "basis_init": ("orthogonal", "gpt2"),
    "topk_ends": ("both", "input", "output"),
    "topk_gradient": ("kept", "straight_through"),
}
