"""Signal distillation: does a student that shares its teacher's basis have its signals?

A study of students of one teacher (`pretraining/studies/distillation.toml`), at equal tokens: without a teacher
(`none`), from its distribution (`logits`), and from its readout signals too, with a basis that is the teacher's and
`frozen`, the same `rotated` and frozen, the teacher's as a `start`, or the student's `own`.

What `rotated` controls. A student in the basis Q B learns from the teacher's signals in that basis, Q a. The space
that its signals span, inner products of streams and the teacher's logits are the same; the axes are others. Whatever a
frozen student has more of than a rotated one it owes to the teacher's single signals, not to the space. A vector of the
stream belongs to no axis: steering by it should carry over to both, and is measured beside.

What is measured of each student, with the teacher's signal s standing for the student's signal s (`number`), or for the
one whose recipe column is most alike (`recipe`; matched on one half of the frequent tokens and looked at on the other):

* the share of a signal's ten top words that both have; by chance, with signals paired at random;
* how far the signal that causes the teacher's prediction (experiment 9) causes the student's: 1 where it takes as many
  nats as the student's own most causal signal, 0 where it takes those of any signal;
* how far an edit of recipes (experiment 12) by the teacher's direction moves the student as its own direction does;
* the same of steering at the middle block (experiment 10), by the teacher's direction in signals and as a vector.

The rule, decided beforehand. The unit is the seed; students of one seed have the same first weights and batches and are
paired. A claim is *supported* if the 95% interval of the difference (Student's t) lies above the smallest effect that
matters and the p of its being 0, Holm-adjusted over all claims, is below 0.05; *not supported* if the interval lies
below that effect; otherwise, and with fewer than three seeds, *underpowered*. Smallest effects: 0.02 nats of held-out
loss, 0.1 of the top words, 0.2 of a share.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import plotly.graph_objects as go

from analyses.experiments.genetic_hijack.measure import Probe
from analyses.findings.runs import TrainedRun, measured_by, runs_table, trained_runs
from analyses.findings.seeds import Difference, measures_over_seeds, paired_difference
from analyses.findings.transfer import (
    Pairing,
    by_number,
    by_recipe,
    causal_transfer,
    codebook_agreement,
    edit_transfer,
    shuffled_agreement,
    steering_transfer,
)
from analyses.measures.sentiment import sentiment_poles
from analyses.result.finding import Finding
from analyses.result.result import Result
from analyses.statistics.pvalues import holm
from analyses.statistics.verdicts import SIGNIFICANCE, Verdict
from analyses.words.lexicon import Lexicon, load_lexicon
from reflowlens.errors import ReflowlensError
from reflowlens.figures.builders import bars
from reflowlens.models.base import HookedModel
from reflowlens.signals import SignalView, signal_view
from reflowlens.storage.model_hash import model_hash

MINIMUM_SEEDS = 3
LOSS, WORDS, SHARE = 0.02, 0.1, 0.2


class Claim(NamedTuple):
    """That an arm has more of a measure than another, by more than the smallest effect that matters."""

    measure: str
    arm: str
    against: str
    smallest: float
    definition: str


CLAIMS = {
    "logits_gain": Claim(
        "gain", "logits", "none", LOSS, "held-out loss without a teacher minus that with its distribution, in nats"
    ),
    "signals_gain": Claim(
        "gain", "frozen", "logits", LOSS, "held-out loss from logits minus that from signals in the frozen basis too"
    ),
    "basis_gain": Claim(
        "gain", "frozen", "own", LOSS, "held-out loss in a basis of the student's own minus that in the teacher's"
    ),
    "codebook": Claim(
        "codebook_number", "frozen", "rotated", WORDS, "share of a signal's ten top words, frozen minus rotated basis"
    ),
    "causal": Claim(
        "causal_number_share", "frozen", "rotated", SHARE, "share of the causal signals' effect, frozen minus rotated"
    ),
    "edit": Claim("edit_number_share", "frozen", "rotated", SHARE, "share of an edit's effect, frozen minus rotated"),
    "steering": Claim(
        "steering_number_share", "frozen", "rotated", SHARE, "share of steering in signals, frozen minus rotated"
    ),
    "signals_loss": Claim(
        "causal_number_share",
        "own",
        "logits",
        SHARE,
        "share of the causal signals' effect, with the signals' loss in a basis of the student's own minus without it",
    ),
    "shared_basis": Claim(
        "causal_number_share",
        "frozen",
        "own",
        SHARE,
        "share of the causal signals' effect, teacher's frozen basis "
        "minus the student's own, both with the signals' loss",
    ),
}


def distillation(
    study: str | Path,
    teacher: HookedModel,
    *,
    lexicon: Lexicon | None = None,
    quick: bool = True,
    progress: bool | None = None,
) -> Result:
    """Whether students have their teacher's signals, by arm.

    Args:
        study: what `reflowlens study distillation` wrote.
        teacher: of its students.
        quick: a third of the prompts and half of the carriers.

    Returns a Result with a metric a claim, the difference between two arms over seeds, and frames `runs` (a row a
    student), `by_arm` (means over seeds with intervals) and `differences`, and figures `loss`, `codebooks`, `transfer`.

    Raises ReflowlensError if the teacher has no signals or not the students' vocabulary, or as `trained_runs` does.

    Example: `distillation("out/distillation", rl.load_model("reflow-nano")).frames["by_arm"]`
    """
    lexicon, theirs, identity = lexicon or load_lexicon(), signal_view(teacher, "native"), model_hash(teacher)

    def measure(student: HookedModel, run: TrainedRun) -> Mapping[str, float]:
        return transfer(student, theirs, lexicon, quick=quick)

    name = f"transfer_{'quick' if quick else 'full'}_{identity[:8]}"
    found = measured_by(study, name, measure, progress=progress)
    losses = {(run.arm, run.seed): run.val_loss for run in trained_runs(study)}
    found["val_loss"] = [losses[arm, seed] for arm, seed in zip(found["arm"], found["seed"], strict=True)]
    found["gain"] = -found["val_loss"]
    differences = differences_of(found)
    by_arm = measures_over_seeds(found, [name for name in found.columns if name not in _KEYS])
    findings, notes = _findings(differences, by_arm)
    complete = runs_table(study)["complete"]
    if not complete.all():
        notes.append(f"{(~complete).sum()} of {len(complete)} runs are not complete and left out")
    return Result(
        name="distillation",
        title="Signal distillation",
        params={"teacher": teacher.cfg.model_name, "teacher_hash": identity, "quick": quick, "seed": 0},
        findings=findings,
        frames={"runs": found.drop(columns="gain"), "by_arm": by_arm, "differences": differences},
        figures=_figures(by_arm),
        definitions={name: f"{claim.definition}; over seeds" for name, claim in CLAIMS.items()},
        notes=notes,
    )


_KEYS = ("arm", "seed", "gain")


def transfer(student: HookedModel, theirs: SignalView, lexicon: Lexicon, *, quick: bool = True) -> dict[str, float]:
    """All that is measured of a student.

    `codebook_PAIRING` and `codebook_shuffled`; of `causal_PAIRING`, `edit_PAIRING`, `steering_PAIRING` and
    `steering_vector` (where both streams are as wide) `_teacher`, `_own`, `_random` and `_share`; PAIRING is `number`
    or `recipe`.

    Raises ReflowlensError if the student has no signals, not as many, or another vocabulary.
    """
    ours, teacher = signal_view(student, "native"), theirs.model
    for field in ("tokenizer_name", "n_signals"):
        if getattr(student.cfg, field) != getattr(teacher.cfg, field):
            raise ReflowlensError(
                f"a student shares its teacher's {field}, which is {getattr(teacher.cfg, field)!r}, and this has "
                f"{getattr(student.cfg, field)!r}"
            )
    training, heldout = sentiment_poles(student, lexicon, "distillation")
    tokens = [
        student.to_single_token(f" {word}")
        for word in lexicon.sentiment.subjects
        if student.tokenizer.is_single_token(f" {word}")
    ]
    carriers = [
        text for text in lexicon.sentiment.prompts if not set(tokens).isdisjoint(student.tokenizer.encode(text))
    ]
    carriers = carriers[:: 2 if quick else 1]
    prompts = [item.prompt for item in lexicon.factual][:: 3 if quick else 1]
    probe = Probe(student, carriers, heldout, lexicon.neutral_texts[:1])
    own, of_teacher = training.direction(ours), training.direction(theirs)
    found = {"codebook_shuffled": shuffled_agreement(ours, theirs, 0)}
    vectors = {}
    pairings: dict[str, Pairing] = {"number": by_number(theirs.n_signals), "recipe": by_recipe(ours, theirs)}
    for name, pairing in pairings.items():
        carried = pairing.carried_over(of_teacher)
        vectors[f"steering_{name}"] = ours.write(carried)
        found[f"codebook_{name}"] = float(codebook_agreement(ours, theirs, pairing).mean())
        found |= _named(causal_transfer(ours, theirs, pairing, prompts), "causal", name)
        found |= _named(edit_transfer(probe, tokens, own, carried, ours), "edit", name)
    if student.cfg.d_model == teacher.cfg.d_model:
        vectors["steering_vector"] = theirs.write(of_teacher)
    return found | steering_transfer(ours, carriers, heldout, ours.write(own), vectors)


def _named(found: Mapping[str, float], kind: str, pairing: str) -> dict[str, float]:
    return {key.replace(kind, f"{kind}_{pairing}", 1): value for key, value in found.items()}


def differences_of(found: pd.DataFrame) -> pd.DataFrame:
    """A row a claim whose arms there are: `claim`, `measure`, `arm`, `against`, the paired difference's `mean`, `low`,
    `high` and `seeds`, its Holm-adjusted `p` and the `verdict`."""
    rows = []
    for name, claim in CLAIMS.items():
        if claim.measure not in found:
            continue
        measured = found.dropna(subset=[claim.measure])
        seeds = [set(measured.loc[measured["arm"] == arm, "seed"]) for arm in (claim.arm, claim.against)]
        if set.intersection(*seeds):
            rows.append((name, claim, paired_difference(measured, claim.arm, claim.against, claim.measure)))
    tested = [name for name, _, difference in rows if not math.isnan(difference.p)]
    adjusted = dict(zip(tested, holm([d.p for name, _, d in rows if name in tested]) if tested else [], strict=True))
    return pd.DataFrame(
        [
            {
                "claim": name,
                "measure": claim.measure,
                "arm": claim.arm,
                "against": claim.against,
                **difference._asdict(),
                "p": adjusted.get(name, math.nan),
                "smallest": claim.smallest,
                "verdict": claim_verdict(difference, claim.smallest, adjusted.get(name, math.nan)),
            }
            for name, claim, difference in rows
        ]
    )


def claim_verdict(difference: Difference, smallest: float, p: float) -> Verdict:
    """The rule at the top of this module.

    >>> claim_verdict(Difference(0.5, 0.4, 0.6, 0.001, 3), 0.2, 0.01)
    'supported'
    """
    if difference.seeds < MINIMUM_SEEDS:
        return "underpowered"
    if difference.low > smallest and p < SIGNIFICANCE:
        return "supported"
    return "not supported" if difference.high < smallest else "underpowered"


def _findings(differences: pd.DataFrame, by_arm: pd.DataFrame) -> tuple[dict[str, Finding], list[str]]:
    """A finding a claim, with both arms' means beside it, and what was left out."""
    means = {(row["measure"], row["arm"]): float(row["mean"]) for row in by_arm.to_dict("records")}
    findings = {}
    for row in differences.to_dict("records"):
        measure = "val_loss" if row["measure"] == "gain" else row["measure"]
        controls = {row["against"]: means[measure, row["against"]], row["arm"]: means[measure, row["arm"]]}
        interval = None if math.isnan(row["low"]) else (row["low"], row["high"])
        findings[row["claim"]] = Finding(row["mean"], interval, controls, row["verdict"])
    left_out = [name for name in CLAIMS if name not in findings]
    notes = [f"not measured in two arms of a seed: {', '.join(left_out)}"] if left_out else []
    few = [row["claim"] for row in differences.to_dict("records") if row["seeds"] < MINIMUM_SEEDS]
    if few:
        notes.append(f"fewer than {MINIMUM_SEEDS} seeds, which decide nothing: {', '.join(few)}")
    return findings, notes


def _figures(by_arm: pd.DataFrame) -> dict[str, go.Figure]:
    def of(measures: Sequence[str], title: str, y_title: str, controls: Sequence[str] = ()) -> go.Figure:
        rows = by_arm[by_arm["measure"].isin(measures)]
        low, high = ("low", "high") if rows["low"].notna().all() else (None, None)
        return bars(
            rows, "arm", "mean", low, high, "measure", controls=controls, title=title, x_title="arm", y_title=y_title
        )

    shares = [name for name in by_arm["measure"].unique() if name.endswith("_share")]
    books = ["codebook_number", "codebook_recipe", "codebook_shuffled"]
    return {
        "loss": of(["val_loss"], "Held-out loss of students", "nats a token"),
        "codebooks": of(books, "Top words that student and teacher share", "share of ten", ["codebook_shuffled"]),
        "transfer": of(shares, "What the teacher's signals and edits do to students", "share of the student's own"),
    }
