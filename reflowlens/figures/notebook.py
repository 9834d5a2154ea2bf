"""Figures in notebooks: a still picture beside the interactive one, for readers that have no plotly.

Jupyter's own default keeps a figure as plotly's JSON alone. JupyterLab, VS Code and Notebook draw it; a notebook that
is exported to HTML or PDF, or read on GitHub, would show nothing, and say nothing. So the default becomes
``plotly_mimetype+reflowlens``: the same, and a PNG where a Chrome or Chromium is installed (a second for the first, a
tenth for the others), or else a line that says what is missing. Whoever has chosen a renderer (``PLOTLY_RENDERER`` or
``plotly.io.renderers.default``) keeps it; ``plotly.io.renderers.default = "plotly_mimetype"`` goes back.
"""

from __future__ import annotations

import base64
import os
from html import escape
from typing import Any

import plotly.graph_objects as go
import plotly.io as pio
from plotly.io.base_renderers import MimetypeRenderer

from reflowlens.errors import ReflowlensError
from reflowlens.figures.export import PngDrawer, title_of

RENDERER = "reflowlens"
_JUPYTER = "plotly_mimetype"  # plotly's own default in a Jupyter kernel


class StillRenderer(MimetypeRenderer):
    """What a reader without plotly sees of a figure."""

    def __init__(self) -> None:
        self._drawer = PngDrawer()

    def to_mimebundle(self, fig_dict: dict[str, Any]) -> dict[str, str]:
        """A PNG, or a note in HTML, and a line of text, of plotly's dictionary of a figure."""
        figure = go.Figure(fig_dict, skip_invalid=True)
        name = title_of(figure) or "a figure"
        try:
            return {"image/png": base64.b64encode(self._drawer.draw(figure)).decode(), "text/plain": f"Figure: {name}"}
        except (ReflowlensError, OSError) as error:
            told = f"Figure: {name}. Plotly draws it, which this page lacks, and there is no picture of it: {error}"
            return {"text/html": f"<p><em>{escape(told)}</em></p>", "text/plain": told}


def add_renderer() -> None:
    """Register the renderer, and put it beside the default of a Jupyter kernel unless another has been chosen."""
    pio.renderers[RENDERER] = StillRenderer()
    if pio.renderers.default == _JUPYTER and "PLOTLY_RENDERER" not in os.environ:
        pio.renderers.default = f"{_JUPYTER}+{RENDERER}"
