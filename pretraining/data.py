"""Text, tokenised once into a folder of memory-mapped files (`pretraining.token_files` says what they hold)."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from pretraining.batches import batch_at, blocks_per_epoch, sequential_batches, spread_batches
from pretraining.encoding import Encoded, Encoder, added, encoded_documents
from pretraining.local_files import Selection, Source
from pretraining.sources import find_sources
from pretraining.staging import (
    SplitWriter,
    discard,
    finished,
    is_complete,
    partial_folder,
    publish,
    save_progress,
    unfinished,
)
from pretraining.token_files import (
    FORMAT_VERSION,
    SHARD_BYTES,
    SPLITS,
    Manifest,
    SourceRecord,
    SplitRecord,
    TokenData,
    TokenShards,
    TokenStream,
    open_tokens,
    read_manifest,
)
from reflowlens.errors import ReflowlensError
from reflowlens.storage.atomic import sole_writer
from reflowlens.tokenizers.base import END_OF_TEXT
from reflowlens.tokenizers.by_name import get_tokenizer

__all__ = [
    "Manifest",
    "SourceRecord",
    "SplitRecord",
    "TokenData",
    "TokenShards",
    "TokenStream",
    "batch_at",
    "blocks_per_epoch",
    "open_tokens",
    "prepare",
    "read_manifest",
    "sequential_batches",
    "spread_batches",
]

_SAVE_SECONDS = 5.0


def prepare(
    sources: str | Path | Sequence[str | Path],
    out_dir: str | Path,
    tokenizer: str = "gpt2_16k",
    *,
    val_fraction: float = 0.01,
    val_sources: str | Path | Sequence[str | Path] | None = None,
    val_split: str | None = None,
    separator: str = END_OF_TEXT,
    text_field: str | None = None,
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
    max_documents: int | None = None,
    max_tokens: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    workers: int | None = None,
    seed: int = 0,
    progress: bool = True,
    overwrite: bool = False,
) -> Manifest:
    """Tokenise documents into `train.bin`, `val.bin` and `manifest.json` in `out_dir`.

    sources: files (.txt or .jsonl, also .gz or .xz; .parquet, .arrow, .json), folders of these, or, where no such path
        exists, data sets of the hub: openwebtext, lima, tinystories or any name. See `pretraining.readers` for what a
        document is, `pretraining.sources` for which files of a folder are read and what `split`, `config`, `revision`
        and `text_field` choose.
    val_fraction: this share of the documents validates. Which ones is decided by a hash of (seed, text): it depends on
        neither order nor workers, and a text that occurs twice falls on one side.
    val_sources, val_split: validate on these instead (default: `sources`), of which this split is read (default:
        `split`), and train on all of `sources`.
    max_documents, max_tokens: stop before there are more, training and the share that validates taken together;
        validation apart is read whole.
    shard_bytes: a split larger than this is written in several files, read as one stream.
    workers: processes that tokenise (default: one a core; they are started for more than a few megabytes). The output
        does not depend on it. A script that uses more than one must guard its own start: `if __name__ == "__main__":`.
    overwrite: replace what an earlier run left in `out_dir`. Without it, a folder made from the same inputs is left as
        it is, and one made from others is an error.

    Ids are uint16 where the tokenizer has at most 65,536 tokens, else uint32. The files appear when complete, the
    manifest last. A run that was interrupted, even killed, is continued by the same call, and ends with the same bytes.

    Raises ReflowlensError for a missing, empty or damaged source (named), a data set that cannot be had, no document in
    a split, or a full disk.

    >>> manifest = prepare("corpus/", "runs/corpus", tokenizer="gpt2")        # doctest: +SKIP
    >>> manifest.splits["train"].tokens                                       # doctest: +SKIP
    """
    apart = val_sources is not None or val_split is not None
    _check_positive(max_documents=max_documents, max_tokens=max_tokens, workers=workers)
    if not apart and not 0 < val_fraction < 1:
        raise ReflowlensError(f"val_fraction must lie between 0 and 1, and is {val_fraction}")
    if shard_bytes < 4:
        raise ReflowlensError(f"shard_bytes must be at least one token of 4 bytes, and is {shard_bytes}")
    out, chosen = Path(out_dir), get_tokenizer(tokenizer)
    selection = Selection(split, config, revision, text_field, separator)
    found = [(source, "train" if apart else "both") for source in find_sources(_as_list(sources), selection, progress)]
    if apart:
        selection = replace(selection, split=val_split or split)
        validating = find_sources(_as_list(sources if val_sources is None else val_sources), selection, progress)
        found += [(source, "val") for source in validating]
    planned = Manifest(
        format_version=FORMAT_VERSION,
        tokenizer=chosen.name,
        n_vocab=chosen.n_vocab,
        end_id=0 if chosen.eot_token is None else chosen.eot_token,
        dtype="<u2" if chosen.n_vocab <= 1 << 16 else "<u4",
        seed=seed,
        val_fraction=None if apart else val_fraction,
        separator=separator,
        text_field=text_field or "text",
        splits={name: SplitRecord(0, 0, 0) for name in SPLITS},
        sources=tuple(_record(source, role) for source, role in found),
        max_documents=max_documents,
        max_tokens=max_tokens,
        shard_bytes=shard_bytes,
    )
    _check_disjoint(planned.sources)
    with _preparing(out, progress):
        if not overwrite and (existing := finished(out, planned)) is not None:
            if progress:
                print(f"{out} already holds these tokens: left as it is", file=sys.stderr)
            return existing
        counted = unfinished(out, planned, overwrite)
        if not is_complete(out):
            encode, workers = Encoder.of(tokenizer, planned), workers or os.cpu_count() or 1
            counted = _tokenise(out, counted, [source for source, _ in found], encode, workers, progress)
        return publish(out, counted)


@contextmanager
def _preparing(out: Path, progress: bool) -> Iterator[None]:
    """Keep other processes out of the folder, and say of what ends the work early what was kept of it.

    Raises:
        ReflowlensError: a disk that is full or cannot be written, a worker that died, another process in the folder.
    """
    try:
        with sole_writer(out, "preparing"):
            yield
    except OSError as error:
        what = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise ReflowlensError(f"cannot prepare {str(out)!r}: {what}{_kept(out)}") from error
    except KeyboardInterrupt:
        if progress:
            print(f"stopped{_kept(out)}", file=sys.stderr)
        raise
    except BrokenProcessPool as error:
        raise ReflowlensError(
            f"cannot prepare {str(out)!r}: a worker process died (out of memory? a script must guard its start with "
            f"`if __name__ == '__main__'`){_kept(out)}, perhaps with fewer workers"
        ) from error


def _check_positive(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ReflowlensError(f"{name} must be positive, and is {count}")


def _as_list(sources: str | Path | Sequence[str | Path]) -> list[str | Path]:
    listed = [sources] if isinstance(sources, (str, Path)) else list(sources)
    if not listed:
        raise ReflowlensError("no sources: give at least one file, folder or data set")
    return listed


def _record(source: Source, role: str) -> SourceRecord:
    return SourceRecord(source.name, source.sha256, source.bytes, 0, role, source.revision)


def _check_disjoint(records: Sequence[SourceRecord]) -> None:
    training = {record.identity: record.name for record in records if record.role == "train"}
    for record in records:
        if record.role == "val" and record.identity in training:
            raise ReflowlensError(
                f"{record.name!r} is given both to train on ({training[record.identity]!r}) and to validate"
            )


def _kept(out: Path) -> str:
    folder = partial_folder(out)
    return f"; the same command goes on from what was done so far ({folder})" if folder.exists() else ""


def _tokenise(
    out: Path, start: Manifest, found: Sequence[Source], encode: Encoder, workers: int, progress: bool
) -> Manifest:
    """Write the tokens of all documents that `start` does not count yet, and return the counts of all.

    Bad input leaves nothing behind; after anything else that ends it, the run can be continued.
    """
    so_far = start
    with ExitStack() as stack:
        writers = [stack.enter_context(closing(SplitWriter(out, split, start))) for split in SPLITS]

        def save() -> None:
            for writer in writers:
                writer.sync()
            save_progress(out, so_far)

        try:
            bar = stack.enter_context(_bar(found, progress))
            saved = time.monotonic()
            for encoded in stack.enter_context(closing(encoded_documents(start, found, encode, workers))):
                for split, writer in zip(SPLITS, writers, strict=True):
                    writer.write(encoded.ids[split])
                so_far = _counted(so_far, encoded)
                bar.update(encoded.chunk.position - bar.n)
                bar.set_postfix(tokens=f"{sum(split.tokens for split in so_far.splits.values()):,}", refresh=False)
                if time.monotonic() - saved > _SAVE_SECONDS:
                    save()
                    saved = time.monotonic()
            _check_no_split_is_empty(so_far)
            save()
        except ReflowlensError:
            discard(out)
            raise
        except BaseException:
            with suppress(
                OSError, ValueError
            ):  # a full disk, or a file that was just being changed: the last save holds
                save()
            raise
    return so_far


def _bar(found: Sequence[Source], progress: bool) -> tqdm[NoReturn]:
    return tqdm(
        total=sum(source.bytes for source in found) or None,
        unit="B",
        unit_scale=True,
        desc="tokenising",
        disable=None if progress else True,  # None: disabled unless on a terminal
    )


def _counted(so_far: Manifest, encoded: Encoded) -> Manifest:
    more = Counter(encoded.chunk.owners)
    sources = list(so_far.sources)
    for number, count in more.items():
        sources[number] = replace(sources[number], documents=sources[number].documents + count)
    splits = {split: added(so_far.splits[split], encoded.counts[split]) for split in SPLITS}
    return replace(so_far, splits=splits, sources=tuple(sources))


def _check_no_split_is_empty(complete: Manifest) -> None:
    total = sum(source.documents for source in complete.sources)
    for split in SPLITS:
        if not complete.splits[split].documents:
            limits = "" if complete.max_tokens is None else f" and max_tokens {complete.max_tokens}"
            raise ReflowlensError(
                f"none of {total} documents fell to {split!r} with val_fraction {complete.val_fraction}{limits}: "
                "change it, give val_sources, or mark the documents off with a line of only the separator"
            )
