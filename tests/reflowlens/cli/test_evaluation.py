"""``reflowlens evaluate``: bits per byte of files and prepared folders, and last words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import reflowlens as rl
from analyses.tasks.comparisons import last_words
from reflowlens.cli import main
from reflowlens.scoring.items import NORMALISATIONS
from tests.support.tiny import random_model

PROMPTS = ["The capital of", "In the middle of", "He went to", "It was in"]
TEXTS = [f"the cat number {i} sat on the mat" for i in range(12)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    rl.save_model(folder / "one", random_model("reflow"))
    rl.save_model(folder / "two", random_model("gpt2"))
    (folder / "texts.jsonl").write_text("".join(f"{json.dumps({'text': text})}\n" for text in TEXTS))
    (folder / "train.txt").write_text("something else to train on, a little longer than a context")
    arguments = [str(folder / "train.txt"), "--val", str(folder / "texts.jsonl"), "--tokenizer", "bytes"]
    assert main(["prepare", *arguments, "--out", str(folder / "data")]) == 0
    return folder


def table(printed: str) -> list[dict[str, str]]:
    header, *rows = [line.split() for line in printed.strip().splitlines()]
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_a_file_and_what_was_prepared_of_it_have_the_same_bits(files, capsys):
    found = []
    for data in ("texts.jsonl", "data"):
        assert main(["evaluate", str(files / "one"), str(files / data), "--bits-per-byte", "--stride", "6",
                     "--against", str(files / "two")]) == 0  # fmt: skip
        found.append(table(capsys.readouterr().out))
    assert [{**row, "model": ""} for row in found[0]] == [{**row, "model": ""} for row in found[1]]
    assert [row["model"] for row in found[0]] == [str(files / "one"), str(files / "two")]
    assert int(found[0][0]["bytes"]) == sum(len(text) - 1 for text in TEXTS)


def test_last_words_are_guessed_token_by_token():
    model = rl.load_model("reflow-nano")
    texts = [f"{prompt} {answer}" for prompt in PROMPTS for answer in ("the", "France", "unbelievable")]
    expected = []
    for text in texts:
        last = text.rpartition(" ")[2]
        start = [model.tokenizer.eot_token]
        ids, n = model.tokenizer.encode(text), len(model.tokenizer.encode(f" {last}"))
        logits = model(torch.tensor([*start, *ids[:-1]]))[0, -n:]
        expected.append(bool((logits.argmax(-1) == torch.tensor(ids[-n:])).all()))
    result = last_words(model, texts, batch=4, progress=False)
    assert result.metrics["accuracy"] == sum(expected) / len(texts) > 0
    assert result.intervals["accuracy"].low < result.metrics["accuracy"] < result.intervals["accuracy"].high


def test_the_first_documents_of_prepared_data(files, capsys):
    assert main(["evaluate", str(files / "one"), str(files / "data"), "--last-word", "--max-documents", "5"]) == 0
    row, logprob = table(capsys.readouterr().out)
    assert (row["metric"], row["items"], logprob["metric"]) == ("accuracy", "5", "logprob")
    assert 0 <= float(row["low"]) <= float(row["value"]) <= float(row["high"]) <= 1


PAIRS = [{"sentence_good": "the cat sat", "sentence_bad": "the cat sit", "UID": name} for name in "aab"]
QUESTIONS = [{"question": "the cat", "choices": ["sat", "sits", "is"], "answer": i} for i in (0, 1, 0)]


@pytest.mark.parametrize(
    ("measure", "rows", "metrics"),
    [
        ("--minimal-pairs", PAIRS, ["accuracy", "accuracy_per_token", "mean_of_groups"]),
        ("--multiple-choice", QUESTIONS, [f"accuracy_{name}" for name in NORMALISATIONS[:3]]),
    ],
)
def test_tasks_of_a_file_of_json_lines(files, tmp_path, capsys, measure, rows, metrics):
    path = tmp_path / "items.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    models = [str(files / "one"), str(files / "two")]
    assert main(["evaluate", models[0], str(path), measure, "--against", models[1]]) == 0
    found = table(capsys.readouterr().out)
    assert [(row["model"], row["metric"]) for row in found] == [(name, metric) for name in models for metric in metrics]
    assert {row["items"] for row in found} == {"3"}
    path.write_text("not JSON")
    assert main(["evaluate", models[0], str(path), measure]) == 2
    assert "is no file of JSON lines that can be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--window", "8"], "--window goes with --bits-per-byte"),
        (["--last-word", "--stride", "8"], "--stride goes with --bits-per-byte"),
        (["--bits-per-byte", "--window", "99"], "window=99 is longer than the n_ctx=24"),
        (["--bits-per-byte", "--max-documents", "0"], "--max-documents must be at least 1, got 0"),
    ],
)
def test_bad_input_is_one_line(files, capsys, arguments, message):
    assert main(["evaluate", str(files / "one"), str(files / "texts.jsonl"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
