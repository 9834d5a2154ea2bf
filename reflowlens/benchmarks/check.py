"""A guard against falls of speed: ratios measured now beside stored ones. Times are a machine's, ratios the code's."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch

from reflowlens.benchmarks.catalogue import BENCHMARKS
from reflowlens.benchmarks.machine import machine
from reflowlens.errors import ReflowlensError
from reflowlens.storage.atomic import replacing

STORED = Path(__file__).parent / "ratios.json"
TOLERANCE = 0.3  # of a new row: what repeated measurements of the quick forms differ by on a busy machine


@dataclass(frozen=True)
class Ratio:
    """A stored ratio.

    Args:
        benchmark, row: what was measured.
        ratio: above 1 ours is faster.
        tolerance: the share of it by which a later one may be lower.
        machine: where it was measured.
    """

    benchmark: str
    row: str
    ratio: float
    tolerance: float
    machine: str


def measured(names: Sequence[str]) -> Iterator[tuple[str, str, float]]:
    """The name of a benchmark, that of a row and its ratio, of each row as soon as it is measured, in quick form.

    On one thread, of which the time counts that it had itself: what else a machine does moves such ratios least.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name in names:
            for row, ratio in BENCHMARKS[name].ratios_of(BENCHMARKS[name].quick()):
                yield name, row, ratio
    finally:
        torch.set_num_threads(threads)


def compared(stored: Iterable[Ratio], found: Iterable[tuple[str, str, float]], names: Sequence[str]) -> pd.DataFrame:
    """Stored ratios of these benchmarks beside those that were found.

    Returns:
        One row a ratio: ``benchmark``, ``row``, ``stored``, ``found``, ``lowest`` (stored · (1 - tolerance)) and
        ``what``: ``fell`` (it is below the lowest), ``missing`` (it was not found), ``new`` (it is not stored)
        or ``""``.
    """
    before = {(each.benchmark, each.row): each for each in stored if each.benchmark in names}
    now = {(benchmark, row): ratio for benchmark, row, ratio in found}
    rows = []
    for key in [*before, *(key for key in now if key not in before)]:
        old, new = before.get(key), now.get(key)
        lowest = None if old is None else old.ratio * (1 - old.tolerance)
        what = "new" if lowest is None else "missing" if new is None else "fell" if not new >= lowest else ""
        rows.append((*key, None if old is None else old.ratio, new, lowest, what))
    columns = ["benchmark", "row", "stored", "found", "lowest", "what"]
    return pd.DataFrame(rows, columns=columns).astype(dict.fromkeys(columns[2:5], "float64"))


def read_ratios(path: str | Path) -> list[Ratio]:
    """The ratios of a file that :func:`write_ratios` wrote.

    Raises:
        ReflowlensError: there is no such file, or it is none.
    """
    try:
        ratios = [Ratio(**row) for row in json.loads(Path(path).read_text(encoding="utf8"))]
        if not all(each.ratio > 0 and 0 < each.tolerance < 1 for each in ratios):
            raise ValueError("nothing could fall below such a ratio, or everything would")
        return ratios
    except FileNotFoundError as error:
        raise ReflowlensError(f"no stored ratios {path}: `reflowlens bench check --write` stores them") from error
    except (OSError, ValueError, TypeError) as error:
        raise ReflowlensError(f"{path} holds no ratios as `reflowlens bench check --write` stores them") from error


def write_ratios(path: str | Path, found: Iterable[tuple[str, str, float]], before: Iterable[Ratio]) -> None:
    """Store ratios in place of those of the same benchmarks; a row that was stored keeps its tolerance."""
    rows, kept = list(found), list(before)
    tolerances: Mapping[tuple[str, str], float] = {(each.benchmark, each.row): each.tolerance for each in kept}
    renewed = {benchmark for benchmark, _, _ in rows}
    ratios = [each for each in kept if each.benchmark not in renewed]
    here = machine()
    for benchmark, row, ratio in rows:
        ratios.append(Ratio(benchmark, row, float(f"{ratio:.5g}"), tolerances.get((benchmark, row), TOLERANCE), here))
    text = ",\n".join(json.dumps(asdict(each), ensure_ascii=False) for each in ratios)
    with replacing(path) as unfinished:
        unfinished.write_text(f"[\n{text}\n]\n", encoding="utf8")
