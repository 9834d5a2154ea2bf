"""Why a head looks where it does: its score before softmax as a sum over pairs of a query's and a key's source.

Under the norm scale of a prompt a head's query at one position and its key at another are sums over the nodes of a
graph, q = Σ_i q_i and k = Σ_j k_j, rotary turns included. So the score is a sum over pairs, q · k / √d_head =
Σ_ij q_i · k_j / √d_head: exact, for it is of degree one in either.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from reflowlens.arguments import integer, whole_number
from reflowlens.circuits.attribution.frozen import dot
from reflowlens.circuits.attribution.heads import Reader, split_by_last_head
from reflowlens.circuits.attribution.table import nodes_of
from reflowlens.circuits.attribution.traced import Traced, check_unhooked, traced_of
from reflowlens.errors import ReflowlensError
from reflowlens.models.attention import Attention
from reflowlens.models.components import Block
from reflowlens.models.decoder import Decoder
from reflowlens.out_of_memory import lower_if_it_does_not_fit

if TYPE_CHECKING:
    from reflowlens.circuits.attribution.graph import AttributionGraph

_NUMBERS_AT_ONCE = 2**20  # products of pairs
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class WhyAttended:
    """The score of a head for a query and a key, or for one key less that for another, and what adds up to it.

    Attributes:
        layer, head, query, key: of what.
        other_key: the key that it is compared with, or None.
        score: before softmax, as the model has it; of a comparison the difference, which is the logarithm of how many
            times more attention the key gets.
        pattern: the attention that it became; of a comparison the difference.
        pairs: a row a pair of nodes, ``query_source`` and ``key_source``, with the ``weight`` that it adds, the largest
            first; the last row, ``rest`` and ``rest``, is the sum of all others. They add up to the score.
        queries: a row a node, ``source``, what it is (columns of ``graph.nodes``), and the ``weight`` that it adds by
            way of the query, with all of the key; the largest first. They add up to the score.
        keys: the same by way of the key, with all of the query.
    """

    layer: int
    head: int
    query: int
    key: int
    other_key: int | None
    score: float
    pattern: float
    pairs: pd.DataFrame = field(repr=False)
    queries: pd.DataFrame = field(repr=False)
    keys: pd.DataFrame = field(repr=False)
    _head: _Head = field(repr=False)
    _top: int = field(repr=False)
    _query: Float[Tensor, "node d_head"] = field(repr=False)
    _key: Float[Tensor, "node d_head"] = field(repr=False)

    @torch.no_grad()
    def compared(self, other_key: int | str) -> WhyAttended:
        """Why this key and not another, up to which the query looks too: the difference of two decompositions.

        Softmax sees differences alone. What the query's sources add to the score of every key drops out here.

        Args:
            other_key: its position, or a token that occurs once.

        Raises:
            ReflowlensError: it does not exist, comes behind the query, or is this key.
        """
        if self.other_key is not None:
            raise ReflowlensError("this is a comparison already: compare what graph.why_attended gave")
        other = self._head.key_position(other_key, self.query)
        if other == self.key:
            raise ReflowlensError(f"key {other} is compared with itself: name another one")
        pair = self.query, self.key, other
        return self._head.explained(*pair, self._query, self._key - self._head.key(other), self._top)

    @torch.no_grad()
    def heads(self, side: Literal["query", "key"], source: str | None = None, top: int = 1000) -> pd.DataFrame:
        """A marginal split exactly by the last head that carried it to the position of the query, or of the key.

        Composition of heads: of a key at which an earlier head put the token before it, this names that head.

        Args:
            side: which marginal.
            source: the only node whose weight is split, or all.
            top: how many parts are kept, the largest.

        Returns:
            As :meth:`AttributionGraph.heads`. The parts of a source add up to its weight in ``queries`` or ``keys``.

        Raises:
            ReflowlensError: the side is neither, this is a comparison, the source is no node or adds nothing.

        Example: ``why.heads("key", "embedding@2")``
        """
        if side not in ("query", "key"):
            raise ReflowlensError(f"side must be 'query' or 'key', got {side!r}")
        if self.other_key is not None:
            raise ReflowlensError("heads that carried a key are those of one key: ask what graph.why_attended gave")
        other = self._key if side == "query" else self._query
        reader = self._head.reader(side, self.query if side == "query" else self.key, other.sum(0))
        return split_by_last_head(self._head.traced, self._head.nodes, reader, source, top, f"this {side}")

    def by(self, *columns: str) -> pd.DataFrame:
        """The sums over all pairs of groups of nodes, exactly: rows are the query's groups, columns the key's.

        Args:
            columns: of ``graph.nodes``, by which nodes are grouped: ``"kind"``, ``"layer"``, ``"pos"``, …

        Example: ``why.by("kind", "layer")``
        """
        nodes = self._head.nodes.iloc[: len(self._query)]
        if unknown := [name for name in columns if name not in nodes] or ["nothing"] * (not columns):
            raise ReflowlensError(f"no column {unknown[0]!r}: nodes are grouped by {', '.join(nodes.columns)}")
        groups = nodes.groupby(list(columns) if len(columns) > 1 else columns[0], dropna=False, sort=True)
        number = torch.tensor(groups.ngroup().to_numpy(), device=self._query.device)
        zeros = self._query.new_zeros(groups.ngroups, self._query.shape[1])
        query, key = (zeros.index_add(0, number, part) for part in (self._query, self._key))
        index = groups.size().index
        names = [index.set_names([f"{side} {name}" for name in columns]) for side in ("query", "key")]
        table = pd.DataFrame(_numbers(query @ key.T), *names)
        return table.loc[(table != 0).any(axis=1), (table != 0).any(axis=0)]

    def top(self, n: int = 10) -> dict[str, list[tuple[Any, ...]]]:
        """The largest pairs and marginals as lists, as ``qk_tracing_results`` of published graphs have them.

        Args:
            n: how many of each.

        Returns:
            ``pair_wise_contributors``: (query source, key source, weight); ``top_q_marginal_contributors`` and
            ``top_k_marginal_contributors``: (source, weight). Sources are names of nodes.
        """
        n = whole_number(n, "n", 1)
        return {
            "pair_wise_contributors": list(self.pairs.iloc[:-1].head(n).itertuples(index=False, name=None)),
            "top_q_marginal_contributors": _first(self.queries, n),
            "top_k_marginal_contributors": _first(self.keys, n),
        }

    def _repr_html_(self) -> str:
        from reflowlens.notebook.html import folded, table, titled

        texts = self._head.traced.texts
        where = [f"{texts[place]!r} @{place}" for place in (self.query, self.key)]
        instead = "" if self.other_key is None else f" and not at {texts[self.other_key]!r} @{self.other_key}"
        facts = f"{self.layer}.{self.head} at {where[0]} looks at {where[1]}{instead}: score {self.score:.4g}"
        shown = pd.concat([self.pairs.iloc[:-1].head(10), self.pairs.iloc[-1:]])
        parts = [table(list(shown.columns), shown.itertuples(index=False))]
        for name, frame in (("queries", self.queries), ("keys", self.keys)):
            few = frame[["source", "label", "weight"]].head(10)
            parts.append(folded(name, table(list(few.columns), few.itertuples(index=False))))
        return titled("Head", facts, *parts)


@torch.no_grad()
def why_attended(
    graph: AttributionGraph, layer: int, head: int, query: int | str, key: int | str, top: int = 1000
) -> WhyAttended:
    """Why a head looks from one position at another: its score before softmax, split exactly into pairs of nodes.

    Args:
        graph: pruned or not: sources are the nodes of the whole graph.
        layer, head: which; grouped-query heads count as many as there are of queries.
        query, key: positions, negative ones counted from the end; or tokens that occur once, or ``"last"``.
        top: how many pairs are kept, the largest; the sum of all others is one row.

    Returns:
        The score, its pairs, and the marginals of queries and keys; ``.compared(other_key)`` explains why this key and
        not another. Biases of queries, keys and their norm belong to ``bias:{layer}``.

    Raises:
        ReflowlensError: the graph was made without its model, a layer, head or position does not exist, the key comes
            behind the query, or the model changed since.

    Example: ``graph.why_attended(layer=2, head=1, query=-1, key=" king").compared(" queen").pairs.head()``
    """
    found = _Head.of(traced_of(graph), layer, head)
    query = found.traced.position(query, "query")
    key = found.key_position(key, query)
    with lower_if_it_does_not_fit("the length of the prompt, or top="):
        return found.explained(query, key, None, found.query(query), found.key(key), whole_number(top, "top", 1))


@dataclass(frozen=True)
class _Head:
    """A head on the prompt of a graph."""

    traced: Traced
    layer: int
    head: int
    scores: Float[Tensor, "query key"]
    nodes: pd.DataFrame

    @classmethod
    def of(cls, traced: Traced, layer: Any, head: Any) -> _Head:
        if not isinstance(traced.model, Decoder):
            raise ReflowlensError(f"why a head of a {type(traced.model).__name__} looks where it does is not split yet")
        n_blocks, n_heads = traced.engine.layout.n_blocks, traced.model.cfg.n_heads
        block, number = integer(layer), integer(head)
        if block is None or not 0 <= block < n_blocks:
            raise ReflowlensError(f"no layer {layer!r}: this graph has blocks 0 to {n_blocks - 1}")
        if number is None or not 0 <= number < n_heads:
            raise ReflowlensError(f"no head {head!r}: a block has heads 0 to {n_heads - 1}")
        check_unhooked(traced.model)
        name = f"blocks.{block}.attn.hook_attn_scores"
        _, cache = traced.model.run_with_cache(traced.tokens[None], names_filter=[name], stop_at_layer=block + 1)
        return cls(traced, block, number, cache[name][0, number], nodes_of(traced))

    @property
    def attn(self) -> Attention:
        return cast(Block, self.traced.model.blocks[self.layer]).attn

    def key_position(self, key: Any, query: int) -> int:
        place = self.traced.position(key, "key")
        if place > query:
            raise ReflowlensError(f"key {place} comes behind query {query}: heads look at positions up to their own")
        return place

    def query(self, position: int) -> Float[Tensor, "node d_head"]:
        """What each node adds to the query, divided by √d_head."""
        return self._sources("query", position)

    def key(self, position: int) -> Float[Tensor, "node d_head"]:
        """What each node adds to the key."""
        return self._sources("key", position)

    def _sources(self, side: Literal["query", "key"], position: int) -> Float[Tensor, "node d_head"]:
        """The channels of a query or key as targets of the graph's engine."""
        reader = self.reader(side, position, None)
        return reader.edges(self.traced.engine).T.contiguous()

    def reader(self, side: Literal["query", "key"], position: int, along: Float[Tensor, " d_head"] | None) -> Reader:
        """The channels of a query, divided by √d_head, or of a key, turned as rotary positions turn them, or their sum
        along a vector, as targets that read the stream in front of the block."""
        attn, cfg = self.attn, self.attn.cfg
        if side == "query":
            W, b, scale = attn.W_Q[self.head], None if attn.b_Q is None else attn.b_Q[self.head], cfg.d_head**-0.5
        else:
            shared = self.head * cfg.kv_heads // cfg.n_heads
            W, b, scale = attn.W_K[shared], None if attn.b_K is None else attn.b_K[shared], 1.0
        turn = torch.eye(cfg.d_head, dtype=W.dtype, device=W.device) * scale  # a row what becomes of a channel
        if cfg.positional_embedding_type == "rotary":
            turn = attn.rotary(turn[None, None], slice(position, position + 1))[0, 0]
        channels = turn.T if along is None else (turn @ along)[None]
        norm, rows = self.traced.engine.frozen.attention[self.layer].norm, channels @ W.T
        gradient = norm.back(rows * norm.w, slice(position, position + 1))
        return Reader(gradient, position, self.layer, False, dot(rows, norm.b) + dot(channels, b))

    def explained(
        self,
        query: int,
        key: int,
        other_key: int | None,
        q: Float[Tensor, "node d_head"],
        k: Float[Tensor, "node d_head"],
        top: int,
    ) -> WhyAttended:
        pattern = self.traced.engine.frozen.attention[self.layer].pattern[self.head, query]
        of_keys = [self.scores[query], pattern]
        score, attention = (float(row[key] - (0.0 if other_key is None else row[other_key])) for row in of_keys)
        self._check_sum(q, k, score)
        names = self.nodes["node"].to_numpy()
        i, j, weights = (each.numpy() for each in largest_products(q, k, top))
        rest = float(q.sum(0, dtype=torch.float64) @ k.sum(0, dtype=torch.float64)) - weights.sum(dtype=np.float64)
        pairs = pd.DataFrame({"query_source": names[i], "key_source": names[j], "weight": weights})
        pairs.loc[len(pairs)] = ["rest", "rest", rest]
        marginals = [self._marginal(q, k.sum(0)), self._marginal(k, q.sum(0))]
        where = self.layer, self.head, query, key, other_key
        return WhyAttended(*where, score, attention, pairs, *marginals, self, top, q, k)

    def _marginal(self, parts: Float[Tensor, "node d_head"], whole: Float[Tensor, " d_head"]) -> pd.DataFrame:
        weights = _numbers(parts @ whole)
        frame = self.nodes[["node", "kind", "layer", "pos", "feature", "label"]].iloc[: len(weights)]
        frame = frame.rename(columns={"node": "source"}).assign(weight=weights)
        return frame[weights != 0].sort_values("weight", key=np.abs, ascending=False, ignore_index=True)

    def _check_sum(self, q: Tensor, k: Tensor, score: float) -> None:
        q, k = q.sum(0), k.sum(0)
        if abs(float(q @ k) - score) > _TOLERANCE * float(q.norm() * k.norm()):
            raise ReflowlensError("the model is not what it was when the graph was made: make the graph anew")


def largest_products(
    q: Float[Tensor, "query_node d_head"], k: Float[Tensor, "key_node d_head"], n: int
) -> tuple[Int[Tensor, " pair"], Int[Tensor, " pair"], Float[Tensor, " pair"]]:
    """The pairs of rows with the n largest |products|, in descending order; none that are 0.

    Rows are taken in the order of their norms: |q_i · k_j| ≤ |q_i| |k_j| says which products cannot be among them, and
    those are not formed.
    """
    (q_norm, q_order), (k_norm, k_order) = (each.norm(dim=1).sort(descending=True) for each in (q, k))
    q, k = q[q_order], k[k_order]
    places, weights = q_order.new_zeros(0), q.new_zeros(0)
    n_keys = len(k)
    size, least = max(1, _NUMBERS_AT_ONCE // n_keys), 0.0
    for start in range(0, len(q), size):
        reach = int((q_norm[start] * k_norm > least).sum())
        if not reach:
            break
        products = q[start : start + size] @ k[:reach].T
        rows, columns = (products.abs() > least).nonzero().unbind(1)
        places = torch.cat([places, (start + rows) * n_keys + columns])
        weights = torch.cat([weights, products[rows, columns]])
        if len(weights) > n:
            kept = weights.abs().topk(n).indices
            places, weights = places[kept], weights[kept]
            least = float(weights[-1].abs())
    order = weights.abs().argsort(descending=True, stable=True)
    places, weights = places[order], weights[order]
    return q_order[places // n_keys].cpu(), k_order[places % n_keys].cpu(), weights.cpu()


def _first(frame: pd.DataFrame, n: int) -> list[tuple[Any, ...]]:
    return list(frame[["source", "weight"]].head(n).itertuples(index=False, name=None))


def _numbers(x: Tensor) -> np.ndarray:
    return x.detach().cpu().numpy()
