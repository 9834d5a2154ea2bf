"""Documents to token ids, a chunk at a time, by as many processes as are worth starting, in the order they are read."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate, chain, islice
from typing import Any

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray

from pretraining.local_files import Source
from pretraining.token_files import SPLITS, Manifest, SplitRecord
from reflowlens.tokenizers.base import Tokenizer
from reflowlens.tokenizers.by_name import get_tokenizer

_CHUNK_CHARACTERS = 1 << 20
_FEW_CHUNKS = 4  # tokenised in less time than processes take to start


@dataclass(frozen=True)
class Chunk:
    """Consecutive documents: their texts, the number of the source of each, and how far all sources are read by then.

    role: as in `SourceRecord`.
    """

    role: str
    texts: tuple[str, ...]
    owners: tuple[int, ...]
    position: int

    def first(self, n: int) -> Chunk:
        return replace(self, texts=self.texts[:n], owners=self.owners[:n])


@dataclass(frozen=True)
class Encoded:
    """A chunk and its tokens: the ids and counts of each split, and the length of each document with its end id."""

    chunk: Chunk
    ids: dict[str, NDArray[Any]]
    counts: dict[str, SplitRecord]
    lengths: Int[np.ndarray, " documents"]


@dataclass(frozen=True)
class Encoder:
    """What a worker process needs to know. It opens the tokenizer itself, by name or path: those cannot be sent."""

    tokenizer: str
    end_id: int
    dtype: str
    seed: int
    val_fraction: float | None

    @classmethod
    def of(cls, tokenizer: str, manifest: Manifest) -> Encoder:
        return cls(tokenizer, manifest.end_id, manifest.dtype, manifest.seed, manifest.val_fraction)

    def __call__(self, chunk: Chunk) -> Encoded:
        tokenizer = _opened(self.tokenizer)
        end = np.array([self.end_id], dtype=np.uint32)
        parts: dict[str, list[NDArray[Any]]] = {split: [end[:0]] for split in SPLITS}
        counts = {split: SplitRecord(0, 0, 0) for split in SPLITS}
        lengths = []
        for text in chunk.texts:
            split = chunk.role if chunk.role != "both" else _side(text, self.seed, self.val_fraction or 0.0)
            ids = tokenizer.encode_to_numpy(text)
            parts[split] += [ids, end]
            lengths.append(len(ids) + 1)
            counts[split] = added(counts[split], SplitRecord(len(ids) + 1, 1, len(text.encode())))
        joined = {split: np.concatenate(ids).astype(self.dtype) for split, ids in parts.items()}
        return Encoded(chunk, joined, counts, np.array(lengths, dtype=np.int64))


@cache
def _opened(tokenizer: str) -> Tokenizer:
    return get_tokenizer(tokenizer)


def added(left: SplitRecord, right: SplitRecord) -> SplitRecord:
    return SplitRecord(left.tokens + right.tokens, left.documents + right.documents, left.text_bytes + right.text_bytes)


def _side(text: str, seed: int, val_fraction: float) -> str:
    """Training or validation, from a hash of (seed, text) read as a number in [0, 1)."""
    digest = hashlib.blake2b(f"{seed}\0{text}".encode(), digest_size=8).digest()
    return "val" if int.from_bytes(digest, "big") / 2**64 < val_fraction else "train"


def encoded_documents(
    start: Manifest, found: Sequence[Source], encode: Encoder, workers: int
) -> Generator[Encoded, None, None]:
    """What `start` does not count yet, tokenised, until a limit is reached; then validation sources of its own."""
    apart = start.val_fraction is None
    training = [number for number, source in enumerate(start.sources) if source.role != "val"]
    validating = [number for number, source in enumerate(start.sources) if source.role == "val"]
    with _worker_processes(workers) as pool:
        documents: Iterator[tuple[int, str, int]] = _documents(start, found, training)
        if start.max_documents is not None:
            documents = islice(documents, start.max_documents - sum(start.sources[n].documents for n in training))
        encoded = _in_order(_chunks(documents, "train" if apart else "both"), encode, pool, workers)
        if start.max_tokens is not None:
            done = sum(start.splits[split].tokens for split in (SPLITS if not apart else ("train",)))
            encoded = _up_to(start.max_tokens - done, encoded, encode)
        with closing(encoded):
            yield from encoded
        if validating:
            yield from _in_order(_chunks(_documents(start, found, validating), "val"), encode, pool, workers)


def _documents(start: Manifest, found: Sequence[Source], numbers: Sequence[int]) -> Iterator[tuple[int, str, int]]:
    """Number of the source, text, and bytes of all sources read: the documents after those that `start` counts."""
    offsets = list(accumulate((source.bytes for source in found), initial=0))
    begun = [number for number in numbers if start.sources[number].documents]
    for number in numbers[numbers.index(begun[-1]) if begun else 0 :]:
        for text, position in islice(found[number].documents(), start.sources[number].documents, None):
            yield number, text, offsets[number] + position


def _up_to(max_tokens: int, encoded: Generator[Encoded, None, None], encode: Encoder) -> Generator[Encoded, None, None]:
    """As many documents as have no more tokens than this, all together."""
    with closing(encoded):
        for one in encoded:
            if one.lengths.sum() > max_tokens:
                yield encode(one.chunk.first(int(np.searchsorted(one.lengths.cumsum(), max_tokens, side="right"))))
                return
            max_tokens -= int(one.lengths.sum())
            yield one


def _chunks(documents: Iterable[tuple[int, str, int]], role: str) -> Iterator[Chunk]:
    """About a megabyte of text at a time, from (number of the source, text, position) of each document."""
    texts: list[str] = []
    owners: list[int] = []
    size = position = 0
    for owner, text, position in documents:
        texts.append(text)
        owners.append(owner)
        size += len(text)
        if size >= _CHUNK_CHARACTERS:
            yield Chunk(role, tuple(texts), tuple(owners), position)
            texts, owners, size = [], [], 0
    if texts:
        yield Chunk(role, tuple(texts), tuple(owners), position)


def _in_order(
    read: Iterator[Chunk], encode: Callable[[Chunk], Encoded], pool: ProcessPoolExecutor, workers: int
) -> Generator[Encoded, None, None]:
    """Chunks encoded by the pool, in the order they were read; only a few wait at a time, so memory stays bounded."""
    first = list(islice(read, _FEW_CHUNKS))
    if workers == 1 or len(first) < _FEW_CHUNKS:
        yield from map(encode, chain(first, read))
        return
    waiting: deque[Future[Encoded]] = deque()
    try:
        for chunk in chain(first, read):
            waiting.append(pool.submit(encode, chunk))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:  # where the reader of this stops early
            future.cancel()


@contextmanager
def _worker_processes(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes, each started when there is work for it. Threads share Python's lock with the reading of the documents:
    two of them were no faster than one.
    """
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_begin_worker)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    """Leave Ctrl-C to the parent, and end when it ends, even killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
