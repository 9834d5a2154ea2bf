"""What torchrun starts in the tests: several runs in a row, since starting takes longer than training; or one in which
a process fails.

python -m tests.support.launched CONFIG[+resume]...
python -m tests.support.launched --fail {raise,kill} RANK STEP CONFIG
"""

from __future__ import annotations

import os
import signal
import sys

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


if __name__ == "__main__":
    if sys.argv[1] == "--fail":
        fail_at(*sys.argv[2:5])
        train.main(sys.argv[5:])
    else:
        for job in sys.argv[1:]:
            config, _, how = job.partition("+")
            train.train(load_config(config), resume=how == "resume")
