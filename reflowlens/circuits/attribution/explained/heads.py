"""Which heads carried the edges of a graph.

An edge is a sum over paths along the residual stream, each of which passes some heads or none, and no other node. Every
path that passes any has a last head, from which it goes to the target without passing another: so that an edge is what
comes directly, plus, for every head of every block and every position that it read, what passed that head last.
"""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from reflowlens.arguments import whole_number
from reflowlens.circuits.attribution.edges.engine import Engine
from reflowlens.circuits.attribution.edges.largest import LargestParts
from reflowlens.circuits.attribution.edges.layout import End
from reflowlens.circuits.attribution.edges.table import nodes_of
from reflowlens.circuits.attribution.linear.frozen import FrozenAttention, FrozenDecoder
from reflowlens.circuits.attribution.linear.frozen_model import at_positions
from reflowlens.circuits.attribution.linear.refined import FrozenRefined
from reflowlens.circuits.attribution.linear.ways import Ways, dense
from reflowlens.circuits.attribution.traced import Traced, traced_of
from reflowlens.errors import ReflowlensError, nearest
from reflowlens.out_of_memory import lower_if_it_does_not_fit

if TYPE_CHECKING:
    from reflowlens.circuits.attribution.graph import AttributionGraph

_NUMBERS_AT_ONCE = 2**22  # of gradients and edges
_TOLERANCE = 1e-3


@torch.no_grad()
def by_last_head(graph: AttributionGraph, target: str, source: str | None = None, top: int = 1000) -> pd.DataFrame:
    """The edges into a node, or one of them, split exactly by the last head on the way.

    Args:
        graph: pruned or not; edges are those of the whole graph.
        target, source: names of nodes; without a source all edges are split.
        top: how many parts are kept, the largest; what all others of an edge add up to is one part of it.

    Returns:
        A row a part, the largest first, behind them those that sum up others: ``source``, ``route``, ``layer``,
        ``head``, ``key``, ``weight``. Of the route ``head`` the last head on the way is named, and the position that it
        read; it wrote at the target's own. The route ``direct`` passes no head: it stays at the target's position. The
        route ``rest`` is all others. The parts of a source add up to its edge.

    Raises:
        ReflowlensError: the graph was made without its model, a node is not in it, or nothing goes into the target or
            only what no head carries.

    Example: ``graph.heads("logit:262").groupby(["layer", "head"])["weight"].sum()``
    """
    traced = traced_of(graph)
    nodes = nodes_of(traced)
    return split_by_last_head(traced, nodes, reader_of(traced, nodes, target), source, top, repr(target))


def split_by_last_head(
    traced: Traced, nodes: pd.DataFrame, reader: Reader, source: str | None, top: int, name: str
) -> pd.DataFrame:
    """What goes to a reader, as :func:`by_last_head` says.

    Args:
        nodes: of the whole graph.
        name: of the reader.
    """
    frozen, top, number = (
        check_split(traced),
        whole_number(top, "top", 1),
        None if source is None else _number(nodes, source),
    )
    first_layer, first_key = _begins(nodes, number)
    engine, n, n_heads = traced.engine, traced.engine.layout.n_positions, traced.model.cfg.n_heads
    direct = _looking(frozen, 0.0)  # where heads look nowhere, what goes to a target passes none
    parts = LargestParts(len(nodes), top, number)
    with lower_if_it_does_not_fit("the length of the prompt, or top="):
        parts.add(reader.edges(_engine_of(direct, engine)), torch.tensor([-1]))
        for layer, middle in reader.middles(direct):
            start = first_key if layer >= first_layer else n
            for positions, edges in _from_heads(engine, frozen.attention[layer], layer, middle, start):
                parts.add(edges, (positions[:, None] + n * (torch.arange(n_heads) + n_heads * layer)).flatten())
    if number is not None and not parts.counts[number]:
        raise ReflowlensError(f"no path leads from {source!r} to {name}")
    return parts.table(nodes["node"].to_numpy(), n, n_heads)


@torch.no_grad()
def through_heads(graph: AttributionGraph, target: str) -> pd.DataFrame:
    """What every head of every position brings to a node, on all ways from there that pass no other node.

    Of a head that is: what it adds to the stream at a position, times the gradient of the target there. What passes two
    heads counts for both, so that these do not add up to the target; biases of values and their norm are part of it.

    Args:
        graph: pruned or not.
        target: the name of a node.

    Returns:
        A row a head and position, the largest first: ``layer``, ``head``, ``query``, ``weight``.

    Raises:
        ReflowlensError: the graph was made without its model, or the target is not in it or has no heads before it.

    Example: ``graph.through_heads("logit:262").head()``
    """
    traced = traced_of(graph)
    nodes = nodes_of(traced)
    reader = reader_of(traced, nodes, target)
    frozen, frames = check_split(traced), []
    for layer, middle in reader.middles(frozen):
        attention = frozen.attention[layer]
        gradient = torch.einsum("qd,hed->qhe", middle[:, 0], attention.W_O)
        weights = (gradient * attention.z[: len(gradient)]).sum(-1)
        query, head = weights.nonzero().unbind(1)
        columns = {"layer": layer, "head": head.cpu(), "query": query.cpu(), "weight": weights[query, head].cpu()}
        frames.append(pd.DataFrame(columns))
    if not frames:
        raise ReflowlensError(f"no head lies before {target!r}")
    return pd.concat(frames).sort_values("weight", key=np.abs, ascending=False, ignore_index=True)


@dataclass(frozen=True)
class Reader:
    """Targets that read the stream at one position.

    Args:
        gradient: of each, there.
        n_blocks: whose attention comes before them.
        inside: they read the middle of the last of these, and not its output.
        constant: what biases add to them behind that.
    """

    gradient: Float[Tensor, "target d_model"]
    position: int
    n_blocks: int
    inside: bool
    constant: Float[Tensor, " target"]

    @property
    def positions(self) -> Int[Tensor, " target"]:
        return torch.full((len(self.gradient),), self.position, device=self.gradient.device)

    def edges(self, engine: Engine) -> Float[Tensor, "target node"]:
        """All that go into them."""
        if not self.inside:
            here = Ways.at(self.gradient, self.positions)
            return engine.edges_into(self.n_blocks, here, self.constant, self.n_blocks)
        block = self.n_blocks - 1
        attention = cast(FrozenDecoder, engine.frozen).attention[block]
        carried, constant = attention.back_from(self.gradient, self.positions)
        return engine.edges_into(block, carried, self.constant + constant, block)

    def middles(self, frozen: FrozenDecoder) -> Iterator[tuple[int, Float[Tensor, "pos target d_model"]]]:
        """Block by block downwards, their gradients at ``resid_mid``, where heads write."""
        stream = at_positions(self.gradient, self.positions)
        for layer in reversed(range(self.n_blocks)):
            if self.inside and layer == self.n_blocks - 1:
                yield layer, stream
                stream, _ = frozen.attention[layer].back(stream)
            else:
                yield layer, frozen.middle(layer, stream)
                stream, _ = frozen.through(layer, stream)


def reader_of(traced: Traced, nodes: pd.DataFrame, target: str) -> Reader:
    """A node as a target, whose edges still add up to its value.

    Raises:
        ReflowlensError: it is none that edges through heads go into, or the model has changed.
    """
    frozen, number = check_split(traced), _number(nodes, target)
    reader = _reader_of(traced, frozen, number, target)
    edges, value = reader.edges(_engine_of(_looking(frozen, 1.0), traced.engine)), nodes["value"].iloc[number]
    if abs(float(edges.sum()) - value) > _TOLERANCE * float(edges.abs().sum()):
        raise ReflowlensError("the model is not what it was when the graph was made: make the graph anew")
    return reader


def _reader_of(traced: Traced, frozen: FrozenDecoder, number: int, target: str) -> Reader:
    engine = traced.engine
    layout, end = engine.layout, engine.end
    if number < layout.first_unit[0]:
        raise ReflowlensError(f"nothing goes into {target!r}, of which heads could carry something")
    if number >= layout.first_target and end.directions:
        return _reader_of_direction(end, frozen, number - layout.first_target)
    if number >= layout.first_signal:
        row = number - layout.first_signal
        if end.signals is not None and number >= layout.first_target:
            raise ReflowlensError(f"what goes into {target!r} are signals of the readout: ask for one, as 'readout:0'")
        last = layout.n_positions - 1
        gradient = frozen.final.back(end.rows[[row]], slice(last, last + 1))
        return Reader(gradient, last, layout.n_blocks, False, end.constant[[row]])
    block = bisect_right(layout.first_unit, number) - 1
    first = number - layout.first_unit[block]
    unit = engine.replacement.units[block][first : first + 1]
    gradient = frozen.norms[block].back(unit.rows, unit.position)
    inside = not frozen.parallel
    return Reader(gradient, int(unit.position), block + inside, inside, unit.constant)


def _reader_of_direction(end: End, frozen: FrozenDecoder, number: int) -> Reader:
    group, i = [(each, i) for each in end.directions for i in range(len(each.asked))][number]
    gradient, position = group.rows[[i]], group.positions[[i]]
    if group.at == "ln1.hook_normalized":
        gradient = frozen.attention[group.layer].norm.back(gradient, position)
    if group.at == "ln2.hook_normalized":
        gradient = frozen.norms[group.layer].back(gradient, position)
    before, inside = group.asked[i].passed
    inside = inside and not frozen.parallel
    return Reader(gradient, int(position), before + inside, inside, gradient.new_zeros(1))


def check_split(traced: Traced) -> FrozenDecoder:
    """A frozen model whose edges pass heads: none where these are nodes, and where neurons are part of them."""
    frozen, name = traced.engine.frozen, type(traced.model).__name__
    if isinstance(frozen, FrozenDecoder | FrozenRefined) and frozen.heads:
        raise ReflowlensError("heads are nodes of this graph, and no edge passes one: see the edges of those")
    if isinstance(frozen, FrozenRefined):
        raise ReflowlensError(
            f"edges of a {name} pass blocks by way of earlier streams too, and are not split by heads: make the graph "
            "with heads=True"
        )
    if not isinstance(frozen, FrozenDecoder):
        raise ReflowlensError(
            f"edges of a {name} pass no head but that of the neuron that they go into: see its number"
        )
    return frozen


def _number(nodes: pd.DataFrame, name: Any) -> int:
    places = np.flatnonzero(nodes["node"] == name)
    if not len(places):
        raise ReflowlensError(f"no node {name!r} in this graph{nearest(name, nodes['node'].tolist())}")
    return int(places[0])


def _begins(nodes: pd.DataFrame, number: int | None) -> tuple[int, int]:
    """The first block, and the first position, at which heads can read what a node writes."""
    if number is None:
        return 0, 0
    node = nodes.iloc[number]
    return node["layer"], 0 if pd.isna(node["pos"]) else node["pos"]


def _looking(frozen: FrozenDecoder, share: float) -> FrozenDecoder:
    """With its weights as they are now, and patterns times a number."""
    other = copy.copy(frozen)
    other.attention = [replace(each, pattern=share * each.pattern) for each in frozen.attention]
    return other


def _engine_of(frozen: FrozenDecoder, like: Engine) -> Engine:
    return Engine(frozen, like.replacement, like.inputs, like.end, like.layout)


def _from_heads(
    engine: Engine,
    attention: FrozenAttention,
    layer: int,
    middle: Float[Tensor, "query 1 d_model"],
    first_key: int,
) -> Iterator[tuple[Int[Tensor, " key"], Float[Tensor, "key_and_head node"]]]:
    """What goes to a target at the last position by a head of a block, and on without another, from each position."""
    last = torch.tensor(len(middle) - 1, device=middle.device)
    heads = torch.arange(len(attention.W_O), device=middle.device)
    n, n_heads = len(middle), len(heads)
    carried, constant = attention.back_from_heads(middle[-1].expand(n_heads, -1), heads, last.expand(n_heads))
    gradients = dense(carried)
    looked = attention.pattern[:, n - 1, :n]
    constants = (looked / looked.sum(1, keepdim=True)).T * constant
    numbers = n_heads * (engine.layout.first_unit[layer] + 2 * n * engine.frozen.numbers_carried)
    size = max(1, min(_NUMBERS_AT_ONCE // numbers, n // 4))  # few, lest most be carried over positions behind their own
    for start in range(first_key, n, size):
        keys = torch.arange(start, min(start + size, n), device=middle.device)
        ways = Ways.at(gradients[keys].flatten(0, 1), keys.repeat_interleave(n_heads))
        yield keys.cpu(), engine.edges_into(layer, ways, constants[keys].flatten(), layer)
