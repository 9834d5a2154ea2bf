"""Views with nothing in them to find: `untrained`, which every experiment has beside it, and recipes drawn anew."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np
import torch
from numpy.typing import NDArray

from analyses.measures.neighbors import shuffle_columns
from analyses.statistics.draws import derive_rng, derive_seed
from reflowlens.models import build_model
from reflowlens.models.base import HookedModel
from reflowlens.signals import VIEWS, SignalView, signal_view

_shared: ContextVar[dict[tuple[str, int, int], HookedModel] | None] = ContextVar("_shared", default=None)


def untrained_model(model: HookedModel, seed: int, number: int = 1) -> HookedModel:
    """The architecture of a model at initialisation: the control ``untrained``, one for all experiments of a seed.

    ``number``: which one, where several are held against the model.
    """
    key = (repr(model.cfg), seed, number)
    shared = _shared.get()
    if shared is not None and key in shared:
        return shared[key]
    untrained = build_model(model.cfg, seed=derive_seed(seed, "untrained", number), device=model.cfg.device)
    if shared is not None:
        shared.clear()  # one at a time: it is as large as the model
        shared[key] = untrained
    return untrained


@contextmanager
def shared_untrained() -> Iterator[None]:
    """Within the block `untrained_model` makes a model once and gives it again: to be left as it is."""
    token = _shared.set({})
    try:
        yield
    finally:
        _shared.reset(token)


def untrained_view(view: SignalView, seed: int) -> SignalView:
    """The `untrained_model` of a view's model, through a view of the same kind.

    A view made by hand has no untrained twin; the default view of the architecture takes its place.

    Example: ``untrained_view(signal_view(model), seed=0).model``
    """
    untrained = untrained_model(view.model, seed)
    name = next((name for name in VIEWS if name == view.name), None)
    return signal_view(untrained, name, seed=seed)


def gaussian_view(view: SignalView, seed: int) -> SignalView:
    """The control ``gaussian``: independent normal entries with the mean and variance of the recipe, the same basis."""
    recipe = view.recipe
    real = recipe[: view.n_tokens]
    drawn = derive_rng(seed, "gaussian").standard_normal(tuple(recipe.shape), dtype=np.float32)
    return dataclasses.replace(view, recipe=torch.from_numpy(drawn).to(recipe) * real.std() + real.mean())


def shuffled_view(view: SignalView, seed: int) -> SignalView:
    """The control ``shuffled_recipe``: entries of real tokens permuted within each signal, the same basis."""
    real = view.of_tokens(view.n_tokens)
    return dataclasses.replace(real, recipe=shuffle_columns(real.recipe, seed))


def recipe_nulls(view: SignalView, seed: int, experiment: str) -> Iterator[tuple[str, SignalView]]:
    """``shuffled_recipe`` and ``gaussian``, drawn for one experiment, and ``untrained``, one at a time."""
    own = derive_seed(seed, experiment)
    yield "shuffled_recipe", shuffled_view(view, own)
    yield "gaussian", gaussian_view(view, own)
    yield "untrained", untrained_view(view, seed)


def permuted_labels(labels: NDArray[np.int64], permutations: int, seed: int) -> NDArray[np.int64]:
    """The control ``label_permutation``: labels in random orders, [permutation, point]."""
    return derive_rng(seed, "label_permutation").permuted(np.tile(labels, (permutations, 1)), axis=1)
