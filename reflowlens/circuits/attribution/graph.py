"""An attribution graph: its nodes and edges as frames, influence, pruning and scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from reflowlens.arguments import real_number
from reflowlens.circuits.attribution.scores.influence import Kinds, Shares, Vector, prune
from reflowlens.circuits.attribution.scores.sums import sums_of
from reflowlens.errors import ReflowlensError
from reflowlens.storage.opening import as_path

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from reflowlens.circuits.attribution.explained.attention import WhyAttended
    from reflowlens.circuits.attribution.grouped.groups import Groups
    from reflowlens.circuits.attribution.performed.performing import Factors
    from reflowlens.circuits.attribution.performed.validation import Validation
    from reflowlens.circuits.attribution.traced import Traced

INPUTS = ("embedding", "position", "signal", "bigram", "token_value")
PROMPT = tuple(kind for kind in INPUTS if kind != "signal")  # which pruning keeps
LEFT_OUT = ("bias", "rest")
LEAVES = (*INPUTS, *LEFT_OUT, "error")


@dataclass(frozen=True, eq=False)
class AttributionGraph:
    """What made what on one prompt; ``rl.attribute`` makes it.

    Attributes:
        nodes: a row a node:

            ===============  ==========================================================================================
            ``node``         its name, such as ``feature:2.17@5`` (block, number, position)
            ``kind``         ``feature``, ``neuron``, ``head``, ``error``, ``embedding``, ``position``, ``bigram`` and
                             ``token_value`` (of a TTTFlow), ``signal`` (of a recipe), ``readout`` (a signal read off
                             the end), ``bias``, ``rest`` (edges that were not kept), ``logit``, ``direction`` (of the
                             stream, as a target)
            ``layer``        its block; -1 of inputs, the number of blocks behind the last
            ``pos``          its position; missing of ``bias`` and ``rest``
            ``feature``      number of the feature, neuron, head or signal; of ``embedding`` and ``logit`` the token's
                             id
            ``label``        text of the token, name of the direction
            ``activation``   what it writes with
            ``value``        what its incoming edges add up to, by the forward pass: of a feature or neuron the
                             pre-activation (of a gated neuron, whose gate is held, the activation), of a head the norm
                             of what it writes, of a ``logit`` the logit less the vocabulary's mean, or the difference
                             of two, of a ``direction`` vector · stream; missing where nothing goes in
            ``target``       the share of a target in what is explained: probabilities, normalised to 1
            ``probability``  of a ``logit`` of a token; otherwise missing
            ``influence``    how much of the targets goes through it
            ``cumulative``   the share of all influence that it has together with the nodes of more; without ``bias``
                             and ``rest``, which pruning leaves out
            ===============  ==========================================================================================

        matrix: the weights of the edges, sparse, [target, source] in the order of ``nodes``.
        tokens: the texts of the prompt's tokens.
        of: names of the model and of what its nodes are.
        traced: the model, the dictionary and the frozen prompt that the graph was made of.
    """

    nodes: pd.DataFrame
    matrix: Any = dataclasses.field(repr=False)
    tokens: Sequence[str]
    of: str
    _dropped: Float[Vector, " node"] = dataclasses.field(repr=False)
    _scores: dict[str, float] | None = dataclasses.field(default=None, repr=False)
    traced: Traced | None = dataclasses.field(default=None, repr=False)
    _sums: pd.DataFrame | None = dataclasses.field(default=None, repr=False)
    _prompt: str | None = dataclasses.field(default=None, repr=False)

    def __repr__(self) -> str:
        scores = ", ".join(f"{name} {value:.3f}" for name, value in self.scores().items())
        return f"AttributionGraph({self.of}, {len(self.nodes):,} nodes, {self.matrix.nnz:,} edges, {scores})"

    def _repr_html_(self) -> str:
        from reflowlens.notebook.graph_page import graph_html

        return graph_html(self)

    def save(
        self,
        path: str | Path,
        groups: Sequence[Sequence[str]] | None = None,
        features: str | Path | None = None,
        lang: str = "en",
        title: str | None = None,
    ) -> Path:
        """Write the graph to a file, as its suffix says.

        Args:
            path: ``.html``: one page to look at and to work with, which opens offline
                (:func:`~reflowlens.notebook.graph_page.write_graph_page`); ``.json``: the graph as it is, for the
                viewers of circuit-tracer and Neuronpedia (:func:`~reflowlens.conversion.graph_json.write_graph_json`);
                ``.png``, ``.svg``, ``.pdf``: :meth:`figure`.
            groups: labels, each with the names of its nodes; of a page or a JSON file.
            features: where the features' own pages are: of a page their folder, of a JSON file the address of theirs.
            lang: of the page.
            title: of a page or a figure.

        Raises:
            ReflowlensError: of another suffix, or what the page cannot show.

        Example: ``graph.save("out/capital.html", groups=[["a city", "feature:5.1220@4", "feature:5.1741@4"]])``
        """
        from reflowlens.conversion.graph_json import write_graph_json
        from reflowlens.figures.export import STATIC_SUFFIXES, save_figure
        from reflowlens.notebook.graph_page import write_graph_page

        suffix = as_path(path).suffix.lower()
        if suffix == ".html":
            return write_graph_page(self, path, groups, features, lang, title)
        if suffix == ".json":
            return write_graph_json(self, path, groups=groups or (), features=features and str(features))
        if suffix in STATIC_SUFFIXES:
            return save_figure(self.figure(title), path)
        allowed = ", ".join((".html", ".json", *STATIC_SUFFIXES))
        raise ReflowlensError(f"a graph is saved as one of {allowed}, got {str(path)!r}")

    def figure(self, title: str | None = None, *, most_nodes: int = 80, most_edges: int = 160) -> go.Figure:
        """The nodes of most influence by layer and token, and the edges of the highest score, as a still figure.

        Args:
            title: default: the prompt.
            most_nodes, most_edges: how many are drawn, of the pruned graph.

        Example: ``graph.figure().save("capital.pdf", width="two")``
        """
        from reflowlens.figures.export import stamp
        from reflowlens.figures.layered_graph import layered_graph

        pruned = self if self.is_pruned else self.prune()
        title = self.prompt if title is None else title
        figure = layered_graph(
            pruned.nodes, pruned.edges, self.tokens, most_nodes=most_nodes, most_edges=most_edges, title=title
        )
        stamp(figure, graph=self.of, prompt=self.prompt, **self.scores())
        return figure

    @property
    def prompt(self) -> str:
        """The text, also where tokens are parts of a character, whose own texts are names of bytes."""
        return "".join(self.tokens) if self._prompt is None else self._prompt

    @cached_property
    def edges(self) -> pd.DataFrame:
        """A row an edge: ``source`` and ``target``, names of nodes, and ``weight``: what the source adds to the
        target's value. A frame of its own: it costs more memory than the matrix."""
        names = pd.CategoricalDtype(self.nodes["node"])
        targets = np.repeat(np.arange(len(self.nodes)), np.diff(self.matrix.indptr))
        return pd.DataFrame(
            {
                "source": pd.Categorical.from_codes(self.matrix.indices, dtype=names),
                "target": pd.Categorical.from_codes(targets, dtype=names),
                "weight": self.matrix.data,
            }
        )

    @property
    def influence(self) -> pd.Series:
        """How much of the targets goes through each node, by its name: p (Â + Â² + …), of the graph before pruning."""
        return self.nodes.set_index("node")["influence"]

    def scores(self) -> dict[str, float]:
        """How far the graph can be trusted; of a pruned graph those from before.

        Returns:
            ``replacement``: I_inputs / (I_inputs + I_errors), the share of what comes from the prompt that comes by way
            of features. ``completeness``: Σ_t (1 − Σ_{s error} Â_ts) (I_t + p_t) / Σ_t (I_t + p_t).
            ``error_influence``: the share of errors in the influence of all nodes. ``rest_influence``: the share of
            edges that were not kept.
        """
        if self._scores is not None:
            return dict(self._scores)
        shares = self.shares
        influence = np.where(self._is("rest"), 0.0, self.nodes["influence"].to_numpy())
        errors, inputs = self._is("error"), self._is(*INPUTS)
        from_errors, from_inputs = influence[errors].sum(), influence[inputs].sum()
        through = influence + shares.targets
        rest = float(through @ shares.rest)
        total = max(float(influence.sum()) + rest, 1e-30)
        of_errors = shares.matrix @ errors.astype(shares.matrix.dtype)
        return {
            "replacement": float(from_inputs / max(from_inputs + from_errors, 1e-30)),
            "completeness": float(((1 - of_errors) * through).sum() / through.sum()),
            "error_influence": float(from_errors / total),
            "rest_influence": rest / total,
        }

    def prune(self, node_threshold: float = 0.8, edge_threshold: float = 0.98) -> AttributionGraph:
        """The part that most of the influence goes through.

        Kept are the nodes of most influence that together have ``node_threshold`` of it, then the edges of the highest
        score Â_ts (I_t + p_t) among them that have ``edge_threshold`` of that, then what still leads from somewhere to
        a target. Embeddings, positions and targets always stay; constants and the rest go. Weights stay what they are,
        so that incoming edges no longer add up to ``value``.

        Raises:
            ReflowlensError: a threshold is not between 0 and 1.
        """
        for name, threshold in (("node_threshold", node_threshold), ("edge_threshold", edge_threshold)):
            if not 0 <= real_number(threshold, name) <= 1:
                raise ReflowlensError(f"{name} is a share from 0 to 1, got {threshold!r}")
        always = self._is(*PROMPT) | (self.nodes["target"].to_numpy() > 0)
        kinds = Kinds(always, self._is(*LEAVES), self._is(*LEFT_OUT))
        kept = prune(self.matrix, self.shares, kinds, node_threshold, edge_threshold)
        return AttributionGraph(
            self.nodes.iloc[kept.nodes].reset_index(drop=True),
            kept.weights,
            self.tokens,
            self.of,
            self._dropped[kept.nodes],
            self.scores(),
            self.traced,
            sums_of(self, kept.nodes),
            self._prompt,
        )

    @property
    def is_pruned(self) -> bool:
        """Whether it is a part of a graph, whose scores it has."""
        return self._scores is not None

    def groups(self, **options: Any) -> Groups:
        """Nodes that do the same thing, found without a language model, named and tested: see
        :func:`reflowlens.circuits.attribution.grouped.groups.groups_of`, which has the arguments."""
        from reflowlens.circuits.attribution.grouped.groups import groups_of

        return groups_of(self, **options)

    def paths(self, k: int = 10, *, edges: int = 2, errors: bool = True) -> pd.DataFrame:
        """The k paths that most of what is explained goes along; see
        :func:`~reflowlens.circuits.attribution.scores.paths.strongest_paths`."""
        from reflowlens.circuits.attribution.scores.paths import strongest_paths

        return strongest_paths(self, k, edges=edges, errors=errors)

    def perform(self, interventions: Factors | Sequence[Factors], **options: Any) -> pd.DataFrame:
        """Set nodes to multiples of their activation in the model, and read what becomes of the others: see
        :func:`reflowlens.circuits.attribution.performed.performing.perform`, which has the arguments."""
        from reflowlens.circuits.attribution.performed.performing import perform

        return perform(self, interventions, **options)

    def validate(self, n_nodes: int = 32, *args: Any, **options: Any) -> Validation:
        """Set nodes one at a time, and compare what changes with what the graph predicts, beside random nodes: see
        :func:`reflowlens.circuits.attribution.performed.validation.validate`, which has the arguments."""
        from reflowlens.circuits.attribution.performed.validation import validate

        return validate(self, n_nodes, *args, **options)

    def faithfulness(self) -> dict[str, Any]:
        """Whether the graph is to be trusted, by a few interventions in the model, once: see
        :func:`reflowlens.circuits.attribution.performed.faithful.faithfulness`, which has the values and the rule."""
        return dict(self._faithfulness)

    @cached_property
    def _faithfulness(self) -> dict[str, Any]:
        from reflowlens.circuits.attribution.performed.faithful import faithfulness

        return faithfulness(self)

    def why_attended(self, layer: int, head: int, query: int | str, key: int | str, top: int = 1000) -> WhyAttended:
        """Why a head looks from one position at another: its score split exactly into pairs of nodes; see
        :func:`~reflowlens.circuits.attribution.explained.attention.why_attended`."""
        from reflowlens.circuits.attribution.explained.attention import why_attended

        return why_attended(self, layer, head, query, key, top)

    def heads(self, target: str, source: str | None = None, top: int = 1000) -> pd.DataFrame:
        """The edges into a node split exactly by the last head on the way; see
        :func:`~reflowlens.circuits.attribution.explained.heads.by_last_head`."""
        from reflowlens.circuits.attribution.explained.heads import by_last_head

        return by_last_head(self, target, source, top)

    def through_heads(self, target: str) -> pd.DataFrame:
        """What every head brings to a node, on all ways; see
        :func:`~reflowlens.circuits.attribution.explained.heads.through_heads`."""
        from reflowlens.circuits.attribution.explained.heads import through_heads

        return through_heads(self, target)

    @cached_property
    def shares(self) -> Shares:
        """Â, p, and what is missing from the rows of Â; of a pruned graph those of what is left."""
        return shares_of(self.nodes, self.matrix, self._dropped)

    def _is(self, *kinds: str) -> Any:
        return self.nodes["kind"].isin(kinds).to_numpy()


def shares_of(nodes: pd.DataFrame, matrix: Any, dropped: Float[Vector, " node"]) -> Shares:
    """Â and p of a graph."""
    return Shares.of(matrix, nodes["target"].to_numpy(), nodes["kind"].isin(LEFT_OUT).to_numpy(), dropped)
