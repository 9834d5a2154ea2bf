"""No result depends on the type that torch gives to tensors made without one, and none breaks under autocast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

import reflowlens as rl
from reflowlens import varimax
from reflowlens.models.base import HookedModel
from tests.support.public_calls import CLEAN, PUBLIC_CALLS
from tests.support.tiny import CONFIGS, assert_close, random_model

TYPES = [torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(params=TYPES)
def other_default(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """A type to make the default; it is float32 again afterwards."""
    yield request.param
    torch.set_default_dtype(torch.float32)


def computed(name: str, model: HookedModel, folder: Path) -> Any:
    varimax._found.clear()  # what was found before would hide how it is found
    folder.mkdir()
    return PUBLIC_CALLS[name](model, folder)


@pytest.fixture(scope="module")
def in_float32(tiny_models: dict[str, HookedModel], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """What a call gives by default, computed once."""
    return cache(lambda name: computed(name, tiny_models["reflow"], tmp_path_factory.mktemp("float32") / "expected"))


@pytest.mark.parametrize("other_default", TYPES[:2], indirect=True)  # a wider one, and one that is narrower
@pytest.mark.parametrize("name", PUBLIC_CALLS)
def test_results_are_those_of_float32(
    tiny_models: dict[str, HookedModel],
    in_float32: Callable[[str], Any],
    other_default: torch.dtype,
    name: str,
    tmp_path: Path,
) -> None:
    expected = in_float32(name)
    torch.set_default_dtype(other_default)
    found = computed(name, tiny_models["reflow"], tmp_path / "found")
    torch.set_default_dtype(torch.float32)
    if isinstance(expected, Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(expected, pd.DataFrame):
        pd.testing.assert_frame_equal(found, expected, check_exact=True)
    else:
        assert found == expected


@pytest.mark.parametrize("name", CONFIGS)
def test_models_are_built_and_read_in_float32(name: str, other_default: torch.dtype) -> None:
    assert_same_under(other_default, lambda: rl.build_model(CONFIGS[name], seed=1))


def test_a_packaged_model_is_read_in_float32(other_default: torch.dtype) -> None:
    assert_same_under(other_default, lambda: rl.load_model("bdh-nano"))


def assert_same_under(default: torch.dtype, make: Callable[[], HookedModel]) -> None:
    model = make()
    torch.set_default_dtype(default)
    made = make()
    assert {tensor.dtype for tensor in (*made.parameters(), *made.buffers())} == {torch.float32}
    assert rl.model_hash(made) == rl.model_hash(model)
    assert all(torch.equal(a, b) for a, b in zip(made.buffers(), model.buffers(), strict=True))
    assert torch.equal(made(CLEAN), model(CLEAN))


def test_a_model_of_64_bits_is_read_without_rounding(tmp_path: Path) -> None:
    model = random_model("reflow").double()
    with torch.no_grad():
        model.embed.W_basis += 1e-12
    saved = rl.save_model(tmp_path / "wide", model)
    assert torch.equal(rl.load_model(saved, dtype=torch.float64).embed.W_basis, model.embed.W_basis)


@pytest.mark.parametrize("name", PUBLIC_CALLS)
def test_nothing_breaks_under_autocast(tiny_models: dict[str, HookedModel], name: str, tmp_path: Path) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found = computed(name, tiny_models["reflow"], tmp_path / "found")
    assert not isinstance(found, Tensor) or found.isfinite().all()


def test_what_reads_a_pass_is_not_rounded_under_autocast(tiny_models: dict[str, HookedModel]) -> None:
    """Views and closed forms are in float32 at least, whatever the passes are in."""
    model = tiny_models["reflow"]
    resid = model.run_with_cache(CLEAN)[1]["resid_post", -1]
    for name in ("native", "rotated", "varimax", "svd", "identity"):
        varimax._found.clear()
        view = rl.signal_view(model, name)
        expected = view.logits(view.readout(resid))
        varimax._found.clear()
        with torch.autocast("cpu", torch.bfloat16):
            again = rl.signal_view(model, name)
            assert_close(again.logits(again.readout(resid)), expected, what=name)
    alone = rl.ablate_readout(model, CLEAN)
    expected_kl = type(alone)(alone.view, alone.signals, alone.replacement).kl()
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(type(alone)(alone.view, alone.signals, alone.replacement).kl(), expected_kl)
