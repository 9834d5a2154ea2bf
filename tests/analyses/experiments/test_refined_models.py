"""The experiments on a TTTFlow: what they read is the refined stream, and what they change are whole passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from analyses.experiments.causal_ablation.experiment import causal_ablation
from analyses.experiments.circuit_tracing.additions import ends_with, log_probabilities
from analyses.experiments.circuit_tracing.experiment import circuit_tracing
from analyses.experiments.circuit_tracing.writers import Writers
from analyses.experiments.emotion_surgery.carriers import SteeredTexts
from analyses.experiments.layer_evolution.context_length import crystallisation_shares
from analyses.experiments.signal_flow.contributions import read_contributions
from analyses.experiments.typo_resilience.measure import compare_words
from analyses.words.lexicon import FactualPrompt, Lexicon
from reflowlens.errors import ReflowlensError
from reflowlens.signals import signal_view
from tests.reflowlens.models.test_ttt_flow import filled, text

FEW = Lexicon(
    version="few",
    factual=tuple(FactualPrompt(each, " x") for each in ("The king of", "She saw the", "A stone in")),
    short_prompts=("We saw a", "He went to"),
    neutral_texts=("The river runs by.",),
)
TOKENS = text(8)


def test_contributions_of_signals_are_to_the_logit_in_front_of_the_cap():
    model = filled()
    result = causal_ablation(model, lexicon=FEW, rotations=2)
    signals, prompt = result.frames["signals"], result.params["prompt"]
    stream, logits = model.final_stream(prompt)[0, -1].detach(), model(prompt)[0, -1].detach()
    target = int(logits.argmax())
    assert signals["contribution"].sum() == pytest.approx((stream @ model.W_U[:, target]).item(), rel=1e-4)
    assert signals["probability_before"].iloc[0] == pytest.approx(logits.softmax(-1)[target].item(), rel=1e-4)
    first = signals.iloc[0]

    def zero(x: Tensor, hook: Any) -> Tensor:
        x = x.clone()
        x[:, -1, int(first["signal"])] = 0.0
        return x

    without = model.run_with_hooks(prompt, fwd_hooks=[("hook_refined", zero)])[0, -1].detach()
    assert first["after_zero"] == pytest.approx(without.softmax(-1)[target].item(), rel=1e-3)


def test_what_is_added_to_blocks_and_refiners_reaches_the_prediction():
    model = filled()
    added = torch.zeros(3, 7, 1, 16)
    added[1, 2], added[2, 6] = 1.0, 0.5
    found = log_probabilities(model, ends_with(model, TOKENS, added))
    for row, point in ((0, None), (1, "blocks.2.hook_mlp_out"), (2, "flow.hook_delta")):
        hooks = []
        if point is not None:

            def add(x: Tensor, hook: Any, row: int = row) -> Tensor:
                return torch.cat([x[:, :-1], x[:, -1:] + (1.0 if row == 1 else 0.5)], dim=1)

            hooks = [(point, add)]
        expected = model.run_with_hooks(TOKENS, fwd_hooks=hooks)[0, -1].log_softmax(-1)
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-5)
    writers = Writers.of(model, None)
    assert [len(each) for each in writers.decoders] == [20, 20, 20, 20, 20, 0, 10]
    flow = model.flow
    written = writers.written(torch.tensor([6]), torch.tensor([3]), torch.tensor([2.0]))[0, 6]
    expected = 2 * flow.gate.sigmoid() * flow.W_out[3] @ flow.W_up
    torch.testing.assert_close(written, expected.detach(), rtol=1e-4, atol=1e-6)


def test_it_is_traced_to_its_neurons_and_those_of_the_flow_step():
    result = circuit_tracing(filled(), lexicon=FEW, units=4, quick=True)
    assert 0 < result.metrics["strongest_path_share"] < 1
    assert set(result.frames["units"]["layer"]) <= {0, 1, 2, 3, 4, 6}


def test_readings_end_in_the_prediction():
    model = filled()
    view = signal_view(model)
    likeness = compare_words(view, ["friend"], {"misspelt": ["freind"]}, ["The"])["misspelt"]
    p, q = (model(f"The {word}")[0, -1].detach().log_softmax(-1) for word in ("friend", "freind"))
    assert likeness.kl[-1, 0] == pytest.approx((p.exp() * (p - q)).sum().item(), rel=1e-3, abs=1e-6)
    assert 0 <= crystallisation_shares(view, ["The king"])[0] <= 1


def test_texts_are_steered_in_whole_passes():
    model, texts = filled(), ["The river runs.", "A stone lies."]
    direction = 0.3 * torch.randn(16, generator=torch.Generator().manual_seed(1))
    damage = SteeredTexts(model, texts).damage(3, direction)
    for i, (line, sign) in enumerate(zip(texts, (1, -1), strict=True)):
        before = model(line)[0, :-1].log_softmax(-1)
        change = [("blocks.3.hook_resid_pre", lambda x, hook, sign=sign: x + sign * direction)]
        after = model.run_with_hooks(line, fwd_hooks=change)[0, :-1].log_softmax(-1)
        targets = model.to_tokens(line)[0, 1:, None]
        loss = (before - after).gather(1, targets).mean()
        torch.testing.assert_close(damage.loss[i], loss, rtol=1e-3, atol=1e-5)


def test_who_writes_a_prediction_is_refused_with_what_says_it():
    with pytest.raises(ReflowlensError, match=r"blocks of a TTTFlow scale it .* rl\.attribute"):
        read_contributions(signal_view(filled()), ["The king"])
