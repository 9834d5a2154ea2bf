from __future__ import annotations

import json
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import reflowlens.inspection.weights as weights_module
from reflowlens.checkpoints import WEIGHTS, save_model
from reflowlens.cli import main
from reflowlens.dictionaries.config import DictionaryConfig
from reflowlens.dictionaries.dictionary import Dictionary
from reflowlens.dictionaries.files import save_dictionary
from reflowlens.errors import ReflowlensError
from reflowlens.inspection import inspect_path
from reflowlens.inspection.signals import matrix_effective_rank
from reflowlens.inspection.weights import Weights, part_of
from reflowlens.tokenizers.by_name import get_tokenizer
from tests.support.tiny import FACTORED, random_model

READ = {"tokens_seen": 4096, "val_loss": 2.5, "training": {"run": {"steps": 8}, "model": {}}}


@pytest.fixture
def checkpoint(tmp_path, model):
    return save_model(tmp_path / "model", model, READ)


@pytest.fixture
def reflow(tmp_path):
    return save_model(tmp_path / "reflow", random_model("reflow"), READ)


# -- models -----------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_counted_by_part_and_described(checkpoint, model):
    found = inspect_path(checkpoint)
    assert found.kind == "checkpoint written by reflowlens"
    assert found.problems == ()
    assert found.facts["architecture"] == model.cfg.architecture
    assert found.facts["parameters"] == model.n_parameters
    assert found.facts["tokens_seen"] == 4096
    assert found.facts["training.run"] == {"steps": 8}
    parts = found.frames["parts"].set_index("part")
    assert parts["parameters"].sum() == model.n_parameters
    assert parts["share"].sum() == pytest.approx(1)
    by_name = {name: parameter.numel() for name, parameter in model.named_parameters()}
    for part, mark in {"mlp": ".mlp.", "attention": ".attn.", "recipe": "W_recipe", "signal basis": "W_basis"}.items():
        expected = sum(size for name, size in by_name.items() if mark in name)
        assert (parts["parameters"][part] if part in parts.index else 0) == expected


@pytest.mark.parametrize("chunk", [7, 1 << 22])
def test_statistics_are_those_of_the_whole_tensor(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(weights_module, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a.weight": 1 + torch.randn(12, 5, generator=generator),
        "b.weight": torch.randn(40, generator=generator).to(torch.bfloat16),
        "c.weight": torch.tensor([[0.0, 2.0, float("nan")], [float("-inf"), 0.0, -4.0]], dtype=torch.float16),
        "scalar": torch.tensor(3.0),
        "whole": torch.arange(9).reshape(3, 3),
        "none": torch.zeros(0, 4),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    found = inspect_path(tmp_path / "x.safetensors")
    rows = found.frames["tensors"].set_index("name")
    for name, tensor in tensors.items():
        values = tensor.double().numpy().ravel()
        finite = values[np.isfinite(values)]
        row = rows.loc[name]
        assert row["parameters"] == values.size
        assert row["dtype"] == str(tensor.dtype).removeprefix("torch.")
        assert (row["nan"], row["infinite"]) == (np.isnan(values).sum(), np.isinf(values).sum())
        assert row["norm"] == pytest.approx(np.linalg.norm(finite), rel=1e-12)
        if finite.size:
            expected = [finite.mean(), finite.std(), finite.min(), finite.max(), (finite == 0).sum() / values.size]
            assert list(row[["mean", "std", "min", "max", "zeros"]]) == pytest.approx(expected, rel=1e-9)
    assert found.facts["not_finite"] == 2
    assert found.problems == ("c.weight holds 1 NaN and 1 infinite values",)


def test_no_more_than_a_chunk_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(weights_module, "CHUNK", 64)
    save_file({"x": torch.arange(700.0).reshape(100, 7)}, tmp_path / "x.safetensors")
    with Weights([tmp_path / "x.safetensors"]) as weights:
        chunks = list(weights.chunks("x"))
    assert max(chunk.numel() for chunk in chunks) <= 64
    assert torch.equal(torch.cat(chunks), torch.arange(700.0).reshape(100, 7))


@pytest.mark.parametrize("name", FACTORED)
def test_the_recipe_is_measured_over_real_tokens(name, tmp_path):
    model = random_model(name)
    measured = inspect_path(save_model(tmp_path / "m", model)).frames["signals"].set_index("measure")["value"]
    R = model.effective_recipe().detach().double().numpy()[: get_tokenizer("bytes").n_vocab]
    active = (np.abs(R) > 2 * np.abs(R).mean(1, keepdims=True)).mean()
    participation = ((R**2).sum(1) ** 2 / (R**4).sum(1)).mean() / R.shape[1]
    energy = np.linalg.svd(model.embed.W_basis.detach().double().numpy(), compute_uv=False) ** 2
    share = energy / energy.sum()
    assert measured["active share"] == pytest.approx(active)
    assert measured["participation ratio"] == pytest.approx(participation)
    assert measured["exact zeros"] == pytest.approx((R == 0).mean())
    assert measured["dead signals"] == (R == 0).all(0).sum()
    assert measured["effective rank"] == pytest.approx(np.exp(-(share * np.log(share)).sum()))
    if model.cfg.topk is not None and model.cfg.topk_ends != "input":
        assert (R != 0).sum(1).max() <= model.cfg.topk
        assert measured["exact zeros"] >= 1 - model.cfg.topk / R.shape[1]


def test_effective_rank_of_matrices_whose_rank_is_known():
    assert matrix_effective_rank(torch.linalg.qr(torch.randn(9, 5, generator=torch.Generator().manual_seed(0)))[0]) == (
        pytest.approx(5)
    )
    assert matrix_effective_rank(torch.outer(torch.arange(1.0, 5), torch.ones(3))) == pytest.approx(1)


def test_a_gaussian_recipe_shows_the_figures_given_beside(tmp_path):
    model = random_model("reflow")
    with torch.no_grad():
        model.embed.W_recipe.normal_(generator=torch.Generator().manual_seed(1))
    signals = inspect_path(save_model(tmp_path / "m", model)).frames["signals"].set_index("measure")
    assert signals["value"]["active share"] == pytest.approx(signals["gaussian"]["active share"], abs=0.01)
    assert signals["value"]["participation ratio"] == pytest.approx(
        signals["gaussian"]["participation ratio"], abs=0.03
    )


def test_weights_that_do_not_fit_their_configuration(reflow):
    tensors = load_file(reflow / WEIGHTS)
    with Weights([reflow / WEIGHTS]) as weights:
        header = dict(weights.metadata)
    tensors["blocks.0.mlp.W_in"] = tensors["blocks.0.mlp.W_in"][:-1].contiguous()
    tensors["extra"] = tensors.pop("ln_final.w")
    save_file(tensors, reflow / WEIGHTS, metadata=header)
    problems = "\n".join(inspect_path(reflow).problems)
    assert "ln_final.w is missing" in problems
    assert "extra is not a parameter of its configuration" in problems
    assert "blocks.0.mlp.W_in has shape [31, 48], and its configuration asks for [32, 48]" in problems
    assert "its SHA-256 differs" in problems


def rewritten(folder, change):
    """A checkpoint with its tensors changed and its configuration as it was."""
    tensors = load_file(folder / WEIGHTS)
    with Weights([folder / WEIGHTS]) as weights:
        header = dict(weights.metadata)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata=header)
    return inspect_path(folder)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["embed.W_basis", "embed.W_recipe"])
def test_signals_that_are_not_finite_are_told(reflow, name, bad):
    found = rewritten(reflow, lambda tensors: tensors[name][3].fill_(bad))
    assert any(problem.startswith(f"{name} holds ") for problem in found.problems)
    signals = found.frames["signals"].set_index("measure")["value"]
    assert np.isnan(signals["effective rank"]) == (name == "embed.W_basis")
    assert "effective rank" in found.to_text()


@pytest.mark.parametrize(
    ("name", "shape"),
    [("embed.W_recipe", (288,)), ("embed.W_basis", (40,)), ("embed.W_recipe", (288, 3)), ("embed.W_basis", (40, 3, 2))],
)
def test_signals_of_another_shape_are_told(tmp_path, name, shape):
    folder = save_model(tmp_path / "m", random_model("reflow_topk"))
    found = rewritten(folder, lambda tensors: tensors.update({name: torch.ones(shape)}))
    assert f"{name} has shape {list(shape)}, and its configuration asks for" in "\n".join(found.problems)
    assert "signals" not in found.frames


def with_size(path, name, size):
    """A safetensors file of ours, one size of its configuration changed."""
    tensors = load_file(path)
    with Weights([path]) as weights:
        header = dict(weights.metadata)
    config = json.loads(header["config"]) | {name: size}
    save_file(tensors, path, metadata=header | {"config": json.dumps(config)})


@pytest.mark.parametrize("size", [10**12, 10**4, 10**6])
@pytest.mark.parametrize("name", ["n_layers", "n_ctx", "d_head", "d_vocab", "n_signals"])
def test_a_damaged_size_is_not_built(reflow, name, size):
    with_size(reflow / WEIGHTS, name, size)
    problems = inspect_path(reflow / WEIGHTS).problems
    if name == "n_ctx" and size <= 1 << 24:
        assert not problems  # no rotary parameter depends on it
    elif size == 10**4 and name not in ("n_layers", "n_ctx"):
        assert all("asks for" in problem for problem in problems)  # no more than the file holds: shapes are told
    else:
        assert len(problems) == 1
        assert name in problems[0]
        assert f"{size:,}" in problems[0]


def test_names_with_numbers_of_any_length_are_in_order(tmp_path):
    names = ["1" * 5000, "²", "a.10.b", "a.9.b"]
    save_file({name: torch.ones(1) for name in names}, tmp_path / "x.safetensors")
    found = list(inspect_path(tmp_path / "x.safetensors").frames["tensors"]["name"])
    assert sorted(found) == sorted(names)
    assert found.index("a.9.b") < found.index("a.10.b")


def test_a_file_of_empty_tensors_alone(tmp_path):
    save_file({f"h.{i}.weight": torch.ones(0, 3) for i in range(3)}, tmp_path / "x.safetensors")
    found = inspect_path(tmp_path / "x.safetensors").frames["tensors"]
    assert list(found["dtype"]) == ["float32"] * 3
    assert list(found["parameters"]) == [0] * 3
    assert found["mean"].isna().all()


# -- comparison -------------------------------------------------------------------------------------------------------


def test_differences_to_another_checkpoint(tmp_path):
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    a = {"same": x, "scaled": 1.5 * x, "shape": x, "here": x, "nan": x * torch.nan, "number": torch.tensor(3.0)}
    b = {"same": x, "scaled": x, "shape": x.T, "there": x, "nan": x}
    for name, tensors in {"a": a, "b": b}.items():
        copies = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
        save_file(copies, tmp_path / f"{name}.safetensors")
    frame = inspect_path(tmp_path / "a.safetensors", against=tmp_path / "b.safetensors").frames["differences"]
    rows = frame.set_index("name")
    assert rows["state"].to_dict() == {
        "same": "same",
        "scaled": "differs",
        "shape": "shape",
        "here": "only here",
        "there": "only there",
        "nan": "differs",
        "number": "only here",
    }
    assert rows["relative"]["same"] == 0
    assert rows["relative"]["scaled"] == pytest.approx(0.5)
    assert rows["max_abs"]["scaled"] == pytest.approx(0.5 * x.abs().max().item())
    assert rows["relative"][["shape", "here", "there", "nan"]].isna().all()
    assert rows["max_abs"][["shape", "here", "there", "nan"]].isna().all()


def test_the_largest_difference_is_that_of_finite_values(tmp_path, monkeypatch):
    """Wherever among the chunks a NaN lies."""
    monkeypatch.setattr(weights_module, "CHUNK", 4)
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    y = x.clone()
    y[2] += torch.tensor([0.5, torch.nan])
    y[5] += torch.tensor([-torch.inf, 0.25])
    save_file({"x": x}, tmp_path / "x.safetensors")
    save_file({"x": y}, tmp_path / "y.safetensors")
    for one, two in (("x", "y"), ("y", "x")):
        found = inspect_path(tmp_path / f"{one}.safetensors", against=tmp_path / f"{two}.safetensors")
        row = found.frames["differences"].iloc[0]
        assert row["max_abs"] == pytest.approx(0.5)
        assert not np.isfinite(row["relative"])


def test_a_model_is_no_different_from_itself_in_sixteen_bits(tmp_path, reflow):
    half = save_model(tmp_path / "half", random_model("reflow"), dtype=torch.bfloat16)
    assert set(inspect_path(reflow, against=reflow).frames["differences"]["state"]) == {"same"}
    relative = inspect_path(half, against=reflow).frames["differences"]["relative"]
    assert 0 < relative.max() < 2**-8


def test_a_comparison_needs_tensors_on_both_sides(tmp_path, reflow):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ReflowlensError, match="empty holds no tensors to compare"):
        inspect_path(reflow, against=tmp_path / "empty")


# -- foreign and damaged ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=11,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
    )
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder / "one")
    model.save_pretrained(folder / "sharded", max_shard_size="20KB")
    return folder, model


@pytest.mark.parametrize("kind", ["one", "sharded"])
def test_a_folder_of_transformers(llama, kind):
    folder, model = llama
    found = inspect_path(folder / kind)
    assert found.kind == "transformers folder (LlamaForCausalLM)"
    assert found.problems == ()
    assert found.facts["config"]["num_key_value_heads"] == 2
    assert found.facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert set(found.frames["parts"]["part"]) == {"embedding", "norms", "attention", "mlp"}
    names = list(found.frames["tensors"]["name"])
    assert names.index("model.layers.10.mlp.up_proj.weight") > names.index("model.layers.9.mlp.up_proj.weight")
    assert "model.layers.*.self_attn.q_proj.weight" in found.to_text()


def test_a_missing_shard_and_code_that_is_not_run(llama, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in (llama[0] / "sharded").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    gone = sorted(folder.glob("*.safetensors"))[1]
    gone.unlink()
    (folder / "modeling_own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    found = inspect_path(folder)
    assert f"shard {gone.name} is missing" in found.problems
    assert any("modeling_own.py" in note and "not run" in note for note in found.notes)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("architectures", "shown"),
    [("GPT2LMHeadModel", "GPT2LMHeadModel"), (5, "5"), (["A", 7], "A, 7"), ([], "gpt2"), (None, "gpt2")],
)
def test_an_architecture_however_it_is_written(tmp_path, architectures, shown):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": architectures, "model_type": "gpt2"}))
    assert inspect_path(tmp_path).facts["architecture"] == shown


class _Evil:
    def __init__(self, path: Path) -> None:
        self.command = f"touch {path}"

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("how", [0, 1, 2, 3, 4, 5, "torch", "old torch"])
def test_a_pickle_is_told_and_not_run(tmp_path, how):
    path, ran = tmp_path / "model.pt", tmp_path / "ran"
    content = {"weight": torch.zeros(3, 4), "names": ["a", "b"], "evil": _Evil(ran)}
    if isinstance(how, int):
        path.write_bytes(pickle.dumps(content | {"weight": None}, protocol=how))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "torch")
    found = inspect_path(path)
    assert not ran.exists()
    assert "pickle" in found.kind
    assert found.facts["would_call"] == [f"{os.system.__module__}.system"]
    assert "it was not loaded" in found.notes[0]
    if how == "torch":
        assert found.facts["would_call"] == torch.serialization.get_unsafe_globals_in_checkpoint(path)
        assert (found.facts["storages"], found.facts["tensor_bytes"]) == (1, 48)
    in_folder = inspect_path(tmp_path)
    assert any(note.startswith("model.pt: loading a pickle") for note in in_folder.notes)
    assert not ran.exists()


@pytest.mark.parametrize("old", [False, True])
def test_a_checkpoint_of_tensors_alone_calls_nothing(tmp_path, old):
    content = {"w": torch.randn(3), "p": torch.nn.Parameter(torch.randn(2).bfloat16()), "n": np.float64(0.5)}
    torch.save(content, tmp_path / "model.bin", _use_new_zipfile_serialization=not old)
    found = inspect_path(tmp_path / "model.bin")
    assert "would_call" not in found.facts
    assert "weights_only=True" in found.notes[0]


def test_damage_is_named(reflow, tmp_path):
    whole = (reflow / WEIGHTS).read_bytes()
    (reflow / WEIGHTS).write_bytes(whole[:-1000])
    found = inspect_path(reflow)
    assert f"promises {len(whole):,} bytes and it has {len(whole) - 1000:,} (cut short)" in found.problems[0]
    assert found.facts["tokens_seen"] == 4096
    (tmp_path / "noise.safetensors").write_bytes(bytes(range(7, 200)))
    assert "does not begin with a safetensors header" in inspect_path(tmp_path / "noise.safetensors").problems[0]
    (tmp_path / "config.json").write_text("{")
    assert "not readable JSON" in inspect_path(tmp_path / "config.json").problems[0]
    torch.save({"w": torch.zeros(1000)}, tmp_path / "x.pt")
    (tmp_path / "x.pt").write_bytes((tmp_path / "x.pt").read_bytes()[:2000])
    assert inspect_path(tmp_path / "x.pt").problems


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("nothing.bin", b"", "empty file"),
        ("weights.bin", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        ("model.gguf", b"GGUF" + struct.pack("<I", 3), "GGUF model"),
        ("notes.txt", "naïve".encode(), "text file"),
        ("train.bin", struct.pack("<6H", 0x0480, 1, 2, 3, 4, 5), "file of no known format"),
        ("page.pt", b"<!doctype html>", "text file"),
    ],
)
def test_files_that_are_no_models(tmp_path, name, content, kind):
    (tmp_path / name).write_bytes(content)
    assert inspect_path(tmp_path / name).kind.startswith(kind)
    listed = inspect_path(tmp_path).frames["files"]
    assert listed["kind"][0].startswith(kind)


def test_what_a_foreign_file_says_does_not_steer_the_terminal(tmp_path):
    text = json.dumps({"title": "\x1b]0;owned\x07", "half": "\ud800", "chinese": "词"})
    (tmp_path / "facts.json").write_text(text)
    found = inspect_path(tmp_path / "facts.json")
    shown = found.to_text()
    assert r"\x1b]0;owned\x07" in shown
    assert r"\ud800" in shown
    assert "词" in shown
    assert json.loads(found.to_json().encode("utf8")) == found.to_dict()


def test_tables_in_tables_without_end_are_cut(tmp_path):
    (tmp_path / "deep.json").write_text('{"a":' * 700 + "1" + "}" * 700)
    found = inspect_path(tmp_path / "deep.json")
    assert "…" in found.to_text()
    assert "…" in str(json.loads(found.to_json())["facts"])


def test_paths_that_cannot_be_inspected(tmp_path):
    with pytest.raises(ReflowlensError, match="did you mean 'reflow-nano'"):
        inspect_path("reflow-nanno")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ReflowlensError, match="neither a file nor a folder"):
        inspect_path(tmp_path / "pipe")
    assert inspect_path(tmp_path).frames["files"]["kind"].tolist() == ["special file"]
    (tmp_path / "empty").mkdir()
    assert inspect_path(tmp_path / "empty").kind == "empty folder"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(max_size=300),
    start=st.sampled_from([b"", b"PK\x03\x04", b"\x80\x04", b"\x80\x02", b"{", b"GGUF"]),
    name=st.sampled_from(["x.safetensors", "x.pt", "x.json", "x.bin", "metrics.jsonl", "manifest.json", "config.json"]),
)
def test_any_bytes_are_answered(tmp_path, content, start, name):
    folder = tmp_path / "any"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    (folder / name).write_bytes(start + content)
    for path in (folder, folder / name):
        json.loads(inspect_path(path).to_json())
        assert inspect_path(path).to_text()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_byte_anywhere_is_answered(reflow, data):
    file = data.draw(st.sampled_from([WEIGHTS, "manifest.json"]))
    whole = (reflow / file).read_bytes()
    at = data.draw(st.integers(0, min(len(whole), 3000) - 1))
    try:
        (reflow / file).write_bytes(whole[:at] + bytes([data.draw(st.integers(0, 255))]) + whole[at + 1 :])
        json.loads(inspect_path(reflow).to_json())
    finally:
        (reflow / file).write_bytes(whole)


# -- runs and data ----------------------------------------------------------------------------------------------------


def test_a_training_run(tmp_path, reflow):
    run = tmp_path / "run"
    run.mkdir()
    reflow.rename(run / "step_0000024")
    save_model(run / "step_0000009", random_model("reflow"))
    lines = [{"step": i, "tokens": 8 * i, "loss": float(100 - i), "tokens_per_s": 10.0} for i in range(1, 25)]
    for i in (8, 16, 24):
        lines[i - 1]["val_loss"] = {8: 3.0, 16: 2.0, 24: 2.5}[i]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 25, "lo')
    (run / "run.json").write_text('{"starts": [{"step": 0, "processes": 2}]}')
    found = inspect_path(run)
    assert found.kind == "training run"
    assert found.facts["starts"] == [{"step": 0, "processes": 2}]
    assert found.facts["checkpoints"] == ["step_0000009", "step_0000024"]
    assert found.facts["newest_checkpoint"] == "step_0000024"
    assert found.facts["tokens_seen"] == 4096
    assert found.facts["log"] == {
        "steps": 24,
        "first_loss": 99.0,
        "last_loss": pytest.approx(sum(range(76, 100)) / 24),
        "val_loss": 2.5,
        "val_loss_step": 24,
        "best_val_loss": 2.0,
        "best_val_loss_step": 16,
        "tokens_per_s": 10.0,
    }
    curve = found.frames["curve"]
    assert curve["step"].tolist() == list(range(2, 25, 2))
    assert curve["loss"].tolist() == [100 - step + 0.5 for step in range(2, 25, 2)]
    assert curve["val_loss"].dropna().tolist() == [3.0, 2.0, 2.5]
    assert found.problems == ("metrics.jsonl: 1 of 25 lines are not readable",)
    assert "tensors" in found.frames


def test_a_run_whose_loss_is_not_a_number(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": NaN}\n')
    found = inspect_path(tmp_path)
    assert found.problems == ("the loss stopped being finite at step 2",)
    assert found.notes == ("there is no checkpoint yet",)
    assert json.loads(found.to_json())["frames"]["curve"][1]["loss"] is None


@pytest.mark.parametrize(
    ("text", "steps", "problems"),
    [
        ("[5, 7]\n[8]\n", None, ["metrics.jsonl holds no steps with a loss"]),
        ('{"text": "a"}\n"b"\n3\n', None, ["metrics.jsonl holds no steps with a loss"]),
        ("", None, ["metrics.jsonl holds no steps with a loss"]),
        ('[5, 7]\n{"step": 1, "loss": 2.0}\n', [1], []),
        ('{"step": 0, "val_loss": 4}\n{"step": 1, "loss": 3, "val_loss": 2}\n', [1], []),
        ('{"step": 100, "loss": 3.2}\n{"step": 100, "eval_loss": 3.1}\n{"epoch": 1}\n', [100], []),
        ('{"step": 1, "loss": 2}\n{"step": NaN, "loss": 2}\n', [1], ["metrics.jsonl: 1 of 2 lines are not readable"]),
        (
            '{"step": 1, "loss": 2}\n{"step": 2, "loss": ' + "9" * 400 + '}\n{"step": 3, "lo',
            [1],
            ["metrics.jsonl: 2 of 3 lines are not readable"],
        ),
        ('{"step": 1, "loss": 2, "tokens": Infinity}\n{"step": 1e300, "loss": 2, "tokens": 1}\n', [1, 1e300], []),
    ],
)
def test_logs_that_others_wrote(tmp_path, text, steps, problems):
    (tmp_path / "metrics.jsonl").write_text(text)
    found = inspect_path(tmp_path)
    assert list(found.problems) == problems
    assert (found.frames["curve"]["step"].tolist() if "curve" in found.frames else None) == steps
    assert found.to_text()
    json.loads(found.to_json())


def test_prepared_data(tmp_path):
    from pretraining.data import prepare

    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(f"the cat {i}" for i in range(100)))
    manifest = prepare(tmp_path / "text.txt", tmp_path / "data", "bytes", val_fraction=0.2, progress=False)
    found = inspect_path(tmp_path / "data")
    assert (found.kind, found.problems) == ("prepared data", ())
    splits = found.frames["splits"].set_index("split")
    assert splits["tokens"]["train"] == manifest.splits["train"].tokens
    with (tmp_path / "data" / "val.bin").open("ab") as file:
        file.write(b"\0\0")
    assert inspect_path(tmp_path / "data").problems[0].startswith("val: ")


# -- forms ------------------------------------------------------------------------------------------------------------


def test_the_packaged_model():
    found = inspect_path("reflow-nano")
    assert found.path == "reflow-nano"
    assert found.problems == ()
    assert found.facts["parameters"] == 9_178_368
    assert found._repr_html_().count("<table") == 1 + len(found.frames)


def test_text_takes_layers_together_unless_asked(reflow):
    found = inspect_path(reflow)
    assert "blocks.*.mlp.W_in" in found.to_text()
    assert "blocks.1.mlp.W_in" not in found.to_text()
    assert "blocks.1.mlp.W_in" in found.to_text(all_tensors=True)
    assert "nan" not in found.to_text()


def test_a_long_file_is_told_on_a_page(tmp_path):
    """A tokenizer's vocabulary lies within one value, a bare one side by side; all of both is in the facts."""
    vocabulary = {f"token{i}": i for i in range(50_000)}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": {"vocab": vocabulary}}))
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    nested, flat = (inspect_path(tmp_path / name) for name in ("tokenizer.json", "vocab.json"))
    for found in (nested, flat):
        assert "token7" in found.to_text()
        assert len(found.to_text().splitlines()) < 70
        assert "token49999" not in found.to_text() + found._repr_html_()
        assert "token49999" in found.to_json()
    assert nested.to_text().endswith(" …")
    assert flat.to_text().endswith("and 49,941 more")


def test_json_holds_every_number(reflow):
    stored = json.loads(inspect_path(reflow).to_json())
    rows = {row["name"]: row for row in stored["frames"]["tensors"]}
    for name, tensor in load_file(reflow / WEIGHTS).items():
        assert rows[name]["norm"] == pytest.approx(tensor.norm().item(), rel=1e-5)


def test_html_escapes_what_a_file_says(tmp_path):
    save_file({"<b>x": torch.zeros(2)}, tmp_path / "x.safetensors", metadata={"note": "<script>"})
    html = inspect_path(tmp_path / "x.safetensors")._repr_html_()
    assert "<script>" not in html
    assert "<b>x" not in html


def test_the_command(reflow, tmp_path, capsys):
    assert main(["inspect", str(reflow), "--against", str(reflow)]) == 0
    out = capsys.readouterr().out
    assert "blocks.*.attn.W_Q" in out
    assert f"{len(load_file(reflow / WEIGHTS))} tensors same" in out
    assert main(["inspect", str(reflow), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["facts"]["tokens_seen"] == 4096
    (reflow / WEIGHTS).write_bytes(b"no")
    assert main(["inspect", str(reflow)]) == 1
    assert "problem: " in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "nowhere")]) == 2
    assert "no file or folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("transformer.h.0.ln_1.weight", "norms"),
        ("transformer.wpe.weight", "embedding"),
        ("model.layers.0.self_attn.q_norm.weight", "norms"),
        ("transformer.h.0.attn.c_attn.weight", "attention"),
        ("model.layers.0.block_sparse_moe.experts.3.w1.weight", "mlp"),
        ("lm_head.weight", "readout"),
        ("unembed.W_U", "readout"),
        ("embed.W_basis", "signal basis"),
        ("blocks.0.ln2.b", "norms"),
    ],
)
def test_parts_by_name(name, part):
    assert part_of(name) == part


# -- dictionaries -----------------------------------------------------------------------------------------------------


def test_a_dictionary_is_told_by_its_layers(tmp_path: Path) -> None:
    points = [tuple(f"blocks.{layer}.{name}" for layer in range(2)) for name in ("ln2.hook_normalized", "hook_mlp_out")]
    cfg = DictionaryConfig(points[0], points[1], 8, 8, 20, "topk", 4, model_name="mine", name="plt")
    save_dictionary(tmp_path / "plt", Dictionary.fresh(cfg), {"tokens_seen": 5, "metrics": {"l0": [4.0, 3.5]}})
    found = inspect_path(tmp_path / "plt")
    assert (found.kind, found.problems) == ("dictionary", ())
    assert found.facts["tokens_seen"] == 5
    layers = found.frames["layers"]
    assert layers["reads"].tolist() == list(cfg.reads)
    assert layers["l0"].tolist() == [4.0, 3.5]
    assert layers["decoder_norm"].tolist() == pytest.approx([1.0, 1.0])
    assert "transcoder(plt of mine: 2 layers of 20 features, topk(4))" in found.to_text()
    assert inspect_path(tmp_path).facts["dictionaries"] == ["plt"]
    (tmp_path / "plt" / "dictionary.safetensors").write_bytes(b"no tensors")
    (problem,) = inspect_path(tmp_path / "plt").problems
    assert "not a readable safetensors file" in problem
