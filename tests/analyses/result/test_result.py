from __future__ import annotations

import csv
import json
import math
import os

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analyses.result.finding import Finding
from analyses.result.result import Result
from reflowlens.errors import ReflowlensError


def _result(**changes):
    frame = pd.DataFrame(
        {
            "layer": [0, 1, 2],
            "token": [" king", "", "NA"],
            "probability": [0.1, math.nan, 1 / 3],
            "decided": [False, True, True],
        }
    )
    fields = {
        "name": "layer_evolution",
        "title": "Layer Evolution",
        "params": {"prompt": "The capital of France is", "layers": (0, 2), "seed": 0},
        "metrics": {"crystallisation": 4.5, "entropy": 2.0},
        "controls": {"crystallisation": {"untrained": 6.0, "shuffled_norm": 5.5}},
        "intervals": {"crystallisation": (4.0, 5.0)},
        "published": {"crystallisation": 18.0},
        "verdicts": {"crystallisation": "supported"},
        "frames": {"layers": frame},
        "figures": {"probability": go.Figure(go.Scatter(x=frame["layer"], y=frame["probability"]))},
        "notes": ["skipped <b>2</b> prompts"],
        "definitions": {"crystallisation": "first layer after which the final top-1 stays top-1"},
        "seconds": 1.5,
    }
    return Result(**fields | changes)


def _assert_same(loaded, saved):
    for name, frame in saved.frames.items():
        pd.testing.assert_frame_equal(loaded.frames[name], frame, check_exact=True)
    assert loaded.figures == saved.figures
    for field in vars(saved).keys() - {"frames", "figures"}:
        assert getattr(loaded, field) == getattr(saved, field)
    assert loaded.frames.keys() == saved.frames.keys()


def test_round_trip_through_a_folder(tmp_path):
    result = _result()
    folder = result.save(tmp_path / "out" / "evolution")
    assert folder == tmp_path / "out" / "evolution"
    _assert_same(Result.load(folder), result)
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "result.json",
        "frames/layers.csv",
        "figures/probability.html",
        "figures/probability.json",
        "figures/plotly.min.js",
    }
    assert (folder / "frames/layers.csv").read_text().splitlines() == [
        '"layer","token","probability","decided"',
        '0," king",0.1,False',
        '1,"","",True',
        '2,"NA",0.3333333333333333,True',
    ]
    html = (folder / "figures/probability.html").read_text(encoding="utf-8")
    assert 'src="plotly.min.js"' in html
    assert "http" not in html


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
columns = {
    "int64": st.integers(-(2**63), 2**63 - 1),
    "float64": st.floats(),
    "float32": st.floats(width=32),
    "float16": st.floats(width=16),
    "uint8": st.integers(0, 255),
    "bool": st.booleans(),
    "str": texts,
}


@st.composite
def frames(draw):
    rows = draw(st.integers(0, 4))
    dtypes = draw(
        st.dictionaries(
            texts.filter(lambda name: name and name.isprintable()),
            st.sampled_from(sorted(columns)),
            min_size=1,
            max_size=4,
        )
    )
    return pd.DataFrame(
        {
            name: pd.Series(draw(st.lists(columns[dtype], min_size=rows, max_size=rows)), dtype=dtype)
            for name, dtype in dtypes.items()
        }
    )


FORMULAS = ["=1+2", "+1", "-x", "@SUM(A1)", "\t=1", "  =1", "'quoted", "'='", " a", "", "plain"]


def test_a_spreadsheet_computes_no_text_and_load_gives_it_back(tmp_path):
    frame = pd.DataFrame({"token": FORMULAS, "p": [-1.5] * len(FORMULAS), "=column": ["a"] * len(FORMULAS)})
    folder = Result("tokens", "Tokens", frames={"tokens": frame}).save(tmp_path, spreadsheet=True)
    with (folder / "frames" / "tokens.csv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    texts = [*header, *(cell for row in rows for cell in (row[0], row[2]))]
    assert not [text for text in texts if text.strip(" ")[:1] in tuple("=+-@\t")]
    assert {row[1] for row in rows} == {"-1.5"}, "numbers stay numbers"
    pd.testing.assert_frame_equal(Result.load(folder).frames["tokens"], frame)


@settings(max_examples=100, deadline=None)
@given(frames())
def test_any_frame_of_numbers_and_text_survives(tmp_path_factory, frame):
    folder = tmp_path_factory.mktemp("frame")
    result = Result("any", "Any", frames={"rows": frame})
    _assert_same(Result.load(result.save(folder)), result)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
finite = st.floats(allow_nan=False, allow_infinity=False)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(texts, json_values), st.dictionaries(texts, finite), st.lists(texts), st.data())
def test_any_metrics_and_params_survive(tmp_path_factory, params, metrics, notes, data):
    controls = {metric: data.draw(st.dictionaries(texts, finite, max_size=2)) for metric in metrics}
    intervals = {metric: tuple(sorted(data.draw(st.tuples(finite, finite)))) for metric in metrics}
    result = Result("any", "Any", params, metrics, controls, intervals, notes=notes)
    _assert_same(Result.load(result.save(tmp_path_factory.mktemp("metrics"))), result)


def test_saving_again_replaces_the_result_and_nothing_else(tmp_path):
    _result().save(tmp_path)
    (tmp_path / "frames" / "mine.csv").write_text("kept")
    other = _result(metrics={"entropy": 1.0}, controls={}, intervals={}, verdicts={}, frames={}, figures={})
    other.save(tmp_path)
    _assert_same(Result.load(tmp_path), other)
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"result.json", "frames/mine.csv", "figures/plotly.min.js"}


def test_an_interrupted_save_leaves_the_old_result_or_none(tmp_path, monkeypatch):
    first, second = _result(), _result(metrics={"entropy": 9.0}, controls={}, intervals={}, verdicts={})
    first.save(tmp_path)
    monkeypatch.setattr(go.Figure, "write_html", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        second.save(tmp_path)
    _assert_same(Result.load(tmp_path), first)
    monkeypatch.undo()

    moved = []

    def move_two(source, target, replace=os.replace):
        moved.append(target)
        if len(moved) > 2:
            raise OSError("disk full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", move_two)
    with pytest.raises(OSError, match="disk full"):
        second.save(tmp_path)
    with pytest.raises(ReflowlensError, match=r"no result in .*a folder that holds result.json was expected"):
        Result.load(tmp_path)
    assert not list(tmp_path.glob(".result-*"))


def test_a_manifest_cannot_point_outside_its_folder(tmp_path):
    (tmp_path / "precious.csv").write_text("kept")
    folder = _result().save(tmp_path / "out")
    manifest = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(manifest | {"frames": {"../../precious": {}}}))
    with pytest.raises(ReflowlensError, match="is used as a file name"):
        Result.load(folder)
    _result().save(folder)
    assert (tmp_path / "precious.csv").read_text() == "kept"


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "result.json").write_text("{"),
        lambda folder: (folder / "result.json").write_text("[]"),
        lambda folder: (folder / "result.json").write_text('{"name": "x"}'),
        lambda folder: (folder / "frames/layers.csv").unlink(),
        lambda folder: (folder / "frames/layers.csv").write_text("layer,token\n0,x\n"),
        lambda folder: (folder / "frames/layers.csv").write_text("layer,token,probability,decided\nx,x,x,x\n"),
        lambda folder: (folder / "figures/probability.json").write_text("{"),
    ],
)
def test_a_damaged_result_is_an_error(tmp_path, damage):
    damage(_result().save(tmp_path))
    with pytest.raises(ReflowlensError, match="is damaged"):
        Result.load(tmp_path)


def test_to_json_metrics_is_json_and_complete():
    metrics = _result().to_json_metrics()
    assert json.loads(json.dumps(metrics)) == {
        "crystallisation": {
            "value": 4.5,
            "interval": [4.0, 5.0],
            "controls": {"untrained": 6.0, "shuffled_norm": 5.5},
            "published": 18.0,
            "verdict": "supported",
        },
        "entropy": {"value": 2.0, "interval": None, "controls": {}, "published": None, "verdict": None},
    }


def test_summary_has_a_row_for_each_control():
    summary = _result().summary()
    assert list(summary["control"]) == ["untrained", "shuffled_norm", ""]
    assert list(summary["metric"]) == ["crystallisation", "crystallisation", "entropy"]
    assert list(summary["control_value"][:2]) == [6.0, 5.5]
    assert summary.loc[2, ["low", "high", "control_value", "published"]].isna().all()
    assert list(Result("empty", "Empty").summary().columns) == list(summary.columns)


def test_notebook_view_shows_the_headline_and_escapes():
    html = _result(title="A < B")._repr_html_()
    assert "A &lt; B" in html
    assert "untrained 6, shuffled_norm 5.5" in html
    assert "4 to 5" in html
    assert "skipped &lt;b&gt;2" in html
    assert "no metrics" in Result("empty", "Empty")._repr_html_()
    assert "crystallisation=4.5" in repr(_result())


def test_numpy_numbers_become_floats_and_tuples_lists():
    result = _result(metrics={"crystallisation": np.float32(4.5)}, intervals={"crystallisation": np.array([4, 5])})
    assert type(result.metrics["crystallisation"]) is float
    assert result.intervals["crystallisation"] == (4.0, 5.0)
    assert result.params["layers"] == [0, 2]


def test_findings_and_tables_by_metric_are_one_result():
    tables = _result(published={"crystallisation": 18.0, "absent": 1.0}, definitions={"absent": "none"})
    findings = {
        "crystallisation": Finding(
            4.5, (4.0, 5.0), {"untrained": 6.0, "shuffled_norm": 5.5}, "supported", published=18.0
        ),
        "entropy": Finding(2.0),
    }
    nothing = {table: {} for table in ("metrics", "controls", "intervals", "verdicts")}
    other = _result(**nothing, findings=findings, published={"absent": 1.0}, definitions={"absent": "none"})
    assert other.findings == tables.findings
    for table in ("metrics", "controls", "intervals", "published", "verdicts", "definitions"):
        assert getattr(other, table) == getattr(tables, table)
    assert other.definitions == {"absent": "none"}
    assert "absent" not in other.findings


def test_tables_of_a_result_are_for_reading():
    result = _result()
    for change in (
        lambda: result.metrics.update(entropy=1.0),
        lambda: result.verdicts.setdefault("entropy", "supported"),
        lambda: result.controls.__setitem__("entropy", {"untrained": 1.0}),
    ):
        with pytest.raises(ReflowlensError, match=r"set result.findings\[metric\] = Finding"):
            change()
    with pytest.raises(AttributeError):
        result.metrics = {}
    result.findings["late"] = Finding(1.0, controls={"untrained": 2.0}, definition="something")
    assert result.metrics["late"] == 1.0
    assert result.controls["late"] == {"untrained": 2.0}
    assert result.definitions["late"] == "something"


def test_frames_are_copied_and_renumbered():
    frame = pd.DataFrame({"layer": [0, 1, 2]})
    result = Result("any", "Any", frames={"odd": frame[frame["layer"] != 1]})
    frame.loc[2, "layer"] = 7
    assert result.frames["odd"].to_dict("list") == {"layer": [0, 2]}
    assert list(result.frames["odd"].index) == [0, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": {"crystallisation": math.nan}}, r"metrics\['crystallisation'\] is nan: leave out"),
        ({"published": {"x": math.inf}}, r"published\['x'\] is inf"),
        ({"controls": {"accuracy": {"untrained": 1.0}}}, "no such metric; the metrics are crystallisation, entropy"),
        ({"controls": {"entropy": {"untrained": math.nan}}}, r"controls\['entropy'\]\['untrained'\] is nan"),
        ({"intervals": {"accuracy": (0.0, 1.0)}}, r"intervals\['accuracy'\]: no such metric"),
        ({"intervals": {"entropy": (1.0, 0.0)}}, r"low ≤ high were expected, got \(1.0, 0.0\)"),
        ({"verdicts": {"accuracy": "supported"}}, r"verdicts\['accuracy'\]: no such metric"),
        ({"verdicts": {"entropy": "true"}}, "no verdict 'true'; there are supported, not supported, underpowered"),
        ({"params": {"model": object()}}, r"params\['model'\]: a value that JSON can hold"),
        ({"params": {"alpha": math.nan}}, r"params\['alpha'\]: a value that JSON can hold"),
        ({"name": "layer evolution"}, "'layer evolution' is used as a file name"),
        ({"frames": {"a/b": pd.DataFrame({"x": [1]})}}, "'a/b' is used as a file name"),
        ({"frames": {"f": [1]}}, "a DataFrame was expected, got list"),
        ({"frames": {"f": pd.DataFrame({"x": [1]}, index=["a"])}}, r"the index holds data; .*reset_index"),
        ({"frames": {"f": pd.DataFrame({"x": [1], "y": [2]}).set_index("x")}}, "the index holds data"),
        ({"frames": {"f": pd.DataFrame([[1, 2]], columns=["x", "x"])}}, "distinct, printable column names"),
        ({"frames": {"f": pd.DataFrame()}}, "distinct, printable column names"),
        ({"frames": {"f": pd.DataFrame({"a\nb": [1]})}}, "distinct, printable column names"),
        ({"frames": {"f": pd.DataFrame([[1, 2]])}}, "distinct, printable column names"),
        ({"frames": {"f": pd.DataFrame({"x": ["a", None]})}}, r"frames\['f'\]\['x'\]: a value is missing; write ''"),
        ({"frames": {"f": pd.DataFrame({"x": ["a", 1]})}}, "holds mixed"),
        ({"frames": {"f": pd.DataFrame({"x": [(1, 2)]})}}, "whole numbers, floats, booleans or text were expected"),
        ({"frames": {"f": pd.DataFrame({"x": ["a"]}, dtype="category")}}, "holds categorical"),
    ],
)
def test_what_cannot_be_kept_is_rejected(changes, message):
    with pytest.raises(ReflowlensError, match=message):
        _result(**changes)


def test_what_was_added_later_is_checked_when_saving(tmp_path):
    result = _result()
    result.findings["late"] = Finding(math.nan)
    with pytest.raises(ReflowlensError, match=r"metrics\['late'\] is nan"):
        result.save(tmp_path)
