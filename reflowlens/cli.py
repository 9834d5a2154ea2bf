"""The command line: a thin layer that parses, calls one function and prints. Heavy imports wait until needed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reflowlens.errors import ReflowlensError

if TYPE_CHECKING:
    from reflowlens.models.base import HookedModel

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
    words = [*options.experiments, *rest]
    options.model, *options.experiments = words if options.model is None else [options.model, *words]
    return options


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="reflowlens",
        description="Language models whose predictions are sums over readable signals, and experiments that test it.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_run(commands)
    _add_figures(commands)
    _add_models(commands)
    _add_sample(commands)
    _add_prepare(commands)
    _add_train(commands)
    _add_finetune(commands)
    _add_evaluate(commands)
    _add_export(commands)
    _add_import(commands)
    _add_inspect(commands)
    _add_units(commands)
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
    parser.add_argument("--out", type=Path, help="folder of the report (default: out/MODEL/DATE-TIME); it keeps others")
    parser.add_argument("--analogies", type=Path, help="a questions-words file for experiment 5")
    parser.add_argument("--seed", type=int, default=0, help="of every random choice")
    parser.add_argument("--quick", action="store_true", help="fewer prompts and controls, for a first look")
    parser.add_argument("--device", default="cpu", help="where to compute, e.g. cuda")
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
        help="of --compare: native, identity, svd, rotated, varimax (default: native)",
    )
    parser.add_argument("--no-cache", action="store_true", help="compute anew what an earlier run has computed")
    parser.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    from analyses.suite import run_suite
    from reflowlens.checkpoints import load_model, read_manifest

    model, selection = _chosen(options)
    if options.compare:
        return _compare(options, model, selection)
    if options.views:
        raise ReflowlensError("--views are the columns of a comparison: name a model to --compare with, e.g. untrained")
    run = run_suite(
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
    )
    for name, error in run.errors.items():
        print(f"{name}: {error}", file=sys.stderr)
    if run.cached:
        before = ", ".join(name for name in run.results if name in run.cached)
        print(f"computed before: {before} (--no-cache computes them anew)", file=sys.stderr)
    print(run.report)
    return 130 if run.interrupted else 1 if run.errors else 0


def _compare(options: argparse.Namespace, model: str, selection: list[int]) -> int:
    from analyses.comparison import compare_models, write_comparison
    from analyses.suite import make_folder

    if options.analogies:
        raise ReflowlensError("--analogies cannot be used with --compare, which takes those of the lexicon")
    comparison = compare_models(
        [model, *options.compare],
        options.views or ["native"],
        selection,
        seed=options.seed,
        quick=options.quick,
        device=options.device,
        cache=not options.no_cache,
        progress=sys.stderr.isatty(),
    )
    print(write_comparison(comparison, make_folder(options.out, "comparison"), lang=options.lang))
    return 0 if comparison["error"].eq("").any() else 1


def _chosen(options: argparse.Namespace) -> tuple[str, list[int]]:
    """The model and the numbers of the experiments, asked for where a terminal is told neither."""
    from analyses.messages import in_language
    from analyses.registry import EXPERIMENTS, parse_selection
    from reflowlens.checkpoints import find_model, list_models

    model, experiments = options.model, options.experiments
    if model is None and not experiments and sys.stdin.isatty() and sys.stdout.isatty():
        from analyses.menu import choose

        with in_language(options.lang):
            return choose(DEFAULT_MODEL, list_models(), find_model)
    model = model or DEFAULT_MODEL
    named = {"all", *(experiment.name for experiment in EXPERIMENTS.values())}
    # `reflowlens run 5 7` leaves out the model
    if model in named or (model[:1].isdigit() and not Path(model).exists() and model not in list_models()):
        model, experiments = DEFAULT_MODEL, [model, *experiments]
    return model, parse_selection(experiments or "all")


def _add_figures(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(commands, "figures", "write every figure of a run as PDF, SVG or PNG files for a paper or a talk")
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
    parser.set_defaults(command=_figures)


def _figures(options: argparse.Namespace) -> None:
    from analyses.figure_files import export_figures

    formats = list(dict.fromkeys(options.format))
    paths = export_figures(options.folder, formats, out=options.out, width=options.width, progress=sys.stderr.isatty())
    print(f"{len(paths)} files in {paths[0].parent if paths else options.folder}")


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
    parser.add_argument("--chat", action="store_true", help="answer each prompt as a question, after finetune on chats")
    parser.add_argument("--device", default="cpu", help="where to compute, e.g. cuda")
    parser.set_defaults(command=_sample)


def _sample(options: argparse.Namespace) -> None:
    from reflowlens.checkpoints import load_model

    model = load_model(options.model, device=options.device)
    settings = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p", "seed")}
    if options.chat:
        from pretraining.chat import chat, recorded_template

        texts = chat(model, recorded_template(options.model), options.prompt, options.tokens, **settings)
    else:
        texts = model.generate(options.prompt, options.tokens, **settings)
    print("\n---\n".join(texts))


def _add_prepare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(commands, "prepare", "turn text into memory-mapped tokens; continues an interrupted run")
    parser.add_argument(
        "sources",
        nargs="+",
        help="files (.txt, .jsonl, also .xz and .gz; .parquet, .arrow, .json), folders of them, or datasets of the "
        "hub: openwebtext, lima, tinystories, or any name",
    )
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument("--tokenizer", default="gpt2_16k", help="gpt2, gpt2_16k, bytes or a tokenizer.json")
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
    parser.set_defaults(command=_prepare)


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


def _add_train(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from pretraining.command import add_arguments, run

    parser = _command(commands, "train", "train a model (several processes: torchrun -m pretraining.train CONFIG)")
    add_arguments(parser)
    parser.set_defaults(command=run)


def _add_finetune(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(commands, "finetune", "teach a model to complete prompts or to answer in chats, from examples")
    parser.add_argument("model", help="packaged name, checkpoint folder or file")
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
    parser.add_argument("--device", default="cpu", help="where to compute, e.g. cuda")
    parser.set_defaults(command=_finetune)


def _finetune(options: argparse.Namespace) -> None:
    from pretraining.finetune import FinetuneConfig, finetune

    cfg = FinetuneConfig(
        epochs=options.epochs,
        learning_rate=options.lr,
        batch_size=options.batch_size,
        context=options.context,
        seed=options.seed,
        val_fraction=options.val_fraction,
        dtype=options.dtype,
    )
    tuned = finetune(options.model, options.data, options.out, cfg, val=options.val, device=options.device)
    if tuned.last.step < tuned.last.steps:
        print(f"stopped at step {tuned.last.step} of {tuned.last.steps}; saved in {tuned.folder}", file=sys.stderr)
        return
    print(f"held-out completion loss {tuned.val_losses[0]:.4f} -> {tuned.val_losses[-1]:.4f} nats a token")
    print(tuned.folder)


def _add_evaluate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(commands, "evaluate", "validation loss of a model on prepared data")
    parser.add_argument("model", help="packaged name, checkpoint folder or file")
    parser.add_argument("data", type=Path, help="a folder made by prepare")
    parser.add_argument(
        "--against",
        nargs="+",
        metavar="MODEL",
        help="a table of these beside the model: losses and differences a token, with intervals over documents "
        "(of a single text: over its blocks)",
    )
    parser.add_argument("--split", default="val", choices=["train", "val"])
    parser.add_argument("--device", default="cpu", help="where to compute, e.g. cuda")
    parser.set_defaults(command=_evaluate)


def _evaluate(options: argparse.Namespace) -> None:
    from pretraining.evaluate import evaluate_model
    from reflowlens.checkpoints import load_model

    if options.against:
        from pretraining.loss_comparison import compare_losses

        models = {name: load_model(name, device=options.device) for name in [options.model, *options.against]}
        frame = compare_losses(models, options.data, split=options.split)
        counts = dict.fromkeys(["parameters", "outside_embedding", "tokens", "units"], "{:,}".format)
        print(frame.to_string(index=False, na_rep="-", float_format="{:.4f}".format, formatters=counts))
        return
    result = evaluate_model(load_model(options.model, device=options.device), options.data, split=options.split)
    print(
        f"loss {result.loss:.4f} nats a token, perplexity {result.perplexity:.2f}, "
        f"{result.bits_per_byte:.4f} bits a byte, {result.tokens:,} tokens"
    )


def _add_export(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(commands, "export", "write a checkpoint's model alone, without the training state")
    parser.add_argument("model", help="packaged name, checkpoint folder or file")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument(
        "--format",
        default="reflowlens",
        choices=["reflowlens", "hf"],
        help="hf: a LlamaForCausalLM or GPT2LMHeadModel with its tokenizer, as transformers opens it",
    )
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"], help="of the weights")
    parser.set_defaults(command=_export)


def _export(options: argparse.Namespace) -> None:
    import torch

    from reflowlens.checkpoints import load_model, read_manifest, save_model

    model, dtype = load_model(options.model), getattr(torch, options.dtype)
    if options.format == "hf":
        from reflowlens.conversion import export_hf

        print(export_hf(model, options.out, dtype=dtype))
        return
    facts = {k: v for k, v in read_manifest(options.model).items() if k not in ("format", "config", "weights_sha256")}
    print(save_model(options.out, model, facts, dtype=dtype))


def _add_import(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(commands, "import", "make a checkpoint of a model that transformers or nanoGPT saved")
    parser.add_argument("source", type=Path, help="a transformers folder (GPT-2, Llama, Mistral, Qwen2), or a ckpt.pt")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument(
        "--from", dest="source_format", choices=["hf", "nanogpt"], help="default: hf for a folder, nanogpt for a file"
    )
    parser.add_argument("--tokenizer", help="gpt2, gpt2_16k, bytes or a tokenizer.json (default: the folder's; gpt2)")
    parser.add_argument(
        "--n-ctx", type=int, help="longest input to keep (default: the model's own, at most 4096 for hf)"
    )
    parser.add_argument("--n-heads", type=int, help="of a nanogpt file that does not say (default: heads 64 wide)")
    parser.add_argument("--topk", type=int, help="signals that each token keeps, of a nanogpt file that does not say")
    parser.add_argument(
        "--dtype", choices=["float32", "float16", "bfloat16"], help="of the weights (default: as stored)"
    )
    parser.set_defaults(command=_import)


def _import(options: argparse.Namespace) -> None:
    import torch

    from reflowlens.conversion import import_model

    names = ("tokenizer", "n_ctx", "n_heads", "topk")
    chosen = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    dtype = getattr(torch, options.dtype) if options.dtype else None
    print(import_model(options.source, options.out, options.source_format, dtype=dtype, **chosen))


def _add_inspect(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(commands, "inspect", "tell what any file or folder holds, without executing anything in it")
    parser.add_argument("path", help="packaged name, checkpoint, run, prepared data, or anything else")
    parser.add_argument("--against", metavar="OTHER", help="another model to compare the tensors with, by name")
    parser.add_argument("--tensors", action="store_true", help="a line for each tensor, layers not taken together")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.set_defaults(command=_inspect)


def _inspect(options: argparse.Namespace) -> int:
    from reflowlens.inspection import inspect_path

    found = inspect_path(options.path, against=options.against)
    print(found.to_json() if options.json else found.to_text(all_tensors=options.tensors))
    return 1 if found.problems else 0


def _add_units(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(commands, "units", "how often single units fire, how selective they are, and what they fire at")
    parser.add_argument("model", help="packaged name, checkpoint folder or file")
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
    parser.add_argument("--seed", type=int, default=0, help="of every random choice")
    parser.add_argument("--device", default="cpu", help="where to compute, e.g. cuda")
    parser.set_defaults(command=_units)


def _units(options: argparse.Namespace) -> None:
    from analyses import unit_statistics
    from analyses.unit_report import table, unit_report
    from reflowlens.checkpoints import load_model

    for name in ("batches", "batch_size", "context", "events", "top"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ReflowlensError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    model = load_model(options.model, device=options.device)
    text = _held_out(model, options.data)
    settings = {
        "sampling": options.sampling,
        "n_batches": options.batches,
        "batch_size": options.batch_size,
        "context": options.context or min(256, model.cfg.n_ctx),
        "minimum_events": options.events,
        "seed": options.seed,
        "progress": sys.stderr.isatty(),
    }
    if options.against:
        from analyses.unit_comparison import compare_units
        from reflowlens.models import build_model

        others = {
            name: build_model(model.cfg, seed=options.seed + 1, device=options.device)
            if name == "untrained"
            else load_model(name, device=options.device)
            for name in options.against
        }
        frame = compare_units({options.model: model, **others}, text, options.hook, **settings)
        print(table(frame))
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            frame.to_csv(options.out / "units.csv", index=False)
        return
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
        print(result.save(options.out))


def _held_out(model: HookedModel, path: Path) -> Any:
    """The text of a file, or the validation tokens of prepared data."""
    if path.is_dir():
        from pretraining.evaluate import tokens_for

        return tokens_for(model, path, "val").tokens[:]
    try:
        return path.read_text(encoding="utf8")
    except OSError as error:
        raise ReflowlensError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ReflowlensError(f"{path} is no UTF-8 text; prepare reads .xz, .gz, .jsonl and tables") from error


def _add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(commands, "bench", "measure this machine, each figure a ratio taken side by side in one process")
    parser.add_argument(
        "benchmark", nargs="?", default="all", choices=["all", "hooks", "decode", "sweep", "train"], help="which"
    )
    train = parser.add_argument_group("of train")
    train.add_argument("--preset", help="model's shape, e.g. reflow_1_small (default: reflow_nano on a CPU)")
    train.add_argument("--steps", type=int, default=10, help="timed steps of each variant")
    train.add_argument("--batch", type=int, default=16, help="examples a step")
    train.add_argument("--context", type=int, help="tokens of an example (default: n_ctx)")
    train.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"], help="of products")
    train.add_argument("--device", default="cpu", help="where to compute, e.g. cuda")
    train.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=None, help="torch.compile (default: on a GPU)"
    )
    parser.set_defaults(command=_bench)


def _bench(options: argparse.Namespace) -> None:
    from reflowlens.benchmarks import TrainBench, bench_sweep, bench_train, run_benchmarks

    if options.benchmark in ("all", "hooks", "decode"):
        print(run_benchmarks(options.benchmark).to_string(index=False))
    if options.benchmark in ("all", "sweep"):
        print(bench_sweep().to_string(index=False, na_rep="-"))
    if options.benchmark in ("all", "train"):
        fields = {name: getattr(options, name) for name in ("batch", "context", "dtype")}
        bench = TrainBench.named(options.preset, device=options.device, compiled=options.compile, **fields)
        print(bench_train(bench, steps=options.steps))


if __name__ == "__main__":
    sys.exit(main())
