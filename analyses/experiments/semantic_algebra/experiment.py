"""Experiment 5, Semantic Algebra: does a - b + c land on the word that completes the analogy?

The recipe R of a view and the embedding E = R B are asked the same questions, so that "the recipe carries meaning" can
be told from "the embedding does". Four nulls stand beside both: ``c_alone``, the nearest neighbour of c, the shortcut
that much of an analogy set rewards (Linzen 2016); ``a_plus_c``, which leaves b out; ``shuffled_recipe``, R with the
entries of each signal permuted over tokens; and ``untrained``, the same architecture at initialisation.
``rotated_basis`` is no null but a check: a rotation of the signals moves no cosine, hence no rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor
from tqdm import tqdm

from analyses.controls.bases import random_rotations
from analyses.controls.nulls import untrained_view
from analyses.experiments.semantic_algebra.measure import RANKINGS, analogy_ranks, candidate_sets, usable_analogies
from analyses.measures.neighbors import shuffle_columns
from analyses.result.model_identity import hash_of
from analyses.result.result import Result
from analyses.statistics.draws import derive_rng, derive_seed
from analyses.statistics.intervals import bootstrap_interval, rate_band
from analyses.statistics.verdicts import Verdict, verdict
from analyses.words.lexicon import Analogy, Lexicon, load_lexicon, read_questions_words, single_token_analogies
from reflowlens.figures.builders import bars, dots
from reflowlens.models.base import HookedModel
from reflowlens.signals import SignalView, ViewName, rotate, view_of

Ranks: TypeAlias = "NDArray[np.int64]"  # of the expected word, [question]
Hits: TypeAlias = "NDArray[np.bool_]"  # whether it is first, [question]

MINIMUM_FOR_VERDICT = 30
QUICK_ANALOGIES = 100
NULLS = ("c_alone", "a_plus_c", "shuffled_recipe", "untrained")
VARIANTS = tuple(ranking for ranking in RANKINGS if ranking not in ("add", *NULLS))
MEASURES = {
    "accuracy_at_1": "share of questions whose expected word has rank 1",
    "accuracy_at_5": "share of questions whose expected word has rank 5 or better",
    "mean_reciprocal_rank": "mean over questions of 1 / rank of the expected word",
}
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
    chosen = view_of(model, view, seed=seed)
    lexicon = lexicon or load_lexicon()
    given = _given(analogies, lexicon)
    usable, notes = usable_analogies(given, model.tokenizer)
    asked = _draw(usable, max_per_section, QUICK_ANALOGIES if quick else None, seed)
    published, _ = single_token_analogies([item for item in lexicon.analogies if item.published_rank], model.tokenizer)
    ranked = _rank_all(model, _spaces(chosen, seed), [*asked, *published], lexicon, progress)
    position = ranked.groupby(["space", "weights"]).cumcount()
    quadruples = ranked[position < len(asked)].reset_index(drop=True)
    frames = {
        "quadruples": quadruples,
        "overall": _overall(quadruples, seed),
        "sections": _sections(quadruples, seed),
    }
    if published:
        frames["published"] = _published(ranked[position >= len(asked)].reset_index(drop=True), published)
    result = Result(
        name="semantic_algebra",
        title="Semantic Algebra",
        params={
            "model_hash": hash_of(model),
            "view": chosen.name,
            "lexicon": lexicon.version,
            "analogies": str(analogies) if isinstance(analogies, str | Path) else f"{len(given)} analogies",
            "max_per_section": max_per_section,
            "seed": seed,
            "quick": quick,
        },
        frames=frames,
        figures=_figures(frames),
        notes=[*notes, _UNITS_NOTE],
    )
    _add_metrics(result, seed)
    return result


def carries_analogies(hits: Hits, interval: tuple[float, float], nulls: dict[str, Hits]) -> Verdict:
    """Claim: the space carries analogies, that is, it answers more questions than any of its `NULLS` does.

    Supported if the interval of accuracy@1 lies above the best null's accuracy and the paired test against every null
    has p < 0.05 (the largest p decides, so that none needs adjusting); underpowered below 30 questions.
    """
    p = max(paired_hits_pvalue(hits, null) for null in nulls.values())
    best = max(float(null.mean()) for null in nulls.values())
    return verdict(interval, best, p, minimum_units=MINIMUM_FOR_VERDICT, units=len(hits))


def better_than(hits: Hits, other: Hits, interval: tuple[float, float]) -> Verdict:
    """Claim: one space is better than another, that is, its accuracy@1 minus the other's, paired, is above 0.

    Supported if the interval of the difference lies above 0 and the paired test has p < 0.05; underpowered below 30
    questions.
    """
    p = paired_hits_pvalue(hits, other)
    return verdict(interval, 0.0, p, minimum_units=MINIMUM_FOR_VERDICT, units=len(hits))


def paired_hits_pvalue(hits: Hits, other: Hits) -> float:
    """One-sided exact sign-flip p of more hits than the other's on the same questions (McNemar's exact test).

    Only questions that one of the two answers have a sign to flip, and their differences are all of size 1, which makes
    the sign-flip distribution binomial.
    """
    wins, losses = int((hits & ~other).sum()), int((other & ~hits).sum())
    return float(stats.binomtest(wins, wins + losses, alternative="greater").pvalue) if wins + losses else 1.0


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


def _spaces(view: SignalView, seed: int) -> Iterator[tuple[str, str, Float[Tensor, "token S"]]]:
    """Kind of weights, space, and its rows without padding."""
    own = derive_seed(seed, "semantic_algebra")
    yield from _both("trained", view)
    shuffled = shuffle_columns(view.recipe[: view.n_tokens], own)
    yield from _both("shuffled_recipe", dataclasses.replace(view, recipe=shuffled))
    yield from _both("untrained", untrained_view(view, seed))
    ((_, rotation),) = random_rotations(view.n_signals, 1, seed, "semantic_algebra")
    rotated = rotate(view, rotation)
    yield "rotated_basis", "R", rotated.recipe[: view.n_tokens]


def _both(weights: str, view: SignalView) -> Iterator[tuple[str, str, Float[Tensor, "token S"]]]:
    recipe = view.recipe[: view.n_tokens]
    yield weights, "R", recipe
    if view.name != "identity":
        yield weights, "E", recipe @ view.basis


def _rank_all(
    model: HookedModel,
    spaces: Iterator[tuple[str, str, Float[Tensor, "token S"]]],
    questions: list[Analogy],
    lexicon: Lexicon,
    progress: bool,
) -> pd.DataFrame:
    """A row a space, kind of weights and question, in this order."""
    tokenizer = model.tokenizer
    ids = torch.tensor([[tokenizer.single_token(f" {word}") for word in item.words] for item in questions])
    candidates = candidate_sets(tokenizer, lexicon, ids)
    words = pd.DataFrame([item.words for item in questions], columns=["a", "b", "c", "expected"])
    parts = []
    for weights, space, rows in tqdm(spaces, desc="spaces", disable=not progress):
        ranks: dict[str, Any] = analogy_ranks(rows, ids.to(rows.device), candidates.to(rows.device))
        ranks["predicted"] = [text[1:] for text in tokenizer.to_str_tokens(ranks["predicted"])]
        parts.append(
            words.assign(relation=[item.relation for item in questions], space=space, weights=weights, **ranks)
        )
    return pd.concat(parts, ignore_index=True)


def _published(ranked: pd.DataFrame, published: Sequence[Analogy]) -> pd.DataFrame:
    copies = len(ranked) // len(published)
    ranks = [float(item.published_rank or np.nan) for item in published]
    series = ranked["space"].where(ranked["weights"] == "trained", ranked["weights"])
    return ranked.assign(analogy=list(map(str, published)) * copies, series=series, published_rank=ranks * copies)


def _answers(frame: pd.DataFrame) -> dict[str, dict[str, Ranks]]:
    """Ranks by space and series: every ranking, then ``add`` with other than the trained weights."""
    answers: dict[str, dict[str, Ranks]] = {}
    for space, weights in frame[["space", "weights"]].drop_duplicates().itertuples(index=False):
        rows = frame[(frame["space"] == space) & (frame["weights"] == weights)]
        series = {name: f"rank_{name}" for name in RANKINGS} if weights == "trained" else {weights: "rank_add"}
        answers.setdefault(space, {}).update({name: rows[column].to_numpy() for name, column in series.items()})
    return answers


def _beside(answers: dict[str, dict[str, Ranks]], space: str) -> dict[str, Ranks]:
    """What stands beside a space's ``add``: its nulls, its rotation where it was rotated, and the other space."""
    own = {name: ranks for name, ranks in answers[space].items() if name in (*NULLS, "rotated_basis")}
    return own | {other: series["add"] for other, series in answers.items() if other != space}


def _measures(ranks: Ranks) -> NDArray[np.float64]:
    """`MEASURES` of each question, [question, 3]."""
    return np.stack([ranks == 1, ranks <= 5, 1 / ranks], axis=1).astype(float)


def _summary(ranks: Ranks, seed: int) -> dict[str, float]:
    """Means over questions with 95% intervals; a single question has none."""
    values = _measures(ranks)
    low, high = rate_band(values, seed=seed) if len(values) > 1 else (np.full(3, np.nan), np.full(3, np.nan))
    row: dict[str, float] = {"n": len(values)}
    for i, measure in enumerate(MEASURES):
        row |= {measure: values[:, i].mean(), f"{measure}_low": low[i], f"{measure}_high": high[i]}
    return row


def _overall(quadruples: pd.DataFrame, seed: int) -> pd.DataFrame:
    """A row a space and series; ``p``: that the space's ``add`` answers more questions than this series."""
    rows = [
        {"space": space, "series": name}
        | _summary(ranks, seed)
        | {"p": paired_hits_pvalue(series["add"] == 1, ranks == 1)}
        for space, series in _answers(quadruples).items()
        for name, ranks in series.items()
    ]
    return pd.DataFrame(rows)


def _sections(quadruples: pd.DataFrame, seed: int) -> pd.DataFrame:
    """A row a relation and series: the spaces by ``add``, then the nulls of R."""
    rows = []
    for relation, part in quadruples.groupby("relation", sort=False):
        answers = _answers(part)
        series = {space: answers[space]["add"] for space in answers} | {name: answers["R"][name] for name in NULLS}
        rows += [{"relation": relation, "series": name} | _summary(ranks, seed) for name, ranks in series.items()]
    return pd.DataFrame(rows)


def _add_metrics(result: Result, seed: int) -> None:
    answers = _answers(result.frames["quadruples"])
    for space in answers:
        _add_space(result, answers, space)
    rotation = np.abs(answers["R"]["add"] - answers["R"]["rotated_basis"]).max()
    result.metrics["rotated_basis_rank_difference"] = float(rotation)
    if "E" in answers:
        _add_comparison(result, answers, seed)
    else:
        result.notes.append("recipe_minus_E is absent: the identity view's recipe is E itself")
    result.definitions |= DEFINITIONS
    if "published" in result.frames:
        _add_published(result)


def _add_comparison(result: Result, answers: dict[str, dict[str, Ranks]], seed: int) -> None:
    hits = {
        name: (answers["R"][name] == 1, answers["E"][name] == 1) for name in ("add", "shuffled_recipe", "untrained")
    }
    recipe, embedding = hits.pop("add")
    difference = recipe.astype(float) - embedding
    result.metrics["recipe_minus_E"] = float(difference.mean())
    result.intervals["recipe_minus_E"] = bootstrap_interval(difference, seed=seed)
    result.controls["recipe_minus_E"] = {name: float(r.mean() - e.mean()) for name, (r, e) in hits.items()}
    result.verdicts["recipe_minus_E"] = better_than(recipe, embedding, result.intervals["recipe_minus_E"])
    p = paired_hits_pvalue(recipe, embedding)
    result.notes.append(f"R answers more questions than E: sign-flip p = {p:.2g}")


def _add_space(result: Result, answers: dict[str, dict[str, Ranks]], space: str) -> None:
    suffix = "" if space == "R" else f"_{space}"
    overall = result.frames["overall"].query("space == @space").set_index("series")
    quadruples = result.frames["quadruples"].query("space == @space")

    def add(metric: str, measure: str, ranking: str) -> None:
        result.metrics[metric] = float(overall[measure][ranking])
        result.intervals[metric] = (overall[f"{measure}_low"][ranking], overall[f"{measure}_high"][ranking])
        result.definitions[metric] = f"{MEASURES[measure]} in {space}; ranks {RANKINGS[ranking]}"

    for i, measure in enumerate(MEASURES):
        add(measure + suffix, measure, "add")
        beside = _beside(answers, space)
        result.controls[measure + suffix] = {name: _measures(ranks)[:, i].mean() for name, ranks in beside.items()}
    for ranking in VARIANTS:
        metric = f"accuracy_at_1_{ranking}{suffix}"
        add(metric, "accuracy_at_1", ranking)
        hits = (quadruples[f"rank_{ranking}"] == 1).groupby(quadruples["weights"]).mean()
        result.controls[metric] = {weights: hits[weights] for weights in ("shuffled_recipe", "untrained")}
    accuracy = f"accuracy_at_1{suffix}"
    nulls = {name: answers[space][name] == 1 for name in NULLS}
    result.verdicts[accuracy] = carries_analogies(answers[space]["add"] == 1, result.intervals[accuracy], nulls)


def _add_published(result: Result) -> None:
    """``rank_<expected>`` of each published analogy in R; of two with the same expected word the first."""
    frame = result.frames["published"]
    beside = _beside(_answers(frame), "R")
    for i, row in enumerate(frame[frame["series"] == "R"].to_dict("records")):
        metric = f"rank_{row['expected']}"
        if metric not in result.metrics:
            result.metrics[metric] = float(row["rank_add"])
            result.published[metric] = row["published_rank"]
            result.controls[metric] = {name: float(ranks[i]) for name, ranks in beside.items()}
            result.definitions[metric] = f"rank of the answer to {row['analogy']} in R; ranks {RANKINGS['add']}"


def _figures(frames: dict[str, pd.DataFrame]) -> dict[str, go.Figure]:
    low, high, y = "accuracy_at_1_low", "accuracy_at_1_high", "accuracy_at_1"
    trained = frames["overall"][~frames["overall"]["series"].isin(["rotated_basis"])]
    figures = {
        "accuracy": bars(
            trained,
            "series",
            y,
            low,
            high,
            "space",
            title="Analogies answered, by ranking and null",
            x_title="ranking",
            y_title="accuracy@1",
        ),
        "sections": bars(
            frames["sections"],
            "relation",
            y,
            low,
            high,
            "series",
            controls=NULLS,
            horizontal=True,
            title="Analogies answered, by relation",
            y_title="accuracy@1",
        ),
    }
    if "published" in frames:
        figures["published"] = dots(
            frames["published"].query("weights == 'trained' or (space == 'R' and weights != 'rotated_basis')"),
            "rank_add",
            "analogy",
            "series",
            reference="published_rank",
            controls=("shuffled_recipe", "untrained"),
            log_x=True,
            hover=["predicted", "rank_mul", "rank_with_inputs"],
            title="The three published analogies",
            x_title="rank of the expected word",
        )
    return figures
