"""The logit lens through a signal view: what the model would predict if the residual stream ended here.

Depth is counted in blocks: 0 is the embedding, l + 0.5 the stream between attention and MLP of block l, l + 1 the
stream behind it. ``resid_post`` of a block and ``resid_pre`` of the next are one stream and one point. Where a model
refines its last residual stream before it reads logits off it, the last point is the refined stream, so that readings
end in the model's prediction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from analyses.measures.depth import ORDINARY
from reflowlens.models.base import HookedModel
from reflowlens.models.text import TextInput
from reflowlens.signals import SignalView
from reflowlens.sweeps.injections import READ_LAST


class ResidualPoint(NamedTuple):
    """A place to read the residual stream."""

    depth: float
    label: str
    hook: str


def residual_points(n_layers: int) -> list[ResidualPoint]:
    """The 2 n_layers + 1 distinct points from the embedding to the end.

    >>> [point.label for point in residual_points(1)]
    ['0_pre', '0_mid', '0_post']
    """
    points = [ResidualPoint(0.0, "0_pre", "blocks.0.hook_resid_pre")]
    for layer in range(n_layers):
        points.append(ResidualPoint(layer + 0.5, f"{layer}_mid", f"blocks.{layer}.hook_resid_mid"))
        points.append(ResidualPoint(layer + 1.0, f"{layer}_post", f"blocks.{layer}.hook_resid_post"))
    return points


def lens_points(n_layers: int) -> list[ResidualPoint]:
    """The points that are read where every point costs a readout of the whole vocabulary for each of many prompts.

    All of them up to 12 blocks. Of deeper models the stream behind whole blocks, at most 25 of these, evenly spread,
    both ends and the half among them.

    >>> [point.label for point in lens_points(50)][:3]
    ['0_pre', '1_post', '3_post']
    """
    points = residual_points(n_layers)
    if n_layers <= ORDINARY:
        return points
    steps = min(n_layers, 2 * ORDINARY)
    return [points[2 * (step * n_layers // steps)] for step in range(steps + 1)]


def unread(n_layers: int) -> list[str]:
    """A note where `lens_points` leaves some out."""
    read, all_of_them = len(lens_points(n_layers)), len(residual_points(n_layers))
    return [f"the lens is read at {read} of {all_of_them} points of the stream"] if read < all_of_them else []


def depths_of(points: Sequence[ResidualPoint]) -> NDArray[np.float64]:
    """The depth of each, in blocks."""
    return np.array([point.depth for point in points])


def point_name(label: str) -> str:
    """What the stream has just passed at a point, for people.

    >>> [point_name(point.label) for point in residual_points(1)]
    ['embedding', 'attention 0', 'MLP 0']
    """
    layer, _, place = label.partition("_")
    return {"pre": "embedding", "mid": f"attention {layer}", "post": f"MLP {layer}"}[place]


@torch.no_grad()
def residual_stack(
    model: HookedModel,
    input: TextInput,
    *,
    last_only: bool = True,
    points: Sequence[ResidualPoint] | None = None,
) -> Float[Tensor, "point prompt *pos d_model"]:
    """The residual stream of each prompt at some points: at its own last token, or at every position, padding too.

    A block that writes once leaves the stream halfway through it as it was read. The last point is what logits are read
    off. ``points``: default all, the last of which the end has to be.
    """
    tokens, lengths = model.tokens_and_lengths(input)
    names = [point.hook for point in (residual_points(model.cfg.n_layers) if points is None else points)]
    names = [name if name in model.hook_dict else name.replace("resid_mid", "resid_pre") for name in names]
    if not model.reads_last_stream:
        names[-1] = READ_LAST
    _, cache = model.run_with_cache(tokens, return_type=None, names_filter=names, return_cache_object=False)
    stack = torch.stack([cache[name] for name in names])
    if not last_only:
        return stack
    rows = torch.arange(len(lengths), device=stack.device)
    return stack[:, rows, torch.tensor(lengths, device=stack.device) - 1]


@dataclass(frozen=True)
class LensReading:
    """What the lens says of each prompt's next token at every point; arrays are [point, prompt].

    Args:
        probability, rank, logit: of the target; rank 1 is the most probable of the real tokens.
        top: the most probable token.
        top_probability: its probability.
        entropy: of the lens's distribution, in nats.
        kl: from the model's own distribution to the lens's, KL(final ‖ lens), in nats.
    """

    probability: NDArray[np.float64]
    rank: NDArray[np.int64]
    logit: NDArray[np.float64]
    top: NDArray[np.int64]
    top_probability: NDArray[np.float64]
    entropy: NDArray[np.float64]
    kl: NDArray[np.float64]

    @property
    def crystallisation(self) -> NDArray[np.int64]:
        """For each prompt the first point from which the final top-1 stays top-1."""
        return first_settled(self.top == self.top[-1])


@torch.no_grad()
def read_lens(
    view: SignalView, stack: Float[Tensor, "point prompt d_model"], targets: Int[Tensor, " prompt"] | Sequence[int]
) -> LensReading:
    """Read every point of every prompt through the final norm and the view's readout, over the real tokens.

    The last is the model's prediction, which the others are held against.
    """
    targets = torch.as_tensor(targets, device=stack.device)
    final = lens_log_probabilities(view.final, stack[-1])
    parts: list[list[Tensor]] = []
    for reader, point in zip(readers(view, len(stack)), stack, strict=True):
        logits = reader.logits(reader.readout(point))[:, : view.n_tokens].float()
        log_p = logits.log_softmax(dim=-1)
        target_logit = logits.gather(1, targets[:, None])
        top = log_p.max(dim=-1)
        parts.append(
            [
                log_p.gather(1, targets[:, None]).squeeze(1).exp(),
                (logits > target_logit).sum(dim=-1) + 1,
                target_logit.squeeze(1),
                top.indices,
                top.values.exp(),
                -(log_p.exp() * log_p).sum(dim=-1),
                (final.exp() * (final - log_p)).sum(dim=-1),
            ]
        )
    return LensReading(*(torch.stack(column).cpu().numpy() for column in zip(*parts, strict=True)))


def readers(view: SignalView, n_points: int) -> list[SignalView]:
    """By which each point of a :func:`residual_stack` is read: the last as the model's own readout reads it."""
    return [view] * (n_points - 1) + [view.final]


def lens_log_probabilities(view: SignalView, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch token"]:
    """log softmax of the lens's logits over the real tokens."""
    return view.logits(view.readout(resid))[..., : view.n_tokens].float().log_softmax(dim=-1)


def top_tokens(view: SignalView, resid: Float[Tensor, "*batch d_model"]) -> Int[Tensor, "*batch"]:
    """The most probable of the real tokens, by the lens."""
    return view.logits(view.readout(resid))[..., : view.n_tokens].argmax(dim=-1)


def first_settled(holds: NDArray[np.bool_]) -> NDArray[np.int64]:
    """For each column of [point, prompt] the first point from which the condition holds to the end.

    >>> first_settled(np.array([[True], [False], [True], [True]]))
    array([2])
    """
    settled = np.logical_and.accumulate(holds[::-1], axis=0)
    return len(holds) - settled.sum(axis=0)
