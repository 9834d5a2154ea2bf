"""Views with nothing in them to find: `untrained`, which every experiment has beside it, and recipes drawn anew."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch

from analyses.neighbors import shuffle_columns
from reflowlens.models import build_model
from reflowlens.signals import VIEWS, SignalView, signal_view


def untrained_view(view: SignalView, seed: int) -> SignalView:
    """The architecture of a view's model at initialisation, built with ``seed + 1``, through a view of the same kind.

    A view made by hand has no untrained twin; the default view of the architecture takes its place.

    Example: ``untrained_view(signal_view(model), seed=0).model``
    """
    untrained = build_model(view.model.cfg, seed=seed + 1, device=view.model.cfg.device)
    name = next((name for name in VIEWS if name == view.name), None)
    return signal_view(untrained, name, seed=seed)


def gaussian_view(view: SignalView, seed: int) -> SignalView:
    """The control ``gaussian``: independent normal entries with the mean and variance of the recipe, the same basis."""
    recipe = view.recipe
    real = recipe[: view.n_tokens]
    drawn = np.random.default_rng(seed).standard_normal(tuple(recipe.shape), dtype=np.float32)
    return dataclasses.replace(view, recipe=torch.from_numpy(drawn).to(recipe) * real.std() + real.mean())


def shuffled_view(view: SignalView, seed: int) -> SignalView:
    """The control ``shuffled_recipe``: entries of real tokens permuted within each signal, the same basis."""
    return dataclasses.replace(view, recipe=shuffle_columns(view.recipe[: view.n_tokens], seed))


def recipe_nulls(view: SignalView, seed: int) -> Iterator[tuple[str, SignalView]]:
    """``shuffled_recipe``, ``gaussian`` and ``untrained``, one at a time."""
    yield "shuffled_recipe", shuffled_view(view, seed)
    yield "gaussian", gaussian_view(view, seed)
    yield "untrained", untrained_view(view, seed)
