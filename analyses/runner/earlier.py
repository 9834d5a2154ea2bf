"""What earlier runs left in a folder, and what of it need not be run again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from analyses.registry import EXPERIMENTS, Experiment
from reflowlens.errors import ReflowlensError

if TYPE_CHECKING:
    from analyses.result.result import Result

METRICS_FILE = "results.json"
INTERRUPTED = "interrupted before it was done"
NOT_STARTED = "not started"
LEFT_OUT = "left out: it does not fit into the time that was given"
NOT_TRIED = (INTERRUPTED, NOT_STARTED, LEFT_OUT)
"""Why there is no result of an experiment that did not fail."""


@dataclass(frozen=True)
class SuiteRun:
    """What a run left behind. `results`, `errors` and `seconds` are by the experiments' names; `cached` are the results
    that an earlier run had computed, whose `seconds` are those of then. `made_of`: of a result, what it depends on: the
    model's hash and `analyses.result.kept.result_key`; "" where that is not known. `refused`: those of the errors that
    say what an experiment needs and this model, or its tokenizer, lacks."""

    folder: Path
    results: dict[str, Result] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    cached: set[str] = field(default_factory=set)
    made_of: dict[str, str] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)

    @property
    def report(self) -> Path:
        """The HTML file."""
        return self.folder / "report.html"

    @property
    def failed(self) -> bool:
        """Whether an experiment broke, or none has a result for all refused."""
        tried = [name for name, why in self.errors.items() if why != LEFT_OUT]
        return any(name not in self.refused or not self.results for name in tried)

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C stopped it."""
        return not {INTERRUPTED, NOT_STARTED}.isdisjoint(self.errors.values())


def read_earlier(folder: Path, selected: Sequence[Experiment], model_hash: str) -> SuiteRun:
    """What earlier runs on this model left in a folder; of a selected experiment too, as far as it can be read.

    Raises ReflowlensError for a damaged record and for the results of another model that would stay.
    """
    earlier, path = SuiteRun(folder), folder / METRICS_FILE
    if not path.exists():
        return earlier
    try:
        entries = {
            name: (entry["error"], entry["seconds"], entry.get("made_of", ""))
            for name, entry in json.loads(path.read_bytes()).items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ReflowlensError(f"cannot add to the results in {folder}: {path} is damaged ({error})") from error
    again = {experiment.name for experiment in selected}
    for name, (why, seconds, made_of) in entries.items():
        if why is not None and name not in again:
            earlier.errors[name] = why
        elif why is None:
            result = _load_earlier(folder / name, name in again)
            if result is None:
                continue
            if result.params.get("model_hash", model_hash) == model_hash:
                earlier.results[name], earlier.made_of[name] = result, made_of
            elif name not in again:
                raise ReflowlensError(f"{folder} holds the results of another model ({name}): choose another folder")
        earlier.seconds[name] = seconds
    return earlier


def _load_earlier(folder: Path, runs_again: bool) -> Result | None:
    """A result of an earlier run; None for one that cannot be read and is about to be replaced."""
    from analyses.result.result import Result

    try:
        return Result.load(folder)
    except ReflowlensError:
        if not runs_again:
            raise
        return None


def merged(earlier: SuiteRun, run: SuiteRun) -> SuiteRun:
    """Both, in the order of the experiments; the later of two of one, unless it was not tried to its end."""
    failed = {name: why for name, why in run.errors.items() if why not in NOT_TRIED or name not in earlier.results}
    results = {**{name: result for name, result in earlier.results.items() if name not in failed}, **run.results}
    errors = {**{name: why for name, why in earlier.errors.items() if name not in results}, **failed}
    names = [experiment.name for experiment in EXPERIMENTS.values()]
    return SuiteRun(
        run.folder,
        {name: results[name] for name in names if name in results},
        {name: errors[name] for name in names if name in errors},
        earlier.seconds | run.seconds,
        made_of=earlier.made_of | run.made_of,
    )


@contextmanager
def writing_into(folder: str | Path) -> Iterator[None]:
    """What cannot be written is an error that names the folder."""
    try:
        yield
    except OSError as error:
        raise ReflowlensError(f"cannot write into {folder}: {error.strerror or error}") from error
