"""Statistics of activations over any number of positions, without holding them.

    collected = rl.collect(model, batches, ["unembed.hook_signal", "blocks.3.hook_resid_post"], threshold=0.0)
    signals = collected["unembed.hook_signal"]
    signals.mean, signals.covariance, signals.firing_rate, signals.examples(17, model)
    collected.save("out/statistics"); rl.Collected.load("out/statistics").merge(of_more_text)

Memory is that of one batch, plus features² (covariance) and features · k (examples), however long the text. What is
collected is in main memory, whatever the model's device.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from reflowlens.activations.moments import Moments, PointStatistics, TopExamples
from reflowlens.activations.stream import Occurrences, measured
from reflowlens.arguments import integer, names_given, path_given, real_number, whole_number
from reflowlens.dictionaries.splice import identity_of
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.models.text import TextInput
from reflowlens.models.threads import changing
from reflowlens.models.unwrapping import guarded, hooked_model
from reflowlens.storage.tensor_folder import open_tensors, save_tensors

Statistic: TypeAlias = Literal["mean", "covariance", "top"]
STATISTICS: tuple[Statistic, ...] = ("mean", "covariance", "top")
_KIND = "statistics"
_SAVE_EVERY = 60.0  # seconds


@guarded(
    changing, "the prompts of a batch or their length (pos), the number of hook points, k, or leave out 'covariance'"
)
@torch.no_grad()
def collect(
    model: Any,
    batches: Iterable[TextInput] | Int[Tensor, "row pos"] | np.ndarray,
    names: str | Sequence[str],
    *,
    statistics: Statistic | Sequence[Statistic] = STATISTICS,
    k: int = 20,
    threshold: float | None = None,
    positions: slice | Literal["last"] | None = None,
    results: str | Path | None = None,
    progress: bool | None = None,
) -> Collected:
    """Run a model over a stream of text and keep statistics of some of its activations.

    Args:
        model: a hooked model; hooks and interventions that are attached to it act.
        batches: an iterable of inputs (a text, a list of texts, tokens [batch, pos]), read once; or one array of tokens
            [row, pos], read 16 rows at a time. Padding is left out.
        names: hook points, one or several, whose activations are [batch, pos, ...]. All axes after the position are
            flattened to features.
        statistics: any of ``"mean"`` (mean and variance per feature), ``"covariance"`` (of all pairs of features; mean
            and variance too) and ``"top"`` (the k largest values per feature, and where they were).
        k: examples per feature.
        threshold: count how often each feature is above this value, in the units of the activation; None does not
            count.
        positions: which of each prompt's own positions count: a slice with a positive step, ``"last"``, or None for
            all. ``slice(1, None)`` leaves out the first.
        results: a folder for what is collected, written once a minute and at the end. Called again with the same folder
            and batches, a collection continues: prompts that it has seen are not run.
        progress: show a bar; by default on a terminal.

    Returns:
        The statistics by hook point, with float64 moments divided by n: see
        :class:`reflowlens.activations.moments.PointStatistics`.

    Raises:
        ReflowlensError: a point does not exist or has no positions, no position counts, an activation is not finite, or
            the results are of another model or of other choices.
        OutOfMemory: a batch does not fit; a ReflowlensError that says what to lower.

    Example:
        >>> import reflowlens as rl
        >>> model = rl.load_model("reflow-nano")
        >>> collected = rl.collect(model, [["The king of France", "A stone"], "The river"], "unembed.hook_signal", k=3)
        >>> collected.n_rows, collected["unembed.hook_signal"].covariance.shape
        (3, torch.Size([256, 256]))
    """
    hooked = hooked_model(model)
    choices = _choices(hooked, names, statistics, k, threshold, positions)
    collected = Collected({}, 0, choices, hooked.cfg.model_name, identity_of(hooked))
    results = None if results is None else path_given(results, "results")
    if results is not None and results.is_dir() and any(results.iterdir()):
        collected = Collected.load(results).merge(collected)
    total = int(np.prod(batches.shape)) if isinstance(batches, np.ndarray | Tensor) else None
    show = sys.stderr.isatty() if progress is None else progress
    saved = time.monotonic()
    measure, chosen = partial(_of_activation, choices), slice(*choices.positions)
    stream = measured(hooked, batches, choices.names, measure, positions=chosen, skip=collected.n_rows)
    try:
        with tqdm(total=total, unit="position", unit_scale=True, disable=not show) as bar:
            for parts, n_rows, n_positions in stream:
                collected = collected.merge(replace(collected, points=parts, n_rows=n_rows))
                bar.update(n_positions)
                if results is not None and time.monotonic() - saved > _SAVE_EVERY:
                    collected.save(results)
                    saved = time.monotonic()
    finally:  # also when it is interrupted
        if results is not None and collected.n_rows:
            collected.save(results)
    if not collected.points:
        raise ReflowlensError("there is nothing to collect from: the batches are empty, or no position counts")
    return collected


@dataclass(frozen=True)
class Choices:
    """What is collected: the arguments of :func:`collect`, ``positions`` as the start, stop and step of a slice."""

    names: list[str]
    statistics: list[str]
    k: int
    threshold: float | None
    positions: list[int | None]


@dataclass(frozen=True, eq=False)
class Collected:
    """What :func:`collect` returns: the statistics of each hook point, ``collected["hook_embed"]``.

    The statistics of two consecutive parts of a stream merge to those of the whole.

    Attributes:
        points: statistics by hook point.
        n_rows: number of prompts that were read.
        choices: what was collected.
        model, model_hash: name of the model, and hash of its weights and of the dictionaries spliced into it.

    Raises:
        ReflowlensError: a point that is indexed was not collected.

    Example: ``rl.Collected.load("out/statistics")["unembed.hook_signal"].mean``
    """

    points: dict[str, PointStatistics]
    n_rows: int
    choices: Choices
    model: str
    model_hash: str

    def __repr__(self) -> str:
        return (
            f"Collected({self.model or 'unnamed model'}: {self.n_rows:,} prompts, {', '.join(self.choices.statistics)})"
        )

    def _repr_html_(self) -> str:
        from reflowlens.notebook.html import table, titled

        return titled(repr(self), "", table(["point"], [(name,) for name in self.points]))

    def __getitem__(self, name: str) -> PointStatistics:
        if not isinstance(name, str) or name not in self.points:
            raise ReflowlensError(f"{name!r} was not collected; these were: {', '.join(self.points)}")
        return self.points[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.points)

    def __len__(self) -> int:
        return len(self.points)

    def merge(self, other: Collected) -> Collected:
        """What one pass over both parts of a stream would have given; the rows of the other part come second.

        Raises:
            ReflowlensError: the parts are of different models or choices.

        Example: ``rl.collect(model, first, names).merge(rl.collect(model, second, names)).n_rows``
        """
        self.check_mergeable(other)
        points = dict(self.points)
        for name, point in other.points.items():
            behind = point.later(self.n_rows)
            points[name] = self[name].merge(behind, self.choices.k) if name in points else behind
        return Collected(points, self.n_rows + other.n_rows, self.choices, self.model, self.model_hash)

    def check_mergeable(self, other: Collected) -> None:
        """Raise unless both are of the same model and choices."""
        if not isinstance(other, Collected):
            raise ReflowlensError(f"statistics merge with others of rl.collect, got {other!r}")
        if self.model_hash != other.model_hash:
            raise ReflowlensError("these statistics are of different models, or of one with different weights")
        for name, value in asdict(self.choices).items():
            if value != getattr(other.choices, name):
                raise ReflowlensError(
                    f"these statistics were collected differently: {name} {value} and {getattr(other.choices, name)}"
                )

    def save(self, folder: str | Path) -> Path:
        """Write ``statistics.safetensors`` and ``manifest.json``, replacing earlier ones when both are complete.

        Raises:
            ReflowlensError: the folder holds something else, the disk is full or it cannot be written.
        """
        tensors = {
            f"{name}/{part}": tensor.contiguous()
            for name, point in self.points.items()
            for part, tensor in point.tensors().items()
        }
        manifest = {
            "model": self.model,
            "model_hash": self.model_hash,
            "n_rows": self.n_rows,
            "choices": asdict(self.choices),
            "points": {
                name: {"n": point.n, "feature_shape": point.feature_shape} for name, point in self.points.items()
            },
        }
        return save_tensors(folder, _KIND, tensors, manifest)

    @classmethod
    def load(cls, folder: str | Path) -> Collected:
        """What :meth:`save` wrote.

        Raises:
            ReflowlensError: there is no such folder, or it holds something else or is corrupt.
        """
        manifest, stored = open_tensors(folder, _KIND)
        try:
            choices = Choices(**manifest["choices"])
            points = {
                name: PointStatistics.of_tensors(
                    int(entry["n"]),
                    tuple(entry["feature_shape"]),
                    {key.removeprefix(f"{name}/"): stored[key] for key in stored if key.startswith(f"{name}/")},
                )
                for name, entry in manifest["points"].items()
            }
            return cls(points, int(manifest["n_rows"]), choices, manifest["model"], manifest["model_hash"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ReflowlensError(f"{folder} is corrupt: {error!r}") from error


def _choices(
    model: HookedModel,
    names: str | Sequence[str],
    statistics: Statistic | Sequence[Statistic],
    k: int,
    threshold: float | None,
    positions: slice | Literal["last"] | None,
) -> Choices:
    points, kinds = names_given(names, "names"), names_given(statistics, "statistics")
    for name in points:
        if model.hook_axes(name)[:2] != ("batch", "pos"):
            raise ReflowlensError(f"{name!r} has axes {model.hook_axes(name)}: statistics are of [batch, pos, ...]")
    for statistic in kinds:
        if statistic not in STATISTICS:
            raise ReflowlensError(f"statistics are {', '.join(map(repr, STATISTICS))}, got {statistic!r}")
    k = whole_number(k, "k", 1)
    threshold = None if threshold is None else real_number(threshold, "threshold")
    if not points or (not kinds and threshold is None):
        raise ReflowlensError("there is nothing to collect: name a hook point, and a statistic or a threshold")
    chosen = slice(-1, None) if positions == "last" else slice(None) if positions is None else positions
    if not isinstance(chosen, slice):
        raise ReflowlensError(f"positions must be a slice, 'last' or None, got {positions!r}")
    bounds = [None if bound is None else integer(bound) for bound in (chosen.start, chosen.stop, chosen.step)]
    if slice(*bounds) != chosen or (chosen.step is not None and chosen.step < 1):
        raise ReflowlensError(f"positions must be a slice of integers, its step at least 1, got {positions!r}")
    return Choices(points, sorted(kinds), k, threshold, bounds)


def _of_activation(
    choices: Choices, name: str, x: Float[Tensor, "n *feature"], occurrences: Occurrences
) -> PointStatistics:
    features = x.flatten(1)
    if not features.isfinite().all():
        raise ReflowlensError(f"{name!r} holds NaN or infinite values")
    pairs, means = "covariance" in choices.statistics, "mean" in choices.statistics
    where = occurrences.row, occurrences.position, occurrences.token
    return PointStatistics(
        len(features),
        tuple(x.shape[1:]),
        Moments.of(features, pairs=pairs) if pairs or means else None,
        TopExamples.of(features, *where, choices.k) if "top" in choices.statistics else None,
        None if choices.threshold is None else (features > choices.threshold).sum(dim=0),
    ).cpu()
