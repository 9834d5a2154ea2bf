"""What experiment 13 finds: its metrics with their definitions, and the rules of its verdicts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analyses.claims import bound_of
from analyses.experiments.circuit_tracing.forcing import BEFORE, BOUNDS, DOSES, LIFTED, Forced
from analyses.experiments.circuit_tracing.tracing import PROMOTED, STRONGEST
from analyses.result.finding import Finding
from analyses.statistics.intervals import bootstrap_interval, rate_interval
from analyses.statistics.pvalues import holm, paired_permutation_pvalue
from analyses.statistics.verdicts import Verdict, verdict

MINIMUM_UNITS = 20
_OF_PROMPTS = {  # metric: how columns of the prompts' frame begin, and what its own ends with
    "removal_effect": ("removal_", "influence"),
    "promoting_share": ("promoting_", "influence"),
    "strongest_path_share": ("strongest_", "model"),
    "multi_hop_share": ("multi_hop_", "model"),
    "replacement": ("replacement_", "model"),
    "completeness": ("completeness_", "model"),
    "validation_target": ("validation_target_", "model"),
    "validation_units": ("validation_units_", "model"),
}
DEFINITIONS = {
    "removal_effect": "by how many nats the likeliest token's log probability changes, up or down, when one of the "
    f"{STRONGEST} units of most influence on it is removed from the model where it is active; mean over units, then "
    "over prompts. matched_unit: for each another active unit of its block that writes about as much; size: those that "
    "write the most; random_unit: as many at random",
    "promoting_share": "share of these units that have the likeliest token among the "
    f"{PROMOTED} that they promote most on the direct path; mean over prompts",
    "strongest_path_share": "share of all influence on the likeliest token that goes along the "
    f"{STRONGEST} strongest paths of two edges or more, each through a unit at least; mean over prompts. "
    "shuffled_weights: in the same graph with the weights of each row permuted; neurons, untrained: of the graphs of "
    "neurons, and of the untrained model's",
    "multi_hop_share": "share of all influence that goes along paths through two units or more, errors among what "
    "paths begin at; mean over prompts",
    "replacement": "replacement score, I_inputs / (I_inputs + I_errors), of graphs of the likeliest tokens; mean over "
    "prompts. neurons: of as many neurons as the dictionary has active features; random_features: of features of the "
    "same norms and activations that point elsewhere; no_features: all that MLPs write is error. Without a dictionary "
    "of graphs of the likeliest token, beside the untrained model's",
    "completeness": "completeness score of the same graphs: the share of what goes into nodes that is no error, nodes "
    "weighted by their influence",
    "validation_target": "Pearson correlation of what a graph predicts of its likeliest token's logit with what the "
    "model does, when 16 units of most influence are removed and doubled, one at a time; mean over prompts. "
    "matched_unit: with what it does when units that are not active there are given as much to write",
    "validation_units": "the same of the pre-activations of units behind",
    "forced_probability": "probability of the token that a unit promotes most, the unit at the last position set to "
    "the largest activation that it has in the texts; mean over units drawn at random, of the mean over prompts. "
    "unforced: as it is; matched_unit: of the same token when another unit of the block writes as much; "
    "random_direction: of a Gaussian direction as large and the token that it promotes most",
    "best_forced_probability": "the largest that any of these units reaches at any dose up to 100 times its largest "
    "activation, mean over prompts. Published: one feature of a model of two layers, at a dose of 100 in no stated "
    "unit (another reached 0.72 at 200)",
    **{
        f"lifting_share_{bound}": f"share of units that lift one of the {PROMOTED} tokens that they promote most from "
        f"below {BEFORE} to above {LIFTED} at some dose up to {bound} times their largest activation; over prompts"
        for bound in BOUNDS
    },
    "lifting_share_any": "the same of any token whatever, at some dose up to 100 times the largest activation",
}
PUBLISHED = {"best_forced_probability": 0.97}


def findings_of(prompts: pd.DataFrame, forced: Mapping[str, Forced], seed: int) -> tuple[dict[str, Finding], list[str]]:
    """The metrics, and notes of what is absent, has no control, and of the tests of `lifting_share`.

    `prompts`: a row a prompt. `forced`: units that were forced, and their controls.
    """
    findings, notes = {}, []
    for metric, (prefix, own_name) in _OF_PROMPTS.items():
        found = _over_prompts(prompts, prefix, own_name, seed)
        if found is None:
            notes.append(f"{metric} is absent: it could be measured on fewer than 2 prompts")
        else:
            findings[metric] = found
            if not found.controls:
                notes.append(f"{metric}: without a control, for on some prompts there is none")
    if "random_features" in findings["replacement"].controls:
        findings["replacement"] = _judged_scores(prompts, findings["replacement"], seed)
    own = forced["unit"]
    at_one = DOSES.index(1.0)
    controls = {name: each for name, each in forced.items() if name != "unit"}
    findings["forced_probability"] = Finding(
        float(own.probability[:, at_one].mean()),
        bootstrap_interval(own.probability[:, at_one], seed=seed),
        {"unforced": float(own.before.mean())}
        | {name: float(each.probability[:, at_one].mean()) for name, each in controls.items()},
    )
    findings["best_forced_probability"] = Finding(
        float(own.probability.max()), controls={name: float(each.probability.max()) for name, each in controls.items()}
    )
    lifts = [{name: each.lifts[:, i] for name, each in forced.items()} for i in range(len(BOUNDS))]
    pvalues = [paired_permutation_pvalue(each["unit"] - each["random_direction"], seed=seed) for each in lifts]
    for bound, each, p, adjusted in zip(BOUNDS, lifts, pvalues, holm(pvalues), strict=True):
        metric, found = f"lifting_share_{bound}", _share(each, seed)
        control = found.controls["random_direction"]
        judged = lifting_verdict(found.interval or (0.0, 1.0), control, float(adjusted), len(each["unit"]))
        findings[metric] = replace(found, verdict=judged)
        notes.append(f"{metric}: against random directions sign-flip p = {p:.2g}, Holm-adjusted {adjusted:.2g}")
    findings["lifting_share_any"] = _share({name: each.lifts_any[:, -1] for name, each in forced.items()}, seed)
    return findings, notes


def lifting_verdict(interval: tuple[float, float], random_direction: float, p: float, units: int) -> Verdict:
    """Claim: features are such that one alone, forced, makes the model say a token of its own (published: two features,
    at doses of 100 and 200), that is, more of them do than of Gaussian directions that write as strongly.

    Supported if the interval of lifting_share lies above the share of random directions by 0.05 and the sign-flip test
    of the difference over units, Holm-adjusted over the three bounds of the dose, has p < 0.05; underpowered with fewer
    than 20 units.
    """
    bound = bound_of("circuit_tracing", "lifting_share_1", {"random_direction": random_direction})
    return verdict(interval, bound, p, minimum_units=MINIMUM_UNITS, units=units)


def replacement_verdict(interval: tuple[float, float], best: float, p: float, units: int) -> Verdict:
    """Claim: a dictionary explains its model better than as many neurons, and than random features as large, do.

    Supported if the interval of replacement lies above the better of the two by 0.05, and the sign-flip test over
    prompts has p < 0.05 against both; underpowered with fewer than 20 prompts.
    """
    bound = bound_of("circuit_tracing", "replacement", {"neurons": best})
    return verdict(interval, bound, p, minimum_units=MINIMUM_UNITS, units=units)


def _share(lifts: Mapping[str, NDArray[np.float64]], seed: int) -> Finding:
    controls = {name: float(each.mean()) for name, each in lifts.items() if name != "unit"}
    return Finding(float(lifts["unit"].mean()), rate_interval(lifts["unit"], seed=seed), controls)


def _judged_scores(prompts: pd.DataFrame, found: Finding, seed: int) -> Finding:
    """The replacement score against the better of its two nulls with as many features."""
    own, nulls = prompts["replacement_model"], ("neurons", "random_features")
    p = max(paired_permutation_pvalue(own - prompts[f"replacement_{name}"], seed=seed) for name in nulls)
    best = max(found.controls[name] for name in nulls)
    return replace(found, verdict=replacement_verdict(found.interval or (0.0, 1.0), best, p, len(own)))


def _over_prompts(prompts: pd.DataFrame, prefix: str, own: str, seed: int) -> Finding | None:
    """The mean of a column over the prompts that have it, beside those of the others that begin alike; None if fewer
    than two prompts do."""
    values: dict[str, NDArray[np.float64]] = {
        str(name).removeprefix(prefix): prompts[name].dropna().to_numpy(float)
        for name in prompts
        if str(name).startswith(prefix)
    }
    mine = values.pop(own, np.zeros(0))
    if len(mine) < 2:
        return None
    controls = {name: float(each.mean()) for name, each in values.items() if len(each) == len(mine)}
    return Finding(float(mine.mean()), bootstrap_interval(mine, seed=seed), controls)
