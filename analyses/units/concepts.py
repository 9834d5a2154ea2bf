"""Predefined concepts of a text: where lines, words and speakers begin and end, and classes of characters.

They are defined on characters, before any unit is looked at. A token has a concept if its last character has it; for
concepts about the beginning of a line, if its first character has it; for those about the beginning of a word, if its
first character that is not a space has it (a token of GPT-2 begins with the space before its word). With a byte
tokenizer all three agree.
"""

from __future__ import annotations

import re

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from torch import Tensor

from reflowlens.models.base import HookedModel

CONCEPTS: dict[str, str] = {
    "line_start": "the first character of a line",
    "after_blank_line": "the first character behind an empty line",
    "speaker_name": "in a line that ends with a colon and stands behind an empty line, the colon included",
    "early_in_line": "among the first eight characters of a line",
    "capital": "an upper-case letter",
    "vowel": "one of aeiou, of either case",
    "space": "a space",
    "newline": "a line break",
    "colon": "a colon",
    "punctuation": "one of . , ; : ! ? ' -",
    "word_start": "a letter that no letter precedes",
    "word_end": "a letter that no letter follows",
}
_BY_FIRST = ("line_start", "after_blank_line")
_BY_FIRST_LETTER = ("capital", "word_start")


def label_tokens(model: HookedModel, tokens: Int[Tensor, "row pos"]) -> Bool[Tensor, "row pos concept"]:
    """Whether each token has each of ``CONCEPTS``, judged within its own row: what precedes a row is not known.

    Example: ``label_tokens(model, model.to_tokens("KING:\\nHo!"))[0, :, list(CONCEPTS).index("colon")]``
    """
    return torch.stack([_label_row(model.tokenizer.to_str_tokens(row.tolist())) for row in tokens.cpu()])


def _label_row(pieces: list[str]) -> Bool[Tensor, "pos concept"]:
    found = label_characters("".join(pieces))
    ends = np.cumsum([len(piece) for piece in pieces])
    first, last = ends - [len(piece) for piece in pieces], ends - 1
    letter = first + [min(len(piece) - len(piece.lstrip(" ")), len(piece) - 1) for piece in pieces]
    at = dict.fromkeys(_BY_FIRST, first) | dict.fromkeys(_BY_FIRST_LETTER, letter)
    columns = [labels[at.get(name, last)] for name, labels in found.items()]
    return torch.from_numpy(np.stack(columns, axis=1))


def label_characters(text: str) -> dict[str, NDArray[np.bool_]]:
    """Each concept's labels [character].

    >>> label_characters("a\\n\\nBo:")["speaker_name"].tolist()
    [False, False, False, True, True, True]
    """
    return {name: _spans(pattern, text) for name, pattern in _PATTERNS.items()}


_PATTERNS: dict[str, str] = {
    "line_start": r"(?<=\n)[^\n]",
    "after_blank_line": r"(?<=\n\n)[^\n]",
    "speaker_name": r"(?<=\n\n)[^\n:]{1,40}:(?=\n|$)",
    "early_in_line": r"(?<=\n)[^\n]{1,8}",
    "capital": r"[A-Z]",
    "vowel": r"[aeiouAEIOU]",
    "space": r" ",
    "newline": r"\n",
    "colon": r":",
    "punctuation": r"[.,;:!?'-]",
    "word_start": r"(?<![A-Za-z])[A-Za-z]",
    "word_end": r"[A-Za-z](?![A-Za-z]|$)",  # at the end of what is seen it is not known
}


def _spans(pattern: str, text: str) -> NDArray[np.bool_]:
    labels = np.zeros(len(text), dtype=bool)
    for match in re.finditer(pattern, text):
        labels[match.start() : match.end()] = True
    return labels
