"""What a configuration may hold: each function raises an error that names the field and the allowed values."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from reflowlens.config.architectures import CHOICES, FIXED, NEURONS_IN_HEADS, UNPRUNED
from reflowlens.decoder_options import RotaryScaling, is_integer, is_positive
from reflowlens.errors import ReflowlensError
from reflowlens.ttt_flow_config import TTTFlowConfig

if TYPE_CHECKING:
    from reflowlens.config.model import ModelConfig

_OPTIONAL_SIZES = ("n_key_value_heads", "n_signals", "original_n_ctx")
# Far beyond any model: a damaged number is refused before it is built, and no product of sizes overflows.
LARGEST = {"n_layers": 1 << 14, "d_model": 1 << 20, "n_heads": 1 << 14, "d_head": 1 << 20, "d_mlp": 1 << 24}
LARGEST |= dict.fromkeys(("d_vocab", "n_ctx", "n_key_value_heads", "n_signals", "original_n_ctx"), 1 << 24)


def check(cfg: ModelConfig) -> None:
    """Raise unless fields, one by one and together, make up a model; options of decoders check themselves.

    Raises:
        ReflowlensError: a field has a value that is not allowed.
    """
    for name, allowed in CHOICES.items():
        if getattr(cfg, name) not in allowed and not (name == "tokenizer_name" and cfg.has_file_tokenizer):
            raise ReflowlensError(choice_message(name, getattr(cfg, name)))
    for field in dataclasses.fields(cfg):
        if str(field.type).startswith("bool") and not isinstance(getattr(cfg, field.name), bool):
            raise ReflowlensError(
                f"{field.name} must be True or False (in TOML true or false), got {getattr(cfg, field.name)!r}"
            )
    for name, largest in LARGEST.items():
        value = getattr(cfg, name)
        if name in _OPTIONAL_SIZES and value is None:
            continue
        if not (is_integer(value) and value >= 1):
            raise ReflowlensError(f"{name} must be a positive integer, got {value!r}")
        if value > largest:
            raise ReflowlensError(f"{name} must be at most {largest:,}, got {value:,}")
    for name in ("eps", "rotary_base", "initializer_range"):
        if not is_positive(getattr(cfg, name)):
            raise ReflowlensError(f"{name} must be a positive number, got {getattr(cfg, name)!r}")
    _check_heads(cfg)
    _check_rotary(cfg)
    _check_signals(cfg)
    _check_readout(cfg)
    _check_neurons(cfg)
    _check_ttt_flow(cfg)


def _check_heads(cfg: ModelConfig) -> None:
    if cfg.n_heads % cfg.kv_heads:
        raise ReflowlensError(f"n_key_value_heads must divide n_heads={cfg.n_heads}, got {cfg.n_key_value_heads}")


def _check_rotary(cfg: ModelConfig) -> None:
    if cfg.positional_embedding_type == "rotary" and cfg.d_head % 2:
        raise ReflowlensError(f"d_head must be even for rotary positions, got {cfg.d_head}")
    if not isinstance(cfg.rotary_scaling, RotaryScaling | None):
        raise ReflowlensError(f"rotary_scaling must be None or a RotaryScaling, got {cfg.rotary_scaling!r}")


def _check_signals(cfg: ModelConfig) -> None:
    if cfg.is_factored and cfg.n_signals is None:
        raise ReflowlensError(f"n_signals must be a positive integer for architecture {cfg.architecture!r}")
    if cfg.is_factored and not cfg.tie_word_embeddings:
        raise ReflowlensError(
            f"tie_word_embeddings must be True for architecture {cfg.architecture!r}: recipe and basis serve both ends"
        )
    if not cfg.is_factored and cfg.n_signals is not None:
        raise ReflowlensError(
            f"n_signals must be None for architecture {cfg.architecture!r}: its embedding is not factored"
        )
    if cfg.architecture == "reflow_topk":
        if not (is_integer(cfg.topk) and 1 <= cfg.topk <= (cfg.n_signals or 0)):
            raise ReflowlensError(f"topk must be an integer between 1 and n_signals={cfg.n_signals}, got {cfg.topk!r}")
        return
    for name, unpruned in UNPRUNED.items():
        if getattr(cfg, name) != unpruned:
            raise ReflowlensError(
                f"{name} must be {unpruned!r} for architecture {cfg.architecture!r}: only reflow_topk prunes"
            )


def _check_readout(cfg: ModelConfig) -> None:
    if cfg.unembed_bias and cfg.tie_word_embeddings:
        raise ReflowlensError(
            "unembed_bias must be False with tie_word_embeddings=True: a readout of its own alone has a bias"
        )


def _check_neurons(cfg: ModelConfig) -> None:
    if not (isinstance(cfg.dropout, int | float) and 0 <= cfg.dropout < 1):
        raise ReflowlensError(f"dropout must be a number from 0 to below 1, got {cfg.dropout!r}")
    in_heads = cfg.architecture in NEURONS_IN_HEADS
    if in_heads and cfg.d_mlp != cfg.n_heads * cfg.d_head:
        raise ReflowlensError(
            f"d_mlp must be n_heads * d_head = {cfg.n_heads * cfg.d_head}, the neurons of a level, got {cfg.d_mlp}"
        )
    for name, value in FIXED.get(cfg.architecture, {}).items():
        if getattr(cfg, name) != value:
            raise ReflowlensError(
                f"{name} must be {value!r} for architecture {cfg.architecture!r}, got {getattr(cfg, name)!r}"
            )


def _check_ttt_flow(cfg: ModelConfig) -> None:
    is_one = cfg.architecture == "ttt_flow"
    if not isinstance(cfg.ttt_flow, TTTFlowConfig if is_one else None.__class__):
        expected = "a TTTFlowConfig" if is_one else "None"
        raise ReflowlensError(
            f"ttt_flow must be {expected} for architecture {cfg.architecture!r}, got {cfg.ttt_flow!r}"
        )
    if cfg.ttt_flow is not None:
        cfg.ttt_flow.check(d_model=cfg.d_model, d_head=cfg.d_head, n_layers=cfg.n_layers)


def choice_message(field: str, value: object) -> str:
    """That a field has none of its allowed values."""
    return f"{field} must be one of {', '.join(map(repr, CHOICES[field]))}, got {value!r}"
