"""The page of an attribution graph: its sums are of all edges, its text stays text, and a real Chromium works it."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path

import pytest

import reflowlens as rl
from reflowlens.errors import ReflowlensError
from reflowlens.notebook.graph_page import messages

PROMPT = "The capital of France is"
BIASES = [f"bias:{block}" for block in range(7)]


@pytest.fixture(scope="module")
def graph():
    return rl.attribute(rl.load_model("reflow-nano"), PROMPT, rl.load_dictionary("reflow-nano-plt"))


@pytest.fixture(scope="module")
def page(graph, tmp_path_factory) -> Path:
    return graph.save(tmp_path_factory.mktemp("graph") / "capital.html")


def content(path: Path):
    (found,) = re.findall(r'<script type="application/json" id="graph">(.*?)</script>', path.read_text("utf-8"), re.S)
    return json.loads(found)


def test_every_sum_on_the_page_is_of_all_edges(graph, page):
    held = content(page)
    sums = dict(zip(graph.nodes["node"], graph.matrix.sum(1), strict=True))
    reached = [node for node in held["nodes"] if "left" in node]
    assert {node["kind"] for node in reached} == {"feature", "logit"}
    for node in reached:
        assert node["left"]["sum"] == pytest.approx(sums[node["id"]], rel=1e-5, abs=1e-5)
        assert node["left"]["sum"] == pytest.approx(node["value"], rel=1e-4, abs=1e-4)
    of = held["all"]
    assert (of["nodes"], of["edges"], of["whole"]) == (1005, graph.matrix.nnz, True)
    kept = graph.influence[[node["id"] for node in held["nodes"]]].sum()
    assert of["kept"] == pytest.approx(kept / graph.influence.drop(["rest", *BIASES]).sum(), rel=1e-3)


def test_every_text_of_the_page_has_its_chinese(page):
    folder = resources.files("reflowlens.notebook") / "pages"
    script = "".join((folder / f"graph{part}.js").read_text("utf-8") for part in ("", "_picture", "_panel"))
    used = set(re.findall(r'\bt\((?:[\w.]+ === 1 \? "[^"]*" : )?"((?:[^"\\]|\\.)*)"', script))
    used |= set(re.findall(r"\{\{(.*?)\}\}", (folder / "graph.html").read_text("utf-8")))
    assert used <= set(messages("zh"))
    for english, chinese in messages("zh").items():
        assert set(re.findall(r"\{\w+\}", english)) == set(re.findall(r"\{\w+\}", chinese))


def test_what_cannot_be_saved_is_one_error(graph, tmp_path):
    for name, arguments, message in (
        ("x.txt", {}, "a graph is saved as one of .html, .json, .png, .svg, .pdf"),
        ("x.html", {"lang": "de"}, "no language 'de': one of en, zh"),
        ("x.html", {"groups": [["a", "logit:263"]]}, "no node 'logit:263' for group 'a'; did you mean"),
        ("x.html", {"groups": [["a"]]}, "a group is \\[label, node, ...\\] with one node at least"),
        ("x.html", {"groups": [["a", "logit:262"], ["b", "logit:262"]]}, "is in two groups"),
        ("x.html", {"features": tmp_path}, "no feature pages in"),
    ):
        with pytest.raises(ReflowlensError, match=message):
            graph.save(tmp_path / name, **arguments)
    assert list(tmp_path.iterdir()) == []
