"""Accuracies of tasks whose answers are known by arithmetic, beside what lengths and places give away."""

from __future__ import annotations

import pandas as pd
import pytest
from scipy import stats

from analyses.tasks.comparisons import last_sentence, last_words, minimal_pairs, multiple_choice
from reflowlens.errors import ReflowlensError
from tests.reflowlens.scoring.test_score import known_model  # p of "a", "b" and others: 3, 2 and 1 in 259
from tests.support.tiny import random_model, tiny_config


def exact(hits: int, n: int) -> tuple[float, float]:
    interval = stats.binomtest(hits, n).proportion_ci(method="exact")
    return pytest.approx((interval.low, interval.high))


def test_minimal_pairs_of_known_log_probabilities():
    rows = [{"good": "xa", "bad": "xb", "group": "letters"}] * 24 + [{"good": "xaa", "bad": "xb", "group": "long"}] * 6
    result = minimal_pairs(known_model(), rows)
    assert result.metrics == {"accuracy": 24 / 30, "accuracy_per_token": 1.0, "mean_of_groups": 0.5}
    assert result.intervals["accuracy"] == exact(24, 30)
    assert result.controls["accuracy"] == {"chance": 0.5, "shorter": 0.4}
    assert result.verdicts == {"accuracy": "supported", "accuracy_per_token": "supported"}
    groups = result.frames["groups"].set_index(["group", "scoring"])
    assert groups["accuracy"].to_dict() == {
        ("letters", "sum"): 1.0, ("long", "sum"): 0.0, ("letters", "per_token"): 1.0, ("long", "per_token"): 1.0,
    }  # fmt: skip
    assert tuple(groups.loc[("long", "sum"), ["low", "high"]]) == exact(0, 6)


def test_what_lengths_tell_is_no_support():
    rows = [{"good": "xx", "bad": "xxb"}] * 30
    result = minimal_pairs(known_model(), rows)
    assert result.metrics["accuracy"] == 1 == result.controls["accuracy"]["shorter"]
    assert result.verdicts["accuracy"] == "not supported"


def test_multiple_choice_of_known_log_probabilities():
    """By the sum the short choice, by means that of likelier letters; without the question the same ones."""
    rows = [{"question": "q", "choices": ["aaa", "x"], "answer": 0}] * 3
    rows += [{"question": "q", "choices": ["aaa", "x", "b"], "answer": 2}]
    result = multiple_choice(known_model(), rows, separator="", bos=True)
    assert result.metrics["accuracy_none"] == 1 / 4
    assert result.metrics["accuracy_per_token"] == result.metrics["accuracy_per_byte"] == 3 / 4
    assert result.intervals["accuracy_none"] == exact(1, 4)
    controls = result.controls["accuracy_per_token"]
    assert controls == {
        "chance": pytest.approx((3 / 2 + 1 / 3) / 4),
        "most_frequent_place": 0.75,
        "without_question": 0.75,
    }
    assert result.verdicts["accuracy_none"] == "underpowered"
    assert not result.notes


def test_a_model_without_a_beginning_has_no_unconditional_choice():
    rows = [{"question": "q", "choices": ["aaa", "x"], "answer": 0}] * 2
    result = multiple_choice(known_model(), rows)
    assert "accuracy_unconditional" not in result.metrics
    assert result.notes[0].startswith("unconditional is left out")
    assert "without_question" not in result.controls["accuracy_none"]


def test_last_words_beside_the_last_sentence():
    model = random_model(tiny_config("reflow", n_ctx=64))
    result = last_words(model, ["he came. it was the king", "and so it was"])
    frame = result.frames["passages"]
    short = last_words(model, ["it was the king", "and so it was"]).frames["passages"]
    assert result.controls["accuracy"]["last_sentence"] == short["correct"].mean()
    assert result.controls["logprob"]["last_sentence"] == pytest.approx(short["logprob"].mean())
    assert frame["logprob"][0] != pytest.approx(short["logprob"][0])
    assert frame["logprob"][1] == pytest.approx(short["logprob"][1])


@pytest.mark.parametrize(
    ("passage", "last"),
    [
        ('"Go." She gave him the book', "She gave him the book"),
        ("no end at all", "no end at all"),
        ("It was he! Who?", "It was he! Who?"),
    ],
)
def test_the_last_sentence_has_a_word_before_its_last(passage, last):
    assert last_sentence(passage) == last


def test_one_item_has_no_interval():
    with pytest.raises(ReflowlensError, match="an interval needs two pairs at least, got 1"):
        minimal_pairs(known_model(), pd.DataFrame([{"good": "xa", "bad": "xb"}]))
