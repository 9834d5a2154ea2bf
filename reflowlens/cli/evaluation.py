"""``evaluate``: the loss of models on prepared data, their bits per byte of any text, or how well they do tasks."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reflowlens.cli.arguments import Commands, add_command, add_device, add_model
from reflowlens.errors import ReflowlensError

if TYPE_CHECKING:
    import pandas as pd

    from reflowlens.models.base import HookedModel

_TASKS = {"last_word": "last_words", "minimal_pairs": "minimal_pairs", "multiple_choice": "multiple_choice"}
_OF_BITS = ("window", "stride", "score_first_ttt", "max_documents")


def add_commands(commands: Commands) -> None:
    parser = add_command(
        commands,
        "evaluate",
        _evaluate,
        "validation loss of models, bits per byte of a text, or accuracy at last words, minimal pairs, multiple choice",
    )
    add_model(parser)
    parser.add_argument(
        "data",
        type=Path,
        help="a folder made by prepare; of --bits-per-byte and --last-word also a file of text; of --minimal-pairs and "
        "--multiple-choice a file of JSON lines",
    )
    parser.add_argument(
        "--against",
        nargs="+",
        default=[],
        metavar="MODEL",
        help="a table of these beside the model: losses and differences, with intervals over documents (of few: over "
        "their parts)",
    )
    parser.add_argument("--split", default="val", choices=["train", "val"], help="of a prepared folder")
    measures = parser.add_mutually_exclusive_group()
    measures.add_argument(
        "--bits-per-byte",
        action="store_true",
        help="each document by itself, every byte once, whatever the models' tokenizers",
    )
    measures.add_argument(
        "--last-word", action="store_true", help="how often the last word of each document is the likeliest (LAMBADA)"
    )
    measures.add_argument(
        "--minimal-pairs",
        action="store_true",
        help="how often the acceptable text of a pair is the likelier one (BLiMP); lines with good, bad and perhaps "
        "group, or BLiMP's own",
    )
    measures.add_argument(
        "--multiple-choice",
        action="store_true",
        help="how often the right answer is the likeliest; lines with question, choices, answer (its number, from 0, "
        "or its text) and perhaps group",
    )
    parser.add_argument(
        "--window", type=int, metavar="N", help="of bits per byte: tokens read at once (default: n_ctx)"
    )
    parser.add_argument(
        "--stride", type=int, metavar="N", help="of bits per byte: tokens that a window moves on (default: the window)"
    )
    parser.add_argument(
        "--score-first-ttt",
        action="store_true",
        help="of bits per byte: a copy of the model learns from each 32,768 tokens after it has scored them",
    )
    parser.add_argument(
        "--max-documents", type=int, metavar="N", help="of all but losses: the first N (pairs, questions)"
    )
    add_device(parser)


def _evaluate(options: argparse.Namespace) -> None:
    from reflowlens.checkpoints import load_model

    task = next((name for name in _TASKS if getattr(options, name)), None)
    other = () if options.bits_per_byte else _OF_BITS[:3] if task else _OF_BITS
    for name in other:
        if getattr(options, name):
            raise ReflowlensError(f"--{name.replace('_', '-')} goes with --bits-per-byte")
    names = dict.fromkeys([options.model, *options.against])
    models = {name: load_model(name, device=options.device) for name in names}
    if options.bits_per_byte:
        from pretraining.bits_per_byte import ScoreFirst, bits_per_byte

        _show(
            bits_per_byte(
                models,
                _texts(options),
                window=options.window,
                stride=options.stride,
                learning=ScoreFirst() if options.score_first_ttt else None,
                progress=True,
            )
        )
    elif task is not None:
        _show(_accuracies(models, task, options))
    elif options.against:
        from pretraining.loss_comparison import compare_losses

        _show(compare_losses(models, options.data, split=options.split, progress=True))
    else:
        _one_loss(models[options.model], options)


def _accuracies(models: Mapping[str, HookedModel], task: str, options: argparse.Namespace) -> pd.DataFrame:
    """A row a model and accuracy, beside its controls."""
    import pandas as pd

    from analyses.tasks import comparisons

    items = list(_texts(options)) if task == "last_word" else _lines(options)
    measure = getattr(comparisons, _TASKS[task])
    rows = []
    for name, model in models.items():
        result = measure(model, items, progress=True)
        for metric, finding in result.findings.items():
            low, high = finding.interval
            row = {"model": name, "metric": metric, "value": finding.value, "low": low, "high": high}
            rows.append({**row, **finding.controls, "items": len(items)})
    return pd.DataFrame(rows)


def _lines(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines."""
    import json

    try:
        lines = options.data.read_text(encoding="utf-8-sig").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ReflowlensError(f"{options.data} is no file of JSON lines that can be read: {error}") from error
    return rows[: _at_most(options)]


def _at_most(options: argparse.Namespace) -> int | None:
    if options.max_documents is not None and options.max_documents < 1:
        raise ReflowlensError(f"--max-documents must be at least 1, got {options.max_documents}")
    return options.max_documents


def _one_loss(model: HookedModel, options: argparse.Namespace) -> None:
    from pretraining.evaluate import evaluate_model

    result = evaluate_model(model, options.data, split=options.split, progress=True)
    print(
        f"loss {result.loss:.4f} nats a token, perplexity {result.perplexity:.2f}, "
        f"{result.bits_per_byte:.4f} bits a byte, {result.tokens:,} tokens"
    )


def _show(frame: pd.DataFrame) -> None:
    names = ["parameters", "outside_embedding", "tokens", "units", "documents", "bytes", "items"]
    counts = {name: "{:,}".format for name in names if name in frame}
    print(frame.to_string(index=False, na_rep="-", float_format="{:.4f}".format, formatters=counts))


def _texts(options: argparse.Namespace) -> Iterator[str]:
    """The documents of a file of text, or of a split of prepared data."""
    import itertools

    from pretraining.texts import documents_of

    yield from itertools.islice(documents_of(options.data, options.split), _at_most(options))
