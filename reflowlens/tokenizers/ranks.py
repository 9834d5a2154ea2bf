"""Text to tokens: three byte-level tokenizers, built from ranks that are packaged with the library.

`gpt2`      GPT-2's byte-pair encoding, 50,257 tokens with `<|endoftext|>` (Radford et al. 2019).
`gpt2_16k`  its first 16,640 ranks and `<|endoftext|>`: a valid encoding of its own, in which every id below 16,640
            means what it means in GPT-2.
`bytes`     one token a byte of UTF-8; no special token.

An imported model brings its own, a `tokenizer.json`: `reflowlens.tokenizers.file`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from reflowlens.arguments import integer, is_one_of
from reflowlens.config import FILE_TOKENIZER
from reflowlens.errors import ReflowlensError

if TYPE_CHECKING:  # numpy and tiktoken take longer to import than the rest of this module
    import numpy as np
    import tiktoken
    from numpy.typing import NDArray

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_NAMES = ("gpt2", "gpt2_16k", "bytes")

_GPT2_RANKS = 50_256
_PREFIX_RANKS = 16_640
# GPT-2's word pattern; possessive quantifiers (++) change no match and keep long runs from overflowing the regex stack.
_GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
# With no merges the pieces do not matter: short ones are quick.
_BYTES_PATTERN = r"[\s\S]{1,64}"


class Tokenizer:
    """Text to token ids and back.

    Attributes: `name`; `n_vocab`, the number of real tokens (a model may pad its vocabulary beyond it); `eot_token`,
    the id that ends a document, or None where there is none; `bos_token`, the id that models of this tokenizer expect
    in front of a text, or None where a text begins with its own first token.

    >>> tokenizer = get_tokenizer("gpt2")
    >>> tokenizer.encode("Hello world")
    [15496, 995]
    >>> tokenizer.to_str_tokens([15496, 995])
    ['Hello', ' world']
    """

    name: str
    n_vocab: int
    eot_token: int | None
    bos_token: int | None = None

    def __repr__(self) -> str:
        return f"Tokenizer({self.name!r}, n_vocab={self.n_vocab})"

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, in which `<|endoftext|>` is ordinary text: `eot_token` is an id, never a spelling."""
        raise NotImplementedError

    def encode_to_numpy(self, text: str) -> NDArray[np.uint32]:
        """`encode` as an array, without a Python list in between: for corpora. Other threads run meanwhile.

        Raises UnicodeEncodeError if the text holds half of a surrogate pair, which UTF-8 cannot write.
        """
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these ids; bytes that are not valid UTF-8 become U+FFFD.

        Raises ReflowlensError for an id that is no token.
        """
        return b"".join(self._token_bytes(i) for i in ids).decode("utf-8", errors="replace")

    def token_str(self, token: int) -> str:
        """One token, readable: bytes that are not valid UTF-8 on their own are shown as `\\xNN`."""
        return self._token_bytes(token).decode("utf-8", errors="backslashreplace")

    def to_str_tokens(self, ids: Iterable[int]) -> list[str]:
        """`token_str` of each id."""
        return [self.token_str(i) for i in ids]

    def single_token(self, word: str) -> int:
        """The id of a word that is exactly one token, leading space included (`" queen"`).

        Raises ReflowlensError that shows how the word splits, and names the form that is a single token if with (or
        without) the leading space there is one.
        """
        if not isinstance(word, str):
            raise ReflowlensError(f"the text of a token was expected, got {word!r}")
        ids = self._pieces(word)
        if len(ids) == 1:
            return ids[0]
        if not ids:
            raise ReflowlensError("a word was expected, and the text is empty")
        pieces = ", ".join(repr(piece) for piece in self.to_str_tokens(ids))
        message = f"{word!r} is not a single token of {self.name}: it splits into {pieces}"
        sibling = word[1:] if word.startswith(" ") else f" {word}"
        if self.is_single_token(sibling):
            message += f"; {sibling!r} ({'without the' if word.startswith(' ') else 'with a'} leading space) is one"
        raise ReflowlensError(message)

    def is_single_token(self, word: str) -> bool:
        """Whether `word`, leading space included, is exactly one token."""
        return len(self._pieces(word)) == 1

    def _pieces(self, word: str) -> list[int]:
        """The ids of a word in the middle of a text."""
        return self.encode(word)

    def _token_bytes(self, token: int) -> bytes:
        """What one id writes."""
        raise NotImplementedError

    def _checked(self, token: int) -> int:
        index = integer(token)  # a tensor's or an array's element is welcome
        if index is None or not 0 <= index < self.n_vocab:
            raise ReflowlensError(
                f"no token {token!r} in {self.name}: its ids are 0 to {self.n_vocab - 1} "
                "(ids beyond are the padding of a model's vocabulary)"
            )
        return index


class RankTokenizer(Tokenizer):
    """A byte-pair encoding by ranks, through tiktoken."""

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self._encoding = encoding
        self.name = encoding.name
        self.n_vocab = encoding.n_vocab
        self.eot_token = encoding.eot_token if END_OF_TEXT in encoding.special_tokens_set else None

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)

    def encode_to_numpy(self, text: str) -> NDArray[np.uint32]:
        return self._encoding.encode_to_numpy(text, disallowed_special=())

    def _token_bytes(self, token: int) -> bytes:
        return self._encoding.decode_single_token_bytes(self._checked(token))


def get_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of this name: "gpt2", "gpt2_16k", "bytes", that of a model which is open, or a `tokenizer.json`.

    Raises ReflowlensError where there is none. The same object is returned each time.

    >>> get_tokenizer("gpt2_16k").single_token(" queen")
    16599
    """
    if is_one_of(name, TOKENIZER_NAMES):
        return _packaged(name)
    from reflowlens.tokenizers.file import OPENED, open_tokenizer

    if isinstance(name, str) and name in OPENED:
        return OPENED[name]
    if str(name).startswith(FILE_TOKENIZER):
        raise ReflowlensError(
            f"tokenizer {name!r} is not open: load the model from the folder that holds its tokenizer.json"
        )
    if isinstance(name, str | os.PathLike) and Path(name).exists():
        return open_tokenizer(name)
    raise ReflowlensError(f"no tokenizer {name!r}: there are {', '.join(TOKENIZER_NAMES)}, or give a tokenizer.json")


def check_tokenizer_fits(name: str, d_vocab: int, where: str) -> None:
    """Raise ReflowlensError where a tokenizer has tokens that a model's embedding has no row for."""
    n_vocab = get_tokenizer(name).n_vocab
    if n_vocab > d_vocab:
        raise ReflowlensError(
            f"{where} has {d_vocab} rows for tokens, fewer than the {n_vocab} of tokenizer {name!r}: choose another "
            "tokenizer, or one without the tokens that were added to it"
        )


@cache
def _packaged(name: str) -> RankTokenizer:
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
    """The ids of a packaged tokenizer's tokens, its end of text left out: 256 bytes, then one token a merge."""
    if name == "bytes":
        return {bytes([value]): value for value in range(256)}
    byte_of = gpt2_byte_symbols()
    tokens = [bytes([value]) for value in byte_of.values()]
    tokens += [bytes(byte_of[symbol] for symbol in left + right) for left, right in packaged_merges(name)]
    return {token: rank for rank, token in enumerate(tokens)}


def packaged_merges(name: str) -> list[tuple[str, str]]:
    """Which symbols each merge joins, in the order of `vocab.bpe`."""
    if name == "bytes":
        return []
    count = {"gpt2": _GPT2_RANKS, "gpt2_16k": _PREFIX_RANKS}[name] - 256
    text = (resources.files("reflowlens") / "assets/gpt2_bpe/vocab.bpe").read_text(encoding="utf-8")
    # split("\n"), not splitlines(): some byte symbols (U+0085) count as line ends for the latter.
    pairs = [line.split(" ") for line in text.split("\n")[1 : 1 + count]]
    return [(left, right) for left, right in pairs]


def gpt2_byte_symbols() -> dict[str, int]:
    """GPT-2's printable stand-in of each byte, in rank order: visible Latin-1 stands for itself, the others follow."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [value for value in range(256) if value not in visible]
    return {chr(value): value for value in visible} | {chr(256 + i): value for i, value in enumerate(hidden)}
