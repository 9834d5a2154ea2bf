"""Prompts may come from an iterator, which gives them once, wherever a list of texts is taken."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

import reflowlens as rl
from reflowlens.models.base import HookedModel

TEXTS, OTHERS = ["The king of France", "A cat sat"], ["The king of Norway", "A dog ran"]
Prompts = Callable[[list[str]], Iterable[str]]
METRIC = rl.metrics.logit_diff(5, 9)
SCALE = rl.Scale("resid_pre", 0.5, layer=1, position="last")
DOORS: dict[str, Callable[[Any, Prompts], Tensor]] = {
    "a pass": lambda m, of: m(of(TEXTS)),
    "run_with_cache": lambda m, of: m.run_with_cache(of(TEXTS))[1]["resid_post", 1],
    "run_with_cache(input=)": lambda m, of: m.run_with_cache(input=of(TEXTS))[0],
    "a cached loss": lambda m, of: m.run_with_cache(of(TEXTS), "loss")[0],
    "run": lambda m, of: rl.run(m, of(TEXTS), SCALE),
    "a patch": lambda m, of: rl.run(m, TEXTS, [rl.Patch(at, of(OTHERS), layer=1) for at in ("resid_pre", "z")]),
    "a reference": lambda m, of: rl.run(m, TEXTS, rl.Ablate("z", layer=[0, 1], by="mean", reference=of(OTHERS))),
    "generate": lambda m, of: m.generate(of(TEXTS), 2, return_type="tokens"),
    "of_logits": lambda m, of: METRIC.of_logits(m, m(TEXTS), of(TEXTS)),
    "sweep": lambda m, of: rl.sweep(m, of(TEXTS), of(OTHERS), "resid_mid", METRIC).values,
    "screen": lambda m, of: torch.tensor(rl.screen(m, of(TEXTS), of(OTHERS), [SCALE], METRIC).frame.exact),
    "edge_attribution": lambda m, of: rl.edge_attribution(m, of(TEXTS), of(OTHERS), METRIC).values,
    "path_patch": lambda m, of: rl.path_patch(m, of(TEXTS), of(OTHERS), "a0.h1", "a1.h2<v>", METRIC).values,
    "faithfulness": lambda m, of: rl.faithfulness(m, of(TEXTS), of(OTHERS), ["m0"], METRIC, controls=0).metric,
    "ablate_readout": lambda m, of: rl.ablate_readout(m, of(TEXTS)).kl(),
    "ablate_upstream": lambda m, of: rl.ablate_upstream(m, of(TEXTS), METRIC, "embed", signals=[3]).values,
    "collect": lambda m, of: rl.collect(m, iter([of(TEXTS)]), "hook_embed")["hook_embed"].mean,
}


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_prompts_from_an_iterator(tiny_models: dict[str, HookedModel], door: Callable[[Any, Prompts], Tensor]) -> None:
    model = tiny_models["reflow"]
    torch.testing.assert_close(door(model, iter), door(model, list), rtol=0, atol=0, equal_nan=True)
