"""GPT-2's byte-pair encoding written plainly from its description: the oracle of `reflowlens.tokenizers.ranks`.

Words are found with GPT-2's own pattern; each is a list of one-character symbols, of which the neighbouring pair that
was merged earliest in training is merged everywhere, until no pair was ever merged.
"""

from itertools import pairwise
from pathlib import Path

import regex

WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


class ReferenceBPE:
    """The encoding by the first `n_merges` merges of a `vocab.bpe` file."""

    def __init__(self, path: Path, n_merges: int) -> None:
        shown = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
        self.symbol = {b: chr(b) for b in shown}
        for b in range(256):
            if b not in self.symbol:
                self.symbol[b] = chr(256 + len(self.symbol) - len(shown))
        merges = [tuple(line.split()) for line in path.read_bytes().decode().rstrip("\n").split("\n")[1 : 1 + n_merges]]
        self.rank = {pair: i for i, pair in enumerate(merges)}
        vocabulary = list(self.symbol.values()) + [left + right for left, right in merges]
        self.id = {token: i for i, token in enumerate(vocabulary)}

    def encode(self, text: str) -> list[int]:
        return [self.id[token] for word in WORDS.findall(text) for token in self.merge(word)]

    def merge(self, word: str) -> list[str]:
        parts = [self.symbol[b] for b in word.encode()]
        while known := [pair for pair in pairwise(parts) if pair in self.rank]:
            best = min(known, key=self.rank.__getitem__)
            merged: list[str] = []
            while parts:
                size = 2 if tuple(parts[:2]) == best else 1
                merged.append("".join(parts[:size]))
                parts = parts[size:]
            parts = merged
        return parts
