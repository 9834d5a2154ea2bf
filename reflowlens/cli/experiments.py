"""``run`` and ``figures``: the experiments, and what they found as figures for a paper."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from reflowlens.cli.arguments import Commands, add_command, add_device, add_spreadsheet
from reflowlens.errors import ReflowlensError
from reflowlens.storage.atomic import sole_writer

DEFAULT_MODEL = "reflow-nano"


def add_commands(commands: Commands) -> None:
    _add_run(commands)
    _add_figures(commands)


def _add_run(commands: Commands) -> None:
    parser = add_command(commands, "run", run, "run experiments on a model and write a report")
    parser.epilog = (
        "Times: all experiments with reflow-nano take a minute and a half on two idle CPU cores, five on busy ones; "
        "--compare as long for every model, and for every view again. What each will take is said first, from timed "
        "passes of the model, then a line per experiment with the time left, on stderr. Ctrl-C keeps what is done, and "
        "the same command with --out FOLDER goes on from there. An experiment that needs what the model lacks is named "
        "with the reason in the report; the status is 0 where others have results and none broke."
    )
    parser.add_argument(
        "model",
        nargs="?",
        help=f"packaged name, checkpoint folder or file (default: {DEFAULT_MODEL}; asked on a terminal)",
    )
    parser.add_argument(
        "experiments",
        nargs="*",
        default=[],
        help="all, numbers or names, e.g. 5 7 9 (default: all; asked on a terminal)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of the report (default: out/MODEL/DATE-TIME); it keeps others, and what it has is not run again",
    )
    parser.add_argument("--analogies", type=Path, help="a questions-words file for experiment 5")
    parser.add_argument("--seed", type=int, default=0, help="of every random choice")
    parser.add_argument("--quick", action="store_true", help="fewer prompts and controls, for a first look")
    add_device(parser)
    parser.add_argument("--lang", default="en", choices=["en", "zh"], help="language of the report and the menu")
    parser.add_argument(
        "--compare",
        nargs="+",
        metavar="MODEL",
        help="a table of the model beside these instead of a report; 'untrained' "
        "is its own architecture at initialisation",
    )
    parser.add_argument(
        "--views",
        nargs="+",
        metavar="VIEW",
        help="of --compare: native, identity, svd, rotated, varimax, or a dictionary (default: native)",
    )
    add_spreadsheet(parser)
    parser.add_argument(
        "--budget",
        type=_seconds,
        metavar="TIME",
        help="what the run may take, such as 10m or 1.5h: experiments become quick where need be, the most expensive "
        "are left out last",
    )
    parser.add_argument("--again", action="store_true", help="run again what --out or an earlier run has finished")
    parser.add_argument(
        "--no-cache", action="store_true", help="compute anew what an earlier run has computed, and keep nothing"
    )


def _seconds(text: str) -> float:
    """A time such as 90s, 10m or 1.5h, in seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if found is None or not float(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r}: a time such as 90s, 10m or 1.5h was expected")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]


def run(options: argparse.Namespace) -> int:
    from analyses.runner.suite import run_suite
    from reflowlens.checkpoints import load_model, read_manifest

    model, selection = _chosen(options)
    if options.compare:
        return _compare(options, model, selection)
    if options.views:
        raise ReflowlensError("--views are the columns of a comparison: name a model to --compare with, e.g. untrained")
    done = run_suite(
        load_model(model, device=options.device),
        selection,
        out=options.out,
        seed=options.seed,
        quick=options.quick,
        analogies=options.analogies,
        model_name=Path(model).resolve().name if Path(model).exists() else model,
        manifest=read_manifest(model),
        lang=options.lang,
        cache=not options.no_cache,
        resume=not (options.again or options.no_cache),
        again=options.again,
        budget=options.budget,
        progress=True,
        spreadsheet=options.spreadsheet,
    )
    for name, error in done.errors.items():
        print(f"{name}: {error}", file=sys.stderr)
    if done.cached:
        before = ", ".join(name for name in done.results if name in done.cached)
        print(f"computed before: {before} (--again computes them anew)", file=sys.stderr)
    print(done.report)
    return 130 if done.interrupted else int(done.failed)


def _compare(options: argparse.Namespace, model: str, selection: list[int]) -> int:
    from analyses.runner.comparison import compare_models, write_comparison
    from analyses.runner.suite import make_folder

    if options.analogies:
        raise ReflowlensError("--analogies cannot be used with --compare, which takes those of the lexicon")
    if options.budget:
        raise ReflowlensError("--budget is of a report, not of a comparison: --quick makes one short")
    folder = make_folder(options.out, "comparison")
    with sole_writer(folder, "writing results into"):
        comparison = compare_models(
            [model, *options.compare],
            options.views or ["native"],
            selection,
            seed=options.seed,
            quick=options.quick,
            device=options.device,
            cache=not options.no_cache,
            progress=True,
        )
        failed = comparison[comparison["error"].ne("")]
        for row in failed.itertuples():
            print(f"{row.model} {row.view} {row.experiment}: {row.error}", file=sys.stderr)
        print(write_comparison(comparison, folder, lang=options.lang, spreadsheet=options.spreadsheet))
    return 1 if len(failed) == len(comparison) else 0


def _chosen(options: argparse.Namespace) -> tuple[str, list[int]]:
    """The model and the numbers of the experiments, asked for where a terminal is told neither."""
    from analyses.registry import EXPERIMENTS, parse_selection
    from analyses.report.messages import in_language
    from reflowlens.checkpoints import find_model, list_models

    model, experiments = options.model, options.experiments
    if model is None and not experiments and sys.stdin.isatty() and sys.stdout.isatty():
        from analyses.runner.menu import choose

        with in_language(options.lang):
            return choose(DEFAULT_MODEL, list_models(), find_model)
    model = model or DEFAULT_MODEL
    named = {"all", *(experiment.name for experiment in EXPERIMENTS.values())}
    # `reflowlens run 5 7` leaves out the model
    if model in named or (model[:1].isdigit() and not Path(model).exists() and model not in list_models()):
        model, experiments = DEFAULT_MODEL, [model, *experiments]
    return model, parse_selection(experiments or "all")


def _add_figures(commands: Commands) -> None:
    parser = add_command(
        commands, "figures", _figures, "write every figure of a run as PDF, SVG or PNG files for a paper or a talk"
    )
    parser.add_argument("folder", type=Path, metavar="RESULT_DIR", help="what run has written, or one experiment of it")
    parser.add_argument(
        "--format",
        nargs="+",
        default=["pdf"],
        choices=["pdf", "svg", "png", "html", "json"],
        help="one or several (the first three need Chrome or Chromium)",
    )
    parser.add_argument(
        "--width",
        default="screen",
        choices=["screen", "one", "two"],
        help="as on a page, or one or two columns of a journal (3.5 and 7.2 inches, without titles)",
    )
    parser.add_argument("--out", type=Path, help="folder to write (default: RESULT_DIR/figures)")


def _figures(options: argparse.Namespace) -> None:
    from analyses.runner.figure_files import export_figures

    formats = list(dict.fromkeys(options.format))
    paths = export_figures(options.folder, formats, out=options.out, width=options.width, progress=True)
    print(f"{len(paths)} files in {paths[0].parent if paths else options.folder}")
