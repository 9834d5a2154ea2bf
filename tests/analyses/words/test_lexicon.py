from __future__ import annotations

import json

import pytest

from analyses.words.lexicon import (
    TYPO_KINDS,
    Analogy,
    FactualPrompt,
    load_lexicon,
    read_questions_words,
    single_token_analogies,
    single_token_categories,
)
from reflowlens.errors import ReflowlensError
from reflowlens.tokenizers.by_name import get_tokenizer

LEXICON = load_lexicon()
QWERTY_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")


@pytest.fixture(params=["gpt2", "gpt2_16k"])
def tokenizer(request):
    return get_tokenizer(request.param)


def test_counts():
    sizes = {name: len(words) for name, words in LEXICON.categories.items()}
    assert sizes.pop("weekdays") == 7
    assert len(sizes) >= 15
    assert min(sizes.values()) >= 12
    assert len(LEXICON.analogies) >= 300
    assert len({analogy.relation for analogy in LEXICON.analogies}) >= 8
    assert [sum(typo.kind == kind for typo in LEXICON.typos) for kind in TYPO_KINDS] == [20] * 5
    assert len(LEXICON.factual) == len(LEXICON.sentiment.prompts) == 60
    assert len(LEXICON.short_prompts) == len(LEXICON.long_prompts) == 20
    assert len(LEXICON.neutral_texts) >= 10


def test_every_word_is_one_token_with_the_same_id_in_both_tokenizers(tokenizer):
    words = {word for category in LEXICON.categories.values() for word in category}
    words |= {word for analogy in LEXICON.analogies for word in analogy.words}
    words |= {typo.clean for typo in LEXICON.typos}
    words |= {prompt.target[1:] for prompt in LEXICON.factual}
    words |= {*LEXICON.sentiment.positive, *LEXICON.sentiment.negative, *LEXICON.sentiment.subjects}
    assert [word for word in words if not tokenizer.is_single_token(f" {word}")] == []
    assert max(tokenizer.single_token(f" {word}") for word in words) < 16640


def test_no_misspelling_is_a_token(tokenizer):
    assert [typo for typo in LEXICON.typos if tokenizer.is_single_token(f" {typo.misspelt}")] == []


def test_published_analogies_are_marked():
    published = {str(analogy): analogy.published_rank for analogy in LEXICON.analogies if analogy.published_rank}
    assert published == {
        "king - man + woman = queen": 1,
        "walked - walking + running = ran": 1,
        "Paris - France + China = Beijing": 2,
    }


def test_analogies_are_four_distinct_words_and_no_sum_occurs_twice():
    assert all(len(set(analogy.words)) == 4 for analogy in LEXICON.analogies)
    sums = [(frozenset((analogy.a, analogy.c)), analogy.b, analogy.expected) for analogy in LEXICON.analogies]
    assert len(set(sums)) == len(sums)


def _is_swap(clean, misspelt):
    exchanged = {clean[:i] + clean[i + 1] + clean[i] + clean[i + 2 :] for i in range(len(clean) - 1)}
    return misspelt in exchanged


def _is_drop(clean, misspelt):
    return misspelt in {clean[:i] + clean[i + 1 :] for i in range(len(clean))}


def _is_double(clean, misspelt):
    return misspelt in {clean[:i] + clean[i] + clean[i:] for i in range(len(clean))}


def _is_neighbour_key(clean, misspelt):
    """One letter replaced by one that touches it: the same row or the row below is shifted by about half a key."""
    place = {letter: (row, column) for row, keys in enumerate(QWERTY_ROWS) for column, letter in enumerate(keys)}
    changed = [(a, b) for a, b in zip(clean, misspelt, strict=True) if a != b]
    (row_a, column_a), (row_b, column_b) = (place[letter] for letter in changed[0])
    return len(changed) == 1 and abs(row_a - row_b) <= 1 and abs(column_a - column_b) <= 1


@pytest.mark.parametrize("typo", LEXICON.typos, ids=lambda typo: typo.misspelt)
def test_typos_are_of_their_kind(typo):
    rules = {"swap": _is_swap, "drop": _is_drop, "double": _is_double, "neighbour_key": _is_neighbour_key}
    if typo.kind == "phonetic":
        assert typo.clean != typo.misspelt
    else:
        assert rules[typo.kind](typo.clean, typo.misspelt)


def test_long_prompts_are_the_short_ones_behind_a_clause():
    for short, long in zip(LEXICON.short_prompts, LEXICON.long_prompts, strict=True):
        assert long.lower().endswith(f" {short.lower()}")
        assert len(short.split()) <= 6
        assert len(long.split()) >= 20


def test_subjects_are_words_of_the_carriers_and_of_no_neutral_text():
    carriers, neutral = (
        {word.strip(".,").lower() for text in texts for word in text.split()}
        for texts in (LEXICON.sentiment.prompts, LEXICON.neutral_texts)
    )
    assert carriers.issuperset(LEXICON.sentiment.subjects)
    assert neutral.isdisjoint(LEXICON.sentiment.subjects)


def test_sentiment_continuations_are_held_out_of_every_category():
    continuations = {*LEXICON.sentiment.positive, *LEXICON.sentiment.negative}
    assert len(continuations) == len(LEXICON.sentiment.positive) + len(LEXICON.sentiment.negative) >= 20
    assert continuations.isdisjoint(word for words in LEXICON.categories.values() for word in words)


def _load(tmp_path, raw):
    path = tmp_path / "mine.json"
    path.write_text(raw if isinstance(raw, str) else json.dumps(raw), encoding="utf-8")
    return load_lexicon(path)


def test_a_users_lexicon_needs_only_a_version(tmp_path):
    lexicon = _load(
        tmp_path,
        {
            "version": "mine",
            "categories": {"trees": ["oak", "elm"]},
            "analogies": [{"relation": "r", "a": "a", "b": "b", "c": "c", "expected": "d"}],
            "factual": [{"prompt": "Two and two is", "target": " four"}],
        },
    )
    assert lexicon.categories == {"trees": ("oak", "elm")}
    assert lexicon.analogies == (Analogy("r", "a", "b", "c", "d"),)
    assert lexicon.factual == (FactualPrompt("Two and two is", " four"),)
    assert lexicon.typos == lexicon.sentiment.prompts == ()


ANALOGY = {"relation": "r", "a": "a", "b": "b", "c": "c", "expected": "d"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"words": []}, "the file: no field 'words'; there are version, categories, analogies"),
        ({"version": 2}, "version: text was expected, got 2"),
        ({"categories": ["oak"]}, "categories: an object of category names and lists of words was expected"),
        ({"categories": {"trees": "oak"}}, "categories.trees: a list was expected, got 'oak'"),
        ({"categories": {"trees": ["oak", " elm"]}}, r"categories.trees\[1\]: ' elm' has a space .* write 'elm'"),
        (
            {"categories": {"trees": ["oak", "oak"]}},
            r"categories.trees\[1\]: 'oak' is already at categories.trees\[0\]",
        ),
        ({"categories": {"a": ["x"], "b": ["x"]}}, "categories.b: 'x' is already in 'a'"),
        ({"analogies": [ANALOGY | {"b": ""}]}, r"analogies\[0\].b: text was expected, got ''"),
        ({"analogies": [ANALOGY | {"d": "x"}]}, r"analogies\[0\]: no field 'd'; there are relation, a, b, c, expected"),
        ({"analogies": [{"relation": "r"}]}, r"analogies\[0\]: the field 'a' is missing"),
        ({"analogies": [ANALOGY | {"published_rank": 0}]}, "published_rank: a whole number from 1 on"),
        ({"analogies": [ANALOGY, ANALOGY]}, r"analogies\[1\]: .* is already at analogies\[0\]"),
        ({"typos": [{"kind": "slip", "clean": "a", "misspelt": "b"}]}, "no kind 'slip'; there are swap, drop"),
        ({"typos": [{"kind": "swap", "clean": "a", "misspelt": "a"}]}, r"typos\[0\]: 'a' is not misspelt"),
        ({"factual": [{"prompt": "It is", "target": "so"}]}, r"factual\[0\].target: .* write ' so'"),
        ({"factual": [{"prompt": "It is ", "target": " so"}]}, r"factual\[0\].prompt: 'It is ' has a space"),
        ({"sentiment": {"prompts": ["x"], "neutral": []}}, "sentiment: no field 'neutral'"),
    ],
)
def test_errors_name_the_entry(tmp_path, change, message):
    with pytest.raises(ReflowlensError, match=message):
        _load(tmp_path, {"version": "mine"} | change)


def test_errors_of_the_file_itself(tmp_path):
    with pytest.raises(ReflowlensError, match=r"mine.json: the file: the field 'version' is missing"):
        _load(tmp_path, {})
    with pytest.raises(ReflowlensError, match=r"mine.json: not JSON: .* at line 1, column 2"):
        _load(tmp_path, "{")
    with pytest.raises(ReflowlensError, match=r"cannot read .*absent.json: No such file"):
        load_lexicon(tmp_path / "absent.json")


def test_questions_words(tmp_path):
    path = tmp_path / "questions.txt"
    path.write_text(": capitals\nAthens Greece Baghdad Iraq\n: gender\nman woman king queen\n", encoding="utf-8")
    assert read_questions_words(path) == (
        Analogy("capitals", a="Greece", b="Athens", c="Baghdad", expected="Iraq"),
        Analogy("gender", a="woman", b="man", c="king", expected="queen"),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (": s\na b c d\n\na b c d\n", "line 3: four words or ': section' were expected, got ''"),
        (": s\na b c\n", "line 2: four words or ': section' were expected, got 'a b c'"),
        ("a b c d\n", "line 1: a line ': section' was expected before the first quadruple"),
        (":\na b c d\n", "line 1: four words"),
        ("", "no analogies"),
    ],
)
def test_questions_words_errors_name_the_line(tmp_path, text, message):
    path = tmp_path / "questions.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ReflowlensError, match=message):
        read_questions_words(path)


def test_words_of_several_tokens_are_skipped_and_named(tokenizer):
    queen, aunt = Analogy("gender", "king", "man", "woman", "queen"), Analogy("gender", "king", "man", "xyzzy", "queen")
    kept, skipped = single_token_analogies(iter([queen, aunt]), tokenizer)
    assert kept == [queen]
    assert skipped == ["king - man + xyzzy = queen: more than one token: 'xyzzy'"]
    ids, words = single_token_categories({"royal": ("king", "xyzzy", "queen"), "none": ("plugh",)}, tokenizer)
    assert ids == {"royal": [5822, 16599]}
    assert words == ["xyzzy", "plugh"]
