"""``export``, ``import`` and ``inspect``: models as files, ours and those of other libraries."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

from reflowlens.cli.arguments import Commands, add_command, add_model


def add_commands(commands: Commands) -> None:
    _add_export(commands)
    _add_import(commands)
    _add_inspect(commands)


def _add_export(commands: Commands) -> None:
    parser = add_command(commands, "export", _export, "write a checkpoint's model alone, without the training state")
    add_model(parser)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument(
        "--format",
        default="reflowlens",
        choices=["reflowlens", "hf"],
        help="hf: a LlamaForCausalLM or GPT2LMHeadModel with its tokenizer, as transformers opens it",
    )
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"], help="of the weights")
    parser.add_argument(
        "--no-verify",
        action="store_true",
        help="take weights that are not those their manifest was written with; what is written then opens everywhere",
    )
    _add_overwrite(parser)


def _add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace another model that the folder holds")


def _export(options: argparse.Namespace) -> None:
    import torch

    from reflowlens.checkpoints import load_model, read_manifest, save_model

    model, dtype = load_model(options.model, verify=not options.no_verify), getattr(torch, options.dtype)
    if options.format == "hf":
        from reflowlens.conversion import export_hf

        print(export_hf(model, options.out, dtype=dtype, overwrite=options.overwrite))
        return
    facts = {k: v for k, v in read_manifest(options.model).items() if k not in ("format", "config", "weights_sha256")}
    print(save_model(options.out, model, facts, dtype=dtype, overwrite=options.overwrite))


def _add_import(commands: Commands) -> None:
    parser = add_command(commands, "import", _import, "make a checkpoint of a model that transformers or nanoGPT saved")
    parser.add_argument(
        "source", type=Path, help="a transformers folder (GPT-2, Llama, Gemma, Pythia ...), or a ckpt.pt"
    )
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument(
        "--from", dest="source_format", choices=["hf", "nanogpt"], help="default: hf for a folder, nanogpt for a file"
    )
    parser.add_argument("--tokenizer", help="gpt2, gpt2_16k, gpt2_1k, bytes or a tokenizer.json (default: its own)")
    parser.add_argument(
        "--n-ctx", type=int, help="longest input to keep (default: the model's own, at most 4096 for hf)"
    )
    parser.add_argument("--n-heads", type=int, help="of a nanogpt file that does not say (default: heads 64 wide)")
    parser.add_argument("--topk", type=int, help="signals that each token keeps, of a nanogpt file that does not say")
    parser.add_argument(
        "--dtype", choices=["float32", "float16", "bfloat16"], help="of the weights (default: as stored)"
    )
    _add_overwrite(parser)


def _import(options: argparse.Namespace) -> None:
    import torch

    from reflowlens.conversion import import_model

    names = ("tokenizer", "n_ctx", "n_heads", "topk")
    chosen = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    dtype = getattr(torch, options.dtype) if options.dtype else None
    with warnings.catch_warnings(record=True) as told:
        out = import_model(
            options.source, options.out, options.source_format, overwrite=options.overwrite, dtype=dtype, **chosen
        )
    for warning in told:
        print(warning.message, file=sys.stderr)
    print(out)


def _add_inspect(commands: Commands) -> None:
    parser = add_command(
        commands, "inspect", _inspect, "tell what any file or folder holds, without executing anything in it"
    )
    parser.add_argument("path", help="packaged name, checkpoint, run, prepared data, or anything else")
    parser.add_argument("--against", metavar="OTHER", help="another model to compare the tensors with, by name")
    parser.add_argument("--tensors", action="store_true", help="a line for each tensor, layers not taken together")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def _inspect(options: argparse.Namespace) -> int:
    from reflowlens.inspection import inspect_path

    found = inspect_path(options.path, against=options.against)
    print(found.to_json() if options.json else found.to_text(all_tensors=options.tensors))
    return 1 if found.problems else 0
