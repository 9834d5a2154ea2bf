"""The tokenizer of an imported model: a `tokenizer.json`, as the `tokenizers` library writes it.

It is kept in the checkpoint folder, beside a `tokenizer_config.json` that names the tokens that begin and end a text,
and the chat template of an instruct model. Its name is a hash of all that, so that token files made with one tokenizer
are never read by a model of another.
"""

from __future__ import annotations

import hashlib
import json
import re
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reflowlens.config import FILE_TOKENIZER
from reflowlens.errors import ReflowlensError
from reflowlens.tokenizers.base import END_OF_TEXT, Tokenizer
from reflowlens.tokenizers.ranks import gpt2_byte_symbols

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    import tokenizers
    from numpy.typing import NDArray

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
CHAT_TEMPLATE, GENERATION_CONFIG = "chat_template.jinja", "generation_config.json"
OPENED: dict[str, FileTokenizer] = {}  # by name, which is a hash of the contents
_SPACE = "▁"  # SentencePiece writes a space so


def open_tokenizer(path: str | Path, end_of_text: str | int | None = None) -> FileTokenizer:
    """Read a `tokenizer.json`.

    Args:
        path: the file, or its folder.
        end_of_text: the token that ends a document, or its id, if the `tokenizer_config.json` beside the file names no
            `eos_token`; by default `<|endoftext|>`, if there is such a token.

    Raises:
        ReflowlensError: there is no such file, or the `tokenizers` library cannot read it.

    Example: ``open_tokenizer("imported/tokenizer.json").encode("Hello")``
    """
    path = Path(path) / TOKENIZER if Path(path).is_dir() else Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        config = _config(path.with_name(TOKENIZER_CONFIG))
        tokenizer = FileTokenizer(
            text,
            _spelling(config.get("eos_token")),
            end_of_text,
            begin=_spelling(config.get("bos_token")),
            chat_template=_chat_template(path.with_name(CHAT_TEMPLATE), config),
            ends=_ends(path.with_name(GENERATION_CONFIG)),
        )
    except OSError as error:
        raise ReflowlensError(f"no tokenizer file {str(path)!r}: {error.strerror}") from error
    except Exception as error:  # the library raises Exception itself
        raise ReflowlensError(f"{path} is not a tokenizer.json that can be read: {error}") from error
    return OPENED.setdefault(tokenizer.name, tokenizer)


def write_tokenizer_config(folder: Path, begin: str | None, end: str | None, **more: Any) -> None:
    """Write a `tokenizer_config.json` that makes transformers use the `tokenizer.json` beside it unchanged."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": begin,
        "eos_token": end,
        "clean_up_tokenization_spaces": False,
        **more,
    }
    (folder / TOKENIZER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf8")


def _config(path: Path) -> dict[str, Any]:
    """The fields of a `tokenizer_config.json`; none without the file."""
    return dict(json.loads(path.read_text(encoding="utf-8-sig"))) if path.is_file() else {}


def _ends(path: Path) -> list[int]:
    """The ids that a `generation_config.json` has generation stop at."""
    ends = _config(path).get("eos_token_id")
    return [] if ends is None else [int(i) for i in (ends if isinstance(ends, list) else [ends])]


def _spelling(token: Any) -> str | None:
    """The text of a token, which is a string, or an object with a string."""
    return token["content"] if isinstance(token, dict) else token


def _chat_template(path: Path, config: dict[str, Any]) -> str | None:
    """From the file of its own that transformers writes, or as older ones did from the configuration, by name there."""
    if path.is_file():
        return path.read_text(encoding="utf-8-sig")
    named = config.get("chat_template")
    if isinstance(named, list):
        named = {template["name"]: template["template"] for template in named}.get("default")
    return named


class FileTokenizer(Tokenizer):
    """A tokenizer in the `tokenizers` library's format, of any algorithm that the library knows.

    Args:
        text: the `tokenizer.json`.
        configured: the token that ends a document.
        fallback: another, or its id, if there is no such token.
        begin: the token that begins a text, if a model wants one.
        chat_template: how a chat is written.
        ends: ids that end what the model writes, beside the token that ends a document.
    """

    def __init__(
        self,
        text: str,
        configured: str | None,
        fallback: str | int | None = None,
        *,
        begin: str | None = None,
        chat_template: str | None = None,
        ends: Iterable[int] = (),
    ) -> None:
        import tokenizers

        self.json = text
        self._library = tokenizers.Tokenizer.from_str(text)
        self._library.no_truncation()
        self._library.no_padding()
        self._library.encode_special_tokens = True
        ids = self._library.get_vocab(with_added_tokens=True)
        self.n_vocab = max(ids.values()) + 1
        self.end_of_text = self._named_token(configured, fallback, END_OF_TEXT)
        self.eot_token = None if self.end_of_text is None else ids[self.end_of_text]
        whole, plain = (self._library.encode("a", add_special_tokens=special).ids for special in (True, False))
        self.bos_token = whole[0] if whole[:1] != plain[:1] else None
        self.named_bos = self.bos_token if begin is None else ids.get(begin, self.bos_token)
        self.chat_template = chat_template
        # What a model without a beginning of its own or a template is named by stays what it was.
        more = [begin] if self.named_bos not in (self.bos_token, self.eot_token) else []
        more += [chat_template] if chat_template is not None else []
        self._ends = tuple(dict.fromkeys(i for i in ends if i != self.eot_token and 0 <= i < self.n_vocab))
        more += [f"ends {self._ends}"] if self._ends else []
        digest = hashlib.sha256("\0".join(map(str, [text, self.end_of_text, *more])).encode()).hexdigest()
        self.name = f"{FILE_TOKENIZER}{digest[:12]}"
        added = self._library.get_added_tokens_decoder()
        self._added = {i: token.content for i, token in added.items()}
        self._special = {token.content: i for i, token in added.items() if token.special}
        steps = [json.loads(text).get(name) for name in ("normalizer", "pre_tokenizer", "decoder")]
        self._byte_of = gpt2_byte_symbols() if "'ByteLevel'" in str(steps) else {}
        self._spaced = not self._byte_of and _SPACE in str(steps)

    def _named_token(self, *candidates: str | int | None) -> str | None:
        for candidate in candidates:
            name = self._library.id_to_token(candidate) if isinstance(candidate, int) else candidate
            if name is not None and self._library.token_to_id(name) is not None:
                return name
        return None

    def write(self, folder: Path) -> None:
        """Write `tokenizer.json`, what lies beside it and the chat template, which transformers opens too."""
        begin = None if self.named_bos is None else self._library.id_to_token(self.named_bos)
        (folder / TOKENIZER).write_text(self.json, encoding="utf8")
        write_tokenizer_config(folder, begin, self.end_of_text)
        if self._ends:
            ends = json.dumps({"eos_token_id": list(self.end_tokens)}, indent=2)
            (folder / GENERATION_CONFIG).write_text(f"{ends}\n", encoding="utf8")
        if self.chat_template is not None:
            (folder / CHAT_TEMPLATE).write_text(self.chat_template, encoding="utf8")

    def _encode(self, text: str, split_special_tokens: bool) -> list[int]:
        library = self._library if split_special_tokens else self._parsing
        return library.encode(text, add_special_tokens=False).ids

    @cached_property
    def _parsing(self) -> tokenizers.Tokenizer:
        """The same, for which a spelling is the token: one of its own, since other threads may read data meanwhile."""
        library = type(self._library).from_str(self._library.to_str())
        library.encode_special_tokens = False
        return library

    @property
    def special_tokens(self) -> dict[str, int]:
        return self._special

    @property
    def end_tokens(self) -> tuple[int, ...]:
        return (*super().end_tokens, *self._ends)

    def encode_to_numpy(self, text: str) -> NDArray[np.uint32]:
        import numpy as np

        return np.array(self.encode(text), dtype=np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        return self._library.decode([self._checked(i) for i in ids], skip_special_tokens=False)

    def _pieces(self, word: str) -> list[int]:
        # SentencePiece puts a space in front of a text, so that encode(" king") has two: here the word is inside one.
        ids = super()._pieces(word)
        if len(ids) > 1 and self._spaced and word in self._spellings:
            return [self._spellings[word]]
        return ids

    @cached_property
    def _spellings(self) -> dict[str, int]:
        return {self.token_str(i): i for i in range(self.n_vocab) if i not in self._added}

    def _token_bytes(self, token: int) -> bytes:
        token = self._checked(token)
        piece = self._library.id_to_token(token)
        if piece is None:
            return f"[unused {token}]".encode()
        if token in self._added:
            return self._added[token].encode()
        if self._byte_of and set(piece) <= set(self._byte_of):
            return bytes(self._byte_of[symbol] for symbol in piece)
        if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
            return bytes.fromhex(byte[1])
        return piece.replace(_SPACE, " ").encode()
