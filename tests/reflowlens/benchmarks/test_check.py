"""Ratios are compared with stored ones by planted numbers: speeds themselves are never a test."""

from __future__ import annotations

import dataclasses

import pytest

from reflowlens.benchmarks import BENCHMARKS, check, machine
from reflowlens.benchmarks.check import Ratio, compared, read_ratios, write_ratios
from reflowlens.cli import main
from reflowlens.errors import ReflowlensError


def stored(row: str, ratio: float, tolerance: float = 0.2, benchmark: str = "sweep") -> Ratio:
    return Ratio(benchmark, row, ratio, tolerance, "another machine")


@pytest.mark.parametrize(
    ("found", "what"), [(12.0, ""), (9.0, ""), (8.01, ""), (7.99, "fell"), (float("nan"), "fell"), (None, "missing")]
)
def test_what_fell(found: float | None, what: str) -> None:
    ratios = [] if found is None else [("sweep", "heads", found)]
    table = compared([stored("heads", 10.0), stored("others", 1.0, benchmark="hooks")], ratios, ["sweep"])
    (row,) = table.to_dict("records")
    assert (row["row"], row["what"]) == ("heads", what)
    assert row["lowest"] == pytest.approx(8.0)


def test_small_ratios_are_stored_as_they_are(tmp_path) -> None:
    path = tmp_path / "ratios.json"
    write_ratios(path, [("sweep", "heads", 0.00041)], [])
    assert [each.ratio for each in read_ratios(path)] == [0.00041]


def test_a_new_row_did_not_fall() -> None:
    table = compared([], [("sweep", "heads", 0.1)], ["sweep"])
    assert table["what"].tolist() == ["new"]


def test_written_ratios_keep_their_tolerances_and_other_benchmarks(tmp_path) -> None:
    path = tmp_path / "ratios.json"
    before = [stored("heads", 10.0, 0.05), stored("gone", 3.0), stored("decoding", 4.0, benchmark="decode")]
    write_ratios(path, [("sweep", "heads", 12.3456), ("sweep", "new", 2.0)], before)
    assert read_ratios(path) == [
        before[2],
        Ratio("sweep", "heads", 12.346, 0.05, machine()),
        Ratio("sweep", "new", 2.0, check.TOLERANCE, machine()),
    ]


_RATIO = '[{"benchmark": "sweep", "row": "heads", "ratio": %s, "tolerance": %s, "machine": ""}]'


@pytest.mark.parametrize(
    "text",
    [None, "[", "[1]", '[{"row": "heads"}]']
    + [_RATIO % given for given in (('"2"', "0.2"), ("NaN", "0.2"), ("0", "0.2"), ("2", "1"), ("2", "null"))],
)
def test_a_file_without_ratios(tmp_path, text: str | None) -> None:
    path = tmp_path / "ratios.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ReflowlensError, match="no stored ratios" if text is None else "holds no ratios"):
        read_ratios(path)


def test_the_packaged_ratios_are_those_of_benchmarks_that_there_are() -> None:
    ratios = read_ratios(check.STORED)
    assert {each.benchmark for each in ratios} <= set(BENCHMARKS)
    assert len({(each.benchmark, each.row) for each in ratios}) == len(ratios)
    assert all(each.ratio > 0 and 0 < each.tolerance < 1 for each in ratios)


def test_the_command_says_what_fell(monkeypatch, capsys, tmp_path) -> None:
    ratio = 10.0
    monkeypatch.setitem(
        BENCHMARKS,
        "sweep",
        dataclasses.replace(BENCHMARKS["sweep"], quick=lambda: iter([{"ratio": ratio, "of": "heads", "case": "nano"}])),
    )
    path = str(tmp_path / "ratios.json")
    command = ["bench", "check", "--against", path, "--of", "sweep"]
    assert main(command) == 2  # an error: nothing is stored
    write_ratios(path, [("hooks", "forward", 1.0)], [])
    assert main(command) == 2  # so where only others are
    assert main([*command, "--write"]) == 0
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("its tolerance: 1 compared, 0 not stored")
    ratio = 5.0
    assert main(command) == 1
    assert "heads, nano" in capsys.readouterr().out.splitlines()[-1]
    alone = str(tmp_path / "alone.json")
    write_ratios(alone, [("sweep", "heads, nano", 5.0)], [])
    assert main(["bench", "check", "--against", alone]) == 0  # measures what is stored, and nothing else
    assert main(["bench", "hooks", "--write"]) == 2
    assert "are of `reflowlens bench check`" in capsys.readouterr().err
