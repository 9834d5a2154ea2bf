"""Every family of decoders against transformers, and every tool on every family."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from reflowlens.checkpoints import load_model, save_model
from reflowlens.conversion import export_hf
from reflowlens.conversion.families import FAMILIES
from reflowlens.conversion.layout import to_ours
from reflowlens.models.decoder import Decoder
from reflowlens.storage.model_hash import model_hash
from tests.support.families import NAMES, ours, quiet, theirs
from tests.support.tiny import assert_close, random_tokens

every_family = pytest.mark.parametrize("name", NAMES)
TOKENS = random_tokens(ours("llama").cfg, batch=3, pos=20)  # longer than the windows


def logits_of(hf: Any, tokens: Tensor) -> Tensor:
    """transformers' own, without padding: it would tell a text's end by it."""
    return hf(tokens, attention_mask=torch.ones_like(tokens)).logits


# ------------------------------------------------------------------------------------------------- against transformers


@every_family
def test_logits_and_loss(name: str) -> None:
    model, hf = ours(name), theirs(name)
    with torch.no_grad():
        assert_close(model(TOKENS), logits_of(hf, TOKENS))
        assert_close(model(TOKENS, return_type="loss"), hf(TOKENS, labels=TOKENS).loss)


@every_family
def test_gradients_of_every_parameter(name: str) -> None:
    """Theirs, laid out as our parameters are: of what multiplies by 1 + w they are those of w."""
    model, hf = ours(name), theirs(name)
    family = next(each for each in FAMILIES if each.class_name == type(hf).__name__)
    found = torch.autograd.grad(model(TOKENS, return_type="loss"), list(model.parameters()))
    parameters = dict(hf.named_parameters())
    gradients = torch.autograd.grad(hf(TOKENS, labels=TOKENS).loss, list(parameters.values()))
    stored = {family.aliases.get(key, key): value for key, value in zip(parameters, gradients, strict=True)}
    layout = family.layout(model.cfg)
    expected, none = (
        to_ours(layout, {key: partial(torch.mul, value.double(), x) for key, value in stored.items()}, model.cfg, "")
        for x in (1.0, 0.0)
    )
    for (key, _), gradient in zip(model.named_parameters(), found, strict=True):
        if key.endswith("attn.b_K") and model.cfg.positional_embedding_type == "standard":
            assert gradient.abs().max() < 1e-7  # it moves all scores of a query alike
            continue
        assert_close(gradient.double(), expected[key] - none[key], what=key)


@every_family
def test_cached_generation_and_texts_of_several_lengths(name: str) -> None:
    """Token by token and in pieces as in one pass, and a text in a batch as alone: within windows and beyond."""
    model = ours(name)
    with torch.no_grad():
        whole = model(TOKENS)
        past = model.make_cache(len(TOKENS))
        steps = [model(part, past_kv_cache=past) for part in TOKENS.split([1, 7, 1, 1, 9, 1], dim=1)]
        assert_close(torch.cat(steps, dim=1), whole)
        texts = ["The film", "A longer text than", "x"]
        logits = model(texts)
        for row, text in enumerate(texts):
            assert_close(logits[row, : len(text)], model(text)[0])
        segments = torch.tensor([[0] * 9 + [1] * 11])
        packed = model(TOKENS[:1], segments=segments)
        assert_close(packed[:, 9:], model(TOKENS[:1, 9:]))
    prompt, never = TOKENS[:, :6], list(range(256, model.cfg.d_vocab))  # no bytes
    generated = theirs(name).generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=10, do_sample=False, suppress_tokens=never
    )
    assert model.generate(prompt, 10, temperature=0, return_type="tokens").equal(generated)


@every_family
def test_back_to_the_class_that_it_came_from(name: str, tmp_path: Path) -> None:
    model, hf = ours(name), theirs(name)
    with quiet():
        again = AutoModelForCausalLM.from_pretrained(export_hf(model, tmp_path / "hf")).eval()
    assert type(again) is type(hf)
    with torch.no_grad():
        assert_close(logits_of(again, TOKENS), logits_of(hf, TOKENS))


@every_family
def test_checkpoints(name: str, tmp_path: Path) -> None:
    model = ours(name)
    again = load_model(save_model(tmp_path / "model", model))
    assert isinstance(again, Decoder)
    assert again.cfg.to_dict() == model.cfg.to_dict()
    assert model_hash(again) == model_hash(model)
    assert again(TOKENS).equal(model(TOKENS))
