"""``examples``: small files to try the other commands on."""

from __future__ import annotations

import argparse
from pathlib import Path

from reflowlens.cli.arguments import Commands, add_command


def add_commands(commands: Commands) -> None:
    parser = add_command(
        commands, "examples", _examples, "write small texts, chats, analogies and a configuration to try commands on"
    )
    parser.add_argument("folder", type=Path, help="folder to write; its README.md says what each file is")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace files of these names that hold something else"
    )


def _examples(options: argparse.Namespace) -> None:
    from reflowlens.examples import write_examples

    print(*write_examples(options.folder, overwrite=options.overwrite), sep="\n")
