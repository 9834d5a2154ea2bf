"""The experiments that there are, by number. Adding one is one line below; none is imported before it runs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from analyses import costs
from reflowlens.errors import ReflowlensError, nearest

if TYPE_CHECKING:
    from analyses.result.result import Result

IDENTITY = "A. Signal identity"
SEMANTIC = "B. Semantic properties"
MECHANISTIC = "C. Mechanistic analysis"
CONTROL = "D. Control and steering"


@dataclass(frozen=True)
class Experiment:
    """One experiment: the function `name` of `analyses.experiments.<name>`, what a report says of it, and what it
    costs on a model of some sizes."""

    number: int
    name: str
    title: str
    group: str
    question: str
    cost: Callable[[costs.Sizes], costs.Work]

    def load(self) -> Callable[..., Result]:
        """The function, imported now: called as `function(model, seed=, quick=, progress=)` it returns a `Result`."""
        return getattr(importlib.import_module(f"analyses.experiments.{self.name}"), self.name)


_LISTED = (
    Experiment(
        1,
        "recipe_atlas",
        "Recipe Atlas",
        IDENTITY,
        "Which words have alike recipes, and what are signals for?",
        costs.recipe_atlas,
    ),
    Experiment(
        2,
        "sparsity_profile",
        "Sparsity Profile",
        IDENTITY,
        "How many signals does a token use?",
        costs.sparsity_profile,
    ),
    Experiment(
        3,
        "basis_geometry",
        "Basis Geometry",
        IDENTITY,
        "How many directions does the signal basis use?",
        costs.basis_geometry,
    ),
    Experiment(
        4,
        "semantic_galaxy",
        "Semantic Galaxy",
        SEMANTIC,
        "Do the recipes of related words lie together?",
        costs.semantic_galaxy,
    ),
    Experiment(
        5,
        "semantic_algebra",
        "Semantic Algebra",
        SEMANTIC,
        "Do recipes add up: is a − b + c the expected word?",
        costs.semantic_algebra,
    ),
    Experiment(
        6,
        "typo_resilience",
        "Typo Resilience",
        SEMANTIC,
        "Is a misspelling read like the word that was meant?",
        costs.typo_resilience,
    ),
    Experiment(
        7,
        "layer_evolution",
        "Layer Evolution",
        MECHANISTIC,
        "From which layer on is the prediction decided?",
        costs.layer_evolution,
    ),
    Experiment(
        8,
        "signal_flow",
        "Signal Flow",
        MECHANISTIC,
        "Which signals make this prediction, and who writes them?",
        costs.signal_flow,
    ),
    Experiment(
        9,
        "causal_ablation",
        "Causal Ablation",
        MECHANISTIC,
        "Which signals caused this prediction?",
        costs.causal_ablation,
    ),
    Experiment(
        10,
        "emotion_surgery",
        "Emotion Surgery",
        CONTROL,
        "Does a feeling’s recipe turn what the model says, and until when?",
        costs.emotion_surgery,
    ),
    Experiment(
        11,
        "concept_inception",
        "Concept Inception",
        CONTROL,
        "How strongly must a word be injected to be said?",
        costs.concept_inception,
    ),
    Experiment(
        12,
        "genetic_hijack",
        "Genetic Hijack",
        CONTROL,
        "What happens if the recipes themselves are edited?",
        costs.genetic_hijack,
    ),
    Experiment(
        13,
        "circuit_tracing",
        "Circuit Tracing",
        MECHANISTIC,
        "Which features made this prediction, along which paths, and what can one of them do?",
        costs.circuit_tracing,
    ),
)
EXPERIMENTS: dict[int, Experiment] = {experiment.number: experiment for experiment in _LISTED}


def parse_selection(selection: str | int | Iterable[str | int]) -> list[int]:
    """The numbers of the selected experiments, ascending, each once.

    `selection`: "all", numbers and names, one or many, also as a list separated by commas or spaces.
    Raises ReflowlensError for one that does not exist, naming those that do, and for an empty selection.

    >>> parse_selection("9, layer_evolution")
    [7, 9]
    """
    parts = [selection] if isinstance(selection, str | int) else list(selection)
    words = [word for part in parts for word in str(part).replace(",", " ").split()]
    if not words:
        raise ReflowlensError(f"no experiment is selected: 'all' or some of {_available()} was expected")
    numbers = {number for word in words for number in (EXPERIMENTS if word == "all" else [_number(word)])}
    return sorted(numbers)


def _number(word: str) -> int:
    for experiment in EXPERIMENTS.values():
        if word in (str(experiment.number), experiment.name):
            return experiment.number
    names = [experiment.name for experiment in EXPERIMENTS.values()]
    hint = nearest(word, names)
    raise ReflowlensError(
        f"no experiment {word!r}{f'{hint} There' if hint else '; there'} are {_available()}, or 'all'"
    )


def _available() -> str:
    return ", ".join(f"{experiment.number} {experiment.name}" for experiment in EXPERIMENTS.values())
