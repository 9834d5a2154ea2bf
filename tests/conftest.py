from __future__ import annotations

import gc
import inspect
import os
import platform
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

# Matrices this small are slower on several threads, NumPy's as torch's, much slower on a busy machine; processes that
# tests start read this too.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from torch import Tensor

from tests.support.shapes import check_shapes

gc.disable()  # until everything is imported: what imports make stays
check_shapes("reflowlens", "analyses")  # before anything imports them

from reflowlens.models.base import HookedModel  # noqa: E402
from tests.support.runs import tokens_folder, write  # noqa: E402, F401 (fixtures)
from tests.support.tiny import NAMES, random_model, random_tokens  # noqa: E402

_EXACT = ("torch.equal(", "rtol=0, atol=0", "check_exact=True", "same_files(", "same_weights(", "assert_same(")


def pytest_report_header() -> str:
    """Results to the last bit depend on the processor and on the instructions that torch uses of it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return (
        f"cpu: {name or platform.processor()}, torch {torch.__version__} uses {torch.backends.cpu.get_cpu_capability()}"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks the tests that assert equality to the last bit: `make exact` repeats them with fewer instructions.

    Only where marks are asked for by that name: to find the sources takes a second.
    """
    for item in items if "exact" in config.getoption("markexpr") else ():
        if isinstance(item, pytest.Function) and _is_exact(item.function):
            item.add_marker(pytest.mark.exact)


def pytest_collection_finish() -> None:
    """Garbage is collected from here on, and never among the million objects of the imported modules."""
    gc.freeze()
    gc.enable()


@cache  # a source is found anew at every call, some milliseconds, and most functions have several cases
def _is_exact(function: Callable[..., None]) -> bool:
    source = inspect.getsource(function)
    return any(sign in source for sign in _EXACT)


@pytest.fixture(scope="session")
def tiny_models() -> dict[str, HookedModel]:
    """One model of every tiny configuration with random weights, shared: do not change them."""
    return {name: random_model(name) for name in NAMES}


@pytest.fixture(params=NAMES)
def model(request: pytest.FixtureRequest, tiny_models: dict[str, HookedModel]) -> Iterator[HookedModel]:
    """Every architecture in turn; checked to come back without hooks."""
    tiny = tiny_models[request.param]
    yield tiny
    assert not any(point.fwd_hooks or point.bwd_hooks for point in tiny.hook_dict.values())


@pytest.fixture
def tokens(model: HookedModel) -> Tensor:
    return random_tokens(model.cfg)
