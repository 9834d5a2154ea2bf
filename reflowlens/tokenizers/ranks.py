"""Byte-pair encodings by ranks, built from those of GPT-2, which are packaged with the library."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

from reflowlens.tokenizers.base import END_OF_TEXT, Tokenizer

if TYPE_CHECKING:  # numpy and tiktoken take longer to import than the rest of this module
    import numpy as np
    import tiktoken
    from numpy.typing import NDArray

TOKENIZER_NAMES = ("gpt2", "gpt2_16k", "gpt2_1k", "bytes")

_N_RANKS = {"gpt2": 50_256, "gpt2_16k": 16_640, "gpt2_1k": 1_023, "bytes": 256}
# GPT-2's word pattern; possessive quantifiers (++) change no match and keep long runs from overflowing the regex stack.
_GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
# With no merges the pieces do not matter: short ones are quick.
_BYTES_PATTERN = r"[\s\S]{1,64}"


class RankTokenizer(Tokenizer):
    """A byte-pair encoding by ranks, through tiktoken."""

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self._encoding = encoding
        self.name = encoding.name
        self.n_vocab = encoding.n_vocab
        self.eot_token = encoding.eot_token if END_OF_TEXT in encoding.special_tokens_set else None

    def _encode(self, text: str, split_special_tokens: bool) -> list[int]:
        if split_special_tokens:
            return self._encoding.encode_ordinary(text)
        return self._encoding.encode(text, allowed_special="all")

    @property
    def special_tokens(self) -> dict[str, int]:
        return {} if self.eot_token is None else {END_OF_TEXT: self.eot_token}

    def encode_to_numpy(self, text: str) -> NDArray[np.uint32]:
        return self._encoding.encode_to_numpy(text, disallowed_special=())

    def _token_bytes(self, token: int) -> bytes:
        return self._encoding.decode_single_token_bytes(self._checked(token))


@cache
def packaged(name: str) -> RankTokenizer:
    import tiktoken

    ranks = packaged_ranks(name)
    special = {} if name == "bytes" else {END_OF_TEXT: len(ranks)}
    pattern = _BYTES_PATTERN if name == "bytes" else _GPT2_PATTERN
    n_vocab = len(ranks) + len(special)
    return RankTokenizer(
        tiktoken.Encoding(
            name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special, explicit_n_vocab=n_vocab
        )
    )


def packaged_ranks(name: str) -> dict[bytes, int]:
    """The ids of a packaged tokenizer's tokens without the end of text: 256 bytes, then one token per merge."""
    if name == "bytes":
        return {bytes([value]): value for value in range(256)}
    byte_of = gpt2_byte_symbols()
    tokens = [bytes([value]) for value in byte_of.values()]
    tokens += [bytes(byte_of[symbol] for symbol in left + right) for left, right in packaged_merges(name)]
    return {token: rank for rank, token in enumerate(tokens)}


def n_merges(name: str) -> int:
    """How many merges a packaged tokenizer has, which is known without reading them."""
    return _N_RANKS[name] - 256


def packaged_merges(name: str) -> list[tuple[str, str]]:
    """The two symbols that each merge joins, in the order of `vocab.bpe`."""
    if not (count := n_merges(name)):
        return []
    text = (resources.files("reflowlens") / "assets/gpt2_bpe/vocab.bpe").read_text(encoding="utf-8")
    # split("\n"), not splitlines(): some byte symbols (U+0085) count as line ends for the latter.
    pairs = [line.split(" ") for line in text.split("\n")[1 : 1 + count]]
    return [(left, right) for left, right in pairs]


def gpt2_byte_symbols() -> dict[str, int]:
    """GPT-2's printable stand-in of each byte, in rank order: visible Latin-1 stands for itself, the others follow."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [value for value in range(256) if value not in visible]
    return {chr(value): value for value in visible} | {chr(256 + i): value for i, value in enumerate(hidden)}
