"""The command line: a thin layer that parses, calls one function and prints.

Each module adds its commands; heavy imports wait until one of them runs, so that ``reflowlens --help`` costs little.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from reflowlens.cli import (
    bench,
    console,
    dictionary,
    evaluation,
    examples,
    experiments,
    features,
    findings,
    graph,
    model_files,
    models,
    packing,
    training,
    units,
)
from reflowlens.errors import ReflowlensError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. Bad input is one line on stderr, without a traceback."""
    console.show_every_character()
    try:
        try:
            options = _parse(arguments)
            return options.command(options) or 0
        finally:
            console.flush()
    except ReflowlensError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head` has read enough
        console.drop_unwritten()
        return console.BROKEN_PIPE
    except OSError as error:  # a full disk, a folder that may not be written
        console.drop_unwritten()
        print(f"error: {error.filename or 'cannot read or write'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    if not rest:
        return options
    # argparse gives out all positional arguments at the first option: `run MODEL --quick 5 7` leaves 5 and 7 over.
    if options.command is not experiments.run or any(word.startswith("-") for word in rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    words = [*options.experiments, *rest]
    options.model, *options.experiments = words if options.model is None else [options.model, *words]
    return options


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command, in the order in which ``reflowlens --help`` lists them."""
    parser = argparse.ArgumentParser(
        prog="reflowlens",
        description="Language models whose predictions are sums over readable signals, and experiments that test it.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    of_models = experiments, models, training, evaluation, model_files, packing
    for module in (*of_models, dictionary, features, graph, units, findings, bench, examples):
        module.add_commands(commands)
    return parser
