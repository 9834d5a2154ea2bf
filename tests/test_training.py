from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from pretraining import train as train_module
from pretraining.batches import batch_at
from pretraining.config import OptimizerConfig, TrainConfig, load_config
from pretraining.data import open_tokens, prepare
from pretraining.optimizers import Muon, make_optimizers, orthogonalize, schedule
from pretraining.state import newest_checkpoint
from pretraining.train import evaluate, train
from reflowlens.checkpoints import load_model, read_manifest
from reflowlens.errors import ReflowlensError
from reflowlens.models import build_model
from tests.tiny import CONFIGS, assert_close

ROOT = Path(__file__).parent.parent
STEPS = 24
ALONE = train_module.Processes(0, 1, torch.device("cpu"))
MODEL: dict[str, Any] = {
    "architecture": "reflow",
    "n_layers": 2,
    "d_model": 16,
    "n_heads": 2,
    "d_head": 8,
    "d_mlp": 32,
    "d_vocab": 256,
    "n_ctx": 16,
    "n_signals": 16,
    "tokenizer_name": "bytes",
}
OPTIMIZER: dict[str, Any] = {"name": "muon", "learning_rate": 0.01, "matrix_learning_rate": 0.05, "warmup_steps": 4}
RUN: dict[str, Any] = {
    "steps": STEPS,
    "batch_size": 8,
    "dtype": "float32",
    "compile": False,
    "eval_interval": 6,
    "eval_tokens": 100,
    "checkpoint_interval": 5,
}


@pytest.fixture(scope="module")
def tokens_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    sentences = [f"The {animal} {verb} the {thing}. " for animal in ("cat", "dog") for verb in ("sees", "eats")
                 for thing in ("mouse", "bone", "grass")]  # fmt: skip
    (folder / "train.txt").write_text("".join(sentences * 20))
    (folder / "val.txt").write_text("".join(reversed(sentences)))
    prepare(folder / "train.txt", folder / "tokens", "bytes", val_sources=folder / "val.txt", progress=False)
    return folder / "tokens"


@pytest.fixture
def tables(tokens_folder: Path, tmp_path: Path) -> dict[str, dict[str, Any]]:
    return {
        "model": dict(MODEL),
        "data": {"folder": str(tokens_folder), "context": 16},
        "optimizer": dict(OPTIMIZER),
        "run": {"out": str(tmp_path / "run"), **RUN},
    }


@pytest.fixture
def write(tables: dict[str, dict[str, Any]], tmp_path: Path) -> Callable[..., Path]:
    """A TOML file with some fields changed: ``write(run={"steps": 3})``; None drops a field."""

    def write(name: str = "config.toml", **changes: dict[str, Any]) -> Path:
        lines = []
        for table, fields in tables.items():
            lines.append(f"[{table}]")
            fields = fields | changes.get(table, {})
            lines += [f"{key} = {json.dumps(value)}" for key, value in fields.items() if value is not None]
        path = tmp_path / name
        path.write_text("\n".join(lines))
        return path

    return write


def records(out: Path | str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def measured(out: Path | str) -> list[dict[str, float]]:
    """Records without the clock."""
    return [{name: value for name, value in record.items() if name != "tokens_per_s"} for record in records(out)]


def with_out(cfg: TrainConfig, out: Path) -> TrainConfig:
    return dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, out=str(out)))


def same_files(one: Path, two: Path) -> None:
    for name in ("model.safetensors", "training_state.safetensors"):
        ours, theirs = load_file(one / name), load_file(two / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name


# ---------------------------------------------------------------------------------------------------------------- a run


@pytest.mark.parametrize("architecture", ["gpt2", "gpt2_new", "reflow", "reflow_topk", "reflow_lite"])
def test_loss_falls(write: Callable[..., Path], architecture: str) -> None:
    changes: dict[str, Any] = {"architecture": architecture}
    if not architecture.startswith("reflow"):
        changes["n_signals"] = None
    if architecture == "reflow_topk":
        changes["topk"] = 8
    if architecture == "reflow_lite":
        changes["n_key_value_heads"] = 1
    cfg = load_config(write(model=changes))
    folder = train(cfg)
    history = records(cfg.run.out)
    assert [record["step"] for record in history] == list(range(1, STEPS + 1))
    assert history[0]["loss"] == pytest.approx(torch.tensor(256.0).log().item(), abs=0.3)
    assert history[-1]["loss"] < 3.5
    assert history[-1]["tokens"] == STEPS * 8 * 16
    assert [record["step"] for record in history if "val_loss" in record] == [6, 12, 18, 24]
    model = load_model(folder)
    assert model.cfg == cfg.model
    val = open_tokens(cfg.data.folder, "val").tokens
    assert evaluate(model, val, cfg, ALONE) == pytest.approx(history[-1]["val_loss"], abs=1e-6)


def test_checkpoints_of_a_run(write: Callable[..., Path], tmp_path: Path) -> None:
    """The last ones are kept, the newest opens as a model, and its manifest says how it came to be."""
    cfg = load_config(write(run={"keep_checkpoints": 3}))
    folder = train(cfg)
    out = Path(cfg.run.out)
    assert sorted(path.name for path in out.glob("step_*")) == ["step_0000015", "step_0000020", "step_0000024"]
    assert folder == out / "step_0000024" == newest_checkpoint(out)
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.json",
        "model.safetensors",
        "training_state.safetensors",
    ]
    manifest = read_manifest(folder)
    assert manifest["step"] == STEPS
    assert manifest["tokens_seen"] == STEPS * 8 * 16
    assert manifest["val_loss"] == records(out)[-1]["val_loss"]
    assert manifest["training"] == cfg.to_dict()
    assert load_model(out).cfg == cfg.model


def test_validation_reads_every_token_once(write: Callable[..., Path]) -> None:
    """The mean over all predictions, whatever the batch size; or over the first so many."""
    cfg = load_config(write())
    model = build_model(cfg.model)
    val = open_tokens(cfg.data.folder, "val").tokens
    losses = []
    for start in range(0, len(val) - 1, 16):
        block = torch.from_numpy(val[start : start + 17].astype("int64"))
        log_p = model(block[:-1]).log_softmax(-1)[0]
        losses.append(-log_p[torch.arange(len(block) - 1), block[1:]])
    every = torch.cat(losses)
    assert len(every) == len(val) - 1
    for batch_size in (1, 8, 1000):
        changed = dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, batch_size=batch_size))
        assert evaluate(model, val, changed, ALONE) == pytest.approx(every.mean().item(), rel=1e-5)
        assert evaluate(model, val, changed, ALONE, 100) == pytest.approx(every[:100].mean().item(), rel=1e-5)


def test_gradient_accumulation_changes_nothing(write: Callable[..., Path], tmp_path: Path) -> None:
    whole = load_config(write(optimizer={"name": "adamw"}))
    train(whole)
    for n in (2, 8):
        parts = load_config(write(optimizer={"name": "adamw"}, run={"accumulation": n, "out": str(tmp_path / f"{n}")}))
        train(parts)
        for one, two in zip(measured(whole.run.out), measured(parts.run.out), strict=True):
            assert two == pytest.approx(one, rel=1e-4)


def test_autocast_is_close(write: Callable[..., Path], tmp_path: Path) -> None:
    exact, rounded = (load_config(write(run={"dtype": d, "out": str(tmp_path / d)})) for d in ("float32", "bfloat16"))
    for cfg in (exact, rounded):
        train(cfg)
    assert records(rounded.run.out)[-1]["val_loss"] == pytest.approx(records(exact.run.out)[-1]["val_loss"], rel=0.05)
    assert (
        load_file(newest_checkpoint(Path(rounded.run.out)) / "model.safetensors")["ln_final.w"].dtype == torch.float32
    )


@pytest.mark.slow
def test_compiled_is_close(write: Callable[..., Path], tmp_path: Path) -> None:
    plain, compiled = (load_config(write(run={"compile": c, "out": str(tmp_path / str(c))})) for c in (False, True))
    for cfg in (plain, compiled):
        train(cfg)
    for one, two in zip(measured(plain.run.out), measured(compiled.run.out), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)


# ------------------------------------------------------------------------------------------------ stopping and resuming


@pytest.fixture
def uninterrupted(write: Callable[..., Path], tmp_path: Path) -> Callable[[TrainConfig], Path]:
    def run(cfg: TrainConfig) -> Path:
        folder = train(with_out(cfg, tmp_path / "uninterrupted"))
        return folder

    return run


class Crash(Exception):
    """Stands for the machine going down."""


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("crash_at", [7, 10, 23])
def test_resuming_is_bit_for_bit(
    write: Callable[..., Path],
    uninterrupted: Callable[[TrainConfig], Path],
    monkeypatch: pytest.MonkeyPatch,
    optimizer: str,
    crash_at: int,
) -> None:
    """Wherever it stopped: losses, learning rates, gradient norms, weights, and the optimiser's moments."""
    cfg = load_config(write(optimizer={"name": optimizer}))
    log = train_module.Log.write

    def crash(self: Any, step: int, record: dict[str, float]) -> None:
        log(self, step, record)
        if step == crash_at:
            raise Crash

    monkeypatch.setattr(train_module.Log, "write", crash)
    with pytest.raises(Crash):
        train(cfg)
    monkeypatch.undo()
    assert len(records(cfg.run.out)) == crash_at
    folder = train(cfg, resume=True)
    same_files(folder, uninterrupted(cfg))
    assert measured(cfg.run.out) == measured(Path(cfg.run.out).with_name("uninterrupted"))


def run_program(config: Path, *arguments: str, program: str = "", **options: Any) -> subprocess.CompletedProcess[str]:
    """``python -m pretraining.train`` in a process of its own, on one thread as here."""
    command = ["-c", program] if program else ["-m", "pretraining.train"]
    return subprocess.run(
        [sys.executable, *command, str(config), *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        **options,
    )


KILLED_AT_STEP_13 = """
import os, signal, sys
from pretraining import train
log = train.Log.write
def write(self, step, record):
    log(self, step, record)
    if step == 13:
        os.kill(os.getpid(), signal.SIGKILL)
train.Log.write = write
train.main(sys.argv[1:])
"""


def test_a_killed_process_resumes_bit_for_bit(
    write: Callable[..., Path], uninterrupted: Callable[[TrainConfig], Path]
) -> None:
    config = write()
    cfg = load_config(config)
    killed = run_program(config, program=KILLED_AT_STEP_13)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.name for path in sorted(Path(cfg.run.out).glob("step_*"))] == ["step_0000005", "step_0000010"]
    assert len(records(cfg.run.out)) == 13
    folder = train(cfg, resume=True)
    same_files(folder, uninterrupted(cfg))
    assert measured(cfg.run.out) == measured(Path(cfg.run.out).with_name("uninterrupted"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_stops(
    write: Callable[..., Path],
    uninterrupted: Callable[[TrainConfig], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    """After the step that was under way, with one line that says how to go on."""
    cfg = load_config(write())
    log = train_module.Log.write

    def press(self: Any, step: int, record: dict[str, float]) -> None:
        log(self, step, record)
        if step == 8:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(train_module.Log, "write", press)
    before = signal.getsignal(number)
    folder = train(cfg)
    monkeypatch.undo()
    assert signal.getsignal(number) is before
    lines = [line for line in capsys.readouterr().err.splitlines() if "validation loss" not in line]
    assert lines == ["stopped at step 8 of 24; continue with --resume"]
    assert folder.name == "step_0000008"
    assert load_model(folder).cfg == cfg.model
    same_files(train(cfg, resume=True), uninterrupted(cfg))


def test_a_second_ctrl_c_interrupts(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def press(self: Any, step: int, record: dict[str, float]) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(train_module.Log, "write", press)
    with pytest.raises(KeyboardInterrupt):
        train(load_config(write()))


# -------------------------------------------------------------------------------------------------------- two processes


def run_two_processes(config: Path) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "pretraining.train"]
    return subprocess.run(
        [sys.executable, *launcher, str(config)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_two_processes_equal_one_with_the_whole_batch(write: Callable[..., Path], tmp_path: Path) -> None:
    changes: dict[str, Any] = {"accumulation": 2, "steps": 12}
    config = write(optimizer={"name": "adamw"}, run=changes)
    done = run_two_processes(config)
    assert done.returncode == 0, done.stderr
    cfg = load_config(config)
    train(with_out(cfg, tmp_path / "one"))
    two, one = measured(cfg.run.out), measured(tmp_path / "one")
    assert [record["step"] for record in two] == list(range(1, 13))
    for ours, theirs in zip(two, one, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours.get("val_loss") == pytest.approx(theirs.get("val_loss"), abs=1e-5)
    ours = load_file(newest_checkpoint(Path(cfg.run.out)) / "model.safetensors")
    for name, tensor in load_file(newest_checkpoint(tmp_path / "one") / "model.safetensors").items():
        assert_close(ours[name], tensor, 1e-3, name)


def test_rows_of_the_processes_are_the_rows_of_one(write: Callable[..., Path]) -> None:
    cfg = load_config(write())
    tokens = open_tokens(cfg.data.folder, "train").tokens
    whole = {tuple(row) for row in batch_at(tokens, 3, 8, 16, seed=0)[0].tolist()}
    parts = [batch_at(tokens, 3, 8, 16, seed=0, rank=rank, world_size=2)[0] for rank in range(2)]
    assert [len(part) for part in parts] == [4, 4]
    assert {tuple(row) for part in parts for row in part.tolist()} == whole


# ----------------------------------------------------------------------------------------------------------- optimisers


def rates(steps: int, **fields: Any) -> list[float]:
    cfg = OptimizerConfig(warmup_steps=10, final_fraction=0.1, **fields)
    return [schedule(step, cfg, steps) for step in range(steps)]


@given(total=st.integers(20, 300), name=st.sampled_from(["constant", "cosine", "wsd"]))
def test_every_schedule_warms_up_and_never_rises_again(total: int, name: str) -> None:
    shares = rates(total, schedule=name)
    assert shares[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert all(one >= two for one, two in pairwise(shares[9:]))
    assert max(shares) == pytest.approx(1)
    assert min(shares[9:]) >= 0.1 - 1e-12


def test_schedules() -> None:
    assert set(rates(100, schedule="constant")[9:]) == {1.0}
    cosine = rates(110, schedule="cosine")
    assert cosine[60] == pytest.approx(0.1 + 0.9 * 0.5)  # half of the way down
    assert cosine[-1] == pytest.approx(0.1, abs=1e-3)
    wsd = rates(100, schedule="wsd", decay_fraction=0.2)
    assert set(wsd[9:81]) == {1.0}
    assert wsd[90] == pytest.approx(0.1 + 0.9 * 0.5)
    assert wsd[-1] == pytest.approx(0.1 + 0.9 / 20)
    falls = [one - two for one, two in pairwise(wsd[80:])]
    assert falls == pytest.approx([0.9 / 20] * 19)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_what_decays(name: str) -> None:
    """The blocks' matrices and the basis; not norms, recipe, embedding or positions. Each is in one group."""
    for architecture in ("gpt2", "reflow"):
        model = build_model(CONFIGS[architecture])
        optimizers = make_optimizers(model, OptimizerConfig(name=name))
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        names = {parameter: key for key, parameter in model.named_parameters()}
        listed = [names[parameter] for group in groups for parameter in group["params"]]
        assert sorted(listed) == sorted(names.values())
        decayed = {names[p] for group in groups if group["weight_decay"] > 0 for p in group["params"]}
        expected = {key for key in names.values() if re.fullmatch(r"blocks\.\d\.(attn|mlp)\.W_\w+", key)}
        assert decayed == expected | ({"embed.W_basis"} if architecture == "reflow" else set())


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16), (3, 20, 12)])
def test_orthogonalize_keeps_singular_vectors_and_levels_singular_values(shape: tuple[int, ...]) -> None:
    """Against U Vᵀ of the singular value decomposition."""
    rank = min(shape[-2:])
    generator = torch.Generator().manual_seed(0)
    U, _, Vh = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    matrix = U * torch.logspace(-1, 1, rank) @ Vh
    result = orthogonalize(matrix)
    assert result.dtype == matrix.dtype
    core = U.mT @ result @ Vh.mT  # diagonal where singular vectors are kept
    diagonal = core.diagonal(dim1=-2, dim2=-1)
    assert diagonal.min() > 0.6
    assert diagonal.max() < 1.3
    assert (core - torch.diag_embed(diagonal)).abs().max() < 0.05
    assert (result - U @ core @ Vh).abs().max() < 0.05
    polar = U @ Vh
    assert (result * polar).sum() / (result.norm() * polar.norm()) > 0.95


def test_muon_takes_every_head_for_itself() -> None:
    """A step on [head, rows, columns] is that on each slice, of spectral norm lr * max(1, rows / columns) ** 0.5."""
    generator = torch.Generator().manual_seed(0)
    start, gradients = torch.randn(3, 20, 5, generator=generator), torch.randn(4, 3, 20, 5, generator=generator)

    def run(value: Tensor, grads: Tensor) -> Tensor:
        parameter = torch.nn.Parameter(value.clone())
        optimizer = Muon([parameter], lr=0.1, weight_decay=0.01)
        for grad in grads:
            parameter.grad = grad.clone()
            optimizer.step()
        return parameter.detach()

    together = run(start, gradients)
    for head in range(3):
        assert_close(run(start[head], gradients[:, head]), together[head], 1e-3)
    step = start - run(start, gradients[:1]) - start * 0.1 * 0.01
    norms = torch.linalg.matrix_norm(step, ord=2)
    assert (norms / (0.1 * 2) - 1).abs().max() < 0.3


# -------------------------------------------------------------------------------------------------------- configuration


def test_the_shipped_configuration_is_valid() -> None:
    cfg = load_config(ROOT / "pretraining" / "configs" / "reflow_nano.toml")
    assert build_model(cfg.model, device="meta").n_parameters == 9_178_368


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
        ({"run": {"compile": 1}}, "run.compile must be a bool, got 1"),
        ({"optimizer": {"learning_rate": "high"}}, "optimizer.learning_rate must be a float, got 'high'"),
        ({"run": {"steps": None}}, "the table [run] lacks steps"),
        ({"data": {"folder": None, "context": None}}, "the table [data] lacks folder, context"),
        ({"model": {"d_head": None}}, "the model configuration lacks d_head"),
        ({"optimizer": {"name": "sgd"}}, "optimizer.name must be one of 'adamw', 'muon', got 'sgd'"),
        ({"optimizer": {"schedule": "linear"}}, "optimizer.schedule must be one of 'constant', 'cosine', 'wsd'"),
        ({"run": {"dtype": "float16"}}, "run.dtype must be one of 'float32', 'bfloat16', got 'float16'"),
        ({"run": {"batch_size": 0}}, "run.batch_size must be positive, got 0"),
        ({"run": {"keep_checkpoints": 0}}, "run.keep_checkpoints must be positive, got 0"),
        ({"optimizer": {"learning_rate": 0}}, "optimizer.learning_rate must be positive, got 0"),
        ({"optimizer": {"grad_clip": 0}}, "optimizer.grad_clip must be positive, got 0"),
        ({"optimizer": {"warmup_steps": -1}}, "optimizer.warmup_steps must not be negative, got -1"),
        ({"optimizer": {"final_fraction": 2.0}}, "optimizer.final_fraction must be between 0 and 1, got 2.0"),
        ({"data": {"context": 17}}, "data.context=17 exceeds model.n_ctx=16"),
        ({"run": {"accumulation": 3}}, "run.accumulation must divide run.batch_size=8"),
    ],
)
def test_errors_of_a_configuration(write: Callable[..., Path], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ReflowlensError, match=re.escape(message)):
        load_config(write(**changes))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[modle]\nx = 1", r"unknown table \[modle\]; did you mean 'model'"),
        ("[model]\nx = 1", r"the table \[data\] is missing"),
        ("[model\n", "is not valid TOML"),
        ("model = 1\ndata = 2\nrun = 3", r"\[model\] must be a table"),
    ],
)
def test_errors_of_a_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(ReflowlensError, match=message):
        load_config(path)
    with pytest.raises(ReflowlensError, match=r"no configuration file .*nowhere\.toml"):
        load_config(tmp_path / "nowhere.toml")


# --------------------------------------------------------------------------------------------------------------- errors


def test_a_run_is_not_overwritten_and_only_its_own_is_resumed(write: Callable[..., Path], tmp_path: Path) -> None:
    cfg = load_config(write(run={"steps": 2}))
    with pytest.raises(ReflowlensError, match="holds no checkpoint to resume from"):
        train(cfg, resume=True)
    folder = train(cfg)
    with pytest.raises(ReflowlensError, match=r"already holds a run: continue it with --resume, or choose another"):
        train(cfg)
    with pytest.raises(ReflowlensError, match="holds another model than the configuration describes"):
        train(load_config(write(run={"steps": 2}, model={"d_mlp": 33})), resume=True)
    with pytest.raises(
        ReflowlensError, match=r"was trained with optimizer\.name='muon', but the configuration has 'adamw'"
    ):
        train(load_config(write(run={"steps": 2}, optimizer={"name": "adamw"})), resume=True)
    with pytest.raises(ReflowlensError, match=r"was trained with run\.seed=\d+, but the configuration has 77"):
        train(load_config(write(run={"steps": 2, "seed": 77})), resume=True)
    assert train(cfg, resume=True) == folder  # nothing is left to do
    assert len(records(cfg.run.out)) == 2


def test_half_a_line_of_metrics_is_dropped(
    write: Callable[..., Path], uninterrupted: Callable[[TrainConfig], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a machine that went down while it wrote leaves behind."""
    cfg = load_config(write())
    log = train_module.Log.write

    def crash(self: Any, step: int, record: dict[str, float]) -> None:
        log(self, step, record)
        if step == 12:
            with self.path.open("a") as file:
                file.write('{"step": 13, "tok')
            raise Crash

    monkeypatch.setattr(train_module.Log, "write", crash)
    with pytest.raises(Crash):
        train(cfg)
    monkeypatch.undo()
    train(cfg, resume=True)
    uninterrupted(cfg)
    assert measured(cfg.run.out) == measured(Path(cfg.run.out).with_name("uninterrupted"))


def test_accumulation_must_divide_the_rows_of_a_process(write: Callable[..., Path]) -> None:
    cfg = load_config(write(run={"accumulation": 8}))
    two = train_module.Processes(0, 2, torch.device("cpu"))
    with pytest.raises(ReflowlensError, match="accumulation"):
        train_module._train(cfg, two, lambda: False, resume=False, progress=False)


def test_data_of_another_tokenizer(write: Callable[..., Path]) -> None:
    cfg = load_config(write(model={"tokenizer_name": "gpt2"}))
    with pytest.raises(ReflowlensError, match=r"was prepared with 'bytes', but model.tokenizer_name is 'gpt2'"):
        train(cfg)


def test_a_loss_that_is_not_finite_stops_the_run(write: Callable[..., Path]) -> None:
    cfg = load_config(write(optimizer={"name": "adamw", "learning_rate": 1e30, "warmup_steps": 0}))
    with pytest.raises(ReflowlensError, match=r"the loss stopped being finite at step \d+ .* lower optimizer.learning"):
        train(cfg)
    assert all(torch.isfinite(torch.tensor(record["loss"])) for record in records(cfg.run.out))


def test_the_program_shows_one_line_for_an_error(tmp_path: Path) -> None:
    done = run_program(tmp_path / "nowhere.toml")
    assert done.returncode == 1
    assert done.stderr.strip() == f"error: no configuration file '{tmp_path / 'nowhere.toml'}'"
