"""Prompts of several lengths, read together, give what each of them gives alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import reflowlens as rl
from analyses.experiments.signal_flow.contributions import component_outputs
from analyses.measures.damage import NeutralTexts
from analyses.measures.lens import residual_stack
from reflowlens.circuits.circuits import CircuitScore
from reflowlens.models.base import HookedModel
from tests.reflowlens.models.test_bdh import random_bdh

CLEAN, CORRUPTED = ["The king of France", "A cat sat", "Cats"], ["The king of Norway", "A dog ran", "Dogs"]
DIFF, KL = rl.metrics.logit_diff(5, 9), rl.metrics.kl(position="all")
METRICS = [rl.metrics.logit_diff(5, 9, position=at) for at in ("last", "all", -2, 1)]
METRICS += [rl.metrics.target_prob(7, position="all"), rl.metrics.target_rank(7, position="all"), rl.metrics.loss(), KL]
METRICS += [rl.metrics.recovery(rl.metrics.logit_diff(5, 9, position=-2))]
CELLS = [rl.Patch("resid_pre", layer=1, position=at) for at in ("last", -3, slice(1, -1), 2, None)]
CELLS += [rl.Patch("resid_post", layer=0, position=[-1, 0], from_position=-2), rl.Steer("mlp_out", [0.5], layer=1)]

Measure = Callable[[Any, Sequence[str], Sequence[str]], Tensor]  # the last axis is that of the prompts
EVERYWHERE: dict[str, Measure] = {
    "run_with_cache": lambda m, a, b: m.run_with_cache(a)[1]["resid_post", -1][:, : len(min(a, key=len))].movedim(
        0, -1
    ),
    "residual_stack": lambda m, a, b: residual_stack(m, a).movedim(1, -1),
    "neutral texts": lambda m, a, b: damage(m, a),
    "gradient": lambda m, a, b: rl.sweep(m, a, b, CELLS, KL, mode="gradient").values,
    "integrated": lambda m, a, b: rl.sweep(m, a, b, CELLS, DIFF, mode="integrated", steps=2).values,
    "ablate_readout": lambda m, a, b: rl.ablate_readout(m, a).kl().mT,
    "ablate_readout at -2": lambda m, a, b: rl.ablate_readout(m, a, position=-2).probability(7).mT,
    "ablate_readout by the mean": lambda m, a, b: rl.ablate_readout(m, a, by="mean", reference=CORRUPTED).logit(7).mT,
    "ablate_progressively": lambda m, a, b: rl.ablate_progressively(m, a, 7, counts=[0, 5], position=-2).kl().mT,
}
for _metric in METRICS:
    _name = f"{_metric.name} at {_metric.position}"
    EVERYWHERE[f"sweep, {_name}"] = lambda m, a, b, metric=_metric: rl.sweep(m, a, b, CELLS, metric).values
    if _metric.name != "kl" and not _metric.normalised:
        EVERYWHERE[f"of_logits, {_name}"] = lambda m, a, b, metric=_metric: metric.of_logits(m, m(a), a)
for _site in (1, 2):
    EVERYWHERE[f"ablate_upstream, {_site}"] = lambda m, a, b, site=_site: upstream(m, a, site)
DECODERS: dict[str, Measure] = {
    "component outputs": lambda m, a, b: component_outputs(m, a).heads.movedim(2, -1),
    "ablate_upstream, embed": lambda m, a, b: upstream(m, a, "embed"),
    "ablate_upstream, everywhere": lambda m, a, b: upstream(m, a, "everywhere"),
    "EAP": lambda m, a, b: rl.edge_attribution(m, a, b, DIFF, mode="gradient").values,
    "EAP-IG": lambda m, a, b: rl.edge_attribution(m, a, b, KL, steps=2).values,
    "exact edges": lambda m, a, b: rl.exact_edges(m, a, b, DIFF).values,
    "paths": lambda m, a, b: rl.path_patch(m, a, b, ["a0.h1", "m0"], ["a1.h1<q>", "logits"], KL, through=["m1"]).values,
    "faithfulness": lambda m, a, b: circuit(rl.faithfulness(m, a, b, ["m0", "a1.h2"], DIFF, controls=2)),
    "completeness": lambda m, a, b: circuit(rl.completeness(m, a, b, [("a0.h2", "m1")], KL, controls=0)),
}


def damage(model: Any, texts: Sequence[str]) -> Tensor:
    neutral = NeutralTexts(model, texts)
    with rl.intervene(model, rl.Ablate("mlp_out", layer=0)):
        return torch.stack(list(neutral.damage()))


def upstream(model: Any, prompts: Sequence[str], site: Any) -> Tensor:
    return rl.ablate_upstream(model, prompts, KL, site, signals=range(5)).values


def circuit(score: CircuitScore) -> Tensor:
    return torch.stack([score.metric, score.full, score.empty])


CASES = [(name, measure) for name in ("reflow", "reflow_lite") for measure in [*EVERYWHERE, *DECODERS]]
CASES += [("bdh", measure) for measure in EVERYWHERE]


@pytest.mark.parametrize(("name", "measure"), CASES)
def test_each_prompt_alone(tiny_models: dict[str, HookedModel], name: str, measure: str) -> None:
    model, of = random_bdh() if name == "bdh" else tiny_models[name], (EVERYWHERE | DECODERS)[measure]
    together = of(model, CLEAN, CORRUPTED)
    n = together.shape[0] if measure == "run_with_cache" else None
    alone = [of(model, [a], [b])[:n] for a, b in zip(CLEAN, CORRUPTED, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone, dim=-1), rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("positions", [None, "last", slice(1, -1), slice(-3, None)])
def test_a_collection_of_each_prompt_alone(tiny_models: dict[str, HookedModel], positions: Any) -> None:
    model = tiny_models["reflow"]
    points = ["hook_embed", "unembed.hook_signal"]
    together, alone = (
        rl.collect(model, batches, points, positions=positions, k=3, threshold=0.1)
        for batches in ([CLEAN], [[text] for text in CLEAN])
    )
    for point in points:
        torch.testing.assert_close(together[point].covariance, alone[point].covariance, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(together[point].firing_rate, alone[point].firing_rate, rtol=1e-5, atol=1e-5)


def test_estimates_and_performed_cells_of_a_screening(tiny_models: dict[str, HookedModel]) -> None:
    model = tiny_models["reflow"]
    together, *alone = (
        rl.screen(model, a, b, CELLS, DIFF, exhaustive=True).frame.sort_values("cell")[["estimate", "exact"]].to_numpy()
        for a, b in [(CLEAN, CORRUPTED), *zip(CLEAN, CORRUPTED, strict=True)]
    )
    np.testing.assert_allclose(together, np.mean(alone, axis=0), rtol=1e-5, atol=1e-5)
