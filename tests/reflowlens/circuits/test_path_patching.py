"""Exact edge effects and paths, against runs in which every receiver's input is put together by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens import patching

import reflowlens as rl
from reflowlens import metrics
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from tests.reference.graph import Written, everything, graph_run
from tests.support.tiny import assert_close, random_tokens

A, B = 65, 66
METRIC = metrics.logit_diff(A, B)


def pair(model: HookedModel) -> tuple[Tensor, Tensor]:
    """Clean and corrupted prompts; of the first only the middle differs."""
    clean, corrupted = random_tokens(model.cfg, pos=5, seed=1), random_tokens(model.cfg, pos=5, seed=2)
    clean[0, [0, 1, 3]] = corrupted[0, [0, 1, 3]]
    return clean, corrupted


def measured(logits: Tensor) -> Tensor:
    return logits[:, -1, A] - logits[:, -1, B]


class Reference:
    """A corrupted run in which some receivers read something else."""

    def __init__(self, model: HookedModel) -> None:
        self.model = model
        clean, corrupted = (model(tokens, stop_at_layer=0) for tokens in pair(model))
        self.embedding = corrupted
        self.clean = graph_run(model, clean)[1]
        logits, self.corrupted = graph_run(model, corrupted)
        self.baseline = measured(logits)

    def effect(self, added: dict[str, Tensor]) -> Tensor:
        """Of adding to what each receiver reads."""

        def reads(receiver: str, written: Written) -> Tensor:
            return everything(receiver, written) + added.get(receiver, torch.zeros(1))

        return measured(graph_run(self.model, self.embedding, reads)[0]) - self.baseline

    def reaching(self, sender: str, through: list[str]) -> dict[str, Tensor]:
        """What every receiver reads otherwise when a sender is clean and all but the nodes on the way are frozen."""
        arrived: dict[str, Tensor] = {}

        def reads(receiver: str, written: Written) -> Tensor:
            seen = {name: self.corrupted[name] for name in written}
            seen |= {name: written[name] for name in through if name in written}
            if sender in written:
                seen[sender] = self.clean[sender]
            arrived[receiver] = everything(receiver, seen) - everything(receiver, {n: self.corrupted[n] for n in seen})
            return everything(receiver, seen)

        graph_run(self.model, self.embedding, reads)
        return arrived


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Effects are differences of logits, which are of size 1."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_every_edge_equals_performing_it(model: HookedModel) -> None:
    exact, reference = rl.exact_edges(model, *pair(model), METRIC), Reference(model)
    assert_close(exact.baseline, reference.baseline)
    graph = exact.graph
    edges = graph.edges
    assert len(exact.frame) == len(edges) == int((~exact.values.isnan()).sum()) // 2
    for sender, receiver in edges[::3]:
        added = {receiver: reference.clean[sender] - reference.corrupted[sender]}
        actual = exact.values[graph.sender(sender), graph.receiver(receiver)]
        assert_same(actual, reference.effect(added))
    assert exact.frame.score.abs().max() > 0.05


def test_edges_into_heads_equal_transformer_lens(model: HookedModel) -> None:
    clean, corrupted = pair(model)
    exact = rl.exact_edges(model, clean, corrupted, METRIC).matrix
    caches = [model.run_with_cache(tokens)[1] for tokens in (clean, corrupted)]
    components = ("q", "k", "v") if model.cfg.kv_heads == model.cfg.n_heads else ("q",)  # it refuses grouped heads
    for component in components:
        expected = patching.get_act_patch_direct_path_all_sources(
            model, corrupted, *caches, lambda logits: measured(logits).mean(), component=component, verbose=False
        )
        baseline = measured(model(corrupted)).mean()
        for head in range(model.cfg.n_heads):
            for receiver in range(model.cfg.n_heads):
                actual = torch.tensor(exact.loc[f"a0.h{head}", f"a1.h{receiver}<{component}>"])
                assert_same(actual, expected[0, head, 1, receiver] - baseline)


def test_one_path_is_the_edge(model: HookedModel) -> None:
    exact = rl.exact_edges(model, *pair(model), METRIC)
    for sender, receivers in {
        "embed": ["a0.h0<q>", "a1.h1<k>", "a0.h1<v>", "m1"],
        "a0.h2": ["m0", "a1.h0<v>", "logits"],
        "m0": ["a1.h0<k>", "m1", "logits"],
    }.items():
        for receiver in receivers:
            path = rl.path_patch(model, *pair(model), sender, receiver, METRIC)
            assert_same(path.effect()[0], exact.values[exact.graph.sender(sender), exact.graph.receiver(receiver)])


@pytest.mark.parametrize(
    ("sender", "receivers", "through"),
    [
        ("embed", ["logits"], ["a0.h1", "m0", "a1.h2", "m1"]),
        ("embed", ["a1.h3<q>"], ["m0"]),
        ("embed", ["a1.h0<k>", "a1.h1<v>", "m1"], ["a0.h0", "a0.h3"]),
        ("a0.h1", ["m1"], ["m0", "a1.h0"]),
        ("a0.h1", ["m0", "a1.h0<k>", "logits"], []),
        ("m0", ["logits"], ["a0.h0", "m0", "m1"]),  # nodes that come before the sender, or are it, do not count
    ],
)
def test_paths_equal_two_runs_by_hand(
    model: HookedModel, sender: str, receivers: list[str], through: list[str]
) -> None:
    reference = Reference(model)
    arrived = reference.reaching(sender, [name for name in through if name != sender])
    expected = reference.effect({receiver: arrived[receiver] for receiver in receivers})
    actual = rl.path_patch(model, *pair(model), sender, receivers, METRIC, through=through)
    assert_close(actual.baseline, reference.baseline)  # type: ignore[arg-type]
    assert_same(actual.effect()[0], expected)
    assert expected.abs().max() > 1e-3


def test_through_everything_is_patching_the_sender(model: HookedModel) -> None:
    """All paths from a node to the logits are what it does at all."""
    clean, corrupted = pair(model)
    senders = list(rl.Graph.of(model).senders)
    paths = rl.path_patch(model, clean, corrupted, senders, "logits", METRIC, through=senders[1:])
    assert list(paths.index_df.sender) == senders
    heads = rl.sweep(model, clean, corrupted, "attn_head_out", METRIC).values
    mlps = rl.sweep(model, clean, corrupted, [rl.Patch("mlp_out", layer=layer) for layer in (0, 1)], METRIC).values
    for row, sender in zip(paths.values, senders, strict=True):
        if sender == "embed":
            assert_close(row, measured(model(clean)))
        elif sender.startswith("a"):
            assert_close(row, heads[int(sender[1]), int(sender[-1])])
        else:
            assert_close(row, mlps[int(sender[1])])


def test_some_edges_in_little_memory(model: HookedModel) -> None:
    clean, corrupted = pair(model)
    exact = rl.exact_edges(model, clean, corrupted, METRIC)
    edges = [("m0", "a1.h1<v>"), ("embed", "a0.h2<q>"), ("m1", "logits"), ("a0.h3", "m0")]
    some = rl.exact_edges(model, clean, corrupted, METRIC, edges=edges, memory=100_000)
    assert set(zip(some.frame.sender, some.frame.receiver, strict=True)) == set(edges)
    for sender, receiver in edges:
        assert math.isclose(some.matrix.loc[sender, receiver], exact.matrix.loc[sender, receiver], abs_tol=1e-5)
    assert set(some.top(2)) <= set(edges)


def test_prompts_of_different_lengths(model: HookedModel) -> None:
    together = rl.exact_edges(model, ["abcde", "xy"], ["fgcij", "zy"], metrics.loss())
    for i, (clean, corrupted) in enumerate([("abcde", "fgcij"), ("xy", "zy")]):
        alone = rl.exact_edges(model, clean, corrupted, metrics.loss())
        edges = ~alone.values[..., 0].isnan()
        assert_close(together.values[edges][:, i], alone.values[edges][:, 0])


@pytest.mark.parametrize(
    ("sender", "receiver", "through", "message"),
    [
        ("a0.h9", "logits", [], "no sender 'a0.h9'"),
        ("a0.h1<q>", "logits", [], "no sender 'a0.h1<q>'"),
        ("m0", "a1.h5<q>", [], "no receiver 'a1.h5<q>'"),
        ("m0", "a1.h2<k>", [], "no receiver 'a1.h2<k>'"),  # there are two key/value heads
        ("m1", "m0", [], "no edge from 'm1' to 'm0'"),
        ("a0.h1", "a0.h2<q>", [], "no edge"),
        ("a0.h1", "logits", ["embed"], "cannot go through 'embed'"),
        ("a0.h1", "logits", ["m7"], "no sender 'm7'"),
    ],
)
def test_impossible_paths(
    tiny_models: dict[str, HookedModel], sender: str, receiver: str, through: list[str], message: str
) -> None:
    with pytest.raises(ReflowlensError, match=message):
        rl.path_patch(tiny_models["reflow_lite"], "abc", "abd", sender, receiver, METRIC, through=through)


def test_hooks_are_refused(tiny_models: dict[str, HookedModel]) -> None:
    model = tiny_models["reflow"]
    with rl.intervene(model, rl.Ablate("z", layer=0, head=1)):
        model("abc")
        with pytest.raises(ReflowlensError, match=r"leave rl\.intervene"):
            rl.exact_edges(model, "abc", "abd", METRIC)


@pytest.mark.slow
@pytest.mark.by_hand
def test_estimates_find_the_true_edges_of_the_packaged_model() -> None:
    if "reflow-nano" not in rl.list_models():
        pytest.skip("the packaged model is not there")
    model = rl.load_model("reflow-nano")
    texts = ("The capital of France is", "The capital of China is")
    metric = metrics.logit_diff(" Paris", " China")
    exact = rl.exact_edges(model, *texts, metric)
    with torch.enable_grad():
        once, mean = (rl.edge_attribution(model, *texts, metric, mode=mode) for mode in ("gradient", "integrated"))
    agreement = rl.agreement(once.frame.score, exact.frame.score)
    assert (agreement.n, agreement.spearman > 0.95, agreement.top_found >= 0.9) == (1108, True, True)
    assert rl.agreement(mean.frame.score, exact.frame.score).top_found >= 0.8
    curves = [rl.grow_circuit(model, *texts, scores, metric, sizes=[50, 100]).frame for scores in (once, mean)]
    assert (curves[1].faithfulness > curves[0].faithfulness).all()
