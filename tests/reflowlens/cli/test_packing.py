"""``reflowlens pack`` and ``unpack``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import reflowlens as rl
from reflowlens.cli import main
from tests.support.tiny import random_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pack")
    rl.save_model(folder / "model", random_model("reflow"))
    (folder / "code.py").write_text("x" * 1000)
    text = "\n<|endoftext|>\n".join(f"the cat {i} sat on the mat" for i in range(60))
    (folder / "text.txt").write_text(text)
    arguments = [str(folder / "text.txt"), "--tokenizer", "bytes", "--val-fraction", "0.3"]
    assert main(["prepare", *arguments, "--out", str(folder / "data")]) == 0
    return folder


def pack(folder: Path, *more: str) -> int:
    return main(["pack", str(folder / "model"), "--out", str(folder / "model.packed"), *more])


@pytest.mark.parametrize("method", ["clip", "gptq"])
def test_packed_measured_opened_and_unpacked(folder, capsys, method):
    assert pack(folder, "--bits", "5", "--method", method, "--data", str(folder / "data"), "--limit", "1MB") == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == str(folder / "model.packed")
    size = (folder / "model.packed").stat().st_size
    assert f"{size:,} bytes" in printed
    (row,) = [line.split() for line in printed if line.strip().startswith("packed ")]
    assert abs(float(row[5])) < 0.2
    assert float(row[6]) <= float(row[5]) <= float(row[7])
    assert main(["unpack", str(folder / "model.packed"), "--out", str(folder / "unpacked")]) == 0
    opened = rl.load_model(folder / "model.packed")
    torch.testing.assert_close(rl.load_model(folder / "unpacked")("to be"), opened("to be"))


def test_a_limit_that_cannot_be_met_says_by_how_much_and_leaves_nothing(folder, capsys):
    out = folder / "other.packed"
    assert (
        main(["pack", str(folder / "model"), "--out", str(out), "--limit", "10KB", "--code", str(folder / "code.py")])
        == 2
    )
    error = capsys.readouterr().err
    assert "more than the limit of 10,000; most weigh " in error
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--limit", "16 apples"], "--limit must be a size such as 16MB"),
        (["--bits", "9"], "bits must be 2 to 8, got 9"),
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


def test_only_packed_files_are_unpacked(folder, capsys):
    assert main(["unpack", str(folder / "code.py"), "--out", str(folder / "nowhere")]) == 2
    assert "is not a file that pack wrote" in capsys.readouterr().err
