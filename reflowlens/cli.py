"""The command line: a thin layer that parses, calls one function and prints. Heavy imports wait until needed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from reflowlens.errors import ReflowlensError

DEFAULT_MODEL = "reflow-nano"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. Bad input is one line on stderr, without a traceback."""
    options = _parse(arguments)
    try:
        return options.command(options) or 0
    except ReflowlensError as error:
        print(f"error: {error}", file=sys.stderr)
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
    if options.command is not _run or any(word.startswith("-") for word in rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.experiments = [*options.experiments, *rest]
    return options


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="reflowlens",
        description="Language models whose predictions are sums over readable signals, and experiments that test it.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_run(commands)
    _add_models(commands)
    _add_sample(commands)
    _add_prepare(commands)
    _add_train(commands)
    _add_evaluate(commands)
    _add_export(commands)
    _add_bench(commands)
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, summary: str
) -> argparse.ArgumentParser:
    return commands.add_parser(name, help=summary, description=summary, formatter_class=_Help)


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Tells a default where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        nothing = action.default is None or action.default is False or action.default == []
        return action.help if nothing else super()._get_help_string(action)


def _add_run(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(commands, "run", "run experiments on a model and write a report")
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, help="packaged name, checkpoint folder or file")
    parser.add_argument("experiments", nargs="*", default=[], help="numbers or names, e.g. 5 7 9 (default: all)")
    parser.add_argument("--out", type=Path, help="folder of the report (default: out/MODEL/DATE-TIME)")
    parser.add_argument("--analogies", type=Path, help="a questions-words file for experiment 5")
    parser.add_argument("--seed", type=int, default=0, help="of every random choice")
    parser.add_argument("--quick", action="store_true", help="fewer prompts and controls, for a first look")
    parser.add_argument("--device", default="cpu", help="where to compute, e.g. cuda")
    parser.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    from analyses.suite import EXPERIMENTS, parse_selection, run_suite
    from reflowlens.checkpoints import list_models, load_model, read_manifest

    model, experiments = options.model, options.experiments
    named = {"all", *(experiment.name for experiment in EXPERIMENTS.values())}
    # `reflowlens run 5 7` leaves out the model
    if model in named or (model[:1].isdigit() and not Path(model).exists() and model not in list_models()):
        model, experiments = DEFAULT_MODEL, [model, *experiments]
    selection = parse_selection(experiments or "all")
    run = run_suite(
        load_model(model, device=options.device),
        selection,
        out=options.out,
        seed=options.seed,
        quick=options.quick,
        analogies=options.analogies,
        model_name=Path(model).resolve().name if Path(model).exists() else model,
        manifest=read_manifest(model),
    )
    for name, error in run.errors.items():
        print(f"{name}: {error}", file=sys.stderr)
    print(run.report)
    return 1 if run.errors else 0


def _add_models(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(commands, "models", "list the packaged models and the presets")
    parser.set_defaults(command=_models)


def _models(options: argparse.Namespace) -> None:
    from reflowlens.checkpoints import list_models, read_manifest
    from reflowlens.config import PRESETS
    from reflowlens.models import build_model

    print("packaged models (load_model, reflowlens run)")
    for name in list_models():
        facts = read_manifest(name)
        print(f"  {name:20} {facts['tokens_seen'] / 1e6:6.1f}M tokens seen, validation loss {facts['val_loss']:.3f}")
    print("presets (build_model, [model] preset = ...)")
    for name in PRESETS:
        print(f"  {name:20} {build_model(name, device='meta').n_parameters:>13,} parameters")


def _add_sample(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(commands, "sample", "continue a prompt")
    parser.add_argument("model", help="packaged name, checkpoint folder or file")
    parser.add_argument("prompt", nargs="+", help="one or more prompts, each quoted")
    parser.add_argument("--tokens", type=int, default=60, help="how many to add")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the most probable token")
    parser.add_argument("--top-k", type=int, help="sample among the k most probable tokens")
    parser.add_argument("--top-p", type=float, help="sample among the fewest tokens that reach this probability")
    parser.add_argument("--seed", type=int, default=0, help="prompt i draws with seed + i")
    parser.add_argument("--device", default="cpu", help="where to compute, e.g. cuda")
    parser.set_defaults(command=_sample)


def _sample(options: argparse.Namespace) -> None:
    from reflowlens.checkpoints import load_model

    model = load_model(options.model, device=options.device)
    texts = model.generate(
        options.prompt,
        options.tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    )
    print("\n---\n".join(texts))


def _add_prepare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(commands, "prepare", "turn text into memory-mapped tokens")
    parser.add_argument(
        "sources", nargs="+", help="text or JSON-lines files (.xz and .gz too), folders, or a dataset's name"
    )
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument("--tokenizer", default="gpt2_16k", help="gpt2, gpt2_16k or bytes")
    parser.add_argument(
        "--val", nargs="+", metavar="SOURCE", help="validation sources (default: split off by document)"
    )
    parser.add_argument("--val-fraction", type=float, default=0.01, help="share of documents for validation")
    parser.add_argument("--separator", default="<|endoftext|>", help="line between documents of a text file")
    parser.add_argument("--text-field", default="text", help="field of JSON lines and datasets that holds the text")
    parser.add_argument("--workers", type=int, help="threads (default: one a core)")
    parser.add_argument("--seed", type=int, default=0, help="of the train/validation split")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that is already prepared")
    parser.set_defaults(command=_prepare)


def _prepare(options: argparse.Namespace) -> None:
    from pretraining.data import prepare

    manifest = prepare(
        options.sources,
        options.out,
        options.tokenizer,
        val_fraction=options.val_fraction,
        val_sources=options.val,
        separator=options.separator,
        workers=options.workers,
        seed=options.seed,
        text_field=options.text_field,
        overwrite=options.overwrite,
    )
    for name, split in manifest.splits.items():
        print(f"{name}: {split.tokens:,} tokens, {split.documents:,} documents")
    print(options.out)


def _add_train(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(commands, "train", "train a model (several processes: torchrun -m pretraining.train CONFIG)")
    parser.add_argument("config", type=Path, help="a TOML file, e.g. pretraining/configs/reflow_nano.toml")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint")
    parser.set_defaults(command=_train)


def _train(options: argparse.Namespace) -> None:
    from pretraining.train import load_config, train

    print(train(load_config(options.config), resume=options.resume))


def _add_evaluate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(commands, "evaluate", "validation loss of a model on prepared data")
    parser.add_argument("model", help="packaged name, checkpoint folder or file")
    parser.add_argument("data", type=Path, help="a folder made by prepare")
    parser.add_argument("--split", default="val", choices=["train", "val"])
    parser.add_argument("--device", default="cpu", help="where to compute, e.g. cuda")
    parser.set_defaults(command=_evaluate)


def _evaluate(options: argparse.Namespace) -> None:
    from pretraining.evaluate import evaluate_model
    from reflowlens.checkpoints import load_model

    result = evaluate_model(load_model(options.model, device=options.device), options.data, split=options.split)
    print(
        f"loss {result.loss:.4f} nats a token, perplexity {result.perplexity:.2f}, "
        f"{result.bits_per_byte:.4f} bits a byte, {result.tokens:,} tokens"
    )


def _add_export(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(commands, "export", "write a checkpoint's model alone, without the training state")
    parser.add_argument("model", help="packaged name, checkpoint folder or file")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"], help="of the weights")
    parser.set_defaults(command=_export)


def _export(options: argparse.Namespace) -> None:
    import torch

    from reflowlens.checkpoints import load_model, read_manifest, save_model

    facts = {k: v for k, v in read_manifest(options.model).items() if k not in ("format", "config", "weights_sha256")}
    print(save_model(options.out, load_model(options.model), facts, dtype=getattr(torch, options.dtype)))


def _add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(commands, "bench", "measure this machine, each figure a ratio taken side by side in one process")
    parser.add_argument("benchmark", nargs="?", default="all", choices=["all", "hooks", "decode"], help="which")
    parser.set_defaults(command=_bench)


def _bench(options: argparse.Namespace) -> None:
    from reflowlens.bench import run_benchmarks

    print(run_benchmarks(options.benchmark).to_string(index=False))


if __name__ == "__main__":
    sys.exit(main())
