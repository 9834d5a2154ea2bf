"""The runs of a study and what is measured of each, kept beside them.

`reflowlens study` leaves a folder with `runs.csv` and a folder of checkpoints a run. What experiments and measures find
is kept there too, in `measured/NAME.csv`: measured once, read in milliseconds. A folder that holds the tables alone,
without any checkpoint, can therefore be asked everything that was measured before.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from analyses.registry import EXPERIMENTS, Experiment, parse_selection
from analyses.result.finding import Finding
from reflowlens.checkpoints import load_model, weights_in
from reflowlens.errors import ReflowlensError
from reflowlens.models import float32_by_default
from reflowlens.models.base import HookedModel
from reflowlens.progress import bar
from reflowlens.storage.atomic import replacing
from reflowlens.storage.opening import file_hash

TABLE = "runs.csv"
MEASURED = "measured"
_FACTS = ("arm", "seed", "complete", "step", "tokens", "val_loss", "seconds", "folder")
# What is missing is written as nothing; an arm or a setting may be called "None", "NA" or "null".
_AS_WRITTEN: dict[str, Any] = {"keep_default_na": False, "na_values": [""]}
Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """One complete run of a study.

    `arm`, `seed`: which. `val_loss`: the last held-out one, nats a token. `tokens`: read in training. `settings`: what
    the arm puts in place of the configuration's values, by "table.field". `checkpoint`: its last one; None where the
    folder holds tables alone.
    """

    arm: str
    seed: int
    val_loss: float
    tokens: int
    settings: Mapping[str, Any]
    checkpoint: Path | None = None

    def load(self) -> HookedModel:
        """The trained model. Raises ReflowlensError where its checkpoint is not there."""
        if self.checkpoint is None:
            raise ReflowlensError(
                f"arm {self.arm!r}, seed {self.seed}: the checkpoint is not there, and what is asked was not measured "
                "before; train the study (`reflowlens study`)"
            )
        return load_model(self.checkpoint)


def runs_table(study: str | Path) -> pd.DataFrame:
    """`runs.csv` of a study: a row a run with `arm`, `seed`, `complete`, `tokens`, `val_loss` and the settings.

    Raises ReflowlensError if it is missing, no CSV or lacks a column.
    """
    path = Path(study) / TABLE
    try:
        table = pd.read_csv(path, dtype={"arm": str}, **_AS_WRITTEN)
    except OSError as error:
        raise ReflowlensError(f"{study} is not a study's folder: {TABLE} cannot be read ({error.strerror})") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise ReflowlensError(f"{path} is not a table of runs: {error}") from error
    if missing := [name for name in ("arm", "seed", "complete", "tokens", "val_loss") if name not in table]:
        raise ReflowlensError(f"{path} is not a table of runs: it lacks {', '.join(missing)}")
    return table


def trained_runs(study: str | Path) -> list[TrainedRun]:
    """The complete runs of a study, in the order of its table.

    Raises ReflowlensError where none is complete, or as `runs_table` does.

    Example: `[run.val_loss for run in trained_runs("out/sparsity") if run.arm == "top_8"]`
    """
    table = runs_table(study)
    settings = [name for name in table.columns if name not in _FACTS]
    runs = [
        TrainedRun(
            arm=str(row["arm"]),
            seed=int(row["seed"]),
            val_loss=float(row["val_loss"]),
            tokens=int(row["tokens"]),
            settings={name: row[name] for name in settings if pd.notna(row[name])},
            checkpoint=_last_step(Path(study) / f"seed_{row['seed']}_{row['arm']}"),
        )
        for row in table[table["complete"]].to_dict("records")
    ]
    if not runs:
        raise ReflowlensError(f"no run of {study} is complete; `reflowlens study` goes on with it")
    return runs


def measured(
    study: str | Path,
    experiments: Sequence[str | int],
    *,
    arms: Sequence[str] | None = None,
    quick: bool = True,
    seed: int = 0,
    progress: bool | None = None,
    again: bool = False,
) -> pd.DataFrame:
    """The metrics of experiments on every run of a study.

    Args:
        experiments: names or numbers (`analyses.registry.parse_selection`).
        arms: whose runs; default all.
        quick, seed: passed to the experiments.
        progress: a bar an experiment on stderr, by default on a terminal alone.
        again: measure anew what is kept, as after a change of the experiments.

    Returns a row a run, experiment and metric: `arm`, `seed`, `experiment`, `metric`, `value`, `low` and `high` of its
    interval, `verdict`, and a column `control_NAME` for each control; NaN (of a verdict "") where there is none. An
    experiment that refuses a model has no rows of it.

    Raises ReflowlensError as `trained_runs` does, and for a run that was not measured and has no checkpoint.
    """
    chosen = [EXPERIMENTS[number] for number in parse_selection(experiments)]
    form = "quick" if quick else "full"
    frames = [
        _kept(
            study,
            f"{each.name}_{form}_{seed}",
            _rows_of(each, {"quick": quick, "seed": seed}),
            arms=arms,
            progress=progress,
            again=again,
        ).assign(experiment=each.name)
        for each in chosen
    ]
    table = pd.concat(frames, ignore_index=True)
    first = ["arm", "seed", "experiment", "metric", "value", "low", "high", "verdict"]
    table = table.reindex(columns=[*first, *(name for name in table.columns if name not in first)])
    table = table.dropna(subset="metric").reset_index(drop=True)  # what refuses a run has a row without any
    return table.assign(verdict=table["verdict"].fillna(""))


def measured_by(
    study: str | Path,
    name: str,
    measure: Callable[[HookedModel, TrainedRun], Mapping[str, float]],
    *,
    partners: Mapping[tuple[str, int], TrainedRun] | None = None,
    progress: bool | None = None,
    again: bool = False,
) -> pd.DataFrame:
    """A measure of one's own on every run of a study.

    Args:
        name: what it is kept under, file-safe: another one for other settings of the measure.
        partners: by arm and seed the run that a run is compared with, if the measure compares: it is measured anew
            where that is another, or has other weights, than when it was kept.
        progress, again: as of `measured`.

    Returns a row a run: `arm`, `seed` and what the measure returns.

    Example: `measured_by("out/sparsity", "norm", lambda model, run: {"norm": model.embed.W_basis.norm().item()})`
    """

    def rows(model: HookedModel, run: TrainedRun) -> list[Row]:
        return [dict(measure(model, run))]

    return _kept(study, name, rows, partners=partners, progress=progress, again=again)


def _rows_of(experiment: Experiment, options: Mapping[str, Any]) -> Callable[[HookedModel, TrainedRun], list[Row]]:
    def rows(model: HookedModel, run: TrainedRun) -> list[Row]:
        try:
            with float32_by_default():
                result = experiment.load()(model, progress=False, **options)
        except ReflowlensError as error:
            print(f"{experiment.name} refuses arm {run.arm!r}: {error}", file=sys.stderr)
            return []
        return [{"metric": metric, **_flat(finding)} for metric, finding in result.findings.items()]

    return rows


def _flat(finding: Finding) -> Row:
    low, high = finding.interval or (math.nan, math.nan)
    controls = {f"control_{name}": value for name, value in finding.controls.items()}
    return {"value": finding.value, "low": low, "high": high, "verdict": finding.verdict or "", **controls}


def _kept(
    study: str | Path,
    name: str,
    rows_of: Callable[[HookedModel, TrainedRun], list[Row]],
    *,
    arms: Sequence[str] | None = None,
    partners: Mapping[tuple[str, int], TrainedRun] | None = None,
    progress: bool | None,
    again: bool,
) -> pd.DataFrame:
    """The rows of every complete run, or of some arms' alone: those that are kept, where the weights (its own and its
    partner's) are as they were then, otherwise measured now and kept. Written after each run, so that nothing is
    measured twice after an interruption."""
    path = Path(study) / MEASURED / f"{name}.csv"
    show = sys.stderr.isatty() if progress is None else progress
    kept = _read(path)
    found = {} if again else kept
    runs = [run for run in trained_runs(study) if arms is None or run.arm in arms]
    for run in bar(runs, show=show, unit="run", desc=f"measuring {name}", leave=False):
        weights = _identity(run, (partners or {}).get((run.arm, run.seed)))
        known = found.get((run.arm, run.seed))
        if known and weights in ("", known[0]["weights"]):
            continue
        rows = rows_of(run.load(), run) or [{}]
        found |= {(run.arm, run.seed): [{"arm": run.arm, "seed": run.seed, "weights": weights, **row} for row in rows]}
        _write(path, kept | found)
    wanted = [found[run.arm, run.seed] for run in runs]
    return pd.DataFrame([row for rows in wanted for row in rows]).drop(columns="weights")


def _identity(run: TrainedRun, partner: TrainedRun | None = None) -> str:
    """A hash of the weights' file, with its partner's behind it; nothing where one of them is not there."""
    checkpoints = [each.checkpoint for each in (run, partner) if each is not None]
    paths = [None if checkpoint is None else weights_in(checkpoint) for checkpoint in checkpoints]
    return "+".join("" if path is None else file_hash(path)[:16] for path in paths) if all(paths) else ""


def _read(path: Path) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """The rows of a kept table, by run; of one that cannot be read, none."""
    try:
        text = dict.fromkeys(("arm", "weights", "metric", "verdict"), str)
        table = pd.read_csv(path, dtype=text, **_AS_WRITTEN)
        table = table.astype({"seed": int}).fillna({"weights": ""})
    except (OSError, ValueError, UnicodeDecodeError, KeyError):
        return {}
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in table.to_dict("records"):
        found.setdefault((row["arm"], row["seed"]), []).append({str(name): value for name, value in row.items()})
    return found


def _write(path: Path, found: Mapping[tuple[str, int], list[dict[str, Any]]]) -> None:
    table = pd.DataFrame([row for rows in found.values() for row in rows])
    with replacing(path) as temporary:
        table.to_csv(temporary, index=False)


def _last_step(folder: Path) -> Path | None:
    """The last checkpoint of a run that has one."""
    steps = sorted(path for path in folder.glob("step_*") if weights_in(path) is not None)
    return steps[-1] if steps else None
