"""The words for a model without signals: what a reFlow's signals and recipes are to it are the axes of its residual
stream and its embeddings, R = E and B = 1.

Texts are changed in the catalogue, before anything is filled into them: a token or a prompt that holds such a word
stays what it is, and so do identifiers, "random_signal".
"""

from __future__ import annotations

import re

_ENGLISH = (
    (r"\bSignal Flow\b", "Flow along the Axes"),
    (r"\bSignal identity\b", "Identity of the axes"),
    (r"\bsignal kurtosis\b", "kurtosis of an axis"),
    (r" Recipe times basis is its embedding\.", " R is the embedding itself."),
    (r"\b(single )?trained (signals?)\b", r"\1\2"),
    (r"\bsignal basis\b", "embedding"),
    (r"\bSignal ({\w+})", r"Axis \1"),
    (r"\b(a|A) recipe\b", r"\1n embedding"),
    (r"\brecipe(s?)\b", r"embedding\1"),
    (r"\bRecipe(s?)\b", r"Embedding\1"),
)
_CHINESE = (
    (r"信号基", "嵌入"),
    (r"配方乘以基即其嵌入", "R 即嵌入本身"),
    (r"训练所得的(单个)?信号", r"\1信号"),
    (r"配方", "嵌入"),
)


def of_axes(text: str, language: str) -> str:
    """A text of the catalogue in the words for a model without signals.

    >>> of_axes("How many signals does a token use? A signal is active where {signal} is.", "en")
    'How many axes of the residual stream does a token use? An axis is active where {signal} is.'
    """
    for pattern, words in _ENGLISH if language == "en" else _CHINESE:
        text = re.sub(pattern, words, text)
    return _axes(text) if language == "en" else _chinese_axes(text)


def _axes(text: str) -> str:
    """The first mention in full, the others short."""
    mentions = 0

    def name(found: re.Match[str]) -> str:
        nonlocal mentions
        mentions += 1
        article, word, possessive = found.groups()
        axis = "axes" if word.lower() == "signals" else "axis"
        axis = (f"{article}n " if article else "") + axis
        axis = axis if article or word[0].islower() else axis.capitalize()
        if possessive:
            return f"{axis}'s" if axis.endswith("axis") else f"{axis}'"
        return axis if mentions > 1 else f"{axis} of the residual stream"

    return re.sub(r"(?<![{\w])(?:\b([Aa]) )?\b([Ss]ignals?)\b(?!})(['’]s?)?", name, text)


def _chinese_axes(text: str) -> str:
    first = text.replace("信号", "残差流的轴", 1)
    return first.replace("信号", "轴")
