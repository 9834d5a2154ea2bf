"""A dictionary in a model: exactly the model without edits, and with them what two plain hooks a layer give."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import reflowlens as rl
from analyses.units.counts import write_norms
from analyses.units.firing import unit_statistics
from reflowlens.conversion import import_hf
from reflowlens.dictionaries.config import ACTIVATIONS
from reflowlens.dictionaries.dictionary import Dictionary
from reflowlens.errors import ReflowlensError
from reflowlens.interventions.values import Intervention
from reflowlens.models.base import HookedModel
from reflowlens.models.parts import HookPoint
from tests.reference.splice import Edit, by_hand
from tests.reflowlens.models.test_bdh import random_bdh
from tests.support.dictionaries import KINDS, dictionary_of
from tests.support.tiny import NAMES, assert_close, random_model, random_tokens

MODELS: dict[str, Callable[[], HookedModel]] = {name: lambda name=name: random_model(name) for name in NAMES}
MODELS["bdh"] = random_bdh
KINDS_OF = [(name, kind) for name in MODELS for kind in KINDS if name != "bdh" or kind == "sae"]
FEATURES = [3, 7, 11]


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> HookedModel:
    """A Llama that the transformers library wrote."""
    folder: Path = tmp_path_factory.mktemp("hf")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    cfg = LlamaConfig(vocab_size=300, num_key_value_heads=2, max_position_embeddings=24, **sizes)
    LlamaForCausalLM(cfg).save_pretrained(folder)
    return import_hf(folder, tokenizer="bytes")


def edited(layer: int, to: Callable[[Tensor], Tensor]) -> Edit:
    """Some features of one layer changed."""

    def edit(at: int, features: Tensor) -> Tensor:
        changed = features.clone()
        if at == layer:
            changed[..., FEATURES] = to(changed[..., FEATURES])
        return changed

    return edit


# ------------------------------------------------------------------------------------------------------------ exactness


@pytest.mark.parametrize(("name", "kind"), KINDS_OF)
def test_with_its_error_term_the_model_computes_what_it_did(name: str, kind: Any) -> None:
    assert exactness(MODELS[name](), kind) <= 1e-5


def test_and_so_does_an_imported_one(imported: HookedModel) -> None:
    assert max(exactness(imported, kind) for kind in KINDS) <= 1e-5


def exactness(model: HookedModel, kind: Any) -> float:
    """The largest relative difference of logits over activations and ways to look: the row of the table."""
    tokens = random_tokens(model.cfg)
    plain, worst = model(tokens), 0.0
    for activation in ACTIVATIONS:
        dictionary = dictionary_of(model, kind, activation)
        seen = dictionary.cfg.n_layers * 3
        with dictionary.spliced(model):
            assert torch.equal(model(tokens), plain)
            logits, cache = model.run_with_cache(tokens)
            with rl.intervene(model, rl.Scale("features", 1.0, layer="all")):
                scaled = model(tokens)
        with dictionary.spliced(model, error="detached"):
            constant = model(tokens)
        with dictionary.spliced(model, error=False):
            assert (model(tokens) - plain).abs().max() > 1e-2 * plain.abs().max()
        assert sum(name.split(".")[-1].startswith(("hook_features", "hook_rec")) for name in cache) - seen in (0, 1)
        for other in (logits, scaled, constant, model(tokens)):
            worst = max(worst, ((other - plain).abs().max() / plain.abs().max()).item())
    return worst


@pytest.mark.parametrize("error", [True, False, "detached"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_features_are_what_the_dictionary_encodes(kind: Any, activation: str, error: Any) -> None:
    model = random_model("gpt2_new")
    tokens, dictionary = random_tokens(model.cfg), dictionary_of(model, kind, activation)
    with dictionary.spliced(model, error=error):
        logits, cache = model.run_with_cache(tokens)
    expected, features = by_hand(model, dictionary, tokens, error=bool(error))
    assert_close(logits, expected)
    for layer in range(2):
        assert_close(cache["features", layer], features[layer])
        assert 0.02 < (features[layer] > 0).float().mean() < 0.9
        assert model.hook_dict.get(f"blocks.{layer}.hook_features") is None
    if error:
        y = model.run_with_cache(tokens)[1][dictionary.cfg.writes[1]]
        assert_close(cache["reconstruction", 1] + cache["reconstruction_error", 1], y)


# ---------------------------------------------------------------------------------------------------------------- edits

INTERVENTIONS: dict[str, tuple[Callable[[int], Intervention], Callable[[Tensor], Tensor]]] = {
    "ablate": (lambda layer: rl.Ablate("features", layer=layer, index=FEATURES), lambda f: 0 * f),
    "steer": (lambda layer: rl.Steer("features", [1.5, -2.0, 3.0], layer=layer, index=FEATURES), lambda f: f + STEER),
    "replace": (lambda layer: rl.Replace("features", 2.5, layer=layer, index=FEATURES), lambda f: 0 * f + 2.5),
    "scale": (lambda layer: rl.Scale("features", -3.0, layer=layer, index=FEATURES), lambda f: -3 * f),
}
STEER = torch.tensor([1.5, -2.0, 3.0])


@pytest.mark.parametrize("error", [True, False, "detached"])
@pytest.mark.parametrize("what", INTERVENTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_interventions_equal_plain_hooks(kind: Any, what: str, error: Any) -> None:
    for name in ("reflow_lite", "gpt2_biased", "llama_untied"):
        model = random_model(name)
        tokens, dictionary = random_tokens(model.cfg), dictionary_of(model, kind, "relu")
        for layer in (0, 1):
            intervention, to = INTERVENTIONS[what]
            with dictionary.spliced(model, error=error):
                actual, unchanged = rl.run(model, tokens, intervention(layer)), model(tokens)
            expected, _ = by_hand(model, dictionary, tokens, edited(layer, to), bool(error))
            assert_close(actual, expected, what=f"{name}, layer {layer}")
            assert (actual - unchanged).abs().max() > 1e-4 * unchanged.abs().max()


@pytest.mark.parametrize("error", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_patches_take_the_features_of_another_run(kind: Any, error: bool) -> None:
    model = random_bdh() if kind == "sae" else random_model("reflow")
    tokens, other = random_tokens(model.cfg), random_tokens(model.cfg, seed=5)
    dictionary = dictionary_of(model, kind)
    _, theirs = by_hand(model, dictionary, other, error=error)
    with dictionary.spliced(model, error=error):
        actual = rl.run(model, tokens, rl.Patch("features", other, layer=0, position=-2))

    def edit(layer: int, features: Tensor) -> Tensor:
        changed = features.clone()
        if layer == 0:
            changed[:, -2] = theirs[0][:, -2]
        return changed

    assert_close(actual, by_hand(model, dictionary, tokens, edit, error)[0])


@pytest.mark.parametrize("kind", ["plt", "clt", "skip"])
def test_reconstruction_and_error_are_points_of_their_own(kind: Any) -> None:
    model = random_model("gpt2_new")
    tokens, dictionary = random_tokens(model.cfg), dictionary_of(model, kind, "relu")
    replaced, _ = by_hand(model, dictionary, tokens, error=False)
    ablate = INTERVENTIONS["ablate"]
    both, _ = by_hand(model, dictionary, tokens, edited(0, ablate[1]), error=False)
    with dictionary.spliced(model):
        assert_close(rl.run(model, tokens, rl.Ablate("reconstruction_error", layer="all")), replaced)
        errors = rl.Ablate("reconstruction_error", layer="all")
        assert_close(rl.run(model, tokens, [errors, ablate[0](0)]), both)
        only_error = rl.run(model, tokens, rl.Ablate("reconstruction", layer=1))
        error = model.run_with_cache(tokens)[1]["reconstruction_error", 1]
    assert_close(only_error, rl.run(model, tokens, rl.Replace("mlp_out", error, layer=1)))
    no_error = pytest.raises(ReflowlensError, match=r"no hook 'blocks\.0\.hook_reconstruction_error'")
    with dictionary.spliced(model, error=False), no_error:
        rl.run(model, tokens, errors)


@pytest.mark.parametrize("kind", ["plt", "clt"])
def test_some_layers_alone(kind: Any) -> None:
    """Of a cross-layer dictionary the layers that are written, from features of all before them."""
    model = random_model("llama_untied")
    tokens, dictionary = random_tokens(model.cfg), dictionary_of(model, kind)
    _, before = by_hand(model, dictionary, tokens, error=True)
    replaced = dictionary.reconstruct(1, before, model.run_with_cache(tokens)[1][dictionary.cfg.reads[1]])
    with dictionary.spliced(model, error=False, layers=1):
        assert ("blocks.0.hook_features" in model.hook_dict) == (kind == "clt")
        actual = model(tokens)
    assert_close(actual, rl.run(model, tokens, rl.Replace("mlp_out", replaced, layer=1)))


# ---------------------------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize("attached", ["before", "after"])
@pytest.mark.parametrize("kind", ["plt", "clt"])
def test_reads_see_every_hook_and_writes_go_through_every_hook(kind: Any, attached: str) -> None:
    model = random_model("gpt2_new")
    tokens, dictionary = random_tokens(model.cfg), dictionary_of(model, kind, "relu")
    read, written = dictionary.cfg.reads[0], dictionary.cfg.writes[0]
    hooks = [rl.Scale(read, 1.5), rl.Scale(written, -0.5)]
    contexts = [dictionary.spliced(model, error=False), rl.intervene(model, hooks)]
    with contextlib.ExitStack() as stack:
        for context in contexts if attached == "after" else reversed(contexts):
            stack.enter_context(context)
        actual, cache = model.run_with_cache(tokens)

    def scale(factor: float) -> Callable[..., Tensor]:
        return lambda x, hook: factor * x

    def hooked_by_hand() -> tuple[Tensor, list[Tensor]]:
        with model.hooks([(read, scale(1.5))]):
            return by_hand(model, dictionary, tokens, error=False)

    _, features = hooked_by_hand()
    assert_close(cache["features", 0], features[0])
    plain = model.run_with_cache(tokens)[1]
    reconstruction = dictionary.reconstruct(0, features, plain[read] * 1.5)
    assert_close(cache[written], -0.5 * reconstruction)
    assert_close(cache["reconstruction", 0], reconstruction)
    assert actual.isfinite().all()


def test_an_autoencoder_reads_and_writes_before_the_hooks_of_its_point() -> None:
    model = random_bdh()
    tokens, dictionary = random_tokens(model.cfg), dictionary_of(model, "sae")
    point = dictionary.cfg.writes[0]
    x = model.run_with_cache(tokens)[1][point]
    with rl.intervene(model, rl.Scale(point, 2.0)), dictionary.spliced(model, error=False):
        _, cache = model.run_with_cache(tokens)
    assert_close(cache["features", 0], dictionary.layers[0].encode(x))
    assert_close(cache[point], 2 * dictionary.reconstruct(0, {0: cache["features", 0]}, x))


# ------------------------------------------------------------------------------------------------------------ gradients


def gradients(model: HookedModel, tokens: Tensor, names: list[str]) -> dict[str, Tensor]:
    kept: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: HookPoint) -> None:
        x.retain_grad()
        kept[str(hook.name)] = x

    with torch.enable_grad(), model.hooks([(name, keep) for name in names]):
        model(tokens)[:, -1, 65].sum().backward()
    model.zero_grad()
    return {name: x.grad for name, x in kept.items() if x.grad is not None}


@pytest.mark.parametrize("kind", ["sae", "plt", "clt", "skip"])
def test_the_gradient_of_features_is_their_decoding_and_that_of_other_points_the_models(kind: Any) -> None:
    model = random_model("reflow")
    tokens, dictionary = random_tokens(model.cfg), dictionary_of(model, kind, "relu")
    streams = ["blocks.0.hook_resid_pre", "blocks.0.hook_resid_mid", *dictionary.cfg.writes]
    plain = gradients(model, tokens, streams)
    features = [f"blocks.{layer}.hook_features" for layer in (0, 1)]
    with dictionary.spliced(model):
        found = gradients(model, tokens, [*streams, *features])
    for name in streams:
        assert_close(found[name], plain[name], what=name)
    for layer, name in enumerate(features):
        decoders = dictionary.layers[layer].W_dec
        writes = dictionary.cfg.writes[layer : layer + decoders.shape[1]]
        expected = sum(plain[write] @ decoders[:, i].T for i, write in enumerate(writes))
        assert_close(found[name], expected, what=name)  # type: ignore[arg-type]


def test_a_detached_error_leaves_the_features_as_the_only_way() -> None:
    model = random_model("gpt2_new")
    tokens, dictionary = random_tokens(model.cfg), dictionary_of(model, "skip", "relu")
    read, written = dictionary.cfg.reads[1], dictionary.cfg.writes[1]
    with dictionary.spliced(model, error="detached"):
        found = gradients(
            model, tokens, [read, written, "blocks.1.hook_features", "blocks.1.hook_reconstruction_error"]
        )
        unhooked = gradients(model, tokens, [read, written])
    layer = dictionary.layers[1]
    assert_close(found["blocks.1.hook_features"], found[written] @ layer.W_dec[:, 0].T)
    assert_close(found["blocks.1.hook_reconstruction_error"], found[written])
    x = model.run_with_cache(tokens)[1][read]
    active = layer.encode(x) > 0
    through = (found["blocks.1.hook_features"] * active) @ layer.W_enc + found[written] @ layer.W_skip
    assert_close(found[read], through)
    assert_close(unhooked[read], through)


def test_without_the_error_term_the_gradient_is_the_replacements() -> None:
    model = random_model("gpt2_new")
    tokens, dictionary = random_tokens(model.cfg), dictionary_of(model, "clt", "relu")
    step = 1e-3 * torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
    name = "blocks.0.hook_resid_mid"
    with dictionary.spliced(model.double(), error=False):
        slope = gradients(model, tokens, [name])[name]
        ends = [rl.run(model, tokens, rl.Steer(name, step, sign))[:, -1, 65].sum() for sign in (1.0, -1.0)]
    torch.testing.assert_close((slope * step).sum(), (ends[0] - ends[1]) / 2, rtol=1e-3, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------- contexts


def assert_as_before(model: HookedModel, points: list[str]) -> None:
    assert list(model.hook_dict) == points
    assert {type(point) for point in model.hook_dict.values()} == {HookPoint}
    assert not any("hook_features" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("kind", KINDS)
def test_afterwards_the_model_is_what_it_was(kind: Any) -> None:
    model = random_model("reflow")
    points, weights = list(model.hook_dict), rl.model_hash(model)
    dictionary = dictionary_of(model, kind)
    with dictionary.spliced(model, error=False):
        assert rl.model_hash(model) == weights  # of the model alone
        assert set(model.state_dict()) == set(dict(model.named_parameters()))
    assert_as_before(model, points)
    with pytest.raises(ReflowlensError, match="empty"), dictionary.spliced(model):
        model("")
    assert_as_before(model, points)


def test_splices_and_interventions_may_be_left_in_any_order() -> None:
    model = random_model("gpt2_new")
    points, tokens = list(model.hook_dict), random_tokens(model.cfg)
    plain = model(tokens)
    first, second = dictionary_of(model, "plt"), dictionary_of(model, "sae", seed=3)
    replaced, _ = by_hand(model, _part(second, 1), tokens, error=False)
    a, b = first.spliced(model, layers=0), second.spliced(model, error=False, layers=[1])
    c = rl.intervene(model, rl.Scale("mlp_out", 2.0, layer=0))
    for context in (a, c, b):
        context.__enter__()
    assert model.run_with_cache(tokens)[1]["features", 1].shape == (2, 7, 40)
    a.__exit__(None, None, None)
    assert [name for name in model.hook_dict if name.endswith("features")] == ["blocks.1.hook_features"]
    c.__exit__(None, None, None)
    assert_close(model(tokens), replaced)
    b.__exit__(None, None, None)
    assert_as_before(model, points)
    assert torch.equal(model(tokens), plain)


def _part(dictionary: Dictionary, layer: int) -> Dictionary:
    """One layer of a per-layer dictionary as a dictionary."""
    cfg = dictionary.cfg
    part = Dictionary(dataclasses.replace(cfg, reads=(cfg.reads[layer],), writes=(cfg.writes[layer],)))
    part.layers[0].load_state_dict(dictionary.layers[layer].state_dict())
    return part


def test_one_dictionary_in_two_models_at_once() -> None:
    first, second = random_model("gpt2_new"), random_model("gpt2_new", seed=4)
    tokens, dictionary = random_tokens(first.cfg), dictionary_of(first, "clt")
    with dictionary.spliced(first, error=False), dictionary.spliced(second, error=False):

        def inside(x: Tensor, hook: HookPoint) -> None:
            second(tokens)  # a pass within a pass leaves the outer one's features alone

        nested = first.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_resid_pre", inside)])
        both = first(tokens), second(tokens)
    for model, actual in zip((first, second), both, strict=True):
        assert_close(actual, by_hand(model, dictionary, tokens, error=False)[0])
    assert torch.equal(nested, both[0])


def test_a_pass_that_broke_off_leaves_nothing_to_the_next() -> None:
    model = random_model("gpt2_new")
    tokens, dictionary = random_tokens(model.cfg), dictionary_of(model, "clt")
    stream = model(tokens, stop_at_layer=1)
    with dictionary.spliced(model, error=False):
        model(tokens, stop_at_layer=1)
        with pytest.raises(ReflowlensError, match=r"pass began behind 'blocks\.0\.ln2.*passes from its first layer on"):
            model(stream, start_at_layer=1)
    with dictionary.spliced(model):
        assert_close(model(stream, start_at_layer=1), model(tokens))


def test_a_compiled_model_sees_the_features_too() -> None:
    model = random_model("gpt2_new")
    tokens, dictionary = random_tokens(model.cfg), dictionary_of(model, "plt")
    compiled = torch.compile(model, backend="eager")
    plain = compiled(tokens)
    with dictionary.spliced(compiled, error=False):
        replaced = compiled(tokens)
    assert_close(replaced, by_hand(model, dictionary, tokens, error=False)[0])
    assert torch.equal(compiled(tokens), plain)


def test_another_thread_has_to_wait() -> None:
    model = random_model("gpt2_new")
    said: list[str] = []

    def elsewhere() -> None:
        try:
            model("ab")
        except ReflowlensError as error:
            said.append(str(error))

    with dictionary_of(model).spliced(model):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert "another thread is using this model" in said[0]


# --------------------------------------------------------------------------------------------------------------- passes


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_several_lengths_and_packed_texts_give_what_each_gives_alone(kind: Any) -> None:
    model = random_model("reflow")
    texts, ablate = ["abcdef", "xyz", "q"], rl.Ablate("features", layer=0, position="last")
    with dictionary_of(model, kind, "relu").spliced(model, error=False):
        together, alone = rl.run(model, texts, ablate), [rl.run(model, text, ablate) for text in texts]
        row = model.to_tokens("abcdefxyzq")
        packed = model(row, segments=torch.tensor([[0] * 6 + [1] * 3 + [2]]))
        each = torch.cat([model(text) for text in texts], dim=1)
    for i, logits in enumerate(alone):
        assert_close(together[i : i + 1, : logits.shape[1]], logits)
    assert_close(packed, each)


@pytest.mark.parametrize("name", ["reflow", "bdh"])
@pytest.mark.parametrize("error", [True, False])
def test_a_text_read_in_pieces_or_written_on_is_the_text_read_whole(name: str, error: bool) -> None:
    model = MODELS[name]()
    dictionary = dictionary_of(model, "sae" if name == "bdh" else "clt", "relu")
    tokens = random_tokens(model.cfg)
    with (
        dictionary.spliced(model, error=error),
        rl.intervene(model, rl.Scale("features", 3.0, layer=0, index=FEATURES)),
    ):
        whole, past = model(tokens), model.make_cache(2)
        pieces = torch.cat([model(part, past_kv_cache=past) for part in tokens.split(3, dim=1)], dim=1)
        written = model.generate(tokens[:1, :3], 5, temperature=0, return_type="tokens")
        expected = tokens[:1, :3]
        for _ in range(5):
            expected = torch.cat([expected, model(expected)[:, -1:, :256].argmax(-1)], dim=1)
    assert_close(pieces, whole)
    assert torch.equal(written, expected)


def test_layers_that_a_pass_leaves_out_are_left_out() -> None:
    model = random_model("gpt2_new")
    tokens, dictionary = random_tokens(model.cfg), dictionary_of(model, "plt")
    with dictionary.spliced(model, error=False):
        whole, stream = model(tokens), model(tokens, stop_at_layer=1)
        assert_close(model(stream, start_at_layer=1), whole)
        with pytest.raises(ReflowlensError, match="never ran"), rl.intervene(model, rl.Scale("features", 2.0, layer=0)):
            model(stream, start_at_layer=1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_16_bits_keeps_its_type_and_the_dictionary_its_own(kind: Any) -> None:
    model = random_model("gpt2_new").to(torch.bfloat16)
    tokens, dictionary = random_tokens(model.cfg), dictionary_of(model, kind, "relu")
    plain = model(tokens)
    with dictionary.spliced(model):
        logits, cache = model.run_with_cache(tokens)
    assert logits.dtype == torch.bfloat16
    assert torch.equal(logits, plain)
    read = cache[dictionary.cfg.reads[0]].float()
    assert_close(cache["features", 0], dictionary.layers[0].encode(read))


def test_under_autocast_features_are_what_the_dictionary_encodes() -> None:
    model = random_model("gpt2_new")
    tokens, dictionary = random_tokens(model.cfg), dictionary_of(model, "plt")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = model(tokens)
        with dictionary.spliced(model):
            logits, cache = model.run_with_cache(tokens)
        with dictionary.spliced(model, error=False):
            model(tokens)
    assert torch.equal(logits, plain)
    features = dictionary.layers[0].encode(cache[dictionary.cfg.reads[0]].float())
    assert cache["features", 0].dtype == torch.float32
    assert_close(cache["features", 0], features)


def test_collected_statistics_are_those_of_the_features() -> None:
    model = random_model("reflow")
    dictionary = dictionary_of(model, "plt", "relu")
    name = "blocks.1.hook_features"
    with dictionary.spliced(model):
        both = rl.collect(model, [["abcdef", "xyz"], "q"], name, threshold=0.0, progress=False)
        collected = both[name]
        alone = [model.run_with_cache(text)[1]["features", 1][0] for text in ("abcdef", "xyz", "q")]
    with dictionary_of(model, "plt", "relu", seed=3).spliced(model), pytest.raises(ReflowlensError, match="different"):
        both.merge(rl.collect(model, ["abc"], name, threshold=0.0, progress=False))
    features = torch.cat(alone)
    assert_close(collected.mean, features.double().mean(dim=0))
    assert torch.equal(collected.firing_rate, (features > 0).double().mean(dim=0))


def test_features_are_units() -> None:
    """Counted as neurons are; what they write is their decoder, over all layers that it reaches."""
    model = random_model("reflow")
    dictionary = dictionary_of(model, "clt", "relu")
    with dictionary.spliced(model):
        rates = unit_statistics(model, "To be, or not to be. " * 9, "features", context=24, quick=True, controls=False)
        norms = write_norms(model, "blocks.0.hook_features")
    assert rates.frames["levels"]["kind"].tolist() == ["features"] * 2
    assert_close(norms, dictionary.decoder_norms(0))  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------ bad input


def test_bad_input_is_one_clear_error_and_leaves_the_model_alone() -> None:
    model = random_model("gpt2_new")
    points, dictionary = list(model.hook_dict), dictionary_of(model, "plt")
    other = dictionary_of(model, "plt", seed=1)
    both = Dictionary(dataclasses.replace(other.cfg, reads=(other.cfg.reads[0], "blocks.0.hook_resid_mid"),
                                          writes=(other.cfg.writes[0], "blocks.0.hook_resid_post")))  # fmt: skip
    apart = Dictionary(dataclasses.replace(other.cfg, writes=other.cfg.writes[::-1]))
    embedding = Dictionary(dataclasses.replace(other.cfg, reads=("hook_embed",), writes=("hook_embed",)))
    backwards = Dictionary.fresh(dataclasses.replace(other.cfg, reads=other.cfg.writes, writes=other.cfg.reads))
    foreign = Dictionary(dataclasses.replace(other.cfg, model_hash="0" * 64))
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: dictionary.spliced(random_bdh()), "this model has no such hook point"),
        (lambda: foreign.spliced(model), "other weights.*other_model=True"),
        (lambda: dictionary.spliced(model, error="frozen"), "error must be True, False or 'detached', got 'frozen'"),
        (lambda: dictionary.spliced(model, layers=2), "layers must be blocks of the dictionary, 0, 1, got 2"),
        (lambda: dictionary.spliced(model, layers=[]), "layers names no block"),
        (lambda: both.spliced(model), "block 0 has the features of another layer of a dictionary already"),
        (lambda: apart.spliced(model), "are not two points of one block"),
        (lambda: embedding.spliced(model), "features belong to a block: 'hook_embed'"),
        (lambda: dictionary.to("meta").spliced(model), "the dictionary is on meta and the model on cpu"),
    ]
    for make, message in cases:
        with pytest.raises(ReflowlensError, match=message), make():
            pass
        assert_as_before(model, points)
    strange = random_model("gpt2_new")
    strange.blocks[1].hook_mlp_out = type("OwnPoint", (HookPoint,), {})()
    strange.setup()
    with (
        pytest.raises(ReflowlensError, match=r"'blocks\.1\.hook_mlp_out' is of class OwnPoint"),
        other.spliced(strange),
    ):
        pass
    assert list(strange.hook_dict) == points
    collision = pytest.raises(ReflowlensError, match="block 1 has the features")
    with other.spliced(model, layers=1), collision, other.spliced(model):
        pass
    with foreign.spliced(model, other_model=True):
        pass
    with backwards.spliced(model), pytest.raises(ReflowlensError, match=r"reached before 'blocks\.0\.hook_mlp_out'"):
        rl.run(model, "ab", rl.Scale("features", 2.0, layer=0))
    with other.spliced(model), pytest.raises(ReflowlensError, match="cannot be copied"):
        copy.deepcopy(model)
    still_open = rl.intervene(model, rl.Scale("features", 2.0, layer=0))
    spliced = other.spliced(model)
    spliced.__enter__()
    still_open.__enter__()
    model("ab")
    with pytest.raises(ReflowlensError, match=r"'blocks\.0\.hook_features' is gone with its dictionary.*still open"):
        spliced.__exit__(None, None, None)
    still_open.__exit__(None, None, None)
    assert_as_before(model, points)


@pytest.mark.parametrize("hook", ["features", "blocks.1.hook_features", "reconstruction"])
def test_without_a_dictionary_the_error_says_how_features_come(hook: str) -> None:
    layer = {} if hook.startswith("blocks") else {"layer": 1}
    model = random_model("gpt2_new")
    with pytest.raises(ReflowlensError, match=r"splice a dictionary into this block first, with dictionary\.spliced"):
        rl.run(model, "ab", rl.Ablate(hook, **layer))
    with dictionary_of(model).spliced(model, layers=1), pytest.raises(ReflowlensError, match="say which with layer="):
        rl.run(model, "ab", rl.Ablate("features"))
