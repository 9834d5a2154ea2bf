"""Every figure of a run, as files for a paper or a talk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from analyses.result.result import Result
from analyses.runner.suite import ERROR_FILE
from reflowlens.errors import ReflowlensError
from reflowlens.figures.export import Width, save_figures

if TYPE_CHECKING:
    import plotly.graph_objects as go


def export_figures(
    folder: str | Path,
    formats: Sequence[str] = ("pdf",),
    *,
    out: str | Path | None = None,
    width: Width = "screen",
    progress: bool = False,
) -> list[Path]:
    """Write every figure of a run, or of one saved result, with one start of the browser, and return the paths.

    Args:
        folder: what `run_suite` or `Result.save` has written.
        formats: of html, json, png, svg and pdf.
        out: where `EXPERIMENT-FIGURE.FORMAT` is written; default `folder/figures`.
        width: "screen", or "one" or "two" columns of a journal (`reflowlens.figures.export.save_figure`).

    Raises ReflowlensError if there is no result, one is damaged, or there is no browser to draw with.

    Example: `export_figures("out/reflow-nano/2026-01-31_12-00-00", ["pdf", "png"], width="one")`
    """
    folder = Path(folder)
    results = [
        Result.load(path.parent)
        for path in sorted([*folder.glob("result.json"), *folder.glob("*/result.json")])
        if not (path.parent / ERROR_FILE).exists()  # of an earlier run; the last one failed
    ]
    if not results:
        raise ReflowlensError(f"no results in {folder}: a folder that `reflowlens run` has written was expected")
    out = folder / "figures" if out is None else Path(out)
    figures: dict[str | Path, go.Figure] = {
        out / f"{result.name}-{name}.{format}": figure
        for result in results
        for name, figure in result.figures.items()
        for format in formats
    }
    return save_figures(figures, width=width, progress=progress)
