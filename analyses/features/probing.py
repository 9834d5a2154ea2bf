"""k-sparse probing: how well k features tell a category of words or a concept of the text (Gurnee et al., 2023, arXiv
2305.01610), beside k coordinates of other bases.

``words``  the lexicon's categories, one against all others. A word is the mean of its features over at most 20 of its
    occurrences in held-out documents; half of the words of each category train, so that what is told is the category
    and not the word.
``concepts``  the concepts of `analyses.units.concepts`, at places of held-out documents; half of the documents train.

Of each basis the k features with the largest absolute difference of means between the class and the others are chosen
on the training half, and a logistic regression on them (each scaled to variance 1, classes weighted alike) is scored on
the other: the area under its ROC curve, ``auc``, and the mean of sensitivity and specificity, ``accuracy``. Every basis
has the same input, what the dictionary's layer reads:

``dictionary``  its features.
``neurons``  those of the MLP of the block, where the dictionary writes what the MLP does.
``native``, ``varimax``, ``rotated``  of a reFlow, what is read in its signals, B x.
``pca``  the principal components of what is read, on the training half.
``random``  the features of a fresh dictionary with as many active.

Intervals are over resamples of the test half's words, or documents; differences from the dictionary are paired.
``detectable`` is the smallest true difference from the dictionary that this list would show with 80% power at the 5%
level, 2.80 standard errors of the paired difference (normal approximation; for the dictionary itself, from an AUC of a
half): where a difference is smaller, "no difference" means that the list cannot tell. It is missing where no resample
differs, as when a handful of words is told without a fault: that says nothing of other words.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from analyses.features.documents import Documents, document_batches, token_rows
from analyses.features.probing_tasks import Task, probing_tasks
from analyses.features.reconstructors import model_views, principal_axes
from analyses.features.replacement import activations
from analyses.statistics.draws import derive_seed
from analyses.statistics.resampling import percentile_interval
from analyses.units.points import level_of, written_by
from analyses.words.lexicon import Lexicon, load_lexicon
from reflowlens.activations.moments import Moments
from reflowlens.dictionaries.belonging import check_belongs
from reflowlens.dictionaries.dictionary import Dictionary
from reflowlens.models.base import HookedModel
from reflowlens.progress import bar
from reflowlens.signals import signal_view

KS = (1, 4, 16)
_POWER = 1.960 + 0.842  # standard errors: 5% two-sided, 80% power
Draws = Float[np.ndarray, " draw"]


@torch.no_grad()
def sparse_probing(
    model: HookedModel,
    dictionary: Dictionary,
    documents: Documents,
    *,
    ks: Sequence[int] = KS,
    lexicon: Lexicon | None = None,
    positions: int = 3000,
    batch_size: int = 16,
    resamples: int = 300,
    seed: int = 0,
    progress: bool = False,
) -> pd.DataFrame:
    """Probe every layer of a dictionary, and other bases beside it.

    Args:
        model: the one that the dictionary was trained on.
        documents: held-out texts or arrays of tokens, of any lengths; some hundreds, for words to occur.
        ks: numbers of features.
        lexicon: whose categories are probed; the packaged one by default.
        positions: places of each half that concepts are asked at.
        seed: of the halves, the resamples, the random dictionary and the rotated basis.

    Returns:
        A row a task, class (and "all", the mean over the task's classes), layer (its block), basis and k: ``task``,
        ``class``, ``layer``, ``basis``, ``k``, ``n`` (test rows of the class), ``auc`` with its interval ``low`` and
        ``high``, ``accuracy``, ``difference`` from the dictionary with ``difference_low`` and ``difference_high``, and
        ``detectable``.

    Raises:
        ReflowlensError: the dictionary is not of the model, or no word and no concept occurs often enough.

    Example: ``sparse_probing(model, dictionary, texts).query("`class` == 'all'")``
    """
    check_belongs(dictionary, model)
    rows = token_rows(model, documents)
    tasks = probing_tasks(model, rows, lexicon or load_lexicon(), positions, seed)
    weights = [_weights(task, resamples, seed) for task in tasks]
    found: list[dict[str, object]] = []
    for layer in bar(range(dictionary.cfg.n_layers), show=progress, unit="layer", desc="probing"):
        block = str(level_of(dictionary.cfg.writes[layer]))
        for task, drawn in zip(tasks, weights, strict=True):
            own: dict[tuple[str, int], Draws] = {}
            for basis, features in _bases(model, dictionary, layer, task, rows, batch_size, seed):
                for k in ks:
                    place = {"task": task.name, "layer": block, "basis": basis}
                    found += [place | row for row in _probed(task, features, k, drawn, own)]
    order = ["task", "class", "layer", "basis", "k", "n", "auc", "low", "high", "accuracy"]
    return pd.DataFrame(found)[[*order, "difference", "difference_low", "difference_high", "detectable"]]


def weighted_auc(
    scores: Float[np.ndarray, " row"], positive: NDArray[np.bool_], weights: Float[np.ndarray, "draw row"]
) -> Draws:
    """Area under the ROC curve, ties counted half, with the rows weighted in several ways; NaN without both classes.

    >>> weighted_auc(np.array([0.1, 0.2, 0.3]), np.array([False, True, True]), np.ones((1, 3))).tolist()
    [1.0]
    """
    _, group = np.unique(scores, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    hits, misses = (np.add.reduceat((weights * of)[:, order], starts, axis=1) for of in (positive, ~positive))
    below = np.cumsum(misses, axis=1) - misses / 2
    with np.errstate(invalid="ignore"):
        return (hits * below).sum(1) / (hits.sum(1) * misses.sum(1))


def largest_differences(
    features: Float[np.ndarray, "row feature"], positive: NDArray[np.bool_], k: int
) -> NDArray[np.int64]:
    """The k features whose means differ most between the rows of a class and the others; of equal ones the first."""
    difference = np.abs(features[positive].mean(0) - features[~positive].mean(0))
    return np.argsort(-difference, kind="stable")[:k]


def _probed(
    task: Task,
    features: Float[np.ndarray, "row feature"],
    k: int,
    weights: Float[np.ndarray, "draw test"],
    own: dict[tuple[str, int], Draws],
) -> Iterator[dict[str, object]]:
    """Rows of the table, of each class and of all. ``own`` has the dictionary's, which come first."""
    aucs, accuracies = [], []
    for column, name in enumerate(task.classes):
        labels = task.labels[:, column]
        auc, accuracy = sparse_probe(features, labels, task.training, k, weights)
        aucs.append(auc)
        accuracies.append(accuracy)
        yield _row(name, k, int(labels[~task.training].sum()), auc, accuracy, own)
    yield _row("all", k, int((~task.training).sum()), np.nanmean(aucs, axis=0), float(np.mean(accuracies)), own)


def sparse_probe(
    features: Float[np.ndarray, "row feature"],
    labels: NDArray[np.bool_],
    training: NDArray[np.bool_],
    k: int,
    weights: Float[np.ndarray, "draw test"],
) -> tuple[Draws, float]:
    """AUC under each weighting of the test rows, and accuracy, of a probe on the k features that tell a class best."""
    chosen = features[:, largest_differences(features[training], labels[training], k)]
    spread = chosen[training].std(0)
    scaled = chosen / np.where(spread > 0, spread, 1)
    probe = LogisticRegression(class_weight="balanced", max_iter=500).fit(scaled[training], labels[training])
    scores, truth = probe.decision_function(scaled[~training]), labels[~training]
    accuracy = ((scores > 0)[truth].mean() + (scores <= 0)[~truth].mean()) / 2
    return weighted_auc(scores, truth, weights), float(accuracy)


def _row(
    name: str, k: int, n: int, auc: Draws, accuracy: float, own: dict[tuple[str, int], Draws]
) -> dict[str, object]:
    beside = own.setdefault((name, k), auc)  # the dictionary's own are first
    difference = auc - beside
    spread = np.nanstd((auc if auc is beside else difference)[1:])
    (low, high), (least, most) = (percentile_interval(draws[1:][~np.isnan(draws[1:])]) for draws in (auc, difference))
    return {
        "class": name,
        "k": k,
        "n": n,
        "auc": float(auc[0]),
        "low": low,
        "high": high,
        "accuracy": accuracy,
        "difference": float(difference[0]),
        "difference_low": least,
        "difference_high": most,
        "detectable": float(_POWER * spread) if spread > 0 else float("nan"),
    }


def _weights(task: Task, resamples: int, seed: int) -> Float[np.ndarray, "draw test"]:
    """How often each test row is drawn, first 1 each, then with its word or document in every resample."""
    _, unit = np.unique(task.unit[~task.training], return_inverse=True)
    n = int(unit.max()) + 1
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    return np.concatenate([np.ones((1, n)), drawn])[:, unit]


def _bases(
    model: HookedModel,
    dictionary: Dictionary,
    layer: int,
    task: Task,
    rows: Sequence[Int[Tensor, " _token"]],
    batch_size: int,
    seed: int,
) -> Iterator[tuple[str, Float[np.ndarray, "row feature"]]]:
    """Features of a task's rows in every basis, the dictionary's first."""
    cfg, of_layer = dictionary.cfg, dictionary.each_layer()[layer]
    neurons = cfg.writes[layer].replace("hook_mlp_out", "mlp.hook_post")
    has_neurons = neurons != cfg.writes[layer] and written_by(model, neurons) is not None
    found = _at_places(model, task, rows, [cfg.reads[layer], *[neurons] * has_neurons], batch_size)
    x = found[cfg.reads[layer]]
    yield "dictionary", task.rows(of_layer.encode(x)).numpy()
    if has_neurons:
        yield "neurons", task.rows(found[neurons]).numpy()
    if cfg.d_in == model.cfg.d_model:
        for name in model_views(model):
            yield name, task.rows(x @ signal_view(model, name, seed=seed).basis.float().T).numpy()
    axes = principal_axes(Moments.of(x[torch.from_numpy(task.training[task.row])], pairs=True))
    yield "pca", task.rows(x @ axes.T).numpy()
    k = min(cfg.n_features, max(1, round(float((of_layer.encode(x) != 0).sum() / len(x)))))
    fresh = Dictionary.fresh(dataclasses.replace(cfg, activation="topk", k=k), derive_seed(seed, "random_dictionary"))
    yield "random", task.rows(fresh.to(x.device).each_layer()[layer].encode(x)).numpy()


def _at_places(
    model: HookedModel, task: Task, rows: Sequence[Int[Tensor, " _token"]], points: Sequence[str], batch_size: int
) -> dict[str, Float[Tensor, "occurrence _d"]]:
    """What hook points hold at the places of a task, in their order."""
    order = {place: number for number, place in enumerate(map(tuple, task.place.tolist()))}
    held: dict[str, Tensor] = {}
    for batch in document_batches(rows, batch_size):
        position = batch.counted.nonzero()[:, 1]
        here = zip(batch.document.tolist(), position.tolist(), strict=True)
        numbers = torch.tensor([order.get(place, -1) for place in here])
        for point, activation in activations(model, batch, points).items():
            some = batch.within(activation)[(numbers >= 0).to(activation.device)]
            held.setdefault(point, some.new_empty(len(order), some.shape[1]))[numbers[numbers >= 0]] = some
    return held
