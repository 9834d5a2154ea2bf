"""How much of each head's attention goes to the token before, to earlier copies of the token, to what followed them, …

The kinds are those of `analyses.tasks.head_patterns`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from reflowlens.interventions.passes import is_intervened
from reflowlens.models.base import HookedModel
from reflowlens.progress import bar
from reflowlens.scoring.batches import by_length

KINDS = ("previous", "duplicate", "induction", "current", "first")
BY_TOKENS = ("duplicate", "induction")


def pattern_of(kind: str, tokens: Int[Tensor, "row pos"]) -> Bool[Tensor, "row query key"]:
    """The keys that a kind of head attends to.

    >>> pattern_of("induction", torch.tensor([[5, 6, 5]]))[0].nonzero().tolist()
    [[2, 1]]
    """
    n = tokens.shape[1]
    query, key = torch.arange(n)[:, None], torch.arange(n)
    if kind == "duplicate":
        return (tokens[:, :, None] == tokens[:, None]) & (key < query)
    if kind == "induction":
        follows = torch.zeros(len(tokens), n, n, dtype=torch.bool)
        follows[:, :, 1:] = pattern_of("duplicate", tokens)[:, :, :-1]
        return follows
    place = {"previous": key == query - 1, "current": key == query, "first": (key == 0) & (query >= 0)}[kind]
    return place.expand(len(tokens), -1, -1)


@dataclass(frozen=True, eq=False)
class Shares:
    """Shares of attention by kind, of all sequences' queries that have a key, and of attending to all keys alike."""

    score: Mapping[str, Float[np.ndarray, "sequence layer head"]]
    where_possible: Mapping[str, Float[np.ndarray, "layer head"]]
    shuffled: Mapping[str, Float[np.ndarray, "sequence layer head"]]
    uniform: Mapping[str, Float[np.ndarray, " sequence"]]

    def excess(self, kind: str) -> Float[np.ndarray, "sequence layer head"]:
        """Over the control that is the kind's own."""
        beside = self.shuffled[kind] if kind in BY_TOKENS else self.uniform[kind][:, None, None]
        return self.score[kind] - beside


def measured_shares(
    model: HookedModel,
    rows: Sequence[Sequence[int]],
    shuffled: Sequence[Sequence[int]],
    progress: bool,
    desc: str,
) -> Shares:
    """Both runs of each sequence, its own and the shuffled one, at the places that its own tokens name."""
    shape = len(rows), model.cfg.n_layers, model.cfg.n_heads
    found = [{kind: np.zeros(shape) for kind in KINDS} for _ in range(2)]
    possible, uniform = ({kind: np.zeros(len(rows)) for kind in KINDS} for _ in range(2))

    @torch.no_grad()
    def run(chosen: list[int]) -> None:
        lengths = torch.tensor([len(rows[i]) for i in chosen])
        own, other = (_padded([some[i] for i in chosen]) for some in (rows, shuffled))
        is_query = torch.arange(own.shape[1]) < lengths[:, None]
        places = {kind: pattern_of(kind, own) & is_query[:, :, None] for kind in KINDS}
        for kind, place in places.items():
            counts = place.sum(dim=2)
            possible[kind][chosen] = (counts > 0).sum(dim=1).numpy()
            alike = counts / torch.arange(1, own.shape[1] + 1)
            uniform[kind][chosen] = (alike.sum(dim=1) / lengths).numpy()
        stacked = torch.stack([places[kind] for kind in KINDS]).to(model.cfg.device)
        for scores, tokens in zip(found, (own, other), strict=True):
            points = enumerate(pattern_points(model))
            hooks = [(name, partial(_share, stacked, scores, chosen, layer)) for layer, name in points]
            with model.hooks(hooks):
                model(tokens.to(model.cfg.device), return_type=None, stop_at_layer=model.cfg.n_layers)

    with bar(show=progress, total=len(rows), unit="sequence", desc=f"attention, {desc}") as shown_bar:
        lengths = [len(row) for row in rows]
        device = next(model.parameters()).device
        for chosen, _ in by_length(lengths, run, device, alike=is_intervened(model)):
            shown_bar.update(len(chosen))
    sums, of_shuffled = found
    n = np.array([len(row) for row in rows])[:, None, None]
    return Shares(
        {kind: x / n for kind, x in sums.items()},
        {kind: x.sum(axis=0) / (possible[kind].sum() or np.nan) for kind, x in sums.items()},
        {kind: x / n for kind, x in of_shuffled.items()},
        uniform,
    )


def _share(
    places: Bool[Tensor, "kind row query key"],
    scores: Mapping[str, NDArray[np.float64]],
    chosen: Sequence[int],
    layer: int,
    pattern: Float[Tensor, "row head query key"],
    hook: HookPoint,
) -> None:
    for kind, place in zip(KINDS, places, strict=True):
        share = torch.einsum("rhqk,rqk->rh", pattern.float(), place.float())
        scores[kind][list(chosen), layer] = share.cpu().numpy()


def _padded(rows: Sequence[Sequence[int]]) -> Int[Tensor, "row pos"]:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


def pattern_points(model: HookedModel) -> list[str]:
    """The hook point of every block's attention pattern."""
    return [f"blocks.{layer}.attn.hook_pattern" for layer in range(model.cfg.n_layers)]
