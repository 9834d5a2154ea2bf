"""The tools on a TTTFlow against plain hooks and whole passes: views of the refined stream, ablations, steering."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import reflowlens as rl
from analyses.measures.lens import read_lens, readers, residual_stack
from analyses.units.firing import unit_statistics
from reflowlens.conversion.hf import export_hf
from reflowlens.errors import ReflowlensError
from reflowlens.sweeps.injections import Injections, steer
from tests.reflowlens.models.test_ttt_flow import filled, text
from tests.reflowlens.sweeps.test_sweep import whole
from tests.support.dictionaries import dictionary_of, features_for

PROMPTS = ["the cat", "a"]
TOKENS = text(9)


def zeroed(point: str, index: int) -> tuple[str, Any]:
    def zero(x: Tensor, hook: Any) -> Tensor:
        x = x.clone()
        x[..., index] = 0.0
        return x

    return point, zero


@pytest.mark.parametrize("name", ["identity", "svd", "varimax"])
def test_signals_of_the_refined_stream_add_up_to_logits_in_front_of_the_cap(name):
    model, tokens = filled(), TOKENS
    view, logits = rl.signal_view(model, name).final, model(tokens)
    assert view.is_prediction
    assert view.final is view
    stream = model.final_stream(tokens)
    signals = view.readout(stream)
    torch.testing.assert_close(view.logits(signals), logits, rtol=1e-4, atol=1e-5)
    before = (stream @ model.W_U)[..., 5]
    torch.testing.assert_close(view.contributions(stream, 5).sum(-1), before, rtol=1e-4, atol=1e-5)


def test_the_view_of_the_stream_says_where_the_logits_are():
    model = filled()
    view = rl.signal_view(model)
    assert not view.is_prediction
    _, cache = model.run_with_cache(TOKENS)
    for call in (lambda: view.contributions(cache["resid_post", -1], 5), lambda: cache.signal_contributions(5)):
        with pytest.raises(ReflowlensError, match=r"take view\.final and model\.final_stream\(text\)"):
            call()
    unrefined = rl.signal_view(rl.load_model("bdh-nano"))
    assert unrefined.final is unrefined


@pytest.mark.parametrize("by", ["zero", "mean"])
def test_signals_removed_at_the_readout_are_those_of_whole_passes(by):
    model = filled()
    reference = {} if by == "zero" else {"reference": text(7, 5)}
    alone = rl.ablate_readout(model, PROMPTS, by=by, **reference)
    changed = {s: rl.Ablate("hook_refined", index=s, by=by, **reference) for s in (0, 3, 15)}
    ends = [len(prompt) - 1 for prompt in PROMPTS]
    before = torch.stack([model(prompt)[0, -1] for prompt in PROMPTS])
    for signal, ablation in changed.items():
        logits = rl.run(model, PROMPTS, ablation)[torch.arange(2), ends]
        torch.testing.assert_close(alone.logit(5)[:, signal], logits[:, 5], rtol=1e-4, atol=1e-5)
        p, q = before.log_softmax(-1), logits.log_softmax(-1)
        torch.testing.assert_close(alone.probability(5)[:, signal], q[:, 5].exp(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(alone.kl()[:, signal], (p.exp() * (p - q)).sum(-1), rtol=1e-3, atol=1e-6)
        assert alone.rank(5)[:, signal].tolist() == (1 + (logits > logits[:, 5:6]).sum(-1)).tolist()


def test_signals_removed_in_an_order_are_those_of_whole_passes():
    model = filled()
    order = torch.tensor([[3, 0, 7]])
    found = rl.ablate_progressively(model, TOKENS, order)
    changes = [zeroed("hook_refined", index) for index in (3, 0, 7)]
    for count in range(4):
        logits = model.run_with_hooks(TOKENS, fwd_hooks=changes[:count])[0, -1]
        torch.testing.assert_close(found.logit(5)[0, count], logits[5], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.probability(5)[0, count], logits.softmax(-1)[5], rtol=1e-4, atol=1e-6)
    by_contribution = rl.ablate_progressively(model, TOKENS, 5, counts=[1])
    parts = rl.signal_view(model).final.contributions(model.final_stream(TOKENS)[0, -1], 5)
    first = model.run_with_hooks(TOKENS, fwd_hooks=[zeroed("hook_refined", int(parts.abs().argmax()))])[0, -1]
    torch.testing.assert_close(by_contribution.logit(5)[0, 0], first[5], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("site", ["embed", 0, 3, 5, "everywhere"])
def test_signals_removed_upstream_are_those_of_whole_passes(site):
    """The axes of the stream, one by one."""
    model, metric = filled(), rl.metrics.logit_diff(5, 7)
    found = rl.ablate_upstream(model, ["abcdef", "ghijkl"], metric, site, signals=[2, 9], progress=False)
    point = {"embed": "hook_embed", "everywhere": "hook_embed", 5: "hook_refined"}.get(site)
    for row, signal in enumerate((2, 9)):
        changes = [zeroed(point or f"blocks.{site}.hook_resid_pre", signal)]
        if site == "everywhere":
            changes.append(zeroed("hook_refined", signal))
        logits = model.run_with_hooks(["abcdef", "ghijkl"], fwd_hooks=changes)[:, -1]
        torch.testing.assert_close(found.values[row], logits[:, 5] - logits[:, 7], rtol=1e-4, atol=1e-5)
    logits = model(["abcdef", "ghijkl"])[:, -1]
    torch.testing.assert_close(found.baseline, logits[:, 5] - logits[:, 7], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("where", ["last", "all"])
def test_directions_added_at_a_layer_are_those_of_whole_passes(where):
    model = filled()
    runs = Injections(model, PROMPTS, where)
    direction = torch.randn(16, generator=torch.Generator().manual_seed(1))
    for layer in (0, 3, 5):
        ends = runs.final(layer, torch.tensor([1, 0]), torch.stack([direction, 2 * direction]))
        for row, prompt, size in ((0, "a", 1.0), (1, "the cat", 2.0)):
            position = "last" if where == "last" else None
            with rl.intervene(model, steer(model, layer, direction, size, position)):
                expected = model.final_stream(prompt)[0, -1]
            torch.testing.assert_close(ends[row], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(runs.unsteered(5)[0], model.final_stream("the cat")[0, -1], rtol=1e-4, atol=1e-5)


def test_the_final_stream_is_that_of_the_model_as_it_is_changed():
    model = filled()
    with rl.intervene(model, rl.Scale("blocks.2.hook_mlp_out", 2.0, position=1)):
        stream, logits = model.final_stream(TOKENS), model(TOKENS)
    torch.testing.assert_close(model.read_final(stream).logits(), logits, rtol=1e-4, atol=1e-5)
    with (
        rl.intervene(model, rl.Scale("unembed.hook_logits_pre_cap", 2.0)),
        pytest.raises(ReflowlensError, match="a final stream comes before what is attached"),
    ):
        model.final_stream(TOKENS)


def test_the_lens_ends_in_the_models_prediction():
    model = filled()
    view = rl.signal_view(model)
    stack = residual_stack(model, PROMPTS)
    assert len(stack) == 2 * model.cfg.n_layers + 1
    reading = read_lens(view, stack, [5, 7])
    logits = torch.stack([model(prompt)[0, -1] for prompt in PROMPTS])
    assert reading.top[-1].tolist() == logits.argmax(-1).tolist()
    assert reading.logit[-1] == pytest.approx([logits[0, 5].item(), logits[1, 7].item()], rel=1e-4)
    assert reading.kl[-1] == pytest.approx([0, 0], abs=1e-6)
    last = readers(view, len(stack))[-1]
    torch.testing.assert_close(last.logits(last.readout(stack[-1])), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grid", ["resid_mid", "mlp_out", "attn_head_q", "attn_head_k_by_pos", "attn_head_v",
                                  "attn_head_pattern_by_pos", "tokens", "features_by_pos"])  # fmt: skip
def test_every_grid_of_a_sweep_is_of_whole_passes_of_prompts_as_alone(grid):
    """Of several lengths; none runs on suffixes."""
    model, metric = filled(), rl.metrics.logit_diff(5, 7)
    assert model.stages == "whole"
    with features_for(model, grid):
        found = rl.sweep(model, None, PROMPTS, [rl.Scale("ttt.hook_delta", 0.5)], metric, progress=False)
        pairs = [(text(5, 1), text(5, 2)), (text(5, 3), text(5, 4))]  # a mini-batch and a token
        clean, corrupted = (torch.stack(each) for each in zip(*pairs, strict=True))
        together = rl.sweep(model, clean, corrupted, grid, metric, progress=False)
        alone = [rl.sweep(model, *(x[None] for x in pair), grid, metric, progress=False) for pair in pairs]
        expected = whole(model, clean, corrupted, grid, metric)
    values = torch.cat([each.values for each in alone], dim=-1)
    torch.testing.assert_close(together.values, values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.values.flatten(0, -2), expected, rtol=1e-4, atol=1e-5)
    for i, prompt in enumerate(PROMPTS):
        logits = model.run_with_hooks(prompt, fwd_hooks=[("ttt.hook_delta", lambda x, hook: 0.5 * x)])[0, -1]
        torch.testing.assert_close(found.values[0, i], logits[5] - logits[7], rtol=1e-4, atol=1e-5)


def test_a_screening_measures_what_a_sweep_does():
    model, metric = filled(), rl.metrics.logit_diff(5, 7)
    clean, corrupted = text(9, 1)[None], text(9, 2)[None]
    found = rl.screen(model, clean, corrupted, "attn_head_out", metric, exhaustive=True, progress=False)
    exact = rl.sweep(model, clean, corrupted, "attn_head_out", metric, progress=False).values[..., 0]
    estimate = rl.sweep(model, clean, corrupted, "attn_head_out", metric, mode="gradient", progress=False).values[
        ..., 0
    ]
    frame = found.frame.sort_values(["layer", "head"])
    size = exact.abs().max().item()
    baseline = rl.sweep(model, clean, corrupted, "attn_head_out", metric, progress=False).baseline.item()
    for column, values in (("exact", exact), ("estimate", estimate)):
        assert frame[column].to_numpy() == pytest.approx((values.flatten() - baseline).numpy(), abs=1e-4 * size)


def test_doses_are_those_of_plain_hooks():
    model, place = filled(), rl.FeatureAt(2, 3, -1)
    frame = rl.dose_response(model, None, place, 5, TOKENS, doses=[0.0, 2.0], quantile=1.5, controls=2)
    for _, row in frame.iterrows():

        def put(x: Tensor, hook: Any, row: Any = row) -> Tensor:
            x = x.clone()
            x[:, -1, int(row["feature"])] = row["activation"]
            return x

        logits = model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.2.mlp.hook_post", put)])[0, -1].detach()
        assert row["logit"] == pytest.approx((logits[5] - logits.mean()).item(), rel=1e-3, abs=1e-5)
        assert row["log_prob"] == pytest.approx(logits.log_softmax(-1)[5].item(), rel=1e-4)
    writes = (model.blocks[2].mlp.W_out * model.blocks[2].w_mlp).norm(dim=1).detach()
    ratio = frame[frame["control"] & (frame["dose"] == 2)].iloc[0]
    assert ratio["activation"] == pytest.approx((3 * writes[3] / writes[int(ratio["feature"])]).item(), rel=1e-4)


def test_statistics_edits_and_caches_are_of_the_model_as_it_reads(tmp_path):
    model, tokens = filled(), torch.stack([text(10, 1), text(10, 2)])
    points = ["blocks.3.mlp.hook_post", "ttt.hook_delta", "flow.hook_flow_post", "hook_refined"]
    _, cache = model.run_with_cache(tokens)
    collected = rl.collect(model, [tokens], points)
    for point in points:
        torch.testing.assert_close(
            collected[point].mean, cache[point].flatten(0, 1).mean(0).double(), rtol=1e-4, atol=1e-5
        )
    with pytest.raises(ReflowlensError, match="statistics are of"):
        rl.collect(model, [tokens], "ttt.steps.1.hook_W")
    with rl.edit(model, rl.ScaleWeights("ttt.W_O", 0.0)):
        edited = model(tokens)
    silent = model.run_with_hooks(tokens, fwd_hooks=[("ttt.hook_delta", lambda x, hook: 0 * x)])
    torch.testing.assert_close(edited, silent, rtol=1e-4, atol=1e-5)
    cache.save(tmp_path / "cache")
    loaded = rl.ActivationCache.load(tmp_path / "cache")
    assert set(loaded) == set(cache)
    assert all(torch.equal(loaded[name], cache[name]) for name in cache)


def test_units_are_counted_as_they_fire():
    model = filled()
    result = unit_statistics(model, text(40, 3), "mlp_post", sampling="tiles", context=10, untrained=1, controls=False)
    levels = result.frames["levels"]
    _, cache = model.run_with_cache(text(40, 3).view(4, 10), names_filter="blocks.2.mlp.hook_post")
    fires = (cache["blocks.2.mlp.hook_post"] > 0).double().mean().item()
    row = levels[(levels["level"] == 2) & (levels["kind"] == "mlp_post")].iloc[0]
    assert row["firing_rate"] == pytest.approx(fires, abs=1e-6)


def test_what_transformers_has_no_class_for_is_not_exported(tmp_path):
    with pytest.raises(ReflowlensError, match="ttt_flow"):
        export_hf(filled(), tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize("kind", ["plt", "clt", "skip", "sae"])
def test_dictionaries_stand_in_for_parts_of_it(kind):
    model = filled()
    dictionary = dictionary_of(model, kind)
    with dictionary.spliced(model):
        with_error = model(TOKENS)
    torch.testing.assert_close(with_error, model(TOKENS), rtol=1e-4, atol=1e-5)
    _, cache = model.run_with_cache(TOKENS)
    layers = list(dictionary.each_layer())
    with dictionary.spliced(model, error=False):
        found = model.run_with_cache(TOKENS, names_filter=dictionary.cfg.writes[0])[1][dictionary.cfg.writes[0]]
        assert (model(TOKENS) - with_error).abs().max() > 1e-3
    read = cache[dictionary.cfg.reads[0]][0]
    expected = dictionary.reconstruct(0, [layers[0].encode(read)], read)
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-5)
