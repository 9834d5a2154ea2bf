"""At which depths a costly measure is taken: at every layer of a model of ordinary depth, of a deep one on a grid.

What is done at a layer for every strength, direction or prompt costs passes, and there are as many layers to do it at
as the model is deep: the cost grows with the square of the depth. A grid makes it grow with the depth alone.

The grid is even and chosen beforehand. Layers picked by what a measure shows at their neighbours would favour it over
its controls, which are measured at the same layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from reflowlens.arguments import whole_number
from reflowlens.errors import ReflowlensError

ORDINARY = 12  # blocks, up to which nothing is left out
_QUICK = 6


def layer_grid(n_layers: int, *, quick: bool = False) -> list[int]:
    """The layers of the stream, 0 to ``n_layers`` (the end), at which something is measured.

    All of them up to 12 blocks; of deeper models 13 evenly spread ones, 7 in a quick run, both ends and the half among
    them.

    >>> layer_grid(3), layer_grid(30, quick=True)
    ([0, 1, 2, 3], [0, 5, 10, 15, 20, 25, 30])
    """
    steps = _QUICK if quick else ORDINARY
    if n_layers <= ORDINARY:
        return list(range(n_layers + 1))
    return [step * n_layers // steps for step in range(steps + 1)]


def chosen_layers(layers: Sequence[int] | None, n_layers: int, *, quick: bool = False) -> list[int]:
    """The layers that are asked for with both ends and the half, ascending; by default `layer_grid`.

    Raises:
        ReflowlensError: there is no such layer.
    """
    if layers is None:
        return layer_grid(n_layers, quick=quick)
    given = list(layers) if isinstance(layers, Iterable) else [layers]
    chosen = {whole_number(layer, "layers", 0) for layer in given} | {0, n_layers // 2, n_layers}
    if max(chosen) > n_layers:
        raise ReflowlensError(f"layers: numbers from 0 to {n_layers} (the end) were expected, got {max(chosen)}")
    return sorted(chosen)


def left_out(layers: Sequence[int], n_layers: int) -> list[str]:
    """A note where some layers were not measured."""
    if len(layers) == n_layers + 1:
        return []
    return [f"measured at {len(layers)} of {n_layers + 1} layers: {', '.join(map(str, layers))}"]
