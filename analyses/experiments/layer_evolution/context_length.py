"""How the depth at which a prediction is settled depends on the length of what stands before it.

The lexicon's long prompts are its short ones behind a subordinate clause. Each is read with the last 0, 1, 2, 4, 8 and
16 words of its clause before the sentence, and the lens says from which depth on the final token is the most probable
one. The sentence, and so the place where the prediction is made, stays the same.

Two controls stand beside it. ``shuffled_clause``: the same words before the sentence, the clause's order lost: what
length alone does. ``untrained``: the same architecture at initialisation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from numpy.typing import NDArray

from analyses.claims import UNTRAINED, bound_of, control_of
from analyses.controls.nulls import over_untrained
from analyses.measures.lens import depths_of, lens_points, readers, residual_stack, top_tokens
from analyses.result.finding import Finding
from analyses.statistics.draws import derive_rng
from analyses.statistics.intervals import bootstrap_interval
from analyses.statistics.pvalues import paired_permutation_pvalue
from analyses.statistics.verdicts import verdict
from analyses.words.lexicon import Lexicon
from reflowlens.figures.builders import line_with_band
from reflowlens.signals import SignalView

CLAUSE_WORDS = (0, 1, 2, 4, 8, 16)
MINIMUM_PROMPTS = 20
DELAY = "crystallisation_delay"
CONTROLS = ("shuffled_clause", *UNTRAINED)
DEFINITION = (
    "crystallisation share behind the most words of a subordinate clause that all prompts have and the model can read, "
    "less that of the same sentence alone; mean over prompts. Published: as late as layer 28 of 36 behind long "
    "clauses, against 18"
)


def read_context(view: SignalView, lexicon: Lexicon, seed: int, *, quick: bool = False) -> pd.DataFrame | None:
    """The frame ``context`` of the lexicon's sentences (`context_frame`); None without two pairs of a sentence and its
    clause that fit into the model's context.

    Example: `context_figure(read_context(view, load_lexicon(), seed=0), seed=0)`
    """
    pairs = clauses(lexicon.short_prompts, lexicon.long_prompts)
    longest = min((len(clause) for clause, _ in pairs), default=0)
    prompts = context_prompts(pairs, [count for count in CLAUSE_WORDS if count <= longest], seed)
    prompts = {count: series for count, series in prompts.items() if _fit(view, series)}
    return None if len(pairs) < 2 or len(prompts) < 2 else context_frame(view, prompts, seed, quick=quick)


def delay_finding(frame: pd.DataFrame, seed: int) -> tuple[Finding, str]:
    """``crystallisation_delay`` of a frame ``context``, and a note.

    Claim: a long clause settles predictions later, more than as many words in no order do. Supported if the interval of
    the delay lies above those of ``shuffled_clause`` and of each ``untrained`` draw by 0.05, and the sign-flip tests
    of its difference from any over prompts have p < 0.05 (all must hold, so that the largest p needs no correction;
    Berger 1982); underpowered with fewer than 20 prompts (`analyses.statistics.verdict`).
    """
    values = delays(frame)
    own = values["model"]
    interval = bootstrap_interval(own, seed=seed)
    others = {name: values[name] for name in CONTROLS if name in values}
    pvalues = {name: paired_permutation_pvalue(own - other, seed=seed) for name, other in others.items()}
    controls = {name: float(other.mean()) for name, other in others.items()}
    bound, p = bound_of("layer_evolution", DELAY, controls), max(pvalues.values())
    judged = verdict(interval, bound, p, minimum_units=MINIMUM_PROMPTS, units=len(own))
    largest: dict[str, float] = {}
    for name, each in pvalues.items():
        largest[control_of(name)] = max(each, largest.get(control_of(name), 0.0))
    told = ", ".join(f"{each:.2g} against {name}" for name, each in largest.items())
    return Finding(own.mean(), interval, controls, judged), f"{DELAY}: sign-flip p = {told}; {len(own)} prompts"


def clauses(short_prompts: Sequence[str], long_prompts: Sequence[str]) -> list[tuple[list[str], str]]:
    """Each short prompt with the words that its long one has before it; a pair that does not end alike is left out.

    >>> clauses(["He saw a"], ["When it rained, he saw a"])
    [(['When', 'it', 'rained,'], 'he saw a')]
    """
    found = []
    for short, long in zip(short_prompts, long_prompts, strict=False):
        clause, sentence = long[: len(long) - len(short)], long[len(long) - len(short) :]
        if sentence.lower() == short.lower() and clause.strip():
            found.append((clause.split(), sentence))
    return found


def context_prompts(
    pairs: Sequence[tuple[list[str], str]], counts: Sequence[int], seed: int
) -> dict[int, dict[str, list[str]]]:
    """Number of words -> the sentences behind that many last words of their clauses: "model" in the clause's order,
    "shuffled_clause" in a random one."""
    order = derive_rng(seed, "shuffled_clause")
    prompts = {}
    for count in counts:
        words = [(clause[len(clause) - count :], sentence) for clause, sentence in pairs]
        prompts[count] = {
            "model": [" ".join([*shown, sentence]) for shown, sentence in words],
            "shuffled_clause": [" ".join([*order.permutation(shown).tolist(), sentence]) for shown, sentence in words],
        }
    return prompts


def context_frame(
    view: SignalView, prompts: Mapping[int, Mapping[str, Sequence[str]]], seed: int, *, quick: bool
) -> pd.DataFrame:
    """A row a series ("model" and the controls), number of words and sentence: ``crystallisation_share``."""

    def of_series(through: SignalView, kind: str) -> pd.DataFrame:
        frames = []
        for count, series in prompts.items():
            shares = crystallisation_shares(through, series[kind])
            columns = {"prompt": series[kind], "sentence": range(len(shares)), "crystallisation_share": shares}
            frames.append(pd.DataFrame({"words": count, **columns}))
        return pd.concat(frames)

    frames = {kind: of_series(view, kind) for kind in ("model", "shuffled_clause")}
    frames |= over_untrained(lambda fresh: of_series(fresh, "model"), view, seed, "layer_evolution", quick=quick)
    return pd.concat([frame.assign(series=name) for name, frame in frames.items()], ignore_index=True)


@torch.no_grad()
def crystallisation_shares(view: SignalView, prompts: Sequence[str]) -> NDArray[np.float64]:
    """For each prompt the first point from which the final top-1 token stays top-1, as a share of the depth.

    Read from the end back, each prompt until its top-1 token is another one.
    """
    points = lens_points(view.model.cfg.n_layers)
    stack = residual_stack(view.model, list(prompts), points=points)
    *through, end = readers(view, len(points))
    final = top_tokens(end, stack[-1])
    first = torch.full_like(final, len(points) - 1)
    settled = torch.arange(len(final), device=final.device)
    for point, lens in reversed(list(enumerate(through))):
        settled = settled[top_tokens(lens, stack[point, settled]) == final[settled]]
        if not len(settled):
            break
        first[settled] = point
    return depths_of(points)[first.cpu().numpy()] / points[-1].depth


def delays(frame: pd.DataFrame) -> dict[str, NDArray[np.float64]]:
    """Series -> for each sentence its share behind the most words less that behind none."""
    found = {}
    for name, part in frame.groupby("series", sort=False):
        table = part.pivot(index="sentence", columns="words", values="crystallisation_share")
        found[str(name)] = (table.iloc[:, -1] - table.iloc[:, 0]).to_numpy()
    return found


def context_figure(frame: pd.DataFrame, seed: int) -> go.Figure:
    """Means over sentences with bootstrap intervals against the number of words before them."""
    rows = []
    for (name, count), part in frame.groupby(["series", "words"], sort=False):
        low, high = bootstrap_interval(part["crystallisation_share"], seed=seed)
        mean = part["crystallisation_share"].mean()
        rows.append({"series": name, "words": count, "share": mean, "low": low, "high": high})
    return line_with_band(
        pd.DataFrame(rows),
        "words",
        "share",
        "low",
        "high",
        color="series",
        controls=CONTROLS,
        title="Where predictions crystallise, by what stands before the sentence",
        x_title="words of a clause before the sentence",
        y_title="share of the depth",
    )


def _fit(view: SignalView, series: Mapping[str, Sequence[str]]) -> bool:
    """Whether the model's context has room for all of the prompts."""
    model = view.model
    room = model.cfg.n_ctx - len(model.text_start())
    return all(len(model.tokenizer.encode(prompt)) <= room for prompts in series.values() for prompt in prompts)
