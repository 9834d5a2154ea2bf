"""Activations of a stream of text: batches are read once, and what a hook point holds is measured and let go.

    def measure(name: str, x: Float[Tensor, "n *feature"], occurrences: Occurrences) -> Moments:
        return Moments.of(x.flatten(1), pairs=False)

    for parts, *_ in measured(model, texts, ["hook_embed"], measure):
        total = parts["hook_embed"] if total is None else total.merge(parts["hook_embed"])

A statistic of a long text is one that can be made of a batch and merged with that of the batches before it. The memory
of a pass is then that of one batch, and of what is made of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from reflowlens.errors import ReflowlensError
from reflowlens.interventions.passes import check_lengths_known
from reflowlens.models.base import HookedModel
from reflowlens.models.text import TextInput

Part = TypeVar("Part")
_ROWS_AT_ONCE = 16  # of tokens that come as one array
_BEFORE_BLOCKS = ("hook_recipe", "hook_embed", "hook_pos_embed")


@dataclass(frozen=True, eq=False)
class Occurrences:
    """Where the n vectors of a batch are, prompt after prompt.

    Args:
        row: of the prompt, counted from the first prompt of the batch that is run.
        position, token: in the prompt, and the token there.
    """

    row: Int[Tensor, " n"]
    position: Int[Tensor, " n"]
    token: Int[Tensor, " n"]


Measure: TypeAlias = Callable[[str, Float[Tensor, "n *feature"], Occurrences], Part]


def measured(
    model: HookedModel,
    batches: Iterable[TextInput] | Int[Tensor, "row pos"] | np.ndarray,
    names: Sequence[str],
    measure: Measure[Part],
    *,
    positions: slice = slice(None),
    skip: int = 0,
) -> Iterator[tuple[dict[str, Part], int, int]]:
    """Run a model over a stream, and measure the activations of each batch at the moment that they exist.

    Args:
        model: what is attached to it acts; it runs as far as the hook points need.
        batches: an iterable of what the model reads (a text, a list of texts, tokens [batch, pos]), read once; or one
            array of tokens [row, pos].
        names: hook points whose activations are [batch, pos, ...].
        measure: what is made of the name of a point, its activations at the positions that count, and where these are.
            It must not keep the activations.
        positions: which of each prompt's own positions count.
        skip: so many prompts of the stream are read, and not run.

    Yields:
        For each batch, once all its points are measured: what was made of each point (nothing if no position of the
        batch counts), the number of its prompts that were run, and the number of its positions, without padding, those
        of skipped prompts included.

    Raises:
        ReflowlensError: the batches are not what a model reads, or a point does not exist or has no positions.
    """
    for batch in _split(batches):
        tokens, lengths = model.tokens_and_lengths(batch)
        check_lengths_known(model, lengths)
        skipped = min(skip, len(tokens))
        skip -= skipped
        rows = tokens[skipped:]
        occurrences = _occurrences(rows, lengths[skipped:], positions)
        parts: dict[str, Part] = {}
        if len(occurrences.row):
            watch = partial(_watch, parts, measure, occurrences)
            with torch.no_grad(), model.hooks([(name, watch) for name in dict.fromkeys(names)]):
                model(rows, return_type=None, stop_at_layer=first_unneeded_block(names))
        yield {name: parts[name] for name in names if parts}, len(rows), sum(lengths)


def _occurrences(tokens: Int[Tensor, "batch pos"], lengths: Sequence[int], positions: slice) -> Occurrences:
    counts = torch.zeros(tokens.shape, dtype=torch.bool)
    for of_row, length in zip(counts, lengths, strict=True):
        of_row[:length][positions] = True
    row, position = counts.nonzero().to(tokens.device).unbind(dim=1)
    return Occurrences(row, position, tokens[row, position])


def _watch(
    parts: dict[str, Part], measure: Measure[Part], occurrences: Occurrences, activation: Tensor, hook: HookPoint
) -> None:
    every = activation.shape[:2].numel() == len(occurrences.row)
    x = activation.flatten(0, 1) if every else activation[occurrences.row, occurrences.position]
    parts[str(hook.name)] = measure(str(hook.name), x, occurrences)


def first_unneeded_block(names: Sequence[str]) -> int | None:
    """The first block that need not run; None when the end of the pass is asked for."""
    if not all(name.startswith("blocks.") or name in _BEFORE_BLOCKS for name in names):
        return None
    return max((int(name.split(".")[1]) + 1 for name in names if name.startswith("blocks.")), default=0)


def _split(batches: Iterable[TextInput] | Tensor | np.ndarray) -> Iterator[TextInput]:
    if isinstance(batches, str):
        raise ReflowlensError("batches must be a list of texts or of batches, not one text")
    if not isinstance(batches, Iterable):
        raise ReflowlensError(f"batches must be a list of texts or of batches, or an array of tokens, got {batches!r}")
    if not isinstance(batches, np.ndarray | Tensor):
        yield from batches
        return
    if batches.ndim != 2:
        raise ReflowlensError(f"an array of tokens must be [row, pos], got {list(batches.shape)}")
    yield from (batches[start : start + _ROWS_AT_ONCE] for start in range(0, len(batches), _ROWS_AT_ONCE))
