"""The flow's velocity as a field: how long it is, in how many directions it points, how it changes from place to place.

What it does at the points z that a model visits is compared with what it does at two kinds of points that no text leads
to: z turned by one random rotation, which keeps distances, and z with each channel's values in an order of their own,
which keeps every channel's distribution. What is the same there is the network's, not the text's.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from analyses.experiments.refinement.gates import final_norm, gated, refiners_of
from analyses.experiments.refinement.inner import AS_IS, entropy_of_shares
from analyses.experiments.refinement.texts import Texts, as_frame, mean_by_document
from analyses.statistics.draws import derive_generator, derive_seed
from analyses.statistics.intervals import Interval
from analyses.statistics.resampling import percentile_interval, resampled_means
from reflowlens.models.base import HookedModel
from reflowlens.models.flow_refiner import FlowRefiner
from reflowlens.signals import random_rotation

ROTATED, SHUFFLED_CHANNELS = "rotated", "shuffled_channels"
ELSEWHERE = (ROTATED, SHUFFLED_CHANNELS)
_JACOBIANS = 8  # of each text, evenly spaced
_LEAST = torch.finfo(torch.float64).tiny
_RESAMPLES = 500  # each asks for the eigenvalues of a matrix


class Points(NamedTuple):
    """Where the flow starts, a row a token, and which text the token is of."""

    z: Float[Tensor, "n flow"]
    text: Int[np.ndarray, " n"]


@torch.no_grad()
def visited(model: HookedModel, texts: Texts) -> Points:
    """z of every token that is read."""
    flow = cast(FlowRefiner, refiners_of(model)[1])
    parts = []
    for rows, tokens, _ in texts.batches():
        z = gated(model, final_norm(model, tokens), flow=False) @ flow.W_down
        parts.append(z[torch.as_tensor(texts.is_read[rows, : tokens.shape[1]], device=z.device)])
    return Points(torch.cat(parts), np.repeat(np.arange(len(texts.tokens)), texts.lengths))


def elsewhere(z: Float[Tensor, "n flow"], seed: int) -> dict[str, Float[Tensor, "n flow"]]:
    """The points of a model, and both kinds of others."""
    generator = derive_generator(seed, SHUFFLED_CHANNELS)
    order = torch.rand(z.shape, generator=generator).argsort(dim=0).to(z.device)
    rotation = random_rotation(z.shape[1], derive_seed(seed, ROTATED)).to(z)
    return {AS_IS: z, ROTATED: z @ rotation, SHUFFLED_CHANNELS: z.gather(0, order)}


@torch.no_grad()
def velocity_frames(model: HookedModel, texts: Texts, seed: int) -> dict[str, pd.DataFrame]:
    """Three frames, in each of which `input` is "model", "rotated" or "shuffled_channels".

    `velocity`, a row a `measure`, with intervals over documents: "ratio", mean ‖v‖/‖z‖. "directions", how many v uses:
    the exponential of the entropy of its covariance's eigenvalues as shares; "input_directions": the same of z.
    "constant": ‖mean v‖² as a share of the mean ‖v‖². "affine": share of v's variance that an affine map of z gives,
    fitted on one half of the texts and measured on the other. "stretch": mean largest singular value of ∂v/∂z.
    `directions`, a row a principal component `of` "velocity" or "latent" (z): its `share` of variance, `cumulative`.
    `jacobian`, a row a singular value of ∂v/∂z by size, mean over tokens; `real_part`: of its eigenvalues, by size.
    """
    flow, (own, text) = cast(FlowRefiner, refiners_of(model)[1]), visited(model, texts)
    chosen = _spaced(text, _JACOBIANS)
    measures, components, jacobians = [], [], []
    for name, z in elsewhere(own, seed).items():
        v, at = flow.velocity(z), {"input": name}
        ratio = (v.norm(dim=1) / z.norm(dim=1)).double().cpu().numpy()
        J = jacobian(flow, z[chosen])
        singular = torch.linalg.svdvals(J).double().cpu().numpy()
        of_jacobian = as_frame(_by_text(singular, text[chosen], seed), "component", **at)
        real = torch.linalg.eigvals(J).real.sort(dim=1, descending=True).values.mean(dim=0)
        jacobians.append(of_jacobian.rename(columns={"value": "singular_value"}).assign(real_part=real.tolist()))
        means = {"ratio": _by_text(ratio[:, None], text, seed)[1]}
        means |= {"directions": directions(v, text, seed), "input_directions": directions(z, text, seed)}
        means |= {"stretch": _by_text(singular[:, :1], text[chosen], seed)[1]}
        alone = {"constant": float(v.mean(0).square().sum() / v.square().sum(1).mean()), "affine": _affine(z, v, text)}
        means |= {measure: (value, Interval(np.nan, np.nan)) for measure, value in alone.items()}
        measures.append(as_frame(means, "measure", **at))
        for of, points in (("velocity", v), ("latent", z)):
            shares = variance_shares(points)
            own_rows = {"component": range(1, len(shares) + 1), "share": shares, "cumulative": shares.cumsum()}
            components.append(pd.DataFrame({**at, "of": of, **own_rows}))
    tables = {"velocity": measures, "directions": components, "jacobian": jacobians}
    return {name: pd.concat(parts, ignore_index=True) for name, parts in tables.items()}


def jacobian(flow: FlowRefiner, z: Float[Tensor, "n flow"]) -> Float[Tensor, "n flow flow"]:
    """∂v/∂z at each point, [·, i, j] of v's channel j by z's channel i: A₁ between which and A₂ stands GELU's slope."""
    a = z @ flow.W_in + flow.b_in
    slope = torch.special.ndtr(a) + a * (-a.square() / 2).exp() / (2 * torch.pi) ** 0.5
    return (flow.W_in * slope[:, None]) @ flow.W_out


def variance_shares(points: Float[Tensor, "n flow"]) -> NDArray[np.float64]:
    """Of principal components, largest first."""
    values = torch.linalg.eigvalsh(points.double().T.cov()).flip(0).clamp(min=0)
    return (values / values.sum().clamp(min=_LEAST)).cpu().numpy()


def directions(points: Float[Tensor, "n flow"], text: Int[np.ndarray, " n"], seed: int) -> tuple[float, Interval]:
    """The effective number of directions that points vary in, with its interval over texts drawn whole."""
    centred = (points.double() - points.double().mean(0)).cpu()
    width = centred.shape[1]
    by_text = centred.split(np.bincount(np.unique(text, return_inverse=True)[1]).tolist())
    moments = [torch.cat([(own.T @ own).flatten(), own.sum(0), own.new_tensor([len(own)])]) for own in by_text]
    table = torch.stack(moments)
    scale = table.abs().amax(0).clamp(min=_LEAST)  # resamples are in float32

    def effective(sums: Float[Tensor, "draw moment"]) -> NDArray[np.float64]:
        second, first, count = sums.split([width**2, width, 1], dim=1)
        mean = first / count
        covariance = (second / count).unflatten(1, (width, width)) - mean[:, :, None] * mean[:, None]
        return entropy_of_shares(torch.linalg.eigvalsh(covariance).clamp(min=0)).exp().numpy()

    drawn = resampled_means(table / scale, resamples=_RESAMPLES, seed=seed)
    interval = percentile_interval(effective(torch.as_tensor(drawn).double() * scale))
    return float(effective(table.sum(0, keepdim=True))[0]), interval


class AffineMap(NamedTuple):
    """z B + c, the best for v in the sense of least squares."""

    B: Float[Tensor, "flow flow"]
    c: Float[Tensor, " flow"]

    @classmethod
    def fitted(cls, z: Float[Tensor, "n flow"], v: Float[Tensor, "n flow"]) -> AffineMap:
        """Also where z does not vary in all directions."""
        centre, mean = z.double().mean(0), v.double().mean(0)
        B = torch.linalg.pinv(z.double() - centre) @ (v.double() - mean)
        return cls(B.to(v), (mean - centre @ B).to(v))

    def __call__(self, z: Float[Tensor, "*batch flow"]) -> Float[Tensor, "*batch flow"]:
        return z @ self.B + self.c


def halves(text: Int[np.ndarray, " n"]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which tokens are of texts with an even number, and which of others."""
    even = text % 2 == 0
    return even, ~even


def _affine(z: Float[Tensor, "n flow"], v: Float[Tensor, "n flow"], text: Int[np.ndarray, " n"]) -> float:
    left = total = 0.0
    for fitted, measured in (halves(text), halves(text)[::-1]):
        best = AffineMap.fitted(z[fitted], v[fitted])
        left += float((v[measured] - best(z[measured])).square().sum())
        total += float((v[measured] - v[measured].mean(0)).square().sum())
    return 1 - left / total if total > 0 else 1.0


def _spaced(text: Int[np.ndarray, " n"], each: int) -> NDArray[np.int64]:
    """At most so many rows of each text, evenly spaced."""
    places = [np.flatnonzero(text == number) for number in np.unique(text)]
    return np.concatenate([own[np.unique(np.linspace(0, len(own) - 1, each).round().astype(int))] for own in places])


def _by_text(
    values: Float[np.ndarray, "n column"], text: Int[np.ndarray, " n"], seed: int
) -> dict[int, tuple[float, Interval]]:
    """The mean of every column, numbered from 1, over texts drawn whole."""
    number = np.unique(text, return_inverse=True)[1]
    sums = {column: np.bincount(number, own).astype(np.float64) for column, own in enumerate(values.T, start=1)}
    return mean_by_document(sums, np.bincount(number), seed)
