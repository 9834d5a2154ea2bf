"""``reflowlens pack`` and ``unpack``, of models and dictionaries."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import reflowlens as rl
from pretraining.loss_comparison import compare_replacements
from reflowlens.checkpoints import read_manifest
from reflowlens.cli import main
from reflowlens.dictionaries.files import dictionary_manifest
from reflowlens.inspection.inspect import inspect_path
from reflowlens.packing import pack_model
from tests.reflowlens.dictionaries.test_files import random_dictionary
from tests.support.tiny import random_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pack")
    rl.save_model(folder / "model", random_model("reflow"))
    rl.save_dictionary(folder / "dictionary", random_dictionary(), {"tokens_seen": 7})
    (folder / "code.py").write_text("x" * 1000)
    text = "\n<|endoftext|>\n".join(f"the cat {i} sat on the mat" for i in range(60))
    (folder / "text.txt").write_text(text)
    arguments = [str(folder / "text.txt"), "--tokenizer", "bytes", "--val-fraction", "0.3"]
    assert main(["prepare", *arguments, "--out", str(folder / "data")]) == 0
    return folder


def pack(folder: Path, *more: str, what: str = "model") -> int:
    return main(["pack", str(folder / what), "--out", str(folder / f"{what}.packed"), *more])


def losses_of(printed: list[str]) -> list[float]:
    (row,) = [line.split() for line in printed if line.strip().startswith("packed ")]
    return [float(cell) for cell in row[1:]]


@pytest.mark.parametrize("method", ["clip", "gptq"])
def test_packed_measured_opened_and_unpacked(folder, capsys, method):
    assert pack(folder, "--bits", "5", "--method", method, "--data", str(folder / "data"), "--limit", "1MB") == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == str(folder / "model.packed")
    size = (folder / "model.packed").stat().st_size
    assert f"{size:,} bytes" in printed
    *_, difference, low, high = losses_of(printed)
    assert abs(difference) < 0.2
    assert low <= difference <= high
    assert main(["unpack", str(folder / "model.packed"), "--out", str(folder / "unpacked")]) == 0
    opened = rl.load_model(folder / "model.packed")
    torch.testing.assert_close(rl.load_model(folder / "unpacked")("to be"), opened("to be"))


@pytest.mark.parametrize("method", ["clip", "gptq"])
def test_a_dictionary_is_packed_measured_in_its_model_opened_and_unpacked(folder, capsys, method):
    data, model = str(folder / "data"), str(folder / "model")
    arguments = ["--bits", "5", "--method", method, "--data", data, "--of", model]
    assert pack(folder, *arguments, what="dictionary") == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == str(folder / "dictionary.packed")
    loss, *_, difference, low, high = losses_of(printed)[1:]
    assert low <= difference <= high
    whole = rl.load_dictionary(folder / "dictionary")
    expected = compare_replacements(rl.load_model(model), {"": whole}, data, max_tokens=100_000)["loss"][0]
    assert loss - difference == pytest.approx(expected, abs=2e-4)  # four digits are printed
    assert main(["unpack", str(folder / "dictionary.packed"), "--out", str(folder / "unpacked_dictionary")]) == 0
    opened, unpacked = (rl.load_dictionary(folder / name) for name in ("dictionary.packed", "unpacked_dictionary"))
    assert dictionary_manifest(folder / "unpacked_dictionary")["tokens_seen"] == 7
    for ours, theirs in zip(opened.parameters(), unpacked.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_packed_model_is_inspected(folder, capsys):
    assert pack(folder, "--bits", "5") == 0
    found = inspect_path(folder / "model.packed")
    assert not found.problems
    assert found.kind.startswith("packed model")
    assert found.facts["packing"] == {"bits": "8", "method": "clip", "compressor": "lzma"}
    assert found.facts["parameters"] == random_model("reflow").n_parameters
    against = inspect_path(folder / "model.packed", against=folder / "model").frames["differences"]
    assert (against["relative"] < 0.1).all()
    (folder / "broken.packed").write_bytes((folder / "model.packed").read_bytes()[:-1])
    (problem,) = inspect_path(folder / "broken.packed").problems
    assert "it was changed or cut short" in problem


def test_a_limit_that_cannot_be_met_says_by_how_much_and_leaves_nothing(folder, capsys):
    out = folder / "other.packed"
    assert (
        main(["pack", str(folder / "model"), "--out", str(out), "--limit", "10KB", "--code", str(folder / "code.py")])
        == 2
    )
    error = capsys.readouterr().err
    found = re.search(r"([\d,]+) bytes are ([\d,]+) more than the limit of 10,000; most weigh embed\.W_recipe ", error)
    assert found is not None
    total, above = (int(number.replace(",", "")) for number in found.groups())
    assert total == above + 10_000
    assert total == pack_model(rl.load_model(folder / "model"), manifest=read_manifest(folder / "model")).size + 1000
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--limit", "1_0.MB"], "--limit must be a size such as 16MB"),
        (["--limit", "16 apples"], "--limit must be a size such as 16MB"),
        (["--bits", "9"], "bits must be 2 to 8, got 9"),
        (["--bits", "4.5"], "bits must be an integer and at least 2, got 4.5"),
        (["--of", "reflow-nano"], "--of names the model of a dictionary, and "),
        (["--method", "gptq"], "--method gptq calibrates with the training tokens of --data"),
        (["--code", "nothing.py"], "--code nothing.py is no file"),
        (["--compressor", "rar"], "compressor must be one of"),
    ],
)
def test_bad_input_is_one_line(folder, capsys, arguments, message):
    assert pack(folder, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--embedding-bits", "8"], "--embedding-bits is of a model's tables, and "),
        (["--bits", "4.5"], "bits must be an integer"),
        (
            ["--data", "data"],
            "--data measures a dictionary in its model, which this one does not name: give --of MODEL",
        ),
    ],
)
def test_bad_input_of_a_dictionary_is_one_line(folder, capsys, arguments, message):
    assert pack(folder, *arguments, what="dictionary") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_only_packed_files_are_unpacked(folder, capsys):
    assert main(["unpack", str(folder / "code.py"), "--out", str(folder / "nowhere")]) == 2
    assert "is not a file that pack wrote" in capsys.readouterr().err
