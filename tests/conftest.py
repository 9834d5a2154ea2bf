from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from reflowlens.models.base import HookedModel
from tests.runs import tokens_folder, write  # noqa: F401 (fixtures)
from tests.tiny import NAMES, random_model, random_tokens


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tensors this small are slower on several threads, much slower on a busy machine."""
    torch.set_num_threads(1)


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
