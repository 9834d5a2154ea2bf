"""What ``reflowlens train``, ``distill`` and ``study``, and the modules that torchrun starts, take and do."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from pretraining.stopping import INTERRUPTED
from reflowlens.errors import ReflowlensError


def start(
    description: str,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    run: Callable[[argparse.Namespace], int | None],
    arguments: Sequence[str] | None,
) -> None:
    """What torchrun starts: a command that ends with one line where it fails or is interrupted."""
    parser = argparse.ArgumentParser(description=description)
    add_arguments(parser)
    try:
        status = run(parser.parse_args(arguments))
    except ReflowlensError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = INTERRUPTED
    if status:
        sys.exit(status)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line of a training run."""
    parser.add_argument("config", help="a TOML file, or the name of a shipped configuration, e.g. reflow_1_small")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="TABLE.FIELD=VALUE",
        help="put a value in place of the configuration's, e.g. run.steps=100; repeatable, recorded in checkpoints",
    )
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint")
    parser.add_argument("--dry-run", action="store_true", help="print what the run would cost and stop")
    plan = parser.add_argument_group("with --dry-run")
    plan.add_argument("--gpus", type=int, metavar="N", help="how many share the run (default: 1)")
    plan.add_argument("--rate", type=float, metavar="TOKENS/S", help="how fast all of them together train")
    plan.add_argument("--flops", metavar="FLOP/S", help="peak of one of them, or its name: 312e12, A100")
    plan.add_argument("--mfu", type=float, metavar="SHARE", help="share of the peak that is reached (default: 0.4)")


def add_distillation_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line of a student's training run."""
    parser.add_argument("teacher", help="a packaged model, a checkpoint's folder or a file")
    add_arguments(parser)


def run_distillation(options: argparse.Namespace) -> int | None:
    """Train a student as :func:`run` trains a model, with its exit status; a dry run counts the student alone.

    Raises:
        ReflowlensError: as of :func:`run`, or the teacher does not fit the student.
    """
    options.set.append(f"distillation.teacher={options.teacher}")
    return run(options)


def add_study_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line of a study."""
    parser.add_argument("study", help="a TOML file, or the name of a shipped study, e.g. refiners")
    parser.add_argument("--config", help="train this configuration instead of the study's")
    parser.add_argument("--arm", action="append", default=[], metavar="NAME", help="this arm alone; repeatable")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--seeds", type=int, metavar="N", help="train each arm with this many seeds, 0 to N - 1")
    which.add_argument("--seed", type=int, action="append", metavar="N", help="this seed alone; repeatable")
    parser.add_argument("--out", metavar="FOLDER", help="write all runs here")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="TABLE.FIELD=VALUE",
        help="put a value in place of the configuration's, in every run; repeatable",
    )
    parser.add_argument(
        "--list", action="store_true", help="print what there is of each of these runs, and train nothing"
    )


def run_study(options: argparse.Namespace) -> None:
    """Train a study, or with ``--list`` say how far it is; then the held-out loss of every arm over its seeds.

    Raises:
        ReflowlensError: the study or an option is not as it should be, or a run fails.
    """
    from pretraining.study import by_arm, load_study, table, train_study, write_table

    runs = load_study(
        options.study,
        config=options.config,
        arms=options.arm,
        seeds=options.seed if options.seeds is None else options.seeds,
        out=options.out,
        settings=options.set,
    )
    if options.list:
        found = table(runs)
        shown = found[["arm", "seed", "complete", "step", "tokens", "val_loss", "seconds"]]
        print(shown.to_string(index=False, float_format="{:.4f}".format))
    else:
        found = train_study(runs, progress=True)
        print(write_table(runs))
    if found.complete.any():
        print(by_arm(found).to_string(float_format="{:.4f}".format))


def run(options: argparse.Namespace) -> int | None:
    """Train, or with ``--dry-run`` print what that would cost.

    Returns:
        The exit status, where it is not 0: of a run that was stopped and saved, 130.

    Raises:
        ReflowlensError: the configuration or an option is not as it should be, or the run fails.
    """
    from pretraining.config import load_config
    from pretraining.distributed import is_first_process

    plan = {name: getattr(options, name) for name in ("gpus", "rate", "flops", "mfu")}
    given = [f"--{name}" for name, value in plan.items() if value is not None]
    try:
        if given and not options.dry_run:
            raise ReflowlensError(f"{given[0]} is for --dry-run, which prints what a run would cost")
        cfg = load_config(options.config, options.set)
    except ReflowlensError:
        if not is_first_process():  # all processes read the same: one says what is wrong
            raise SystemExit(1) from None
        raise
    if options.dry_run:
        from pretraining.estimate import estimate

        print(estimate(cfg, **{name: value for name, value in plan.items() if value is not None}))
        return None
    from pretraining.state import is_last
    from pretraining.train import train

    folder = train(cfg, resume=options.resume, progress=True)
    if is_first_process():
        print(folder)
    return None if is_last(folder, cfg) else INTERRUPTED
