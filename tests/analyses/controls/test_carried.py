"""What a dictionary leaves out of predictions, told beside them."""

from __future__ import annotations

import pytest
import torch

from analyses.controls.carried import logit_error
from reflowlens.models.reflow import ReFlow
from reflowlens.signals import signal_view
from tests.support.dictionaries import dictionary_of
from tests.support.tiny import random_model


@torch.no_grad()
def test_shares_are_of_the_likeliest_token_and_never_of_padding() -> None:
    """Rows behind the tokenizer's vocabulary have logits too, here the largest, and no token has them."""
    model = random_model("reflow")
    assert isinstance(model, ReFlow)
    n = model.tokenizer.n_vocab
    model.embed.W_recipe[n:] *= 100
    view = signal_view(model, dictionary_of(model, "sae", "topk"))
    final = model.final_stream(["The capital", "of France i"])[:, -1]
    logits = model.unembed(model.ln_final(final)[:, None])[:, 0]
    assert (logits.argmax(dim=-1) >= n).all()
    parts = view.contributions(final, logits[:, :n].argmax(dim=-1))
    sizes = torch.cat([parts[:, :-2].sum(dim=-1, keepdim=True), parts[:, -2:]], dim=-1).abs()
    shares = sizes[:, 1:] / sizes.sum(dim=-1, keepdim=True)
    found = logit_error(view, final, seed=0)
    assert [found["constant_share"].value, found["error_share"].value] == pytest.approx(shares.mean(dim=0).tolist())


@torch.no_grad()
def test_shares_are_of_sizes_where_the_logit_is_near_nothing() -> None:
    """Parts that cancel: of a logit of 1e-6 they would be millions of times it."""
    view = signal_view(random_model("reflow"), dictionary_of(random_model("reflow"), "sae"))
    parts = torch.zeros(2, view.n_signals + 2)
    parts[:, 0], parts[:, -2], parts[:, -1] = 3.0, -1.0, torch.tensor([-2.0 + 1e-6, 4.0])
    object.__setattr__(view, "contributions", lambda stream, tokens: parts)
    found = logit_error(view, torch.zeros(2, 32), seed=0)
    assert found["error_share"].value == pytest.approx((2 / 6 + 4 / 8) / 2, rel=1e-5)
    assert found["constant_share"].value == pytest.approx((1 / 6 + 1 / 8) / 2, rel=1e-5)
