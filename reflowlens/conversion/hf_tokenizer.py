"""Our tokenizers as a ``tokenizer.json``, and whose tokenizer a ``tokenizer.json`` is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from reflowlens.errors import ReflowlensError
from reflowlens.tokenizers.base import END_OF_TEXT, Tokenizer
from reflowlens.tokenizers.by_name import get_tokenizer
from reflowlens.tokenizers.file import CHAT_TEMPLATE, TOKENIZER, FileTokenizer, open_tokenizer, write_tokenizer_config
from reflowlens.tokenizers.ranks import TOKENIZER_NAMES, gpt2_byte_symbols, n_merges, packaged_merges, packaged_ranks

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def write_tokenizer(folder: Path, tokenizer: Tokenizer, n_ctx: int) -> None:
    """Write ``tokenizer.json`` and what transformers wants beside it: the special tokens, and to take it as it is."""
    end = tokenizer.token_str(tokenizer.eot_token) if tokenizer.eot_token is not None else None
    first = tokenizer.bos_token if tokenizer.named_bos is None else tokenizer.named_bos
    begin = tokenizer.token_str(first) if first is not None else end
    text = tokenizer.json if isinstance(tokenizer, FileTokenizer) else packaged_json(tokenizer.name)
    (folder / TOKENIZER).write_text(text, encoding="utf8")
    write_tokenizer_config(folder, begin, end, model_max_length=n_ctx)
    if tokenizer.chat_template is not None:
        (folder / CHAT_TEMPLATE).write_text(tokenizer.chat_template, encoding="utf8")
    special = {name: token for name, token in (("bos_token", begin), ("eos_token", end)) if token is not None}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf8")


def packaged_json(name: str) -> str:
    """The ``tokenizer.json`` of a packaged tokenizer: byte-level BPE, every id as it is here."""
    special = [END_OF_TEXT] if get_tokenizer(name).eot_token is not None else []
    vocabulary = _vocabulary(name)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    fields: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": vocabulary[token], "content": token, **flags} for token in special],
        "normalizer": None,
        "pre_tokenizer": _BYTE_LEVEL,
        "post_processor": None,
        "decoder": _BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocabulary,
            "merges": [f"{left} {right}" for left, right in packaged_merges(name)],
        },
    }
    return json.dumps(fields, ensure_ascii=False)


def read_tokenizer(folder: Path, config: dict[str, Any], chosen: str | None) -> str:
    """The name of an imported model's tokenizer, which is open afterwards.

    Args:
        config: the folder's ``config.json``, for the id that ends a document where no tokenizer file names it.
        chosen: a packaged tokenizer's name or a path, instead of the folder's own.

    Raises:
        ReflowlensError: there is none, or it cannot be read.
    """
    if chosen in TOKENIZER_NAMES:
        return chosen
    path = Path(chosen) if chosen is not None else folder
    if chosen is None and not (folder / TOKENIZER).is_file():
        raise ReflowlensError(
            f"{folder} holds no {TOKENIZER}: have transformers save one there (AutoTokenizer's save_pretrained), or "
            f"choose {', '.join(TOKENIZER_NAMES)} or a file"
        )
    ends = config.get("eos_token_id")
    tokenizer = open_tokenizer(path, next(iter(ends), None) if isinstance(ends, list) else ends)
    return _packaged_name(tokenizer) or tokenizer.name


def _packaged_name(tokenizer: FileTokenizer) -> str | None:
    """Which packaged tokenizer a file is, if any: the same bytes have the same ids, by the same merges."""
    fields = json.loads(tokenizer.json)
    model, split = fields["model"], fields.get("pre_tokenizer") or {}
    plain = (
        model.get("type") == "BPE"
        and fields.get("normalizer") is None
        and split.get("type") == "ByteLevel"
        and not split.get("add_prefix_space")
        and split.get("use_regex", True)
        and tokenizer.bos_token is None
        and tokenizer.chat_template is None
        and len(tokenizer.end_tokens) < 2
    )
    if not plain:
        return None
    vocabulary = model["vocab"] | {token["content"]: token["id"] for token in fields.get("added_tokens", [])}
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    for name in TOKENIZER_NAMES:
        if len(merges) == n_merges(name) and merges == packaged_merges(name) and vocabulary == _vocabulary(name):
            return name
    return None


def _vocabulary(name: str) -> dict[str, int]:
    """Ids by GPT-2's printable spelling of a token's bytes."""
    symbol_of = {byte: symbol for symbol, byte in gpt2_byte_symbols().items()}
    ranks = packaged_ranks(name)
    vocabulary = {"".join(symbol_of[byte] for byte in token): rank for token, rank in ranks.items()}
    end = get_tokenizer(name).eot_token
    return vocabulary if end is None else {**vocabulary, END_OF_TEXT: end}
