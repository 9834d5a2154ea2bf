"""Experiment 10, Emotion Surgery: does the recipe of a feeling, added to the stream, turn what the model says?

The direction is the mean recipe of positive adjectives minus that of negative ones, written through the basis. Each
carrier prompt ("The film was") is steered against its own leaning, the pole of its most probable held-out continuation,
and has *flipped* when the most probable one is of the other pole. What that costs is measured on neutral texts, steered
at every position, as a text generated under steering is, and toward either pole in turn.

Layers differ in what they bear, so they are compared at equal cost: at each the largest strength that raises the
perplexity by at most ``max_cost``. Beside it at the same strength: ``shuffled_labels``, the same adjectives dealt to
the poles at random (the permutation test); ``random_direction``, isotropic ones; and ``untrained``, the architecture
at initialisation with the direction of its own recipes. The best layer is the best by luck too: so is each draw's of a
control, which has its own best layer. A rotation of the signals moves no written direction, so that ``rotated_basis``
would be the measurement itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from analyses.claims import bound_of
from analyses.controls.nulls import over_untrained
from analyses.experiments.emotion_surgery.carriers import (
    Carriers,
    Steered,
    SteeredTexts,
    affordable_strength,
)
from analyses.experiments.emotion_surgery.figures import emotion_figures
from analyses.experiments.emotion_surgery.frames import (
    CONTROLS,
    SteeredLayer,
    frontier_frame,
    generations_frame,
    layers_frame,
    prompts_frame,
    sweep_frame,
)
from analyses.measures.depth import chosen_layers, left_out
from analyses.measures.lens import lens_log_probabilities
from analyses.measures.sentiment import sentiment_poles
from analyses.measures.steering import random_directions
from analyses.result.finding import Finding
from analyses.result.params import run_params
from analyses.result.result import Result
from analyses.statistics.draws import derive_seed
from analyses.statistics.intervals import bootstrap_interval, rate_interval
from analyses.statistics.pvalues import permutation_pvalue
from analyses.statistics.verdicts import SIGNIFICANCE, Verdict, verdict
from analyses.words.lexicon import Lexicon, load_lexicon
from analyses.words.tokens import listed
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.signals import SignalView, ViewName, view_of
from reflowlens.sweeps.injections import Where, rms

MINIMUM_PROMPTS = 20
STRENGTHS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
RANDOM_DRAWS = 20
DEFINITIONS = {
    "best_flip_rate": "share of carriers whose most probable held-out continuation changes its pole when they are "
    "steered against it, at the layer where that is largest; at each layer the largest strength that raises the "
    "perplexity of neutral texts by at most max_cost. Controls at the same strengths, each draw at the layer that is "
    "best for it",
    "best_layer": "that layer: of the stream that block reads, the number of blocks being the end",
    "log_odds_shift": "how far steering moves the log odds of all positive against all negative held-out continuations "
    "away from the carrier's leaning, at that layer and strength, in nats; mean over carriers. Controls there too",
    "last_effective_layer": "last layer whose flip rate at that cost exceeds that of shuffled labels, Holm-adjusted "
    "p < 0.05. random_direction: the last layer whose flip rate exceeds what Holm's first step asks, -1 where none "
    "does; mean over its draws",
    "last_effective_share": "the same as a share of the depth, 0 where none does. Published: effective at layers 0 to "
    "12 of 36, inert beyond 18",
    "strength": "strength at best_layer: root mean square of what is added over that of the stream there. Controls: "
    "the largest that max_cost allows them at this layer",
    "alpha": "the same as the factor of the direction's own recipe, or of a control's as long",
    "perplexity_cost": "relative rise of the perplexity of neutral texts there, measured; controls at the same "
    "strength",
    "damage_kl": "KL(unsteered ‖ steered) of a neutral text's tokens there, in nats; controls at the same strength",
    "heldout_probability": "probability of all held-out continuations together without steering, mean over carriers: "
    "the part of the prediction that a flip is about",
}
PUBLISHED = {"last_effective_share": 12 / 36}


@torch.no_grad()
def emotion_surgery(
    model: HookedModel,
    prompts: Sequence[str] | None = None,
    *,
    view: SignalView | ViewName | None = None,
    lexicon: Lexicon | None = None,
    where: Where = "last",
    strengths: Sequence[float] = STRENGTHS,
    max_cost: float = 0.05,
    permutations: int | None = None,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    quick: bool = False,
    progress: bool = False,
) -> Result:
    """Steer carrier prompts toward the other feeling at every layer and strength, and measure what that costs.

    Args:
        prompts: carriers; default the lexicon's ``sentiment.prompts``.
        view: whose recipes make the direction; what it writes is the same through every exact view.
        where: the positions of a carrier that are steered: ``"last"``, ``"all"``, or from a token's last occurrence on.
        strengths: of the sweep, ascending, in units of the stream's root mean square.
        max_cost: relative rise of the perplexity that steering may cost.
        permutations: of the labels; default 25 a layer, so that the smallest p survives Holm's correction.
        layers: where to steer beside both ends and the half, 0 to the number of blocks (the end); default all up to 12
            blocks, of deeper models an even grid (`analyses.measures.depth.layer_grid`).
        quick: a third of the carriers and of the neutral texts; of a deep model a coarser grid.

    Returns:
        A Result with frames ``sweep`` (a row a layer and strength), ``layers`` (at equal cost, a row a layer and
        series), ``prompts`` (at equal cost, a row a layer and carrier), ``frontier`` (flip rate against cost) and
        ``generations``, and figures ``sweep``, ``layers``, ``frontier``, ``generations``.

    Raises:
        ReflowlensError: the lexicon lacks sentiment words of single tokens, two neutral texts or two carriers, a
            carrier lacks the token to steer from, there is no such layer, or the strengths or the cost are out of
            order.

    Example: ``emotion_surgery(model).frames["layers"].query("series == 'sentiment'")``
    """
    chosen = view_of(model, view, seed=seed, exact_for="emotion_surgery")
    lexicon = lexicon or load_lexicon()
    carriers = listed(lexicon.sentiment.prompts if prompts is None else prompts, "prompts")[:: 3 if quick else 1]
    strengths = [float(strength) for strength in strengths]
    neutral = lexicon.neutral_texts[:: 3 if quick else 1]
    _check(carriers, neutral, strengths, max_cost)
    measured = chosen_layers(layers, model.cfg.n_layers, quick=quick)
    words, heldout = sentiment_poles(model, lexicon, "emotion_surgery")
    steered = Carriers.of(chosen, carriers, heldout, where)
    texts = SteeredTexts(model, neutral)
    permutations = permutations or 25 * len(measured)
    own = derive_seed(seed, "emotion_surgery")
    directions = {
        "sentiment": steered.directions([words]),
        "shuffled_labels": steered.directions([words.shuffled(derive_seed(own, i)) for i in range(permutations)]),
        "random_direction": random_directions(RANDOM_DRAWS, model.cfg.d_model, own).to(chosen.basis.device),
    }
    bar = tqdm(total=2 * len(measured) + 1, desc="emotion surgery", disable=not progress)
    unit_alpha = steered.scale / rms(chosen.write(words.direction(chosen)))
    sweep = sweep_frame(steered, texts, directions["sentiment"], measured, strengths, unit_alpha, bar)
    places = []
    for layer in measured:
        rows = sweep[sweep["layer"] == layer]
        strength = affordable_strength(rows["strength"], rows["perplexity_cost"], max_cost)
        outcomes = {name: steered.steer(layer, strength, some) for name, some in directions.items()}
        damage = texts.damage(layer, strength * steered.scale[layer] * directions["sentiment"][0])
        places.append(SteeredLayer(layer, strength, float(strength * unit_alpha[layer]), outcomes, damage))
        bar.update()

    def untrained(view: SignalView) -> tuple[list[Steered], NDArray[np.float64]]:
        fresh = Carriers.of(view, carriers, heldout, where)
        direction = fresh.directions([words])
        steered_there = [fresh.steer(place.layer, place.strength, direction) for place in places]
        return steered_there, _heldout_probability(fresh)

    ((steered_fresh, at_start),) = over_untrained(untrained, chosen, seed, "emotion_surgery", quick=quick).values()
    for place, outcome in zip(places, steered_fresh, strict=True):
        place.outcomes["untrained"] = outcome
    at_layers = layers_frame(places, seed)
    best = places[int(at_layers.query("series == 'sentiment'")["flip_rate"].to_numpy().argmax())]
    frames = {
        "sweep": sweep,
        "layers": at_layers,
        "prompts": pd.concat([prompts_frame(model, carriers, place) for place in places], ignore_index=True),
        "frontier": frontier_frame(steered, texts, directions, best, sweep),
        "generations": generations_frame(steered, carriers, directions["sentiment"][0], best, where, seed),
    }
    bar.update()
    bar.close()
    probability, beside = _heldout_probability(steered), {"untrained": float(at_start.mean())}
    at_best, flips = _at_best(places, best, frames, max_cost, seed)
    flips_any = at_best["best_flip_rate"].verdict == "supported"
    effective, last = _last_effective(places, model.cfg.n_layers, at_layers, flips_any, seed)
    return Result(
        name="emotion_surgery",
        title="Emotion Surgery",
        params={
            "carriers": len(carriers),
            "where": where,
            "strengths": list(strengths),
            "max_cost": max_cost,
            "permutations": permutations,
            "layers": None if layers is None else measured,
            **run_params(chosen, lexicon, seed, quick),
        },
        findings={
            "heldout_probability": Finding(probability.mean(), bootstrap_interval(probability, seed=seed), beside),
            **at_best,
            **effective,
        },
        frames=frames,
        figures=emotion_figures(frames),
        definitions=DEFINITIONS,
        published=PUBLISHED,
        notes=[
            f"The direction is made of {len(words.ids)} adjectives and judged by {len(heldout.ids)} other words; "
            f"{int((heldout.leaning(steered.before) > 0).sum())} of {len(carriers)} carriers lean to the positive pole",
            flips,
            last,
            *left_out(measured, model.cfg.n_layers),
        ],
    )


def flip_verdict(interval: tuple[float, float], controls: dict[str, float], p: float, units: int) -> Verdict:
    """Claim: the recipe of a feeling turns continuations at little cost.

    Supported if the interval of best_flip_rate over carriers lies above both shuffled_labels and random_direction by
    0.05 and its permutation p against the best flip rate of each shuffle is below 0.05; underpowered with fewer than 20
    carriers. The untrained model has no part in it: its words are so nearly alike that the least push turns some,
    whichever way (its log_odds_shift is the better comparison).
    """
    bound = bound_of("emotion_surgery", "best_flip_rate", controls)
    return verdict(interval, bound, p, minimum_units=MINIMUM_PROMPTS, units=units)


def boundary_verdict(interval: tuple[float, float], fall: tuple[float, float], units: int) -> Verdict:
    """Claim: steering comes too late in the second half of the model (published: inert beyond layer 18 of 36).

    Supported if the interval of last_effective_share lies at or below 0.5 and, since an effect that was not found is
    not one that is absent, the flip rate of the best layer of the second half lies below that of the best of all: the
    interval of their difference over carriers (``fall``) is above 0. Underpowered with fewer than 20 carriers, or if
    one of the two intervals does not decide. Only asked where best_flip_rate is supported: what turns nothing anywhere
    does not come too late.
    """
    low, high = interval
    if units < MINIMUM_PROMPTS or low <= 0.5 < high:
        return "underpowered"
    if low > 0.5:
        return "not supported"
    return "supported" if fall[0] > 0 else "underpowered"


def _check(carriers: list[str], neutral: Sequence[str], strengths: Sequence[float], max_cost: float) -> None:
    if len(carriers) < 2:
        raise ReflowlensError(f"emotion_surgery needs at least two carrier prompts, got {len(carriers)}")
    if len(neutral) < 2:
        raise ReflowlensError(
            "emotion_surgery needs two neutral_texts in the lexicon at least: damage is measured there"
        )
    if not strengths or min(strengths) <= 0 or list(strengths) != sorted(set(strengths)):
        raise ReflowlensError(f"strengths must be positive and ascend, got {list(strengths)}")
    if max_cost <= 0:
        raise ReflowlensError(f"max_cost must be positive, got {max_cost}")


def _heldout_probability(steered: Carriers) -> NDArray[np.float64]:
    """Probability of all held-out continuations together after each carrier, unsteered."""
    end = steered.runs.unsteered(steered.runs.layers[-1])
    held_out = lens_log_probabilities(steered.view, end)[:, steered.poles.ids].exp()
    return held_out.sum(dim=1).double().cpu().numpy()


def _at_best(
    places: Sequence[SteeredLayer], best: SteeredLayer, frames: Mapping[str, pd.DataFrame], max_cost: float, seed: int
) -> tuple[dict[str, Finding], str]:
    """What steering does at the best layer and what it costs there, beside the same of the controls; and a note."""
    flipped, shift = best.outcomes["sentiment"].flipped[0], best.outcomes["sentiment"].shift[0]
    units, rate, interval = len(flipped), float(flipped.mean()), rate_interval(flipped)
    bests = {name: _best_flip_rates(places, name) for name in CONTROLS}
    rates = {name: float(each.mean()) for name, each in bests.items()}
    p = permutation_pvalue(rate, bests["shuffled_labels"])
    layers = frames["layers"]
    shifts = layers[layers["layer"] == best.layer].set_index("series")["log_odds_shift"]
    kl = best.damage.kl
    beside = _controls_cost(frames["frontier"], best, max_cost)
    findings = {
        "best_flip_rate": Finding(rate, interval, rates, flip_verdict(interval, rates, p, units)),
        "log_odds_shift": Finding(
            shift.mean(), bootstrap_interval(shift, seed=seed), {name: shifts[name] for name in CONTROLS}
        ),
        "best_layer": Finding(best.layer),
        "strength": Finding(best.strength, controls=beside["strength"]),
        "alpha": Finding(best.alpha, controls=beside["alpha"]),
        "perplexity_cost": Finding(best.damage.cost, controls=beside["perplexity_cost"]),
        "damage_kl": Finding(float(kl.mean()), bootstrap_interval(kl.cpu().numpy(), seed=seed), beside["damage_kl"]),
    }
    return findings, (
        f"best_flip_rate at layer {best.layer}: permutation p = {p:.2g} against the best layer of each shuffle; "
        f"{units} carriers. The layer is chosen on the same carriers, and its interval takes it as given"
    )


def _controls_cost(frontier: pd.DataFrame, best: SteeredLayer, max_cost: float) -> dict[str, dict[str, float]]:
    """Metric -> control -> what it costs at the strength of the best layer, and what strength it can afford there."""
    costs = {}
    for name, rows in frontier[frontier["series"].isin(CONTROLS)].groupby("series", sort=False):
        same = rows[rows["strength"] == best.strength].iloc[0]
        strength = affordable_strength(rows["strength"], rows["perplexity_cost"], max_cost)
        costs[str(name)] = {
            "perplexity_cost": float(same["perplexity_cost"]),
            "damage_kl": float(same["kl"]),
            "strength": float(strength),
            "alpha": float(strength * (best.alpha / best.strength)),
        }
    metrics = ("perplexity_cost", "damage_kl", "strength", "alpha")
    return {metric: {name: cost[metric] for name, cost in costs.items()} for metric in metrics}


def _best_flip_rates(places: Sequence[SteeredLayer], series: str) -> NDArray[np.float64]:
    """The flip rate of each draw of a series at the layer that is best for it, chosen as the metric's own is."""
    return np.max([place.outcomes[series].flipped.mean(axis=1) for place in places], axis=0)


def _last_effective(
    places: Sequence[SteeredLayer], depth: int, layers: pd.DataFrame, flips: bool, seed: int
) -> tuple[dict[str, Finding], str]:
    """The last layer with an effect, and a note; its interval resamples carriers against a fixed threshold, the null's
    quantile that Bonferroni's correction asks of every layer. ``flips``: whether best_flip_rate is supported."""
    sentiment = layers.query("series == 'sentiment'")
    effective = sentiment.loc[sentiment["p_holm"] < SIGNIFICANCE, "layer"]
    if effective.empty:
        return {}, "last_effective_layer is absent: no layer's flip rate exceeds that of shuffled labels"
    flipped = np.stack([place.outcomes["sentiment"].flipped[0] for place in places], axis=1)
    nulls = np.stack([place.outcomes["shuffled_labels"].flipped.mean(axis=1) for place in places])
    threshold = np.quantile(nulls, 1 - SIGNIFICANCE / len(places), axis=1)

    measured = np.array([place.layer for place in places])

    def last_above(rates: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.where(rates > threshold, measured, -1).max(axis=-1).astype(float)

    def last(carriers: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
        return last_above(flipped[np.moveaxis(carriers, axis, -1).astype(int)].mean(axis=-2))

    random = last_above(np.stack([place.outcomes["random_direction"].flipped.mean(axis=1) for place in places], axis=1))
    units = len(flipped)
    interval = bootstrap_interval(np.arange(units), last, seed=seed)
    low, high = (max(0.0, end) / depth for end in interval)
    rates = flipped.mean(axis=0)
    best, late = int(rates.argmax()), int(np.where(measured > depth / 2, rates, -1).argmax())
    fall = bootstrap_interval(flipped[:, best] - flipped[:, late], seed=seed)
    findings = {
        "last_effective_layer": Finding(effective.max(), interval, {"random_direction": random.mean()}),
        "last_effective_share": Finding(
            effective.max() / depth,
            (low, high),
            {"random_direction": random.clip(min=0).mean() / depth},
            boundary_verdict((low, high), fall, units) if flips else None,
        ),
    }
    if not flips:
        return findings, "last_effective_share has no verdict: that steering turns anything is not supported"
    return findings, (
        f"last_effective_share: from layer {measured[best]}, the best, to layer {measured[late]}, the best of the "
        f"second half, the flip rate falls by {rates[best] - rates[late]:.3f} ({fall[0]:.3f} to {fall[1]:.3f})"
    )
