"""Tasks that compare log-probabilities of texts: minimal pairs, multiple choice, last words.

Each is judged beside what would answer it without knowing the task: the lengths of the texts, the choices without their
question, the last sentence without the passage. Intervals of accuracies are exact (Clopper and Pearson, 1934).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from analyses.claims import bound_of
from analyses.result.finding import Finding
from analyses.result.model_identity import hash_of
from analyses.result.result import Result
from analyses.statistics.intervals import bootstrap_interval, rate_interval
from analyses.statistics.verdicts import verdict
from analyses.tasks.answered import MINIMUM_PROMPTS
from reflowlens.errors import ReflowlensError
from reflowlens.figures.builders import bars
from reflowlens.models.unwrapping import hooked_model
from reflowlens.scoring.items import NORMALISATIONS, score_choices, score_last_words, score_pairs

_SCORINGS = {"sum": "correct", "per_token": "correct_per_token"}
_SENTENCE_ENDS = re.compile(r"(?<=[.!?])[\"'”’)]*\s+")


def minimal_pairs(model: Any, pairs: Any, *, bos: bool | None = None, seed: int = 0, **options: Any) -> Result:
    """How often the acceptable text of a minimal pair is the likelier one (BLiMP: Warstadt et al., 2020).

    Args:
        model, pairs, bos, options: as for :func:`reflowlens.scoring.items.score_pairs`.
        seed: of the resamples of groups.

    Returns:
        A Result with metrics ``accuracy`` (whole texts), ``accuracy_per_token`` (means) and, of several groups,
        ``mean_of_groups``, which weighs them alike, as BLiMP's overall score does. Controls: ``chance``, and
        ``shorter``, the accuracy of choosing the text with fewer tokens, which tells what lengths give away. Frames
        ``pairs`` and ``groups`` (a row a group and scoring: ``items``, ``accuracy``, ``low``, ``high``, ``shorter``);
        figure ``groups``.

    Raises:
        ReflowlensError: as for `score_pairs`, or there are fewer than two pairs.

    Example: ``minimal_pairs(model, pairs).frames["groups"]``
    """
    hooked = hooked_model(model)
    frame = score_pairs(hooked, pairs, bos=bos, **options)
    _check_several(frame, "pairs")
    controls = {"chance": 0.5, "shorter": frame["shorter"].mean()}
    definitions = {
        "accuracy": "share of pairs whose good text has the larger log-probability",
        "accuracy_per_token": "share of pairs whose good text has the larger mean log-probability of a token",
    }
    findings = {
        metric: _judged(frame[column], "minimal_pairs", metric, controls, definitions[metric])
        for metric, column in zip(definitions, _SCORINGS.values(), strict=True)
    }
    groups = _pair_groups(frame)
    means = groups[groups["scoring"] == "sum"]["accuracy"].to_numpy()
    if len(means) > 1:
        findings["mean_of_groups"] = Finding(
            means.mean(),
            bootstrap_interval(means, seed=seed),
            {"chance": 0.5},
            definition="mean over groups of the accuracy of whole texts; the interval is over groups",
        )
    figure = bars(
        groups, "group", "accuracy", "low", "high", "scoring", horizontal=True, title="Minimal pairs by group"
    )
    return Result(
        "minimal_pairs",
        "Minimal pairs",
        {"pairs": len(frame), "bos": bos, "seed": seed, "model_hash": hash_of(hooked)},
        findings=findings,
        frames={"pairs": frame, "groups": groups},
        figures={"groups": figure},
    )


def multiple_choice(
    model: Any, questions: Any, *, separator: str = " ", without: str = "", bos: bool | None = None, **options: Any
) -> Result:
    """How often the right answer of several has the largest log-probability, under four normalisations.

    Args:
        model, questions, separator, without, bos, options: as for :func:`reflowlens.scoring.items.score_choices`.

    Returns:
        A Result with metrics ``accuracy_none``, ``accuracy_per_token``, ``accuracy_per_byte`` (where bytes are known)
        and ``accuracy_unconditional`` (where something predicts a choice without its question). Controls: ``chance``;
        ``without_question``, the accuracy of the same scores of the choices alone; ``most_frequent_place``, that of
        always choosing the place (first, second, ...) that is right most often. Frames ``choices`` (see
        `score_choices`), ``questions`` (a row each: ``item``, ``group``, and by normalisation whether its choice is
        right) and ``groups``; figure ``groups``.

    Raises:
        ReflowlensError: as for `score_choices`, or there are fewer than two questions.

    Example: ``multiple_choice(model, questions).metrics["accuracy_per_byte"]``
    """
    hooked = hooked_model(model)
    choices = score_choices(hooked, questions, separator=separator, without=without, bos=bos, **options)
    by_item = choices.groupby("item", sort=True)
    _check_several(by_item, "questions")
    numbers = choices["right"].groupby(choices["item"]).apply(np.argmax)
    chance, most_frequent = float((1 / by_item.size()).mean()), float(numbers.value_counts(normalize=True).iloc[0])
    table = by_item[["group"]].first().reset_index()
    findings = {}
    names = [name for name in NORMALISATIONS if choices[f"score_{name}"].notna().all()]
    for name in names:
        table[name] = _chosen(choices, f"score_{name}")
        controls = {"chance": chance, "most_frequent_place": most_frequent}
        if (alone := f"score_without_{name}") in choices and choices[alone].notna().all():
            controls["without_question"] = float(np.mean(_chosen(choices, alone)))
        definition = f"share of questions whose right choice has the largest score: {_SCORES[name]}"
        findings[f"accuracy_{name}"] = _judged(table[name], "multiple_choice", f"accuracy_{name}", controls, definition)
    groups = pd.concat([_rates(table, name, {"normalisation": name}) for name in names], ignore_index=True)
    figure = bars(
        groups, "group", "accuracy", "low", "high", "normalisation", horizontal=True, title="Multiple choice by group"
    )
    params = {"questions": len(table), "separator": separator, "without": without, "bos": bos}
    skipped = [f"{name} is left out: {why}" for name, why in _NEEDS.items() if name not in names]
    return Result(
        "multiple_choice",
        "Multiple choice",
        {**params, "model_hash": hash_of(hooked)},
        findings=findings,
        frames={"choices": choices, "questions": table, "groups": groups},
        figures={"groups": figure},
        notes=skipped,
    )


def last_words(
    model: Any, passages: Iterable[str], *, bos: bool | None = None, seed: int = 0, **options: Any
) -> Result:
    """How often the last word of a passage is the likeliest one, token by token (LAMBADA: Paperno et al., 2016).

    Args:
        model, passages, bos, options: as for :func:`reflowlens.scoring.items.score_last_words`.
        seed: of the resamples.

    Returns:
        A Result with metrics ``accuracy`` and ``logprob`` (of a word, in nats). The control ``last_sentence`` has read
        no more than the sentence that the word ends: LAMBADA's words are told by the passage before it. Frame
        ``passages``, with ``correct_last_sentence``.

    Raises:
        ReflowlensError: as for `score_last_words`, or there are fewer than two passages.

    Example: ``last_words(model, passages).metrics["accuracy"]``
    """
    hooked, texts = hooked_model(model), [passages] if isinstance(passages, str) else list(passages)
    frame = score_last_words(hooked, texts, bos=bos, **options)
    _check_several(frame, "passages")
    short = score_last_words(hooked, [last_sentence(text) for text in texts], bos=bos, **options)
    frame["correct_last_sentence"] = short["correct"]
    accuracy = Finding(
        frame["correct"].mean(),
        rate_interval(frame["correct"]),
        {"last_sentence": short["correct"].mean()},
        definition="share of passages of whose last word each token is the likeliest",
    )
    logprob = Finding(
        frame["logprob"].mean(),
        bootstrap_interval(frame["logprob"], seed=seed),
        {"last_sentence": short["logprob"].mean()},
        definition="log-probability of the last word in nats, mean over passages",
    )
    return Result(
        "last_words",
        "Last words",
        {"passages": len(frame), "bos": bos, "seed": seed, "model_hash": hash_of(hooked)},
        findings={"accuracy": accuracy, "logprob": logprob},
        frames={"passages": frame},
    )


def last_sentence(passage: str) -> str:
    """The last sentence of a passage, with the one before it where it is a single word.

    >>> last_sentence("He was late. She gave him the book")
    'She gave him the book'
    """
    starts = [match.end() for match in _SENTENCE_ENDS.finditer(passage.rstrip())]
    sentences = [passage[start:] for start in (0, *starts)]
    return next(text for text in [*reversed(sentences), passage] if len(text.split()) > 1 or text is passage)


_SCORES = {
    "none": "its log-probability behind the question",
    "per_token": "the mean of a token",
    "per_byte": "the mean of a byte",
    "unconditional": "what the question adds to its log-probability",
}


_NEEDS = {
    "per_byte": "tokens are not made of the bytes of the texts",
    "unconditional": "the tokenizer has no token that begins a text; without='...' says what a choice is read behind",
}


def _judged(correct: pd.Series, measure: str, metric: str, controls: Mapping[str, float], definition: str) -> Finding:
    """An accuracy, supported where it exceeds every control by what `analyses.claims` asks for."""
    hits, highest = correct.astype(float), max(controls.values())
    interval, bound = rate_interval(hits), bound_of(measure, metric, controls)
    p = stats.binomtest(int(hits.sum()), len(hits), highest, alternative="greater").pvalue
    judgement = verdict(interval, bound, float(p), minimum_units=MINIMUM_PROMPTS, units=len(hits))
    return Finding(hits.mean(), interval, dict(controls), judgement, definition)


def _pair_groups(frame: pd.DataFrame) -> pd.DataFrame:
    parts = [_rates(frame, column, {"scoring": scoring}) for scoring, column in _SCORINGS.items()]
    shorter = frame.groupby("group", sort=False)["shorter"].mean()
    groups = pd.concat(parts, ignore_index=True)
    return groups.assign(shorter=groups["group"].map(shorter))


def _rates(frame: pd.DataFrame, column: str, others: Mapping[str, str]) -> pd.DataFrame:
    """The accuracy of each group with its interval, which of one item says nothing."""
    rows = []
    for group, correct in frame.groupby("group", sort=False)[column]:
        low, high = rate_interval(correct.astype(float)) if len(correct) > 1 else (0.0, 1.0)
        rows.append({"group": group, **others, "items": len(correct), "accuracy": correct.mean(), "low": low})
        rows[-1]["high"] = high
    return pd.DataFrame(rows)


def _chosen(choices: pd.DataFrame, score: str) -> NDArray[np.bool_]:
    """Whether the choice with the largest score is the right one, by item."""
    return choices.loc[choices.groupby("item")[score].idxmax(), "right"].to_numpy(dtype=bool)


def _check_several(items: Any, what: str) -> None:
    if len(items) < 2:
        raise ReflowlensError(f"an interval needs two {what} at least, got {len(items)}")
