"""Text, tokenised once into a folder of memory-mapped files (`pretraining.token_files` says what they hold)."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pretraining.batches import batch_at, blocks_per_epoch, sequential_batches
from pretraining.sources import Source, find_sources
from pretraining.token_files import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    SPLITS,
    Manifest,
    SourceRecord,
    SplitRecord,
    TokenData,
    open_tokens,
    read_manifest,
)
from reflowlens.errors import ReflowlensError
from reflowlens.tokenizers import END_OF_TEXT, Tokenizer, get_tokenizer

__all__ = [
    "Manifest",
    "SourceRecord",
    "SplitRecord",
    "TokenData",
    "batch_at",
    "blocks_per_epoch",
    "open_tokens",
    "prepare",
    "read_manifest",
    "sequential_batches",
]

_FILES = (*(f"{split}.bin" for split in SPLITS), MANIFEST_NAME)  # the manifest last: it says that all is there
_CHUNK_CHARACTERS = 1 << 20


def prepare(
    sources: str | Path | Sequence[str | Path],
    out_dir: str | Path,
    tokenizer: str = "gpt2_16k",
    *,
    val_fraction: float = 0.01,
    val_sources: str | Path | Sequence[str | Path] | None = None,
    separator: str = END_OF_TEXT,
    workers: int | None = None,
    seed: int = 0,
    text_field: str = "text",
    split: str = "train",
    progress: bool = True,
    overwrite: bool = False,
) -> Manifest:
    """Tokenise documents into `out_dir/train.bin`, `out_dir/val.bin` and `out_dir/manifest.json`.

    sources: files (.txt or .jsonl, also .gz or .xz), folders of these, or names of data sets of the `datasets` library
        (where no such path exists), whose split `split` is taken. See `pretraining.sources` for what a document is.
    val_fraction: this share of the documents validates. Which ones is decided by a hash of (seed, text): it depends on
        neither order nor workers, and a text that occurs twice falls on one side.
    val_sources: validate on these instead, and train on all of `sources`.
    workers: threads (the tokenizer releases Python's lock); default, one a core. The output does not depend on it.
    overwrite: replace what an earlier run left in `out_dir`. Without it, a folder made from the same inputs is left as
        it is, and one made from others is an error.

    Ids are uint16 where the tokenizer has at most 65,536 tokens, else uint32. The files appear when complete, the
    manifest last; an interrupted run removes what it wrote.

    Raises ReflowlensError for a missing, empty or undecodable source (named), no document in a split, or a full disk.

    >>> manifest = prepare("corpus/", "runs/corpus", tokenizer="gpt2")        # doctest: +SKIP
    >>> manifest.splits["train"].tokens                                       # doctest: +SKIP
    """
    if val_sources is None and not 0 < val_fraction < 1:
        raise ReflowlensError(f"val_fraction must lie between 0 and 1, and is {val_fraction}")
    chosen = get_tokenizer(tokenizer)
    out = Path(out_dir)
    find = partial(find_sources, separator=separator, text_field=text_field, split=split)
    found = [(source, "both" if val_sources is None else "train") for source in find(_as_list(sources))]
    if val_sources is not None:
        found += [(source, "val") for source in find(_as_list(val_sources))]
    _check_disjoint(found)
    planned = Manifest(
        format_version=FORMAT_VERSION,
        tokenizer=tokenizer,
        n_vocab=chosen.n_vocab,
        end_id=0 if chosen.eot_token is None else chosen.eot_token,
        dtype="<u2" if chosen.n_vocab <= 1 << 16 else "<u4",
        seed=seed,
        val_fraction=val_fraction if val_sources is None else None,
        separator=separator,
        text_field=text_field,
        splits={},
        sources=tuple(SourceRecord(source.name, source.sha256, source.bytes, 0, role) for source, role in found),
    )
    if (finished := _finished(out, planned, overwrite)) is not None:
        if progress:
            print(f"{out} already holds these tokens: left as it is", file=sys.stderr)
        return finished
    try:
        return _write(out, planned, found, chosen, workers or os.cpu_count() or 1, progress)
    except OSError as error:
        what = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise ReflowlensError(f"cannot prepare {str(out)!r}: {what}; what was written has been removed") from error


def _as_list(sources: str | Path | Sequence[str | Path]) -> list[str | Path]:
    listed = [sources] if isinstance(sources, (str, Path)) else list(sources)
    if not listed:
        raise ReflowlensError("no sources: give at least one file, folder or data set")
    return listed


def _check_disjoint(found: list[tuple[Source, str]]) -> None:
    training = {source.sha256: source.name for source, role in found if role == "train"}
    for source, role in found:
        if role == "val" and source.sha256 in training:
            raise ReflowlensError(
                f"{source.name!r} is given both to train on ({training[source.sha256]!r}) and to validate"
            )


def _finished(out: Path, planned: Manifest, overwrite: bool) -> Manifest | None:
    """The manifest of an earlier run with the same inputs, whose files are sound; an error if the folder is taken."""
    if overwrite or not any((out / name).exists() for name in _FILES):
        return None
    if not (out / MANIFEST_NAME).exists():
        raise ReflowlensError(f"{str(out)!r} holds token files without a manifest: choose another folder, or overwrite")
    existing = read_manifest(out)
    if not existing.same_inputs(planned):
        raise ReflowlensError(f"{str(out)!r} holds other data already: choose another folder, or overwrite")
    for split in SPLITS:
        open_tokens(out, split)
    return existing


def _write(
    out: Path, planned: Manifest, found: list[tuple[Source, str]], tokenizer: Tokenizer, workers: int, progress: bool
) -> Manifest:
    out.mkdir(parents=True, exist_ok=True)
    partial_dir = Path(tempfile.mkdtemp(prefix=".partial-", dir=out))
    try:
        manifest = _tokenise(partial_dir, planned, found, tokenizer, workers, progress)
        (partial_dir / MANIFEST_NAME).write_text(json.dumps(asdict(manifest), indent=1) + "\n", encoding="utf-8")
        (out / MANIFEST_NAME).unlink(missing_ok=True)  # while files are exchanged the folder is not a finished one
        for name in _FILES:
            os.replace(partial_dir / name, out / name)
        return manifest
    finally:
        shutil.rmtree(partial_dir, ignore_errors=True)


@dataclass(frozen=True)
class _Chunk:
    """Consecutive documents of source `source`; `read` is how many more of its bytes they took."""

    source: int
    role: str
    texts: tuple[str, ...]
    read: int


@dataclass(frozen=True)
class _Tokens:
    """A chunk, tokenised: the ids and counts of each split."""

    chunk: _Chunk
    ids: dict[str, NDArray[Any]]
    counts: dict[str, SplitRecord]


def _tokenise(
    folder: Path,
    planned: Manifest,
    found: list[tuple[Source, str]],
    tokenizer: Tokenizer,
    workers: int,
    progress: bool,
) -> Manifest:
    counts = {split: SplitRecord(0, 0, 0) for split in SPLITS}
    documents = [0] * len(found)
    with ExitStack() as stack:
        files = {split: stack.enter_context((folder / f"{split}.bin").open("wb")) for split in SPLITS}
        bar = stack.enter_context(
            tqdm(
                total=sum(source.bytes for source, _ in found),
                unit="B",
                unit_scale=True,
                desc="tokenising",
                disable=None if progress else True,  # None: disabled unless on a terminal
            )
        )
        for done in _in_order(found, partial(_encode, planned, tokenizer), workers):
            for split in SPLITS:
                files[split].write(done.ids[split].tobytes())
                counts[split] = _sum(counts[split], done.counts[split])
            documents[done.chunk.source] += len(done.chunk.texts)
            bar.update(done.chunk.read)
    for split in SPLITS:
        if not counts[split].documents:
            total = sum(documents)
            raise ReflowlensError(
                f"none of {total} documents fell to {split!r} with val_fraction {planned.val_fraction}: "
                "change it, give val_sources, or mark the documents off with a line of only the separator"
            )
    records = tuple(replace(record, documents=n) for record, n in zip(planned.sources, documents, strict=True))
    return replace(planned, splits=counts, sources=records)


def _in_order(found: list[tuple[Source, str]], encode: Callable[[_Chunk], _Tokens], workers: int) -> Iterator[_Tokens]:
    """Chunks encoded by threads, in the order they were read; only a few wait at a time, so memory stays bounded."""
    pool = ThreadPoolExecutor(workers)
    try:
        waiting: deque[Future[_Tokens]] = deque()
        for chunk in _chunks(found):
            waiting.append(pool.submit(encode, chunk))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _chunks(found: list[tuple[Source, str]]) -> Iterator[_Chunk]:
    for index, (source, role) in enumerate(found):
        texts: list[str] = []
        size = position = before = 0
        for text, position in source.documents():
            texts.append(text)
            size += len(text)
            if size >= _CHUNK_CHARACTERS:
                yield _Chunk(index, role, tuple(texts), position - before)
                texts, size, before = [], 0, position
        yield _Chunk(index, role, tuple(texts), source.bytes - before)


def _encode(planned: Manifest, tokenizer: Tokenizer, chunk: _Chunk) -> _Tokens:
    texts: dict[str, list[str]] = {split: [] for split in SPLITS}
    for text in chunk.texts:
        side = chunk.role if chunk.role != "both" else _side(text, planned.seed, planned.val_fraction or 0.0)
        texts[side].append(text)
    end = np.array([planned.end_id], dtype=np.uint32)
    ids, counts = {}, {}
    for split, documents in texts.items():
        parts = [part for text in documents for part in (tokenizer.encode_to_numpy(text), end)]
        ids[split] = np.concatenate([end[:0], *parts]).astype(planned.dtype)
        counts[split] = SplitRecord(len(ids[split]), len(documents), sum(len(text.encode()) for text in documents))
    return _Tokens(chunk, ids, counts)


def _side(text: str, seed: int, val_fraction: float) -> str:
    """Training or validation, from a hash of (seed, text) read as a number in [0, 1)."""
    digest = hashlib.blake2b(f"{seed}\0{text}".encode(), digest_size=8).digest()
    return "val" if int.from_bytes(digest, "big") / 2**64 < val_fraction else "train"


def _sum(left: SplitRecord, right: SplitRecord) -> SplitRecord:
    return SplitRecord(left.tokens + right.tokens, left.documents + right.documents, left.text_bytes + right.text_bytes)
