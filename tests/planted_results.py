"""The planted results: what the experiments find in models whose answers are known, beside these answers.

    python -m tests.planted_results

Each case is an experiment on a model of `tests.support.planted`, with what it must find there and how nearly. The
experiments' own tests assert the same cases.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import pandas as pd
import torch
from tqdm import tqdm

from analyses.experiments.basis_geometry.experiment import basis_geometry
from analyses.experiments.causal_ablation.experiment import causal_ablation
from analyses.experiments.circuit_tracing.experiment import circuit_tracing
from analyses.experiments.concept_inception.experiment import concept_inception
from analyses.experiments.emotion_surgery.experiment import emotion_surgery
from analyses.experiments.genetic_hijack.experiment import genetic_hijack
from analyses.experiments.layer_evolution.experiment import layer_evolution
from analyses.experiments.recipe_atlas.experiment import recipe_atlas
from analyses.experiments.semantic_algebra.experiment import semantic_algebra
from analyses.experiments.semantic_galaxy.experiment import semantic_galaxy
from analyses.experiments.signal_flow.experiment import signal_flow
from analyses.experiments.sparsity_profile.experiment import sparsity_profile
from analyses.experiments.typo_resilience.experiment import typo_resilience
from analyses.registry import EXPERIMENTS
from analyses.result.result import Result
from reflowlens.models.base import HookedModel
from tests.support import planted

COLUMNS = ["experiment", "model", "quantity", "expected", "found", "tolerance", "ok"]


@dataclass(frozen=True)
class Expected:
    """A number within an absolute tolerance, or a text."""

    quantity: str
    value: float | str
    tolerance: float
    found: Callable[[Result], float | str]

    def holds(self, result: Result) -> bool:
        found = self.found(result)
        if isinstance(self.value, str) or isinstance(found, str):
            return found == self.value
        return abs(found - self.value) <= self.tolerance


@dataclass(frozen=True)
class Case:
    """An experiment, a model of `tests.support.planted`, and what the one finds in the other."""

    experiment: str
    model: partial[HookedModel]
    measure: Callable[[HookedModel], Result]
    expected: Sequence[Expected]

    def run(self) -> Result:
        return self.measure(self.model())


def metric(name: str, value: float, tolerance: float = 0.0) -> Expected:
    return Expected(name, value, tolerance, lambda result: result.metrics[name])


def verdict(name: str, value: str) -> Expected:
    return Expected(f"verdict of {name}", value, 0.0, lambda result: result.verdicts[name])


def missed(result: Result, expected: Iterable[Expected]) -> list[str]:
    """What was expected and not found, a sentence each."""
    return [
        f"{each.quantity}: {each.value} ± {each.tolerance} was expected, found {each.found(result)}"
        for each in expected
        if not each.holds(result)
    ]


def table_of(cases: Iterable[tuple[Case, Result]]) -> pd.DataFrame:
    """A row a case and expectation."""
    rows = [
        (*case_of, each.quantity, each.value, each.found(result), each.tolerance, each.holds(result))
        for case, result in cases
        for case_of in [(case.experiment, case.model.func.__name__)]
        for each in case.expected
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


# -- what is planted, by experiment -----------------------------------------------------------------------------------

CATEGORY_COSINE = 1 / (1 + 32 * planted.CATEGORY_NOISE**2)  # of two words of a category in a `category_model`


def _category_cosine(same: bool) -> Callable[[Result], float]:
    def mean(result: Result) -> float:
        pairs = result.frames["similarity"]
        return float(pairs.loc[(pairs["category"] == pairs["other"]) == same, "cosine"].mean())

    return mean


def _planted_purity(result: Result) -> float:
    return float(result.frames["codebooks"].query("sign == 1 and signal < 8")["purity"].min())


ATLAS_LEXICON = planted.category_lexicon(8)
ATLAS = Case(
    "recipe_atlas",
    partial(planted.category_model, ATLAS_LEXICON),
    lambda model: recipe_atlas(model, lexicon=ATLAS_LEXICON, quick=True, rotations=4),
    (
        metric("valid_top_pairs", 1),
        verdict("valid_top_pairs", "supported"),
        Expected("mean cosine within a category", CATEGORY_COSINE, 0.02, _category_cosine(True)),
        Expected("mean cosine between categories", 0, 0.02, _category_cosine(False)),
        Expected("purity of the categories' codebooks, least", 1, 1e-6, _planted_purity),
        metric("jaccard_at_10", 1, 0.01),  # the basis is orthogonal
    ),
)

ACTIVE = 3
SPARSITY = Case(
    "sparsity_profile",
    partial(planted.sparse_model, ACTIVE),
    lambda model: sparsity_profile(model, rotations=4),
    (
        metric("active_signals", ACTIVE),
        metric("active_share", ACTIVE / 32),
        metric("active_share_text", ACTIVE / 32),
        metric("participation", ACTIVE / 32, 1e-6),
        metric("hoyer", (32**0.5 - ACTIVE**0.5) / (32**0.5 - 1), 1e-5),
        metric("support_share", ACTIVE / 32),  # two of three hold 67%
        metric("signal_kurtosis", 32 / ACTIVE, 0.5),  # of an entry that is ±1 or 0
        metric("dead_signals", 0),
        verdict("active_share", "supported"),
    ),
)

RANK = 4
GEOMETRY_TEXTS = 3 * [
    f"The {word} runs through the city and the house."
    for word in ("river", "road", "train", "king", "queen", "dog", "cat")
]
GEOMETRY = Case(
    "basis_geometry",
    partial(planted.low_rank_model, RANK),
    lambda model: basis_geometry(model, texts=GEOMETRY_TEXTS, directions=RANK, quick=True),
    (
        *(metric(name, RANK, 0.02 * RANK) for name in ("effective_rank", "stable_rank", "participation_ratio")),
        *(metric(f"{name}_E", RANK, 0.05 * RANK) for name in ("effective_rank", "stable_rank", "participation_ratio")),
        metric("condition_number", 100, 0.1),
        metric("above_edge", RANK),
        *(metric(f"alignment_{where}", 1, 0.01) for where in ("first", "last", "mean")),
        *(verdict(name, "supported") for name in ("effective_rank", "effective_rank_E")),
        *(verdict(f"alignment_{where}", "supported") for where in ("first", "last", "mean")),
    ),
)

GALAXY_LEXICON = planted.category_lexicon(3)
GALAXY = Case(
    "semantic_galaxy",
    partial(planted.category_model, GALAXY_LEXICON),
    lambda model: semantic_galaxy(model, lexicon=GALAXY_LEXICON, quick=True),
    (
        metric("knn_accuracy", 1),
        metric("silhouette", CATEGORY_COSINE, 0.06),  # (b - a) / b with a = 1 - CATEGORY_COSINE and b = 1
        # Of three orthogonal categories two dimensions of variance 1/3 are between, and 32 of 0.01 within.
        metric("explained_variance_2", (2 / 3 + 0.02) / (2 / 3 + 0.32), 0.05),
        *(verdict(name, "supported") for name in ("silhouette", "silhouette_plane", "knn_accuracy")),
    ),
)

ALGEBRA = Case(
    "semantic_algebra",
    partial(planted.analogy_model),
    lambda model: semantic_algebra(model, analogies=planted.planted_analogies()),
    (
        *(metric(name, 1) for name in ("accuracy_at_1", "accuracy_at_5", "mean_reciprocal_rank", "accuracy_at_1_E")),
        *(metric(f"rank_{word}", 1) for word in ("queen", "ran", "Beijing")),
        metric("recipe_minus_E", 0),
        *(verdict(name, "supported") for name in ("accuracy_at_1", "accuracy_at_1_E")),
        verdict("recipe_minus_E", "not supported"),
    ),
)


def recovery(layer: int) -> tuple[Expected, ...]:
    """Of a `correcting_model`: a misspelling is its word from behind the block on."""
    return metric("recovered_share", 1), metric("recovery_layer", layer + 1)


CORRECTED = 10 / math.sqrt(101)  # the cosine of a corrected misspelling and its word
TYPOS = Case(
    "typo_resilience",
    partial(planted.correcting_model, 2),
    lambda model: typo_resilience(model, lexicon=planted.typo_lexicon()),
    (
        *recovery(2),
        *(metric(name, CORRECTED, 1e-5) for name in ("final_cosine_readout", "final_cosine_resid")),
        metric("final_kl", 0, 0.001),
        *(
            verdict(name, "supported")
            for name in ("final_cosine_readout", "final_cosine_resid", "final_kl", "recovered_share")
        ),
    ),
)


def decision(layer: int) -> tuple[Expected, ...]:
    """Of a `deciding_model`; the claim is that predictions are settled in the first half."""
    return (
        metric("crystallisation_layer", layer + 1),
        metric("target_accuracy", 1),
        verdict("crystallisation_share", "supported" if layer == 0 else "not supported"),
    )


DECISION = Case(
    "layer_evolution",
    partial(planted.deciding_model, 2),
    lambda model: layer_evolution(model, lexicon=planted.LEXICON),
    decision(2),
)


def _leaders(result: Result) -> pd.DataFrame:
    return result.frames["tracks"].dropna(subset="since")


def relayed(layer: int, writer: str) -> tuple[Expected, ...]:
    """Of a `relaying_model`: the signals that lead at the end lead from where they are written on."""
    depth = layer + (1 if writer == "mlp" else 0.5)
    return (
        Expected(
            "leading signals", str(sorted(planted.RELAYED)), 0.0, lambda result: str(sorted(_leaders(result)["signal"]))
        ),
        Expected(
            "depth from which they lead, first", depth, 0.0, lambda result: float(_leaders(result)["since"].min())
        ),
        Expected("depth from which they lead, last", depth, 0.0, lambda result: float(_leaders(result)["since"].max())),
    )


RELAY = Case(
    "signal_flow",
    partial(planted.relaying_model, 2, "mlp"),
    lambda model: signal_flow(model, k=5, rotations=2, lexicon=planted.LEXICON),
    relayed(2, "mlp"),
)
KEPT = Case(
    "signal_flow",
    partial(planted.keeping_model),
    lambda model: signal_flow(model, "The king of the house", k=5, lexicon=planted.LEXICON),
    (
        metric("neighbour_overlap", 1, 1e-6),
        metric("leading_since", 0),
        *(verdict(name, "supported") for name in ("leading_share", "neighbour_overlap", "leading_since")),
    ),
)


def _worst_signals(result: Result) -> str:
    return str(sorted(result.frames["prompts"].query("basis == 'native'")["worst_signal"].unique().tolist()))


ABLATION = Case(
    "causal_ablation",
    partial(planted.one_signal_model),
    lambda model: causal_ablation(model, lexicon=planted.LEXICON, rotations=6),
    (
        Expected("signals that take a prediction", "[0]", 0.0, _worst_signals),
        metric("remaining_after_one", 0, 0.001),
        metric("sufficient_share", 1 / 32, 1e-8),
        *(verdict(name, "supported") for name in ("remaining_after_one", "sufficient_share")),
    ),
)


def last_effective(layer: int) -> tuple[Expected, ...]:
    """Of a `feeling_model`; the claim of the share is that steering comes too late in the second half."""
    return (
        metric("best_flip_rate", 1),
        metric("last_effective_layer", layer),
        metric("last_effective_share", layer / 4),
        verdict("best_flip_rate", "supported"),
        verdict("last_effective_share", "supported" if layer <= 2 else "not supported"),
    )


STRENGTHS = (0.1, 0.2, 0.25)  # the last turns every carrier along the feeling itself, and few along another direction
SURGERY = Case(
    "emotion_surgery",
    partial(planted.feeling_model, 1),
    lambda model: emotion_surgery(model, lexicon=planted.feeling_lexicon(), strengths=STRENGTHS),
    last_effective(1),
)

CRITICAL = Case(
    "concept_inception",
    partial(planted.heavy_model, 3.0),
    lambda model: concept_inception(
        model, planted.concepts(), lexicon=planted.concept_lexicon(), prompts_per_concept=1
    ),
    (
        metric("critical_alpha", 9, 0.02 * 9),
        metric("critical_strength", 3, 0.02 * 3),
        metric("reachable_share", 1),
        *(metric(name, 0) for name in ("closed_share", "long_clause_delay", "non_monotone_share")),
        *(verdict(name, "not supported") for name in ("closed_share", "long_clause_delay")),
    ),
)


def no_return(layer: int) -> tuple[Expected, ...]:
    """Of a `closing_model`."""
    return metric("point_of_no_return", (layer + 1) / 4), metric("long_clause_delay", 1 / 4)


CLOSING = Case(
    "concept_inception",
    partial(planted.closing_model, 1),
    lambda model: concept_inception(
        model, planted.concepts(), lexicon=planted.concept_lexicon(), prompts_per_concept=1
    ),
    (*no_return(1), *(verdict(name, "supported") for name in ("closed_share", "long_clause_delay"))),
)


def _of_unedited(name: str) -> Callable[[Result], float]:
    """A metric as a multiple of the mean log odds of the unedited model."""

    def multiple(result: Result) -> float:
        return result.metrics[name] / float(result.frames["carriers"].query("edit == 'unedited'")["log_odds"].mean())

    return multiple


def _strongest(result: Result) -> str:
    return str(result.frames["signals"].query("basis == 'native'")["signal"].unique().tolist())


HIJACK = Case(
    "genetic_hijack",
    partial(planted.feeling_model, 1, lean=0.3),
    lambda model: genetic_hijack(model, lexicon=planted.feeling_lexicon(), betas=(0.25, 0.5), new_tokens=2),
    (
        Expected("signals that carry the direction", str([planted.FEELING]), 0.0, _strongest),
        # A swap of the poles turns the log odds, and without the planted signal there are none.
        Expected("swap_log_odds_change / log odds", -2, 2e-5, _of_unedited("swap_log_odds_change")),
        Expected("silence_effect / log odds", 1, 0.01, _of_unedited("silence_effect")),
        verdict("log_odds_shift", "not supported"),  # 0.006 nats: there for certain, and less than what matters
        verdict("silence_effect", "supported"),
    ),
)


def _strongest_path(result: Result) -> str:
    """The words at its ends and the units between, without where these are."""
    nodes = str(result.frames["paths"].loc[0, "path"]).split(" → ")
    return " ".join(node.split(" at ")[0].strip("“ ”") for node in nodes)


TRACING = Case(
    "circuit_tracing",
    partial(planted.chained_model),
    lambda model: circuit_tracing(model, lexicon=planted.chained_lexicon(), units=48, quick=True),
    (
        Expected("the strongest path", f"{planted.concepts()[0]} 1.0 3.0 {planted.answers()[0]}", 0, _strongest_path),
        metric("strongest_path_share", 1, 0.001),
        metric("multi_hop_share", 1, 0.001),
        # Without the first hop the concept says itself, e^√80 against all words at 1; without the second, nothing does.
        metric("removal_effect", (math.log(16639 + math.exp(80**0.5)) + math.log(16640)) / 2, 0.001),
        metric("promoting_share", 0.5),
        # Of the two hops the second alone promotes its answer on the direct path.
        metric("forced_probability", 0.5, 0.001),
        metric("best_forced_probability", 1, 0.001),
        metric("lifting_share_1", 0.5),
        metric("lifting_share_any", 1),
        verdict("lifting_share_1", "supported"),
    ),
)

CASES = (
    *(ATLAS, SPARSITY, GEOMETRY, GALAXY, ALGEBRA, TYPOS, DECISION),
    *(RELAY, KEPT, ABLATION, SURGERY, CRITICAL, CLOSING, HIJACK, TRACING),
)


def shown(table: pd.DataFrame) -> str:
    """The table as text, each experiment with its number."""
    numbers = {experiment.name: number for number, experiment in EXPERIMENTS.items()}
    columns = {
        "experiment": [f"{numbers[name]:>2} {name}" for name in table["experiment"]],
        "expected": [_number(value) for value in table["expected"]],
        "found": [_number(value) for value in table["found"]],
        "tolerance": [_number(value) if value else "" for value in table["tolerance"]],
        "ok": table["ok"].map({True: "yes", False: "NO"}),
    }
    frame = table.assign(**columns)
    for name in ("experiment", "model", "quantity"):
        frame[name] = frame[name].str.ljust(int(frame[name].str.len().max()))
    return str(frame.to_string(index=False))


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.5g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    torch.set_num_threads(1)  # models this small are slower on several
    table = table_of((case, case.run()) for case in tqdm(CASES, unit="case", disable=None))
    print(shown(table))
    print(f"{int(table['ok'].sum())} of {len(table)} as expected")
    raise SystemExit(0 if table["ok"].all() else 1)


if __name__ == "__main__":
    main()
