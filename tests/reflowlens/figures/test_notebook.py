"""What a notebook keeps of a figure: plotly's JSON, and something for readers without plotly."""

from __future__ import annotations

import base64

import pandas as pd
import plotly.io as pio
import pytest

from reflowlens.errors import ReflowlensError
from reflowlens.figures import browser
from reflowlens.figures.builders import line_with_band
from reflowlens.figures.figure import Figure
from reflowlens.figures.notebook import add_renderer

PLOTLY = "application/vnd.plotly.v1+json"


@pytest.fixture
def in_jupyter(monkeypatch):
    """plotly's default of a Jupyter kernel, and the one of before again afterwards."""
    monkeypatch.delenv("PLOTLY_RENDERER", raising=False)
    before = pio.renderers.default
    pio.renderers.default = "plotly_mimetype"
    yield
    pio.renderers.default = before


def figure() -> Figure:
    return line_with_band(pd.DataFrame({"x": [0, 1], "y": [0, 1]}), "x", "y", title="p < 1")


def test_without_a_browser_a_line_says_what_is_missing(in_jupyter, monkeypatch):
    monkeypatch.setenv("BROWSER_PATH", "/nowhere/chrome")
    add_renderer()
    bundle = figure()._repr_mimebundle_()
    assert bundle[PLOTLY]["data"][0]["type"] == "scatter", "interactive readers lose nothing"
    assert "p &lt; 1" in bundle["text/html"]
    assert "no picture of it: BROWSER_PATH is &#x27;/nowhere/chrome&#x27;" in bundle["text/html"]
    assert "<script" not in bundle["text/html"]


def test_with_a_browser_a_picture_lies_beside(in_jupyter):
    try:
        browser.find_browser()
    except ReflowlensError:
        pytest.skip("PNGs need Chrome or Chromium")
    add_renderer()
    bundles = [figure()._repr_mimebundle_() for _ in range(2)]
    for bundle in bundles:
        assert PLOTLY in bundle
        assert base64.b64decode(bundle["image/png"]).startswith(b"\x89PNG")
    pio.renderers["reflowlens"]._drawer.close()


@pytest.mark.parametrize(("environment", "default"), [("plotly_mimetype", "plotly_mimetype"), (None, "json")])
def test_a_renderer_that_somebody_chose_stays(in_jupyter, monkeypatch, environment, default):
    if environment:
        monkeypatch.setenv("PLOTLY_RENDERER", environment)
    pio.renderers.default = default
    add_renderer()
    assert pio.renderers.default == default
