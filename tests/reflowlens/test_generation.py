from __future__ import annotations

import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

import reflowlens as rl
from reflowlens import generation
from reflowlens.errors import ReflowlensError
from reflowlens.generation import sample
from tests.reflowlens.models.test_bdh import random_bdh
from tests.support.tiny import NAMES, assert_close, random_model

PROMPTS = ["The cap", "x", "A longer one"]


@pytest.mark.parametrize("name", NAMES)
def test_the_cached_path_writes_what_the_uncached_one_does(name, tiny_models):
    model = tiny_models[name]
    settings = {"return_type": "tokens", "seed": 3, "top_k": 20}
    cached = model.generate(PROMPTS, 8, **settings)
    assert torch.equal(cached, model.generate(PROMPTS, 8, use_past_kv_cache=False, **settings))


@pytest.mark.parametrize("name", ["gpt2", "reflow", "reflow_lite"])
def test_a_row_of_a_batch_gets_what_it_gets_alone(name, tiny_models):
    model = tiny_models[name]
    together = model.generate(PROMPTS, 6, seed=5, temperature=0.7)
    for row, prompt in enumerate(PROMPTS):
        assert model.generate(prompt, 6, seed=5 + row, temperature=0.7) == together[row]


def test_greedy_takes_the_most_probable_token():
    model = random_model("reflow")
    greedy = model.generate("The", 5, temperature=0, return_type="tokens")[0]
    expected = model.to_tokens("The")
    for _ in range(5):
        expected = torch.cat([expected, model(expected)[:, -1:, :256].argmax(-1)], dim=1)
    assert greedy.tolist() == expected[0].tolist()


def test_the_seed_decides():
    model = random_model("reflow")
    assert model.generate("The", 12, seed=1) == model.generate("The", 12, seed=1)
    assert model.generate("The", 12, seed=1) != model.generate("The", 12, seed=2)


def test_tokens_are_drawn_by_their_probabilities():
    logits = torch.tensor([0.5, float("-inf"), 2.0, 1.0, -1.0, float("-inf")])
    draws = sample(logits.expand(4000, -1), 0.7, None, None, [torch.Generator().manual_seed(i) for i in range(4000)])
    counts = draws.bincount(minlength=6)
    expected = 4000 * (logits.double() / 0.7).softmax(dim=0)
    assert counts[1] == counts[5] == 0
    possible = expected > 0
    assert scipy.stats.chisquare(counts[possible], expected[possible]).pvalue > 0.001


def test_a_stop_token_ends_a_row():
    model = random_model("reflow")
    free = model.generate("The", 10, temperature=0, return_type="tokens")[0].tolist()
    stop = free[5]
    stopped = model.generate("The", 10, temperature=0, stop_token=stop, return_type="tokens")[0].tolist()
    assert stopped == free[: free.index(stop, 3) + 1]


def test_a_row_may_end_before_another_row_s_prompt_does():
    model = random_model("reflow")
    first = int(model.generate("x", 1, seed=0, return_type="tokens")[0, -1])
    short, long = model.generate(["x", "A longer one"], 4, seed=0, stop_token=first)
    assert len(short) == 2 or "\ufffd" in short
    assert long.startswith("A longer one")


def test_padding_rows_are_never_drawn():
    model = random_model("reflow")
    with torch.no_grad():
        model.embed.W_recipe[256:] *= 100
    assert model.generate(PROMPTS, 10, return_type="tokens").max() < 256


def test_activations_of_the_whole_text_come_along():
    model = random_model("reflow")
    tokens, cache = model.generate(
        "The", 6, return_type="tokens", return_cache=True, names_filter="unembed.hook_signal"
    )
    assert cache["unembed.hook_signal"].shape == (1, 9, 32)
    _, whole = model.run_with_cache(tokens)
    assert_close(cache["unembed.hook_signal"], whole["unembed.hook_signal"])


@given(st.integers(1, 12), st.floats(0.05, 1.0), st.integers(0, 50))
@settings(max_examples=40, deadline=None)
def test_filters_keep_the_smallest_sufficient_set(k, p, seed):
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(seed))
    probabilities = logits[0].softmax(-1)
    order = probabilities.argsort(descending=True)
    nucleus = order[: int((probabilities[order].cumsum(0) < p - 1e-6).sum()) + 1].tolist()
    for draw in range(20):
        generator = [torch.Generator().manual_seed(draw)]
        assert int(sample(logits, 1.0, k, None, generator)) in order[:k].tolist()
        assert int(sample(logits, 1.0, None, p, [torch.Generator().manual_seed(draw)])) in nucleus


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 2.5}, "top_k must be an integer and at least 1, got 2.5"),
        ({"temperature": "a"}, "temperature must be 0 .greedy. or positive, got 'a'"),
        ({"top_p": "a"}, "top_p must be above 0 and at most 1, got 'a'"),
        ({"seed": 2**70}, r"seed must be an integer from -2\*\*63"),
        ({"seed": 1.5}, r"seed must be an integer from -2\*\*63"),
        ({"top_p": 0.0}, "top_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 2.0}, "max_new_tokens must be an integer"),
        ({"temperature": float("nan")}, "temperature"),
        ({"stop_token": 288}, r"stop_token must be a token's text or its id, 0 to 287, got 288"),
        ({"stop_token": ["x", "y"]}, "stop_token must be a token's text or its id"),
        ({"max_new_tokens": 30}, "at most 21 new tokens"),
        ({"return_type": "tensor"}, "must be 'text' or 'tokens', got 'tensor'"),
    ],
)
def test_settings_out_of_range_are_errors(settings, message):
    with pytest.raises(ReflowlensError, match=message):
        random_model("reflow").generate("The", **({"max_new_tokens": 3} | settings))


def test_an_empty_prompt_is_an_error():
    with pytest.raises(ReflowlensError, match="empty"):
        random_model("reflow").generate("", 3)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_nan_are_an_error(temperature):
    model = random_model("reflow")
    with torch.no_grad():
        model.ln_final.w[0] = float("nan")
    with pytest.raises(ReflowlensError, match="the logits are NaN"):
        model.generate("The", 3, temperature=temperature)


@pytest.mark.parametrize("position", ["last", "e", None, 3, slice(1, 6)])
def test_a_row_is_intervened_on_as_it_is_alone(position, tiny_models):
    """While a longer prompt is read, what is the newest token of the pass is not yet its last; and rows have a token at
    different places, or one of them only in what it wrote."""
    model = tiny_models["reflow"]
    direction = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(4))
    steer = rl.Steer("resid_mid", direction, 3.0, layer=0, position=position)
    texts = ["xyz e", "abcdefgh", "eeee"]
    with rl.intervene(model, steer):
        together = model.generate(texts, 6, temperature=0, return_type="tokens")
    for row, text in zip(together, texts, strict=True):
        with rl.intervene(model, steer):
            alone = model.generate(text, 6, temperature=0, return_type="tokens")[0]
        assert row[: len(alone)].tolist() == alone.tolist()
        assert model.generate(text, 6, temperature=0, return_type="tokens")[0].tolist() != alone.tolist()


@pytest.mark.parametrize(
    "intervention",
    [
        rl.Scale("resid_mid", 3.0, layer=0, position=slice(5, 8)),
        rl.Scale("resid_mid", 3.0, layer=0, position=7),
        rl.Scale("resid_mid", 3.0, layer=0, position=[1, 6]),
        rl.Ablate("pattern", layer=1, index=slice(5, 8)),
        rl.Ablate("pattern", layer=1, index=6, position=slice(6, 9)),
    ],
)
def test_positions_that_are_not_written_yet_are_waited_for(tiny_models, intervention):
    model, texts, options = tiny_models["reflow"], ["abcd", "x"], {"temperature": 0, "return_type": "tokens"}
    with rl.intervene(model, intervention):
        cached = model.generate(texts, 9, **options)
        assert torch.equal(model.generate(texts, 9, use_past_kv_cache=False, **options), cached)
    assert not torch.equal(model.generate(texts, 9, **options), cached)


@pytest.mark.parametrize("past", [True, False])
def test_positions_from_the_end_are_refused(tiny_models, past):
    model = tiny_models["reflow"]
    for position in (-1, slice(None, -1), slice(-2, None), [0, -1]):
        scale = rl.Scale("resid_mid", 0.0, layer=0, position=position)
        error = pytest.raises(ReflowlensError, match="negative positions have no meaning while text is generated")
        with error, rl.intervene(model, scale):
            model.generate("abcd", 2, use_past_kv_cache=past)


INF = float("inf")


@pytest.mark.parametrize(
    ("logits", "temperature"), [([1.0, INF, 0.0], 1.0), ([1.0, INF, 0.0], 0.0), ([-INF] * 3, 1.0), ([20.0, 1.0], 1e-38)]
)
def test_infinite_logits_are_not_sampled(logits: list[float], temperature: float) -> None:
    with pytest.raises(ReflowlensError, match="the logits are infinite"):
        sample(torch.tensor([logits]), temperature, None, None, [torch.Generator().manual_seed(0)])


def test_a_logit_of_minus_infinity_is_a_token_ruled_out() -> None:
    logits = torch.tensor([[-INF, 0.0, -INF]])
    for temperature in (0.0, 1.0):
        assert sample(logits, temperature, None, None, [torch.Generator()]).tolist() == [1]


def test_a_draw_that_is_rounded_up_to_the_total_takes_the_last_possible_token(monkeypatch) -> None:
    highest = torch.tensor([[1.0]], dtype=torch.float64)  # times a total it would be past the last token
    monkeypatch.setattr(torch, "rand", lambda *shape, **kwargs: highest)
    assert sample(torch.tensor([[0.0, 1.0, -INF]]), 1.0, None, None, [torch.Generator()]).tolist() == [1]


@pytest.mark.parametrize("name", ["gpt2_biased", "llama_untied", "reflow"])
def test_gradients_through_the_cache_are_those_of_the_whole_pass(name):
    model = random_model(name).double()  # so that what remains is no rounding of float32 sums
    tokens = model.to_tokens("abcdefgh")
    past = model.make_cache(1, torch.float64)
    parts = [model(tokens[:, here], past_kv_cache=past) for here in (slice(0, 3), slice(3, 7), slice(7, 8))]
    torch.cat(parts, dim=1).square().sum().backward()
    cached = {key: parameter.grad for key, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    model(tokens).square().sum().backward()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(cached[key], parameter.grad, rtol=1e-9, atol=1e-9)  # that of b_K is 0


@pytest.mark.parametrize("name", ["gpt2_biased", "reflow_lite", "bdh"])
def test_a_pass_without_gradients_leaves_what_earlier_ones_saved(name):
    model = (random_bdh() if name == "bdh" else random_model(name)).double()
    tokens, past = model.to_tokens("abcdefgh"), model.make_cache(1, torch.float64)
    parts = [model(tokens[:, here], past_kv_cache=past) for here in (slice(0, 3), slice(3, 5))]
    with torch.no_grad():
        rest = [model(tokens[:, here], past_kv_cache=past) for here in (slice(5, 6), slice(6, 8))]
    torch.testing.assert_close(torch.cat([*parts, *rest], dim=1), model(tokens), rtol=1e-9, atol=1e-9)
    torch.cat(parts, dim=1).square().sum().backward()
    cached = {key: parameter.grad for key, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    model(tokens[:, :5]).square().sum().backward()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(cached[key], parameter.grad, rtol=1e-9, atol=1e-9)


def test_graphs_of_many_passes_keep_no_room_for_positions_to_come():
    model, saved = random_model("reflow"), []
    past = model.make_cache(1)
    room = past.keys[0].untyped_storage().nbytes()

    def note(x: torch.Tensor) -> torch.Tensor:
        saved.append(x.untyped_storage().nbytes())
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        for token in model.to_tokens("abc").T:
            model(token[None], past_kv_cache=past)
    assert saved
    assert room not in saved


@pytest.fixture
def modes(monkeypatch) -> list[bool]:
    """For each step that is generated whether it ran in inference mode."""
    modes, newest = [], generation._newest

    def noted(readout):
        modes.append(torch.is_inference_mode_enabled())
        return newest(readout)

    monkeypatch.setattr(generation, "_newest", noted)
    return modes


@pytest.mark.parametrize("name", [*NAMES, "bdh"])
def test_a_model_that_has_generated_is_trained_as_one_that_has_not(name, modes):
    """Its steps run in inference mode, of which no tensor may be kept: a backward pass could not read it."""
    model, fresh = (random_bdh() if name == "bdh" else random_model(name) for _ in range(2))
    model.generate(PROMPTS, 3)
    assert modes
    assert all(modes)
    for each in (model, fresh):
        each("The cap", return_type="loss").backward()
    for (key, parameter), other in zip(model.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad), key


def _torch_hook(model, keep):
    return model.blocks[0].mlp.register_forward_hook(lambda module, given, out: keep(out))


def _global_hook(model, keep):
    return torch.nn.modules.module.register_module_forward_hook(lambda module, given, out: keep(out))


def _own_module(model, keep):
    class Noting(type(model.blocks[0].mlp)):
        def forward(self, x):
            out = super().forward(x)
            keep(out)
            return out

    model.blocks[0].mlp.__class__ = Noting


def _own_forward(model, keep):
    mlp = model.blocks[0].mlp
    forward = mlp.forward

    def noting(x):
        out = forward(x)
        keep(out)
        return out

    mlp.forward = noting


def _kept_point(model, keep):
    vars(model.blocks[0].mlp.hook_post)["keep"] = lambda x, point: keep(x)


def _hook(model, keep):
    model.add_hook("blocks.0.mlp.hook_post", lambda x, hook: keep(x))


@pytest.mark.parametrize("attach", [_hook, _kept_point, _torch_hook, _global_hook, _own_module, _own_forward])
def test_what_somebody_keeps_of_a_step_may_enter_a_backward_pass(attach, modes):
    model, kept = random_model("reflow"), []
    expected = model.generate("The", 3)
    modes.clear()
    handle = attach(model, lambda x: kept.append(x) if isinstance(x, torch.Tensor) else None)
    try:
        assert model.generate("The", 3) == expected
    finally:
        if handle is not None:
            handle.remove()
    assert modes == [False] * 3
    assert kept
    for x in kept:
        weight = torch.ones_like(x, requires_grad=True)
        (weight * x).sum().backward()
        assert torch.equal(weight.grad, x)


def test_what_is_generated_in_the_caller_s_inference_mode_is_the_same(tiny_models):
    with torch.inference_mode():
        within = tiny_models["reflow"].generate(PROMPTS, 4)
    assert within == tiny_models["reflow"].generate(PROMPTS, 4)


def test_a_compiled_model_writes_the_same_and_is_compiled_once_for_all_lengths(tiny_models):
    """A graph for the prompt, one for one token more at any place: traced, without running a compiler."""
    model, counted = tiny_models["reflow"], CompileCounter()
    torch.compiler.reset()
    settings = {"return_type": "tokens", "temperature": 0, "stop_at_eos": False}
    written = rl.generate(torch.compile(model, backend=counted), "The cap", 7, **settings)
    torch.compiler.reset()
    assert torch.equal(written, model.generate("The cap", 7, **settings))
    assert counted.frame_count == 2
