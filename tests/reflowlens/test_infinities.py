"""What one position overflows to does not reach the positions before it: it is selected away, not multiplied by 0."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import reflowlens as rl
from reflowlens.circuits.circuits import CircuitScore
from reflowlens.models.base import HookedModel
from reflowlens.models.numerics import weighted_sum
from tests.reflowlens.models.test_bdh import random_bdh
from tests.support.tiny import random_model

TEXT = "A cat sat down"
NAMES = ["reflow", "gpt2_biased", "llama_untied", "bdh"]
POINTS = ["hook_embed", "blocks.0.hook_resid_pre", "blocks.1.attn.hook_v", "blocks.1.attn.hook_k"]
PLACES = [(name, point) for name in NAMES for point in POINTS if name != "bdh" or "attn" not in point]


@pytest.fixture
def architecture(request: pytest.FixtureRequest, tiny_models: dict[str, HookedModel]) -> HookedModel:
    return random_bdh() if request.param == "bdh" else tiny_models[request.param]


@pytest.mark.parametrize("squares", [False, True], ids=["", "scores are watched"])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize(("architecture", "point"), PLACES, indirect=["architecture"])
def test_positions_before_an_infinity_are_what_they_were(
    architecture: HookedModel, point: str, value: float, squares: bool
) -> None:
    logits = architecture(TEXT)
    changes = [rl.Replace(point, value, position=-2)]
    if squares:
        changes += [rl.Scale(name, 1.0) for name in architecture.hook_dict if name.endswith("attn_scores")]
    actual = rl.run(architecture, TEXT, changes)
    torch.testing.assert_close(actual[:, :-2], logits[:, :-2], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(actual[:, -2:], logits[:, -2:])


@pytest.mark.parametrize("architecture", NAMES, indirect=True)
def test_a_sweep_and_a_run_agree_on_infinities(architecture: HookedModel) -> None:
    """Also where an earlier change makes the sweep run the positions before it."""
    metric = rl.metrics.logit_diff(5, 9, position=-3)
    cell = [
        rl.Replace("resid_pre", float("inf"), layer=1, position="last"),
        rl.Ablate("resid_pre", layer=1, position=2),
    ]
    swept = rl.sweep(architecture, None, TEXT, [cell], metric).values[0]
    expected = metric.of_logits(architecture, rl.run(architecture, TEXT, cell[1:]))
    torch.testing.assert_close(swept, expected, rtol=1e-5, atol=1e-5)


def test_long_texts_that_are_read_in_chunks() -> None:
    model, text = random_bdh(), "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer"
    change = rl.Replace("resid_pre", float("inf"), layer=1, position=41)
    torch.testing.assert_close(rl.run(model, text, change)[:, :41], model(text)[:, :41], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gradients", [False, True])
def test_a_position_that_no_loss_reads_does_not_spoil_it(tiny_models: dict[str, HookedModel], gradients: bool) -> None:
    model, overflow = tiny_models["reflow"], rl.Replace("resid_post", float("inf"), layer=1, position="last")
    with torch.set_grad_enabled(gradients):
        actual = rl.run(model, ["A cat sat", "A dog"], overflow, return_type="loss")
        expected = model(["A cat sat", "A dog"], "loss")
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_weighted_sum_is_the_product_but_for_weights_of_zero(dtype: torch.dtype) -> None:
    inf, nan = float("inf"), float("nan")
    weights = torch.tensor([[0.5, 0, 0], [1, 2, 0], [-1, 0, 3], [0.5, 0.5, nan]], dtype=dtype)
    values = torch.tensor([[1.0, inf, 2, inf], [4, -inf, 5, inf], [6, inf, nan, 0]], dtype=dtype)
    expected = [[0.5, inf, 1, inf], [9, nan, 12, inf], [17, nan, nan, -inf], [nan] * 4]
    _assert_same(weighted_sum(weights, values), torch.tensor(expected, dtype=dtype))
    finite = values.nan_to_num(0, 0, 0)
    _assert_same(weighted_sum(weights, finite), weights @ finite)


def overflowing(name: str) -> HookedModel:
    """A model that gives one token infinite activations."""
    model = random_model(name)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if n in ("embed.W_recipe", "embed.W_E"))[ord("z")] = torch.inf
    return model


def score(circuit: CircuitScore) -> Tensor:
    return torch.tensor([circuit.value, circuit.pvalue, *circuit.null])


PATCHES = [rl.Patch("resid_pre", layer=1), rl.Patch("pattern", layer=0), rl.Ablate("k", layer=0)]
PATCHES += [rl.Patch("attn_scores", layer=0, position=1), rl.Ablate("hook_embed"), rl.Steer("mlp_out", [1.0], layer=1)]
SCORES: dict[str, Callable[..., Tensor]] = {
    "EAP": lambda *of: rl.edge_attribution(*of, mode="gradient").values,
    "EAP-IG": lambda *of: rl.edge_attribution(*of, steps=2).values,
    "exact edges": lambda *of: rl.exact_edges(*of, edges=[("a0.h1", "a1.h1<q>"), ("m0", "logits")]).values,
    "gradient": lambda m, a, b, metric: rl.sweep(m, a, b, PATCHES, metric, mode="gradient").values,
    "integrated": lambda m, a, b, metric: rl.sweep(m, a, b, PATCHES, metric, mode="integrated", steps=2).values,
    "faithfulness": lambda m, a, b, metric: score(rl.faithfulness(m, a, b, ["m0", "a1.h2"], metric, controls=3)),
    "completeness": lambda m, a, b, metric: score(rl.completeness(m, a, b, [("a0.h2", "m1")], metric, controls=3)),
}
ENDS = [("abcdz", "xbfgz"), ("abcdz", "xbfgk"), ("abcdk", "xbfgz")]


@pytest.mark.parametrize("measure", SCORES)
@pytest.mark.parametrize("name", ["reflow", "gpt2_biased", "reflow_lite"])
def test_scores_of_what_comes_before_an_infinity_are_those_of_the_prompts_without_it(name: str, measure: str) -> None:
    model, of = overflowing(name), SCORES[measure]
    for clean, corrupted in ENDS:
        actual = of(model, clean, corrupted, rl.metrics.logit_diff(5, 9, position=-2))
        expected = of(model, clean[:-1], corrupted[:-1], rl.metrics.logit_diff(5, 9))
        assert expected.isfinite().any()
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("point", ["blocks.1.hook_resid_pre", "blocks.0.attn.hook_v", "blocks.1.hook_attn_out"])
@pytest.mark.parametrize("measure", ["EAP", "gradient"])
def test_estimates_under_an_intervention_that_makes_an_infinity(measure: str, point: str) -> None:
    model, metric = random_model("reflow"), rl.metrics.logit_diff(5, 9, position=-2)
    expected = SCORES[measure](model, "abcd", "xbfg", rl.metrics.logit_diff(5, 9))
    with rl.intervene(model, rl.Replace(point, torch.inf, position=4)):
        actual = SCORES[measure](model, "abcde", "xbfgh", metric)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("measure", ["EAP", "EAP-IG", "exact edges"])
@pytest.mark.parametrize("pair", [("abzd", "xbfg"), ("abcd", "xbzg"), ("abzd", "xbzg")])
def test_an_edge_without_a_right_score_is_an_error_and_no_missing_edge(measure: str, pair: tuple[str, str]) -> None:
    clean, corrupted = (["abcd", prompt] for prompt in pair)
    with pytest.raises(rl.ReflowlensError, match=r"prompt 1: the score of the edge from .* activations overflow"):
        SCORES[measure](overflowing("reflow"), clean, corrupted, rl.metrics.logit_diff(5, 9))


@pytest.mark.parametrize("pair", [("abzd", "xbfg"), ("abcd", "xbzg")])
def test_circuits_of_runs_that_overflow_are_an_error(pair: tuple[str, str]) -> None:
    with pytest.raises(rl.ReflowlensError, match="prompt 0: the metric of a circuit's run is nan: activations overfl"):
        rl.faithfulness(overflowing("reflow"), *pair, ["m0"], rl.metrics.logit_diff(5, 9), controls=2)


def _assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
