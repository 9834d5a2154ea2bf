"""Queries and keys of a head on the prompt of a graph, channel by channel, as targets of the graph's engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from reflowlens.arguments import integer
from reflowlens.circuits.attribution.explained.heads import Reader, check_split
from reflowlens.circuits.attribution.linear.frozen import FrozenDecoder, dot
from reflowlens.circuits.attribution.traced import Traced, check_unhooked
from reflowlens.errors import ReflowlensError
from reflowlens.models.bdh import BDH, Level
from reflowlens.models.components import Block
from reflowlens.models.parts import Norm
from reflowlens.models.refined_block import RefinedBlock
from reflowlens.models.ttt_flow import TTTFlow

Side: TypeAlias = Literal["query", "key"]


@dataclass(frozen=True)
class HeadAt:
    """A head at the position of a query.

    Args:
        scores: its own for the keys, before softmax and in front of a soft cap.
        pattern: the attention that they became.
    """

    traced: Traced
    layer: int
    head: int
    query: int
    scores: Float[Tensor, " key"]
    pattern: Float[Tensor, " key"]

    def key_position(self, key: Any) -> int:
        """A position that the head may look at.

        Raises:
            ReflowlensError: there is none, or it may not.
        """
        place = self.traced.position(key, "key")
        if place > self.query:
            raise ReflowlensError(
                f"key {place} comes behind query {self.query}: heads look at positions up to their own"
            )
        return place

    def sources(self, side: Side, position: int) -> Float[Tensor, "node channel"]:
        """What each node adds to the channels of the query or a key, of which the score is the inner product."""
        return self.reader(side, position).edges(self.traced.engine).T.contiguous()

    def reader(self, side: Side, position: int, along: Float[Tensor, " channel"] | None = None) -> Reader:
        """The channels, or their sum along a vector, as targets that read the stream in front of the block."""
        gradient, constant = self.channels(side, position)
        if along is not None:
            gradient, constant = (along @ gradient)[None], (along @ constant)[None]
        return Reader(gradient, position, self.layer, False, constant)

    def channels(self, side: Side, position: int) -> tuple[Float[Tensor, "channel d_model"], Float[Tensor, " channel"]]:
        """The gradient of each with respect to the stream there, and what biases add."""
        raise NotImplementedError


class DecoderHeadAt(HeadAt):
    """Channels are those of q / √d_head and of k, turned as rotary positions turn them, the divisors of norms held."""

    def key_position(self, key: Any) -> int:
        place, window = super().key_position(key), cast(Block, self.traced.model.blocks[self.layer]).attn.window
        if window is not None and self.query - place >= window:
            raise ReflowlensError(
                f"key {place} lies outside of the window of query {self.query}: heads of block {self.layer} look at "
                f"{window} positions, the last their own"
            )
        return place

    def channels(self, side: Side, position: int) -> tuple[Float[Tensor, "channel d_model"], Float[Tensor, " channel"]]:
        attn = cast(Block, self.traced.model.blocks[self.layer]).attn
        cfg = attn.cfg
        W, b, scale, head = attn.W_Q, attn.b_Q, 1 / attn.divisor, self.head
        if side == "key":
            W, b, scale, head = attn.W_K, attn.b_K, 1.0, self.head * cfg.kv_heads // cfg.n_heads
        turn = scale * torch.eye(cfg.d_head, dtype=W.dtype, device=W.device)  # a row what becomes of a channel
        if attn.q_norm is not None:
            turn = turn * self._normalised(side, head, position)
        if attn.rotary is not None:
            turn = attn.rotary(turn[None, None], slice(position, position + 1))[0, 0]
        norm = cast(FrozenDecoder, self.traced.engine.frozen).attention[self.layer].norm
        rows = turn.T @ W[head].T
        gradient = norm.back(rows * norm.w, slice(position, position + 1))
        return gradient, dot(rows, norm.b) + dot(turn.T, None if b is None else b[head])

    def _normalised(self, side: Side, head: int, position: int) -> Float[Tensor, "d_head 1"]:
        """What a norm of queries or keys multiplies each channel by, its divisor held."""
        attn, name = cast(Block, self.traced.model.blocks[self.layer]).attn, "q_norm" if side == "query" else "k_norm"
        point = f"blocks.{self.layer}.attn.{name}.hook_scale"
        _, cache = self.traced.model.run_with_cache(self.traced.tokens[None], names_filter=[point])
        w = cast(Norm, getattr(attn, name)).w.detach()
        if attn.cfg.qk_norm_over_heads:
            return (w.unflatten(0, (-1, attn.cfg.d_head))[head] / cache[point][0, position])[:, None]
        return (w / cache[point][0, position, head])[:, None]


class RefinedHeadAt(HeadAt):
    """Of a TTTFlow: the divisors of queries and keys are held too, and gains and the turn of some channels follow."""

    def sources(self, side: Side, position: int) -> Float[Tensor, "node channel"]:
        attn = cast(RefinedBlock, self.traced.model.blocks[self.layer]).attn
        cfg = attn.cfg
        W, scale, head = attn.W_Q, attn.gain[self.head] * cfg.d_head**-0.5, self.head
        if side == "key":
            W, scale, head = attn.W_K, torch.ones_like(scale), self.head * cfg.kv_heads // cfg.n_heads
        name = f"blocks.{self.layer}.attn.hook_{'q' if side == 'query' else 'k'}"
        _, cache = self.traced.model.run_with_cache(self.traced.tokens[None], names_filter=[name])
        divisor = (cache[name][0, position, head].pow(2).mean() + cfg.eps).sqrt()
        turn = (scale / divisor) * torch.eye(cfg.d_head, dtype=W.dtype, device=W.device)[None, None]
        rows = attn.turned(turn, slice(position, position + 1))[0, 0].T @ W[head].T
        rows = rows * cast(RefinedBlock, self.traced.model.blocks[self.layer]).ln1.w
        positions = torch.full((len(rows),), position, device=rows.device)
        return self.traced.engine.edges_at("ln1.hook_normalized", self.layer, rows, positions).T.contiguous()

    def channels(self, side: Side, position: int) -> tuple[Float[Tensor, "channel d_model"], Float[Tensor, " channel"]]:
        check_split(self.traced)
        raise NotImplementedError


@dataclass(frozen=True)
class LevelHeadAt(HeadAt):
    """Of BDH: channels are the head's turned neurons, of which those that are active are held to be so.

    Args:
        active: neurons of the head whose first reading is above zero.
    """

    active: Bool[Tensor, "pos neuron"]

    def key_position(self, key: Any) -> int:
        place = self.traced.position(key, "key")
        if place >= self.query:
            raise ReflowlensError(
                f"key {place} is not before query {self.query}: levels look at earlier positions alone"
            )
        return place

    def channels(self, side: Side, position: int) -> tuple[Float[Tensor, "channel d_model"], Float[Tensor, " channel"]]:
        neurons = cast(Level, self.traced.model.blocks[self.layer]).neurons()
        read = (neurons.W_x[self.head] * self.active[position])[:, None, None]
        turned = neurons.turn(read, slice(position, position + 1))[0, :, 0].T
        of_query = self.active[self.query].unflatten(0, (-1, 2)).any(1)  # a turn mixes two neurons, and no others
        gradient = turned[of_query.repeat_interleave(2)]
        return gradient, gradient.new_zeros(len(gradient))


def head_at(traced: Traced, layer: Any, head: Any, query: Any) -> HeadAt:
    """A head of a graph's model at a position.

    Raises:
        ReflowlensError: a layer, head or position does not exist, or something is attached to the model.
    """
    model, n_heads = traced.model, traced.model.cfg.n_heads
    n_blocks = min(traced.engine.layout.n_blocks, model.cfg.n_layers)
    block, number = integer(layer), integer(head)
    if block is None or not 0 <= block < n_blocks:
        raise ReflowlensError(f"no layer {layer!r}: this graph has blocks 0 to {n_blocks - 1}")
    if number is None or not 0 <= number < n_heads:
        raise ReflowlensError(f"no head {head!r}: a block has heads 0 to {n_heads - 1}")
    place = traced.position(query, "query")
    check_unhooked(model)
    is_decoder = not isinstance(model, BDH)
    parts = ("attn.hook_attn_scores", "attn.hook_pattern") if is_decoder else ("hook_attn_scores", "hook_x_sparse")
    names = [f"blocks.{block}.{part}" for part in parts]
    _, cache = model.run_with_cache(traced.tokens[None], names_filter=names, stop_at_layer=block + 1)
    scores = cache[names[0]][0, number, place]
    if is_decoder and model.cfg.attn_scores_soft_cap is not None:
        scores = _before_cap(traced, block, number, place)
    where = traced, block, number, place, scores
    if is_decoder:
        kind = RefinedHeadAt if isinstance(model, TTTFlow) else DecoderHeadAt
        return kind(*where, cache[names[1]][0, number, place])
    return LevelHeadAt(*where, scores, cache[names[1]][0, :, number] > 0)


def _before_cap(traced: Traced, block: int, head: int, query: int) -> Float[Tensor, " key"]:
    """Scores in front of their soft cap, of which they are products of queries and keys."""
    attn = cast(Block, traced.model.blocks[block]).attn
    names = [f"blocks.{block}.attn.hook_rot_{of}" for of in "qk"]
    _, cache = traced.model.run_with_cache(traced.tokens[None], names_filter=names, stop_at_layer=block + 1)
    q, k = (cache[name][0] for name in names)
    return k[:, head * k.shape[1] // q.shape[1]] @ q[query, head] / attn.divisor
