"""Sweeps of a model that dictionaries are spliced into: every cell equals one whole pass under plain hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformer_lens import patching

import reflowlens as rl
from reflowlens import metrics
from reflowlens.dictionaries.dictionary import Dictionary
from reflowlens.errors import ReflowlensError
from reflowlens.interventions.values import Intervention
from reflowlens.models.base import HookedModel
from reflowlens.sweeps.injections import Injections, steer
from reflowlens.sweeps.reading import Reader
from reflowlens.sweeps.runs import PackedRuns
from reflowlens.sweeps.setup import prepare_sweep
from tests.reference.splice import by_hand
from tests.reflowlens.models.test_bdh import random_bdh
from tests.reflowlens.sweeps.test_sweep import pair, whole
from tests.support.dictionaries import KINDS, dictionary_of
from tests.support.tiny import NAMES, assert_close, random_model, random_tokens

A, B = 65, 66
METRIC = metrics.logit_diff(A, B)
MODELS: dict[str, HookedModel] = {name: random_model(name) for name in NAMES} | {"bdh": random_bdh()}
CASES = [(name, kind) for name in ("reflow_topk", "gpt2_biased", "llama_untied") for kind in KINDS] + [("bdh", "sae")]


def planned(model: HookedModel, cells: Any) -> list[bool]:
    """Which cells run as suffixes."""
    setup = prepare_sweep(model, *pair(model), cells)
    runs = PackedRuns(setup.cells.cells, Reader(model, METRIC, setup.prompts))  # type: ignore[arg-type]
    return [plan is not None for plan in runs.plans]


@pytest.mark.parametrize("error", [True, False])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_grid_of_features_equals_whole_passes(name: str, kind: Any, error: bool) -> None:
    model = MODELS[name]
    clean, corrupted = pair(model)
    with dictionary_of(model, kind, n_features=12).spliced(model, error=error):
        actual = rl.sweep(model, clean, corrupted, "features", METRIC)
        expected = whole(model, clean, corrupted, "features", METRIC)
        assert set(planned(model, "features")) == {kind != "clt"}
    assert actual.axis_names == ["layer", "feature"]
    assert actual.values.shape == (model.cfg.n_layers, 12, 3)
    assert_close(actual.values.flatten(0, 1), expected)
    assert (actual.effect() != 0).any(dim=-1).sum() > 10


@pytest.mark.parametrize("error", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_grid_of_features_by_position_equals_hooks_by_hand(kind: Any, error: bool) -> None:
    """Not even the splice is used on the other side."""
    model = MODELS["bdh" if kind == "sae" else "reflow_lite"]
    clean, corrupted = random_tokens(model.cfg, pos=4, seed=1), random_tokens(model.cfg, pos=4, seed=2)
    dictionary = dictionary_of(model, kind, "relu", n_features=5)
    with dictionary.spliced(model, error=error):
        result = rl.sweep(model, clean, corrupted, "features_by_pos", METRIC)
    theirs = by_hand(model, dictionary, clean, error=error)[1]
    for layer, position, feature in [(0, 0, 1), (0, 2, 3), (1, 1, 4), (1, 3, 0)]:

        def patched(at: int, features: Tensor, cell: tuple[int, int, int] = (layer, position, feature)) -> Tensor:
            changed = features.clone()
            if at == cell[0]:
                changed[:, cell[1], cell[2]] = theirs[at][:, cell[1], cell[2]]
            return changed

        logits, _ = by_hand(model, dictionary, corrupted, patched, error)
        assert_close(result.values[layer, position, feature], logits[:, -1, A] - logits[:, -1, B])
    assert result.values.shape == (model.cfg.n_layers, 4, 5, 2)


# Layers that read and write in other places: across the halves of a block, and where a stage begins.
PLACES: dict[str, tuple[str, str, bool]] = {
    "attention": ("ln1.hook_normalized", "hook_attn_out", True),
    "attention, from the stream": ("hook_resid_pre", "hook_attn_out", True),
    "stream between the halves": ("hook_resid_mid", "hook_resid_mid", True),
    "across the halves": ("hook_resid_mid", "hook_mlp_out", False),
    "where a block begins": ("hook_resid_pre", "hook_resid_pre", False),
    "a block": ("hook_resid_pre", "hook_resid_post", False),
}


def placed(model: HookedModel, place: str, seed: int = 0) -> Dictionary:
    read, write, _ = PLACES[place]
    reads, writes = (tuple(f"blocks.{layer}.{point}" for layer in (0, 1)) for point in (read, write))
    return dictionary_of(model, "plt", "relu", n_features=6, seed=seed, reads=reads, writes=writes)


@pytest.mark.parametrize("error", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_wherever_a_layer_reads_and_writes(place: str, error: bool) -> None:
    model = MODELS["llama_untied"]
    clean, corrupted = pair(model)
    with placed(model, place).spliced(model, error=error):
        for grid in ("features", "resid_pre", "attn_head_out", "mlp_out"):
            actual = rl.sweep(model, clean, corrupted, grid, METRIC).values.flatten(0, 1)
            assert_close(actual, whole(model, clean, corrupted, grid, METRIC), what=grid)
        assert all(planned(model, "features")) == PLACES[place][2]
        assert all(planned(model, "resid_pre")) == (PLACES[place][2] or error)


POINTS = [
    "hook_embed",
    "unembed.hook_signal",
    "ln_final.hook_scale",
    *(f"blocks.{layer}.{point}" for layer in (0, 1) for point in (
        "hook_features", "hook_features", "hook_features", "hook_reconstruction", "hook_reconstruction_error",
        "hook_resid_pre", "attn.hook_z", "attn.hook_pattern", "hook_resid_mid", "ln2.hook_normalized", "mlp.hook_post",
        "hook_mlp_out", "hook_resid_post",
    )),
]  # fmt: skip


@st.composite
def any_intervention(draw: st.DrawFn) -> Intervention:
    point = draw(st.sampled_from(POINTS))
    where: dict[str, Any] = {"position": draw(st.sampled_from([None, 0, 3, -1, "last", [1, 4], slice(2, 5)]))}
    if "scale" not in point:
        where["index"] = draw(st.sampled_from([None, 2, [0, 3]]))
    kind = draw(st.sampled_from(["zero", "scale", "patch", "replace"]))
    if kind == "zero":
        return rl.Ablate(point, **where)
    if kind == "patch":
        return rl.Patch(point, **where)
    return rl.Scale(point, 0.5, **where) if kind == "scale" else rl.Replace(point, 0.3, **where)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([*CASES, *((name, place) for name in ("reflow", "gpt2_biased") for place in PLACES)]),
    st.sampled_from([True, False]),
    st.lists(st.lists(any_intervention(), min_size=1, max_size=3), min_size=1, max_size=4),
)
def test_any_interventions_equal_whole_passes(
    case: tuple[str, Any], error: bool, cells: list[list[Intervention]]
) -> None:
    model = MODELS[case[0]]
    dictionary = placed(model, case[1]) if case[1] in PLACES else dictionary_of(model, case[1], "relu")
    clean, corrupted = pair(model)
    with dictionary.spliced(model, error=error):
        cells = [[part for part in cell if part.hook in model.hook_dict] for cell in cells]
        cells = [cell for cell in cells if cell]
        if not cells:
            return
        expected = whole(model, clean, corrupted, cells, metrics.target_prob(A))
        if expected.isfinite().all():  # not a norm divided by an ablated scale
            assert_close(rl.sweep(model, clean, corrupted, cells, metrics.target_prob(A)).values, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_several_lengths_equal_each_alone(kind: Any) -> None:
    model = MODELS["reflow"]
    clean, corrupted = ["abcde", "xyz"], ["fghij", "zwx"]
    cells = [rl.Patch("features", layer=0, position=at) for at in ("last", -2, 0, None)]
    cells += [rl.Ablate("features", layer=1, position="last")]
    with dictionary_of(model, kind, "relu", n_features=6).spliced(model, error=False):
        for spec in (cells, "features"):
            together = rl.sweep(model, clean, corrupted, spec, metrics.loss()).values
            for i in range(2):
                alone = rl.sweep(model, clean[i], corrupted[i], spec, metrics.loss()).values
                assert_close(together[..., i], alone[..., 0])


def test_some_blocks_make_the_grid_and_two_dictionaries_one() -> None:
    model = MODELS["gpt2_new"]
    clean, corrupted = pair(model)
    dictionary, other = dictionary_of(model, "plt"), dictionary_of(model, "sae", seed=2)
    with dictionary.spliced(model, layers=1):
        result = rl.sweep(model, clean, corrupted, "features", METRIC)
        assert result.index_df["layer"].unique().tolist() == [1]
        with other.spliced(model, layers=0, error=False):
            both = rl.sweep(model, clean, corrupted, "features", METRIC)
            expected = whole(model, clean, corrupted, "features", METRIC)
        assert_close(both.values.flatten(0, 1), expected)
        wide = dictionary_of(model, "plt", n_features=41)
        with wide.spliced(model, layers=0), pytest.raises(ReflowlensError, match="40 and 41 features a layer"):
            rl.sweep(model, clean, corrupted, "features", METRIC)
    with pytest.raises(ReflowlensError, match="this model has no features: splice a dictionary first"):
        rl.sweep(model, clean, corrupted, "features", METRIC)


def test_transformer_lens_patches_features_by_their_name() -> None:
    model = MODELS["gpt2_new"]
    clean, corrupted = pair(model)
    with dictionary_of(model, "plt", n_features=12).spliced(model):
        _, cache = model.run_with_cache(clean)
        expected = patching.generic_activation_patch(
            model,  # type: ignore[arg-type]
            corrupted,
            cache,  # type: ignore[arg-type]
            lambda logits: (logits[:, -1, A] - logits[:, -1, B]).mean(),
            patching.layer_pos_patch_setter,
            "features",
            index_axis_names=("layer", "pos"),
        )
        cells = [rl.Patch("features", layer=layer, position=at) for layer in (0, 1) for at in range(clean.shape[1])]
        actual = rl.sweep(model, clean, corrupted, cells, METRIC).values.mean(dim=-1)
    assert_close(actual.unflatten(0, (2, -1)), expected)


def test_a_results_file_is_of_one_dictionary(tmp_path: Any) -> None:
    model, file = MODELS["gpt2_new"], tmp_path / "results.jsonl"
    clean, corrupted = pair(model)
    sweep: Callable[[], Any] = lambda: rl.sweep(model, clean, corrupted, "features", METRIC, results=file)  # noqa: E731
    with dictionary_of(model, "plt").spliced(model):
        first = sweep()
        assert torch.equal(sweep().values, first.values)
    with dictionary_of(model, "plt", seed=7).spliced(model), pytest.raises(ReflowlensError):
        sweep()


def test_what_goes_around_the_hook_points_is_refused_where_it_would_differ() -> None:
    model = MODELS["reflow"]
    texts, path = ("ab", "cd"), ("a0.h1", "a1.h0<q>")
    plain = rl.path_patch(model, *texts, *path, METRIC).values
    removed = rl.ablate_upstream(model, "ab", METRIC, 1, signals=[2]).values
    direction, row = torch.ones(1, 32), torch.tensor([0])
    with dictionary_of(model, "clt").spliced(model):
        assert_close(rl.path_patch(model, *texts, *path, METRIC).values, plain)
        assert_close(rl.ablate_upstream(model, "ab", METRIC, 1, signals=[2]).values, removed)
    with dictionary_of(model, "clt").spliced(model, error=False):
        for refused in (
            lambda: rl.ablate_upstream(model, "ab", METRIC, 1, signals=[2]),
            lambda: Injections(model, ["ab"]).final(1, row, direction),
        ):
            with pytest.raises(ReflowlensError, match="splice it with its error term"):
                refused()
    with dictionary_of(model, "plt").spliced(model, error=False):
        with pytest.raises(ReflowlensError, match="paths go through the model's own MLPs"):
            rl.path_patch(model, *texts, *path, METRIC)
        final = Injections(model, ["ab"]).final(1, row, direction)
        with rl.intervene(model, steer(model, 1, direction[0], 1.0, position="last")):
            _, cache = model.run_with_cache("ab")
    assert_close(final, cache["resid_post", 1][:, -1])


# ------------------------------------------------------------------------------------------------------------ estimates


@pytest.mark.parametrize("error", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_estimates_are_first_order_right(kind: Any, error: bool) -> None:
    """A small step of a layer's features does what their gradient says, the layers after it included."""
    model = (random_bdh() if kind == "sae" else random_model("gpt2_biased")).double()
    _, corrupted = pair(model)
    step = 1e-3
    with dictionary_of(model, kind, "relu", n_features=12).double().spliced(model, error=error):
        cells = [rl.Scale("features", 1 + change, layer=layer) for layer in (0, 1) for change in (step, -step)]
        exact = rl.sweep(model, None, corrupted, cells, METRIC).values
        estimated = rl.sweep(model, None, corrupted, cells, METRIC, mode="gradient").values
    slopes, expected = ((values[::2] - values[1::2]) / (2 * step) for values in (estimated, exact))
    assert expected.abs().min() > 1e-4
    torch.testing.assert_close(slopes, expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", ["plt", "clt"])
def test_screening_performs_the_strongest_features(kind: Any) -> None:
    model = MODELS["reflow"]
    texts = ["abcde", "xyz"], ["fghij", "zwx"]
    with dictionary_of(model, kind, n_features=12).spliced(model):
        exact = rl.sweep(model, *texts, "features", METRIC).effect().mean(dim=-1)
        for mode in ("gradient", "integrated"):
            found = rl.screen(model, *texts, "features", METRIC, mode=mode, exhaustive=True, progress=False)  # type: ignore[arg-type]
            rows = found.frame.sort_values(["layer", "feature"])
            assert_close(torch.tensor(rows["exact"].to_numpy()).float().reshape(2, 12), exact)
            assert found.agreement.pearson > 0.5


def test_edges_and_estimates_of_other_points_are_what_they_are_without_a_dictionary() -> None:
    model = MODELS["reflow"]
    clean, corrupted = pair(model)
    plain = [rl.sweep(model, clean, corrupted, "attn_head_out", METRIC, mode="gradient").values.flatten(0, 1)]
    plain.append(rl.edge_attribution(model, clean, corrupted, METRIC).values.nan_to_num().flatten(0, 1))
    with dictionary_of(model, "clt").spliced(model):
        spliced = [rl.sweep(model, clean, corrupted, "attn_head_out", METRIC, mode="gradient").values.flatten(0, 1)]
        spliced.append(rl.edge_attribution(model, clean, corrupted, METRIC).values.nan_to_num().flatten(0, 1))
        assert_close(
            rl.sweep(model, clean, corrupted, "attn_head_out", METRIC).values,
            _without(model, clean, corrupted),
        )
    for one, other in zip(spliced, plain, strict=True):
        assert_close(one, other)


def _without(model: HookedModel, clean: Tensor, corrupted: Tensor) -> Tensor:
    """The same sweep of a copy that no dictionary is in."""
    return rl.sweep(random_model("reflow"), clean, corrupted, "attn_head_out", METRIC).values
