"""The target tokens of a measure, as a caller gives them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from reflowlens.arguments import integer
from reflowlens.errors import ReflowlensError

Target: TypeAlias = "str | int | Sequence[str | int] | Int[Tensor, ' prompt']"


def target_ids(
    to_single_token: Callable[[str], int], target: Target, n_prompts: int, d_vocab: int
) -> Int[Tensor, " prompt"]:
    """The id of the target token of each prompt.

    Args:
        to_single_token: the model's method; called with texts only.
        target: one token for all prompts (its text, or its id), or one for each prompt.
        d_vocab: number of ids, padding of the vocabulary included.

    Raises:
        ReflowlensError: a text is not a single token, there is no such id, or there are not as many targets as prompts.
    """
    words: Any = target
    is_list = isinstance(target, Sequence) and not isinstance(target, str | bytes)
    if not getattr(target, "ndim", is_list):
        words = [target] * n_prompts
    if len(words) != n_prompts:
        raise ReflowlensError(f"{len(words)} target tokens are given for {n_prompts} prompts")
    ids = []
    for word in words:
        token = to_single_token(word) if isinstance(word, str) else integer(word)
        if token is None:
            raise ReflowlensError(f"a target is the text or the id of a token, got {word!r}")
        if not 0 <= token < d_vocab:
            raise ReflowlensError(f"no token {token}: ids are 0 to {d_vocab - 1}")
        ids.append(token)
    return torch.tensor(ids)
