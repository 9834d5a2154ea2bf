"""The documents of a file of text, or of a prepared folder, as texts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pretraining.local_files import Selection
from pretraining.sources import find_sources
from pretraining.token_files import MANIFEST_NAME, open_tokens
from reflowlens.errors import ReflowlensError
from reflowlens.tokenizers.by_name import get_tokenizer


def documents_of(path: Path, split: str = "val") -> Iterator[str]:
    """Documents, in their order.

    Args:
        path: a file that ``prepare`` reads, a folder of them, or one that it wrote.
        split: of a folder that it wrote.

    Raises:
        ReflowlensError: there is no such file, it is of no known kind, or the folder's tokenizer is a file of its own.

    Example: ``list(documents_of(Path("val.txt.xz")))``
    """
    if path.is_dir() and (path / MANIFEST_NAME).is_file():
        data = open_tokens(path, split)
        tokenizer, tokens = get_tokenizer(data.manifest.tokenizer), np.asarray(data.tokens[:])
        for ids in np.split(tokens, np.flatnonzero(tokens == data.manifest.end_id) + 1):
            yield tokenizer.decode(ids[ids != data.manifest.end_id].tolist())
        return
    if not path.exists():
        raise ReflowlensError(f"no file or folder {str(path)!r}")
    for source in find_sources([path], Selection()):
        for text, _ in source.documents():
            yield text
