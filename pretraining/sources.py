"""Which files are meant: files and folders of this machine, and data sets of the hub (`pretraining.hub`)."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from pretraining.hub import hub_sources
from pretraining.local_files import Selection, Source, file_source, files_of_split
from pretraining.readers import READABLE, ending
from reflowlens.errors import ReflowlensError


def find_sources(names: Sequence[str | Path], selection: Selection, progress: bool = False) -> list[Source]:
    """The files that these names mean, in order: a file, those of a folder's split, or else of a data set's on the hub.

    A folder may be what `save_to_disk` wrote, or laid out like a data set on the hub, where file and folder names (or
    the README's metadata) say the splits: `data/train-00000-of-00002.parquet`, `test.jsonl`. Parquet and arrow files
    come first: beside them, others are notes and copies. Text and JSON-lines files without a split are "train". Those
    of a split are read in the order of their names, numbers in these by size (`part2` before `part10`). A file that is
    meant twice, by two names too, is read once; copies are files of their own.

    Raises ReflowlensError if there is no such file, or its kind cannot be read, or the data set cannot be had.
    """
    sources: dict[str, Source] = {}  # by what tells a file from another
    for name in names:
        path = Path(name).expanduser()
        if not path.exists() and isinstance(name, str) and _may_be_a_dataset(name):
            sources |= {f"{source.name}@{source.revision}": source for source in hub_sources(name, selection)}
            continue
        for file, short in _files(path, selection):
            place = os.path.realpath(file)
            if place in sources:
                print(f"note: {short!r} is given twice, and read once", file=sys.stderr)
            else:
                sources[place] = file_source(file, short, selection, progress)
    return list(sources.values())


def _files(path: Path, selection: Selection) -> list[tuple[str, str]]:
    """The files that a path means, each with its name: within the folder, if it is one."""
    if path.is_dir():
        return [(file, Path(file).relative_to(path.resolve()).as_posix()) for file in files_of_split(path, selection)]
    if not path.exists():
        raise ReflowlensError(f"no file or folder {str(path)!r}")
    if ending(path.name) is None:
        raise ReflowlensError(f"cannot read {path.name!r}: expected a file named {', '.join(READABLE)}")
    return [(str(path), path.name)]


def _may_be_a_dataset(name: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) is not None and ending(name) is None
