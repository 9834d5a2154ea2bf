"""BDH: against a plain re-implementation, its three forms against each other, and as a model like the others."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformer_lens import patching

import reflowlens as rl
from analyses import basis_geometry, causal_ablation, layer_evolution, signal_flow, sparsity_profile
from analyses.words.lexicon import load_lexicon
from pretraining.config import OptimizerConfig, TrainConfig, load_config
from pretraining.data import prepare
from pretraining.optimizers import make_optimizers
from pretraining.state import resume_state, training_data
from pretraining.token_files import open_tokens
from pretraining.train import train
from reflowlens.ablations.upstream import ablate_upstream
from reflowlens.cli import main
from reflowlens.config import ModelConfig, preset
from reflowlens.errors import ReflowlensError
from reflowlens.flops import forward_flops_by_part
from reflowlens.interventions.values import Intervention
from reflowlens.models import bdh, build_model
from reflowlens.models.base import HookedModel
from reflowlens.sweeps.injections import Injections, steer
from reflowlens.sweeps.reading import Reader
from reflowlens.sweeps.runs import PackedRuns
from reflowlens.sweeps.setup import prepare_sweep
from tests.pretraining.test_estimate import kept_for_backward
from tests.reference import bdh as plain
from tests.reflowlens.sweeps.test_sweep import whole
from tests.support import ROOT
from tests.support.runs import measured, records, same_files
from tests.support.tiny import assert_close, random_model, random_tokens

CONFIG = ModelConfig(
    architecture="bdh",
    n_layers=3,
    d_model=8,
    n_heads=2,
    d_head=24,
    d_mlp=48,
    d_vocab=256,
    n_ctx=96,
    rotary_base=65_536.0,
    tie_word_embeddings=False,
    tokenizer_name="bytes",
)
# The size at which the untrained firing rates and loss are known.
SMALL = dataclasses.replace(CONFIG, n_layers=4, d_model=64, n_heads=4, d_head=512, d_mlp=2048, n_ctx=256)
POINTS = ["x_pre", "x_sparse", "attn_scores", "attn_out", "attn_norm", "y_pre", "y_sparse", "xy_sparse", "mlp_out"]
STREAM_POINTS = ["resid_pre", *POINTS, "resid_post"]
README = (ROOT / "README.md").read_text(encoding="utf8")


def random_bdh(cfg: ModelConfig = CONFIG, seed: int = 0) -> HookedModel:
    """Weights large enough that a wrong sign anywhere shows."""
    model = build_model(cfg, seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(20)
    return model


def plain_logits(model: HookedModel, tokens: Tensor) -> Tensor:
    cfg, weights = model.cfg, dict(model.named_parameters())
    return torch.stack([plain.logits(weights, row, cfg.n_layers, cfg.rotary_base, cfg.eps) for row in tokens])


# -- the architecture -------------------------------------------------------------------------------------------------


def test_number_of_parameters() -> None:
    """Three matrices that all levels share, and both ends: whatever the number of levels and heads."""
    assert build_model("bdh", device="meta").n_parameters == 25_296_896
    assert build_model(dataclasses.replace(preset("bdh"), n_layers=2), device="meta").n_parameters == 25_296_896
    assert build_model(SMALL, device="meta").n_parameters == 3 * 2048 * 64 + 2 * 256 * 64 == 425_984


def test_logits_and_gradients_are_those_of_the_plain_form() -> None:
    model, tokens = random_bdh(), random_tokens(CONFIG, batch=2, pos=11)
    expected = plain_logits(model, tokens)
    assert_close(model(tokens), expected)
    weighted = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
    names, parameters = zip(*model.named_parameters(), strict=True)
    theirs = torch.autograd.grad((expected * weighted).sum(), parameters)
    ours = torch.autograd.grad((model(tokens) * weighted).sum(), parameters)
    for name, a, b in zip(names, ours, theirs, strict=True):
        assert_close(a, b, what=name)


@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(1, 17), st.booleans())
def test_square_chunked_and_recurrent_forms_agree(lengths: list[int], chunk: int, remembers: bool) -> None:
    """In pieces of any lengths, in chunks of any size, with a state of earlier positions or none."""
    generator = torch.Generator().manual_seed(sum(lengths))
    q = torch.randn(2, 3, sum(lengths), 10, generator=generator)
    x = torch.randn(2, sum(lengths), 6, generator=generator)
    square = (q @ q.mT).tril(-1) @ x[:, None]
    out, state = bdh.attend_in_chunks(q, x, chunk)
    assert_close(out, square)
    assert_close(state, q.mT @ x[:, None])
    pieces, state = [], torch.zeros(2, 3, 10, 6) if remembers else None
    for part, values in zip(q.split(lengths, dim=2), x.split(lengths, dim=1), strict=True):
        out, state = bdh.attend_in_chunks(part, values, chunk, state)
        pieces.append(out)
    assert_close(torch.cat(pieces, dim=2), square)


@pytest.mark.parametrize("pieces", [[1] * 40, [7, 33], [40]])
@torch.no_grad()
def test_a_text_read_in_pieces_is_the_text(pieces: list[int]) -> None:
    model, tokens = random_bdh(), random_tokens(CONFIG, batch=2, pos=40)
    past = model.make_cache(2)
    parts = [model(piece, past_kv_cache=past) for piece in tokens.split(pieces, dim=1)]
    expected = plain_logits(model, tokens)
    assert_close(torch.cat(parts, dim=1), expected)
    assert_close(model(tokens), expected)
    assert past.length == 40


def test_long_texts_are_read_in_chunks_and_hooked_ones_in_a_square() -> None:
    """Gradients too; the square is formed as soon as someone looks at it."""
    model, tokens = random_bdh(), random_tokens(CONFIG, batch=1, pos=64)
    assert bdh.chunks_are_cheaper(64, CONFIG.d_head, CONFIG.d_model)
    assert not bdh.chunks_are_cheaper(512, preset("bdh").d_head, preset("bdh").d_model)
    weights = list(model.parameters())
    chunked = torch.autograd.grad(model(tokens, "loss"), weights)
    with model.hooks(fwd_hooks=[("blocks.1.hook_attn_scores", lambda scores, hook: None)]):
        square = torch.autograd.grad(model(tokens, "loss"), weights)
    for a, b in zip(chunked, square, strict=True):
        assert_close(a, b, relative=1e-4)


@torch.no_grad()
def test_fresh_weights_predict_nothing_and_open_each_gate_half_the_time() -> None:
    """ln 256 = 5.545; a product of two gates that are open half the time is open a quarter of it."""
    tokens = torch.tensor(list(README.encode()[:2048])).reshape(32, 64)
    model = build_model(SMALL, seed=1337)
    loss, cache = model.run_with_cache(tokens, "loss")
    assert 5.4 < loss < 5.75
    rates = {
        name: torch.stack([(cache[name, level] > 0).float().mean() for level in range(4)]).mean()
        for name in ("x_sparse", "y_sparse", "xy_sparse")
    }
    assert rates["xy_sparse"] == pytest.approx(0.247, abs=0.01)
    assert rates["x_sparse"] == pytest.approx(0.5, abs=0.015)
    assert rates["y_sparse"] == pytest.approx(0.495, abs=0.02)


@pytest.mark.slow
@pytest.mark.by_hand
@torch.no_grad()
def test_fresh_weights_of_the_default_size() -> None:
    tokens = torch.tensor(list(README.encode()[:256])).reshape(4, 64)
    loss, cache = build_model("bdh", seed=1337).run_with_cache(
        tokens, "loss", names_filter=lambda name: name.endswith("hook_xy_sparse")
    )
    assert 5.4 < loss < 5.75
    rates = [(cache["xy_sparse", level] > 0).float().mean() for level in range(6)]
    assert torch.stack(rates).mean() == pytest.approx(0.247, abs=0.01)


@torch.no_grad()
def test_the_first_position_sees_nothing() -> None:
    model = random_bdh()
    _, cache = model.run_with_cache(random_tokens(CONFIG, pos=9), names_filter=lambda name: "hook_" in name)
    for level in range(CONFIG.n_layers):
        for point in ("attn_out", "attn_norm", "y_pre", "y_sparse", "xy_sparse", "mlp_out"):
            assert (cache[f"blocks.{level}.hook_{point}"][:, 0] == 0).all()
        assert (cache["xy_sparse", level][:, 1:] > 0).any()
        scores = cache[f"blocks.{level}.hook_attn_scores"]
        assert (scores.triu() == 0).all()
        assert (scores != 0).any()


# -- a model like the others ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_every_point_has_its_axes_and_can_be_read_without_changing_anything() -> None:
    model, tokens = random_bdh(), random_tokens(CONFIG, batch=2, pos=9)
    logits, cache = model.run_with_cache(tokens, names_filter=lambda name: True)
    assert_close(logits, model(tokens), relative=1e-6)
    sizes = {"batch": 2, "pos": 9, "key_pos": 9, "head": 2, "neuron": 24, "d_model": 8}
    assert set(cache) == set(model.hook_dict)
    for name, activation in cache.items():
        assert activation.shape == tuple(sizes[axis] for axis in model.hook_axes(name)), name
    assert {f"blocks.1.hook_{point}" for point in (*POINTS, "resid_pre", "resid_post")} < set(cache)
    assert "blocks.0.hook_attn_scores" not in model.run_with_cache(tokens)[1]


@pytest.mark.parametrize("point", [*POINTS, "resid_pre", "resid_post"])
@torch.no_grad()
def test_every_point_can_be_replaced(point: str) -> None:
    """By the activation of another text everywhere it gives that text's logits behind it, or by zeros other ones."""
    model, tokens = random_bdh(), random_tokens(CONFIG, batch=1, pos=9)
    name = f"blocks.1.hook_{point}"
    before = model(tokens)
    same = model.run_with_cache(tokens, names_filter=name)[1][name]
    kept = model.run_with_hooks(tokens, fwd_hooks=[(name, lambda activation, hook: same)])
    assert_close(kept, before, relative=1e-6)
    zeroed = model.run_with_hooks(tokens, fwd_hooks=[(name, lambda activation, hook: torch.zeros_like(activation))])
    assert (zeroed - before).abs().max() > 0.01
    assert_close(model(tokens), before, relative=0)


def test_gradients_are_kept_when_they_are_asked_for() -> None:
    model, tokens = random_bdh(), random_tokens(CONFIG, pos=9)
    name = "blocks.1.hook_xy_sparse"
    _, cache = model.run_with_cache(tokens, "loss", names_filter=name, incl_bwd=True)
    assert cache[f"{name}_grad"].shape == cache[name].shape
    assert (cache[f"{name}_grad"] != 0).any()


@torch.no_grad()
def test_layers_can_be_run_apart_and_the_lens_reads_each() -> None:
    """The stream behind a level is what a model of so many levels would unembed: they share weights and readout."""
    model, tokens = random_bdh(), random_tokens(CONFIG)
    resid = model(tokens, stop_at_layer=2)
    assert_close(model(resid, start_at_layer=2), model(tokens), relative=1e-6)
    shallow = random_bdh(dataclasses.replace(CONFIG, n_layers=2))
    _, cache = model.run_with_cache(tokens)
    view = rl.signal_view(model)
    assert view.name == "identity"
    assert_close(view.logits(view.readout(cache["resid_post", 1])), shallow(tokens))
    assert_close(cache["resid_pre", 2], resid, relative=0)


@torch.no_grad()
def test_texts_that_share_a_row_are_read_alone() -> None:
    model, tokens = random_bdh(), random_tokens(CONFIG, batch=1, pos=14)
    segments = torch.tensor([[0] * 5 + [1] * 9])
    packed = model(tokens, segments=segments)
    assert_close(packed[:, :5], model(tokens[:, :5]))
    assert_close(packed[:, 5:], model(tokens[:, 5:]))


def test_generation_by_the_state_is_generation_by_reading_again() -> None:
    """Prompts of different lengths, greedy and drawn; the state does not grow."""
    model = random_bdh()
    for options in ({"temperature": 0.0}, {"temperature": 0.8, "top_k": 3, "seed": 5}):
        texts = [model.generate(["To be or ", "O"], 30, use_past_kv_cache=past, **options) for past in (True, False)]
        assert texts[0] == texts[1]
    past = model.make_cache(1)
    sizes = []
    with torch.no_grad():
        for piece in (random_tokens(CONFIG, 1, 5), random_tokens(CONFIG, 1, 30)):
            model(piece, past_kv_cache=past)
            sizes.append(sum(state.numel() for state in past.states))
    assert sizes == [3 * 2 * 24 * 8] * 2


def test_what_a_state_cannot_do_is_said() -> None:
    model, tokens = random_bdh(), random_tokens(CONFIG)
    with pytest.raises(ReflowlensError, match="holds a batch of 1, and the input is a batch of 2"):
        model(tokens, past_kv_cache=model.make_cache(1))
    for reader, other in ((model, random_model("reflow")), (random_model("reflow"), model)):
        with pytest.raises(ReflowlensError, match="this key-value cache is another model's"):
            reader(tokens, past_kv_cache=other.make_cache(2))
    with (
        pytest.raises(ReflowlensError, match="attn_scores exist where the whole text is read at once"),
        model.hooks(fwd_hooks=[("blocks.0.hook_attn_scores", lambda scores, hook: None)]),
    ):
        model(tokens, past_kv_cache=model.make_cache(2))


def test_dropout_is_for_training() -> None:
    model, tokens = random_bdh(dataclasses.replace(CONFIG, dropout=0.5)), random_tokens(CONFIG)
    assert torch.equal(model(tokens), model(tokens))
    assert_close(model(tokens), random_bdh()(tokens), relative=0)
    model.train()
    assert not torch.equal(model(tokens), model(tokens))


def test_a_checkpoint_is_the_model(tmp_path: Path) -> None:
    model, tokens = random_bdh(dataclasses.replace(CONFIG, dropout=0.1)), random_tokens(CONFIG)
    loaded = rl.load_model(rl.save_model(tmp_path / "bdh", model))
    assert torch.equal(loaded(tokens), model(tokens))
    assert loaded.cfg == model.cfg
    assert loaded.cfg.dropout == 0.1


def test_the_commands_take_it_as_any_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Continued, looked into, evaluated and written anew, from a folder and bytes."""
    folder = str(rl.save_model(tmp_path / "bdh", random_bdh()))
    (tmp_path / "train.txt").write_text("To be, or not to be.")
    (tmp_path / "val.txt").write_text(README[:400], encoding="utf8")
    texts = {"val_sources": [tmp_path / "val.txt"], "tokenizer": "bytes", "workers": 1, "progress": False}
    prepare(tmp_path / "train.txt", tmp_path / "data", **texts)
    assert main(["sample", folder, "To be", "--tokens", "5", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.startswith("To be")
    assert main(["inspect", folder]) == 0
    assert "bdh" in capsys.readouterr().out
    assert main(["evaluate", folder, str(tmp_path / "data")]) == 0
    evaluated = capsys.readouterr().out
    assert main(["export", folder, str(tmp_path / "copy")]) == 0
    assert main(["evaluate", str(tmp_path / "copy"), str(tmp_path / "data")]) == 0
    assert evaluated in capsys.readouterr().out


@pytest.mark.parametrize(
    ("field", "value", "also"),
    [
        ("d_mlp", 50, "n_heads * d_head = 48"),
        ("dropout", 1.0, "from 0 to below 1"),
        ("act_fn", "gelu", "'relu'"),
        ("tie_word_embeddings", True, "False"),
        ("mlp_bias", True, "False"),
        ("unembed_bias", True, "False"),
        ("n_key_value_heads", 1, "None"),
        ("d_head", 7, "even"),
        ("n_signals", 8, "not factored"),
    ],
)
def test_errors_name_the_field(field: str, value: Any, also: str) -> None:
    with pytest.raises(ReflowlensError) as error:
        dataclasses.replace(CONFIG, **{field: value})
    assert str(error.value).startswith(field)
    assert also in str(error.value)


# -- interventions and experiments ------------------------------------------------------------------------------------


@torch.no_grad()
def test_sweeps_are_the_runs_one_by_one() -> None:
    model, (clean, corrupted) = random_bdh(), random_tokens(CONFIG, batch=2, pos=6)[:, None]
    metric = rl.metrics.target_prob(65)
    result = rl.sweep(model, clean, corrupted, "resid_pre", metric)
    assert result.values.shape == (3, 6, 1)
    source = model.run_with_cache(clean)[1]["resid_pre", 2]

    def patch(stream: Tensor, hook: Any) -> Tensor:
        return torch.cat([stream[:, :4], source[:, 4:5], stream[:, 5:]], dim=1)

    by_hand = model.run_with_hooks(corrupted, fwd_hooks=[("blocks.2.hook_resid_pre", patch)])
    assert_close(result.values[2, 4], by_hand[:, -1].softmax(-1)[:, 65])
    units = [rl.Ablate("xy_sparse", layer=1, head=1, index=i) for i in (0, 5)]
    for value, unit in zip(rl.sweep(model, None, corrupted, units, metric).values, units, strict=True):
        assert_close(value, rl.run(model, corrupted, unit)[:, -1].softmax(-1)[:, 65])


@pytest.mark.parametrize("grid", ["resid_pre", "mlp_out"])
@torch.no_grad()
def test_sweeps_are_transformer_lenss(grid: str) -> None:
    """Every cell of a grid over levels and positions, against TransformerLens's own loop."""
    model, (clean, corrupted) = random_bdh(), random_tokens(CONFIG, batch=2, pos=7)[:, None]
    result = rl.sweep(model, clean, corrupted, grid, rl.metrics.logit_diff(65, 66))
    _, cache = model.run_with_cache(clean)
    expected = patching.generic_activation_patch(
        model,
        corrupted,
        cache,
        lambda logits: logits[0, -1, 65] - logits[0, -1, 66],
        patching.layer_pos_patch_setter,
        grid,
        index_axis_names=["layer", "pos"],
    )
    assert result.values.std() > 0.01
    assert_close(result.values[..., 0], expected, relative=1e-5)


@st.composite
def any_intervention(draw: st.DrawFn) -> Intervention:
    point = draw(
        st.sampled_from(["hook_embed", *(f"blocks.{level}.hook_{p}" for level in (0, 2) for p in STREAM_POINTS)])
    )
    where: dict[str, Any] = {"position": draw(st.sampled_from([None, 0, 3, -1, "last", [1, 4], slice(2, 5)]))}
    if "scores" not in point:
        where["index"] = draw(st.sampled_from([None, 2, [0, 3]]))
    kind = draw(st.sampled_from([rl.Ablate, rl.Patch, partial(rl.Scale, factor=0.5), partial(rl.Replace, value=0.3)]))
    return kind(point, **where)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(any_intervention(), min_size=1, max_size=3), min_size=1, max_size=4))
def test_any_interventions_equal_whole_passes(cells: list[list[Intervention]]) -> None:
    model, (clean, corrupted) = random_bdh(), random_tokens(CONFIG, batch=4, pos=6).unflatten(0, (2, 2))
    metric = rl.metrics.target_prob(65)
    expected = whole(model, clean, corrupted, cells, metric)
    assert_close(rl.sweep(model, clean, corrupted, cells, metric).values, expected)


@pytest.mark.parametrize("grid", ["resid_pre", "resid_post", "attn_out"])
def test_long_prompts_are_swept_by_their_states(grid: str) -> None:
    """Suffixes of more positions than d_model are read in chunks; one prompt is like its clean one at first."""
    model, (clean, corrupted) = random_bdh(), random_tokens(CONFIG, batch=4, pos=40).unflatten(0, (2, 2))
    clean[0, :15] = corrupted[0, :15]
    assert bdh.chunks_are_cheaper(40, CONFIG.d_head, CONFIG.d_model)
    metric = rl.metrics.logit_diff(65, 66, position=-2)
    expected = whole(model, clean, corrupted, grid, metric)
    actual = rl.sweep(model, clean, corrupted, grid, metric)
    assert_close(actual.values.flatten(0, -2), expected, relative=2e-5)
    assert actual.baseline is not None
    assert torch.equal(actual.values[:, :15, 0], actual.baseline[0].expand(CONFIG.n_layers, 15))  # not run


def test_all_but_the_scores_are_packed() -> None:
    model, tokens = random_bdh(), random_tokens(CONFIG, batch=1, pos=5)
    cells = [rl.Scale(f"blocks.1.hook_{point}", 0.5) for point in STREAM_POINTS]
    setup = prepare_sweep(model, None, tokens, cells)
    runs = PackedRuns(setup.cells.cells, Reader(model, rl.metrics.kl(), setup.prompts.as_clean()))
    unplanned = [cell.hook for cell, plan in zip(cells, runs.plans, strict=True) if plan is None]
    assert unplanned == ["blocks.1.hook_attn_scores"]


@torch.no_grad()
def test_signals_are_removed_and_directions_added_on_the_way() -> None:
    model, prompts = random_bdh(), ["To be or", "not to"]
    metric, view = rl.metrics.target_prob(65), rl.signal_view(model, "svd")
    removed = ablate_upstream(model, prompts, metric, 1, signals=[0, 3], view=view)
    direction = torch.nn.functional.normalize(view.basis, dim=-1)[3]

    def without(stream: Tensor, hook: Any) -> Tensor:
        return stream - (stream @ direction)[..., None] * direction

    for i, prompt in enumerate(prompts):
        logits = model.run_with_hooks(prompt, fwd_hooks=[("blocks.1.hook_resid_pre", without)])
        assert_close(removed.values[1, i], logits[0, -1].softmax(-1)[65])
    added = Injections(model, prompts).final(2, torch.tensor([1, 0]), direction.expand(2, -1))
    for row, prompt in zip(added, reversed(prompts), strict=True):
        with rl.intervene(model, steer(model, 2, direction, 1.0, position="last")):
            _, cache = model.run_with_cache(prompt)
        assert_close(row, cache["resid_post", 2][0, -1])


def test_a_gradient_sweep_estimates_small_changes() -> None:
    model, tokens = random_bdh(), random_tokens(CONFIG, batch=1, pos=6)
    metric = rl.metrics.logit_diff(65, 66)
    cells = [rl.Scale("xy_sparse", layer=2, index=i, factor=1.001) for i in range(4)]
    exact = rl.sweep(model, None, tokens, cells, metric)
    estimated = rl.sweep(model, None, tokens, cells, metric, mode="gradient")
    change = exact.values.double() - exact.baseline.double()
    assert_close(estimated.values.double() - exact.baseline.double(), change, relative=0.05)


def test_experiments_through_the_identity_view() -> None:
    """Those that ask of a prediction or of the embedding; what needs words of one token says so."""
    model = random_bdh(dataclasses.replace(CONFIG, n_ctx=256))
    lexicon = load_lexicon()
    first_bytes = tuple(dataclasses.replace(item, target=item.target[:1]) for item in lexicon.factual)
    lexicon = dataclasses.replace(lexicon, factual=first_bytes)
    evolution = layer_evolution(model, "To be", target=" ", lexicon=lexicon, quick=True)
    layers = evolution.frames["layers"]
    final = layers[layers["depth"] == CONFIG.n_layers]
    assert final["kl_to_final"].abs().max() < 1e-6
    halves, before = (layers[layers["depth"] == depth]["entropy"].iloc[0] for depth in (1.5, 1.0))
    assert halves == before, "a level writes once"
    ablation = causal_ablation(model, "To be", lexicon=lexicon, quick=True)
    assert set(ablation.frames["sites"]["site"]) == {"readout"}
    for experiment in (sparsity_profile, basis_geometry):
        assert experiment(model, quick=True).metrics
    with pytest.raises(ReflowlensError, match="cannot be split"):
        signal_flow(model, "To be", k=4, quick=True)


# -- training ---------------------------------------------------------------------------------------------------------

TINY: dict[str, Any] = {
    "architecture": "bdh",
    "n_layers": 2,
    "d_model": 16,
    "d_head": 64,
    "d_mlp": 128,
    "n_signals": None,
    "rotary_base": 65_536.0,
    "dropout": 0.1,
    "tie_word_embeddings": False,
}


def test_training_lowers_both_losses_and_resumes_to_the_bit(write: Callable[..., Path], tmp_path: Path) -> None:
    """Dropout included; validation is read without it."""
    optimizer = {"name": "adamw", "learning_rate": 0.01, "matrix_learning_rate": None, "decay_all": True}
    optimizer["schedule"] = "constant"
    path = write(model=TINY, optimizer=optimizer, run={"steps": 30, "eval_interval": 10, "checkpoint_interval": 20})
    whole = load_config(path)
    last = train(whole, progress=False)
    found = records(whole.run.out)
    assert found[-1]["loss"] < 0.75 * found[0]["loss"]
    validation = [record["val_loss"] for record in found if "val_loss" in record]
    assert len(validation) == 3
    assert validation[-1] < validation[0]
    parted = dataclasses.replace(whole, run=dataclasses.replace(whole.run, out=str(tmp_path / "parted")))
    train(dataclasses.replace(parted, run=dataclasses.replace(parted.run, steps=20)), progress=False)
    same_files(last, train(parted, resume=True, progress=False))
    assert measured(parted.run.out)[-1] == measured(whole.run.out)[-1]


def test_what_decides_which_neurons_are_dropped_stays(write: Callable[..., Path]) -> None:
    """Of a run without dropout both are free to change: they change its steps up to rounding alone."""
    optimizer = {"name": "adamw", "matrix_learning_rate": None}

    def config(**run: Any) -> TrainConfig:
        return load_config(write(model=TINY, optimizer=optimizer, run={"steps": 2} | run))

    def resumed(cfg: TrainConfig) -> int:
        data, model = training_data(open_tokens(cfg.data.folder, "train").manifest), build_model(cfg.model)
        return resume_state(cfg, data, model, make_optimizers(model, cfg.optimizer))

    train(config(), progress=False)
    for changed, was in (({"accumulation": 2}, "accumulation=1"), ({"compile": True}, "compile=False")):
        with pytest.raises(ReflowlensError, match=rf"was trained with run\.{was}, but the configuration has"):
            resumed(config(**changed))
    assert resumed(config(sharding="zero1")) == 2


def test_what_decays_and_what_muon_takes() -> None:
    """The levels' shared matrices are the blocks' matrices; as published, both ends decay too."""
    model = build_model(CONFIG)
    shared = {id(p) for p in model.neurons.parameters()}
    (adamw,) = make_optimizers(model, OptimizerConfig())
    assert [{id(p) for p in group["params"]} == shared for group in adamw.param_groups] == [True, False]
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.1, 0.0]
    (adamw,) = make_optimizers(model, OptimizerConfig(decay_all=True))
    assert {group["weight_decay"] for group in adamw.param_groups} == {0.1}
    assert sum(len(group["params"]) for group in adamw.param_groups) == len(list(model.parameters()))
    _, muon = make_optimizers(model, OptimizerConfig(name="muon"))
    assert {id(p) for group in muon.param_groups for p in group["params"]} == shared


def test_the_shipped_configurations() -> None:
    published, nano, control = (load_config(name) for name in ("bdh_shakespeare", "bdh_nano", "relu_nano"))
    assert published.model == preset("bdh")
    assert (published.run.steps, published.tokens_per_step, published.run.seed) == (3000, 32 * 512, 1337)
    assert published.optimizer.decay_all
    counts = [build_model(cfg.model, device="meta").n_parameters for cfg in (nano, control)]
    assert counts == [2_039_808, 2_040_000]
    assert (nano.data, nano.optimizer) == (control.data, control.optimizer)
    assert dataclasses.replace(nano.run, out=control.run.out) == control.run


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_memory_of_activations(dtype: str) -> None:
    """Within a tenth of what autograd keeps, scores and tables of angles among it."""
    cfg = dataclasses.replace(CONFIG, d_model=32, n_heads=4, d_head=256, d_mlp=1024, dropout=0.1)
    width, copies = 4, 0
    if dtype == "bfloat16":
        width = 2
        copies = sum(2 * p.numel() for name, p in build_model(cfg).named_parameters() if name != "embed.W_E")
    expected = sum(bdh.BDH.activation_bytes(cfg, 6 * 32, width)) + copies
    assert kept_for_backward(cfg, 6, 32, dtype) == pytest.approx(expected, rel=0.1)


def test_operations_of_a_pass() -> None:
    """A position reads and writes every neuron of each level through three matrices."""
    parts = forward_flops_by_part(preset("bdh"), context=1)
    assert parts["neurons"] == 2 * 6 * 25_165_824
    assert parts["attention_mixing"] == 0
    assert parts["readout"] == 2 * 256 * 256


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.bfloat16, 0.1)])
def test_other_types_of_numbers(dtype: torch.dtype, tolerance: float) -> None:
    model = random_bdh()
    tokens = random_tokens(CONFIG)
    logits, other = model(tokens).detach(), copy.deepcopy(model).to(dtype)
    actual = other(tokens).detach()
    assert actual.dtype == dtype
    assert float((actual - logits).norm() / logits.norm()) < tolerance
    assert other.generate("To be", 3, temperature=0).startswith("To be")
