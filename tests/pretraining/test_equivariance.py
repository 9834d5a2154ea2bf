"""Which optimisers know of axes: training from rotated weights ends in rotated weights, or does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pretraining.config import OptimizerConfig
from pretraining.optimizers import freeze_norms, make_optimizers
from reflowlens.models import build_model
from reflowlens.models.base import HookedModel
from reflowlens.rotations import rotate_signals, rotate_stream
from reflowlens.signals import random_rotation
from tests.support.tiny import CONFIGS, random_tokens

EQUIVARIANT = {"name": "muon", "matrix_dtype": "float32", "freeze_norms": True}


def trained(model: HookedModel, cfg: OptimizerConfig, steps: int = 4) -> HookedModel:
    if cfg.freeze_norms:
        freeze_norms(model)
    optimizers = make_optimizers(model, cfg)
    for step in range(steps):
        loss = model(random_tokens(model.cfg, seed=step), "loss")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
    return model


def rotated(model: HookedModel) -> HookedModel:
    if model.cfg.n_signals:
        model = rotate_signals(model, random_rotation(model.cfg.n_signals, 5))
    return rotate_stream(model, random_rotation(model.cfg.d_model, 6))


def farthest(architecture: str, **settings: Any) -> float:
    """Between rotated, then trained and trained, then rotated: the largest distance of weights, in units of how far
    training moved them."""
    cfg = OptimizerConfig(learning_rate=0.03, matrix_learning_rate=0.03, **settings)
    start = build_model(CONFIGS[architecture], seed=0).double()
    turned = rotated(start)
    ours, theirs = trained(start, cfg), trained(turned, cfg)
    if not cfg.freeze_norms:  # what free weights of norms have become is nothing to rotate: compare predictions
        tokens = random_tokens(start.cfg, seed=9)
        one, two = (model(tokens).detach() for model in (ours, theirs))
        return float((one - two).norm() / one.norm())
    fresh = rotated(build_model(CONFIGS[architecture], seed=0).double())
    triples = zip(rotated(ours).parameters(), theirs.parameters(), fresh.parameters(), strict=True)
    moved = [((one - two).norm().item(), (one - old).norm().item()) for one, two, old in triples if one.requires_grad]
    return max(apart / far for apart, far in moved)


@pytest.mark.parametrize("architecture", ["reflow", "gpt2_new"])
@pytest.mark.parametrize("rest", ["sgd", "adam_rows", "muon"])
def test_equivariant_arms(architecture: str, rest: str) -> None:
    assert farthest(architecture, rest=rest, **EQUIVARIANT) < 1e-5


@pytest.mark.parametrize("architecture", ["reflow", "gpt2_new"])
@pytest.mark.parametrize(
    "arm",
    [
        {"rest": "adamw"},  # of the tables alone
        {"rest": "adam_rows", "name": "adamw"},  # of the blocks' matrices alone
        {"rest": "adam_rows", "freeze_norms": False},  # of the norms' weights alone
    ],
    ids=["tables", "matrices", "norms"],
)
def test_arms_that_know_of_axes(architecture: str, arm: dict[str, Any]) -> None:
    assert farthest(architecture, **(EQUIVARIANT | arm)) > 0.01
