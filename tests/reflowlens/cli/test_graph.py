"""``reflowlens graph``: a prompt's graph as a page, as published JSON and as tables."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

import reflowlens as rl
from reflowlens.cli import main
from tests.support.tiny import random_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graph")
    rl.save_model(folder / "model", random_model("reflow"))
    return folder


def graph(folder: Path, *more: str, prompt: str = "to be") -> int:
    return main(["graph", str(folder / "model"), prompt, "--out", str(folder / "out"), *more])


def test_a_prompt_becomes_files(folder, capsys):
    assert graph(folder, "--target", "A", "--against", "B", "--neurons", "4", "--lang", "zh") == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("AttributionGraph(neurons of a model, ")
    assert printed[1].startswith(("trustworthy: ", "not trustworthy: ")), "as the page says first"
    assert printed[-1] == str(folder / "out" / "graph.html")
    assert '<html lang="zh' in (folder / "out" / "graph.html").read_text()
    published = json.loads((folder / "out" / "graph.json").read_text())
    assert published["metadata"]["prompt"] == "to be"
    assert json.loads((folder / "out" / "graph-metadata.json").read_text())["graphs"] == [published["metadata"]]
    nodes, edges = (pd.read_csv(folder / "out" / f"{name}.csv") for name in ("nodes", "edges"))
    assert nodes["label"].iloc[-1] == "A − B"
    expected = rl.attribute(
        rl.load_model(folder / "model"), "to be", targets="A", against="B", neurons=4, progress=False
    ).prune()
    assert nodes["node"].tolist() == expected.nodes["node"].tolist()
    assert len(edges) == len(expected.edges)


def test_heads_and_thresholds(folder):
    assert graph(folder, "--heads", "--node-threshold", "0.5", "--edge-threshold", "0.9") == 0
    kinds = pd.read_csv(folder / "out" / "nodes.csv")["kind"]
    assert "head" in set(kinds)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "two words"], "'two words' is not a single token of bytes"),
        (["--against", "B"], "against= is compared with targets="),
        (["--dictionary", "nothing"], "no dictionary 'nothing'"),
        (["--node-threshold", "2"], "node_threshold is a share from 0 to 1, got 2"),
        (["--memory", "1e-9"], "memory=1 bytes hold"),
        (["--features", "nothing"], "nothing"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(folder, capsys, arguments, message):
    out = folder / "fresh"
    assert graph(folder, *arguments, "--out", str(out)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_one_token_is_no_prompt(folder, capsys):
    assert graph(folder, prompt="t") == 2
    assert "two tokens at least" in capsys.readouterr().err
