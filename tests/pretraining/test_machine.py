"""What ``auto`` becomes, and the step in which a model is compiled."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.testing import CompileCounter

from pretraining import machine
from pretraining.batches import count_batches, spread_batches
from pretraining.compilation import compiling
from pretraining.config import load_config
from pretraining.machine import decided, has_bfloat16
from pretraining.stopping import StopRequests
from pretraining.train import train
from reflowlens.checkpoints import read_manifest
from reflowlens.errors import ReflowlensError
from tests.support.runs import records

CPU = torch.device("cpu")
AUTO = {"dtype": None, "compile": None}  # the fields left out


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The CPU has these instructions, torch uses those, and so many threads compute."""

    def has(flags: str, capability: str = "AVX512", threads: int = 1) -> None:
        monkeypatch.setattr(machine, "_cpu", lambda field: {"flags": flags, "model name": "A CPU"}[field])
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)

    return has


@pytest.mark.parametrize(
    ("flags", "capability", "dtype"),
    [
        ("fma avx2 avx512f avx512_bf16", "AVX512", "bfloat16"),
        ("fma avx2 avx512f amx_tile amx_bf16", "AVX512", "bfloat16"),
        ("fma avx2 avx512f", "AVX512", "float32"),
        ("fma avx2", "AVX2", "float32"),
        ("fma avx2 avx512f avx512_bf16 amx_bf16", "AVX2", "float32"),  # held back, as by ATEN_CPU_CAPABILITY
        ("", "DEFAULT", "float32"),
    ],
)
def test_bfloat16_where_the_cpu_has_instructions_for_it(
    cpu: Callable[..., None], flags: str, capability: str, dtype: str
) -> None:
    cpu(flags, capability)
    assert has_bfloat16(CPU) == (dtype == "bfloat16")
    assert decided(load_config("reflow_nano"), CPU).run.dtype == dtype


def test_long_runs_are_compiled(cpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    def compiles(steps: int, processes: int = 1) -> Any:
        return decided(load_config("reflow_nano", [f"run.steps={steps}"]), CPU, processes).run.compile

    cpu("avx2", threads=2)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    assert [compiles(steps) for steps in (20, 100, 1000, 7345)] == [False, False, True, True]
    assert compiles(1000, processes=8) is False  # an eighth of the work for each
    cpu("avx2", threads=64)
    assert compiles(1000) is False
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert compiles(10**6) is False  # without a C++ compiler


def test_what_a_configuration_says_stays(cpu: Callable[..., None]) -> None:
    cpu("avx2")
    cfg = load_config("reflow_nano", ["run.dtype=bfloat16", "run.compile=true", "run.steps=1"])
    assert decided(cfg, CPU) == cfg
    assert decided(load_config("reflow_nano", ["run.compile=auto"]), CPU).run.compile is True


def test_the_decision_is_recorded_and_a_resumed_run_keeps_it(
    write: Callable[..., Path], cpu: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    cpu("avx2")
    folder = train(load_config(write(run={"steps": 2, **AUTO})))
    out = folder.parent
    assert capsys.readouterr().err.startswith("A CPU, 1 thread: run.dtype=float32, run.compile=false\n")
    cpu("avx512_bf16")
    folder = train(load_config(write(run={"steps": 2, **AUTO})), resume=True)
    run = json.loads((out / "run.json").read_text())
    for training in (run["training"], read_manifest(folder)["training"]):
        assert (training["run"]["dtype"], training["run"]["compile"]) == ("float32", False)
    chosen = {"run.dtype": "float32", "run.compile": False}
    assert [(start["processor"], start["decided"]) for start in run["starts"]] == [("A CPU, 1 thread", chosen)] * 2
    with pytest.raises(ReflowlensError, match=r"was trained with run\.dtype='float32', but"):
        train(load_config(write(run={"steps": 2, "compile": None, "dtype": "bfloat16"})), resume=True)


# ------------------------------------------------------------------------------------------------------------ compiling


def test_a_model_is_compiled_once_and_that_is_said(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where einops has not been used before, which notes the types that it meets."""
    torch.compiler.reset()
    monkeypatch.setattr("einops._backends._type2backend", {})
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    train(load_config(write(model={"n_layers": 1}, run={"steps": 3, "compile": True})))
    assert counter.frame_count == 1
    assert capsys.readouterr().err.count("compiling ...") == 1


def replaced(monkeypatch: pytest.MonkeyPatch, compiler: Callable[..., Any]) -> None:
    """A stand-in for the compiled model."""
    monkeypatch.setattr("pretraining.replicas.compiled", lambda module: compiler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_request_to_stop_while_compiling_ends_the_run_at_once(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """Nothing is left but what the next attempt begins with."""
    cfg, reached = load_config(write(run={"steps": 2, "compile": True})), []

    def stopped(*arguments: Any, **options: Any) -> None:
        os.kill(os.getpid(), number)
        reached.append("what comes after")

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        replaced(patch, stopped)
        with pytest.raises(KeyboardInterrupt):
            train(cfg)
    assert reached == []
    assert signal.getsignal(number) is before
    assert not list(Path(cfg.run.out).glob("step_*"))
    assert records(train(load_config(write(run={"steps": 2}))).parent)[-1]["step"] == 2


def test_the_end_of_a_compiler_that_the_signal_reached_too_is_no_error() -> None:
    stop = StopRequests(at_once=True)
    stop.requested = True
    with pytest.raises(KeyboardInterrupt) as caught, compiling(stop, say=False):
        raise RuntimeError("C++ compile error\n" + "warning: ...\n" * 2763)
    assert caught.value.__suppress_context__


def test_a_model_that_cannot_be_compiled_is_one_clear_error() -> None:
    failed = BackendCompilerFailed("inductor", FileNotFoundError("no g++ here\n" + "warning: ...\n" * 2763), None)
    message = r"^the model cannot be compiled here \(FileNotFoundError: no g\+\+ here\): set run\.compile=false$"
    with pytest.raises(ReflowlensError, match=message), compiling(StopRequests(at_once=True), say=False):
        raise failed
    with pytest.raises(ZeroDivisionError), compiling(StopRequests(at_once=True), say=False):
        raise ZeroDivisionError  # not the compiler's


@pytest.mark.parametrize("max_tokens", [None, 1, 100, 450, 10**6])
@pytest.mark.parametrize("n_tokens", [2, 16, 17, 449, 450, 513])
def test_batches_are_counted_beforehand(n_tokens: int, max_tokens: int | None) -> None:
    batches = list(spread_batches(np.arange(n_tokens), 4, 16, max_tokens))
    assert count_batches(n_tokens, 4, 16, max_tokens) == len(batches)


# ------------------------------------------------------------------------------------------------------------- progress


def test_off_a_terminal_a_run_writes_lines_with_the_time_left(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("reflowlens.progress._SECONDS", 0.0)
    cfg = load_config(write(run={"steps": 3, "checkpoint_interval": 2}))
    train(cfg, progress=True)
    lines = [line for line in capsys.readouterr().err.splitlines() if "validation" not in line]
    steps = [line for line in lines if "steps" in line]
    assert re.fullmatch(r"2/3 steps, loss=\d\.\d+, tokens_per_s=[\d,]+, 00:\d\d elapsed, about 00:\d\d left", steps[1])
    assert re.fullmatch(r"3/3 steps, loss=.*, 00:\d\d elapsed", steps[-1])
    evaluations = [line for line in lines if "evaluating" in line]
    assert [line.split(",")[0] for line in evaluations] == [f"{n}/4 batches" for n in (1, 2, 3, 4)]
