"""Views with nothing in them to find: `untrained`, which every experiment has beside it, and recipes drawn anew."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from analyses.claims import untrained_names
from analyses.measures.neighbors import shuffle_columns
from analyses.statistics.draws import derive_rng, derive_seed
from reflowlens.dictionary_view import DictionaryView
from reflowlens.models import build_model
from reflowlens.models.base import HookedModel
from reflowlens.signals import VIEWS, SignalView, signal_view

T = TypeVar("T")
_LARGE = 20_000_000  # parameters, from which on memory is dearer than the second that it takes to draw a model again

_shared: ContextVar[dict[tuple[str, int, int], HookedModel] | None] = ContextVar("_shared", default=None)


def over_untrained(
    measure: Callable[[SignalView], T], view: SignalView, seed: int, experiment: str, *, quick: bool
) -> dict[str, T]:
    """What a function makes of each `untrained_view` of a view, by the names of `untrained_names`.

    The models are in memory one after the other, if nothing that is returned holds them; one that an experiment before
    this has left is read first. Large ones are gone when this returns.

    Example: ``over_untrained(lambda fresh: fresh.recipe.std(), signal_view(model), 0, "signal_flow", quick=True)``
    """
    names = untrained_names(experiment, quick)
    order = sorted(range(len(names)), key=lambda i: not _is_at_hand(view.model, seed, i + 1))
    found = {names[i]: measure(untrained_view(view, seed, i + 1)) for i in order}
    free_untrained(view.model)
    return {name: found[name] for name in names}


def untrained_model(model: HookedModel, seed: int, number: int = 1) -> HookedModel:
    """The architecture of a model at initialisation: the control ``untrained``, the same for all experiments of a seed.

    ``number``: which draw, from 1.
    """
    key = (repr(model.cfg), seed, number)
    shared = _shared.get()
    if shared is not None and key in shared:
        return shared[key]
    if shared is not None:
        shared.clear()  # one at a time: it is as large as the model
    free_untrained(model)
    untrained = build_model(model.cfg, seed=derive_seed(seed, "untrained", number), device=model.cfg.device)
    if shared is not None and model.n_parameters <= _LARGE:
        shared[key] = untrained
    return untrained


def free_untrained(model: HookedModel) -> None:
    """Give the memory of large draws back that nobody holds: a model refers to itself, through what ties its weights,
    and would outlive its last name until the collector's own time."""
    if model.n_parameters > _LARGE:
        gc.collect()


def _is_at_hand(model: HookedModel, seed: int, number: int) -> bool:
    return (repr(model.cfg), seed, number) in (_shared.get() or {})


@contextmanager
def shared_untrained() -> Iterator[None]:
    """Within the block `untrained_model` keeps the last model that it made, unless it is large, and gives it again: to
    be left as it is."""
    token = _shared.set({})
    try:
        yield
    finally:
        _shared.reset(token)


def untrained_view(view: SignalView, seed: int, number: int = 1) -> SignalView:
    """An `untrained_model` of a view's model, through a view of the same kind.

    Of a dictionary's view in a dictionary that is untrained too. A view made by hand has no untrained twin; the default
    view of the architecture takes its place.

    Example: ``untrained_view(signal_view(model), seed=0).model``
    """
    untrained = untrained_model(view.model, seed, number)
    if isinstance(view, DictionaryView):
        return view.untrained(untrained, derive_seed(seed, "untrained_dictionary", number))
    name = next((name for name in VIEWS if name == view.name), None)
    return signal_view(untrained, name, seed=seed)


def gaussian_view(view: SignalView, seed: int) -> SignalView:
    """The control ``gaussian``: independent normal entries with the mean and variance of the recipe, the same basis."""
    recipe = view.recipe
    real = recipe[: view.n_tokens]
    drawn = derive_rng(seed, "gaussian").standard_normal(tuple(recipe.shape), dtype=np.float32)
    return view.with_recipe(torch.from_numpy(drawn).to(recipe) * real.std() + real.mean())


def shuffled_view(view: SignalView, seed: int) -> SignalView:
    """The control ``shuffled_recipe``: entries of real tokens permuted within each signal, the same basis."""
    real = view.of_tokens(view.n_tokens)
    return real.with_recipe(shuffle_columns(real.recipe, seed))


def over_nulls(
    measure: Callable[[SignalView], T], view: SignalView, seed: int, experiment: str, *, quick: bool
) -> dict[str, T]:
    """What a function makes of ``shuffled_recipe`` and ``gaussian``, drawn for one experiment, and `over_untrained`."""
    own = derive_seed(seed, experiment)
    found = {"shuffled_recipe": measure(shuffled_view(view, own)), "gaussian": measure(gaussian_view(view, own))}
    return found | over_untrained(measure, view, seed, experiment, quick=quick)


def permuted_labels(labels: NDArray[np.int64], permutations: int, seed: int) -> NDArray[np.int64]:
    """The control ``label_permutation``: labels in random orders, [permutation, point]."""
    return derive_rng(seed, "label_permutation").permuted(np.tile(labels, (permutations, 1)), axis=1)
