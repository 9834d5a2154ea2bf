"""Runs of dictionaries on a model of two blocks and documents of a few words."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pretraining.data import prepare
from pretraining.dictionaries import train as train_module
from pretraining.dictionaries.config import DictionarySpec, list_runs, load_run
from pretraining.dictionaries.learner import Learner
from pretraining.dictionaries.state import STATE
from pretraining.dictionaries.train import train_dictionaries
from reflowlens import cli
from reflowlens.checkpoints import load_model, save_model
from reflowlens.dictionaries.files import dictionary_manifest, load_dictionary
from reflowlens.errors import ReflowlensError
from tests.support.processes import exit_code, two_processes
from tests.support.tiny import random_model

STEPS = 12
KINDS: dict[str, dict[str, Any]] = {
    "plt": {},
    "clt": {"kind": "cross_layer"},
    "sae": {"kind": "sae", "layers": [1]},
    "skip": {"skip": True, "activation": "batchtopk"},
    "relu": {"activation": "relu", "l0": 6.0},
    "jump": {"activation": "jumprelu", "kind": "cross_layer", "penalty": "tanh", "l0": 6.0},
    "frozen-decoder": {"frozen": "decoder"},
    "frozen-encoder": {"frozen": "encoder"},
}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documents")
    letters = list("abcdefghijklmnopqrstuvwxyz ")
    generator = np.random.default_rng(0)
    for split, n in (("train", 80), ("val", 12)):
        texts = ["".join(generator.choice(letters, size=int(generator.integers(12, 60)))) for _ in range(n)]
        (folder / f"{split}.txt").write_text("\n<|endoftext|>\n".join(texts))
    prepare(folder / "train.txt", folder / "tokens", "bytes", val_sources=folder / "val.txt", progress=False)
    save_model(folder / "model", random_model("reflow"))
    return folder


@pytest.fixture
def write(corpus: Path, tmp_path: Path) -> Callable[..., Path]:
    def written(*kinds: str, out: str = "run", **run: Any) -> Path:
        tables: dict[str, dict[str, Any]] = {
            "model": {"name": str(corpus / "model")},
            "data": {"folder": str(corpus / "tokens"), "windows": 40, "val_windows": 10},
            "optimizer": {"warmup_steps": 2, "learning_rate": 0.01},
            "run": {"out": str(tmp_path / out), "tokens": 128 * STEPS, "batch_tokens": 128, "dtype": "float32"}
            | {"log_interval": 2, "eval_interval": 4, "checkpoint_interval": 4}
            | run,
        }
        lines = [line for name, fields in tables.items() for line in (f"[{name}]", *_lines(fields))]
        for kind in kinds:
            lines += ["[[dictionary]]", *_lines({"name": kind, "n_features": 48, "k": 6} | KINDS[kind])]
        path = tmp_path / f"{out}.toml"
        path.write_text("\n".join(lines))
        return path

    return written


def _lines(fields: dict[str, Any]) -> list[str]:
    return [f"{key} = {json.dumps(value)}" for key, value in fields.items()]


def records(out: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def measured(out: Path | str) -> list[dict[str, Any]]:
    """Records without the clock."""
    return [{key: value for key, value in r.items() if key not in ("tokens_per_s", "harvest_s")} for r in records(out)]


def same_run(one: Path | str, two: Path | str) -> None:
    ours, theirs = (load_file(Path(out) / STATE / "dictionary_state.safetensors") for out in (one, two))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert measured(one) == measured(two)


# ------------------------------------------------------------------------------------------------------------------ run


def test_all_kinds_learn_from_one_pass(write: Callable[..., Path], corpus: Path) -> None:
    cfg = load_run(write(*KINDS), ["run.tokens=5120"])
    folders = train_dictionaries(cfg)
    assert [folder.name for folder in folders] == list(KINDS)
    history = records(cfg.run.out)
    assert [r["step"] for r in history] == list(range(2, 41, 2))
    assert [r["step"] for r in history if "val_fvu" in r["dictionaries"]["plt"]] == list(range(4, 41, 4))
    model = load_model(corpus / "model")
    for folder in folders:
        first, last = (np.mean(r["dictionaries"][folder.name]["fvu"]) for r in (history[0], history[-1]))
        assert last < 0.8 * first, folder.name
        dictionary = load_dictionary(folder, model=model)
        n_layers = 1 if folder.name == "sae" else 2
        assert dictionary.cfg.n_layers == n_layers
        manifest = dictionary_manifest(folder)
        assert manifest["tokens_seen"] == 5120
        assert len(manifest["measured_in_training"]["val_fvu"]) == n_layers
    frozen = {part: load_dictionary(folders[list(KINDS).index(f"frozen-{part}")]) for part in ("decoder", "encoder")}
    for part, dictionary in frozen.items():
        drawn = type(dictionary).fresh(dictionary.cfg, seed=0)
        for layer, before in zip(dictionary.each_layer(), drawn.each_layer(), strict=True):
            same = {"decoder": (layer.W_dec, before.W_dec), "encoder": (layer.W_enc, before.W_enc)}
            for name, (now, then) in same.items():
                cosine = torch.cosine_similarity(now.flatten(1), then.flatten(1))
                assert bool((cosine > 0.99999).all()) == (name == part)


def test_what_is_saved_says_of_the_models_activations_what_was_learnt(write: Callable[..., Path], corpus: Path) -> None:
    """The published transcoder predicts a normalised output and its interventions insert it as it is."""
    cfg = load_run(write("plt", "clt", "skip"))
    training = train_module._Training(cfg, train_module.Processes(0, 1, torch.device("cpu")))
    training.run(False, lambda: False, False)
    held_out = training._harvest(training.val_data, training.val_windows, 1)
    for learner in training.learners:
        expected = train_module._explained(learner, held_out)
        dictionary = load_dictionary(Path(cfg.run.out) / learner.spec.name)
        x, y = ([held_out[name] for name in names] for names in (dictionary.cfg.reads, dictionary.cfg.writes))
        with torch.no_grad():
            for target, said, fvu in zip(y, dictionary(x), expected, strict=True):
                found = (target - said).square().sum() / (target - target.mean(0)).square().sum()
                assert found.item() == pytest.approx(fvu, rel=0.02)  # of all positions, and of whole batches
        norms = [float(target.square().sum(1).mean()) for target in y]
        assert max(abs(norm - dictionary.cfg.d_out) for norm in norms) > 1  # the factors are not 1


def test_the_model_reads_as_in_evaluation(write: Callable[..., Path], corpus: Path, tmp_path: Path) -> None:
    """The published training switches the frozen model's dropout on."""
    import dataclasses

    model = random_model("gpt2")
    dropping = random_model(dataclasses.replace(model.cfg, dropout=0.5))
    save_model(tmp_path / "dropping", dropping)
    cfg = load_run(write("plt"), [f"model.name={tmp_path / 'dropping'}"])
    training = train_module._Training(cfg, train_module.Processes(0, 1, torch.device("cpu")))
    one, two = (training._harvest(training.val_data, training.val_windows, 1) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not any(p.requires_grad for p in training.model.parameters())


# ------------------------------------------------------------------------------------------------------------- going on


def killed_at_step_6(config: Path) -> None:
    log = train_module._log

    def logged(out: Path, cfg: Any, step: int, *rest: Any) -> None:
        log(out, cfg, step, *rest)
        if step == 6:
            os.kill(os.getpid(), signal.SIGKILL)

    train_module._log = logged
    train_dictionaries(load_run(config))


def test_a_killed_run_goes_on_bit_for_bit(write: Callable[..., Path]) -> None:
    kinds = ("plt", "skip", "jump")
    config = write(*kinds)
    assert exit_code(killed_at_step_6, config) == -signal.SIGKILL
    cfg = load_run(config)
    assert [r["step"] for r in records(cfg.run.out)] == [2, 4, 6]
    train_dictionaries(cfg, resume=True)
    whole = load_run(write(*kinds, out="whole"))
    train_dictionaries(whole)
    same_run(cfg.run.out, whole.run.out)


def test_ctrl_c_saves_and_stops(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write("plt")
    cfg, whole = load_run(config), load_run(write("plt", out="whole"))
    step = Learner.step

    def interrupted(self: Learner, *args: Any, **kwargs: Any) -> Any:
        if self.optimizer.state and next(iter(self.optimizer.state.values()))["step"] == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(Learner, "step", interrupted)
        assert cli.main(["dictionary", "train", str(config)]) == 130
    assert "stopped at step 5 of 12; continue with --resume" in capsys.readouterr().err
    assert cli.main(["dictionary", "train", str(config), "--resume"]) == 0
    train_dictionaries(whole)
    same_run(cfg.run.out, whole.run.out)


def with_its_weights(rank: int, config: Path, folder: Path) -> None:
    """A run, of which each process writes down its weights."""
    run = train_module._Training.run

    def recorded(self: train_module._Training, *args: Any) -> None:
        run(self, *args)
        tensors = {f"{of.spec.name}/{name}": t for of in self.learners for name, t in of.state().items()}
        save_file(tensors, folder / f"rank{rank}.safetensors")

    train_module._Training.run = recorded  # type: ignore[method-assign]
    train_dictionaries(load_run(config))


def test_two_processes_have_their_own_documents_and_the_same_weights(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    """Also after dead features were resampled, for which each process has examples of its own."""
    config = write("plt", "relu")
    config.write_text(config.read_text() + "\ndead_after = 1\n")  # of the last, relu: features die at every step
    two_processes(with_its_weights, config, tmp_path)
    ours, theirs = (load_file(tmp_path / f"rank{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if "/weights/" in name)
    cfg, one = load_run(config), load_run(write("plt", "relu", out="one"))
    train_dictionaries(one)
    assert all(records(run.run.out)[-1]["step"] == STEPS for run in (cfg, one))
    found, alone = (records(run.run.out)[-1]["dictionaries"]["plt"]["val_fvu"] for run in (cfg, one))
    assert np.mean(found) == pytest.approx(np.mean(alone), rel=0.25)  # other batches, as many positions
    with pytest.raises(ReflowlensError, match="was trained with processes 2, and now it is 1"):
        train_dictionaries(cfg, resume=True)


# ---------------------------------------------------------------------------------------------------------- one learner


def fresh_learner(**fields: Any) -> Learner:
    model = random_model("reflow")
    spec = DictionarySpec("d", n_features=48, **fields)
    learner = Learner(
        spec, spec.of(model), learning_rate=0.01, betas=(0.9, 0.999), dead_after=100, device=torch.device("cpu")
    )
    return learner


def random_batch(learner: Learner, n: int = 64, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    cfg = learner.dictionary.cfg
    return {name: torch.randn(n, cfg.d_in, generator=generator) for name in (*cfg.reads, *cfg.writes)}


def test_a_penalty_is_steered_to_its_l0() -> None:
    learner = fresh_learner(activation="relu", l0=5.0)
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(32, 32, generator=generator)
    record: dict[str, Any] = {}
    for i in range(500):
        batch = random_batch(learner, n=128, seed=i)
        for read, written in zip(learner.dictionary.cfg.reads, learner.dictionary.cfg.writes, strict=True):
            batch[written] = (batch[read] @ mixing).relu()
        record = learner.step(batch, clip=1.0, dtype=torch.float32)
    assert np.mean(record["l0"]) == pytest.approx(5.0, rel=0.35)


def test_resampled_features_point_at_errors_and_begin_anew() -> None:
    learner = fresh_learner(activation="relu")
    batch = random_batch(learner)
    learner.step(batch, clip=1.0, dtype=torch.float32)
    learner.silent[:] = 0
    learner.silent[0, [3, 5]] = 1000
    alive = learner.dictionary.layers[0].W_enc.detach().clone()  # type: ignore[union-attr]
    assert learner.resample(batch, seed=[1]) == 2
    layer = learner.dictionary.each_layer()[0]
    others = [i for i in range(48) if i not in (3, 5)]
    assert torch.equal(layer.W_enc[others], alive[others])
    expected = 0.2 * alive[others].norm(dim=1).mean()
    torch.testing.assert_close(layer.W_enc[[3, 5]].norm(dim=1), expected.expand(2), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.W_dec[[3, 5], 0].norm(dim=1), torch.ones(2))
    along = torch.nn.functional.cosine_similarity(layer.W_enc[3, None], batch["blocks.0.ln2.hook_normalized"])
    assert along.max().item() == pytest.approx(1.0, abs=1e-5)  # an input of the batch
    assert float(learner.optimizer.state[layer.W_enc]["exp_avg"][[3, 5]].abs().max()) == 0.0
    assert learner.silent[0, [3, 5]].tolist() == [0, 0]
    assert learner.resample(batch, seed=[1]) == 0


@pytest.mark.parametrize("frozen", ["encoder", "decoder"])
def test_a_frozen_half_is_not_resampled(frozen: str) -> None:
    learner = fresh_learner(activation="relu", frozen=frozen)
    learner.silent[:] = 1000
    before = {name: p.detach().clone() for name, p in learner.dictionary.named_parameters()}
    assert learner.resample(random_batch(learner), seed=[1]) == 0
    for i in range(3):
        learner.step(random_batch(learner, seed=i), clip=1.0, dtype=torch.float32)
    moved = {
        name.split(".")[-1] for name, p in learner.dictionary.named_parameters() if not torch.equal(p, before[name])
    }
    assert moved == {"encoder": {"W_dec", "b_dec"}, "decoder": {"W_enc", "b_enc", "b_dec"}}[frozen]


def test_a_threshold_of_batchtopk_is_right_from_the_first_step() -> None:
    learner = fresh_learner(activation="batchtopk", k=4)
    batch = random_batch(learner, n=256)
    learner.step(batch, clip=1.0, dtype=torch.float32)
    x, _ = learner.scaled(batch)
    active = (learner.dictionary.encode(x)[0] > 0).sum(1).float().mean()
    assert 2 < active.item() < 6  # the weights have moved by one step; a threshold of 0 would let 24 through


def test_the_type_of_a_run_is_kept_when_it_goes_on(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = load_run(write("plt", dtype="auto"))
    monkeypatch.setattr(train_module, "has_bfloat16", lambda device: False)
    train_dictionaries(cfg)
    monkeypatch.setattr(train_module, "has_bfloat16", lambda device: True)
    train_dictionaries(cfg, resume=True)
    assert json.loads((Path(cfg.run.out) / "run.json").read_text())["dtype"] == "float32"


def test_decoders_of_kinds_with_a_k_keep_their_norm() -> None:
    learner = fresh_learner(kind="cross_layer", k=4)
    for i in range(3):
        learner.step(random_batch(learner, seed=i), clip=1.0, dtype=torch.float32)
    for layer in learner.dictionary.each_layer():
        torch.testing.assert_close(layer.W_dec.flatten(1).norm(dim=1), torch.ones(48))


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("dictionary.k=100", "k must not be larger than n_features"),
        ("dictionary.kind=clt", "dictionary.kind must be one of 'sae', 'transcoder', 'cross_layer', got 'clt'"),
        ("dictionary.layers=[7]", "this model has blocks 0 to 1"),
        ("dictionary.layers=[1, 0]", "must be in forward order"),
        ("dictionary.name=state", "must be the name of a folder of its own"),
        ("optimizer.grad_clip=0", "optimizer.grad_clip must be positive"),
        ("optimizer.weight_decay=0.1", "optimizer.weight_decay must be 0 here"),
        ("run.seed=-1", "run.seed must not be negative"),
        ("data.context=-5", "data.context must not be negative"),
        ('dictionary.reads="blocks.{layer}.attn.hook_z"', "is not \\[batch, pos, d\\]"),
        ("dictionary.featuers=3", "unknown field 'dictionary.featuers'.*dictionary.n_features"),
        ("optimizer.name=muon", "optimizer.name must be 'adamw' for dictionaries"),
        ("run.tokens=0", "run.tokens must be positive"),
        ("data.windows=2", "raise data.windows or prepare more data"),
        ("data.context=64", "data.context=64 exceeds the model's n_ctx=24"),
        ("model.name=reflow-nano", "was prepared with 'bytes'"),
    ],
)
def test_errors_name_the_field(write: Callable[..., Path], setting: str, message: str) -> None:
    config = write("plt")
    with pytest.raises(ReflowlensError, match=message):
        train_dictionaries(load_run(config, [setting]))
    assert not list(Path(load_run(write("plt")).run.out).glob("plt/*"))


def test_a_run_is_not_written_over(write: Callable[..., Path]) -> None:
    cfg = load_run(write("plt", tokens=512))
    with pytest.raises(ReflowlensError, match="holds no state to resume from"):
        train_dictionaries(cfg, resume=True)
    train_dictionaries(cfg)
    with pytest.raises(ReflowlensError, match="already holds a run: continue it with --resume"):
        train_dictionaries(cfg)
    before = measured(cfg.run.out)
    train_dictionaries(cfg, resume=True)  # there is nothing left to do
    assert measured(cfg.run.out) == before


def test_shipped_configurations_are_sound() -> None:
    assert {"reflow_nano", "gpt2_new_nano", "tiny_transcoder"} <= set(list_runs())
    for name in list_runs():
        assert load_run(name).run.steps >= 100
