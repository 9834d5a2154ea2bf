"""Steering: what a direction added to the residual stream does from its layer on, for many strengths at once.

Prompts are read once. An injection into layer l changes nothing before l, nor at earlier positions, so each of many
injections runs only its own positions through the blocks from l on (:mod:`reflowlens.sweeps.suffixes`); the
numbers are those of one whole pass with :func:`steer` each. Layer ``n_layers`` is the end: the stream that is
unembedded.

A direction is written in write coordinates, r B, which is the same through every exact view of a model. Its *strength*
is the root mean square of what is added over that of the stream that it is added to: at 1 it is as large as the stream.
``alpha`` is the factor of r B itself, the unit of the published figures as far as these say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from analyses.statistics.draws import derive_generator
from reflowlens.errors import ReflowlensError
from reflowlens.interventions.values import Position, Steer
from reflowlens.models.base import HookedModel
from reflowlens.models.text import TextInput
from reflowlens.sweeps.stages import stages_of
from reflowlens.sweeps.suffixes import Layout

Where: TypeAlias = "Literal['last', 'all'] | str"
Reached: TypeAlias = "Callable[[NDArray[np.int64], NDArray[np.float64]], NDArray[np.bool_]]"
_AT_ONCE = 2**22  # entries of a [row, pos, d_model] block: 16 MB, of which a pass holds a few


class Injections:
    """Prompts read once, and the streams that they end in when directions are added on the way.

    Args:
        model: a hooked model to which nothing is attached.
        where: the positions that a direction is added to: ``"last"``, each prompt's last; ``"all"``; or the text of a
            token (``" film"``), from whose last occurrence on it is added.

    Raises:
        ReflowlensError: hooks are attached to the model, or a prompt lacks the token.

    Example:
        >>> import reflowlens as rl
        >>> runs = Injections(rl.load_model("reflow-nano"), ["The film was", "The food is"])
        >>> runs.final(3, torch.tensor([0, 0, 1]), torch.ones(3, 256)).shape
        torch.Size([3, 256])
    """

    def __init__(self, model: HookedModel, prompts: TextInput, where: Where = "last") -> None:
        if any(point.fwd_hooks or point.bwd_hooks for point in model.hook_dict.values()):
            raise ReflowlensError(
                "directions are added to the model as it is: leave rl.intervene and remove hooks first"
            )
        self.model = model
        self.tokens, lengths = model.tokens_and_lengths(prompts)
        self.last = torch.tensor(lengths, device=self.tokens.device) - 1
        self.start = self._starts(where)
        self._stages = stages_of(model)
        names = [*self._stages.streams, *self._stages.remembered]
        with torch.no_grad():
            _, self._cache = model.run_with_cache(
                self.tokens, names_filter=names, return_type=None, return_cache_object=False
            )
        between_blocks = self._stages.streams[:: self._stages.per_block]
        self.streams: list[Float[Tensor, "prompt pos d_model"]] = [self._cache[name] for name in between_blocks]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def layers(self) -> range:
        """Where a direction can be added: the stream that each block reads, and the end."""
        return range(self.model.cfg.n_layers + 1)

    def unsteered(self, layer: int) -> Float[Tensor, "prompt d_model"]:
        """The stream at each prompt's last position as it is."""
        return self.streams[layer][torch.arange(len(self), device=self.last.device), self.last]

    def rms(self) -> Float[Tensor, "layer prompt"]:
        """Root mean square of the unsteered streams, the unit of strength."""
        return torch.stack([rms(self.unsteered(layer)) for layer in self.layers])

    def final(
        self, layer: int, prompt: Int[Tensor, " row"], change: Float[Tensor, "row d_model"]
    ) -> Float[Tensor, "row d_model"]:
        """The stream that each row ends in at its last position: a prompt of these with a change added at a layer."""
        rows = max(1, _AT_ONCE // self.streams[0][0].numel())
        parts = zip(prompt.split(rows), change.split(rows), strict=True)
        return torch.cat([self._run(layer, some, added) for some, added in parts])

    @torch.no_grad()
    def _run(self, layer: int, prompt: Tensor, change: Tensor) -> Float[Tensor, "row d_model"]:
        layout = self._layout(prompt)
        row, position = layout.row, layout.position
        stream = self.streams[layer]
        resid = (stream[prompt[row], position] + change.to(stream)[row])[None]
        for at in range(layer * self._stages.per_block, len(self._stages.streams) - 1):
            resid = self._stages.run(at, resid, layout, self._cache)
        return resid[0, position == self.last[prompt[row]]]

    def _layout(self, prompt: Int[Tensor, " row"]) -> Layout:
        """Each row's positions from where its prompt is steered to its last token."""
        position = torch.arange(self.tokens.shape[1], device=prompt.device)
        steered = (position >= self.start[prompt, None]) & (position <= self.last[prompt, None])
        row, place = steered.nonzero(as_tuple=True)
        return Layout(prompt, row, place, self.tokens.shape[1])

    def _starts(self, where: Where) -> Int[Tensor, " prompt"]:
        if where in ("last", "all"):
            return self.last if where == "last" else torch.zeros_like(self.last)
        wanted = self.model.to_single_token(where)
        position = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        found = torch.where((self.tokens == wanted) & (position <= self.last[:, None]), position, -1).amax(dim=1)
        if bool((found < 0).any()):
            missing = int(found.argmin())
            text = self.model.to_string(self.tokens[missing, : int(self.last[missing]) + 1])
            raise ReflowlensError(f"the prompt {text!r} has no token {where!r} to steer from")
        return found


def steer(
    model: HookedModel, layer: int, direction: Float[Tensor, " d_model"], alpha: float, position: Position = None
) -> Steer:
    """The same injection as an intervention for ``rl.intervene``: into the stream that a block reads, or the last one.

    Example: ``with rl.intervene(model, steer(model, 3, direction, 40.0)): model.generate("The film was")``
    """
    at_end = layer == model.cfg.n_layers
    hook, block = ("resid_post", layer - 1) if at_end else ("resid_pre", layer)
    return Steer(hook, direction, alpha, layer=block, position=position)


def rms(vectors: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
    """Root mean square of the entries, ‖x‖ / √d."""
    return vectors.float().pow(2).mean(dim=-1).sqrt()


def of_unit_rms(vectors: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    """The same directions with entries of root mean square 1."""
    return F.normalize(vectors.float(), dim=-1) * vectors.shape[-1] ** 0.5


def random_directions(n: int, size: int, seed: int) -> Float[Tensor, "n size"]:
    """The control `random_direction`: isotropic, of unit root mean square."""
    return of_unit_rms(torch.randn(n, size, generator=derive_generator(seed, "random_direction")))


class Critical(NamedTuple):
    """What :func:`critical_strength` found.

    Args:
        strength: the smallest that suffices, by problem; NaN where none up to the largest does.
        trace: a row a trial in the order made: ``problem``, ``step``, ``strength``, ``reached``.
    """

    strength: NDArray[np.float64]
    trace: pd.DataFrame


def critical_strength(
    reached: Reached, n_problems: int, *, smallest: float, largest: float, tolerance: float = 0.02
) -> Critical:
    """The smallest strength at which each problem's goal is reached: bracketed by doubling, then bisected, all at once.

    0 is tried first, then ``smallest``, twice that, and so on up to ``largest``; the first bracket whose upper end
    suffices is halved until it is no wider than ``tolerance`` times its upper end, which is returned. If a goal is lost
    again at a larger strength this is still its first bracket: see :func:`lost_again`.

    Args:
        reached: called with the indices of some problems and a strength for each.

    Raises:
        ReflowlensError: not 0 < smallest ≤ largest, or not 0 < tolerance < 1.

    >>> needed = np.array([0.0, 0.7, 50.0])
    >>> critical_strength(lambda problem, strength: strength >= needed[problem], 3, smallest=0.1, largest=8).strength
    array([0. , 0.7, nan])
    """
    if not 0 < smallest <= largest or not 0 < tolerance < 1:
        raise ReflowlensError(
            f"0 < smallest ≤ largest and 0 < tolerance < 1 were expected, got {smallest}, {largest} and {tolerance}"
        )
    low, high = np.zeros(n_problems), np.full(n_problems, smallest)
    critical = np.full(n_problems, np.nan)
    trials: list[pd.DataFrame] = []

    def succeed(problems: NDArray[np.int64], strengths: NDArray[np.float64]) -> NDArray[np.bool_]:
        hits = reached(problems, strengths)
        trials.append(pd.DataFrame({"problem": problems, "step": len(trials), "strength": strengths, "reached": hits}))
        return hits

    searching = np.arange(n_problems)
    hits = succeed(searching, low)
    critical[searching[hits]] = 0.0
    searching = searching[~hits]
    found = []
    while len(searching):
        hits = succeed(searching, high[searching])
        found.append(searching[hits])
        searching = searching[~hits & (high[searching] < largest)]
        low[searching] = high[searching]
        high[searching] = np.minimum(2 * low[searching], largest)
    bracketed = np.concatenate(found) if found else searching
    while len(wide := bracketed[high[bracketed] - low[bracketed] > tolerance * high[bracketed]]):
        middle = (low[wide] + high[wide]) / 2
        hits = succeed(wide, middle)
        high[wide[hits]], low[wide[~hits]] = middle[hits], middle[~hits]
    critical[bracketed] = high[bracketed]
    return Critical(critical, pd.concat(trials, ignore_index=True))


def lost_again(reached: Reached, critical: NDArray[np.float64], strengths: NDArray[np.float64]) -> NDArray[np.bool_]:
    """By problem, whether a goal that is reached at its critical strength fails at one of some larger ones.

    >>> def reached(problem, strength):
    ...     return (strength > 1) & (strength < 3 + 9 * problem)
    >>> lost_again(reached, np.array([1.1, 1.1, np.nan]), np.array([1, 2, 4, 8]))
    array([ True, False, False])
    """
    lost = np.zeros(len(critical), dtype=bool)
    for strength in strengths:
        problems = np.flatnonzero((critical < strength) & ~lost)
        lost[problems] = ~reached(problems, np.full(len(problems), float(strength)))
    return lost
