"""Does the model do the task at all? Asked first, for what a circuit restores may be a failure.

On prompts with an answer: whether the answer is above the wrong one, whether it is the likeliest token, and by how much
the logit difference is larger than after the corrupted prompt. Each stands beside what would look the same without the
task: chance, the corrupted prompts, and the same pair of answers after another prompt of the set that asks for another
answer, which knows which answers are frequent and nothing of this prompt.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from scipy.stats import binomtest
from torch import Tensor

from analyses.claims import bound_of
from analyses.result.finding import Finding
from analyses.result.result import Result
from analyses.statistics.draws import derive_rng
from analyses.statistics.intervals import bootstrap_interval, rate_interval
from analyses.statistics.pvalues import paired_permutation_pvalue
from analyses.statistics.verdicts import verdict
from analyses.tasks.answered import (
    DEFINITIONS,
    MINIMUM_PROMPTS,
    Answered,
    Scores,
    numbers,
    performance_findings,
    performance_note,
    some_prompts,
    task_params,
)
from reflowlens.figures.builders import bars, histogram_with_control
from reflowlens.models.base import HookedModel
from reflowlens.models.unwrapping import hooked_model
from reflowlens.prompts import Prompts

_DRAWS = 10
OWN_DEFINITIONS = {
    "accuracy": DEFINITIONS["accuracy"] + ". other_prompt: the same answers after another prompt that has another "
    "answer, mean over draws; corrupted: after the corrupted one",
    "top1": "share of prompts whose answer is the likeliest token; controls as of accuracy",
    "gap": "logit_diff after the clean prompt less that after the corrupted one. Mean over prompts",
}


@torch.no_grad()
def task_performance(
    model: HookedModel, prompts: Prompts, *, seed: int = 0, quick: bool = False, progress: bool | None = None
) -> Result:
    """How well a model does on prompts with answers, against chance and against other prompts.

    Args:
        model: a hooked model.
        prompts: with columns ``clean`` and ``answer``; ``wrong_answer``, ``corrupted`` and ``group`` where there are
            such.
        seed: of resamples.
        quick: a third of the prompts.
        progress: taken for likeness with other measures; this one takes two or three passes.

    Returns:
        A Result with metrics ``accuracy`` and ``top1`` with exact intervals, ``logit_diff`` and ``gap`` with bootstrap
        intervals, of which ``accuracy`` and ``gap`` have verdicts: supported where the interval lies above chance and
        what the same answers get after prompts with other answers, by 0.05 (above 0 by 0.1), underpowered below 20
        prompts. Where all prompts have the same answers that control is left out. Where ``accuracy`` is not above
        chance a note says that nothing found on these prompts is about the task. Frames ``prompts``, a row a prompt,
        and ``groups``, a row a group, ``all`` first; figures ``groups`` and ``margins``.

    Raises:
        ReflowlensError: there are no answers, fewer than two prompts, or an answer is not a single token.

    Example: ``task_performance(model, rl.Prompts.read("capitals.jsonl")).metrics["accuracy"]``
    """
    hooked, chosen = hooked_model(model), some_prompts(prompts, quick, seed)
    clean = Answered.of(hooked, chosen)
    streams = _final_streams(clean)
    runs = {"clean": _read(clean, streams)}
    if (others := _others(clean, seed)) is not None:
        several = [_read(clean, streams[drawn]) for drawn in torch.from_numpy(others).to(streams.device)]
        runs["other_prompt"] = _Read(
            _joined([one.scores for one in several]), np.concatenate([r.top1 for r in several])
        )
    if "corrupted" in chosen.frame:
        texts = chosen.frame.assign(clean=chosen.corrupted).drop(columns="corrupted")
        corrupted = Answered.of(hooked, Prompts.of(texts))
        runs["corrupted"] = _read(corrupted, _final_streams(corrupted))
    scores = {name: run.scores for name, run in runs.items()}
    frame = _prompt_frame(chosen, scores)
    findings = performance_findings(scores["clean"], seed)
    findings["accuracy"] = _rate(scores, "correct", seed, chance=0.0 if clean.wrong is None else 0.5)
    frame["top1"] = top1 = runs["clean"].top1
    findings["top1"] = Finding(
        top1.mean(),
        rate_interval(top1, seed=seed),
        {name: run.top1.mean() for name, run in runs.items() if name != "clean"},
    )
    if "corrupted" in scores:
        findings["gap"] = _gap(frame["gap"].to_numpy(), seed)
    groups = _group_frame(frame, seed)
    return Result(
        name="task_performance",
        title="Does the Model Do the Task?",
        params=task_params(hooked, chosen, seed, quick),
        findings=findings,
        frames={"prompts": frame, "groups": groups},
        figures={
            "groups": bars(
                groups, "group", "accuracy", "low", "high", hover=["prompts"], title="Answer above wrong answer"
            ),
            "margins": _margins(scores),
        },
        definitions=DEFINITIONS | OWN_DEFINITIONS,
        notes=performance_note(findings, clean.wrong is not None),
    )


def _rate(scores: dict[str, Scores], name: str, seed: int, chance: float) -> Finding:
    """The share of prompts that are right, judged against the larger of chance and other prompts."""
    values = {run: numbers(getattr(of_run, name)) for run, of_run in scores.items()}
    own = values.pop("clean")
    controls = {"chance": chance} | {run: float(of_run.mean()) for run, of_run in values.items()}
    interval, bound = rate_interval(own, seed=seed), bound_of("task_performance", "accuracy", controls)
    p = binomtest(int(own.sum()), len(own), min(bound, 1.0), alternative="greater").pvalue
    told = verdict(interval, bound, float(p), minimum_units=MINIMUM_PROMPTS, units=len(own))
    return Finding(own.mean(), interval, controls, told)


def _gap(gap: NDArray[np.float64], seed: int) -> Finding:
    interval, p = bootstrap_interval(gap, seed=seed), paired_permutation_pvalue(gap, seed=seed)
    controls = {"no_effect": 0.0}
    bound = bound_of("task_performance", "gap", controls)
    told = verdict(interval, bound, p, minimum_units=MINIMUM_PROMPTS, units=len(gap))
    return Finding(gap.mean(), interval, controls, told)


class _Read(NamedTuple):
    """Scores of prompts, and whether the answer of each is above every other token, 0 or 1."""

    scores: Scores
    top1: NDArray[np.float64]


def _read(answered: Answered, streams: Float[Tensor, "prompt d_model"]) -> _Read:
    """What each prompt's answers get off the streams of its row, which may be other prompts'."""
    scores, top1 = [], []
    for batch in answered.batches():
        logits = batch.read(streams[list(batch.rows)]).logits()[:, 0]
        scores.append(batch.of_logits(logits))
        top1.append(dataclasses.replace(batch, wrong=None).of_logits(logits).correct)
    return _Read(_joined(scores), numbers(torch.cat(top1)))


def _joined(parts: list[Scores]) -> Scores:
    return Scores(*map(torch.cat, zip(*parts, strict=True)))


def _final_streams(answered: Answered) -> Float[Tensor, "prompt d_model"]:
    return torch.cat([batch.final() for batch in answered.batches()])


def _others(answered: Answered, seed: int) -> Int[np.ndarray, "draw prompt"] | None:
    """For each prompt, in each draw, another with another answer, or where all have one, with another wrong answer.

    None where all have the same: behind every prompt the answers are then its own.
    """
    asked = answered.answer
    if answered.wrong is not None and len(asked.unique()) < 2:
        asked = answered.wrong
    kind, count = (each.cpu().numpy() for each in asked.unique(return_inverse=True, return_counts=True)[1:])
    if len(count) < 2:
        return None
    order, size = np.argsort(kind, kind="stable"), count[kind]
    first = (np.cumsum(count) - count)[kind]  # of the prompt's own kind, in that order
    drawn = derive_rng(seed, "task_performance").integers(len(kind) - size, size=(_DRAWS, len(kind)))
    return order[drawn + np.where(drawn >= first, size, 0)]


def _prompt_frame(prompts: Prompts, scores: dict[str, Scores]) -> pd.DataFrame:
    columns = [name for name in ("clean", "corrupted", "answer", "wrong_answer", "group") if name in prompts.frame]
    frame = prompts.frame[columns].astype(str)
    own = scores["clean"]
    frame = frame.assign(logit_diff=numbers(own.logit_diff), loss=numbers(own.loss), correct=numbers(own.correct))
    if "corrupted" in scores:
        frame["corrupted_logit_diff"] = numbers(scores["corrupted"].logit_diff)
        frame["gap"] = frame["logit_diff"] - frame["corrupted_logit_diff"]
    return frame


def _group_frame(frame: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Accuracy by group; of a group of one prompt the interval is NaN."""
    named = {"all": frame} | (dict(list(frame.groupby("group", sort=False))) if "group" in frame else {})
    rows = []
    for name, part in named.items():
        several = len(part) > 1
        low, high = rate_interval(part["correct"], seed=seed) if several else (np.nan, np.nan)
        gap = part["gap"].mean() if "gap" in part else np.nan
        rows.append((name, len(part), part["correct"].mean(), low, high, part["logit_diff"].mean(), gap))
    return pd.DataFrame(rows, columns=["group", "prompts", "accuracy", "low", "high", "logit_diff", "gap"])


def _margins(scores: dict[str, Scores]) -> object:
    parts = [pd.DataFrame({"logit_diff": numbers(of.logit_diff), "run": run}) for run, of in scores.items()]
    controls = [run for run in scores if run != "clean"]
    frame = pd.concat(parts, ignore_index=True)
    return histogram_with_control(frame, "logit_diff", "run", controls=controls, title="Answer less wrong answer")
