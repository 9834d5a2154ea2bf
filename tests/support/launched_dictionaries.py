"""What torchrun starts in the tests of dictionaries: a run, of which each process writes down its weights.

python -m tests.support.launched_dictionaries CONFIG FOLDER
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from pretraining.dictionaries import train
from pretraining.dictionaries.config import load_run

if __name__ == "__main__":
    run = train._Training.run

    def recorded(self: train._Training, *args: Any) -> None:
        run(self, *args)
        tensors = {f"{of.spec.name}/{name}": t for of in self.learners for name, t in of.state().items()}
        save_file(tensors, Path(sys.argv[2]) / f"rank{os.environ['RANK']}.safetensors")

    train._Training.run = recorded  # type: ignore[method-assign]
    train.train_dictionaries(load_run(sys.argv[1]))
