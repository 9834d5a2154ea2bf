"""A graph over the layers and tokens of a prompt: rows are layers, the inputs at the bottom, and columns tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from reflowlens.errors import ReflowlensError
from reflowlens.figures.style import PALETTE, check_columns, hover_texts, label, series_of
from reflowlens.figures.template import blank_figure

if TYPE_CHECKING:
    import plotly.graph_objects as go

_SYMBOLS = {
    "error": "diamond-open",
    "embedding": "square",
    "position": "square-open",
    "bigram": "square-open",
    "token_value": "square-open",
    "signal": "square-open",
    "readout": "hexagon",
    "logit": "star",
    "head": "triangle-up",
}
_ABREAST = 10  # nodes side by side in a cell; more stand in a further row of it
_CELL_HEIGHT = 0.62  # of a layer's row
_THINNEST, _THICKEST = 0.5, 3.0


def layered_graph(
    nodes: pd.DataFrame,
    edges: pd.DataFrame,
    tokens: Sequence[str],
    *,
    most_nodes: int = 80,
    most_edges: int = 160,
    title: str = "",
) -> go.Figure:
    """Nodes by layer and position, edges as curves: orange what adds, dashed blue what takes away.

    Args:
        nodes: columns ``node``, ``kind``, ``layer``, ``pos``, ``label``, ``activation``, ``influence``, ``target``.
        edges: columns ``source``, ``target``, ``weight``. An edge's score is its share of what goes into its target,
            times the influence of that; it is as wide as its score.
        tokens: the texts of the columns.
        most_nodes: those of most influence are drawn; inputs and what is explained always are.
        most_edges: those of the highest score, among the nodes that are drawn.

    Raises:
        ReflowlensError: the frame of nodes is empty, or a frame lacks a column.

    Example: ``layered_graph(graph.nodes, graph.edges, graph.tokens)``
    """
    check_columns(nodes, ["node", "kind", "layer", "pos", "label", "activation", "influence", "target"])
    if not edges.empty:
        check_columns(edges, ["source", "target", "weight"])
    placed = _placed(_drawn(nodes, most_nodes), len(tokens))
    figure = blank_figure(title, "", "layer")
    figure.update_layout(shapes=_curves(placed, edges, most_edges))
    through = placed["influence"] + placed["target"]
    placed = placed.assign(size=6 + 9 * np.sqrt(through / max(float(through.max()), 1e-30)))
    for series in series_of(placed, "kind", ["error"]):
        rows = series.rows
        kind = str(rows["kind"].iloc[0])
        symbol = _SYMBOLS.get(kind, "circle")
        figure.add_scatter(
            x=rows["x"],
            y=rows["y"],
            mode="markers+text" if kind == "logit" else "markers",
            text=[label(text) for text in rows["label"]] if kind == "logit" else None,
            textposition="top center",
            name=series.name,
            marker={"color": series.color, "symbol": symbol, "size": rows["size"], "line": {"width": 1}},
            customdata=hover_texts(rows, ["node", "label", "activation", "influence"]),
            hovertemplate="%{customdata}<extra></extra>",
        )
    middles = placed.attrs["middles"]
    layers = sorted(placed["layer"].unique())
    figure.update_xaxes(tickvals=middles, ticktext=[label(token) for token in tokens], showgrid=False)
    names = {layer: str(layer) for layer in layers} | {-1: "inputs"}
    for kind, name in (("readout", "readout"), ("logit", "logits")):
        names |= dict.fromkeys(placed["layer"][placed["kind"] == kind], name)
    figure.update_yaxes(
        tickvals=layers, ticktext=[names[layer] for layer in layers], range=[min(layers) - 0.6, max(layers) + 0.8]
    )
    figure.update_layout(height=max(420, 74 * (max(layers) - min(layers) + 2)), meta={"min_width": 26 * len(tokens)})
    return figure


def _drawn(nodes: pd.DataFrame, most: int) -> pd.DataFrame:
    nodes = nodes[nodes["pos"].notna()]
    if nodes.empty:
        raise ReflowlensError("a figure of a graph needs a node with a position; these have none")
    always = nodes["kind"].isin(["embedding", "logit"])
    others = nodes[~always].nlargest(max(most - int(always.sum()), 0), "influence")
    return nodes.loc[nodes.index.isin(others.index) | always]


def _placed(nodes: pd.DataFrame, n_tokens: int) -> pd.DataFrame:
    """With ``x`` and ``y``; a column is as wide as its fullest cell, and its middle in ``attrs``."""
    nodes = nodes.sort_values(["pos", "layer", "influence"], ascending=[True, True, False], kind="stable")
    cells = nodes.groupby(["pos", "layer"])
    rank, count = cells.cumcount().to_numpy(), cells["node"].transform("size").to_numpy()
    abreast = np.minimum(count, _ABREAST)
    widths = np.ones(n_tokens)
    np.maximum.at(widths, nodes["pos"].to_numpy(int), abreast)
    left = np.concatenate([[0.0], (widths + 1).cumsum()])[:-1]
    middles = left + (widths - 1) / 2
    rows = -(-count // _ABREAST)
    in_row = np.minimum(count - rank // _ABREAST * _ABREAST, _ABREAST)
    x = middles[nodes["pos"].to_numpy(int)] + rank % _ABREAST - (in_row - 1) / 2
    y = nodes["layer"].to_numpy(float) + _CELL_HEIGHT * ((rank // _ABREAST + 0.5) / rows - 0.5)
    placed = nodes.assign(x=x, y=y, layer=nodes["layer"].astype(int))
    placed.attrs["middles"] = middles
    return placed


def _curves(placed: pd.DataFrame, edges: pd.DataFrame, most: int) -> list[dict[str, object]]:
    at = placed.set_index("node")
    among = edges[edges["source"].isin(at.index) & edges["target"].isin(at.index) & (edges["weight"] != 0)]
    if among.empty:
        return []
    size = among["weight"].abs()
    through = (at["influence"] + at["target"]).reindex(among["target"]).to_numpy(float)
    score = size / size.groupby(among["target"], observed=True).transform("sum") * through
    among = among.assign(score=score).nlargest(most, "score").sort_values("score", kind="stable")
    among["score"] /= among["score"].max() or 1.0
    curves: list[dict[str, object]] = []
    for source, target, weight, score in among[["source", "target", "weight", "score"]].itertuples(index=False):
        (x0, y0), (x1, y1) = at.loc[source, ["x", "y"]], at.loc[target, ["x", "y"]]
        middle, strength = (y0 + y1) / 2, score**0.5
        line = {
            "width": _THINNEST + (_THICKEST - _THINNEST) * strength,
            "color": PALETTE[1] if weight > 0 else PALETTE[0],
            "dash": "solid" if weight > 0 else "dash",
        }
        path = f"M {x0:.3f},{y0:.3f} C {x0:.3f},{middle:.3f} {x1:.3f},{middle:.3f} {x1:.3f},{y1:.3f}"
        curves.append({"type": "path", "path": path, "line": line, "opacity": 0.2 + 0.5 * strength, "layer": "below"})
    return curves
