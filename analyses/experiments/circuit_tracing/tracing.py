"""What the graphs of prompts say: which units lead to a prediction, what removing them does, and along which paths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from analyses.experiments.circuit_tracing.additions import ends_with, log_probabilities
from analyses.experiments.circuit_tracing.writers import Writers
from analyses.statistics.draws import derive_rng
from reflowlens.circuits.attribution.attribute import attribute
from reflowlens.circuits.attribution.graph import AttributionGraph
from reflowlens.circuits.attribution.scores.influence import Shares
from reflowlens.circuits.attribution.scores.paths import beginnings, best_paths, share_by_length
from reflowlens.dictionaries.dictionary import Dictionary
from reflowlens.models.base import HookedModel

STRONGEST = 10  # units that are removed, and paths that are counted
PROMOTED = 10  # tokens that a unit is said to promote
UNITS = ("feature", "neuron")
_ALIKE = 8  # units of the nearest size, among which a control is drawn


def graph_of(
    model: HookedModel, dictionary: Dictionary | None, prompt: str, target: str | None = None
) -> AttributionGraph:
    """The graph of one token behind a prompt, by default the likeliest; inputs are whole embeddings."""
    wanted: str | int | None = target
    if wanted is None:
        wanted = int(model(prompt)[0, -1, : model.tokenizer.n_vocab].argmax())
    signals = False if "hook_recipe" in model.hook_dict else None
    return attribute(model, prompt, dictionary, [wanted], signals=signals, progress=False)


# -- units ------------------------------------------------------------------------------------------------------------


def unit_frame(graph: AttributionGraph, writers: Writers) -> pd.DataFrame:
    """The units of a graph with their ``size``, activation times the norm of what is written, by falling influence."""
    units = graph.nodes[graph.nodes["kind"].isin(UNITS)]
    norms = [writers.norms(block).cpu().numpy() for block in range(len(writers.decoders))]
    norm = [norms[block][index] for block, index in zip(units["layer"], units["feature"], strict=True)]
    columns = ["node", "layer", "feature", "pos", "activation", "influence"]
    frame = units[columns].assign(size=units["activation"].abs() * np.array(norm, dtype=float))
    return frame.sort_values("influence", ascending=False, ignore_index=True)


def chosen_units(units: pd.DataFrame, rng: np.random.Generator) -> dict[str, pd.DataFrame]:
    """Units of a graph by how they are chosen; ways that find none are left out.

    Args:
        units: a :func:`unit_frame`.

    Returns:
        ``influence`` and ``size``: the largest of either; ``matched_unit``: for each of the first another of its block,
        drawn among those of the nearest size; ``random_unit``: as many at random.
    """
    strongest = units.head(STRONGEST)
    others = units.iloc[len(strongest) :]
    matched: list[Any] = []
    for layer, size in zip(strongest["layer"], strongest["size"], strict=True):
        free = others[(others["layer"] == layer) & ~others.index.isin(matched)]
        if len(free):
            near = (np.log(free["size"]) - np.log(size)).abs().nsmallest(_ALIKE).index
            matched.append(rng.choice(near.to_numpy()))
    drawn = rng.permutation(len(others))[:STRONGEST]
    chosen = {
        "influence": strongest,
        "size": units.nlargest(STRONGEST, "size"),
        "matched_unit": others.loc[matched],
        "random_unit": others.iloc[drawn],
    }
    return {name: some for name, some in chosen.items() if len(some)}


def promoted_by(writers: Writers, units: pd.DataFrame) -> NDArray[np.int64]:
    """The tokens that units promote by what they write, with the sign of their activation: [unit, token]."""
    block, index = (torch.tensor(units[name].to_numpy(dtype=np.int64)) for name in ("layer", "feature"))
    sign = torch.tensor(np.sign(units["activation"].to_numpy(dtype=np.float32)))
    return writers.promoted(writers.written(block, index, sign), PROMOTED).cpu().numpy()


def removal_effects(
    graph: AttributionGraph, writers: Writers, prompt: str, chosen: Mapping[str, pd.DataFrame]
) -> dict[str, float]:
    """By how many nats the target's log probability changes, up or down, when a unit is removed from the model as it is
    where it is active; mean over units, each removed by itself."""
    tokens, cfg = writers.model.to_tokens(prompt)[0], writers.model.cfg
    units = pd.concat(chosen.values(), keys=chosen).drop_duplicates("node")
    block, index, position = (torch.tensor(units[name].to_numpy(np.int64)) for name in ("layer", "feature", "pos"))
    added = torch.zeros(1 + len(units), len(writers.decoders), len(tokens), cfg.d_model, device=tokens.device)
    rows = torch.arange(len(units))
    activation = torch.tensor(units["activation"].to_numpy(np.float32))
    added[1 + rows, :, position] = -writers.written(block, index, activation)
    target = int(graph.nodes["feature"].iloc[-1])
    ends = ends_with(writers.model, tokens, added)
    log_p = log_probabilities(writers.model, ends)[:, target].double().cpu().numpy()
    change = dict(zip(units["node"], np.abs(log_p[1:] - log_p[0]), strict=True))
    return {name: float(np.mean([change[node] for node in own["node"]])) for name, own in chosen.items()}


# -- paths ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Paths:
    """How what is explained is shared out among paths.

    Args:
        strongest: the share of the 10 strongest of two edges or more, each through a unit at least.
        by_length: of all paths of 1, 2, … edges.
    """

    strongest: float
    by_length: Float[np.ndarray, " length"]

    @classmethod
    def of(cls, shares: Shares, begin: NDArray[np.bool_]) -> Paths:
        strongest = sum(path.share for path in best_paths(shares, begin, STRONGEST, edges=2))
        return cls(strongest, share_by_length(shares, begin))

    @property
    def multi_hop(self) -> float:
        """The share of paths through two units or more."""
        return float(self.by_length[2:].sum())


def paths_of(graph: AttributionGraph) -> Paths:
    return Paths.of(graph.shares, beginnings(graph))


def shuffled_paths(graph: AttributionGraph, seed: int, label: str) -> Paths:
    """Of the same graph, the weights of each row in a random order over its edges."""
    matrix = cast("Any", graph.shares.matrix.copy())
    matrix.eliminate_zeros()  # edges from constants, which do not count
    rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    drawn = derive_rng(seed, "shuffled_weights", label).random(len(rows))  # below 1: rows stay where they are
    matrix.data = matrix.data[np.argsort(rows + drawn)]
    return Paths.of(Shares(matrix, graph.shares.rest, graph.shares.targets), beginnings(graph))


def path_frame(graph: AttributionGraph, writers: Writers, k: int) -> pd.DataFrame:
    """The strongest paths of a graph as text, and what their last unit promotes."""
    text = node_texts(graph)
    rows = graph.paths(k, edges=2)
    units = graph.nodes.set_index("node")
    last = units.loc[[path[-2] for path in rows["path"]]].reset_index()
    promoted = promoted_by(writers, last)
    return pd.DataFrame(
        {
            "share": rows["share"],
            "edges": rows["edges"],
            "sign": rows["sign"],
            "path": [" → ".join(text[node] for node in path) for path in rows["path"]],
            "promotes": promoted_texts(writers.model, promoted, 5),
        }
    )


def node_texts(graph: AttributionGraph) -> dict[str, str]:
    """Nodes as people read them: tokens by their text, units by block, number and the token that they are at."""
    texts = {}
    nodes = graph.nodes.astype({"pos": object}).to_dict("records")
    for node in nodes:
        at = "" if pd.isna(node["pos"]) else f"“{graph.tokens[node['pos']]}”"
        special = {
            "embedding": at,
            "position": f"position {node['pos']}",
            "bigram": f"pair “{node['label']}”",
            "token_value": f"value of {at}",
            "error": f"error {node['layer']} at {at}",
            "logit": f"“{node['label']}”",
        }
        texts[str(node["node"])] = special.get(str(node["kind"]), f"{node['layer']}.{node['feature']} at {at}")
    return texts


def promoted_texts(model: HookedModel, promoted: NDArray[np.int64], k: int) -> list[str]:
    """The first k of each row of tokens as one readable line."""
    return [" ".join(map(repr, model.tokenizer.to_str_tokens(row))) for row in promoted[:, :k].tolist()]
