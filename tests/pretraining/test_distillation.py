"""Students: their losses against plain ones, what they begin with, runs that are stopped or shared out, bad input."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from pretraining import train as train_module
from pretraining.batches import batch_at
from pretraining.config import load_config
from pretraining.distillation.losses import logit_losses
from pretraining.distillation.objective import objective_of
from pretraining.distributed import Processes
from pretraining.objective import Objective
from pretraining.replicas import Replica
from pretraining.state import newest_checkpoint
from pretraining.token_files import open_tokens
from pretraining.train import train
from reflowlens.checkpoints import load_model, model_hash, read_manifest, save_model
from reflowlens.cli import main
from reflowlens.config import ModelConfig
from reflowlens.errors import ReflowlensError
from reflowlens.models import build_model
from reflowlens.models.reflow import ReFlow
from reflowlens.models.residual import Readout
from reflowlens.signals import signal_view
from tests.support.launched import train_all
from tests.support.processes import two_processes
from tests.support.runs import MODEL, measured, records, same_files, with_out
from tests.support.tiny import assert_close, random_model

ALL = {"tokens": 0.3, "logits": 0.5, "signals": 0.2, "temperature": 2.0}
STEPS = 8


def teacher_at(folder: Path, **changes: Any) -> Path:
    return save_model(folder, random_model(ModelConfig.from_dict(MODEL | {"n_layers": 3} | changes), seed=5))


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return teacher_at(tmp_path / "teacher")


@pytest.fixture
def write_student(write: Callable[..., Path], teacher: Path) -> Callable[..., Path]:
    """A student's configuration: ``write_student(distillation={"basis": "frozen"}, run={"steps": 3})``."""

    def written(name: str = "student.toml", *, distillation: dict[str, Any], **changes: Any) -> Path:
        changes["run"] = {"steps": STEPS, "checkpoint_interval": 3, "eval_interval": 4} | changes.get("run", {})
        path = write(name, **changes)
        table = {"teacher": str(teacher)} | distillation
        fields = "\n".join(f"{key} = {json.dumps(value)}" for key, value in table.items())
        path.write_text(f"{path.read_text()}\n[distillation]\n{fields}\n")
        return path

    return written


# ----------------------------------------------------------------------------------------------------------- the losses


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("has_bias", [False, True])
def test_losses_and_gradients_are_those_of_whole_logits(temperature: float, cap: float | None, has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    features, matrix, bias = drawn(2, 5, 3).requires_grad_(), drawn(7, 3).requires_grad_(), drawn(7).requires_grad_()
    theirs = Readout(drawn(2, 5, 4), drawn(7, 4), drawn(7) if has_bias else None, None)
    ours = Readout(features, matrix, bias if has_bias else None, cap)
    targets = torch.randint(7, (2, 5), generator=generator)
    inputs = [features, matrix, *([bias] if has_bias else [])]
    found = logit_losses(ours, theirs, targets, tokens=0.3, logits=0.6, temperature=temperature, chunk=3)
    logits, wanted = ours.logits().flatten(0, 1), theirs.logits().flatten(0, 1)
    tokens = F.cross_entropy(logits, targets.flatten())
    divergence = F.kl_div(
        (logits / temperature).log_softmax(-1),
        (wanted / temperature).log_softmax(-1),
        log_target=True,
        reduction="batchmean",
    )
    total = 0.3 * tokens + 0.6 * temperature**2 * divergence
    expected = (total, tokens, temperature**2 * divergence)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two)
    for one, two in zip(
        torch.autograd.grad(2 * found.total, inputs), torch.autograd.grad(2 * total, inputs), strict=True
    ):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("pos", [2, 16], ids=["factored", "formed"])
@pytest.mark.parametrize("architecture", ["reflow", "reflow_topk"])
def test_signals_of_a_readout(pos: int, architecture: str) -> None:
    """The same whether the pass reads logits through B and then R, or through R B."""
    changes = {"architecture": architecture, "n_signals": 24, "d_vocab": 32, "n_ctx": 16}
    model = random_model(ModelConfig.from_dict(MODEL | changes | ({"topk": 5} if "topk" in architecture else {})))
    assert isinstance(model, ReFlow)
    x = torch.randint(32, (4, pos), generator=torch.Generator().manual_seed(1))
    assert model.forms(model.cfg, x.numel()) == (pos == 16)
    expected = signal_view(model).readout(model.final_stream(x))
    assert_close(model(x, lambda readout: model.signals_of(readout)), expected)


@pytest.mark.parametrize("basis", ["own", "rotated"])
def test_a_students_losses(write_student: Callable[..., Path], basis: str) -> None:
    """Each as it is written down, from whole logits and whole signals; the total is their weighted sum."""
    cfg = load_config(write_student(distillation=ALL | {"basis": basis}))
    tokens = open_tokens(cfg.data.folder, "train").tokens
    cfg, objective = objective_of(cfg, tokens)
    assert cfg.distillation is not None
    teacher, student = load_model(cfg.distillation.teacher), random_model(cfg.model, seed=9)
    objective.prepare(student)
    x, y = batch_at(tokens, 3, 8, 16, seed=0)
    first, _ = batch_at(tokens, 0, 8, 16, seed=0)
    with torch.no_grad():
        found = objective.losses(student, x, y)
        ours, theirs = (model(x).flatten(0, 1) / 2 for model in (student, teacher))
        expected = {
            "loss_tokens": F.cross_entropy(2 * ours, y.flatten()),
            "loss_logits": 4
            * F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="batchmean"),
        }
        view = signal_view(teacher)
        # of a rotated student: the rotation is what its basis is of the teacher's
        Q = torch.linalg.lstsq(view.basis.double().T, signal_view(student).basis.double().T).solution.T.float()
        Q = Q if basis == "rotated" else torch.eye(16)
        torch.testing.assert_close(Q @ Q.T, torch.eye(16), atol=1e-3, rtol=0)
        wanted, moments = (view.readout(teacher.final_stream(texts)).flatten(0, 1) @ Q.T for texts in (x, first))
        signals = signal_view(student).readout(student.final_stream(x)).flatten(0, 1)
        expected["loss_signals"] = ((signals - wanted) ** 2 / moments.var(0, correction=0)).mean()
    expected["loss"] = 0.3 * expected["loss_tokens"] + 0.5 * expected["loss_logits"] + 0.2 * expected["loss_signals"]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(float(value), rel=1e-3 if "signals" in name else 1e-5), name


# ------------------------------------------------------------------------------------------- what a student begins with


def test_what_is_shared_with_the_teacher(write_student: Callable[..., Path], teacher: Path) -> None:
    """Own weights are those of a run without a teacher; the rotated factors have the same product, span and metric."""
    theirs: Any = load_model(teacher)
    fresh: Any = build_model(load_config(write_student(distillation={})).model, seed=0)  # of any seed
    for basis in ("own", "start", "frozen", "rotated"):
        for recipe in ("own",) if basis == "own" else ("own", "start", "frozen"):
            asked = {"basis": basis, "recipe": recipe}
            cfg = load_config(write_student(distillation=asked))
            cfg, objective = objective_of(cfg, open_tokens(cfg.data.folder, "train").tokens)
            student: Any = build_model(cfg.model, seed=0)
            objective.prepare(student)
            found, B = student.embed, theirs.embed.W_basis
            assert found.W_basis.requires_grad == (basis in ("own", "start"))
            assert found.W_recipe.requires_grad == (recipe != "frozen")
            if basis == "rotated":
                assert_close(found.W_basis.T @ found.W_basis, B.T @ B, 1e-4)
                assert float((found.W_basis - B).detach().norm() / B.detach().norm()) > 0.5
            else:
                assert torch.equal(found.W_basis, fresh.embed.W_basis if basis == "own" else B)
            if recipe == "own":
                assert torch.equal(found.W_recipe, fresh.embed.W_recipe)
            else:
                assert_close(found.W_recipe @ found.W_basis, theirs.embed.W_recipe @ B, 1e-4)
            for name, parameter in student.blocks.named_parameters():
                assert torch.equal(parameter, fresh.blocks.get_parameter(name)), name


def test_a_student_does_not_begin_as_its_teacher_began(write_student: Callable[..., Path]) -> None:
    """A teacher of the run's seed had the first recipe of that seed, which leaves its mark on signals."""
    cfg = load_config(write_student(distillation={"teacher": "", "tokens": 1.0, "logits": 0.0}))
    student, of_seed, later = (
        model.get_parameter("embed.W_recipe")
        for model in (
            Replica(cfg, Processes(0, 1, torch.device("cpu")), Objective()).model,
            build_model(ModelConfig.from_dict(MODEL | {"n_layers": 3}), seed=cfg.run.seed),
            build_model(cfg.model, seed=cfg.run.seed + 1000),
        )
    )
    assert torch.equal(student, later)
    assert not torch.equal(student, of_seed)


# ----------------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("basis", ["frozen", "start", "rotated"])
def test_a_student_is_trained(write_student: Callable[..., Path], teacher: Path, basis: str) -> None:
    """Its losses fall; a frozen basis stays and has no moments; the checkpoint names its teacher and the weights."""
    weights = ALL | {"tokens": 0.0, "signals": 0.5}
    path = write_student(distillation=weights | {"basis": basis}, run={"steps": 24, "checkpoint_interval": 24})
    folder = train(load_config(path))
    history = records(folder.parent)
    for name in ("loss", "loss_logits", "loss_signals"):
        assert history[-1][name] < 0.95 * history[0][name], name
    before, after = (load_file(each / "model.safetensors")["embed.W_basis"] for each in (teacher, folder))
    is_kept = {"frozen": True, "start": False, "rotated": False}[basis]
    assert torch.equal(before, after) == is_kept
    moments = load_file(folder / "training_state.safetensors")
    assert any("embed.W_basis" in name for name in moments) == (basis == "start")
    assert any("embed.W_recipe" in name for name in moments)
    manifest = read_manifest(folder)
    told = manifest["training"]["distillation"]
    assert told == {
        "teacher": str(teacher),
        "hash": model_hash(load_model(teacher)),
        "basis": basis,
        "recipe": "own",
        "seed_offset": 1000,
        **weights,
    }
    assert manifest["loss_logits"] == history[-1]["loss_logits"]
    assert load_model(folder).cfg == load_config(path).model


def test_resuming_a_student_is_bit_for_bit(
    write_student: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher may have moved; another one is refused, and so is another weight of a loss."""
    cfg = load_config(write_student(distillation=ALL | {"basis": "frozen"}))
    log = train_module.Log.write

    def crash(self: Any, step: int, record: dict[str, float]) -> None:
        log(self, step, record)
        if step == 5:
            raise KeyError

    monkeypatch.setattr(train_module.Log, "write", crash)
    with pytest.raises(KeyError):
        train(cfg)
    monkeypatch.undo()
    whole = train(with_out(cfg, tmp_path / "uninterrupted"))
    assert cfg.distillation is not None
    other = teacher_at(tmp_path / "other", rotary_base=100.0)

    def asking(**changes: Any) -> Any:
        return dataclasses.replace(cfg, distillation=dataclasses.replace(cfg.distillation, **changes))

    for changed, place in ((asking(teacher=str(other)), "hash"), (asking(signals=0.3), "signals")):
        with pytest.raises(ReflowlensError, match=rf"was trained with distillation\.{place}="):
            train(changed, resume=True)
    with pytest.raises(
        ReflowlensError, match=r"was trained with a table \[distillation\], and the configuration is without one"
    ):
        train(dataclasses.replace(cfg, distillation=None), resume=True)
    moved = Path(cfg.distillation.teacher).rename(tmp_path / "moved")
    folder = train(asking(teacher=str(moved)), resume=True)
    same_files(folder, whole)
    assert measured(folder.parent) == measured(whole.parent)


def test_without_a_teacher_a_student_is_any_other_model(
    write_student: Callable[..., Path], write: Callable[..., Path]
) -> None:
    """The control: the losses of a plain run, which cannot be gone on with as if it were one."""
    run = {"steps": 4, "eval_interval": 4}
    asked = {"teacher": "", "tokens": 1.0, "logits": 0.0, "seed_offset": 0}
    folder = train(load_config(write_student(distillation=asked, run=run)))
    out = str(folder.parent.with_name("plain"))
    plain = load_config(write(run=run | {"out": out}))
    train(plain)
    assert measured(folder.parent) == measured(out)
    with pytest.raises(
        ReflowlensError, match=r"was trained with a table \[distillation\], and the configuration is without one"
    ):
        train(with_out(plain, folder.parent), resume=True)


def test_accumulating_a_students_gradients_changes_nothing(write_student: Callable[..., Path], tmp_path: Path) -> None:
    asked: dict[str, Any] = {"distillation": ALL | {"basis": "frozen"}, "optimizer": {"name": "adamw"}}
    whole = train(load_config(write_student(**asked)))
    parts = train(load_config(write_student(**asked, run={"accumulation": 4, "out": str(tmp_path / "parts")})))
    for one, two in zip(measured(whole.parent), measured(parts.parent), strict=True):
        assert two == pytest.approx(one, rel=1e-4)


def test_two_processes_train_the_student_of_one(write_student: Callable[..., Path], tmp_path: Path) -> None:
    """However they share it out, a frozen basis among it."""
    asked: dict[str, Any] = {"distillation": ALL | {"basis": "frozen"}, "optimizer": {"name": "adamw"}}
    alone = train(load_config(write_student(**asked)))
    shardings = ("none", "zero1", "fsdp")
    jobs = [
        write_student(f"{name}.toml", **asked, run={"out": str(tmp_path / name), "sharding": name, "accumulation": 2})
        for name in shardings
    ]
    two_processes(train_all, *jobs)
    for name in shardings:
        for one, two in zip(measured(alone.parent), measured(tmp_path / name), strict=True):
            assert two == pytest.approx(one, rel=1e-4, abs=1e-5), name
        folder = newest_checkpoint(tmp_path / name)
        for file in ("model.safetensors", "training_state.safetensors"):
            ours, theirs = load_file(folder / file), load_file(alone / file)
            assert ours.keys() == theirs.keys()
            assert all((ours[key] - theirs[key]).norm() <= 1e-3 * theirs[key].norm() for key in theirs), name
        assert read_manifest(folder)["training"]["distillation"] == read_manifest(alone)["training"]["distillation"]


@pytest.mark.slow
@pytest.mark.by_hand
def test_a_compiled_student_is_close(write_student: Callable[..., Path], tmp_path: Path) -> None:
    runs: list[Path] = []
    for compile in (False, True):
        run = {"compile": compile, "out": str(tmp_path / str(compile))}
        asked = {"distillation": ALL | {"basis": "frozen"}, "optimizer": {"name": "adamw"}, "run": run}
        runs.append(train(load_config(write_student(**asked))).parent)
    for one, two in zip(*map(measured, runs), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)
        assert two["loss_signals"] == pytest.approx(one["loss_signals"], rel=1e-3)


def test_the_command(write: Callable[..., Path], teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The teacher that it names counts, and ``--set`` reaches the table."""
    path = write(run={"steps": 4, "checkpoint_interval": 2})
    asked = ["distill", str(teacher), str(path), "--set", "distillation.signals=0.5", "--set", "run.eval_interval=2"]
    main(asked)
    folder = Path(capsys.readouterr().out.strip())
    manifest = read_manifest(folder)
    assert manifest["step"] == 4
    assert manifest["overrides"]["distillation.teacher"] == str(teacher)
    assert manifest["training"]["distillation"]["signals"] == 0.5
    main([*asked, "--resume", "--set", "run.steps=4"])
    assert Path(capsys.readouterr().out.strip()) == folder


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"basis": "turned"}, "distillation.basis must be one of 'own', 'start', 'frozen', 'rotated', got 'turned'"),
        ({"recipe": "rotated"}, "distillation.recipe must be one of 'own', 'start', 'frozen', got 'rotated'"),
        ({"seed_offset": -1}, "distillation.seed_offset must not be negative, got -1"),
        ({"logits": -1.0}, "distillation.logits must not be negative, and finite, got -1.0"),
        ({"tokens": 0, "logits": 0}, "one of distillation.tokens, logits and signals must be positive"),
        ({"temperature": 0.0}, "distillation.temperature must be positive and finite, got 0.0"),
        ({"recipe": "start"}, "distillation.recipe='start' mixes signals of the teacher's basis"),
        ({"teacher": ""}, "distillation.teacher is missing: reflowlens distill TEACHER CONFIG"),
        ({"signal": 1.0}, "unknown field distillation.signal; did you mean 'signals'"),
        ({"hash": "abc"}, "has the hash .*, but distillation.hash is abc"),
        ({"teacher": "reflow-nanoo"}, "no model 'reflow-nanoo'"),
        ({"teacher": "reflow-nano"}, "has tokenizer_name 'gpt2_16k', the student 'bytes'"),
    ],
)
def test_bad_tables(write_student: Callable[..., Path], asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ReflowlensError, match=message):
        train(load_config(write_student(distillation=asked)))


def test_one_source_of_the_basis(write_student: Callable[..., Path]) -> None:
    with pytest.raises(ReflowlensError, match=r"run\.start_from fills all weights, and distillation\.basis='start'"):
        load_config(write_student(distillation={"basis": "start"}, run={"start_from": "reflow-nano"}))


@pytest.mark.parametrize(
    ("of_teacher", "asked", "of_student", "message"),
    [
        ({"d_vocab": 300}, {}, {}, "has d_vocab 300, the student 256: .* give model.d_vocab=300"),
        ({"n_ctx": 12}, {}, {}, "reads at most n_ctx=12 tokens, and data.context is 16: give data.context=12 or less"),
        ({"d_model": 24}, {"basis": "start"}, {}, "has d_model 24 and the student 16; give model.d_model=24"),
        ({"n_signals": 24}, {"signals": 1.0}, {}, "has n_signals 24 and the student 16; give model.n_signals=24"),
        (
            {"architecture": "gpt2_new", "n_signals": None},
            {"signals": 1.0},
            {},
            "distillation.signals needs readout signals at both ends, and the teacher .* has none: 'gpt2_new'",
        ),
        (
            {},
            {"basis": "frozen"},
            {"architecture": "gpt2_new", "n_signals": None},
            "distillation.basis='frozen' needs readout signals at both ends, and the student has none: 'gpt2_new'",
        ),
        (
            {},
            {"basis": "frozen", "recipe": "start"},
            {"architecture": "reflow_topk", "topk": 4},
            "distillation.recipe='start': a 'reflow_topk' cannot have the recipe of this 'reflow', .* would prune",
        ),
    ],
)
def test_teachers_that_do_not_fit(
    write_student: Callable[..., Path],
    tmp_path: Path,
    of_teacher: dict[str, Any],
    asked: dict[str, Any],
    of_student: dict[str, Any],
    message: str,
) -> None:
    teacher = teacher_at(tmp_path / "misfit", **of_teacher)
    cfg = load_config(write_student(distillation=asked | {"teacher": str(teacher)}, model=of_student))
    with pytest.raises(ReflowlensError, match=message):
        train(cfg)
    assert not list(Path(cfg.run.out).glob("*"))


def test_any_teacher_of_the_vocabulary_will_do(write_student: Callable[..., Path], tmp_path: Path) -> None:
    """One without signals, of another width, and a student of other signals, where only the distribution is learned."""
    teacher = teacher_at(tmp_path / "gpt", architecture="gpt2", n_signals=None, d_model=24, n_ctx=20)
    asked = {"teacher": str(teacher), "tokens": 0.0, "logits": 1.0}
    folder = train(load_config(write_student(distillation=asked, model={"n_signals": 12}, run={"steps": 3})))
    record = records(folder.parent)[0]
    assert record["loss"] == record["loss_logits"]
    assert "loss_signals" not in record
