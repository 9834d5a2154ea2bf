"""Where documents come from: text files, JSON lines, folders of these, and data sets of the `datasets` library.

A document of a text file is what stands between two lines that hold only the separator, without the newline that ends
its last line. Line ends are read as "\\n" whatever the file uses. Documents of white space alone are passed over.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any
from unittest.mock import patch

from reflowlens.errors import ReflowlensError

SUFFIXES = tuple(kind + packing for kind in (".txt", ".jsonl") for packing in ("", ".gz", ".xz"))


@dataclass(frozen=True)
class Source:
    """A file or a data set. `sha256` and `bytes` are those of the file as it lies, or of a data set's documents."""

    name: str
    sha256: str
    bytes: int
    documents: Callable[[], Iterator[tuple[str, int]]]
    """Each document, with how many of `bytes` had been read when it was complete."""


def find_sources(names: Sequence[str | Path], separator: str, text_field: str, split: str) -> list[Source]:
    """The sources that these names mean, in order: a file, every readable file under a folder, or else a data set.

    `text_field` is the field of JSON lines and data sets that holds the text; `split` is the split of a data set.
    Raises ReflowlensError if there is no such file, or its kind cannot be read, or the data set cannot be had.
    """
    sources: list[Source] = []
    for name in names:
        path = Path(name).expanduser()
        if path.is_dir():
            inside = sorted(found for found in path.rglob("*") if found.name.endswith(SUFFIXES))
            if not inside:
                raise ReflowlensError(f"no text in folder {str(name)!r}: expected files named {', '.join(SUFFIXES)}")
            sources += [
                _file_source(found, found.relative_to(path).as_posix(), separator, text_field) for found in inside
            ]
        elif path.exists():
            sources.append(_file_source(path, path.name, separator, text_field))
        elif isinstance(name, str) and _may_be_a_dataset(name):
            sources.append(_dataset_source(name, text_field, split))
        else:
            raise ReflowlensError(f"no file or folder {str(name)!r}")
    return sources


def _may_be_a_dataset(name: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) is not None and not name.endswith(SUFFIXES)


# --------------------------------------------------------------------------------------------------------------- files


def _file_source(path: Path, name: str, separator: str, text_field: str) -> Source:
    if not path.name.endswith(SUFFIXES):
        raise ReflowlensError(f"cannot read {name!r}: expected a file named {', '.join(SUFFIXES)}")
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise ReflowlensError(f"cannot read {name!r}: {error.strerror}") from error
    split_documents = (
        partial(_json_documents, name=name, text_field=text_field)
        if ".jsonl" in path.suffixes[-2:]
        else partial(_text_documents, separator=separator)
    )
    documents = partial(_file_documents, path, name, split_documents)
    return Source(name=name, sha256=digest.hexdigest(), bytes=path.stat().st_size, documents=documents)


def _file_documents(
    path: Path, name: str, split_documents: Callable[[IO[str]], Iterator[str]]
) -> Iterator[tuple[str, int]]:
    complete = 0
    with path.open("rb") as raw:
        try:
            with io.TextIOWrapper(_unpacked(raw, path.suffix), encoding="utf-8") as text:
                for document in split_documents(text):
                    complete += 1
                    yield document, raw.tell()
        except UnicodeDecodeError as error:
            raise ReflowlensError(f"{name!r} is not valid UTF-8 after document {complete}: {error.reason}") from error
        except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise ReflowlensError(f"{name!r} cannot be unpacked, it is damaged or cut short: {error}") from error
    if not complete:
        raise ReflowlensError(f"{name!r} holds no text")


def _unpacked(raw: IO[bytes], suffix: str) -> Any:
    if suffix == ".xz":
        return lzma.open(raw)
    return gzip.open(raw) if suffix == ".gz" else raw


def _text_documents(lines: IO[str], separator: str) -> Iterator[str]:
    document: list[str] = []
    for line in lines:
        if line.rstrip("\n") == separator:
            yield from _joined(document)
            document = []
        else:
            document.append(line)
    yield from _joined(document)


def _joined(lines: list[str]) -> Iterator[str]:
    text = "".join(lines).removesuffix("\n")
    if text.strip():
        yield text


def _json_documents(lines: IO[str], name: str, text_field: str) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ReflowlensError(f"{name!r}, line {number} is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise ReflowlensError(f"{name!r}, line {number} is not a JSON object with a field {text_field!r}")
        text = _field(record, text_field, f"{name!r}, line {number}")
        if text.strip():
            yield text


def _field(record: dict[str, Any], text_field: str, where: str) -> str:
    text = record.get(text_field)
    if not isinstance(text, str):
        textual = [key for key, value in record.items() if isinstance(value, str)]
        raise ReflowlensError(
            f"{where} has no text in field {text_field!r}; fields with text: {', '.join(textual) or 'none'}"
        )
    # JSON can spell half of a surrogate pair, which no UTF-8 text holds.
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# ----------------------------------------------------------------------------------------------------------- data sets


def _dataset_source(name: str, text_field: str, split: str) -> Source:
    """A data set of the `datasets` library, from its hub or from the cache of an earlier download."""
    import datasets

    reachable = _hub_answers(name)
    try:
        # Where there is no hub, look in the cache at once: the library would first try to connect for half a minute.
        with nullcontext() if reachable else patch.object(datasets.config, "HF_HUB_OFFLINE", True):
            dataset = datasets.load_dataset(name, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        message = f"there is no file or folder {name!r}, and no data set of this name could be loaded: "
        if reachable:
            raise ReflowlensError(message + _first_line(error)) from error
        raise ReflowlensError(
            message + "the hub is unreachable and no earlier download was found. "
            "Download it where there is a network, or give text files (.txt, .jsonl, .gz, .xz) instead"
        ) from error
    documents = partial(_dataset_documents, dataset, name, text_field)
    digest, size = hashlib.sha256(), 0
    for text, size in documents():  # noqa: B007  (the last size is the whole)
        digest.update(text.encode("utf-8") + b"\0")
    return Source(name=f"{name} [{split}]", sha256=digest.hexdigest(), bytes=size, documents=documents)


def _hub_answers(name: str) -> bool:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().dataset_info(name, timeout=10)
    except HfHubHTTPError:  # an answer, if only to say that there is no such data set
        return True
    except Exception:  # which errors of connection there are depends on the HTTP library beneath
        return False
    return True


def _dataset_documents(dataset: Any, name: str, text_field: str) -> Iterator[tuple[str, int]]:
    size = 0
    for number, record in enumerate(dataset, start=1):
        text = _field(record, text_field, f"data set {name!r}, record {number}")
        size += len(text.encode("utf-8"))
        if text.strip():
            yield text, size
    if not size:
        raise ReflowlensError(f"data set {name!r} holds no text")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
