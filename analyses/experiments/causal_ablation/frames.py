"""The frames of experiment 9."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from analyses.controls.bases import Bases
from analyses.experiments.causal_ablation.measure import Measured
from analyses.measures.knockout import (
    codebook_texts,
    random_order,
)
from analyses.measures.lens import residual_stack
from analyses.statistics.draws import derive_generator, derive_seed
from analyses.statistics.intervals import bootstrap_band
from analyses.words.lexicon import Lexicon
from reflowlens.ablations.closed_form import SingleAblations
from reflowlens.ablations.upstream import Site, ablate_upstream
from reflowlens.dictionary_view import DictionaryView
from reflowlens.metrics import target_prob
from reflowlens.models.base import HookedModel
from reflowlens.signals import SignalView


def signal_frame(
    model: HookedModel, view: SignalView, prompt: str, target_id: int, lexicon: Lexicon, seed: int
) -> pd.DataFrame:
    """Every signal of one prompt: what it contributes, and the target's probability without it."""
    resid = residual_stack(model, prompt)[-1]
    a = view.readout(resid)
    reference = _reference_signals(model, view, lexicon)
    drawn = torch.randint(len(reference), (view.n_signals,), generator=derive_generator(seed, "resample"))
    elsewhere = reference[drawn]
    replacements: dict[str, Tensor | float] = {
        "zero": 0.0,
        "mean": reference.mean(dim=0)[None],
        "resample": elsewhere.diagonal()[None],
    }
    alone = {kind: SingleAblations(view, a, value) for kind, value in replacements.items()}
    upstream = {
        site: ablate_upstream(model, prompt, target_prob(target_id), site, view=view, progress=False).values[:, 0]
        for site in _sites(model, view)
        if isinstance(site, str)
    }
    signals = a[0, : view.n_signals]
    frame = pd.DataFrame(
        {
            "signal": range(view.n_signals),
            "target": model.to_single_str_token(target_id),
            "readout": signals.cpu().numpy(),
            "contribution": (signals * view.logit_rows[target_id, : view.n_signals]).cpu().numpy(),
            "probability_before": float(alone["zero"].before().probability(target_id)),
            **{f"after_{kind}": each.probability(target_id)[0].cpu().numpy() for kind, each in alone.items()},
            "kl_zero": alone["zero"].kl()[0].cpu().numpy(),
            **{f"after_{site}": values.cpu().numpy() for site, values in upstream.items()},
            "codebook": codebook_texts(view),
        }
    )
    return frame.sort_values("contribution", ascending=False, ignore_index=True)


@torch.no_grad()
def _reference_signals(model: HookedModel, view: SignalView, lexicon: Lexicon) -> Float[Tensor, "n S"]:
    """Readouts at every position of the lexicon's neutral texts."""
    readouts = []
    for text in lexicon.neutral_texts:
        ids = (model.text_start() + model.tokenizer.encode(text))[: model.cfg.n_ctx]
        tokens = torch.tensor([ids], device=model.cfg.device)
        readouts.append(view.readout(model.final_stream(tokens))[0].float())
    return torch.cat(readouts)


def site_frame(
    model: HookedModel, view: SignalView, prompt: str, target_id: int, signals: pd.DataFrame, seed: int, k: int = 8
) -> pd.DataFrame:
    """The k most damaging signals of the prompt in detail, and as many random ones, removed at every site."""
    before = signals["probability_before"].iloc[0]
    damaging = signals.nsmallest(k, "after_zero")["signal"].tolist()
    drawn = random_order((1, view.n_signals), derive_seed(seed, "sites"))[0].tolist()
    others = [signal for signal in drawn if signal not in damaging][:k]
    chosen = [*damaging, *others]
    known = signals.set_index("signal").loc[chosen]
    metric = target_prob(target_id)
    after: dict[str, list[float]] = {}
    for site in _sites(model, view):
        if isinstance(site, str):
            after[site] = known[f"after_{site}"].tolist()
        else:
            removed = ablate_upstream(model, prompt, metric, site, signals=chosen, view=view, progress=False)
            after[f"resid {site}"] = removed.values[:, 0].tolist()
    after["readout"] = known["after_zero"].tolist()
    groups = ["most damaging"] * len(damaging) + ["random"] * len(others)
    return pd.DataFrame(
        [
            {"site": site, "signal": signal, "group": group, "left": probability / before}
            for site, probabilities in after.items()
            for signal, group, probability in zip(chosen, groups, probabilities, strict=True)
        ]
    )


def _sites(model: HookedModel, view: SignalView) -> list[Site]:
    """From the input to the end; the signals of an unembedding of its own are not what enters at the input, and the
    features of a dictionary are in one stream.

    None of a model whose blocks do not add to the stream: what is removed from it does not stay removed.
    """
    if not model.sublayers:
        return []
    if isinstance(view, DictionaryView):
        return [view.site]
    layers = range(model.cfg.n_layers + 1)
    return ["embed", *layers, "everywhere"] if model.cfg.has_one_embedding else [*layers]


def prompts_frame(bases: Bases[Measured], prompts: list[str]) -> pd.DataFrame:
    """A row a basis and prompt."""
    frames = []
    for name, measured in bases.named("native").items():
        frames.append(
            pd.DataFrame(
                {
                    "basis": name,
                    "prompt": prompts,
                    "worst_signal": measured.worst,
                    "left_random_signal": measured.single["random_signal"],
                    "left_matched_signal": measured.single["matched_signal"],
                    **measured.headline(),
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def curve_frame(bases: Bases[Measured], seed: int) -> pd.DataFrame:
    """Mean curves over prompts with pointwise bootstrap bands."""
    curves = dict(bases.own.curves)
    for order in ("contribution", "keep"):
        rotated = [measured.curves[order] for measured in bases.rotated.values()]
        curves[f"{order}, rotated basis"] = np.mean(rotated, axis=0)
    frames = []
    for order, curve in curves.items():
        low, high = bootstrap_band(curve, seed=seed)
        frames.append(
            pd.DataFrame({"order": order, "removed": bases.own.counts, "left": curve.mean(0), "low": low, "high": high})
        )
    return pd.concat(frames, ignore_index=True)
