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

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from analyses.controls.nulls import untrained_view
from analyses.experiments.concept_inception.figures import inception_figures
from analyses.measures.knockout import real_tokens
from analyses.measures.lens import first_settled
from analyses.measures.steering import Critical, Injections, critical_strength, lost_again, rms
from analyses.result.model_identity import hash_of
from analyses.result.result import Result
from analyses.statistics.draws import derive_generator, derive_seed
from analyses.statistics.intervals import bootstrap_interval, rate_interval
from analyses.statistics.pvalues import paired_permutation_pvalue
from analyses.statistics.verdicts import Verdict, verdict
from analyses.words.lexicon import Lexicon, load_lexicon
from analyses.words.tokens import listed
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.signals import SignalView, ViewName, view_of

MINIMUM_CONCEPTS = 20
CONTROLS = ("untrained", "random_recipe")
RATES = ("reachable_share", "closed_share", "non_monotone_share")
UNTRAINED_LONG = "untrained_long"
DOUBLINGS = 8  # from the smallest strength that is tried to the limit
_LOGITS_AT_ONCE = 2**22
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
        quick: one prompt a concept.

    Returns:
        A Result with frames ``problems`` (a row a series, concept, prompt and layer: ``strength`` and ``alpha``, NaN
        where unreachable), ``layers`` (medians over concepts with intervals) and ``trace`` (every trial of the first
        concept in its first prompt), and figures ``critical``, ``alpha``, ``reachable``, ``trace``.

    Raises:
        ReflowlensError: fewer than two concepts are one token, or the lexicon has no short prompts.

    Example: ``concept_inception(model, ["Paris", "winter"]).frames["layers"]``
    """
    chosen = real_tokens(view_of(model, view, seed=seed))
    lexicon = lexicon or load_lexicon()
    words, skipped = _usable_concepts(model, concepts, lexicon)
    pairs = _pairs(len(words), len(lexicon.short_prompts), 1 if quick else prompts_per_concept)
    untrained = real_tokens(untrained_view(chosen, seed))
    prompts = {"short": lexicon.short_prompts, "long": lexicon.long_prompts}
    told = [name for name in prompts if len(prompts[name]) == len(lexicon.short_prompts)]
    setups = {name: _Setup.of(chosen, words, pairs, prompts[name]) for name in told}
    setups["untrained"] = _Setup.of(untrained, words, pairs, prompts["short"])
    if "long" in told:
        first = pairs[:: len(pairs) // len(words)]
        setups[UNTRAINED_LONG] = _Setup.of(untrained, words, first, prompts["long"])
    setups["random_recipe"] = setups["short"].with_random_recipes(derive_seed(seed, "concept_inception"))
    solved = {
        name: setup.solve(limit, tolerance, check=name in (*told, UNTRAINED_LONG))
        for name, setup in tqdm(setups.items(), desc="concept inception", disable=not progress)
    }
    problems = pd.concat([setups[name].frame(name, *found) for name, found in solved.items()], ignore_index=True)
    frames = {
        "problems": problems,
        "layers": _layers_frame(problems, seed),
        "trace": setups["short"].trace(solved["short"][0]),
    }
    result = Result(
        name="concept_inception",
        title="Concept Inception",
        params={
            "concepts": words,
            "view": chosen.name,
            "limit": limit,
            "tolerance": tolerance,
            "prompts_per_concept": len(pairs) // len(words),
            "seed": seed,
            "quick": quick,
            "lexicon": lexicon.version,
            "model_hash": hash_of(model),
        },
        frames=frames,
        figures=inception_figures(frames),
        definitions=DEFINITIONS,
        published=PUBLISHED,
        notes=[f"skipped {len(skipped)} concepts of several tokens: {', '.join(skipped)}"] if skipped else [],
    )
    return _with_metrics(result, model.cfg.n_layers, seed)


def closing_verdict(interval: tuple[float, float], untrained: float, units: int) -> Verdict:
    """Claim: an intervention can come too late (published: after layers 12 to 18 of 36), that is, most concepts have a
    point of no return.

    Supported if the whole interval of closed_share lies above 0.5 and above the untrained model's, in which nothing is
    decided that could be too late to change; underpowered with fewer than 20 concepts or if it contains 0.5.
    """
    low, high = interval
    if units < MINIMUM_CONCEPTS or low <= 0.5 <= high:
        return "underpowered"
    return "supported" if low > max(0.5, untrained) else "not supported"


def delay_verdict(interval: tuple[float, float], untrained: float, p: float, units: int) -> Verdict:
    """Claim: behind a long clause the prediction stays open longer.

    Supported if the interval of long_clause_delay lies above 0 and above the untrained model's, and the sign-flip test
    of their difference over concepts has p < 0.05; underpowered with fewer than 20 concepts.
    """
    return verdict(interval, max(0.0, untrained), p, minimum_units=MINIMUM_CONCEPTS, units=units)


@dataclass(frozen=True)
class _Setup:
    """Concepts in prompts at layers, the *problems*; arrays are [problem]."""

    view: SignalView
    runs: Injections
    prompts: Sequence[str]
    words: Sequence[str]
    written: Float[Tensor, "concept d_model"]  # r B
    concept: NDArray[np.int64]
    prompt: NDArray[np.int64]
    layer: NDArray[np.int64]

    @classmethod
    def of(
        cls, view: SignalView, words: Sequence[str], pairs: Sequence[tuple[int, int]], prompts: Sequence[str]
    ) -> _Setup:
        runs = Injections(view.model, list(prompts))
        written = view.write(view.rows([f" {word}" for word in words]))
        rows = np.array([(*pair, layer) for pair in pairs for layer in runs.layers])
        return cls(view, runs, prompts, words, written, *rows.T)

    def with_random_recipes(self, seed: int) -> _Setup:
        """The control: Gaussian recipes, each as long as the concept's."""
        recipes = self.view.rows([f" {word}" for word in self.words])
        gaussian = torch.randn(recipes.shape, generator=derive_generator(seed, "random_recipe")).to(recipes)
        lengths = recipes.norm(dim=-1, keepdim=True) / gaussian.norm(dim=-1, keepdim=True)
        return dataclasses.replace(self, written=self.view.write(gaussian * lengths))

    @property
    def alpha_of_one(self) -> NDArray[np.float64]:
        """α at strength 1."""
        stream = self.runs.rms().cpu().double().numpy()[self.layer, self.prompt]
        return stream / rms(self.written).cpu().double().numpy()[self.concept]

    def reached(self, problems: NDArray[np.int64], strengths: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Whether the concept's token is the most probable one."""
        hits = np.zeros(len(problems), dtype=bool)
        alpha = strengths * self.alpha_of_one[problems]
        targets = torch.tensor([self.view.model.to_single_token(f" {word}") for word in self.words])
        for layer in np.unique(self.layer[problems]):
            here = np.flatnonzero(self.layer[problems] == layer)
            concept, prompt = (torch.from_numpy(x[problems[here]]) for x in (self.concept, self.prompt))
            change = torch.from_numpy(alpha[here]).to(self.written)[:, None] * self.written[concept]
            ends = self.runs.final(int(layer), prompt.to(change.device), change)
            rows = ends.split(max(1, _LOGITS_AT_ONCE // len(self.view.recipe)))
            top = torch.cat([self.view.logits(self.view.readout(some)).argmax(dim=-1) for some in rows])
            hits[here] = (top.cpu() == targets[concept]).numpy()
        return hits

    def solve(self, limit: float, tolerance: float, check: bool) -> tuple[Critical, NDArray[np.bool_]]:
        """Critical strengths; and by problem whether success is lost at a larger one, if that is checked."""
        n, smallest = len(self.layer), limit / 2**DOUBLINGS
        critical = critical_strength(self.reached, n, smallest=smallest, largest=limit, tolerance=tolerance)
        if not check:
            return critical, np.zeros(n, dtype=bool)
        return critical, lost_again(self.reached, critical.strength, smallest * 2.0 ** np.arange(DOUBLINGS + 1))

    def frame(self, series: str, critical: Critical, lost: NDArray[np.bool_]) -> pd.DataFrame:
        return pd.DataFrame(
            {
                "series": series,
                "concept": [self.words[i] for i in self.concept],
                "prompt": [self.prompts[i] for i in self.prompt],
                "pair": self.concept * len(self.prompts) + self.prompt,
                "layer": self.layer,
                "strength": critical.strength,
                "alpha": critical.strength * self.alpha_of_one,
                "reachable": ~np.isnan(critical.strength),
                "lost_again": lost,
            }
        )

    def trace(self, critical: Critical) -> pd.DataFrame:
        """The trials of the first concept in its first prompt."""
        problem = critical.trace["problem"].to_numpy()
        frame = critical.trace.assign(
            concept=self.words[0],
            prompt=self.prompts[self.prompt[0]],
            layer=self.layer[problem],
            alpha=critical.trace["strength"] * self.alpha_of_one[problem],
        )
        first = (self.concept[problem] == 0) & (self.prompt[problem] == self.prompt[0])
        trials = frame[first].drop(columns="problem").sort_values(["layer", "step"], ignore_index=True)
        return trials.assign(step=trials.groupby("layer").cumcount())  # other problems' trials lay between


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


def _medians(frame: pd.DataFrame, column: str, seed: int) -> tuple[float, float, float]:
    """Median over concepts of the mean over their prompts, and its interval; unreachable is larger than all.

    NaN for what lies among the unreachable.
    """
    values = frame.assign(value=frame[column].fillna(np.inf)).groupby("concept", sort=False)["value"].mean().to_numpy()
    finite = values[np.isfinite(values)]
    beyond = 2 * finite.max() + 1 if len(finite) else 1.0
    coded = np.where(np.isfinite(values), values, beyond)
    ends = (float(np.median(coded)), *bootstrap_interval(coded, np.median, seed=seed))
    median, low, high = (value if len(finite) and value <= finite.max() else np.nan for value in ends)
    return median, low, high


def _layers_frame(problems: pd.DataFrame, seed: int) -> pd.DataFrame:
    rows = []
    for (series, layer), part in problems.groupby(["series", "layer"], sort=False):
        row: dict[str, object] = {"series": series, "layer": layer}
        for column in ("strength", "alpha"):
            row |= dict(zip((column, f"{column}_low", f"{column}_high"), _medians(part, column, seed), strict=True))
        shares = _by_concept(part, "reachable")
        low, high = rate_interval(shares, seed=seed)
        rows.append(row | {"reachable": shares.mean(), "reachable_low": low, "reachable_high": high})
    return pd.DataFrame(rows)


def _by_concept(frame: pd.DataFrame, column: str) -> NDArray[np.float64]:
    """Means over what belongs to a concept, the unit of replication."""
    return frame.groupby("concept", sort=False)[column].mean().to_numpy(dtype=float)


def _no_return(problems: pd.DataFrame) -> pd.DataFrame:
    """Of one series a row a ``pair`` of concept and prompt: ``layer``, the first from which on nothing suffices, one
    behind the end if there is none; and whether it is ``closed``."""
    reachable = problems.pivot(index="layer", columns="pair", values="reachable")
    concept = problems.drop_duplicates("pair").set_index("pair")["concept"]
    layer = first_settled(~reachable.to_numpy(dtype=bool))
    columns = {"concept": concept[reachable.columns], "layer": layer, "closed": layer < len(reachable)}
    return pd.DataFrame(columns, index=reachable.columns)


def _long_clause(short: pd.DataFrame, long: pd.DataFrame) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What a clause before the prompts of ``long`` does, two series of the same model: by concept, how many layers
    later the point of no return comes; and the log ratio of the critical strengths, of the concepts that have any."""
    short = short[short["pair"].isin(long["pair"])]
    later = _by_concept(_no_return(long), "layer") - _by_concept(_no_return(short), "layer")
    both = short.merge(long, on=["concept", "pair", "layer"], suffixes=("", "_long"))
    both = both[(both["strength"] > 0) & (both["strength_long"] > 0)]  # reached in both, and not without an injection
    return later, _by_concept(both.assign(ratio=np.log(both["strength_long"] / both["strength"])), "ratio")


def _with_metrics(result: Result, n_layers: int, seed: int) -> Result:
    problems = result.frames["problems"]
    series = {str(name): part for name, part in problems.groupby("series", sort=False)}
    controls = {name: part for name, part in series.items() if name in CONTROLS}
    no_return = {name: _no_return(part) for name, part in series.items()}
    short = no_return["short"]

    def add(metric: str, values: NDArray[np.float64]) -> None:
        result.metrics[metric] = float(values.mean())
        interval_of = rate_interval if metric in RATES else bootstrap_interval
        result.intervals[metric] = interval_of(values, seed=seed)

    _add_critical(result, n_layers // 2)
    add("reachable_share", _by_concept(series["short"], "reachable"))
    add("closed_share", _by_concept(short, "closed"))
    for name, part in controls.items():
        result.controls.setdefault("reachable_share", {})[name] = float(part["reachable"].mean())
        result.controls.setdefault("closed_share", {})[name] = float(no_return[name]["closed"].mean())
    closed = short[short["closed"]]
    if closed["concept"].nunique() > 1:
        add("point_of_no_return", _by_concept(closed, "layer") / n_layers)
        layers = {name: no_return[name].query("closed")["layer"] for name in CONTROLS}
        result.controls["point_of_no_return"] = {
            name: float(layer.mean()) / n_layers for name, layer in layers.items() if len(layer)
        }
    else:
        result.notes.append("point_of_no_return is absent: concepts can be implanted up to the end of the model")
    units = short["concept"].nunique()
    result.verdicts["closed_share"] = closing_verdict(
        result.intervals["closed_share"], result.controls["closed_share"]["untrained"], units
    )
    if "long" in series:
        later, ratios = _long_clause(series["short"], series["long"])
        untrained_later, untrained_ratios = _long_clause(series["untrained"], series[UNTRAINED_LONG])
        delay, untrained_delay = later / n_layers, untrained_later / n_layers
        add("long_clause_delay", delay)
        result.controls["long_clause_delay"] = {"untrained": float(untrained_delay.mean())}
        p = paired_permutation_pvalue(delay - untrained_delay, seed=seed)
        result.verdicts["long_clause_delay"] = delay_verdict(
            result.intervals["long_clause_delay"], float(untrained_delay.mean()), p, units
        )
        result.notes.append(f"long_clause_delay against untrained: sign-flip p = {p:.2g}, {units} concepts")
        if len(ratios) > 1:
            add("log_long_clause_ratio", ratios)
            if len(untrained_ratios):
                result.controls["log_long_clause_ratio"] = {"untrained": float(untrained_ratios.mean())}
    else:
        result.notes.append("long_clause_delay is absent: the lexicon has no long prompt for each short one")
    told = problems[problems["series"].isin(["short", "long"]) & problems["reachable"]]
    if told["concept"].nunique() > 1:
        add("non_monotone_share", _by_concept(told, "lost_again"))
        if UNTRAINED_LONG in series and series[UNTRAINED_LONG]["reachable"].any():
            checked = series[UNTRAINED_LONG].query("reachable")
            result.controls["non_monotone_share"] = {"untrained": float(checked["lost_again"].mean())}
    return result


def _add_critical(result: Result, layer: int) -> None:
    """The critical values at one layer, beside those of the controls that reach the concepts."""
    rows = result.frames["layers"].query("layer == @layer").set_index("series")
    for metric, column in (("critical_alpha", "alpha"), ("critical_strength", "strength")):
        value, low, high = rows.loc["short", [column, f"{column}_low", f"{column}_high"]].to_numpy(dtype=float)
        if np.isnan(value):
            result.notes.append(f"{metric} is absent: most concepts are unreachable after half of the blocks")
            continue
        result.metrics[metric] = float(value)
        controls = rows.loc[list(CONTROLS), column].dropna()
        result.controls[metric] = {str(name): float(control) for name, control in controls.items()}
        if np.isnan(low) or np.isnan(high):
            result.notes.append(f"{metric} has no interval: its upper end lies among the unreachable")
        else:
            result.intervals[metric] = (float(low), float(high))
