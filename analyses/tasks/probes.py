"""Linear probes by layer: what a linear function of the residual stream can tell, and what that says.

A probe's accuracy has no meaning by itself: a probe may learn its examples by heart, tell the classes by the tokens
that are read, or profit from one class being frequent. So every accuracy is held out, near-duplicates together, and
stands beside that of the most frequent class, of the embedding, of the same probe on a *control task*, random labels
that are constant for each token (Hewitt and Liang, 2019), and, if one is given, of an untrained model. *Selectivity* is
the accuracy less that of the control task. That a label can be read off says nothing of whether the model reads it:
steer by the probe's direction, or attribute to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from analyses.claims import bound_of
from analyses.result.finding import Finding
from analyses.result.result import Result
from analyses.statistics.draws import derive_seed
from analyses.statistics.intervals import bootstrap_interval, rate_interval
from analyses.statistics.pvalues import paired_permutation_pvalue
from analyses.statistics.verdicts import verdict
from analyses.tasks.answered import MINIMUM_PROMPTS, one_or_several, shown, some_prompts, task_params
from analyses.tasks.by_group import group_figures, group_frames
from analyses.tasks.fitted_probes import (
    COORDINATE,
    EMBEDDING,
    Fit,
    Kind,
    ProbedLayer,
    folds_of,
    held_out,
    point_of,
    probe_layers,
)
from analyses.tasks.probed import Places
from reflowlens.arguments import integer, is_one_of, number_of_runs, real_number, whole_number
from reflowlens.errors import ReflowlensError
from reflowlens.figures.builders import line_with_band
from reflowlens.models.base import HookedModel
from reflowlens.models.unwrapping import hooked_model
from reflowlens.prompts import At, Prompts

_QUICK_LAYERS = 6


class Probes(Result):
    """The Result of :func:`linear_probes`, with the directions that probes read."""

    def direction(self, layer: int, label: str | None = None) -> Float[Tensor, " d_model"]:
        """The direction of the stream behind a layer that speaks for a label, of length 1.

        Args:
            layer: a block whose ``hook_resid_post`` was probed; -1 for the embedding.
            label: one of the classes; of two, by default the second in the alphabet.

        Returns:
            float32: of the probe that is fitted to all examples, in the units of the activations. Its column
            ``separation`` in the frame ``directions`` is how far the label's examples lie from the others along it: as
            an ``alpha``, what moves the mean of the others there.

        Raises:
            ReflowlensError: the layer was not probed, or there is no such label.

        Example: ``rl.Steer("resid_post", probes.direction(3), alpha=4.0, layer=3)``
        """
        frame = self.frames["directions"]
        classes = sorted(frame["label"].unique())
        if label is None and len(classes) > 2:
            raise ReflowlensError(f"there are {len(classes)} labels, each with its direction: {', '.join(classes)}")
        label = classes[-1] if label is None else str(label)
        rows = frame[(frame["layer"] == layer) & (frame["label"] == label)]
        if not len(rows):
            layers = ", ".join(map(str, frame["layer"].unique()))
            raise ReflowlensError(
                f"no direction of layer {layer!r} for {label!r}: layers are {layers}, labels {', '.join(classes)}"
            )
        coordinates = [name for name in map(str, frame) if name.startswith(COORDINATE)]
        return torch.tensor(rows[coordinates].iloc[0].to_numpy(dtype=np.float32))


def linear_probes(
    model: HookedModel,
    prompts: Prompts,
    label: str,
    *,
    at: At = "last",
    kind: Kind = "logistic",
    l2: float = 1.0,
    layers: int | Sequence[int] | None = None,
    together: str | None = None,
    untrained: HookedModel | None = None,
    folds: int = 5,
    most: int = 10_000,
    memory: float = 2**29,
    seed: int = 0,
    quick: bool = False,
    progress: bool | None = None,
) -> Probes:
    """How well a linear probe tells a label, layer by layer.

    Each example is held out once, in one of ``folds`` parts of its own groups; features are scaled to mean 0 and
    variance 1 on the others. An accuracy is a mean over groups, and its interval is over them: exact where groups are
    single examples, otherwise bootstrap. The control task's is the mean of three draws of labels.

    Args:
        model: what is attached to it acts.
        prompts: with a column of labels.
        label: its name. Of ``at="all"`` a row may hold a list, a label for each token, "" or a missing value (None,
            NaN) where there is none.
        at: where the stream is read: a position as of ``prompts.positions``, or ``"all"``.
        kind: logistic regression, or ridge regression of ±1, which is faster.
        l2: the strength of the penalty.
        layers: blocks whose output is probed, and -1 for what the first block reads; default: all.
        together: a column; rows that are alike in it are held out together, such as those of one template or subject.
            By default rows of the same text are.
        untrained: a model of this architecture to hold the probes against.
        folds: parts.
        most: examples; of more, so many are drawn.
        memory: bytes of activations held at once: layers are read in as many passes as that takes.
        seed: of folds, draws and resamples.
        quick: a third of the prompts, and six layers.

    Returns:
        :class:`Probes`, a Result with ``accuracy`` of the layer that is best on the other folds (so that choosing is no
        advantage) and its ``selectivity``; controls ``majority``, ``embedding`` and ``untrained``, all of which an
        accuracy that is supported exceeds by 0.05, and ``control_task``.
        Frames ``layers`` (a row a model and layer: ``accuracy``, ``control_task``, ``selectivity``, each with ``_low``
        and ``_high``, and ``majority``), ``classes`` (``examples`` and ``share``), ``examples`` and ``directions``;
        figure ``layers``. Of prompts with groups the frame and figure ``groups``, of the same two metrics.

    Raises:
        ReflowlensError: there is no such column, position or layer, one label alone, or too few groups for the folds.

    Example: ``linear_probes(model, prompts, "tense", together="subject").frames["layers"]``
    """
    hooked, chosen = hooked_model(model), some_prompts(prompts, quick, seed)
    if not is_one_of(kind, ("logistic", "ridge")):
        raise ReflowlensError(f"kind must be 'logistic' or 'ridge', got {kind!r}")
    folds, most = whole_number(folds, "folds", 2), number_of_runs(most, "most", 2)
    if not real_number(l2, "l2") > 0:
        raise ReflowlensError(f"l2 must be positive, got {l2!r}")
    own = derive_seed(seed, "linear_probes")
    places = Places.of(hooked, chosen, label, at, together, most, own)
    fold = folds_of(places, folds, own)
    wanted = _layers(hooked, layers, quick)
    fit = Fit(kind, l2)
    models = {"trained": hooked} | ({} if untrained is None else {"untrained": hooked_model(untrained)})
    read = {
        name: probe_layers(one, places, wanted, fold, fit, memory, own, shown(progress), name)
        for name, one in models.items()
    }
    majority = held_out(np.zeros((len(places), 1), np.float32), places.label, fold, None) == places.label
    table = pd.concat([_layer_frame(name, one, places, majority, seed) for name, one in read.items()])
    groups = _group_frames(chosen, _chosen(read["trained"], fold), places, seed)
    return Probes(
        "linear_probes",
        "Linear probes",
        task_params(hooked, chosen, seed, quick, label=label, at=_told(at), kind=kind, l2=l2, folds=folds),
        findings=_findings(read, places, majority, fold, seed),
        frames={
            "layers": table.reset_index(drop=True),
            "classes": _classes(places),
            "examples": places.frame(hooked, fold),
            "directions": pd.DataFrame([row for one in read["trained"] for row in one.directions]),
            **groups,
        },
        figures={"layers": _figure(table)} | group_figures(groups, "Held-out accuracy and selectivity"),
        notes=[
            f"{len(places):,} examples of {places.group.max() + 1:,} groups, which are held out together; the control "
            f"task gives each {places.kind_name} a label"
        ],
    )


def _by_group(values: NDArray[Any], places: Places) -> NDArray[np.float64]:
    """Means over the examples of each group."""
    return np.bincount(places.group, weights=values) / np.bincount(places.group)


def _layer_frame(
    name: str, read: Sequence[ProbedLayer], places: Places, majority: NDArray[np.bool_], seed: int
) -> pd.DataFrame:
    rows = []
    for one in read:
        right, control = _by_group(one.correct, places), _by_group(one.control, places)
        row: dict[str, Any] = {"model": name, "layer": one.layer, "point": point_of(one.layer)}
        intervals = {
            "accuracy": (right.mean(), rate_interval(right, seed=seed)),
            "control_task": (control.mean(), rate_interval(control, seed=seed)),
            "selectivity": ((right - control).mean(), bootstrap_interval(right - control, seed=seed)),
        }
        for metric, (value, (low, high)) in intervals.items():
            row |= {metric: value, f"{metric}_low": low, f"{metric}_high": high}
        rows.append(row | {"majority": _by_group(majority, places).mean()})
    return pd.DataFrame(rows)


def _findings(
    read: dict[str, list[ProbedLayer]],
    places: Places,
    majority: NDArray[np.bool_],
    fold: NDArray[np.int64],
    seed: int,
) -> dict[str, Finding]:
    best = _chosen(read["trained"], fold)
    right = _by_group(best["correct"], places)
    beside = {"majority": majority, "control_task": best["control"]}
    if (embedding := next((one for one in read["trained"] if one.layer == EMBEDDING), None)) is not None:
        beside["embedding"] = embedding.correct
    if "untrained" in read:
        beside["untrained"] = _chosen(read["untrained"], fold)["correct"]
    shares = {name: _by_group(values, places) for name, values in beside.items()}
    controls = {name: float(values.mean()) for name, values in shares.items()}
    to_beat = [name for name in controls if name != "control_task"]  # which is what selectivity is about
    strongest = max(to_beat, key=lambda name: controls[name])
    interval = rate_interval(right, seed=seed)
    p = paired_permutation_pvalue(right - shares[strongest], seed=seed)
    bound = bound_of("linear_probes", "accuracy", controls)
    judgement = verdict(interval, bound, p, minimum_units=MINIMUM_PROMPTS, units=len(right))
    difference = right - shares["control_task"]
    return {
        "accuracy": Finding(
            right.mean(),
            interval,
            controls,
            judgement,
            "share of held-out examples that are told, by the layer that is best on the other folds; mean over groups",
        ),
        "selectivity": Finding(
            difference.mean(),
            bootstrap_interval(difference, seed=seed),
            definition="accuracy less that of the same probes on the control task",
        ),
    }


def _chosen(read: Sequence[ProbedLayer], fold: NDArray[np.int64]) -> dict[str, NDArray[np.bool_]]:
    """Of each fold what the layer tells that is best on the others."""
    correct, control = (np.stack([getattr(one, name) for one in read]) for name in ("correct", "control"))
    layer = np.array([correct[:, fold != number].mean(axis=1).argmax() for number in range(fold.max() + 1)])[fold]
    each = np.arange(len(fold))
    return {"correct": correct[layer, each], "control": control[layer, each]}


def _group_frames(
    prompts: Prompts, best: dict[str, NDArray[np.bool_]], places: Places, seed: int
) -> dict[str, pd.DataFrame]:
    """Accuracy and selectivity in each group of prompts, over what of it is held out together."""
    values = {"accuracy": best["correct"], "selectivity": best["correct"] - np.asarray(best["control"], float)}
    return group_frames(
        prompts, values, seed, rows=places.prompt.tolist(), units=places.group.tolist(), rates=["accuracy"]
    )


def _classes(places: Places) -> pd.DataFrame:
    examples = np.bincount(places.label, minlength=len(places.classes))
    return pd.DataFrame({"label": places.classes, "examples": examples, "share": examples / len(places)})


def _figure(table: pd.DataFrame) -> go.Figure:
    """Accuracy by layer, beside the control task and the most frequent class."""
    parts = []
    for name, metric in {"trained": "accuracy", "control task": "control_task", "untrained": "accuracy"}.items():
        rows = table[table["model"] == ("untrained" if name == "untrained" else "trained")]
        curve = rows[["layer", metric, f"{metric}_low", f"{metric}_high"]].set_axis(
            ["layer", "accuracy", "low", "high"], axis=1
        )
        parts.append(curve.assign(probe=name))
    own = table[table["model"] == "trained"]
    flat = own[["layer"]].assign(accuracy=own["majority"], low=np.nan, high=np.nan, probe="majority")
    curves = pd.concat([*parts, flat], ignore_index=True)
    return line_with_band(
        curves,
        "layer",
        "accuracy",
        "low",
        "high",
        "probe",
        controls=["control task", "untrained", "majority"],
        title="Held-out accuracy of linear probes",
        x_title="layer (-1: the embedding)",
    )


def _layers(model: HookedModel, layers: int | Sequence[int] | None, quick: bool) -> list[int]:
    n = model.cfg.n_layers
    if layers is None:
        every = list(range(EMBEDDING, n))
        if quick and len(every) > _QUICK_LAYERS:
            return [every[i] for i in np.linspace(0, len(every) - 1, _QUICK_LAYERS).round().astype(int)]
        return every
    asked = one_or_several(layers)
    for layer in asked:
        if integer(layer) is None or not EMBEDDING <= layer < n:
            raise ReflowlensError(f"layers are blocks, 0 to {n - 1}, or {EMBEDDING} for the embedding, got {layer!r}")
    if not asked:
        raise ReflowlensError(f"layers are blocks, 0 to {n - 1}, or {EMBEDDING} for the embedding, got none")
    return sorted({int(layer) for layer in asked})


def _told(at: At) -> Any:
    if isinstance(at, str):
        return at
    one = integer(at)
    return [int(place) for place in cast("Sequence[int]", at)] if one is None else one
