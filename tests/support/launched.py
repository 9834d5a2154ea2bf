"""What two processes do in the tests: several runs in a row, since starting takes longer than training; or, under
torchrun, one in which a process fails.

python -m tests.support.launched CONFIG[+resume]...
python -m tests.support.launched --fail {raise,kill} RANK STEP CONFIG
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from pretraining import train
from pretraining.config import load_config


def fail_at(how: str, rank: str, at_step: str) -> None:
    log = train.Log.write

    def write(self: train.Log, step: int, record: dict[str, float]) -> None:
        log(self, step, record)
        if os.environ["RANK"] == rank and step == int(at_step):
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError("the disk with the data is gone")

    train.Log.write = write  # type: ignore[method-assign]


def train_all(rank: int, *jobs: str | Path) -> None:
    """The runs of some configurations, one after the other; of CONFIG+resume the rest."""
    for job in jobs:
        config, _, how = str(job).partition("+")
        train.train(load_config(config), resume=how == "resume")


if __name__ == "__main__":
    if sys.argv[1] == "--fail":
        fail_at(*sys.argv[2:5])
        train.main(sys.argv[5:])
    else:
        train_all(int(os.environ["RANK"]), *sys.argv[1:])
