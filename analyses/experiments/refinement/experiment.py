"""Refinement: what a model's two refiners do, and whether they help each other.

Two questions that are easily taken for one. Whether two refiners *trained together* depend on each other is seen in one
model, by switching each off (`gates`): it measures how far they have adapted to each other. Whether a model gains more
from both than from each *alone* is seen only in models trained with and without, over several seeds (`retrained`): one
run a cell cannot tell an interaction from the spread between runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from analyses.experiments.refinement.figures import refinement_figures
from analyses.experiments.refinement.gates import CELLS, cells_of, effects, gate_losses, refiners_of
from analyses.experiments.refinement.inner import (
    AS_IS,
    CONTROLS,
    NO_LEARNING,
    PREVIOUS,
    SHUFFLED,
    WRONG_WAY,
    inner_curves,
    inner_frame,
    learned,
    learning_losses,
)
from analyses.experiments.refinement.logits import STEPS, SUBSTEPS, logit_frame, step_losses
from analyses.experiments.refinement.retrained import (
    AS_TRAINED,
    PUBLISHED,
    PUBLISHED_INTERACTION,
    READING,
    design_losses,
    effect_frame,
    packed_name,
    read_grid,
    run_frame,
    weighted,
)
from analyses.experiments.refinement.texts import Losses, Texts, as_frame, mean_by_document, read_texts
from analyses.result.finding import Finding
from analyses.result.model_identity import hash_of
from analyses.result.result import Result
from analyses.statistics.draws import derive_seed
from analyses.statistics.intervals import Interval, bootstrap_interval
from analyses.statistics.pvalues import paired_permutation_pvalue
from analyses.statistics.verdicts import Verdict, verdict
from analyses.words.lexicon import Lexicon, load_lexicon
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel

MINIMUM_TEXTS, MINIMUM_SEEDS = 20, 5
DEFINITIONS = {
    "gate_interaction": "loss of the model − without flow − without TTT + without both, in nats a token, switched off "
    "in one trained model; below 0 where each takes more off the loss beside the other. Interval: documents "
    "resampled. Claim judged: below 0",
    "ttt_gain": "loss without TTT − loss of the model, nats a token. alone: the same where the flow is off too",
    "flow_gain": "loss without the flow − loss of the model, nats a token. alone: the same where TTT is off too",
    "learning_gain": "loss at an inner rate of 0 − loss of the model: what learning from the text itself takes off, "
    "nats a token. sign_flipped, previous_state: the same where the inner learner steps the wrong way, or begins with "
    "what another text has left. Claim judged: above 0",
    "inner_fit": "inner loss of a mini-batch before the step made from it − after, a mean over heads, texts and "
    "mini-batches but the first, whose step leads from W₁ to where all texts lead",
    "inner_generalisation": "the same of the mini-batch behind it, which the step has not seen. Claim judged: above 0 "
    "and above that of shuffled tokens",
    "best_step": "the step size τ of the flow with the least loss, among those tried; trained at 1",
    "retrained_interaction": "interaction of bits per byte of models trained with both − TTT − flow + neither, a mean "
    "over seeds. Interval: Student's t over seeds. Claim judged: below 0",
}


@torch.no_grad()
def refinement(
    model: HookedModel,
    texts: Sequence[str | Sequence[int]] | None = None,
    *,
    grid: str | Path | None = None,
    bits: int = 6,
    lexicon: Lexicon | None = None,
    seed: int = 0,
    quick: bool = False,
    progress: bool = False,
) -> Result:
    """Whether two refiners help each other, and what each does.

    `texts`: documents that the model was not trained on, text or token ids, each read from its beginning as far as the
    model reads; default the lexicon's neutral texts. `grid`: a folder of models trained with each refiner, both and
    neither over seeds (`read_grid`). `bits`: of the packed copies, on which losses are measured too. `quick`: the first
    quarter of the texts, at least two.

    Returns a Result with frames

    - `gates`: loss by which gates are open, and by weights (as trained, packed); `effects`: what these say;
    - `retrained`, `retrained_effects`: the same of the grid's models, beside `published`;
    - `inner`: the inner learner's losses by head and mini-batch, with its controls; `learning`: the model's in them;
    - `logits`: what each refiner adds to the logits before the cap; `steps`: loss by the flow's step;
    - `gains`: by position in the text, and by whether the token to predict has occurred before.

    Raises ReflowlensError for a model without refiners, fewer than two texts, or a grid without two whole seeds.

    Example: `refinement(model, documents, grid="out/ttt_flow_micro_grid").frames["retrained_effects"]`
    """
    ttt, flow = refiners_of(model)
    if ttt is None and flow is None:
        raise ReflowlensError(
            f"{model.cfg.model_name or model.cfg.architecture} has no refiners: a ttt_flow model with TTT or flow was "
            "expected"
        )
    documents = list(texts) if texts is not None else list((lexicon or load_lexicon()).neutral_texts)
    documents = documents[: max(2, len(documents) // 4)] if quick else documents
    read = read_texts(model, documents)
    own = derive_seed(seed, "refinement")
    found = _Found(read, seed)
    frames: dict[str, pd.DataFrame] = {}
    notes: list[str] = []

    gates = {weights: gate_losses(each, read) for weights, each in weighted(model, bits).items()}
    frames["gates"] = found.frame(gates, "cell")
    if len(gates[AS_TRAINED]) == len(CELLS):
        of_both = {weights: effects(cells) for weights, cells in gates.items()}
        frames["effects"] = found.frame(of_both, "effect")
        found.add_gates(of_both, packed_name(bits))
    else:
        notes.append("the model has one refiner: two are needed to ask whether they help each other")

    gains = {name: loss - gates[AS_TRAINED][cells_of(model)[-1]] for name, loss in _switched_off(gates[AS_TRAINED])}
    if ttt is not None:
        learning = learning_losses(model, read)
        frames["learning"] = found.frame({AS_TRAINED: learning}, "control")
        gains["learning"] = learning[NO_LEARNING] - learning[AS_IS]
        found.add_learning(learning)
        curves = inner_curves(model, read, own)
        frames["inner"] = inner_frame(curves)
        of_texts = {name: learned(each) for name, each in curves.items()}
        if len(of_texts[AS_IS]["generalisation"]):
            found.add_inner(of_texts)
        else:
            del frames["inner"]
            notes.append(f"no text has three mini-batches of {ttt.chunk} tokens: inner learning is not shown")
    frames["gains"] = _gains(gains, read, ttt.chunk if ttt is not None else 16, seed)
    frames["logits"] = logit_frame(model, read)
    if flow is not None:
        frames["steps"] = found.add_steps(step_losses(model, read))
    if grid is not None:
        checkpoints, left_out = read_grid(grid)
        held_out, sums = design_losses(checkpoints, documents, bits, progress)
        frames["retrained"] = run_frame(checkpoints, sums, held_out)
        frames["retrained_effects"] = effect_frame(sums, held_out, seed)
        frames["published"] = pd.DataFrame({"cell": list(PUBLISHED), "bits_per_byte": list(PUBLISHED.values())})
        found.add_retrained(frames["retrained_effects"], packed_name(bits))
        notes += [*left_out, READING]
    params: dict[str, Any] = {"texts": len(read.tokens), "tokens": int(read.lengths.sum()), "bits": bits}
    params |= {"grid": None if grid is None else str(grid), "seed": seed, "quick": quick, "model_hash": hash_of(model)}
    return Result(
        name="refinement",
        title="Refinement",
        params=params,
        findings=found.findings,
        frames=frames,
        figures=refinement_figures(frames),
        definitions=DEFINITIONS,
        published={"retrained_interaction": PUBLISHED_INTERACTION},
        notes=notes,
    )


class _Found:
    """The findings so far, all over the same texts."""

    def __init__(self, texts: Texts, seed: int) -> None:
        self.texts, self.seed, self.findings = texts, seed, dict[str, Finding]()

    def means(self, losses: Mapping[Any, Losses]) -> dict[Any, tuple[float, Interval]]:
        sums = {name: loss.sum(axis=1) for name, loss in losses.items()}
        return mean_by_document(sums, self.texts.lengths, self.seed)

    def frame(self, losses: Mapping[str, Mapping[str, Losses]], name: str) -> pd.DataFrame:
        """A row a weights and `name`, with "value", "low" and "high" in nats a token."""
        frames = (as_frame(self.means(each), name, weights=weights) for weights, each in losses.items())
        return pd.concat(frames, ignore_index=True)

    def add_gates(self, by_weights: Mapping[str, Mapping[str, Losses]], packed: str) -> None:
        found = {weights: self.means(each) for weights, each in by_weights.items()}
        trained, other = found[AS_TRAINED], found[packed]
        value, interval = trained["interaction"]
        judged = self.verdict(-by_weights[AS_TRAINED]["interaction"], _negated(interval))
        self.findings["gate_interaction"] = Finding(value, interval, {packed: other["interaction"][0]}, judged)
        for refiner, beside in (("ttt", "ttt_with_flow"), ("flow", "flow_with_ttt")):
            value, interval = trained[beside]
            controls = {"alone": -trained[f"{refiner}_alone"][0], packed: -other[beside][0]}
            self.findings[f"{refiner}_gain"] = Finding(-value, _negated(interval), controls)

    def add_learning(self, learning: Mapping[str, Losses]) -> None:
        gains = {name: learning[NO_LEARNING] - loss for name, loss in learning.items() if name != NO_LEARNING}
        means = self.means(gains)
        value, interval = means[AS_IS]
        controls = {name: means[name][0] for name in (WRONG_WAY, PREVIOUS)}
        self.findings["learning_gain"] = Finding(value, interval, controls, self.verdict(gains[AS_IS], interval))

    def add_inner(self, by_control: Mapping[str, Mapping[str, NDArray[np.float64]]]) -> None:
        for what in ("fit", "generalisation"):
            own = by_control[AS_IS][what]
            controls = {name: float(by_control[name][what].mean()) for name in CONTROLS}
            interval = bootstrap_interval(own, seed=self.seed) if len(own) > 1 else None
            judged = None
            if what == "generalisation" and interval is not None:
                p = paired_permutation_pvalue(own, seed=self.seed)
                least = max(0.0, controls[SHUFFLED])
                judged = verdict(interval, least, p, minimum_units=MINIMUM_TEXTS, units=len(own))
            self.findings[f"inner_{what}"] = Finding(float(own.mean()), interval, controls, judged)

    def add_steps(self, losses: Mapping[str, Losses]) -> pd.DataFrame:
        """The frame of steps: `kind`, `size`, and the loss less that of a step of 1."""
        means = self.means({name: loss - losses["step 1"] for name, loss in losses.items()})
        kinds = [*(("step", tau) for tau in STEPS), *(("substeps", n) for n in SUBSTEPS), ("velocity alone", 1.0)]
        frame = as_frame(means, "name").assign(
            kind=[kind for kind, _ in kinds], size=[float(size) for _, size in kinds]
        )
        best = min(STEPS, key=lambda tau: (means[f"step {tau:g}"][0], abs(tau - 1)))
        self.findings["best_step"] = Finding(best, controls={"trained": 1.0})
        return frame

    def add_retrained(self, effects: pd.DataFrame, packed: str) -> None:
        interactions = effects[effects["effect"] == "interaction"].set_index("weights")
        own: dict[Any, Any] = interactions.loc[AS_TRAINED].to_dict()
        judged = verdict(
            (-own["high"], -own["low"]),
            0.0,
            own["p"] / 2 if own["value"] < 0 else 1 - own["p"] / 2,
            minimum_units=MINIMUM_SEEDS,
            units=own["seeds"],
            published=-PUBLISHED_INTERACTION,
        )
        controls = {packed: cast(float, interactions.loc[packed, "value"])}
        self.findings["retrained_interaction"] = Finding(own["value"], (own["low"], own["high"]), controls, judged)

    def verdict(self, gain: Losses, interval: Interval) -> Verdict:
        """Of a claim that a gain is above 0, over documents."""
        by_text = gain.sum(axis=1) / self.texts.lengths
        p = paired_permutation_pvalue(by_text, seed=self.seed)
        return verdict(interval, 0.0, p, minimum_units=MINIMUM_TEXTS, units=len(by_text))


def _negated(interval: Interval) -> Interval:
    return Interval(-interval.high, -interval.low)


def _switched_off(cells: Mapping[str, Losses]) -> Iterable[tuple[str, Losses]]:
    """Losses without a refiner, by its name, and without any, as "both" where there are two."""
    if len(cells) < len(CELLS):
        return [(next(cell for cell in cells if cell != "none"), cells["none"])]
    return [("ttt", cells["flow"]), ("flow", cells["ttt"]), ("both", cells["none"])]


def _gains(gains: Mapping[str, Losses], texts: Texts, chunk: int, seed: int) -> pd.DataFrame:
    """A row a refiner and bin of positions, or of whether the target was seen before in the text."""
    places = np.arange(texts.tokens.shape[1])
    edges = [0, chunk]
    while edges[-1] < len(places):
        edges.append(2 * edges[-1])
    seen, is_read = texts.seen(), texts.is_read
    bins = [
        ("position", f"{start} to {stop - 1}", start, is_read & (start <= places) & (places < stop))
        for start, stop in itertools.pairwise(edges)
    ]
    bins += [("seen", "seen before", 1, seen), ("seen", "not seen", 0, is_read & ~seen)]
    parts = []
    for by, name, first, chosen in bins:
        if chosen.any():
            sums = {refiner: np.where(chosen, gain, 0).sum(axis=1) for refiner, gain in gains.items()}
            found = as_frame(mean_by_document(sums, chosen.sum(axis=1), seed), "refiner", by=by, bin=name)
            parts.append(found.assign(first=first, tokens=int(chosen.sum())))
    return pd.concat(parts, ignore_index=True)
