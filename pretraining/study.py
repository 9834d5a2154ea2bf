"""A study: one configuration trained in several arms, each with the same seeds, one run after another.

    reflowlens study STUDY.toml

A study is a TOML file. `config` is the configuration that every run begins from, `seeds` how many times each arm is
trained, `out` the folder of all runs. An arm is a named table of settings, put in place of the configuration's; `[set]`
holds those of all arms; `[grid]` gives settings several values each, and every arm is trained with every combination.
An arm with a `config` of its own begins from that:

    config = "reflow_micro"
    seeds = 3
    out = "out/sparsity"

    [arms.dense]
    [arms.top_8]
    "model.architecture" = "reflow_topk"
    "model.topk" = 8

    [grid]
    "optimizer.weight_decay" = [0.0, 0.1]

All arms of a seed are trained before the next seed begins, so that what is complete when time is up is a whole design
of fewer seeds. Runs of a seed read the same data in the same order. Started again, a study goes on where it stopped.
`--arm` and `--seed` train a part of it; the table keeps what was trained before.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from pretraining.command import add_study_arguments, run_study, start
from pretraining.config import TrainConfig, load_config, read_toml
from pretraining.state import is_last
from pretraining.train import train
from reflowlens.arguments import whole_number
from reflowlens.errors import ReflowlensError, nearest
from reflowlens.storage.atomic import replacing

STUDIES = Path(__file__).parent / "studies"
TABLE = "runs.csv"
_FIELDS = ("config", "seeds", "out", "set", "arms", "grid")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a study.

    Args:
        arm: the arm's name, with the grid's values of this run behind it.
        seed: of weights and data.
        settings: what the arm puts in place of the configuration's values.
        cfg: the whole configuration; its ``run.out`` is the run's folder.
    """

    arm: str
    seed: int
    settings: Mapping[str, Any]
    cfg: TrainConfig

    @property
    def folder(self) -> Path:
        """Where the run is, as ``reflowlens train`` writes it."""
        return Path(self.cfg.run.out)

    @property
    def is_complete(self) -> bool:
        """Whether its last step was taken and saved."""
        return (self.folder / f"step_{self.cfg.run.steps:07d}").is_dir()


def load_study(
    name: str | Path,
    *,
    config: str | Path | None = None,
    arms: Sequence[str] = (),
    seeds: int | Sequence[int] | None = None,
    out: str | Path | None = None,
    settings: Sequence[str] = (),
) -> list[Run]:
    """The runs of a study, in the order in which they are trained.

    Args:
        name: a TOML file, or the bare name of a shipped study.
        config, out: in place of what the file says.
        arms: these alone, by the names that runs have; none named is all of them.
        seeds: in place of what the file says: how many, 0 to N - 1, or which.
        settings: ``"table.field=value"`` for every run, as :func:`pretraining.config.load_config` takes them; what an
            arm sets has the last word.

    Raises:
        ReflowlensError: the file is missing, is not TOML or lacks something, two arms have one name, a field or an arm
            is unknown, or a configuration is not as it should be; the message names the arm.

    >>> [(run.arm, run.seed) for run in load_study("refiners", arms=["ttt", "flow"], seeds=[3])]
    [('ttt', 3), ('flow', 3)]
    """
    path = _find(name)
    stated = _tables(path)
    base = config if config is not None else stated.get("config")
    if not isinstance(base, str | Path):
        raise ReflowlensError(f"{path}: config must name a configuration, got {base!r}")
    folder = Path(out if out is not None else stated.get("out", f"out/{path.stem}"))
    shared = [*settings, *_written(stated.get("set", {}))]
    chosen = _chosen(_arms(stated, path), arms, path)
    return [
        Run(arm=arm, seed=seed, settings=own, cfg=_config(base, shared, own, arm, seed, folder / f"seed_{seed}_{arm}"))
        for seed in _seeds(seeds if seeds is not None else stated.get("seeds", 1))
        for arm, own in chosen.items()
    ]


def train_study(runs: Sequence[Run], *, progress: bool | None = None) -> pd.DataFrame:
    """Train what is not trained yet, and return the table of all runs.

    A run that is complete is checked against its configuration and left as it is; one that was stopped goes on. The
    table is written beside the runs after each.

    Raises:
        KeyboardInterrupt: a run was asked to stop; it was saved.
        ReflowlensError: as :func:`pretraining.train.train`, or the study's folder has another ``runs.csv``.
    """
    _others(runs)  # hours before it is needed
    for number, run in enumerate(runs, start=1):
        print(f"run {number} of {len(runs)}: {run.arm}, seed {run.seed} ({run.folder})", file=sys.stderr)
        last = train(run.cfg, resume=any(run.folder.glob("step_*")), progress=progress)
        write_table(runs)
        if not is_last(last, run.cfg):
            raise KeyboardInterrupt
    return table(runs)


def table(runs: Sequence[Run]) -> pd.DataFrame:
    """What became of each run so far: its arm, seed and settings, steps, tokens, held-out loss in nats and time.

    Columns ``step``, ``tokens``, ``val_loss`` (the last one measured), ``seconds`` (of the steps that were taken) and
    ``complete``; nothing is known of a run that has not begun.
    """
    return pd.DataFrame([{**_facts(run), **run.settings, "folder": str(run.folder)} for run in runs])


def write_table(runs: Sequence[Run]) -> Path:
    """Write :func:`table` as ``runs.csv`` into the folder of the study, and return its path.

    Rows of other runs that were there before, of an arm or a seed that is not named now, stay as they were.

    Raises:
        ReflowlensError: what is there is no table of runs.
    """
    path = runs[0].folder.parent / TABLE
    rows = pd.concat([table(runs), _others(runs)]).sort_values("seed", kind="stable", key=lambda each: each.astype(int))
    rows.insert(len(rows.columns) - 1, "folder", rows.pop("folder"))  # behind the settings, whosever they are
    with replacing(path) as temporary:
        rows.to_csv(temporary, index=False)
    return path


def _others(runs: Sequence[Run]) -> pd.DataFrame:
    """The rows of ``runs.csv`` that are of none of these runs, as text, so that they are written as they were read."""
    path = runs[0].folder.parent / TABLE
    if not path.is_file():
        return pd.DataFrame()
    named = {(run.arm, str(run.seed)) for run in runs}
    try:
        rows = pd.read_csv(path, dtype=str, keep_default_na=False, na_values=[""])
        is_other = [(arm, str(int(seed))) not in named for arm, seed in zip(rows.arm, rows.seed, strict=True)]
    except (OSError, ValueError, AttributeError) as error:
        raise ReflowlensError(f"{path} is no table of runs, and would be lost: move it away ({error})") from error
    return rows[is_other]


def _facts(run: Run) -> dict[str, Any]:
    path = run.folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf8").splitlines() if path.is_file() else []
    records = [json.loads(line) for line in lines if line.strip()]
    steps = {record["step"]: record for record in records if "loss" in record}
    held_out = [record["val_loss"] for record in records if record.get("val_loss") is not None]
    per_step = run.cfg.tokens_per_step
    return {
        "arm": run.arm,
        "seed": run.seed,
        "complete": run.is_complete,
        "step": max(steps, default=0),
        "tokens": max((record.get("tokens", 0) for record in steps.values()), default=0),
        "val_loss": held_out[-1] if held_out else float("nan"),
        "seconds": sum(per_step / record["tokens_per_s"] for record in steps.values() if record.get("tokens_per_s")),
    }


def _find(name: str | Path) -> Path:
    path = Path(name)
    if path.is_file():
        return path
    shipped = sorted(each.stem for each in STUDIES.glob("*.toml"))
    if path.suffix or path.name not in shipped:
        raise ReflowlensError(
            f"no study {str(path)!r}{nearest(path.name, shipped)}; shipped are {', '.join(shipped)}, otherwise give a "
            "TOML file"
        )
    return STUDIES / f"{path.name}.toml"


def _tables(path: Path) -> dict[str, Any]:
    stated = read_toml(path)
    for field, value in stated.items():
        if field not in _FIELDS:
            raise ReflowlensError(f"{path}: unknown field {field!r}{nearest(field, list(_FIELDS))}")
        if field in ("set", "arms", "grid") and not isinstance(value, dict):
            raise ReflowlensError(f"{path}: [{field}] must be a table, got {value!r}")
    return stated


def _arms(stated: Mapping[str, Any], path: Path) -> dict[str, dict[str, Any]]:
    """The settings of each arm, the grid's values among them, by a name that makes a folder's."""
    named: dict[str, Any] = stated.get("arms", {})
    grid: dict[str, Any] = stated.get("grid", {})
    for name, own in named.items():
        if not isinstance(own, dict) or not name.replace("-", "_").replace(".", "_").isidentifier():
            raise ReflowlensError(f"{path}: [arms.{name}] must be a table of settings, with a plain word for a name")
    for place, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ReflowlensError(f"{path}: grid.{place} must be a list of values, got {values!r}")
    if not named and not grid:
        raise ReflowlensError(f"{path}: a study has [arms.NAME] or a [grid]")
    arms: dict[str, dict[str, Any]] = {}
    for name, own in (named or {"": {}}).items():
        for values in itertools.product(*grid.values()):
            chosen = dict(zip(grid, values, strict=True))
            words = [f"{place.rsplit('.', 1)[-1]}_{value}" for place, value in chosen.items()]
            arm = "-".join([name, *words] if name else words).replace("/", "_")
            if arm in arms:
                raise ReflowlensError(f"{path}: two arms are called {arm!r}")
            arms[arm] = {**own, **chosen}
    return arms


def _chosen(arms: dict[str, dict[str, Any]], names: Sequence[str], path: Path) -> dict[str, dict[str, Any]]:
    """The named arms, or all, in the study's order."""
    for name in names:
        if name not in arms:
            raise ReflowlensError(
                f"{path.name} has no arm {name!r}; it has {', '.join(arms)}{nearest(name, list(arms))}"
            )
    return {name: own for name, own in arms.items() if name in (names or arms)}


def _seeds(given: Any) -> Sequence[int]:
    """0 to N - 1 for a number, or those that are listed."""
    if isinstance(given, list | tuple) and given:
        return sorted({whole_number(seed, "a seed", 0) for seed in given})
    return range(whole_number(given, "seeds", 1))


def _written(settings: Mapping[str, Any]) -> list[str]:
    """Values as ``--set`` takes them."""
    return [f"{place}={json.dumps(value)}" for place, value in settings.items()]


def _config(
    base: str | Path, shared: Sequence[str], own: Mapping[str, Any], arm: str, seed: int, folder: Path
) -> TrainConfig:
    base = own.get("config", base)
    places = {"run.seed": seed, "run.out": str(folder)}
    own = {place: value for place, value in own.items() if place != "config"} | places
    try:
        return load_config(base, [*shared, *_written(own)])
    except ReflowlensError as error:
        raise ReflowlensError(f"arm {arm!r}: {error}") from error


def by_arm(found: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over seeds of the held-out loss of each arm's complete runs, in nats a token."""
    losses = found[found.complete].groupby("arm", sort=False).val_loss
    return pd.DataFrame({"seeds": losses.count(), "mean": losses.mean(), "sd": losses.std()})


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``torchrun -m pretraining.study``."""
    start("Train a study: a configuration in several arms, over seeds.", add_study_arguments, run_study, arguments)


if __name__ == "__main__":
    main()
