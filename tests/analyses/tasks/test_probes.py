"""Probes on a model that is built to carry a label, and on ones in which there is nothing to find."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import reflowlens as rl
from analyses.result.result import Result
from analyses.tasks.fitted_probes import folds_of, held_out
from analyses.tasks.probed import Places, activations_at
from analyses.tasks.probes import Probes, linear_probes
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from tests.reflowlens.models.test_bdh import random_bdh
from tests.reflowlens.models.test_ttt_flow import filled
from tests.support.planted import silent_blocks
from tests.support.tiny import random_model, tiny_config

LAYER = 1  # the block that carries it


def carrying_model() -> HookedModel:
    """Block 1 attends to all positions alike and adds what "a" and "b" have along coordinate 0: +1 and -1.

    No other token has any, so that the stream of the last position says nothing of them before that block.
    """
    model = silent_blocks(rl.build_model(tiny_config("gpt2_new", n_layers=3), seed=0))
    with torch.no_grad():
        model.embed.W_E.normal_(0, 1.0, generator=torch.Generator().manual_seed(0))
        model.embed.W_E[:, 0] = 0.0
        model.embed.W_E[ord("a"), 0], model.embed.W_E[ord("b"), 0] = 8.0, -8.0
        attention = model.blocks[LAYER].attn
        for weight in (attention.W_Q, attention.W_V, attention.W_O):
            weight.zero_()
        attention.W_V[0, 0, 0] = 1.0
        attention.W_O[0, 0, 0] = 8.0
    return model


def labelled(**more: Any) -> rl.Prompts:
    """A letter that tells the label, two that do not, and a full stop, which is read."""
    rows = []
    for i, letters in enumerate(itertools.islice(itertools.product("cdefg", repeat=2), 24)):
        for letter in "ab":
            rows.append({"clean": f"{letter}{''.join(letters)}.", "label": f"is {letter}", "pair": i, **more})
    return rl.Prompts.of(rows)


def test_results_by_group_of_prompts():
    """One group's labels are as the letter says, the other's are drawn: accuracy hides that, groups tell it."""
    drawn = np.random.default_rng(0).choice(["is a", "is b"], 48)
    told, guessed = (labelled(group=name).frame for name in ("told", "guessed"))
    rows = pd.concat([told, guessed.assign(label=drawn, clean="h" + guessed["clean"])], ignore_index=True)
    probes = linear_probes(carrying_model(), rl.Prompts.of(rows), "label", layers=LAYER, kind="ridge")
    groups = probes.frames["groups"].set_index(["group", "metric"])
    for metric in ("accuracy", "selectivity"):
        assert groups.loc[("all", metric), "value"] == pytest.approx(probes.metrics[metric])
        assert (groups.loc[("all", metric), "low"], groups.loc[("all", metric), "high"]) == pytest.approx(
            probes.intervals[metric]
        )
    assert groups.loc[("told", "accuracy"), "value"] > groups.loc[("guessed", "accuracy"), "value"] + 0.2
    assert groups["prompts"].unstack()["accuracy"].to_dict() == {"all": 96, "told": 48, "guessed": 48}
    assert "groups" in probes.figures
    assert "groups" not in linear_probes(carrying_model(), labelled(), "label", layers=LAYER, kind="ridge").frames


@pytest.mark.parametrize("kind", ["logistic", "ridge"])
def test_a_label_is_told_from_the_layer_on_that_carries_it(kind):
    probes = linear_probes(carrying_model(), labelled(), "label", kind=kind, together="pair")
    layers = probes.frames["layers"].set_index("layer")
    assert (layers.loc[[-1, 0], "accuracy"] < 0.75).all()
    assert layers.loc[[1, 2], "accuracy"].tolist() == [1.0, 1.0]
    assert (layers["majority"] == 0.5).all()
    assert probes.metrics["accuracy"] == 1.0
    assert probes.verdicts["accuracy"] == "supported"
    assert probes.controls["accuracy"]["embedding"] == layers.loc[-1, "accuracy"]
    assert probes.metrics["selectivity"] > 0.2
    for layer in (1, 2):
        direction = probes.direction(layer)
        assert abs(direction[0]) > 0.8  # the planted coordinate
        assert direction.norm().item() == pytest.approx(1, rel=1e-5)
        assert direction[0] < 0  # the last in the alphabet is "is b"
        torch.testing.assert_close(probes.direction(layer, "is a"), -direction)


def test_a_direction_steers():
    model, prompts = carrying_model(), labelled()
    probes = linear_probes(model, prompts, "label")
    frame = probes.frames["directions"].query("layer == 1 and label == 'is b'")
    direction, alpha = probes.direction(1), float(frame["separation"].iloc[0])
    stream = {}
    for text in ("acdk", "bcdk"):
        stream[text] = model.run_with_cache(text)[1]["blocks.1.hook_resid_post"][0, -1]
    with rl.intervene(model, rl.Steer("resid_post", direction, alpha=alpha, layer=1, position="last")):
        steered = model.run_with_cache("acdk")[1]["blocks.1.hook_resid_post"][0, -1]
    before = (stream["acdk"] - stream["bcdk"]) @ direction
    after = (steered - stream["bcdk"]) @ direction
    assert abs(after) < 0.3 * abs(before)
    rl.DirectionAt(direction, layer=1, name="b")


def test_nothing_is_found_where_there_is_nothing():
    """Labels at random: the accuracy is about the majority's, whatever layer is best by chance."""
    rng = np.random.default_rng(1)
    rows = [{"clean": "".join(rng.choice(list("cdefghij"), 4)), "label": int(rng.integers(2))} for _ in range(120)]
    probes = linear_probes(random_model("reflow"), rl.Prompts.of(rows), "label", kind="ridge")
    assert probes.verdicts["accuracy"] == "not supported"
    assert probes.intervals["accuracy"].low < 0.55


def test_near_duplicates_are_held_out_together():
    """Labels that belong to the pair by chance: by heart where a twin is in the fit, otherwise by guessing."""
    rng = np.random.default_rng(0)
    rows = []
    for pair in range(60):
        label, last = int(rng.integers(2)), chr(ord("0") + pair)
        rows += [{"clean": f"{letter}{last}", "label": label, "pair": pair} for letter in "ab"]
    prompts, model = rl.Prompts.of(rows), random_model(tiny_config("gpt2_new", d_model=64, d_head=16))
    how = {"kind": "ridge", "l2": 0.01, "layers": [-1]}
    apart = linear_probes(model, prompts, "label", **how)
    together = linear_probes(model, prompts, "label", **how, together="pair")
    assert apart.metrics["accuracy"] > 0.8
    assert together.metrics["accuracy"] < 0.65
    fold = together.frames["examples"].groupby("group")["fold"].nunique()
    assert (fold == 1).all()


def test_a_control_task_has_a_label_a_token_as_often_as_the_labels():
    prompts = rl.Prompts.of(
        [{"clean": text, "label": text[0]} for text in map("".join, itertools.product("ab", "cdefg", "klmnopqrst"))]
    )
    places = Places.of(random_model("reflow"), prompts, "label", "last", None, 1000, 0)
    assert places.kind_name == "token"
    labels = places.control_labels(0)
    tokens = np.array([ids[-1] for ids in places.ids])
    assert all(len(np.unique(labels[tokens == token])) == 1 for token in np.unique(tokens))
    assert set(labels) == {0, 1}
    few = Places.of(random_model("reflow"), prompts, "label", 0, None, 1000, 0)
    assert few.kind_name == "group"


def test_every_position_with_labels_of_its_own():
    """The token itself is the label: the embedding tells it, and the control task too, token by token."""
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdefghijkl"), 8)) for _ in range(30)]
    rows = [{"clean": text, "vowel": ["yes" if letter in "aei" else "no" for letter in text]} for text in texts]
    probes = linear_probes(random_model("gpt2_new"), rl.Prompts.of(rows), "vowel", at="all", layers=[-1])
    layers = probes.frames["layers"]
    assert layers["accuracy"][0] == layers["control_task"][0] == 1.0
    assert probes.metrics["selectivity"] == 0.0
    assert len(probes.frames["examples"]) == 240
    assert probes.frames["classes"]["examples"].sum() == 240
    assert (
        linear_probes(random_model("gpt2_new"), rl.Prompts.of(rows), "vowel", at="all", layers=[-1], most=100)
        .frames["examples"]
        .shape[0]
        == 100
    )


def test_classes_by_name_and_an_untrained_model():
    rows = [{"clean": f"{a}{b}{c}", "label": a} for a, b, c in itertools.product("abd", "efgh", "klmn")]
    model = random_model("reflow_lite")
    probes = linear_probes(
        model, rl.Prompts.of(rows), "label", at=0, layers=[-1, 1], untrained=rl.build_model(model.cfg)
    )
    assert probes.metrics["accuracy"] == 1.0
    assert probes.controls["accuracy"]["untrained"] == 1.0
    assert probes.verdicts["accuracy"] == "not supported"  # the embedding tells it
    assert set(probes.frames["layers"]["model"]) == {"trained", "untrained"}
    assert probes.direction(1, "d").shape == (32,)
    with pytest.raises(ReflowlensError, match="there are 3 labels, each with its direction: a, b, d"):
        probes.direction(1)


@pytest.mark.parametrize("name", ["reflow", "bdh", "ttt_flow"])
def test_activations_are_those_of_each_prompt_alone(name):
    model = {"bdh": random_bdh, "ttt_flow": filled}.get(name, lambda: random_model(name))()
    prompts = rl.Prompts.of([{"clean": text, "label": i % 2} for i, text in enumerate(["the", "a king", "be"])])
    places = Places.of(model, prompts, "label", -2, None, 100, 0)
    points = ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_post"]
    found = activations_at(model, places, points, progress=False, desc="")
    for i, text in enumerate(prompts.clean):
        cache = model.run_with_cache(text)[1]
        for point in points:
            np.testing.assert_allclose(found[point][i], cache[point][0, -2].numpy(), rtol=1e-4, atol=1e-5)


def test_memory_bounds_the_layers_of_a_pass(monkeypatch):
    asked = []

    def watched(model, places, points, **options):
        asked.append(len(points))
        return activations_at(model, places, points, **options)

    monkeypatch.setattr("analyses.tasks.fitted_probes.activations_at", watched)
    model, prompts = carrying_model(), labelled()
    few = linear_probes(model, prompts, "label", kind="ridge", memory=4 * 32 * 48 * 3)
    assert asked == [3, 1]
    all_ = linear_probes(model, prompts, "label", kind="ridge")
    assert few.frames["layers"].equals(all_.frames["layers"])


def test_it_is_kept(tmp_path):
    probes = linear_probes(carrying_model(), labelled(), "label", kind="ridge", quick=True, layers=[1])
    folder = probes.save(tmp_path / "probes", pages=False)
    torch.testing.assert_close(Probes.load(folder).direction(1), probes.direction(1))
    assert isinstance(Result.load(folder), Result)


def test_folds_are_as_scikit_learn_scores_them():
    """Held-out predictions are those of a plain loop of scikit-learn."""
    from sklearn.linear_model import RidgeClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng(0)
    x, y, fold = rng.standard_normal((60, 5)).astype(np.float32), rng.integers(3, size=60), np.arange(60) % 4
    found = held_out(x, y, fold, lambda a, b: RidgeClassifier(alpha=2.0).fit(a, b))
    for number in range(4):
        test = fold == number
        plain = make_pipeline(StandardScaler(), RidgeClassifier(alpha=2.0)).fit(x[~test], y[~test])
        assert (found[test] == plain.predict(x[test])).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label": "lable"}, "no column 'lable'"),
        ({"kind": "svm"}, "kind must be 'logistic' or 'ridge'"),
        ({"layers": [3]}, "layers are blocks, 0 to 2, or -1 for the embedding, got 3"),
        ({"l2": 0}, "l2 must be positive"),
        ({"folds": 30}, "30 folds need as many groups of each label that can be held out, and 'is a' has 24"),
        ({"label": "one"}, "a probe tells labels apart, and 'one' has one: x"),
    ],
)
def test_what_cannot_be_probed(options, message):
    with pytest.raises(ReflowlensError, match=message):
        linear_probes(carrying_model(), labelled(one="x"), **{"label": "label", "together": "pair", **options})


def test_groups_are_in_one_fold_each():
    places = Places.of(random_model("reflow"), labelled(), "label", "last", "pair", 1000, 0)
    fold = folds_of(places, 4, 0)
    assert all(len(np.unique(fold[places.group == group])) == 1 for group in np.unique(places.group))
    assert set(fold) == {0, 1, 2, 3}


@pytest.mark.parametrize("missing", [None, float("nan"), ""])
def test_a_missing_label_is_none_and_the_others_stay_as_they_are_written(missing):
    rows = labelled().frame.to_dict("records")
    rows = [row | {"label": missing if i % 6 == 5 else i % 2} for i, row in enumerate(rows)]
    probes = linear_probes(carrying_model(), rl.Prompts.of(rows), "label", layers=LAYER)
    assert probes.frames["classes"]["label"].tolist() == ["0", "1"]
    assert len(probes.frames["examples"]) == 40
    assert probes.frames["layers"]["layer"].tolist() == [LAYER]


@pytest.mark.parametrize("layers", [[], 9, 1.5, "1"])
def test_what_is_no_layer(layers):
    with pytest.raises(ReflowlensError, match="layers are blocks, 0 to 2"):
        linear_probes(carrying_model(), labelled(), "label", layers=layers)
