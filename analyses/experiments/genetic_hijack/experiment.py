"""Experiment 12, Genetic Hijack: what happens if the recipes themselves are edited?

Four edits of R, each undone bit for bit. ``shift`` adds β r to the recipes of what the carriers speak of ("film"), r
the mean recipe of positive adjectives minus that of negative ones: do these words become good or bad for the model, and
is the text still text? ``swap`` exchanges the recipes of the held-out positive and negative words, pair by pair; a tied
embedding makes that a change of names at both ends, so that the log odds change their sign, exactly where both poles
have as many words. ``silence`` zeroes the column of the signal that carries most of r, ``graft`` replaces it by the
column of the one that carries least, scaled to the same norm.

``random_direction`` is the same edit along a random direction of equal norm. Silence and graft speak of a single signal
and have ``rotated_basis`` beside them: the same done to the strongest signal of random rotations of the basis.
``untrained`` is the architecture at initialisation, shifted along the direction of its own recipes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from analyses.claims import bound_of
from analyses.controls.bases import check_rotations
from analyses.controls.nulls import over_untrained
from analyses.experiments.genetic_hijack.edits import (
    RecipeEdits,
    Shift,
    random_recipes,
    random_replacement,
    random_swap,
    replacements,
    strongest_signal,
)
from analyses.experiments.genetic_hijack.figures import hijack_figures
from analyses.experiments.genetic_hijack.frames import Run, carriers_frame, edits_frame, signals_frame
from analyses.experiments.genetic_hijack.measure import Probe
from analyses.measures.depth import ORDINARY
from analyses.measures.sentiment import Poles, sentiment_poles
from analyses.result.finding import Finding
from analyses.result.params import run_params
from analyses.result.result import Result
from analyses.statistics.draws import derive_seed
from analyses.statistics.intervals import bootstrap_interval
from analyses.statistics.pvalues import holm, predictive_pvalue
from analyses.statistics.verdicts import Verdict, verdict
from analyses.words.lexicon import Lexicon, load_lexicon
from analyses.words.tokens import listed
from reflowlens.checkpoints import model_hash
from reflowlens.errors import ReflowlensError
from reflowlens.interventions.edit import WeightEdit
from reflowlens.models.base import HookedModel
from reflowlens.signals import SignalView, ViewName, view_of

MINIMUM_CARRIERS = 20
BETAS = (0.25, 0.5, 1.0)
RANDOM_DRAWS = 20  # judged by the next word
WRITTEN_DRAWS = 6  # of which texts are generated too, at the β of the headline
DEFINITIONS = {
    "beta": "β of the headline: the largest of the sweep at which texts have at most max_ratio times the perplexity of "
    "unedited ones, as a share: norm of what is added over the mean norm of the edited recipes. random_direction: the "
    "largest that the texts written under it bear",
    "beta_raw": "the same as the factor of the direction's recipe r, or of a random one as long",
    "sentiment_shift": "half the difference between the mean valence of texts written with +β and with -β from the "
    "same seeds, in VADER's ratings (-4 to 4) a word, edited words not counted; mean over carriers",
    "log_odds_shift": "half the difference of the log odds of held-out positive against negative words as the next "
    "word with +β and with -β, in nats; mean over carriers",
    "perplexity_ratio": "perplexity of the written texts under the unedited model over that of unedited texts, "
    "geometric mean of +β and -β",
    "distinct_2": "different pairs of neighbouring tokens over all pairs in the texts, mean of +β and -β",
    "locality_kl": "KL(before ‖ under the edit) a token on neutral texts, which hold none of the edited words, mean of "
    "+β and -β, in nats",
    "swap_log_odds_change": "mean change of the log odds when the recipes of the held-out words are exchanged pair by "
    "pair",
    "silence_effect": "mean absolute change of the log odds without the signal that carries most of the direction, in "
    "nats",
    "graft_effect": "the same when its column is replaced by that of the signal that carries least",
}


@torch.no_grad()
def genetic_hijack(
    model: HookedModel,
    words: Sequence[str] | None = None,
    *,
    view: SignalView | ViewName | None = None,
    lexicon: Lexicon | None = None,
    betas: Sequence[float] = BETAS,
    max_ratio: float = 1.25,
    rotations: int = 6,
    new_tokens: int = 12,
    seed: int = 0,
    quick: bool = False,
    progress: bool = False,
) -> Result:
    """Edit recipes, and measure sentiment, fluency and locality before and after from the same seeds.

    Args:
        words: whose recipes ``shift`` edits, without a leading space; default the lexicon's ``sentiment.subjects``.
            Only carriers that hold one are measured.
        view: whose recipe is edited; a change of another view's recipe is carried over to the stored one.
        betas: of the sweep, ascending, both signs, as shares of the mean norm of the edited recipes.
        max_ratio: of the perplexity; see the definition of ``beta``.
        rotations: random rotations in the ``rotated_basis`` null; at least 2.
        new_tokens: length of a continuation.
        quick: half of the carriers, and the largest β alone; of a model deeper than 12 blocks also a third of the
            neutral texts, and texts written under half as many random directions.

    Returns:
        A Result with frames ``edits`` (a row an edit and control), ``carriers`` (a row an edit and carrier: text,
        valence, log odds, loss) and ``signals`` (silence and graft in the trained and in rotated bases), and figures
        ``fluency``, ``log_odds``, ``generations``, ``signals``.

    Raises:
        ReflowlensError: fewer than two carriers hold an edited word, the lexicon lacks sentiment words or neutral texts
            without one, or the view's recipe is no linear image of the stored one.

    Example: ``genetic_hijack(model, ["film", "movie"]).frames["carriers"]``
    """
    chosen = view_of(model, view, seed=seed, exact_for="genetic_hijack")
    lexicon = lexicon or load_lexicon()
    poles, heldout = sentiment_poles(model, lexicon, "genetic_hijack")
    given = listed(lexicon.sentiment.subjects if words is None else words, "words")
    edited = [word for word in given if model.tokenizer.is_single_token(f" {word}")]
    ids = [model.to_single_token(f" {word}") for word in edited]
    carriers = [text for text in lexicon.sentiment.prompts if not _lacks(model, text, ids)][:: 2 if quick else 1]
    neutral = [text for text in lexicon.neutral_texts if _lacks(model, text, ids)]
    betas = sorted(betas)[-1 if quick else 0 :]
    is_thrifty = quick and model.cfg.n_layers > ORDINARY
    neutral, written_draws = (neutral[::3], WRITTEN_DRAWS // 2) if is_thrifty else (neutral, WRITTEN_DRAWS)
    _check(carriers, neutral, betas, rotations)
    common, own = run_params(chosen, lexicon, seed, quick), derive_seed(seed, "genetic_hijack")
    probe = Probe(model, carriers, heldout, neutral, edited=edited, new_tokens=new_tokens, seed=seed)
    shift = Shift.of(chosen, ids, poles.direction(chosen))
    directions = random_recipes(RANDOM_DRAWS, chosen, derive_seed(own, "shift"))
    bar = tqdm(total=len(betas) + 4, desc="genetic hijack", disable=not progress)

    def shifted(series: str, beta: float, direction: Tensor | None = None) -> list[Run]:
        return [
            Run("shift", series, signed, probe.outcome(shift.by(signed, direction), write=True))
            for signed in (beta, -beta)
        ]

    runs = [Run("unedited", "unedited", 0.0, probe.outcome(write=True))]
    for beta in betas:
        runs += [*shifted("edit", beta), *shifted("random_direction", beta, directions[0])]
        bar.update()
    beta, random_beta = (_affordable(runs, series, betas, max_ratio) for series in ("edit", "random_direction"))
    for direction in directions[1:written_draws]:
        runs += shifted("random_direction", beta, direction)
    bar.update()
    for (name, series), edits in _other_edits(chosen, heldout, shift.direction, own).items():
        runs.append(Run(name, series, 0.0, probe.outcome(edits, write=True)))
    bar.update()
    nulls = {
        "random_direction": np.stack([_next_word_shift(probe, shift, beta, u) for u in directions]),
        **over_untrained(
            lambda fresh: _untrained_shift(fresh, probe, poles, ids, beta)[None],
            chosen,
            seed,
            "genetic_hijack",
            quick=quick,
        ),
    }
    bar.update()
    signals = signals_frame(probe, chosen, poles, rotations, seed)
    bar.update()
    bar.close()
    if model_hash(model) != common["model_hash"]:
        raise ReflowlensError("an edit was not undone: the model's weights are not what they were")
    frames = {"edits": edits_frame(runs, seed), "carriers": carriers_frame(runs, carriers), "signals": signals}
    raw = shift.size / float(shift.direction.norm())
    shifts, shift_pvalues = _shift_findings(runs, beta, nulls, seed)
    effects, effect_pvalues = _signal_findings(signals, runs, chosen.name, seed)
    findings = {
        "beta": Finding(beta, controls={"random_direction": random_beta}),
        "beta_raw": Finding(beta * raw, controls={"random_direction": random_beta * raw}),
        **shifts,
        "swap_log_odds_change": _swap_finding(runs, seed),
        **effects,
    }
    findings, told = _judged(findings, shift_pvalues | effect_pvalues, len(carriers))
    notes = ["Sentiment of texts by VADER's lexicon; after all edits the weights are what they were, bit for bit"]
    if skipped := [word for word in given if word not in edited]:
        notes.append(f"skipped {len(skipped)} words of several tokens: {', '.join(skipped)}")
    if not effect_pvalues:
        notes.append("silence and graft have no rotated_basis: a rotated recipe is not what ReLU and top-k would make")
    return Result(
        name="genetic_hijack",
        title="Genetic Hijack",
        params={
            "words": edited,
            "betas": betas,
            "max_ratio": max_ratio,
            "rotations": rotations,
            "new_tokens": probe.new_tokens,
            "carriers": len(carriers),
            **common,
        },
        findings=findings,
        frames=frames,
        figures=hijack_figures(frames, beta),
        definitions=DEFINITIONS,
        notes=[*notes, *told],
    )


def shift_verdict(
    metric: str, interval: tuple[float, float], controls: Mapping[str, float], p: float, units: int
) -> Verdict:
    """Claim: shifting the recipes of what a text is about turns its sentiment, in the text written (sentiment_shift) or
    in the next word (log_odds_shift).

    Supported if the interval over carriers lies above the mean of random directions by 0.05 of a rating, or by 0.1
    nats, and the Holm-adjusted p of the shift as one more draw from theirs is below 0.05; underpowered with fewer than
    20 carriers.
    """
    bound = bound_of("genetic_hijack", metric, controls)
    return verdict(interval, bound, p, minimum_units=MINIMUM_CARRIERS, units=units)


def signal_verdict(interval: tuple[float, float], rotated: float, p: float, units: int) -> Verdict:
    """Claim: one signal of the trained basis carries sentiment (silence_effect, graft_effect).

    Supported if the interval over carriers lies above the mean of the rotated bases by 0.05 nats and the Holm-adjusted
    p of the effect as one more draw from them is below 0.05; underpowered with fewer than 20 carriers.
    """
    bound = bound_of("genetic_hijack", "silence_effect", {"rotated_basis": rotated})
    return verdict(interval, bound, p, minimum_units=MINIMUM_CARRIERS, units=units)


def _lacks(model: HookedModel, text: str, tokens: list[int]) -> bool:
    return set(tokens).isdisjoint(model.tokenizer.encode(text))


def _check(carriers: list[str], neutral: list[str], betas: Sequence[float], rotations: int) -> None:
    if len(carriers) < 2:
        raise ReflowlensError(
            "genetic_hijack needs two of the lexicon's sentiment.prompts at least that hold an edited word "
            f"(words=, default sentiment.subjects), got {len(carriers)}"
        )
    if not neutral:
        raise ReflowlensError(
            "genetic_hijack needs neutral_texts in the lexicon without an edited word: locality is measured on them"
        )
    if not betas or min(betas) <= 0:
        raise ReflowlensError(f"betas must be positive, for each is taken with both signs, got {list(betas)}")
    check_rotations(rotations)


def _shifts(runs: Sequence[Run], series: str, beta: float) -> list[Run]:
    """The shifts of a series by ±β, the positive one of each direction first."""
    return [run for run in runs if (run.edit, run.series, abs(run.beta)) == ("shift", series, beta)]


def _affordable(runs: Sequence[Run], series: str, betas: Sequence[float], max_ratio: float) -> float:
    """The largest β of a series whose texts are fluent enough; the smallest of all if none is."""
    unedited = runs[0].written.loss.mean()
    rise = {beta: np.mean([run.written.loss for run in _shifts(runs, series, beta)]) - unedited for beta in betas}
    return max((beta for beta in betas if rise[beta] <= np.log(max_ratio)), default=betas[0])


def _other_edits(
    view: SignalView, heldout: Poles, direction: Tensor, seed: int
) -> dict[tuple[str, str], list[WeightEdit]]:
    """Swap, silence and graft, each with its random direction."""
    editor, signal = RecipeEdits.of(view), strongest_signal(direction)
    pairs = list(zip(heldout.positive, heldout.negative, strict=False))
    edits: dict[tuple[str, str], list[WeightEdit]] = {
        ("swap", "edit"): [editor.swap(*pair) for pair in pairs],
        ("swap", "random_direction"): random_swap(view, pairs, derive_seed(seed, "swap")),
    }
    for name, column in replacements(view, direction).items():
        edits[name, "edit"] = [editor.graft(signal, column)]
        edits[name, "random_direction"] = [random_replacement(view, signal, column, derive_seed(seed, name))]
    return edits


def _next_word_shift(probe: Probe, shift: Shift, beta: float, direction: Tensor | None = None) -> NDArray[np.float64]:
    """Half the difference of the log odds with +β and with -β, by carrier."""
    plus, minus = (probe.log_odds(shift.by(signed, direction)) for signed in (beta, -beta))
    return (plus - minus) / 2


def _untrained_shift(
    untrained: SignalView, probe: Probe, poles: Poles, tokens: list[int], beta: float
) -> NDArray[np.float64]:
    fresh = Probe(untrained.model, probe.carriers, probe.heldout, probe.neutral.texts[:1])
    return _next_word_shift(fresh, Shift.of(untrained, tokens, poles.direction(untrained)), beta)


def _shift_findings(
    runs: Sequence[Run], beta: float, nulls: Mapping[str, NDArray[np.float64]], seed: int
) -> tuple[dict[str, Finding], dict[str, float]]:
    """What the shift by ±β does, and the p-values of its two claims."""
    unedited = runs[0]
    plus, minus = _shifts(runs, "edit", beta)
    random = _shifts(runs, "random_direction", beta)
    valence = (plus.written.valence - minus.written.valence) / 2
    random_valence = [
        float((up.written.valence - down.written.valence).mean() / 2)
        for up, down in zip(random[::2], random[1::2], strict=True)
    ]
    log_odds = (plus.outcome.log_odds - minus.outcome.log_odds) / 2

    def measured(measure: Callable[[Sequence[Run]], float], **controls: float) -> Finding:
        return Finding(measure([plus, minus]), controls={"random_direction": measure(random), **controls})

    findings = {
        "sentiment_shift": _mean(valence, {"random_direction": float(np.mean(random_valence))}, seed),
        "log_odds_shift": _mean(log_odds, {name: float(null.mean()) for name, null in nulls.items()}, seed),
        "perplexity_ratio": measured(
            lambda some: float(np.exp(np.mean([run.written.loss - unedited.written.loss for run in some])))
        ),
        "distinct_2": measured(
            lambda some: float(np.mean([run.written.distinct for run in some])), unedited=unedited.written.distinct
        ),
        "locality_kl": measured(lambda some: float(np.mean([run.outcome.kl for run in some]))),
    }
    return findings, {
        "sentiment_shift": predictive_pvalue(valence.mean(), random_valence),
        "log_odds_shift": predictive_pvalue(log_odds.mean(), nulls["random_direction"].mean(axis=1)),
    }


def _swap_finding(runs: Sequence[Run], seed: int) -> Finding:
    log_odds = {run.series: run.outcome.log_odds for run in runs if run.edit == "swap"}
    swapped, random = (log_odds[series] - runs[0].outcome.log_odds for series in ("edit", "random_direction"))
    return _mean(swapped, {"random_direction": float(random.mean())}, seed)


def _signal_findings(
    signals: pd.DataFrame, runs: Sequence[Run], basis: str, seed: int
) -> tuple[dict[str, Finding], dict[str, float]]:
    """What silence and graft do, and the p-values against rotated bases, where there are any."""
    unedited = runs[0].outcome.log_odds
    findings, pvalues = {}, {}
    for name, part in signals.groupby("edit", sort=False):
        effects = {str(key): rows["effect"].to_numpy() for key, rows in part.groupby("basis", sort=False)}
        own = effects.pop(basis)
        control = next(run for run in runs if (run.edit, run.series) == (name, "random_direction"))
        controls = {"random_direction": float(np.abs(control.outcome.log_odds - unedited).mean())}
        if effects:
            rotated = [effect.mean() for effect in effects.values()]
            controls["rotated_basis"] = float(np.mean(rotated))
            pvalues[f"{name}_effect"] = predictive_pvalue(own.mean(), rotated)
        findings[f"{name}_effect"] = _mean(own, controls, seed)
    return findings, pvalues


def _mean(values: NDArray[np.float64], controls: Mapping[str, float], seed: int) -> Finding:
    return Finding(float(values.mean()), bootstrap_interval(values, seed=seed), controls)


def _judged(
    findings: Mapping[str, Finding], pvalues: Mapping[str, float], units: int
) -> tuple[dict[str, Finding], list[str]]:
    """The findings, those with a p-value judged, and notes."""
    judged, notes = dict(findings), []
    for (metric, raw), p in zip(pvalues.items(), holm(list(pvalues.values())).tolist(), strict=True):
        interval, controls = findings[metric].interval, findings[metric].controls
        assert interval is not None  # what is judged is a mean over carriers
        if "rotated_basis" in controls:
            claim = signal_verdict(interval, controls["rotated_basis"], p, units)
        else:
            claim = shift_verdict(metric, interval, controls, p, units)
        judged[metric] = replace(findings[metric], verdict=claim)
        notes.append(f"{metric}: p = {raw:.2g}, Holm-adjusted {p:.2g}; {units} carriers")
    return judged, notes
