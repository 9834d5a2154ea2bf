"""The control `untrained`, which every experiment has beside it."""

from __future__ import annotations

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
