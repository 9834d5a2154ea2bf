"""The fast step against the dense one: the same numbers, the same gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pretraining.dictionaries.config import DictionarySpec
from pretraining.dictionaries.objective import AUX_WEIGHT, evaluate_objective
from reflowlens.dictionaries.config import DictionaryConfig
from reflowlens.dictionaries.dictionary import Dictionary
from reflowlens.dictionaries.sparse import decode, dense, encode, largest, largest_of_batch
from tests.reference.dictionaries import reconstructions, top_of_batch, top_of_each

N, D, F = 11, 6, 24


def fresh(activation: str = "topk", **changes: object) -> Dictionary:
    k = 4 if activation in ("topk", "batchtopk") else None
    reads, writes = (tuple(f"blocks.{l}.{point}" for l in range(3)) for point in ("a", "b"))  # noqa: E741
    cfg = DictionaryConfig(reads, writes, D, D, F, activation, k, **changes)  # type: ignore[arg-type]
    dictionary = Dictionary.fresh(cfg, seed=1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in dictionary.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        for layer in dictionary.each_layer():
            if layer.threshold is not None:
                layer.threshold.abs_()
    return dictionary


def data(seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(N, D, generator=generator) for _ in range(6)]
    return drawn[:3], drawn[3:]


def gradients(dictionary: Dictionary, objective: Tensor) -> dict[str, Tensor]:
    dictionary.zero_grad()
    objective.backward()
    return {name: p.grad.clone() for name, p in dictionary.named_parameters() if p.grad is not None}


def same(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert (ours[name] - value).norm() <= 1e-5 * value.norm() + 1e-9, name


@pytest.mark.parametrize("changes", [{}, {"cross_layer": True}, {"skip": True}, {"cross_layer": True, "skip": True}])
@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_step_and_gradients_equal_dense_autograd(activation: str, changes: dict[str, bool]) -> None:
    dictionary = fresh(activation, **changes)
    x, y = data()
    spec = DictionarySpec("d", activation=activation, k=4, n_features=F)
    outcome = evaluate_objective(dictionary, spec, x, y, penalty_weight=0.0, dead=[torch.empty(0).long()] * 3)
    ours = gradients(dictionary, outcome.objective)
    choose = top_of_each if activation == "topk" else top_of_batch
    features = [choose(layer.preactivations(read), 4) for layer, read in zip(dictionary.each_layer(), x, strict=True)]
    said = reconstructions(dictionary, features, x)
    expected = sum((target - of).square().mean() for target, of in zip(y, said, strict=True))
    assert isinstance(expected, Tensor)
    assert outcome.objective.item() == pytest.approx(expected.item(), rel=1e-5)
    same(ours, gradients(dictionary, expected))
    assert outcome.n_active == [int((of_layer > 0).sum()) for of_layer in features]
    assert [fired.tolist() for fired in outcome.fired] == [(f > 0).any(0).tolist() for f in features]
    assert outcome.smallest == pytest.approx([f[f > 0].min().item() for f in features])
    errors = [(target - of).square().sum().item() for target, of in zip(y, said, strict=True)]
    assert outcome.squared_error == pytest.approx(errors, rel=1e-5)


def test_dead_features_learn_what_is_left_of_the_error() -> None:
    dictionary = fresh()
    x, y = data()
    spec = DictionarySpec("d", k=4, n_features=F)
    dead = torch.tensor([0, 3, 7, 9, 20])
    none = torch.empty(0).long()
    outcome = evaluate_objective(dictionary, spec, x, y, penalty_weight=0.0, dead=[none, dead, none])
    ours = gradients(dictionary, outcome.objective)
    plain = evaluate_objective(dictionary, spec, x, y, penalty_weight=0.0, dead=[none] * 3)
    layer = dictionary.each_layer()[1]
    value = top_of_each((x[1] @ layer.W_enc.T + layer.b_enc)[:, dead], D // 2)
    left = plain.errors[1] - value @ layer.W_dec[dead, 0]
    aux = left.square().mean() / plain.errors[1].square().mean()
    expected = plain.objective + AUX_WEIGHT * aux
    assert outcome.objective.item() == pytest.approx(expected.item(), rel=1e-5)
    same(ours, gradients(dictionary, expected))


@pytest.mark.parametrize("penalty", ["l1", "tanh"])
@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
def test_penalty_weighs_activations_by_their_decoders(activation: str, penalty: str) -> None:
    """Doubling an encoder and halving its decoder changes nothing: the norms are in the penalty."""
    dictionary = fresh(activation, cross_layer=True)
    spec = DictionarySpec("d", "cross_layer", activation=activation, penalty=penalty, n_features=F)
    x, y = data()
    none = [torch.empty(0).long()] * 3

    def objective() -> float:
        return evaluate_objective(dictionary, spec, x, y, penalty_weight=0.3, dead=none).objective.item()

    before = objective()
    unpenalised = evaluate_objective(dictionary, spec, x, y, penalty_weight=0.0, dead=none).objective.item()
    assert before > unpenalised
    with torch.no_grad():
        for layer in dictionary.each_layer():
            layer.W_enc *= 2
            layer.b_enc *= 2
            layer.W_dec /= 2
            if layer.threshold is not None:
                layer.threshold *= 2
    assert objective() == pytest.approx(before, rel=1e-5)


def test_threshold_learns_through_a_rectangle() -> None:
    """Of one feature: its gradient is -(θ/ε) Σ g over the activations within ε/2 of θ."""
    dictionary = fresh("jumprelu")
    spec = DictionarySpec("d", activation="jumprelu", n_features=F, bandwidth=0.5)
    x, y = data()
    outcome = evaluate_objective(dictionary, spec, x, y, penalty_weight=0.0, dead=[torch.empty(0).long()] * 3)
    found = gradients(dictionary, outcome.objective)["layers.0.threshold"]
    layer = dictionary.each_layer()[0]
    assert layer.threshold is not None
    before = layer.preactivations(x[0]).detach()
    value = (before * (before > layer.threshold)).detach().requires_grad_()
    (value @ layer.W_dec[:, 0] + layer.b_dec - y[0]).square().mean().backward()
    assert value.grad is not None
    near = (before - layer.threshold).abs() < 0.25
    assert int(near.sum()) > 5
    expected = -(layer.threshold / 0.5) * (value.grad * near).sum(0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 9), d=st.integers(1, 5), n_features=st.integers(1, 12), data=st.data())
def test_active_pairs_of_any_shape(n: int, d: int, n_features: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, n_features))
    torch.manual_seed(data.draw(st.integers(0, 999)))
    x, W_enc, b_enc, W_dec = (
        torch.randn(n, d),
        torch.randn(n_features, d),
        torch.randn(n_features),
        torch.randn(n_features, d),
    )
    before = x @ W_enc.T + b_enc
    active = largest(x, W_enc, b_enc, k)
    value = encode(x, W_enc, b_enc, active).relu()
    expected = top_of_each(before, k)
    torch.testing.assert_close(dense(value, active), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(decode(value, W_dec, active), expected @ W_dec, rtol=1e-5, atol=1e-5)
    of_batch = largest_of_batch(x, W_enc, b_enc, k)
    assert len(of_batch.feature) == k * n
    if 4 * k >= n_features:  # no position is held back
        value = encode(x, W_enc, b_enc, of_batch).relu()
        torch.testing.assert_close(dense(value, of_batch), top_of_batch(before, k), rtol=1e-5, atol=1e-6)


def test_comparing_in_bfloat16_changes_places_not_values() -> None:
    torch.manual_seed(0)
    x, W_enc, b_enc = torch.randn(64, 32), torch.randn(200, 32), torch.zeros(200)
    before = x @ W_enc.T
    active = largest(x, W_enc, b_enc, 8, torch.bfloat16)
    value = encode(x, W_enc, b_enc, active)
    torch.testing.assert_close(value, before[active.position, active.feature], rtol=1e-5, atol=1e-5)
    kept = value.view(64, 8).min(1).values
    eighth = before.sort(dim=1, descending=True).values[:, 7]
    assert ((eighth - kept) / eighth.abs()).max() < 0.05
