"""The tables of `analyses.emotion_surgery`: what steering does at every layer and strength, and at equal cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from analyses.experiments.emotion_surgery.carriers import Carriers, Steered, SteeredTexts
from analyses.measures.damage import Damage
from analyses.measures.sentiment import text_valence
from analyses.statistics.intervals import rate_band
from analyses.statistics.pvalues import holm, permutation_pvalue
from reflowlens.interventions.apply import intervene
from reflowlens.models.base import HookedModel
from reflowlens.sweeps.injections import Where, steer

CONTROLS = ("shuffled_labels", "random_direction", "untrained")
FRONTIER_DRAWS = 2
NEW_TOKENS = 20


@dataclass(frozen=True)
class SteeredLayer:
    """A layer at equal cost: the strength that can be afforded there and what it does, by direction."""

    layer: int
    strength: float
    alpha: float
    outcomes: dict[str, Steered]
    damage: Damage


def sweep_frame(
    steered: Carriers,
    texts: SteeredTexts,
    direction: Float[Tensor, "1 d_model"],
    layers: Sequence[int],
    strengths: Sequence[float],
    unit_alpha: Float[Tensor, " layer"],
    bar: tqdm[Any],
) -> pd.DataFrame:
    rows = []
    for layer in layers:
        for strength in strengths:
            outcome = steered.steer(layer, strength, direction)
            damage = texts.damage(layer, strength * steered.scale[layer] * direction[0])
            rows.append(
                {
                    "layer": layer,
                    "strength": strength,
                    "alpha": float(strength * unit_alpha[layer]),
                    "flip_rate": outcome.flipped.mean(),
                    "log_odds_shift": outcome.shift.mean(),
                    "perplexity_cost": damage.cost,
                    "kl": float(damage.kl.mean()),
                }
            )
        bar.update()
    return pd.DataFrame(rows)


def layers_frame(places: Sequence[SteeredLayer], seed: int) -> pd.DataFrame:
    """A row a series and layer: of sentiment and untrained the interval over carriers, of the other controls
    the range of the middle 95% of their draws."""
    frames = []
    for name in ("sentiment", *CONTROLS):
        flipped = np.stack([place.outcomes[name].flipped for place in places])  # layer, draw, carrier
        if flipped.shape[1] == 1:
            low, high = rate_band(flipped[:, 0].T, seed=seed)
        else:
            low, high = np.quantile(flipped.mean(axis=2), [0.025, 0.975], axis=1)
        frames.append(
            pd.DataFrame(
                {
                    "series": name,
                    "layer": [place.layer for place in places],
                    "strength": [place.strength for place in places],
                    "alpha": [place.alpha if name == "sentiment" else np.nan for place in places],
                    "flip_rate": flipped.mean(axis=(1, 2)),
                    "low": low,
                    "high": high,
                    "log_odds_shift": [place.outcomes[name].shift.mean() for place in places],
                }
            )
        )
    frame = pd.concat(frames, ignore_index=True)
    p = [_pvalue(place) for place in places] + [np.nan] * (len(frame) - len(places))
    adjusted = [*holm(p[: len(places)]), *p[len(places) :]]
    cost = [place.damage.cost for place in places] + [np.nan] * (len(frame) - len(places))
    return frame.assign(p=p, p_holm=adjusted, perplexity_cost=cost)


def _pvalue(place: SteeredLayer) -> float:
    """That the labels do not matter for the flip rate at this layer."""
    null = place.outcomes["shuffled_labels"].flipped.mean(axis=1)
    return permutation_pvalue(float(place.outcomes["sentiment"].flipped.mean()), null)


def prompts_frame(model: HookedModel, carriers: list[str], place: SteeredLayer) -> pd.DataFrame:
    """Each carrier at one layer: its most probable held-out continuation before and after."""
    outcome = place.outcomes["sentiment"]
    ids = outcome.poles.ids
    before, after = (
        model.tokenizer.to_str_tokens([ids[i] for i in logits.argmax(dim=-1).tolist()])
        for logits in (outcome.before, outcome.after[0])
    )
    return pd.DataFrame(
        {
            "layer": place.layer,
            "prompt": carriers,
            "before": before,
            "after": after,
            "flipped": outcome.flipped[0] > 0,
            "log_odds_shift": outcome.shift[0],
        }
    )


def frontier_frame(
    steered: Carriers,
    texts: SteeredTexts,
    directions: dict[str, Float[Tensor, "_direction d_model"]],
    best: SteeredLayer,
    sweep: pd.DataFrame,
) -> pd.DataFrame:
    """Flip rate against cost: of the first, the middle, the best and the last layer, and of a few directions of each
    control at the best one."""
    layers, strengths = (sweep[name].unique().tolist() for name in ("layer", "strength"))
    told = sorted({layers[0], layers[len(layers) // 2], best.layer, layers[-1]})
    columns = ["series", "layer", "strength", "flip_rate", "log_odds_shift", "perplexity_cost", "kl"]
    frames = [sweep[sweep["layer"] == layer].assign(series=f"layer {layer}")[columns] for layer in told]
    for name in ("shuffled_labels", "random_direction"):
        some = directions[name][:FRONTIER_DRAWS]
        for strength in sorted({*strengths, best.strength}):
            outcome = steered.steer(best.layer, strength, some)
            changes = strength * steered.scale[best.layer] * some
            damage = [texts.damage(best.layer, change) for change in changes]
            cost, kl = np.mean([[each.cost, float(each.kl.mean())] for each in damage], axis=0)
            values = [name, best.layer, strength, outcome.flipped.mean(), outcome.shift.mean(), cost, kl]
            frames.append(pd.DataFrame([values], columns=columns))
    return pd.concat(frames, ignore_index=True)


def generations_frame(
    steered: Carriers,
    carriers: list[str],
    direction: Float[Tensor, " d_model"],
    best: SteeredLayer,
    where: Where,
    seed: int,
    examples: int = 3,
) -> pd.DataFrame:
    """A few carriers continued from the same seeds: as they are, and steered toward either pole at the best layer, at
    the strength that can be afforded and at three times that."""
    model, runs = steered.view.model, steered.runs
    alike = [i for i in range(len(carriers)) if runs.last[i] == runs.last[0] and runs.start[i] == runs.start[0]]
    prompts = [carriers[i] for i in alike[:examples]]
    length = int(runs.last[0]) + 1
    room = min(NEW_TOKENS, model.cfg.n_ctx - length)
    rows = []
    for pole, sign, factor in (
        ("none", 0, 0),
        ("negative", -1, 1),
        ("positive", 1, 1),
        ("negative", -1, 3),
        ("positive", 1, 3),
    ):
        size = sign * factor * best.strength * float(steered.scale[best.layer])
        position = None if where == "all" else slice(int(runs.start[0]), None)
        with intervene(model, steer(model, best.layer, direction, size, position)):
            texts = model.generate(prompts, room, temperature=0.7, seed=seed, progress=False)
        for prompt, text in zip(prompts, texts, strict=True):
            continuation = text[len(prompt) :]
            rows.append(
                {
                    "prompt": prompt,
                    "toward": pole,
                    "strength": factor * best.strength,
                    "text": continuation,
                    "valence": text_valence(continuation),
                }
            )
    return pd.DataFrame(rows).sort_values("prompt", kind="stable", ignore_index=True)
