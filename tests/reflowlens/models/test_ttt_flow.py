"""TTT-Linear with a flow refiner: published sizes, a plain forward, the dual form, texts apart, generation."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import reflowlens as rl
from reflowlens.config import PRESETS, ModelConfig
from reflowlens.errors import ReflowlensError
from reflowlens.flops import forward_flops_by_part
from reflowlens.models import build_model
from reflowlens.models.ttt_flow import TTTFlow
from reflowlens.models.ttt_linear import TTTLinear
from reflowlens.sweeps.packed import UnpatchedRun
from reflowlens.ttt_flow_config import TTTFlowConfig
from tests.reference import ttt_flow as plain
from tests.reflowlens.sweeps.test_sweep import whole

OWN = TTTFlowConfig(
    ttt_heads=2, ttt_chunk=4, flow_width=6, flow_hidden=10, bigram_slots=13, bigram_width=6, value_width=5,
    value_layers=1, exclusive_layers=2, rotary_channels=4, rotary_context=16,
)  # fmt: skip
CFG = ModelConfig(
    architecture="ttt_flow", n_layers=5, d_model=16, n_heads=4, n_key_value_heads=2, d_head=6, d_mlp=20, d_vocab=256,
    n_ctx=32, tokenizer_name="bytes", ttt_flow=OWN,
)  # fmt: skip


def filled(dtype: torch.dtype = torch.float32, seed: int = 0, **own: Any) -> TTTFlow:
    """Every weight away from where it would not show."""
    model = build_model(dataclasses.replace(CFG, ttt_flow=dataclasses.replace(OWN, **own)), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            std = 0.1 if parameter.ndim < 2 else parameter.shape[-2] ** -0.5
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=std)
            if name.endswith(".gate") and "smear" not in name:
                parameter.zero_()
    return model.to(dtype)  # type: ignore[return-value]


def text(n: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("preset", "own", "expected"),
    [
        ("ttt_flow_10l", {}, 25_749_398),
        ("ttt_flow_11l", {}, 28_110_750),
        ("ttt_flow_10l", {"ttt": False, "flow": False}, 24_566_868),
        ("ttt_flow_10l", {"flow": False}, 24_566_868 + 1_083_905),
        ("ttt_flow_10l", {"ttt": False}, 24_566_868 + 98_625),
        ("ttt_flow_10l", {"ttt": False, "flow_width": 32}, 24_566_868 + 49_441),
        ("ttt_flow_10l", {"ttt": False, "flow_hidden": 128}, 24_566_868 + 82_113),
        ("ttt_flow_10l", {"ttt": False, "flow_width": 128}, 24_566_868 + 196_993),
    ],
)
def test_published_sizes(preset, own, expected):
    cfg = dataclasses.replace(PRESETS[preset], ttt_flow=TTTFlowConfig(**own))
    assert build_model(cfg, device="meta").n_parameters == expected


@pytest.mark.parametrize("own", [{}, {"ttt": False}, {"flow": False}, {"ttt": False, "flow": False}])
@pytest.mark.parametrize("length", [1, 3, 11])
def test_logits_are_those_of_the_plain_forward(own, length):
    model, tokens = filled(torch.float64, **own), text(length)
    expected = plain.logits(tokens.tolist(), dict(model.named_parameters()), model.cfg)
    torch.testing.assert_close(model(tokens)[0], expected, rtol=1e-6, atol=1e-6)  # angles are stored in float32


def test_float32_is_near_the_plain_forward():
    model, tokens = filled(), text(19)
    expected = plain.logits(tokens.tolist(), dict(filled(torch.float64).named_parameters()), model.cfg)
    torch.testing.assert_close(model(tokens)[0].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [3, 4, 9])
def test_the_dual_form_is_a_loop_over_tokens_with_its_outer_gradients(length):
    """Gradients of what is read, through every inner step, at all that is learned."""
    ttt = filled(torch.float64).ttt
    assert ttt is not None
    x = torch.randn(length, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    readout = torch.randn(length, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    weights = {f"ttt.{name}": parameter for name, parameter in ttt.named_parameters()}
    leaves = [x, *weights.values()]
    fast = ttt(x[None])[0][0]
    slow = x + weights["ttt.gate"].sigmoid() * plain.ttt(x, weights, 2, 4, ttt.rate)
    torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-10)
    for found, expected in zip(
        torch.autograd.grad((fast * readout).sum(), leaves),
        torch.autograd.grad((slow * readout).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


def test_the_inner_gradient_is_that_of_the_inner_loss():
    ttt = filled(torch.float64).ttt
    assert ttt is not None
    k, v = torch.randn(2, 3, 2, 4, 8, dtype=torch.float64)
    state = ttt.first_state(3)
    c = torch.zeros(3, 2, 4, 8, dtype=torch.float64, requires_grad=True)  # one a token
    loss = 0.5 * (ttt.inner_norm(k @ state.W + state.c[..., None, :] + c) - (v - k)).pow(2).sum()
    torch.testing.assert_close(ttt.inner_loss(k, v, state.W, state.c).sum(), loss)
    (expected,) = torch.autograd.grad(loss, c)
    torch.testing.assert_close(ttt.inner_gradient(k, v, state.W, state.c), expected)


def test_fresh_refiners_add_next_to_nothing():
    cfg = dataclasses.replace(PRESETS["ttt_flow_10l"], n_layers=4, n_ctx=32, n_heads=2, n_key_value_heads=1, d_mlp=64)
    model, tokens = build_model(cfg), torch.arange(20)
    _, cache = model.run_with_cache(
        tokens, names_filter=["ttt.hook_delta", "flow.hook_delta", "ln_final.hook_normalized"]
    )
    assert bool((cache["ttt.hook_delta"] == 0).all())
    size = cache["flow.hook_delta"].norm() / cache["ln_final.hook_normalized"].norm()
    assert 1e-4 < size < 0.0067


def test_every_parameter_of_a_fresh_model_learns():
    """Many begin at 0, and none where what it is multiplied with does too."""
    model = build_model(CFG)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    for step in range(3):
        optimizer.zero_grad()
        model(torch.stack([text(12, 2 * step), text(12, 2 * step + 1)]), "loss").backward()
        optimizer.step()
    still = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert not still


@pytest.mark.parametrize("changed", [0, 4, 9])
def test_nothing_is_seen_of_the_future(changed):
    model, tokens = filled(), text(12)
    other = tokens.clone()
    other[changed] = (other[changed] + 1) % 256
    before, after = model(tokens)[0], model(other)[0]
    torch.testing.assert_close(before[:changed], after[:changed], rtol=0, atol=1e-6)
    assert (before[changed:] - after[changed:]).abs().amax(-1).min() > 1e-4


def test_texts_packed_into_a_row_are_read_as_if_alone():
    model, texts = filled(), [text(7, 1), text(5, 2), text(12, 3)]
    segments = torch.cat([torch.full((len(each),), i) for i, each in enumerate(texts)])
    packed = model(torch.cat(texts)[None], segments=segments[None])[0]
    alone = torch.cat([model(each)[0] for each in texts])
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)


def test_the_text_before_does_not_leak():
    """The published family's smear gate did."""
    model, first, second = filled(), text(6, 1), text(9, 2)
    segments = torch.tensor([0] * 6 + [1] * 9)[None]
    other = (first + 1) % 256
    rows = [model(torch.cat([each, second])[None], segments=segments)[0, 6:] for each in (first, other)]
    assert torch.equal(*rows)


def test_a_prompt_in_a_batch_is_read_as_alone():
    model = filled()
    prompts = ["a", "abcdef", "the cat sat on"]
    together = model(prompts)
    for row, prompt in zip(together, prompts, strict=True):
        torch.testing.assert_close(row[: len(prompt)], model(prompt)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cuts", [[5], [1, 2, 3, 4], [4, 8], [3, 9, 10]])
def test_a_text_read_in_pieces_is_the_text_read_at_once(cuts):
    model, tokens = filled(), torch.stack([text(13, 1), text(13, 2)])
    past, pieces = model.make_cache(2), []
    for first, last in zip([0, *cuts], [*cuts, 13], strict=True):
        pieces.append(model(tokens[:, first:last], past_kv_cache=past))
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens), rtol=1e-4, atol=1e-5)
    assert past.length == 13


def test_generation_takes_the_likeliest_token_of_the_whole_pass():
    model, prompt = filled(), text(6)
    tokens = prompt[None]
    for _ in range(9):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], dim=1)
    assert model.generate(prompt, 9, temperature=0, return_type="tokens").tolist() == tokens.tolist()


def test_losses_and_their_gradients_are_those_of_capped_logits():
    model, tokens = filled(torch.float64), text(11)[None]
    logits = model(tokens)
    assert logits.abs().max() < OWN.logit_cap
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:])
    loss = model(tokens, "loss")
    torch.testing.assert_close(loss, expected)
    parameters = list(model.parameters())
    for found, wanted in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-10)


def test_the_state_of_each_mini_batch_can_be_read_and_changed():
    model, tokens = filled(), text(10)
    names = [f"ttt.steps.{m}.hook_{part}" for m in range(3) for part in ("W", "c", "grad")]
    _, cache = model.run_with_cache(tokens, names_filter=names)
    ttt = model.ttt
    assert isinstance(ttt, TTTLinear)
    torch.testing.assert_close(cache["ttt.steps.0.hook_W"][0], ttt.W_start)
    _, views = model.run_with_cache(tokens, names_filter=["ttt.hook_k"])
    k, G = views["ttt.hook_k"][0, :4].transpose(0, 1), cache["ttt.steps.0.hook_grad"][0]
    torch.testing.assert_close(cache["ttt.steps.1.hook_W"][0], ttt.W_start - ttt.rate * k.mT @ G)
    torch.testing.assert_close(cache["ttt.steps.1.hook_c"][0], ttt.b_start - ttt.rate * G.sum(1))
    back = model.run_with_hooks(tokens, fwd_hooks=[("ttt.steps.2.hook_W", lambda W, hook: ttt.W_start[None])])
    change = (back - model(tokens))[0].abs().amax(-1)
    assert bool((change[:8] == 0).all())
    assert bool((change[8:] > 0).all())


def test_a_pass_starts_from_tokens():
    with pytest.raises(ReflowlensError, match="starts from tokens"):
        filled()(torch.zeros(1, 3, 16), start_at_layer=2)


def test_a_default_cache_holds_no_state_of_mini_batches(tmp_path):
    model, tokens = filled(), text(6)
    _, cache = model.run_with_cache(tokens)
    assert not [name for name in cache if ".steps." in name]
    assert {"ttt.hook_delta", "flow.hook_velocity", "hook_refined", "blocks.4.hook_resid_in"} <= set(cache)
    rl.save_model(tmp_path / "model", model)
    torch.testing.assert_close(rl.load_model(tmp_path / "model")(tokens), model(tokens))


@pytest.mark.parametrize("grid", ["resid_pre", "attn_out", "mlp_neurons", "attn_head_out"])
def test_sweeps_are_whole_passes(grid):
    model = filled()
    clean, corrupted = torch.stack([text(9, 1), text(9, 2)]), torch.stack([text(9, 3), text(9, 4)])
    metric = rl.metrics.logit_diff(5, 7)
    found = rl.sweep(model, clean, corrupted, grid, metric, progress=False)
    expected = whole(model, clean, corrupted, grid, metric)
    torch.testing.assert_close(found.values.flatten(0, -2), expected, rtol=1e-4, atol=1e-5)
    assert (found.effect() != 0).any()


def test_the_final_stream_is_read_position_by_position():
    model, tokens = filled(), text(9)
    stream = model.final_stream(tokens)
    torch.testing.assert_close(model.read_final(stream[:, 4:5]).logits(), model(tokens)[:, 4:5])


def test_what_runs_from_a_block_on_says_that_it_cannot():
    with pytest.raises(ReflowlensError, match="a pass of a TTTFlow starts from tokens"):
        UnpatchedRun(filled(), text(5)[None]).resid(2)


@pytest.mark.parametrize("own", [{}, {"ttt": False, "flow": False, "value_layers": 0}])
@pytest.mark.parametrize("context", [8, 11])
def test_every_product_of_a_pass_is_counted(context, own):
    model, tokens = filled(**own), torch.stack([text(context, 1), text(context, 2)])
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens)
    parts = forward_flops_by_part(model.cfg, context, batch=2)
    square = parts["attention_mixing"] * 2 * context / (context + 1)
    whole = sum(parts.values()) - parts["attention_mixing"] + square
    assert counter.get_total_flops() == pytest.approx(whole * 2 * context)


SIZES = {
    "batch": 2, "pos": 11, "head": 4, "d_model": 16, "d_mlp": 20, "d_head": 6, "flow": 6, "d_vocab": 256, "one": 1,
    "flow_hidden": 10, "key_pos": 11, "pos_in_chunk": 4, "key": 8, "value": 8,
}  # fmt: skip


@pytest.mark.parametrize("return_type", ["logits", "loss", "both", None])
def test_every_point_runs_with_the_axes_that_it_names(return_type):
    model, tokens = filled(), torch.stack([text(11, 1), text(11, 2)])
    reached = {name for name in model.hook_dict if not name.startswith("ttt.steps.") or int(name.split(".")[2]) < 3}
    _, cache = model.run_with_cache(tokens, return_type=return_type, names_filter=lambda name: True)
    assert set(cache) == reached
    for name, activation in cache.items():
        sizes = SIZES | ({"head": 2, "d_head": 8} if name.startswith("ttt.") else {})
        if name.startswith("ttt.steps.2."):
            sizes |= {"pos_in_chunk": 3}
        of_values = ("hook_k", "hook_v", "hook_rot_k", "hook_value", "hook_token_values", "hook_excluded")
        if name.endswith((*of_values, "hook_k_input", "hook_v_input")) and "ttt" not in name:
            sizes |= {"head": 2}
        assert activation.shape == tuple(sizes[axis] for axis in model.hook_axes(name)), name


def test_every_point_has_the_gradient_of_a_change_of_it():
    """Along a direction, against a central difference in float64."""
    model, tokens = filled(torch.float64), text(9)[None]
    reached = [name for name in model.hook_dict if not name.startswith("ttt.steps.") or int(name.split(".")[2]) < 3]
    _, cache = model.run_with_cache(tokens, "loss", names_filter=reached, incl_bwd=True, return_cache_object=False)
    step = 1e-5
    for name in reached:
        if name not in cache or "pattern" in name or "scores" in name:  # rows of a softmax; masked scores
            continue
        direction = torch.randn(cache[name].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        ends = [
            model.run_with_hooks(
                tokens, return_type="loss", fwd_hooks=[(name, lambda x, hook, by=by, d=direction: x + by * d)]
            )
            for by in (step, -step)
        ]
        found = (cache[f"{name}_grad"] * direction).sum()
        torch.testing.assert_close(found, (ends[0] - ends[1]) / (2 * step), rtol=2e-4, atol=1e-7, msg=name)


def test_logits_in_front_of_the_cap_are_formed_when_something_is_attached_alone():
    model, tokens = filled(torch.float64), text(7)[None]
    logits, cache = model.run_with_cache(tokens, names_filter="unembed.hook_logits_pre_cap")
    before = cache["unembed.hook_logits_pre_cap"]
    torch.testing.assert_close(before, model.final_stream(tokens) @ model.W_U)
    torch.testing.assert_close(logits, 30 * (before / 30).tanh())
    assert "unembed.hook_logits_pre_cap" not in model.run_with_cache(tokens)[1]
    changes = [("unembed.hook_logits_pre_cap", lambda x, hook: 2 * x)]
    logits, loss = model.run_with_hooks(tokens, return_type="both", fwd_hooks=changes)
    torch.testing.assert_close(logits, 30 * (2 * before / 30).tanh())
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:]))
    metric = rl.metrics.logit_diff(5, 7)
    changed = rl.Scale("unembed.hook_logits_pre_cap", 2.0)
    found = rl.sweep(model, None, tokens, [changed], metric, progress=False).values
    torch.testing.assert_close(found.flatten(), (logits[0, -1, 5] - logits[0, -1, 7])[None].to(found))


def test_points_of_packed_texts_are_where_their_tokens_are():
    model, texts = filled(), [text(7, 1), text(5, 2)]
    segments = torch.tensor([0] * 7 + [1] * 5)[None]
    names = ["ttt.hook_q", "ttt.hook_out", "ttt.hook_delta", "hook_refined"]
    _, packed = model.run_with_cache(torch.cat(texts)[None], segments=segments, names_filter=names)
    alone = [model.run_with_cache(each, names_filter=names)[1] for each in texts]
    for name in names:
        torch.testing.assert_close(
            packed[name][0], torch.cat([cache[name][0] for cache in alone]), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("point", ["W", "c", "grad"])
def test_interventions_on_the_state_of_a_mini_batch(point):
    model, tokens = filled(), torch.stack([text(10, 1), text(10, 2)])
    other, name = torch.stack([text(10, 3), text(10, 4)]), f"ttt.steps.1.hook_{point}"
    _, there = model.run_with_cache(other, names_filter=name)

    def by_hand(change):
        return model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: change(x))])

    cases = [
        (rl.Ablate(name), torch.zeros_like),
        (rl.Scale(name, 0.5), lambda x: 0.5 * x),
        (rl.Patch(name, other), lambda x: there[name]),
        (rl.Ablate(name, by="mean", reference=other), lambda x: there[name].mean(0, keepdim=True).expand_as(x)),
        (rl.Ablate(name, head=1), lambda x: torch.stack([x[:, 0], 0 * x[:, 1]], dim=1)),
        (rl.Replace(name, torch.ones(8)), torch.ones_like),
    ]
    for intervention, change in cases:
        found = rl.run(model, tokens, intervention)
        torch.testing.assert_close(found, by_hand(change), rtol=1e-5, atol=1e-6)
        assert (found - model(tokens)).abs().max() > 1e-6
    for selected in ({"position": 2}, {"position": "last"}):
        with pytest.raises(ReflowlensError, match="has no positions"):
            rl.run(model, tokens, rl.Ablate(name, **selected))
    with pytest.raises(ReflowlensError, match="has no positions"):
        rl.run(model, tokens, rl.Patch(name, other, from_position=1))
    with pytest.raises(ReflowlensError, match="needs source texts of equal length"):
        rl.run(model, tokens, rl.Patch(name, ["a long text", "short"]))


def test_a_pos_slice_leaves_states_whole():
    model, tokens = filled(), text(10)
    names = ["ttt.steps.1.hook_W", "ttt.steps.1.hook_grad", "ttt.hook_out"]
    _, cache = model.run_with_cache(tokens, names_filter=names, pos_slice=-1)
    assert [cache[name].shape for name in names] == [(1, 2, 8, 8), (1, 2, 4, 8), (1, 1, 2, 8)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_another_type_keeps_tables_and_factors(dtype):
    """Constants are no weights: 1 / √(l + 1) and the turns are as they are in float32."""
    model, reference = filled().to(dtype), filled()
    for block, same in zip(model.blocks, reference.blocks, strict=True):
        for table in ("cos", "sin"):
            assert torch.equal(getattr(block.attn.rotary, table), getattr(same.attn.rotary, table))
        assert torch.equal(block.ln2.w, same.ln2.w)
    assert model(text(9)).dtype == dtype
    tolerance = {torch.float64: 1e-4, torch.bfloat16: 0.3, torch.float16: 0.05}[dtype]
    assert (model(text(9)).float() - reference(text(9))).abs().max() < tolerance


def test_a_view_is_capped_and_no_prediction():
    """It reads the stream in front of the refiners, as the lens does."""
    model, tokens = filled(), text(9)
    view = rl.signal_view(model)
    logits, cache = model.run_with_cache(tokens)
    last = cache["resid_post", -1]
    plain = last / (last.pow(2).mean(-1, keepdim=True) + model.cfg.eps).sqrt() @ model.W_U
    torch.testing.assert_close(view.logits(cache.signals()), 30 * (plain / 30).tanh(), rtol=1e-4, atol=1e-5)
    assert not view.is_prediction
    assert (view.logits(cache.signals()) - logits).abs().max() > 0.1
    unrefined = filled(ttt=False, flow=False)
    assert not rl.signal_view(unrefined).is_prediction
    torch.testing.assert_close(
        rl.signal_view(unrefined).logits(unrefined.run_with_cache(tokens)[1].signals()), unrefined(tokens)
    )


def test_what_needs_logits_that_are_sums_is_refused():
    model, tokens = filled(), text(9)
    cache = model.run_with_cache(tokens)[1]
    for call in (
        lambda: cache.logit_attrs(cache.accumulated_resid(), 5),
        lambda: model.tokens_to_residual_directions(5),
    ):
        with pytest.raises(ReflowlensError, match="a TTTFlow refines that stream and caps its logits"):
            call()
    for call in (cache.decompose_resid, cache.stack_head_results, cache.get_full_resid_decomposition):
        with pytest.raises(ReflowlensError, match="scale theirs and read earlier streams"):
            call()
    with pytest.raises(ReflowlensError, match="a TTTFlow has no graph"):
        rl.Graph.of(model)


def test_gradients_of_a_sweep_are_those_of_whole_passes():
    model = filled(torch.float64)
    clean, corrupted = torch.stack([text(9, 1), text(9, 2)]), torch.stack([text(9, 3), text(9, 4)])
    metric = rl.metrics.logit_diff(5, 7)
    found = rl.sweep(model, clean, corrupted, "resid_post", metric, mode="gradient", progress=False)
    name = "blocks.2.hook_resid_post"
    _, there = model.run_with_cache(clean, names_filter=name)
    kept = []

    def keep(x, hook):
        kept.append(x.detach().requires_grad_())
        return kept[-1]

    logits = model.run_with_hooks(corrupted, fwd_hooks=[(name, keep)])[:, -1]
    values = logits[:, 5] - logits[:, 7]
    torch.testing.assert_close(found.baseline, values.detach().to(found.baseline))
    (gradient,) = torch.autograd.grad(values.sum(), kept)
    expected = values[None] + ((there[name] - kept[0]) * gradient).sum(-1).T
    torch.testing.assert_close(found.values[2], expected.detach().to(found.values), rtol=1e-5, atol=1e-6)
    with pytest.raises(ReflowlensError, match="integrated gradients go along 'hook_embed'"):
        rl.sweep(model, clean, corrupted, "resid_post", metric, mode="integrated", progress=False)


def test_prompts_of_several_lengths_are_continued_as_alone():
    model = filled()
    prompts = ["a", "abcdef", "the cat sat on"]
    together = model.generate(prompts, 9, temperature=0, stop_at_eos=False)
    assert together == [model.generate(prompt, 9, temperature=0, stop_at_eos=False) for prompt in prompts]
    slow = model.generate(prompts, 9, temperature=0, stop_at_eos=False, use_past_kv_cache=False)
    assert together == slow
