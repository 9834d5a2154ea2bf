"""Experiment 8, Signal Flow: which signals make a prediction, from where on, and who writes them?

A signal contributes a_s R_target,s to the target's logit, at any depth, and all of them sum to the logit that the lens
reads there. The k largest are the *leading* signals: how much of the logit they hold, whether the next layer has the
same ones, and since when the final ones have led says how a prediction is put together. What a layer changes is split
into its attention, head by head, and its MLP, with the final norm's divisor frozen
(`contributions.py` beside).

That the contributions sum to the logit is arithmetic, true of every basis, and ships as ``sum_error``. A statement
about leading signals is one about a basis: ``rotated_basis``, the same in random rotations of it, is its floor,
``varimax``, the rotation with the sparsest recipes, its ceiling. ``random_signal`` is what k signals drawn at random
give, and ``untrained`` the same architecture at initialisation.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from analyses.controls.bases import (
    ROTATIONS,
    Bases,
    basis_verdicts,
    by_metric,
    check_rotations,
    random_rotations,
)
from analyses.controls.carried import logit_error
from analyses.controls.nulls import over_untrained
from analyses.experiments.signal_flow.contributions import (
    Reading,
    leading_signals,
    mean_lead_since,
    neighbour_overlap,
    random_overlap,
    read_contributions,
)
from analyses.experiments.signal_flow.figures import flow_figures
from analyses.experiments.signal_flow.frames import detail_frames
from analyses.measures.knockout import leading_share
from analyses.measures.lens import residual_stack
from analyses.result.finding import Finding
from analyses.result.params import run_params
from analyses.result.result import Result
from analyses.statistics.intervals import bootstrap_band, bootstrap_interval
from analyses.words.lexicon import Lexicon, load_lexicon
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.signals import AnyView, varimax_of, view_of

MINIMUM_PROMPTS = 20
LEADING = 10


def definitions(k: int) -> dict[str, str]:
    """What each metric means, with the number of leading signals that was used."""
    lead = f"the {k} leading signals (the largest positive contributions a_s R_target,s to the top-1 token's logit)"
    return {
        "leading_share": f"share of all positive contributions at the end that {lead} hold; mean over prompts",
        "neighbour_overlap": f"Jaccard index of {lead} before and after a block, mean over blocks and prompts. "
        "random_signal: of two random sets of as many",
        "leading_since": f"depth from which on each of {lead} of the end has led, as a share of the depth (0: the "
        "embedding, 1: the end); mean over them and prompts",
        "attention_share": "what attention adds to or takes from the top-1 token's logit, in absolute value summed "
        "over layers, as a share of what attention and MLPs do, with the final norm's divisor frozen at its value for "
        "the last residual; mean over prompts",
        "sum_error": "largest |Σ_s contribution - the model's own logit| over prompts and residual points, as a share "
        "of Σ_s |contribution|. rotated_basis: the largest of all rotations",
        "split_error": "the same of the sum over embedding, attention, MLPs, the norm's bias and signals at the end",
    }


@torch.no_grad()
def signal_flow(
    model: HookedModel,
    prompt: str | None = None,
    target: str | None = None,
    *,
    position: int = -1,
    signal: int | None = None,
    k: int = LEADING,
    view: AnyView = None,
    lexicon: Lexicon | None = None,
    rotations: int = ROTATIONS,
    seed: int = 0,
    quick: bool = False,
    progress: bool = False,
) -> Result:
    """Follow the signals that contribute most to a prediction from the embedding to the end.

    Args:
        prompt: shown in detail; default the lexicon's first factual prompt.
        target: the token whose logit is taken apart there; default the model's top-1. Over the prompts it is each
            prompt's top-1.
        position: of the prompt in detail, negative from its end; default its last token.
        signal: the one shown at every position; default the one that contributes most at the end.
        k: how many signals lead.
        view: whose signals; default the model's own, or the residual axes of a model without any.
        rotations: random rotations in the ``rotated_basis`` null; at least 2.
        quick: a third of the prompts.

    Returns:
        A Result with frames of the prompt in detail, ``signals`` (a row a point and signal that leads at any),
        ``tracks`` (a row such a signal: since when it leads, until when, codebook), ``changes`` (a row such a signal,
        layer and part of it) and ``positions`` (one signal at every point and position), and over the prompts
        ``prompts`` (a row a prompt and basis), ``layers`` (overlap, births and deaths a block and basis), ``split``
        (what each part adds to the logit) and ``heads``; figures ``signals``, ``tracks``, ``positions``, ``overlap``,
        ``split``, ``heads``.

    Raises:
        ReflowlensError: the prompt is empty or too long, the target several tokens, there is no such position or
            signal, k is not between 1 and the number of signals, or the lexicon has fewer than two prompts.

    Example: ``signal_flow(model, "The capital of France is", target=" Paris").frames["tracks"]``
    """
    chosen = view_of(model, view, seed=seed)
    lexicon = lexicon or load_lexicon()
    prompts = [item.prompt for item in lexicon.factual][:: 3 if quick else 1]
    if len(prompts) < 2:
        raise ReflowlensError("signal_flow needs at least two factual prompts in the lexicon")
    if not 1 <= k <= chosen.n_signals:
        raise ReflowlensError(f"k must be between 1 and the view's {chosen.n_signals} signals, got {k}")
    check_rotations(rotations)
    prompt = prompt if prompt is not None else prompts[0]
    frames = detail_frames(chosen, prompt, target, position, signal, k)
    reading = read_contributions(chosen, prompts)
    fresh = over_untrained(lambda each: read_contributions(each, prompts), chosen, seed, "signal_flow", quick=quick)
    drawn = random_rotations(chosen.n_signals, rotations, seed, "signal_flow")
    bar = tqdm(drawn, total=rotations, desc="signal flow", disable=not progress)
    sparsest = varimax_of(chosen, seed=seed)
    flows = Bases(
        own=Flow.of(reading, k),
        nulls={name: Flow.of(each, k) for name, each in fresh.items()},
        rotated={name: Flow.of(reading.rotated(rotation), k) for name, rotation in bar},
        varimax=Flow.of(reading.rotated(sparsest), k),
    )
    readings = {"model": reading, **fresh}
    frames |= {
        "prompts": _prompt_frame(flows, prompts),
        "layers": _layer_frame(flows, seed),
        "split": _split_frame(readings, seed),
        "heads": _head_frame(readings, seed),
    }
    leading, notes = _leading_findings(flows, chosen.n_signals, k, seed)
    attention, why = _attention_share(readings, seed)
    sum_error = {
        "rotated_basis": max(flow.sum_error for flow in flows.rotated.values()),
        **{name: flow.sum_error for name, flow in flows.nulls.items()},
    }
    return Result(
        name="signal_flow",
        title="Signal Flow",
        params={
            "prompt": prompt,
            "target": frames["tracks"]["target"].iloc[0],
            "position": position,
            "signal": int(frames["positions"]["signal"].iloc[0]),
            "k": k,
            "rotations": rotations,
            **run_params(chosen, lexicon, seed, quick),
        },
        findings={
            **leading,
            **attention,
            "sum_error": Finding(flows.own.sum_error, controls=sum_error),
            "split_error": Finding(
                reading.split_error(), controls={name: each.split_error() for name, each in fresh.items()}
            ),
            **(logit_error(chosen, residual_stack(model, prompts)[-1], seed) if chosen.n_carried else {}),
        },
        frames=frames,
        figures=flow_figures(frames, prompt),
        definitions=definitions(k),
        notes=[*notes, *why],
    )


class Flow(NamedTuple):
    """The leading signals of every prompt in one basis; arrays are [prompt], those of blocks [block, prompt]."""

    share: NDArray[np.float64]
    since: NDArray[np.float64]
    overlap: NDArray[np.float64]
    births: NDArray[np.float64]
    deaths: NDArray[np.float64]
    sum_error: float

    @classmethod
    def of(cls, reading: Reading, k: int) -> Flow:
        """The k leading signals at the embedding and behind each block."""
        contributions = reading.contributions()[::2]
        leading = leading_signals(contributions, k)
        before, after = leading[:-1], leading[1:]
        share, since, overlap, births, deaths = (
            each.double().cpu().numpy()
            for each in (
                leading_share(contributions[-1], k, reading.carried[-1]),
                mean_lead_since(leading),
                neighbour_overlap(leading),
                (after & ~before).sum(dim=-1),
                (before & ~after).sum(dim=-1),
            )
        )
        return cls(share, since, overlap, births, deaths, reading.sum_error())

    def headline(self) -> dict[str, NDArray[np.float64]]:
        """The metrics with a rotation null, one value a prompt."""
        return {
            "leading_share": self.share,
            "neighbour_overlap": self.overlap.mean(axis=0),
            "leading_since": self.since,
        }


def _leading_findings(flows: Bases[Flow], n_signals: int, k: int, seed: int) -> tuple[dict[str, Finding], list[str]]:
    """The metrics that speak of single signals, between their floor and their ceiling."""
    values = by_metric(flows.map(Flow.headline))
    means = {metric: found.map(lambda per_prompt: float(per_prompt.mean())) for metric, found in values.items()}
    controls = {metric: mean.controls() for metric, mean in means.items()}
    controls["leading_share"]["random_signal"] = k / n_signals
    controls["neighbour_overlap"]["random_signal"] = random_overlap(n_signals, k)
    findings = {
        metric: Finding(means[metric].own, bootstrap_interval(found.own, seed=seed), controls[metric])
        for metric, found in values.items()
    }
    units = dict.fromkeys(means, len(flows.own.share))
    return basis_verdicts(findings, means, units, minimum_units=MINIMUM_PROMPTS, experiment="signal_flow")


def _attention_share(readings: dict[str, Reading], seed: int) -> tuple[dict[str, Finding], list[str]]:
    """Who writes: the share of attention, where the blocks write anything."""
    shares = {}
    for name, reading in readings.items():
        attention, mlp = (
            part.sum(dim=-1).abs().sum(dim=0).double().cpu().numpy()
            for part in (reading.split.attention, reading.split.mlp)
        )
        shares[name] = attention[attention + mlp > 0] / (attention + mlp)[attention + mlp > 0]
    own = shares.pop("model")
    if len(own) < 2:
        return {}, ["attention_share: absent, for neither attention nor MLPs write anything"]
    controls = {name: float(share.mean()) for name, share in shares.items()}
    return {"attention_share": Finding(own.mean(), bootstrap_interval(own, seed=seed), controls)}, []


def _prompt_frame(flows: Bases[Flow], prompts: list[str]) -> pd.DataFrame:
    by_name = {"model": flows.own, **flows.nulls, "varimax": flows.varimax, **flows.rotated}
    frames = [pd.DataFrame({"basis": name, "prompt": prompts, **flow.headline()}) for name, flow in by_name.items()]
    return pd.concat(frames, ignore_index=True)


def _layer_frame(flows: Bases[Flow], seed: int) -> pd.DataFrame:
    """What a block does to the leading signals: means over prompts, of the rotations together one row a block."""
    frames = []
    for name, some in flows.series("model").items():
        flow = Flow(*(np.mean(values, axis=0) for values in zip(*some, strict=True)))
        low, high = bootstrap_band(flow.overlap.T, seed=seed)
        frames.append(
            pd.DataFrame(
                {
                    "basis": name,
                    "block": range(len(flow.overlap)),
                    "overlap": flow.overlap.mean(axis=1),
                    "low": low,
                    "high": high,
                    "births": flow.births.mean(axis=1),
                    "deaths": flow.deaths.mean(axis=1),
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def _split_frame(readings: dict[str, Reading], seed: int) -> pd.DataFrame:
    """What each part of the model adds to the top-1 token's logit: means over prompts with intervals."""
    frames = []
    for name, reading in readings.items():
        for part, contributions in reading.split.parts().items():
            logits = contributions.sum(dim=-1).double().cpu().numpy()
            low, high = bootstrap_band(logits.T, seed=seed)
            table = {"part": part, "block": range(len(logits)), "logit": logits.mean(axis=1), "low": low, "high": high}
            frames.append(pd.DataFrame({"model": name, **table}))
    return pd.concat(frames, ignore_index=True)


def _head_frame(readings: dict[str, Reading], seed: int) -> pd.DataFrame:
    """The same of every head."""
    frames = []
    for name, reading in readings.items():
        heads = reading.split.heads.double().cpu().numpy()
        low, high = bootstrap_band(np.moveaxis(heads, -1, 0), seed=seed)
        layer, head = np.indices(heads.shape[:2])
        columns = {"layer": layer, "head": head, "logit": heads.mean(axis=-1), "low": low, "high": high}
        frames.append(pd.DataFrame({"model": name, **{key: value.ravel() for key, value in columns.items()}}))
    return pd.concat(frames, ignore_index=True)
