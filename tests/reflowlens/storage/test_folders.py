from __future__ import annotations

import os
from pathlib import Path

import pytest

from reflowlens.cli import main
from reflowlens.errors import ReflowlensError
from reflowlens.storage.folders import check_makeable


def test_a_folder_that_can_be_made_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path, tmp_path / "a" / "b", Path("out"), Path()):
        check_makeable(folder)
    assert not any(tmp_path.iterdir())


def test_below_a_file_none_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("kept")
    for folder in (tmp_path / "notes", tmp_path / "notes" / "a" / "b"):
        with pytest.raises(ReflowlensError, match=r"notes is a file: choose a new folder$"):
            check_makeable(folder)


def test_where_nothing_may_be_written_none_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(os, "access", lambda path, mode: asked.append((path, mode)))  # falsy; root may write anywhere
    with pytest.raises(ReflowlensError, match=rf"^cannot write to {tmp_path}: choose a folder that may be written to$"):
        check_makeable(tmp_path / "a" / "b")
    assert asked == [(tmp_path, os.W_OK | os.X_OK)]


@pytest.mark.parametrize(
    "command",
    [
        ["units", "no-such-model", "--data", "no-such-text"],
        ["graph", "no-such-model", "a prompt"],
        ["pack", "no-such-model"],
        ["findings", "scale", "--runs", "no-such-runs"],
    ],
)
def test_a_command_says_so_before_it_works(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes").write_text("kept")
    assert main([*command, "--out", str(tmp_path / "notes" / "out")]) == 2
    error = capsys.readouterr().err
    assert "notes is a file: choose a new folder" in error
    assert "no-such" not in error
    assert (tmp_path / "notes").read_text() == "kept"
