"""What the sweep engine gains over TransformerLens's patching functions and loops of ``run_with_hooks``."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from transformer_lens import patching
from transformer_lens.patching import PatchingResult

from reflowlens.ablations.readout import ablate_readout
from reflowlens.benchmarks.sweep_floor import plain_rate, suffixes_flops, whole_passes_flops
from reflowlens.benchmarks.sweep_nnsight import has_nnsight, nnsight_resid_pre
from reflowlens.benchmarks.table import Row
from reflowlens.benchmarks.timing import comparison
from reflowlens.checkpoints import load_model
from reflowlens.config import ModelConfig
from reflowlens.interventions.values import Patch
from reflowlens.metrics import logit_diff
from reflowlens.models import build_model
from reflowlens.models.architecture import HEADS_AND_MLPS
from reflowlens.models.base import HookedModel
from reflowlens.progress import bar
from reflowlens.sweeps.sweep import sweep

_SECONDS = 60  # of a comparison, after which it takes no further round
_NO_NNSIGHT: Row = {"of": "resid_pre against nnsight", "case": "left out: pip install reflowlens[bench]"}
RIGHT, WRONG = 64, 118  # any two tokens: the cost is the same
_SHAPES = {
    "gpt2-small shape": ModelConfig(
        architecture="gpt2", n_layers=12, d_model=768, n_heads=12, d_head=64, d_mlp=3072, d_vocab=50257, n_ctx=1024
    ),
    "6 layers, d 256": ModelConfig(
        architecture="gpt2_new", n_layers=6, d_model=256, n_heads=4, d_head=64, d_mlp=704, d_vocab=8192, n_ctx=256,
        tokenizer_name="bytes",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model and prompts, random and different at every position: no cell is spared for changing nothing.

    Args:
        positions: those that are patched; None for all.
    """

    name: str
    model: HookedModel
    clean: Tensor
    corrupted: Tensor
    positions: tuple[int, ...] | None = None

    @property
    def label(self) -> str:
        """What a row says of it."""
        batch, pos = self.corrupted.shape
        some = "" if self.positions is None else f", {len(self.positions)} positions"
        return f"{self.name}, T {pos}, batch {batch}{some}"

    @property
    def places(self) -> Sequence[int]:
        """The positions that are patched."""
        return range(self.corrupted.shape[1]) if self.positions is None else self.positions

    @property
    def is_small(self) -> bool:
        return self.model.cfg.d_model <= 256 and self.corrupted.numel() <= 128 and self.positions is None


def bench_sweep(cases: Sequence[Case] | None = None, *, patches: int = 1000, rounds: int = 5) -> Iterator[Row]:
    """Sweeps against the functions that people use, on the same model in one process.

    Args:
        cases: what is swept (default: :func:`default_cases`). On the first, a reFlow, signals are patched and ablated
            too.
        patches: how many cells the patch of signals has.
        rounds: of ours and theirs in turn, but none begins after a minute.

    Yields:
        One row a comparison: ``cells``, ``ours_ms`` and ``other_ms`` (medians), ``ratio`` (median of other / ours),
        ``difference``, the largest between the two results, ``case`` and ``of``; of grids also ``flops``, the ratio in
        matrix products alone of whole passes to what has to be computed, and ``floor``, the share of ``ours_ms`` that
        these products would take at the rate of a plain product of the model's shape (:func:`.plain_rate`). Without
        nnsight its rows are left out, and a row without numbers says so.
    """
    cases = cases or default_cases()
    comparisons: list[Callable[[], Row]] = []
    for case in cases:
        comparisons.append(partial(_grid, case, "resid_pre", patching.get_act_patch_resid_pre, rounds))
    # A large model's heads would take TransformerLens minutes and show the same, as would those of many tokens.
    for case in (case for case in cases if case.model.sublayers == HEADS_AND_MLPS and case.is_small):
        heads = partial(_grid, case, "attn_head_out_by_pos", patching.get_act_patch_attn_head_out_by_pos, rounds)
        comparisons.append(heads)
    comparisons.append(partial(_signal_patches, cases[0], patches, rounds))
    comparisons.append(partial(_readout_ablation, cases[0], rounds))
    small = [case for case in cases if case.is_small]
    comparisons += [partial(_nnsight, case, rounds) for case in small] if has_nnsight() else [lambda: _NO_NNSIGHT]
    for compare in bar(comparisons, show=True, unit="comparison"):
        yield compare()


def default_cases() -> list[Case]:
    """Those that the README's table is of, beginning with the quick ones."""
    nano, small = load_model("reflow-nano"), build_model(_SHAPES["gpt2-small shape"])
    long = build_model(dataclasses.replace(_SHAPES["6 layers, d 256"], n_ctx=1024))
    return [
        *quick_cases(),
        make_case("gpt2-small shape", small, batch=1, pos=16),
        make_case("reflow-nano", nano, batch=64, pos=16),
        make_case("6 layers, d 256", long, batch=1, pos=256, positions=range(15, 256, 16)),
        make_case("6 layers, d 256", long, batch=1, pos=1024, positions=range(127, 1024, 128)),
    ]


def quick_cases() -> list[Case]:
    """Those that take seconds."""
    return [
        make_case("reflow-nano", load_model("reflow-nano"), batch=1, pos=32),
        make_case("6 layers, d 256", build_model(_SHAPES["6 layers, d 256"]), batch=4, pos=32),
        make_case("bdh-nano", load_model("bdh-nano"), batch=1, pos=64),
    ]


def make_case(name: str, model: HookedModel, batch: int, pos: int, positions: Sequence[int] | None = None) -> Case:
    """A model with two batches of random prompts, of which some positions are patched, or all."""
    generator, tokens = torch.Generator().manual_seed(0), min(8000, model.cfg.d_vocab)
    clean, corrupted = (torch.randint(0, tokens, (batch, pos), generator=generator) for _ in range(2))
    return Case(name, model.eval(), clean, corrupted, None if positions is None else tuple(positions))


def _grid(case: Case, grid: str, reference: Any, rounds: int) -> Row:
    def theirs() -> PatchingResult:
        _, cache = case.model.run_with_cache(case.clean, return_type=None)
        options: dict[str, Any] = {"reduce": "none", "baseline": True}
        if case.positions is not None:
            places = itertools.product(range(case.model.cfg.n_layers), case.positions)
            options["index_df"] = pd.DataFrame(places, columns=["layer", "pos"])
            options["index_axis_names"] = None
        with _quiet():
            return reference(case.model, case.corrupted, cache, _difference, **options)

    def ours() -> PatchingResult:
        return _sweep(case, grid)

    row = _row(case, grid, ours, theirs, _per_cell, rounds)
    return row | _floor(case, grid, row)


def _per_cell(result: PatchingResult) -> Tensor:
    return result.values.flatten(0, -2)


def _nnsight(case: Case, rounds: int) -> Row:
    """The grid of the residual stream as nnsight batches it."""

    def theirs() -> Tensor:
        return nnsight_resid_pre(case.model, case.clean, case.corrupted, _difference).flatten(0, 1)

    def ours() -> Tensor:
        return _per_cell(_sweep(case, "resid_pre"))

    return _row(case, "resid_pre against nnsight", ours, theirs, lambda values: values, rounds)


def _sweep(case: Case, grid: str) -> PatchingResult:
    return sweep(
        case.model,
        case.clean,
        case.corrupted,
        grid,
        logit_diff(RIGHT, WRONG),
        positions=None if case.positions is None else list(case.positions),
        progress=False,
    )


def _difference(logits: Tensor) -> Tensor:
    return logits[:, -1, RIGHT] - logits[:, -1, WRONG]


def _signal_patches(case: Case, n: int, rounds: int) -> Row:
    """Single recipe coordinates of single positions, against a loop of run_with_hooks."""
    S, pos = case.model.cfg.n_signals or 0, case.corrupted.shape[1]
    generator = torch.Generator().manual_seed(1)
    places = torch.randperm(S * pos, generator=generator)[:n].tolist()
    cells = [Patch("hook_recipe", position=place // S, index=place % S) for place in places]

    def theirs() -> Tensor:
        _, cache = case.model.run_with_cache(case.clean, names_filter="hook_recipe", return_type=None)
        values = []
        for place in places:
            position, signal = divmod(place, S)

            def hook(recipe: Tensor, hook: object, position: int = position, signal: int = signal) -> Tensor:
                recipe = recipe.clone()
                recipe[:, position, signal] = cache["hook_recipe"][:, position, signal]
                return recipe

            values.append(_difference(case.model.run_with_hooks(case.corrupted, fwd_hooks=[("hook_recipe", hook)])))
        return torch.stack(values)

    def ours() -> Tensor:
        metric = logit_diff(RIGHT, WRONG)
        return sweep(case.model, case.clean, case.corrupted, cells, metric, progress=False).values

    return _row(case, f"{n} signals of the recipe", ours, theirs, lambda values: values, rounds)


def _readout_ablation(case: Case, rounds: int) -> Row:
    """A token's probability with each signal zeroed at the readout, one after the other."""

    def theirs() -> Tensor:
        values = []
        for signal in range(case.model.cfg.n_signals or 0):

            def hook(signals: Tensor, hook: object, signal: int = signal) -> Tensor:
                signals = signals.clone()
                signals[..., signal] = 0
                return signals

            logits = case.model.run_with_hooks(case.corrupted, fwd_hooks=[("unembed.hook_signal", hook)])
            values.append(logits[:, -1].softmax(dim=-1)[:, RIGHT])
        return torch.stack(values, dim=1)

    def ours() -> Tensor:
        return ablate_readout(case.model, case.corrupted).probability(RIGHT)

    return _row(case, "every signal of the readout", ours, theirs, lambda values: values.T, rounds)


def _row(
    case: Case,
    what: str,
    ours: Callable[[], Any],
    theirs: Callable[[], Any],
    values: Callable[[Any], Tensor],
    rounds: int,
) -> Row:
    found: dict[str, Tensor] = {}

    def keep(name: str, call: Callable[[], Any]) -> None:
        found[name] = values(call())

    with torch.no_grad():
        ours()  # kernels are made for new shapes once a process; the others' runs are so long that it does not show
        calls = partial(keep, "ours", ours), partial(keep, "other", theirs)
        row = comparison(what, *calls, rounds, warm_up=0, at_most=_SECONDS)
    a, b = found["ours"], found["other"]
    return row | {
        "cells": a[..., 0].numel(),
        "difference": float((a - b).abs().max()),
        "case": case.label,
    }


def _floor(case: Case, grid: str, row: Row) -> Row:
    """``flops`` and ``floor`` of a comparison of grids."""
    n_prompts, n_tokens = case.corrupted.shape
    places = list(itertools.product(range(case.model.cfg.n_layers), case.places))
    cells = places * (row["cells"] // len(places))  # of heads: once a head
    needed = suffixes_flops(case.model, grid, cells, n_tokens)
    share = needed * n_prompts / plain_rate(case.model) / (row["ours_ms"] / 1000)
    return {
        "flops": round(whole_passes_flops(case.model, len(cells), n_tokens) / needed, 1),
        "floor": float(f"{share:.3g}"),
    }


@contextlib.contextmanager
def _quiet() -> Any:
    """Without the progress bars that are printed a cell."""
    with open(os.devnull, "w", encoding="utf8") as nowhere, contextlib.redirect_stderr(nowhere):
        yield
