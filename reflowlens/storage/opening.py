"""Opening what comes from outside: paths, names, JSON and safetensors files, none of which is trusted."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from reflowlens.errors import ReflowlensError


def as_path(value: object) -> Path:
    """A path that a caller gave.

    Raises:
        ReflowlensError: it is none, or one that the system cannot look up.
    """
    if not isinstance(value, str | os.PathLike):
        raise ReflowlensError(f"a path or a name was expected, got {shown(value)}")
    path = Path(value)
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # too long, a null character, a folder that may not be entered
        reason = getattr(error, "strerror", None) or error
        raise ReflowlensError(f"cannot look up {shown(str(path))}: {reason}") from error
    return path


def holds_file(folder: Path, name: object) -> bool:
    """Whether a name read from a file is that of a file in the folder itself, and not of anything elsewhere."""
    try:
        return isinstance(name, str) and Path(name).name == name and (folder / name).is_file()
    except (OSError, ValueError):
        return False


def shown(value: object) -> str:
    """What came from outside as a message quotes it: of a long text the beginning."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:119]}…"


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):  # hashlib.file_digest is not in Python 3.10
            digest.update(block)
    return digest.hexdigest()


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        ReflowlensError: it cannot be read, is no JSON, or is nested too deep.
    """
    try:
        if not path.is_file():
            raise ValueError("it is no file")  # reading a pipe would wait for a writer
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ReflowlensError(f"{path} is damaged: {error}") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """What a JSON file that holds an object holds.

    Raises:
        ReflowlensError: as :func:`read_json`, or it holds something else.
    """
    found = read_json(path)
    if not isinstance(found, dict):
        raise ReflowlensError(f"{path} is damaged: it holds no JSON object")
    return found


def open_safetensors(path: Path) -> Any:
    """A safetensors file as ``safetensors.safe_open`` gives it, its header read and checked, which is at most 100 MB.

    Raises:
        ReflowlensError: it is no such file, or cut short.
    """
    from safetensors import SafetensorError, safe_open

    try:
        if not path.is_file():
            raise OSError("it is no file")  # opening a pipe would wait for a writer
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ReflowlensError(f"{path} is not a readable safetensors file: {error}") from error


def read_tensor(path: Path, name: str) -> Tensor:
    """A tensor of a safetensors file, mapped into memory for as long as it is kept.

    The file is opened for it alone: of one that stays open all that was read counts as memory of the process, and a
    model beside its whole file takes twice its size.

    Raises:
        ReflowlensError: the file cannot be opened.
    """
    return open_safetensors(path).get_tensor(name)


@contextlib.contextmanager
def unchanged(paths: Sequence[Path]) -> Iterator[None]:
    """A block that opens files more than once, and would mix what was there with what is.

    Raises:
        ReflowlensError: one was written or replaced meanwhile.
    """

    def states() -> list[tuple[int, ...]]:
        return [(at.st_dev, at.st_ino, at.st_size, at.st_mtime_ns) for at in map(Path.stat, paths)]

    try:
        before = states()
        yield
        after = states()
    except OSError as error:
        raise ReflowlensError(f"{error.filename} cannot be read: {error.strerror}") from error
    for path, old, new in zip(paths, before, after, strict=True):
        if old != new:
            raise ReflowlensError(f"{path} was written while it was read: open it again")


def read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file.

    Raises:
        ReflowlensError: it is no such file, cut short, or holds a type of number that torch does not know.
    """
    from safetensors import SafetensorError

    file = open_safetensors(path)
    try:
        return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, TypeError, AttributeError) as error:
        raise ReflowlensError(f"{path} is not a readable safetensors file: {error}") from error


def stated_config(path: Path, metadata: Mapping[str, str], format: str) -> dict[str, Any]:
    """The configuration that the header of a safetensors file of ours carries.

    Raises:
        ReflowlensError: the file is of another format, or its configuration is no JSON object.
    """
    if metadata.get("format") != format:
        raise ReflowlensError(
            f"{path} was not written by reflowlens (format {metadata.get('format')!r}, expected {format!r})"
        )
    try:
        config = json.loads(metadata["config"])
    except (KeyError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise ReflowlensError(f"{path} holds no readable configuration")
    return config


def check_shapes(path: Path, shapes: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]]) -> None:
    """Raise unless the tensors of a file are the parameters of these shapes."""
    if missing := sorted(set(expected) - set(shapes)):
        raise ReflowlensError(f"{path} lacks {missing[0]!r} ({len(missing)} parameters missing)")
    if extra := sorted(set(shapes) - set(expected)):
        raise ReflowlensError(f"{path} holds {shown(extra[0])}, which its configuration does not have")
    for name, shape in expected.items():
        if list(shapes[name]) != list(shape):
            raise ReflowlensError(f"{path}: {name} has shape {list(shapes[name])}, expected {list(shape)}")
