"""``reflowlens dictionary evaluate``: what it reads, prints and writes, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from analyses.words import lexicon
from analyses.words.lexicon import FactualPrompt, Lexicon
from pretraining.data import prepare
from reflowlens.checkpoints import save_model
from reflowlens.cli import main
from reflowlens.dictionaries.files import save_dictionary
from reflowlens.models import build_model
from reflowlens.models.base import HookedModel
from reflowlens.storage.model_hash import model_hash
from tests.support.dictionaries import dictionary_of
from tests.support.tiny import random_model, tiny_config

SENTENCES = [f"The {animal} {verb} the {thing}." for animal in ("cat", "dog", "old fox") for verb in ("sees", "eats")
             for thing in ("mouse", "bone", "green grass")]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a model, two dictionaries of it, one of the untrained model, and one of nobody."""
    folder = tmp_path_factory.mktemp("evaluation")
    (folder / "train.txt").write_text("\n<|endoftext|>\n".join(SENTENCES))
    (folder / "val.txt").write_text("\n<|endoftext|>\n".join(reversed(SENTENCES)))
    prepare(folder / "train.txt", folder / "data", "bytes", val_sources=folder / "val.txt", progress=False)
    model, untrained = random_model("reflow"), build_model(tiny_config("reflow"), seed=3)
    save_model(folder / "model", model)
    trained_on: dict[str, tuple[HookedModel, int]] = {
        "first": (model, -1),
        "second": (model, -1),
        "null": (untrained, 3),
    }
    for number, (name, (of, seed)) in enumerate(trained_on.items()):
        dictionary = dictionary_of(
            of, seed=number, name=name, model_hash=model_hash(of), model_name=str(folder / "model")
        )
        save_dictionary(folder / name, dictionary, {"training": {"model": {"untrained_seed": seed}}})
    save_dictionary(folder / "nameless", dictionary_of(model))
    return folder


def test_a_dictionary_is_measured_beside_others(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(folder / name) for name in ("first", "second", "null")]
    out = tmp_path / "evaluation.json"
    command = ["dictionary", "evaluate", paths[0], "--data", str(folder / "data"), "--tokens", "0", "--resamples", "20"]
    assert main([*command, "--against", *paths[1:], "--out", str(out)]) in (0, None)
    printed = capsys.readouterr().out
    found = json.loads(out.read_text())
    assert str(out) in printed
    assert "recovered_zero" in printed
    assert {row["dictionary"] for row in found["frames"]["layers"]} >= {"first", "second", "null", "pca", "varimax"}
    assert found["params"]["documents"] == len(SENTENCES)
    assert found["params"]["positions"] == sum(min(24, len(sentence)) - 1 for sentence in SENTENCES)
    assert main([*command[:5], "--tokens", "60", "--no-nulls", "--resamples", "5", "--out", str(out)]) in (0, None)
    few = json.loads(out.read_text())
    assert {row["dictionary"] for row in few["frames"]["layers"]} == {"first"}
    assert few["params"]["documents"] < len(SENTENCES)


def test_windows_stand_in_for_documents_that_are_few(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.txt").write_text("\n<|endoftext|>\n".join(SENTENCES))
    (tmp_path / "book.txt").write_text(" ".join(SENTENCES))  # one document
    prepare(tmp_path / "train.txt", tmp_path / "data", "bytes", val_sources=tmp_path / "book.txt", progress=False)
    out = tmp_path / "evaluation.json"
    command = ["dictionary", "evaluate", str(folder / "first"), "--data", str(tmp_path / "data"), "--tokens", "0"]
    assert main([*command, "--no-nulls", "--resamples", "5", "--out", str(out)]) in (0, None)
    n_windows = len(" ".join(SENTENCES)) // 24
    assert json.loads(out.read_text())["params"]["documents"] in (n_windows, n_windows + 1)
    assert "held out are 1 documents" in capsys.readouterr().err


def test_stability_probes_and_graphs_are_kept_with_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = (FactualPrompt("a short one", " a"), FactualPrompt("another", " b"))  # the model reads 24 bytes
    monkeypatch.setattr(lexicon, "load_lexicon", lambda: Lexicon("", factual=prompts))
    command = ["dictionary", "evaluate", str(folder / "first"), "--data", str(folder / "data"), "--tokens", "0"]
    more = [
        "--together",
        "--resamples",
        "5",
        "--seeds",
        str(folder / "second"),
        "--probe",
        "--graphs",
        "--out",
        str(tmp_path / "x.json"),
    ]
    assert main([*command, *more]) in (0, None)
    printed = capsys.readouterr().out
    assert "stability over seeds" in printed
    assert "mean over classes" in printed
    assert "scores of attribution graphs" in printed
    frames = json.loads((tmp_path / "x.json").read_text())["frames"]
    assert [row["layer"] for row in frames["stability"]] == ["0", "1", "all"]
    assert {row["basis"] for row in frames["probes"]} >= {"dictionary", "neurons", "pca", "random"}
    assert {row["dictionary"] for row in frames["graphs"]} == {"first", "neurons", "random", "none"}
    alone = [row for row in frames["layers"] if row["dictionary"] == "pca" and row["layer"] == "0"]
    assert [row["loss"] for row in alone] == [None]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nameless"], "does not name its model: give it with --model"),
        (["first", "--tokens", "-1"], r"--tokens must be 0 \(all\) or more, got -1"),
        (["first", "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["null"], "was trained on a model of other weights"),
        (["first", "--data", "nothing"], "no prepared data in 'nothing'"),
    ],
)
def test_what_cannot_be_measured_is_one_error(
    folder: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *others = arguments
    assert main(["dictionary", "evaluate", str(folder / name), "--data", str(folder / "data"), *others]) == 2
    assert re.search(message, capsys.readouterr().err)
