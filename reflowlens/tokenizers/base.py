"""What every tokenizer does: text to token ids and back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from reflowlens.arguments import integer
from reflowlens.errors import ReflowlensError

if TYPE_CHECKING:  # it takes longer to import than the rest of this module
    import numpy as np
    from numpy.typing import NDArray

END_OF_TEXT = "<|endoftext|>"


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        name: what :func:`reflowlens.tokenizers.get_tokenizer` finds it by.
        n_vocab: number of real tokens; a model may pad its vocabulary beyond it.
        eot_token: the id that ends a document; None if there is none.
        bos_token: the id that models of this tokenizer expect before a text; None if a text begins with its own first
            token.
        named_bos: the id that the tokenizer's files call the beginning, whether texts get it or not; None if none does.
        chat_template: how a chat is written, a Jinja template (:mod:`reflowlens.tokenizers.chat`); None without one.

    Example:
        >>> from reflowlens.tokenizers import get_tokenizer
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
    named_bos: int | None = None
    chat_template: str | None = None

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """The ids that end what a model writes: `eot_token`, and others that an instruct model ends its turns with."""
        return () if self.eot_token is None else (self.eot_token,)

    def __repr__(self) -> str:
        return f"Tokenizer({self.name!r}, n_vocab={self.n_vocab})"

    def encode(self, text: str, *, split_special_tokens: bool = True, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text.

        Args:
            split_special_tokens: read the spelling of a special token, such as `<|endoftext|>`, as the characters that
                it is, as is right for data and for what others write; False makes it the token.
            add_special_tokens: begin with `bos_token`, where there is one.

        Both arguments are named as in transformers.
        """
        ids = self._encode(text, split_special_tokens)
        return [self.bos_token, *ids] if add_special_tokens and self.bos_token is not None else ids

    def _encode(self, text: str, split_special_tokens: bool) -> list[int]:
        raise NotImplementedError

    @property
    def special_tokens(self) -> dict[str, int]:
        """The id of each special token, by its spelling."""
        raise NotImplementedError

    def encode_to_numpy(self, text: str) -> NDArray[np.uint32]:
        """`encode` as an array [token], without a Python list in between, for corpora; other threads run meanwhile.

        Raises:
            UnicodeEncodeError: the text holds half of a surrogate pair, which UTF-8 cannot write.
        """
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; bytes that are not valid UTF-8 become U+FFFD.

        Raises:
            ReflowlensError: an id is not one of 0 to ``n_vocab - 1``.
        """
        return b"".join(self._token_bytes(i) for i in ids).decode("utf-8", errors="replace")

    def token_str(self, token: int) -> str:
        """The text of one token; bytes that are not valid UTF-8 on their own are shown as `\\xNN`.

        Raises:
            ReflowlensError: the id is not one of 0 to ``n_vocab - 1``.
        """
        return self._token_bytes(token).decode("utf-8", errors="backslashreplace")

    def to_str_tokens(self, ids: Iterable[int]) -> list[str]:
        """`token_str` of each id."""
        return [self.token_str(i) for i in ids]

    def single_token(self, word: str) -> int:
        """The id of a word that is exactly one token, leading space included (`" queen"`).

        Raises:
            ReflowlensError: the word is empty or several tokens. The message shows how it splits, and the form with (or
                without) the leading space if that is a single token.
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
        """The ids of a word that stands inside a text, or the id of a special token's spelling."""
        special = self.special_tokens.get(word)
        return self.encode(word) if special is None else [special]

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for.

        Raises:
            ReflowlensError: the id is not one of 0 to ``n_vocab - 1``.
        """
        return self._token_bytes(token)

    def _token_bytes(self, token: int) -> bytes:
        raise NotImplementedError

    def _checked(self, token: int) -> int:
        index = integer(token)  # a tensor's or an array's element is welcome
        if index is None or not 0 <= index < self.n_vocab:
            raise ReflowlensError(
                f"no token {token!r} in {self.name}: its ids are 0 to {self.n_vocab - 1} "
                "(ids beyond are the padding of a model's vocabulary)"
            )
        return index
