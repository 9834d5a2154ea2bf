"""What one unit can do by force: set to multiples of the largest activation it has in text, what is said next?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from analyses.experiments.circuit_tracing.additions import ends_with, log_probabilities
from analyses.experiments.circuit_tracing.writers import Writers
from analyses.statistics.draws import derive_generator
from analyses.statistics.intervals import bootstrap_band
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel

DOSES = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
BOUNDS = (1, 5, 100)  # doses up to which a unit is asked to lift a token
PROMOTED = 10  # tokens of a unit, of which it must lift one
LIFTED, BEFORE = 0.5, 0.1  # the probability that a token must reach, and be below before
_AT_ONCE = 128  # rows that are read over the vocabulary
_ALIKE = 16  # units of the nearest norm, among which a control is drawn


@dataclass(frozen=True)
class Pushes:
    """Things that can be forced, each with the tokens that are watched meanwhile; n of them.

    Args:
        written: what is written into each block's MLP output at dose 1.
        present: of what is written there already, how much, as a dose, by prompt.
        tokens: the watched ones, the first of which is its own.
    """

    written: Float[Tensor, "n block d_model"]
    present: Float[Tensor, "prompt n"]
    tokens: Int[Tensor, "n token"]


@dataclass(frozen=True)
class Sample:
    """Units that were drawn, with the largest activation of each in text, which is dose 1."""

    block: Int[Tensor, " n"]
    index: Int[Tensor, " n"]
    largest: Float[Tensor, " n"]


def drawn_units(writers: Writers, texts: Sequence[str], n: int, seed: int) -> Sample:
    """At most n units at random, of those that write anything and are active anywhere in the texts.

    Raises:
        ReflowlensError: fewer than two are.
    """
    largest = [each * (writers.norms(block) > 0) for block, each in enumerate(writers.largest(texts))]
    block = torch.cat([torch.full_like(each, b, dtype=torch.long) for b, each in enumerate(largest)])
    index = torch.cat([torch.arange(len(each), device=each.device) for each in largest])
    activation = torch.cat(largest)
    active = activation.nonzero()[:, 0]
    if len(active) < 2:
        raise ReflowlensError(f"circuit_tracing forces units that are active in texts, and there are {len(active)}")
    chosen = active[torch.randperm(len(active), generator=derive_generator(seed, "drawn_units"))[:n].to(active.device)]
    return Sample(block[chosen], index[chosen], activation[chosen])


def matched_units(writers: Writers, sample: Sample, seed: int) -> Sample:
    """For each unit another of its block, drawn among those whose decoders have the nearest norm.

    Dose 1 writes as much. Its activation at dose 1 has the sign of the unit's own.
    """
    generator, index, largest = derive_generator(seed, "matched_units"), [], []
    columns = (part.tolist() for part in (sample.block, sample.index, sample.largest))
    for block, unit, activation in zip(*columns, strict=True):
        norms = writers.norms(block)
        distance = (norms - norms[unit]).abs()
        distance[unit] = torch.inf
        distance[norms == 0] = torch.inf
        near = distance.argsort(stable=True)[: min(_ALIKE, int(distance.isfinite().sum()))]
        other = int(near[torch.randint(len(near), (1,), generator=generator)]) if len(near) else unit
        index.append(other)
        largest.append(activation * float(norms[unit] / norms[other]))
    return replace(sample, index=sample.index.new_tensor(index), largest=sample.largest.new_tensor(largest))


def pushes_of(
    writers: Writers, sample: Sample, prompts: Sequence[Int[Tensor, " pos"]], tokens: Tensor | None = None
) -> Pushes:
    """Units as pushes.

    Args:
        tokens: the watched ones [n, token]; default: those that each promotes most.
    """
    written = writers.written(sample.block, sample.index, sample.largest)
    present = torch.stack([_present(writers, sample, prompt) for prompt in prompts])
    return Pushes(written, present, writers.promoted(written, PROMOTED) if tokens is None else tokens)


def random_directions(writers: Writers, like: Pushes, seed: int) -> Pushes:
    """Gaussian directions, written where the units write and as strongly, each with the tokens that it promotes."""
    generator = derive_generator(seed, "random_directions")
    drawn = torch.randn(like.written.shape, generator=generator).to(like.written)
    written = drawn / drawn.norm(dim=2, keepdim=True) * like.written.norm(dim=2, keepdim=True)
    tokens = writers.promoted(written, PROMOTED)
    return Pushes(written, torch.zeros_like(like.present), tokens)


@dataclass(frozen=True)
class Forced:
    """What forcing did to each of n things.

    Args:
        before: the probability of the first watched token, mean over prompts.
        probability: the same under every dose.
        lifts: for every bound, the share of prompts in which some dose up to it lifts one of the watched tokens from
            below 0.1 to above 0.5.
        lifts_any: the same of any token whatever.
    """

    before: NDArray[np.float64]
    probability: Float[np.ndarray, "n dose"]
    lifts: Float[np.ndarray, "n bound"]
    lifts_any: Float[np.ndarray, "n bound"]

    @classmethod
    def of(cls, writers: Writers, pushes: Pushes, prompts: Sequence[Int[Tensor, " pos"]]) -> Forced:
        """Under every dose, at the last position of each prompt."""
        doses = torch.tensor(DOSES, device=pushes.written.device)
        within = torch.stack([doses <= bound for bound in BOUNDS])
        before, after, lifts, lifts_any = [], [], [], []
        for prompt, present in zip(prompts, pushes.present, strict=True):
            by = doses - present[:, None]
            added = torch.einsum("nx,nbd->nxbd", by, pushes.written).flatten(0, 1)
            added = torch.cat([torch.zeros_like(added[:1]), added])[:, :, None]
            ends = ends_with(writers.model, prompt, added)
            first = log_probabilities(writers.model, ends[:1])[0].exp()
            watched = pushes.tokens.repeat_interleave(len(doses), dim=0)
            read = zip(ends[1:].split(_AT_ONCE), watched.split(_AT_ONCE), strict=True)
            p, likeliest = map(torch.cat, zip(*(_read(writers.model, *some) for some in read), strict=True))
            lifted = (p > LIFTED) & (first < BEFORE)[torch.cat([watched, likeliest], dim=1)]
            before.append(first[pushes.tokens[:, 0]])
            after.append(p[:, 0])
            lifts.append(lifted[:, :-1].any(dim=1))
            lifts_any.append(lifted[:, -1])
        own, other = (torch.stack(each).unflatten(1, (-1, len(doses))) for each in (lifts, lifts_any))
        shares = [(each[:, :, None] & within).any(dim=3).double().mean(dim=0) for each in (own, other)]
        probability = torch.stack(after).mean(dim=0).unflatten(0, (-1, len(doses)))
        found = (torch.stack(before).mean(dim=0), probability, *shares)
        return cls(*(each.double().cpu().numpy() for each in found))


def dose_frame(forced: dict[str, Forced], seed: int) -> pd.DataFrame:
    """A row a series and dose: the mean probability with its band over units."""
    frames = []
    for series, each in forced.items():
        low, high = bootstrap_band(each.probability, seed=seed)
        mean = each.probability.mean(0)
        frames.append(pd.DataFrame({"series": series, "dose": DOSES, "probability": mean, "low": low, "high": high}))
    return pd.concat(frames, ignore_index=True)


def _read(
    model: HookedModel, ends: Float[Tensor, "row d_model"], watched: Int[Tensor, "row token"]
) -> tuple[Float[Tensor, "row token_and_likeliest"], Int[Tensor, "row 1"]]:
    """Probabilities of the watched tokens and of the likeliest, and which that is: none but it can be above a half."""
    log_p = log_probabilities(model, ends)
    top = log_p.max(dim=1, keepdim=True)
    return torch.cat([log_p.gather(1, watched), top.values], dim=1).exp(), top.indices


def _present(writers: Writers, sample: Sample, prompt: Int[Tensor, " pos"]) -> Float[Tensor, " n"]:
    """The activation of each unit at the last position, as a dose."""
    cache = writers.model.run_with_cache(prompt[None], names_filter=list(writers.points), return_type=None)[1]
    found = torch.zeros_like(sample.largest)
    for block in sample.block.unique().tolist():
        own = sample.block == block
        activations = writers.activations(block, cache[writers.points[block]][0, -1:])[0]
        found[own] = activations[sample.index[own]] / sample.largest[own]
    return found
