"""A prepared folder: `train.bin`, `val.bin` and the manifest that says what they are.

A `.bin` file is raw little-endian token ids, documents one after another, each followed by the tokenizer's end id
(`<|endoftext|>`; for `bytes`, which has none, the byte 0).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reflowlens.errors import ReflowlensError

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
SPLITS = ("train", "val")


@dataclass(frozen=True)
class SplitRecord:
    """What a `.bin` file holds. `text_bytes` counts the documents' UTF-8, so losses can be given in bits per byte."""

    tokens: int
    documents: int
    text_bytes: int


@dataclass(frozen=True)
class SourceRecord:
    """One source: its name, the sha256 and size of the file as it lies, its documents, and what they were used for."""

    name: str
    sha256: str
    bytes: int
    documents: int
    role: str  # "train", "val", or "both": split by document


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`: what was prepared, from what, and how. `val_fraction` is None where `val_sources` were given."""

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

    def same_inputs(self, other: Manifest) -> bool:
        """Whether both were made from the same texts in the same way, so that their tokens are the same."""
        return self._inputs() == other._inputs()

    def _inputs(self) -> tuple[Any, ...]:
        sources = tuple((source.sha256, source.role) for source in self.sources)
        how = (self.tokenizer, self.seed, self.val_fraction, self.separator, self.text_field)
        return (self.format_version, *how, sources)


@dataclass(frozen=True)
class TokenData:
    """One split of a prepared folder: its tokens [n_tokens], memory-mapped, and the folder's manifest."""

    tokens: NDArray[Any]
    manifest: Manifest


def open_tokens(folder: str | Path, split: str) -> TokenData:
    """Open the "train" or "val" tokens of a folder that `prepare` made. Nothing is read until it is used.

    Raises ReflowlensError if the folder is not a finished one, or a file is not as long as the manifest says.

    >>> data = open_tokens("runs/mix16k", "train")          # doctest: +SKIP
    >>> x, y = batch_at(data.tokens, step=0, batch_size=8, context=256, seed=0)     # doctest: +SKIP
    """
    if split not in SPLITS:
        raise ReflowlensError(f"no split {split!r}: there are {' and '.join(SPLITS)}")
    folder = Path(folder)
    manifest = read_manifest(folder)
    record = manifest.splits[split]
    path, dtype = folder / f"{split}.bin", np.dtype(manifest.dtype)
    expected = record.tokens * dtype.itemsize
    actual = path.stat().st_size if path.exists() else 0
    if actual != expected:
        raise ReflowlensError(
            f"{path} is damaged: {actual:,} bytes, and the manifest says {expected:,} "
            f"({record.tokens:,} tokens of {manifest.dtype}); prepare the data again with overwrite"
        )
    return TokenData(tokens=np.memmap(path, dtype=dtype, mode="r"), manifest=manifest)


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a prepared folder. Raises ReflowlensError if there is none, or it cannot be understood."""
    path = Path(folder) / MANIFEST_NAME
    if not path.is_file():
        raise ReflowlensError(f"no prepared data in {str(folder)!r}: it has no finished {MANIFEST_NAME}")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["format_version"] != FORMAT_VERSION:
            raise ReflowlensError(
                f"{path} has format version {stored['format_version']}, and this library reads {FORMAT_VERSION}"
            )
        stored["splits"] = {split: SplitRecord(**stored["splits"][split]) for split in SPLITS}
        stored["sources"] = tuple(SourceRecord(**source) for source in stored["sources"])
        return Manifest(**stored)
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ReflowlensError(f"{path} is damaged: {type(error).__name__}: {error}") from error
