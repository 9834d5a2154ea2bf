"""A file that an editor saved with a byte-order mark in front reads as the same file without one."""

from __future__ import annotations

import gzip
import lzma
from codecs import BOM_UTF8
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from analyses.words.lexicon import load_lexicon, read_questions_words
from pretraining.chat import ChatTemplate
from pretraining.config import CONFIGS, load_config
from pretraining.sft import read_examples
from pretraining.sources import Selection, find_sources
from reflowlens.cli.units import _held_out
from reflowlens.conversion import export_hf, import_hf
from reflowlens.inspection import inspect_path
from reflowlens.tokenizers.by_name import get_tokenizer
from tests.support.tiny import random_model

TEXT = "<|endoftext|>\none\n<|endoftext|>\ntwo\n"
LINES = '{"text": "one"}\n{"text": "two"}\n'
EXAMPLE = '{"prompt": "one", "completion": "two"}\n'


def documents(path: Path) -> list[str]:
    return [text for source in find_sources([path], Selection()) for text, _ in source.documents()]


def examples(path: Path) -> Any:
    return [example.tokens.tolist() for example in read_examples(path, get_tokenizer("bytes"), ChatTemplate())]


READERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a.txt": (documents, TEXT),
    "a.txt.gz": (documents, TEXT),
    "a.txt.xz": (documents, TEXT),
    "a.jsonl": (documents, LINES),
    "a.jsonl.xz": (documents, LINES),
    "a.json": (documents, '[{"text": "one"}]'),
    "examples.jsonl": (examples, EXAMPLE),
    "examples.jsonl.gz": (examples, EXAMPLE),
    "run.toml": (load_config, (CONFIGS / "reflow_nano.toml").read_text(encoding="utf8")),
    "questions-words.txt": (read_questions_words, ": capitals\nAthens Greece Oslo Norway\n"),
    "lexicon.json": (load_lexicon, '{"version": "mine"}'),
    "held-out.txt": (lambda path: _held_out(random_model("reflow"), path), "one two"),
}


@pytest.mark.parametrize("name", READERS)
def test_a_byte_order_mark_is_no_text(name: str, tmp_path: Path) -> None:
    read, text = READERS[name]
    pack = {".gz": gzip.compress, ".xz": lzma.compress}.get(Path(name).suffix, bytes)
    found = []
    for mark in (b"", BOM_UTF8):
        (tmp_path / name).write_bytes(pack(mark + text.encode()))
        found.append(read(tmp_path / name))
    assert found[0] == found[1]
    if read is documents:
        assert found[1][0] == "one"


def test_a_transformers_folder_with_byte_order_marks(tmp_path: Path) -> None:
    folder = export_hf(random_model("gpt2"), tmp_path / "hf")
    plain = import_hf(folder).cfg
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        file = folder / name
        if file.exists():
            file.write_bytes(BOM_UTF8 + file.read_bytes())
    assert import_hf(folder).cfg == plain
    assert not inspect_path(folder).problems
