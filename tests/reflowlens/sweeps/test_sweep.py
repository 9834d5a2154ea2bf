"""The sweep engine against TransformerLens's patching functions and against whole forward passes."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pickle
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformer_lens import patching

import reflowlens as rl
from reflowlens import metrics
from reflowlens.errors import ReflowlensError
from reflowlens.interventions.values import Intervention
from reflowlens.metrics import Metric
from reflowlens.models.base import HookedModel
from reflowlens.models.components import Block
from reflowlens.sweeps import sweep as sweep_module
from reflowlens.sweeps.alignment import from_left
from reflowlens.sweeps.batching import in_batches, measure_peak
from reflowlens.sweeps.grids import GRIDS, make_cells
from reflowlens.sweeps.reading import Reader
from reflowlens.sweeps.runs import PackedRuns, WholeRuns
from reflowlens.sweeps.setup import prepare_sweep
from reflowlens.sweeps.suffixes import LastQueries, Layout, PrefixKeysValues
from tests.support.dictionaries import features_for
from tests.support.processes import two_processes
from tests.support.tiny import FACTORED, NAMES, assert_close, in_turn, random_model, random_tokens, tiny_config

A, B = 65, 66
TRANSFORMER_LENS: dict[str, Any] = {
    "resid_pre": patching.get_act_patch_resid_pre,
    "resid_mid": patching.get_act_patch_resid_mid,
    "attn_out": patching.get_act_patch_attn_out,
    "mlp_out": patching.get_act_patch_mlp_out,
    "attn_head_out": patching.get_act_patch_attn_head_out_all_pos,
    "attn_head_out_by_pos": patching.get_act_patch_attn_head_out_by_pos,
    "attn_head_q": patching.get_act_patch_attn_head_q_all_pos,
    "attn_head_q_by_pos": patching.get_act_patch_attn_head_q_by_pos,
    "attn_head_k": patching.get_act_patch_attn_head_k_all_pos,
    "attn_head_k_by_pos": patching.get_act_patch_attn_head_k_by_pos,
    "attn_head_v": patching.get_act_patch_attn_head_v_all_pos,
    "attn_head_v_by_pos": patching.get_act_patch_attn_head_v_by_pos,
    "attn_head_pattern": patching.get_act_patch_attn_head_pattern_all_pos,
    "attn_head_pattern_by_pos": patching.get_act_patch_attn_head_pattern_by_pos,
    "attn_head_pattern_dest_src_pos": patching.get_act_patch_attn_head_pattern_dest_src_pos,
}


def pair(model: HookedModel) -> tuple[Tensor, Tensor]:
    """Clean and corrupted prompts: the second shares a prefix, the third differs from the first token on."""
    clean, corrupted = random_tokens(model.cfg, batch=3, seed=1), random_tokens(model.cfg, batch=3, seed=2)
    clean[0, :2] = corrupted[0, :2]
    return clean, corrupted


def whole(model: HookedModel, clean: Tensor, corrupted: Tensor, cells: Any, metric: Metric) -> Tensor:
    """One forward pass a cell."""
    setup = prepare_sweep(model, clean, corrupted, cells)
    runs = WholeRuns(setup.cells.cells, Reader(model, metric, setup.prompts))  # type: ignore[arg-type]
    with torch.no_grad():
        return torch.cat([values for _, values in runs.values(range(len(setup.cells.cells)))])


@pytest.mark.parametrize(
    ("model", "grid"), in_turn(TRANSFORMER_LENS, always=("reflow", "gpt2_own_readout")), indirect=["model"]
)
def test_equals_transformer_lens(model: HookedModel, grid: str) -> None:
    clean, corrupted = pair(model)
    if grid == "attn_head_pattern_dest_src_pos":
        clean, corrupted = clean[:, :4], corrupted[:, :4]
    _, cache = model.run_with_cache(clean, names_filter=lambda name: True)
    heads = model.cfg.n_heads
    if grid.startswith(("attn_head_k", "attn_head_v")) and model.cfg.kv_heads != heads:
        pytest.skip("TransformerLens's key/value axes count query heads here; see the test with whole passes")

    def metric(logits: Tensor) -> Tensor:
        return logits[:, -1, A] - logits[:, -1, B]

    expected = TRANSFORMER_LENS[grid](model, corrupted, cache, metric, reduce="none", baseline=True)
    actual = rl.sweep(model, clean, corrupted, grid, metrics.logit_diff(A, B))
    assert_close(actual.values, expected.values, what=grid)
    assert_close(actual.baseline, expected.baseline)  # type: ignore[arg-type]
    assert actual.axis_names == [axis.replace("head_index", "head") for axis in expected.axis_names]


OF_SIGNALS = [(name, grid) for name in ("reflow", "reflow_topk") for grid in ("recipe", "signal")]


@pytest.mark.parametrize(("model", "grid"), list(dict.fromkeys([*in_turn(GRIDS), *OF_SIGNALS])), indirect=["model"])
def test_every_grid_equals_whole_passes(model: HookedModel, grid: str) -> None:
    if grid in ("recipe", "signal") and model.cfg.n_signals is None:
        with pytest.raises(ReflowlensError, match="no hook"):
            rl.sweep(model, "ab", "cd", grid, metrics.kl())
        return
    clean, corrupted = pair(model)
    metric = metrics.logit_diff(A, B)
    with features_for(model, grid):
        actual = rl.sweep(model, clean, corrupted, grid, metric)
        expected = whole(model, clean, corrupted, grid, metric)
    assert actual.values.shape[-1] == 3
    assert_close(actual.values.reshape(-1, 3), expected, what=grid)
    assert (actual.effect() != 0).any()


METRICS = [
    metrics.logit_diff([A, B, A], [B, A, 70], position=3),
    metrics.target_prob(A),
    metrics.target_rank(A, position=-2),
    metrics.kl(position="all"),
    metrics.loss(),
    metrics.recovery(metrics.target_prob(B)),
]


@pytest.mark.parametrize(
    ("model", "metric"), in_turn(METRICS), indirect=["model"], ids=lambda part: getattr(part, "name", part)
)
def test_every_metric_equals_whole_passes(model: HookedModel, metric: Metric) -> None:
    clean, corrupted = pair(model)
    actual = rl.sweep(model, clean, corrupted, "resid_mid", metric)
    assert_close(actual.values.reshape(-1, 3), whole(model, clean, corrupted, "resid_mid", metric), what=metric.name)


POINTS = [
    "hook_embed",
    "hook_recipe",
    "unembed.hook_signal",
    "hook_basis",
    *(f"blocks.{layer}.{point}" for layer in (0, 1) for point in (
        "hook_resid_pre", "ln1.hook_normalized", "ln1.hook_scale", "attn.hook_q", "attn.hook_rot_k", "attn.hook_k",
        "attn.hook_v", "attn.hook_attn_scores", "attn.hook_pattern", "attn.hook_z", "attn.hook_result",
        "attn.hook_attn_in", "attn.hook_q_input", "attn.hook_v_input", "hook_attn_out", "hook_resid_mid", "hook_mlp_in",
        "ln2.hook_normalized", "mlp.hook_pre", "mlp.hook_post", "hook_mlp_out", "hook_resid_post",
    )),
    "ln_final.hook_scale",
]  # fmt: skip


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
    kind = draw(st.sampled_from(["zero", "scale", "patch", "replace"]))
    if kind == "zero":
        return rl.Ablate(point, **where)
    if kind == "patch" and point != "hook_basis":
        return rl.Patch(point, **where)
    return rl.Scale(point, 0.5, **where) if kind == "scale" else rl.Replace(point, 0.3, **where)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(NAMES), st.lists(st.lists(any_intervention(), min_size=1, max_size=3), min_size=1, max_size=4))
def test_any_interventions_equal_whole_passes(name: str, cells: list[list[Intervention]]) -> None:
    model = MODELS[name]
    cells = [[part for part in cell if part.hook in model.hook_dict] for cell in cells]
    cells = [cell for cell in cells if cell]
    if not cells:
        return
    clean, corrupted = pair(model)
    metric = metrics.target_prob(A)  # a difference of logits near 0 has only their rounding
    expected = whole(model, clean, corrupted, cells, metric)
    if not expected.isfinite().all():
        return  # a norm divided by an ablated scale
    actual = rl.sweep(model, clean, corrupted, cells, metric)
    assert_close(actual.values, expected)


MODELS = {name: random_model(name) for name in NAMES}


def test_most_cells_are_packed() -> None:
    """That the fast way is taken at all: only the basis and the last norm need whole passes."""
    model = MODELS["reflow"]
    clean, corrupted = pair(model)
    cells = [[rl.Scale(point, 0.5)] for point in POINTS if point in model.hook_dict]
    setup = prepare_sweep(model, clean, corrupted, cells)
    runs = PackedRuns(setup.cells.cells, Reader(model, metrics.logit_diff(A, B), setup.prompts))  # type: ignore[arg-type]
    unplanned = {cell[0].hook for cell, plan in zip(cells, runs.plans, strict=True) if plan is None}
    assert unplanned == {"hook_basis", "ln_final.hook_scale"}


def test_cells_that_change_nothing_are_the_baseline_and_are_not_run(
    model: HookedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean, corrupted = pair(model)
    clean[:, :4] = corrupted[:, :4]
    entered: list[Tensor] = []
    of_suffixes = Layout.of_suffixes
    monkeypatch.setattr(
        Layout, "of_suffixes", lambda prompt, start, n: (entered.append(start), of_suffixes(prompt, start, n))[1]
    )
    result = rl.sweep(model, clean, corrupted, "resid_pre", metrics.kl())
    assert result.baseline is not None
    assert torch.equal(result.values[:, :4], result.baseline.expand(model.cfg.n_layers, 4, 3))
    one_cell, *suffixes = entered  # the first measures what a cell takes
    assert one_cell.eq(0).all()
    assert min(int(start.min()) for start in suffixes) >= 4


@pytest.mark.parametrize(("position", "queries"), [("last", {1}), (-2, {1}), ("all", set())])
def test_in_the_last_block_only_what_is_read_asks(
    position: str | int, queries: set[int], model: HookedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless more than one position of a row is read."""
    asked: list[int] = []
    mix = LastQueries.mix

    def watched(self: LastQueries, attn: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = mix(self, attn, q, k, v)
        asked.append(q.shape[1] // out.shape[1])
        return out

    monkeypatch.setattr(LastQueries, "mix", watched)
    clean, corrupted = pair(model)
    metric = dataclasses.replace(metrics.logit_diff(A, B), position=position)
    actual = rl.sweep(model, clean, corrupted, "resid_pre", metric)
    assert set(asked) == queries
    assert_close(actual.values.reshape(-1, 3), whole(model, clean, corrupted, "resid_pre", metric))


@pytest.mark.parametrize(("position", "asks"), [("last", True), (-2, False)])
@pytest.mark.parametrize("grid", ["resid_pre", "attn_head_out_by_pos"])
def test_a_window_is_counted_from_the_position_that_asks(
    grid: str, position: str | int, asks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, asked, mix = random_model(tiny_config("llama_untied", window_size=2)), list[int](), LastQueries.mix
    monkeypatch.setattr(LastQueries, "mix", lambda *args: asked.append(1) or mix(*args))
    clean, corrupted = pair(model)
    metric = dataclasses.replace(metrics.logit_diff(A, B), position=position)
    actual = rl.sweep(model, clean, corrupted, grid, metric)
    assert bool(asked) == asks
    assert_close(actual.values.reshape(-1, 3), whole(model, clean, corrupted, grid, metric))


@pytest.mark.parametrize(("point", "projected", "fed"), [("resid_pre", [3, 15], [15, 3]), ("z", [3], [3, 3])])
def test_where_a_row_enters_only_what_differs_is_computed(
    point: str, projected: list[int], fed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One position of each of three prompts until attention carries its change to all five behind; at the end one."""
    model = MODELS["llama_untied"]
    clean, corrupted = random_tokens(model.cfg, batch=3, seed=1), random_tokens(model.cfg, batch=3, seed=2)
    metric, cells = metrics.logit_diff(A, B, position=-2), [rl.Patch(point, layer=0, position=2)]
    expected = whole(model, clean, corrupted, cells, metric)
    setup = prepare_sweep(model, clean, corrupted, cells)
    runs = PackedRuns(setup.cells.cells, Reader(model, metric, setup.prompts))  # type: ignore[arg-type]
    tokens: dict[str, list[int]] = {"projected": [], "fed": []}
    mix, mix_last, mlp_written = PrefixKeysValues.mix, LastQueries.mix, Block.mlp_written
    monkeypatch.setattr(
        PrefixKeysValues, "mix", lambda *args: tokens["projected"].append(args[3].shape[1]) or mix(*args)
    )
    monkeypatch.setattr(
        LastQueries, "mix", lambda *args: tokens["projected"].append(args[0].resid.shape[1]) or mix_last(*args)
    )
    monkeypatch.setattr(
        Block, "mlp_written", lambda *args: tokens["fed"].append(args[1].shape[1]) or mlp_written(*args)
    )
    with torch.no_grad():
        assert_close(runs.run([plan for plan in runs.plans if plan]), expected)
    assert tokens == {"projected": projected, "fed": fed}


def test_the_clean_run_is_made_for_metrics_that_compare_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the one that patches take their activations from."""
    model, passes = random_model("reflow"), list[int]()
    run = type(model).final_stream
    monkeypatch.setattr(type(model), "final_stream", lambda self, *a, **k: passes.append(1) or run(self, *a, **k))
    rl.sweep(model, "abc", "abd", "resid_pre", metrics.logit_diff("a", "b"))
    assert not passes
    rl.sweep(model, "abc", "abd", "resid_pre", metrics.kl())
    assert len(passes) == 1


def test_prompts_of_different_lengths(model: HookedModel) -> None:
    clean, corrupted = ["abcde", "xy"], ["fghij", "zw"]
    together = rl.sweep(model, clean, corrupted, "resid_pre", metrics.loss())
    for i, (one, other) in enumerate(zip(clean, corrupted, strict=True)):
        alone = rl.sweep(model, one, other, "resid_pre", metrics.loss())
        assert_close(together.values[:, : len(one), i], alone.values[..., 0])


def test_several_grids_stack_where_their_shapes_agree(model: HookedModel) -> None:
    clean, corrupted = pair(model)
    metric = metrics.logit_diff(A, B)
    stacked = rl.sweep(model, clean, corrupted, ["resid_pre", "attn_out"], metric)
    assert stacked.axis_names == ["patch_type", "layer", "pos"]
    for i, grid in enumerate(["resid_pre", "attn_out"]):
        assert_close(stacked.values[i], rl.sweep(model, clean, corrupted, grid, metric).values)
    flat = rl.sweep(model, clean, corrupted, ["resid_pre", "attn_head_out"], metric)
    assert flat.values.shape == (len(flat.index_df), 3)
    assert set(flat.to_dataframe()["patch_type_name"]) == {"resid_pre", "attn_head_out"}


def test_a_small_memory_budget_changes_nothing(model: HookedModel) -> None:
    clean, corrupted = pair(model)
    metric = metrics.logit_diff(A, B)
    for grid in ("attn_head_out_by_pos", "attn_head_pattern_by_pos"):
        plenty = rl.sweep(model, clean, corrupted, grid, metric)
        assert_close(rl.sweep(model, clean, corrupted, grid, metric, memory=200_000).values, plenty.values)


def test_batches_are_halved_when_memory_runs_out() -> None:
    sizes = []

    def run(batch: list[int]) -> Tensor:
        sizes.append(len(batch))
        if len(batch) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.tensor(batch)

    done = list(itertools.chain.from_iterable(batch for batch, _ in in_batches(range(20), run, torch.device("cpu"))))
    assert done == list(range(20))
    assert sizes[:3] == [16, 8, 4]
    with pytest.raises(torch.OutOfMemoryError):
        list(in_batches([1], lambda batch: run(batch * 6), torch.device("cpu")))


def test_the_budget_bounds_what_is_measured() -> None:
    def run(batch: list[int]) -> Tensor:
        return torch.ones(len(batch), 1000).sum(dim=1)

    peaks = []
    for batch, _ in in_batches(range(200), run, torch.device("cpu"), budget=100_000):
        peaks.append(measure_peak(lambda batch=batch: run(batch), torch.device("cpu"))[1])
    assert max(peaks) <= 110_000
    assert len(peaks) <= 10


def test_a_hook_of_the_users_is_respected(model: HookedModel) -> None:
    clean, corrupted = pair(model)
    metric = metrics.logit_diff(A, B)
    ablation = rl.Ablate("z", layer=0, head=0)
    with rl.intervene(model, ablation):
        inside = rl.sweep(model, clean, corrupted, "mlp_out", metric)
        cache = model.run_with_cache(clean)[1]
    cells = [
        [ablation, rl.Patch("mlp_out", cache, layer=layer, position=position)]
        for layer in range(model.cfg.n_layers)
        for position in range(clean.shape[1])
    ]
    outside = rl.sweep(model, None, corrupted, [*cells, ablation], metric)
    assert inside.baseline is not None
    assert_close(inside.values.reshape(-1, 3), outside.values[:-1])
    assert_close(inside.baseline, outside.values[-1])


def test_a_stopped_sweep_continues_from_its_file(tmp_path: Path) -> None:
    model = MODELS["reflow"]
    clean, corrupted = pair(model)
    metric = metrics.logit_diff(A, B)
    path = tmp_path / "results" / "sweep.jsonl"
    first = rl.sweep(model, clean, corrupted, "attn_head_out_by_pos", metric, results=path)
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + len(first.index_df)
    changed = json.loads(lines[1]) | {"values": [1.5, 2.5, 3.5]}
    path.write_text(lines[0] + json.dumps(changed) + "\n" + lines[2][:10])  # killed while it wrote
    second = rl.sweep(model, clean, corrupted, "attn_head_out_by_pos", metric, results=path)
    expected = first.values.clone()
    expected.reshape(-1, 3)[changed["cell"]] = torch.tensor([1.5, 2.5, 3.5])
    assert torch.equal(second.values, expected)
    with pytest.raises(ReflowlensError, match="another sweep"):
        rl.sweep(model, clean, corrupted, "resid_pre", metric, results=path)
    path.write_text("no json\n")
    with pytest.raises(ReflowlensError, match="not a sweep's results file"):
        rl.sweep(model, clean, corrupted, "resid_pre", metric, results=path)


@pytest.mark.parametrize("memory", [None, 300_000])
def test_a_sweep_that_continues_is_the_sweep_to_the_bit(tmp_path: Path, memory: float | None) -> None:
    """Wherever it was cut, also within a batch: the rest runs in the batches in which it would have run."""
    model = MODELS["reflow_wide"]
    clean, corrupted = pair(model)

    def swept(path: Path | None) -> Tensor:
        cells, metric = "attn_head_out_by_pos", metrics.logit_diff(A, B)
        return rl.sweep(model, clean, corrupted, cells, metric, results=path, memory=memory).values

    whole = swept(tmp_path / "whole.jsonl")
    assert torch.equal(swept(None), whole)
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    for kept in range(1, len(lines), 5):
        path = tmp_path / f"{kept}.jsonl"
        path.write_text("".join(lines[:kept]))
        assert torch.equal(swept(path), whole), kept
        assert sorted(path.read_text().splitlines(keepends=True)) == sorted(lines)


def test_a_sweep_continues_in_the_batches_that_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever memory is free by then."""
    model, sizes = MODELS["reflow"], []
    clean, corrupted = pair(model)
    run = PackedRuns.run
    monkeypatch.setattr(PackedRuns, "run", lambda self, plans: sizes.append(len(plans)) or run(self, plans))
    monkeypatch.setattr(PackedRuns, "batch_size", lambda self, cells, memory: 7 if memory is None else 5)
    path = tmp_path / "sweep.jsonl"
    arguments = (model, clean, corrupted, "resid_pre", metrics.logit_diff(A, B))
    rl.sweep(*arguments, results=path)
    assert sizes == [7, 7]
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]))
    monkeypatch.setattr(PackedRuns, "batch_size", lambda self, cells, memory: 3 if memory is None else 5)
    sizes.clear()
    rl.sweep(*arguments, results=path)
    assert sizes == [7, 7]
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:1]))
    sizes.clear()
    rl.sweep(*arguments, results=path, memory=1e6)
    assert sizes == [5, 5, 4]


def test_a_file_of_one_process_counts_once_among_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum over processes is of each one's own cells."""
    model = MODELS["reflow"]
    clean, corrupted = pair(model)
    arguments = (model, clean, corrupted, "resid_pre", metrics.logit_diff(A, B))
    whole = rl.sweep(*arguments, results=tmp_path / "sweep.jsonl").values
    monkeypatch.setattr(dist, "all_reduce", lambda values: None)
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(sweep_module, "processes", lambda rank=rank: (rank, 2))
        parts.append(rl.sweep(*arguments, results=tmp_path / "sweep.jsonl").values)
    assert_close(parts[0] + parts[1], whole)


def test_a_recovery_of_another_target_is_another_sweep(tmp_path: Path) -> None:
    """Its baseline is 0 whatever the target."""
    model = MODELS["reflow"]
    clean, corrupted = pair(model)
    for target in range(4):
        path = tmp_path / str(target)
        one, other = (metrics.recovery(metrics.target_prob(token)) for token in (target, target + 1))
        rl.sweep(model, clean, corrupted, "resid_pre", one, results=path)
        with pytest.raises(ReflowlensError, match="another sweep"):
            rl.sweep(model, clean, corrupted, "resid_pre", other, results=path)


def test_a_sweep_under_an_intervention_on_the_basis() -> None:
    model = MODELS["reflow"]
    clean, corrupted = pair(model)
    with rl.intervene(model, rl.Ablate("hook_basis", index=3)):
        inside = rl.sweep(model, clean, corrupted, "resid_pre", metrics.logit_diff(A, B))
    with rl.edit(random_model("reflow"), rl.SetWeights("embed.W_basis", 0.0, rows=3)) as edited:
        expected = rl.sweep(edited, clean, corrupted, "resid_pre", metrics.logit_diff(A, B))
    assert_close(inside.values, expected.values)


def _shared(rank: int, out: Path) -> None:
    model = random_model("reflow_lite")
    clean, corrupted = pair(model)
    result = rl.sweep(model, clean, corrupted, "attn_head_k_by_pos", metrics.logit_diff(A, B))
    torch.save(result.values, out / f"{rank}.pt")


def test_two_processes_share_the_cells(tmp_path: Path) -> None:
    two_processes(_shared, tmp_path)
    model = MODELS["reflow_lite"]
    clean, corrupted = pair(model)
    expected = rl.sweep(model, clean, corrupted, "attn_head_k_by_pos", metrics.logit_diff(A, B)).values
    for rank in (0, 1):
        assert_close(torch.load(tmp_path / f"{rank}.pt", weights_only=True), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("abc", "ab", "resid_pre", metrics.kl()), r"as many tokens: \[3\] against \[2\]"),
        (("abc", "abd", "resid_pree", metrics.kl()), "did you mean 'resid_pre'"),
        (("abc", "abd", [], metrics.kl()), "at least one cell"),
        (("abc", "abd", [["resid_pre"]], metrics.kl()), "grid's name, several names, or a list of interventions"),
        (("a", "b", "resid_pre", metrics.loss()), "prompts of two tokens at least"),
        ((None, "abd", "resid_pre", metrics.loss()), "give the clean prompts"),
        ((None, "abd", [rl.Ablate("z", layer=0)], metrics.kl()), "kl needs a clean run"),
        ((None, "abd", [rl.Ablate("z", layer=0)], metrics.recovery(metrics.loss())), "recovery needs the clean"),
        (("abc", "abd", "resid_pre", metrics.target_prob("no such word")), "token"),
        (("abc", "abd", "resid_pre", metrics.target_prob(999)), "ids are 0 to 287"),
        (("abc", "abd", "resid_pre", metrics.target_prob(["a", "b"])), "2 target tokens are given for 1 prompts"),
        (("abc", "abd", "resid_pre", metrics.target_prob("a", position=3)), "reads position 3"),
        (("abc", "abd", [rl.Ablate("z", layer=0, head=9)], metrics.loss()), "head=9 is out of range"),
    ],
)
def test_impossible_sweeps(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ReflowlensError, match=message):
        rl.sweep(MODELS["reflow"], *arguments)


@pytest.mark.parametrize(
    "metric",
    [
        metrics.logit_diff("a", [98]),
        metrics.target_prob(torch.tensor([97]), position="all"),
        metrics.target_rank("a", position=-2),
        metrics.kl(),
        metrics.loss(),
        metrics.recovery(metrics.target_prob("a")),
    ],
    ids=lambda metric: metric.name,
)
def test_a_metric_in_another_process_is_the_same(metric: metrics.Metric) -> None:
    sent = pickle.loads(ForkingPickler.dumps(metric))  # what multiprocessing sends
    assert sent == dataclasses.replace(metric, bind=sent.bind)
    here, there = (rl.sweep(MODELS["reflow"], "abc", "abd", "resid_pre", each).values for each in (metric, sent))
    assert here.equal(there)


def test_metrics_of_whole_logits(model: HookedModel, tokens: Tensor) -> None:
    logits = model(tokens)
    last = logits[:, -1]
    p = last.softmax(dim=-1)
    assert_close(metrics.logit_diff(A, B).of_logits(model, logits), last[:, A] - last[:, B])
    assert_close(metrics.target_prob(A).of_logits(model, logits), p[:, A])
    assert metrics.target_rank(A).of_logits(model, logits).tolist() == [
        1 + sum(x > row[A] for x in row) for row in last
    ]
    assert_close(metrics.loss().of_logits(model, logits, tokens).mean(), model(tokens, "loss"))


def test_cells_of_grouped_query_models_are_real_heads() -> None:
    cells = make_cells(MODELS["reflow_lite"], "attn_head_k", from_left(5))
    assert cells.shape == (2, 2)
    assert make_cells(MODELS["reflow_lite"], "attn_head_q", from_left(5)).shape == (2, 4)
    assert FACTORED
