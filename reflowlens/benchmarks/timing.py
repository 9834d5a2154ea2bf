"""Timing several ways of doing one thing in turns, so that whatever else the machine does meets all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from reflowlens.benchmarks.table import Row


def alternate(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warm_up: int = 1,
    at_most: float = float("inf"),
    device: str = "cpu",
) -> dict[str, list[float]]:
    """Seconds of each call in each of ``rounds`` rounds, in which every call has one turn.

    After ``at_most`` seconds no further round begins.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-warm_up, rounds):
        if turn > 0 and sum(map(sum, times.values())) > at_most:
            break
        for name, call in calls.items():
            began = _now(device)
            call()
            if turn >= 0:
                times[name].append(_now(device) - began)
    return times


def _now(device: str) -> float:
    """On one thread of a CPU its own time, to which nothing else that the machine does adds; otherwise the clock's."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def ratio(others: list[float], ours: list[float]) -> float:
    """Median over the rounds of other / ours: above 1 we are faster."""
    return statistics.median(other / our for other, our in zip(others, ours, strict=True))


def comparison(
    of: str,
    ours: Callable[[], object],
    other: Callable[[], object],
    rounds: int = 9,
    *,
    warm_up: int = 1,
    at_most: float = float("inf"),
    **facts: Any,
) -> Row:
    """A row of two ways of doing one thing.

    Args:
        of: what is compared.
        rounds, warm_up, at_most: as of :func:`alternate`.
        facts: other columns, such as the ``difference`` between the two results.

    Returns:
        ``ours_ms`` and ``other_ms`` (medians), ``ratio`` (median of other / ours over the rounds: above 1 ours is
        faster), the facts and ``of``.
    """
    times = alternate({"ours": ours, "other": other}, rounds, warm_up=warm_up, at_most=at_most)
    a, b = (1000 * statistics.median(times[name]) for name in ("ours", "other"))
    quotient = round(ratio(times["other"], times["ours"]), 3)
    return {"ours_ms": round(a, 2), "other_ms": round(b, 2), "ratio": quotient, **facts, "of": of}
