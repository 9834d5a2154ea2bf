"""How alike a model reads two words that stand in the same place: the measures of Typo Resilience.

A word is put behind a carrier, the beginning of a sentence, and read at its last token, which is the last of the
prompt: words that fall into different numbers of tokens are compared where both are complete. What would follow them
cannot matter, for attention is causal.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from analyses.claims import sign_of
from analyses.measures.lens import (
    depths_of,
    first_settled,
    lens_log_probabilities,
    lens_points,
    readers,
    residual_stack,
)
from analyses.statistics.draws import derive_rng
from analyses.statistics.pvalues import paired_permutation_pvalue
from reflowlens.signals import SignalView

UNRELATED = ("unrelated_word", "unrelated_misspelling")
"""The controls that say how alike any two words are read."""
BATCH = 64  # prompts at a time: of a large model the residual stream at every point is megabytes a prompt

Values: TypeAlias = "Mapping[str, pd.DataFrame]"  # comparison -> a row a pair or a word, a column a metric


@dataclass(frozen=True)
class Likeness:
    """How alike the words of each pair are read at every point of `lens_points`: [point, pair], means over carriers.

    Args:
        cosine_resid: of the residual streams.
        cosine_readout: of their readouts a = B norm_final(x); a rotation of the signals does not move it.
        kl: from the first word's distribution of the next token to the other's, KL(first ‖ other) in nats, both
            through the lens; at the last point they are the model's own.
    """

    cosine_resid: NDArray[np.float64]
    cosine_readout: NDArray[np.float64]
    kl: NDArray[np.float64]


def others_of_same_length(words: Sequence[str], pool: Iterable[str], seed: int) -> list[str]:
    """For each word another one of the pool with as many letters, drawn at random; of the nearest length if none has.

    >>> others_of_same_length(["king", "queen"], ["king", "king", "ruler", "wine"], seed=0)
    ['wine', 'ruler']
    """
    candidates, generator = sorted(set(pool)), derive_rng(seed, "same_length")
    drawn = []
    for word in words:
        distance = np.array([abs(len(other) - len(word)) if other != word else np.inf for other in candidates])
        drawn.append(candidates[generator.choice(np.flatnonzero(distance == distance.min()))])
    return drawn


@torch.no_grad()
def compare_words(
    view: SignalView, words: Sequence[str], others: Mapping[str, Sequence[str]], carriers: Sequence[str]
) -> dict[str, Likeness]:
    """Compare each word with its partner in several lists of others, all in the same carriers.

    Example: ``compare_words(view, ["friend"], {"misspelt": ["freind"]}, ["She wrote the word"])["misspelt"].kl[-1]``
    """
    points = lens_points(view.model.cfg.n_layers)
    texts = list(dict.fromkeys(itertools.chain(words, *others.values())))
    number = {text: i for i, text in enumerate(texts)}
    first = torch.tensor([number[word] for word in words])
    partners = {name: torch.tensor([number[other] for other in column]) for name, column in others.items()}
    found: dict[str, list[Likeness]] = {name: [] for name in others}
    for carrier in carriers:
        prompts = [f"{carrier} {text}" for text in texts]
        batches = [prompts[start : start + BATCH] for start in range(0, len(prompts), BATCH)]
        stack = torch.cat([residual_stack(view.model, batch, points=points) for batch in batches], dim=1)
        for name, likeness in _compare(view, stack, first, partners).items():
            found[name].append(likeness)
    return {name: _mean(each) for name, each in found.items()}


def pair_values(likeness: Likeness, threshold: float, n_layers: int) -> pd.DataFrame:
    """The headline of each pair; the recovery layer of one that never recovers is NaN."""
    settled = first_settled(likeness.cosine_readout >= threshold)
    recovered = settled < len(likeness.cosine_readout)
    layers = np.append(depths_of(lens_points(n_layers)), np.nan)
    return pd.DataFrame(
        {
            "final_cosine_readout": likeness.cosine_readout[-1],
            "final_cosine_resid": likeness.cosine_resid[-1],
            "final_kl": likeness.kl[-1],
            "recovered_share": recovered.astype(float),
            "recovery_layer": layers[settled],
        }
    )


def by_word(words: Sequence[str], values: Values) -> Values:
    """Means over the pairs of each word, the unit of replication; NaN where all of them are."""
    return {name: each.groupby(np.array(words), sort=False).mean() for name, each in values.items()}


def control_pvalues(values: Values, metric: str, seed: int) -> dict[str, float]:
    """p of the paired test over words against each unrelated control."""
    differences = {
        name: sign_of("typo_resilience", metric) * (values["misspelt"][metric] - values[name][metric])
        for name in UNRELATED
    }
    return {name: paired_permutation_pvalue(difference, seed=seed) for name, difference in differences.items()}


def _compare(
    view: SignalView,
    stack: Float[Tensor, "point text d_model"],
    first: Int[Tensor, " pair"],
    partners: Mapping[str, Int[Tensor, " pair"]],
) -> dict[str, Likeness]:
    rows: dict[str, list[list[Tensor]]] = {name: [] for name in partners}
    for lens, resid in zip(readers(view, len(stack)), stack, strict=True):
        resid = resid.float()
        readout = lens.readout(resid)
        log_p = lens_log_probabilities(lens, resid)
        p = log_p[first].exp()
        negative_entropy = (p * log_p[first]).sum(dim=-1)
        for name, partner in partners.items():
            rows[name].append(
                [
                    F.cosine_similarity(resid[first], resid[partner], dim=-1),
                    F.cosine_similarity(readout[first], readout[partner], dim=-1),
                    negative_entropy - (p * log_p[partner]).sum(dim=-1),
                ]
            )
    return {
        name: Likeness(*(torch.stack(column).double().cpu().numpy() for column in zip(*points, strict=True)))
        for name, points in rows.items()
    }


def _mean(likenesses: Sequence[Likeness]) -> Likeness:
    return Likeness(
        *(
            np.mean([getattr(each, name) for each in likenesses], axis=0)
            for name in ("cosine_resid", "cosine_readout", "kl")
        )
    )
