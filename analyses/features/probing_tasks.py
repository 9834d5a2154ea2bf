"""What probes are asked: the categories of words, and concepts of a text, at places in held-out documents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from analyses.statistics.draws import derive_rng
from analyses.units.concepts import CONCEPTS, label_tokens
from analyses.words.lexicon import Lexicon, single_token_categories
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel

MINIMUM = {"words": 5, "concepts": 20}  # rows of a class, and without it, in each half
OCCURRENCES = 20  # of a word, so that a frequent one does not decide what is read


@dataclass(frozen=True, eq=False)
class Task:
    """Rows with labels, half of them for training.

    Args:
        name: ``words``, whose rows are words, each the mean over its occurrences; or ``concepts``, whose rows are
            places.
        classes: one against all others each.
        labels: whether a row is of a class.
        unit: what a row stands and falls with: the word, or the document.
        training: rows of the training half; no unit is in both.
        place: of each occurrence, (document, position).
        row: which row an occurrence belongs to.
    """

    name: str
    classes: tuple[str, ...]
    labels: NDArray[np.bool_]
    unit: NDArray[np.int64]
    training: NDArray[np.bool_]
    place: NDArray[np.int64]
    row: NDArray[np.int64]

    def rows(self, features: Float[Tensor, "occurrence feature"]) -> Float[Tensor, "row feature"]:
        """The mean over the occurrences of each row."""
        row = torch.from_numpy(self.row)
        sums = torch.zeros(len(self.unit), features.shape[1]).index_add_(0, row, features.float().cpu())
        return sums / row.bincount(minlength=len(self.unit))[:, None]

    def usable(self) -> Task:
        """The same without the classes that have too few rows in a half."""
        halves = [self.labels[self.training], self.labels[~self.training]]
        few = MINIMUM[self.name]
        kept = np.all([(half.sum(0) >= few) & ((~half).sum(0) >= few) for half in halves], axis=0)
        classes = tuple(name for name, keep in zip(self.classes, kept, strict=True) if keep)
        return Task(self.name, classes, self.labels[:, kept], self.unit, self.training, self.place, self.row)


def probing_tasks(
    model: HookedModel, rows: Sequence[Int[Tensor, " _token"]], lexicon: Lexicon, positions: int, seed: int
) -> list[Task]:
    """The tasks that these documents can decide.

    Args:
        rows: the documents.
        positions: places of each half that concepts are asked at.

    Raises:
        ReflowlensError: there is none: too few of the words occur, and too few of the concepts.
    """
    tasks = [task.usable() for task in (_words(model, rows, lexicon, seed), _concepts(model, rows, positions, seed))]
    if not any(task.classes for task in tasks):
        raise ReflowlensError(
            f"neither words of a category nor concepts occur often enough in {len(rows)} documents: give more text"
        )
    return [task for task in tasks if task.classes]


def _words(model: HookedModel, rows: Sequence[Tensor], lexicon: Lexicon, seed: int) -> Task:
    """Words of the lexicon's categories that occur, half of each category for training."""
    generator = derive_rng(seed, "probed_words")
    found = _occurrences(rows)
    kept: list[tuple[str, NDArray[np.int64]]] = []
    for category, tokens in single_token_categories(lexicon.categories, model.tokenizer)[0].items():
        for token in tokens:
            places = found[found[:, 2] == token, :2]
            if len(places):
                kept.append((category, generator.permutation(places)[:OCCURRENCES]))
    categories = list(dict.fromkeys(category for category, _ in kept))
    of_row = np.array([category for category, _ in kept])
    labels = np.array([[own == category for category in categories] for own, _ in kept], dtype=bool)
    training = np.zeros(len(kept), dtype=bool)
    for category in categories:
        own = generator.permutation(np.flatnonzero(of_row == category))
        training[own[: len(own) // 2]] = True
    place = np.concatenate([places for _, places in kept]) if kept else np.zeros((0, 2), dtype=np.int64)
    row = np.repeat(np.arange(len(kept)), [len(places) for _, places in kept])
    shape = (len(kept), len(categories))
    return Task("words", tuple(categories), labels.reshape(shape), np.arange(len(kept)), training, place, row)


def _concepts(model: HookedModel, rows: Sequence[Tensor], positions: int, seed: int) -> Task:
    """Places of documents, half of the documents for training."""
    generator = derive_rng(seed, "probed_documents")
    first = np.zeros(len(rows), dtype=bool)
    first[generator.permutation(len(rows))[: len(rows) // 2]] = True
    places = _occurrences(rows)[:, :2]
    chosen = [generator.permutation(places[first[places[:, 0]] == half])[:positions] for half in (True, False)]
    place = np.concatenate(chosen)
    labels = [label_tokens(model, row[None])[0].numpy() for row in rows]
    of_place = np.stack([labels[document][position] for document, position in place.tolist()])
    return Task("concepts", tuple(CONCEPTS), of_place, place[:, 0], first[place[:, 0]], place, np.arange(len(place)))


def _occurrences(rows: Sequence[Tensor]) -> NDArray[np.int64]:
    """(document, position, token) of every position that counts."""
    return np.concatenate(list(_of_documents(rows)))


def _of_documents(rows: Sequence[Tensor]) -> Iterator[NDArray[np.int64]]:
    for document, row in enumerate(rows):
        tokens = row[1:].cpu().numpy()
        yield np.stack([np.full(len(tokens), document), np.arange(1, len(row)), tokens], axis=1)
