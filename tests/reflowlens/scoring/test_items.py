"""Items of tasks, on a model whose log-probabilities are known by arithmetic and on ones that plain passes check."""

from __future__ import annotations

import math

import pandas as pd
import pytest

import reflowlens as rl
from reflowlens.scoring.items import NORMALISATIONS, score_choices, score_last_words, score_pairs
from tests.reflowlens.scoring.test_score import known_model
from tests.support.tiny import random_model, tiny_config

A, B, X = (math.log(p / 259) for p in (3, 2, 1))  # of known_model


def test_pairs_by_arithmetic():
    """Sum and mean disagree where one text is longer; the first letter counts behind a beginning."""
    pairs = [{"good": "aa", "bad": "ax"}, {"good": "aaa", "bad": "ab"}, {"good": "xx", "bad": "aa", "group": "g"}]
    frame = score_pairs(known_model(), pairs, bos=True)
    assert frame["logprob_good"].tolist() == pytest.approx([2 * A, 3 * A, 2 * X])
    assert frame["logprob_bad"].tolist() == pytest.approx([A + X, A + B, 2 * A])
    assert frame["correct"].tolist() == [True, False, False]
    assert frame["correct_per_token"].tolist() == [True, True, False]
    assert frame["shorter"].tolist() == [0.5, 0.0, 0.5]
    assert score_pairs(known_model(), pairs[:2])["logprob_good"].tolist() == pytest.approx([A, 2 * A])


def test_choices_by_arithmetic():
    questions = [{"question": "q", "choices": ["xb", "aaa", "b"], "answer": "b"}]
    frame = score_choices(known_model(), questions, separator="", bos=True)
    assert frame["right"].tolist() == [False, False, True]
    sums, sizes = [X + B, 3 * A, B], [2, 3, 1]
    assert frame["score_none"].tolist() == pytest.approx(sums)
    for name in ("per_token", "per_byte"):
        expected = [total / n for total, n in zip(sums, sizes, strict=True)]
        assert frame[f"score_{name}"].tolist() == pytest.approx(expected)
        assert frame[f"score_without_{name}"].tolist() == pytest.approx(expected)
    assert frame["score_unconditional"].tolist() == pytest.approx([0, 0, 0], abs=1e-6)  # it reads no question


def test_what_a_question_adds_to_a_choice():
    model = random_model(tiny_config("reflow", d_vocab=1152, tokenizer_name="gpt2_1k"))
    questions = [{"question": "The king", "choices": ["of it", "was"], "answer": 1}] * 2
    frame = score_choices(model, questions)
    texts = [" of it", " was"] * 2
    behind = rl.score(model, texts, given="The king", bos=True).texts["logprob"]
    alone = rl.score(model, texts, bos=True).texts["logprob"]
    assert frame["score_unconditional"].tolist() == pytest.approx((behind - alone).tolist())
    assert score_choices(model, questions, without="So").loc[0, "logprob_without"] == pytest.approx(
        rl.score(model, " of it", given="So", bos=True).texts.loc[0, "logprob"]
    )
    spaced = score_choices(model, [{**questions[0], "question": "The king:\n"}])
    assert spaced.loc[0, "tokens"] == len(model.tokenizer.encode("of it"))


def test_last_words_are_whole_words_read_from_as_far_back_as_the_context_goes():
    model = random_model("reflow")
    long = "it was the king of the old land who came"
    frame = score_last_words(model, ["the king", f"{long}  "])
    assert frame["word"].tolist() == ["king", "came"]
    assert frame["tokens"].tolist() == [5, 5]
    logits = model(long[-25:-1])[0, -5:].log_softmax(-1)
    expected = sum(logits[i, ord(letter)].item() for i, letter in enumerate(" came"))
    assert frame.loc[1, "logprob"] == pytest.approx(expected, rel=1e-5)


def test_other_kinds_of_rows_and_blimps_own_names():
    frame = pd.DataFrame([{"sentence_good": "aa", "sentence_bad": "ax", "UID": "u"}])
    assert score_pairs(known_model(), frame)["group"].tolist() == ["u"]
    assert [*frame] == ["sentence_good", "sentence_bad", "UID"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: score_pairs(m, [{"god": "a", "bad": "b"}]), "pairs need a column 'good', did you mean 'god'|'good'"),
        (lambda m: score_pairs(m, [{"good": "", "bad": "b"}]), "pairs, row 0: 'good' is ''"),
        (lambda m: score_pairs(m, []), "there are no pairs"),
        (lambda m: score_pairs(m, "ab"), "pairs are rows with good, bad: a frame or a list of dicts, got 'ab'"),
        (lambda m: score_pairs(m, [{"good": "ab", "bad": "xb"}]), "row 0: texts begin with different tokens"),
        (
            lambda m: score_choices(m, [{"question": "q", "choices": ["a", "b"], "answer": 2}]),
            "answer 2 is none of the choices, nor a number from 0 to 1",
        ),
        (
            lambda m: score_choices(m, [{"question": "q", "choices": ["a"], "answer": 0}]),
            "row 0: two texts to choose from are needed at least",
        ),
        (
            lambda m: score_pairs(m, [{"good": "a", "bad": "b", "group": name} for name in (1, "1")]),
            "groups 1 and '1' are written alike",
        ),
        (lambda m: score_last_words(m, ["word"]), "a passage needs a word before its last: 'word'"),
        (lambda m: score_last_words(m, []), "no passage to predict the last word of"),
    ],
)
def test_what_is_no_item(call, message):
    with pytest.raises(rl.ReflowlensError, match=message):
        call(known_model())


def test_nothing_without_a_question_where_nothing_begins_a_text():
    frame = score_choices(known_model(), [{"question": "q", "choices": ["a", "b"], "answer": 0}] * 2)
    assert frame["logprob_without"].isna().all()
    assert {f"score_{name}" for name in NORMALISATIONS} <= {*frame}


def test_a_question_that_ends_with_a_space_is_read_as_one_whose_choices_begin_with_it():
    model = random_model(tiny_config("reflow", d_vocab=1152, tokenizer_name="gpt2_1k"))
    spaced, bare = (
        score_choices(model, [{"question": question, "choices": ["of it", "was"], "answer": 1}])
        for question in ("The king ", "The king")
    )
    assert spaced["question"].tolist() == ["The king "] * 2
    pd.testing.assert_frame_equal(spaced.drop(columns="question"), bare.drop(columns="question"))


def test_the_last_word_may_stand_behind_any_white_space():
    model = random_model("reflow")
    frame = score_last_words(model, ["the old\nking", "the old\tking", "the old king"])
    assert frame["word"].tolist() == ["king"] * 3
    assert frame["tokens"].tolist() == [4, 4, 5]
    alone = rl.score(model, "king", given="the old\n", bos=None)
    assert frame.loc[0, "logprob"] == pytest.approx(alone.texts.loc[0, "logprob"], rel=1e-5)
