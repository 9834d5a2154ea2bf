from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import reflowlens.checkpoints
from pretraining import train as train_module
from pretraining.batches import batch_at
from pretraining.config import TrainConfig, load_config
from pretraining.distributed import Processes
from pretraining.evaluate import evaluate, evaluate_model
from pretraining.state import newest_checkpoint
from pretraining.token_files import open_tokens
from pretraining.train import train
from reflowlens import cli
from reflowlens.checkpoints import load_model, read_manifest, write_folder
from reflowlens.errors import ReflowlensError
from reflowlens.models import build_model
from tests.support.processes import exit_code
from tests.support.runs import ROOT, STEPS, measured, records, same_files, with_out

TTT_FLOW = "ttt_heads = 2\nttt_chunk = 4\nrotary_channels = 8\nvalue_layers = 1\nexclusive_layers = 1\nflow_width = 8"
ALONE = Processes(0, 1, torch.device("cpu"))


# ---------------------------------------------------------------------------------------------------------------- a run


@pytest.mark.parametrize("architecture", ["gpt2", "gpt2_new", "reflow", "reflow_topk", "reflow_lite", "ttt_flow"])
def test_loss_falls(write: Callable[..., Path], architecture: str) -> None:
    changes: dict[str, Any] = {"architecture": architecture}
    if not architecture.startswith("reflow"):
        changes["n_signals"] = None
    if architecture == "reflow_topk":
        changes["topk"] = 8
    if architecture == "reflow_lite":
        changes["n_key_value_heads"] = 1
    path = write(model=changes)
    if architecture == "ttt_flow":
        path.write_text(f"{path.read_text()}\n[model.ttt_flow]\n{TTT_FLOW}")
    cfg = load_config(path)
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
    assert manifest["overrides"] == {}
    assert load_model(out).cfg == cfg.model


def test_validation_reads_every_token_once(write: Callable[..., Path]) -> None:
    """The mean over all predictions, whatever the batch size; or over blocks at equal distances."""
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
        # 100 tokens are six blocks of 16, as far apart as the stream allows.
        n_blocks = (len(val) - 1) // 16
        spread = torch.cat([every[16 * (i * n_blocks // 6) :][:16] for i in range(6)])
        assert evaluate(model, val, changed, ALONE, 100) == pytest.approx(spread.mean().item(), rel=1e-5)


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
@pytest.mark.by_hand
def test_compiled_is_close(write: Callable[..., Path], tmp_path: Path) -> None:
    plain, compiled = (load_config(write(run={"compile": c, "out": str(tmp_path / str(c))})) for c in (False, True))
    for cfg in (plain, compiled):
        train(cfg)
    for one, two in zip(measured(plain.run.out), measured(compiled.run.out), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)


# ------------------------------------------------------------------------------------------------ weights to start from


PLAIN = {"name": "adamw", "freeze_norms": True, "schedule": "constant"}  # norms that a rotation of the stream can pass


@pytest.mark.parametrize("rotation", ["none", "signals", "stream"])
def test_a_run_begins_with_the_weights_of_another(write: Callable[..., Path], tmp_path: Path, rotation: str) -> None:
    """Its first loss is theirs, however they are rotated; resumed, it does not begin again."""
    first = load_config(write(optimizer=PLAIN, run={"steps": 6, "out": str(tmp_path / "first_0")}))
    before = load_model(train(first))
    start = {"start_from": str(tmp_path / "first_{seed}"), "start_rotation": rotation}
    two, three = (
        load_config(write(model={"model_name": "again"}, optimizer=PLAIN, run=start | {"steps": steps}))
        for steps in (2, 3)
    )
    train(two)
    x, y = batch_at(open_tokens(two.data.folder, "train").tokens, 0, 8, 16, seed=0)
    assert records(two.run.out)[0]["loss"] == pytest.approx(before(x, "loss", targets=y).item(), rel=1e-5)
    train(with_out(three, tmp_path / "uninterrupted"))
    shutil.rmtree(tmp_path / "first_0")
    same_files(train(three, resume=True), newest_checkpoint(tmp_path / "uninterrupted"))


def test_weights_to_begin_with_that_are_not_of_this_model(write: Callable[..., Path], tmp_path: Path) -> None:
    first = load_config(write(run={"steps": 2, "out": str(tmp_path / "first")}))
    train(first)
    other = load_config(write(model={"n_layers": 1}, run={"start_from": str(tmp_path / "first")}))
    with pytest.raises(
        ReflowlensError, match=r"run.start_from: .* holds another model than the configuration describes"
    ):
        train(other)
    free = load_config(write(run={"start_from": str(tmp_path / "first"), "start_rotation": "stream"}))
    with pytest.raises(ReflowlensError, match=r"optimizer.freeze_norms = true"):
        train(free)


@pytest.fixture
def longer(write: Callable[..., Path], tmp_path: Path) -> Callable[[int], TrainConfig]:
    """Two steps of a run, and the same run to more steps."""
    run = {"out": str(tmp_path / "first"), "checkpoint_interval": 2}
    train(load_config(write(optimizer=PLAIN, run=run | {"steps": 2})))
    return lambda steps: load_config(write(optimizer=PLAIN, run=run | {"steps": steps}))


def test_an_unfinished_run_is_no_start_unless_its_checkpoint_is_named(
    write: Callable[..., Path], longer: Callable[[int], TrainConfig], tmp_path: Path
) -> None:
    """Stopped at step 2 of 4: the run's folder is refused, the checkpoint taken and recorded."""
    checkpoint = tmp_path / "first" / "step_0000002"
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["training"]["run"]["steps"] = 4
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    refused = load_config(write(optimizer=PLAIN, run={"steps": 2, "start_from": str(tmp_path / "first")}))
    with pytest.raises(ReflowlensError, match=r"is a run that stands at step 2 of 4: .*begin with, .*step_0000002"):
        train(refused)
    assert not any((tmp_path / "out").glob("step_*"))
    named = load_config(write(optimizer=PLAIN, run={"steps": 2, "start_from": str(checkpoint)}))
    assert read_manifest(train(named))["started_from"] == {
        "model": str(checkpoint),
        "step": 2,
        "weights_sha256": manifest["weights_sha256"],
    }


def test_a_run_is_resumed_only_with_the_start_that_it_had(
    write: Callable[..., Path], longer: Callable[[int], TrainConfig], tmp_path: Path
) -> None:
    """Another name of the same weights is the same start; the same name of others, as of a run trained on, is not."""

    def begun(start: str, steps: int) -> TrainConfig:
        return load_config(write(optimizer=PLAIN, run={"steps": steps, "start_from": str(tmp_path / start)}))

    train(begun("first", 2))
    first = read_manifest(tmp_path / "first" / "step_0000002")
    resumed = train(begun("first/step_0000002", 3), resume=True)
    assert read_manifest(resumed)["started_from"] == {
        "model": str(tmp_path / "first"),
        "step": 2,
        "weights_sha256": first["weights_sha256"],
    }
    train(longer(4), resume=True)
    with pytest.raises(ReflowlensError, match=r"began with the weights of .*first at step 2, and run.start_from"):
        train(begun("first", 4), resume=True)
    assert train(begun("first/step_0000002", 4), resume=True).name == "step_0000004"


# ------------------------------------------------------------------------------------------------ stopping and resuming


@pytest.fixture
def uninterrupted(write: Callable[..., Path], tmp_path: Path) -> Callable[[TrainConfig], Path]:
    def run(cfg: TrainConfig) -> Path:
        folder = train(with_out(cfg, tmp_path / "uninterrupted"))
        return folder

    return run


class Crash(Exception):
    """Stands for the machine going down."""


AVERAGED = {
    "name": "muon",
    "average": 0.9,
    "matrix_momentum": 0.99,
    "matrix_momentum_start": 0.9,
    "matrix_momentum_steps": 20,
    "embedding_learning_rate": 3e-3,
}


SHARED = {"rest": "adam_rows", "name": "muon", "freeze_norms": True}
SGD = {"rest": "sgd", "learning_rate": 0.3, "embedding_learning_rate": 10.0}
TABLES = {"rest": "muon", "matrix_dtype": "float32", "average": 0.9}


@pytest.mark.parametrize(
    ("optimizer", "crash_at"),
    [
        *((optimizer, step) for optimizer in ({"name": "adamw"}, {"name": "muon"}, AVERAGED) for step in (7, 10, 23)),
        *((optimizer, 13) for optimizer in (SHARED, SGD, TABLES)),
    ],
)
def test_resuming_is_bit_for_bit(
    write: Callable[..., Path],
    uninterrupted: Callable[[TrainConfig], Path],
    monkeypatch: pytest.MonkeyPatch,
    optimizer: dict[str, Any],
    crash_at: int,
) -> None:
    """Wherever it stopped: losses, learning rates, gradient norms, weights, and the optimiser's moments."""
    cfg = load_config(write(optimizer=optimizer))
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


def test_the_average_of_the_weights_is_validated_and_written(write: Callable[..., Path]) -> None:
    cfg = load_config(write(optimizer=AVERAGED, run={"checkpoint_interval": 1, "keep_checkpoints": STEPS, "steps": 6}))
    last = train(cfg)
    average: dict[str, torch.Tensor] = {}
    for step in range(1, 7):
        weights = load_file(Path(cfg.run.out) / f"step_{step:07d}" / "model.safetensors")
        average = {name: w if step == 1 else average[name].lerp(w, 0.1) for name, w in weights.items()}
    model = load_model(last / "average")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), average[name])
    val = open_tokens(cfg.data.folder, "val").tokens
    assert evaluate(model, val, cfg, ALONE) == pytest.approx(records(cfg.run.out)[-1]["val_loss"], abs=1e-6)
    assert evaluate(load_model(last), val, cfg, ALONE) != pytest.approx(records(cfg.run.out)[-1]["val_loss"], abs=1e-4)


def test_a_run_killed_while_it_evaluates_loses_no_step(
    write: Callable[..., Path], uninterrupted: Callable[[TrainConfig], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint that is due at the same step is written first, and resuming makes up for the evaluation."""
    cfg = load_config(write(run={"steps": 12, "eval_interval": 6, "checkpoint_interval": 6}))
    out, calls = Path(cfg.run.out), itertools.count(1)

    def killed(*arguments: Any) -> float:
        if next(calls) in (1, 3):  # at steps 6 and 12; the second makes up for the first
            raise Crash
        return evaluate(*arguments)

    monkeypatch.setattr(train_module, "evaluate", killed)
    for step in (6, 12):
        with pytest.raises(Crash):
            train(cfg, resume=step > 6)
        assert newest_checkpoint(out).name == f"step_{step:07d}"
        assert "val_loss" not in read_manifest(newest_checkpoint(out))
        assert [record["step"] for record in records(out)] == list(range(1, step + 1))
    folder = train(cfg, resume=True)
    whole = uninterrupted(cfg)
    same_files(folder, whole)
    assert measured(out) == measured(whole.parent)
    losses = [record["val_loss"] for record in records(out) if "val_loss" in record]
    assert [read_manifest(path)["val_loss"] for path in sorted(out.glob("step_*"))] == losses


def killed_at_step_13(config: Path) -> None:
    log = train_module.Log.write

    def write(self: train_module.Log, step: int, record: dict[str, float]) -> None:
        log(self, step, record)
        if step == 13:
            os.kill(os.getpid(), signal.SIGKILL)

    train_module.Log.write = write  # type: ignore[method-assign]
    train(load_config(config))


def test_a_killed_process_resumes_bit_for_bit(
    write: Callable[..., Path], uninterrupted: Callable[[TrainConfig], Path]
) -> None:
    config = write()
    cfg = load_config(config)
    assert exit_code(killed_at_step_13, config) == -signal.SIGKILL
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


def test_a_command_that_was_asked_to_stop_ends_with_status_130(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a study and a report do, and what torchrun starts; a run that goes on and comes to its end has status 0."""
    config, log, at = str(write()), train_module.Log.write, 8

    def press(self: Any, step: int, record: dict[str, float]) -> None:
        log(self, step, record)
        if step == at:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(train_module.Log, "write", press)
    assert cli.main(["train", config]) == 130
    printed = capsys.readouterr()
    assert printed.out.strip().endswith("step_0000008")
    assert printed.err.splitlines()[-1] == "stopped at step 8 of 24; continue with --resume"
    at = 16
    with pytest.raises(SystemExit) as ended:
        train_module.main([config, "--resume"])
    assert ended.value.code == 130
    assert cli.main(["train", config, "--resume"]) == 0


def test_a_second_ctrl_c_interrupts(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def press(self: Any, step: int, record: dict[str, float]) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(train_module.Log, "write", press)
    with pytest.raises(KeyboardInterrupt):
        train(load_config(write()))


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


@pytest.mark.parametrize(
    ("table", "field", "value", "was"),
    [
        ("optimizer", "learning_rate", 0.5, r"0\.01"),
        ("optimizer", "weight_decay", 0.7, r"0\.1"),
        ("optimizer", "warmup_steps", 1, r"\d+"),
        ("run", "dtype", "bfloat16", "'float32'"),
    ],
)
def test_a_setting_that_was_edited_in_the_file_is_noticed(
    write: Callable[..., Path], table: str, field: str, value: Any, was: str
) -> None:
    """As one that was given by --set is: a run goes on as it began or not at all."""
    run = {"steps": 2} if table == "optimizer" else {"steps": 2, field: value}
    changes: dict[str, Any] = {"run": run} | ({"optimizer": {field: value}} if table == "optimizer" else {})
    train(load_config(write(run={"steps": 2})))
    with pytest.raises(ReflowlensError, match=rf"was trained with {table}\.{field}={was}, but the configuration has"):
        train(load_config(write(**changes)), resume=True)


def test_a_run_can_be_made_longer_where_that_leaves_its_past_as_it_was(write: Callable[..., Path]) -> None:
    """To the bit what a run as long would have been; a cosine would have fallen otherwise from the start."""
    constant: dict[str, Any] = {"optimizer": {"schedule": "constant"}}
    train(load_config(write(run={"steps": 2}, **constant)))
    longer = load_config(write(run={"steps": 3}, **constant))
    folder = train(longer, resume=True)
    same_files(folder, train(with_out(longer, folder.parent.with_name("at once"))))

    falling: dict[str, Any] = {"optimizer": {"schedule": "cosine", "warmup_steps": 0}}
    out = str(folder.parent.with_name("falling"))
    train(load_config(write(run={"steps": 2, "out": out}, **falling)))
    with pytest.raises(ReflowlensError, match=r"was trained with run\.steps=2, but the configuration has 3"):
        train(load_config(write(run={"steps": 3, "out": out}, **falling)), resume=True)


def test_a_run_goes_on_with_its_own_tokens_wherever_they_lie(write: Callable[..., Path], tmp_path: Path) -> None:
    cfg = load_config(write(run={"steps": 2}))
    folder = train(cfg)
    moved = shutil.copytree(cfg.data.folder, tmp_path / "moved")
    assert train(load_config(write(run={"steps": 2}, data={"folder": str(moved)})), resume=True) == folder
    manifest = json.loads((moved / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"][0]["sha256"] = "0" * 64
    (moved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ReflowlensError, match=r"was trained on other tokens than .*moved holds now"):
        train(load_config(write(run={"steps": 2}, data={"folder": str(moved)})), resume=True)


@pytest.mark.parametrize("file", ["manifest.json", "model.safetensors", "training_state.safetensors"])
def test_a_damaged_checkpoint_is_told_and_the_one_before_goes_on(write: Callable[..., Path], file: str) -> None:
    cfg = load_config(write(run={"steps": 4, "checkpoint_interval": 2}))
    folder = train(cfg)
    kept = shutil.copytree(folder, folder.parent.with_name("kept"))
    whole = (folder / file).read_bytes()
    for length in (0, len(whole) // 2, len(whole) - 3):
        (folder / file).write_bytes(whole[:length])
        with pytest.raises(
            ReflowlensError,
            match=r"^cannot resume from .*step_0000004: .*; if it is damaged, remove it to go on from the checkpoint",
        ):
            train(cfg, resume=True)
    shutil.rmtree(folder)
    same_files(train(cfg, resume=True), kept)


def flip_last_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-4] ^= 1
    path.write_bytes(data)


def test_a_checkpoint_with_a_flipped_bit_is_not_gone_on_from(write: Callable[..., Path]) -> None:
    flip_last_bit(train(load_config(write(run={"steps": 2}))) / "model.safetensors")
    with pytest.raises(ReflowlensError, match=r"cannot resume from .*is not the file that manifest\.json was written"):
        train(load_config(write(run={"steps": 4})), resume=True)


@pytest.mark.parametrize("split", ["train", "val"])
def test_tokens_that_were_changed_are_not_trained_on(write: Callable[..., Path], tmp_path: Path, split: str) -> None:
    """Nor evaluated on; whoever means it takes the hash out of the manifest."""
    sound = load_config(write()).data.folder
    folder = Path(shutil.copytree(sound, tmp_path / "changed"))
    data = {"folder": str(folder)}
    last = train(load_config(write(run={"steps": 2}, data=data)))
    flip_last_bit(folder / f"{split}.bin")
    message = rf"{split}\.bin is not the file that was prepared .*give it the sha256 null in manifest\.json"
    with pytest.raises(ReflowlensError, match=message):
        train(load_config(write(run={"steps": 4}, data=data)), resume=True)
    with pytest.raises(ReflowlensError, match=message):
        train(load_config(write(run={"steps": 2, "out": str(tmp_path / "new")}, data=data)))
    assert not (tmp_path / "new").exists()
    model = load_model(last)
    with pytest.raises(ReflowlensError, match=message):
        evaluate_model(model, folder, split=split)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"][split]["shards"][0]["sha256"] = None
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert evaluate_model(model, folder, split=split) != evaluate_model(model, sound, split=split)


def test_a_folder_in_which_another_process_trains_is_left_alone(write: Callable[..., Path]) -> None:
    """Also before its first checkpoint, and until it ends; one that was killed holds nothing."""
    cfg = load_config(write(run={"steps": 2}))
    out = Path(cfg.run.out)
    held = subprocess.Popen([sys.executable, "-c", HOLDS, str(out)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert held.stdout is not None
    assert held.stdout.readline() == "held\n"
    (out / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    for resume in (False, True):
        with pytest.raises(ReflowlensError, match=r"^another process is training in '.*run' right now: wait until it"):
            train(cfg, resume=resume)
    assert len(records(out)) == 2
    held.kill()
    held.wait()
    assert train(cfg).name == "step_0000002"


HOLDS = """
import sys, time
from reflowlens.storage.atomic import sole_writer
with sole_writer(sys.argv[1], "training in"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_run_that_cannot_begin_leaves_no_folder(write: Callable[..., Path]) -> None:
    cfg = load_config(write(model={"tokenizer_name": "gpt2"}))
    with pytest.raises(ReflowlensError, match="was prepared with"):
        train(cfg)
    assert not Path(cfg.run.out).exists()


def test_what_a_killed_save_left_is_removed_by_the_next(write: Callable[..., Path], tmp_path: Path) -> None:
    cfg = load_config(write(run={"steps": 2}))
    out = Path(cfg.run.out)

    def killed(folder: Path) -> None:
        (folder / "half").write_text("")
        raise Crash

    with pytest.MonkeyPatch.context() as patch:  # a killed process cleans up nothing
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(Crash):
            write_folder(out / "step_0000001", killed)
    (left,) = out.iterdir()
    others = [out / ".step_0000001.old.notes", out / ".step_by_step", out / ".mine.abcdefgh"]
    for folder in (out / ".step_0000001.old.a1_b2c3d", *others):
        folder.mkdir()
    train(cfg)
    assert not left.exists()
    assert sorted(out.glob(".*")) == sorted(others)


def test_overrides_are_recorded_and_kept(write: Callable[..., Path], tmp_path: Path) -> None:
    """In the run's manifest and in every checkpoint's; what decides the run cannot be overridden otherwise later."""
    config = write(run={"checkpoint_interval": 2, "keep_checkpoints": 9})
    settings = ["run.steps=4", "optimizer.learning_rate=0.02"]
    cfg = load_config(config, settings)
    folder = train(cfg)
    overrides = {"run.steps": 4, "optimizer.learning_rate": 0.02}
    out = Path(cfg.run.out)
    checkpoints = sorted(out.glob("step_*"))
    assert [read_manifest(path)["overrides"] for path in checkpoints] == [overrides] * 2
    shutil.rmtree(folder)

    refused = r"was trained with {}, but the configuration has {}: a resumed run must repeat"
    for given, was, now in (
        (settings[:1], r"optimizer\.learning_rate=0\.02", "0.01"),
        (settings[1:], r"run\.steps=4", "24"),
        ([*settings, "run.dtype=bfloat16"], r"run\.dtype='float32'", "'bfloat16'"),
        ([*settings, "model.d_mlp=48"], "another model", ""),
    ):
        expected = refused.format(was, now) if now else "holds another model than the configuration describes"
        with pytest.raises(ReflowlensError, match=expected):
            train(load_config(config, given), resume=True)
    with pytest.raises(ReflowlensError, match=r"\(give --set optimizer\.learning_rate=0\.02 again\)"):
        train(load_config(config, settings[:1]), resume=True)

    moved = ["run.accumulation=2", "run.eval_interval=1"]
    assert train(load_config(config, [*settings, *moved]), resume=True) == folder
    run = json.loads((out / "run.json").read_text())
    assert run["overrides"] == overrides | {"run.accumulation": 2, "run.eval_interval": 1}
    assert [(start["step"], start["overrides"]) for start in run["starts"]] == [(0, overrides), (2, run["overrides"])]
    same = write("same.toml", run={"steps": 4}, optimizer={"learning_rate": 0.02})
    assert train(load_config(same), resume=True) == folder  # the same values, from the file


def test_a_checkpoint_older_than_a_field_of_the_configuration(write: Callable[..., Path]) -> None:
    """Its absence means the default, and no overrides."""
    cfg = load_config(write(run={"steps": 2}))
    manifest_path = train(cfg) / "manifest.json"
    manifest = json.loads(manifest_path.read_text())
    del manifest["overrides"], manifest["training_data"], manifest["training"]["optimizer"]["matrix_scale"]
    manifest_path.write_text(json.dumps(manifest))
    train(cfg, resume=True)
    with pytest.raises(ReflowlensError, match=r"optimizer.matrix_scale='narrowing', but the configuration has 'wide"):
        train(load_config(write(run={"steps": 2}, optimizer={"matrix_scale": "widening"})), resume=True)


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


@pytest.mark.parametrize("damage", [b"", b"[]\n", b'{"other": 1}\n', b'{"step": "1", "starts": 1}\n', b"\xff\xfe\n"])
@pytest.mark.parametrize("name", ["metrics.jsonl", "run.json"])
def test_a_damaged_record_of_a_run_is_told(write: Callable[..., Path], name: str, damage: bytes) -> None:
    cfg = load_config(write(run={"steps": 2}))
    folder = train(cfg)
    record = Path(cfg.run.out) / name
    record.write_bytes(damage)
    if (name, damage) == ("metrics.jsonl", b""):  # no step was written down: nothing is damaged
        assert train(cfg, resume=True) == folder
        return
    with pytest.raises(ReflowlensError, match=rf"{name} is damaged: .*move it away to go on without it"):
        train(cfg, resume=True)
    assert record.read_bytes() == damage
    record.unlink()
    assert train(cfg, resume=True) == folder


def test_accumulation_must_divide_the_rows_of_a_process(write: Callable[..., Path]) -> None:
    cfg = load_config(write(run={"accumulation": 8}))
    two = Processes(0, 2, torch.device("cpu"))
    with pytest.raises(ReflowlensError, match="accumulation"):
        train_module._train(cfg, two, lambda: False, resume=False, progress=False)


def test_data_of_another_tokenizer(write: Callable[..., Path]) -> None:
    cfg = load_config(write(model={"tokenizer_name": "gpt2"}))
    with pytest.raises(ReflowlensError, match=r"was prepared with 'bytes', but model.tokenizer_name is 'gpt2'"):
        train(cfg)


def test_a_vocabulary_that_does_not_hold_the_datas_tokens(write: Callable[..., Path]) -> None:
    with pytest.raises(ReflowlensError, match=r"holds ids up to 255, but model.d_vocab is 200: at least 256 is needed"):
        train(load_config(write(model={"d_vocab": 200})))


def test_a_folder_that_cannot_be_written_is_one_clear_error(write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ReflowlensError, match=r"cannot write .*metrics\.jsonl: "):
        train(load_config(write(run={"out": str(tmp_path / "file" / "run")})))


def test_a_disk_that_fills_while_it_trains_leaves_a_run_to_go_on_with(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = load_config(write(run={"steps": 4, "checkpoint_interval": 2}))
    opened, appended = Path.open, itertools.count(1)

    def full(self: Path, mode: str = "r", **options: Any) -> Any:
        if self.name == "metrics.jsonl" and mode == "a" and next(appended) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(self, mode, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(ReflowlensError, match=r"cannot write .*metrics\.jsonl: No space left on device"):
            train(cfg)
    assert newest_checkpoint(Path(cfg.run.out)).name == "step_0000002"
    assert train(cfg, resume=True).name == "step_0000004"


@pytest.mark.parametrize("writer", ["reflowlens.checkpoints.write_tensors", "pretraining.state.write_tensors"])
@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("No space left on device (os error 28)")],
)
def test_a_checkpoint_that_finds_the_disk_full_says_how_to_go_on(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, writer: str, error: Exception
) -> None:
    """Of the checkpoint, by its own name, and where the run stands; not of the folder in which it was being written."""
    cfg = load_config(write(run={"steps": 4, "checkpoint_interval": 2}))
    calls, write_tensors = itertools.count(1), reflowlens.checkpoints.write_tensors

    def full(*arguments: Any) -> None:
        if next(calls) == 2:
            raise error
        write_tensors(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(writer, full)
        with pytest.raises(ReflowlensError) as caught:
            train(cfg)
    out = Path(cfg.run.out)
    assert str(caught.value) == (
        f"cannot write {out / 'step_0000004'}: {error.strerror if isinstance(error, OSError) else error}; "
        f"the last checkpoint is {out / 'step_0000002'}: continue with --resume"
    )
    assert not list(out.glob(".step*"))
    assert train(cfg, resume=True).name == "step_0000004"


def test_a_loss_that_is_not_finite_stops_the_run(write: Callable[..., Path]) -> None:
    cfg = load_config(write(optimizer={"name": "adamw", "learning_rate": 1e30, "warmup_steps": 0}))
    with pytest.raises(ReflowlensError, match=r"the loss stopped being finite at step \d+ .* lower optimizer.learning"):
        train(cfg)
    assert all(torch.isfinite(torch.tensor(record["loss"])) for record in records(cfg.run.out))


def test_the_program_shows_one_line_for_an_error(tmp_path: Path) -> None:
    """With a text as its code the interpreter prints it and ends with 1."""
    with pytest.raises(SystemExit) as ended:
        train_module.main([str(tmp_path / "nowhere.toml")])
    assert ended.value.code == f"error: no configuration file '{tmp_path / 'nowhere.toml'}'"
