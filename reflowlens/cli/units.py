"""``units``: when single units fire, in one model or in several side by side."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reflowlens.cli.arguments import Commands, add_command, add_device, add_model, add_spreadsheet
from reflowlens.errors import ReflowlensError

if TYPE_CHECKING:
    from reflowlens.models.base import HookedModel


def add_commands(commands: Commands) -> None:
    parser = add_command(
        commands, "units", _units, "how often single units fire, how selective they are, and what they fire at"
    )
    parser.epilog = (
        "Time, with reflow-nano on two CPU cores: about three minutes, of which four fifths are the controls, or 15 s "
        "with --quick --no-controls. Progress goes to stderr, off a terminal as lines with the time left."
    )
    add_model(parser)
    parser.add_argument(
        "--data", required=True, type=Path, metavar="TEXT", help="held-out text: a file, or a folder made by prepare"
    )
    parser.add_argument(
        "--hook",
        nargs="+",
        metavar="POINT",
        help="hook points, e.g. blocks.0.mlp.hook_post, or kinds at every level, e.g. xy_sparse, mlp_post, "
        "unembed_signal (default: what the architecture is made of)",
    )
    parser.add_argument(
        "--against",
        nargs="+",
        metavar="MODEL",
        help="a table of these beside the model instead, such as other steps or seeds: rates and their differences; "
        "'untrained' is its own architecture at initialisation",
    )
    parser.add_argument(
        "--sampling", default="windows", choices=["windows", "tiles"], help="random windows, or all of the text"
    )
    parser.add_argument("--batches", type=int, default=10, help="of random windows")
    parser.add_argument("--batch-size", type=int, default=8, help="windows read at once")
    parser.add_argument("--context", type=int, help="tokens of a window or tile (default: 256, or the model's n_ctx)")
    parser.add_argument("--events", type=int, default=20, help="positions at which a unit must fire to be ranked")
    parser.add_argument("--top", type=int, default=10, help="units of each kind whose strongest context is shown")
    parser.add_argument("--no-controls", action="store_true", help="leave out untrained models and shuffled text")
    parser.add_argument("--quick", action="store_true", help="two batches and one untrained model, for a first look")
    parser.add_argument("--out", type=Path, help="folder to keep tables and figures in (of --against: the table)")
    add_spreadsheet(parser)
    parser.add_argument("--seed", type=int, default=0, help="of every random choice")
    add_device(parser)


def _units(options: argparse.Namespace) -> None:
    from reflowlens.checkpoints import load_model
    from reflowlens.storage.folders import check_makeable

    if options.out:
        check_makeable(options.out)  # before minutes are spent
    for name in ("batches", "batch_size", "context", "events", "top"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ReflowlensError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    model = load_model(options.model, device=options.device)
    text = _held_out(model, options.data)
    settings: dict[str, Any] = {
        "sampling": options.sampling,
        "n_batches": options.batches,
        "batch_size": options.batch_size,
        "context": options.context or min(256, model.cfg.n_ctx),
        "minimum_events": options.events,
        "seed": options.seed,
        "progress": True,
    }
    report = _compare if options.against else _describe
    report(options, model, text, settings)


def _describe(options: argparse.Namespace, model: HookedModel, text: Any, settings: dict[str, Any]) -> None:
    from analyses import unit_statistics
    from analyses.units.terminal import unit_report

    result = unit_statistics(
        model,
        text,
        options.hook,
        top=options.top,
        controls=not options.no_controls,
        quick=options.quick,
        **settings,
    )
    print(unit_report(result, top=options.top))
    if options.out:
        print(result.save(options.out, spreadsheet=options.spreadsheet))


def _compare(options: argparse.Namespace, model: HookedModel, text: Any, settings: dict[str, Any]) -> None:
    from analyses.controls.nulls import untrained_model
    from analyses.result.spreadsheets import guarded
    from analyses.units.comparison import compare_units
    from analyses.units.terminal import table
    from reflowlens.checkpoints import load_model

    for name in ("quick", "no_controls"):
        if getattr(options, name):
            raise ReflowlensError(f"--{name.replace('_', '-')} is not for --against, which has no controls of its own")
    names = [options.model, *options.against]
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise ReflowlensError(f"--against: {twice[0]} is given twice, and a model is compared with others")
    others = {
        name: untrained_model(model, options.seed) if name == "untrained" else load_model(name, device=options.device)
        for name in options.against
    }
    frame = compare_units({options.model: model, **others}, text, options.hook, **settings)
    print(table(frame))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (guarded(frame) if options.spreadsheet else frame).to_csv(options.out / "units.csv", index=False)


def _held_out(model: HookedModel, path: Path) -> Any:
    """The text of a file, or the validation tokens of prepared data."""
    if path.is_dir():
        from pretraining.evaluate import tokens_for

        return tokens_for(model, path, "val").tokens[:]
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ReflowlensError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ReflowlensError(f"{path} is no UTF-8 text; prepare reads .xz, .gz, .jsonl and tables") from error
