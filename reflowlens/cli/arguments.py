"""What the commands share: how one is added, and the arguments that several of them take."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_command(
    commands: Commands, name: str, function: Callable[[argparse.Namespace], int | None], summary: str
) -> argparse.ArgumentParser:
    """The parser of a new command. Its function takes the options and returns the exit status, None for 0."""
    parser = commands.add_parser(name, help=summary, description=summary, formatter_class=_Help)
    parser.set_defaults(command=function)
    return parser


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="packaged name, checkpoint folder or file")


def add_device(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--device", default="cpu", help="where to compute, e.g. cuda")


def add_spreadsheet(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--spreadsheet",
        action="store_true",
        help="write CSV files for Excel and its kind: text that begins like a formula (= + - @) gets an apostrophe, so "
        "that no token is computed",
    )


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Tells a default where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        nothing = action.default is None or action.default is False or action.default == []
        return action.help if nothing else super()._get_help_string(action)
