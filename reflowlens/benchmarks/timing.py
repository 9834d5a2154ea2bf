"""Timing several ways of doing one thing in turns, so that whatever else the machine does meets all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


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
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def ratio(others: list[float], ours: list[float]) -> float:
    """Median over the rounds of other / ours: above 1 we are faster."""
    return statistics.median(other / our for other, our in zip(others, ours, strict=True))


def comparison(
    benchmark: str, of: str, ours: Callable[[], object], other: Callable[[], object], rounds: int = 9
) -> dict[str, Any]:
    """A row of :func:`reflowlens.benchmarks.run_benchmarks`."""
    times = alternate({"ours": ours, "other": other}, rounds)
    a, b = (1000 * statistics.median(times[name]) for name in ("ours", "other"))
    quotient = round(ratio(times["other"], times["ours"]), 3)
    return {"benchmark": benchmark, "ours_ms": round(a, 2), "other_ms": round(b, 2), "ratio": quotient, "of": of}
