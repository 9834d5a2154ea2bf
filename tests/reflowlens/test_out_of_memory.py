"""What does not fit the memory is one error that says what to lower; weights and files are as they were."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import reflowlens as rl
from reflowlens.metrics import kl
from reflowlens.models.base import HookedModel
from reflowlens.out_of_memory import is_out_of_memory
from reflowlens.sweeps.runs import PackedRuns
from tests.support.processes import in_a_process
from tests.support.tiny import random_model

PAIR = ("the king", "the kind")
ALLOCATOR = "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to ..."
RUNS = "the number or the length of the prompts"
CALLS: dict[str, tuple[Callable[[HookedModel], Any], str]] = {
    "run_with_cache": (lambda m: m.run_with_cache("the king"), "names_filter, pos_slice, dtype"),
    "collect": (lambda m: rl.collect(m, ["the king"], "hook_embed"), "the prompts of a batch or their length"),
    "sweep": (lambda m: rl.sweep(m, *PAIR, "resid_pre", kl()), RUNS),
    "sweep integrated": (lambda m: rl.sweep(m, *PAIR, "resid_pre", kl(), mode="integrated", steps=2), RUNS),
    "score": (lambda m: rl.score(m, "the king"), "batch, memory"),
    "screen": (lambda m: rl.screen(m, *PAIR, "resid_pre", kl(), top=1), RUNS),
    "edge_attribution": (lambda m: rl.edge_attribution(m, *PAIR, kl(), steps=2), RUNS),
    "faithfulness": (lambda m: rl.faithfulness(m, *PAIR, ["m0"], kl(), controls=1), RUNS),
    "generate": (lambda m: m.generate("the king", 2), "max_new_tokens"),
}


def refuse_after(passes: int, error: BaseException) -> Callable[[Tensor, Any], None]:
    """A hook at which memory has run out once so many passes are through."""
    seen = iter(range(passes))

    def hook(activation: Tensor, hook: Any) -> None:
        if next(seen, None) is None:
            raise error

    return hook


@pytest.mark.parametrize(
    "error", [RuntimeError(ALLOCATOR), MemoryError(), torch.OutOfMemoryError("CUDA out of memory")]
)
@pytest.mark.parametrize("name", CALLS)
def test_the_allocators_error_says_what_to_lower(name: str, error: BaseException) -> None:
    call, advice = CALLS[name]
    model = random_model("reflow")
    before = rl.model_hash(model)
    with (
        model.hooks([("hook_embed", refuse_after(0, error))]),
        pytest.raises(rl.ReflowlensError, match=f"^out of memory: lower .*{advice}") as told,
    ):
        call(model)
    assert told.value.__cause__ is error
    assert rl.model_hash(model) == before
    assert not any(point.fwd_hooks or point.bwd_hooks for point in model.hook_dict.values())
    call(model)


def test_another_error_of_a_hook_is_left_alone() -> None:
    error = RuntimeError("shapes do not match")
    with pytest.raises(RuntimeError, match="shapes do not match") as raised:
        random_model("reflow").run_with_hooks("ab", fwd_hooks=[("hook_embed", refuse_after(0, error))])
    assert not is_out_of_memory(raised.value)


def test_a_sweep_that_ran_out_of_memory_keeps_its_cells_and_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, file, run, batches = random_model("reflow"), tmp_path / "cells.jsonl", PackedRuns.run, iter(range(3))

    def refused(self: PackedRuns, plans: list[Any]) -> Tensor:
        if next(batches, None) is None:
            raise MemoryError
        return run(self, plans)

    monkeypatch.setattr(PackedRuns, "run", refused)
    with pytest.raises(rl.ReflowlensError, match="out of memory: lower"):
        rl.sweep(model, *PAIR, "resid_pre", kl(), results=file, memory=1)
    monkeypatch.undo()
    assert len(file.read_text().splitlines()) == 1 + 3  # what the sweep is, and a cell a batch
    continued = rl.sweep(model, *PAIR, "resid_pre", kl(), results=file, memory=1).values
    assert_close(continued, rl.sweep(model, *PAIR, "resid_pre", kl()).values)


def test_a_collection_that_ran_out_of_memory_keeps_the_batches_before(tmp_path: Path) -> None:
    model, batches = random_model("reflow"), [["the king"], ["the kind"], ["a stone"]]
    with (
        model.hooks([("hook_embed", refuse_after(2, MemoryError()))]),
        pytest.raises(rl.ReflowlensError, match="lower"),
    ):
        rl.collect(model, batches, "hook_embed", results=tmp_path / "kept")
    assert rl.Collected.load(tmp_path / "kept").n_rows == 2
    rest = rl.collect(model, batches, "hook_embed", results=tmp_path / "kept")["hook_embed"]
    np.testing.assert_allclose(rest.mean, rl.collect(model, batches, "hook_embed")["hook_embed"].mean, rtol=1e-5)


LIMITED: dict[str, Callable[[HookedModel, Tensor], Any]] = {
    "run_with_cache": lambda model, tokens: model.run_with_cache(tokens),
    "collect": lambda model, tokens: rl.collect(model, [tokens], "hook_embed"),
    "sweep": lambda model, tokens: rl.sweep(model, tokens, tokens.flip(1), "resid_pre", kl()),
}


def called_under_a_limit(told: Path) -> None:
    """Each of the calls with more than there is memory for, and again with little; the errors are written down."""
    import resource  # not everywhere

    model = random_model("reflow")
    few, many = torch.randint(0, 200, (1, 4)), torch.randint(0, 200, (2048, 24))
    for call in LIMITED.values():
        call(model, few)
    before, messages = rl.model_hash(model), []
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**24, resource.RLIM_INFINITY))
    for name, call in LIMITED.items():
        try:
            call(model, many)
        except rl.ReflowlensError as error:
            messages.append(f"{name} {error}")
        call(model, few)
    assert rl.model_hash(model) == before
    told.write_text("\n".join(messages))


@pytest.mark.skipif(sys.platform != "linux", reason="a limit of a process's memory, which other systems do not keep")
def test_a_real_limit_ends_in_the_same_error_and_less_runs_afterwards(tmp_path: Path) -> None:
    in_a_process(called_under_a_limit, tmp_path / "told")
    lines = (tmp_path / "told").read_text().splitlines()
    assert [line.split(":")[0] for line in lines] == [f"{name} out of memory" for name in LIMITED]
