"""What functions of a model accept: a hooked model, compiled or not, that no other thread is using."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.out_of_memory import lower_if_it_does_not_fit

Function = TypeVar("Function", bound=Callable[..., Any])


def hooked_model(model: Any) -> HookedModel:
    """The model itself, or what ``torch.compile`` made a compiled one of.

    A compiled module answers to most names of the model inside it, but its parameters have other names and its graph
    does not see new hooks.

    Raises:
        ReflowlensError: it is no hooked model: a name, a model in a wrapper for training, or one of another library.
    """
    while isinstance(model, nn.Module) and isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
        model = inner
    if isinstance(model, HookedModel):
        return model
    if isinstance(model, str | Path):
        raise ReflowlensError(f"{str(model)!r} is a name and not a model: load it with rl.load_model({str(model)!r})")
    kind = type(model).__name__
    if isinstance(model, nn.Module) and isinstance(getattr(model, "module", None), nn.Module):
        raise ReflowlensError(f"a {kind} wraps the model: pass model.module")
    raise ReflowlensError(f"expected a hooked model, as rl.load_model and rl.build_model give, got a {kind}")


def guarded(
    hold: Callable[[HookedModel], AbstractContextManager[None]],
    lower: str = "the number or the length of the prompts that are given at once, the memory= of a batch where it was "
    "given, or the model's type (load_model(..., dtype=torch.bfloat16))",
) -> Callable[[Function], Function]:
    """Hold a model, a function's first argument, for a whole call: ``changing`` or ``reading`` (:mod:`.threads`).

    For functions that run it several times: what another thread changed in between would be in some of the runs.

    Args:
        hold: how the model is held.
        lower: what its caller may lower where the memory does not hold the runs.
    """

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def held(model: Any, *args: Any, **kwargs: Any) -> Any:
            with hold(hooked_model(model)), lower_if_it_does_not_fit(lower):
                return function(model, *args, **kwargs)

        return held  # type: ignore[return-value] # called as the function is

    return decorate
