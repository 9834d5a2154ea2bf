"""Contributions against sets, loops and TransformerLens's direct logit attribution."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from analyses.experiments.signal_flow.contributions import (
    component_outputs,
    leading_signals,
    mean_lead_since,
    neighbour_overlap,
    random_overlap,
    read_contributions,
    split_contributions,
)
from analyses.measures.knockout import leading_share
from reflowlens.signals import random_rotation, rotate, signal_view
from tests.support.tiny import FACTORED, NAMES, assert_close, bias, random_model

PROMPTS = ["The capital", "A much longer prompt", "x"]
VALUES = arrays(np.float32, (4, 7), elements=st.integers(-20, 20).map(float), unique=True)
LEADING = arrays(np.bool_, (5, 2, 6))


@given(VALUES, st.integers(1, 7))
def test_leading_signals_are_the_largest_that_contribute(values, k):
    leading = leading_signals(torch.from_numpy(values), k).numpy()
    share = leading_share(torch.from_numpy(values), k).numpy()
    for row, found, held in zip(values, leading, share, strict=True):
        largest = sorted(range(len(row)), key=lambda s: -row[s])[:k]
        assert set(np.flatnonzero(found)) == {s for s in largest if row[s] > 0}
        positive = row[row > 0].sum()
        assert held == pytest.approx(row[found].sum() / positive if positive else 0)


@given(LEADING)
def test_overlap_is_the_jaccard_index(leading):
    overlap = neighbour_overlap(torch.from_numpy(leading)).numpy()
    for step, prompt in np.ndindex(4, 2):
        before, after = (set(np.flatnonzero(leading[step + i, prompt])) for i in (0, 1))
        expected = len(before & after) / len(before | after) if before | after else 1
        assert overlap[step, prompt] == pytest.approx(expected)


@given(LEADING)
def test_lead_since_is_the_start_of_the_last_run(leading):
    since = mean_lead_since(torch.from_numpy(leading)).numpy()
    for prompt in range(2):
        starts = []
        for signal in np.flatnonzero(leading[-1, prompt]):
            layer = 4
            while layer > 0 and leading[layer - 1, prompt, signal]:
                layer -= 1
            starts.append(layer / 4)
        assert since[prompt] == pytest.approx(np.mean(starts) if starts else 1)


@pytest.mark.parametrize(("n_signals", "k"), [(5, 2), (6, 3), (4, 4), (3, 1)])
def test_random_overlap_is_the_mean_over_all_pairs_of_sets(n_signals, k):
    sets = [set(each) for each in itertools.combinations(range(n_signals), k)]
    every = [len(a & b) / len(a | b) for a in sets for b in sets]
    assert random_overlap(n_signals, k) == pytest.approx(np.mean(every))


@pytest.mark.parametrize("name", NAMES)
def test_components_are_what_the_stream_is_made_of(name):
    model = random_model(name, seed=2)
    parts = component_outputs(model, PROMPTS)
    b_O = torch.stack([bias(block.attn.b_O).expand(model.cfg.d_model) for block in model.blocks])
    assert_close(parts.heads.sum(dim=1) + b_O[:, None], parts.attention)
    total = parts.embedding + parts.attention.sum(dim=0) + parts.mlp.sum(dim=0)
    for i, prompt in enumerate(PROMPTS):
        _, cache = model.run_with_cache(prompt)
        assert_close(total[i], cache["resid_post", 1][0, -1].detach())
        assert_close(parts.scale[i], cache["ln_final.hook_scale"][0, -1].detach())


@pytest.mark.parametrize("name", NAMES)
def test_the_split_is_transformer_lens_s_direct_logit_attribution(name):
    model = random_model(name, seed=2)
    target = 70
    parts = component_outputs(model, PROMPTS[0])
    split = split_contributions(signal_view(model), parts, torch.tensor([target]))
    _, cache = model.run_with_cache(PROMPTS[0])
    stack, labels = cache.decompose_resid(return_labels=True, pos_slice=-1)
    attributed = dict(zip(labels, cache.logit_attrs(stack, tokens=target, pos_slice=-1)[:, 0].tolist(), strict=True))
    ours = {f"{layer}_attn_out": split.attention[layer].sum().item() for layer in range(2)}
    ours |= {f"{layer}_mlp_out": split.mlp[layer].sum().item() for layer in range(2)}
    ours["embed"] = split.embedding.sum().item()
    attributed["embed"] += attributed.pop("pos_embed", 0)
    assert ours == pytest.approx({label: attributed[label] for label in ours}, rel=1e-4, abs=1e-4)
    heads, labels = cache.stack_head_results(return_labels=True, pos_slice=-1)
    attributed = dict(zip(labels, cache.logit_attrs(heads, tokens=target, pos_slice=-1)[:, 0].tolist(), strict=True))
    for layer, head in np.ndindex(*split.heads.shape[:2]):
        assert split.heads[layer, head].item() == pytest.approx(attributed[f"L{layer}H{head}"], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("view", ["native", "identity", "svd", "rotated"])
def test_contributions_and_parts_sum_to_the_model_s_logit(name, view):
    if view == "native" and name not in FACTORED:
        pytest.skip("this architecture has no native signals")
    model = random_model(name, seed=1)
    reading = read_contributions(signal_view(model, view), PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        logits = model(prompt)[0, -1].detach()
        assert reading.targets[i] == logits[:256].argmax()
        expected = logits[reading.targets[i]] - model.b_U[reading.targets[i]].detach()
        assert_close(reading.logits[-1, i], expected)
        assert_close(reading.contributions()[-1, i].sum(), expected)
        assert_close(reading.split.logit()[i], expected, relative=1e-4)
    assert reading.sum_error() < 2e-6
    assert reading.split_error() < 2e-6


def test_an_error_would_be_seen():
    reading = read_contributions(signal_view(random_model("reflow")), PROMPTS, target=9)
    assert (reading.targets == 9).all()
    assert reading._replace(readouts=reading.readouts * 1.001).sum_error() > 1e-5
    silent = reading.split._replace(mlp=torch.zeros_like(reading.split.mlp))
    assert reading._replace(split=silent).split_error() > 1e-3


def test_a_rotated_reading_is_that_of_the_rotated_view():
    view = signal_view(random_model("reflow_wide"))
    rotation = random_rotation(view.n_signals, seed=3)
    ours, expected = (
        read_contributions(view, PROMPTS).rotated(rotation),
        read_contributions(rotate(view, rotation), PROMPTS),
    )
    assert_close(ours.contributions(), expected.contributions())
    assert_close(ours.logits, expected.logits)
