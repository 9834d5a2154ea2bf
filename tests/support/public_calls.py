"""Every public function of a model, called once on prompts of a few tokens: for tests of what they have in common."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

import reflowlens as rl
from reflowlens.activations.moments import PointStatistics, TopExamples
from reflowlens.conversion.hf import export_hf
from reflowlens.metrics import kl, logit_diff

CLEAN, CORRUPTED = "the king", "the kind"
Call: TypeAlias = "Callable[[Any, Path], Any]"


def _in_block(block: Any) -> Tensor:
    with block as model, torch.no_grad():
        return model(CLEAN)


def _saved_cache(model: Any, folder: Path) -> Any:
    cache = rl.ActivationCache({"hook_embed": torch.ones(1, 2, 32, dtype=torch.float32)}, None)
    cache.save(folder / "cache")
    return rl.ActivationCache.load(folder / "cache", model)["hook_embed"]


def _examples(model: Any, _: Path) -> Any:
    values = torch.tensor([0.5, 2.0, 1.0])
    where = torch.zeros(3, dtype=torch.long), torch.arange(3), torch.tensor([104, 105, 106])
    return PointStatistics(3, (1,), None, TopExamples.of(values[:, None], *where, k=2), None).examples(0, model)


def _grown(model: Any) -> Any:
    scores = rl.edge_attribution(model, CLEAN, CORRUPTED, kl(), mode="gradient")
    return rl.grow_circuit(model, CLEAN, CORRUPTED, scores, kl(), of="nodes", sizes=[2]).frame


_PAIR = (CLEAN, CORRUPTED)
_SIGNAL = "unembed.hook_signal"
_SWAP = rl.SwapWeights("embed.W_recipe", rows=("k", "q"))
PUBLIC_CALLS: dict[str, Call] = {
    "ActivationCache.load": _saved_cache,
    "AttributionGraph.perform": lambda model, _: (
        rl.attribute(model, CLEAN, neurons=4).perform({"signal:0@0": 0.3, "error:1@1": 0.7})["after"].to_list()
    ),
    "AttributionGraph.faithfulness": lambda model, _: rl.attribute(model, CLEAN, neurons=4).faithfulness()[
        "correlation"
    ],
    "Graph.of": lambda model, _: rl.Graph.of(model).edges,
    "ablate_progressively": lambda model, _: rl.ablate_progressively(model, CLEAN, "g").kl(),
    "ablate_readout": lambda model, _: rl.ablate_readout(model, CLEAN).frame("g", against="d"),
    "ablate_readout by mean": lambda model, _: rl.ablate_readout(model, CLEAN, by="mean", reference=CORRUPTED).kl(),
    "ablate_upstream": lambda model, _: rl.ablate_upstream(model, CLEAN, kl(), 1, signals=[0, 3]).values,
    "attribute": lambda model, _: torch.from_numpy(rl.attribute(model, CLEAN, neurons=4).matrix.toarray()),
    "attribute_each": lambda model, _: (
        rl.attribute_each(model, _PAIR, neurons=4).summary(resamples=2)["mean"].to_list()
    ),
    "collect": lambda model, _: rl.collect(model, [[*_PAIR]], _SIGNAL)[_SIGNAL].covariance,
    "completeness": lambda model, _: rl.completeness(model, *_PAIR, ["m0"], kl(), controls=2).value,
    "dose_response": lambda model, _: rl.dose_response(
        model, None, rl.FeatureAt(0, 1), "g", CLEAN, controls=2, quantile=1.5
    )["logit"].to_list(),
    "edge_attribution": lambda model, _: rl.edge_attribution(model, *_PAIR, kl(), steps=2).values.nan_to_num(),
    "edit": lambda model, _: _in_block(rl.edit(model, _SWAP)),
    "exact_edges": lambda model, _: rl.exact_edges(model, *_PAIR, kl(), edges=[("m0", "m1")]).values.nan_to_num(),
    "export_hf": lambda model, folder: export_hf(model, folder / "hf").name,
    "examples": _examples,
    "faithfulness": lambda model, _: rl.faithfulness(model, *_PAIR, ["m0"], kl(), controls=2).value,
    "generate": lambda model, _: rl.generate(model, CLEAN, 3, temperature=0.0, return_type="tokens"),
    "graph_cost": lambda model, _: rl.graph_cost(model, CLEAN, neurons=4).edges,
    "grow_circuit": lambda model, _: _grown(model),
    "intervene": lambda model, _: _in_block(rl.intervene(model, rl.Ablate("z", layer=0))),
    "model_hash": lambda model, _: rl.model_hash(model),
    "path_patch": lambda model, _: rl.path_patch(model, *_PAIR, "a0.h1", "m1", kl()).values,
    "run": lambda model, _: rl.run(model, CLEAN, rl.Scale("mlp_out", 2.0, layer=0)).detach(),
    "save_model": lambda model, folder: rl.model_hash(rl.load_model(rl.save_model(folder / "saved", model))),
    "score": lambda model, _: rl.score(model, _PAIR).logprobs[1][1:].tolist(),
    "screen": lambda model, _: rl.screen(model, *_PAIR, "attn_head_out", kl(), top=2, progress=False).frame,
    "show_attention": lambda model, _: repr(rl.show_attention("no", torch.ones(1, 2, 2) / 2, model=model)),
    "show_tokens": lambda model, _: repr(rl.show_tokens("no", [1.0, 2.0], model=model)),
    "signal_view": lambda model, _: rl.signal_view(model, "varimax").recipe,
    "sweep": lambda model, _: rl.sweep(model, *_PAIR, "attn_head_out", logit_diff("g", "d")).values,
    "sweep gradient": lambda model, _: rl.sweep(model, *_PAIR, "recipe", kl(), mode="gradient").values,
    "sweep integrated": lambda model, _: rl.sweep(model, *_PAIR, "recipe", kl(), mode="integrated", steps=2).values,
}
