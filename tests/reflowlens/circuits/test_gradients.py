"""Gradient estimates of cells and edges: against autograd by hand, TransformerLens, exact effects, and theorems."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformer_lens.tools.analysis import attribution_patch
from transformer_lens.tools.analysis.attribution_patching import EdgeAttributionConfig

import reflowlens as rl
from reflowlens import metrics
from reflowlens.errors import ReflowlensError
from reflowlens.interventions.values import Intervention
from reflowlens.models.base import HookedModel
from reflowlens.sweeps.alignment import from_left
from reflowlens.sweeps.grids import GRIDS, make_cells
from reflowlens.sweeps.setup import prepare_sweep
from tests.reference.graph import Written, edge_of, everything, graph_run
from tests.support.dictionaries import features_for
from tests.support.tiny import NAMES, assert_close, random_model, random_tokens

A, B = 65, 66
METRIC = metrics.logit_diff(A, B)
MODELS = {name: random_model(name) for name in NAMES}


def pair(model: HookedModel) -> tuple[Tensor, Tensor]:
    clean, corrupted = random_tokens(model.cfg, pos=5, seed=1), random_tokens(model.cfg, pos=5, seed=2)
    clean[0, [0, 1, 3]] = corrupted[0, [0, 1, 3]]
    return clean, corrupted


def measured(logits: Tensor) -> Tensor:
    return logits[:, -1, A] - logits[:, -1, B]


def slope(model: HookedModel, tokens: Tensor, name: str, prompt: int) -> Tensor:
    """Gradient of one prompt's metric with respect to a point's activation, by adding zeros to it."""
    added: list[Tensor] = []

    def add_zeros(x: Tensor, hook: Any) -> Tensor:
        added.append(torch.zeros_like(x, requires_grad=True))
        return x + added[-1]

    with torch.enable_grad():
        value = measured(model.run_with_hooks(tokens, fwd_hooks=[(name, add_zeros)]))[prompt]
        return torch.autograd.grad(value, added)[0]


def estimate_by_hand(model: HookedModel, clean: Tensor, corrupted: Tensor, cell: Any) -> Tensor:
    """(after - before) · gradient, the activation after an intervention read off a run under it."""
    (part,) = prepare_sweep(model, clean, corrupted, [cell]).cells.cells[0]
    before = model.run_with_cache(corrupted, names_filter=lambda name: True)[1]
    with rl.intervene(model, part):
        after = model.run_with_cache(corrupted, names_filter=lambda name: True)[1]
    (name,) = [name for name in after if _is_at(model, part, name)]
    change = (after[name] - before[name]).nan_to_num(0, torch.inf, -torch.inf)  # scores masked before and after
    effects = []
    for prompt in range(len(corrupted)):
        product = change * slope(model, corrupted, name, prompt)
        effects.append(product.sum() if name == "hook_basis" else product[prompt].sum())
    return torch.stack(effects)


def _is_at(model: HookedModel, part: Intervention, name: str) -> bool:
    return name == part.hook or (part.layer is not None and name == f"blocks.{part.layer}.{part.hook}")


# ---------------------------------------------------------------------------------------------------------------- cells


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", ["reflow_lite", "gpt2_biased"])
def test_every_grid_equals_autograd(name: str, grid: str) -> None:
    model = MODELS[name]
    if grid in ("recipe", "signal") and model.cfg.n_signals is None:
        pytest.skip(f"{name} has no recipe and no signals")
    clean, corrupted = pair(model)
    with features_for(model, grid):
        result = rl.sweep(model, clean, corrupted, grid, METRIC, mode="gradient")
        assert_close(result.baseline, measured(model(corrupted)))  # type: ignore[arg-type]
        cells = make_cells(model, grid, from_left(clean.shape[1])).cells
        effects = result.effect().reshape(len(cells), -1)
        assert effects.abs().max() > 1e-3
        for i in range(0, len(cells), max(1, len(cells) // 4)):
            expected = estimate_by_hand(model, clean, corrupted, cells[i])
            torch.testing.assert_close(effects[i], expected, rtol=1e-3, atol=5e-5)


POINTS = [
    "hook_embed",
    "hook_recipe",
    "hook_pos_embed",
    "hook_basis",
    "unembed.hook_signal",
    "ln_final.hook_scale",
    "ln_final.hook_normalized",
    *(f"blocks.{layer}.{point}" for layer in (0, 1) for point in (
        "hook_resid_pre", "ln1.hook_normalized", "ln1.hook_scale", "attn.hook_q", "attn.hook_rot_k", "attn.hook_k",
        "attn.hook_v", "attn.hook_attn_scores", "attn.hook_pattern", "attn.hook_z", "attn.hook_result",
        "attn.hook_attn_in", "attn.hook_q_input", "attn.hook_v_input", "hook_attn_out", "hook_resid_mid", "hook_mlp_in",
        "mlp.hook_pre", "mlp.hook_post", "hook_mlp_out", "hook_resid_post",
    )),
]  # fmt: skip
OTHERS = ["abcde", "vwxyz", "mnopq"]


@st.composite
def any_intervention(draw: st.DrawFn) -> Intervention:
    point = draw(st.sampled_from(POINTS))
    where: dict[str, Any] = {}
    if point != "hook_basis":
        where["position"] = draw(st.sampled_from([None, 0, 3, -1, "last", [1, 4], slice(2, 5)]))
    if any(part in point for part in ("attn.hook_q", "attn.hook_z", "rot_k", "attn.hook_k", "pattern", "result")):
        where["head"] = draw(st.sampled_from([None, 0, 1, [0, 1]]))
    if "scale" not in point:
        where["index"] = draw(st.sampled_from([None, 2, [0, 3]]))
    kinds: list[Intervention] = [
        rl.Ablate(point, **where),
        rl.Scale(point, 0.5, **where),
        rl.Replace(point, 0.3, **where),
        rl.Steer(point, torch.tensor(0.4), **where),
    ]
    if point != "hook_basis":
        kinds += [
            rl.Patch(point, **where),
            rl.Patch(point, "qrstu", from_position=1, **where),
            rl.Ablate(point, by="mean", reference=OTHERS, **where),
            rl.Ablate(point, by="resample", reference=OTHERS, **where),
        ]
    return draw(st.sampled_from(kinds))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(NAMES), any_intervention())
def test_any_intervention_equals_autograd(name: str, intervention: Intervention) -> None:
    model = MODELS[name]
    if intervention.hook not in model.hook_dict:
        return
    clean, corrupted = pair(model)
    expected = estimate_by_hand(model, clean, corrupted, [intervention])
    if not expected.isfinite().all():
        return  # scores masked on one side alone
    actual = rl.sweep(model, clean, corrupted, [intervention], METRIC, mode="gradient").effect()[0]
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=5e-5)


def test_a_cell_of_several_interventions_adds_them_up(model: HookedModel) -> None:
    """At one point they act one after the other; at several their effects add."""
    clean, corrupted = pair(model)
    halves = [rl.Scale("mlp_out", 0.5, layer=0), rl.Scale("mlp_out", 0.5, layer=0)]
    patch = rl.Patch("z", layer=1, head=2)
    quarter = rl.Scale("mlp_out", 0.25, layer=0)
    cells = [[*halves], [quarter], [patch], [*halves, patch], [rl.Scale("mlp_out", 0.5, layer=[0, 1])]]
    effects = rl.sweep(model, clean, corrupted, cells, METRIC, mode="gradient").effect()
    assert_close(effects[0], effects[1])
    assert_close(effects[3], effects[0] + effects[2])
    assert effects[4].abs().max() > 0


def test_small_changes_are_estimated_exactly(model: HookedModel) -> None:
    """Both signs of a small change: what is left of their difference is of third order."""
    clean, corrupted = pair(model)
    points = ("resid_pre", "z", "mlp_out", "hook_mlp_in", "attn.hook_k")
    up, down = (
        [rl.Steer(point, torch.tensor(alpha), layer=0, position=[1, 3]) for point in points] for alpha in (2e-3, -2e-3)
    )
    exact = rl.sweep(model, clean, corrupted, [*up, *down], METRIC).effect()
    estimated = rl.sweep(model, clean, corrupted, up, METRIC, mode="gradient").effect()
    assert_close(estimated, (exact[: len(up)] - exact[len(up) :]) / 2, relative=0.02)


def test_integrated_gradients_add_up_to_the_whole_difference(model: HookedModel) -> None:
    """The mean gradient on the way times the way is the difference between its ends."""
    clean, corrupted = pair(model)
    everything = [rl.Patch("hook_embed")]
    steps = 3000  # at each kink of a ReLU the sum over steps is off by something like one of them
    integrated = rl.sweep(model, clean, corrupted, everything, METRIC, mode="integrated", steps=steps)
    assert_close(integrated.values[0], measured(model(clean)), relative=1e-3)
    once = rl.sweep(model, clean, corrupted, everything, METRIC, mode="gradient")
    assert (once.values - integrated.values).abs().max() > 0.1


def test_recovery_is_a_share_of_the_difference(model: HookedModel) -> None:
    clean, corrupted = pair(model)
    plain, share = (
        rl.sweep(model, clean, corrupted, "attn_head_out", metric, mode="gradient").effect()
        for metric in (METRIC, metrics.recovery(METRIC))
    )
    assert_close(share, plain / (measured(model(clean)) - measured(model(corrupted))))


def test_nodes_equal_transformer_lens(model: HookedModel) -> None:
    clean, corrupted = pair(model)
    expected = attribution_patch(model, clean, corrupted, lambda logits: measured(logits).mean()).node_scores
    heads, mlps, embeddings = (
        rl.sweep(model, clean, corrupted, grid, METRIC, mode="gradient").effect().mean(dim=-1)
        for grid in ("attn_head_out_by_pos", "mlp_out", "tokens")
    )
    for node, score in expected.items():
        if node.kind == "embed":
            actual = embeddings[node.position]
        else:
            actual = (
                mlps[node.layer, node.position] if node.head is None else heads[node.layer, node.position, node.head]
            )
        assert math.isclose(actual.item(), score, rel_tol=1e-3, abs_tol=1e-5), node


def test_gradients_need_no_trainable_parameters_and_leave_none_behind() -> None:
    model = random_model("reflow_lite")
    clean, corrupted = pair(model)
    cells = [rl.Patch("resid_mid", layer=0), rl.Ablate("hook_basis", index=3), rl.Scale("hook_recipe", 0.5)]
    trainable = rl.sweep(model, clean, corrupted, cells, METRIC, mode="integrated").values
    model.requires_grad_(False)
    frozen = rl.sweep(model, clean, corrupted, cells, METRIC, mode="integrated").values
    with torch.inference_mode():
        inference = rl.sweep(model, clean, corrupted, cells, METRIC, mode="integrated").values
    assert_close(frozen, trainable)
    assert_close(inference, trainable)
    assert not trainable.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_little_memory_changes_nothing() -> None:
    model = MODELS["reflow_lite"]
    clean, corrupted = pair(model)
    plenty, little = (
        rl.sweep(model, clean, corrupted, "attn_head_q", METRIC, mode="integrated", steps=20, memory=memory).values
        for memory in (None, 200_000)
    )
    assert_close(little, plenty)
    plenty, little = (
        rl.edge_attribution(model, clean, corrupted, METRIC, steps=20, memory=memory).values.nan_to_num()
        for memory in (None, 400_000)
    )
    assert_close(little, plenty)


@pytest.mark.parametrize(
    ("clean", "metric", "arguments", "message"),
    [
        (None, metrics.loss(), {"mode": "integrated"}, "give these"),
        ("abc", metrics.loss(), {"mode": "integrated", "steps": 0}, "must be an integer and at least 1, got 0"),
        ("abc", metrics.target_rank(A), {"mode": "gradient"}, "target_rank has no gradient"),
    ],
)
def test_impossible_estimates(clean: str | None, metric: metrics.Metric, arguments: Any, message: str) -> None:
    with pytest.raises(ReflowlensError, match=message):
        rl.sweep(MODELS["reflow"], clean, "abd", [rl.Ablate("z", layer=0)], metric, **arguments)


# ---------------------------------------------------------------------------------------------------------------- edges


def edges_by_hand(model: HookedModel, share: float) -> Tensor:
    """[sender, receiver, prompt]: (clean - corrupted) · gradient at every receiver, from zeros added to its input.

    Args:
        share: how far the embeddings of the run whose gradient it is are on the way to the clean ones.
    """
    graph = rl.Graph.of(model)
    clean, corrupted = (model(tokens, stop_at_layer=0).detach() for tokens in pair(model))
    sent = [graph_run(model, embedding)[1] for embedding in (clean, corrupted)]
    zeros = {receiver: torch.zeros_like(clean, requires_grad=True) for receiver in graph.receivers}

    def reads(receiver: str, written: Written) -> Tensor:
        return everything(receiver, written) + zeros[receiver]

    with torch.enable_grad():
        logits, _ = graph_run(model, corrupted + share * (clean - corrupted), reads)
        slopes = torch.autograd.grad(measured(logits).sum(), list(zeros.values()))
    changes = torch.stack([sent[0][name] - sent[1][name] for name in graph.senders]).detach()
    scores = torch.einsum("sbpd,rbpd->srb", changes, torch.stack(slopes))
    return scores.masked_fill(~graph.possible[..., None], torch.nan)


def test_edges_equal_autograd(model: HookedModel) -> None:
    clean, corrupted = pair(model)
    once = rl.edge_attribution(model, clean, corrupted, METRIC, mode="gradient")
    torch.testing.assert_close(once.values, edges_by_hand(model, 0.0), rtol=1e-3, atol=1e-5, equal_nan=True)
    mean = rl.edge_attribution(model, clean, corrupted, METRIC, steps=3)
    expected = torch.stack([edges_by_hand(model, share) for share in (1 / 6, 3 / 6, 5 / 6)]).mean(dim=0)
    torch.testing.assert_close(mean.values, expected, rtol=1e-3, atol=1e-5, equal_nan=True)


def test_edges_equal_transformer_lens(model: HookedModel) -> None:
    if model.cfg.kv_heads != model.cfg.n_heads:
        pytest.skip("TransformerLens refuses grouped keys and values")
    clean, corrupted = pair(model)
    config = EdgeAttributionConfig(granularity="edge")
    scores = attribution_patch(model, clean, corrupted, lambda logits: measured(logits).mean(), config).edge_scores
    summed: dict[tuple[str, str], float] = {}
    for edge, score in scores.items():
        summed[edge_of(edge)] = summed.get(edge_of(edge), 0.0) + score
    actual = rl.edge_attribution(model, clean, corrupted, METRIC, mode="gradient").frame
    assert len(actual) == len(summed)
    for row in actual.itertuples():
        assert math.isclose(row.score, summed[row.sender, row.receiver], rel_tol=1e-3, abs_tol=2e-5), row


def test_a_senders_edges_sum_to_its_node(model: HookedModel) -> None:
    clean, corrupted = pair(model)
    for mode in ("gradient", "integrated"):
        nodes = rl.edge_attribution(model, clean, corrupted, METRIC, mode=mode).nodes
        heads, mlps = (
            rl.sweep(model, clean, corrupted, cells, METRIC, mode=mode).effect().mean(dim=-1)  # type: ignore[arg-type]
            for cells in ("attn_head_out", [rl.Patch("mlp_out", layer=layer) for layer in (0, 1)])
        )
        assert nodes["a1.h2"] == pytest.approx(heads[1, 2].item(), rel=1e-3, abs=1e-5)
        assert nodes["a0.h0"] == pytest.approx(heads[0, 0].item(), rel=1e-3, abs=1e-5)
        assert nodes["m0"] == pytest.approx(mlps[0].item(), rel=1e-3, abs=1e-5)


def test_forms_of_edge_scores() -> None:
    model = MODELS["reflow_lite"]
    scores = rl.edge_attribution(model, *pair(model), METRIC)
    frame, matrix = scores.frame, scores.matrix
    assert matrix.shape == (1 + 2 * 5, 2 * (4 + 2 + 2 + 1) + 1)  # real key/value heads
    assert len(frame) == matrix.notna().to_numpy().sum() == len(scores.graph.edges)
    for row in frame.sample(10, random_state=0).itertuples():
        assert matrix.loc[row.sender, row.receiver] == pytest.approx(row.score)
    assert math.isnan(matrix.loc["m1", "m0"])
    top = scores.top(5)
    assert [abs(matrix.loc[edge]) for edge in top] == sorted((abs(frame.score)).nlargest(5), reverse=True)
    with pytest.raises(ReflowlensError, match="mode must be"):
        rl.edge_attribution(model, *pair(model), METRIC, mode="exact")  # type: ignore[arg-type]
    with pytest.raises(ReflowlensError, match="as many tokens"):
        rl.edge_attribution(model, "abc", "ab", METRIC)


# ------------------------------------------------------------------------------------------------------------ screening


def test_screening_confirms_what_looks_strongest(model: HookedModel) -> None:
    clean, corrupted = pair(model)
    found = rl.screen(model, clean, corrupted, "attn_head_out_by_pos", METRIC, top=6)
    exact = rl.sweep(model, clean, corrupted, "attn_head_out_by_pos", METRIC)
    frame = found.frame
    assert frame.estimate.abs().is_monotonic_decreasing
    assert frame.exact.notna().tolist() == [True] * 6 + [False] * (len(frame) - 6)
    effects = exact.effect().mean(dim=-1)
    for row in frame[:6].itertuples():
        assert row.exact == pytest.approx(effects[row.layer, row.pos, row.head].item(), rel=1e-4, abs=1e-5)
    assert found.agreement.n == 6
    assert math.isnan(found.agreement.top_found)


def test_an_exhaustive_screening_says_what_it_would_have_missed() -> None:
    model = MODELS["gpt2"]
    clean, corrupted = pair(model)
    found = rl.screen(model, clean, corrupted, "attn_head_out", METRIC, top=3, exhaustive=True, mode="integrated")
    exact = rl.sweep(model, clean, corrupted, "attn_head_out", METRIC).effect().mean(dim=-1).flatten()
    estimated = rl.sweep(model, clean, corrupted, "attn_head_out", METRIC, mode="integrated").effect()
    estimated = estimated.mean(dim=-1).flatten()
    both = {*exact.abs().topk(3).indices.tolist()} & {*estimated.abs().topk(3).indices.tolist()}
    assert found.agreement.n == 8
    assert found.agreement.top_found == pytest.approx(len(both) / 3)
    assert found.agreement.pearson == pytest.approx(
        torch.corrcoef(torch.stack([exact, estimated]))[0, 1].item(), abs=1e-5
    )
    assert found.agreement.same_sign == pytest.approx((exact.sign() == estimated.sign()).float().mean().item())


def test_agreement_of_known_effects() -> None:
    same = rl.agreement([1, 2, -3, 0.5], [2, 4, -6, 1.0], top=2)
    assert (same.pearson, same.spearman, same.same_sign, same.top_found) == pytest.approx((1, 1, 1, 1))
    opposite = rl.agreement([1, 2, 3], [-1, -2, -4], top=5)
    assert (opposite.spearman, opposite.same_sign, opposite.top, opposite.top_found) == (-1, 0, 3, 1)
    with pytest.raises(ReflowlensError, match="2 estimated effects cannot be compared with 3"):
        rl.agreement([1, 2], [1, 2, 3])
    with pytest.raises(ReflowlensError, match="mode must be"):
        rl.screen(MODELS["reflow"], "abc", "abd", "resid_pre", METRIC, mode="exact")  # type: ignore[arg-type]
