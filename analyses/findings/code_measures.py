"""What codes are held against each other by, on the same positions: measures that favour none by construction.

Every measure is a mean over documents that were not used to choose anything, under several weightings of the documents:
all alike, then as resamples draw them, the same for every code, so that differences of codes are paired.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from analyses.features.probing import Draws, largest_differences, sparse_probe
from analyses.features.probing_tasks import Task
from analyses.features.stability import best_matching
from analyses.findings.codes import Code, Held
from analyses.statistics.draws import derive_rng

LEADING = 10


@dataclass(frozen=True, eq=False)
class Resamples:
    """How often each document is drawn, [draw, document]; first 1 each."""

    weights: Float[np.ndarray, "draw document"]

    @classmethod
    def of(cls, measured: NDArray[np.bool_], resamples: int, seed: int) -> Resamples:
        """Of the documents that are measured; the others are never drawn."""
        n = int(measured.sum())
        weights = np.zeros((resamples + 1, len(measured)))
        weights[0, measured] = 1
        weights[1:, measured] = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), resamples)
        return cls(weights)

    def mean(self, values: Float[Tensor, " n"], document: Tensor) -> Draws:
        """Mean over positions, of those that have a value."""
        known, of_row = values.double().cpu().numpy(), document.cpu().numpy()
        counts = np.isfinite(known)
        n = self.weights.shape[1]
        sums = np.bincount(of_row[counts], weights=known[counts], minlength=n)
        with np.errstate(invalid="ignore", divide="ignore"):
            return (self.weights @ sums) / (self.weights @ np.bincount(of_row[counts], minlength=n))


def recovered(code: Code, held: Held, training_mean: Float[Tensor, " d"], k: int, over: Resamples) -> dict[str, Draws]:
    """``loss`` with k coordinates in the place and, of the loss that the place is worth, the share that they recover:
    (loss_0 - loss) / (loss_0 - loss of the model), loss_0 with nothing (``recovered_zero``) or the training mean
    (``recovered_mean``) in the place; NaN where the place is not surely worth anything (:func:`_share`)."""
    without = held.normed - held.places[code.place]

    def loss(normed: Tensor) -> Draws:
        return over.mean(held.losses(normed), held.document)

    own, said = loss(held.normed), loss(code.with_kept(held, k))
    zero, mean = loss(without), loss(without + training_mean)
    return {
        "loss": said,
        "recovered_zero": _share(zero - said, zero - own),
        "recovered_mean": _share(mean - said, mean - own),
    }


def _share(part: Draws, whole: Draws) -> Draws:
    """part / whole of each draw; NaN where the whole is not above 0, and throughout where it is not so in 97.5% of the
    draws: of what is worth nothing, or does harm, no share means anything, and its interval has no ends."""
    known = whole > 0
    sure = known[0] and np.quantile(whole, 0.025) > 0
    return np.divide(part, whole, out=np.full_like(whole, np.nan), where=known & sure)


def probed(code: Code, held: Held, task: Task, k: int, over: Resamples, seed: int) -> dict[str, Draws]:
    """``auc`` and ``accuracy`` (of all test rows alike) of a logistic regression on k coordinates, mean over the task's
    classes, and the AUC where the training labels are permuted (``auc_permuted``)."""
    features = code.encode(held)[rows_at(held, task)].float().cpu().numpy()
    weights = over.weights[:, task.unit[~task.training]]
    generator = derive_rng(seed, "permuted_probes")
    aucs, accuracies, permuted = [], [], []
    for labels in task.labels.T:
        auc, accuracy = sparse_probe(features, labels, task.training, k, weights)
        shuffled = labels.copy()
        shuffled[task.training] = generator.permutation(labels[task.training])
        aucs.append(auc)
        accuracies.append(accuracy)
        permuted.append(sparse_probe(features, shuffled, task.training, k, weights[:1])[0])
    return {
        "auc": np.nanmean(aucs, axis=0),
        "accuracy": np.array([np.mean(accuracies)]),
        "auc_permuted": np.nanmean(permuted, axis=0),
    }


def removal(code: Code, held: Held, task: Task, over: Resamples, places: int, seed: int) -> dict[str, Draws]:
    """What removing the coordinate that tells a concept best does to the predictions where the concept holds and where
    it does not: KL(model ‖ without) in nats ``on`` and ``off``, and ``selectivity`` on / (on + off), 0.5 where it does
    not matter; means over the concepts. The coordinate is chosen on the training half, measured on the other.

    Args:
        places: at most so many on and off each.
    """
    at = rows_at(held, task)
    z = code.encode(held)[at]
    features, test = z.float().cpu().numpy(), ~task.training
    found = []
    for number, labels in enumerate(task.labels.T):
        (chosen,) = largest_differences(features[task.training], labels[task.training], 1)
        effects = []
        for wanted in (True, False):
            some = _drawn(np.flatnonzero(test & (labels == wanted)), places, seed + number)
            here = held.of(at[some])
            without = here.normed - z[some, chosen, None] * code.writes[chosen]
            effects.append(over.mean(here.divergences(without), here.document))
        on, off = effects
        with np.errstate(invalid="ignore"):
            found.append((on, off, np.where(on + off > 0, on / (on + off), 0.5)))
    on, off, selectivity = (np.nanmean(each, axis=0) for each in zip(*found, strict=True))
    return {"on": on, "off": off, "selectivity": selectivity}


def knocked_out(code: Code, held: Held, over: Resamples) -> dict[str, Draws]:
    """Of each position's most probable token: ``leading_share``, the part of all that the code says for it which its 10
    largest coordinates hold (constant and error count as two more that never lead), and ``left_after_one``, the share
    of its probability that is left without the largest one. Logits are centred over the vocabulary."""
    normed, z = held.normed, code.encode(held)
    logits = held.logits(normed)
    top = logits.argmax(dim=-1)
    direction = held.unembedding[top] - held.unembedding.mean(dim=0)
    contributions = z * (direction @ code.writes.T)
    constant = code.constant(held)
    error = held.places[code.place] - constant - z @ code.writes
    beside = torch.stack([(part * direction).sum(dim=-1) for part in (constant, error)], dim=-1)
    positive = contributions.clamp(min=0)
    leading = positive.topk(min(LEADING, z.shape[1]), dim=-1).values.sum(dim=-1)
    share = leading / (positive.sum(dim=-1) + beside.clamp(min=0).sum(dim=-1))  # NaN where nothing speaks for it
    worst = contributions.argmax(dim=-1)
    rows = torch.arange(len(worst))
    after = held.logits(normed - z[rows, worst, None] * code.writes[worst])
    before, after = (x.log_softmax(dim=-1)[rows, top].exp() for x in (logits, after))
    return {
        "leading_share": over.mean(share, held.document),
        "left_after_one": over.mean(after / before, held.document),
    }


def stability(codes: Sequence[Code]) -> float:
    """Mean |cosine| of the writes of codes of one place and size that are matched one to one, over pairs of codes; NaN
    of a single one."""
    if len(codes) < 2:
        return float("nan")
    found = []
    for a, b in combinations(codes, 2):
        cosines = (F.normalize(a.writes, dim=1) @ F.normalize(b.writes, dim=1).T).abs().cpu().numpy()
        found.append(float(cosines[best_matching(cosines)].mean()))
    return float(np.mean(found))


def rows_at(held: Held, task: Task) -> Tensor:
    """The rows of the places of a task whose rows are places."""
    number = {place: i for i, place in enumerate(zip(held.document.tolist(), held.position.tolist(), strict=True))}
    return torch.tensor([number[document, position] for document, position in task.place.tolist()])


def _drawn(rows: NDArray[np.int64], most: int, seed: int) -> NDArray[np.int64]:
    return np.sort(derive_rng(seed, "removal_places").permutation(rows)[:most])


def active(code: Code, held: Held) -> Float[Tensor, " n"]:
    """How many coordinates are not 0 at each position."""
    some: Bool[Tensor, "n S"] = code.encode(held) != 0
    return some.sum(dim=1).float()
