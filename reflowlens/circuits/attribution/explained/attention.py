"""Why a head looks where it does: its score before softmax as a sum over pairs of a query's and a key's source.

Under the norm scale of a prompt a head's query at one position and its key at another are sums over the nodes of a
graph, q = Σ_i q_i and k = Σ_j k_j, rotary turns included. So the score is a sum over pairs, q · k / √d_head =
Σ_ij q_i · k_j / √d_head: exact, for it is of degree one in either. Of BDH query and key are the turned neurons of the
first reading, without √d_head; those that are active are held to be so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from reflowlens.arguments import whole_number
from reflowlens.circuits.attribution.edges.largest import largest_products
from reflowlens.circuits.attribution.edges.table import nodes_of
from reflowlens.circuits.attribution.explained.heads import split_by_last_head
from reflowlens.circuits.attribution.explained.queries_keys import HeadAt, Side, head_at
from reflowlens.circuits.attribution.traced import traced_of
from reflowlens.errors import ReflowlensError
from reflowlens.out_of_memory import lower_if_it_does_not_fit

if TYPE_CHECKING:
    from reflowlens.circuits.attribution.graph import AttributionGraph

_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class WhyAttended:
    """The score of a head for a query and a key, or for one key less that for another, and what adds up to it.

    Attributes:
        layer, head, query, key: of what.
        other_key: the key that it is compared with, or None.
        score: before softmax, as the model has it; of a comparison the difference, which is the logarithm of how many
            times more attention the key gets.
        pattern: the attention that it became (of BDH, which has no softmax, the score); of a comparison the difference.
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
    _at: HeadAt = field(repr=False)
    _nodes: pd.DataFrame = field(repr=False)
    _top: int = field(repr=False)
    _query: Float[Tensor, "node channel"] = field(repr=False)
    _key: Float[Tensor, "node channel"] = field(repr=False)

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
        other = self._at.key_position(other_key)
        if other == self.key:
            raise ReflowlensError(f"key {other} is compared with itself: name another one")
        key = self._key - self._at.sources("key", other)
        return _explained(self._at, self._nodes, self.key, other, self._query, key, self._top)

    @torch.no_grad()
    def heads(self, side: Side, source: str | None = None, top: int = 1000) -> pd.DataFrame:
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
        reader = self._at.reader(side, self.query if side == "query" else self.key, other.sum(0))
        return split_by_last_head(self._at.traced, self._nodes, reader, source, top, f"this {side}")

    def by(self, *columns: str) -> pd.DataFrame:
        """The sums over all pairs of groups of nodes, exactly: rows are the query's groups, columns the key's.

        Args:
            columns: of ``graph.nodes``, by which nodes are grouped: ``"kind"``, ``"layer"``, ``"pos"``, …

        Example: ``why.by("kind", "layer")``
        """
        nodes = self._nodes.iloc[: len(self._query)]
        if unknown := [name for name in columns if name not in nodes] or ["nothing"] * (not columns):
            raise ReflowlensError(f"no column {unknown[0]!r}: nodes are grouped by {', '.join(nodes.columns)}")
        groups = nodes.groupby(list(columns) if len(columns) > 1 else columns[0], dropna=False, sort=True)
        number = torch.tensor(groups.ngroup().to_numpy(), device=self._query.device)
        zeros = self._query.new_zeros(groups.ngroups, self._query.shape[1])
        query, key = (zeros.index_add(0, number, part) for part in (self._query, self._key))
        index = groups.size().index
        names = [index.set_names([f"{side} {name}" for name in columns]) for side in ("query", "key")]
        table = pd.DataFrame(_numbers(query @ key.T), index=names[0], columns=names[1])
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

        texts = self._at.traced.texts
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
    at = head_at(traced_of(graph), layer, head, query)
    place, top = at.key_position(key), whole_number(top, "top", 1)
    with lower_if_it_does_not_fit("the length of the prompt, or top="):
        return _explained(
            at, nodes_of(at.traced), place, None, at.sources("query", at.query), at.sources("key", place), top
        )


def _explained(
    at: HeadAt,
    nodes: pd.DataFrame,
    key: int,
    other_key: int | None,
    q: Float[Tensor, "node channel"],
    k: Float[Tensor, "node channel"],
    top: int,
) -> WhyAttended:
    score, pattern = (float(x[key] - (0.0 if other_key is None else x[other_key])) for x in (at.scores, at.pattern))
    whole_q, whole_k = q.sum(0, dtype=torch.float64), k.sum(0, dtype=torch.float64)
    total = float(whole_q @ whole_k)
    if abs(total - score) > _TOLERANCE * float(whole_q.norm() * whole_k.norm()):
        raise ReflowlensError("the model is not what it was when the graph was made: make the graph anew")
    names = nodes["node"].to_numpy()
    i, j, weights = (each.numpy() for each in largest_products(q, k, top))
    pairs = pd.DataFrame({"query_source": names[i], "key_source": names[j], "weight": weights})
    pairs.loc[len(pairs)] = ["rest", "rest", total - weights.sum(dtype=np.float64)]
    marginals = _marginal(nodes, q @ whole_k.to(k)), _marginal(nodes, k @ whole_q.to(q))
    where = at.layer, at.head, at.query, key, other_key
    return WhyAttended(*where, score, pattern, pairs, *marginals, at, nodes, top, q, k)


def _marginal(nodes: pd.DataFrame, weights: Float[Tensor, " node"]) -> pd.DataFrame:
    numbers = _numbers(weights)
    frame = nodes[["node", "kind", "layer", "pos", "feature", "label"]].iloc[: len(numbers)]
    frame = frame.rename(columns={"node": "source"}).assign(weight=numbers)
    return frame[numbers != 0].sort_values("weight", key=np.abs, ascending=False, ignore_index=True)


def _first(frame: pd.DataFrame, n: int) -> list[tuple[Any, ...]]:
    return list(frame[["source", "weight"]].head(n).itertuples(index=False, name=None))


def _numbers(x: Tensor) -> np.ndarray:
    return x.detach().cpu().numpy()
