"""Sweeps over data sets: each prompt is what it is alone, wherever its words stand; what is not there is NaN."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import reflowlens as rl
from reflowlens.models.base import HookedModel
from reflowlens.sweeps.patching_result import PatchingResult

# One token a character; clean and corrupted differ in length, and so do the prompts.
PROMPTS = rl.Prompts.of(
    [
        {"clean": "the cat is", "corrupted": "the lion is", "answer": "A", "wrong_answer": "B", "subject": "cat"},
        {"clean": "a tiger", "corrupted": "a dog", "answer": "C", "wrong_answer": "A", "subject": "tiger"},
        {"clean": "one ox went", "corrupted": "one cow went", "answer": "B", "wrong_answer": "D", "subject": "ox"},
    ]
)
OTHERS = ["lion", "dog", "cow"]
PROMPTS.frame["corrupted_subject"] = OTHERS
EVEN = PROMPTS.select([0, 1]).frame.assign(corrupted=["the dog is", "a mouse"], corrupted_subject=["dog", "mouse"])
EVEN = rl.Prompts.of(EVEN)
MODELS = ["gpt2", "llama_untied"]


def places(prompts: rl.Prompts, label: str | int, text: str) -> list[int]:
    """Where each prompt has a role, or a position from its end, by counting characters."""
    found = []
    for row in prompts.frame.to_dict("records"):
        role = row["subject"] if text == "clean" else row["corrupted_subject"]
        ends = {"subject": row[text].find(role) + len(role) - 1, "subject:first": row[text].find(role)}
        at = ends.get(str(label), -1 if label == "last" else label)
        found.append(len(row[text]) + at if at < 0 else at)
    return found


def alone(model: HookedModel, prompts: rl.Prompts, point: str, label: str | int) -> Tensor:
    """The logit difference of each prompt by itself, patched at one position by a plain hook."""
    values = []
    everywhere = zip(places(prompts, label, "clean"), places(prompts, label, "corrupted"), strict=True)
    for row, (q, p) in enumerate(everywhere):
        if min(p, q) < 0:
            values.append(torch.nan)
            continue
        _, cache = model.run_with_cache(prompts.clean[row])

        def patch(activation: Tensor, hook: Any, p: int = p, clean: Tensor = cache[point][0, q]) -> Tensor:
            activation[0, p] = clean
            return activation

        with torch.no_grad():
            logits = model.run_with_hooks(prompts.corrupted[row], fwd_hooks=[(point, patch)])[0, -1]
        right, wrong = ord(prompts.answers[row]), ord(prompts.wrong_answers[row])
        values.append(float(logits[right] - logits[wrong]))
    return torch.tensor(values)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("grid", ["resid_pre", "mlp_out"])
@pytest.mark.parametrize("positions", ["right", ["subject", "subject:first", "last", 1]])
def test_each_prompt_is_what_it_is_alone(
    tiny_models: dict[str, HookedModel], name: str, grid: str, positions: Any
) -> None:
    model = tiny_models[name]
    metric = rl.metrics.logit_diff(PROMPTS)
    result = rl.sweep(model, PROMPTS, cells=grid, metric=metric, positions=positions)
    axis = "pos" if positions == "right" else "role"
    assert result.axis_names == ["layer", axis]
    labels = result.index_df[axis].unique().tolist()
    assert labels == (list(range(-11, 0)) if positions == "right" else positions)
    for (layer, label), values in zip(
        result.index_df.itertuples(index=False), result.values.flatten(0, 1), strict=True
    ):
        wanted = alone(model, PROMPTS, f"blocks.{layer}.hook_{grid}", label)
        torch.testing.assert_close(values, wanted, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_a_head_at_a_role(tiny_models: dict[str, HookedModel]) -> None:
    model = tiny_models["gpt2"]
    metric = rl.metrics.logit_diff(PROMPTS)
    result = rl.sweep(model, PROMPTS, cells="attn_head_out_by_pos", metric=metric, positions=["subject"])
    assert result.axis_names == ["layer", "role", "head"]
    point = "blocks.1.attn.hook_z"
    for row in range(3):
        (q,), (p,) = (places(PROMPTS.select([row]), "subject", text) for text in ("clean", "corrupted"))
        one = [rl.Patch(point, PROMPTS.clean[row], position=p, from_position=q, head=2)]
        logits = rl.run(model, PROMPTS.corrupted[row], one)[0, -1]
        wanted = logits[ord(PROMPTS.answers[row])] - logits[ord(PROMPTS.wrong_answers[row])]
        torch.testing.assert_close(result.values[1, 0, 2, row], wanted, rtol=1e-5, atol=1e-5)


def test_gradients_by_role_are_those_of_each_prompt_alone(tiny_models: dict[str, HookedModel]) -> None:
    model = tiny_models["gpt2"]
    options: dict[str, Any] = {"cells": "resid_mid", "positions": ["subject", "last"], "mode": "gradient"}
    result = rl.sweep(model, PROMPTS, metric=rl.metrics.logit_diff(PROMPTS), **options)
    for row in range(3):
        one = PROMPTS.select([row])
        _, clean = model.run_with_cache(one.clean)
        kept: dict[str, Tensor] = {}

        def keep(activation: Tensor, hook: Any, kept: dict[str, Tensor] = kept) -> Tensor:
            kept["x"] = activation.detach().requires_grad_()
            return kept["x"]

        with model.hooks([("blocks.1.hook_resid_mid", keep)]):
            logits = model(one.corrupted)[0, -1]
        before = logits[ord(one.answers[0])] - logits[ord(one.wrong_answers[0])]
        before.backward()
        (q,), (p,) = (places(one, "subject", text) for text in ("clean", "corrupted"))
        change = clean["blocks.1.hook_resid_mid"][0, q] - kept["x"][0, p]
        wanted = before + (change * kept["x"].grad[0, p]).sum()
        torch.testing.assert_close(result.values[1, 0, row], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["exact", "gradient", "integrated"])
def test_a_prompt_has_no_value_behind_its_end(tiny_models: dict[str, HookedModel], mode: Any, tmp_path: Path) -> None:
    model = tiny_models["gpt2"]
    file = {"results": tmp_path / "cells.jsonl"} if mode == "exact" else {}
    metric = rl.metrics.logit_diff(EVEN)
    result = rl.sweep(model, EVEN, cells="resid_pre", metric=metric, mode=mode, positions="left", **file)
    lengths = [len(text) for text in EVEN.clean]
    assert lengths == [10, 7]
    lacking = np.arange(10)[None, :, None] >= np.array(lengths)
    assert (result.values.isnan().numpy() == lacking).all()
    if file:
        rows = [json.loads(line) for line in file["results"].read_text().splitlines()[1:]]
        kept = torch.tensor([row["values"] for row in sorted(rows, key=lambda row: row["cell"])])
        torch.testing.assert_close(kept, result.values.flatten(0, 1), rtol=0, atol=0, equal_nan=True)
        again = rl.sweep(model, EVEN, cells="resid_pre", metric=metric, positions="left", **file)
        torch.testing.assert_close(again.values, result.values, rtol=0, atol=0, equal_nan=True)


def test_keys_behind_the_end_are_missing_too(tiny_models: dict[str, HookedModel]) -> None:
    grid = "attn_head_pattern_dest_src_pos"
    model, metric = tiny_models["gpt2"], rl.metrics.logit_diff(EVEN)
    result = rl.sweep(model, EVEN, cells=grid, metric=metric, positions="left")
    missing = result.values.isnan()
    assert not missing[..., 0].any()
    assert (missing[..., 1] == ((torch.arange(10)[:, None] >= 7) | (torch.arange(10) >= 7))).all()


def test_means_are_of_the_prompts_that_have_the_position(tiny_models: dict[str, HookedModel]) -> None:
    metric = rl.metrics.logit_diff(EVEN)
    result = rl.sweep(tiny_models["gpt2"], EVEN, cells="resid_pre", metric=metric, positions="left")
    values = result.values.numpy()
    np.testing.assert_allclose(result.mean(), np.nanmean(values, axis=-1), rtol=1e-6)
    short, long = result.values[:, :7], result.values[:, 7:, 0]
    low, high = result.bootstrap_ci(n_resamples=50)
    torch.testing.assert_close(low[:, 7:], long)
    torch.testing.assert_close(high[:, 7:], long)
    assert (low[:, :7] <= short.mean(dim=-1)).all()
    assert (result.permutation_pvalue()[:, 7:] == 1).all()
    assert result.stderr()[:, 7:].isnan().all()
    assert not result.stderr()[:, :7].isnan().any()
    assert len(result.to_dataframe()) == result.values.isfinite().sum()
    assert "nan" not in result._repr_html_()


def test_a_value_that_is_nan_for_another_reason_stays_one() -> None:
    values = torch.tensor([[1.0, torch.nan, 5.0], [torch.nan, 2.0, 5.0]])
    missing = torch.tensor([[False, True, False], [False, False, False]])
    result = PatchingResult(values, [], EVEN.frame, ["m"], reduced=False, missing=missing)
    torch.testing.assert_close(result.mean(), torch.tensor([3.0, torch.nan]), equal_nan=True)


def test_a_mean_over_misaligned_positions_warns_once_and_only_then(tiny_models: dict[str, HookedModel]) -> None:
    metric = rl.metrics.logit_diff(EVEN)
    for positions in (None, "left", "right", ["last"]):
        result = rl.sweep(tiny_models["gpt2"], EVEN, cells="resid_pre", metric=metric, positions=positions)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            result.mean()
        assert len(said) == (positions is None)
    with pytest.warns(UserWarning, match="from the left"):
        rl.screen(tiny_models["gpt2"], EVEN, cells="resid_pre", metric=metric, top=1, progress=False)


@pytest.mark.parametrize(
    ("position", "expected"),
    [(2, True), ([0, 2], True), (slice(1, None), True), (slice(0, -1), False), (0, False), (-1, False), ("last", False),
     ([[2], [3]], False), (None, False)],
)  # fmt: skip
def test_a_mean_over_cells_of_ones_own_warns_where_they_count_from_the_left(
    tiny_models: dict[str, HookedModel], position: Any, expected: bool
) -> None:
    cells = [rl.Scale("mlp_out", 0.5, layer=0, position=position)]
    options: dict[str, Any] = {"cells": cells, "metric": rl.metrics.logit_diff(EVEN)}
    assert rl.sweep(tiny_models["gpt2"], EVEN, **options).misaligned == expected
    assert not rl.sweep(tiny_models["gpt2"], EVEN, positions="left", **options).misaligned


def test_screening_by_role_performs_what_it_estimates(tiny_models: dict[str, HookedModel]) -> None:
    options: dict[str, Any] = {"cells": "resid_pre", "metric": rl.metrics.logit_diff(PROMPTS), "positions": "right"}
    found = rl.screen(tiny_models["gpt2"], PROMPTS, exhaustive=True, progress=False, **options)
    result = rl.sweep(tiny_models["gpt2"], PROMPTS, **options)
    wanted = np.nanmean(result.effect().numpy(), axis=-1)
    for row in found.frame.itertuples():
        np.testing.assert_allclose(row.exact, wanted[row.layer, row.pos], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "cell", [rl.Ablate("mlp_out", layer=0, position="subject"), rl.Patch("z", layer=1, position="subject")]
)
def test_a_role_in_an_intervention(tiny_models: dict[str, HookedModel], cell: Any) -> None:
    model, metric = tiny_models["gpt2"], rl.metrics.logit_diff(PROMPTS)
    values = rl.sweep(model, PROMPTS, cells=[cell], metric=metric).values[0]
    for row in range(3):
        one = PROMPTS.select([row])
        (q,), (p,) = (places(one, "subject", text) for text in ("clean", "corrupted"))
        plain = rl.Ablate("mlp_out", layer=0, position=p)
        if isinstance(cell, rl.Patch):
            plain = rl.Patch("z", one.clean[0], layer=1, position=p, from_position=q)
        alone = rl.sweep(model, None, one.corrupted, [plain], rl.metrics.logit_diff(one)).values[0, 0]
        torch.testing.assert_close(values[row], alone, rtol=1e-5, atol=1e-5)


def test_prompts_without_twins_are_run_themselves(tiny_models: dict[str, HookedModel]) -> None:
    model, cells = tiny_models["gpt2"], [rl.Scale("resid_mid", 0.5, layer=0)]
    bare = rl.Prompts.of(PROMPTS.frame[["clean", "answer"]])
    result = rl.sweep(model, bare, cells=cells, metric=rl.metrics.target_prob(bare))
    wanted = rl.sweep(model, None, bare.clean, cells, rl.metrics.target_prob(bare.answers))
    torch.testing.assert_close(result.values, wanted.values, rtol=0, atol=0)


M = rl.metrics.logit_diff(PROMPTS)
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unaligned": ({"cells": "resid_pre"}, "as many tokens.*positions='right'"),
    "heads as a whole": ({"cells": "attn_head_out"}, "as many tokens.*positions='right'"),
    "a grid without positions": ({"cells": "attn_head_out", "positions": ["last"]}, "no axis of positions"),
    "no such role": ({"cells": "resid_pre", "positions": ["object"]}, "no column 'object'"),
    "no such positions": ({"cells": "resid_pre", "positions": "middle"}, "positions are 'left', 'right', or a list"),
    "a role twice": ({"cells": "resid_pre", "positions": ["last", "last"]}, "positions name 'last' twice"),
    "too far": ({"cells": "resid_pre", "positions": [-6]}, "row 1: there is no position -6"),
    "all logits": (
        {"cells": "resid_pre", "positions": ["last"], "metric": rl.metrics.kl(position="all")},
        "all positions",
    ),
    "a way between": (
        {"cells": [rl.Ablate("mlp_out", layer=0)], "mode": "integrated"},
        "differ in length: positions=.right., or roles",
    ),
    "twins given twice": ({"cells": "resid_pre", "corrupted": ["x"]}, "leave corrupted out"),
    "no metric": ({"cells": "resid_pre", "metric": None}, "the metric must be one of"),
    "no cells": ({"positions": ["last"]}, "at least one cell"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_named(tiny_models: dict[str, HookedModel], arguments: Any, message: str) -> None:
    with pytest.raises(rl.ReflowlensError, match=message):
        rl.sweep(tiny_models["gpt2"], PROMPTS, **{"metric": M, **arguments})


def test_prompts_stand_where_clean_ones_do(tiny_models: dict[str, HookedModel]) -> None:
    for clean in (None, PROMPTS.clean):
        with pytest.raises(rl.ReflowlensError, match="give them as clean"):
            rl.sweep(tiny_models["gpt2"], clean, PROMPTS, [rl.Ablate("mlp_out", layer=0)], M)  # type: ignore[arg-type]


def test_roles_need_a_table(tiny_models: dict[str, HookedModel]) -> None:
    texts = EVEN.clean, EVEN.corrupted
    with pytest.raises(rl.ReflowlensError, match=r"column of rl\.Prompts"):
        rl.sweep(tiny_models["gpt2"], *texts, "resid_pre", M, positions=["subject"])
    result = rl.sweep(tiny_models["gpt2"], *texts, "resid_pre", rl.metrics.logit_diff("A", "B"), positions=["last"])
    assert result.values.shape == (2, 1, 2)


def test_kl_compares_each_prompt_with_its_own_last_token(tiny_models: dict[str, HookedModel]) -> None:
    model = tiny_models["gpt2"]
    result = rl.sweep(model, PROMPTS, cells="resid_pre", metric=rl.metrics.kl(), positions=["last"])
    for row in range(3):
        clean, patched = (model(text[row])[0, -1].log_softmax(-1) for text in (PROMPTS.clean, PROMPTS.corrupted))
        torch.testing.assert_close(result.baseline[row], (clean.exp() * (clean - patched)).sum(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("positions", [None, "right", ["subject", "last"]])
@pytest.mark.parametrize("mode", ["exact", "gradient"])
def test_many_prompts_in_parts_are_the_same(
    tiny_models: dict[str, HookedModel], monkeypatch: pytest.MonkeyPatch, positions: Any, mode: Any
) -> None:
    prompts = EVEN if positions is None else PROMPTS
    options: dict[str, Any] = {"cells": ["resid_pre", "mlp_out"], "positions": positions, "mode": mode}
    metric = rl.metrics.recovery(rl.metrics.logit_diff(prompts))
    whole = rl.sweep(tiny_models["gpt2"], prompts, metric=metric, **options)
    monkeypatch.setattr("reflowlens.sweeps.sweep.PROMPTS_AT_ONCE", 1)
    parts = rl.sweep(tiny_models["gpt2"], prompts, metric=metric, **options)
    torch.testing.assert_close(parts.values, whole.values, rtol=1e-4, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(parts.baseline, whole.baseline, rtol=1e-4, atol=1e-5)
    assert parts.index_df.equals(whole.index_df)
    assert parts.misaligned == whole.misaligned == (positions is None)
    assert (parts.missing is None) == (whole.missing is None)
    if whole.missing is not None:
        assert (parts.missing == whole.missing).all()


def test_a_metric_of_ones_own_sees_all_prompts_at_once(
    tiny_models: dict[str, HookedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def bind(model: Any, reference: Any) -> Any:
        seen.append(len(reference.tokens))
        return lambda logits, prompts: logits.vocabulary().mean(dim=(1, 2))

    monkeypatch.setattr("reflowlens.sweeps.sweep.PROMPTS_AT_ONCE", 1)
    rl.sweep(
        tiny_models["gpt2"], PROMPTS, cells="mlp_out", metric=rl.metrics.Metric("own", "last", bind), positions=["last"]
    )
    assert seen == [3]


@pytest.mark.parametrize("hooked", [False, True])
def test_every_architecture_by_role(model: HookedModel, hooked: bool) -> None:
    """Also whole pass by whole pass, where something is attached."""
    options: dict[str, Any] = {"cells": "resid_pre", "positions": ["subject", "last"]}
    with model.hooks([("hook_embed", lambda activation, hook: activation)] if hooked else []):
        together = rl.sweep(model, PROMPTS, metric=rl.metrics.logit_diff(PROMPTS), **options)
    for row in range(3):
        one = PROMPTS.select([row])
        alone = rl.sweep(model, one, metric=rl.metrics.logit_diff(one), **options)
        torch.testing.assert_close(together.values[..., row], alone.values[..., 0], rtol=1e-4, atol=1e-5)


def test_a_logit_difference_is_of_two_tokens() -> None:
    with pytest.raises(rl.ReflowlensError, match="leave wrong out"):
        rl.metrics.logit_diff(PROMPTS, " a")
    with pytest.raises(rl.ReflowlensError, match="two tokens: give the wrong one too"):
        rl.metrics.logit_diff(" a")
