"""Validation loss of any model on any prepared data."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from pretraining.batches import count_batches, sequential_batches, spread_batches
from pretraining.config import TrainConfig
from pretraining.distributed import Processes
from pretraining.machine import autocast
from pretraining.token_files import TokenData, check_tokens, open_tokens
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.progress import bar

if TYPE_CHECKING:
    from pretraining.batches import Batch


@dataclass(frozen=True)
class Evaluation:
    """Loss over ``tokens`` predicted tokens.

    Args:
        loss: mean cross-entropy in nats a token.
        bits_per_byte: the same information spread over the text's UTF-8 bytes, comparable between tokenizers.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int


def evaluate_model(
    model: HookedModel, folder: str | Path, *, split: str = "val", batch_size: int = 32, progress: bool | None = None
) -> Evaluation:
    """Read a whole split in order, in blocks of the model's context; every token but the first is predicted once.

    Args:
        progress: show a bar, or lines where there is no terminal; by default only on a terminal.

    Raises:
        ReflowlensError: the data were prepared with another tokenizer, or were changed since.

    Example: ``evaluate_model(rl.load_model("reflow-nano"), "data/mix16k").loss``
    """
    data = tokens_for(model, folder, split)
    n_batches = count_batches(len(data.tokens), batch_size, model.cfg.n_ctx)
    batches = sequential_batches(data.tokens, batch_size, model.cfg.n_ctx)
    show = sys.stderr.isatty() if progress is None else progress
    total, tokens = summed_loss(model, bar(batches, show=show, total=n_batches, desc="evaluating", unit="batch"))
    loss, text_bytes = total / tokens, data.manifest.splits[split].text_bytes
    return Evaluation(loss, math.exp(loss), total / math.log(2) / text_bytes, tokens)


def tokens_for(model: HookedModel, folder: str | Path, split: str, name: str = "the model") -> TokenData:
    """A split of prepared data, which the model can read and whose files are as they were prepared.

    Args:
        name: what an error calls the model.

    Raises:
        ReflowlensError: the data were prepared with another tokenizer, or were changed since.
    """
    data = open_tokens(folder, split)
    check_tokens(folder, split)
    if data.manifest.tokenizer != model.cfg.tokenizer_name:
        raise ReflowlensError(
            f"{folder} was prepared with {data.manifest.tokenizer!r}, but {name} reads {model.cfg.tokenizer_name!r}"
        )
    return data


def evaluate(
    model: HookedModel,
    tokens: Any,
    cfg: TrainConfig,
    group: Processes,
    max_tokens: int | None = None,
    progress: bool = False,
) -> float:
    """Mean next-token loss in nats over the validation stream, or ``max_tokens`` spread over it; processes share it."""
    rows = max(1, cfg.run.batch_size // cfg.run.accumulation)
    batches = spread_batches(tokens, rows, cfg.data.context, max_tokens)
    numbers = itertools.count()
    own = (batch for batch in batches if next(numbers) % group.world_size == group.rank)
    training = model.training
    model.eval()
    with autocast(group.device, cfg.run.dtype):
        total = math.ceil(count_batches(len(tokens), rows, cfg.data.context, max_tokens) / group.world_size)
        show = progress and group.is_first
        share = summed_loss(model, bar(own, show=show, total=total, unit="batch", desc="evaluating", leave=False))
        remainder = next(numbers) % group.world_size
        if cfg.run.sharding == "fsdp" and 0 < remainder <= group.rank:
            # Sliced weights are put together by all processes or by none: take part without a batch to read.
            summed_loss(model, [(torch.zeros(1, 1, dtype=torch.int64),) * 2])
    model.train(training)
    sums = torch.tensor(share, dtype=torch.float64, device=group.device)
    if group.world_size > 1:
        dist.all_reduce(sums)
    return float(sums[0] / sums[1])


@torch.no_grad()
def summed_loss(model: HookedModel, batches: Iterable[Batch]) -> tuple[float, int]:
    """Next-token loss in nats summed over batches of inputs and targets, and how many tokens were predicted."""
    total, count = 0.0, 0
    for x, y in batches:
        loss = model(x.to(model.cfg.device), "loss", targets=y.to(model.cfg.device))
        total, count = total + loss.item() * y.numel(), count + y.numel()
    return total, count
