"""A graph over layers and tokens: what is drawn, where, and how an edge shows its sign and size."""

from __future__ import annotations

import pandas as pd
import pytest

from reflowlens.errors import ReflowlensError
from reflowlens.figures.layered_graph import layered_graph

NODES = pd.DataFrame(
    [
        ("e0", "embedding", -1, 0, "<b>", 1.0, 0.6, 0.0),
        ("e1", "embedding", -1, 1, "y", 1.0, 0.1, 0.0),
        ("f0", "feature", 0, 0, "", 2.0, 0.5, 0.0),
        ("f1", "feature", 0, 1, "", 2.0, 0.4, 0.0),
        ("g1", "feature", 0, 1, "", 2.0, 0.3, 0.0),
        ("l", "logit", 1, 1, "z", 3.0, 0.0, 1.0),
        ("b", "bias", 0, None, "", None, 0.0, 0.0),
    ],
    columns=["node", "kind", "layer", "pos", "label", "activation", "influence", "target"],
)
EDGES = pd.DataFrame(
    [("e0", "f0", 2.0), ("f0", "l", 3.0), ("f1", "l", -1.0), ("e1", "g1", 0.5), ("b", "l", 9.0)],
    columns=["source", "target", "weight"],
)


def points(figure) -> dict[str, tuple[float, float]]:
    found = {}
    for trace in figure.data:
        for x, y, text in zip(trace.x, trace.y, trace.customdata, strict=True):
            found[text.split("<br>")[0].removeprefix("node: ")] = (x, y)
    return found


def test_nodes_stand_in_their_layer_and_column():
    figure = layered_graph(NODES, EDGES, ["<b>", "y"])
    at = points(figure)
    assert set(at) == {"e0", "e1", "f0", "f1", "g1", "l"}
    assert at["e0"][1] == at["e1"][1] == -1
    assert at["f0"][1] == at["f1"][1] == 0
    assert at["e0"][0] == at["f0"][0] < at["f1"][0] < at["g1"][0]
    assert (at["f1"][0] + at["g1"][0]) / 2 == at["e1"][0] == at["l"][0]
    assert list(figure.layout.xaxis.ticktext) == ["&lt;b&gt;", "y"]
    assert list(figure.layout.yaxis.ticktext) == ["inputs", "0", "logits"]


def test_edges_show_sign_and_share():
    shapes = layered_graph(NODES, EDGES, ["x", "y"]).layout.shapes
    assert len(shapes) == 4  # what has no place is not drawn
    # into the logit 3 and -1 of 4, times 1; into f0 all, times 0.5; into g1 all, times 0.3: the last is the widest
    assert [shape.line.dash for shape in shapes] == ["dash", "solid", "solid", "solid"]
    widths = [shape.line.width for shape in shapes]
    assert widths == sorted(widths)
    assert widths[-1] == pytest.approx(3.0)


def test_bounds_keep_what_matters_most():
    figure = layered_graph(NODES, EDGES, ["x", "y"], most_nodes=4, most_edges=1)
    assert set(points(figure)) == {"e0", "e1", "f0", "l"}
    assert len(figure.layout.shapes) == 1


def test_without_edges_and_without_nodes():
    assert not layered_graph(NODES, EDGES[:0], ["x", "y"]).layout.shapes
    with pytest.raises(ReflowlensError, match="at least one row"):
        layered_graph(NODES[:0], EDGES, ["x", "y"])
    with pytest.raises(ReflowlensError, match="a node with a position"):
        layered_graph(NODES[6:], EDGES, ["x", "y"])
    with pytest.raises(ReflowlensError, match="no column 'weight'"):
        layered_graph(NODES, EDGES.rename(columns={"weight": "w"}), ["x", "y"])
