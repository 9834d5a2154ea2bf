"""Several processes do what one does: on the CPU, two of them, over gloo."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from pretraining.batches import batch_at
from pretraining.config import TrainConfig, load_config
from pretraining.replicas import owners
from pretraining.state import newest_checkpoint
from pretraining.token_files import open_tokens
from pretraining.train import train
from reflowlens.checkpoints import load_model
from tests.support.launched import train_all
from tests.support.processes import two_processes
from tests.support.runs import measured, run_tables, run_two_processes, same_files, with_out, write_toml

SHARDINGS = ("none", "zero1", "fsdp")
OPTIMIZERS = ("adamw", "muon")
# What updates tables and vectors, and a way to share it out that knows of it; norms do not learn.
REST = (("zero1", "adam_rows"), ("zero1", "sgd"), ("fsdp", "sgd"), ("fsdp", "muon"))
STEPS = 12
# Of losses, and of weights and moments relative to their norms.
LOSSES, STATE = 1e-5, 3e-5
RUN: dict[str, Any] = {"steps": STEPS, "accumulation": 2, "keep_checkpoints": 9}


def same_run(ours: Path, expected: Path, looser: float = 1) -> None:
    """The same losses and gradient norms step by step, and the same weights and moments at the end."""
    losses, states = looser * LOSSES, looser * STATE
    records, expected_records = measured(ours), measured(expected)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    for record, other in zip(records, expected_records, strict=True):
        assert record["loss"] == pytest.approx(other["loss"], abs=losses)
        assert record.get("val_loss") == pytest.approx(other.get("val_loss"), abs=losses)
        assert record["grad_norm"] == pytest.approx(other["grad_norm"], rel=10 * losses)
    for name in ("model.safetensors", "training_state.safetensors"):
        state, other_state = (load_file(newest_checkpoint(out) / name) for out in (ours, expected))
        assert state.keys() == other_state.keys()
        for key, value in other_state.items():
            assert (state[key] - value).norm() <= states * value.norm(), key


def begun(run: Path, copy: Path) -> Path:
    """A run as it was after its first checkpoint."""
    shutil.copytree(run, copy)
    for later in sorted(copy.glob("step_*"))[1:]:
        shutil.rmtree(later)
    return copy


@pytest.fixture(scope="module")
def runs(tokens_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs: ``one-OPTIMIZER`` by one process; ``SHARDING-OPTIMIZER`` by two; ``more-SHARDING``, begun by
    one and finished by two."""
    folder = tmp_path_factory.mktemp("runs")
    tables = run_tables(tokens_folder, folder)

    def config(name: str, optimizer: str, rest: str = "adamw", **run: Any) -> Path:
        run = RUN | {"out": str(folder / name)} | run
        updates: dict[str, Any] = {"name": optimizer, "rest": rest, "freeze_norms": rest != "adamw"}
        # Gradients summed in another order differ in their last bit. Where that moves a product across a rounding
        # boundary of bfloat16, Muon's step differs by a part in 256, whatever is shared out; in float32 it does not.
        updates["matrix_dtype"] = "float32"
        return write_toml(folder / f"{name}.toml", tables, optimizer=updates, run=run)

    for optimizer in OPTIMIZERS:
        train(load_config(config(f"one-{optimizer}", optimizer)))
    for rest in {rest for _, rest in REST}:
        train(load_config(config(f"one-rest-{rest}", "adamw", rest)))
    train(load_config(config("one-bfloat16", "adamw", dtype="bfloat16")))
    jobs = [str(config(f"{sharding}-{name}", name, sharding=sharding)) for sharding in SHARDINGS for name in OPTIMIZERS]
    jobs.append(str(config("fsdp-bfloat16", "adamw", sharding="fsdp", dtype="bfloat16", accumulation=1)))
    jobs += [str(config(f"{sharding}-rest-{rest}", "adamw", rest, sharding=sharding)) for sharding, rest in REST]
    for sharding in SHARDINGS:
        begun(folder / "one-adamw", folder / f"more-{sharding}")
        jobs.append(f"{config(f'more-{sharding}', 'adamw', sharding=sharding)}+resume")
    two_processes(train_all, *jobs)
    return folder


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_two_processes_equal_one_with_the_whole_batch(runs: Path, sharding: str, optimizer: str) -> None:
    same_run(runs / f"{sharding}-{optimizer}", runs / f"one-{optimizer}")
    assert load_model(runs / f"{sharding}-{optimizer}").cfg == load_config(runs / "one-adamw.toml").model


@pytest.mark.parametrize(("sharding", "rest"), REST)
def test_two_processes_share_what_the_rest_is_updated_by(runs: Path, sharding: str, rest: str) -> None:
    same_run(runs / f"{sharding}-rest-{rest}", runs / f"one-rest-{rest}")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_owning_a_share_of_the_optimiser_changes_no_bit(runs: Path, optimizer: str) -> None:
    same_files(*(newest_checkpoint(runs / f"{sharding}-{optimizer}") for sharding in ("none", "zero1")))


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_a_run_goes_on_with_more_processes(runs: Path, sharding: str) -> None:
    same_run(runs / f"more-{sharding}", runs / "one-adamw")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_a_run_goes_on_with_fewer_processes(runs: Path, tmp_path: Path, sharding: str, optimizer: str) -> None:
    fewer = begun(runs / f"{sharding}-{optimizer}", tmp_path / "fewer")
    train(with_out(load_config(runs / f"{sharding}-{optimizer}.toml"), fewer), resume=True)
    same_run(fewer, runs / f"one-{optimizer}")


def test_slices_in_bfloat16_are_close_to_autocast(runs: Path) -> None:
    """Weights are rounded before they are sent, and gradients summed, in another order."""
    for ours, expected in zip(measured(runs / "fsdp-bfloat16"), measured(runs / "one-bfloat16"), strict=True):
        assert ours["loss"] == pytest.approx(expected["loss"], abs=3e-3)
    weights = load_file(newest_checkpoint(runs / "fsdp-bfloat16") / "model.safetensors")
    assert {str(tensor.dtype) for tensor in weights.values()} == {"torch.float32"}


def test_rows_of_the_processes_are_the_rows_of_one(runs: Path) -> None:
    cfg = load_config(runs / "one-adamw.toml")
    tokens = open_tokens(cfg.data.folder, "train").tokens
    whole = {tuple(row) for row in batch_at(tokens, 3, 8, 16, seed=0)[0].tolist()}
    parts = [batch_at(tokens, 3, 8, 16, seed=0, rank=rank, world_size=2)[0] for rank in range(2)]
    assert [len(part) for part in parts] == [4, 4]
    assert {tuple(row) for part in parts for row in part.tolist()} == whole


@given(sizes=st.dictionaries(st.text("abc", min_size=1), st.integers(1, 1000), min_size=1), n=st.integers(1, 6))
def test_owners_share_evenly(sizes: dict[str, int], n: int) -> None:
    """Every parameter has one owner, and no two owners' loads differ by more than one parameter."""
    owner = owners(sizes, n)
    assert list(owner) == list(sizes)
    loads = [sum(size for name, size in sizes.items() if owner[name] == rank) for rank in range(n)]
    assert sum(loads) == sum(sizes.values())
    assert max(loads) - min(loads) <= max(sizes.values())


# ------------------------------------------------------------------------------------------------- a process that fails


def goes_on(cfg: TrainConfig, tmp_path: Path) -> None:
    """What was left behind is enough to finish the run as if nothing had happened."""
    train(cfg, resume=True)
    train(with_out(cfg, tmp_path / "uninterrupted"))
    same_run(Path(cfg.run.out), tmp_path / "uninterrupted")


def failed(config: Path, how: str) -> str:
    """The one line that says why a run failed in which process 1 raises or is killed after step 7."""
    done = run_two_processes("-m", "tests.support.launched", "--fail", how, "1", "7", config)
    assert done.returncode != 0
    cause = done.stderr.split("Root Cause")[1]
    assert "rank      : 1 (local_rank: 1)" in cause  # the launcher blames the same one
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error:"))
    return line


@pytest.mark.slow
def test_a_process_that_raises_ends_all_with_one_message(write: Callable[..., Path], tmp_path: Path) -> None:
    config = write(optimizer={"name": "adamw"}, run=RUN | {"sharding": "zero1"})
    cfg = load_config(config)
    assert failed(config, "raise") == (
        "error: rank 1 of 2 failed: OSError: the disk with the data is gone; "
        f"the last checkpoint is {cfg.run.out}/step_0000005: continue with --resume"
    )
    goes_on(cfg, tmp_path)


@pytest.mark.slow
def test_a_process_that_is_killed_ends_all_with_one_message(write: Callable[..., Path], tmp_path: Path) -> None:
    config = write(optimizer={"name": "adamw"}, run=RUN | {"sharding": "fsdp"})
    cfg = load_config(config)
    line = failed(config, "kill")
    assert line.startswith("error: rank 0 of 2 lost the connection to another process, which was killed or whose")
    assert line.endswith(f"the last checkpoint is {cfg.run.out}/step_0000005: continue with --resume")
    goes_on(cfg, tmp_path)


@pytest.mark.slow
def test_bad_input_is_one_line(tmp_path: Path) -> None:
    """All processes meet it; one says so."""
    done = run_two_processes("-m", "pretraining.train", tmp_path / "nowhere.toml")
    assert [line for line in done.stderr.splitlines() if line.startswith("error:")] == [
        f"error: no configuration file '{tmp_path / 'nowhere.toml'}'"
    ]


@pytest.mark.slow
@pytest.mark.by_hand
def test_compiled(write: Callable[..., Path], tmp_path: Path) -> None:
    run = RUN | {"compile": True}
    configs = [
        write(
            f"{sharding}.toml",
            optimizer={"name": "adamw"},
            run=run | {"sharding": sharding, "out": str(tmp_path / sharding)},
        )
        for sharding in SHARDINGS
    ]
    done = run_two_processes("-m", "tests.support.launched", *configs)
    assert done.returncode == 0, done.stderr
    train(with_out(load_config(write(optimizer={"name": "adamw"}, run=RUN)), tmp_path / "one"))
    for sharding in SHARDINGS:
        same_run(tmp_path / sharding, tmp_path / "one", looser=10)
