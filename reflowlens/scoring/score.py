"""Log-probabilities of texts, token by token.

    scores = rl.score(model, texts)
    scores.texts        a row a text: tokens, logprob, mean, perplexity, bytes, bits_per_byte, likeliest
    scores.tokens       a row a token: text, position, token, id, logprob, likeliest

Texts of like length are read together, and logits are formed of the scored positions alone, some hundreds at a time:
memory is that of a batch's activations. What is attached to the model (interventions, edits, dictionaries) acts.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from numpy.typing import NDArray

from reflowlens.arguments import whole_number
from reflowlens.errors import ReflowlensError
from reflowlens.interventions.passes import check_rows_are_free, is_intervened
from reflowlens.models.base import HookedModel
from reflowlens.models.text import TextInput, read_once
from reflowlens.models.threads import reading
from reflowlens.models.unwrapping import guarded, hooked_model
from reflowlens.progress import bar
from reflowlens.scoring.batches import by_length
from reflowlens.scoring.rows import Row, prompts_given, rows_of, token_sizes, token_text
from reflowlens.scoring.windows import Predicted, Window, n_scored, predictions, sliding_windows, whole_window


@dataclass(frozen=True, eq=False)
class Scores:
    """What :func:`score` returns: the log-probabilities of some texts in nats.

    Attributes:
        logprobs: of each text, by token; NaN of a first token that nothing predicts.
        likeliest: of each text by token, whether no other token was likelier.

    Example: ``rl.score(model, ["The king", "The queen"]).texts["logprob"]``
    """

    logprobs: list[Float[np.ndarray, " _token"]]
    likeliest: list[Bool[np.ndarray, " _token"]]
    _rows: list[Row] = field(repr=False)
    _prompts: list[str] = field(repr=False)
    _model: HookedModel = field(repr=False)

    def __repr__(self) -> str:
        return f"Scores({len(self):,} texts, {sum(map(len, self.logprobs)):,} tokens)"

    def __len__(self) -> int:
        return len(self.logprobs)

    @cached_property
    def tokens(self) -> pd.DataFrame:
        """A row a token of a text: ``text`` (its number), ``position`` in what was read, ``token``, ``id``,
        ``logprob`` (NaN of a first token that nothing predicts) and ``likeliest``."""
        ids = np.concatenate([row.ids[row.own :] for row in self._rows])
        strings = {token: token_text(self._model.tokenizer, token) for token in np.unique(ids).tolist()}
        lengths = [len(row.ids) - row.own for row in self._rows]
        return pd.DataFrame(
            {
                "text": np.repeat(np.arange(len(self)), lengths),
                "position": np.concatenate([np.arange(row.own, len(row.ids)) for row in self._rows]),
                "token": [strings[token] for token in ids.tolist()],
                "id": ids,
                "logprob": np.concatenate(self.logprobs),
                "likeliest": np.concatenate(self.likeliest),
            }
        )

    @cached_property
    def texts(self) -> pd.DataFrame:
        """A row a text: ``text``, ``given`` (where there were prompts), ``tokens`` that were scored, their ``logprob``
        in all, its ``mean`` a token, ``perplexity`` = exp(−mean), ``bytes`` of them and ``bits_per_byte`` (NaN where
        tokens are not made of the text's bytes), and ``likeliest``, whether each token was the likeliest."""
        tokenizer = self._model.tokenizer
        n = np.array([len(row.ids) - row.scored for row in self._rows])
        logprob = np.array([np.nansum(values) for values in self.logprobs])
        sizes = [token_sizes(tokenizer, *each) for each in zip(self._rows, self._prompts, strict=True)]
        scored = zip(self._rows, sizes, strict=True)
        bytes_ = np.array([math.nan if size is None else size[row.scored :].sum() for row, size in scored], dtype=float)
        columns: dict[str, Any] = {"text": [self._text(row) for row in self._rows]}
        if any(self._prompts):
            columns["given"] = self._prompts
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            columns |= {
                "tokens": n,
                "logprob": logprob,
                "mean": logprob / n,
                "perplexity": np.exp(-logprob / n),
                "bytes": bytes_,
                "bits_per_byte": -logprob / math.log(2) / bytes_,
                "likeliest": [bool(values[-count:].all()) for values, count in zip(self.likeliest, n, strict=True)],
            }
        return pd.DataFrame(columns)

    def _text(self, row: Row) -> str:
        if row.text is not None:
            return row.text
        return "".join(token_text(self._model.tokenizer, token) for token in row.ids.tolist())

    def _repr_html_(self) -> str:
        from reflowlens.notebook.html import table, titled

        shown = self.texts.head(20)
        return titled(
            repr(self), "", table([str(name) for name in shown], [tuple(row) for row in shown.itertuples(index=False)])
        )


@guarded(reading, "batch, memory, or the window that is read at once")
def score(
    model: Any,
    texts: TextInput,
    *,
    given: str | Iterable[str | None] | None = None,
    bos: bool | None = None,
    split_special_tokens: bool = False,
    window: int | None = None,
    stride: int | None = None,
    batch: int | None = None,
    memory: float | None = None,
    progress: bool | None = None,
) -> Scores:
    """The log-probability of each token of some texts, each read as if alone.

    A token's log-probability is ``log softmax(logits)[token]`` at the position before it. The first token has none,
    unless the text is read behind a beginning token or a prompt.

    Args:
        model: a hooked model; what is attached to it acts. Inside ``rl.intervene`` texts of one length are read
            together, so that positions and ``"last"`` are each text's own (a resampling ablation draws anew in each
            batch).
        texts: a text, a list of texts, a list of rows of token ids, or tokens [text, pos], a tensor or an array.
        given: prompts, one for all texts or one each, None for none: a text is scored as what continues its prompt.
            Both are cut into tokens as one, so that the text begins where it does in what a model reads.
        bos: read each text behind the tokenizer's ``bos_token``, or its end-of-document token if it has no other. None:
            as the model was trained (see ``model.to_tokens``).
        split_special_tokens: read ``<|endoftext|>`` in a text as the characters that it is, as texts of others should
            be.
        window: read longer texts than this in windows of so many tokens, each token once
            (:func:`reflowlens.scoring.windows.sliding_windows`); by default a text longer than ``n_ctx`` is an error.
        stride: tokens by which a window moves on; default: the window.
        batch: texts, or windows, that are read at once; default: as many as ``memory`` holds.
        memory: bytes that a batch may take; default: half of a GPU's free memory, on a CPU 32 MiB but 1,024 tokens at
            least.
        progress: show a bar; by default on a terminal.

    Returns:
        :class:`Scores`, in the order of the texts.

    Raises:
        ReflowlensError: there is no text, one has no token that anything predicts or does not fit the context, a token
            spans the end of its prompt, or a log-probability is NaN.
        OutOfMemory: a text does not fit; a ReflowlensError that says what to lower.

    Example:
        >>> import reflowlens as rl
        >>> model = rl.load_model("reflow-nano")
        >>> rl.score(model, [" king", " of"], given="The").texts["logprob"].round(2).tolist()
        [-8.63, -8.96]
    """
    hooked, texts = hooked_model(model), read_once(texts)
    given = prompts_given(given)
    rows = rows_of(hooked, texts, given, bos, split_special_tokens)
    found = predicted_rows(
        hooked, rows, window=window, stride=stride, batch=batch, memory=memory, progress=progress, desc="scoring"
    )
    prompts = [given or ""] * len(rows) if given is None or isinstance(given, str) else [*given]
    gaps = [row.scored - row.own for row in rows]
    logprobs = [np.concatenate([np.full(gap, np.nan), one.logprob]) for gap, one in zip(gaps, found, strict=True)]
    likeliest = [np.concatenate([np.zeros(gap, bool), one.likeliest]) for gap, one in zip(gaps, found, strict=True)]
    return Scores(logprobs, likeliest, rows, prompts, hooked)


def predicted_rows(
    model: HookedModel,
    rows: Sequence[Row],
    *,
    window: int | None = None,
    stride: int | None = None,
    batch: int | None = None,
    memory: float | None = None,
    progress: bool | None = None,
    desc: str = "",
) -> list[Predicted]:
    """What a model predicts of each row's scored tokens; arguments as for :func:`score`."""
    check_rows_are_free(model)
    batch = None if batch is None else whole_number(batch, "batch", 1)
    windows = [each for i, row in enumerate(rows) for each in _windows(model, i, row, window, stride)]
    ids = [row.ids for row in rows]
    logprob = [np.full(len(row.ids), np.nan) for row in rows]
    likeliest = [np.zeros(len(row.ids), dtype=bool) for row in rows]
    batches = by_length(
        [each.end - each.first for each in windows],
        lambda chosen: predictions(model, ids, [windows[i] for i in chosen]),
        next(model.parameters()).device,
        batch=batch,
        memory=memory,
        alike=is_intervened(model),
    )
    show = sys.stderr.isatty() if progress is None else progress
    with bar(show=show, total=sum(map(n_scored, windows)), desc=desc, unit="token", unit_scale=True) as shown:
        for chosen, made in batches:
            for i, one in zip(chosen, made, strict=True):
                row, at = windows[i].row, slice(windows[i].scored, windows[i].last + 1)
                logprob[row][at], likeliest[row][at] = one
            shown.update(sum(n_scored(windows[i]) for i in chosen))
    found = [Predicted(logprob[i][row.scored :], likeliest[i][row.scored :]) for i, row in enumerate(rows)]
    for i, one in enumerate(found):
        _check_known(one.logprob, i)
    return found


def _windows(model: HookedModel, i: int, row: Row, window: int | None, stride: int | None) -> list[Window]:
    """What is read of a row: all of it, or windows that score something."""
    n, n_ctx = len(row.ids), model.cfg.n_ctx
    size = n_ctx if window is None else whole_number(window, "window", 1)
    step = size if stride is None else whole_number(stride, "stride", 1)
    if size > n_ctx:
        raise ReflowlensError(f"window={size} is longer than the model's n_ctx={n_ctx}")
    if step > size:
        raise ReflowlensError(f"stride={step} would leave tokens out between windows of {size}")
    if n <= size:
        return [whole_window(i, n, row.scored)]
    if window is None:
        raise ReflowlensError(
            f"text {i} has {n} tokens, but this model reads at most n_ctx={n_ctx}: window={n_ctx} reads it in windows"
        )
    asked = (each._replace(scored=max(each.scored, row.scored)) for each in sliding_windows(i, n, size, step))
    return [each for each in asked if n_scored(each) > 0]


def _check_known(logprobs: NDArray[np.float64], i: int) -> None:
    if np.isnan(logprobs).any():
        raise ReflowlensError(
            f"a log-probability of text {i} is NaN: the weights, or an intervention, are not finite, or the logits "
            "overflow their type"
        )
