"""Edges, paths, circuits and integrated gradients of pairs of unequal length: against one pair at a time, by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import reflowlens as rl
from reflowlens.models.base import HookedModel
from tests.reference.graph import Written, everything, graph_run
from tests.reflowlens.sweeps.test_prompt_sweeps import PROMPTS, places
from tests.support.tiny import assert_close

ROLES = ["subject", "last"]
ALIGNED = ["right", ROLES]
MODELS = ["gpt2_biased", "llama_untied", "reflow_lite"]  # learned positions and rotary ones, grouped heads, a recipe
NODES = ["a0.h1", "m0", "a1.h2"]


@pytest.fixture(params=MODELS)
def decoder(request: Any, tiny_models: dict[str, HookedModel]) -> HookedModel:
    return tiny_models[request.param]


def partners(row: int, positions: Any, of: str = "corrupted") -> dict[int, int]:
    """Which position of the other prompt each of one prompt stands for, by counting characters."""
    one = PROMPTS.select([row])
    if positions == "right":
        clean, corrupted = len(one.clean[0]), len(one.corrupted[0])
        pairs = [(corrupted - k, clean - k) for k in range(1, min(clean, corrupted) + 1)]
    else:
        pairs = [(places(one, role, "corrupted")[0], places(one, role, "clean")[0]) for role in positions]
    return dict(pairs if of == "corrupted" else [(q, p) for p, q in pairs])


def with_partners(own: Tensor, other: Tensor, partner: dict[int, int]) -> Tensor:
    """An activation [1, pos, d_model], at some positions that of another run."""
    taken = own.clone()
    for p, q in partner.items():
        taken[:, p] = other[:, q]
    return taken


def measured(logits: Tensor, row: int) -> Tensor:
    right, wrong = (ord(token) for token in (PROMPTS.answers[row], PROMPTS.wrong_answers[row]))  # type: ignore[arg-type]
    return logits[0, -1, right] - logits[0, -1, wrong]


def both_runs(model: HookedModel, row: int) -> tuple[Written, Written, Tensor, Tensor]:
    """What all nodes write in the clean and in the corrupted run of a pair, and what both start from."""
    streams = [model(texts[row], stop_at_layer=0).detach() for texts in (PROMPTS.clean, PROMPTS.corrupted)]
    clean, corrupted = (graph_run(model, stream)[1] for stream in streams)
    return clean, corrupted, *streams


def changes(model: HookedModel, row: int, positions: Any) -> dict[str, Tensor]:
    """What each sender writes otherwise, at the positions that are patched."""
    clean, corrupted, *_ = both_runs(model, row)
    partner = partners(row, positions)
    return {name: with_partners(x, clean[name], partner) - x for name, x in corrupted.items() if x.ndim == 3}


@pytest.mark.parametrize("positions", ALIGNED, ids=str)
def test_edges_equal_performing_each(decoder: HookedModel, positions: Any) -> None:
    exact = rl.exact_edges(decoder, PROMPTS, metric=rl.metrics.logit_diff(PROMPTS), positions=positions)
    edges = exact.graph.edges
    for row in range(len(PROMPTS)):
        added = changes(decoder, row, positions)
        embedding = both_runs(decoder, row)[-1]
        before = measured(graph_run(decoder, embedding)[0], row)
        for sender, receiver in edges[row :: len(edges) // 5]:

            def reads(name: str, written: Written, at: str = receiver, change: Tensor = added[sender]) -> Tensor:
                return everything(name, written) + (change if name == at else 0.0)

            wanted = measured(graph_run(decoder, embedding, reads)[0], row) - before
            actual = exact.values[exact.graph.sender(sender), exact.graph.receiver(receiver), row]
            torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)
    assert exact.values.nan_to_num().abs().amax(dim=(0, 1)).min() > 1e-3


def input_path(model: HookedModel, row: int, positions: Any, share: float) -> Tensor:
    """The corrupted run's start with the embeddings of aligned tokens on the way to the clean ones."""
    point = "hook_recipe" if "hook_recipe" in model.hook_dict else "hook_embed"
    clean, corrupted = (model.run_with_cache(t[row])[1][point] for t in (PROMPTS.clean, PROMPTS.corrupted))
    there = with_partners(corrupted, clean, partners(row, positions))
    moved = torch.lerp(corrupted, there, share)
    hooks = [(point, lambda x, hook: moved)]
    return model.run_with_hooks(PROMPTS.corrupted[row], fwd_hooks=hooks, stop_at_layer=0).detach()


@pytest.mark.parametrize("positions", ALIGNED, ids=str)
@pytest.mark.parametrize("steps", [None, 2])
def test_edge_attribution_equals_autograd(decoder: HookedModel, positions: Any, steps: int | None) -> None:
    options: dict[str, Any] = {"mode": "integrated", "steps": steps} if steps else {"mode": "gradient"}
    metric = rl.metrics.logit_diff(PROMPTS)
    scores = rl.edge_attribution(decoder, PROMPTS, metric=metric, positions=positions, **options)
    graph = scores.graph
    for row in range(len(PROMPTS)):
        added = torch.stack([changes(decoder, row, positions)[name] for name in graph.senders])
        total = torch.zeros(len(graph.senders), len(graph.receivers))
        for share in [(step + 0.5) / steps for step in range(steps)] if steps else [0.0]:
            start = input_path(decoder, row, positions, share)
            zeros = {name: torch.zeros_like(start, requires_grad=True) for name in graph.receivers}

            def reads(name: str, written: Written, zeros: dict[str, Tensor] = zeros) -> Tensor:
                return everything(name, written) + zeros[name]

            value = measured(graph_run(decoder, start, reads)[0], row)
            slopes = torch.stack(torch.autograd.grad(value, list(zeros.values())))
            total += torch.einsum("sbpd,rbpd->sr", added, slopes).detach() / (steps or 1)
        wanted = graph.only_edges(total)
        torch.testing.assert_close(scores.values[..., row], wanted, rtol=1e-3, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("positions", ALIGNED, ids=str)
@pytest.mark.parametrize("ablation", ["corrupted", "mean"])
def test_circuits_equal_runs_by_hand(decoder: HookedModel, positions: Any, ablation: Any) -> None:
    """Outside the circuit a node writes what the corrupted one does at its partner, or its own where it has none."""
    rows = [0, 2] if ablation == "mean" else [0, 1, 2]  # in row 1 the subject is the last word: of two means
    prompts, graph = PROMPTS.select(rows), rl.Graph.of(decoder)
    metric, runs = rl.metrics.logit_diff(prompts), {row: both_runs(decoder, row) for row in rows}
    kept = {(sender, receiver) for sender, receiver in graph.edges if sender in {*NODES, "embed"}}
    some = set(graph.edges[::2])
    for circuit, edges, nothing in (
        (NODES, kept, {e for e in kept if e[0] == "embed"}),
        (graph.edges[::2], some, set()),
    ):
        options: dict[str, Any] = {"ablation": ablation, "positions": positions, "controls": 0}
        score = rl.faithfulness(decoder, prompts, None, circuit, metric, **options)
        left = rl.completeness(decoder, prompts, None, circuit, metric, **options)
        rest = set(graph.edges) - edges | nothing
        for i, (row, (clean, _, embedding, _)) in enumerate(runs.items()):
            replaced = {
                name: x if x.ndim < 3 else _replaced(name, row, positions, ablation, runs) for name, x in clean.items()
            }
            for actual, through in ((score.metric, edges), (left.metric, rest), (score.empty, nothing)):

                def reads(
                    receiver: str, written: Written, through: Any = through, outside: Written = replaced
                ) -> Tensor:
                    whole = {u: x if (u, receiver) in through else outside[u] for u, x in written.items()}
                    return everything(receiver, whole)

                wanted = measured(graph_run(decoder, embedding, reads)[0], row)
                torch.testing.assert_close(actual[i], wanted, rtol=1e-4, atol=1e-5)
            assert_close(score.full[i], measured(graph_run(decoder, embedding)[0], row), relative=1e-4)


def _replaced(name: str, row: int, positions: Any, ablation: str, runs: dict[int, Any]) -> Tensor:
    """What a node writes where it is replaced: at its partner, or the mean of those that stand at the same label."""
    own, others = runs[row][0][name], {other: run[1][name] for other, run in runs.items()}
    if ablation == "corrupted":
        return with_partners(own, others[row], partners(row, positions, of="clean"))
    filled = own.clone()
    labels = range(-own.shape[1], 0) if positions == "right" else positions
    for label in labels:
        at = places(PROMPTS.select([row]), label, "clean")[0]
        there = places(PROMPTS, label, "corrupted")
        taken = [other[0, there[i]] for i, other in others.items() if there[i] >= 0]
        if taken:
            filled[0, at] = torch.stack(taken).mean(dim=0)
    return filled


@pytest.mark.parametrize("positions", ALIGNED, ids=str)
def test_all_paths_from_the_embedding_are_the_aligned_input(decoder: HookedModel, positions: Any) -> None:
    """And those from a head are patching it where it is aligned."""
    senders = list(rl.Graph.of(decoder).senders)
    paths = rl.path_patch(
        decoder, PROMPTS, None, ["embed", "a0.h1"], "logits", rl.metrics.logit_diff(PROMPTS),
        through=senders[1:], positions=positions,
    )  # fmt: skip
    for row in range(len(PROMPTS)):
        partner = partners(row, positions)
        for sender, point in enumerate(("blocks.0.hook_resid_pre", "blocks.0.attn.hook_z")):
            clean, before = (decoder.run_with_cache(t[row])[1][point] for t in (PROMPTS.clean, PROMPTS.corrupted))
            patched = with_partners(before, clean, partner)
            if sender:
                patched[:, :, [0, 2, 3]] = before[:, :, [0, 2, 3]]
            logits = decoder.run_with_hooks(PROMPTS.corrupted[row], fwd_hooks=[(point, lambda x, hook, y=patched: y)])
            torch.testing.assert_close(paths.values[sender, row], measured(logits, row), rtol=1e-4, atol=1e-5)


Measure = Callable[[Any, rl.Prompts, Any], Tensor]  # the last axis is that of the pairs


def _sweep(model: Any, prompts: rl.Prompts, positions: Any) -> Tensor:
    metric = rl.metrics.logit_diff(prompts)
    return rl.sweep(
        model, prompts, cells="resid_mid", metric=metric, positions=positions, mode="integrated", steps=3
    ).values[:, -2:]


def _circuit(model: Any, prompts: rl.Prompts, positions: Any) -> Tensor:
    score = rl.faithfulness(model, prompts, None, NODES, rl.metrics.kl(), controls=0, positions=positions)
    return torch.stack([score.metric, score.full, score.empty])


MEASURES: dict[str, Measure] = {
    "EAP": lambda m, p, at: rl.edge_attribution(
        m, p, metric=rl.metrics.kl(), positions=at, mode="gradient"
    ).values,
    "EAP-IG": lambda m, p, at: rl.edge_attribution(
        m, p, metric=rl.metrics.logit_diff(p), positions=at, steps=3
    ).values,
    "exact edges": lambda m, p, at: rl.exact_edges(m, p, metric=rl.metrics.kl(), positions=at).values,
    "faithfulness": _circuit,
    "integrated": _sweep,
}  # fmt: skip


@pytest.mark.parametrize("name", ["gpt2_biased", "reflow_lite"])
@pytest.mark.parametrize("positions", ALIGNED, ids=str)
@pytest.mark.parametrize("measure", MEASURES)
def test_each_pair_alone(tiny_models: dict[str, HookedModel], name: str, positions: Any, measure: str) -> None:
    """A pair of equal length among them too, whose input goes to the clean one token by token."""
    rows = PROMPTS.frame.assign(corrupted=[*PROMPTS.corrupted[:2], "one hen went"])
    rows.loc[2, ["clean", "subject", "corrupted_subject"]] = ["one owl went", "owl", "hen"]
    prompts, of = rl.Prompts.of(rows), MEASURES[measure]
    together = of(tiny_models[name], prompts, positions)
    alone = [of(tiny_models[name], prompts.select([row]), positions) for row in range(3)]
    torch.testing.assert_close(together, torch.cat(alone, dim=-1), rtol=1e-5, atol=1e-5, equal_nan=True)


def test_integrated_gradients_add_up_to_the_aligned_input(tiny_models: dict[str, HookedModel]) -> None:
    model, metric = tiny_models["gpt2"], rl.metrics.logit_diff(PROMPTS)
    options: dict[str, Any] = {"cells": "tokens", "metric": metric, "positions": "right"}
    summed = rl.sweep(model, PROMPTS, mode="integrated", steps=400, **options).effect().nansum(dim=0)
    for row in range(len(PROMPTS)):
        moved, start = (graph_run(model, input_path(model, row, "right", share))[0] for share in (1.0, 0.0))
        torch.testing.assert_close(summed[row], measured(moved, row) - measured(start, row), rtol=1e-3, atol=1e-3)


def test_growing_judges_the_circuits_that_faithfulness_judges(tiny_models: dict[str, HookedModel]) -> None:
    model, metric = tiny_models["llama_untied"], rl.metrics.logit_diff(PROMPTS)
    scores = rl.edge_attribution(model, PROMPTS, metric=metric, positions=ROLES)
    for of in ("nodes", "edges"):
        grown = rl.grow_circuit(model, PROMPTS, scores=scores, metric=metric, of=of, sizes=[4], positions=ROLES)  # type: ignore[arg-type]
        for function, column in ((rl.faithfulness, "faithfulness"), (rl.completeness, "completeness")):
            alone = function(model, PROMPTS, None, grown.circuits[0], metric, controls=0, positions=ROLES)
            assert grown.frame[column][0] == pytest.approx(alone.value, rel=1e-4, abs=1e-5)


def test_positions_of_pairs_of_one_length_patch_there_alone(tiny_models: dict[str, HookedModel]) -> None:
    """All of them are what is patched anyway; and a mean of prompts of one length is that by position."""
    model, metric = tiny_models["reflow_lite"], rl.metrics.logit_diff("A", "B")
    texts = ["abcd", "efgh"], ["ijkl", "mnop"]
    for positions in ("left", "right", [0, 1, 2, "last"]):
        for mode in ("gradient", "integrated"):
            plain = rl.edge_attribution(model, *texts, metric, mode=mode).values  # type: ignore[arg-type]
            aligned = rl.edge_attribution(model, *texts, metric, mode=mode, positions=positions).values  # type: ignore[arg-type]
            torch.testing.assert_close(aligned, plain, rtol=1e-5, atol=1e-6, equal_nan=True)
        for ablation in ("corrupted", "mean"):
            options: dict[str, Any] = {"ablation": ablation, "controls": 0}
            plain, aligned = (
                rl.faithfulness(model, *texts, NODES, metric, **options, positions=at).metric
                for at in (None, positions)
            )
            torch.testing.assert_close(aligned, plain, rtol=1e-5, atol=1e-6)


def test_a_mean_over_other_prompts_counts_those_that_have_the_position(tiny_models: dict[str, HookedModel]) -> None:
    """Two corrupted prompts with the same ending are as good as one of them, from the right."""
    model, metric = tiny_models["llama_untied"], rl.metrics.logit_diff("A", "B")
    options: dict[str, Any] = {"ablation": "mean", "controls": 0, "positions": "right"}
    many = rl.faithfulness(model, ["abc", "xyzu"], ["qr", "qr", "qr"], NODES, metric, **options).metric
    for row, clean in enumerate(["abc", "xyzu"]):
        one = rl.faithfulness(model, clean, "qr", NODES, metric, controls=0, positions="right").metric
        torch.testing.assert_close(many[row], one[0], rtol=1e-5, atol=1e-5)


CALLS: dict[str, Callable[..., Any]] = {
    "edges": lambda m, p, **o: rl.edge_attribution(m, p, metric=rl.metrics.logit_diff(p), **o),
    "paths": lambda m, p, **o: rl.path_patch(m, p, None, "m0", "logits", rl.metrics.logit_diff(p), **o),
    "circuits": lambda m, p, **o: rl.faithfulness(m, p, None, ["m0"], rl.metrics.logit_diff(p), controls=0, **o),
}
CROSSED = rl.Prompts.of(
    [{"clean": "a cat", "corrupted": "a cow and", "answer": "A", "wrong_answer": "B", "x": "cat", "corrupted_x": "cow"}]
)  # in the clean prompt the animal is the last token, and not in the corrupted one


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (PROMPTS, {}, "as many tokens.*positions='right', or roles"),
        (PROMPTS, {"positions": "left"}, "as many tokens.*positions='right', or roles"),
        (PROMPTS, {"positions": ["object"]}, "no column 'object'"),
        (PROMPTS, {"positions": "middle"}, "positions are 'left', 'right', or a list"),
    ],
)
def test_what_does_not_fit_is_named(
    tiny_models: dict[str, HookedModel], call: str, prompts: rl.Prompts, options: Any, message: str
) -> None:
    with pytest.raises(rl.ReflowlensError, match=message):
        CALLS[call](tiny_models["gpt2"], prompts, **options)


def test_a_token_that_stands_for_two_is_named(tiny_models: dict[str, HookedModel]) -> None:
    model = tiny_models["gpt2"]
    with pytest.raises(
        rl.ReflowlensError, match=r"row 0: position 4 is 'last' and another of positions=\['x', 'last'\]"
    ):
        CALLS["circuits"](model, CROSSED, positions=["x", "last"])
    with pytest.raises(rl.ReflowlensError, match="row 1: position 6 is 'last' and another"):  # of two means
        CALLS["circuits"](model, PROMPTS, positions=ROLES, ablation="mean")
    CALLS["edges"](model, CROSSED, positions=["x", "last"])  # two places of the corrupted prompt, which is run


def test_a_circuit_is_replaced_where_the_metric_reads(tiny_models: dict[str, HookedModel]) -> None:
    with pytest.raises(rl.ReflowlensError, match=r"row 0: .*'subject'.* hold none that the metric reads.*'last'"):
        CALLS["circuits"](tiny_models["gpt2"], PROMPTS, positions=["subject"])
