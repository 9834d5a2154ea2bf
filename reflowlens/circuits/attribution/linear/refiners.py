"""The refiners of a TTTFlow at the last position of a prompt, as linear maps: what logits are read off is theirs.

The inner learner is held at what it has become there: z = q W_t + c_t, and the divisors of its two norms. It is then an
affine map of the stream. z U is linear in the flow step as it is, and its velocity's neurons are nodes like an MLP's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from reflowlens.circuits.attribution.linear.replacement import (
    Heads,
    Replacement,
    Units,
    Written,
    chosen_units,
    no_units,
)
from reflowlens.models.flow_refiner import FlowRefiner
from reflowlens.models.ttt_flow import TTTFlow
from reflowlens.models.ttt_linear import INNER_EPS, OUT_EPS, TTTLinear

_STATE = ("W", "c", "grad")


@dataclass(frozen=True)
class FrozenLearner:
    """The inner learner as it is at the last position.

    Args:
        W_Q: to the queries of each head.
        W, c: the inner model there, all steps up to this position taken.
        inner_scale, scale: the divisors of the norm of each head, and of that of all heads' outputs.
        W_O: times the gate.
        out: what the heads give there.
    """

    W_Q: Float[Tensor, "d_model head f"]
    W: Float[Tensor, "head f g"]
    c: Float[Tensor, "head f"]
    w_inner: Float[Tensor, "head f"]
    b_inner: Float[Tensor, "head f"]
    inner_scale: Float[Tensor, "head 1"]
    w_norm: Float[Tensor, " d_model"]
    b_norm: Float[Tensor, " d_model"]
    scale: Float[Tensor, ""]
    W_O: Float[Tensor, "d_model d_model"]
    out: Float[Tensor, "head f"]

    @staticmethod
    def points(ttt: TTTLinear, n_tokens: int) -> list[str]:
        """The hook points that it is made of: the state is that of the last mini-batch."""
        step = f"ttt.steps.{(n_tokens - 1) // ttt.chunk}"
        return [*(f"ttt.hook_{part}" for part in ("q", "k", "out")), *(f"{step}.hook_{part}" for part in _STATE)]

    @classmethod
    def of(cls, ttt: TTTLinear, cache: Mapping[str, Tensor]) -> FrozenLearner:
        q, k, out = (cache[f"ttt.hook_{part}"][0] for part in ("q", "k", "out"))
        step = (len(q) - 1) // ttt.chunk
        W, c, G = (cache[f"ttt.steps.{step}.hook_{part}"][0] for part in _STATE)
        k = k[step * ttt.chunk :]
        W = W - ttt.rate * einsum(k, G, "pos head f, head pos g -> head f g")
        c = c - ttt.rate * G.sum(1)
        z = einsum(q[-1], W, "head f, head f g -> head g") + c
        return cls(
            W_Q=ttt.W_Q.detach().unflatten(1, (ttt.n_heads, -1)),
            W=W,
            c=c,
            w_inner=ttt.w_inner.detach(),
            b_inner=ttt.b_inner.detach(),
            inner_scale=(z.var(-1, keepdim=True, correction=0) + INNER_EPS).sqrt(),
            w_norm=ttt.w_norm.detach(),
            b_norm=ttt.b_norm.detach(),
            scale=(out[-1].var(correction=0) + OUT_EPS).sqrt(),
            W_O=(ttt.gate.sigmoid() * ttt.W_O).detach(),
            out=out[-1],
        )

    def back(self, gradient: Float[Tensor, "target d_model"]) -> Float[Tensor, "target d_model"]:
        """From behind it to in front of it, the way around included."""
        return gradient + self._from_outs(self._to_outs(gradient))[0]

    def back_from_heads(
        self, gradient: Float[Tensor, "target d_model"], heads: Int[Tensor, " target"]
    ) -> tuple[Float[Tensor, "target d_model"], Float[Tensor, " target"]]:
        """From what one head a target writes, and what constants add to that."""
        own = torch.nn.functional.one_hot(heads, len(self.W)).to(gradient)
        return self._from_outs(self._to_outs(gradient) * own[..., None])

    def written(
        self, out: Float[Tensor, "*row head f"], scale: Float[Tensor, "*#row"] | None = None
    ) -> Float[Tensor, "*row head d_model"]:
        """What heads add to the stream, but for the bias of the norm: each has its own share of the mean.

        Args:
            scale: the norm's divisor; None: that of the prompt.
        """
        W_O = self.w_norm[:, None] * self.W_O
        apart = einsum(out, W_O.unflatten(0, out.shape[-2:]), "... head f, head f d_model -> ... head d_model")
        means = out.sum(-1, keepdim=True) * W_O.mean(0)
        return (apart - means) / (self.scale if scale is None else scale[..., None, None])

    def ahead(self, change: Float[Tensor, "row d_model"]) -> Float[Tensor, "row head d_model"]:
        """What a change of the stream in front of it changes of what each head writes."""
        q = einsum(change, self.W_Q, "row d_model, d_model head f -> row head f")
        z = einsum(q, self.W, "row head f, head f g -> row head g")
        return self.written(q + self.w_inner * (z - z.mean(-1, keepdim=True)) / self.inner_scale)

    @property
    def norm_bias(self) -> Float[Tensor, " d_model"]:
        """What the bias of the norm of all heads' outputs adds to the stream."""
        return self.b_norm @ self.W_O

    @property
    def constant(self) -> Float[Tensor, " d_model"]:
        """What it adds to the stream whatever that is."""
        held = self.b_inner + self.w_inner * (self.c - self.c.mean(-1, keepdim=True)) / self.inner_scale
        return self.written(held).sum(0) + self.norm_bias

    def _to_outs(self, gradient: Float[Tensor, "target d_model"]) -> Float[Tensor, "target head f"]:
        normal = (gradient @ self.W_O.T) * self.w_norm
        return ((normal - normal.mean(-1, keepdim=True)) / self.scale).unflatten(1, self.out.shape)

    def _from_outs(
        self, out: Float[Tensor, "target head f"]
    ) -> tuple[Float[Tensor, "target d_model"], Float[Tensor, " target"]]:
        normal = out * self.w_inner
        z = (normal - normal.mean(-1, keepdim=True)) / self.inner_scale
        q = out + einsum(z, self.W, "target head g, head f g -> target head f")
        constant = (out * self.b_inner + z * self.c).sum((1, 2))
        return einsum(q, self.W_Q, "target head f, d_model head f -> target d_model"), constant


@dataclass(frozen=True)
class FrozenFlow:
    """The flow step's linear part, (x D) U times the gate."""

    POINTS: ClassVar[tuple[str, ...]] = ("flow.hook_flow_pre", "flow.hook_flow_post")
    W_down: Float[Tensor, "d_model flow"]
    W_up: Float[Tensor, "flow d_model"]

    @classmethod
    def of(cls, flow: FlowRefiner) -> FrozenFlow:
        return cls(flow.W_down.detach(), (flow.gate.sigmoid() * flow.W_up).detach())

    def back(self, gradient: Float[Tensor, "target d_model"]) -> Float[Tensor, "target d_model"]:
        """From behind it to in front of it, the way around included."""
        return gradient + gradient @ self.W_up.T @ self.W_down.T


def flow_writes(flow: FlowRefiner) -> Float[Tensor, "flow_hidden d_model"]:
    """What each neuron of the velocity adds to the stream at an activation of 1."""
    return (flow.gate.sigmoid() * flow.W_out @ flow.W_up).detach()


def with_refiners(blocks: Replacement, model: TTTFlow, cache: Mapping[str, Tensor], neurons: int) -> Replacement:
    """A replacement of the blocks with the refiners behind them, each a block.

    Args:
        neurons: how many of the velocity's are nodes; the others are the error.
    """
    units, written, heads = list(blocks.units), list(blocks.written), list(blocks.heads)
    nothing = torch.zeros_like(cache["hook_refined"][0])
    none, last = no_units(nothing), len(nothing) - 1
    if model.ttt is not None:
        learner = FrozenLearner.of(model.ttt, cache)
        units.append(none)
        written.append(Written({}, nothing, None if blocks.heads else learner.constant))
        if blocks.heads:
            heads.append(Heads(_of_heads(learner, last), learner.norm_bias))
    if model.flow is not None:
        block = len(units)
        units.append(_of_flow(model.flow, cache, neurons))
        writes, activation = flow_writes(model.flow), units[-1].activation
        rest = cache["flow.hook_flow_post"][0, -1].index_fill(0, units[-1].index, 0.0) @ writes
        error = nothing.index_copy(0, torch.tensor([last], device=nothing.device), rest[None])
        bias = (model.flow.gate.sigmoid() * model.flow.b_out @ model.flow.W_up).detach()
        written.append(Written({block: activation[:, None] * writes[units[-1].index]}, error, bias))
        if blocks.heads:
            heads.append(Heads(none, None))
    return replace(blocks, units=units, written=written, heads=heads)


def _of_flow(flow: FlowRefiner, cache: Mapping[str, Tensor], n: int) -> Units:
    """Of the velocity's neurons at the last position the ``n`` that write the most."""
    before, after = (cache[name][0, -1:] for name in FrozenFlow.POINTS)
    chosen = chosen_units(after.abs() * flow_writes(flow).norm(dim=1), n, 0, ())
    index = chosen[0].nonzero()[:, 0]
    rows = (flow.W_down @ flow.W_in).detach().T[index]
    position = torch.full_like(index, cache[FrozenFlow.POINTS[0]].shape[1] - 1)
    return Units(index, position, after[0, index], before[0, index], rows, flow.b_in.detach()[index])


def _of_heads(learner: FrozenLearner, last: int) -> Units:
    """The heads of the inner learner that write something."""
    written = learner.written(learner.out)
    size = written.norm(dim=-1)
    index = size.nonzero()[:, 0]
    norm = size[index]
    rows = written[index] / norm[:, None]
    return Units(index, torch.full_like(index, last), norm, norm, rows, torch.zeros_like(norm))
