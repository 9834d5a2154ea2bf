"""``findings``: the open questions about signals, asked of trained runs or of a model."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reflowlens.cli.arguments import Commands, add_command, add_spreadsheet
from reflowlens.errors import ReflowlensError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from analyses.result.result import Result

_OPTIONS = {
    "study": "--runs",
    "model": "--model",
    "dictionaries": "--dictionary",
    "texts": "--data",
    "teacher": "--teacher",
    "models": "--against",
    "arm": "--arm",
}
"""A question's argument -> the option that gives it."""


def add_commands(commands: Commands) -> None:
    parser = add_command(
        commands,
        "findings",
        _findings,
        "an open question about signals, answered from trained runs, with controls",
    )
    parser.epilog = (
        "What is measured of a run is kept in RUNS/measured and not measured again. Without a question: what there is."
    )
    parser.add_argument("question", nargs="?", help="what is asked; none lists the questions")
    parser.add_argument("--runs", type=Path, metavar="FOLDER", help="what `reflowlens study` wrote")
    parser.add_argument("--model", help="packaged name, checkpoint folder or file, of a question about one model")
    parser.add_argument("--dictionary", nargs="+", metavar="D", help="dictionaries, by packaged name or folder")
    parser.add_argument("--data", type=Path, metavar="TEXT", help="held-out text")
    parser.add_argument("--teacher", metavar="MODEL", help="whom the students were distilled from")
    parser.add_argument("--against", nargs="+", metavar="MODEL", help="models to put beside the runs")
    parser.add_argument("--arm", help="of which arm, where a question is of one")
    parser.add_argument("--full", action="store_true", help="experiments in their full form, three times as long")
    parser.add_argument("--out", type=Path, help="folder to keep tables and figures in")
    add_spreadsheet(parser)


def _findings(options: argparse.Namespace) -> None:
    from analyses.findings import QUESTIONS, question
    from reflowlens.storage.folders import check_makeable

    if options.question is None:
        for name in QUESTIONS:
            print(f"{name}: {(question(name).__doc__ or '').strip().splitlines()[0]}")
        return
    if options.out:
        check_makeable(options.out)  # before minutes are spent
    ask = question(options.question)
    result: Result = ask(**_arguments(ask, options), quick=not options.full)
    print(_told(result))
    if options.out:
        print(result.save(options.out, spreadsheet=options.spreadsheet))


def _arguments(ask: Callable[..., Result], options: argparse.Namespace) -> dict[str, Any]:
    """What a question takes of the options.

    Raises:
        ReflowlensError: it lacks one, or one is given that it does not take.
    """
    takes = inspect.signature(ask).parameters
    given = {name: getattr(options, option.strip("-")) for name, option in _OPTIONS.items()}
    for name, value in given.items():
        option = _OPTIONS[name]
        if value is not None and name not in takes:
            raise ReflowlensError(f"{options.question} does not take {option}; it takes {_taken(takes)}")
        if value is None and name in takes and takes[name].default is inspect.Parameter.empty:
            raise ReflowlensError(f"{options.question} needs {option}; it takes {_taken(takes)}")
    return {name: _loaded(name, value) for name, value in given.items() if value is not None}


def _taken(takes: Mapping[str, inspect.Parameter]) -> str:
    return ", ".join(option for name, option in _OPTIONS.items() if name in takes)


def _loaded(name: str, value: Any) -> Any:
    """A model for its name, documents for a file of text; everything else as it was given."""
    from reflowlens.checkpoints import load_model

    if name in ("model", "teacher"):
        return load_model(value)
    if name == "texts":
        from pretraining.texts import documents_of

        return list(documents_of(value))
    if name == "models":
        return {each: load_model(each) for each in value}
    return value


def _told(result: Result) -> str:
    """A line a metric: its value with the interval and controls, and what follows."""
    lines = [result.title]
    for metric, finding in result.findings.items():
        low_high = "" if finding.interval is None else f" ({finding.interval[0]:.4g} to {finding.interval[1]:.4g})"
        controls = "".join(f", {name} {value:.4g}" for name, value in finding.controls.items())
        verdict = f": {finding.verdict}" if finding.verdict else ""
        lines.append(f"  {metric} {finding.value:.4g}{low_high}{controls}{verdict}")
    return "\n".join([*lines, *(f"  {note}" for note in result.notes)])
