"""Peak memory of a training step.

On a GPU, ``torch.cuda.max_memory_allocated``: model, gradients, optimiser and activations. On a CPU torch keeps no
count, so a process of its own takes the steps, and what counts is how far its largest resident size rises above what it
was after a step of a tiny model, libraries loaded: the same things, and what the allocator keeps.

python -m reflowlens.benchmarks.peak_memory BENCH VARIANT
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import torch

from reflowlens.benchmarks.steps import TrainBench, training_step
from reflowlens.config import ModelConfig
from reflowlens.errors import ReflowlensError
from reflowlens.out_of_memory import is_out_of_memory

_STEPS = 2  # the first makes the optimiser's state, the second holds everything
_OUT_OF_MEMORY = 77


def peak_memory(bench: TrainBench, variant: str) -> int | None:
    """Bytes at the height of a step of one variant alone; None if it ran out of memory."""
    return _on_gpu(bench, variant) if bench.on_gpu else _in_own_process(bench, variant)


def _on_gpu(bench: TrainBench, variant: str) -> int | None:
    gc.collect()  # an earlier variant's
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(bench.device)
    before = torch.cuda.memory_allocated(bench.device)
    try:
        _take_steps(bench, variant)
        torch.cuda.synchronize(bench.device)
        return torch.cuda.max_memory_allocated(bench.device) - before
    except torch.OutOfMemoryError:
        return None


def _take_steps(bench: TrainBench, variant: str) -> None:
    step = training_step(bench, variant)
    for _ in range(_STEPS):
        step()


def _in_own_process(bench: TrainBench, variant: str) -> int | None:
    described = json.dumps(dataclasses.asdict(bench) | {"model": bench.model.to_dict()})
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", "reflowlens.benchmarks.peak_memory", described, variant]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | threads)
    if done.returncode in (_OUT_OF_MEMORY, -9):  # -9: the system ended the largest process
        return None
    if done.returncode != 0:
        raise ReflowlensError(f"measuring the memory of {variant!r} failed: {done.stderr.strip().splitlines()[-1]}")
    return int(done.stdout.split()[-1])


def forget_peak() -> None:
    """Have the largest resident size start from the present one, where the system can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf8")


def peak_resident() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would begin, on Linux, from what the parent had
        (line,) = (line for line in status.read_text(encoding="utf8").splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _tiny(bench: TrainBench) -> TrainBench:
    """The same libraries and kernels at next to no memory."""
    model = dataclasses.replace(
        bench.model,
        n_layers=1,
        d_model=32,
        n_heads=1,
        n_key_value_heads=None,
        d_head=32,
        d_mlp=32,
        d_vocab=64,
        n_ctx=8,
        n_signals=32 if bench.model.is_factored else None,
        topk=8 if bench.model.topk else None,
    )
    return dataclasses.replace(bench, model=model, batch=1, context=8)


def main(described: str, variant: str) -> None:
    """Take the steps and print the bytes."""
    fields = json.loads(described)
    bench = TrainBench(**fields | {"model": ModelConfig.from_dict(fields["model"])})
    training_step(_tiny(bench), variant)()
    torch.compiler.reset()  # what was compiled for one shape would make the next one's code a general one
    forget_peak()
    before = peak_resident()
    try:
        _take_steps(bench, variant)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        sys.exit(_OUT_OF_MEMORY)
    print(peak_resident() - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
