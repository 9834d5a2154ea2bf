"""Doses of one feature: against plain hooks, in units of its percentile, beside random features."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import reflowlens as rl
from reflowlens.errors import ReflowlensError
from tests.support.dictionaries import dictionary_of

PROMPT, TEXT = "abcde", "a small text, and another one; " * 3


@pytest.mark.parametrize("kind", ["plt", "clt", None])
def test_a_dose_is_what_replacing_the_feature_does(kind, tiny_models):
    model = tiny_models["gpt2_biased"]
    dictionary = None if kind is None else dictionary_of(model, kind)
    feature = rl.FeatureAt(0, 7, 2)
    frame = rl.dose_response(model, dictionary, feature, "g", PROMPT, (0, 1, 3), quantile=2.0, controls=5)
    assert len(frame) == 18
    assert frame.groupby("feature")["control"].all().sum() == 5
    own = frame[~frame["control"]]
    assert own["feature"].eq(7).all()
    assert own["activation"].tolist() == [0, 2, 6]
    for row in frame.itertuples():
        point = "blocks.0.mlp.hook_post" if dictionary is None else "blocks.0.hook_features"
        change = rl.Replace(point, torch.tensor(row.activation), index=row.feature, position=2)
        with torch.no_grad():
            if dictionary is None:
                logits = rl.run(model, PROMPT, change)[0, -1]
            else:
                with dictionary.spliced(model):
                    logits = rl.run(model, PROMPT, change)[0, -1]
        assert row.logit == pytest.approx(float(logits[ord("g")] - logits.mean()), abs=1e-4)
        assert row.probability == pytest.approx(float(logits.softmax(-1)[ord("g")]), rel=1e-4)
    assert np.allclose(frame["log_prob"], np.log(frame["probability"]))
    assert own["probability"].nunique() == 3


def test_random_features_write_as_much(tiny_models):
    model = tiny_models["gpt2"]
    dictionary = dictionary_of(model, "clt")
    frame = rl.dose_response(model, dictionary, rl.FeatureAt(1, 3), "g", PROMPT, (2,), quantile=1.0, controls=6)
    sizes = frame["activation"].to_numpy() * dictionary.decoder_norms(1).numpy()[frame["feature"]]
    np.testing.assert_allclose(sizes, sizes[0], rtol=1e-5)
    assert frame["feature"].is_unique
    again = rl.dose_response(model, dictionary, rl.FeatureAt(1, 3), "g", PROMPT, (2,), quantile=1.0, controls=6, seed=1)
    assert again["feature"].tolist() != frame["feature"].tolist()


def test_a_dose_of_one_is_the_percentile_of_active_tokens(tiny_models):
    model = tiny_models["reflow"]
    dictionary = dictionary_of(model, "plt")
    tokens = torch.tensor(list(TEXT.encode()))
    parts = [model.run_with_cache(part[None])[1]["blocks.1.ln2.hook_normalized"][0] for part in tokens.split(24)]
    features = dictionary.each_layer()[1].encode(torch.cat(parts))[:, 5].detach()
    expected = np.quantile(features[features > 0].double().numpy(), 0.999)
    given = rl.FeatureAt(1, 5), "g", PROMPT, (1,)
    frame = rl.dose_response(model, dictionary, *given, text=TEXT, controls=0)
    assert frame["activation"].item() == pytest.approx(expected, rel=1e-6)
    table = torch.zeros(2, 40)
    table[1, 5] = 0.7
    assert rl.dose_response(model, dictionary, *given, quantile=table, controls=0)[
        "activation"
    ].item() == pytest.approx(0.7)
    assert rl.dose_response(model, dictionary, *given, controls=0)["activation"].item() > 0  # in the packaged plays


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"feature": rl.FeatureAt(0, 40)}, "no feature 40: they are 0 to 39"),
        ({"feature": rl.FeatureAt(2, 0)}, "no layer 2"),
        ({"feature": rl.FeatureAt(0, 0, 5)}, "no position 5"),
        ({"feature": 7}, "a dose is of one feature, as rl.FeatureAt"),
        ({"token": "no single token"}, "token"),
        ({"prompt": ["ab", "cd"]}, "a dose is given in one prompt, got 2"),
        ({"doses": ()}, "doses must be finite numbers"),
        ({"doses": (0, float("inf"))}, "doses must be finite numbers"),
        ({"doses": (0, float("nan"))}, "a dose must be a number"),
        ({"quantile": 0.0}, "quantile is the 99.9th percentile"),
        ({"quantile": np.zeros((2, 3))}, "quantile is the 99.9th percentile"),
        ({"controls": 40}, "controls=40 is more than there are other features of the layer, 39"),
        ({"quantile": None, "text": ["a"]}, "text must be one text"),
        ({"quantile": None, "text": ""}, "feature 0 of block 0 is not active in the text"),
        ({"quantile": None, "text": "a"}, "feature 0 of block 0 is not active in the text"),
    ],
)
def test_what_cannot_be_given_is_refused(changed, match, tiny_models):
    model = tiny_models["gpt2"]
    dictionary = dictionary_of(model, "plt")
    if changed.get("text") == "a":
        with torch.no_grad():
            dictionary.each_layer()[0].b_enc[0] = -100.0
    given = {"feature": rl.FeatureAt(0, 0), "token": "g", "prompt": PROMPT, "quantile": 1.0} | changed
    with pytest.raises(ReflowlensError, match=match):
        rl.dose_response(model, dictionary, **given)
