from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest

from analyses.registry import EXPERIMENTS, Experiment
from analyses.result.result import Result
from analyses.runner.suite import SuiteRun
from reflowlens.checkpoints import save_model
from reflowlens.cli import main
from tests.support.tiny import random_model


@pytest.fixture
def checkpoint(tmp_path):
    return save_model(tmp_path / "model", random_model("reflow"), {"tokens_seen": 10, "val_loss": 2.5})


def test_help_imports_nothing_heavy():
    code = (
        "import sys, reflowlens.cli as cli\n"
        "try: cli.main(['run', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformer_lens', 'pandas', 'plotly', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: reflowlens run" in done.stdout
    assert time.perf_counter() - began < 10  # a hang, not a speed: `reflowlens bench` measures


@pytest.mark.parametrize(
    "command",
    [
        *("run", "figures", "models", "sample", "prepare", "train", "finetune", "evaluate"),
        *("export", "import", "inspect", "units", "bench", "dictionary"),
    ],
)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"usage: reflowlens {command}" in capsys.readouterr().out


def test_models_lists_presets_with_their_counts(capsys):
    assert main(["models"]) == 0
    assert "reflow_1_lite          413,336,576 parameters" in capsys.readouterr().out


def test_sample_continues_every_prompt(checkpoint, capsys):
    assert main(["sample", str(checkpoint), "The", "An", "--tokens", "4", "--temperature", "0"]) == 0
    first, second = capsys.readouterr().out.split("\n---\n")
    assert first.startswith("The")
    assert second.startswith("An")


def test_prepare_train_evaluate_and_export_in_turn(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(f"the cat {i} sat on the mat" for i in range(200)))
    data = tmp_path / "data"
    assert (
        main(
            ["prepare", str(tmp_path / "text.txt"), "--out", str(data), "--tokenizer", "bytes", "--val-fraction", "0.2"]
        )
        == 0
    )
    config = tmp_path / "tiny.toml"
    config.write_text(f"""
[model]
architecture = "reflow"
n_layers = 1
d_model = 16
n_heads = 2
d_head = 8
d_mlp = 32
d_vocab = 256
n_ctx = 16
n_signals = 16
tokenizer_name = "bytes"
[data]
folder = "{data}"
context = 16
[run]
out = "{tmp_path / "run"}"
steps = 3
batch_size = 4
compile = false
dtype = "float32"
""")
    assert main(["train", str(config)]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run"), str(data)]) == 0
    loss = float(capsys.readouterr().out.split()[1])
    manifest = json.loads((tmp_path / "run" / "step_0000003" / "manifest.json").read_text())
    assert loss == pytest.approx(manifest["val_loss"], abs=1e-4)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--dtype", "float16"]) == 0
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["tokens_seen"] == 3 * 4 * 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "reflow-nanno", "The"], "no model 'reflow-nanno'"),
        (["train", "nowhere.toml"], "no configuration file 'nowhere.toml'"),
        (["evaluate", "nowhere", "data"], "no model 'nowhere'"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_an_empty_prompt_and_a_long_one_are_errors(checkpoint, capsys):
    assert main(["sample", str(checkpoint), ""]) == 2
    assert "empty" in capsys.readouterr().err
    assert main(["sample", str(checkpoint), "x" * 200]) == 2
    assert "n_ctx=24" in capsys.readouterr().err


@pytest.fixture
def runs(monkeypatch):
    """The arguments of every run of the suite, which is not run."""
    calls = []

    def record(model, experiments, **options):
        calls.append((options["model_name"], experiments, options["quick"]))
        return SuiteRun(Path("out"), errors={"layer_evolution": "too few prompts"})

    monkeypatch.setattr("analyses.runner.suite.run_suite", record)
    monkeypatch.setattr("reflowlens.checkpoints.load_model", lambda *_, **__: None)
    return calls


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", ("reflow-nano", [*EXPERIMENTS], False)),
        ("all", ("reflow-nano", [*EXPERIMENTS], False)),
        ("5 7", ("reflow-nano", [5, 7], False)),
        ("layer_evolution", ("reflow-nano", [7], False)),
        ("reflow-nano 9", ("reflow-nano", [9], False)),
        ("reflow-nano --quick 5 7", ("reflow-nano", [5, 7], True)),
        ("--quick 5 --seed 1 7", ("reflow-nano", [5, 7], True)),
        ("--quick reflow-nano 9", ("reflow-nano", [9], True)),
    ],
)
def test_run_knows_models_from_experiments(runs, arguments, expected, capsys):
    assert main(["run", *arguments.split()]) == 1
    assert runs == [expected]
    assert "layer_evolution: too few prompts" in capsys.readouterr().err


@pytest.fixture
def terminal(monkeypatch):
    """A person at a terminal, who gives these answers."""

    def sit_down(*answers):
        left = iter(answers)
        monkeypatch.setattr("builtins.input", lambda question: print(question) or next(left))
        monkeypatch.setattr("sys.stdin.isatty", lambda: True)
        monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
        return left

    return sit_down


def test_on_a_terminal_a_run_that_is_told_nothing_asks(runs, terminal, capsys):
    left = terminal("reflow-nanno", "", "5 x", "9, layer_evolution")
    assert main(["run", "--quick"]) == 1
    assert runs == [("reflow-nano", [7, 9], True)]
    assert next(left, None) is None
    shown = capsys.readouterr().out
    assert "did you mean 'reflow-nano'" in shown
    assert "no experiment 'x'" in shown
    for experiment in EXPERIMENTS.values():
        assert f"{experiment.number:3}  {experiment.title}: {experiment.question}\n" in shown


def test_the_menu_takes_all_by_default_and_speaks_chinese(runs, terminal, capsys):
    terminal("", "")
    assert main(["run", "--lang", "zh"]) == 1
    assert runs == [("reflow-nano", [*EXPERIMENTS], False)]
    assert "7  逐层演化: 预测从哪一层起已成定局？\n" in capsys.readouterr().out


def test_the_end_of_the_input_ends_the_menu(runs, terminal, capsys):
    terminal()

    def end(question):
        raise EOFError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.input", end)
        assert main(["run"]) == 130
    assert runs == []


def test_a_file_that_cannot_be_written_is_one_line(monkeypatch, capsys):
    def full(options):
        raise OSError(errno.ENOSPC, "No space left on device", "out/table.csv")

    monkeypatch.setattr("reflowlens.cli._parse", lambda arguments: Namespace(command=full))
    assert main([]) == 2
    assert capsys.readouterr().err == "error: out/table.csv: No space left on device\n"


@pytest.fixture
def console(monkeypatch):
    """Standard output as a given console takes it; returns what was written."""

    def of(encoding: str, errors: str = "strict"):
        written = io.BytesIO()
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding, errors))
        return written

    return of


def test_a_console_that_lacks_a_character_shows_its_escape(console, monkeypatch):
    def inspect(options):
        print("caf\u00e9 \u2248 \U0001f642")

    monkeypatch.setattr("reflowlens.cli._parse", lambda arguments: Namespace(command=inspect))
    written = console("cp1252")
    assert main([]) == 0
    assert written.getvalue().decode("cp1252").strip() == "caf\u00e9 \\u2248 \\U0001f642"
    written = console("cp1252", "replace")  # what PYTHONIOENCODING asks for is left as it is
    assert main([]) == 0
    assert written.getvalue().decode("cp1252").strip() == "caf\u00e9 ? ?"


def test_commands_run_on_a_console_that_lacks_characters(console, checkpoint):
    written = console("ascii")
    assert main(["inspect", "reflow-nano"]) == 0
    assert main(["sample", str(checkpoint), "\U0001f642", "--tokens", "1"]) == 0
    assert rb"\U0001f642" in written.getvalue()


def run_buffered(*arguments: str, stdout: int) -> tuple[int, str]:
    """Status and errors of a process of its own."""
    command = [sys.executable, "-m", "reflowlens.cli", *arguments]
    environment = os.environ | {"PYTHONUNBUFFERED": ""}
    done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment)
    return done.returncode, done.stderr


@pytest.fixture
def unread():
    """A pipe whose reader has gone."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


def test_output_that_nobody_reads_ends_a_process_silently(unread):
    assert run_buffered("--help", stdout=unread) == (141, "")


@pytest.mark.parametrize(
    "arguments",
    ["models", "inspect CHECKPOINT", "sample CHECKPOINT a --tokens 1", "train reflow_1_small --dry-run", "many lines"],
)
def test_output_that_nobody_reads_ends_every_command_silently(arguments, checkpoint, unread, monkeypatch, capsys):
    if arguments == "many lines":  # more than buffer and pipe take
        command = Namespace(command=lambda options: print("line\n" * 100_000))
        monkeypatch.setattr("reflowlens.cli._parse", lambda arguments: command)
    monkeypatch.setattr("sys.stdout", os.fdopen(unread, "w", encoding="utf8"))
    assert main(arguments.replace("CHECKPOINT", str(checkpoint)).split()) == 141
    sys.stdout.close()  # as the interpreter does at its end
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_output_on_a_full_disk_is_one_line():
    with open("/dev/full", "wb") as full:
        status = run_buffered("--help", stdout=full.fileno())
    assert status == (2, "error: cannot read or write: No space left on device\n")


@pytest.mark.parametrize("arguments", ["run all", "run reflow-nano", "run --quick 7"])
def test_a_run_that_is_told_something_does_not_ask(runs, terminal, arguments):
    left = terminal("never read")
    assert main(arguments.split()) == 1
    assert next(left) == "never read"


def test_ctrl_c_ends_a_run_with_130_and_a_report(checkpoint, tmp_path, monkeypatch, capsys):
    def interrupt(model, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(Experiment, "load", lambda self: interrupt)
    assert main(["run", str(checkpoint), "7", "--out", str(tmp_path / "out"), "--no-cache"]) == 130
    assert "interrupted before it was done" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "layer_evolution" in json.loads((tmp_path / "out" / "results.json").read_text())


def test_a_second_run_says_that_it_was_computed_before(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("REFLOWLENS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Experiment, "load", lambda self: lambda model, progress: Result(self.name, self.title))
    arguments = ["run", str(checkpoint), "7", "--out", str(tmp_path / "out")]
    for more, told in (([], False), ([], True), (["--no-cache"], False)):
        assert main([*arguments, *more]) == 0
        assert ("computed before: layer_evolution" in capsys.readouterr().err) == told


@pytest.mark.parametrize("arguments", ["run --fast", "run 5 --fast 7", "models reflow-nano"])
def test_arguments_that_do_not_exist(runs, arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments.split())
    assert stop.value.code == 2
    assert "unrecognized arguments" in capsys.readouterr().err
    assert runs == []


def test_a_device_that_is_not_there_is_one_line(checkpoint, capsys):
    assert main(["sample", str(checkpoint), "The", "--device", "gpu"]) == 2
    assert "cannot compute on device 'gpu'" in capsys.readouterr().err
