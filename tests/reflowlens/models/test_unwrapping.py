"""Every public function sees through ``torch.compile``, and names what is no hooked model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from tests.support.public_calls import PUBLIC_CALLS


class Replicated(torch.nn.Module):
    """As DistributedDataParallel wraps a model, which needs processes."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, pd.DataFrame):
        return bool(one.equals(other))
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


@pytest.mark.parametrize("name", PUBLIC_CALLS)
def test_a_compiled_model_is_the_model(tiny_models: dict[str, HookedModel], name: str, tmp_path: Path) -> None:
    model = tiny_models["reflow"]
    (tmp_path / "plain").mkdir()
    (tmp_path / "compiled").mkdir()
    plain = PUBLIC_CALLS[name](model, tmp_path / "plain")
    with torch.compiler.set_stance("force_eager"):  # what is compiled is no matter here
        assert _same(PUBLIC_CALLS[name](torch.compile(model), tmp_path / "compiled"), plain)


@pytest.mark.parametrize("name", PUBLIC_CALLS)
def test_what_is_no_hooked_model_is_told(tiny_models: dict[str, HookedModel], name: str, tmp_path: Path) -> None:
    call, model = PUBLIC_CALLS[name], tiny_models["reflow"]
    with pytest.raises(ReflowlensError, match=r"load it with rl.load_model\('reflow-nano'\)"):
        call("reflow-nano", tmp_path)
    with pytest.raises(ReflowlensError, match=r"a Replicated wraps the model: pass model.module"):
        call(torch.compile(Replicated(model)), tmp_path)
    for foreign, kind in ((torch.nn.Linear(2, 2), "Linear"), (type(model), "type"), (object(), "object")):
        with pytest.raises(ReflowlensError, match=f"expected a hooked model.* got a {kind}"):
            call(foreign, tmp_path)
