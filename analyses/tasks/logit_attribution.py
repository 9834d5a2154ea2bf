"""Direct logit attribution: what each head and MLP writes, in the direction of the answer.

The stream that is unembedded is the sum of what embedding, heads and MLPs have written, and the final norm divides it
by its length. With that divisor held at its value, the logit of the answer less that of the wrong one is a sum over
writers, exactly. Writing in the answer's direction is not causing the answer: later layers read what earlier ones
write, and the direct path leaves that out (:func:`analyses.head_ablation` does not).

The control asks the same of other tokens: what the same writers contribute to the difference of the answers of other
prompts. A component that writes "some capital city" contributes as much there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from analyses.claims import bound_of
from analyses.result.finding import Finding
from analyses.result.result import Result
from analyses.statistics.draws import derive_rng
from analyses.statistics.familywise import max_statistic_pvalues
from analyses.statistics.intervals import bootstrap_band, bootstrap_interval
from analyses.statistics.pvalues import permutation_pvalue
from analyses.statistics.verdicts import SIGNIFICANCE, verdict
from analyses.tasks.answered import (
    DEFINITIONS,
    MINIMUM_PROMPTS,
    Answered,
    Scores,
    numbers,
    performance_findings,
    performance_note,
    shown,
    some_prompts,
    task_params,
)
from analyses.tasks.by_group import group_figures, group_frames
from analyses.tasks.writers import Writers, check_heads_and_mlps, component_names, layers_by_writers
from reflowlens.arguments import number_of_runs
from reflowlens.errors import ReflowlensError
from reflowlens.figures.builders import bars
from reflowlens.models.base import HookedModel
from reflowlens.models.unwrapping import hooked_model
from reflowlens.progress import bar
from reflowlens.prompts import Prompts

SMALLEST = 0.05  # contribution that is counted, as a share of the logit difference
_LARGEST_ERROR = 1e-3  # of a sum, relative to its parts' sizes: beyond it a part is missing
_SHOWN = 20
JUDGED = ("from_heads", "from_mlps")
OWN_DEFINITIONS = {
    "from_embedding": "what the token embedding (and learned positions) contribute to logit_diff",
    "from_heads": "what all heads contribute together",
    "from_mlps": "what all MLPs contribute together, their output biases included",
    "from_biases": "what biases of attention, of the final norm and of the readout contribute together",
    "components_beyond_control": "how many heads and MLPs contribute a twentieth of logit_diff or more, and otherwise "
    f"than to the differences of other prompts' answers, family-wise p < {SIGNIFICANCE}",
    "sum_error": "largest difference between a prompt's logit difference and the sum of its contributions, as a share "
    "of the largest sum of their sizes",
}


def direct_logit_attribution(
    model: HookedModel,
    prompts: Prompts,
    *,
    draws: int = 200,
    seed: int = 0,
    quick: bool = False,
    progress: bool | None = None,
) -> Result:
    """What each head and MLP contributes to the logit of the answer less that of the wrong one (Elhage et al., 2021).

    A component that writes c into the last position's stream contributes ``(c / σ ⊙ w) · (U_a - U_b)``: σ and w are the
    final norm's divisor and weight, U_a and U_b the unembedding of both tokens; a LayerNorm centres c first.
    Without a column ``wrong_answer`` U_b is the mean over all tokens. Contributions of a prompt sum to its logit
    difference. One pass over the prompts.

    Args:
        model: a hooked model whose blocks are heads and MLPs.
        prompts: with columns ``clean`` and ``answer``; ``wrong_answer`` and ``group`` are used where they are.
        draws: of the control, in each of which every prompt is asked for the answers of another, other tokens than its
            own.
        quick: a third of the prompts and of the draws.

    Returns:
        A Result with frames ``components`` (a row a component: ``mean`` with ``low`` and ``high`` over prompts; the
        control's ``shuffled`` with the middle 95% of draws; ``p``, family-wise), ``contributions`` (a row a prompt and
        component) and ``prompts``; figures ``layers`` (layer × head) and ``strongest``; of prompts with groups a frame
        and figure ``groups`` too. The metrics begin with ``accuracy`` and ``logit_diff``.

    Raises:
        ReflowlensError: there are fewer than two prompts or no answers; logits of this model are no sums over what
            heads and MLPs write.

    Example: ``direct_logit_attribution(model, prompts).frames["components"].nlargest(5, "mean")``
    """
    hooked = hooked_model(model)
    check_heads_and_mlps(hooked, "direct logit attribution")
    hooked.check_reads_last_stream("contributions of heads and MLPs")
    chosen = some_prompts(prompts, quick, seed)
    answered = Answered.of(hooked, chosen)
    draws = max(20, number_of_runs(draws, "draws", 2) // (3 if quick else 1))
    pairs = _Pairs.of(answered)
    rng = derive_rng(seed, "direct_logit_attribution")
    shuffled = np.stack([pairs.shuffled(rng) for _ in range(draws)])
    named, batches = component_names(hooked, ends=True), list(answered.batches())
    parts = [
        _contributions(batch, pairs.direction, pairs.offset, shuffled[:, batch.rows], pairs.number[batch.rows])
        for batch in bar(batches, show=shown(progress), unit="batch", desc="direct logit attribution")
    ]
    own = np.concatenate([part.own for part in parts])
    null = np.concatenate([part.shuffled for part in parts], axis=1).mean(axis=1)
    uncapped = np.concatenate([part.logit_diff for part in parts])
    error = float(np.abs(own.sum(axis=1) - uncapped).max() / max(np.abs(own).sum(axis=1).max(), 1e-9))
    if error > _LARGEST_ERROR:
        raise ReflowlensError(
            f"contributions of a {type(hooked).__name__} do not sum to its logits (they miss {error:.1%}): something "
            "else than embedding, heads, MLPs and biases writes to its stream, or its readout is not linear"
        )
    scores = Scores(*map(torch.cat, zip(*(part.scores for part in parts), strict=True)))
    findings = performance_findings(scores, seed)
    notes = performance_note(findings, answered.wrong is not None) + pairs.notes
    difference = numbers(scores.logit_diff)
    if parts[0].is_capped:
        notes.append(
            f"the readout caps logits: contributions sum to the difference before the cap, {uncapped.mean():.4g} on "
            f"average, which it makes {difference.mean():.4g}"
        )
    frame = _component_frame(named, own, null, seed)
    findings |= _part_findings(named, own, null, seed)
    writers = frame["kind"].isin(["head", "mlp"])
    matters = frame["mean"].abs() >= SMALLEST * np.abs(uncapped.mean())
    findings["components_beyond_control"] = Finding(float((writers & matters & (frame["p"] < SIGNIFICANCE)).sum()))
    findings["sum_error"] = Finding(error)
    frames = {
        "components": frame,
        "contributions": _long(named, own),
        "prompts": _prompt_frame(chosen, scores.logit_diff, scores.correct, uncapped),
        **group_frames(chosen, {"logit_diff": difference, **_by_kind(named, own)}, seed),
    }
    return Result(
        name="direct_logit_attribution",
        title="Direct Logit Attribution",
        params=task_params(hooked, chosen, seed, quick, draws=draws, passes=len(chosen)),
        findings=findings,
        frames=frames,
        figures=_figures(frame) | group_figures(frames, "Contributions to the logit difference"),
        definitions=DEFINITIONS | OWN_DEFINITIONS,
        notes=notes,
    )


@dataclass(frozen=True, eq=False)
class _Pairs:
    """The pairs of tokens whose logits are compared: the direction of each in the normalised stream.

    Args:
        direction: [pair, d_model].
        offset: what biases of the final norm and of the readout add to each, [pair].
        number: which pair each prompt has, [prompt].
        tokens: which tokens each pair is of, whichever of them is the answer, [pair].
    """

    direction: Float[Tensor, "pair d_model"]
    offset: Float[Tensor, " pair"]
    number: NDArray[np.int64]
    tokens: NDArray[np.int64]
    notes: list[str]

    @classmethod
    def of(cls, answered: Answered) -> _Pairs:
        ids = answered.answer[:, None] if answered.wrong is None else torch.stack([answered.answer, answered.wrong], 1)
        distinct, number = ids.unique(dim=0, return_inverse=True)
        notes = []
        if len(distinct.sort(dim=1).values.unique(dim=0)) == 1:
            generator = torch.Generator().manual_seed(int(distinct.sum()))
            n_vocab = answered.model.tokenizer.n_vocab
            others = torch.randint(n_vocab, (50, ids.shape[1]), generator=generator).to(distinct)
            distinct = torch.cat([distinct, others])
            notes.append("all prompts are about the same tokens: the control is of random tokens of the vocabulary")
        tokens = distinct.sort(dim=1).values.unique(dim=0, return_inverse=True)[1]
        model, norm = answered.model, answered.model.ln_final
        rows, bias = model.unembedding_rows(distinct), model.b_U[distinct]
        if answered.wrong is None:
            n_vocab = model.tokenizer.n_vocab
            rows = rows[:, 0] - model.W_U[:, :n_vocab].mean(dim=1)
            bias = bias[:, 0] - model.b_U[:n_vocab].mean()
        else:
            rows, bias = rows[:, 0] - rows[:, 1], bias[:, 0] - bias[:, 1]
        rows = rows.float()
        offset = bias if norm.b is None else bias + rows @ norm.b.float()
        asked, same = number.cpu().numpy(), tokens.cpu().numpy()
        return cls((rows * norm.w).detach(), offset.detach(), asked, same, notes)

    def shuffled(self, rng: np.random.Generator) -> NDArray[np.int64]:
        """For each prompt another's pair, of other tokens: its own the other way round says nothing new."""
        own = self.tokens[self.number]
        pool = self.number if len(set(own)) > 1 else np.flatnonzero(self.tokens != own[0])
        drawn = rng.choice(pool, len(own))
        while (same := self.tokens[drawn] == own).any():
            drawn[same] = rng.choice(pool, same.sum())
        return drawn


@dataclass(frozen=True, eq=False)
class _Part:
    """Of a batch: contributions `own` [prompt, component] and `shuffled` [draw, prompt, component], and `logit_diff`
    before a cap [prompt]."""

    own: NDArray[np.float64]
    shuffled: NDArray[np.float64]
    logit_diff: NDArray[np.float64]
    scores: Scores
    is_capped: bool


@torch.no_grad()
def _contributions(
    batch: Answered,
    direction: Float[Tensor, "pair d_model"],
    offset: Float[Tensor, " pair"],
    shuffled: NDArray[np.int64],
    number: NDArray[np.int64],
) -> _Part:
    writers = Writers.at_last(batch)
    pair = torch.from_numpy(np.concatenate([number[None], shuffled])).to(direction.device)  # [1 + draw, prompt]
    parts = writers.normalised()
    # A component at a time: a draw's directions are as large as the stream.
    found = torch.stack([torch.einsum("mbd,bd->mb", direction[pair], part) for part in parts], dim=2)
    found[..., -1] += offset[pair]
    both = batch.answer[:, None] if batch.wrong is None else torch.stack([batch.answer, batch.wrong], dim=1)
    capped = batch.read(writers.final)
    readout = capped._replace(cap=None)
    logits = readout.logits_of(both[:, None])[:, 0].float()
    other = readout.logits()[:, 0, : batch.model.tokenizer.n_vocab].mean(1) if batch.wrong is None else logits[:, 1]
    return _Part(
        numbers(found[0]),
        numbers(found[1:]),
        numbers(logits[:, 0] - other),
        batch.scores(writers.final),
        capped.cap is not None,
    )


def _component_frame(
    named: pd.DataFrame, own: NDArray[np.float64], null: NDArray[np.float64], seed: int
) -> pd.DataFrame:
    low, high = bootstrap_band(own, seed=seed)
    shuffled_low, shuffled_high = np.quantile(null, [0.025, 0.975], axis=0)
    return named.assign(
        mean=own.mean(axis=0),
        low=low,
        high=high,
        shuffled=null.mean(axis=0),
        shuffled_low=shuffled_low,
        shuffled_high=shuffled_high,
        p=max_statistic_pvalues(own.mean(axis=0), null),
    )


def _by_kind(named: pd.DataFrame, contributions: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Metric -> what each kind of component contributes together, [row], of contributions [row, component]."""
    metrics = {"embedding": "from_embedding", "head": "from_heads", "mlp": "from_mlps", "bias": "from_biases"}
    return {
        metric: contributions[:, (named["kind"] == kind).to_numpy()].sum(axis=1) for kind, metric in metrics.items()
    }


def _part_findings(
    named: pd.DataFrame, own: NDArray[np.float64], null: NDArray[np.float64], seed: int
) -> dict[str, Finding]:
    """What each kind of component contributes together, beside the same of other prompts' answers."""
    findings, controls_of = {}, _by_kind(named, null)
    for metric, values in _by_kind(named, own).items():
        control = controls_of[metric]
        interval = bootstrap_interval(values, seed=seed)
        p = permutation_pvalue(float(values.mean()), control)
        controls = {"shuffled_answers": float(control.mean())}
        bound = bound_of("direct_logit_attribution", metric, controls, of=float(own.sum(axis=1).mean()))
        judged = verdict(interval, bound, p, minimum_units=MINIMUM_PROMPTS, units=len(values))
        findings[metric] = Finding(values.mean(), interval, controls, judged if metric in JUDGED else None)
    return findings


def _long(named: pd.DataFrame, own: NDArray[np.float64]) -> pd.DataFrame:
    prompt, component = np.indices(own.shape).reshape(2, -1)
    rows = named.iloc[component].reset_index(drop=True)
    return rows.assign(prompt=prompt, contribution=own.ravel())[["prompt", *named.columns, "contribution"]]


def _prompt_frame(prompts: Prompts, logit_diff: Tensor, correct: Tensor, uncapped: NDArray[np.float64]) -> pd.DataFrame:
    group = list(map(str, prompts.groups)) if "group" in prompts.frame else [""] * len(prompts)
    return pd.DataFrame(
        {
            "text": prompts.clean,
            "group": group,
            "logit_diff": numbers(logit_diff),
            "before_cap": uncapped,
            "correct": numbers(correct) > 0,
        }
    )


def _figures(frame: pd.DataFrame) -> dict[str, go.Figure]:
    strongest = frame.loc[frame["mean"].abs().nlargest(_SHOWN).index]
    beside = pd.concat(
        [
            strongest.assign(asked_of="answers"),
            strongest.assign(
                asked_of="shuffled_answers",
                mean=strongest["shuffled"],
                low=strongest["shuffled_low"],
                high=strongest["shuffled_high"],
            ),
        ]
    )
    return {
        "layers": layers_by_writers(
            frame, "mean", ["low", "high", "shuffled", "p"], "Contributions to the logit difference", "logits"
        ),
        "strongest": bars(
            beside,
            "component",
            "mean",
            "low",
            "high",
            color="asked_of",
            controls=("shuffled_answers",),
            horizontal=True,
            title="Largest contributions to the logit difference",
            y_title="logits",
        ),
    }
