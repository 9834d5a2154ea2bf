"""What each tensor of a nanoGPT-style checkpoint is, by the pattern of its name.

A role is ``recipe``, ``embedding``, ``final_norm.bias`` …, or within block 3 ``3.q.weight``, ``3.norm1.weight`` ….
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from reflowlens.errors import ReflowlensError
from reflowlens.storage.opening import shown

_WRAPPERS = r"^(?:_orig_mod\.|module\.|model\.|transformer\.)+"  # torch.compile's, DDP's and nanoGPT's own
_KIND = r"(?:\.(?P<kind>weight|bias|scale|gamma|g|w))?$"
# Tables that a model computes itself: the causal mask, which is a square, and rotary angles.
_MASK = r"(?:.*\.)?(?:attn|attention|self_attn)\.(?:bias|mask|tril)$"
_ANGLES = r"(?:.*[._])?(?:freqs_(?:cis|cos|sin)|inv_freq|(?:cos|sin)(?:_cache|_cached)?)$"
_TOP = {
    "recipe": r"(?:.*\.)?(?:\w*vocab_?(?:to|2)_?signals?|\w*recipe\w*)",
    "basis": r"(?:.*\.)?\w*basis\w*",
    "embedding": r"wte|tok_emb\w*|token_emb\w*|embed_tokens",
    "positions": r"wpe|pos_emb\w*|position_emb\w*",
    "final_norm": r"ln_f|norm_f|ln_final|final_norm|final_layernorm|norm",
    "head": r"lm_head",
}
_BLOCK = r"(?:h|blocks?|layers?)\.(?P<layer>\d{1,9})\."
_ATTENTION, _MLP = r"(?:attn|attention|self_attn)\.", r"(?:mlp|ffn|feed_forward|ff)\."
_IN_BLOCK = {
    "norm1": r"ln_?1|norm_?1|rms_?1|attn_norm|attention_norm|input_layernorm",
    "norm2": r"ln_?2|norm_?2|rms_?2|mlp_norm|ffn_norm|post_attention_layernorm",
    "qkv": _ATTENTION + r"(?:c_attn|w?qkv|qkv_proj)",
    "kv": _ATTENTION + r"(?:c_kv|w?kv|kv_proj)",
    "q": _ATTENTION + r"(?:c_q|w?q|q_proj|query)",
    "k": _ATTENTION + r"(?:c_k|w?k|k_proj|key)",
    "v": _ATTENTION + r"(?:c_v|w?v|v_proj|value)",
    "o": _ATTENTION + r"(?:c_proj|w?o|o_proj|out_proj|proj)",
    "gate": _MLP + r"(?:c_gate|w_?gate|gate_proj|gate|w1)",
    "up": _MLP + r"(?:c_fc|w_?up|up_proj|up|w3)",
    "down": _MLP + r"(?:c_proj|w_?down|down_proj|down|w2)",
}


def place(state: Mapping[str, Tensor], where: str) -> dict[str, str]:
    """The name of the tensor for each role; tables that a model computes itself are left out.

    Raises:
        ReflowlensError: a tensor has no place, or two have the same.

    >>> import torch
    >>> place({"_orig_mod.transformer.h.0.attn.c_q.weight": torch.zeros(2, 2)}, "ckpt.pt")
    {'0.q.weight': '_orig_mod.transformer.h.0.attn.c_q.weight'}
    """
    names: dict[str, str] = {}
    for name, tensor in state.items():
        plain = re.sub(_WRAPPERS, "", name)
        if re.match(_ANGLES, plain) or (re.match(_MASK, plain) and tensor.ndim > 1):
            continue
        role = _role(plain)
        vector = role is not None and ("norm" in role or role.endswith("bias"))
        if role is None or tensor.ndim != (1 if vector else 2):
            raise ReflowlensError(f"{where}: no place for {shown(name)} {list(tensor.shape)} in a GPT-2 or reFlow")
        if role in names:
            raise ReflowlensError(f"{where}: {name!r} and {names[role]!r} want the same place")
        names[role] = name
    return _with_down_last(names, state)


def _role(name: str) -> str | None:
    for role, pattern in _TOP.items():
        if found := re.match(f"(?:{pattern}){_KIND}", name):
            return f"{role}.bias" if found["kind"] == "bias" else role
    for role, pattern in _IN_BLOCK.items():
        if found := re.match(f"{_BLOCK}(?:{pattern}){_KIND}", name):
            return f"{found['layer']}.{role}.{'bias' if found['kind'] == 'bias' else 'weight'}"
    return None


def _with_down_last(names: dict[str, str], state: Mapping[str, Tensor]) -> dict[str, str]:
    """Llama's SwiGLU is w2(silu(w1 x) * w3 x); some write w3(silu(w1 x) * w2 x), which the shapes show."""
    exchanged = {}
    for role, name in names.items():
        layer, _, part = role.partition(".")
        gate, down = (names.get(f"{layer}.{name}.weight") for name in ("gate", "down"))
        other = {"up": "down", "down": "up"}.get(part.partition(".")[0])
        if other and gate and down and down.endswith("w2.weight") and state[down].shape == state[gate].shape:
            role = f"{layer}.{other}.{part.partition('.')[2]}"
        exchanged[role] = name
    return exchanged
