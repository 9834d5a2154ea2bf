"""Removing signals in closed form, or many at once, against performing every removal."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import reflowlens as rl
from reflowlens.ablations import closed_form as ablated_readout
from reflowlens.ablations.closed_form import ProgressiveAblations, SingleAblations, contribution_order
from reflowlens.ablations.upstream import Site
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.signals import signal_view
from reflowlens.sweeps.stages import DecoderStages
from tests.support.exactness import MODELS
from tests.support.tiny import FACTORED, NAMES, assert_close, random_model

PROMPTS = ["The capital", "Of all the days"]
REFERENCE = ["Some other text", "and more of it"]
BY: list[dict[str, Any]] = [
    {},
    {"by": "mean", "reference": REFERENCE},
    {"by": "resample", "reference": REFERENCE, "seed": 4},
]
TARGET, WRONG = ord("e"), ord("x")


def last_logits(model: HookedModel, logits: Tensor) -> Tensor:
    lengths = model.tokens_and_lengths(PROMPTS)[1]
    return torch.stack([row[length - 1] for row, length in zip(logits, lengths, strict=True)]).detach()


def check_against(ablations: Any, after: Tensor, before: Tensor) -> None:
    """Every quantity against whole logits: ``after`` [prompt, cell, d_vocab], ``before`` [prompt, d_vocab]."""
    log_p, log_before = after.double().log_softmax(-1), before.double().log_softmax(-1)[:, None]
    assert_close(ablations.logit(TARGET), after[..., TARGET])
    assert_close(ablations.logit_diff("e", WRONG), after[..., TARGET] - after[..., WRONG])
    assert_close(ablations.probability(TARGET).double(), log_p[..., TARGET].exp())
    assert (ablations.kl().double() - (log_before.exp() * (log_before - log_p)).sum(-1)).abs().max() < 1e-5
    gaps = after - after[..., TARGET, None]
    near_ties = (gaps.abs() < 1e-5).sum(-1) - 1
    assert ((ablations.rank(TARGET) - 1 - (gaps > 0).sum(-1)).abs() <= near_ties).all()


@pytest.mark.parametrize("how", BY, ids=["zero", "mean", "resample"])
@pytest.mark.parametrize("name", FACTORED)
def test_every_single_signal_is_what_hooks_do(tiny_models: dict[str, HookedModel], name: str, how: dict) -> None:
    model = tiny_models[name]
    performed = [
        last_logits(model, rl.run(model, PROMPTS, rl.Ablate("unembed.hook_signal", index=s, **how)))
        for s in range(model.cfg.n_signals or 0)
    ]
    check_against(
        rl.ablate_readout(model, PROMPTS, **how), torch.stack(performed, dim=1), last_logits(model, model(PROMPTS))
    )


@pytest.mark.parametrize("how", BY, ids=["zero", "mean", "resample"])
@pytest.mark.parametrize("keep", [False, True])
def test_the_first_k_signals_are_what_hooks_do(keep: bool, how: dict) -> None:
    model = random_model("reflow_wide")
    n_signals = model.cfg.n_signals
    order = torch.stack([torch.randperm(n_signals, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    curve = rl.ablate_progressively(model, PROMPTS, order, counts=[0, 1, 7, n_signals], keep=keep, **how)
    before = last_logits(model, model(PROMPTS))
    rows = []
    for prompt in range(2):
        for k in (0, 1, 7, n_signals):
            removed = order[prompt, k:] if keep else order[prompt, :k]
            logits = before
            if len(removed):
                ablation = rl.Ablate("unembed.hook_signal", index=removed.tolist(), **how)
                logits = last_logits(model, rl.run(model, PROMPTS, ablation))
            rows.append(logits[prompt])
    check_against(curve, torch.stack(rows).unflatten(0, (2, 4)), before)


def views(name: str) -> list[str]:
    return ["native", "identity", "svd", "rotated"] if name in FACTORED else ["identity", "svd", "rotated"]


@pytest.mark.parametrize(("name", "view_name"), [(name, view) for name in NAMES for view in views(name)])
def test_signals_of_every_view(tiny_models: dict[str, HookedModel], name: str, view_name: str) -> None:
    model = tiny_models[name]
    view = signal_view(model, view_name)
    alone = rl.ablate_readout(model, PROMPTS, view=view, position=1)
    a = view.readout(model(PROMPTS, stop_at_layer=model.cfg.n_layers)[:, 1]).detach()
    without = a[:, None] * (1 - torch.eye(view.n_signals))
    check_against(alone, view.logits(without), model(PROMPTS)[:, 1].detach())
    assert_close(alone.before().probability(TARGET)[:, 0], view.logits(a).softmax(-1)[:, TARGET])


def test_numbers_are_those_of_the_metrics() -> None:
    model, metrics = random_model("reflow"), rl.metrics
    alone = rl.ablate_readout(model, PROMPTS)
    cells = [rl.Ablate("unembed.hook_signal", index=s) for s in range(32)]
    pairs = {
        metrics.target_prob("e"): alone.probability("e"),
        metrics.target_rank("e"): alone.rank("e").float(),
        metrics.kl(): alone.kl(),
        metrics.logit_diff("e", "x"): alone.logit_diff("e", "x"),
    }
    for metric, ours in pairs.items():
        assert_close(ours.T, rl.sweep(model, PROMPTS, PROMPTS, cells, metric).values, 1e-4, metric.name)


def test_signals_whose_removal_overflows_an_exponential() -> None:
    view = signal_view(random_model("reflow"))
    a = torch.randn(2, 32, generator=torch.Generator().manual_seed(0)) * 900
    without = (a[:, None] * (1 - torch.eye(32))).double() @ view.recipe.double().T
    log_p, log_before = without.log_softmax(-1), (a.double() @ view.recipe.double().T).log_softmax(-1)[:, None]
    kl = (log_before.exp() * (log_before - log_p)).sum(-1)
    assert float(kl.max()) > 90
    alone = SingleAblations(view, a, 0.0)
    assert_close(alone.kl().double(), kl)
    assert (alone.probability(TARGET).double() - log_p[..., TARGET].exp()).abs().max() < 1e-3


@pytest.mark.parametrize("scale", [1.0, 30.0, 300.0, 3000.0])
def test_probabilities_however_far_logits_move(scale: float) -> None:
    view = signal_view(random_model("reflow"))
    a = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)) * scale
    a[:, 16:] /= scale  # signals of both kinds
    without = (a[:, None] * (1 - torch.eye(32))).double() @ view.recipe.double().T
    for ids in (torch.full((3,), TARGET), (a @ view.recipe.T).argmax(-1)):
        expected = without.log_softmax(-1)[torch.arange(3), :, ids].exp()
        ours = SingleAblations(view, a, 0.0).probability(ids).double()
        rounded = 1e-6 * (10 + scale)  # of a float32 logit, as large as the signals are
        assert ((ours - expected).abs() <= rounded * expected + 1e-30).all()


@pytest.mark.parametrize("name", ["reflow", "reflow_lite", "norms_behind"])
@pytest.mark.parametrize("replacement", [0.0, "mean"])
def test_what_is_kept_is_what_is_not_removed(name: str, replacement: str | float) -> None:
    view = signal_view(random_model(MODELS[name]))
    n = view.n_signals
    generator = torch.Generator().manual_seed(0)
    a, mean = torch.randn(3, n, generator=generator), torch.randn(1, n, generator=generator)
    order = torch.stack([torch.randperm(n, generator=generator) for _ in range(3)])
    for keep in (False, True):
        cells = ProgressiveAblations(view, a, mean if replacement == "mean" else 0.0, order, [0, 1, 5, n], keep)
        own, others = cells.probability_and_kept(TARGET)
        assert_close(own, cells.probability(TARGET))
        assert_close(others, dataclasses.replace(cells, keep=not keep).probability(TARGET))


def test_a_trained_model_in_double_precision() -> None:
    model = rl.load_model("reflow-nano")
    alone = rl.ablate_readout(model, "The capital of France is")
    a, recipe = alone.signals.double(), alone.view.recipe.double()
    before = (a @ recipe.T).log_softmax(-1)
    after = ((a * (1 - torch.eye(256, dtype=torch.double))) @ recipe.T).log_softmax(-1)
    divergence = (before.exp() * (before - after)).sum(-1)  # up to 28 nats, which float32 tells apart to 2e-6
    torch.testing.assert_close(alone.kl()[0].double(), divergence, rtol=5e-7, atol=1e-6)
    token = model.to_single_token(" Paris")
    assert_close(alone.probability(" Paris")[0].double(), after[:, token].exp())


def test_pieces_of_the_vocabulary_and_a_small_budget_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("reflow_topk")
    alone, curve = rl.ablate_readout(model, PROMPTS), rl.ablate_progressively(model, PROMPTS, "e")
    expected = [alone.kl(), alone.probability("e"), alone.rank("e").float(), curve.kl()]
    monkeypatch.setattr(ablated_readout, "_BLOCK", 40 * 7)
    alone, curve = rl.ablate_readout(model, PROMPTS), rl.ablate_progressively(model, PROMPTS, "e", memory=10_000)
    for small, whole in zip(
        [alone.kl(), alone.probability("e"), alone.rank("e").float(), curve.kl()], expected, strict=True
    ):
        assert_close(small, whole, 1e-5)


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_removing_and_keeping_are_complements(seed: int) -> None:
    """The first of an order is that signal alone; keeping k is removing the rest; all removed, every token is alike."""
    generator = torch.Generator().manual_seed(seed)
    view = signal_view(random_model("reflow_lite"))
    a = torch.randn(2, 24, generator=generator)
    order = torch.stack([torch.randperm(24, generator=generator) for _ in range(2)])
    counts = list(range(25))
    removed = ProgressiveAblations(view, a, 0.0, order, counts)
    kept = ProgressiveAblations(view, a, 0.0, order.flip(1), counts, keep=True)
    alone = SingleAblations(view, a, 0.0)
    first = alone.probability(TARGET).gather(1, order[:, :1])[:, 0]
    assert torch.allclose(removed.probability(TARGET)[:, 1], first, rtol=1e-4)
    assert torch.allclose(removed.kl(), kept.kl().flip(1), atol=1e-5)
    assert torch.allclose(removed.probability(TARGET)[:, -1], torch.tensor(1 / len(view.recipe)))
    assert torch.allclose(removed.kl()[:, 0], torch.zeros(2), atol=1e-6)


def test_the_order_of_a_token_is_by_the_size_of_contributions() -> None:
    model = random_model("reflow")
    view, targets = signal_view(model), torch.tensor([TARGET, WRONG])
    a = view.readout(last_logits(model, model(PROMPTS, stop_at_layer=2)))
    order = contribution_order(view, a, targets)
    sizes = (a * view.recipe[targets]).abs().gather(1, order)
    assert (sizes.diff(dim=-1) <= 0).all()
    curves = [rl.ablate_progressively(model, PROMPTS, given) for given in (order, targets, ["e", "x"])]
    assert torch.equal(curves[0].order, order)
    for curve in curves:  # sizes that differ by their rounding alone may change places
        assert_close((a * view.recipe[targets]).abs().gather(1, curve.order), sizes)
        assert (len(curve.counts), sorted(curve.order[0].tolist())) == (33, list(range(32)))
    alone = rl.ablate_readout(model, PROMPTS)
    assert torch.equal(alone.logit(targets), alone.logit(["e", "x"]))


def test_frames_hold_a_row_for_each_prompt_and_cell() -> None:
    model = random_model("reflow")
    alone, curve = rl.ablate_readout(model, PROMPTS), rl.ablate_progressively(model, PROMPTS, "e", counts=[1, 4])
    frame = alone.frame("e", against="x")
    assert list(frame) == ["prompt", "signal", "logit", "probability", "rank", "kl", "logit_diff"]
    assert len(frame) == 64
    row = frame.query("prompt == 1 and signal == 5").iloc[0]
    assert row["probability"] == pytest.approx(float(alone.probability("e")[1, 5]))
    assert curve.frame("e")[["prompt", "count"]].to_numpy().tolist() == [[0, 1], [0, 4], [1, 1], [1, 4]]


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda m: rl.ablate_readout(m, "ab", position=5), "position 5"),
        (lambda m: rl.ablate_readout(m, "ab", by="mean"), "needs a reference"),
        (lambda m: rl.ablate_readout(m, "ab", view="nativ"), "view must be one of"),
        (lambda m: rl.ablate_readout(m, ["ab", "cd"]).probability(["e"]), "1 target tokens are given for 2 prompts"),
        (lambda m: rl.ablate_readout(m, "ab").rank(400), "no token 400: ids are 0 to 287"),
        (lambda m: rl.ablate_progressively(m, "ab", torch.tensor([[1, 1]])), "names a signal twice"),
        (lambda m: rl.ablate_progressively(m, "ab", torch.tensor([[32]])), "signals 0 to 31"),
        (lambda m: rl.ablate_progressively(m, ["ab", "cd"], torch.tensor([[3]])), "1 rows for 2 prompts"),
        (lambda m: rl.ablate_progressively(m, "ab", torch.tensor([[3, 4]]), counts=[3]), "between 0 and 2"),
        (lambda m: rl.ablate_upstream(m, "ab", rl.metrics.kl(), "embd"), "site must be 'embed', 'everywhere' or"),
        (lambda m: rl.ablate_upstream(m, "ab", rl.metrics.kl(), 3), "layer from 0 to 2, got 3"),
        (lambda m: rl.ablate_upstream(m, "ab", rl.metrics.kl(), 0, signals=[32]), "signals 0 to 31"),
        (lambda m: rl.ablate_upstream(m, "ab", rl.metrics.kl(), 0, signals=[1.9]), "no signal 1.9"),
        (lambda m: rl.ablate_upstream(m, "ab", rl.metrics.kl, 0), "reflowlens.metrics"),
        (lambda m: rl.ablate_upstream(m, "ab", rl.metrics.recovery(rl.metrics.kl()), 0), "recovery compares"),
    ],
)
def test_errors_say_what_was_expected(ask: Callable[[HookedModel], Any], message: str) -> None:
    with pytest.raises(ReflowlensError, match=message):
        ask(random_model("reflow"))


def test_upstream_removal_refuses_what_it_could_get_silently_wrong() -> None:
    model = random_model("reflow")
    with rl.intervene(model, rl.Scale("z", 0.5, layer=0)) as hooked:
        with pytest.raises(ReflowlensError, match=r"leave rl\.intervene"):
            rl.ablate_upstream(hooked, "ab", rl.metrics.kl(), "embed")
        hooked("ab")
    untied = random_model("llama_untied")
    with pytest.raises(ReflowlensError, match="one embedding at both ends"):
        rl.ablate_upstream(untied, "ab", rl.metrics.kl(), "embed")


# ------------------------------------------------------------------------------------------------------------- upstream


def without_column(signal: int) -> Callable:
    def hook(recipe: Tensor, hook: Any) -> Tensor:
        return recipe.index_fill(-1, torch.tensor([signal]), 0.0)

    return hook


def without_row(signal: int) -> Callable:
    def hook(basis: Tensor, hook: Any) -> Tensor:
        return basis.index_fill(0, torch.tensor([signal]), 0.0)

    return hook


def without_direction(row: Tensor) -> Callable:
    direction = row / row.norm()

    def hook(resid: Tensor, hook: Any) -> Tensor:
        return resid - (resid @ direction)[..., None] * direction

    return hook


def performed(model: HookedModel, site: Site, signal: int) -> Tensor:
    if site == "embed":
        hooks = [("hook_recipe", without_column(signal))]
    elif site == "everywhere":
        hooks = [("hook_basis", without_row(signal))]
    else:
        name = f"blocks.{site}.hook_resid_pre" if site < 2 else "blocks.1.hook_resid_post"
        hooks = [(name, without_direction(model.embed.W_basis[signal]))]
    return model.run_with_hooks(PROMPTS, fwd_hooks=hooks).detach()


METRICS = [rl.metrics.target_prob("e"), rl.metrics.loss(), rl.metrics.logit_diff("e", "x", position=2)]


@pytest.mark.parametrize("site", [0, 1, 2])
def test_a_readout_of_its_own_keeps_its_bias(tiny_models: dict[str, HookedModel], site: int) -> None:
    model, metric = tiny_models["gpt2_own_readout"], rl.metrics.target_prob("e")
    view = signal_view(model, "rotated")
    name = f"blocks.{site}.hook_resid_pre" if site < 2 else "blocks.1.hook_resid_post"
    result = rl.ablate_upstream(model, PROMPTS, metric, site, signals=[0, 3], view=view)
    for signal, ours in zip([0, 3], result.values, strict=True):
        logits = model.run_with_hooks(PROMPTS, fwd_hooks=[(name, without_direction(view.basis[signal]))]).detach()
        assert_close(ours, last_logits(model, logits).softmax(-1)[:, TARGET])
    order = torch.tensor([[0, 3, 5], [3, 0, 5]])
    curve = rl.ablate_progressively(model, PROMPTS, order, view=view, counts=[0, 2])
    a = view.readout(last_logits(model, model(PROMPTS, stop_at_layer=2)))
    left = torch.stack([a, a.index_fill(1, torch.tensor([0, 3]), 0.0)], dim=1)
    after = left @ view.recipe.T + model.b_U.detach()
    check_against(curve, after, last_logits(model, model(PROMPTS)))


@pytest.mark.parametrize("site", ["embed", "everywhere", 0, 1, 2])
@pytest.mark.parametrize("name", FACTORED)
def test_every_upstream_removal_is_what_hooks_do(tiny_models: dict[str, HookedModel], name: str, site: Site) -> None:
    model = tiny_models[name]
    if isinstance(site, str) and not model.cfg.has_one_embedding:
        with pytest.raises(ReflowlensError, match="needs one embedding at both ends"):
            rl.ablate_upstream(model, PROMPTS, METRICS[-1], site)
        return
    tokens, lengths = model.tokens_and_lengths(PROMPTS)
    signals = [0, 3, 9, 23]
    logits = [performed(model, site, signal) for signal in signals]
    for metric in METRICS:
        result = rl.ablate_upstream(model, PROMPTS, metric, site, signals=signals)
        score = metric.bind(model, rl.metrics.Reference(tokens, lengths))
        if metric.position == "all":
            expected = [score(rl.metrics.WholeLogits(one), torch.arange(2)) for one in logits]
        else:
            read = [last_logits(model, one) if metric.position == "last" else one[:, metric.position] for one in logits]
            expected = [score(rl.metrics.WholeLogits(one[:, None]), torch.arange(2)) for one in read]
        assert_close(result.values, torch.stack(expected), 1e-5, metric.name)
    assert result.index_df["signal"].tolist() == signals
    one = rl.ablate_upstream(model, PROMPTS, METRICS[-1], site, signals=3)
    assert_close(one.values, result.values[1:2], 1e-5, "one signal")


@pytest.mark.parametrize("name", ["gpt2", "gpt2_biased", "gpt2_new"])
def test_residual_axes_removed_from_the_embedding(tiny_models: dict[str, HookedModel], name: str) -> None:
    """Of a model without signals: a column of the embedding is zero at the input, and at both ends."""
    model, metric = tiny_models[name], rl.metrics.target_prob("e")
    for axis in (0, 17):
        at_input = model.run_with_hooks(PROMPTS, fwd_hooks=[("hook_embed", without_column(axis))]).detach()
        both = random_model(name)
        with torch.no_grad():
            both.embed.W_E[:, axis] = 0
        for site, logits in (("embed", at_input), ("everywhere", both(PROMPTS).detach())):
            ours = rl.ablate_upstream(model, PROMPTS, metric, site, signals=[axis]).values[0]
            assert_close(ours, last_logits(model, logits).softmax(-1)[:, TARGET], what=site)


@pytest.mark.parametrize("name", ["reflow", "reflow_topk"])
def test_embed_is_what_a_sweep_of_interventions_gives(name: str) -> None:
    model = random_model(name)
    signals = range(model.cfg.n_signals or 0)
    cells = [rl.Ablate("hook_recipe", index=signal) for signal in signals]
    ours = rl.ablate_upstream(model, PROMPTS, rl.metrics.kl(), "embed")
    swept = rl.sweep(model, PROMPTS, PROMPTS, cells, rl.metrics.kl())
    assert_close(ours.values, swept.values)
    assert float(ours.baseline.abs().max()) < 1e-6
    small = rl.ablate_upstream(model, PROMPTS, rl.metrics.kl(), "embed", memory=50_000)
    assert_close(small.values, ours.values)


def test_a_signal_that_no_token_of_the_prompt_uses_costs_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("reflow_topk")
    view, tokens = signal_view(model), model.to_tokens("aab")
    unused = (view.recipe[tokens[0]] == 0).all(dim=0).nonzero()[:, 0].tolist()
    assert unused
    ran: list[int] = []
    run = DecoderStages.run
    monkeypatch.setattr(DecoderStages, "run", lambda self, at, *rest: (ran.append(at), run(self, at, *rest))[1])
    used = (view.recipe[tokens[0]] != 0).any(dim=0).nonzero()[0].tolist()
    rl.ablate_upstream(model, tokens, rl.metrics.target_prob("e"), "embed", signals=used)
    assert ran
    ran.clear()
    result = rl.ablate_upstream(model, tokens, rl.metrics.target_prob("e"), "embed", signals=unused)
    assert not ran
    # Read as a batch of its own shape: a matrix product promises its last bits for one shape alone.
    assert_close(result.values[:, 0], result.baseline.expand(len(unused)))
    at_readout = rl.ablate_readout(model, tokens).probability("e")[0, unused]
    everywhere = rl.ablate_upstream(model, tokens, rl.metrics.target_prob("e"), "everywhere", signals=unused)
    assert_close(everywhere.values[:, 0], at_readout)


def test_a_view_of_fewer_tokens_reads_a_smaller_vocabulary() -> None:
    model = random_model("reflow")
    view = signal_view(model)
    real = dataclasses.replace(view, recipe=view.recipe[:256])
    logits = last_logits(model, performed(model, "everywhere", 4))
    ours = rl.ablate_upstream(model, PROMPTS, rl.metrics.target_prob("e"), "everywhere", signals=[4], view=real)
    assert_close(ours.values[0], logits[:, :256].softmax(-1)[:, TARGET])
