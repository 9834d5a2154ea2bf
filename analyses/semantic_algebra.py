"""Experiment 5, Semantic Algebra: does a - b + c land on the word that completes the analogy?

Each analogy is a question to the rows of a matrix: of all candidate words, how near is the expected one to what a, b and
c ask for? The recipe R of the view and the embedding E = R B are asked the same questions, so that "the recipe carries
meaning" can be told from "the embedding does". Four nulls stand beside both: ``c_alone``, the nearest neighbour of c, the
shortcut that much of an analogy set rewards (Linzen 2016); ``a_plus_c``, which leaves b out; ``shuffled_recipe``, R with
the entries of each signal permuted over tokens; and ``untrained``, the same architecture at initialisation.
``rotated_basis`` is no null but a check: a rotation of the signals moves no cosine, hence no rank.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor
from tqdm import tqdm

from analyses.lexicon import Analogy, Lexicon, load_lexicon, read_questions_words, single_token_analogies
from analyses.neighbors import BLOCK, rank_among, shuffle_columns, unit_rows, word_tokens
from analyses.result import Result
from analyses.statistics import Verdict, bootstrap_band, bootstrap_interval, verdict
from reflowlens.checkpoints import model_hash
from reflowlens.errors import ReflowlensError
from reflowlens.figures import bars, dots
from reflowlens.models import build_model
from reflowlens.models.base import HookedModel
from reflowlens.signals import VIEWS, SignalView, ViewName, random_rotation, rotate, signal_view
from reflowlens.tokenizers import Tokenizer

MINIMUM_ANALOGIES = 10
MINIMUM_FOR_VERDICT = 30
QUICK_ANALOGIES = 100
EPSILON = 1e-3  # of 3CosMul, as Levy and Goldberg (2014) set it

RANKINGS = {
    "add": "3CosAdd on raw rows: candidates x by cos(x, r_a - r_b + r_c); candidates are the tokens that begin with a space "
    "and a letter; a, b and c excluded; ties count against the expected word",
    "add_unit": "as add, with rows scaled to length 1 before they are added (Levy and Goldberg 2014)",
    "mul": "as add, by 3CosMul (Levy and Goldberg 2014): s(x, a) s(x, c) / (s(x, b) + 0.001) with s = (1 + cos) / 2",
    "c_alone": "as add, by cos(x, r_c)",
    "a_plus_c": "as add, by cos(x, r_a + r_c)",
    "with_inputs": "as add, with a, b and c among the candidates",
    "all_tokens": "as add, over all real tokens; the vocabulary's padding rows are never candidates",
    "lexicon": "as add, over the words of the lexicon's categories and of the analogies asked",
}
MEASURES = {
    "accuracy_at_1": "share of questions whose expected word has rank 1",
    "accuracy_at_5": "share of questions whose expected word has rank 5 or better",
    "mean_reciprocal_rank": "mean over questions of 1 / rank of the expected word",
}
NULLS = ("c_alone", "a_plus_c", "shuffled_recipe", "untrained")
VARIANTS = tuple(ranking for ranking in RANKINGS if ranking not in ("add", *NULLS))
_UNITS_NOTE = (
    "Intervals and p-values take questions as the units; questions of one relation share words, so they are narrower and "
    "smaller than new relations and new words would give."
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
        seed: of draws, shuffles, rotation and bootstrap; the untrained model is built with ``seed + 1``.
        quick: draw at most 100 questions.

    Returns:
        A Result whose headline metrics are ``accuracy_at_1``, ``accuracy_at_5`` and ``mean_reciprocal_rank`` of R, the same
        with ``_E`` of E, ``recipe_minus_E`` (accuracy@1, paired) and ``rank_queen``, ``rank_ran``, ``rank_Beijing``.
        Frames: ``quadruples`` (a row a question, space and kind of weights, a column a ranking of `RANKINGS`),
        ``overall`` (a row a space and series: rankings, then other weights), ``sections`` (a row a relation and series) and
        ``published``.

    Raises:
        ReflowlensError: fewer than 10 questions consist of single tokens of the model's tokenizer.

    Example: ``semantic_algebra(model, analogies="questions-words.txt", max_per_section=600).frames["sections"]``
    """
    started = time.perf_counter()
    chosen = view if isinstance(view, SignalView) else signal_view(model, view, seed=seed)
    lexicon = lexicon or load_lexicon()
    given = _given(analogies, lexicon)
    asked, notes = usable_analogies(given, model.tokenizer)
    asked = _draw(asked, max_per_section, QUICK_ANALOGIES if quick else None, seed)
    published = single_token_analogies([item for item in lexicon.analogies if item.published_rank], model.tokenizer)[0]
    questions = [*asked, *published]
    ids = torch.tensor([[model.tokenizer.single_token(f" {word}") for word in item.words] for item in questions])
    candidates = candidate_sets(model.tokenizer, lexicon, ids)
    parts = []
    for weights, space, rows in tqdm(_spaces(model, chosen, seed), desc="algebra", disable=not progress):
        ranks: dict[str, Any] = analogy_ranks(rows, ids.to(rows.device), candidates.to(rows.device))
        ranks["predicted"] = [text[1:] for text in model.tokenizer.to_str_tokens(ranks["predicted"])]
        parts.append(_describe(questions).assign(space=space, weights=weights, **ranks))
    quadruples = pd.concat([part.iloc[: len(asked)] for part in parts], ignore_index=True)
    frames = {
        "quadruples": quadruples,
        "overall": _overall(quadruples, seed),
        "sections": _sections(quadruples, seed),
    }
    if published:
        ranked = pd.concat([part.iloc[len(asked) :] for part in parts], ignore_index=True)
        frames["published"] = _published(ranked, published)
    result = Result(
        name="semantic_algebra",
        title="Semantic Algebra",
        params={
            "model_hash": model_hash(model),
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
    result.seconds = time.perf_counter() - started
    return result


def analogy_ranks(
    rows: Float[Tensor, "token S"],
    ids: Int[Tensor, "quadruple 4"],
    candidates: Bool[Tensor, "token 3"],
) -> dict[str, NDArray[np.int64]]:
    """Rank of the expected word of each quadruple (a, b, c, expected) by every rule of `RANKINGS`.

    Args:
        rows: a space, a row a token.
        candidates: the sets words, all tokens and lexicon, as `candidate_sets` makes them.

    Returns:
        ``rank_<ranking>`` and ``predicted`` (the nearest word by ``add``), each [quadruple].

    Example: ``analogy_ranks(view.recipe[: view.n_tokens], ids, candidates)["rank_add"]``
    """
    words, places = ids[:, :3].unique(return_inverse=True)
    unit = unit_rows(rows)
    # Every rule combines the cosines of a, b and c, so one matrix product over the distinct words serves them all.
    cosines = unit[words] @ unit.T
    lengths = rows[words].to(unit).norm(dim=1)
    blocks = [
        _block_ranks(cosines[places[i : i + BLOCK]], lengths[places[i : i + BLOCK]], ids[i : i + BLOCK], candidates)
        for i in range(0, len(ids), BLOCK)
    ]
    return {name: torch.cat([block[name] for block in blocks]).cpu().numpy() for name in blocks[0]}


def _block_ranks(
    cosines: Float[Tensor, "quadruple 3 token"],
    lengths: Float[Tensor, "quadruple 3"],
    ids: Int[Tensor, "quadruple 4"],
    candidates: Bool[Tensor, "token 3"],
) -> dict[str, Tensor]:
    cos_a, cos_b, cos_c = cosines.unbind(1)
    length_a, length_b, length_c = lengths[:, :, None].unbind(1)
    inputs, expected = ids[:, :3], ids[:, 3]
    words = candidates[:, :1]
    # cos(x, r_a - r_b + r_c) up to a factor that is the same for all x; likewise the others.
    add = length_a * cos_a - length_b * cos_b + length_c * cos_c
    scores = {
        "add_unit": cos_a - cos_b + cos_c,
        "mul": (cos_a + 1) / 2 * (cos_c + 1) / 2 / ((cos_b + 1) / 2 + EPSILON),
        "c_alone": cos_c,
        "a_plus_c": length_a * cos_a + length_c * cos_c,
    }
    ranks = {f"rank_{name}": rank_among(score, expected, words, inputs)[:, 0] for name, score in scores.items()}
    among_words, among_tokens, among_lexicon = rank_among(add, expected, candidates, inputs).unbind(1)
    nearest = add.masked_fill(~words.T, -torch.inf).scatter(1, inputs, -torch.inf).argmax(dim=1)
    return {
        "rank_add": among_words,
        **ranks,
        "rank_with_inputs": rank_among(add, expected, words)[:, 0],
        "rank_all_tokens": among_tokens,
        "rank_lexicon": among_lexicon,
        "predicted": nearest,
    }


def candidate_sets(tokenizer: Tokenizer, lexicon: Lexicon, ids: Int[Tensor, "quadruple 4"]) -> Bool[Tensor, "token 3"]:
    """Which real tokens are words (a space, then a letter), which are tokens (all), which are the lexicon's."""
    listed = {f" {word}" for words in lexicon.categories.values() for word in words}
    candidates = torch.zeros(tokenizer.n_vocab, 3, dtype=torch.bool)
    candidates[word_tokens(tokenizer), 0] = True
    candidates[:, 1] = True
    candidates[[tokenizer.single_token(word) for word in listed if tokenizer.is_single_token(word)], 2] = True
    candidates[ids.flatten(), 2] = True
    return candidates


def usable_analogies(analogies: Sequence[Analogy], tokenizer: Tokenizer) -> tuple[list[Analogy], list[str]]:
    """The analogies that can be asked, and notes on the others.

    Four single tokens are needed, and an expected word that is not among a, b and c, which are excluded as answers.
    Raises ReflowlensError if fewer than 10 are left.
    """
    kept, skipped = single_token_analogies(analogies, tokenizer)
    trivial = [item for item in kept if item.expected in (item.a, item.b, item.c)]
    kept = [item for item in kept if item not in trivial] if trivial else kept
    notes = [
        f"{len(reasons)} of {len(analogies)} analogies skipped, {why}: {'; '.join(map(str, reasons[:5]))}"
        for why, reasons in (("not single tokens", skipped), ("the answer is one of the inputs", trivial))
        if reasons
    ]
    if len(kept) < MINIMUM_ANALOGIES:
        raise ReflowlensError(
            f"semantic algebra needs at least {MINIMUM_ANALOGIES} analogies of single tokens of {tokenizer.name!r}, "
            f"got {len(kept)}" + "".join(f" ({note})" for note in notes)
        )
    return kept, notes


def carries_analogies(
    hits: NDArray[np.bool_], interval: tuple[float, float], nulls: dict[str, NDArray[np.bool_]]
) -> Verdict:
    """Claim: the space carries analogies, that is, more questions are answered than by any null of the same space.

    Supported if the interval of accuracy@1 lies above the best null's accuracy and the paired test against every null has
    p < 0.05 (the largest p decides, so none needs adjusting); underpowered below 30 questions.

    Args:
        hits: whether each question is answered, [quadruple].
        nulls: the same by each of `NULLS`.
    """
    p = max(paired_hits_pvalue(hits, null) for null in nulls.values())
    best = max(float(null.mean()) for null in nulls.values())
    return verdict(interval, best, p, minimum_units=MINIMUM_FOR_VERDICT, units=len(hits))


def paired_hits_pvalue(hits: NDArray[np.bool_], null: NDArray[np.bool_]) -> float:
    """One-sided exact sign-flip p of more hits than the null's on the same questions (McNemar's exact test).

    Only questions that one of the two answers have a sign to flip, and all their differences are of size 1, which makes the
    sign-flip distribution binomial.
    """
    wins, losses = np.count_nonzero(hits & ~null), np.count_nonzero(null & ~hits)
    return float(stats.binomtest(wins, wins + losses, alternative="greater").pvalue) if wins + losses else 1.0


def _given(analogies: Sequence[Analogy] | str | Path | None, lexicon: Lexicon) -> Sequence[Analogy]:
    if analogies is None:
        return lexicon.analogies
    return read_questions_words(analogies) if isinstance(analogies, str | Path) else list(analogies)


def _draw(asked: list[Analogy], per_section: int | None, total: int | None, seed: int) -> list[Analogy]:
    """A random subset within both limits, in the order given."""
    shuffled = pd.Series([item.relation for item in asked]).sample(frac=1, random_state=seed)
    if per_section is not None:
        shuffled = shuffled[shuffled.groupby(shuffled).cumcount() < per_section]
    return [asked[i] for i in sorted(shuffled.index[:total])]


def _spaces(model: HookedModel, view: SignalView, seed: int) -> Iterator[tuple[str, str, Float[Tensor, "token S"]]]:
    """Kind of weights, space and its rows, padding left out."""
    yield from _both("trained", view)
    shuffled = shuffle_columns(view.recipe[: view.n_tokens], seed)
    yield from _both("shuffled_recipe", dataclasses.replace(view, recipe=shuffled))
    fresh = build_model(model.cfg, seed=seed + 1, device=model.cfg.device)
    name = next((name for name in VIEWS if name == view.name), None)
    yield from _both("untrained", signal_view(fresh, name, seed=seed))
    rotated = rotate(view, random_rotation(view.n_signals, seed))
    yield "rotated_basis", "R", rotated.recipe[: view.n_tokens]


def _both(weights: str, view: SignalView) -> Iterator[tuple[str, str, Float[Tensor, "token S"]]]:
    recipe = view.recipe[: view.n_tokens]
    yield weights, "R", recipe
    if view.name != "identity":
        yield weights, "E", recipe @ view.basis


def _describe(questions: Sequence[Analogy]) -> pd.DataFrame:
    fields = ("relation", "a", "b", "c", "expected")
    return pd.DataFrame({name: [getattr(item, name) for item in questions] for name in fields})


def _published(ranked: pd.DataFrame, published: Sequence[Analogy]) -> pd.DataFrame:
    ranked.insert(0, "analogy", ranked["a"] + " - " + ranked["b"] + " + " + ranked["c"] + " = " + ranked["expected"])
    series = ranked["space"].where(ranked["weights"] == "trained", ranked["weights"])
    ranks = [float(item.published_rank or np.nan) for item in published]
    return ranked.assign(series=series, published_rank=np.tile(ranks, len(ranked) // len(published)))


def _answers(frame: pd.DataFrame, space: str) -> dict[str, NDArray[np.int64]]:
    """Ranks of one space, [question] each: by every ranking, then by ``add`` with other than the trained weights."""
    by_weights = dict(list(frame[frame["space"] == space].groupby("weights", sort=False)))
    trained = by_weights.pop("trained")
    answers = {ranking: trained[f"rank_{ranking}"] for ranking in RANKINGS}
    answers |= {weights: rows["rank_add"] for weights, rows in by_weights.items()}
    return {name: ranks.to_numpy() for name, ranks in answers.items()}


def _measures(ranks: NDArray[np.int64]) -> NDArray[np.float64]:
    """`MEASURES` of each question, [question, 3]."""
    return np.stack([ranks == 1, ranks <= 5, 1 / ranks], axis=1).astype(float)


def _summary(ranks: NDArray[np.int64], seed: int) -> dict[str, float]:
    """Means over questions with 95% intervals; a single question has none."""
    values = _measures(ranks)
    low, high = bootstrap_band(values, seed=seed) if len(values) > 1 else (np.full(3, np.nan), np.full(3, np.nan))
    row: dict[str, float] = {"n": len(values)}
    for i, measure in enumerate(MEASURES):
        row |= {measure: values[:, i].mean(), f"{measure}_low": low[i], f"{measure}_high": high[i]}
    return row


def _overall(quadruples: pd.DataFrame, seed: int) -> pd.DataFrame:
    """A row a space and series; ``p`` is that of the space's ``add`` answering more questions than this series."""
    rows = []
    for space in quadruples["space"].unique():
        answers = _answers(quadruples, space)
        for name, ranks in answers.items():
            p = paired_hits_pvalue(answers["add"] == 1, ranks == 1)
            rows.append({"space": space, "series": name} | _summary(ranks, seed) | {"p": p})
    return pd.DataFrame(rows)


def _sections(quadruples: pd.DataFrame, seed: int) -> pd.DataFrame:
    """A row a relation and series: both spaces by ``add``, and the nulls of R."""
    rows = []
    for relation, part in quadruples.groupby("relation", sort=False):
        series = {space: _answers(part, space)["add"] for space in part["space"].unique()}
        series |= {name: ranks for name, ranks in _answers(part, "R").items() if name in NULLS}
        rows += [{"relation": relation, "series": name} | _summary(ranks, seed) for name, ranks in series.items()]
    return pd.DataFrame(rows)


def _add_metrics(result: Result, seed: int) -> None:
    quadruples = result.frames["quadruples"]
    answers = {space: _answers(quadruples, space) for space in quadruples["space"].unique()}
    for space in answers:
        _add_space(result, space, answers)
    difference = answers["R"]["add"] - answers["R"]["rotated_basis"]
    result.metrics["rotated_basis_rank_difference"] = float(np.abs(difference).max())
    result.definitions["rotated_basis_rank_difference"] = (
        "largest change of a rank by add when the signals of R are rotated at random: 0 but for words whose cosines differ "
        "by less than rounding"
    )
    if "E" in answers:
        _add_comparison(result, answers["R"]["add"] == 1, answers["E"]["add"] == 1, seed)
    else:
        result.notes.append("the identity view's recipe is E itself: R and E are one space and are not compared")
    if "published" in result.frames:
        _add_published(result)


def _add_space(result: Result, space: str, answers: dict[str, dict[str, NDArray[np.int64]]]) -> None:
    quadruples, overall = result.frames["quadruples"], result.frames["overall"].set_index(["space", "series"])
    suffix = "" if space == "R" else f"_{space}"
    controls = _controls(space, answers)

    def add(metric: str, measure: str, ranking: str) -> None:
        row = overall.loc[(space, ranking)]
        result.metrics[metric] = row[measure]
        result.intervals[metric] = (row[f"{measure}_low"], row[f"{measure}_high"])
        result.definitions[metric] = f"{MEASURES[measure]}, in {space}; ranks {RANKINGS[ranking]}"

    for i, measure in enumerate(MEASURES):
        add(measure + suffix, measure, "add")
        result.controls[measure + suffix] = {n: float(_measures(r)[:, i].mean()) for n, r in controls.items()}
    for ranking in VARIANTS:
        metric = f"accuracy_at_1_{ranking}{suffix}"
        add(metric, "accuracy_at_1", ranking)
        null_rows = quadruples[(quadruples["space"] == space) & quadruples["weights"].isin(NULLS)]
        hits = (null_rows[f"rank_{ranking}"] == 1).groupby(null_rows["weights"]).mean()
        result.controls[metric] = {str(name): float(hit) for name, hit in hits.items()}
    result.verdicts["accuracy_at_1" + suffix] = carries_analogies(
        answers[space]["add"] == 1,
        result.intervals["accuracy_at_1" + suffix],
        {name: answers[space][name] == 1 for name in NULLS},
    )


def _controls(space: str, answers: dict[str, dict[str, NDArray[np.int64]]]) -> dict[str, NDArray[np.int64]]:
    """What stands beside a space's ``add``: its nulls, its rotation where it was rotated, and the other space."""
    own = {name: answers[space][name] for name in (*NULLS, "rotated_basis") if name in answers[space]}
    return own | {other: answers[other]["add"] for other in answers if other != space}


def _add_comparison(result: Result, hits: NDArray[np.bool_], other: NDArray[np.bool_], seed: int) -> None:
    """Claim: R is a better semantic space than E, that is, accuracy@1 of R minus that of E, paired, is above 0."""
    difference = hits.astype(float) - other
    interval = bootstrap_interval(difference, seed=seed)
    p = paired_hits_pvalue(hits, other)
    result.metrics["recipe_minus_E"] = float(difference.mean())
    result.intervals["recipe_minus_E"] = interval
    result.controls["recipe_minus_E"] = {"no_difference": 0.0}
    result.definitions["recipe_minus_E"] = "accuracy_at_1 of R minus that of E, paired over questions"
    result.verdicts["recipe_minus_E"] = verdict(interval, 0.0, p, minimum_units=MINIMUM_FOR_VERDICT, units=len(hits))


def _add_published(result: Result) -> None:
    """``rank_<expected>`` of each published analogy; of two with the same expected word the first."""
    frame = result.frames["published"]
    answers = {space: _answers(frame, space) for space in frame["space"].unique()}
    for i, row in frame[frame["series"] == "R"].drop_duplicates("expected").iterrows():
        metric = f"rank_{row['expected']}"
        result.metrics[metric] = float(row["rank_add"])
        result.published[metric] = row["published_rank"]
        result.controls[metric] = {name: float(ranks[i]) for name, ranks in _controls("R", answers).items()}
        result.definitions[metric] = f"rank of the answer to {row['analogy']} in R; ranks {RANKINGS['add']}"


def _figures(frames: dict[str, pd.DataFrame]) -> dict[str, go.Figure]:
    accuracy = ["accuracy_at_1", "accuracy_at_1_low", "accuracy_at_1_high"]
    overall, sections = frames["overall"], frames["sections"]
    figures = {
        "accuracy": bars(overall, "series", *accuracy, "space", y_title="accuracy@1"),
        "sections": bars(
            sections, "relation", *accuracy, "series", controls=NULLS, horizontal=True, y_title="accuracy@1"
        ),
    }
    if "published" in frames:
        published = frames["published"].query("weights == 'trained' or (space == 'R' and weights != 'rotated_basis')")
        controls = [name for name in NULLS if name in set(published["series"])]
        figures["published"] = dots(
            published,
            "rank_add",
            "analogy",
            "series",
            reference="published_rank",
            controls=controls,
            log_x=True,
            hover=["predicted", "rank_mul", "rank_with_inputs"],
            x_title="rank of the expected word",
        )
    return figures
