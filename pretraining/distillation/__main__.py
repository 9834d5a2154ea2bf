"""What torchrun starts for a student."""

from __future__ import annotations

from pretraining.command import add_distillation_arguments, run_distillation, start

if __name__ == "__main__":
    start(
        "Train a student; start with torchrun for several processes.",
        add_distillation_arguments,
        run_distillation,
        None,
    )
