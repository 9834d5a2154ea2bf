"""Experiment 6, Typo Resilience: is a misspelling read like the word that was meant?

A word and a misspelling of it stand at the end of the same carrier and are read there, at the last token of each: a
misspelling is often several tokens, none of which is the word, so that likeness has to be made by the blocks. A pair
has *recovered* at the first point from which the cosine of the readouts stays at or above a threshold.

All prompts of a carrier have much in common, and cosines are high for that alone. Two controls say how high, each in
the same carrier: ``unrelated_word``, the clean word against another of the same length, and ``unrelated_misspelling``,
the clean word against the misspelling of another, which is split into as many tokens as misspellings are. A third,
``untrained``, is the same pairs in the same architecture at initialisation. A rotation of the signals moves none of
these numbers, so that ``rotated_basis`` is no control here.

Several misspellings of one word are no independent observations of how the model reads it: the word is the unit, its
value the mean over its misspellings, and means, intervals and tests are over words.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tqdm import tqdm

from analyses.claims import bound_of, sign_of
from analyses.controls.nulls import over_untrained
from analyses.experiments.typo_resilience.figures import typo_figures
from analyses.experiments.typo_resilience.frames import cells_frame, kinds_frame, layers_frame, pairs_frame
from analyses.experiments.typo_resilience.measure import (
    UNRELATED,
    Values,
    by_word,
    compare_words,
    control_pvalues,
    others_of_same_length,
    pair_values,
)
from analyses.measures.lens import unread
from analyses.result.finding import Finding
from analyses.result.params import run_params
from analyses.result.result import Result
from analyses.statistics.draws import derive_seed
from analyses.statistics.intervals import bootstrap_interval, rate_interval
from analyses.statistics.pvalues import holm
from analyses.statistics.verdicts import Verdict, verdict
from analyses.words.lexicon import Lexicon, Typo, load_lexicon
from analyses.words.tokens import listed
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.signals import SignalView, ViewName, view_of

MINIMUM_WORDS = 20
THRESHOLD = 0.8
CARRIERS = ("She wrote down the word", "The next word on the page was")
CONTROLS = (*UNRELATED, "untrained")
JUDGED = ("final_cosine_readout", "final_cosine_resid", "final_kl", "recovered_share")

_RECOVERY = "first point from which the cosine of the readouts stays at or above the threshold"


def definitions(threshold: float) -> dict[str, str]:
    """What each metric means, with the threshold of recovery that was used."""
    pairs = "of a clean word and its misspelling at the last token of each; mean over a word's misspellings, then words"
    return {
        "final_cosine_readout": f"cosine of the readouts a = B norm(x) at the end {pairs}",
        "final_cosine_resid": f"cosine of the last residual streams {pairs}",
        "final_kl": f"KL(clean ‖ misspelt) of the next-token distributions in nats {pairs}",
        "recovered_share": f"share of a word's misspellings that recover, mean over words: {_RECOVERY}, {threshold:g}",
        "recovery_layer": f"{_RECOVERY}, {threshold:g}, in blocks (0: the embedding); mean over a "
        "word's misspellings that recover, then over words with any",
    }


@torch.no_grad()
def typo_resilience(
    model: HookedModel,
    *,
    view: SignalView | ViewName | None = None,
    lexicon: Lexicon | None = None,
    carriers: Sequence[str] = CARRIERS,
    threshold: float = THRESHOLD,
    seed: int = 0,
    quick: bool = False,
    progress: bool = False,
) -> Result:
    """Compare words with their misspellings at every residual point.

    Args:
        view: whose readouts are compared; default the model's own, or the residual axes of a model without any.
        lexicon: its ``typos`` are the pairs; those whose clean word is several tokens are skipped.
        carriers: beginnings of sentences in front of the words; a pair's value is its mean over carriers.
        threshold: of the cosine of the readouts, from which on a pair has recovered.
        seed: of the unrelated words, the untrained model, the bootstrap and the permutations.
        quick: a third of the pairs.

    Returns:
        A Result with frames ``layers`` (a row a comparison, quantity and point: means over words with intervals),
        ``cells`` (a row a pair and point), ``pairs`` (a row a comparison and pair) and ``kinds`` (the end, by kind of
        misspelling, p against both unrelated controls raw and Holm-adjusted), and figures ``readout``, ``residual``,
        ``kl``, ``kinds``, ``pairs``.

    Raises:
        ReflowlensError: the lexicon has fewer than two pairs whose clean word is one token, there is no carrier, or the
            threshold is no cosine.

    Example: ``typo_resilience(model, threshold=0.9).frames["pairs"]``
    """
    carriers = listed(carriers, "carriers")
    if not carriers:
        raise ReflowlensError("carriers: one beginning of a sentence was expected at least, got none")
    if not -1 <= threshold <= 1:
        raise ReflowlensError(f"threshold: a cosine between -1 and 1 was expected, got {threshold}")
    chosen = view_of(model, view, seed=seed, exact_for="typo_resilience")
    lexicon = lexicon or load_lexicon()
    pairs, skipped = _usable_pairs(model, lexicon, quick)
    clean, misspelt = [pair.clean for pair in pairs], [pair.misspelt for pair in pairs]
    words = [word for category in lexicon.categories.values() for word in category]
    pool = [word for word in [*clean, *words] if model.tokenizer.is_single_token(f" {word}")]
    own = derive_seed(seed, "typo_resilience")
    unrelated = others_of_same_length(clean, pool, derive_seed(own, "unrelated_word"))
    misspelling_of = {pair.clean: pair.misspelt for pair in pairs}
    others_of_clean = others_of_same_length(clean, clean, derive_seed(own, "unrelated_misspelling"))
    elsewhere = [misspelling_of[word] for word in others_of_clean]
    bar = tqdm(total=2, desc="typo resilience", disable=not progress)
    others = dict(zip(("misspelt", *UNRELATED), (misspelt, unrelated, elsewhere), strict=True))
    compared = compare_words(chosen, clean, others, carriers)
    bar.update()
    compared |= over_untrained(
        lambda fresh: compare_words(fresh, clean, {"misspelt": misspelt}, carriers)["misspelt"],
        chosen,
        seed,
        "typo_resilience",
        quick=quick,
    )
    bar.update()
    bar.close()
    others["untrained"] = misspelt
    values = {name: pair_values(likeness, threshold, model.cfg.n_layers) for name, likeness in compared.items()}
    frames = {
        "layers": layers_frame(clean, compared, model.cfg.n_layers, seed),
        "cells": cells_frame(pairs, compared["misspelt"], model.cfg.n_layers),
        "pairs": pairs_frame(model, pairs, others, compared, values),
        "kinds": kinds_frame(pairs, values, seed),
    }
    findings, notes = _findings(by_word(clean, values), seed)
    return Result(
        name="typo_resilience",
        title="Typo Resilience",
        params={
            "carriers": list(carriers),
            "threshold": threshold,
            "pairs": len(pairs),
            "words": len(set(clean)),
            **run_params(chosen, lexicon, seed, quick),
        },
        findings=findings,
        frames=frames,
        figures=typo_figures(frames, threshold),
        definitions=definitions(threshold),
        notes=[
            *([f"skipped, for the word is several tokens: {', '.join(skipped)}"] if skipped else []),
            *notes,
            *unread(model.cfg.n_layers),
        ],
    )


def resilience_verdict(
    metric: str, interval: tuple[float, float], controls: dict[str, float], p: float, units: int
) -> Verdict:
    """Claim: a misspelling is read like the word that was meant.

    Supported if the mean over words beats both unrelated controls (larger, for the KL smaller): the Holm-adjusted p,
    itself the larger of those of the paired sign-flip tests against each, is below 0.05, and the interval is clear of
    the nearer control by 0.05 (for the KL by 0.1 nats); underpowered with fewer than 20 words.
    """
    sign = sign_of("typo_resilience", metric)
    low, high = sorted(sign * end for end in interval)
    bound = bound_of("typo_resilience", metric, controls)
    return verdict((low, high), bound, p, minimum_units=MINIMUM_WORDS, units=units)


def _usable_pairs(model: HookedModel, lexicon: Lexicon, quick: bool) -> tuple[list[Typo], list[str]]:
    """The pairs whose clean word is one token, and the clean words of the others."""
    usable = [pair for pair in lexicon.typos if model.tokenizer.is_single_token(f" {pair.clean}")]
    skipped = [pair.clean for pair in lexicon.typos if pair not in usable]
    usable = usable[::3] if quick else usable
    if len({pair.clean for pair in usable}) < 2:
        raise ReflowlensError(
            "typo_resilience needs misspellings of at least two words that are single tokens, "
            f"got {len(usable)} of the lexicon's {len(lexicon.typos)}"
        )
    return usable, skipped


def _findings(values: Values, seed: int) -> tuple[dict[str, Finding], list[str]]:
    """The metrics beside their controls, from values of every word, and notes."""
    units = len(values["misspelt"])
    raw = {metric: control_pvalues(values, metric, seed) for metric in JUDGED}
    adjusted = holm([max(each.values()) for each in raw.values()]).tolist()
    findings, notes = {}, []
    for metric, p in zip(JUDGED, adjusted, strict=True):
        ours = values["misspelt"][metric]
        interval_of = rate_interval if metric == "recovered_share" else bootstrap_interval
        interval = interval_of(ours, seed=seed)
        controls = {name: float(values[name][metric].mean()) for name in CONTROLS}
        judged = resilience_verdict(metric, interval, controls, p, units)
        findings[metric] = Finding(ours.mean(), interval, controls, judged)
        against = ", ".join(f"{name.replace('_', ' ')} p = {each:.2g}" for name, each in raw[metric].items())
        notes.append(f"{metric}, {units} words, sign-flip tests against {against}; larger, Holm-adjusted {p:.2g}")
    layers = {name: each["recovery_layer"].dropna() for name, each in values.items()}
    ours = layers["misspelt"]
    if len(ours) < 2:
        return findings, [*notes, "recovery_layer: absent, for misspellings of fewer than 2 words recover"]
    controls = {name: float(layers[name].mean()) for name in CONTROLS if len(layers[name])}
    findings["recovery_layer"] = Finding(ours.mean(), bootstrap_interval(ours, seed=seed), controls)
    if never := [name for name in CONTROLS if name not in controls]:
        notes.append(f"recovery_layer: without {', '.join(never)}, of which no pair passes the threshold")
    return findings, notes
