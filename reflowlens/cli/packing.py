"""``pack`` and ``unpack``: a model as one small file under a limit, and back."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reflowlens.cli.arguments import Commands, add_command, add_model
from reflowlens.errors import ReflowlensError

if TYPE_CHECKING:
    from reflowlens.models.base import HookedModel

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "KIB": 2**10, "MIB": 2**20}
_CALIBRATION_ROWS = 64


def add_commands(commands: Commands) -> None:
    parser = add_command(commands, "pack", _pack, "a model in one small file, which every command opens by its path")
    parser.epilog = (
        "Told first are the bytes of each tensor, by the entropy of its codes; with --data losses before and after, "
        "and the difference with an interval over documents."
    )
    add_model(parser)
    parser.add_argument("--bits", type=int, default=6, help="of a weight of a block's matrix, 2 to 8")
    parser.add_argument("--embedding-bits", type=int, default=8, help="of a weight of the tables at both ends")
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
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the file; an earlier one is replaced")

    parser = add_command(commands, "unpack", _unpack, "a packed model as a checkpoint folder")
    parser.add_argument("file", type=Path, help="written by pack")
    parser.add_argument("--out", required=True, type=Path, help="folder to write")


def _pack(options: argparse.Namespace) -> None:
    from reflowlens.checkpoints import load_model
    from reflowlens.packing import pack_model

    limit = None if options.limit is None else _bytes(options.limit)
    if options.method == "gptq" and options.data is None:
        raise ReflowlensError(
            "--method gptq calibrates with the training tokens of --data: name a folder made by prepare"
        )
    code = sum(_size(path) for path in options.code)
    model = load_model(options.model)
    grams: dict[str, Any] | None = None
    if options.method == "gptq":
        from reflowlens.calibration import input_grams

        grams = input_grams(model, _rows(model, options.data))
    packed = pack_model(
        model,
        options.bits,
        table_bits=options.embedding_bits,
        method=options.method,
        grams=grams,
        compressor_name=options.compressor,
        calibration=str(options.data) if grams else "",
    )
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
    if options.data is not None:
        _compare(model, packed.model(), options)
    print(packed.save(options.out))


def _compare(model: HookedModel, packed: HookedModel, options: argparse.Namespace) -> None:
    from pretraining.loss_comparison import compare_losses

    models = {"as it was": model, "packed": packed}
    frame = compare_losses(models, options.data, max_tokens=options.max_tokens, progress=sys.stderr.isatty())
    columns = ["model", "tokens", "loss", "low", "high", "difference", "difference_low", "difference_high"]
    print(frame[columns].to_string(index=False, na_rep="-", float_format="{:.4f}".format))


def _unpack(options: argparse.Namespace) -> None:
    from reflowlens.checkpoints import load_model, save_model
    from reflowlens.packing import is_packed
    from reflowlens.storage.opening import file_hash

    if not is_packed(options.file):
        raise ReflowlensError(f"{options.file} is not a file that pack wrote")
    print(save_model(options.out, load_model(options.file), {"unpacked_from_sha256": file_hash(options.file)}))


def _bytes(text: str) -> int:
    """A size such as ``16MB``."""
    match = re.fullmatch(r"\s*([\d_.]+)\s*([KM]?i?B?)\s*", text, re.IGNORECASE)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise ReflowlensError(f"--limit must be a size such as 16MB, 15MiB or 16000000, got {text!r}")
    return round(float(match[1].replace("_", "")) * unit)


def _size(path: Path) -> int:
    if not path.is_file():
        raise ReflowlensError(f"--code {path} is no file")
    return path.stat().st_size


def _rows(model: HookedModel, folder: Path) -> list[Any]:
    """Rows of training tokens at equal distances."""
    from pretraining.batches import spread_batches
    from pretraining.evaluate import tokens_for

    data, context = tokens_for(model, folder, "train"), model.cfg.n_ctx
    batches = spread_batches(data.tokens, 8, min(context, len(data.tokens) - 1), _CALIBRATION_ROWS * context)
    return [x.to(model.cfg.device) for x, _ in batches]
