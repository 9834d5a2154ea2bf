from __future__ import annotations

import dataclasses
import errno
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretraining.config import CONFIGS, list_configs, load_config
from pretraining.estimate import estimate
from pretraining.optimizers import schedule
from pretraining.train import train
from reflowlens.config import PRESETS, preset
from reflowlens.errors import ReflowlensError
from reflowlens.models import build_model
from tests.support.runs import MODEL

REFINED = ("ttt_flow_10l", "ttt_flow_11l")
FAMILY = [name for name in PRESETS if name not in ("bdh", "tiny_transcoder_gpt", *REFINED)]


@pytest.mark.parametrize("name", FAMILY)
def test_the_published_configurations(name: str) -> None:
    """Open by name, hold what is published, and read the corpus's 9B tokens once."""
    cfg = load_config(name)
    assert cfg.model == preset(name)
    assert (cfg.run.steps, cfg.data.context, cfg.data.folder) == (50_000, 1024, "data/openwebtext")
    assert cfg.run.steps * cfg.tokens_per_step == pytest.approx(9e9, rel=0.01)
    optimizer = cfg.optimizer
    assert (optimizer.name, optimizer.learning_rate, optimizer.beta1, optimizer.beta2) == ("adamw", 6e-4, 0.9, 0.95)
    assert (optimizer.weight_decay, optimizer.grad_clip) == (0.1, 1.0)
    assert optimizer.schedule == ("constant" if name in ("reflow_1", "reflow_1_lite") else "cosine")
    assert [cfg.rows_per_process(gpus) for gpus in (1, 2, 4, 8)]


@pytest.mark.parametrize("name", REFINED)
def test_the_published_refined_models(name: str) -> None:
    cfg = load_config(name)
    assert cfg.model == preset(name)
    assert (cfg.run.steps, cfg.tokens_per_step, cfg.data.context) == (7185, 786_432, 2048)
    optimizer = cfg.optimizer
    rates = (optimizer.matrix_learning_rate, optimizer.embedding_learning_rate, optimizer.learning_rate)
    assert (optimizer.name, *rates) == ("muon", 0.025, 0.035, 0.025)
    assert (optimizer.matrix_momentum_start, optimizer.matrix_momentum, optimizer.average) == (0.92, 0.99, 0.997)
    assert schedule(7185 - 4311 - 1, optimizer, 7185) == 1.0 > schedule(7185 - 4311 + 1, optimizer, 7185)


def test_the_small_relatives_differ_in_their_embedding_alone() -> None:
    """One run's order of data, schedule and blocks; the share of signals kept is the published 64 of 1024."""
    nano, baseline, sparse = (load_config(name) for name in ("reflow_nano_short", "gpt2_new_nano", "reflow_topk_nano"))
    counts = [build_model(cfg.model, device="meta").n_parameters for cfg in (nano, baseline, sparse)]
    assert counts == [9_178_368, 9_112_832, 9_178_368]
    assert sparse.model.topk / sparse.model.n_signals == 64 / 1024
    for cfg in (baseline, sparse):
        assert (cfg.data, cfg.optimizer) == (nano.data, nano.optimizer)
        assert dataclasses.replace(cfg.run, out=nano.run.out) == nano.run
        own = {"architecture", "model_name", "n_signals", "topk", "rotary_adjacent_pairs"}
        ours, theirs = cfg.model.to_dict(), nano.model.to_dict()
        assert {key for key in ours if ours[key] != theirs[key]} <= own


def test_the_gpt_of_tiny_transcoder() -> None:
    """As published, and small: the same architecture with heads as wide."""
    published, nano = (load_config(name) for name in ("tiny_transcoder", "tiny_transcoder_nano"))
    assert published.model == preset("tiny_transcoder_gpt")
    assert (published.run.steps, published.run.batch_size, published.run.seed) == (2000, 128, 1337)
    assert (published.data.context, published.run.eval_interval) == (64, 500)
    optimizer = published.optimizer
    assert (optimizer.name, optimizer.learning_rate, optimizer.schedule) == ("adamw", 3e-4, "constant")
    assert (optimizer.warmup_steps, optimizer.grad_clip, optimizer.weight_decay) == (0, float("inf"), 0.01)
    assert build_model(nano.model, device="meta").n_parameters == 10_188_672
    ours, theirs = nano.model.to_dict(), published.model.to_dict()
    sizes = {"model_name", "d_model", "n_heads", "d_mlp", "d_vocab", "tokenizer_name", "dropout"}
    assert {key for key in ours.keys() | theirs if ours.get(key) != theirs.get(key)} == sizes
    assert nano.model.d_head == nano.model.d_model // nano.model.n_heads == published.model.d_head == 42
    assert 8e6 < nano.run.steps * nano.tokens_per_step < 10e6


def test_every_shipped_configuration_opens() -> None:
    assert {*FAMILY, "bdh_shakespeare"} < set(list_configs())
    for name in list_configs():
        assert load_config(name) == load_config(CONFIGS / f"{name}.toml")


def test_a_preset_with_changes(write: Callable[..., Path]) -> None:
    path = write(model=dict.fromkeys(MODEL) | {"preset": "reflow_1_small", "n_layers": 3})
    cfg = load_config(path)
    assert (cfg.model.n_layers, cfg.model.d_model, cfg.model.n_signals) == (3, 512, 512)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run": {"step": 5}}, "unknown field run.step; did you mean 'steps'"),
        ({"model": {"n_layer": 5}}, "unknown model field 'n_layer'; did you mean 'n_layers'"),
        ({"model": {"preset": "reflow_1_smal"}}, "unknown preset 'reflow_1_smal'; did you mean 'reflow_1_small'"),
        ({"run": {"steps": "many"}}, "run.steps must be a int, got 'many'"),
        ({"run": {"steps": True}}, "run.steps must be a int, got True"),
        ({"run": {"steps": 2.5}}, "run.steps must be a int, got 2.5"),
        ({"run": {"compile": 1}}, "run.compile must be true, false or 'auto', got 1"),
        ({"optimizer": {"learning_rate": "high"}}, "optimizer.learning_rate must be a float, got 'high'"),
        ({"run": {"steps": None}}, "the table [run] lacks steps"),
        ({"data": {"folder": None, "context": None}}, "the table [data] lacks folder, context"),
        ({"model": {"d_head": None}}, "the model configuration lacks d_head"),
        ({"optimizer": {"name": "sgd"}}, "optimizer.name must be one of 'adamw', 'muon', got 'sgd'"),
        ({"optimizer": {"schedule": "linear"}}, "optimizer.schedule must be one of 'constant', 'cosine', 'wsd'"),
        ({"run": {"sharding": "zero3"}}, "run.sharding must be one of 'none', 'zero1', 'fsdp', got 'zero3'"),
        ({"optimizer": {"matrix_scale": "wide"}}, "optimizer.matrix_scale must be one of 'narrowing', 'widening'"),
        ({"run": {"dtype": "float16"}}, "run.dtype must be one of 'auto', 'float32', 'bfloat16', got 'float16'"),
        ({"run": {"batch_size": 0}}, "run.batch_size must be positive, got 0"),
        ({"run": {"keep_checkpoints": 0}}, "run.keep_checkpoints must be positive, got 0"),
        ({"optimizer": {"learning_rate": 0}}, "optimizer.learning_rate must be positive, got 0"),
        ({"optimizer": {"grad_clip": 0}}, "optimizer.grad_clip must be positive, got 0"),
        ({"optimizer": {"warmup_steps": -1}}, "optimizer.warmup_steps must not be negative, got -1"),
        ({"optimizer": {"final_fraction": 2.0}}, "optimizer.final_fraction must be between 0 and 1, got 2.0"),
        (
            {"optimizer": {"rest": "lion"}},
            "optimizer.rest must be one of 'adamw', 'sgd', 'adam_rows', 'muon', got 'lion'",
        ),
        ({"optimizer": {"matrix_dtype": "float16"}}, "optimizer.matrix_dtype must be one of 'bfloat16', 'float32'"),
        (
            {"optimizer": {"rest": "sgd", "decay_all": True}},
            "optimizer.rest sgd decays nothing: set optimizer.decay_all",
        ),
        (
            {"run": {"start_rotation": "axes"}},
            "run.start_rotation must be one of 'none', 'signals', 'stream', got 'axes'",
        ),
        (
            {"run": {"start_rotation": "stream"}},
            "run.start_rotation rotates the weights of run.start_from, which is not",
        ),
        ({"data": {"context": 17}}, "data.context=17 exceeds model.n_ctx=16"),
        ({"run": {"accumulation": 3}}, "run.accumulation must divide run.batch_size=8"),
    ],
)
def test_errors_of_a_configuration(write: Callable[..., Path], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ReflowlensError, match=re.escape(message)):
        load_config(write(**changes))


@pytest.mark.parametrize(
    ("optimizer", "sharding", "message"),
    [
        ({"rest": "adam_rows"}, "fsdp", "optimizer.rest adam_rows goes with run.sharding none or zero1: fsdp cuts"),
        (
            {"average": 0.9},
            "zero1",
            "optimizer.average goes with run.sharding none or fsdp: of zero1 no process has all",
        ),
    ],
)
def test_what_several_processes_cannot_share_out_one_has(
    write: Callable[..., Path], optimizer: dict[str, Any], sharding: str, message: str
) -> None:
    cfg = load_config(write(optimizer=optimizer, run={"sharding": sharding, "steps": 2}))
    assert train(cfg).name == "step_0000002"
    for asked in (cfg.check_sharding, lambda n: estimate(cfg, gpus=n)):
        asked(1)
        with pytest.raises(ReflowlensError, match=re.escape(message)):
            asked(2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[modle]\nx = 1", r"unknown table \[modle\]; did you mean 'model'"),
        ("[model]\nx = 1", r"the table \[data\] is missing"),
        ("[model\n", "is not valid TOML"),
        ("model = 1\ndata = 2\nrun = 3", r"\[model\] must be a table"),
        (b"[model]\nmodel_name = '\xe9'", r"config\.toml is not valid TOML: 'utf-8' codec can't decode byte 0xe9"),
    ],
)
def test_errors_of_a_file(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ReflowlensError, match=message):
        load_config(path)
    with pytest.raises(ReflowlensError, match=r"no configuration file .*nowhere\.toml"):
        load_config(tmp_path / "nowhere.toml")
    with pytest.raises(ReflowlensError, match=r"no configuration 'reflow_1_smal'; did you mean 'reflow_1_small'.* or"):
        load_config("reflow_1_smal")


def test_a_file_that_may_not_be_read(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = write()

    def refuse(self: Path, **options: Any) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(ReflowlensError, match=r"cannot read .*config\.toml: Permission denied"):
        load_config(path)


# ---------------------------------------------------------------------------------------------------------------- --set


def test_settings_are_typed_as_toml_types_them(write: Callable[..., Path]) -> None:
    path = write(optimizer=dict.fromkeys(("name", "learning_rate", "matrix_learning_rate", "warmup_steps")))
    settings = [
        "run.steps=1_000",
        "run.out=out/a",
        "run.compile=true",
        "optimizer.learning_rate = 1e-3",
        "run.seed=7",
        "optimizer.grad_clip=inf",
        "model.n_layers=3",
        "model.model_name=7",
        'run.wandb_project="x y"',
    ]
    cfg = load_config(path, settings)
    assert (cfg.run.steps, cfg.run.out, cfg.run.compile, cfg.run.seed) == (1000, "out/a", True, 7)
    assert (cfg.optimizer.learning_rate, cfg.optimizer.grad_clip) == (1e-3, float("inf"))
    assert (cfg.model.n_layers, cfg.model.model_name, cfg.run.wandb_project) == (3, "7", "x y")
    assert cfg.overrides == {
        "run.steps": 1000,
        "run.out": "out/a",
        "run.compile": True,
        "optimizer.learning_rate": 1e-3,
        "run.seed": 7,
        "optimizer.grad_clip": float("inf"),
        "model.n_layers": 3,
        "model.model_name": "7",
        "run.wandb_project": "x y",
    }
    assert load_config(path).overrides == {}
    assert load_config("reflow_1_small", ["model.preset=reflow_1", "run.steps=1", "run.steps=2"]).run.steps == 2


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("run.steps", "--set run.steps: expected table.field=value"),
        ("steps=3", "--set steps=3: unknown field 'steps'; did you mean 'run.steps'"),
        ("run.step=3", "--set run.step=3: unknown field 'run.step'; did you mean 'run.steps'"),
        ("run.steps=many", "run.steps must be a int, got 'many'"),
        ("run.steps=2.5", "run.steps must be a int, got 2.5"),
        ("run.steps=0", "run.steps must be positive, got 0"),
        ("model.n_layers=two", "n_layers must be a positive integer, got 'two'"),
        ("optimizer.name=sgd", "optimizer.name must be one of 'adamw', 'muon', got 'sgd'"),
        ("model.gated_mlp=False", "gated_mlp must be True or False (in TOML true or false), got 'False'"),
    ],
)
def test_errors_of_a_setting(write: Callable[..., Path], setting: str, message: str) -> None:
    with pytest.raises(ReflowlensError, match=re.escape(message)):
        load_config(write(), [setting])
