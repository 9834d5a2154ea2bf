"""The figure that the builders return: plotly's, with a method that saves it."""

from __future__ import annotations

from pathlib import Path

import plotly.graph_objects as go

from reflowlens.figures.export import Width, save_figure


class Figure(go.Figure):
    """A plotly figure, everything of which works on it, that saves itself in the format a file's name asks for.

    Example: ``rl_figures.bars(frame, "word", "count").save("counts.pdf", width="one")``
    """

    def save(self, path: str | Path, *, width: Width = "screen") -> Path:
        """Write HTML, JSON, PNG, SVG or PDF, by the suffix; see :func:`reflowlens.figures.export.save_figure`."""
        return save_figure(self, path, width=width)
