"""What `reflowlens run` asks on a terminal when it is told nothing: which model, which experiments."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from analyses.registry import EXPERIMENTS, parse_selection
from analyses.report.messages import translate
from reflowlens.errors import ReflowlensError

Answer = TypeVar("Answer")


def choose(default_model: str, models: list[str], find: Callable[[str], object]) -> tuple[str, list[int]]:
    """The model and the experiments' numbers that a person picks; a wrong answer is explained and asked again.

    `find` raises ReflowlensError for what is no model.
    """
    print(translate("Models: {models}, or the path of a checkpoint", models=", ".join(models)))
    model = _ask(
        translate("Model [{default}]: ", default=default_model), lambda text: _model(text, default_model, find)
    )
    print()
    for experiment in EXPERIMENTS.values():
        print(f"{experiment.number:3}  {translate(experiment.title)}: {translate(experiment.question)}")
    print()
    numbers = _ask(translate("Experiments, by number or name [all]: "), lambda text: parse_selection(text or "all"))
    return model, numbers


def _model(text: str, default: str, find: Callable[[str], object]) -> str:
    model = text or default
    find(model)
    return model


def _ask(question: str, read: Callable[[str], Answer]) -> Answer:
    while True:
        try:
            return read(input(question).strip())
        except ReflowlensError as error:
            print(error)
        except EOFError:  # Ctrl-D
            raise KeyboardInterrupt from None
