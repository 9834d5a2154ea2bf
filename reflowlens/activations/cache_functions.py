"""TransformerLens's functions of a cache: what they cannot compute with is an error that names it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from reflowlens.arguments import integer, is_one_of
from reflowlens.errors import ReflowlensError
from reflowlens.out_of_memory import is_out_of_memory

Function = TypeVar("Function", bound=Callable[..., Any])
Class = TypeVar("Class", bound=type)
_UP_TO_LAYER = (
    "accumulated_resid",
    "apply_ln_to_stack",
    "decompose_resid",
    "get_full_resid_decomposition",
    "stack_activation",
    "stack_head_results",
    "stack_neuron_results",
)
_PARTS = (
    "decompose_resid",
    "get_full_resid_decomposition",
    "get_neuron_results",
    "stack_head_results",
    "stack_neuron_results",
)
_OTHERS = (
    "apply_slice_to_batch_dim",
    "compute_ssm_effective_attention",
    "compute_ssm_state",
    "get_neuron_results",
    "logit_attrs",
    "logit_lens",
    "remove_batch_dim",
    "to",
    "toggle_autodiff",
)


def with_checked_arguments(cls: Class) -> Class:
    """A class of caches whose functions of TransformerLens raise :class:`ReflowlensError` for what they cannot use."""
    for name in (*_UP_TO_LAYER, *_OTHERS):
        setattr(cls, name, _checked(getattr(cls, name)))
    return cls


def _checked(function: Function) -> Function:
    signature, name = inspect.signature(function), function.__name__

    @functools.wraps(function)
    def call(cache: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(cache, *args, **kwargs).arguments
        if name in _UP_TO_LAYER and given.get("layer") is not None:
            given["layer"] = _layer(given["layer"], cache)
        if name == "decompose_resid" and not is_one_of(given.get("mode", "all"), ("all", "mlp", "attn")):
            raise ReflowlensError(f"mode must be 'all', 'mlp' or 'attn', got {given['mode']!r}")
        if name in _PARTS and cache.model is not None and cache.model.stages == "whole":
            raise ReflowlensError(
                f"cache.{name} is of streams that are sums of what heads and MLPs write, and blocks of a "
                f"{type(cache.model).__name__} scale theirs and read earlier streams: read its hook points"
            )
        _check_options(name, given, cache)
        extra = given.pop("kwargs", {})
        try:
            return function(**given, **extra)
        except ReflowlensError:
            raise
        except (
            AssertionError,
            AttributeError,
            IndexError,
            OverflowError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            if is_out_of_memory(error):
                raise
            shown = ", ".join(f"{key}={_short(value)}" for key, value in list(given.items())[1:])
            raise ReflowlensError(f"cache.{name}({shown}) cannot be computed: {error or 'a wrong type'}") from error

    return call  # type: ignore[return-value] # called as the function is


def _check_options(name: str, given: dict[str, Any], cache: Any) -> None:
    """TransformerLens's functions take it that heads and neurons are added as they are, and MLPs read behind heads."""
    cfg = None if cache.model is None else cache.model.cfg
    if cfg is not None and name in _PARTS and name != "decompose_resid" and cfg.has_post_norms:
        raise ReflowlensError(
            f"cache.{name} is of heads and neurons that are added to the stream as they are, and in this model they "
            "pass a norm together (ln1_post, ln2_post): use decompose_resid, or rl.attribute(..., heads=True)"
        )
    if cfg is not None and cfg.parallel_attn_mlp and given.get("mlp_input") and name != "apply_ln_to_stack":
        raise ReflowlensError(
            f"mlp_input=True asks cache.{name} for what an MLP reads behind attention, and here both read resid_pre: "
            "leave it out"
        )


def _layer(layer: Any, cache: Any) -> int:
    """A layer as a Python integer: TransformerLens counts up to it, so that one below -1 would be no layers."""
    number, n_layers = integer(layer), cache.model.cfg.n_layers if cache.model is not None else None
    if number is None or number < -1 or (n_layers is not None and number > n_layers):
        end = "" if n_layers is None else f" to {n_layers}"
        raise ReflowlensError(f"layer must be an integer from 0{end}, or -1 or None for the end, got {layer!r}")
    return number


def _short(value: Any) -> str:
    if isinstance(value, Tensor | np.ndarray) and value.ndim:
        return f"{type(value).__name__.lower()} {list(value.shape)}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
