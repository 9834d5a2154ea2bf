"""``torch.compile`` for training: once, said beforehand, ended at once when asked, and with one clear error."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import einops
import torch
from torch import nn

from pretraining.stopping import StopRequests
from reflowlens.errors import ReflowlensError


def compiled(module: nn.Module) -> Any:
    """The module as it is compiled at its first call, and not again."""
    # einops notes each type of tensor when it first meets it. Were that while the graph is traced, which depends on
    # those notes, the second call would find them changed and compile everything a second time.
    for tensor in (torch.zeros(1), nn.Parameter(torch.zeros(1))):
        einops.rearrange(tensor, "one -> one")
    return torch.compile(module)


@contextlib.contextmanager
def compiling(stop: StopRequests, *, say: bool) -> Iterator[None]:
    """Around the first step of a compiled model, in which it is compiled.

    Args:
        stop: ends it at once, without waiting for the C++ compiler and without what that had to say.
        say: announce it on stderr.

    Raises:
        KeyboardInterrupt: somebody asked to stop.
        ReflowlensError: the model cannot be compiled.
    """
    from torch._dynamo.exc import TorchDynamoException

    if say:
        print("compiling ... (minutes on a CPU; --set run.compile=false does without)", file=sys.stderr, flush=True)
    try:
        yield
    except KeyboardInterrupt:
        _leave_compiler()
        raise
    except Exception as error:
        if stop():  # the signal reached the compiler too, whose end is this error
            _leave_compiler()
            raise KeyboardInterrupt from None
        if not isinstance(error, TorchDynamoException):
            raise
        cause = getattr(error, "inner_exception", error)
        reason = f"{type(cause).__name__}: {str(cause).strip()}".partition("\n")[0]  # not what a C++ compiler says
        raise ReflowlensError(f"the model cannot be compiled here ({reason}): set run.compile=false") from error


def _leave_compiler() -> None:
    """Drop what waits to be compiled, and end the compilers that run: the interpreter would wait for all of them."""
    # torch has no door for this; where its names are others, the wait is all that is lost
    with contextlib.suppress(ImportError, AttributeError, AssertionError):
        from torch._inductor.async_compile import AsyncCompile

        AsyncCompile.pool().shutdown(wait=False, cancel_futures=True)
        AsyncCompile.pool.cache_clear()
    for pid in _compilers():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _compilers() -> list[int]:
    """Processes of a C++ compiler that this one started; none where the system does not list them."""
    parents, names = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            pid, _, rest = stat.read_text(encoding="utf8", errors="replace").partition(" (")
            names[int(pid)], _, rest = rest.rpartition(") ")
            parents[int(pid)] = int(rest.split()[1])
    own, children = set[int](), {os.getpid()}
    while children:
        own |= children
        children = {pid for pid, parent in parents.items() if parent in own} - own
    tools = {
        Path(os.environ.get("CXX", "g++")).name,
        "g++",
        "c++",
        "clang++",
        "clang",
        "cc1plus",
        "as",
        "collect2",
        "ld",
    }
    return [pid for pid in own if names.get(pid) in tools]
