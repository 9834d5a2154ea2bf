"""``dictionary``: autoencoders and transcoders; a command of its own for each thing that is done with them."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from reflowlens.cli.arguments import Commands, add_command, add_device
from reflowlens.cli.dictionary_evaluation import add_evaluate
from reflowlens.errors import ReflowlensError

if TYPE_CHECKING:
    from reflowlens.dictionaries.dictionary import Dictionary
    from reflowlens.dictionaries.thresholds import Activations

EXAMPLES = """examples:
  reflowlens dictionary list
  reflowlens dictionary train reflow_nano --set run.out=out/dictionaries
  reflowlens dictionary evaluate reflow-nano-plt --data data/mix16k --against out/nulls/frozen-decoder
  reflowlens dictionary export out/dictionaries/reflow-nano-plt small --bits 4.2 --model reflow-nano --data data/mix16k
  reflowlens dictionary export reflow-nano-plt plt --format circuit-tracer --model reflow-nano --data data/mix16k
  reflowlens dictionary import plt mine --from circuit-tracer --model reflow-nano
"""


def add_commands(commands: Commands) -> None:
    parser = commands.add_parser(
        "dictionary",
        help="sparse autoencoders and transcoders: list, train, evaluate, export, import",
        description="Sparse autoencoders and transcoders of a model's activations.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_command(actions, "list", _list, "the packaged dictionaries, and any others named").add_argument(
        "others", nargs="*", metavar="FOLDER", help="further dictionaries, or folders of them"
    )
    _add_train(actions)
    _add_export(actions)
    _add_import(actions)
    add_evaluate(actions)


def _list(options: argparse.Namespace) -> None:
    from reflowlens.dictionaries.files import list_dictionaries
    from reflowlens.dictionaries.listing import found_in, table

    print(table([*list_dictionaries(), *(path for folder in options.others for path in found_in(folder))]))


def _add_train(commands: Commands) -> None:
    from pretraining.dictionaries.command import add_arguments, run

    parser = add_command(
        commands,
        "train",
        run,
        "train dictionaries on prepared text (several processes: torchrun -m pretraining.dictionaries.train CONFIG)",
    )
    add_arguments(parser)


def _add_export(commands: Commands) -> None:
    parser = add_command(commands, "export", _export, "write a dictionary, packed or in the layout of another library")
    _add_dictionary(parser)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--format", default="reflowlens", choices=["reflowlens", "circuit-tracer", "sae-lens"])
    parser.add_argument(
        "--bits",
        type=float,
        help="of reflowlens: pack each weight in about so many bits, from 1 to 8; 4.3 loses little",
    )
    parser.add_argument(
        "--model",
        help="its model: by its activations a TopK dictionary gets thresholds for another library, and a packed one "
        "its errors where they matter least",
    )
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="text for that, made by prepare: its training part")
    parser.add_argument("--tokens", type=int, default=16_384, help="how many of it")
    add_device(parser)


def _export(options: argparse.Namespace) -> None:
    from reflowlens.conversion.circuit_tracer import export_circuit_tracer
    from reflowlens.conversion.sae_lens import export_sae_lens
    from reflowlens.dictionaries.files import dictionary_manifest, load_dictionary, save_dictionary
    from reflowlens.dictionaries.thresholds import with_thresholds

    if (options.model is None) != (options.data is None):
        raise ReflowlensError("--model and --data go together: they are the activations to go by")
    dictionary = load_dictionary(options.dictionary)
    if options.format == "reflowlens":
        reads = _activations(dictionary, options).reads if options.model else None
        manifest = dictionary_manifest(options.dictionary)
        print(save_dictionary(options.out, dictionary, manifest, bits=options.bits, reads=reads))
        return
    if options.bits is not None:
        raise ReflowlensError(
            f"--bits packs a dictionary of reflowlens, and {options.format} reads none that is packed"
        )
    export = export_circuit_tracer if options.format == "circuit-tracer" else export_sae_lens
    if options.model is None:
        print(export(dictionary, options.out))
        return
    dictionary, cost = with_thresholds(dictionary, _activations(dictionary, options))
    for name in ("l0", "fvu"):
        topk, thresholds = (statistics.mean(cost[f"{name}_{of}"]) for of in ("topk", "thresholds"))
        print(f"{name.upper()}: top-k {topk:.4g}, thresholds {thresholds:.4g} ({cost['positions']:,} other positions)")
    print(export(dictionary, options.out, {"thresholds": cost}))


def _activations(dictionary: Dictionary, options: argparse.Namespace) -> Activations:
    """Of the model, on rows of the training part of prepared text: what is held out stays so."""
    from pretraining.batches import spread_batches
    from pretraining.evaluate import tokens_for
    from reflowlens.checkpoints import load_model
    from reflowlens.dictionaries.thresholds import activations_of

    if options.tokens < 1:
        raise ReflowlensError(f"--tokens must be at least 1, got {options.tokens}")
    model = load_model(options.model, device=options.device)
    tokens = tokens_for(model, options.data, "train").tokens
    rows = spread_batches(tokens, 8, min(model.cfg.n_ctx, 256), options.tokens)
    return activations_of(dictionary, model, (x.to(options.device) for x, _ in rows))


def _add_import(commands: Commands) -> None:
    parser = add_command(commands, "import", _import, "make a dictionary of what another library's layout holds")
    parser.add_argument("source", type=Path, help="its folder; of sae-lens one layer's, or a folder of such")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--from", dest="layout", required=True, choices=["circuit-tracer", "sae-lens"])
    parser.add_argument("--model", help="the model that it is for: recorded, once its hook points and widths are there")
    parser.add_argument(
        "--reads", metavar="HOOK", help="of circuit-tracer: what a block reads, e.g. ln2.hook_normalized"
    )
    parser.add_argument("--writes", metavar="HOOK", help="of circuit-tracer: what a block writes, e.g. hook_mlp_out")


def _import(options: argparse.Namespace) -> None:
    from reflowlens.conversion.circuit_tracer import import_circuit_tracer
    from reflowlens.conversion.sae_lens import import_sae_lens
    from reflowlens.dictionaries.files import save_dictionary

    if options.layout == "circuit-tracer":
        dictionary = import_circuit_tracer(options.source, input_hook=options.reads, output_hook=options.writes)
    elif options.reads or options.writes:
        raise ReflowlensError(
            "--reads and --writes are for circuit-tracer: sae-lens names the hook points of each layer"
        )
    else:
        dictionary = import_sae_lens(options.source)
    if options.model is not None:
        _record_model(dictionary, options.model)
    print(
        save_dictionary(
            options.out, dictionary, {"imported_from": {"format": options.layout, "source": str(options.source)}}
        )
    )


def _record_model(dictionary: Dictionary, name: str) -> None:
    from reflowlens.checkpoints import load_model
    from reflowlens.dictionaries.belonging import check_belongs
    from reflowlens.storage.model_hash import model_hash

    model = check_belongs(dictionary, load_model(name))
    dictionary.cfg = dataclasses.replace(dictionary.cfg, model_name=Path(name).name, model_hash=model_hash(model))


def _add_dictionary(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dictionary", help="packaged name, folder or file")
