"""What ``reflowlens dictionary train`` takes on the command line, and what it does with it."""

from __future__ import annotations

import argparse

from pretraining.stopping import INTERRUPTED
from reflowlens.errors import ReflowlensError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line of a run that trains dictionaries."""
    parser.add_argument("config", help="a TOML file, or the name of a shipped configuration, e.g. reflow_nano")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="TABLE.FIELD=VALUE",
        help="put a value in place of the configuration's, e.g. run.tokens=1_000_000 or, for every dictionary, "
        "dictionary.k=16; repeatable",
    )
    parser.add_argument("--resume", action="store_true", help="continue the run in run.out")


def run(options: argparse.Namespace) -> int | None:
    """Train.

    Returns:
        The exit status, where it is not 0: of a run that was stopped and saved, 130.

    Raises:
        ReflowlensError: the configuration or an option is not as it should be, or the run fails.
    """
    from pretraining.dictionaries.config import load_run
    from pretraining.distributed import is_first_process

    try:
        cfg = load_run(options.config, options.set)
    except ReflowlensError:
        if not is_first_process():  # all processes read the same: one says what is wrong
            raise SystemExit(1) from None
        raise
    from pretraining.dictionaries.train import train_dictionaries
    from reflowlens.dictionaries.files import dictionary_manifest

    folders = train_dictionaries(cfg, resume=options.resume, progress=True)
    if is_first_process():
        print(*folders, sep="\n")
    return INTERRUPTED if dictionary_manifest(folders[0])["step"] < cfg.run.steps else None
