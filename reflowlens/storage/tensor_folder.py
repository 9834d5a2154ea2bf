"""A folder of tensors and a JSON manifest: written whole or not at all, read a tensor at a time."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from reflowlens.errors import ReflowlensError
from reflowlens.storage.folders import MANIFEST, check_replaceable, write_folder, write_tensors
from reflowlens.storage.opening import as_path, open_safetensors, read_json

_PACKAGES = ("reflowlens", "torch", "transformer-lens", "safetensors")


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a safetensors file, memory-mapped: one is read when it is indexed, and only as far as it is used.

    A tensor may be written to; the file does not change.
    """

    def __init__(self, path: Path) -> None:
        self._file = open_safetensors(path)
        self._names = frozenset(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    def __len__(self) -> int:
        return len(self._names)


def save_tensors(folder: str | Path, kind: str, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> Path:
    """Write ``KIND.safetensors`` and ``manifest.json``, replacing earlier ones of this kind when both are complete.

    Tensors must not share memory.

    Args:
        kind: what the tensors are, one word; the manifest's format names it.

    Raises:
        ReflowlensError: the folder holds something else, the disk is full or it cannot be written; then nothing has
            changed.
    """
    folder = as_path(folder)
    check_replaceable(folder, (f"{kind}.safetensors",), kind)
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    record = {"format": _format(kind), **manifest, "versions": versions}

    def write(folder: Path) -> None:
        write_tensors(folder / f"{kind}.safetensors", tensors, {"format": _format(kind)})
        lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in record.items())
        (folder / MANIFEST).write_text(f"{{\n{lines}\n}}\n", encoding="utf8")

    return write_folder(folder, write)


def open_tensors(folder: str | Path, kind: str) -> tuple[dict[str, Any], StoredTensors]:
    """The manifest and the tensors of a folder that :func:`save_tensors` wrote.

    Raises:
        ReflowlensError: there is no such folder, it holds something else, or a file of it is missing or corrupt.
    """
    folder = as_path(folder)
    if not folder.is_dir():
        raise ReflowlensError(f"no folder {str(folder)!r}: expected one with {kind}.safetensors and {MANIFEST}")
    if not (folder / MANIFEST).is_file():
        raise ReflowlensError(f"{folder} has no {MANIFEST}: it holds no {kind}")
    manifest = read_json(folder / MANIFEST)
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != _format(kind):
        raise ReflowlensError(f"{folder} holds no {kind} (format {found!r}, expected {_format(kind)!r})")
    if not (folder / f"{kind}.safetensors").is_file():
        raise ReflowlensError(f"{folder} lacks {kind}.safetensors")
    return manifest, StoredTensors(folder / f"{kind}.safetensors")


def _format(kind: str) -> str:
    return f"reflowlens-{kind}-1"
