"""What of a configuration takes more than a name to translate: rotary positions, windows, biases, scales."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from reflowlens.config import ModelConfig
from reflowlens.decoder_options import RotaryScaling, is_positive
from reflowlens.errors import ReflowlensError

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_fast": "gelu_new",
    "relu": "relu",
}
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class Trait:
    """Fields of ours from theirs, and back.

    Args:
        read: from transformers' configuration object and our fields so far.
        write: to fields of ``config.json``.
    """

    read: Callable[[Any, dict[str, Any]], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]


def bias(theirs: str, *ours: str) -> Trait:
    """A flag of theirs that says whether several of our parts have biases."""
    return Trait(
        lambda hf, _: dict.fromkeys(ours, bool(getattr(hf, theirs, False))),
        lambda cfg: {theirs: getattr(cfg, ours[0])},
    )


def head_width() -> Trait:
    """A width of heads that need not be d_model / n_heads; where theirs is not given it is."""
    return Trait(lambda hf, ours: {}, lambda cfg: {"head_dim": cfg.d_head})


# ----------------------------------------------------------------------------------------------------- rotary positions


def rotary(partial: bool = False) -> Trait:
    """θ and its scaling; of some families a part of each head turns."""
    return Trait(
        lambda hf, ours: _rotary_fields(hf.rope_parameters or {}, ours, partial),
        lambda cfg: _rope_fields(cfg) | (_partial_fields(cfg) if partial else {}),
    )


def _rotary_fields(rope: dict[str, Any], ours: dict[str, Any], partial: bool) -> dict[str, Any]:
    kind, share = rope.get("rope_type", "default"), rope.get("partial_rotary_factor")
    found: dict[str, Any] = {"rotary_base": float(rope.get("rope_theta") or 10_000.0), "rotary_scaling": None}
    if share not in (None, 1.0):
        if not partial:
            raise ReflowlensError("rotary positions on a part of a head (partial_rotary_factor) cannot be read")
        found["rotary_dim"] = int(ours["d_head"] * share)
    if kind == "linear":
        found["rotary_linear_factor"] = float(rope["factor"])
    elif kind == "llama3":
        found["rotary_scaling"] = RotaryScaling(
            factor=rope["factor"],
            low_freq_factor=rope["low_freq_factor"],
            high_freq_factor=rope["high_freq_factor"],
            original_context=rope["original_max_position_embeddings"],
        )
    elif kind != "default":
        raise ReflowlensError(
            f"rotary scaling {kind!r} cannot be read: plain rotary positions, 'linear' and 'llama3' can"
        )
    return found


def _scaling(cfg: ModelConfig) -> dict[str, Any] | None:
    scaling = cfg.rotary_scaling
    if scaling is None:
        linear = {"rope_type": "linear", "factor": cfg.rotary_linear_factor}
        return None if cfg.rotary_linear_factor == 1 else linear
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_context,
    }


def _rope_fields(cfg: ModelConfig) -> dict[str, Any]:
    """transformers 4 reads ``rope_theta`` and ``rope_scaling``, 5 ``rope_parameters``."""
    scaling = _scaling(cfg)
    return {
        "rope_theta": cfg.rotary_base,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_type": "default", **(scaling or {}), "rope_theta": cfg.rotary_base},
    }


def _partial_fields(cfg: ModelConfig) -> dict[str, Any]:
    share = (cfg.rotary_dim or cfg.d_head) / cfg.d_head
    rope = _rope_fields(cfg)["rope_parameters"] | {"partial_rotary_factor": share}
    return {"partial_rotary_factor": share, "rope_parameters": rope}


def _read_two_bases(hf: Any, ours: dict[str, Any]) -> dict[str, Any]:
    rope = hf.rope_parameters
    local = _rotary_fields(rope[_LOCAL], ours, partial=False)
    if rope[_LOCAL].get("rope_type", "default") != "default":
        raise ReflowlensError("rotary scaling of local layers cannot be read: of global ones alone it can")
    has_window = ours.get("window_size") is not None
    return _rotary_fields(rope[_GLOBAL], ours, partial=False) | (
        {"rotary_base_local": local["rotary_base"]} if has_window else {}
    )


def _write_two_bases(cfg: ModelConfig) -> dict[str, Any]:
    rope, local = _rope_fields(cfg), cfg.rotary_base_local or cfg.rotary_base
    by_type = {_GLOBAL: rope["rope_parameters"], _LOCAL: {"rope_type": "default", "rope_theta": local}}
    return rope | {"rope_local_base_freq": local, "rope_parameters": by_type}


TWO_BASES = Trait(_read_two_bases, _write_two_bases)


# -------------------------------------------------------------------------------------------------------------- windows


def _window_fields(window: int | None, types: list[str]) -> dict[str, Any]:
    """Ours, of layers each ``"local"`` or ``"global"``."""
    if window is None or "local" not in types:
        return {}
    return {"window_size": window, "attn_types": tuple(types) if "global" in types else None}


def _types(cfg: ModelConfig) -> list[str]:
    return ["global" if cfg.window_of(layer) is None else "local" for layer in range(cfg.n_layers)]


def _by_layer(hf: Any, ours: dict[str, Any]) -> dict[str, Any]:
    known = {_LOCAL: "local", _GLOBAL: "global"}
    if strange := [kind for kind in hf.layer_types if kind not in known]:
        raise ReflowlensError(f"layer_types has {strange[0]!r}, and {_LOCAL} and {_GLOBAL} can be read")
    return _window_fields(hf.sliding_window, [known[kind] for kind in hf.layer_types])


def _layer_types(cfg: ModelConfig) -> dict[str, Any]:
    names = {"local": _LOCAL, "global": _GLOBAL}
    return {"sliding_window": cfg.window_size, "layer_types": [names[kind] for kind in _types(cfg)]}


# One window for all layers; named per layer; the same behind a switch.
WINDOW = Trait(
    lambda hf, ours: _window_fields(hf.sliding_window, ["local"]),
    lambda cfg: {"sliding_window": None if "global" in _types(cfg) else cfg.window_size},
)
# Gemma makes the mask of local layers even where it has none, and that takes a number: the context hides nothing.
WINDOWS_BY_LAYER = Trait(_by_layer, lambda cfg: _layer_types(cfg) | {"sliding_window": cfg.window_size or cfg.n_ctx})
SWITCHED_WINDOWS = Trait(_by_layer, lambda cfg: _layer_types(cfg) | {"use_sliding_window": cfg.window_size is not None})
GPT_NEO_WINDOWS = Trait(
    lambda hf, ours: _window_fields(hf.window_size, list(hf.attention_layers)),
    lambda cfg: {
        "window_size": cfg.window_size or 256,
        "attention_layers": _types(cfg),
        "attention_types": [[_types(cfg), 1]],
    },
)


# ------------------------------------------------------------------------------------------------- what one family has

GPT2_CONTEXT = Trait(lambda hf, ours: {}, lambda cfg: {"n_ctx": cfg.n_ctx})  # llama.cpp reads it
PARALLEL = Trait(
    lambda hf, ours: {"parallel_attn_mlp": bool(hf.use_parallel_residual)},
    lambda cfg: {"use_parallel_residual": cfg.parallel_attn_mlp},
)
GPTJ_ROTARY = Trait(
    lambda hf, ours: {"rotary_dim": None if hf.rotary_dim in (None, ours["d_head"]) else hf.rotary_dim},
    lambda cfg: {"rotary_dim": cfg.rotary_dim or cfg.d_head},
)
SOME_LAYERS_TURN = Trait(
    lambda hf, ours: {
        "rotary_layers": None if all(hf.no_rope_layers) else tuple(map(bool, hf.no_rope_layers[: ours["n_layers"]]))
    },
    lambda cfg: {"no_rope_layers": [int(cfg.turns(layer)) for layer in range(cfg.n_layers)]},
)
SCALED_EMBEDDING = Trait(lambda hf, ours: {"embed_scale": ours["d_model"] ** 0.5}, lambda cfg: {})


def _attention_scale(hf: Any, ours: dict[str, Any]) -> dict[str, Any]:
    width = hf.query_pre_attn_scalar
    return {"attn_scale": None if width == ours["d_head"] else float(width) ** 0.5}


def _query_scalar(cfg: ModelConfig) -> dict[str, Any]:
    square = cfg.d_head if cfg.attn_scale is None else cfg.attn_scale**2
    return {"query_pre_attn_scalar": round(square) if abs(square - round(square)) < 1e-6 else square}


QUERY_SCALAR = Trait(_attention_scale, _query_scalar)
ATTENTION_CAP = Trait(
    lambda hf, ours: {"attn_scores_soft_cap": hf.attn_logit_softcapping},
    lambda cfg: {"attn_logit_softcapping": cfg.attn_scores_soft_cap},
)
LOGITS_CAP = Trait(
    lambda hf, ours: {"output_logits_soft_cap": hf.final_logit_softcapping},
    lambda cfg: {"final_logit_softcapping": cfg.output_logits_soft_cap},
)


def _multipliers(hf: Any, ours: dict[str, Any]) -> dict[str, Any]:
    for name in ("attention_multiplier", "logits_scaling"):  # which something is divided by
        if not is_positive(value := getattr(hf, name)):
            raise ReflowlensError(f"{name} must be a positive number, got {value!r}")
    scale = float(f"{1 / hf.attention_multiplier:.12g}")  # the same after its inverse was written and read
    usual = math.isclose(scale, ours["d_head"] ** 0.5, rel_tol=1e-9)
    return {"embed_scale": float(hf.embedding_multiplier), "attn_scale": None if usual else scale}


# What blocks write and logits are multiplied by is in the weights.
MULTIPLIERS = Trait(
    _multipliers,
    lambda cfg: {
        "embedding_multiplier": cfg.embed_scale,
        "attention_multiplier": float(f"{1 / (cfg.attn_scale or cfg.d_head**0.5):.15g}"),
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
)
LOGIT_SCALE = Trait(lambda hf, ours: {}, lambda cfg: {"logit_scale": 1.0})


def gemma_activation(*theirs: str) -> Trait:
    """Gemma's name of the activation, on export."""
    return Trait(
        lambda hf, ours: {},
        lambda cfg: dict.fromkeys(theirs, "gelu_pytorch_tanh" if cfg.act_fn == "gelu_new" else cfg.act_fn),
    )
