"""Experiment 5, Semantic Algebra: does a - b + c land on the word that completes the analogy?

The recipe R of a view and the embedding E = R B are asked the same questions, so that "the recipe carries meaning" can
be told from "the embedding does". Four nulls stand beside both: ``c_alone``, the nearest neighbour of c, the shortcut
that much of an analogy set rewards (Linzen 2016); ``a_plus_c``, which leaves b out; ``shuffled_recipe``, R with the
entries of each signal permuted over tokens; and ``untrained``, the same architecture at initialisation.
``rotated_basis`` is no null but a check: a rotation of the signals moves no cosine, hence no rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from analyses.claims import bound_of
from analyses.experiments.semantic_algebra.figures import algebra_figures
from analyses.experiments.semantic_algebra.frames import (
    MEASURES,
    Answers,
    answers_of,
    beside,
    measures_of,
    overall_frame,
    published_frame,
    sections_frame,
)
from analyses.experiments.semantic_algebra.measure import (
    NULLS,
    OTHER_WEIGHTS,
    RANKINGS,
    Hits,
    paired_hits_pvalue,
    rank_all,
    spaces_of,
    usable_analogies,
)
from analyses.result.finding import Finding
from analyses.result.params import run_params
from analyses.result.result import Result
from analyses.statistics.draws import derive_rng
from analyses.statistics.intervals import bootstrap_interval
from analyses.statistics.verdicts import Verdict, verdict
from analyses.words.lexicon import Analogy, Lexicon, load_lexicon, read_questions_words, single_token_analogies
from reflowlens.models.base import HookedModel
from reflowlens.signals import SignalView, ViewName, view_of

MINIMUM_FOR_VERDICT = 30
QUICK_ANALOGIES = 100
VARIANTS = tuple(ranking for ranking in RANKINGS if ranking not in ("add", *NULLS))
DEFINITIONS = {
    "recipe_minus_E": "accuracy_at_1 of R minus that of E, paired over questions",
    "rotated_basis_rank_difference": "largest change of a rank by add when the signals of R are rotated at random; 0 "
    "but for words whose cosines differ by less than rounding",
}
_UNITS_NOTE = (
    "Intervals and p-values take questions as their units. Questions of one relation share words, so both are more "
    "confident about new words and new relations than they should be."
)


@torch.no_grad()
def semantic_algebra(
    model: HookedModel,
    *,
    view: SignalView | ViewName | None = None,
    lexicon: Lexicon | None = None,
    analogies: Sequence[Analogy] | str | Path | None = None,
    max_per_section: int | None = None,
    seed: int = 0,
    quick: bool = False,
    progress: bool = False,
) -> Result:
    """Rank the expected word of each analogy a - b + c in the recipe space R and in the embedding E.

    Args:
        view: whose recipe is R; default the model's native one. With ``identity`` R is E and only R is reported.
        lexicon: default the packaged one; its analogies with a ``published_rank`` are always reported.
        analogies: the questions; default the lexicon's. A path is read as Google's ``questions-words.txt``.
        max_per_section: draw at most so many of each relation.
        seed: of draws, shuffles, rotation, untrained model and bootstrap.
        quick: draw at most 100 questions.

    Returns:
        A Result. Headline: ``accuracy_at_1``, ``accuracy_at_5``, ``mean_reciprocal_rank`` of R, and with ``_E`` of E;
        ``recipe_minus_E``; ``rank_queen``, ``rank_ran`` and ``rank_Beijing``.
        Frames: ``quadruples`` (a row a question, space and kind of weights; a column a ranking of ``RANKINGS``),
        ``published`` (the same of published ones), ``overall`` (a row a space and series: the rankings, then ``add``
        with other weights), ``sections`` (a row a relation and series).

    Raises:
        ReflowlensError: fewer than 10 questions consist of single tokens of the model's tokenizer.

    Example: ``semantic_algebra(model, analogies="questions-words.txt", max_per_section=600).frames["sections"]``
    """
    chosen = view_of(model, view, seed=seed, exact_for="semantic_algebra")
    lexicon = lexicon or load_lexicon()
    given = _given(analogies, lexicon)
    usable, notes = usable_analogies(given, model.tokenizer)
    asked = _draw(usable, max_per_section, QUICK_ANALOGIES if quick else None, seed)
    published, _ = single_token_analogies([item for item in lexicon.analogies if item.published_rank], model.tokenizer)
    ranked = rank_all(model, spaces_of(chosen, seed, quick=quick), [*asked, *published], lexicon, progress)
    position = ranked.groupby(["space", "weights"]).cumcount()
    quadruples = ranked[position < len(asked)].reset_index(drop=True)
    frames = {
        "quadruples": quadruples,
        "overall": overall_frame(quadruples, seed),
        "sections": sections_frame(quadruples, seed),
    }
    if published:
        frames["published"] = published_frame(ranked[position >= len(asked)].reset_index(drop=True), published)
    findings, told = _findings(frames, seed)
    return Result(
        name="semantic_algebra",
        title="Semantic Algebra",
        params={
            "analogies": str(analogies) if isinstance(analogies, str | Path) else f"{len(given)} analogies",
            "max_per_section": max_per_section,
            **run_params(chosen, lexicon, seed, quick),
        },
        findings=findings,
        frames=frames,
        figures=algebra_figures(frames),
        definitions=DEFINITIONS,
        notes=[*notes, _UNITS_NOTE, told],
    )


def carries_analogies(hits: Hits, interval: tuple[float, float], nulls: dict[str, Hits]) -> Verdict:
    """Claim: the space carries analogies, that is, it answers more questions than any of its `NULLS` does.

    Supported if the interval of accuracy@1 lies above the best null's accuracy by 0.05 and the paired test against
    every null has p < 0.05 (the largest p decides, so that none needs adjusting); underpowered below 30 questions.
    """
    p = max(paired_hits_pvalue(hits, null) for null in nulls.values())
    bound = bound_of("semantic_algebra", "accuracy_at_1", {name: float(null.mean()) for name, null in nulls.items()})
    return verdict(interval, bound, p, minimum_units=MINIMUM_FOR_VERDICT, units=len(hits))


def better_than(hits: Hits, other: Hits, interval: tuple[float, float]) -> Verdict:
    """Claim: one space is better than another, that is, its accuracy@1 minus the other's, paired, is above 0.

    Supported if the interval of the difference lies above 0.05 and the paired test has p < 0.05; underpowered below 30
    questions.
    """
    p, bound = paired_hits_pvalue(hits, other), bound_of("semantic_algebra", "recipe_minus_E", {})
    return verdict(interval, bound, p, minimum_units=MINIMUM_FOR_VERDICT, units=len(hits))


def _given(analogies: Sequence[Analogy] | str | Path | None, lexicon: Lexicon) -> Sequence[Analogy]:
    if analogies is None:
        return lexicon.analogies
    return read_questions_words(analogies) if isinstance(analogies, str | Path) else list(analogies)


def _draw(asked: list[Analogy], per_section: int | None, total: int | None, seed: int) -> list[Analogy]:
    """A random subset within both limits, in the order given."""
    order = derive_rng(seed, "semantic_algebra", "questions").permutation(len(asked))
    relations = pd.Series([item.relation for item in asked]).iloc[order]
    if per_section is not None:
        relations = relations[relations.groupby(relations).cumcount() < per_section]
    return [asked[i] for i in sorted(relations.index[:total])]


def _findings(frames: Mapping[str, pd.DataFrame], seed: int) -> tuple[dict[str, Finding], str]:
    """The metrics of both spaces, their difference and the published analogies, and a note."""
    answers = answers_of(frames["quadruples"])
    findings: dict[str, Finding] = {}
    for space in answers:
        findings |= _of_space(frames, answers, space)
    rotation = np.abs(answers["R"]["add"] - answers["R"]["rotated_basis"]).max()
    findings["rotated_basis_rank_difference"] = Finding(rotation)
    if "E" in answers:
        findings["recipe_minus_E"], note = _recipe_minus_embedding(answers, seed)
    else:
        note = "recipe_minus_E is absent: the identity view's recipe is E itself"
    return findings | (_of_published(frames["published"]) if "published" in frames else {}), note


def _of_space(frames: Mapping[str, pd.DataFrame], answers: Answers, space: str) -> dict[str, Finding]:
    suffix = "" if space == "R" else f"_{space}"
    overall = frames["overall"].query("space == @space").set_index("series")
    quadruples = frames["quadruples"].query("space == @space")
    series = answers[space]
    nulls = {name: series[name] == 1 for name in NULLS if name in series}
    findings = {}

    def finding(measure: str, ranking: str, controls: Mapping[str, float], judged: bool = False) -> Finding:
        interval = (overall[f"{measure}_low"][ranking], overall[f"{measure}_high"][ranking])
        judgement = carries_analogies(series[ranking] == 1, interval, nulls) if judged else None
        definition = f"{MEASURES[measure]} in {space}; ranks {RANKINGS[ranking]}"
        return Finding(overall[measure][ranking], interval, controls, judgement, definition)

    for i, measure in enumerate(MEASURES):
        controls = {name: measures_of(ranks)[:, i].mean() for name, ranks in beside(answers, space).items()}
        findings[measure + suffix] = finding(measure, "add", controls, judged=measure == "accuracy_at_1")
    for ranking in VARIANTS:
        hits = (quadruples[f"rank_{ranking}"] == 1).groupby(quadruples["weights"]).mean()
        controls = {weights: hits[weights] for weights in OTHER_WEIGHTS if weights in hits}
        findings[f"accuracy_at_1_{ranking}{suffix}"] = finding("accuracy_at_1", ranking, controls)
    return findings


def _recipe_minus_embedding(answers: Answers, seed: int) -> tuple[Finding, str]:
    recipe, embedding = (answers[space]["add"] == 1 for space in ("R", "E"))
    difference = recipe.astype(float) - embedding
    interval = bootstrap_interval(difference, seed=seed)
    controls = {
        name: float((answers["R"][name] == 1).mean() - (answers["E"][name] == 1).mean())
        for name in OTHER_WEIGHTS
        if name in answers["R"]
    }
    finding = Finding(difference.mean(), interval, controls, better_than(recipe, embedding, interval))
    return finding, f"R answers more questions than E: sign-flip p = {paired_hits_pvalue(recipe, embedding):.2g}"


def _of_published(frame: pd.DataFrame) -> dict[str, Finding]:
    """``rank_<expected>`` of each published analogy in R; of two with the same expected word the first."""
    others = beside(answers_of(frame), "R")
    findings: dict[str, Finding] = {}
    for i, row in enumerate(frame[frame["series"] == "R"].to_dict("records")):
        controls = {name: float(ranks[i]) for name, ranks in others.items()}
        definition = f"rank of the answer to {row['analogy']} in R; ranks {RANKINGS['add']}"
        finding = Finding(row["rank_add"], controls=controls, definition=definition, published=row["published_rank"])
        findings.setdefault(f"rank_{row['expected']}", finding)
    return findings
