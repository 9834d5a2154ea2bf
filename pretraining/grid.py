"""Runs of one configuration with each of its refiners and without, over several seeds: a 2 × 2 design, retrained.

    python -m pretraining.grid CONFIG [--seeds N] [--out FOLDER] [--set TABLE.FIELD=VALUE ...]

Runs follow one another, all four of a seed before the next seed, so that what is complete when time is up is a whole
design of fewer seeds. The four of a seed share their data in its order and the start of all weights but the refiners'.
Started again, the command goes on where it stopped. Each run is a folder as ``reflowlens train`` writes it,
``OUT/seed_0_both`` and so on, which :func:`analyses.experiments.refinement.read_grid` takes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pretraining.command import start
from pretraining.config import TrainConfig, load_config
from pretraining.train import train
from reflowlens.arguments import whole_number
from reflowlens.errors import ReflowlensError

CELLS = {"none": (False, False), "ttt": (True, False), "flow": (False, True), "both": (True, True)}
"""The design: which of the two refiners, TTT and flow, a run has."""


def grid_configs(
    config: str | Path, seeds: int, out: str | Path | None = None, settings: Sequence[str] = ()
) -> list[TrainConfig]:
    """The configurations of all runs, in their order.

    Args:
        config: a TOML file, or the name of a shipped configuration, of a ``ttt_flow`` model.
        seeds: how many: 0, 1, …
        out: the folder of all runs; default: the configuration's ``run.out`` with ``_grid`` behind it.
        settings: as :func:`pretraining.config.load_config` takes them, for every run.

    Raises:
        ReflowlensError: the configuration is of another architecture, or as ``load_config``.

    >>> [config.run.out for config in grid_configs("ttt_flow_nano", 1)][:2]
    ['out/ttt_flow_nano_grid/seed_0_none', 'out/ttt_flow_nano_grid/seed_0_ttt']
    """
    whole_number(seeds, "seeds", 1)
    asked = load_config(config, settings)
    if asked.model.ttt_flow is None:
        raise ReflowlensError(f"a grid is of refiners: a ttt_flow model was expected, got {asked.model.architecture!r}")
    folder = Path(out) if out is not None else Path(f"{asked.run.out}_grid")
    return [
        load_config(
            config,
            [
                *settings,
                f"model.ttt_flow.ttt={str(ttt).lower()}",
                f"model.ttt_flow.flow={str(flow).lower()}",
                f"run.seed={seed}",
                f"run.out={folder / f'seed_{seed}_{cell}'}",
            ],
        )
        for seed in range(seeds)
        for cell, (ttt, flow) in CELLS.items()
    ]


def train_grid(configs: Sequence[TrainConfig], *, progress: bool | None = None) -> list[Path]:
    """Train all that is not trained yet, and return the folders of the runs.

    A run that is complete is checked against its configuration and left as it is; one that was stopped goes on.

    Raises:
        KeyboardInterrupt: a run was asked to stop; it was saved.
        ReflowlensError: as :func:`pretraining.train.train`.
    """
    for number, cfg in enumerate(configs, start=1):
        out = Path(cfg.run.out)
        print(f"run {number} of {len(configs)}: {out}", file=sys.stderr)
        last = train(cfg, resume=any(out.glob("step_*")), progress=progress)
        if last.name != f"step_{cfg.run.steps:07d}":
            raise KeyboardInterrupt
    return [Path(cfg.run.out) for cfg in configs]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m pretraining.grid``."""
    start("Train a model with each of its refiners and without, over seeds.", _add_arguments, _run, arguments)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a TOML file, or the name of a shipped configuration, e.g. ttt_flow_micro")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="how many (default: 5)")
    parser.add_argument("--out", metavar="FOLDER", help="of all runs (default: the configuration's run.out + _grid)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="TABLE.FIELD=VALUE",
        help="put a value in place of the configuration's, in every run; repeatable",
    )


def _run(options: argparse.Namespace) -> None:
    for folder in train_grid(grid_configs(options.config, options.seeds, options.out, options.set), progress=True):
        print(folder)


if __name__ == "__main__":
    main()
