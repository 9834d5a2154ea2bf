"""Forward passes of a model that is under interventions: hooks are told what each reads, and none is compiled."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from reflowlens.arguments import integer
from reflowlens.errors import ReflowlensError
from reflowlens.interventions.selectors import Prompt
from reflowlens.models.base import HookedModel
from reflowlens.models.checked_pass import checked_mask
from reflowlens.models.pass_context import giving_lengths, growing_rows
from reflowlens.models.past import read_before
from reflowlens.models.text import read_once
from reflowlens.models.threads import reading


class _Uncompiled:
    """Compiled models run uncompiled while any of these blocks is open, in whatever order they are closed."""

    def __init__(self) -> None:
        self._lock, self._open, self._stance = threading.Lock(), 0, contextlib.ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._open:
                self._stance.enter_context(torch.compiler.set_stance("force_eager"))
            self._open += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._open -= 1
            if not self._open:
                self._stance.close()


UNCOMPILED = _Uncompiled()


@dataclass(eq=False)
class _Block:
    """The passes that a block of interventions sees, innermost last, and the lengths that it was given.

    Of ``source_prompts`` prompts each row of a pass has its own; of one all have it.
    """

    passes: list[Prompt]
    lengths: Sequence[int] | None
    source_prompts: int


@dataclass
class _Noted:
    """The open blocks of a model, and the ``forward`` that it had of its own before them."""

    own_forward: Callable[..., Any] | None
    blocks: list[_Block] = field(default_factory=list)


_NOTED: WeakKeyDictionary[HookedModel, _Noted] = WeakKeyDictionary()


@contextlib.contextmanager
def noting_passes(
    model: HookedModel, passes: list[Prompt], lengths: Sequence[int] | None, source_prompts: int = 1
) -> Iterator[None]:
    """Keep in ``passes`` what is being read: selectors such as ``"last"`` depend on it.

    Blocks may be closed in any order: the first changes the model's forward pass, the last restores it.
    """
    if lengths is not None and (not isinstance(lengths, Sequence) or any(integer(n) is None for n in lengths)):
        raise ReflowlensError(f"lengths must be a list of numbers of tokens, got {lengths!r}")
    block = _Block(passes, lengths, source_prompts)
    if model not in _NOTED:
        _NOTED[model] = _Noted(model.__dict__.get("forward"))
        model.forward = MethodType(
            _noting(model, model.forward), model
        )  # bound, so that a deepcopy binds it to the copy
    noted = _NOTED[model]
    noted.blocks.append(block)
    try:
        with giving_lengths(model, lengths):
            yield
    finally:
        noted.blocks.remove(block)
        if not noted.blocks:
            del _NOTED[model], model.forward
            if noted.own_forward is not None:
                model.forward = noted.own_forward


def _noting(model: HookedModel, forward: Callable[..., Any]) -> Callable[..., Any]:
    def noting(self: HookedModel, input: Any, *args: Any, **kwargs: Any) -> Any:
        if self is not model:  # a deepcopy, which would answer with the weights of the original
            raise ReflowlensError("this model was copied inside rl.intervene: copy it outside of the block")
        input = read_once(input)
        with reading(model):
            open_blocks = _NOTED[model].blocks if model in _NOTED else []
            blocks = [(block, _prompt(model, input, kwargs, block.lengths)) for block in open_blocks]
            for block, prompt in blocks:
                block.passes.append(prompt)
            try:
                return forward(input, *args, **kwargs)
            finally:
                for block, _ in blocks:
                    block.passes.pop()

    return noting


def is_intervened(model: HookedModel) -> bool:
    """Whether a block of interventions is open on a model."""
    return model in _NOTED


def check_rows_are_free(model: HookedModel) -> None:
    """Raise where rows of a pass are patched each from its own: a function that batches texts anew would mix them."""
    most = max((block.source_prompts for block in _NOTED[model].blocks), default=1) if is_intervened(model) else 1
    if most > 1:
        raise ReflowlensError(
            f"texts are read in batches of other texts here, and a patch from {most} prompts gives each row of a pass "
            "its own: patch from one prompt"
        )


def check_lengths_known(model: HookedModel, lengths: Sequence[int]) -> None:
    """Raise where interventions are at work on a model that is about to be given padded tokens instead of texts."""
    if len(set(lengths)) > 1 and is_intervened(model):
        raise ReflowlensError(
            f"inside rl.intervene prompts must be of one length here, got {', '.join(map(str, lengths))} tokens: "
            "intervene on each length by itself"
        )


def _lengths_from_the_left(
    input: Any, tokens: Int[Tensor, "batch pos"], lengths: list[int], kwargs: Mapping[str, Any]
) -> list[int]:
    """The number of each row's own tokens, as padding on the right leaves them, where selectors count positions."""
    mask, on_left = kwargs.get("attention_mask"), kwargs.get("padding_side") == "left"
    if mask is not None:
        own = checked_mask(mask, tokens.shape)
        on_left, lengths = not bool(own[:, 0].all()), own.sum(dim=1).tolist()
    elif isinstance(input, Tensor | np.ndarray):
        on_left = False
    if on_left and len(set(lengths)) > 1:
        raise ReflowlensError(
            "inside rl.intervene positions count from the beginning of a row: give the texts themselves, or rows that "
            "are padded on the right with their attention_mask"
        )
    return lengths


def _prompt(model: HookedModel, input: Any, kwargs: dict[str, Any], lengths: Sequence[int] | None) -> Prompt:
    past, growing = kwargs.get("past_kv_cache"), growing_rows()
    offset = read_before(past)
    tokens, own = None, list[int]()
    if kwargs.get("start_at_layer") is None:
        tokens, own = model.tokens_and_lengths(input, offset=offset)
        own = _lengths_from_the_left(input, tokens, own, kwargs)
    shape = (*getattr(input, "shape", ()), 0, 0)[:2] if tokens is None else tokens.shape  # the model refuses no stream
    if lengths is not None and isinstance(input, Tensor):
        if len(lengths) != shape[0] or not all(1 <= length <= shape[1] for length in lengths):
            raise ReflowlensError(
                f"lengths {list(lengths)} do not fit an input of {shape[0]} rows and {shape[1]} tokens"
            )
        own = list(lengths)
    return Prompt(shape[1], tokens, own, offset, past is not None or growing is not None, growing)
