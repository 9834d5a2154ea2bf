"""Folders of files that belong together: written whole or not at all, and replaced only by their own kind."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from reflowlens.errors import ReflowlensError
from reflowlens.storage.opening import open_safetensors

MANIFEST = "manifest.json"


def check_replaceable(folder: Path, files: tuple[str, ...], kind: str = "checkpoint") -> None:
    """Raise if a folder is a file, or holds something else than what the writer of these files left there."""
    if folder.exists() and not folder.is_dir():
        raise ReflowlensError(f"{folder} is a file: choose a new folder")
    if folder.is_dir() and any(folder.iterdir()) and not all((folder / name).is_file() for name in files):
        raise ReflowlensError(
            f"{folder} holds other files and no {kind} to replace ({', '.join(files)}): choose a new folder"
        )


def check_same_model(folder: Path, file: str, weights: Mapping[str, Tensor]) -> None:
    """Raise if a folder holds the weights of another model than these, whatever type they are stored in.

    Args:
        file: the safetensors file in which the folder's weights would be.
        weights: before they are rounded to a type.
    """
    if not (folder / file).is_file():
        return
    stored = open_safetensors(folder / file)
    shapes = {name: stored.get_slice(name).get_shape() for name in stored.keys()}  # noqa: SIM118 # it is no mapping
    for name in sorted({*shapes, *weights}):
        has_shape = name in weights and shapes.get(name) == list(weights[name].shape)
        if not has_shape or not _rounds_to(weights[name], stored.get_tensor(name)):
            raise ReflowlensError(
                f"{folder} holds another model ({sum(map(math.prod, shapes.values())):,} weights; {name} differs): "
                "choose another folder, or replace it with --overwrite"
            )


def _rounds_to(weight: Tensor, stored: Tensor) -> bool:
    return bool((weight.to("cpu", stored.dtype) == stored).all())


def check_makeable(folder: Path) -> None:
    """Raise if a folder is a file, or could not be made or written in: before the work whose results it is to hold.

    Nothing is made. What can be known beforehand is known of the nearest folder above it that exists.

    Example: ``check_makeable(Path("out/units"))``
    """
    nearest = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not nearest.is_dir():
        raise ReflowlensError(f"{nearest} is a file: choose a new folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ReflowlensError(f"cannot write to {nearest}: choose a folder that may be written to")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file; equal tensors and metadata give equal bytes."""
    from safetensors.torch import save_file

    save_file(dict(tensors), path, metadata=metadata)
    with path.open("r+b") as file:  # the library writes the metadata in an order of its own each time
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(metadata.items()))
        file.seek(8)
        file.write(json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(length))


def write_folder(folder: Path, write: Callable[[Path], None]) -> Path:
    """Fill a temporary folder beside ``folder`` and move it into place; after any failure ``folder`` is as it was."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise _write_error(folder, error) from error
    try:
        write(temporary)
        temporary.chmod(0o755)  # mkdtemp and safetensors keep what they write to its owner
        for file in temporary.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)
        if folder.exists():
            _replace(folder, temporary)
        else:
            temporary.rename(folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) or "os error" in str(error).lower():  # safetensors wraps the system's error
            raise _write_error(folder, error) from error
        raise
    return folder


def leftovers(parent: Path, pattern: str) -> list[Path]:
    """What :func:`write_folder` left in ``parent`` when it was killed, of folders whose names match ``pattern``."""
    names = re.compile(rf"\.{pattern}\.(old\.)?[a-z0-9_]{{8}}")  # as mkdtemp makes them
    return [path for path in parent.iterdir() if names.fullmatch(path.name) and path.is_dir()]


def _replace(folder: Path, new: Path) -> None:
    """Move ``new`` to ``folder``, which exists; what was there is put back if that fails, and removed if not."""
    retired = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
    old = retired / folder.name
    try:
        folder.rename(old)
        try:
            new.rename(folder)
        except BaseException:
            old.rename(folder)
            raise
    finally:
        shutil.rmtree(retired)


def _write_error(folder: Path, error: BaseException) -> ReflowlensError:
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    return ReflowlensError(f"cannot write {folder}: {'the disk is full' if full else error}; nothing was changed")
