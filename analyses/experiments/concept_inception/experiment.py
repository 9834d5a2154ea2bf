"""Experiment 11, Concept Inception: how strongly must a word's recipe be injected for the model to say the word?

α r B is added to the stream at a prompt's last position, r the recipe of a concept's token. The critical α is the
smallest that makes the token the most probable of all; a layer from which no strength up to a limit does, at this layer
and at every later one, is the point of no return.

The readout is tied: what is injected is also what the token's logit is read along, so a concept can be implanted in any
model that has one word a direction, trained or not. The controls say how much of a result that explains.
``untrained``: the same architecture at initialisation; behind a clause each concept in its first prompt only.
``random_recipe``: a Gaussian recipe as long as the concept's, judged by the concept's token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from analyses.claims import UNTRAINED, bound_of, joined_draws
from analyses.controls.nulls import over_untrained
from analyses.experiments.concept_inception.figures import inception_figures
from analyses.experiments.concept_inception.frames import by_concept, layers_frame, long_clause, no_return
from analyses.experiments.concept_inception.measure import Setup
from analyses.measures.depth import chosen_layers, left_out
from analyses.measures.knockout import real_tokens
from analyses.result.finding import Finding
from analyses.result.params import run_params
from analyses.result.result import Result
from analyses.statistics.draws import derive_seed
from analyses.statistics.intervals import bootstrap_interval, rate_interval
from analyses.statistics.pvalues import paired_permutation_pvalue
from analyses.statistics.verdicts import Verdict, verdict
from analyses.words.lexicon import Lexicon, load_lexicon
from analyses.words.tokens import listed
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.signals import SignalView, ViewName, view_of

MINIMUM_CONCEPTS = 20
CONTROLS = (*UNTRAINED, "random_recipe")
LONG = "_long"  # behind the name of an untrained model: its series behind the clause
DEFINITIONS = {
    "critical_alpha": "smallest α of α r B, injected after half of the blocks at the last position of a short prompt, "
    "that makes the concept's token the most probable one; median over concepts of the mean over their prompts, "
    "unreachable counted as larger than all. Published without a unit or a layer",
    "critical_strength": "the same as the root mean square of what is added over that of the stream",
    "reachable_share": "share of concepts, short prompts and layers (the end among them) where some strength up to the "
    "limit suffices",
    "closed_share": "share of concepts and short prompts with a point of no return: a layer from which on, to the end, "
    "no strength up to the limit suffices",
    "point_of_no_return": "that layer as a share of the depth, mean over the concepts and short prompts that have one. "
    "Published: about layer 18 of 36 for short prompts",
    "long_clause_delay": "point of no return of a prompt behind a subordinate clause minus that of the prompt alone, "
    "as a share of the depth, no point of no return counted as one layer behind the end; mean over concepts. "
    "untrained: of each concept's first prompt. Published: as late as layer 28 of 36 against about 18",
    "log_long_clause_ratio": "logarithm of the critical strength behind a subordinate clause over that of the prompt "
    "alone, mean over the layers where both can be reached, then over concepts. untrained: of first prompts",
    "non_monotone_share": "share of reachable concepts, prompts and layers where the token is lost again at a larger "
    "strength. untrained: of first prompts behind the clause",
}
PUBLISHED = {"critical_alpha": 18.4, "point_of_no_return": 18 / 36, "long_clause_delay": 10 / 36}


@torch.no_grad()
def concept_inception(
    model: HookedModel,
    concepts: Sequence[str] | None = None,
    *,
    view: SignalView | ViewName | None = None,
    lexicon: Lexicon | None = None,
    limit: float = 16.0,
    tolerance: float = 0.02,
    prompts_per_concept: int = 3,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    quick: bool = False,
    progress: bool = False,
) -> Result:
    """Find the critical strength of concepts at every layer, after short prompts and the same behind a long clause.

    Args:
        concepts: words of one token (without a leading space); default the first of each of the lexicon's categories.
        view: whose recipes are injected; what they write is the same through every exact view.
        limit: the largest strength that is tried, in units of the stream's root mean square.
        tolerance: of the critical strength, relative.
        prompts_per_concept: how many of the lexicon's ``short_prompts`` each concept is injected into, in turn.
        layers: where to inject beside both ends and the half, 0 to the number of blocks (the end); default all up to
            12 blocks, of deeper models an even grid (`analyses.measures.depth.layer_grid`).
        quick: one prompt a concept; of a deep model a coarser grid.

    Returns:
        A Result with frames ``problems`` (a row a series, concept, prompt and layer: ``strength`` and ``alpha``, NaN
        where unreachable), ``layers`` (medians over concepts with intervals) and ``trace`` (every trial of the first
        concept in its first prompt), and figures ``critical``, ``alpha``, ``reachable``, ``trace``.

    Raises:
        ReflowlensError: fewer than two concepts are one token, there is no such layer, or the lexicon has no short
            prompts.

    Example: ``concept_inception(model, ["Paris", "winter"]).frames["layers"]``
    """
    chosen = real_tokens(view_of(model, view, seed=seed, exact_for="concept_inception"))
    lexicon = lexicon or load_lexicon()
    words, skipped = _usable_concepts(model, concepts, lexicon)
    pairs = _pairs(len(words), len(lexicon.short_prompts), 1 if quick else prompts_per_concept)
    measured = chosen_layers(layers, model.cfg.n_layers, quick=quick)
    prompts = {"short": lexicon.short_prompts, "long": lexicon.long_prompts}
    told = [name for name in prompts if len(prompts[name]) == len(lexicon.short_prompts)]
    setups = {name: Setup.of(chosen, words, pairs, prompts[name], measured) for name in told}
    setups["random_recipe"] = setups["short"].with_random_recipes(derive_seed(seed, "concept_inception"))
    solved = {
        name: setup.solve(limit, tolerance, check=name in told)
        for name, setup in tqdm(setups.items(), desc="concept inception", disable=not progress)
    }
    series = {name: setups[name].frame(name, *found) for name, found in solved.items()}

    def untrained(view: SignalView) -> dict[str, pd.DataFrame]:
        fresh, first = real_tokens(view), pairs[:: len(pairs) // len(words)]
        short = Setup.of(fresh, words, pairs, prompts["short"], measured)
        found = {"": short.frame("", *short.solve(limit, tolerance, check=False))}
        if "long" in told:
            long = Setup.of(fresh, words, first, prompts["long"], measured)
            found[LONG] = long.frame("", *long.solve(limit, tolerance, check=True))
        return found

    for draw, found in over_untrained(untrained, chosen, seed, "concept_inception", quick=quick).items():
        series |= {draw + behind: frame.assign(series=draw + behind) for behind, frame in found.items()}
    problems = pd.concat(series.values(), ignore_index=True)
    frames = {
        "problems": problems,
        "layers": layers_frame(problems, seed),
        "trace": setups["short"].trace(solved["short"][0]),
    }
    findings, notes = _findings(problems, frames["layers"], model.cfg.n_layers, seed)
    skips = f"skipped {len(skipped)} concepts of several tokens: {', '.join(skipped)}"
    return Result(
        name="concept_inception",
        title="Concept Inception",
        params={
            "concepts": words,
            "limit": limit,
            "tolerance": tolerance,
            "prompts_per_concept": len(pairs) // len(words),
            "layers": None if layers is None else measured,
            **run_params(chosen, lexicon, seed, quick),
        },
        findings=findings,
        frames=frames,
        figures=inception_figures(frames),
        definitions=DEFINITIONS,
        published=PUBLISHED,
        notes=[*([skips] if skipped else []), *notes, *left_out(measured, model.cfg.n_layers)],
    )


def closing_verdict(interval: tuple[float, float], untrained: float, units: int) -> Verdict:
    """Claim: an intervention can come too late (published: after layers 12 to 18 of 36), that is, most concepts have a
    point of no return.

    Supported if the whole interval of closed_share lies above 0.5 and above the untrained model's by 0.05, in which
    nothing is decided that could be too late to change; underpowered with fewer than 20 concepts or if it contains 0.5.
    """
    low, high = interval
    if units < MINIMUM_CONCEPTS or low <= 0.5 <= high:
        return "underpowered"
    bound = bound_of("concept_inception", "closed_share", {"untrained": untrained})
    return "supported" if low > bound else "not supported"


def delay_verdict(interval: tuple[float, float], untrained: float, p: float, units: int) -> Verdict:
    """Claim: behind a long clause the prediction stays open longer.

    Supported if the interval of long_clause_delay lies above 0 and above the untrained model's by 0.05, and the
    sign-flip test of their difference over concepts has p < 0.05; underpowered with fewer than 20 concepts.
    """
    bound = bound_of("concept_inception", "long_clause_delay", {"untrained": untrained})
    return verdict(interval, bound, p, minimum_units=MINIMUM_CONCEPTS, units=units)


def _usable_concepts(
    model: HookedModel, concepts: Sequence[str] | None, lexicon: Lexicon
) -> tuple[list[str], list[str]]:
    """The concepts that are one token, and the others."""
    if concepts is None:
        concepts = [words[0] for words in lexicon.categories.values() if words]
    given = listed(concepts, "concepts")
    single = [word for word in given if model.tokenizer.is_single_token(f" {word}")]
    if len(single) < 2:
        raise ReflowlensError(f"concept_inception needs at least two concepts of one token, got {len(single)}")
    return single, [word for word in given if word not in single]


def _pairs(n_concepts: int, n_prompts: int, per_concept: int) -> list[tuple[int, int]]:
    """Each concept with some of the prompts, all prompts in turn."""
    if n_prompts == 0:
        raise ReflowlensError("concept_inception needs short_prompts in the lexicon")
    some = range(min(per_concept, n_prompts))
    return [(concept, (concept * len(some) + i) % n_prompts) for concept in range(n_concepts) for i in some]


def _findings(
    problems: pd.DataFrame, layers: pd.DataFrame, n_layers: int, seed: int
) -> tuple[dict[str, Finding], list[str]]:
    """The metrics beside their controls, from the critical strengths of every problem, and notes."""
    series = {str(name): part for name, part in problems.groupby("series", sort=False)}
    findings, notes = _critical(layers, n_layers // 2)
    reachable = by_concept(series["short"], "reachable")
    controls = {name: float(series[name]["reachable"].mean()) for name in CONTROLS if name in series}
    findings["reachable_share"] = Finding(reachable.mean(), rate_interval(reachable, seed=seed), controls)
    for found, told in (_no_return_findings(series, n_layers, seed), _long_clause_findings(series, n_layers, seed)):
        findings |= found
        notes += told
    checked = problems[problems["series"].isin(["short", "long"]) & problems["reachable"]]
    if checked["concept"].nunique() > 1:
        lost = by_concept(checked, "lost_again")
        behind = {
            name: series[name + LONG].query("reachable")["lost_again"] for name in UNTRAINED if name + LONG in series
        }
        controls = {name: float(found.mean()) for name, found in behind.items() if len(found)}
        findings["non_monotone_share"] = Finding(lost.mean(), rate_interval(lost, seed=seed), controls)
    return findings, notes


def _critical(layers: pd.DataFrame, layer: int) -> tuple[dict[str, Finding], list[str]]:
    """The critical values at one layer, beside those of the controls that reach the concepts."""
    findings, notes = {}, []
    rows = layers.query("layer == @layer").set_index("series")
    for metric, column in (("critical_alpha", "alpha"), ("critical_strength", "strength")):
        ends = rows.loc["short", [column, f"{column}_low", f"{column}_high"]].to_numpy(dtype=float)
        value, low, high = map(float, ends)
        if np.isnan(value):
            notes.append(f"{metric} is absent: most concepts are unreachable after half of the blocks")
            continue
        there = [name for name in CONTROLS if name in rows.index]
        controls = {str(name): control for name, control in rows.loc[there, column].dropna().items()}
        interval = None if np.isnan(low) or np.isnan(high) else (low, high)
        findings[metric] = Finding(value, interval, controls)
        if interval is None:
            notes.append(f"{metric} has no interval: its upper end lies among the unreachable")
    return findings, notes


def _no_return_findings(
    series: Mapping[str, pd.DataFrame], n_layers: int, seed: int
) -> tuple[dict[str, Finding], list[str]]:
    """How many concepts have a point of no return, and where those that have one have it."""
    points = {name: no_return(series[name]) for name in ("short", *CONTROLS) if name in series}
    short = points.pop("short")
    closed = by_concept(short, "closed")
    interval = rate_interval(closed, seed=seed)
    controls = {name: float(each["closed"].mean()) for name, each in points.items()}
    hardest = joined_draws("concept_inception", "closed_share", controls)["untrained"]
    judged = closing_verdict(interval, hardest, len(closed))
    findings = {"closed_share": Finding(closed.mean(), interval, controls, judged)}
    if short.loc[short["closed"], "concept"].nunique() < 2:
        return findings, ["point_of_no_return is absent: concepts can be implanted up to the end of the model"]
    point = by_concept(short[short["closed"]], "layer") / n_layers
    layers = {name: each.loc[each["closed"], "layer"] for name, each in points.items()}
    controls = {name: float(layer.mean()) / n_layers for name, layer in layers.items() if len(layer)}
    findings["point_of_no_return"] = Finding(point.mean(), bootstrap_interval(point, seed=seed), controls)
    return findings, []


def _long_clause_findings(
    series: Mapping[str, pd.DataFrame], n_layers: int, seed: int
) -> tuple[dict[str, Finding], list[str]]:
    """What a subordinate clause before the prompt does."""
    if "long" not in series:
        return {}, ["long_clause_delay is absent: the lexicon has no long prompt for each short one"]
    later, ratios = long_clause(series["short"], series["long"])
    untrained = {name: long_clause(series[name], series[name + LONG]) for name in UNTRAINED if name in series}
    delay, interval = later / n_layers, bootstrap_interval(later / n_layers, seed=seed)
    p = max(paired_permutation_pvalue(delay - other / n_layers, seed=seed) for other, _ in untrained.values())
    controls = {name: float(other.mean()) / n_layers for name, (other, _) in untrained.items()}
    hardest = joined_draws("concept_inception", "long_clause_delay", controls)["untrained"]
    judged = delay_verdict(interval, hardest, p, len(delay))
    findings = {"long_clause_delay": Finding(delay.mean(), interval, controls, judged)}
    if len(ratios) > 1:
        controls = {name: float(other.mean()) for name, (_, other) in untrained.items() if len(other)}
        interval = bootstrap_interval(ratios, seed=seed)
        findings["log_long_clause_ratio"] = Finding(ratios.mean(), interval, controls)
    return findings, [f"long_clause_delay against untrained: sign-flip p = {p:.2g}, {len(delay)} concepts"]
