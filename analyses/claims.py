"""What every verdict asks for, decided beforehand: the controls that a metric must beat, and by how much.

An interval that clears its control by a hair says that an effect is there, not that it matters: of 49,152 tokens the
mean is known to three digits. A metric is therefore held against each named control plus (or, where less is claimed,
minus) the *smallest effect that matters*, and the whole interval has to lie beyond (a minimum-effect test, Murphy and
Myors 1999). A control that its interval covers is never beaten, however small the p.

Controls that stand beside a metric and are not named here have no part in its verdict; `why` says why not, where one
could expect it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

UNTRAINED = ("untrained", "untrained_2", "untrained_3")
"""The draws of the control ``untrained``, as frames and figures name them."""
QUICK_UNTRAINED = 2


@dataclass(frozen=True)
class Claim:
    """What the verdict on one metric asks for.

    Args:
        beats: the controls that it must exceed, or fall below.
        smallest: by how much at least, in units of the metric; with ``relative`` as a share of the control's size.
        beyond: a fixed value that it must exceed, or fall below, as well.
        below: that less is claimed: the metric must fall below them.
        share_of: the metric of the same result that ``smallest`` is a share of, instead of the control.
        why: why an obvious control is not among them.
    """

    beats: tuple[str, ...]
    smallest: float
    relative: bool = False
    beyond: float | None = None
    below: bool = False
    share_of: str = ""
    why: str = ""

    @property
    def sign(self) -> int:
        """1, or -1 where less is claimed and all values are negated."""
        return -1 if self.below else 1

    def bound(self, controls: Mapping[str, float], of: float = 1.0) -> float:
        """What the interval must lie above, all values negated where less is claimed: the hardest of the controls that
        there are, and of each draw of one. ``of``: the value of the metric that the smallest effect is a share of.

        >>> Claim(("untrained", "rotated_basis"), 0.05).bound({"untrained": 0.3, "rotated_basis": 0.2, "varimax": 0.9})
        0.35
        >>> Claim(("untrained",), 0.05).bound({"untrained": 0.3, "untrained_2": 0.5})
        0.55
        """
        there = [value for name, value in controls.items() if control_of(name) in self.beats]
        bounds = [self.sign * value + self.smallest * abs(value if self.relative else of) for value in there]
        bounds += [] if self.beyond is None else [self.sign * self.beyond]
        return float(np.max(bounds)) if bounds else -np.inf

    @property
    def amount(self) -> str:
        """The smallest effect that matters, for people."""
        if self.share_of:
            return f"{self.smallest:.0%} of {self.share_of}"
        return f"{self.smallest:.0%}" if self.relative else f"{self.smallest:g}"


_NULLS = ("shuffled_recipe", "gaussian", "untrained", "label_permutation")
_TURNED = ("rotated_basis", "untrained")
_DENSE = (*_TURNED, "gaussian")
_ALIKE = "the untrained model reads all words alike, so that nothing could be above it"
CLAIMS: dict[str, dict[str, Claim]] = {
    "recipe_atlas": {
        "valid_top_pairs": Claim((*_NULLS, "random_words"), 0.1),
        "codebook_purity": Claim((*_TURNED, "label_permutation"), 0.02),
    },
    "sparsity_profile": {
        "active_share": Claim(_DENSE, 0.1, relative=True, below=True),
        "usage_gini": Claim(
            ("rotated_basis",), 0.1, relative=True, below=True, why="independent entries use all signals evenly"
        ),
        "hoyer": Claim(_DENSE, 0.1, relative=True),
        "participation": Claim(_DENSE, 0.1, relative=True, below=True),
        "signal_kurtosis": Claim(_DENSE, 0.1, relative=True),
        "support_share": Claim(_DENSE, 0.1, relative=True, below=True),
    },
    "basis_geometry": {
        "effective_rank": Claim(("gaussian", "untrained"), 0.05, relative=True, below=True),
        "effective_rank_E": Claim(("gaussian", "untrained"), 0.05, relative=True, below=True),
        "coherence_mean": Claim(
            ("rotated_basis",), 0.1, relative=True, below=True, why="an untrained basis is orthogonal by making"
        ),
        "alignment_*": Claim(("random_direction", "untrained"), 0.05),
    },
    "semantic_galaxy": {
        "silhouette*": Claim(_NULLS, 0.01),
        "knn_accuracy": Claim(_NULLS, 0.05),
    },
    "semantic_algebra": {
        "accuracy_at_1": Claim(("c_alone", "a_plus_c", "shuffled_recipe", "untrained"), 0.05),
        "accuracy_at_1_E": Claim(("c_alone", "a_plus_c", "shuffled_recipe", "untrained"), 0.05),
        "recipe_minus_E": Claim((), 0.0, beyond=0.05),
    },
    "typo_resilience": {
        "final_cosine_*": Claim(("unrelated_word", "unrelated_misspelling"), 0.05, why=_ALIKE),
        "final_kl": Claim(("unrelated_word", "unrelated_misspelling"), 0.1, below=True, why=_ALIKE),
        "recovered_share": Claim(("unrelated_word", "unrelated_misspelling"), 0.05, why=_ALIKE),
    },
    "layer_evolution": {
        "crystallisation_share": Claim(("untrained",), 0.05),
        "crystallisation_delay": Claim(("shuffled_clause", "untrained"), 0.05),
    },
    "signal_flow": {
        "leading_share": Claim(_TURNED, 0.05),
        "neighbour_overlap": Claim(_TURNED, 0.05),
        "leading_since": Claim(_TURNED, 0.05, below=True),
    },
    "causal_ablation": {
        "remaining_after_one": Claim(_TURNED, 0.05, below=True),
        "knockout_area": Claim(_TURNED, 0.05),
        "sufficient_share": Claim(_TURNED, 0.05, below=True),
    },
    "emotion_surgery": {
        "best_flip_rate": Claim(
            ("shuffled_labels", "random_direction"), 0.05, why="of the untrained model the least push turns some words"
        ),
    },
    "concept_inception": {
        "closed_share": Claim(("untrained",), 0.05, beyond=0.5),
        "long_clause_delay": Claim(("untrained",), 0.05, beyond=0.0),
    },
    "genetic_hijack": {
        "sentiment_shift": Claim(("random_direction",), 0.05),
        "log_odds_shift": Claim(
            ("random_direction",), 0.1, why="what is shifted is read along in any tied model, an untrained one too"
        ),
        "silence_effect": Claim(("rotated_basis",), 0.05),
        "graft_effect": Claim(("rotated_basis",), 0.05),
    },
    "circuit_tracing": {
        "lifting_share_*": Claim(("random_direction",), 0.05),
        "replacement": Claim(("neurons", "random_features"), 0.05),
    },
}
"""Experiment -> metric, or a pattern of several, -> what its verdict asks for."""
_LEARNED = Claim(("nothing",), 0.01)
MEASURES: dict[str, dict[str, Claim]] = {
    "task_performance": {
        "accuracy": Claim(("chance", "other_prompt"), 0.05, why="the corrupted prompt may be another task"),
        "gap": Claim(("no_effect",), 0.1),
    },
    "minimal_pairs": {"accuracy*": Claim(("chance", "shorter"), 0.05)},
    "multiple_choice": {"accuracy_*": Claim(("chance", "without_question", "most_frequent_place"), 0.05)},
    "direct_logit_attribution": {"from_*": Claim(("shuffled_answers", "nothing"), 0.05, share_of="logit_diff")},
    "head_ablation": {"largest_drop": Claim(("random_direction", "nothing"), 0.05, share_of="logit_diff")},
    "activation_addition": {"effect": Claim(("random_direction", "shuffled_labels", "nothing"), 0.1)},
    "causal_tracing": {
        "total_effect": Claim(("other_tokens", "nothing"), 0.05, share_of="answer"),
        "*_peak": Claim(("elsewhere", "nothing"), 0.05, share_of="answer"),
    },
    "linear_probes": {
        "accuracy": Claim(
            ("majority", "embedding", "untrained"), 0.05, why="the control task is what selectivity is about"
        )
    },
    "function_vectors": {"injected_accuracy": Claim(("zero_shot", "random_heads", "shuffled_labels"), 0.05)},
    "head_patterns": {"*": Claim((), 0.0, beyond=0.05, why="the excess is over its control already")},
    "unit_statistics": {"*_firing_rate": Claim(("untrained",), 0.1, relative=True, below=True)},
    "group_controls": dict.fromkeys(("additive", "alike", "both"), Claim(("random groups",), 0.1)),
    "refinement": {
        "gate_interaction": Claim(("nothing",), 0.01, below=True),
        "learning_gain": _LEARNED,
        "own_text_gain": _LEARNED,
        "inner_generalisation": Claim(("shuffled",), 0.1, relative=True, beyond=0.0),
        "retrained_interaction": Claim(
            ("nothing",), 0.0004, below=True, why="runs of one configuration differ so much"
        ),
    },
    "claims_over_seeds": {"stable_share": Claim(("shuffled_claims",), 0.1)},
}
"""The same of measures that are no numbered experiments, by the names of their results. ``nothing`` is 0."""


def claim_of(experiment: str, metric: str) -> Claim | None:
    """What the verdict on a metric asks for; None for one that is not in the table, such as your own.

    >>> claim_of("circuit_tracing", "lifting_share_5").beats
    ('random_direction',)
    """
    known = (CLAIMS | MEASURES).get(experiment, {})
    pattern = next((name for name in known if fnmatchcase(metric, name)), None)
    return known.get(metric) or (known[pattern] if pattern else None)


def bound_of(experiment: str, metric: str, controls: Mapping[str, float], of: float = 1.0) -> float:
    """What the interval of a metric of an experiment, or measure, must lie beyond (`Claim.bound`)."""
    return _claim(experiment, metric).bound({"nothing": 0.0, **controls}, of)


def sign_of(experiment: str, metric: str) -> int:
    """1 where more of a metric is claimed, -1 where less is."""
    return _claim(experiment, metric).sign


def _claim(experiment: str, metric: str) -> Claim:
    claim = claim_of(experiment, metric)
    assert claim is not None, f"{experiment} judges {metric} without a claim"
    return claim


def untrained_names(experiment: str, quick: bool) -> tuple[str, ...]:
    """The draws of ``untrained`` that an experiment takes: three, of a quick run two; one where no verdict asks.

    A single draw can lie low by chance, and a difference from it shows no more than that: where a claim names the
    control, its verdict asks for the hardest of several (`joined_draws`).

    >>> untrained_names("signal_flow", quick=True), untrained_names("typo_resilience", quick=False)
    (('untrained', 'untrained_2'), ('untrained',))
    """
    asked = any(UNTRAINED[0] in claim.beats for claim in CLAIMS.get(experiment, {}).values())
    return UNTRAINED[: (QUICK_UNTRAINED if quick else len(UNTRAINED)) if asked else 1]


def control_of(draw: str) -> str:
    """The control that a draw of the untrained model is one of.

    >>> control_of("untrained_2"), control_of("untrained_long")
    ('untrained', 'untrained_long')
    """
    return re.sub(r"^untrained_\d+$", "untrained", draw)


def joined_draws(experiment: str, metric: str, controls: Mapping[str, float]) -> dict[str, float]:
    """Controls with the draws of the untrained model as one number: where the metric's claim names the control, the
    draw that is hardest to beat, which decides; otherwise their mean.

    >>> joined_draws("signal_flow", "leading_share", {"untrained": 0.3, "untrained_2": 0.2, "varimax": 0.9})
    {'untrained': 0.3, 'varimax': 0.9}
    """
    claim, by_control = claim_of(experiment, metric), dict[str, list[float]]()
    for name, value in controls.items():
        by_control.setdefault(control_of(name), []).append(value)

    def one(control: str, draws: list[float]) -> float:
        if len(draws) == 1 or claim is None or control not in claim.beats:
            return draws[0] if len(draws) == 1 else float(np.mean(draws))
        return min(draws) if claim.below else max(draws)

    return {control: one(control, draws) for control, draws in by_control.items()}
