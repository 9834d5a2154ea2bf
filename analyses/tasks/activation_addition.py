"""Activation addition: steering by the difference of means of two sets of texts.

After Turner et al. (2023) and Rimsky et al. (2024). The steering vector of a layer is the mean stream at the last
tokens of the positive texts less that of the negative ones. α times the vector is added to the stream of prompts that
are about something else, and what comes next is read. Layer and strength are chosen on one half of these prompts,
among those whose cost on neutral texts is affordable, and judged on the other half: the best of many, judged where it
was chosen, is always good.

Two controls at the chosen layer and strength, of the same length as the vector: ``random_direction``, and
``shuffled_labels``, the difference of means of the same texts when it is drawn by lot which of them are positive. The
second has what any difference of such texts has, and not what they were chosen for. Few texts can be labelled in few
ways: each counts once, and where these are so few that no p could be below 0.05, nothing can be told.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from analyses.claims import bound_of
from analyses.measures.damage import Damage, NeutralTexts
from analyses.measures.lens import residual_stack
from analyses.result.finding import Finding
from analyses.result.result import Result
from analyses.statistics.draws import derive_generator, derive_rng
from analyses.statistics.intervals import bootstrap_interval
from analyses.statistics.pvalues import permutation_pvalue
from analyses.statistics.verdicts import SIGNIFICANCE, verdict
from analyses.tasks.answered import (
    DEFINITIONS,
    MINIMUM_PROMPTS,
    Answered,
    halves,
    layers_given,
    numbers,
    one_or_several,
    performance_findings,
    priced,
    shown,
    some_prompts,
    task_params,
)
from analyses.tasks.by_group import group_figures, group_frames
from analyses.words.lexicon import load_lexicon
from reflowlens.arguments import number_of_runs, real_number
from reflowlens.errors import ReflowlensError
from reflowlens.figures.builders import bars
from reflowlens.figures.heatmap import heatmap
from reflowlens.interventions.apply import intervene
from reflowlens.models.base import HookedModel
from reflowlens.models.unwrapping import hooked_model
from reflowlens.progress import bar
from reflowlens.prompts import Prompts
from reflowlens.sweeps.injections import Injections, Where, rms, steer

STRENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0)
_COSTED = 5  # draws of a control whose cost is measured
OWN_DEFINITIONS = {
    "effect": "how much the vector raises logit_diff on the half of the prompts that layer and strength were not "
    "chosen on; mean over these. Controls: as long a vector in a random direction, and of shuffled labels; means over "
    "draws",
    "loss_rise": "rise of the mean loss of neutral texts' tokens, in nats, steered alike at every position",
    "kl": "KL(unsteered ‖ steered) a token of neutral texts, in nats",
    "layer": "where the vector is added, chosen on the other half: the stream that this layer reads",
    "strength": "how many times the difference of means is added",
    "relative_strength": "root mean square of what is added over that of the stream at the prompts' last tokens",
}


@torch.no_grad()
def activation_addition(
    model: HookedModel,
    positive: Iterable[str],
    negative: Iterable[str],
    prompts: Prompts,
    *,
    layers: int | Sequence[int] | None = None,
    strengths: float | Sequence[float] = STRENGTHS,
    where: Where = "all",
    max_loss_rise: float = 0.1,
    neutral: Sequence[str] | None = None,
    draws: int = 40,
    seed: int = 0,
    quick: bool = False,
    progress: bool | None = None,
) -> Result:
    """Steer with a contrast set: effect on held-out prompts, against controls, beside its cost on neutral texts.

    Args:
        model: a hooked model whose passes can start at any block.
        positive, negative: the contrast set, two texts or more each, read at their last tokens.
        prompts: to steer, with ``answer``, the token that the positive texts should make likelier, and
            ``wrong_answer`` that it is held against.
        layers: where to add the vector (0 to ``n_layers``, the end); default every layer, or 12 at equal distances.
        strengths: multiples of the vector that are tried.
        where: positions of the prompts that it is added to: ``"all"``, ``"last"``, or from the last occurrence of a
            token on.
        max_loss_rise: a layer and strength that raise the loss of neutral texts by more nats are not chosen.
        neutral: texts for the cost; default the lexicon's.
        draws: of each control; fewer of ``shuffled_labels`` where the texts cannot be labelled in as many other ways.
        quick: a third of the prompts and half of the draws.

    Returns:
        A Result with frames ``grid`` (a row a layer and strength: ``effect`` on the half that chooses, ``loss_rise``,
        ``kl``), ``prompts`` (a row a held-out prompt) and ``draws`` (a row a draw of a control: its mean effect), and
        figures ``grid`` and ``controls``. The metrics begin with ``accuracy`` and ``logit_diff``, unsteered.

    Raises:
        ReflowlensError: too few texts or prompts, there is no such layer, or the model's passes start from tokens
            alone.

    Example: ``activation_addition(model, happy, sad, prompts).metrics["effect"]``
    """
    hooked = hooked_model(model)
    positives, negatives = _several(positive, "positive"), _several(negative, "negative")
    texts = positives + negatives
    labels = np.arange(len(texts)) < len(positives)
    chosen = some_prompts(prompts, quick, seed)
    answered = Answered.of(hooked, chosen, least=4)
    at_layers = layers_given(hooked, layers, ends=True)
    factors = _factors(strengths)
    draws = max(20, number_of_runs(draws, "draws", 2) // (2 if quick else 1))
    choosing, judging = halves(answered, seed)
    found_on, held_out = (Steered.of(half, where) for half in (choosing, judging))
    streams = residual_stack(hooked, texts)[::2]  # before each block, and the last
    vectors = {layer: _difference(streams[layer], labels) for layer in at_layers}
    costs = NeutralTexts(hooked, list(neutral) if neutral is not None else load_lexicon().neutral_texts)
    per_layer = len(factors) * (len(choosing) + len(costs.texts))
    shuffled = _other_labels(labels, draws, seed)
    passes = (
        len(at_layers) * per_layer + (draws + len(shuffled) + 1) * len(judging) + (2 * _COSTED + 1) * len(costs.texts)
    )
    rows = []
    steps = bar(at_layers, show=shown(progress), unit="layer", desc=priced("activation addition", passes))
    for layer in steps:
        effects = found_on.effects(layer, torch.stack([factor * vectors[layer] for factor in factors])).mean(dim=1)
        for factor, effect in zip(factors, numbers(effects), strict=True):
            damage = _damage(costs, layer, factor * vectors[layer])
            rows.append((layer, factor, effect, float(damage.loss.mean()), float(damage.kl.mean())))
    grid = pd.DataFrame(rows, columns=["layer", "strength", "effect", "loss_rise", "kl"])
    affordable = grid[grid["loss_rise"] <= real_number(max_loss_rise, "max_loss_rise")]
    best = (affordable.nlargest(1, "effect") if len(affordable) else grid.nsmallest(1, "loss_rise")).iloc[0]
    layer, strength = int(best["layer"]), float(best["strength"])
    grid["chosen"] = (grid["layer"] == layer) & (grid["strength"] == strength)
    vector = strength * vectors[layer]
    series = {
        "random_direction": _random(vector, draws, seed),
        "shuffled_labels": _of_labels(streams[layer], shuffled, vector),
    }
    own = numbers(held_out.effects(layer, vector[None])[0])
    controls = {name: numbers(held_out.effects(layer, several)) for name, several in series.items()}
    damage = _damage(costs, layer, vector)
    beside = {name: [_damage(costs, layer, one) for one in several[:_COSTED]] for name, several in series.items()}
    findings = performance_findings(answered.unchanged(), seed)
    findings |= _findings(own, controls, damage, beside, seed)
    added, stream = rms(vector), held_out.runs.rms()[layer].mean()
    findings |= {
        "layer": Finding(layer),
        "strength": Finding(strength),
        "relative_strength": Finding(float(added / stream)),
    }
    notes = [f"layer {layer} and strength {strength:g} are chosen on {len(choosing)} prompts, judged on {len(judging)}"]
    if len(shuffled) < draws:
        notes.append(f"the texts can be labelled in {len(shuffled)} other ways, all of which are the control")
    if not len(affordable):
        notes.append(f"no layer and strength costs less than {max_loss_rise:g} nats: the cheapest is taken")
    frames = {
        "grid": grid,
        "prompts": _prompt_frame(chosen, judging, own, controls),
        "draws": pd.concat(
            [pd.DataFrame({"series": name, "effect": each.mean(axis=1)}) for name, each in controls.items()],
            ignore_index=True,
        ),
        **group_frames(
            chosen,
            {"effect": own, **{name: each.mean(axis=0) for name, each in controls.items()}},
            seed,
            rows=judging.rows,
        ),
    }
    return Result(
        name="activation_addition",
        title="Activation Addition",
        params=task_params(
            hooked,
            chosen,
            seed,
            quick,
            positive=int(labels.sum()),
            negative=int((~labels).sum()),
            layers=at_layers,
            strengths=factors,
            where=where,
            max_loss_rise=max_loss_rise,
            draws=draws,
            passes=passes,
        ),
        findings=findings,
        frames=frames,
        figures=_figures(frames, findings["effect"]) | group_figures(frames, "Effect of the vector"),
        definitions=DEFINITIONS | OWN_DEFINITIONS,
        notes=notes,
    )


class Steered(NamedTuple):
    """Prompts that are steered, read once, and their logit differences unsteered."""

    answered: Answered
    runs: Injections
    before: Float[Tensor, " prompt"]

    @classmethod
    def of(cls, answered: Answered, where: Where) -> Steered:
        runs = Injections(answered.model, answered.texts, where)
        return cls(answered, runs, answered.scores(runs.unsteered(runs.layers[-1])).logit_diff)

    def effects(self, layer: int, vectors: Float[Tensor, "vector d_model"]) -> Float[Tensor, "vector prompt"]:
        """How much each vector, added at a layer, raises each prompt's logit difference."""
        n = len(self.answered)
        prompt = self.answered.each.repeat(len(vectors))
        end = self.runs.final(layer, prompt, vectors.repeat_interleave(n, dim=0))
        return (self.answered.scores(end, prompt).logit_diff - self.before[prompt]).unflatten(0, (-1, n))


def _difference(streams: Float[Tensor, "text d_model"], labels: NDArray[np.bool_]) -> Float[Tensor, " d_model"]:
    positive = torch.from_numpy(labels).to(streams.device)
    return streams[positive].mean(dim=0) - streams[~positive].mean(dim=0)


def _random(vector: Float[Tensor, " d_model"], draws: int, seed: int) -> Float[Tensor, "draw d_model"]:
    generator = derive_generator(seed, "activation_addition", "random_direction")
    drawn = torch.randn(draws, len(vector), generator=generator).to(vector)
    return F.normalize(drawn, dim=-1) * vector.norm()


def _other_labels(labels: NDArray[np.bool_], draws: int, seed: int) -> Bool[np.ndarray, "draw text"]:
    """Labels in other orders, each once, neither the right one nor its opposite: all, or as many as draws."""
    n, n_positive = len(labels), int(labels.sum())
    left_out = {labels.tobytes(), (~labels).tobytes()}
    if math.comb(n, n_positive) <= draws + 2:
        every = np.array([np.isin(np.arange(n), chosen) for chosen in combinations(range(n), n_positive)])
        return np.stack([each for each in every if each.tobytes() not in left_out])[:draws]
    rng = derive_rng(seed, "activation_addition", "shuffled_labels")
    found: list[NDArray[np.bool_]] = []
    while len(found) < draws:
        drawn = rng.permutation(labels)
        if drawn.tobytes() not in left_out:
            left_out.add(drawn.tobytes())
            found.append(drawn)
    return np.stack(found)


def _of_labels(
    streams: Float[Tensor, "text d_model"], labels: Bool[np.ndarray, "draw text"], vector: Float[Tensor, " d_model"]
) -> Float[Tensor, "draw d_model"]:
    """The difference of means under each labels, as long as the vector."""
    return F.normalize(torch.stack([_difference(streams, each) for each in labels]), dim=-1) * vector.norm()


def _damage(costs: NeutralTexts, layer: int, vector: Float[Tensor, " d_model"]) -> Damage:
    with intervene(costs.model, steer(costs.model, layer, vector, 1.0)):
        return costs.damage()


def _findings(
    own: NDArray[np.float64],
    controls: dict[str, NDArray[np.float64]],
    damage: Damage,
    beside: dict[str, list[Damage]],
    seed: int,
) -> dict[str, Finding]:
    means = {name: float(each.mean()) for name, each in controls.items()}
    interval = bootstrap_interval(own, seed=seed)
    p = max(permutation_pvalue(own.mean(), each.mean(axis=1)) for each in controls.values())
    bound = bound_of("activation_addition", "effect", means)
    judged = verdict(interval, bound, p, minimum_units=MINIMUM_PROMPTS, units=len(own))
    if any(1 / (1 + len(each)) >= SIGNIFICANCE for each in controls.values()):  # whatever is measured
        judged = "underpowered"
    findings = {"effect": Finding(own.mean(), interval, means, judged)}
    for metric, field in (("loss_rise", "loss"), ("kl", "kl")):
        values = numbers(getattr(damage, field))
        of_controls = {
            name: float(np.mean([float(getattr(each, field).mean()) for each in several]))
            for name, several in beside.items()
        }
        ends = bootstrap_interval(values, seed=seed) if len(values) > 1 else None
        findings[metric] = Finding(values.mean(), ends, of_controls)
    return findings


def _prompt_frame(
    prompts: Prompts, judging: Answered, own: NDArray[np.float64], controls: dict[str, NDArray[np.float64]]
) -> pd.DataFrame:
    means = {name: each.mean(axis=0) for name, each in controls.items()}
    return pd.DataFrame({"prompt": list(judging.rows), "text": judging.texts, "effect": own, **means})


def _factors(strengths: Any) -> list[float]:
    found = [real_number(strength, "strengths") for strength in one_or_several(strengths)]
    if not found:
        raise ReflowlensError("strengths must be a number or several, got none")
    return found


def _several(texts: Iterable[str], name: str) -> list[str]:
    found = one_or_several(texts)
    if len(found) < 2 or not all(isinstance(text, str) and text for text in found):
        raise ReflowlensError(f"{name} must be two texts or more, got {texts!r}")
    return found


def _figures(frames: dict[str, pd.DataFrame], effect: Finding) -> dict[str, Any]:
    assert effect.interval is not None
    ends = frames["draws"].groupby("series", sort=False)["effect"]
    rows = [("vector", effect.value, *effect.interval)]
    rows += [(name, each.mean(), *each.quantile([0.025, 0.975])) for name, each in ends]
    return {
        "grid": heatmap(
            frames["grid"],
            "strength",
            "layer",
            "effect",
            hover=["loss_rise", "kl", "chosen"],
            title="Effect on the prompts that choose",
            z_title="logits",
        ),
        "controls": bars(
            pd.DataFrame(rows, columns=["series", "effect", "low", "high"]).assign(kind=lambda f: f["series"]),
            "series",
            "effect",
            "low",
            "high",
            color="kind",
            controls=("random_direction", "shuffled_labels"),
            title="Effect on held-out prompts",
            y_title="rise of the logit difference",
        ),
    }
