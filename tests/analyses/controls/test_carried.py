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
    shares = parts[:, -2:] / parts.sum(dim=-1, keepdim=True)
    found = logit_error(view, final, seed=0)
    assert [found["constant_share"].value, found["error_share"].value] == pytest.approx(shares.mean(dim=0).tolist())
