"""Causal tracing: where the states lie that carry what a prompt says of its subject (Meng et al., 2022).

The subject's tokens get noise on their embeddings, so that the answer is lost: the *total effect*. Then one state at a
time is put back as the clean run has it, at one layer and one role of token, and what the answer gains is its *indirect
effect*. Where there is no total effect there is nothing to trace, and the result says so.

The control of the total effect is noise on as many other tokens. Meng et al. restore each token of a role alone; here
all tokens of a role (the middle of the subject, what follows it) are restored together, which is fewer runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool
from numpy.typing import NDArray
from torch import Tensor

from analyses.claims import bound_of
from analyses.result.finding import Finding
from analyses.result.result import Result
from analyses.statistics.draws import derive_rng
from analyses.statistics.intervals import bootstrap_interval
from analyses.statistics.pvalues import paired_permutation_pvalue
from analyses.statistics.verdicts import verdict
from analyses.tasks.answered import (
    DEFINITIONS,
    MINIMUM_PROMPTS,
    Answered,
    layers_given,
    numbers,
    performance_findings,
    performance_note,
    priced,
    shown,
    some_prompts,
    task_params,
)
from analyses.tasks.by_group import group_figures, group_frames
from analyses.tasks.traced_runs import STATES, Measured, Traced, value_of
from reflowlens.arguments import is_one_of, number_of_runs, real_number
from reflowlens.errors import ReflowlensError
from reflowlens.figures.heatmap import heatmap
from reflowlens.models.base import HookedModel
from reflowlens.models.unwrapping import hooked_model
from reflowlens.progress import bar
from reflowlens.prompts import Prompts

ROLES = ("first subject token", "middle subject tokens", "last subject token", "further tokens", "last token")
_ROWS = 2048  # tokens of a batch, over all its noises
_ROUNDING = 1e-6  # effects below this share of the answer are none
OWN_DEFINITIONS = {
    "answer": "what is traced, in the clean run: the probability of the answer, or its logit difference",
    "total_effect": "how much of it noise on the subject's tokens takes away, mean over noises and prompts. "
    "other_tokens: noise on as many tokens outside of the subject, the last one spared",
    "state_peak": "indirect effect of restoring the stream at the layer and role (the last token left out) with the "
    "largest on one half of the prompts, judged on the other. elsewhere: mean over all other layers and roles",
    "mlp_peak": "the same of what MLPs write, in a window of layers, all roles",
    "attn_peak": "the same of what attention writes",
}


@torch.no_grad()
def causal_tracing(
    model: HookedModel,
    prompts: Prompts,
    *,
    subject: str = "subject",
    noise: float = 3.0,
    samples: int = 10,
    window: int | None = None,
    layers: int | Sequence[int] | None = None,
    measured: Measured = "probability",
    seed: int = 0,
    quick: bool = False,
    progress: bool | None = None,
) -> Result:
    """Indirect effects of states, MLPs and attention, by layer and role of token, with noise on the subject.

    The cost is stated in ``params["passes"]``, whole passes over a prompt.

    Args:
        model: a hooked model whose passes can start at any block.
        prompts: with columns ``clean``, ``answer`` and the subject's.
        subject: the column whose text is the subject.
        noise: standard deviation of the noise in units of that of the embeddings of all subjects' tokens.
        samples: noises a prompt.
        window: consecutive layers whose MLPs, or attention, are restored together, around each layer; default a fifth
            of the model. States are restored at one layer.
        layers: where to restore; default all, or 12 at equal distances.
        measured: ``"probability"`` of the answer, or ``"logit_diff"``.
        seed: of noises and resamples.
        quick: a third of the prompts and of the noises.

    Returns:
        A Result with frames ``trace`` (a row a kind, layer and role: mean indirect ``effect``, ``low``, ``high``, and
        the number of ``prompts`` that have the role), ``effects`` (a row a prompt too) and ``prompts``; a figure a
        kind: ``state``, ``mlp``, ``attn``, those that the model has.

    Raises:
        ReflowlensError: prompts lack the subject or an answer, are fewer than four, or the model's passes start from
            tokens alone.

    Example: ``causal_tracing(model, prompts).frames["trace"].nlargest(5, "effect")``
    """
    if not is_one_of(measured, ("probability", "logit_diff")):
        raise ReflowlensError(f"measured must be 'probability' or 'logit_diff', got {measured!r}")
    hooked = hooked_model(model)
    if hooked.stages == "whole":
        raise ReflowlensError(
            f"causal tracing goes on from a block, and a pass of a {type(hooked).__name__} starts from tokens"
        )
    chosen = some_prompts(prompts, quick, seed)
    answered = Answered.of(hooked, chosen, least=4)
    samples = max(2, number_of_runs(samples, "samples", 1) // (3 if quick else 1))
    first, last = chosen.positions(hooked, f"{subject}:first"), chosen.positions(hooked, subject)
    roles, subjects = roles_of(answered, first, last), subject_tokens(answered, first, last)
    at_layers, width = layers_given(hooked, layers), _window(hooked, window)
    sublayers = [part for part in hooked.sublayers if part in ("attn", "mlp")]
    cells = [(kind, layer, role) for kind in (STATES, *sublayers) for layer in at_layers for role in ROLES]
    spread = real_number(noise, "noise") * embedding_spread(answered, subjects)
    others = other_tokens(answered, first, last, seed)
    restored = sum(1 - layer / hooked.cfg.n_layers for _, layer, _ in cells)
    passes = len(chosen) * (2 + samples * (3 + restored))
    parts, control = [], []
    batches = list(answered.batches(max(1, _ROWS // samples)))
    steps = bar(
        total=len(batches) * len(cells), show=shown(progress), unit="cell", desc=priced("causal tracing", passes)
    )
    for batch in batches:
        rows, n_positions = torch.tensor(batch.rows), batch.tokens.shape[1]
        marked = roles[rows, :, :n_positions]
        traced = Traced.of(batch, subjects[rows, :n_positions], sublayers, spread, samples, measured, seed)
        gains, noisy = [], traced.corrupted()
        for kind, layer, role in cells:
            at = marked[:, ROLES.index(role)]
            span = [layer] if kind == STATES else window_of(layer, width, hooked.cfg.n_layers)
            gains.append(torch.where(at.any(dim=1), traced.restored(kind, span, at) - noisy, torch.nan))
            steps.update()
        elsewhere = Traced.of(batch, others[rows, :n_positions], [], spread, samples, measured, seed).corrupted()
        control.append(elsewhere)
        parts.append((value_of(batch, batch.final(), measured), noisy, torch.stack(gains, dim=1)))
    steps.close()
    clean, corrupted, effects = (torch.cat(each) for each in zip(*parts, strict=True))
    total, beside = numbers(clean - corrupted), numbers(clean - torch.cat(control))
    named = pd.DataFrame(cells, columns=["kind", "layer", "role"])
    findings = performance_findings(answered.unchanged(), seed)
    notes = performance_note(findings, answered.wrong is not None)
    own, told = _findings(named, numbers(clean), total, beside, numbers(effects), seed)
    trace = _trace(named, numbers(effects), seed)
    by_prompt = {"total_effect": total, "other_tokens": beside}
    groups = group_frames(chosen, by_prompt, seed)
    figures = {str(kind): _figure(rows, str(kind), measured) for kind, rows in trace.groupby("kind", sort=False)}
    return Result(
        name="causal_tracing",
        title="Causal Tracing",
        params=task_params(
            hooked,
            chosen,
            seed,
            quick,
            subject=subject,
            noise=noise,
            samples=samples,
            window=width,
            layers=at_layers,
            measured=measured,
            passes=round(passes),
        ),
        findings=findings | own,
        frames={
            "trace": trace,
            "effects": _long(named, numbers(effects)),
            "prompts": pd.DataFrame(
                {
                    "text": chosen.clean,
                    "subject": list(map(str, chosen.column(subject))),
                    "clean": numbers(clean),
                    "corrupted": numbers(corrupted),
                    **by_prompt,
                }
            ),
            **groups,
        },
        figures=figures | group_figures(groups, "Total effect"),
        definitions=DEFINITIONS | OWN_DEFINITIONS,
        notes=told + notes,
    )


def roles_of(answered: Answered, first: Sequence[int], last: Sequence[int]) -> Bool[Tensor, "prompt role pos"]:
    """Which tokens have each of `ROLES`, one at most: the last token its own, those before the subject none."""
    roles = torch.zeros(len(answered), len(ROLES), answered.tokens.shape[1], dtype=torch.bool)
    for row, (start, stop, length) in enumerate(zip(first, last, answered.lengths, strict=True)):
        for position in range(start, length):
            if position == length - 1:
                role = "last token"
            elif position > stop:
                role = "further tokens"
            elif position == stop:
                role = "last subject token"
            else:
                role = "first subject token" if position == start else "middle subject tokens"
            roles[row, ROLES.index(role), position] = True
    return roles.to(answered.tokens.device)


def subject_tokens(answered: Answered, first: Sequence[int], last: Sequence[int]) -> Bool[Tensor, "prompt pos"]:
    """The tokens from a subject's first to its last."""
    here = torch.arange(answered.tokens.shape[1])
    marked = (here >= torch.tensor(first)[:, None]) & (here <= torch.tensor(last)[:, None])
    return marked.to(answered.tokens.device)


def embedding_spread(answered: Answered, subjects: Bool[Tensor, "prompt pos"]) -> float:
    """Standard deviation of the entries of the embeddings of all subjects' tokens."""
    options: dict[str, Any] = {"names_filter": "hook_embed", "stop_at_layer": 1, "return_cache_object": False}
    parts = []
    for batch in answered.batches():
        _, cache = answered.model.run_with_cache(batch.tokens, **options)
        parts.append(cache["hook_embed"][subjects[torch.tensor(batch.rows), : batch.tokens.shape[1]]])
    return float(torch.cat(parts).float().std())


def other_tokens(
    answered: Answered, first: Sequence[int], last: Sequence[int], seed: int
) -> Bool[Tensor, "prompt pos"]:
    """As many tokens as the subject has, drawn outside of it and of the last token; fewer where there are no more."""
    marked = torch.zeros(answered.tokens.shape, dtype=torch.bool)
    for row, (start, stop, length) in enumerate(zip(first, last, answered.lengths, strict=True)):
        free = [position for position in range(length - 1) if not start <= position <= stop]
        rng = derive_rng(seed, "causal_tracing", "other_tokens", answered.texts[row])
        marked[row, rng.permutation(free)[: stop - start + 1].astype(int)] = True
    return marked.to(answered.tokens.device)


def window_of(layer: int, width: int, n_layers: int) -> list[int]:
    """So many layers around one, fewer at both ends.

    >>> window_of(0, 3, 6), window_of(3, 4, 6)
    ([0, 1], [1, 2, 3, 4])
    """
    return list(range(max(0, layer - width // 2), min(n_layers, layer - width // 2 + width)))


def _window(model: HookedModel, window: int | None) -> int:
    return max(1, round(model.cfg.n_layers / 5)) if window is None else number_of_runs(window, "window", 1)


def _trace(named: pd.DataFrame, effects: NDArray[np.float64], seed: int) -> pd.DataFrame:
    """Means and intervals over the prompts that have each role; NaN of a role that fewer than two have."""
    columns = []
    for values in effects.T:
        own = values[~np.isnan(values)]
        low, high = bootstrap_interval(own, seed=seed) if len(own) > 1 else (np.nan, np.nan)
        columns.append((own.mean() if len(own) else np.nan, low, high, len(own)))
    return named.join(pd.DataFrame(columns, columns=["effect", "low", "high", "prompts"]))


def _findings(
    named: pd.DataFrame,
    clean: NDArray[np.float64],
    total: NDArray[np.float64],
    beside: NDArray[np.float64],
    effects: NDArray[np.float64],
    seed: int,
) -> tuple[dict[str, Finding], list[str]]:
    interval = bootstrap_interval(total, seed=seed)
    has_effect = interval[0] > _ROUNDING * abs(clean.mean())
    p = paired_permutation_pvalue(total - beside, seed=seed)
    answer = float(clean.mean())
    bound = bound_of("causal_tracing", "total_effect", {"other_tokens": float(beside.mean())}, of=answer)
    judged = verdict(interval, bound, p, minimum_units=MINIMUM_PROMPTS, units=len(total))
    findings = {
        "answer": Finding(clean.mean(), bootstrap_interval(clean, seed=seed)),
        "total_effect": Finding(
            total.mean(), interval, {"other_tokens": beside.mean()}, judged if has_effect else "not supported"
        ),
    }
    told = [
        f"total effect: noise on the subject takes {total.mean():.4g} ({interval[0]:.4g} to {interval[1]:.4g}) of "
        f"{clean.mean():.4g} away, noise on as many other tokens {beside.mean():.4g}"
        + ("" if has_effect else ". There is no total effect to trace: indirect effects below are of nothing")
    ]
    order = derive_rng(seed, "causal_tracing", "halves").permutation(len(total))
    found_on, held_out = order[: len(order) // 2], order[len(order) // 2 :]
    for kind in named["kind"].unique():
        of_kind = (named["kind"] == kind).to_numpy()
        allowed = of_kind & ~((kind == STATES) & (named["role"] == "last token").to_numpy())
        counted = allowed & (~np.isnan(effects[found_on])).any(axis=0) & (~np.isnan(effects[held_out])).any(axis=0)
        candidates = np.flatnonzero(counted)
        peak = candidates[np.argmax(np.nanmean(effects[found_on][:, candidates], axis=0))]
        judged_on, rest = held_out[~np.isnan(effects[held_out, peak])], np.setdiff1d(candidates, peak)
        own, others = effects[judged_on, peak], effects[judged_on][:, rest]
        elsewhere = np.nansum(others, axis=1) / np.maximum((~np.isnan(others)).sum(axis=1), 1)
        if len(own) < 2:
            told.append(f"{kind}_peak is absent: fewer than two prompts held out have a {named['role'][peak]}")
            continue
        interval, control = bootstrap_interval(own, seed=seed), float(elsewhere.mean())
        p = paired_permutation_pvalue(own - elsewhere, seed=seed)
        metric = f"{kind}_peak"
        bound = bound_of("causal_tracing", metric, {"elsewhere": control}, of=answer)
        judged = verdict(interval, bound, p, minimum_units=MINIMUM_PROMPTS, units=len(own))
        judged = judged if has_effect else "not supported"
        findings[metric] = Finding(own.mean(), interval, {"elsewhere": control}, judged)
        told.append(
            f"{kind}_peak is at layer {named['layer'][peak]}, {named['role'][peak]}: chosen on {len(found_on)} "
            f"prompts, judged on {len(own)} others"
        )
    return findings, told


def _long(named: pd.DataFrame, effects: NDArray[np.float64]) -> pd.DataFrame:
    prompt, cell = np.indices(effects.shape).reshape(2, -1)
    rows = named.iloc[cell].reset_index(drop=True)
    return rows.assign(prompt=prompt, effect=effects.ravel()).dropna(ignore_index=True)


def _figure(rows: pd.DataFrame, kind: str, measured: str) -> Any:
    what = {STATES: "the stream restored", "mlp": "MLPs restored", "attn": "attention restored"}[kind]
    return heatmap(
        rows.iloc[::-1].sort_values("layer", kind="stable"),
        "layer",
        "role",
        "effect",
        hover=["low", "high", "prompts"],
        title=f"Indirect effect: {what}",
        z_title=measured,
    )
