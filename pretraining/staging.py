"""The unfinished part of a prepared folder, `.partial`: token files that grow, and how far they have come.

A run that is killed leaves it behind and the next one with the same inputs goes on from it. When all tokens are
there, the final manifest is written inside, and only then do the files move out, the manifest last.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from pretraining.token_files import MANIFEST_NAME, SPLITS, Manifest, Shard, open_tokens, read_manifest
from reflowlens.errors import ReflowlensError
from reflowlens.storage.atomic import replacing

_PROGRESS_NAME = "progress.json"  # a manifest too: its counts are those of the tokens that are safe on the disk


def partial_folder(out: Path) -> Path:
    return out / ".partial"


def finished(out: Path, planned: Manifest) -> Manifest | None:
    """The manifest of an earlier run with the same inputs, whose files are sound. An error if the folder is taken."""
    if not (out / MANIFEST_NAME).exists():
        if _token_files(out) and not is_complete(out):
            raise ReflowlensError(
                f"{str(out)!r} holds token files without a manifest: choose another folder, or --overwrite"
            )
        return None
    existing = read_manifest(out)
    if (difference := existing.difference(planned)) is not None:
        raise ReflowlensError(
            f"{str(out)!r} holds other data already ({difference}): choose another folder, or --overwrite"
        )
    for split in SPLITS:
        open_tokens(out, split)
    discard(out)
    return existing


def unfinished(out: Path, planned: Manifest, overwrite: bool) -> Manifest:
    """How far an interrupted run with the same inputs came, or `planned`, whose counts are zero, to begin anew.

    Raises ReflowlensError if an interrupted run had other inputs, unless it may be overwritten.
    """
    folder = partial_folder(out)
    if (folder / _PROGRESS_NAME).exists():
        progress = read_manifest(folder, _PROGRESS_NAME)
        if (difference := progress.difference(planned)) is None:
            return progress
        if not overwrite:
            raise ReflowlensError(
                f"{str(out)!r} holds an unfinished run with other inputs ({difference}): finish it with its own, "
                "choose another folder, or --overwrite"
            )
    discard(out)
    return planned


def is_complete(out: Path) -> bool:
    """Whether all tokens are there, so that `publish` is all that remains."""
    return (partial_folder(out) / MANIFEST_NAME).exists()


def save_progress(out: Path, progress: Manifest) -> None:
    with replacing(partial_folder(out) / _PROGRESS_NAME) as temporary:
        _write_manifest(temporary, progress)


def discard(out: Path) -> None:
    shutil.rmtree(partial_folder(out), ignore_errors=True)


class SplitWriter:
    """Appends token ids to the unfinished files of one split, each of `shard_bytes` but the last.

    Begins after the tokens that `progress` counts: what a killed run wrote beyond them is cut off.
    """

    def __init__(self, out: Path, split: str, progress: Manifest) -> None:
        self._out, self._split = out, split
        self._shard_tokens = _shard_tokens(progress)
        self._dtype = np.dtype(progress.dtype)
        self._tokens = progress.splits[split].tokens
        partial_folder(out).mkdir(exist_ok=True)
        self._file = self._open()

    def _open(self) -> IO[bytes]:
        number, tokens = divmod(self._tokens, self._shard_tokens)
        path, size = _staged(self._out, self._split, number), tokens * self._dtype.itemsize
        file = path.open("ab")
        if file.tell() < size:
            raise ReflowlensError(f"{path} is damaged: remove the folder {str(path.parent)!r} and begin anew")
        file.truncate(size)
        return file

    def write(self, ids: NDArray[Any]) -> None:
        while len(ids):
            room = self._shard_tokens - self._tokens % self._shard_tokens
            part, ids = ids[:room], ids[room:]
            self._file.write(part.astype(self._dtype).tobytes())
            self._tokens += len(part)
            if len(part) == room:
                self.sync()
                self._file.close()
                self._file = self._open()

    def sync(self) -> None:
        """Have everything on the disk, so that progress may count it."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def publish(out: Path, complete: Manifest) -> Manifest:
    """Name the files, hash them, write the manifest, move all into place. Killed at any point, it can be done again."""
    folder = partial_folder(out)
    if not is_complete(out):
        splits = {split: replace(complete.splits[split], shards=_shards(out, split, complete)) for split in SPLITS}
        with replacing(folder / MANIFEST_NAME) as temporary:
            _write_manifest(temporary, replace(complete, splits=splits))
    manifest = read_manifest(folder)
    (out / MANIFEST_NAME).unlink(missing_ok=True)  # while files are exchanged the folder is not a finished one
    ours = {shard.file for split in SPLITS for shard in manifest.splits[split].shards}
    for stale in _token_files(out) - ours:
        (out / stale).unlink()
    for split in SPLITS:
        for number, shard in enumerate(manifest.splits[split].shards):
            if (staged := _staged(out, split, number)).exists():
                staged.replace(out / shard.file)
    (folder / MANIFEST_NAME).replace(out / MANIFEST_NAME)
    discard(out)
    return manifest


def _staged(out: Path, split: str, number: int) -> Path:
    return partial_folder(out) / f"{split}-{number:05}.bin"


def _shards(out: Path, split: str, complete: Manifest) -> tuple[Shard, ...]:
    tokens, size = complete.splits[split].tokens, _shard_tokens(complete)
    count = -(-tokens // size)
    shards = []
    for number in range(count):
        file = f"{split}.bin" if count == 1 else f"{split}-{number:05}-of-{count:05}.bin"
        digest = hashlib.sha256()
        with _staged(out, split, number).open("rb") as staged:
            while block := staged.read(1 << 20):
                digest.update(block)
        shards.append(Shard(file, min(size, tokens - number * size), digest.hexdigest()))
    return tuple(shards)


def _shard_tokens(manifest: Manifest) -> int:
    return manifest.shard_bytes // np.dtype(manifest.dtype).itemsize


def _token_files(out: Path) -> set[str]:
    patterns = [pattern for split in SPLITS for pattern in (f"{split}.bin", f"{split}-?????-of-?????.bin")]
    return {path.name for pattern in patterns for path in out.glob(pattern)}


def _write_manifest(path: Path, manifest: Manifest) -> None:
    path.write_text(json.dumps(asdict(manifest), indent=1) + "\n", encoding="utf-8")
