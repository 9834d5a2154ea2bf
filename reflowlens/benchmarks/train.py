"""Training steps side by side: tokens a second, peak memory and utilisation of ours and of three other ways."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch

from reflowlens.benchmarks.machine import machine
from reflowlens.benchmarks.peak_memory import peak_memory
from reflowlens.benchmarks.steps import DTYPES, OURS, VARIANTS, TrainBench, training_step
from reflowlens.benchmarks.timing import alternate, ratio
from reflowlens.errors import ReflowlensError
from reflowlens.flops import mfu, peak_flops, training_flops_per_token
from reflowlens.models.products import product
from reflowlens.progress import bar

_FORMATS = {"tokens_per_s": "{:,.0f}", "ratio": "{:.2f}", "memory_mb": "{:,.0f}", "memory_ratio": "{:.2f}"}


@dataclass(frozen=True, eq=False)
class TrainComparison:
    """What :func:`bench_train` measured.

    Args:
        bench, steps: what was run.
        peak: operations a second that ``mfu`` is a share of; None if the GPU's is not known.
        frame: a row a variant: ``variant``, ``tokens_per_s`` (median), ``ratio`` (the median over the rounds of its
            time / ours: above 1 we are faster), ``memory_mb`` (peak), ``memory_ratio`` (its peak / ours), ``mfu`` and
            ``what``. A variant that ran out of memory has missing values.
    """

    bench: TrainBench
    steps: int
    peak: float | None
    frame: pd.DataFrame

    def __str__(self) -> str:
        bench = self.bench
        source = "data sheet" if bench.on_gpu else "the fastest of many products"
        peak = "not known" if self.peak is None else f"{self.peak / 1e12:.3g} TFLOP/s ({source})"
        formatters = {name: text.format for name, text in (_FORMATS | {"mfu": "{:.1%}"}).items()}
        return "\n".join(
            [
                f"a training step of {bench.model.model_name or bench.model.architecture}, batch {bench.batch} × "
                f"{bench.context}, {bench.dtype}, {'compiled' if bench.compiled else 'eager'}",
                f"{machine(bench.device)}; {self.steps} steps of each in turns; peak {peak}",
                self.frame.to_string(index=False, formatters=formatters, na_rep="-"),
            ]
        )


def bench_train(bench: TrainBench, *, steps: int = 10) -> TrainComparison:
    """Time training steps of every variant in turns, after measuring the peak memory of each by itself.

    Utilisation counts the operations that the model needs (:func:`reflowlens.flops.training_flops_per_token`), of
    Llama those of its own shape, not what a variant spends beyond them. Its peak is the GPU's by name; of a CPU, the
    fastest of many matrix products in the same type, measured here.

    Args:
        steps: timed steps of each variant, one of each in a round.

    Raises:
        ReflowlensError: our own step, or all variants beside each other, do not fit the memory.

    Example: ``print(bench_train(TrainBench.named("reflow_1_small", device="cuda"), steps=30))``
    """
    if steps < 1:
        raise ReflowlensError(f"steps must be positive, got {steps}")
    variants = bar(bench.variants, show=True, unit="variant", desc="its memory")
    memory = {variant: peak_memory(bench, variant) for variant in variants}
    sizes = {variant: size for variant, size in memory.items() if size is not None}
    if OURS not in sizes:
        raise ReflowlensError(f"a step of {bench.tokens:,} tokens does not fit the memory: lower the batch")
    dtype = DTYPES[bench.dtype]
    peak = peak_flops(bench.device, dtype) if bench.on_gpu else measured_peak(dtype)
    try:
        calls = {variant: training_step(bench, variant) for variant in sizes}
        times = alternate(calls, steps, warm_up=2, device=bench.device)
    except torch.OutOfMemoryError as error:
        raise ReflowlensError("the variants do not fit the memory side by side: lower the batch") from error
    finally:
        torch.compiler.reset()
    rows = [_row(bench, variant, times, sizes, peak) for variant in bench.variants]
    return TrainComparison(bench, steps, peak, pd.DataFrame(rows))


def _row(
    bench: TrainBench, variant: str, times: dict[str, list[float]], sizes: dict[str, int], peak: float | None
) -> dict[str, Any]:
    if variant not in times:
        return {"variant": variant, "what": f"out of memory: {VARIANTS[variant]}"}
    rate = bench.tokens / statistics.median(times[variant])
    return {
        "variant": variant,
        "tokens_per_s": rate,
        "ratio": ratio(times[variant], times[OURS]),
        "memory_mb": sizes[variant] / 1e6,
        "memory_ratio": sizes[variant] / sizes[OURS],
        "mfu": mfu(rate, _flops(bench, variant), peak),
        "what": VARIANTS[variant],
    }


def _flops(bench: TrainBench, variant: str) -> float:
    """Operations a token that the model needs, whatever a variant spends."""
    cfg = bench.model
    if variant == "transformers":
        from reflowlens.conversion.families import LLAMA

        cfg = LLAMA.as_family(cfg)
    return training_flops_per_token(cfg, bench.context, batch=bench.batch)


def measured_peak(dtype: torch.dtype, sizes: tuple[int, ...] = (512, 1024, 2048), seconds: float = 1.0) -> float:
    """Operations a second of this CPU in the fastest of many square matrix products, as many as fit the time.

    Several sizes: small ones end before a busy machine interrupts them, large ones occupy many cores.
    """
    fastest = 0.0
    for size in sizes:
        a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
        end = time.perf_counter() + seconds / len(sizes)
        while (began := time.perf_counter()) < end:
            product(a, b)
            fastest = max(fastest, 2 * size**3 / (time.perf_counter() - began))
    return fastest
