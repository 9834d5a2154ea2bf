"""The file of a packed model or dictionary, and the tensors in it.

    magic line with the version, SHA-256 of all that follows, length of the header, JSON header, payload

The header has the configuration, the manifest, and what each tensor is stored as; the payload is, compressed as one,
the upper bytes of steps and 16-bit tensors, their lower bytes, and then the codes, tensor after tensor. What a file
unpacks to is known from its configuration, and no more than that is unpacked. A change of any byte is noticed.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import UInt8
from torch import Tensor

from reflowlens.errors import ReflowlensError
from reflowlens.storage.atomic import replacing
from reflowlens.storage.compressors import compressor
from reflowlens.storage.rounding import Rounded

VERSION = 2
BEGINNING = b"reflowlens packed model "
MAGIC = BEGINNING + b"%d\n" % VERSION
_DIGEST = hashlib.sha256().digest_size
_START = len(MAGIC) + _DIGEST  # of the header's length
_LONGEST_HEADER = 1 << 22
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_OPENERS = {"model": "load_model", "dictionary": "load_dictionary"}
Config = TypeVar("Config")


@dataclass(frozen=True)
class PackedFile:
    """What is in a file.

    Args:
        header: ``kind`` (model or dictionary), ``config``, ``manifest``, ``tensors`` (by name what each is stored as),
            ``compressor``, ``method``, ``calibration``.
        payload: compressed.
    """

    header: Mapping[str, Any]
    payload: bytes

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return _START + 8 + len(_encoded(self.header)) + len(self.payload)

    def save(self, path: Path) -> None:
        """Write the file; an earlier one is replaced when the new one is complete."""
        header = _encoded(self.header)
        rest = struct.pack("<Q", len(header)) + header + self.payload
        with replacing(path) as new:
            new.write_bytes(MAGIC + hashlib.sha256(rest).digest() + rest)

    def weights(self, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """The tensors: what was rounded in float32, others in their 16 bits.

        Args:
            shapes: those that the configuration asks for.

        Raises:
            ReflowlensError: its compressor's package is not installed.
            ValueError: it holds others, or other than so many bytes.
        """
        stored = self.header["tensors"]
        if set(shapes) != set(stored):
            raise ValueError("its tensors are not those of its configuration")
        size = sum(_bytes_of(shapes[name], entry) for name, entry in stored.items())
        raw = compressor(self.header["compressor"]).decompress(self.payload, size)
        if len(raw) != size:
            raise ValueError("it holds less than its tensors")
        return unrounded(_tensors(raw, shapes, stored), shapes)


def is_packed(path: Path) -> bool:
    """Whether a file begins as packed ones of any version do."""
    if not path.is_file():  # a pipe would be waited for
        return False
    try:
        with path.open("rb") as file:
            return file.read(len(BEGINNING)) == BEGINNING
    except OSError:
        return False


def read_header(path: Path) -> dict[str, Any]:
    """The header of a packed file, whose payload is not read.

    Raises:
        ReflowlensError: it is of another version, or has no readable header.
    """
    with path.open("rb") as file:
        _check_version(path, file.readline(len(MAGIC) + 8))
        file.seek(_START)
        length = file.read(8)
        try:
            return _header(file.read(min(struct.unpack("<Q", length)[0], _LONGEST_HEADER)))
        except (struct.error, ValueError, RecursionError) as error:
            raise _damaged(path, error) from error


def recorded_in(path: Path) -> dict[str, Any]:
    """The configuration, as ``config``, and the manifest that a packed file carries."""
    header = read_header(path)
    manifest = header.get("manifest")
    return {"config": header.get("config"), **(manifest if isinstance(manifest, dict) else {})}


def read_packed_file(
    path: Path, kind: str, configured: Callable[[Mapping[str, Any]], tuple[Config, Mapping[str, torch.Size]]]
) -> tuple[Config, dict[str, Tensor]]:
    """Configuration and tensors of a packed file whose every byte is as it was written.

    Args:
        kind: what it should hold, ``"model"`` or ``"dictionary"``.
        configured: of its header the configuration, and the shapes that this asks for.

    Raises:
        ReflowlensError: it was changed or cut short, is of another version, holds something else, or does not fit its
            own configuration.
    """
    data = path.read_bytes()
    _check_version(path, data[: len(MAGIC) + 8].partition(b"\n")[0] + b"\n")
    if hashlib.sha256(memoryview(data)[_START:]).digest() != data[len(MAGIC) : _START]:
        raise _damaged(path, "its contents are not those that were written: it was changed or cut short")
    try:
        (length,) = struct.unpack_from("<Q", data, _START)
        header = _header(data[_START + 8 : _START + 8 + min(length, _LONGEST_HEADER)])
        if (found := header.get("kind")) != kind:
            raise ReflowlensError(
                f"{path} holds a packed {found}, and a {kind} was asked for: "
                f"{_OPENERS.get(str(found), 'nothing here')} opens it"
            )
        cfg, shapes = configured(header)
        return cfg, PackedFile(header, data[_START + 8 + length :]).weights(shapes)
    except ReflowlensError:
        raise
    except Exception as error:  # whatever a file that was made to mislead does to those who read it
        raise _damaged(path, error) from error


def _header(data: bytes) -> dict[str, Any]:
    found = json.loads(data)
    if not isinstance(found, dict):
        raise ValueError("its header is no JSON object")
    return found


def _check_version(path: Path, line: bytes) -> None:
    if line == MAGIC:
        return
    version = line.removeprefix(BEGINNING).strip()
    if version.isdigit():
        raise ReflowlensError(
            f"{path} is a packed file of version {int(version)}, and this reflowlens reads version {VERSION}: pack the "
            "original again, or open it with the reflowlens that wrote it"
        )
    raise _damaged(path, "its first line is damaged")


def _damaged(path: Path, reason: object) -> ReflowlensError:
    return ReflowlensError(f"{path} is not a readable packed file: {reason}")


def _encoded(header: Mapping[str, Any]) -> bytes:
    return json.dumps(header, separators=(",", ":")).encode()


# -- tensors ----------------------------------------------------------------------------------------------------------


def entry_of(tensor: Rounded | Tensor, bits: float | None = None, merged: bool = False) -> dict[str, Any]:
    """What the header says of a tensor.

    Args:
        bits: of a code, for the record.
        merged: whether the first two axes of a rounded tensor were made one.
    """
    if not isinstance(tensor, Rounded):
        return {"dtype": str(tensor.dtype).removeprefix("torch.")}
    step = str(tensor.step.dtype).removeprefix("torch.")
    return {"bits": bits, "table": tensor.is_table, "merged": merged, "dtype": step}


def raw_bytes(tensors: Mapping[str, Rounded | Tensor]) -> bytes:
    """Steps and 16-bit tensors, upper bytes (sign and exponent, of few values) first; then codes: like with like."""
    wide = _bytes([tensor.step if isinstance(tensor, Rounded) else tensor for tensor in tensors.values()])
    codes = _bytes([tensor.codes for tensor in tensors.values() if isinstance(tensor, Rounded)])
    return torch.cat([wide[1::2], wide[0::2], codes]).numpy().tobytes()


def _bytes(tensors: list[Tensor]) -> UInt8[Tensor, " byte"]:
    return torch.cat(
        [torch.empty(0, dtype=torch.uint8), *(each.contiguous().flatten().view(torch.uint8) for each in tensors)]
    )


def unrounded(tensors: Mapping[str, Rounded | Tensor], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The tensors in their own shapes: what was rounded in float32, others in their 16 bits."""
    return {
        name: (tensor.values() if isinstance(tensor, Rounded) else tensor).view(shapes[name])
        for name, tensor in tensors.items()
    }


def _shape_of_codes(shape: torch.Size, entry: Mapping[str, Any]) -> torch.Size:
    return torch.Size((shape[0] * shape[1], *shape[2:])) if entry["merged"] else shape


def _n_rows(shape: torch.Size, entry: Mapping[str, Any]) -> int:
    shape = _shape_of_codes(shape, entry)
    return shape[0] if entry["table"] else shape.numel() // shape[-2]


def _bytes_of(shape: torch.Size, entry: Mapping[str, Any]) -> int:
    return shape.numel() + 2 * _n_rows(shape, entry) if "bits" in entry else 2 * shape.numel()


def _tensors(raw: bytes, shapes: Mapping[str, torch.Size], stored: Mapping[str, Any]) -> dict[str, Rounded | Tensor]:
    data = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    counts = {
        name: _n_rows(shapes[name], entry) if "bits" in entry else shapes[name].numel()
        for name, entry in stored.items()
    }
    n = sum(counts.values())
    halves = torch.stack([data[n : 2 * n], data[:n]], dim=1).flatten()
    wide: dict[str, Tensor] = {}
    for (name, entry), part in zip(stored.items(), halves.split([2 * c for c in counts.values()]), strict=True):
        wide[name] = part.view(_DTYPES[entry["dtype"]])
    at = 2 * n
    tensors: dict[str, Rounded | Tensor] = {}
    for name, entry in stored.items():
        if "bits" not in entry:
            tensors[name] = wide[name]
            continue
        shape = _shape_of_codes(shapes[name], entry)
        codes, at = data[at : at + shape.numel()].view(torch.int8).view(shape), at + shape.numel()
        tensors[name] = Rounded(codes, wide[name], bool(entry["table"]))
    return tensors
