"""What the measurements say: headline metrics with their controls, and what is judged of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analyses.claims import bound_of
from analyses.experiments.refinement.inner import AS_IS, CONTROLS, NO_LEARNING, PREVIOUS, SHUFFLED, WRONG_WAY
from analyses.experiments.refinement.logits import STEPS, SUBSTEPS
from analyses.experiments.refinement.retrained import AS_TRAINED, MINIMUM_SEEDS, PUBLISHED_INTERACTION
from analyses.experiments.refinement.texts import Losses, Texts, as_frame, mean_by_document
from analyses.experiments.refinement.untying import AFFINE, LINEAR, ROTATED_LINEAR, VELOCITY_ALONE
from analyses.experiments.refinement.velocity import ELSEWHERE
from analyses.result.finding import Finding
from analyses.statistics.intervals import Interval, bootstrap_interval
from analyses.statistics.pvalues import paired_permutation_pvalue
from analyses.statistics.verdicts import Verdict, verdict

MINIMUM_TEXTS = 20
VELOCITY = {
    "velocity_ratio": "ratio",
    "velocity_directions": "directions",
    "velocity_affine": "affine",
    "velocity_stretch": "stretch",
}
DEFINITIONS = {
    "gate_interaction": "loss of the model − without flow − without TTT + without both, in nats a token, switched off "
    "in one trained model; below 0 where each takes more off the loss beside the other. Interval: documents "
    "resampled. Claim judged: below 0 by 0.01",
    "ttt_gain": "loss without TTT − loss of the model, nats a token. alone: the same where the flow is off too",
    "flow_gain": "loss without the flow − loss of the model, nats a token. alone: the same where TTT is off too",
    "learning_gain": "loss at an inner rate of 0 − loss of the model: what learning from the text itself takes off, "
    "nats a token. sign_flipped, previous_state: the same where the inner learner steps the wrong way, or begins with "
    "what another text has left. Claim judged: above 0 by 0.01",
    "own_text_gain": "the lower one of the losses at an inner rate of 0 and begun with the state that another text has "
    "left − loss of the model: what only the text at hand can have taught. Claim judged: above 0 by 0.01",
    "inner_fit": "inner loss of a mini-batch before the step made from it − after, a mean over heads, texts and "
    "mini-batches but the first, whose step leads from W₁ to where all texts lead",
    "inner_generalisation": "the same of the mini-batch behind it, which the step has not seen. Claim judged: above 0 "
    "and above that of shuffled tokens by a tenth of it",
    "update_cosine": "cosine of successive steps of the inner learner, both behind the first. other_text: of a step "
    "and the one before it in another text: how alike steps are that have no text in common",
    "update_rank": "effective rank of W − W₁ behind the last whole mini-batch, per head: the exponential of the "
    "entropy of its singular values as shares",
    "planted_gain": "learning_gain on texts of pairs by a random mapping, at seconds of pairs whose first has been a "
    "first before; random: on pairs of random tokens, where there is nothing to learn",
    "velocity_ratio": "mean of ‖v‖ / ‖z‖ over tokens. rotated, shuffled_channels: at points that no text leads to",
    "velocity_directions": "effective number of directions that v varies in, the exponential of the entropy of its "
    "covariance's eigenvalues as shares; latent: the same of z",
    "velocity_affine": "share of the variance of v that an affine map of z gives, fitted on one half of the texts and "
    "measured on the other",
    "velocity_stretch": "mean over tokens of the largest singular value of ∂v/∂z; where it is below 1 everywhere, the "
    "flow's step can be undone",
    "untying_share": "share of what the flow takes off the loss that stays where v is the best affine map of z: what "
    "an output matrix of its own would have, the embedding plus a difference of the flow's rank. linear: without v. "
    "velocity: without z. rotated_linear: without v, a random rotation between D and U",
    "best_step": "the step size τ of the flow with the least loss, among those tried; trained at 1",
    "retrained_interaction": "interaction of bits per byte of models trained with both − TTT − flow + neither, a mean "
    "over seeds. Interval: Student's t over seeds. Claim judged: below 0 by 0.0004",
}


class Found:
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
        judged = self.verdict("gate_interaction", -by_weights[AS_TRAINED]["interaction"], _negated(interval))
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
        self.findings["learning_gain"] = Finding(
            value, interval, controls, self.verdict("learning_gain", gains[AS_IS], interval)
        )
        over = {name: learning[name] - learning[AS_IS] for name in (NO_LEARNING, PREVIOUS)}
        found = self.means(over)
        least = min(over, key=lambda name: found[name][0])
        value, interval = found[least]
        self.findings["own_text_gain"] = Finding(
            value, interval, {}, self.verdict("own_text_gain", over[least], interval)
        )

    def add_inner(self, by_control: Mapping[str, Mapping[str, NDArray[np.float64]]]) -> None:
        for what in ("fit", "generalisation"):
            own = by_control[AS_IS][what]
            controls = {name: float(by_control[name][what].mean()) for name in CONTROLS}
            interval = bootstrap_interval(own, seed=self.seed) if len(own) > 1 else None
            judged = None
            if what == "generalisation" and interval is not None:
                p = paired_permutation_pvalue(own, seed=self.seed)
                bound = bound_of("refinement", "inner_generalisation", controls)
                judged = verdict(interval, bound, p, minimum_units=MINIMUM_TEXTS, units=len(own))
            self.findings[f"inner_{what}"] = Finding(float(own.mean()), interval, controls, judged)
        known = {
            (control, what): by_control[control][what][np.isfinite(by_control[control][what])]
            for control in (AS_IS, SHUFFLED)
            for what in ("cosine", "cosine_other", "rank")
        }
        means = {key: float(values.mean()) for key, values in known.items() if len(values)}
        beside = {"cosine": {SHUFFLED: (SHUFFLED, "cosine"), "other_text": (AS_IS, "cosine_other")}}
        beside["rank"] = {SHUFFLED: (SHUFFLED, "rank")}
        for what, others in beside.items():
            if len(values := known[AS_IS, what]):
                interval = bootstrap_interval(values, seed=self.seed) if len(values) > 1 else None
                controls = {name: means[key] for name, key in others.items() if key in means}
                self.findings[f"update_{what}"] = Finding(means[AS_IS, what], interval, controls)

    def add_steps(self, losses: Mapping[str, Losses]) -> pd.DataFrame:
        """The frame of steps: `kind`, `size`, and the loss less that of a step of 1."""
        means = self.means({name: loss - losses["step 1"] for name, loss in losses.items()})
        kinds = [*(("step", tau) for tau in STEPS), *(("substeps", n) for n in SUBSTEPS)]
        frame = as_frame(means, "name").assign(
            kind=[kind for kind, _ in kinds], size=[float(size) for _, size in kinds]
        )
        best = min(STEPS, key=lambda tau: (means[f"step {tau:g}"][0], abs(tau - 1)))
        self.findings["best_step"] = Finding(best, controls={"trained": 1.0})
        return frame

    def add_velocity(self, velocity: pd.DataFrame) -> None:
        table: dict[Any, Any] = velocity.set_index(["measure", "input"]).to_dict("index")
        for metric, measure in VELOCITY.items():
            own = table[measure, AS_IS]
            controls = {name: table[measure, name]["value"] for name in ELSEWHERE}
            if measure == "directions":
                controls["latent"] = table["input_directions", AS_IS]["value"]
            interval = (own["low"], own["high"]) if np.isfinite(own["low"]) else None
            self.findings[metric] = Finding(own["value"], interval, controls)

    def add_untying(self, untying: pd.DataFrame) -> None:
        shares: dict[Any, Any] = untying.set_index("part").to_dict("index")
        affine = shares[AFFINE]
        if np.isfinite(affine["share"]):
            controls = {part: shares[part]["share"] for part in (LINEAR, VELOCITY_ALONE, ROTATED_LINEAR)}
            ends = (affine["share_low"], affine["share_high"])
            self.findings["untying_share"] = Finding(affine["share"], ends, controls)

    def add_planted(self, planted: pd.DataFrame) -> None:
        known = planted.query(f"control == '{AS_IS}' and at == 'known'")
        gain: dict[Any, Any] = known.set_index("text").to_dict("index")
        mapped, controls = gain["mapped"], {"random": gain["random"]["value"]}
        self.findings["planted_gain"] = Finding(mapped["value"], (mapped["low"], mapped["high"]), controls)

    def add_retrained(self, effects: pd.DataFrame, packed: str) -> dict[str, Any]:
        """The row of the interaction as trained."""
        interactions = effects[effects["effect"] == "interaction"].set_index("weights")
        own = cast("dict[str, Any]", interactions.loc[AS_TRAINED].to_dict())
        judged = verdict(
            (-own["high"], -own["low"]),
            bound_of("refinement", "retrained_interaction", {}),
            own["p"] / 2 if own["value"] < 0 else 1 - own["p"] / 2,
            minimum_units=MINIMUM_SEEDS,
            units=own["seeds"],
            published=-PUBLISHED_INTERACTION,
        )
        controls = {packed: cast(float, interactions.loc[packed, "value"])}
        self.findings["retrained_interaction"] = Finding(own["value"], (own["low"], own["high"]), controls, judged)
        return own

    def verdict(self, metric: str, gain: Losses, interval: Interval) -> Verdict:
        """Of a claim that a gain is above 0 by what matters (`analyses.claims`), over documents."""
        by_text = gain.sum(axis=1) / self.texts.lengths
        p = paired_permutation_pvalue(by_text, seed=self.seed)
        bound = bound_of("refinement", metric, {})
        return verdict(interval, bound, p, minimum_units=MINIMUM_TEXTS, units=len(by_text))


def _negated(interval: Interval) -> Interval:
    return Interval(-interval.high, -interval.low)
