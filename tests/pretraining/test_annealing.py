"""A reFlow-TopK that keeps more signals at first: what each step keeps, what is saved, and how it goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pretraining import train as train_module
from pretraining.annealing import annealed_topk, topk_of_step
from pretraining.batches import batch_at
from pretraining.config import load_config
from pretraining.distributed import Processes
from pretraining.evaluate import evaluate
from pretraining.token_files import open_tokens
from pretraining.train import train
from reflowlens.checkpoints import load_model
from reflowlens.errors import ReflowlensError
from tests.support.runs import STEPS, measured, records, same_files, with_out

PRUNED: dict[str, Any] = {"architecture": "reflow_topk", "topk": 3}
KEPT = [16, 16, 8, 8, 4, 4, 3, 3]  # of 16 signals over the first three quarters of 8 steps


@pytest.fixture
def annealed(write: Callable[..., Path]) -> Callable[..., Path]:
    return lambda **run: write(
        model=PRUNED,
        optimizer={"schedule": "constant"},
        run={"steps": 8, "topk_anneal_fraction": 0.75, "checkpoint_interval": 1, "keep_checkpoints": 8} | run,
    )


def test_each_step_learns_with_the_signals_that_it_keeps(annealed: Callable[..., Path]) -> None:
    """Losses from the checkpoints, whose models are told by hand how many to keep; those are what is validated."""
    cfg = load_config(annealed(eval_interval=2))
    train(cfg)
    tokens, val = (open_tokens(cfg.data.folder, split).tokens for split in ("train", "val"))
    for step, record in enumerate(records(cfg.run.out)[1:], start=1):  # of the first step there is no checkpoint
        model = load_model(Path(cfg.run.out) / f"step_{step:07d}")
        if step % 2 == 0:
            found = evaluate(model, val, cfg, Processes(0, 1, torch.device("cpu")), cfg.run.eval_tokens)
            assert found == pytest.approx(records(cfg.run.out)[step - 1]["val_loss"], abs=1e-6)
        model.topk = KEPT[step]
        x, y = batch_at(tokens, step, cfg.run.batch_size, cfg.data.context, cfg.run.seed, 0, 1)
        assert model(x, "loss", targets=y).item() == pytest.approx(record["loss"], abs=1e-6)
    assert load_model(Path(cfg.run.out) / "step_0000001").topk == 3


@pytest.mark.parametrize("crash_at", [1, 3, 5])
def test_a_resumed_run_goes_on_where_it_was(
    annealed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, crash_at: int
) -> None:
    cfg = load_config(annealed())
    save = train_module.save_state

    def crash(*state: Any) -> None:
        save(*state)
        if state[4] == crash_at:
            raise RuntimeError

    monkeypatch.setattr(train_module, "save_state", crash)
    with pytest.raises(RuntimeError):
        train(cfg)
    monkeypatch.undo()
    at_once = with_out(cfg, Path(cfg.run.out).with_name("at once"))
    same_files(train(cfg, resume=True), train(at_once))
    assert measured(cfg.run.out) == measured(at_once.run.out)


def test_a_longer_run_would_have_kept_others(annealed: Callable[..., Path]) -> None:
    train(load_config(annealed(steps=4)))
    with pytest.raises(ReflowlensError, match=r"was trained with run\.steps=4, but the configuration has 8"):
        train(load_config(annealed(steps=8)), resume=True)
    with pytest.raises(ReflowlensError, match=r"was trained with run\.topk_anneal_fraction=0\.75"):
        train(load_config(annealed(steps=4, topk_anneal_fraction=0.5)), resume=True)


@pytest.mark.parametrize(
    ("n_signals", "topk", "steps", "kept"),
    [
        (16, 3, 6.0, KEPT),
        (16, 16, 4.0, [16] * 6),
        (16, 8, 0.0, [8] * 3),
        (24, 5, 3.0, [24, 12, 6, 5]),
        (7, 1, 0.5, [7, 1]),
    ],
)
def test_signals_halve_in_equal_stages(n_signals: int, topk: int, steps: float, kept: list[int]) -> None:
    assert [annealed_topk(step, n_signals, topk, steps) for step in range(len(kept))] == kept


def test_only_what_prunes_is_annealed(write: Callable[..., Path]) -> None:
    with pytest.raises(ReflowlensError, match=r"run\.topk_anneal_fraction must be 0 for architecture 'reflow'"):
        load_config(write(run={"topk_anneal_fraction": 0.5}))
    with pytest.raises(ReflowlensError, match=r"run\.topk_anneal_fraction must be between 0 and 1"):
        load_config(write(model=PRUNED, run={"topk_anneal_fraction": 1.5}))
    assert topk_of_step(STEPS, load_config(write())) is None
