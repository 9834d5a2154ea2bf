"""``pack`` and ``unpack``: a model or dictionary as one small file under a limit, and back."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reflowlens.cli.arguments import Commands, add_command
from reflowlens.errors import ReflowlensError

if TYPE_CHECKING:
    import pandas as pd

    from reflowlens.dictionaries.dictionary import Dictionary
    from reflowlens.models.base import HookedModel
    from reflowlens.packing import Packed

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "KIB": 2**10, "MIB": 2**20}
_CALIBRATION_ROWS = 64


def add_commands(commands: Commands) -> None:
    parser = add_command(
        commands, "pack", _pack, "a model or dictionary in one small file, which every command opens by its path"
    )
    parser.epilog = (
        "Told first are the bytes of each tensor, by the entropy of its codes; with --data losses before and after, "
        "and the difference with an interval over documents: of a dictionary those of its model with the dictionary in "
        "place of what it stands for."
    )
    parser.add_argument("model", metavar="MODEL", help="model or dictionary: packaged name, folder or file")
    parser.add_argument(
        "--bits",
        type=float,
        help="of a weight of a block's matrix, 2 to 8 (default: 6), or 16 to keep all weights in float16; of a "
        "dictionary's (default: 4; of gptq on average, fractions allowed)",
    )
    parser.add_argument(
        "--embedding-bits", type=int, help="of a weight of the tables at both ends of a model (default: 8)"
    )
    parser.add_argument(
        "--method",
        choices=["rtn", "clip", "gptq"],
        default="clip",
        help="round to nearest; with a search over clips; with errors made up for, as far as the inputs of --data go "
        "together",
    )
    parser.add_argument("--compressor", default="lzma", help="lzma or huffman; with their packages brotli or zstd")
    parser.add_argument("--limit", metavar="SIZE", help="bytes that the file and --code may have, e.g. 16MB or 15MiB")
    parser.add_argument(
        "--code", nargs="+", type=Path, default=[], metavar="FILE", help="files whose bytes count towards the limit"
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="text made by prepare: training tokens calibrate gptq, held-out ones measure",
    )
    parser.add_argument("--max-tokens", type=int, default=100_000, help="held-out tokens that are measured")
    parser.add_argument(
        "--of", metavar="MODEL", help="of a dictionary with --data: its model (default: the one that it names)"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the file; an earlier one is replaced")

    parser = add_command(commands, "unpack", _unpack, "a packed model or dictionary as a folder")
    parser.add_argument("file", type=Path, help="written by pack")
    parser.add_argument("--out", required=True, type=Path, help="folder to write")


def _pack(options: argparse.Namespace) -> None:
    from reflowlens.dictionaries.files import holds_dictionary
    from reflowlens.storage.folders import check_makeable

    check_makeable(options.out.absolute().parent)  # before minutes are spent
    limit = None if options.limit is None else _bytes(options.limit)
    if options.method == "gptq" and options.data is None:
        raise ReflowlensError(
            "--method gptq calibrates with the training tokens of --data: name a folder made by prepare"
        )
    code = sum(_size(path) for path in options.code)
    pack = _packed_dictionary if holds_dictionary(options.model) else _packed_model
    packed, losses = pack(options, limit, code)
    if losses is not None:
        columns = ["model", "tokens", "loss", "low", "high", "difference", "difference_low", "difference_high"]
        print(losses[columns].to_string(index=False, na_rep="-", float_format="{:.4f}".format))
    print(packed.save(options.out))


def _packed_model(options: argparse.Namespace, limit: int | None, code: int) -> tuple[Packed, pd.DataFrame | None]:
    from pretraining.loss_comparison import compare_losses
    from reflowlens.calibration import input_grams
    from reflowlens.checkpoints import load_model, read_manifest
    from reflowlens.packing import pack_model

    if options.of is not None:
        raise ReflowlensError(f"--of names the model of a dictionary, and {options.model} is a model")
    model = load_model(options.model)
    packed = pack_model(
        model,
        _whole(6 if options.bits is None else options.bits),
        table_bits=options.embedding_bits,
        method=options.method,
        grams=input_grams(model, _rows(model, options.data)) if options.method == "gptq" else None,
        compressor_name=options.compressor,
        calibration=_calibration(options),
        manifest=read_manifest(options.model),
    )
    _tell(packed, limit, code)
    if options.data is None:
        return packed, None
    models = {"as it was": model, "packed": packed.model()}
    return packed, compare_losses(models, options.data, max_tokens=options.max_tokens, progress=sys.stderr.isatty())


def _packed_dictionary(options: argparse.Namespace, limit: int | None, code: int) -> tuple[Packed, pd.DataFrame | None]:
    from pretraining.loss_comparison import compare_replacements
    from reflowlens.dictionaries.files import dictionary_manifest, load_dictionary
    from reflowlens.dictionaries.thresholds import activations_of
    from reflowlens.packing import pack_dictionary

    if options.embedding_bits is not None:
        raise ReflowlensError(f"--embedding-bits is of a model's tables, and {options.model} is a dictionary")
    dictionary = load_dictionary(options.model)
    model = None if options.data is None else _model_of(dictionary, options.of)
    reads = None
    if model is not None and options.method == "gptq":
        reads = activations_of(dictionary, model, _rows(model, options.data)).reads
    bits = 4.0 if options.bits is None else options.bits
    packed = pack_dictionary(
        dictionary,
        bits if options.method == "gptq" else _whole(bits),
        method=options.method,
        reads=reads,
        compressor_name=options.compressor,
        calibration=_calibration(options),
        manifest=dictionary_manifest(options.model),
    )
    _tell(packed, limit, code)
    if model is None:
        return packed, None
    both = {"as it was": dictionary, "packed": packed.dictionary()}
    return packed, compare_replacements(
        model, both, options.data, max_tokens=options.max_tokens, progress=sys.stderr.isatty()
    )


def _model_of(dictionary: Dictionary, name: str | None) -> HookedModel:
    from reflowlens.checkpoints import load_model
    from reflowlens.dictionaries.belonging import check_belongs

    name = name or dictionary.cfg.model_name
    if not name:
        raise ReflowlensError(
            "--data measures a dictionary in its model, which this one does not name: give --of MODEL"
        )
    return check_belongs(dictionary, load_model(name))


def _tell(packed: Packed, limit: int | None, code: int) -> None:
    """The bytes of each tensor and of all.

    Raises:
        ReflowlensError: they are more than the limit.
    """
    table = packed.table().sort_values("bytes", ascending=False)
    print(table.head(20).to_string(index=False, float_format="{:.2f}".format, formatters={"bytes": "{:,}".format}))
    total = packed.size + code
    print(f"{packed.size:,} bytes" + (f", with {code:,} of code {total:,}" if code else ""))
    if limit is not None and total > limit:
        heaviest = ", ".join(f"{row.tensor} {row.bytes:,}" for row in table.head(3).itertuples())
        raise ReflowlensError(
            f"{total:,} bytes are {total - limit:,} more than the limit of {limit:,}; most weigh {heaviest}: "
            "give fewer --bits or --embedding-bits"
        )


def _unpack(options: argparse.Namespace) -> None:
    from reflowlens.checkpoints import load_model, read_manifest, save_model
    from reflowlens.dictionaries.files import dictionary_manifest, holds_dictionary, load_dictionary, save_dictionary
    from reflowlens.storage.opening import file_hash
    from reflowlens.storage.packed_file import is_packed

    if not is_packed(options.file):
        raise ReflowlensError(f"{options.file} is not a file that pack wrote")
    source = {"unpacked_from_sha256": file_hash(options.file)}
    if holds_dictionary(options.file):
        manifest = dictionary_manifest(options.file)
        print(save_dictionary(options.out, load_dictionary(options.file), {**manifest, **source}))
    else:
        print(save_model(options.out, load_model(options.file), {**read_manifest(options.file), **source}))


def _bytes(text: str) -> int:
    """A size such as ``16MB``."""
    match = re.fullmatch(r"\s*(\d[\d_]*(?:\.\d+)?)\s*([KM]?i?B?)\s*", text, re.IGNORECASE)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise ReflowlensError(f"--limit must be a size such as 16MB, 15MiB or 16000000, got {text!r}")
    return round(float(match[1].replace("_", "")) * unit)


def _whole(bits: float) -> Any:
    """A number of bits as it is to be told of in an error."""
    return int(bits) if bits == int(bits) else bits


def _size(path: Path) -> int:
    if not path.is_file():
        raise ReflowlensError(f"--code {path} is no file")
    return path.stat().st_size


def _calibration(options: argparse.Namespace) -> str:
    return str(options.data) if options.method == "gptq" else ""


def _rows(model: HookedModel, folder: Path) -> list[Any]:
    """Rows of training tokens at equal distances."""
    from pretraining.batches import spread_batches
    from pretraining.evaluate import tokens_for

    data, context = tokens_for(model, folder, "train"), model.cfg.n_ctx
    batches = spread_batches(data.tokens, 8, min(context, len(data.tokens) - 1), _CALIBRATION_ROWS * context)
    return [x.to(model.cfg.device) for x, _ in batches]
