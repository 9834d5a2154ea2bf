"""Top-k dictionaries for readers that know only thresholds, and what that costs.

Which features are among a position's k largest depends on all of them; a threshold depends on one. No threshold chooses
the same, so that what a file of thresholds computes is another dictionary, whose difference is measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from reflowlens.dictionaries.belonging import check_belongs
from reflowlens.dictionaries.dictionary import Dictionary, DictionaryLayer
from reflowlens.errors import ReflowlensError


class Activations(NamedTuple):
    """What every layer of a dictionary reads and is to write, at the same positions."""

    reads: list[Float[Tensor, "token d_in"]]
    writes: list[Float[Tensor, "token d_out"]]


@torch.no_grad()
def activations_of(
    dictionary: Dictionary, model: Any, batches: Iterable[Int[Tensor, "batch pos"]], *, other_model: bool = False
) -> Activations:
    """The activations of a model that a dictionary reads and writes; the first position of each row is left out.

    Args:
        batches: token ids, rows without padding. Everything is kept in memory.
        other_model: as :func:`reflowlens.dictionaries.belonging.check_belongs` has it.
    """
    model, cfg = check_belongs(dictionary, model, other_model=other_model), dictionary.cfg
    kept: dict[str, list[Tensor]] = {point: [] for point in (*cfg.reads, *cfg.writes)}
    for tokens in batches:
        _, cache = model.run_with_cache(tokens, names_filter=list(kept))
        for point, parts in kept.items():
            parts.append(cache[point][:, 1:].flatten(0, 1).cpu())
    if not kept[cfg.reads[0]]:
        raise ReflowlensError("there are no tokens to take activations from")
    whole = {point: torch.cat(parts) for point, parts in kept.items()}
    return Activations([whole[point] for point in cfg.reads], [whole[point] for point in cfg.writes])


@torch.no_grad()
def with_thresholds(dictionary: Dictionary, activations: Activations) -> tuple[Dictionary, dict[str, Any]]:
    """A JumpReLU dictionary in place of a TopK one, and its cost.

    A feature's threshold is the one at which its activations differ least from the TopK ones, in squared error, over
    the first half of the positions. The cost is measured on the second half.

    Returns:
        The dictionary, and, a number a layer: ``l0_topk`` and ``l0_thresholds``, mean number of active features, and
        ``fvu_topk`` and ``fvu_thresholds``, Σ‖y − ŷ‖² / Σ‖y − ȳ‖²; and ``positions``, on how many.

    Raises:
        ReflowlensError: the dictionary is none of TopK, or there are fewer than two positions.

    Example: ``with_thresholds(dictionary, activations_of(dictionary, model, [tokens]))[1]["fvu_thresholds"]``
    """
    cfg, n = dictionary.cfg, len(activations.reads[0])
    if cfg.activation != "topk":
        raise ReflowlensError(f"thresholds stand in for topk, and this dictionary is of {cfg.activation}")
    if n < 2:
        raise ReflowlensError(f"thresholds are set on one half of the positions and measured on the other, got {n}")
    found = Dictionary(dataclasses.replace(cfg, activation="jumprelu", k=None))
    found.load_state_dict(dictionary.state_dict(), strict=False)
    for layer, ours, x in zip(found.each_layer(), dictionary.each_layer(), activations.reads, strict=True):
        layer.threshold = nn.Parameter(_thresholds(ours, x[: n // 2]))
    reads, writes = ([each[n // 2 :] for each in half] for half in activations)
    cost: dict[str, Any] = {"positions": n - n // 2}
    for name, each in (("topk", dictionary), ("thresholds", found)):
        cost[f"l0_{name}"] = [(a > 0).float().sum(-1).mean().item() for a in each.encode(reads)]
        cost[f"fvu_{name}"] = [_fvu(y, y_hat) for y, y_hat in zip(writes, each(reads), strict=True)]
    return found.eval(), cost


def _thresholds(layer: DictionaryLayer, x: Float[Tensor, "token d_in"]) -> Float[Tensor, " feature"]:
    """With the m largest activations of a feature kept, the error is the square of those among them that TopK drops,
    and of those that it keeps elsewhere: a running sum over m."""
    before, order = layer.preactivations(x).relu().sort(0, descending=True)
    kept = (layer.encode(x) > 0).gather(0, order)
    error = torch.where(kept, -1.0, 1.0).mul_(before.square()).cumsum(0)
    error = torch.cat([torch.zeros_like(error[:1]), error])
    best = error.argmin(0, keepdim=True)  # how many are kept
    last = before.gather(0, (best - 1).clamp(min=0))
    next_one = torch.cat([before, torch.zeros_like(before[:1])]).gather(0, best)
    return torch.where(best == 0, last, (last + next_one) / 2).squeeze(0)


def _fvu(y: Float[Tensor, "token d"], y_hat: Float[Tensor, "token d"]) -> float:
    return float((y - y_hat).square().sum() / (y - y.mean(0)).square().sum())


def stored_thresholds(dictionary: Dictionary) -> list[Float[Tensor, " feature"] | None]:
    """The thresholds, none below zero, that each layer has; None of a ReLU.

    Raises:
        ReflowlensError: it is of TopK, which has none.
    """
    if dictionary.cfg.activation == "topk":
        raise ReflowlensError(
            "the features of a topk dictionary have no thresholds, which the format asks for: "
            "with_thresholds(dictionary, activations) sets and measures them; on the command line, --model and --data"
        )
    return [
        None if layer.threshold is None else layer.threshold.detach().clamp(min=0) for layer in dictionary.each_layer()
    ]
