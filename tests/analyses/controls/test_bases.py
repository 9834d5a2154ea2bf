from __future__ import annotations

import pandas as pd
import pytest
import torch

from analyses.controls.bases import as_one_basis, by_metric, in_bases, rotated_views
from analyses.controls.nulls import shared_untrained, untrained_model
from reflowlens.checkpoints import model_hash
from reflowlens.errors import ReflowlensError
from reflowlens.signals import signal_view
from tests.support.tiny import assert_close, random_model


def test_a_measure_of_what_no_rotation_moves_is_the_same_in_every_basis_and_one_of_signals_is_not():
    view = signal_view(random_model("reflow"))
    found = in_bases(
        lambda each: (each.recipe @ each.basis, each.recipe), view, {}, rotations=2, seed=0, experiment="here"
    )
    embedding, recipe = found.own
    assert torch.equal(recipe, view.recipe)
    assert list(found.rotated) == ["rotated_0", "rotated_1"]
    for other_embedding, other_recipe in (*found.rotated.values(), found.varimax):
        assert_close(other_embedding, embedding, 1e-4)
        assert (other_recipe - recipe).abs().max() > 0.1 * recipe.abs().max()


def test_rotations_are_those_of_their_experiment_and_seed():
    view = signal_view(random_model("reflow"))
    first, again, other = (
        [rotated.recipe for _, rotated in rotated_views(view, 2, 0, experiment)] for experiment in ("a", "a", "b")
    )
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


def test_names_and_series_and_controls_of_numbers_by_basis():
    view = signal_view(random_model("reflow"))

    def largest_entry(each):
        return {"largest": float(each.recipe.abs().max())}

    sizes = in_bases(
        largest_entry,
        view,
        {"untrained": largest_entry(signal_view(random_model("reflow", seed=1)))},
        rotations=3,
        seed=0,
        experiment="here",
    )
    largest = by_metric(sizes)["largest"]
    assert list(largest.named("trained")) == ["trained", "untrained", *largest.rotated, "varimax"]
    assert {name: len(some) for name, some in largest.series("trained").items()} == {
        **dict.fromkeys(("trained", "untrained", "varimax"), 1),
        "rotated_basis": 3,
    }
    floor = sum(largest.rotated.values()) / 3
    assert largest.controls() == {
        "untrained": largest.nulls["untrained"],
        "rotated_basis": pytest.approx(floor),
        "varimax": largest.varimax,
    }
    frame = pd.DataFrame({"basis": list(largest.named("trained")), "largest": list(largest.named("").values())})
    assert as_one_basis(frame)["basis"].tolist() == ["trained", "untrained", *["rotated_basis"] * 3, "varimax"]


def test_one_rotation_has_no_spread():
    with pytest.raises(ReflowlensError, match="rotations must be at least 2"):
        in_bases(lambda each: 0.0, signal_view(random_model("reflow")), {}, rotations=1, seed=0, experiment="here")


def test_a_run_makes_the_untrained_model_once():
    model = random_model("reflow")
    with shared_untrained():
        first = untrained_model(model, 0)
        assert untrained_model(model, 0) is first
        other = untrained_model(model, 1)
        assert model_hash(other) != model_hash(first) == model_hash(untrained_model(model, 0))
    assert untrained_model(model, 0) is not untrained_model(model, 0)
