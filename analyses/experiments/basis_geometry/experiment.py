"""Experiment 3, Basis Geometry: how many directions does the signal basis use, and are they those of the residuals?

A spectrum says nothing alone. A Gaussian matrix spreads its singular values between Marchenko and Pastur's edges, and
an orthogonal one, with which the training of a reFlow begins (``untrained``), has them all alike. ``gaussian`` is a
Gaussian matrix of the same shape and variance. Singular values do not change when the signals are rotated; how alike
single signals are (coherence) does, and stands beside ``rotated_basis``, the floor, and ``varimax``, the ceiling. The
identity view has no basis of its own, only the embedding E = R B, which is measured in every view.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from analyses.claims import bound_of
from analyses.controls.bases import (
    QUICK_ROTATIONS,
    ROTATIONS,
    Bases,
    basis_verdicts,
    by_metric,
    in_bases,
)
from analyses.controls.nulls import over_untrained
from analyses.experiments.basis_geometry.alignment import (
    Alignment,
    captured_variance,
    measure_alignment,
    read_residuals,
    strongest_directions,
)
from analyses.experiments.basis_geometry.coherence import Coherence, measure_coherence, welch_bound
from analyses.experiments.basis_geometry.figures import geometry_figures, geometry_frames
from analyses.experiments.basis_geometry.spectra import (
    SPECTRAL_MEASURES,
    Spectrum,
    above_upper_edge,
    compare_spectrum,
    condition_number,
    factored_singular_values,
    gaussian_matrix,
)
from analyses.measures.knockout import real_tokens
from analyses.result.finding import Finding
from analyses.result.params import run_params
from analyses.result.result import Result
from analyses.statistics.draws import derive_seed
from analyses.statistics.intervals import bootstrap_interval
from analyses.statistics.pvalues import holm, predictive_pvalue
from analyses.statistics.verdicts import Verdict, verdict
from analyses.words.lexicon import Lexicon, load_lexicon
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.signals import SignalView, ViewName, view_of

MINIMUM_UNITS = 20
GAUSSIANS = 20
QUICK_GAUSSIANS = 8
ALIKE = 1.001  # a basis with a smaller condition number has no direction that is stronger than another
ORTHOGONAL = 1e-5  # cosines below are rounding


def definitions(k: int) -> dict[str, str]:
    """What each metric means, with the number of directions that residuals are held against."""
    of_basis = {
        "effective_rank": "exp of the entropy of the energies σ² / Σσ² of B's singular values σ",
        "stable_rank": "Σσ² / max σ² of B",
        "participation_ratio": "(Σσ²)² / Σσ⁴ of B",
        "condition_number": "max σ / min σ of B",
    }
    share = f"share of the residual variance within the {k} strongest directions (right singular vectors) of B"
    how = "positions of running text scaled to length 1 and centred; mean over texts"
    others = {
        "above_edge": "singular values of B above Marchenko and Pastur's upper edge for its shape and variance",
        "coherence_max": "mutual coherence: the largest |cos| between two signals' rows of B",
        "coherence_mean": "mean |cos| of a signal's row of B to the others, mean over signals",
        "alignment_first": f"{share} at the input of the first block; {how}",
        "alignment_last": f"{share} in the stream that is unembedded; {how}",
        "alignment_mean": f"{share}, mean over the inputs of all blocks and the end; {how}",
    }
    return of_basis | {f"{name}_E": text.replace(" B", " E") for name, text in of_basis.items()} | others


@torch.no_grad()
def basis_geometry(
    model: HookedModel,
    *,
    view: SignalView | ViewName | None = None,
    lexicon: Lexicon | None = None,
    texts: Sequence[str] | None = None,
    directions: int | None = None,
    rotations: int | None = None,
    seed: int = 0,
    quick: bool = False,
    progress: bool = False,
) -> Result:
    """Spectra of the basis and the embedding, coherence of the signals, and alignment with the residual stream.

    Args:
        view: whose basis; default the model's native one. The identity view has the spectrum of E alone.
        texts: running text whose residuals are read; default the lexicon's neutral texts and long prompts.
        directions: how many singular vectors residuals are held against; default a quarter of d_model.
        rotations: random rotations beside the coherence, at least 2; default 10, of a quick run 4.
        seed: of Gaussian matrices, rotations, random directions, untrained model and bootstrap.
        quick: also 8 Gaussian matrices and random subspaces instead of 20.

    Returns:
        A Result with frames ``spectrum`` (singular values of B and E beside the nulls), ``signals`` (coherence and
        nearest signal of each), ``cosines`` (their distribution in every basis), ``gram`` (cosines of the most alike
        signals) and ``alignment`` (a row a layer and series), and figures ``scree_B``, ``scree_E``, ``cosines``,
        ``gram``, ``alignment``.

    Raises:
        ReflowlensError: ``directions`` or ``rotations`` is out of range.

    Example: ``basis_geometry(model).frames["spectrum"].query("matrix == 'B'")``
    """
    d_model = model.cfg.d_model
    k = max(1, d_model // 4) if directions is None else directions
    if not 1 <= k < d_model:
        raise ReflowlensError(f"directions must be between 1 and {d_model - 1}, one less than d_model, got {k}")
    chosen = real_tokens(view_of(model, view, seed=seed, exact_for="basis_geometry"))
    lexicon = lexicon or load_lexicon()
    if texts is None:  # texts are the units of replication: a long prompt holds its short one, which is none of its own
        texts = [*lexicon.neutral_texts, *(lexicon.long_prompts or lexicon.short_prompts)]
    rotations = (QUICK_ROTATIONS if quick else ROTATIONS) if rotations is None else rotations
    draws = QUICK_GAUSSIANS if quick else GAUSSIANS
    is_factored = chosen.name != "identity"

    def measured(view: SignalView) -> tuple[NDArray[np.float64], Untrained | None]:
        fresh = real_tokens(view)
        own = factored_singular_values(fresh.recipe, fresh.basis)
        return own, Untrained.of(fresh, texts, k) if is_factored else None

    untrained = over_untrained(measured, chosen, seed, "basis_geometry", quick=quick)
    embeddings = {name: own for name, (own, _) in untrained.items()}
    spectra = {"E": _embedding_spectrum(chosen, embeddings, draws, seed)}
    coherences: Bases[Coherence] | None = None
    alignment: Alignment | None = None
    notes = []
    if not is_factored:
        notes.append("only E is measured: the basis of the identity view is the identity, which has no geometry")
    else:
        fresh = {name: factors for name, (_, factors) in untrained.items() if factors}
        bases = {name: each.basis for name, each in fresh.items()}
        spectra = {"B": _basis_spectrum(chosen, bases, draws, seed)} | spectra
        gaussian = gaussian_matrix(chosen.n_signals, d_model, 1.0, derive_seed(seed, "basis_geometry"))
        coherences = in_bases(
            lambda each: measure_coherence(each.basis),
            chosen,
            {"gaussian": measure_coherence(gaussian), **{name: each.coherence for name, each in fresh.items()}},
            rotations=rotations,
            seed=seed,
            experiment="basis_geometry",
            progress=progress,
        )
        alignment, why = _alignment(chosen, fresh, texts, k, draws, seed)
        notes += why
    frames = geometry_frames(chosen, spectra, coherences, alignment, seed)
    findings, told = _spectrum_findings(spectra)
    for found, more in (
        _coherence_findings(coherences, welch_bound(*chosen.basis.shape), seed),
        _alignment_findings(alignment, seed),
    ):
        findings |= found
        told += more
    return Result(
        name="basis_geometry",
        title="Basis Geometry",
        params={
            "texts": len(texts),
            "directions": k,
            "rotations": rotations,
            "gaussians": draws,
            **run_params(chosen, lexicon, seed, quick),
        },
        findings=findings,
        frames=frames,
        figures=geometry_figures(frames),
        definitions=definitions(k),
        notes=[*notes, *told],
    )


def concentrated_verdict(value: float, controls: Mapping[str, float], p: float) -> Verdict:
    """Claim: the matrix uses fewer directions than a Gaussian one, that is, its effective rank is smaller.

    Supported if p of the effective rank as that of one more Gaussian matrix, Holm-adjusted over B and E, is below 0.05
    and it lies 5% below that of Gaussian matrices and of the untrained model's. There is one matrix and nothing to
    resample, so that the value is its own interval.
    """
    bound = bound_of("basis_geometry", "effective_rank", controls)
    return verdict((-value, -value), bound, p, minimum_units=1, units=1)


def aligned_verdict(interval: tuple[float, float], controls: Mapping[str, float], p: float, texts: int) -> Verdict:
    """Claim: residuals vary along the strongest directions of the basis, more than along as many random ones.

    Supported if p of the share as that of one more random subspace, Holm-adjusted over layers where it is that of one
    layer, is below 0.05 and the interval over texts lies above the random share and the untrained model's by 0.05;
    underpowered with fewer than 20 texts.
    """
    bound = bound_of("basis_geometry", "alignment_mean", controls)
    return verdict(interval, bound, p, minimum_units=MINIMUM_UNITS, units=texts)


class Untrained(NamedTuple):
    """What the factors are in one draw of the model at initialisation.

    ``basis``: its singular values. ``captured``: as of an `Alignment`; None of a basis without a strongest direction.
    """

    basis: NDArray[np.float64]
    coherence: Coherence
    captured: NDArray[np.float64] | None

    @classmethod
    def of(cls, view: SignalView, texts: Sequence[str], k: int) -> Untrained:
        """Of a view of it; fewer than two texts are not read."""
        basis, captured = _singular_values(view), None
        if len(texts) > 1 and condition_number(basis) >= ALIKE:
            captured = captured_variance(read_residuals(view.model, texts), strongest_directions(view.basis, k))
        return cls(basis, measure_coherence(view.basis), captured)


def _singular_values(view: SignalView) -> NDArray[np.float64]:
    return np.asarray(torch.linalg.svdvals(view.basis.double()).cpu())


def _basis_spectrum(view: SignalView, untrained: Mapping[str, NDArray[np.float64]], draws: int, seed: int) -> Spectrum:
    own = derive_seed(seed, "basis_geometry", "B")
    return compare_spectrum(_singular_values(view), untrained, max(view.basis.shape), draws, own)


def _embedding_spectrum(
    view: SignalView, untrained: Mapping[str, NDArray[np.float64]], draws: int, seed: int
) -> Spectrum:
    values, own = factored_singular_values(view.recipe, view.basis), derive_seed(seed, "basis_geometry", "E")
    return compare_spectrum(values, untrained, len(view.recipe), draws, own)


def _alignment(
    view: SignalView, untrained: Mapping[str, Untrained], texts: Sequence[str], k: int, draws: int, seed: int
) -> tuple[Alignment | None, list[str]]:
    """The alignment of the trained basis beside those of untrained ones, and notes on why one is missing."""
    if len(texts) < 2:
        return None, [f"alignment is absent: it needs at least two texts, got {len(texts)}"]
    why = "no alignment of the {} basis: its singular values are all alike, and no direction is strongest"
    if condition_number(_singular_values(view)) < ALIKE:
        return None, [why.format("trained")]
    captured = {name: each.captured for name, each in untrained.items() if each.captured is not None}
    own = derive_seed(seed, "basis_geometry", "trained")
    found = measure_alignment(read_residuals(view.model, texts), view.basis, k, draws, own)
    notes = [] if captured else [why.format("untrained")]
    return dataclasses.replace(found, untrained=captured), notes


def _spectrum_findings(spectra: Mapping[str, Spectrum]) -> tuple[dict[str, Finding], list[str]]:
    findings: dict[str, Finding] = {}
    ranks, notes = {}, []
    for matrix, spectrum in spectra.items():
        suffix = "" if matrix == "B" else "_E"
        for name, measure in SPECTRAL_MEASURES.items():
            value = measure(spectrum.own)
            gaussian = [measure(draw) for draw in spectrum.gaussian]
            if not np.isfinite(value):
                notes.append(f"{name}{suffix} is absent: {matrix} loses a dimension")
                continue
            # The median: the condition number of a square Gaussian matrix has no mean (Edelman, 1988).
            fresh = {name: measure(values) for name, values in spectrum.untrained.items()}
            controls = {"gaussian": float(np.median(gaussian)), **fresh}
            beside = {key: each for key, each in controls.items() if np.isfinite(each)}
            findings[name + suffix] = Finding(value, controls=beside)
            if name == "effective_rank":
                ranks[name + suffix] = gaussian
    raw = [predictive_pvalue(findings[metric].value, gaussian, "less") for metric, gaussian in ranks.items()]
    for (metric, gaussian), p, adjusted in zip(ranks.items(), raw, holm(raw).tolist(), strict=True):
        judged = concentrated_verdict(findings[metric].value, findings[metric].controls, adjusted)
        findings[metric] = dataclasses.replace(findings[metric], verdict=judged)
        notes.append(
            f"{metric}: as that of one more Gaussian matrix p = {p:.2g}, Holm-adjusted {adjusted:.2g}; Gaussian "
            f"matrices {min(gaussian):.4g} to {max(gaussian):.4g}"
        )
    if "B" in spectra:
        found, rows = spectra["B"], spectra["B"].rows
        controls = {
            "gaussian": float(np.mean([above_upper_edge(draw, rows) for draw in found.gaussian])),
            **{name: above_upper_edge(values, rows) for name, values in found.untrained.items()},
        }
        findings["above_edge"] = Finding(above_upper_edge(found.own, rows), controls=controls)
    return findings, notes


def _coherence_findings(
    coherences: Bases[Coherence] | None, bound: float, seed: int
) -> tuple[dict[str, Finding], list[str]]:
    if coherences is None:
        return {}, []
    values, own = by_metric(coherences.map(Coherence.headline)), coherences.own.mean
    largest, mean = values["coherence_max"], values["coherence_mean"]
    findings = {
        "coherence_max": Finding(largest.own, controls=largest.controls() | {"welch_bound": bound}),
        "coherence_mean": Finding(mean.own, bootstrap_interval(own, seed=seed), mean.controls()),
    }
    if largest.own < ORTHOGONAL:  # to the rotations it would be less by their rounding
        return findings, ["no verdict on coherence_mean: the signals of this basis are orthogonal by making"]
    return basis_verdicts(
        findings,
        values,
        {"coherence_mean": len(own)},
        minimum_units=MINIMUM_UNITS,
        experiment="basis_geometry",
    )


def _alignment_findings(found: Alignment | None, seed: int) -> tuple[dict[str, Finding], list[str]]:
    if found is None:
        return {}, []
    mean_p = predictive_pvalue(found.captured.mean(), found.random.mean(axis=0))
    adjusted = holm(found.pvalues())
    n_layers = len(adjusted)
    asked = {
        "alignment_first": ([0], adjusted[0]),
        "alignment_last": ([n_layers - 1], adjusted[-1]),
        "alignment_mean": (list(range(n_layers)), mean_p),
    }
    findings, notes = {}, []
    for metric, (layers, p) in asked.items():
        own = found.captured[layers].mean(axis=0)
        interval = bootstrap_interval(own, seed=seed)
        controls = {
            "random_direction": float(found.random[layers].mean()),
            "best_directions": float(found.best[layers].mean()),
            **{name: float(captured[layers].mean()) for name, captured in found.untrained.items()},
        }
        judged = aligned_verdict(interval, controls, p, len(own))
        findings[metric] = Finding(own.mean(), interval, controls, judged)
        notes.append(f"{metric}: against random subspaces p = {p:.2g}")
    return findings, notes
