"""A tokenizer by its name: a packaged one, that of a loaded model, or a file."""

from __future__ import annotations

import os
from pathlib import Path

from reflowlens.arguments import is_one_of
from reflowlens.config import FILE_TOKENIZER
from reflowlens.errors import ReflowlensError
from reflowlens.tokenizers.base import Tokenizer
from reflowlens.tokenizers.ranks import TOKENIZER_NAMES, packaged


def get_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a name; the same object each time.

    Args:
        name: ``"gpt2"``, ``"gpt2_16k"``, ``"gpt2_1k"``, ``"bytes"``, the ``tokenizer_name`` of a model that is
            loaded, or the path of a `tokenizer.json` or of its folder.

    Raises:
        ReflowlensError: there is no such tokenizer, or the file cannot be read.

    Example:
        >>> get_tokenizer("gpt2_16k").single_token(" queen")
        16599
    """
    if is_one_of(name, TOKENIZER_NAMES):
        return packaged(name)
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
    """Check that a model's embedding, of ``d_vocab`` rows, has a row for every token.

    Raises:
        ReflowlensError: the tokenizer has more tokens; the message names ``where`` the rows are stated.
    """
    n_vocab = get_tokenizer(name).n_vocab
    if n_vocab > d_vocab:
        raise ReflowlensError(
            f"{where} has {d_vocab} rows for tokens, fewer than the {n_vocab} of tokenizer {name!r}: choose another "
            "tokenizer, or one without the tokens that were added to it"
        )
