"""Experiment 9, Causal Ablation: knock signals out and watch the prediction.

A reFlow prediction is a sum over S signals, so single signals can be removed exactly and for free. Whether that says
anything about *these* signals is another matter: with S = d_model the same function can be written in any rotated
basis, (R A, Aᵀ B), and has S signals there too. Every figure therefore stands beside ``rotated_basis``, the same
measurement on the same predictions in random rotations, its floor; beside ``varimax``, the same in the rotation with
the sparsest recipes, its ceiling; beside ``random_signal``, a signal drawn at random; beside ``matched_signal``, the
signal that moves all logits together as much (``|a_s| ‖R_:s‖``) as the one chosen; and beside ``untrained``.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from analyses.controls.bases import ROTATIONS, Bases, basis_verdicts, by_metric, check_rotations, rotated_views
from analyses.controls.nulls import untrained_view
from analyses.experiments.causal_ablation.figures import ablation_figures
from analyses.measures.knockout import (
    codebook_texts,
    curve_area,
    curve_counts,
    matched_order,
    random_order,
    real_tokens,
    write_norms,
)
from analyses.measures.lens import first_settled, lens_log_probabilities, residual_stack
from analyses.result.finding import Finding
from analyses.result.model_identity import hash_of
from analyses.result.result import Result
from analyses.statistics.draws import derive_generator, derive_seed
from analyses.statistics.intervals import bootstrap_band, bootstrap_interval
from analyses.statistics.pvalues import Alternative
from analyses.words.lexicon import Lexicon, load_lexicon
from reflowlens.ablations.closed_form import ProgressiveAblations, SingleAblations
from reflowlens.ablations.upstream import Site, ablate_upstream
from reflowlens.errors import ReflowlensError
from reflowlens.metrics import target_prob
from reflowlens.models.base import HookedModel
from reflowlens.signals import SignalView, ViewName, varimax_view, view_of

MINIMUM_PROMPTS = 20
RECOVERED = 0.9
PRIVILEGED: dict[str, Alternative] = {
    "remaining_after_one": "less",
    "knockout_area": "greater",
    "sufficient_share": "less",
}
"""In a privileged basis one removal leaves less, the order matters more, and fewer signals suffice."""
DEFINITIONS = {
    "probability_before": "probability of the target of the prompt shown in detail; untrained: of the same token",
    "probability_after_one": "the same after zeroing at the readout the one signal that lowers it most. random_signal: "
    "mean over all signals; rotated_basis, varimax: the most damaging signal of each such basis, mean over rotations",
    "remaining_after_one": "share of the top-1 token's probability that is left after zeroing the single most damaging "
    "signal at the readout, mean over prompts. matched_signal: the other signal nearest in |a_s| ‖R_:s‖; "
    "rotated_basis, varimax: the most damaging signal of each such basis",
    "knockout_area": "area between the curve of random order and the curve of contribution order: share of the top-1 "
    "token's probability against the share of signals zeroed at the readout; mean over prompts",
    "sufficient_share": "smallest share of signals, kept in order of contribution with all others zeroed, that "
    f"restores {RECOVERED:.0%} of the top-1 token's probability from there on, among the numbers of signals in the "
    "curves; mean over prompts",
}
PUBLISHED = {
    "probability_before": 0.0831,
    "probability_after_one": 0.0003,
    "remaining_after_one": 0.0003 / 0.0831,
}


@torch.no_grad()
def causal_ablation(
    model: HookedModel,
    prompt: str | None = None,
    target: str | None = None,
    *,
    view: SignalView | ViewName | None = None,
    lexicon: Lexicon | None = None,
    rotations: int = ROTATIONS,
    seed: int = 0,
    quick: bool = False,
    progress: bool = False,
) -> Result:
    """Single and progressive signal knock-out at the readout, and the same signals removed upstream.

    Args:
        prompt: shown in detail, at every site; default the lexicon's first factual prompt.
        target: the token to watch there; default the model's top-1. Over the prompts it is each prompt's top-1.
        view: whose signals to remove; default the model's own, or the residual axes of a model without any.
        rotations: random rotations in the ``rotated_basis`` null; at least 2.
        quick: a third of the prompts.

    Returns:
        A Result with frames ``signals`` (every signal of the prompt in detail: contribution, effects by site and kind
        of replacement, codebook), ``prompts`` (a row a prompt and control), ``curves`` (means over prompts) and
        ``sites`` (the most damaging signals removed at every site), and figures ``knockout``, ``sufficiency``,
        ``signals``, ``sites``, ``single``.

    Raises:
        ReflowlensError: the prompt is empty or too long, the target several tokens, or the lexicon has fewer than two
            prompts or no neutral texts.

    Example: ``causal_ablation(model, "The capital of France is").frames["signals"].head()``
    """
    chosen = real_tokens(view_of(model, view, seed=seed))
    lexicon = lexicon or load_lexicon()
    prompts = [item.prompt for item in lexicon.factual][:: 3 if quick else 1]
    if len(prompts) < 2:
        raise ReflowlensError("causal_ablation needs at least two factual prompts in the lexicon")
    if not lexicon.neutral_texts:
        raise ReflowlensError("causal_ablation needs neutral_texts in the lexicon: they are its reference text")
    check_rotations(rotations)
    prompt = prompt if prompt is not None else prompts[0]
    detail = residual_stack(model, prompt)[-1]
    target_id = _target_id(model, chosen, detail, target)
    final = residual_stack(model, prompts)[-1]
    untrained = real_tokens(untrained_view(chosen, seed))
    own = derive_seed(seed, "causal_ablation")
    rotated = dict(rotated_views(chosen, rotations, seed, "causal_ablation"))
    views = Bases(chosen, rotated, varimax_view(chosen, seed=seed))
    bar = tqdm(rotated.items(), desc="causal ablation", disable=not progress)
    fresh = residual_stack(untrained.model, prompts)[-1]
    bases = Bases(
        own=_measure(chosen, final, derive_seed(own, "model")),
        nulls={"untrained": _measure(untrained, fresh, derive_seed(own, "untrained"))},
        rotated={name: _measure(other, final, derive_seed(own, name)) for name, other in bar},
        varimax=_measure(views.varimax, final, derive_seed(own, "varimax")),
    )
    frames = {
        "signals": _signal_frame(model, chosen, prompt, target_id, lexicon, own),
        "prompts": _prompts_frame(bases, prompts),
        "curves": _curve_frame(bases, seed),
    }
    frames["sites"] = _site_frame(model, chosen, prompt, target_id, frames["signals"], own)
    at_start = lens_log_probabilities(untrained, residual_stack(untrained.model, prompt)[-1])
    least = views.map(lambda view: _least_without_one(view, detail, target_id))
    signals = frames["signals"]
    findings, notes = _findings(bases, seed)
    return Result(
        name="causal_ablation",
        title="Causal Ablation",
        params={
            "prompt": prompt,
            "target": frames["signals"]["target"].iloc[0],
            "view": chosen.name,
            "rotations": rotations,
            "seed": seed,
            "quick": quick,
            "lexicon": lexicon.version,
            "model_hash": hash_of(model),
        },
        findings={
            "probability_before": Finding(
                signals["probability_before"].iloc[0], controls={"untrained": float(at_start[0, target_id].exp())}
            ),
            "probability_after_one": Finding(
                signals["after_zero"].min(),
                controls={"random_signal": signals["after_zero"].mean(), **least.controls()},
            ),
            **findings,
        },
        frames=frames,
        figures=ablation_figures(frames, prompt, seed),
        definitions=DEFINITIONS,
        published=PUBLISHED,
        notes=notes,
    )


class Measured(NamedTuple):
    """What one view says of every prompt; arrays are [prompt], curves [prompt, count]."""

    counts: list[int]
    worst: NDArray[np.int64]
    single: dict[str, NDArray[np.float64]]  # share of the probability left, by which signal was zeroed
    curves: dict[str, NDArray[np.float64]]  # share of the probability left, by order

    def area(self, order: str = "contribution") -> NDArray[np.float64]:
        """Area between the random-order curve and another."""
        return curve_area(self.curves["random"] - self.curves[order], self.counts)

    def sufficient_share(self) -> NDArray[np.float64]:
        """Smallest share of signals whose keeping restores the probability, from there on."""
        enough = self.curves["keep"] >= RECOVERED
        return np.asarray(self.counts)[first_settled(enough.T)] / self.counts[-1]

    def headline(self) -> dict[str, NDArray[np.float64]]:
        """The metrics with a rotation null, one value a prompt."""
        return {
            "remaining_after_one": self.single["worst"],
            "knockout_area": self.area(),
            "sufficient_share": self.sufficient_share(),
        }


def _measure(view: SignalView, final: Float[Tensor, "prompt d_model"], seed: int) -> Measured:
    a = view.readout(final).float()
    targets = view.logits(a).argmax(dim=-1)
    alone = SingleAblations(view, a, 0.0)
    before = alone.before().probability(targets)
    left = (alone.probability(targets) / before).cpu()
    worst = left.argmin(dim=-1)
    contribution = (a * view.recipe[targets]).cpu()
    by_contribution = contribution.argsort(dim=-1, descending=True)
    norms = write_norms(view, a).cpu()
    partner = matched_order(worst[:, None], norms)[:, 0]
    rows = torch.arange(len(left))
    counts = curve_counts(view.n_signals)
    orders = {
        "contribution": by_contribution,
        "matched": matched_order(by_contribution, norms),
        "random": random_order(tuple(left.shape), seed),
    }
    curves = {name: ProgressiveAblations(view, a, 0.0, order, counts) for name, order in orders.items()}
    curves["keep"] = ProgressiveAblations(view, a, 0.0, by_contribution, counts, keep=True)
    return Measured(
        counts,
        worst.numpy(),
        {
            "worst": left[rows, worst].double().numpy(),
            "random_signal": left.mean(dim=-1).double().numpy(),
            "matched_signal": left[rows, partner].double().numpy(),
        },
        {name: (curve.probability(targets) / before).double().cpu().numpy() for name, curve in curves.items()},
    )


def _findings(bases: Bases[Measured], seed: int) -> tuple[dict[str, Finding], list[str]]:
    """The metrics over prompts, between their floor and their ceiling."""
    native = bases.own
    beside: dict[str, dict[str, NDArray[np.float64]]] = {
        "remaining_after_one": {name: native.single[name] for name in ("random_signal", "matched_signal")},
        "knockout_area": {"matched_signal": native.area("matched")},
        "sufficient_share": {},
    }
    values = by_metric(bases.map(Measured.headline))
    means = {metric: found.map(lambda per_prompt: float(per_prompt.mean())) for metric, found in values.items()}
    findings = {}
    for metric, per_prompt in values.items():
        controls = {name: float(each.mean()) for name, each in beside[metric].items()} | means[metric].controls()
        findings[metric] = Finding(means[metric].own, bootstrap_interval(per_prompt.own, seed=seed), controls)
    units = dict.fromkeys(means, len(native.worst))
    return basis_verdicts(findings, means, PRIVILEGED, units, minimum_units=MINIMUM_PROMPTS)


def _target_id(model: HookedModel, view: SignalView, resid: Float[Tensor, "one d_model"], target: str | None) -> int:
    """The token to watch: the one given, else the most probable one."""
    return int(lens_log_probabilities(view, resid).argmax()) if target is None else model.to_single_token(target)


def _least_without_one(view: SignalView, resid: Float[Tensor, "one d_model"], target_id: int) -> float:
    """The target's probability without the signal whose removal lowers it most."""
    return float(SingleAblations(view, view.readout(resid), 0.0).probability(target_id).min())


def _signal_frame(
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
        for site in _sites(model)
        if isinstance(site, str)
    }
    frame = pd.DataFrame(
        {
            "signal": range(view.n_signals),
            "target": model.to_single_str_token(target_id),
            "readout": a[0].cpu().numpy(),
            "contribution": (a[0] * view.recipe[target_id]).cpu().numpy(),
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
        readouts.append(view.readout(model(tokens, stop_at_layer=model.cfg.n_layers))[0].float())
    return torch.cat(readouts)


def _site_frame(
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
    for site in _sites(model):
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


def _sites(model: HookedModel) -> list[Site]:
    """From the input to the end; the signals of an unembedding of its own are not what enters at the input.

    None of a model whose blocks do not add to the stream: what is removed from it does not stay removed.
    """
    if not model.sublayers:
        return []
    layers = range(model.cfg.n_layers + 1)
    return ["embed", *layers, "everywhere"] if model.cfg.tie_word_embeddings else [*layers]


def _prompts_frame(bases: Bases[Measured], prompts: list[str]) -> pd.DataFrame:
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


def _curve_frame(bases: Bases[Measured], seed: int) -> pd.DataFrame:
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
