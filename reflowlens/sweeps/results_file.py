"""A file that keeps a long sweep's finished cells, so that it can be stopped and continued."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

from torch import Tensor

from reflowlens.arguments import path_given
from reflowlens.errors import ReflowlensError
from reflowlens.storage.atomic import replacing


class ResultsFile:
    """JSON lines: what the sweep is, then a line a cell. Without a path it keeps nothing.

    Args:
        what: everything that decides the values, as text; a file of another sweep is refused.
        batch_size: cells that run together; that of a file which is continued stays.
        rank: of the process; every one but the first has a file of its own.
    """

    def __init__(self, path: str | Path | None, what: str, batch_size: int, rank: int = 0) -> None:
        self.path = None if path is None else path_given(path, "results")
        if self.path is not None and rank:
            self.path = self.path.with_suffix(f".{rank}{self.path.suffix}")
        self.key = hashlib.sha256(what.encode()).hexdigest()
        self.batch_size = batch_size
        self.finished: dict[int, list[float]] = {}
        self._file: IO[str] | None = None

    def __enter__(self) -> ResultsFile:
        if self.path is None:
            return self
        whole: list[str] = []
        if self.path.is_dir():
            raise ReflowlensError(f"{self.path} is a folder: results must name a file")
        if self.path.exists():
            whole = [line for line in self.path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        if whole:
            self._read(whole)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        header = {"sweep": self.key, "batch_size": self.batch_size}
        with replacing(self.path) as temporary:  # without a line that a killed sweep left half written
            temporary.write_text("".join(whole) or json.dumps(header) + "\n")
        self._file = self.path.open("a")
        return self

    def _read(self, lines: list[str]) -> None:
        try:
            header, *cells = map(json.loads, lines)
            known = header["sweep"] == self.key
            self.batch_size = max(1, int(header.get("batch_size", self.batch_size)))
            self.finished = {cell["cell"]: cell["values"] for cell in cells}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ReflowlensError(f"{self.path} is not a sweep's results file") from error
        if not known:
            raise ReflowlensError(
                f"{self.path} holds another sweep (other weights, prompts, cells or metric): choose another file"
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, cells: Sequence[int], values: Tensor) -> None:
        """Keep the values of some cells, [cell, prompt]."""
        if self._file is None:
            return
        for cell, row in zip(cells, values.tolist(), strict=True):
            self._file.write(json.dumps({"cell": cell, "values": row}) + "\n")
        self._file.flush()
