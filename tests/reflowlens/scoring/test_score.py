"""Log-probabilities of texts are those of each text alone, on every architecture, whatever is attached to the model."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

import reflowlens as rl
from reflowlens.conversion import export_hf
from reflowlens.models.base import HookedModel
from reflowlens.scoring import windows
from reflowlens.scoring.batches import by_length
from tests.reflowlens.models.test_bdh import random_bdh
from tests.reflowlens.models.test_ttt_flow import filled
from tests.support import families
from tests.support.dictionaries import dictionary_of
from tests.support.tiny import NAMES, random_model, tiny_config

TEXTS = ["the king of it", "a dog", "naïve", "who was it that came?", "be"]
Attached = Callable[[HookedModel], AbstractContextManager[Any]]
ATTACHED: dict[str, Attached] = {
    "nothing": lambda model: nullcontext(),
    "a patch": lambda model: rl.intervene(model, rl.Patch("resid_pre", "the cat", layer=1, position=1)),
    "at the end": lambda model: rl.intervene(model, rl.Steer("resid_pre", [3.0], layer=1, position=-2)),
    "a hook": lambda model: model.hooks([("hook_embed", lambda x, hook: 2 * x)]),
}
OF_REFLOW: dict[str, Attached] = {
    "a final norm": lambda model: rl.intervene(model, rl.Scale("ln_final.hook_normalized", 0.5)),
    "a signal": lambda model: rl.intervene(model, rl.Ablate("unembed.hook_signal", index=3)),
    "an edit": lambda model: rl.edit(model, rl.SwapWeights("embed.W_recipe", rows=("k", "t"))),
    "a dictionary": lambda model: dictionary_of(model, "plt", "relu", n_features=6).spliced(model, error=False),
}
CASES = [(name, attached) for name in [*NAMES, "bdh"] for attached in ATTACHED]
CASES += [("reflow", attached) for attached in OF_REFLOW]
CASES += [("ttt_flow", attached) for attached in ATTACHED]


CASES += [(family, "nothing") for family in families.NAMES if family not in NAMES]


def model_of(name: str) -> HookedModel:
    if name in NAMES:
        return random_model(name)
    return random_bdh() if name == "bdh" else filled() if name == "ttt_flow" else families.ours(name)


def alone(model: HookedModel, text: str) -> torch.Tensor:
    """Of each token but the first, from the whole logits of the text by itself."""
    ids = model.to_tokens(text)[0]
    return model(text)[0, :-1].double().log_softmax(-1).gather(1, ids[1:, None])[:, 0]


@pytest.mark.parametrize(("name", "attached"), CASES)
@torch.no_grad()
def test_each_text_is_scored_as_if_alone(name, attached):
    model = model_of(name)
    with (ATTACHED | OF_REFLOW)[attached](model):
        scores = rl.score(model, TEXTS)
        for text, found in zip(TEXTS, scores.logprobs, strict=True):
            assert math.isnan(found[0])
            np.testing.assert_allclose(found[1:], alone(model, text).numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"batch": 2}, {"batch": 1}, {"memory": 1e5}, {"window": 24}])
def test_batches_do_not_matter(options):
    model = random_model("reflow")
    some, all_ = rl.score(model, TEXTS, **options), rl.score(model, TEXTS)
    for a, b in zip(some.logprobs, all_.logprobs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_the_loss_of_transformers(tmp_path):
    model = random_model("llama_untied")
    other = LlamaForCausalLM.from_pretrained(export_hf(model, tmp_path / "hf")).eval()
    frame = rl.score(model, TEXTS).texts
    for text, mean in zip(TEXTS, frame["mean"], strict=True):
        ids = model.to_tokens(text)
        with torch.no_grad():
            assert -mean == pytest.approx(other(input_ids=ids, labels=ids).loss.item(), rel=1e-5)


def known_model() -> HookedModel:
    """Logits ln 3 for "a", ln 2 for "b" and 0 for the 254 other bytes, everywhere: p = 3, 2 and 1 in 259."""
    model = rl.build_model(tiny_config("gpt2_own_readout", d_vocab=256))
    with torch.no_grad():
        model.unembed.W_U.zero_()
        model.unembed.b_U.zero_()
        model.unembed.b_U[ord("a")], model.unembed.b_U[ord("b")] = math.log(3), math.log(2)
    return model


def test_log_probabilities_by_arithmetic():
    scores = rl.score(known_model(), ["aab", "xaa"], bos=True)
    p = {"a": 3 / 259, "b": 2 / 259, "x": 1 / 259}
    expected = [sum(math.log(p[letter]) for letter in text) for text in ("aab", "xaa")]
    frame = scores.texts
    assert frame["logprob"].tolist() == pytest.approx(expected, rel=1e-6)
    assert frame["tokens"].tolist() == frame["bytes"].tolist() == [3, 3]
    assert frame["perplexity"].tolist() == pytest.approx([math.exp(-total / 3) for total in expected])
    assert frame["bits_per_byte"].tolist() == pytest.approx([-total / 3 / math.log(2) for total in expected])
    assert frame["likeliest"].tolist() == [False, False]
    assert scores.tokens["likeliest"].tolist() == [True, True, False, False, True, True]
    assert scores.tokens["token"].tolist() == list("aabxaa")
    assert scores.tokens["position"].tolist() == [1, 2, 3] * 2


def test_the_first_token_has_no_log_probability_without_a_beginning():
    model = random_model("reflow")
    plain, begun = rl.score(model, "king"), rl.score(model, "king", bos=True)
    assert np.isnan(plain.logprobs[0]).tolist() == [True, False, False, False]
    assert (plain.texts["tokens"][0], begun.texts["tokens"][0]) == (3, 4)
    assert plain.texts["bytes"][0] == 3
    whole = model(model.to_tokens("king", prepend_bos=True))[0].log_softmax(-1)
    assert begun.logprobs[0][0] == pytest.approx(whole[0, ord("k")].item(), rel=1e-5)


def test_a_continuation_is_what_it_adds_to_its_prompt():
    model = random_model("reflow")
    found = rl.score(model, [" king", "s"], given=["the", "the king"]).logprobs
    whole = rl.score(model, ["the king", "the kings"]).logprobs
    np.testing.assert_allclose(found[0], whole[0][3:], rtol=1e-5)
    np.testing.assert_allclose(found[1], whole[1][8:], rtol=1e-5)
    frame = rl.score(model, [" king", " it"], given="the").texts
    assert frame["given"].tolist() == ["the", "the"]
    assert frame["tokens"].tolist() == [5, 3]


def test_a_prompt_ends_where_its_tokens_end():
    model = rl.build_model(tiny_config("reflow", d_vocab=16768, tokenizer_name="gpt2_16k"))
    ids = model.tokenizer.encode("The capital of France is Paris")
    found = rl.score(model, " Paris", given="The capital of France is")
    assert found.tokens["id"].tolist() == ids[-1:]
    assert found.tokens["position"].tolist() == [len(ids) - 1]
    with pytest.raises(rl.ReflowlensError, match="text 0: the token ' Paris' spans the end of the prompt"):
        rl.score(model, "Paris", given="The capital of France is ")


@pytest.mark.parametrize(("window", "stride"), [(9, 4), (24, 24)])
def test_a_long_text_is_read_in_windows(window, stride):
    model, text = random_model("reflow"), "the king of the land was old, and his queen"
    found = rl.score(model, text, window=window, stride=stride).logprobs[0]
    for t in range(1, len(text)):
        ends = [each.last for each in windows.sliding_windows(0, len(text), window, stride) if each.last >= t]
        before = model(text[max(0, ends[0] - window) : t])[0, -1]
        assert found[t] == pytest.approx(before.log_softmax(-1)[ord(text[t])].item(), rel=1e-5)
    of_end = rl.score(model, text[-3:], given=text[:-3], window=window, stride=stride).logprobs[0]
    np.testing.assert_allclose(of_end, found[-3:], rtol=1e-5)


def test_tokens_are_scored_as_they_are():
    model = random_model("reflow")
    ids = model.to_tokens(["the king", "the kind"])
    found, texts = rl.score(model, ids), rl.score(model, ["the king", "the kind"])
    assert found.texts.equals(texts.texts)


def test_rows_of_ids_of_several_lengths():
    model = random_model("reflow")
    found = rl.score(model, [[*b"the king"], [*b"a dog"]]).logprobs
    for a, b in zip(found, rl.score(model, ["the king", "a dog"]).logprobs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_padding_of_the_vocabulary_has_no_bytes():
    scores = rl.score(random_model("reflow"), [[97, 287]])
    assert scores.tokens["token"].tolist() == ["a", "[unused 287]"]
    assert scores.texts["text"].tolist() == ["a[unused 287]"]
    assert scores.texts["bits_per_byte"].isna().all()


def test_special_tokens_are_read_as_the_model_reads_them():
    model = rl.build_model(tiny_config("reflow", d_vocab=1152, tokenizer_name="gpt2_1k"))
    spelt, plain = (rl.score(model, "<|endoftext|>of it", split_special_tokens=split) for split in (False, True))
    assert spelt.tokens["id"].tolist() == model.to_tokens("<|endoftext|>of it")[0].tolist()
    assert plain.tokens["id"].tolist() == model.to_tokens("<|endoftext|>of it", split_special_tokens=True)[0].tolist()
    begun = rl.score(model, "<|endoftext|>of it", bos=True)
    np.testing.assert_allclose(begun.logprobs[0], spelt.logprobs[0][1:], rtol=1e-5)  # not behind two


def test_logits_are_never_formed_of_everything(monkeypatch):
    """Of scored positions alone, so many at a time."""
    formed = []
    logits = windows.Readout.logits

    def counted(readout):
        formed.append(readout.features.shape[:2].numel())
        return logits(readout)

    monkeypatch.setattr(windows.Readout, "logits", counted)
    monkeypatch.setattr(windows, "_POSITIONS", 7)
    rl.score(random_model("gpt2"), [" king", " it"] * 4, given="the old")
    assert sum(formed) == 4 * (5 + 3)
    assert max(formed) == 7


def test_batches_are_of_like_length_within_a_memory():
    lengths, read = [3, 9, 4, 9, 1, 2, 8], []

    def run(chosen):
        read.append(chosen)
        return torch.zeros(len(chosen) * max(lengths[i] for i in chosen), 100)

    list(by_length(lengths, run, torch.device("cpu"), memory=400 * 20))
    assert read == [[1], [3, 6], [2, 0, 5, 4]]


def test_a_batch_that_runs_out_of_memory_is_halved():
    read = []

    def run(chosen):
        if len(chosen) > 2:
            raise MemoryError
        read.append(chosen)
        return chosen

    assert [made for _, made in by_length([5] * 7, run, torch.device("cpu"))] == read
    assert sorted(i for chosen in read for i in chosen) == [*range(7)]
    with pytest.raises(MemoryError):
        list(by_length([5], lambda chosen: (_ for _ in ()).throw(MemoryError()), torch.device("cpu")))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: rl.score(m, []), "there is no text to score"),
        (lambda m: rl.score(m, ["ab", 3]), "a list of texts or an array of tokens can be scored, got 3"),
        (lambda m: rl.score(m, ["ab", "a"]), r"text 1 \('a'\) has no token that anything predicts: bos=True"),
        (lambda m: rl.score(m, ["ab"], given=["x", "y"]), "2 prompts are given for 1 texts"),
        (lambda m: rl.score(m, m.to_tokens("ab"), bos=True), "tokens are scored as they are"),
        (lambda m: rl.score(m, ["ab", "a" * 25]), "text 1 has 25 tokens, .*n_ctx=24: window=24 reads it in windows"),
        (lambda m: rl.score(m, "ab", window=25), "window=25 is longer than the model's n_ctx=24"),
        (lambda m: rl.score(m, "ab", window=4, stride=5), "stride=5 would leave tokens out between windows of 4"),
        (lambda m: rl.score(m, "ab", memory=0), "memory must be a number of bytes above 0"),
    ],
)
def test_what_cannot_be_scored(call, message):
    with pytest.raises(rl.ReflowlensError, match=message):
        call(random_model("reflow"))


def test_a_patch_from_several_prompts_has_no_rows_of_its_own():
    model = random_model("reflow")
    with rl.intervene(model, rl.Patch("resid_pre", ["the", "cat"], layer=1, position=0)):
        with pytest.raises(rl.ReflowlensError, match="a patch from 2 prompts gives each row of a pass its own"):
            rl.score(model, ["abc", "def"])
        model(["abc", "def"])


def test_a_broken_weight_is_no_log_probability():
    model = random_model("reflow")
    with torch.no_grad():
        model.ln_final.w[0] = math.nan
    with pytest.raises(rl.ReflowlensError, match="a log-probability of text 0 is NaN"):
        rl.score(model, ["ab", "cd"])


def test_prompts_of_some_texts_only_and_of_an_iterator():
    model = random_model("gpt2")
    found = rl.score(model, ["king", "a road"], given=iter(["the ", None]))
    assert found.texts["given"].tolist() == ["the ", ""]
    for text, prompt, row in (("king", "the ", 0), ("a road", None, 1)):
        np.testing.assert_allclose(found.logprobs[row], rl.score(model, text, given=prompt).logprobs[0], rtol=1e-5)
    for wrong in (5, [5]):
        with pytest.raises(rl.ReflowlensError, match="given must be a text or a list of texts, got 5"):
            rl.score(model, ["king"], given=wrong)
