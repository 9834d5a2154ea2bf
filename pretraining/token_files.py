"""A prepared folder: token files of a training and a validation split, and the manifest that says what they are.

A `.bin` file is raw little-endian token ids, documents one after another, each followed by the tokenizer's end id
(`<|endoftext|>`; for `bytes`, which has none, the byte 0). A split is `train.bin`, or, where it is larger than a shard,
`train-00000-of-00003.bin` and so on: one stream, cut anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

from reflowlens.errors import ReflowlensError
from reflowlens.storage.opening import file_hash

FORMAT_VERSION = 2  # version 1 knew one file a split and no revisions; it is read as well
MANIFEST_NAME = "manifest.json"
SPLITS = ("train", "val")
SHARD_BYTES = 2**31


@dataclass(frozen=True)
class Shard:
    """One `.bin` file. `sha256` is None in folders of format version 1."""

    file: str
    tokens: int
    sha256: str | None


@dataclass(frozen=True)
class SplitRecord:
    """What a split holds. `text_bytes` counts the documents' UTF-8, so losses can be given in bits per byte."""

    tokens: int
    documents: int
    text_bytes: int
    shards: tuple[Shard, ...] = ()


@dataclass(frozen=True)
class SourceRecord:
    """One source file: its name, the sha256 and size of the file as it lies, its documents, and their use.

    A file on the hub has a `revision` (the commit of its data set) and, where the hub tells, a sha256.
    """

    name: str
    sha256: str | None
    bytes: int
    documents: int
    role: str  # "train", "val", or "both": split by document
    revision: str | None = None

    @property
    def identity(self) -> str:
        """What tells its content from any other: the hash, or the name at a revision."""
        return self.sha256 or f"{self.name}@{self.revision}"


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`: what was prepared, from what, and how.

    `val_fraction` is None where validation has sources of its own; `text_field` is the one asked for, and a data set
    with a short name has its own (`pretraining.hub`).
    """

    format_version: int
    tokenizer: str
    n_vocab: int
    end_id: int
    dtype: str
    seed: int
    val_fraction: float | None
    separator: str
    text_field: str
    splits: dict[str, SplitRecord]
    sources: tuple[SourceRecord, ...]
    max_documents: int | None = None
    max_tokens: int | None = None
    shard_bytes: int = SHARD_BYTES

    def same_inputs(self, other: Manifest) -> bool:
        """Whether both were made from the same texts in the same way, so that their files are the same."""
        return self.difference(other) is None

    def difference(self, other: Manifest) -> str | None:
        """The first thing in which the inputs differ, in words; None where they are the same."""
        names = ("tokenizer", "seed", "val_fraction", "separator", "text_field", "max_documents", "max_tokens")
        for name in (*names, "shard_bytes"):
            if (here := getattr(self, name)) != (there := getattr(other, name)):
                return f"{name} is {here!r} there and {there!r} here"
        ours, theirs = ([(source.identity, source.role) for source in one.sources] for one in (self, other))
        return None if ours == theirs else "the sources are others, or have changed"


class TokenShards:
    """Memory-mapped arrays read as one stream [n_tokens]: slices are arrays, copied only as far as they reach.

    >>> stream = TokenShards([np.arange(3), np.arange(3, 5)])
    >>> len(stream), stream[1:4]
    (5, array([1, 2, 3]))
    """

    def __init__(self, shards: Sequence[NDArray[Any]]) -> None:
        self._shards = tuple(shards)
        self._ends = np.array(list(accumulate(len(shard) for shard in shards)))

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._shards[0].dtype

    @property
    def shape(self) -> tuple[int]:
        return (len(self),)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: slice) -> NDArray[Any]:
        start, stop, step = index.indices(len(self))
        if step != 1:
            raise IndexError("a stream of tokens is read in order: slices have step 1")
        stop = max(start, stop)
        first = min(int(np.searchsorted(self._ends, start, side="right")), len(self._shards) - 1)
        last = max(first, int(np.searchsorted(self._ends, stop)))
        parts = []
        for number in range(first, last + 1):
            begin = int(self._ends[number]) - len(self._shards[number])
            parts.append(self._shards[number][max(0, start - begin) : stop - begin])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self[:], dtype=dtype)


TokenStream: TypeAlias = NDArray[Any] | TokenShards


@dataclass(frozen=True)
class TokenData:
    """One split of a prepared folder: its tokens [n_tokens], memory-mapped, and the folder's manifest."""

    tokens: TokenStream
    manifest: Manifest


def open_tokens(folder: str | Path, split: str) -> TokenData:
    """Open the "train" or "val" tokens of a folder that `prepare` made. Nothing is read until it is used;
    `check_tokens` reads it whole.

    Raises ReflowlensError if the folder is not a finished one, or a file is not as long as the manifest says.

    >>> data = open_tokens("runs/mix16k", "train")          # doctest: +SKIP
    >>> x, y = batch_at(data.tokens, step=0, batch_size=8, context=256, seed=0)     # doctest: +SKIP
    """
    if split not in SPLITS:
        raise ReflowlensError(f"no split {split!r}: there are {' and '.join(SPLITS)}")
    folder = Path(folder)
    manifest = read_manifest(folder)
    shards = [_open_shard(folder / shard.file, shard, manifest) for shard in manifest.splits[split].shards]
    return TokenData(tokens=shards[0] if len(shards) == 1 else TokenShards(shards), manifest=manifest)


def check_tokens(folder: str | Path, split: str) -> None:
    """Read the files of a split once, and raise ReflowlensError if one is not as it was prepared, by its hash.

    Folders of format version 1 record no hashes.
    """
    for shard in read_manifest(folder).splits[split].shards:
        path = Path(folder) / shard.file
        if shard.sha256 is not None and file_hash(path) != shard.sha256:
            raise ReflowlensError(
                f"{path} is not the file that was prepared (its SHA-256 differs): prepare the data again with "
                f"--overwrite, or take it as it is: give it the sha256 null in {MANIFEST_NAME}"
            )


def _open_shard(path: Path, shard: Shard, manifest: Manifest) -> NDArray[Any]:
    dtype = np.dtype(manifest.dtype)
    expected = shard.tokens * dtype.itemsize
    actual = path.stat().st_size if path.exists() else 0
    if actual != expected:
        raise ReflowlensError(
            f"{path} is damaged: {actual:,} bytes, and the manifest says {expected:,} "
            f"({shard.tokens:,} tokens of {manifest.dtype}); prepare the data again with --overwrite"
        )
    return np.memmap(path, dtype=dtype, mode="r")


def read_manifest(folder: str | Path, name: str = MANIFEST_NAME) -> Manifest:
    """The manifest of a prepared folder. Raises ReflowlensError if there is none, or it cannot be understood."""
    path = Path(folder) / name
    if not path.is_file():
        raise ReflowlensError(
            f"no prepared data in {str(folder)!r}: it has no finished {name}; reflowlens prepare makes it of text"
        )
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        version = stored["format_version"]
        if version not in (1, FORMAT_VERSION):
            raise ReflowlensError(f"{path} has format version {version}, and this library reads 1 and {FORMAT_VERSION}")
        splits = {split: dict(stored["splits"][split]) for split in SPLITS}
        for split, record in splits.items():
            if version == 1:
                record["shards"] = [{"file": f"{split}.bin", "tokens": record["tokens"], "sha256": None}]
            record["shards"] = tuple(Shard(**shard) for shard in record["shards"])
        stored["splits"] = {split: SplitRecord(**record) for split, record in splits.items()}
        stored["sources"] = tuple(SourceRecord(**source) for source in stored["sources"])
        return Manifest(**stored)
    except (AttributeError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ReflowlensError(f"{path} is damaged: {type(error).__name__}: {error}") from error
