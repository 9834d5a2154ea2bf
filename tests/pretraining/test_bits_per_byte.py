"""Bits per byte: every byte once, with as much context as a window leaves, and learnt from only when scored."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reflowlens as rl
from pretraining.bits_per_byte import (
    Document,
    ScoreFirst,
    bits_per_byte,
    read_again,
    scored_losses,
)
from reflowlens.errors import ReflowlensError
from reflowlens.scoring.windows import sliding_windows
from tests.support.tiny import random_model, tiny_config

TEXTS = ["the cat sat on the mat, and the dog did not", "naïve café", "a", "0123456789" * 4]


@given(st.integers(1, 60), st.integers(1, 20), st.data())
def test_every_token_but_the_first_is_scored_once(n, window, data):
    stride = data.draw(st.integers(1, window))
    windows = list(sliding_windows(0, n, window, stride))
    assert [i for each in windows for i in range(each.scored, each.last + 1)] == list(range(1, n))
    assert all(0 <= each.first < each.scored and each.last - each.first <= window for each in windows)
    assert all(each.last - each.first == window for each in windows[1:])  # as much context as there is
    assert all(each.last - each.scored + 1 <= stride for each in windows[1:])


@given(st.integers(2, 60), st.integers(1, 20), st.integers(1, 8))
def test_what_was_scored_is_read_again_once(n, window, stride):
    windows = list(sliding_windows(0, n, window, min(stride, window)))
    again = [i for each in read_again(windows[1:], window) for i in range(each.scored, each.last + 1)]
    assert again == [i for each in windows[1:] for i in range(each.scored, each.last + 1)]


@pytest.mark.parametrize("name", ["bytes", "gpt2_1k", "gpt2_16k"])
def test_tokens_have_the_bytes_of_the_text(name):
    tokenizer = rl.get_tokenizer(name)
    for text in TEXTS:
        document = Document.of(text, tokenizer)
        first = len(text.encode()[:1]) if tokenizer.eot_token is None else 0
        assert document.size.sum() == len(text.encode()) - first
        assert len(document.ids) == len(document.size)


@pytest.mark.parametrize(("window", "stride"), [(24, 24), (9, 4), (5, 1)])
@pytest.mark.parametrize("name", ["reflow", "gpt2_own_readout"])
def test_each_token_has_the_loss_of_its_own_window_read_alone(name, window, stride):
    model = random_model(name)
    frame = bits_per_byte({"one": model}, TEXTS, window=window, stride=stride, batch_size=3, resamples=20)
    bits = n_bytes = tokens = 0
    for text in TEXTS:
        ids = list(text.encode())
        for t in range(1, len(ids)):
            last = next(each.last for each in sliding_windows(0, len(ids), window, stride) if each.last >= t)
            before = torch.tensor(ids[max(0, last - window) : t])
            bits -= model(before)[0, -1].log_softmax(-1)[ids[t]].item() / math.log(2)
            n_bytes, tokens = n_bytes + 1, tokens + 1
    (row,) = frame.to_dict("records")
    assert (row["bytes"], row["tokens"], row["documents"]) == (n_bytes, tokens, len(TEXTS))
    assert row["bits_per_byte"] == pytest.approx(bits / n_bytes, rel=1e-5)
    assert row["loss"] == pytest.approx(bits * math.log(2) / tokens, rel=1e-5)
    assert row["low"] <= row["bits_per_byte"] <= row["high"]


def test_a_model_that_knows_nothing_needs_eight_bits():
    model = rl.build_model(tiny_config("gpt2", d_vocab=256))
    with torch.no_grad():
        model.embed.W_E.zero_()
    row = bits_per_byte({"blank": model}, TEXTS, resamples=20).iloc[0]
    assert row["bits_per_byte"] == pytest.approx(8.0)


def test_differences_are_taken_within_documents():
    models = {"one": random_model("reflow"), "two": random_model("reflow", seed=1), "again": random_model("reflow")}
    one, two, again = bits_per_byte(models, TEXTS * 3, resamples=200).to_dict("records")
    assert two["difference"] == pytest.approx(two["bits_per_byte"] - one["bits_per_byte"])
    assert two["difference_low"] < two["difference"] < two["difference_high"]
    assert again["difference"] == again["difference_low"] == again["difference_high"] == 0
    assert np.isnan(one["difference"])


def learnt(model, texts, learning):
    documents = [Document.of(text, model.tokenizer) for text in texts]
    return scored_losses(model, documents, 8, 4, learning, 2, "", False)


def test_what_is_scored_was_never_learnt_from():
    """Chunks before a change are what they were, and so is the changed chunk's own score of the unchanged model."""
    model, learning = random_model("reflow"), ScoreFirst(chunk=12, epochs=2, learning_rate=0.05)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    first, second = "the cat sat on", "the dog ate a hat"
    one, two = learnt(model, [first, second], learning), learnt(model, [first, second[:9] + "XXXXXXXX"], learning)
    np.testing.assert_array_equal(one[0], two[0])
    np.testing.assert_array_equal(one[1][:8], two[1][:8])
    plain = learnt(model, [first, second], None)
    np.testing.assert_allclose(one[0][:12], plain[0][:12], rtol=1e-5)  # of the first chunk nothing was learnt before
    assert np.abs(one[1] - plain[1]).min() > 1e-4
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_learning_from_a_repetition_helps():
    model = random_model("reflow")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3)
    texts = ["abcdefgh" * 4] * 6
    plain, learning = learnt(model, texts, None), ScoreFirst(chunk=32, epochs=4, learning_rate=0.1)
    assert np.concatenate(learnt(model, texts, learning)).mean() < np.concatenate(plain).mean() - 0.1


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"window": 25}, "window=25 is longer than the n_ctx=24 of one"),
        ({"window": 4, "stride": 5}, "stride=5 would leave tokens out between windows of 4"),
        ({"window": 0}, "window"),
    ],
)
def test_windows_that_cannot_be(how, message):
    with pytest.raises(ReflowlensError, match=message):
        bits_per_byte({"one": random_model("reflow")}, TEXTS, **how)


def test_nothing_to_read_is_said():
    with pytest.raises(ReflowlensError, match="need a text"):
        bits_per_byte({"one": random_model("reflow")}, ["", ""])
    with pytest.raises(ReflowlensError, match="need a model"):
        bits_per_byte({}, TEXTS)
    with pytest.raises(ReflowlensError, match="epochs must be positive"):
        ScoreFirst(epochs=0)
