"""What a file is, told from its first bytes and its name; nothing in it is executed.

A pickle is a program that loading runs, so a pickle is never loaded here: its instructions are read as data, which
shows the functions that it would call.
"""

from __future__ import annotations

import codecs
import io
import pickletools
import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from reflowlens.storage.packed_file import BEGINNING

SAFETENSORS, JSON, JSON_LINES, EMPTY = "safetensors file", "JSON file", "JSON-lines file", "empty file"
PACKED = "packed file"
TORCH_ZIP, TORCH_OLD, TORCHSCRIPT = (
    "PyTorch checkpoint (pickle)",
    "old PyTorch checkpoint (pickle)",
    "TorchScript archive",
)
PICKLE, DAMAGED_ZIP = "Python pickle", "damaged zip archive (PyTorch checkpoints are such archives)"
PICKLES = (TORCH_ZIP, TORCH_OLD, TORCHSCRIPT, PICKLE)

_MAGIC = {
    BEGINNING: PACKED,
    b"GGUF": "GGUF model (llama.cpp)",
    b"\x89HDF\r\n\x1a\n": "HDF5 file",
    b"\x93NUMPY": "NumPy array",
    b"\x1f\x8b": "gzip-compressed file",
    b"\xfd7zXZ\x00": "xz-compressed file",
    b"\x28\xb5\x2f\xfd": "zstd-compressed file",
    b"\x89PNG": "PNG image",
    b"version https://git-lfs": "Git LFS pointer (the file itself was not downloaded)",
}
_TORCH_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # the number that torch.save wrote first until version 1.6
_PICKLE_SUFFIXES = {".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".bin"}
_HEAD = 4096
_LARGEST_PICKLE = 64 << 20  # bytes that are read where tensors lie among the instructions
_LARGEST_PROGRAMS = 8 << 20  # and where they lie apart: of a checkpoint thousands, of a bomb any number

# What rebuilding tensors calls; anything else is the pickle's own business.
_REBUILDS_TENSORS = re.compile(
    r"collections\.OrderedDict|torch\.(\w+Storage|Size|device|storage\.\w+|_utils\._rebuild_\w+|_tensor\._rebuild_\w+"
    r"|nn\.parameter\.Parameter|(float|bfloat|int|uint|complex)\d+|bool|serialization\._get_layout)"
    r"|_codecs\.encode|numpy\.(dtype|ndarray|(core|_core)\.multiarray\.(_reconstruct|scalar))"
)


def recognise(path: Path) -> str:
    """The kind of a file in words, e.g. ``"safetensors file"``; of an unknown one, its first bytes."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if not head:
        return EMPTY
    if path.suffix == ".safetensors" or _starts_safetensors(head, path.stat().st_size):
        return SAFETENSORS
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            return kind
    if head.startswith(b"PK\x03\x04"):
        return _zip_kind(path)
    if head[0] == 0x80 and _instructions(head) >= 3:
        return TORCH_OLD if head[2:].startswith(_TORCH_MAGIC) else PICKLE
    if path.suffix in _PICKLE_SUFFIXES and _is_old_pickle(head):
        return PICKLE
    if _is_text(head):
        return _text_kind(path)
    return f"file of no known format (it begins with {head[:8].hex(' ')})"


def _starts_safetensors(head: bytes, size: int) -> bool:
    return len(head) > 8 and head[8:9] == b"{" and 2 <= struct.unpack("<Q", head[:8])[0] <= size - 8


def _zip_kind(path: Path) -> str:
    try:
        names = zipfile.ZipFile(path).namelist()
    except Exception:  # many kinds, at a damaged archive
        return DAMAGED_ZIP
    if any(name.rsplit("/", 1)[-1] == "data.pkl" for name in names):
        return TORCHSCRIPT if any("/code/" in name for name in names) else TORCH_ZIP
    return "NumPy archive" if names and all(name.endswith(".npy") for name in names) else "zip archive"


def _instructions(head: bytes) -> int:
    """How many instructions of a pickle the bytes begin with."""
    count = 0
    try:
        for _ in pickletools.genops(head):
            count += 1
    except Exception:  # pickletools raises many kinds
        pass
    return count


def _is_old_pickle(head: bytes) -> bool:
    """Whether the bytes are a pickle of protocol 0 or 1, which has no mark: instructions, the last one at the end.

    Of a file that goes on, as many instructions as no other data begin with.
    """
    if len(head) == _HEAD:
        return _instructions(head) >= 100
    try:
        return [at for _, _, at in pickletools.genops(head)][-1] == len(head) - 1
    except Exception:
        return False


def _is_text(head: bytes) -> bool:
    """Whether the bytes are UTF-8 text; the last character may be cut."""
    try:
        codecs.getincrementaldecoder("utf8")().decode(head, final=len(head) < _HEAD)
    except UnicodeDecodeError:
        return False
    return b"\0" not in head


def _text_kind(path: Path) -> str:
    kinds = {".json": JSON, ".jsonl": JSON_LINES, ".toml": "TOML file", ".py": "Python source", ".md": "Markdown text"}
    return kinds.get(path.suffix, "text file")


def pickled_calls(path: Path, kind: str) -> list[str]:
    """Functions and classes that loading a pickle would import and may call, beyond those that rebuild tensors.

    Read from its instructions without running them. A pickle can compute a name: none found is no proof that it is
    harmless.
    """
    names = set().union(*map(imported_names, _programs(path, kind)))
    return sorted(name for name in names if not _REBUILDS_TENSORS.fullmatch(name))


def _programs(path: Path, kind: str) -> Iterator[BinaryIO]:
    if kind not in (TORCH_ZIP, TORCHSCRIPT):
        with path.open("rb") as file:
            yield io.BytesIO(file.read(_LARGEST_PICKLE))
        return
    left = _LARGEST_PROGRAMS  # of all together
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith(".pkl"):
                with archive.open(name) as member:
                    program = member.read(left)
                left -= len(program)
                yield io.BytesIO(program)


def imported_names(program: BinaryIO) -> set[str]:
    """``module.name`` of everything that the pickles of a stream import, as far as they can be read.

    >>> import pickle
    >>> imported_names(io.BytesIO(pickle.dumps(print)))
    {'builtins.print'}
    """
    names: set[str] = set()
    try:
        while program.read(1):
            program.seek(-1, io.SEEK_CUR)
            for name in _imports_of_one(program):
                names.add(name)
    except Exception:  # whatever pickletools meets: what follows is data, or damage
        pass
    return names


def _imports_of_one(program: BinaryIO) -> Iterator[str]:
    strings: list[str | None] = [None, None]  # the last two things pushed, where they are strings
    memo: dict[int, str | None] = {}
    for opcode, argument, _ in pickletools.genops(program):
        name = opcode.name
        if name in ("GLOBAL", "INST"):
            yield str(argument).replace(" ", ".")
        elif name == "STACK_GLOBAL" and None not in strings:
            yield ".".join(map(str, strings))
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if argument is None else int(argument)] = strings[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            strings = [strings[-1], memo.get(int(argument or 0))]
        elif name != "FRAME":
            strings = [strings[-1], argument if isinstance(argument, str) else None]


def stored_tensors(path: Path) -> tuple[int, int]:
    """How many storages a PyTorch zip checkpoint holds and their bytes, from its table of contents."""
    with zipfile.ZipFile(path) as archive:
        sizes = [info.file_size for info in archive.infolist() if re.search(r"(^|/)data/\d+$", info.filename)]
    return len(sizes), sum(sizes)
