"""Tokenizers from a `tokenizer.json`: what a text is in transformers it is here, and a model finds its own again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from reflowlens.checkpoints import load_model, save_model
from reflowlens.conversion.hf_tokenizer import packaged_json
from reflowlens.errors import ReflowlensError
from reflowlens.models import build_model
from reflowlens.models.attention import KeyValueCache
from reflowlens.models.base import HookedModel
from reflowlens.tokenizers.by_name import get_tokenizer
from reflowlens.tokenizers.file import OPENED, FileTokenizer, open_tokenizer
from tests.reflowlens.tokenizers.test_ranks import TEXT
from tests.support.tiny import random_model, tiny_config


def sentence_pieces() -> Library:
    """As Llama 2's: a space in front of a text, unknown characters byte by byte, `<s>` before everything."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz"]
    merges = [("▁", "k"), ("▁k", "i"), ("n", "g"), ("▁ki", "ng"), ("▁", "a")]
    pieces += ["".join(merge) for merge in merges]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    library = Library(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return library


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    sentence_pieces().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>", "lstrip": False}}))
    return tmp_path


@pytest.fixture
def pieces(folder: Path) -> FileTokenizer:
    return open_tokenizer(folder)


@pytest.fixture
def llama(pieces: FileTokenizer) -> HookedModel:
    """Its 291 tokens, and 8 of padding."""
    return random_model(tiny_config("llama_untied", tokenizer_name=pieces.name, d_vocab=pieces.n_vocab + 8))


GPT2_16K = FileTokenizer(packaged_json("gpt2_16k"), None)


@given(text=TEXT)
def test_byte_level_files_are_what_tiktoken_makes_of_the_same_merges(text: str) -> None:
    tokenizer = get_tokenizer("gpt2_16k")
    ids = GPT2_16K.encode(text)
    assert ids == tokenizer.encode(text) == GPT2_16K.encode_to_numpy(text).tolist()
    assert GPT2_16K.decode(ids) == text


def test_strings_of_byte_level_tokens() -> None:
    tokenizer = get_tokenizer("gpt2_16k")
    assert GPT2_16K.to_str_tokens(range(16_641)) == tokenizer.to_str_tokens(range(16_641))
    assert (GPT2_16K.n_vocab, GPT2_16K.eot_token, GPT2_16K.bos_token) == (16_641, 16_640, None)
    assert GPT2_16K.single_token(" queen") == 16_599
    with pytest.raises(ReflowlensError, match=r"' queens' is not a single token of tokenizer.json:.*: it splits into"):
        GPT2_16K.single_token(" queens")


@given(text=TEXT)
def test_sentence_pieces_are_what_transformers_reads(text: str) -> None:
    library = sentence_pieces()
    tokenizer = FileTokenizer(library.to_str(), "</s>")
    reference = PreTrainedTokenizerFast(tokenizer_object=library, bos_token="<s>", eos_token="</s>")
    assert [tokenizer.bos_token, *tokenizer.encode(text)] == reference(text)["input_ids"]
    assert tokenizer.decode(tokenizer.encode(text)) == reference.decode(tokenizer.encode(text))


def test_tokens_of_sentence_pieces(pieces: FileTokenizer) -> None:
    assert (pieces.bos_token, pieces.eot_token) == (1, 2)
    ids = pieces.encode("a king é")
    assert pieces.to_str_tokens(ids) == [" a", " king", " ", "\\xc3", "\\xa9"]
    assert pieces.decode(ids) == "a king é"
    assert 2 not in pieces.encode("a</s>")  # an id, never a spelling
    assert len(pieces.encode(" king")) == 2
    assert pieces.single_token(" king") == pieces.single_token("king") == ids[1]
    with pytest.raises(ReflowlensError, match="'kin' is not a single token"):
        pieces.single_token("kin")
    with pytest.raises(ReflowlensError, match=r"no token 291 in tokenizer\.json:"):
        pieces.decode([291])


def test_ids_that_no_token_has() -> None:
    fields = json.loads(packaged_json("bytes"))
    fields["model"]["vocab"]["ab"] = 300
    tokenizer = FileTokenizer(json.dumps(fields), None)
    assert tokenizer.n_vocab == 301
    assert tokenizer.to_str_tokens([97, 299, 300]) == ["a", "[unused 299]", "ab"]
    assert tokenizer.eot_token is None


def test_names_are_of_the_contents(folder: Path, pieces: FileTokenizer) -> None:
    assert pieces.name.startswith("tokenizer.json:")
    assert get_tokenizer(pieces.name) is pieces
    assert get_tokenizer(str(folder)) is get_tokenizer(str(folder / "tokenizer.json")) is pieces
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<unk>"}')
    other = open_tokenizer(folder)
    assert other.name != pieces.name
    assert other.eot_token == 0
    (folder / "tokenizer_config.json").unlink()
    assert open_tokenizer(folder, 2).name == open_tokenizer(folder, "</s>").name == pieces.name
    with pytest.raises(ReflowlensError, match=r"'tokenizer\.json:0123' is not open: load the model from the folder"):
        get_tokenizer("tokenizer.json:0123")


def test_files_that_are_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ReflowlensError, match=r"no tokenizer file '.*tokenizer\.json'"):
        open_tokenizer(tmp_path)
    for text in ("", "{}", "[1]", '{"model": {"type": "Magic"}}'):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(ReflowlensError, match=r"tokenizer\.json is not a tokenizer\.json that can be read"):
            open_tokenizer(tmp_path)


def test_a_checkpoint_keeps_its_tokenizer(llama: HookedModel, tmp_path: Path) -> None:
    pieces = llama.tokenizer
    saved = save_model(tmp_path / "saved", llama)
    OPENED.clear()
    with pytest.raises(ReflowlensError, match="is not open"):
        _ = llama.tokenizer
    loaded = load_model(saved)
    assert loaded.tokenizer.encode("a king") == pieces.encode("a king")
    assert loaded.tokenizer.eot_token == 2
    assert build_model(loaded.cfg).tokenizer is loaded.tokenizer  # an untrained model of the same shape
    (saved / "tokenizer_config.json").write_text('{"eos_token": "<unk>"}')
    with pytest.raises(ReflowlensError, match=r"holds 'tokenizer.json:.*', but its model reads 'tokenizer.json:"):
        load_model(saved)
    (saved / "tokenizer.json").unlink()
    tokens = torch.tensor([[1, 5, 7]])
    assert torch.equal(load_model(saved)(tokens), llama(tokens))  # ids need no tokenizer


def test_texts_begin_as_the_model_was_trained(llama: HookedModel) -> None:
    ids = llama.tokenizer.encode("a king")
    assert llama.to_tokens("a king").tolist() == [[1, *ids]]
    assert llama.to_tokens("a king", prepend_bos=False).tolist() == [ids]
    assert llama.to_str_tokens("a king") == ["<s>", " a", " king"]
    assert llama.to_tokens("").tolist() == [[1]]
    assert llama.to_tokens(["a king", "a"]).tolist() == [[1, *ids], [1, ids[0], 2]]
    past = KeyValueCache(llama.cfg, batch=1)
    assert llama("a", past_kv_cache=past).shape[1] == 2
    assert llama("a", past_kv_cache=past).shape[1] == 1  # in the middle of a text nothing begins


def test_generated_text_begins_with_the_prompt(llama: HookedModel) -> None:
    text = llama.generate("a king", 4, temperature=0)
    assert text.startswith("a king")
    tokens = llama.generate("a king", 4, temperature=0, return_type="tokens")
    assert tokens[0, 0] == 1
    assert text == llama.tokenizer.decode(tokens[0, 1:].tolist())
