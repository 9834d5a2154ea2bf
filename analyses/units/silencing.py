"""Whether the units that predict a concept are used for it: they are set to 0, and so are others that fire as often."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from analyses.statistics.draws import derive_rng
from analyses.statistics.pvalues import permutation_pvalue
from analyses.units.concepts import CONCEPTS
from reflowlens.models.base import HookedModel

UNITS = 10
DRAWS = 19  # of rate-matched units: the smallest p is 1/20
ROWS = 16
_NEIGHBOURS = 8  # the units nearest in firing rate, of which a draw takes one


@torch.no_grad()
def ablate_concepts(
    model: HookedModel,
    tokens: Int[Tensor, "row pos"],
    labels: Bool[Tensor, "row pos concept"],
    units: pd.DataFrame,
    n_first: int,
    n_concepts: int,
    seed: int,
) -> tuple[pd.DataFrame, list[str]]:
    """The loss that silencing the best units of a concept costs, on and off it, and the loss for rate-matched units.

    Units are chosen by their F1 on S1. Losses are measured on S2, of the token after a position that has the concept
    (on) or does not (off).

    Args:
        units: from `analyses.units.monosemanticity.score_units`.
        n_first: number of rows of S1.
        n_concepts: number of concepts, those with the largest F1 of a unit on S1.

    Returns:
        A frame with a row per concept: ``units`` silenced, the change of the mean loss ``on`` and ``off`` the concept
        in nats, ``matched_on`` and ``matched_off`` (means over draws), and ``p`` that ``on`` minus ``off`` is larger
        than for the draws. And a note on each concept that is left out, because all positions have it, or none, or a
        point has fewer than twice as many other units as are silenced, whose draws would be almost the same units.
    """
    generator = derive_rng(seed, "matched_units")
    chosen = units.groupby("concept")["f1_s1"].max().nlargest(n_concepts).index
    rows = tokens[n_first : n_first + ROWS]
    losses = row_losses(model, rows)
    found = []
    notes: list[str] = []
    for concept in chosen:
        on = labels[n_first : n_first + ROWS, :-1, list(CONCEPTS).index(concept)].to(losses.device)
        best = units[units["concept"] == concept].nlargest(UNITS, "f1_s1")
        others = units.drop(best.index)
        if not on.any() or on.all():
            notes.append(f"{concept} is not ablated: of the positions whose loss is measured all have it, or none")
            continue
        if not _enough(best, others):
            notes.append(f"{concept} is not ablated: too few other units to hold its {len(best)} against")
            continue
        change = partial(_change, model, rows, losses, on)
        own = change(_by_point(best))
        draws = np.array([change(_by_point(matched(best, others, generator))) for _ in range(DRAWS)])
        found.append(
            {
                "concept": concept,
                "units": len(best),
                "on": own[0],
                "off": own[1],
                "matched_on": float(draws[:, 0].mean()),
                "matched_off": float(draws[:, 1].mean()),
                "p": permutation_pvalue(own[0] - own[1], draws[:, 0] - draws[:, 1]),
            }
        )
    columns = ["concept", "units", "on", "off", "matched_on", "matched_off", "p"]
    return pd.DataFrame(found, columns=columns), notes


def _enough(best: pd.DataFrame, others: pd.DataFrame) -> bool:
    """Whether each point has twice as many other units as are silenced in it."""
    left = others["point"].value_counts()
    return all(left.get(point, 0) >= 2 * n for point, n in best["point"].value_counts().items())


def matched(best: pd.DataFrame, others: pd.DataFrame, generator: np.random.Generator) -> pd.DataFrame:
    """For each unit another one of the same point, drawn among those nearest in log firing rate, none twice.

    Each point must have enough others (`_enough`).
    """
    taken: list[int] = []
    for unit in best.to_dict("records"):
        pool = others[others["point"] == unit["point"]].drop(index=taken, errors="ignore")
        distance = (np.log(pool["firing_rate"]) - np.log(unit["firing_rate"])).abs()
        near = distance.nsmallest(_NEIGHBOURS).index
        taken.append(int(generator.choice(near)))
    return others.loc[taken]


def row_losses(model: HookedModel, rows: Int[Tensor, "row pos"]) -> Float[Tensor, "row pred"]:
    """The loss of every token but the first, in nats."""
    logits = model(rows)[:, :-1].float()
    return F.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")


def _change(
    model: HookedModel,
    rows: Int[Tensor, "row pos"],
    losses: Float[Tensor, "row pred"],
    on: Bool[Tensor, "row pred"],
    silenced: Mapping[str, Int[Tensor, " _unit"]],
) -> tuple[float, float]:
    """The change of the mean loss on a concept and off it when units are silenced."""
    with model.hooks(fwd_hooks=[(point, partial(_silence, index)) for point, index in silenced.items()]):
        change = row_losses(model, rows) - losses
    return float(change[on].mean()), float(change[~on].mean())


def _silence(index: Int[Tensor, " unit"], activation: Tensor, hook: HookPoint) -> Tensor:
    flat = activation.flatten(2).clone()
    flat[..., index] = 0
    return flat.unflatten(2, activation.shape[2:])


def _by_point(units: pd.DataFrame) -> dict[str, Int[Tensor, " _unit"]]:
    return {str(point): torch.tensor(group["index"].to_numpy()) for point, group in units.groupby("point")}
