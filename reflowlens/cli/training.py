"""``prepare``, ``train``, ``distill``, ``study`` and ``finetune``: from text to a model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from reflowlens.cli.arguments import Commands, add_command, add_device, add_model


def add_commands(commands: Commands) -> None:
    _add_prepare(commands)
    _add_train(commands)
    _add_distill(commands)
    _add_study(commands)
    _add_finetune(commands)


def _add_prepare(commands: Commands) -> None:
    parser = add_command(
        commands, "prepare", _prepare, "turn text into memory-mapped tokens; continues an interrupted run"
    )
    parser.add_argument(
        "sources",
        nargs="+",
        help="files (.txt, .jsonl, also .xz and .gz; .parquet, .arrow, .json), folders of them, or datasets of the "
        "hub: openwebtext, lima, tinystories, or any name",
    )
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument("--tokenizer", default="gpt2_16k", help="gpt2, gpt2_16k, gpt2_1k, bytes or a tokenizer.json")
    parser.add_argument(
        "--val", nargs="+", metavar="SOURCE", help="validation sources (default: split off by document)"
    )
    parser.add_argument("--val-split", metavar="NAME", help="which split validates: of --val, else of the sources")
    parser.add_argument("--val-fraction", type=float, default=0.01, help="share of documents for validation")
    parser.add_argument("--split", default="train", metavar="NAME", help="which split of folders and datasets to read")
    parser.add_argument("--config", metavar="NAME", help="which configuration (subset) of folders and datasets")
    parser.add_argument("--revision", help="commit, branch or tag of datasets (default: the newest)")
    parser.add_argument(
        "--text-field",
        metavar="NAME",
        help="field of tables and JSON lines that holds the text, or a list of turns (default: text; of lima its own)",
    )
    parser.add_argument("--separator", default="<|endoftext|>", help="line between documents of a text file")
    parser.add_argument("--max-documents", type=int, metavar="N", help="read no more, validation share included")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="write no more, validation share included")
    parser.add_argument("--workers", type=int, help="processes (default: one a core)")
    parser.add_argument("--seed", type=int, default=0, help="of the train/validation split")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that is already prepared")


def _prepare(options: argparse.Namespace) -> None:
    from pretraining.data import prepare

    manifest = prepare(
        options.sources,
        options.out,
        options.tokenizer,
        val_fraction=options.val_fraction,
        val_sources=options.val,
        val_split=options.val_split,
        separator=options.separator,
        text_field=options.text_field,
        split=options.split,
        config=options.config,
        revision=options.revision,
        max_documents=options.max_documents,
        max_tokens=options.max_tokens,
        workers=options.workers,
        seed=options.seed,
        overwrite=options.overwrite,
    )
    for name, split in manifest.splits.items():
        n = sum(source.documents > 0 and source.role in (name, "both") for source in manifest.sources)
        print(f"{name}: {split.tokens:,} tokens, {split.documents:,} documents of {n} file{'s' if n > 1 else ''}")
    print(options.out)


def _add_train(commands: Commands) -> None:
    from pretraining.command import add_arguments, run

    parser = add_command(
        commands, "train", run, "train a model (several processes: torchrun -m pretraining.train CONFIG)"
    )
    add_arguments(parser)


def _add_distill(commands: Commands) -> None:
    from pretraining.command import add_distillation_arguments, run_distillation

    parser = add_command(
        commands,
        "distill",
        run_distillation,
        "train a student with a teacher (several processes: torchrun -m pretraining.distillation TEACHER CONFIG)",
    )
    add_distillation_arguments(parser)


def _add_study(commands: Commands) -> None:
    from pretraining.command import add_study_arguments, run_study

    parser = add_command(
        commands, "study", run_study, "train a configuration in several arms over seeds; goes on where it stopped"
    )
    add_study_arguments(parser)


def _add_finetune(commands: Commands) -> None:
    parser = add_command(
        commands, "finetune", _finetune, "teach a model to complete prompts or to answer in chats, from examples"
    )
    add_model(parser)
    parser.add_argument(
        "data", nargs="+", type=Path, help="JSON-lines files (.xz and .gz too): prompt and completion, or messages"
    )
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument("--val", nargs="+", type=Path, default=[], metavar="FILE", help="files to validate on")
    parser.add_argument(
        "--val-fraction", type=float, default=0.05, help="share of prompts held out if no --val is given"
    )
    parser.add_argument("--epochs", type=int, default=3, help="passes over the examples")
    parser.add_argument("--lr", type=float, default=1e-4, help="peak learning rate; 3e-4 suits reflow-nano")
    parser.add_argument("--batch-size", type=int, default=16, help="rows a step, each packed with examples")
    parser.add_argument("--context", type=int, help="tokens of a row; longer examples are left out (default: n_ctx)")
    parser.add_argument("--seed", type=int, default=0, help="of the split and the order")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of matrix products")
    add_device(parser)


def _finetune(options: argparse.Namespace) -> int | None:
    from pretraining.finetune import FinetuneConfig, finetune
    from pretraining.stopping import INTERRUPTED

    cfg = FinetuneConfig(
        epochs=options.epochs,
        learning_rate=options.lr,
        batch_size=options.batch_size,
        context=options.context,
        seed=options.seed,
        val_fraction=options.val_fraction,
        dtype=options.dtype,
    )
    tuned = finetune(
        options.model, options.data, options.out, cfg, val=options.val, device=options.device, progress=True
    )
    if tuned.last.step < tuned.last.steps:
        print(f"stopped at step {tuned.last.step} of {tuned.last.steps}; saved in {tuned.folder}", file=sys.stderr)
        return INTERRUPTED
    print(f"held-out completion loss {tuned.val_losses[0]:.4f} -> {tuned.val_losses[-1]:.4f} nats a token")
    print(tuned.folder)
    return None
