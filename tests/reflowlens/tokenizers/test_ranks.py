import importlib.resources
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reflowlens.errors import ReflowlensError
from reflowlens.tokenizers.by_name import get_tokenizer
from reflowlens.tokenizers.ranks import TOKENIZER_NAMES
from tests.reference.bpe import ReferenceBPE

VOCAB = Path(str(importlib.resources.files("reflowlens"))) / "assets/gpt2_bpe/vocab.bpe"
REFERENCES = {"gpt2": ReferenceBPE(VOCAB, 50_000), "gpt2_16k": ReferenceBPE(VOCAB, 16_640 - 256)}
# Letters, digits, contractions and runs of white space meet GPT-2's word pattern; free text meets the bytes.
TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.text("aeinrst THE'sld\n\t 019.,éж中🙂", max_size=60)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello world", [15496, 995]),
        (" king", [5822]),
        (" queen", [16599]),
        ("hello world", [31373, 995]),
        ("The quick brown fox jumps over the lazy dog", [464, 2068, 7586, 21831, 18045, 625, 262, 16931, 3290]),
        ("today\n \n", [40838, 198, 220, 198]),
        ("", []),
    ],
)
def test_gpt2_gives_the_published_ids(text: str, ids: list[int]) -> None:
    assert get_tokenizer("gpt2").encode(text) == ids


def test_sizes_and_end_of_text() -> None:
    found = {name: (get_tokenizer(name).n_vocab, get_tokenizer(name).eot_token) for name in TOKENIZER_NAMES}
    prefixes = {"gpt2_16k": (16_641, 16_640), "gpt2_1k": (1_024, 1_023)}
    assert found == {"gpt2": (50_257, 50_256), "bytes": (256, None)} | prefixes


@pytest.mark.parametrize(("name", "n", "last"), [("gpt2_16k", 16_640, " queen"), ("gpt2_1k", 1_023, " the")])
def test_a_prefix_means_what_gpt2_means(name: str, n: int, last: str) -> None:
    full, prefix = get_tokenizer("gpt2"), get_tokenizer(name)
    assert prefix.to_str_tokens(range(n)) == full.to_str_tokens(range(n))
    assert prefix.token_str(n) == full.token_str(50_256) == "<|endoftext|>"
    assert prefix.single_token(last) == full.single_token(last)
    assert get_tokenizer("gpt2_16k").single_token(" queen") == 16_599


@pytest.mark.parametrize("name", ["gpt2", "gpt2_16k"])
@given(text=TEXT)
def test_agrees_with_the_plain_algorithm(name: str, text: str) -> None:
    assert get_tokenizer(name).encode(text) == REFERENCES[name].encode(text)


@pytest.mark.parametrize("name", TOKENIZER_NAMES)
@given(text=TEXT)
def test_decode_undoes_encode(name: str, text: str) -> None:
    tokenizer = get_tokenizer(name)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_to_numpy(text).tolist() == ids


@given(text=TEXT)
def test_bytes_are_the_utf8_values(text: str) -> None:
    assert get_tokenizer("bytes").encode(text) == list(text.encode())


def test_end_of_text_is_ordinary_text() -> None:
    tokenizer = get_tokenizer("gpt2")
    text = "hello <|endoftext|>"
    ordinary = tokenizer.encode(text)
    assert 50256 not in ordinary
    assert tokenizer.encode_to_numpy(text).tolist() == ordinary
    assert tokenizer.decode(ordinary) == tokenizer.decode([31373, 220, 50256]) == text


def test_strings_of_tokens_that_are_no_whole_character() -> None:
    tokenizer = get_tokenizer("bytes")
    assert tokenizer.to_str_tokens(tokenizer.encode("aé")) == ["a", "\\xc3", "\\xa9"]
    assert tokenizer.decode([0xC3]) == "\ufffd"
    assert tokenizer.decode(np.array([104, 105])) == "hi"


@pytest.mark.parametrize("token", [-1, 16_641, 16_767])
def test_ids_beyond_the_vocabulary_are_refused(token: int) -> None:
    tokenizer = get_tokenizer("gpt2_16k")
    with pytest.raises(ReflowlensError, match=f"no token {token} in gpt2_16k: its ids are 0 to 16640"):
        tokenizer.decode([0, token])
    with pytest.raises(ReflowlensError, match="padding"):
        tokenizer.token_str(token)


def test_single_tokens() -> None:
    tokenizer = get_tokenizer("gpt2")
    assert tokenizer.single_token(" king") == 5822
    assert tokenizer.is_single_token(" queen")
    assert not tokenizer.is_single_token("queen")
    assert not tokenizer.is_single_token("")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "queen",
            r"'queen' is not a single token of gpt2: it splits into 'que', 'en'; ' queen' \(with a leading space",
        ),
        (" rer", r"' rer' .* splits into ' re', 'r'; 'rer' \(without the leading space\) is one"),
        ("zzyzzx", r"splits into 'zzy', 'zz', 'x'$"),
        ("", "empty"),
    ],
)
def test_words_of_several_tokens_are_shown_split(word: str, message: str) -> None:
    with pytest.raises(ReflowlensError, match=message):
        get_tokenizer("gpt2").single_token(word)


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(ReflowlensError, match="no tokenizer 'gpt3': there are gpt2, gpt2_16k, gpt2_1k, bytes"):
        get_tokenizer("gpt3")


def test_the_module_imports_nothing_heavy_and_tokenizers_are_shared() -> None:
    code = "import sys, reflowlens.tokenizers.ranks; print(sorted({'tiktoken', 'numpy', 'torch'} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"
    assert get_tokenizer("gpt2") is get_tokenizer("gpt2")
