"""The plotly template of this package, and an empty figure in it; plotly is imported with the first figure."""

from __future__ import annotations

import functools
import textwrap
from typing import TYPE_CHECKING

from reflowlens.figures.style import INK, PALETTE, label

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from reflowlens.figures.figure import Figure

TEMPLATE = "reflowlens"


@functools.cache
def register_template() -> go.layout.Template:
    """Register the template with plotly as ``"reflowlens"`` and return it; the builders of figures do so by themselves.

    Example: ``register_template(); plotly.io.templates.default = "reflowlens"`` for a notebook's own figures.
    """
    import plotly.graph_objects as go
    import plotly.io as pio

    from reflowlens.figures.notebook import add_renderer

    axis = {
        "automargin": True,
        "exponentformat": "power",
        "gridcolor": "rgba(128, 128, 128, 0.22)",
        "linecolor": INK,
        "spikecolor": INK,
        "spikethickness": 1,
        "showline": True,
        "tickcolor": INK,
        "ticks": "outside",
        "ticklen": 4,
        "title": {"standoff": 10, "font": {"size": 13}},
        "zeroline": False,
    }
    layout = {
        "colorway": PALETTE,
        "font": {"family": "Inter, system-ui, -apple-system, Segoe UI, Roboto, sans-serif", "size": 13, "color": INK},
        "hoverlabel": {"bgcolor": "#24272D", "bordercolor": "#5A5F69", "font": {"color": "#F4F4F4"}, "align": "left"},
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom"},
        "margin": {"l": 60, "r": 20, "t": 16, "b": 50},
        "modebar": {"bgcolor": "rgba(0, 0, 0, 0)", "color": INK, "activecolor": PALETTE[0]},
        "paper_bgcolor": "rgba(0, 0, 0, 0)",
        "plot_bgcolor": "rgba(0, 0, 0, 0)",
        "title": {"x": 0, "xref": "paper", "y": 1, "yref": "container", "yanchor": "top", "pad": {"t": 16}},
        "xaxis": axis,
        "yaxis": axis,
    }
    pio.templates[TEMPLATE] = go.layout.Template(layout=layout)
    add_renderer()
    return pio.templates[TEMPLATE]


def blank_figure(title: str, x_title: str, y_title: str) -> Figure:
    """An empty figure in the template, with a ``save``; the texts are shown as they are."""
    template = register_template()
    from reflowlens.figures.figure import Figure

    upright = "<br>".join(map(label, textwrap.wrap(y_title, 36)))  # plotly would let a long one run out of the figure
    figure = Figure(layout={"template": template, "xaxis_title": label(x_title), "yaxis_title": upright})
    if title:
        figure.update_layout(title_text=label(title), margin_t=90)
    return figure
