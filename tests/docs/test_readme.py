"""The README's blocks run, one after the other, in a folder that is empty at first."""

from __future__ import annotations

import re
import shlex
import time
import warnings

import pytest

from reflowlens.cli import build_parser
from reflowlens.config import PRESETS
from reflowlens.errors import ReflowlensError
from reflowlens.examples import ASSETS, write_examples
from reflowlens.figures.browser import find_browser
from reflowlens.models import build_model
from tests.support.readme import README, blocks

CONDITIONS = {
    "",
    "takes minutes",
    "takes hours",
    "needs a network",
    "needs a GPU",
    "needs GPUs",
    "needs Chrome or Chromium",
    "in a clone of this repository",
}


def runs_here(condition: str, minutes: bool) -> bool:
    if condition == "needs Chrome or Chromium":
        try:
            find_browser()
        except ReflowlensError:
            return False
        return True
    return not condition or (minutes and condition == "takes minutes")


@pytest.mark.parametrize("minutes", [False, pytest.param(True, marks=[pytest.mark.slow, pytest.mark.by_hand])])
def test_every_block_runs_in_order_in_an_empty_folder(tmp_path, monkeypatch, capsys, minutes):
    """As they stand, and those that take minutes, under `-m slow`; else in brief.

    Of those that need what is not here, the arguments are read.
    """
    monkeypatch.chdir(tmp_path)
    namespace, seconds = {}, []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for block in blocks():
            assert block.condition in CONDITIONS
            if not runs_here(block.condition, minutes):
                if not block.python:
                    block.check()
                continue
            started = time.perf_counter()
            block.run(namespace, brief=not minutes)
            seconds.append((time.perf_counter() - started, (block.text if block.python else block.commands[0])[:60]))
    with capsys.disabled():
        print("\n", *(f"{took:6.1f} s  {text.splitlines()[0]}" for took, text in seconds), sep="\n")
    assert [str(warning.message) for warning in caught if "requires_grad" in str(warning.message)] == []
    out = capsys.readouterr().out
    assert "->" in out
    for written in ("ablation/result.json", "first/report.html", "tiny_report/report.html", "imported/manifest.json"):
        assert (tmp_path / "out" / written).is_file(), written
    if minutes:
        assert (tmp_path / "out" / "all" / "report.html").is_file()


def test_commands_in_the_text_are_commands():
    spans = re.findall(
        r"`(reflowlens [^`]+)`", re.sub(r"^```.*?^```$", "", README, flags=re.M | re.S).replace("\n", " ")
    )
    assert len(spans) > 5
    for span in spans:
        build_parser().parse_args(shlex.split(span)[1:])


def test_no_two_blocks_write_one_folder():
    """But a run that is continued."""
    written = [
        options
        for block in blocks()
        for command in ([] if block.python else block.commands)
        for options in re.findall(r"--out (\S+)", command)
    ]
    assert len(written) == len(set(written))


def test_examples_are_what_their_readme_says(tmp_path):
    files = write_examples(tmp_path / "examples")
    described = (ASSETS / "README.md").read_text(encoding="utf8")
    assert {path.name for path in files} == {"README.md", *re.findall(r"`(\w+\.(?:txt|jsonl|toml))`", described)}
    assert files == write_examples(tmp_path / "examples")
    sizes = [(tmp_path / "examples" / name).stat().st_size for name in ("train.txt", "val.txt")]
    assert sizes == [1_003_854, 111_540]
    for name, count in re.findall(r"\| `(\w+\.\w+)` \| (\d+) ", described):
        lines = (tmp_path / "examples" / name).read_text(encoding="utf8").splitlines()
        assert len([line for line in lines if not line.startswith(":")]) == int(count), name


def test_examples_replace_nothing_else(tmp_path):
    mine = tmp_path / "tiny.toml"
    mine.write_text("mine")
    with pytest.raises(ReflowlensError, match=r"tiny.toml holds something else: .* --overwrite"):
        write_examples(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.toml"]
    write_examples(tmp_path, overwrite=True)
    assert mine.read_bytes() == (ASSETS / "tiny.toml").read_bytes()


@pytest.mark.parametrize("name", PRESETS)
def test_the_table_of_counts(name):
    row = next(line for line in README.splitlines() if f"| `{name}` |" in line and line.rstrip(" |")[-1].isdigit())
    assert int(row.split("|")[-2].replace(",", "")) == build_model(name, device="meta").n_parameters
