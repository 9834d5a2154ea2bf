"""Figures as files: HTML, JSON, PNG, SVG and PDF, for a screen or at a journal's widths, each with its provenance.

Static formats are drawn by an installed Chrome or Chromium (`browser.py` beside) with the plotly.js that the
HTML files use too, so that they show what a page shows. A batch starts the browser once.

A figure's provenance (what made it: experiment, parameters with the model's hash, version) lies in its
``layout.meta["provenance"]`` and goes into every file: plotly's JSON has it there, an HTML page in a ``<meta>``, a PNG
in a ``tEXt`` chunk, an SVG in ``<metadata>``, a PDF in its document information.
"""

from __future__ import annotations

import atexit
import base64
import importlib.metadata
import json
import math
import os
import tempfile
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args
from urllib.parse import unquote

from reflowlens.errors import ReflowlensError
from reflowlens.figures.pdf import VECTORS
from reflowlens.figures.provenance import html_with_metadata, pdf_with_metadata, png_with_metadata, svg_with_metadata
from reflowlens.figures.style import INK
from reflowlens.progress import bar
from reflowlens.storage.atomic import replacing

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from reflowlens.figures.browser import Page
    from reflowlens.figures.figure import Figure

Width = Literal["screen", "one", "two"]
SUFFIXES = (".html", ".json", ".png", ".svg", ".pdf")
STATIC_SUFFIXES = (".png", ".svg", ".pdf")
INCHES = {"one": 3.5, "two": 7.2}  # a column of 89 mm and two of 183 mm, as Nature's and Science's
_PRINT_SCALE = 0.77  # the template's text of 13 px becomes 7.5 points
_PRINT_INK = "#262626"
_MOST_HIGH = {"one": 1.5, "two": 1.0}  # of the width, unless names down an axis need more
_LINE, _MARGINS = 19, 100  # pixels of a line of text, and of an axis with its title
_CHARACTER, _LABEL_ROOM = 9, 20  # pixels that a character of a title and an upright label beside others take
_CSS_DPI = 96
_PNG_DPI = 300
_DEFAULT_HEIGHT = 420


def save_figure(figure: go.Figure, path: str | Path, *, width: Width = "screen", share_plotlyjs: bool = False) -> Path:
    """Write a figure in the format that the suffix names and return the path.

    Args:
        path: ending in ``.html``, ``.json`` (plotly's form), ``.png``, ``.svg`` or ``.pdf``.
        width: of the static formats. ``"screen"`` draws the figure as a page does, on a transparent ground;
            ``"one"`` and ``"two"`` fill one or two columns of a journal (3.5 and 7.2 inches; text of 7.5 points, 300
            dots an inch), dark on white and without the title, which belongs in the caption and stays in the metadata.
        share_plotlyjs: an HTML file holds plotly.js itself (5 MB) and opens alone; True makes it refer to one
            ``plotly.min.js`` in the same folder, written if missing.

    Raises:
        ReflowlensError: the suffix or the width is another, or PNG, SVG and PDF lack a Chrome to draw with.

    Example: ``save_figure(result.figures["probability"], "probability.pdf", width="one")``
    """
    path = _check(path, width)
    if path.suffix in STATIC_SUFFIXES:
        return save_figures({path: figure}, width=width)[0]
    with replacing(path) as temporary:
        if path.suffix == ".html":
            _write_html(figure, temporary, path.stem, share_plotlyjs)
        else:
            figure.write_json(temporary)
    return path


def save_figures(
    figures: Mapping[str | Path, go.Figure], *, width: Width = "screen", progress: bool = False
) -> list[Path]:
    """Write many figures, as :func:`save_figure` does, with one start of the browser, and return their paths.

    Raises:
        ReflowlensError: as there, before anything is written if it is a name, the width or the browser.

    Example: ``save_figures({"a.pdf": first, "b.pdf": second}, width="two")``
    """
    paths = {_check(path, width): figure for path, figure in figures.items()}
    static = {path: figure for path, figure in paths.items() if path.suffix in STATIC_SUFFIXES}
    with bar(show=progress, total=len(paths), unit="figure") as steps:
        if static:
            with _drawing_page() as page:
                for path, figure in static.items():
                    steps.set_description(path.stem, refresh=False)
                    with replacing(path) as temporary:
                        temporary.write_bytes(_draw(page, figure, path.suffix, width))
                    steps.update()
        for path in paths.keys() - static.keys():
            save_figure(paths[path], path)
            steps.update()
    return list(paths)


class PngDrawer:
    """Draws one PNG after the other in a browser that starts with the first and ends with the process, or on a fault.

    Example: ``PngDrawer().draw(figure)``
    """

    def __init__(self) -> None:
        self._opened = ExitStack()
        self._page: Page | None = None
        atexit.register(self.close)

    def draw(self, figure: go.Figure) -> bytes:
        """The figure as on a page. Raises ReflowlensError if there is no browser to draw it or it fails."""
        try:
            if self._page is None:
                self._page = self._opened.enter_context(_drawing_page())
            return _draw(self._page, figure, ".png", "screen")
        except BaseException:  # an interrupt too leaves half a message behind
            self.close()
            raise

    def close(self) -> None:
        """End the browser; the next figure starts another."""
        self._page = None
        self._opened.close()


def read_figure(path: str | Path) -> Figure:
    """A figure from plotly's JSON. Raises ValueError for what is none."""
    from reflowlens.figures.figure import Figure

    return Figure(json.loads(Path(path).read_text(encoding="utf-8")))


# -- provenance -------------------------------------------------------------------------------------------------------


def stamp(figure: go.Figure, /, **facts: Any) -> None:
    """Say in a figure what made it, and the version of reflowlens; what is said already stays.

    A figure whose ``layout.meta`` is no mapping is somebody's own and is left alone.

    Example: ``stamp(figure, experiment="layer_evolution", params={"seed": 0})``
    """
    meta = figure.layout.meta
    if meta is None or (isinstance(meta, Mapping) and "provenance" not in meta):
        version = importlib.metadata.version("reflowlens")
        figure.layout.meta = {**(meta or {}), "provenance": {**facts, "reflowlens": version}}


def provenance(figure: go.Figure) -> dict[str, Any]:
    """What :func:`stamp` has said; of a figure that nobody stamped, the version that writes it.

    >>> from reflowlens.figures.template import blank_figure
    >>> figure = blank_figure("", "x", "y")
    >>> stamp(figure, experiment="mine")
    >>> provenance(figure)["experiment"]
    'mine'
    """
    meta = figure.layout.meta
    said = meta.get("provenance") if isinstance(meta, Mapping) else None
    return dict(said) if said else {"reflowlens": importlib.metadata.version("reflowlens")}


def title_of(figure: go.Figure) -> str:
    """The figure's title as plain text, "" without one."""
    return unescape((figure.layout.title.text or "").replace("<br>", " "))


# -- writing ----------------------------------------------------------------------------------------------------------


def _check(path: str | Path, width: str) -> Path:
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ReflowlensError(f"cannot write {path.name!r}: a name ending in {', '.join(SUFFIXES)} was expected")
    if width not in get_args(Width):
        raise ReflowlensError(f"no width {width!r}; there are {', '.join(get_args(Width))}")
    return path


def _write_html(figure: go.Figure, path: Path, identifier: str, share_plotlyjs: bool) -> None:
    figure.write_html(
        path,
        config={"displaylogo": False, "showSendToCloud": False},  # plotly's button that uploads the data
        include_plotlyjs="directory" if share_plotlyjs else True,
        div_id=identifier,
    )
    page = path.read_text(encoding="utf-8")
    path.write_text(html_with_metadata(page, title_of(figure) or identifier, provenance(figure)), encoding="utf-8")


@dataclass(frozen=True)
class Sheet:
    """The size a figure is laid out at, in CSS pixels, and by how much the drawing is then scaled."""

    width: float
    height: float
    scale: float = 1.0

    @property
    def inches(self) -> tuple[float, float]:
        """Width and height as printed."""
        return self.width * self.scale / _CSS_DPI, self.height * self.scale / _CSS_DPI


def sheet_of(figure: go.Figure, width: Width) -> Sheet:
    """How a figure is laid out for a width: as wide as its text has room to be told apart, at its own proportions.

    What needs more room than a column gives (a heatmap with text in its cells) is laid out wider and printed smaller.

    >>> from reflowlens.figures.template import blank_figure
    >>> [round(x, 2) for x in sheet_of(blank_figure("", "x", "y"), "one").inches]
    [3.5, 2.52]
    """
    meta, layout = figure.layout.meta, figure.layout
    least = float(meta.get("min_width", 0)) if isinstance(meta, Mapping) else 0.0
    if width == "screen":
        return Sheet(float(layout.width or max(760.0, least)), float(layout.height or _DEFAULT_HEIGHT))
    wide = max(INCHES[width] * _CSS_DPI / _PRINT_SCALE, least)
    high = float(layout.height or min(_DEFAULT_HEIGHT, 0.72 * wide))
    if not any(trace.type == "table" for trace in figure.data):  # whose rows would be cut off
        high = min(high, max(_MOST_HIGH[width] * wide, _least_height(figure)))
    return Sheet(wide, high, INCHES[width] * _CSS_DPI / wide)


def _least_height(figure: go.Figure) -> float:
    """At which the names down the axis are a line of text each, below the legend and above the axis."""
    lines = [len(axis.categoryarray or axis.ticktext or ()) for axis in figure.select_yaxes()]
    entries = sum(bool(trace.name) and trace.showlegend is not False for trace in figure.data)
    beside = figure.layout.legend.orientation == "v"
    legend = _LINE * entries
    return max(_MARGINS + _LINE * max(lines, default=0) + (0 if beside else legend), _MARGINS / 2 + legend * beside)


@contextmanager
def _drawing_page() -> Iterator[Page]:
    """A page that holds plotly.js and nothing else, in a browser of its own."""
    if os.name != "posix":
        raise ReflowlensError("PNG, SVG and PDF are drawn on Linux and macOS alone; .html and .json everywhere")
    from plotly.offline import get_plotlyjs

    from reflowlens.figures.browser import browser_page

    with browser_page() as page, tempfile.TemporaryDirectory(prefix="reflowlens-page-") as folder:
        script = get_plotlyjs().replace("</script", "<\\/script")
        file = Path(folder) / "page.html"
        file.write_text(f"<!doctype html><meta charset='utf-8'><body><script>{script}</script>", encoding="utf-8")
        page.open(file.as_uri())
        yield page


def _draw(page: Page, figure: go.Figure, suffix: str, width: Width) -> bytes:
    """The bytes of a static file."""
    sheet, title, facts = sheet_of(figure, width), title_of(figure), provenance(figure)
    dpi = _CSS_DPI if width == "screen" else _PNG_DPI
    options = {"format": suffix[1:], "width": round(sheet.width), "height": round(sheet.height), "scale": sheet.scale}
    if suffix == ".png":
        options["scale"] = 2.0 if width == "screen" else sheet.scale * dpi / _CSS_DPI
    elif suffix == ".pdf":
        options["format"] = "svg"
    data = figure.to_json() if width == "screen" else _for_paper(figure, sheet)
    image: str = page.evaluate(f"Plotly.toImage({data}, {json.dumps(options)})")
    drawing = image.partition(",")[2]
    if suffix == ".png":
        return png_with_metadata(base64.b64decode(drawing), title, facts, dpi if width != "screen" else 2 * dpi)
    svg = unquote(drawing)
    if suffix == ".svg":
        return svg_with_metadata(svg, title, facts).encode()
    page.evaluate(f"document.body.style.margin = 0; document.body.innerHTML = {json.dumps(svg)}; null")
    page.evaluate(VECTORS)
    return pdf_with_metadata(page.pdf(*sheet.inches), title, facts)


def _for_paper(figure: go.Figure, sheet: Sheet) -> str:
    """plotly's JSON of the figure without its title, dark on white, its horizontal axis as full as it can be read."""
    import plotly.graph_objects as go

    copy = go.Figure(figure)
    copy.update_layout(title=None, margin_t=None, paper_bgcolor="white", plot_bgcolor="white")
    for axis in copy.select_xaxes():
        if axis.title.text:
            axis.title.text = "<br>".join(textwrap.wrap(axis.title.text, int(sheet.width / _CHARACTER)))
        if axis.tickvals is not None:
            step = math.ceil(len(axis.tickvals) * _LABEL_ROOM / sheet.width)
            axis.update(tickvals=axis.tickvals[::step], ticktext=(axis.ticktext or axis.tickvals)[::step])
    return copy.to_json().replace(f'"{INK}"', f'"{_PRINT_INK}"')
