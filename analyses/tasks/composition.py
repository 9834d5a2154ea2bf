"""Composition of heads: how much a later head reads of what an earlier one writes (Elhage et al., 2021).

A head reads the stream through two bilinear forms, QK of queries and keys and OV of values, and writes through OV. The
score of an earlier head A and a later head B is ‖OV_A M_B‖ / (‖OV_A‖ ‖M_B‖), in Frobenius norms, with M_B = QK for
Q-composition, its transpose for K-composition and OV for V-composition.

Any two matrices overlap somewhat. The baseline are random ones of equal shape and spectrum: both matrices keep their
singular values, and the directions in which A writes and B reads are drawn anew. The mean of the squared score is then
1 / d_model whatever the spectra are; how far it scatters depends on them, which is why every pair has its own interval.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor
from transformer_lens import FactoredMatrix

from analyses.result.finding import Finding
from analyses.result.model_identity import hash_of
from analyses.result.result import Result
from analyses.statistics.draws import derive_generator
from analyses.statistics.pvalues import holm
from analyses.statistics.verdicts import SIGNIFICANCE
from analyses.tasks.answered import numbers, shown
from analyses.tasks.writers import check_heads_and_mlps, held
from reflowlens.arguments import is_one_of, names_given, number_of_runs
from reflowlens.errors import ReflowlensError
from reflowlens.figures.heatmap import heatmap
from reflowlens.models.base import HookedModel
from reflowlens.models.components import Block
from reflowlens.models.decoder import Decoder
from reflowlens.models.unwrapping import hooked_model
from reflowlens.progress import bar

MODES = ("Q", "K", "V")
_STRONGEST = 50
_TINY = torch.finfo(torch.float32).tiny
_AT_ONCE = 2**24  # numbers of a [draw, row, column] block


@torch.no_grad()
def composition_scores(
    model: HookedModel,
    modes: Sequence[str] = MODES,
    *,
    fold_norms: bool = True,
    draws: int = 1000,
    seed: int = 0,
    quick: bool = False,
    progress: bool | None = None,
) -> Result:
    """Q-, K- and V-composition of every two heads of different layers, beside random matrices of equal spectrum.

    It is read off weights: no prompt is run, and there is no task. Attention patterns, MLPs between the heads, biases,
    norms of queries and keys and rotary positions (the score is that at one position) are left out.

    Args:
        model: a decoder; query heads that share keys and values are each taken with theirs.
        modes: ``"Q"``, ``"K"``, ``"V"``, or several.
        fold_norms: multiply the norm's weight into what a head reads (and writes, where a norm stands behind
            attention) and, of a LayerNorm, leave out the mean, as the model does; False leaves both out, as in
            ``model.all_composition_scores``.
        draws: of the baseline.
        quick: a fifth of the draws.

    Returns:
        A Result with frames ``pairs`` (a row a mode and pair of heads: ``score``, the baseline's mean and the middle
        95% of its draws, ``z``, the score in standard deviations from that mean, and ``p``, of a score as large, after
        Holm's correction over the pairs of the mode) and ``strongest``; figures ``q``, ``k``, ``v`` (earlier head ×
        later head, z). Metrics, by mode: ``beyond_q`` is the share of pairs above their own interval (expected: 0.025),
        ``significant_q`` the number with p < 0.05.

    Raises:
        ReflowlensError: the model has fewer than two layers or no such heads, or there is no such mode.

    Example: ``composition_scores(model, "K").frames["strongest"].head()``
    """
    hooked = hooked_model(model)
    check_heads_and_mlps(hooked, "composition")
    assert isinstance(hooked, Decoder)
    chosen = names_given(modes, "modes")
    for mode in chosen:
        if not is_one_of(mode, MODES):
            raise ReflowlensError(f"modes must be 'Q', 'K' or 'V', got {mode!r}")
    if hooked.cfg.n_layers < 2:
        raise ReflowlensError("heads compose across layers, and this model has one")
    draws = max(50, number_of_runs(draws, "draws", 2) // (5 if quick else 1))
    circuits = Circuits.of(hooked, fold_norms)
    generator, sizes = derive_generator(seed, "composition_scores"), circuits.ov.A.shape[-2:]
    overlaps = random_overlaps(sizes[0], min(sizes), draws, generator).to(circuits.ov.A.device)
    frames, findings, figures = [], {}, {}
    for mode in bar(chosen, show=shown(progress), unit="mode", desc="composition"):
        frame = _pairs(circuits, mode, overlaps)
        frames.append(frame)
        above, significant = frame["score"] > frame["random_high"], frame["p"] < SIGNIFICANCE
        name = mode.lower()
        findings[f"beyond_{name}"] = Finding(above.mean(), controls={"random_matrices": frame["_null_above"].iloc[0]})
        findings[f"significant_{name}"] = Finding(float(significant.sum()))
        figures[name] = _figure(frame, mode)
    pairs = pd.concat(frames, ignore_index=True).drop(columns="_null_above")
    strongest = pairs.loc[pairs["z"].nlargest(_STRONGEST).index]
    return Result(
        name="composition_scores",
        title="Composition of Heads",
        params={
            "modes": chosen,
            "fold_norms": fold_norms,
            "draws": draws,
            "seed": seed,
            "quick": quick,
            "model_hash": hash_of(hooked),
            "passes": 0,
        },
        findings=findings,
        frames={"pairs": pairs, "strongest": strongest},
        figures=figures,
        definitions=_definitions(chosen),
    )


@dataclass(frozen=True, eq=False)
class Circuits:
    """QK and OV of every head, [layer, head, d_model, d_model] in factors, as they stand towards the stream."""

    qk: FactoredMatrix
    ov: FactoredMatrix

    @classmethod
    def of(cls, model: Decoder, fold_norms: bool) -> Circuits:
        """The norm's divisor, which scales a head's whole input, drops out of the scores."""
        W_Q, W_K, W_V, W_O = (W.detach().float() for W in (model.W_Q, model.W_K, model.W_V, model.W_O))
        if fold_norms:
            blocks = cast("list[Block]", list(model.blocks))
            weights = torch.stack([block.ln1.w.detach().float() for block in blocks])
            W_Q, W_K, W_V = (weights[:, None, :, None] * W for W in (W_Q, W_K, W_V))
            if blocks[0].ln1.centered:
                W_Q, W_K, W_V = (W - W.mean(dim=2, keepdim=True) for W in (W_Q, W_K, W_V))
            W_O = torch.stack([held(block.ln1_post, W, torch.ones(1)) for block, W in zip(blocks, W_O, strict=True)])
        return cls(FactoredMatrix(W_Q, W_K.mT), FactoredMatrix(W_V, W_O))

    def reading(self, mode: str) -> FactoredMatrix:
        """What the later head reads the stream with."""
        return {"Q": lambda: self.qk, "K": lambda: self.qk.T, "V": lambda: self.ov}[mode]()

    def scores(self, mode: str) -> Iterator[Float[Tensor, "head later"]]:
        """Of the heads of each layer but the last with all heads of later layers, layer by layer.

        ‖A B M‖ = ‖R B M‖ where A = Q R, and so of the later head's last factor: products are of small matrices.
        """
        reading = self.reading(mode)
        writes = torch.linalg.qr(self.ov.A).R @ self.ov.B  # [layer, head, rank, d_model]
        reads = reading.A @ torch.linalg.qr(reading.B.mT).R.mT  # [layer, head, d_model, rank]
        writes, reads = (x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=_TINY) for x in (writes, reads))
        for layer, heads in enumerate(writes[:-1]):
            later = reads[layer + 1 :].flatten(0, 1)
            yield torch.stack([(head @ later).norm(dim=(-2, -1)) for head in heads])


def _pairs(circuits: Circuits, mode: str, overlaps: Float[Tensor, "draw rank rank"]) -> pd.DataFrame:
    """A row a pair of heads, the earlier layer's first."""
    n_heads = circuits.ov.A.shape[1]
    rank, draws = overlaps.shape[1], len(overlaps)
    earlier, reading = (spectrum(matrix)[..., :rank] for matrix in (circuits.ov, circuits.reading(mode)))
    rows, above = [], []
    for layer, found in enumerate(circuits.scores(mode)):
        scores = numbers(found)
        later = reading[layer + 1 :].flatten(0, 1)
        drawn = numbers(torch.einsum("hi,mij,kj->mhk", earlier[layer], overlaps, later).clamp(min=0).sqrt())
        mean, sd = drawn.mean(axis=0), drawn.std(axis=0, ddof=1)
        low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
        z = (scores - mean) / sd
        head, place = np.indices(scores.shape).reshape(2, -1)
        rows.append(
            pd.DataFrame(
                {
                    "mode": mode,
                    "layer": layer,
                    "head": head,
                    "later_layer": layer + 1 + place // n_heads,
                    "later_head": place % n_heads,
                    "score": scores.ravel(),
                    "random": mean.ravel(),
                    "random_low": low.ravel(),
                    "random_high": high.ravel(),
                    "z": z.ravel(),
                    "p": tail(scores**2, drawn**2).ravel(),
                }
            )
        )
        above.append((drawn[: draws // 2] > np.quantile(drawn[draws // 2 :], 0.975, axis=0)).mean())
    frame = pd.concat(rows, ignore_index=True)
    return frame.assign(p=holm(frame["p"]), _null_above=float(np.mean(above)))


def random_overlaps(d_model: int, rank: int, draws: int, generator: torch.Generator) -> Float[Tensor, "draw rank rank"]:
    """Squared inner products of ``rank`` directions with as many others, both sets orthonormal and drawn at random.

    With A = U S Vᵀ and B = X T Yᵀ the score is ‖S W T‖ / (‖S‖ ‖T‖), W = Vᵀ X. Of directions drawn anew W is a block of
    a random rotation of the stream, and the squared score is the mean of W² under both spectra.
    """
    at_once = max(1, _AT_ONCE // (d_model * rank))
    sizes = [min(at_once, draws - start) for start in range(0, draws, at_once)]
    frames = (torch.linalg.qr(torch.randn(size, d_model, rank, generator=generator)).Q for size in sizes)
    return torch.cat([frame[:, :rank].square() for frame in frames])


def spectrum(matrix: FactoredMatrix) -> Float[Tensor, "layer head rank"]:
    """Squared singular values as shares of their sum, in no particular order."""
    # The singular values of A B are those of the small matrix R_A R_Bᵀ of both factors' QR.
    left, right = torch.linalg.qr(matrix.A).R, torch.linalg.qr(matrix.B.mT).R
    squares = torch.linalg.svdvals(left @ right.mT).square()
    return squares / squares.sum(dim=-1, keepdim=True).clamp(min=_TINY)


def tail(squares: NDArray[np.float64], drawn: NDArray[np.float64]) -> NDArray[np.float64]:
    """How likely random matrices are to have a squared score of this size or more, [pair].

    A squared score is a weighted sum of squares of nearly normal overlaps, and so about gamma-distributed, with the
    mean and variance of its draws [draw, pair] (Satterthwaite, 1946). Counting draws beyond could not go below one in
    as many, which is too few for thousands of pairs.
    """
    mean, variance = drawn.mean(axis=0), drawn.var(axis=0, ddof=1)
    return np.asarray(stats.gamma.sf(squares, mean**2 / variance, scale=variance / mean))


def _figure(frame: pd.DataFrame, mode: str) -> go.Figure:
    names = frame.assign(
        earlier="L" + frame["layer"].astype(str) + "H" + frame["head"].astype(str),
        later="L" + frame["later_layer"].astype(str) + "H" + frame["later_head"].astype(str),
    )
    return heatmap(
        names,
        "later",
        "earlier",
        "z",
        hover=["score", "random", "p"],
        title=f"{mode}-composition",
        x_title="later head, which reads",
        y_title="earlier head, which writes",
        z_title="sd above random",
    )


def _definitions(modes: Sequence[str]) -> dict[str, str]:
    return {
        f"{what}_{mode.lower()}": text.format(mode=mode)
        for mode in modes
        for what, text in (
            (
                "beyond",
                "share of pairs of heads whose {mode}-composition score lies above the middle 95% of random matrices "
                "of their spectra; random_matrices: the same of half of the draws, held against the other half",
            ),
            (
                "significant",
                f"number of pairs whose {{mode}}-composition score lies above random matrices, p < "
                f"{SIGNIFICANCE} after Holm's correction",
            ),
        )
    }
