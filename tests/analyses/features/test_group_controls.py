"""Random groups beside those of a graph."""

from __future__ import annotations

import numpy as np
import pytest

import reflowlens as rl
from analyses.features.group_controls import group_controls, random_group
from reflowlens.errors import ReflowlensError
from tests.support.dictionaries import dictionary_of


def test_random_groups_have_the_layers_of_the_others_and_take_the_same_test(tiny_models):
    model = tiny_models["gpt2"]
    graph = rl.attribute(model, "abcdef", dictionary_of(model, "clt"), progress=False)
    groups = graph.prune(0.99, 1.0).groups(similar=0.3, alike=-1.0)
    rng, number = np.random.default_rng(0), {node: i for i, node in enumerate(groups.whole.nodes["node"])}
    layers = groups.whole.nodes["layer"].to_numpy()
    for members in groups.members.values():
        own = [number[node] for node in members]
        drawn = random_group(groups, own, rng)
        assert len(set(drawn)) == len(own)
        assert sorted(layers[list(drawn)]) == sorted(layers[own])
    result = group_controls(model, dictionary_of(model, "plt"), ["abcde", "fghij"], draws=1, similar=0.3)
    assert set(result.metrics) == {"additive", "alike", "both", "deviation", "likeness"}
    row = result.frames["prompts"].iloc[0]
    assert row["both"] <= min(row["additive"], row["alike"]) <= 1
    with pytest.raises(ReflowlensError, match="two prompts with clusters"):
        group_controls(model, dictionary_of(model, "plt"), ["abcde"], similar=0.3)
