"""The lens against the plain definition: final norm, unembedding, softmax, one prompt at a time."""

from __future__ import annotations

import numpy as np
import pytest

from analyses.measures.lens import first_settled, read_lens, residual_points, residual_stack
from reflowlens.signals import VIEWS, signal_view
from tests.support.tiny import assert_close, random_model

PROMPTS = ["The capital", "A much longer prompt", "x"]


@pytest.fixture(scope="module")
def model():
    return random_model("reflow", seed=3)


def test_points_alternate_between_attention_and_mlp():
    points = residual_points(2)
    assert [point.depth for point in points] == [0, 0.5, 1, 1.5, 2]
    assert points[1].hook == "blocks.0.hook_resid_mid"
    assert points[-1].hook == "blocks.1.hook_resid_post"


def test_the_stack_reads_each_prompt_at_its_own_last_token(model):
    stack = residual_stack(model, PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        _, cache = model.run_with_cache(prompt)
        assert_close(stack[-1, i], cache["resid_post", 1][0, -1])
        assert_close(stack[1, i], cache["resid_mid", 0][0, -1])


@pytest.mark.parametrize("name", VIEWS)
def test_every_view_reads_the_model_s_own_distribution_at_the_end(model, name):
    targets = [5, 80, 255]
    reading = read_lens(signal_view(model, name), residual_stack(model, PROMPTS), targets)
    for i, (prompt, target) in enumerate(zip(PROMPTS, targets, strict=True)):
        p = model(prompt)[0, -1, :256].double().softmax(-1).detach()
        assert reading.probability[-1, i] == pytest.approx(float(p[target]), rel=1e-4)
        assert reading.rank[-1, i] == 1 + int((p > p[target]).sum())
        assert reading.top[-1, i] == int(p.argmax())
        assert reading.entropy[-1, i] == pytest.approx(float(-(p * p.log()).sum()), rel=1e-4)
        assert reading.kl[-1, i] == pytest.approx(0, abs=1e-5)
    assert (reading.kl[:-1] > 0).all()


def test_kl_is_from_the_model_to_the_lens(model):
    view = signal_view(model)
    reading = read_lens(view, residual_stack(model, PROMPTS), [1, 2, 3])
    _, cache = model.run_with_cache(PROMPTS[0])
    final = model(PROMPTS[0])[0, -1, :256].double().log_softmax(-1).detach()
    lens = view.logits(cache.signals(layer=1))[0, -1, :256].double().log_softmax(-1).detach()
    assert reading.kl[2, 0] == pytest.approx(float((final.exp() * (final - lens)).sum()), rel=1e-3)


def test_first_settled_is_the_start_of_the_last_run():
    holds = np.array([[1, 1, 0], [0, 1, 0], [1, 1, 0], [1, 1, 1]], dtype=bool)
    assert first_settled(holds).tolist() == [2, 0, 3]
