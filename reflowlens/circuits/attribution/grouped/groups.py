"""Supernodes: nodes of a graph that do the same thing, clustered, named, tested by removing them, and edited."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import sparse

from reflowlens.arguments import real_number
from reflowlens.circuits.attribution.edges.table import cumulative_shares
from reflowlens.circuits.attribution.graph import AttributionGraph
from reflowlens.circuits.attribution.grouped.alike import UNITS, Numbers, at_least, similarity, tree_of
from reflowlens.circuits.attribution.grouped.jointly import JointRemoval, Removals
from reflowlens.circuits.attribution.performed.performing import PERFORMED, Free, level_of
from reflowlens.circuits.attribution.traced import traced_of
from reflowlens.errors import ReflowlensError, nearest

if TYPE_CHECKING:
    from reflowlens.notebook.feature_pages import FeaturePages

SIMILAR, TOLERANCE, ALIKE = 0.6, 0.2, 0.5
_COLUMNS = ["group", "n", "layers", "positions", "influence", "similarity", "deviation", "likeness", "agrees"]


@dataclass(frozen=True, eq=False)
class Groups:
    """Groups of a graph's nodes; :meth:`AttributionGraph.groups` finds them, and editing returns new ones.

    Attributes:
        whole: the graph whose nodes they are, pruned.
        members: by name of the group, the names of its nodes, two or more.
        tested: how the groups came about, a row a candidate: its ``round`` (0: a cluster, later ones parts of it),
            its ``members``, their ``n``, their ``similarity`` (that of the two parts that it was joined of),
            ``deviation`` and ``likeness`` of their removal
            (:class:`~reflowlens.circuits.attribution.grouped.jointly.JointRemoval`), ``outcome``: ``kept``, ``split``
            into the two parts, which were tested next, or ``dissolved``: these were single nodes; ``group``: its name,
            if kept.
        tolerance, alike: the most deviation and the least likeness with which a group ``agrees``.
        removals: of nodes of ``whole``, together and one by one.
    """

    whole: AttributionGraph
    members: Mapping[str, tuple[str, ...]]
    tested: pd.DataFrame
    tolerance: float
    alike: float
    removals: Removals
    _features: FeaturePages | None

    # -- to look at ---------------------------------------------------------------------------------------------------

    @property
    def nodes(self) -> pd.DataFrame:
        """A row a node in a group: ``group``, and what ``graph.nodes`` says of it."""
        number = self._number
        rows = [self.whole.nodes.iloc[[number[node] for node in nodes]] for nodes in self.members.values()]
        names = [name for name, nodes in self.members.items() for _ in nodes]
        every = pd.concat(rows, ignore_index=True) if rows else self.whole.nodes.iloc[:0]
        return every.assign(group=names)[["group", *self.whole.nodes.columns]]

    @property
    def summary(self) -> pd.DataFrame:
        """A row a group: ``group``, ``n``, its ``layers`` and ``positions``, summed ``influence``, mean ``similarity``
        of two members, ``deviation`` and ``likeness``, and whether it ``agrees`` (edited ones need not)."""
        agreements = self.removals.agreement([self._numbers(name) for name in self.members])
        rows = []
        for (name, nodes), agreement in zip(self.members.items(), agreements, strict=True):
            of = self.whole.nodes.iloc[list(self._numbers(name))]
            alike = similarity(self.whole, self._numbers(name))[np.triu_indices(len(nodes), 1)].mean()
            places = [_listed(of[column].dropna()) for column in ("layer", "pos")]
            rows.append((name, len(nodes), *places, of["influence"].sum(), alike, *agreement, self._agrees(agreement)))
        return pd.DataFrame(rows, columns=_COLUMNS)

    @cached_property
    def graph(self) -> AttributionGraph:
        """The graph with every group as one node of kind ``group``: its edges are sums of its members', those within
        it left out, and so are influence, activation and value. It cannot be performed."""
        nodes, owner = self.whole.nodes, self._owner
        codes, names = pd.factorize(nodes["node"].map(lambda node: owner.get(node, node)))
        joined = sparse.csr_array((np.ones(len(codes)), (codes, np.arange(len(codes)))))
        matrix = (joined @ self.whole.matrix @ joined.T).tocsr()
        matrix.setdiag(0.0)
        matrix.eliminate_zeros()
        matrix.sort_indices()
        first = nodes.groupby(codes).first()
        for column in ("activation", "value", "target", "influence"):
            first[column] = nodes[column].groupby(codes).sum(min_count=1)
        is_group = np.isin(names, list(self.members))
        first["node"] = names
        first.loc[is_group, ["kind", "label", "feature"]] = ["group", None, pd.NA]
        first.loc[is_group, "label"] = names[is_group]
        first["layer"], first["pos"] = (nodes[column].groupby(codes).max() for column in ("layer", "pos"))
        first["cumulative"] = cumulative_shares(first["influence"].to_numpy())
        dropped = joined @ self.whole._dropped
        whole = self.whole
        return AttributionGraph(first, matrix, whole.tokens, whole.of, dropped, whole.scores(), _prompt=whole._prompt)

    @property
    def edges(self) -> pd.DataFrame:
        """Edges between groups, and between them and nodes in none: ``source``, ``target``, ``weight``."""
        return self.graph.edges

    def to_list(self) -> list[list[str]]:
        """``[[label, node, …], …]``, as ``graph.save(…, groups=)`` takes it."""
        return [[name, *nodes] for name, nodes in self.members.items()]

    def __len__(self) -> int:
        return len(self.members)

    def __repr__(self) -> str:
        grouped = sum(map(len, self.members.values()))
        return f"Groups({len(self)} of {grouped} of {len(self.whole.nodes)} nodes, {self.whole.of})"

    def _repr_html_(self) -> str:
        from reflowlens.notebook.html import table, titled

        outcomes = self.tested["outcome"].value_counts()
        facts = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())
        rows = self.summary.sort_values("influence", ascending=False, kind="stable").astype(object)
        return titled(repr(self), facts, table(_COLUMNS, rows.itertuples(index=False)))

    # -- to edit ------------------------------------------------------------------------------------------------------

    def merge(self, a: str, b: str) -> Groups:
        """Two groups as one, under the name of the first."""
        first, second = self._of(a), self._of(b)
        if a == b:
            raise ReflowlensError(f"{a!r} cannot be merged with itself")
        left = {name: nodes for name, nodes in self.members.items() if name != b}
        return self._with(left | {a: first + second})

    def split(self, name: str) -> Groups:
        """A group as its two most similar parts, named anew; a part of one node is in no group any more."""
        parts = tree_of(self.whole, [self._number[node] for node in self._of(name)])
        assert parts is not None
        left = {key: nodes for key, nodes in self.members.items() if key != name}
        for part in parts.parts:
            if len(part.nodes) > 1:
                nodes = tuple(self.whole.nodes["node"].iloc[list(part.nodes)])
                left[_distinct(_name(self.whole, part.nodes, self._features), left)] = nodes
        return self._with(left)

    def rename(self, name: str, to: str) -> Groups:
        """A group under another name."""
        self._of(name)
        self._check_name(to)
        return self._with({to if key == name else key: nodes for key, nodes in self.members.items()})

    def without(self, name: str) -> Groups:
        """Without a group: its nodes are in none."""
        self._of(name)
        return self._with({key: nodes for key, nodes in self.members.items() if key != name})

    def with_group(self, name: str, nodes: Iterable[str]) -> Groups:
        """With a group of nodes of the graph, two or more, that are in no other."""
        chosen = (nodes,) if isinstance(nodes, str) else tuple(nodes)
        self._check_name(name)
        kinds = self.whole.nodes["kind"].tolist()
        for node in chosen:
            if node not in self._number:
                raise ReflowlensError(f"no node {node!r} in this graph{nearest(str(node), list(self._number))}")
            if kinds[self._number[node]] not in PERFORMED:
                raise ReflowlensError(f"{node!r} cannot be in a group, which must be removable: {', '.join(PERFORMED)}")
            if node in self._owner:
                raise ReflowlensError(f"{node!r} is in the group {self._owner[node]!r}: take that one away first")
        if len(set(chosen)) < max(len(chosen), 2):
            raise ReflowlensError(f"a group has two nodes or more, each once, got {list(chosen)}")
        return self._with({**self.members, name: chosen})

    # -- inside -------------------------------------------------------------------------------------------------------

    @cached_property
    def _number(self) -> dict[str, int]:
        return {node: number for number, node in enumerate(self.whole.nodes["node"])}

    @cached_property
    def _owner(self) -> dict[str, str]:
        return {node: name for name, nodes in self.members.items() for node in nodes}

    def _numbers(self, name: str) -> Numbers:
        return tuple(sorted(self._number[node] for node in self.members[name]))

    def _agrees(self, agreement: JointRemoval) -> bool:
        return agreement.deviation <= self.tolerance and agreement.likeness >= self.alike

    def _of(self, name: str) -> tuple[str, ...]:
        if name not in self.members:
            raise ReflowlensError(f"no group {name!r}{nearest(str(name), list(self.members))}")
        return self.members[name]

    def _check_name(self, name: str) -> None:
        if not isinstance(name, str) or not name.strip():
            raise ReflowlensError(f"the name of a group is a text, got {name!r}")
        if name in self.members or name in self._number:
            raise ReflowlensError(f"{name!r} is the name of another group or node")

    def _with(self, members: Mapping[str, tuple[str, ...]]) -> Groups:
        return dataclasses.replace(self, members=dict(members))


def groups_of(
    graph: AttributionGraph,
    *,
    similar: float = SIMILAR,
    tolerance: float = TOLERANCE,
    alike: float = ALIKE,
    free: Free = "model",
    features: FeaturePages | str | Path | None = None,
) -> Groups:
    """Find features, or neurons, that do the same thing.

    Nodes are joined two by two in the order of their mean similarity
    (:func:`~reflowlens.circuits.attribution.grouped.alike.similarity`) as long as this is at least ``similar``. Each
    cluster is then removed as a whole, and each of its nodes alone: it is a group if both come to the same, and if all
    of its nodes do the same to the others. One that fails is split into the two parts that it was joined of, and these
    are tested.

    Args:
        graph: not pruned: its groups are those of ``graph.prune()``.
        similar: from -1 to 1.
        tolerance: the most ``deviation`` of a group's removal from the sum of its members'.
        alike: the least ``likeness`` of what the members do, from -1 to 1.
        free: what is held meanwhile, as for :meth:`AttributionGraph.perform`.
        features: what ``analyses.feature_dashboards`` returned, or its folder: then names say on which words of its
            text the features are active, and not on which tokens of the prompt.

    Raises:
        ReflowlensError: an argument is out of range, the graph has no features or neurons, or cannot be performed.

    Example: ``graph.groups().rename("→ Paris, London · on France", "a capital").summary``
    """
    bounds = {"similar": (similar, -1, 1), "tolerance": (tolerance, 0, np.inf), "alike": (alike, -1, 1)}
    for name, (value, low, high) in bounds.items():
        if not low <= real_number(value, name) <= high:
            raise ReflowlensError(f"{name} must be from {low} to {high}, got {value!r}")
    level = level_of(free)
    traced_of(graph)
    graph = graph if graph.is_pruned else graph.prune()
    is_unit = graph.nodes["kind"].isin(UNITS).to_numpy() & (graph.nodes["activation"].to_numpy() != 0)
    tree = tree_of(graph, np.flatnonzero(is_unit).tolist())
    if tree is None:
        raise ReflowlensError("this graph has no features or neurons to group: prune it less")
    if isinstance(features, str | Path):
        from reflowlens.notebook.feature_pages import open_feature_pages

        features = open_feature_pages(features)
    removals = Removals(graph, level)
    found = Groups(graph, {}, pd.DataFrame(), tolerance, alike, removals, features)
    pending = [cluster for cluster in at_least(tree, similar) if len(cluster.nodes) > 1]
    rows, number = [], -1
    while pending:
        untested, pending, number = pending, [], number + 1
        for cluster, agreement in zip(untested, removals.agreement([each.nodes for each in untested]), strict=True):
            parts = [part for part in cluster.parts if len(part.nodes) > 1]
            outcome = "kept" if found._agrees(agreement) else "split" if parts else "dissolved"
            pending += parts if outcome == "split" else []
            rows.append((number, cluster.nodes, len(cluster.nodes), cluster.similarity, *agreement, outcome))
    tested = pd.DataFrame(rows, columns=["round", "members", "n", "similarity", "deviation", "likeness", "outcome"])
    influence, nodes = graph.nodes["influence"].to_numpy(), graph.nodes["node"]
    members: dict[str, tuple[str, ...]] = {}
    names = dict.fromkeys(tested.index, "")
    kept = tested.index[tested["outcome"] == "kept"]
    for row in sorted(kept, key=lambda row: -influence[list(tested["members"][row])].sum()):
        numbers = tested["members"][row]
        names[row] = _distinct(_name(graph, numbers, features), members)
        members[names[row]] = tuple(nodes.iloc[list(numbers)])
    tested["members"] = [tuple(nodes.iloc[list(numbers)]) for numbers in tested["members"]]
    return dataclasses.replace(found, members=members, tested=tested.assign(group=pd.Series(names, dtype=str)))


def _name(graph: AttributionGraph, numbers: Sequence[int], features: FeaturePages | None) -> str:
    """``→ what they promote · on what they fire``."""
    from reflowlens.notebook.graph_words import pushed_up

    rows = graph.nodes.iloc[list(numbers)]
    promoted = pushed_up(graph, rows, 3)
    if features is None:
        active = [graph.tokens[pos] for pos in rows.sort_values("influence", ascending=False)["pos"].dropna()]
    else:
        places = zip(rows["layer"].tolist(), rows["feature"].tolist(), strict=True)
        of_each = [features.feature(*place)[0].words(features.text) for place in places]
        active = [word for words in zip_longest(*of_each, fillvalue="") for word in words]
    tokens = list(dict.fromkeys(token.strip() for token in active if token.strip()))[:3]
    parts = [f"→ {', '.join(word.strip() for word in promoted)}"] if promoted else []
    parts += [f"on {', '.join(tokens)}"] if tokens else []
    return " · ".join(parts) or f"{len(rows)} {rows['kind'].iloc[0]}s"


def _distinct(name: str, taken: Mapping[str, object]) -> str:
    number = 1
    while (numbered := name if number == 1 else f"{name} ({number})") in taken:
        number += 1
    return numbered


def _listed(values: pd.Series) -> str:
    return ", ".join(map(str, sorted(set(values.tolist()))))
