"""The documents of one file, on this machine or on the hub: text, JSON lines, or a table that `datasets` reads.

A document of a text file is what stands between two lines that hold only the separator, without the newline that ends
its last line. Line ends are read as "\\n" whatever the file uses, and a byte-order mark is no text. Documents of white
space alone are passed over.
"""

from __future__ import annotations

import gzip
import io
import json
import logging
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from reflowlens.errors import ReflowlensError

LINES = tuple(kind + packing for kind in (".txt", ".jsonl") for packing in ("", ".gz", ".xz"))
TABLES = {".parquet": "parquet", ".arrow": "arrow", ".json": "json"}
READABLE = (*LINES, *TABLES)
HUB_SCHEME = "hf://"

TEXT_ENCODING = "utf-8-sig"  # UTF-8, with or without the byte-order mark that editors under Windows put in front

_SPEAKERS = ("User", "Assistant")


def ending(name: str) -> str | None:
    """What of `READABLE` a file's name ends with, in upper or lower case.

    >>> ending("PART1.TXT.GZ"), ending("notes.md")
    ('.txt.gz', None)
    """
    return next((known for known in READABLE if name.lower().endswith(known)), None)


def read_documents(location: str, name: str, separator: str, text_field: str) -> Iterator[tuple[str, int]]:
    """Each document of a file, with how many of the file's bytes had been read when it was complete.

    location: a path, or a file on the hub as `datasets` spells it, "hf://datasets/NAME@REVISION/PATH".
    name: what to call it in errors.
    text_field: of JSON lines and tables, the field with the text, or with a conversation: a list of turns, user first.

    Raises ReflowlensError if the file is damaged or has no such field or no text, ConnectionError if the hub fails.
    """
    complete = 0
    try:
        for text, position in _read(location, name, separator, text_field):
            if text.strip():
                complete += 1
                yield text, position
    except ReflowlensError:
        raise
    except UnicodeDecodeError as error:
        raise ReflowlensError(f"{name!r} is not valid UTF-8 after document {complete}: {error.reason}") from error
    except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ReflowlensError(f"{name!r} cannot be unpacked, it is damaged or cut short: {error}") from error
    except Exception as error:  # which there are depends on the libraries that read tables and the hub
        if location.startswith(HUB_SCHEME):
            raise ConnectionError(f"reading {name!r} from the hub failed: {one_line(error)}") from error
        raise ReflowlensError(f"{name!r} cannot be read, it is damaged or cut short: {one_line(error)}") from error
    if not complete:
        raise ReflowlensError(f"{name!r} holds no text")


def _read(location: str, name: str, separator: str, text_field: str) -> Iterator[tuple[str, int]]:
    kind = ending(location)
    if kind not in LINES:
        yield from ((text, 0) for text in _table_documents(location, name, text_field))
        return
    with _open(location) as raw, io.TextIOWrapper(_unpacked(raw, kind), encoding=TEXT_ENCODING) as lines:
        json_lines = kind.startswith(".jsonl")
        texts = _json_documents(lines, name, text_field) if json_lines else _text_documents(lines, separator)
        for text in texts:
            yield text, raw.tell()


def _open(location: str) -> Any:
    if location.startswith(HUB_SCHEME):
        from huggingface_hub import HfFileSystem

        return HfFileSystem().open(location, "rb")
    return Path(location).open("rb")


def _unpacked(raw: IO[bytes], kind: str) -> Any:
    if kind.endswith(".xz"):
        return lzma.open(raw)
    return gzip.open(raw) if kind.endswith(".gz") else raw


def _text_documents(lines: IO[str], separator: str) -> Iterator[str]:
    document: list[str] = []
    for line in lines:
        if line.rstrip("\n") == separator:
            yield "".join(document).removesuffix("\n")
            document = []
        else:
            document.append(line)
    yield "".join(document).removesuffix("\n")


def _json_documents(lines: IO[str], name: str, text_field: str) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ReflowlensError(f"{name!r}, line {number} is not JSON: {error}") from error
        yield _field(record, text_field, f"{name!r}, line {number}")


def _table_documents(location: str, name: str, text_field: str) -> Iterator[str]:
    import datasets

    module = TABLES.get(ending(location) or "", "json")  # .json.gz and the like
    with quiet_libraries():
        records = datasets.load_dataset(module, data_files=[location], split="train", streaming=True)
        for number, record in enumerate(records, start=1):
            yield _field(record, text_field, f"{name!r}, record {number}")


def _field(record: object, text_field: str, where: str) -> str:
    if not isinstance(record, dict):
        raise ReflowlensError(f"{where} is not a JSON object with a field {text_field!r}")
    text = _text(record.get(text_field))
    if text is None:
        textual = [key for key, value in record.items() if _text(value) is not None]
        raise ReflowlensError(
            f"{where} has no text in field {text_field!r}; fields with text: {', '.join(textual) or 'none'}"
        )
    # JSON can spell half of a surrogate pair, which no UTF-8 text holds.
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _text(value: object) -> str | None:
    """A text as it is; the turns of a conversation, each under its speaker's name; None for anything else.

    >>> _text(["What is two and two?", "Four."])
    'User: What is two and two?\\n\\nAssistant: Four.'
    """
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(turn, str) for turn in value):
        return "\n\n".join(f"{_SPEAKERS[number % 2]}: {turn}" for number, turn in enumerate(value))
    return None


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep `datasets` and its hub client from logging what is about to be one clear error."""
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def one_line(error: BaseException) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__
