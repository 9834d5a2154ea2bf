"""Files and folders of this machine: which of them a split means, and how each is read."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tqdm import tqdm

from pretraining.readers import (
    LINES,
    READABLE,
    TABLES,
    TEXT_ENCODING,
    ending,
    one_line,
    quiet_libraries,
    read_documents,
)
from reflowlens.errors import ReflowlensError
from reflowlens.tokenizers.base import END_OF_TEXT


@dataclass(frozen=True)
class Selection:
    """Which files of a folder or data set are meant, and what in them is the text.

    split, config, revision: as `datasets.load_dataset` has them (`config` is its `name`, the hub's "subset").
    text_field: None is "text", or what `pretraining.hub` knows of the data set.
    """

    split: str = "train"
    config: str | None = None
    revision: str | None = None
    text_field: str | None = None
    separator: str = END_OF_TEXT


@dataclass(frozen=True)
class Source:
    """A file. `sha256` and `bytes` are those of the file as it lies (None and 0 where the hub does not say them)."""

    name: str
    sha256: str | None
    bytes: int
    documents: Callable[[], Iterator[tuple[str, int]]]
    """Each document, with how many of `bytes` had been read when it was complete (tables: 0)."""
    revision: str | None = None


def file_source(location: str, name: str, selection: Selection, progress: bool = False) -> Source:
    """A file of this machine."""
    path, digest = Path(location), hashlib.sha256()
    try:
        size = path.stat().st_size
        bar = tqdm(total=size, unit="B", unit_scale=True, desc=name, delay=2, disable=None if progress else True)
        with bar, path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
                bar.update(len(block))
    except OSError as error:
        raise ReflowlensError(f"cannot read {name!r}: {error.strerror}") from error
    return Source(name, digest.hexdigest(), size, documents_of(location, name, selection))


def documents_of(location: str, name: str, selection: Selection) -> Callable[[], Iterator[tuple[str, int]]]:
    return partial(read_documents, location, name, selection.separator, selection.text_field or "text")


def files_of_split(path: Path, selection: Selection) -> list[str]:
    path = path.resolve()
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _saved_to_disk(path, selection)
    kind, splits = _layout(path, selection.config)
    if not (splits and _says_its_files(path)):
        files = _readable_files(path, kind)
        placed = {file: split for split, some in splits.items() for file in some}
        if not placed.keys() >= set(files):
            placed = _placed_by_name(path, files)
        splits = {}
        for file in files:
            # Of tables beside those with a split, as on the hub, none is meant.
            if file in placed or ending(file) in LINES:
                splits.setdefault(placed.get(file, "train"), []).append(file)
    if not splits:
        raise ReflowlensError(f"no text in folder {str(path)!r}: expected files named {', '.join(READABLE)}")
    return chosen_split(splits, str(path), selection)


def _says_its_files(path: Path) -> bool:
    """Whether the README's metadata, which `datasets` follows, say which files there are."""
    card = path / "README.md"
    text = card.read_text(encoding=TEXT_ENCODING, errors="replace") if card.is_file() else ""
    return re.match(r"---\n(.*\n)*?configs:(.*\n)*?---", text) is not None


def _readable_files(path: Path, kind: str) -> list[str]:
    """All files in a folder of the kind that counts: what `datasets` takes it for, else the first that there is."""
    found: dict[str, list[str]] = {}
    for file in path.rglob("*"):
        if (end := ending(file.name)) is not None and not _is_hidden(file, path) and not file.is_dir():
            found.setdefault("lines" if end in LINES else TABLES[end], []).append(str(file))
    counting = {"parquet": ["parquet"], "arrow": ["arrow"], "text": ["lines"], "json": ["lines", "json"]}
    order = counting.get(kind, ["parquet", "arrow", "lines", "json"])
    return next((found[one] for one in order if one in found), [])


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _placed_by_name(path: Path, files: Iterable[str]) -> dict[str, str]:
    """The split of each file that has one by its name, in any case. `datasets` tells lower from upper case and looks at
    files of one kind only, and is therefore shown links to them, all in lower case and named .txt."""
    with TemporaryDirectory() as folder:
        links = Path(folder).resolve()
        for number, file in enumerate(files):
            name = Path(os.path.relpath(file, path).lower().removesuffix(ending(file) or ""))
            link = links / name.with_name(f"{name.name.replace('.', '_')}_{number}.txt")
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)
        return {os.readlink(link): split for split, some in _layout(links, None)[1].items() for link in some}


def _layout(path: Path, config: str | None) -> tuple[str, dict[str, list[str]]]:
    """What `datasets` takes the folder for: a kind of file, and the files of each split."""
    import datasets

    try:
        with quiet_libraries():
            builder = datasets.load_dataset_builder(str(path), config)
    except FileNotFoundError:
        return "", {}
    except Exception as error:  # which there are for README metadata that makes no sense depends on the library
        if config is None and not _says_its_files(path):
            return "", {}  # splits of several kinds
        raise ReflowlensError(f"cannot read folder {str(path)!r}: {one_line(error)}") from error
    kind, splits = builder_files(builder)
    return (kind, splits) if kind in (*TABLES.values(), "text") else ("", {})


def builder_files(builder: Any) -> tuple[str, dict[str, list[str]]]:
    """What a builder of `datasets` reads: the kind of file ("parquet", "json", "text" ...), and each split's files."""
    files = builder.config.data_files or {}
    kind = type(builder).__module__.split(".")[-1]
    return kind, {str(split): [str(file) for file in files[split]] for split in files}


def chosen_split(splits: dict[str, list[str]], name: str, selection: Selection) -> list[str]:
    """The files of the split that is asked for, `part2` before `part10`. Raises ReflowlensError if there is none."""
    if selection.split not in splits:
        there = ", ".join(sorted(splits))
        raise ReflowlensError(f"no split {selection.split!r} in {name!r}: choose one of {there} (--split, --val-split)")
    return sorted(splits[selection.split], key=_in_natural_order)


def _in_natural_order(name: str) -> tuple[list[str | int], str]:
    """A key that sorts names with numbers as people do.

    >>> sorted(["part10.txt", "part2.txt", "part1.txt"], key=_in_natural_order)
    ['part1.txt', 'part2.txt', 'part10.txt']
    """
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))], name


def _saved_to_disk(path: Path, selection: Selection) -> list[str]:
    import datasets

    try:
        with quiet_libraries():
            saved = datasets.load_from_disk(str(path))
    except Exception as error:  # missing or damaged files of several kinds
        raise ReflowlensError(f"cannot read folder {str(path)!r}: {one_line(error)}") from error
    splits = saved if isinstance(saved, datasets.DatasetDict) else {selection.split: saved}
    files = {str(split): [file["filename"] for file in part.cache_files] for split, part in splits.items()}
    return chosen_split(files, str(path), selection)
