"""A grid of runs: which, in which order, begun together, gone on with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pretraining.config import load_config
from pretraining.grid import CELLS, grid_configs, main, train_grid
from reflowlens.checkpoints import load_model
from reflowlens.errors import ReflowlensError
from reflowlens.models import build_model
from reflowlens.ttt_flow_config import TTTFlowConfig
from tests.support.runs import records

OWN = "ttt_heads = 2\nttt_chunk = 4\nrotary_channels = 8\nvalue_layers = 1\nexclusive_layers = 1\nflow_width = 4"


@pytest.fixture
def config(write: Callable[..., Path]) -> Path:
    path = write(model={"architecture": "ttt_flow", "n_signals": None}, run={"steps": 2})
    path.write_text(f"{path.read_text()}\n[model.ttt_flow]\n{OWN}\nflow_hidden = 6")
    return path


def test_settings_reach_the_fields_of_ttt_flow(config: Path) -> None:
    cfg = load_config(config, ["model.ttt_flow.ttt=false", "model.ttt_flow.ttt_rate=0.5"]).model
    assert isinstance(cfg.ttt_flow, TTTFlowConfig)
    assert (cfg.ttt_flow.ttt, cfg.ttt_flow.flow, cfg.ttt_flow.ttt_rate, cfg.ttt_flow.ttt_heads) == (False, True, 0.5, 2)
    with pytest.raises(ReflowlensError, match=r"unknown field 'model.ttt_flow.tt'; did you mean 'model.ttt_flow.ttt'"):
        load_config(config, ["model.ttt_flow.tt=false"])
    with pytest.raises(ReflowlensError, match=r"ttt_flow.ttt must be True or False, got 1"):
        load_config(config, ["model.ttt_flow.ttt=1"])


def test_a_preset_keeps_what_a_setting_does_not_name(config: Path) -> None:
    text = config.read_text()
    head, data = text.index("[model]"), text.index("[data]")
    preset = '[model]\npreset = "ttt_flow_10l"\ntokenizer_name = "bytes"\n[model.ttt_flow]\nflow_width = 32\n'
    config.write_text(text[:head] + preset + text[data : text.index("[model.ttt_flow]")])
    own = load_config(config, ["model.ttt_flow.flow=false"]).model.ttt_flow
    assert own == TTTFlowConfig(flow_width=32, flow=False)


def test_runs_come_seed_by_seed_with_one_start(config: Path) -> None:
    configs = grid_configs(config, 2, "grid", ["run.steps=3"])
    assert [cfg.run.out for cfg in configs[3:5]] == [str(Path("grid/seed_0_both")), str(Path("grid/seed_1_none"))]
    assert [cfg.run.seed for cfg in configs] == [0] * 4 + [1] * 4
    assert {cfg.run.steps for cfg in configs} == {3}
    refiners = [(cfg.model.ttt_flow.ttt, cfg.model.ttt_flow.flow) for cfg in configs[:4] if cfg.model.ttt_flow]
    assert refiners == list(CELLS.values())
    none, *others = (build_model(cfg.model, seed=cfg.run.seed).state_dict() for cfg in configs[:4])
    for other in others:
        assert all(torch.equal(other[name], weight) for name, weight in none.items())


def test_a_grid_goes_on_where_it_stopped(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = grid_configs(config, 1, tmp_path / "grid")
    train_grid(configs[:2])
    begun = {path: path.stat().st_mtime_ns for path in (tmp_path / "grid").glob("*/step_*/model.safetensors")}
    main([str(config), "--seeds", "1", "--out", str(tmp_path / "grid")])
    assert len(begun) == 2
    assert all(path.stat().st_mtime_ns == written for path, written in begun.items())
    for cfg, cell in zip(configs, CELLS, strict=True):
        out = Path(cfg.run.out)
        assert len(records(out)) == 2
        model: Any = load_model(out / "step_0000002")
        assert ((model.ttt is not None), (model.flow is not None)) == CELLS[cell]
    other = [dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, batch_size=4)) for cfg in configs[:1]]
    with pytest.raises(ReflowlensError, match=r"run\.batch_size"):
        train_grid(other)

    def stopped(cfg: Any, **_: Any) -> Path:
        return Path(cfg.run.out) / "step_0000001"

    monkeypatch.setattr("pretraining.grid.train", stopped)
    with pytest.raises(KeyboardInterrupt):
        train_grid(configs)


def test_a_grid_is_of_refiners(write: Callable[..., Path]) -> None:
    with pytest.raises(ReflowlensError, match="a ttt_flow model was expected, got 'reflow'"):
        grid_configs(write(), 1)
    with pytest.raises(ReflowlensError, match="seeds"):
        grid_configs("ttt_flow_micro", 0)
