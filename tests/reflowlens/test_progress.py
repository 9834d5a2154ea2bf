from __future__ import annotations

import io
import re

import pytest

from reflowlens.progress import bar

NAMES = ["Recipe Atlas", "Signal Flow", "Genetic Hijack"]


@pytest.fixture
def clock(monkeypatch):
    """The seconds that tqdm sees, moved by hand."""
    now = [100.0]
    monkeypatch.setattr("tqdm.std.tqdm._time", lambda self: now[0], raising=False)
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def test_named_units_are_a_line_each_with_the_time_gone_and_left(clock, capsys):
    steps = bar(NAMES, show=True, named=True, unit="experiment")
    for name in steps:
        steps.set_description(name)
        clock[0] += 60
    assert capsys.readouterr().err.splitlines() == [
        "0/3 experiments, Recipe Atlas, 00:00 elapsed",
        "1/3 experiments, Signal Flow, 01:00 elapsed, about 02:00 left",
        "2/3 experiments, Genetic Hijack, 02:00 elapsed, about 01:00 left",
        "3/3 experiments, Genetic Hijack, 03:00 elapsed",
    ]


def test_many_short_units_are_a_line_every_ten_seconds(clock, capsys):
    for _ in bar(range(100), show=True, unit="batch", desc="counting"):
        clock[0] += 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "10/100 batches, counting, 00:10 elapsed, about 01:30 left"
    assert lines[-1] == "100/100 batches, counting, 01:40 elapsed"
    assert len(lines) == len(set(lines)) == 10


def test_the_time_left_of_resumed_work_counts_what_was_done_now(clock, capsys):
    steps = bar(show=True, unit="step", total=100, initial=90)
    clock[0] += 20
    steps.set_postfix(loss=1.5, refresh=False)
    steps.update(5)
    assert capsys.readouterr().err == "95/100 steps, loss=1.5, 00:20 elapsed, about 00:20 left\n"
    steps.close()


def test_nothing_is_written_unless_asked_for(capsys):
    assert list(bar(range(3), show=False)) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar_that_redraws_itself(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", terminal)
    for _ in bar(range(3), show=True, unit="batch"):
        pass
    assert re.search(r"\r.*3/3", terminal.getvalue())
