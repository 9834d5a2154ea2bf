"""Tasks that compare log-probabilities of texts, item by item: minimal pairs, multiple choice, last words.

Each function returns a frame with a row an item; what follows of many of them, with intervals and controls, is made of
such frames by :mod:`analyses.tasks.comparisons`. Items are read behind the tokenizer's beginning token, otherwise its
end-of-document token, so that the first token of a text counts, wherever a tokenizer has either. Their texts are plain
text, whatever they spell.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from reflowlens.arguments import integer
from reflowlens.errors import ReflowlensError, nearest
from reflowlens.models.base import HookedModel
from reflowlens.models.unwrapping import hooked_model
from reflowlens.prompts import group_names
from reflowlens.scoring.score import Scores, score

_PLAIN: dict[str, Any] = {"split_special_tokens": True}
NORMALISATIONS = ("none", "per_token", "per_byte", "unconditional")


def score_pairs(model: Any, pairs: Any, *, bos: bool | None = None, **options: Any) -> pd.DataFrame:
    """Which text of each minimal pair a model finds likelier (BLiMP: Warstadt et al., 2020).

    Args:
        model: a hooked model; what is attached to it acts.
        pairs: rows with ``good`` and ``bad``, two texts, and perhaps ``group``: a frame, a list of dicts, a
            ``datasets.Dataset``. BLiMP's own names (``sentence_good``, ``sentence_bad``, ``UID``) are read too.
        bos: read texts behind a beginning token; None: where the tokenizer has one, or an end-of-document token.
        options: ``batch``, ``memory`` and ``progress`` of :func:`reflowlens.scoring.score.score`.

    Returns:
        A row a pair: ``group`` ("all" without groups), ``good``, ``bad``, ``logprob_good`` and ``logprob_bad``,
        ``tokens_good`` and ``tokens_bad``; ``correct``, whether the good text has the larger log-probability, and
        ``correct_per_token``, whether it has the larger mean; ``shorter``, what the lengths alone say: 1 where the good
        text has fewer tokens, 0 where the bad one has, otherwise a half.

    Raises:
        ReflowlensError: a column or a text is missing, or nothing predicts a first token in which texts differ.

    Example: ``score_pairs(model, [{"good": "The cats run.", "bad": "The cats runs."}])``
    """
    model, frame = hooked_model(model), frame_of(pairs, "pairs", {"good": str, "bad": str}, _OF_BLIMP)
    begins = _reads_behind(model, bos)
    if not begins:
        _check_same_beginnings(model, frame)
    texts = [*frame["good"], *frame["bad"]]
    scores = score(model, texts, bos=begins, **_PLAIN, **options).texts
    good, bad = scores.iloc[: len(frame)], scores.iloc[len(frame) :].reset_index(drop=True)
    return frame[["group", "good", "bad"]].assign(
        logprob_good=good["logprob"],
        logprob_bad=bad["logprob"],
        tokens_good=good["tokens"],
        tokens_bad=bad["tokens"],
        correct=good["logprob"] > bad["logprob"],
        correct_per_token=good["mean"] > bad["mean"],
        shorter=0.5 + 0.5 * np.sign(bad["tokens"] - good["tokens"]),
    )


def score_choices(
    model: Any, questions: Any, *, separator: str = " ", without: str = "", bos: bool | None = None, **options: Any
) -> pd.DataFrame:
    """The log-probability of each answer that a question offers, behind the question and without it.

    Args:
        questions: rows with ``question``, ``choices`` (a list of texts), ``answer`` (the number of the right one, from
            0, or its text) and perhaps ``group``.
        separator: stands between question and choice, unless the choice begins, or the question ends, with a space. It
            is scored with the choice, as are spaces that the question ends with: a token of most tokenizers begins
            with them.
        without: what a choice is read behind for its unconditional log-probability: nothing but the beginning token, or
            a text such as ``"Answer:"``. NaN where there is neither.
        model, bos, options: as for :func:`score_pairs`.

    Returns:
        A row a question and choice: ``item`` (the question's number), ``group``, ``question``, ``choice``, ``right``,
        ``tokens``, ``bytes``, ``logprob`` behind the question and ``logprob_without``; and for each normalisation the
        ``score`` that choices are compared by (columns such as ``score_per_byte``) and the one that they have without
        the question (``score_without_per_byte``): ``none`` the log-probability, ``per_token`` and ``per_byte`` its
        mean, ``unconditional`` what the question adds to it (Brown et al., 2020).

    Raises:
        ReflowlensError: a column is missing, an answer is none of its choices, or a question offers fewer than two.

    Example: ``score_choices(model, [{"question": "The sky is", "choices": ["blue", "loud"], "answer": 0}])``
    """
    kinds: dict[str, type | tuple[type, ...]] = {"question": str, "choices": list, "answer": (int, str)}
    model, frame = hooked_model(model), frame_of(questions, "questions", kinds)
    begins = _reads_behind(model, bos)
    each = zip(frame["question"], frame["choices"], frame["answer"], frame["group"], strict=True)
    rows = [row for item, columns in enumerate(each) for row in _choices(item, *columns, separator=separator)]
    table = pd.DataFrame(rows)
    texts = table["text"].tolist()
    found = score(model, texts, given=table["prompt"].tolist(), bos=begins, **_PLAIN, **options).texts
    alone = pd.Series(np.nan, index=table.index)
    if begins or without:
        alone = score(model, texts, given=without or None, bos=begins, **_PLAIN, **options).texts["logprob"]
    table = table.drop(columns=["text", "prompt"]).assign(
        tokens=found["tokens"], bytes=found["bytes"], logprob=found["logprob"], logprob_without=alone
    )
    for name in NORMALISATIONS[:3]:
        units: Any = {"none": 1, "per_token": table["tokens"], "per_byte": table["bytes"]}[name]
        table[f"score_{name}"], table[f"score_without_{name}"] = table["logprob"] / units, alone / units
    return table.assign(score_unconditional=table["logprob"] - alone)


def score_last_words(model: Any, passages: Iterable[str], *, bos: bool | None = None, **options: Any) -> pd.DataFrame:
    """Whether all tokens of each passage's last word are the likeliest ones (LAMBADA: Paperno et al., 2016).

    A passage is read from as far back as the model's context allows.

    Args:
        passages: texts of several words; spaces at their ends are left out.
        model, bos, options: as for :func:`score_pairs`.

    Returns:
        A row a passage: ``passage``, ``word``, its ``tokens``, ``logprob``, and ``correct``.

    Raises:
        ReflowlensError: a passage has no word before its last, or there is none.

    Example: ``score_last_words(model, ["The cat sat on the mat"])["correct"].mean()``
    """
    model, texts = hooked_model(model), [passages] if isinstance(passages, str) else list(passages)
    if not texts:
        raise ReflowlensError("no passage to predict the last word of")
    cut = [_last_word(text) for text in texts]
    before, words = [prompt for prompt, _ in cut], [word for _, word in cut]
    begins = _reads_behind(model, bos)
    scores: Scores = score(model, words, given=before, bos=begins, window=model.cfg.n_ctx, **_PLAIN, **options)
    found = scores.texts
    return pd.DataFrame(
        {
            "passage": texts,
            "word": [word.strip() for word in words],
            "tokens": found["tokens"],
            "logprob": found["logprob"],
            "correct": found["likeliest"],
        }
    )


_OF_BLIMP = {"sentence_good": "good", "sentence_bad": "bad", "UID": "group"}


def frame_of(
    rows: Any, what: str, kinds: Mapping[str, type | tuple[type, ...]], other_names: Mapping[str, str] | None = None
) -> pd.DataFrame:
    """Rows as a frame with the columns that are needed, and ``group``, "all" where there is none.

    Raises:
        ReflowlensError: they are no rows, a column is missing, a value is of another kind or empty, or two groups are
            written alike.
    """
    if hasattr(rows, "to_pandas"):  # of the datasets package
        rows = rows.to_pandas()
    several = isinstance(rows, Sequence) and not isinstance(rows, str)
    if not isinstance(rows, pd.DataFrame) and not (several and all(isinstance(row, Mapping) for row in rows)):
        raise ReflowlensError(f"{what} are rows with {', '.join(kinds)}: a frame or a list of dicts, got {rows!r}")
    frame = pd.DataFrame(rows).rename(columns=dict(other_names or {})).reset_index(drop=True)
    if not len(frame):
        raise ReflowlensError(f"there are no {what}")
    for name, kind in kinds.items():
        if name not in frame:
            known = nearest(name, list(map(str, frame))) or f"; columns: {', '.join(map(str, frame))}"
            raise ReflowlensError(f"{what} need a column {name!r}{known}")
        frame[name] = [_plain(value) for value in frame[name]]
        for i, value in enumerate(frame[name]):
            if not isinstance(value, kind) or value in ("", []):
                raise ReflowlensError(f"{what}, row {i}: {name!r} is {value!r}")
    return frame.assign(group=group_names(frame["group"].tolist()) if "group" in frame else "all")


def _plain(value: Any) -> Any:
    """Lists and numbers of NumPy, as tables of files hold them, as Python's."""
    number = integer(value)
    return number if number is not None else list(value) if isinstance(value, np.ndarray | tuple) else value


def _reads_behind(model: HookedModel, bos: bool | None) -> bool:
    """Whether texts of a task are read behind a beginning token."""
    tokenizer = model.tokenizer
    known = (tokenizer.bos_token, tokenizer.named_bos, tokenizer.eot_token)
    return any(token is not None for token in known) if bos is None else bos


def _check_same_beginnings(model: HookedModel, frame: pd.DataFrame) -> None:
    for i, (good, bad) in enumerate(zip(frame["good"], frame["bad"], strict=True)):
        if model.tokenizer.encode(good)[:1] != model.tokenizer.encode(bad)[:1]:
            raise ReflowlensError(
                f"pairs, row {i}: texts begin with different tokens, which nothing predicts: bos=True reads them "
                "behind a beginning token"
            )


def _choices(
    item: int, question: str, choices: list[Any], answer: str | int, group: str, *, separator: str
) -> list[dict[str, Any]]:
    """What a question offers, a row a choice, and the text that is scored of each."""
    right = choices.index(answer) if isinstance(answer, str) and answer in choices else answer
    if len(choices) < 2 or not all(isinstance(choice, str) and choice for choice in choices):
        raise ReflowlensError(f"questions, row {item}: two texts to choose from are needed at least, got {choices!r}")
    if not isinstance(right, int) or not 0 <= right < len(choices):
        raise ReflowlensError(
            f"questions, row {item}: answer {answer!r} is none of the choices, nor a number from 0 to "
            f"{len(choices) - 1}"
        )
    prompt = question.rstrip(" ") or question
    is_spaced, spaces = question[-1].isspace(), question[len(prompt) :]
    return [
        {
            "item": item,
            "group": group,
            "question": question,
            "choice": choice,
            "right": i == right,
            "prompt": prompt,
            "text": spaces + choice if is_spaced or choice[0].isspace() else separator + choice,
        }
        for i, choice in enumerate(choices)
    ]


def _last_word(passage: Any) -> tuple[str, str]:
    if not isinstance(passage, str):
        raise ReflowlensError(f"a passage is a text, got {passage!r}")
    whole = passage.rstrip()
    start = len(whole) - len(whole.split()[-1]) if whole else 0
    if not whole[:start].strip():
        raise ReflowlensError(f"a passage needs a word before its last: {passage[:60]!r}")
    start -= whole[start - 1] == " "  # which begins the token of a word, as a line's end does not
    return whole[:start], whole[start:]
