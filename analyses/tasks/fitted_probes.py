"""Probes of the layers of a model, fitted and held out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.model_selection import StratifiedGroupKFold

from analyses.statistics.draws import derive_rng, derive_seed
from analyses.tasks.probed import Places, activations_at
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.progress import bar

EMBEDDING = -1  # the layer in front of the first
COORDINATE = "x"  # begins the names of a direction's columns
Kind = Literal["logistic", "ridge"]
_CONTROLS = 3  # control tasks, whose mean is taken


@dataclass(frozen=True)
class Fit:
    """How a probe is fitted: called with features and labels, it gives scikit-learn's classifier."""

    kind: Kind
    l2: float

    def __call__(self, x: Float[np.ndarray, "n feature"], y: NDArray[np.int64]) -> Any:
        if self.kind == "ridge":
            return RidgeClassifier(alpha=self.l2).fit(x, y)
        return LogisticRegression(C=1 / self.l2, max_iter=1000).fit(x, y)


@dataclass(frozen=True, eq=False)
class ProbedLayer:
    """A layer's probes: which examples they tell when held out, and in how many of the control tasks."""

    layer: int
    correct: NDArray[np.bool_]
    control: Float[np.ndarray, " n"]
    directions: list[dict[str, Any]]


def folds_of(places: Places, folds: int, seed: int) -> NDArray[np.int64]:
    """Which part each example is held out in: groups stay together, and classes are spread over the parts.

    Raises:
        ReflowlensError: there are fewer groups than parts, or of a class.
    """
    for i, name in enumerate(places.classes):
        groups = len(np.unique(places.group[places.label == i]))
        if groups < folds:
            raise ReflowlensError(
                f"{folds} folds need as many groups of each label that can be held out, and {name!r} has {groups}: "
                "fewer folds, more prompts, or another column in together="
            )
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed % 2**32)
    fold = np.zeros(len(places), dtype=np.int64)
    for number, (_, test) in enumerate(splitter.split(places.label, places.label, places.group)):
        fold[test] = number
    return fold


def held_out(
    x: Float[np.ndarray, "n feature"],
    y: NDArray[np.int64],
    fold: NDArray[np.int64],
    fit: Callable[[Float[np.ndarray, "n feature"], NDArray[np.int64]], Any] | None,
) -> NDArray[np.int64]:
    """What is predicted of each example by a fit to the other folds; the most frequent class, if there is no fit."""
    predicted = np.empty_like(y)
    for number in np.unique(fold):
        test = fold == number
        if fit is None or len(np.unique(y[~test])) < 2:
            predicted[test] = np.bincount(y[~test]).argmax()
        else:
            mean, scale = _standard(x[~test])
            predicted[test] = fit((x[~test] - mean) / scale, y[~test]).predict((x[test] - mean) / scale)
    return predicted


def probe_layers(
    model: HookedModel,
    places: Places,
    layers: Sequence[int],
    fold: NDArray[np.int64],
    fit: Fit,
    memory: float,
    seed: int,
    progress: bool,
    name: str,
) -> list[ProbedLayer]:
    """The probes of a model's layers, as many of these at once as the memory holds."""
    size = max(1, int(memory / (4 * model.cfg.d_model * len(places))))
    found: list[ProbedLayer] = []
    tasks = [places.control_labels(derive_seed(seed, draw)) for draw in range(_CONTROLS)]
    # Held out example by example: of a kind that was seen in the fit, a label is known by heart.
    parts = derive_rng(seed, "control_folds").permutation(len(places)) % (fold.max() + 1)
    for start in range(0, len(layers), size):
        some = layers[start : start + size]
        points = [point_of(layer) for layer in some]
        activations = activations_at(model, places, points, progress=progress, desc=f"reading, {name}")
        for layer, point in bar(list(zip(some, points, strict=True)), show=progress, unit="layer", desc="probing"):
            x = activations.pop(point)
            right = held_out(x, places.label, fold, fit) == places.label
            by_heart = np.mean([held_out(x, labels, parts, fit) == labels for labels in tasks], axis=0)
            found.append(ProbedLayer(layer, right, by_heart, _directions(layer, x, places, fit)))
    return found


def _directions(layer: int, x: Float[np.ndarray, "n feature"], places: Places, fit: Fit) -> list[dict[str, Any]]:
    """Of a probe of all examples: a row a class."""
    mean, scale = _standard(x)
    coefficients = np.atleast_2d(fit((x - mean) / scale, places.label).coef_) / scale
    per_class = coefficients if len(coefficients) > 1 else np.concatenate([-coefficients, coefficients])
    rows = []
    for i, vector in enumerate(per_class - per_class.mean(axis=0)):
        unit = vector / max(float(np.linalg.norm(vector)), np.finfo(np.float32).tiny)
        along, own = x @ unit, places.label == i
        row = {"layer": layer, "label": places.classes[i], "separation": along[own].mean() - along[~own].mean()}
        rows.append(row | {f"{COORDINATE}{j}": value for j, value in enumerate(unit.tolist())})
    return rows


def _standard(x: Float[np.ndarray, "n feature"]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    scale = x.std(axis=0)
    return x.mean(axis=0), np.where(scale > 0, scale, 1)


def point_of(layer: int) -> str:
    return "blocks.0.hook_resid_pre" if layer == EMBEDDING else f"blocks.{layer}.hook_resid_post"
