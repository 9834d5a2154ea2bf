from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
import pytest

from reflowlens.errors import ReflowlensError
from reflowlens.figures.builders import bars, dots, histogram_with_control, line_with_band
from reflowlens.figures.export import save_figure
from reflowlens.figures.heatmap import heatmap
from reflowlens.figures.style import CONTROL_GREYS, INK, PALETTE, label
from reflowlens.figures.template import register_template


def curves():
    rows = [(name, x, 0.1 * x, 0.1 * x - 0.05, 0.1 * x + 0.05) for name in ("model", "untrained") for x in range(4)]
    return pd.DataFrame(rows, columns=["series", "layer", "p", "low", "high"])


def luminance(color):
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def contrast(one, other):
    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


def test_importing_the_module_does_not_import_plotly():
    code = "import sys, reflowlens.figures.builders; sys.exit('plotly' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_template_is_registered_once_and_transparent():
    template = register_template()
    assert pio.templates["reflowlens"].layout == template.layout
    assert register_template() is template
    assert template.layout.paper_bgcolor == template.layout.plot_bgcolor == "rgba(0, 0, 0, 0)"
    assert list(template.layout.colorway) == list(PALETTE)


@pytest.mark.parametrize("page", ["#FFFFFF", "#14161A"])
def test_ink_and_colours_can_be_read_on_light_and_dark_pages(page):
    assert contrast(INK, page) > 4
    assert all(contrast(color, page) > 1.8 for color in (*PALETTE, *CONTROL_GREYS))


def test_line_with_band_draws_each_series_over_its_band():
    figure = line_with_band(curves(), "layer", "p", "low", "high", "series", controls=["untrained"])
    bands, lines = figure.data[::2], figure.data[1::2]
    assert [line.name for line in lines] == ["model", "untrained"]
    assert list(lines[0].y) == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert list(bands[0].x) == [0, 1, 2, 3, 3, 2, 1, 0]
    assert list(bands[0].y) == pytest.approx([0.05, 0.15, 0.25, 0.35, 0.25, 0.15, 0.05, -0.05])
    assert all(band.hoverinfo == "skip" and not band.showlegend for band in bands)
    assert (lines[0].line.color, lines[0].line.dash) == (PALETTE[0], "solid")
    assert (lines[1].line.color, lines[1].line.dash) == (CONTROL_GREYS[0], "dash")
    assert lines[0].customdata[1] == "(0.05 to 0.15)"
    assert (figure.layout.xaxis.title.text, figure.layout.yaxis.title.text) == ("layer", "p")


def test_control_greys_do_not_use_up_colours():
    frame = pd.DataFrame({"s": ["null", "a", "b"], "x": [0, 0, 0], "y": [1, 2, 3]})
    figure = line_with_band(frame, "x", "y", color="s", controls=["null", "not there"])
    assert [trace.line.color for trace in figure.data] == [CONTROL_GREYS[0], *PALETTE[:2]]


def test_more_series_than_colours_begin_again():
    frame = pd.DataFrame({"s": list("abcdefgh"), "x": 0, "y": 1})
    assert line_with_band(frame, "x", "y", color="s").data[len(PALETTE)].line.color == PALETTE[0]


def test_a_missing_interval_leaves_the_curve_without_a_band_there():
    frame = curves().query("series == 'model'").assign(low=[np.nan, 0.0, 0.1, 0.2])
    band, line = line_with_band(frame, "layer", "p", "low", "high").data
    assert list(band.x) == [1, 2, 3, 3, 2, 1]
    assert len(line.x) == 4


def test_a_band_on_a_logarithmic_axis_stays_positive():
    figure = line_with_band(curves(), "layer", "p", "low", "high", "series", log_y=True)
    assert figure.layout.yaxis.type == "log"
    assert all(min(band.y) > 0 for band in figure.data[::2])


def sections():
    return pd.DataFrame(
        {
            "section": ["family", "plural", "family", "plural"],
            "space": ["R", "R", "shuffled", "shuffled"],
            "accuracy": [0.5, 0.25, 0.0, 0.0],
            "low": [0.4, 0.2, 0.0, 0.0],
            "high": [0.7, 0.3, 0.1, 0.1],
            "codebook": ["the, a, <b>", "x" * 150, "", ""],
        }
    )


def test_bars_are_grouped_with_intervals_and_hatched_controls():
    figure = bars(sections(), "section", "accuracy", "low", "high", "space", controls=["shuffled"], hover=["codebook"])
    first, control = figure.data
    assert list(first.x) == ["family", "plural"]
    assert list(first.error_y.array) == pytest.approx([0.2, 0.05])
    assert list(first.error_y.arrayminus) == pytest.approx([0.1, 0.05])
    assert (first.marker.pattern.shape, control.marker.pattern.shape) == ("", "/")
    assert first.marker.line.color == PALETTE[0]
    assert "the, a, &lt;b&gt;" in first.customdata[0]
    assert all(len(line) <= 75 for line in first.customdata[1].split("<br>"))
    assert list(figure.layout.xaxis.categoryarray) == ["family", "plural"]
    assert figure.layout.meta["min_width"] > 100


def test_horizontal_bars_swap_the_axes():
    figure = bars(sections(), "section", "accuracy", "low", "high", "space", horizontal=True, y_title="accuracy@1")
    assert list(figure.data[0].y) == ["family", "plural"]
    assert list(figure.data[0].error_x.array) == pytest.approx([0.2, 0.05])
    assert figure.layout.xaxis.title.text == "accuracy@1"
    assert figure.layout.yaxis.autorange == "reversed"


def test_bars_over_numbers_keep_a_numeric_axis():
    figure = bars(pd.DataFrame({"rank": range(1, 301), "effect": np.linspace(1, -1, 300)}), "rank", "effect")
    assert figure.layout.xaxis.type is None
    assert not figure.data[0].showlegend


def test_dots_mark_the_published_value_once_a_line():
    frame = pd.DataFrame(
        {
            "analogy": ["king", "ran", "king", "ran"],
            "space": ["R", "R", "E", "E"],
            "rank": [1, 3, 2, 700],
            "published": [1.0, np.nan, 1.0, np.nan],
        }
    )
    figure = dots(frame, "rank", "analogy", "space", reference="published", log_x=True)
    assert [trace.name for trace in figure.data] == ["R", "E", "published"]
    assert (list(figure.data[2].x), list(figure.data[2].y)) == ([1.0], ["king"])
    assert figure.layout.xaxis.type == "log"


def cells():
    rows = [(layer, pos, token, 0.1 * (layer + pos)) for layer in (0, 1) for pos, token in enumerate([" the", " the"])]
    return pd.DataFrame(rows, columns=["layer", "position", "token", "p"]).assign(top=["a", "<b>", "\n", " "])


def test_heatmap_places_cells_and_writes_in_them():
    figure = heatmap(cells(), "position", "layer", "p", text="top", x_labels="token", z_range=(0, 1))
    (trace,) = figure.data
    np.testing.assert_allclose(trace.z, [[0.0, 0.1], [0.1, 0.2]])
    assert [list(row) for row in trace.text] == [["a", "&lt;b&gt;"], ["⏎", "␣"]]
    assert list(figure.layout.xaxis.ticktext) == [" the", " the"], "equal tokens keep their own columns"
    assert list(figure.layout.yaxis.ticktext) == ["0", "1"]
    assert (trace.zmin, trace.zmax) == (0, 1)
    assert "p: 0.2" in trace.customdata[1][1]


def test_heatmap_leaves_cells_that_no_row_names_empty():
    figure = heatmap(cells().iloc[:3], "position", "layer", "p", text="top")
    assert np.isnan(figure.data[0].z[1][1])
    assert json.loads(figure.to_json())["data"][0]["text"][1][1] is None


def test_heatmap_needs_one_row_a_cell():
    with pytest.raises(ReflowlensError, match="one row a cell: position = 0, layer = 0 has several"):
        heatmap(pd.concat([cells(), cells()]), "position", "layer", "p")


def test_histogram_shares_sum_to_one_over_common_bins():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"effect": rng.normal(size=300), "basis": ["trained"] * 100 + ["rotated_basis"] * 200})
    figure = histogram_with_control(frame, "effect", "basis", controls=["rotated_basis"], bins=20)
    for trace in figure.data:
        assert sum(trace.y[1:-1:2]) == pytest.approx(1)
    assert list(figure.data[0].x) == list(figure.data[1].x)
    with pytest.raises(ReflowlensError, match="'effect' needs finite numbers"):
        histogram_with_control(frame.assign(effect=np.inf), "effect", "basis")


@pytest.mark.parametrize(
    "draw",
    [
        lambda frame: line_with_band(frame, "layer", "q"),
        lambda frame: bars(frame, "layer", "p", hover=["q"]),
        lambda frame: dots(frame, "p", "series", reference="q"),
        lambda frame: heatmap(frame, "layer", "series", "q"),
        lambda frame: histogram_with_control(frame, "p", "q"),
    ],
)
def test_a_missing_column_and_an_empty_frame_are_named(draw):
    with pytest.raises(ReflowlensError, match="no column 'q'; the frame has 'series', 'layer', 'p'"):
        draw(curves())
    with pytest.raises(ReflowlensError, match="at least one row"):
        draw(curves().iloc[:0])


def test_titles_are_shown_as_written_and_long_ones_wrap():
    figure = line_with_band(
        curves(), "layer", "p", title="a < b", y_title="share of the prompts whose lens shows the token"
    )
    assert figure.layout.title.text == "a &lt; b"
    assert figure.layout.yaxis.title.text == "share of the prompts whose lens<br>shows the token"


@pytest.mark.parametrize(
    ("value", "shown"), [("<br>", "&lt;br&gt;"), ("\n\t", "⏎⇥"), ("  ", "␣␣"), (" king", " king"), ("", ""), (3, "3")]
)
def test_label(value, shown):
    assert label(value) == shown


def test_save_as_html_alone_or_sharing_plotly(tmp_path):
    figure = line_with_band(curves(), "layer", "p", color="series")
    alone = save_figure(figure, tmp_path / "new" / "alone.html")
    assert alone.stat().st_size > 3_000_000
    shared = save_figure(figure, tmp_path / "shared.html", share_plotlyjs=True)
    assert 'src="plotly.min.js"' in shared.read_text(encoding="utf-8")
    assert '"showSendToCloud": false' in shared.read_text(encoding="utf-8"), "no button uploads the data"
    assert {path.name for path in tmp_path.iterdir()} == {"new", "plotly.min.js", "shared.html"}


def test_json_round_trip(tmp_path):
    figure = heatmap(cells(), "position", "layer", "p", text="top")
    assert pio.read_json(save_figure(figure, tmp_path / "figure.json")) == figure


def test_an_unknown_suffix_is_an_error(tmp_path):
    with pytest.raises(ReflowlensError, match=r"'a.gif': a name ending in .html, .json, .png, .svg, .pdf was expected"):
        save_figure(go.Figure(), tmp_path / "a.gif")


def test_heatmap_shows_names_in_words_and_tokens_as_they_are():
    rows = cells().assign(layer=["body_parts", "body_parts", "us_states", "us_states"], token=["a_b", "c"] * 2)
    figure = heatmap(rows, "position", "layer", "p", x_labels="token")
    assert list(figure.layout.yaxis.ticktext) == ["body parts", "us states"]
    assert list(figure.layout.xaxis.ticktext) == ["a_b", "c"]


def test_the_frame_of_a_histogram_does_not_cut_its_outermost_lines():
    frame = pd.DataFrame({"effect": [0.0, 0.5, 1.0], "basis": "trained"})
    figure = histogram_with_control(frame, "effect", "basis", bins=4)
    low, high = figure.layout.xaxis.range
    assert low < min(figure.data[0].x)
    assert high > max(figure.data[0].x)
