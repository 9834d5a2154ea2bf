"""A reFlow-TopK that begins dense: during the first steps of a run each token keeps more signals than it will."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

from pretraining.config import TrainConfig
from reflowlens.models.base import HookedModel
from reflowlens.models.reflow_topk import ReFlowTopK


def annealed_topk(step: int, n_signals: int, topk: int, anneal_steps: float) -> int:
    """Signals that a token keeps in a step: all at first, half as many after each of equal stages, then ``topk``.

    Halving needs few different values, for each of which a compiled model is compiled once.

    >>> [annealed_topk(step, n_signals=128, topk=16, anneal_steps=6) for step in range(8)]
    [128, 128, 64, 64, 32, 32, 16, 16]
    """
    stages = math.ceil(math.log2(n_signals / topk))
    if step >= anneal_steps or not stages:
        return topk
    return max(topk, math.ceil(n_signals / 2 ** int(stages * step / anneal_steps)))


def topk_of_step(step: int, cfg: TrainConfig) -> int | None:
    """:func:`annealed_topk` as a configuration has it; None of a model that does not prune."""
    if cfg.model.topk is None:
        return None
    steps = cfg.run.topk_anneal_fraction * cfg.run.steps
    return annealed_topk(step, cfg.model.n_signals or 0, cfg.model.topk, steps)


def topk_stages(cfg: TrainConfig) -> list[tuple[int, int]]:
    """The first step of each stage and the signals that a token keeps from there on; empty of a k that stays.

    >>> from pretraining.config import load_config
    >>> settings = ["model.architecture=reflow_topk", "model.topk=32", "run.topk_anneal_fraction=0.5", "run.steps=80"]
    >>> topk_stages(load_config("reflow_micro", settings))  # 128 signals
    [(0, 128), (20, 64), (40, 32)]
    """
    if not cfg.run.topk_anneal_fraction:
        return []
    kept = [topk_of_step(step, cfg) or 0 for step in range(cfg.run.steps)]
    return [(step, k) for step, k in enumerate(kept) if step == 0 or k != kept[step - 1]]


@contextlib.contextmanager
def keeping(model: HookedModel, topk: int | None) -> Iterator[None]:
    """Have a reFlow-TopK keep so many signals a token, for a while; nothing for other models."""
    if not isinstance(model, ReFlowTopK) or topk is None:
        yield
        return
    usual, model.topk = model.topk, topk
    try:
        yield
    finally:
        model.topk = usual
