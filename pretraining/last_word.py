"""LAMBADA's task: the last word of a passage, which the passage before it tells (Paperno et al., 2016)."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping

import pandas as pd
import torch
from jaxtyping import Int
from scipy import stats
from torch import Tensor

from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.progress import bar
from reflowlens.tokenizers.base import Tokenizer


def last_word_accuracy(
    models: Mapping[str, HookedModel], passages: Iterable[str], *, batch_size: int = 16, progress: bool | None = None
) -> pd.DataFrame:
    """How often all tokens of a passage's last word are the likeliest ones.

    A passage is read behind the tokenizer's end-of-document token where it has one, and from as far back as the model's
    context allows.

    Returns:
        A row a model: ``model``, ``passages``, ``accuracy`` with its 95% interval ``low``, ``high`` (Wilson).

    Raises:
        ReflowlensError: a passage has no word before its last, or there is none.

    Example: ``last_word_accuracy({"reflow-nano": model}, ["The cat sat on the mat"])``
    """
    texts = [passage.rstrip() for passage in passages]
    if not texts:
        raise ReflowlensError("no passage to predict the last word of")
    rows = []
    for name, model in models.items():
        read = [read_up_to(text, model.tokenizer, model.cfg.n_ctx) for text in texts]
        hits = 0
        show = sys.stderr.isatty() if progress is None else progress
        for start in bar(range(0, len(read), batch_size), show=show, desc=name, unit="batch"):
            hits += int(is_predicted(model, read[start : start + batch_size]).sum())
        interval = stats.binomtest(hits, len(texts)).proportion_ci(method="wilson")
        row = {"model": name, "passages": len(texts), "accuracy": hits / len(texts)}
        rows.append(row | {"low": float(interval.low), "high": float(interval.high)})
    return pd.DataFrame(rows)


def read_up_to(text: str, tokenizer: Tokenizer, n_ctx: int) -> tuple[list[int], int]:
    """The tokens of a passage, at most ``n_ctx`` + 1 of them, and how many are its last word.

    >>> from reflowlens.tokenizers import get_tokenizer
    >>> read_up_to("to be", get_tokenizer("bytes"), 24)
    ([116, 111, 32, 98, 101], 3)
    """
    before, space, _ = text.rpartition(" ")
    if not space or not before.strip():
        raise ReflowlensError(f"a passage needs a word before its last: {text[:60]!r}")
    ids = tokenizer.encode(text)
    n_before = len(tokenizer.encode(before))
    start = [] if tokenizer.eot_token is None else [tokenizer.eot_token]
    return [*start, *ids][-(n_ctx + 1) :], len(ids) - n_before


@torch.no_grad()
def is_predicted(model: HookedModel, passages: list[tuple[list[int], int]]) -> Int[Tensor, " passage"]:
    """Of each passage whether the likeliest tokens are those of its last word."""
    length = max(len(ids) for ids, _ in passages) - 1
    tokens, targets = torch.zeros(len(passages), length, dtype=torch.long), torch.full((len(passages), length), -1)
    for row, (ids, n_last) in enumerate(passages):
        tokens[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        targets[row, len(ids) - 1 - n_last : len(ids) - 1] = torch.tensor(ids[-n_last:])
    asked = targets >= 0
    stream = model.final_stream(tokens.to(model.cfg.device))[asked.to(model.cfg.device)][:, None]
    likeliest = model.read_final(stream).logits()[:, 0].argmax(-1).cpu()
    wrong = torch.zeros_like(targets, dtype=torch.bool)
    wrong[asked] = likeliest != targets[asked]
    return (~wrong.any(dim=1)).long()
