"""Frames and figures of Basis Geometry."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from scipy.cluster.hierarchy import leaves_list, linkage

from analyses.claims import UNTRAINED
from analyses.controls.bases import Bases
from analyses.experiments.basis_geometry.alignment import Alignment
from analyses.experiments.basis_geometry.coherence import CENTRES, Coherence, cosine_matrix
from analyses.experiments.basis_geometry.spectra import Spectrum
from analyses.measures.knockout import codebook_texts
from analyses.statistics.intervals import bootstrap_band
from analyses.statistics.pvalues import holm
from reflowlens.figures.builders import line_with_band
from reflowlens.figures.heatmap import heatmap
from reflowlens.signals import SignalView

GRAM_SIGNALS = 40
CONTROLS = (
    *("gaussian", *UNTRAINED, "rotated_basis", "lower_edge", "upper_edge"),
    *("random_direction", "best_directions"),
)


def geometry_frames(
    view: SignalView,
    spectra: Mapping[str, Spectrum],
    coherences: Bases[Coherence] | None,
    alignment: Alignment | None,
    seed: int,
) -> dict[str, pd.DataFrame]:
    """``spectrum``, and of what was measured ``signals``, ``cosines``, ``gram`` and ``alignment``."""
    frames = {
        "spectrum": pd.concat(
            [_spectrum_frame(matrix, spectrum) for matrix, spectrum in spectra.items()], ignore_index=True
        )
    }
    if coherences:
        cosines = cosine_matrix(view.basis).cpu()
        frames["signals"] = _signal_frame(view, coherences.own, cosines)
        frames["cosines"] = _cosine_frame(coherences)
        frames["gram"] = _gram_frame(cosines)
    if alignment:
        frames["alignment"] = _alignment_frame(alignment, seed)
    return frames


def geometry_figures(frames: Mapping[str, pd.DataFrame]) -> dict[str, go.Figure]:
    """``scree_B``, ``scree_E``, ``cosines``, ``gram`` and ``alignment``, of the frames that there are."""
    titles = {"B": "Singular values of the basis", "E": "Singular values of the embedding E = R B"}
    figures = {}
    for matrix, spectrum in frames["spectrum"].groupby("matrix", sort=False):
        figures[f"scree_{matrix}"] = line_with_band(
            spectrum,
            "index",
            "singular_value",
            "low",
            "high",
            color="series",
            controls=CONTROLS,
            log_y=True,
            title=titles[str(matrix)],
            x_title="number",
            y_title="singular value",
        )
    if "cosines" in frames:
        figures["cosines"] = line_with_band(
            frames["cosines"],
            "cosine",
            "share",
            color="basis",
            controls=CONTROLS,
            title="Cosines between the signals' rows of the basis",
            y_title="share of pairs",
        )
        apart = frames["gram"].query("signal != other")["cosine"].abs().max()
        figures["gram"] = heatmap(
            frames["gram"],
            "signal",
            "other",
            "cosine",
            z_range=(-apart, apart),
            title="Cosines of the most alike signals, clustered",
        ).update_layout(height=640)
    if "alignment" in frames:
        figures["alignment"] = line_with_band(
            frames["alignment"],
            "layer",
            "share",
            "low",
            "high",
            color="series",
            controls=CONTROLS,
            title="Residual variance within the strongest directions of the basis",
            x_title="layer that reads the stream (the last: the unembedding)",
            y_title="share of the variance",
        )
    return figures


def _spectrum_frame(matrix: str, spectrum: Spectrum) -> pd.DataFrame:
    """A row a series and singular value; the Gaussian's with the range of its draws, and Marchenko and Pastur's edges.

    A square matrix has no lower edge but 0.
    """
    n = len(spectrum.own)
    series = {
        "trained": (spectrum.own, np.nan, np.nan),
        "gaussian": (spectrum.gaussian.mean(axis=0), spectrum.gaussian.min(axis=0), spectrum.gaussian.max(axis=0)),
        **{name: (values, np.nan, np.nan) for name, values in spectrum.untrained.items()},
    }
    frames = [
        pd.DataFrame(
            {
                "matrix": matrix,
                "series": name,
                "index": range(1, len(values) + 1),
                "singular_value": values,
                "low": low,
                "high": high,
            }
        )
        for name, (values, low, high) in series.items()
    ]
    for name, edge in zip(("lower_edge", "upper_edge"), spectrum.edges(), strict=True):
        if edge > 0:
            ends = {"index": [1, n], "singular_value": edge, "low": np.nan, "high": np.nan}
            frames.append(pd.DataFrame({"matrix": matrix, "series": name, **ends}))
    return pd.concat(frames, ignore_index=True)


def _signal_frame(view: SignalView, coherence: Coherence, cosines: torch.Tensor) -> pd.DataFrame:
    """A row a signal, the one most like another first."""
    others = cosines.abs().fill_diagonal_(-1.0).argmax(dim=1)
    frame = pd.DataFrame(
        {
            "signal": range(len(cosines)),
            "norm": view.basis.norm(dim=1).cpu().numpy(),
            "coherence_max": coherence.largest,
            "coherence_mean": coherence.mean,
            "nearest": others.tolist(),
            "cosine": cosines.gather(1, others[:, None])[:, 0].tolist(),
            "codebook": codebook_texts(view),
        }
    )
    return frame.sort_values("coherence_max", ascending=False, kind="stable", ignore_index=True)


def _cosine_frame(coherences: Bases[Coherence]) -> pd.DataFrame:
    """Shares of pairs by bin of cosine and basis, rotations in the mean, without the empty ends."""
    series = coherences.series("trained")
    densities = {name: np.mean([each.density for each in some], axis=0) for name, some in series.items()}
    filled = np.flatnonzero(sum(densities.values()))
    kept = slice(filled.min(), filled.max() + 1)
    frames = [
        pd.DataFrame({"basis": name, "cosine": CENTRES[kept], "share": density[kept]})
        for name, density in densities.items()
    ]
    return pd.concat(frames, ignore_index=True)


def _gram_frame(cosines: torch.Tensor) -> pd.DataFrame:
    """Cosines among the signals that are most like another, neighbours in a hierarchical clustering side by side."""
    size = cosines.abs().fill_diagonal_(0.0)
    chosen = size.amax(dim=1).argsort(descending=True)[:GRAM_SIGNALS]
    block = cosines[chosen][:, chosen].numpy()
    order = leaves_list(linkage(block, "average")) if len(chosen) > 2 else np.arange(len(chosen))
    signals = chosen.numpy()[order]
    return pd.DataFrame(
        {
            "signal": np.tile(signals, len(signals)),
            "other": np.repeat(signals, len(signals)),
            "cosine": block[np.ix_(order, order)].ravel(),
        }
    )


def _alignment_frame(found: Alignment, seed: int) -> pd.DataFrame:
    """A row a layer and series; of the basis with intervals over texts, p raw and Holm-adjusted over layers."""
    low, high = bootstrap_band(found.captured.T, seed=seed)
    p = np.array(found.pvalues())
    layers = range(len(p))
    nothing = np.full(len(p), np.nan)
    draws = found.random
    series = {
        "trained": (found.captured.mean(axis=1), low, high, p, holm(p)),
        "random_direction": (draws.mean(axis=1), draws.min(axis=1), draws.max(axis=1), nothing, nothing),
        "best_directions": (found.best, nothing, nothing, nothing, nothing),
    }
    for name, captured in found.untrained.items():
        series[name] = (captured.mean(axis=1), nothing, nothing, nothing, nothing)
    frames = [
        pd.DataFrame(
            {"series": name, "layer": layers, "share": share, "low": below, "high": above, "p": raw, "p_holm": adjusted}
        )
        for name, (share, below, above, raw, adjusted) in series.items()
    ]
    return pd.concat(frames, ignore_index=True)
