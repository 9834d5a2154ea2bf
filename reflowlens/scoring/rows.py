"""Texts as rows of tokens, behind a beginning or behind what they continue."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.models.text import is_row_of_ids
from reflowlens.tokenizers.base import Tokenizer

_SHOWN = 60  # characters of a text in a message


@dataclass(frozen=True, eq=False)
class Row:
    """The tokens of a text behind those that it is read behind.

    Args:
        text: what is scored; None of tokens that came as such.
        ids: of a beginning token, a prompt and the text, those that there are.
        begin: number of beginning tokens.
        own: the first token of the text.
    """

    text: str | None
    ids: NDArray[np.int64]
    begin: int
    own: int

    @property
    def scored(self) -> int:
        """The first token that is scored: nothing predicts the first of all."""
        return max(self.own, 1)


def rows_of(
    model: HookedModel,
    texts: Any,
    given: str | Sequence[str] | None,
    bos: bool | None,
    split_special_tokens: bool = False,
) -> list[Row]:
    """The rows of some texts; arguments as for :func:`reflowlens.scoring.score.score`.

    Raises:
        ReflowlensError: a text is no text, or has no token that anything predicts, a beginning goes with tokens,
            prompts and texts differ in number, or tokens span the end of a prompt.
    """
    several = isinstance(texts, Iterable) and not isinstance(texts, str | bytes | Mapping)
    read = list(texts) if several and not isinstance(texts, Tensor | np.ndarray) else [texts]
    if isinstance(texts, Tensor | np.ndarray) or (read and all(map(is_row_of_ids, read))):
        if given is not None or bos is not None:
            raise ReflowlensError("tokens are scored as they are: given= and bos= go with texts")
        tokens, lengths = model.tokens_and_lengths(texts)
        rows = [Row(None, ids[:n], 0, 0) for ids, n in zip(tokens.cpu().numpy(), lengths, strict=True)]
    else:
        before = [given] * len(read) if given is None or isinstance(given, str) else list(given)
        check_texts([*read, *(prompt for prompt in before if prompt is not None)])
        if len(before) != len(read):
            raise ReflowlensError(f"{len(before)} prompts are given for {len(read)} texts")
        cut = partial(_row, partial(model.tokenizer.encode, split_special_tokens=split_special_tokens))
        begin, pairs = model.text_start(bos), enumerate(zip(read, before, strict=True))
        rows = [cut(model.tokenizer, i, text, prompt or "", begin) for i, (text, prompt) in pairs]
    if not rows:
        raise ReflowlensError("there is no text to score")
    for i, row in enumerate(rows):
        if len(row.ids) <= row.scored:
            which = repr(row.text[:_SHOWN]) if row.text is not None else "token ids"
            raise ReflowlensError(
                f"text {i} ({which}) has no token that anything predicts: bos=True reads it behind a beginning token"
            )
    return rows


def prompts_given(given: Any) -> str | list[str] | None:
    """Prompts as they are given, read once; a None among several is no prompt.

    Raises:
        ReflowlensError: they are no texts.
    """
    if given is None or isinstance(given, str):
        return given
    several = list(given) if isinstance(given, Iterable) and not isinstance(given, bytes | Mapping) else [given]
    for prompt in several:
        if not (prompt is None or isinstance(prompt, str)):
            raise ReflowlensError(f"given must be a text or a list of texts, got {prompt!r}")
    return [prompt or "" for prompt in several]


def check_texts(texts: Sequence[Any]) -> None:
    """Raise unless all are texts."""
    for text in texts:
        if not isinstance(text, str):
            raise ReflowlensError(f"a text, a list of texts or an array of tokens can be scored, got {text!r}")


def prompt_length(
    encode: Callable[[str], list[int]], tokenizer: Tokenizer, ids: Sequence[int], prompt: str, text: str, which: str
) -> int:
    """How many of the tokens of ``prompt + text`` are those of the prompt.

    Raises:
        ReflowlensError: a token is of both.
    """
    alone = encode(prompt)
    if list(ids[: len(alone)]) == alone:
        return len(alone)
    end = len(prompt.encode("utf-8"))
    ends = np.cumsum([len(tokenizer.token_bytes(token)) for token in ids]).tolist()
    if end in ends:  # cut otherwise than alone, but cut here
        return ends.index(end) + 1
    across = tokenizer.token_str(ids[next((i for i, at in enumerate(ends) if at > end), -1)])
    raise ReflowlensError(
        f"{which}: the token {across!r} spans the end of the prompt ({prompt[-20:]!r}) and the text behind it "
        f"({text[:20]!r}): cut them where tokens meet, usually with the space in front of the text"
    )


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """The text of a token, ``[unused 16700]`` of one of the padding of a model's vocabulary."""
    return tokenizer.token_str(token) if token < tokenizer.n_vocab else f"[unused {token}]"


def token_sizes(tokenizer: Tokenizer, row: Row, prompt: str) -> NDArray[np.int64] | None:
    """Bytes of each token of a row, 0 of its beginning; None where its tokens are not made of its text's bytes."""
    if (row.ids >= tokenizer.n_vocab).any():  # of the padding of a model's vocabulary
        return None
    pieces = [tokenizer.token_bytes(int(token)) for token in row.ids[row.begin :]]
    sizes = np.array([0] * row.begin + [len(piece) for piece in pieces], dtype=np.int64)
    if row.text is None:
        return sizes
    read, whole = b"".join(pieces), (prompt + row.text).encode("utf-8")
    if read == b" " + whole:  # SentencePiece reads a space in front of a text
        sizes[row.begin] -= 1
        return sizes
    return sizes if read == whole else None


def _row(
    encode: Callable[[str], list[int]], tokenizer: Tokenizer, i: int, text: str, prompt: str, begin: list[int]
) -> Row:
    ids = encode(prompt + text)
    own = prompt_length(encode, tokenizer, ids, prompt, text, f"text {i}") if prompt else 0
    if begin and ids[:1] == begin:  # a text that spells its beginning gets no second one
        ids, own = ids[1:], max(own - 1, 0)
    return Row(text, np.array(begin + ids, dtype=np.int64), len(begin), len(begin) + own)
