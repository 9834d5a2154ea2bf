from __future__ import annotations

import json
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from analyses.result.result import Result
from analyses.runner.figure_files import export_figures
from reflowlens import cli
from reflowlens.errors import ReflowlensError
from reflowlens.figures import browser
from reflowlens.figures.builders import bars, line_with_band
from reflowlens.figures.export import INCHES, provenance, read_figure, save_figure, save_figures, sheet_of, stamp
from reflowlens.figures.figure import Figure
from reflowlens.figures.heatmap import MOST_BYTES, block_means, block_of, heatmap
from reflowlens.figures.provenance import html_with_metadata, pdf_with_metadata, png_chunk, png_with_metadata
from reflowlens.figures.scatter import scatter


def _has_browser() -> bool:
    try:
        browser.find_browser()
    except ReflowlensError:
        return False
    return True


needs_browser = pytest.mark.skipif(not _has_browser(), reason="PNG, SVG and PDF need Chrome or Chromium")
FACTS = {"experiment": "müßig", "params": {"seed": 0, "prompt": "(a\\b)"}}


def curve(title: str = "A title") -> Figure:
    frame = pd.DataFrame({"layer": range(4), "p": [0.1, 0.2, 0.4, 0.3]})
    return line_with_band(frame, "layer", "p", title=title)


def chunks(png: bytes) -> list[tuple[bytes, bytes]]:
    """An independent reading of a PNG, every checksum checked."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    found, at = [], 8
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        kind, data = png[at + 4 : at + 8], png[at + 8 : at + 8 + length]
        assert struct.unpack(">I", png[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + data)
        found.append((kind, data))
        at += 12 + length
    return found


def pdf_information(pdf: bytes) -> bytes:
    """The document information that a reader finds: from the last table of objects, by its offset."""
    start = int(re.findall(rb"startxref\s+(\d+)", pdf)[-1])
    assert pdf[start : start + 4] == b"xref"
    first, offset = re.match(rb"xref\n(\d+) 1\n(\d{10}) 00000 n \n", pdf[start:]).groups()
    info = re.search(rb"/Info (\d+) 0 R", pdf[start:])[1]
    previous = int(re.search(rb"/Prev (\d+)", pdf[start:])[1])
    assert info == first
    assert pdf[previous : previous + 4] == b"xref", "the drawing's own objects are still found"
    assert pdf[int(offset) :].startswith(first + b" 0 obj")
    return pdf[int(offset) : start]


def tiny_png() -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(b"\0\0")) + png_chunk(b"IEND", b"")


TINY_PDF = (
    b"%PDF-1.4\n1 0 obj\n<</CreationDate (D:2026)>>\nendobj\nxref\n0 2\n0000000000 65535 f \n0000000009 00000 n \n"
    b"trailer\n<</Size 2\n/Root 1 0 R\n/Info 1 0 R>>\nstartxref\n51\n%%EOF\n"
)


# -- what every file says of its origin -------------------------------------------------------------------------------


def test_a_png_keeps_its_pixels_and_says_its_origin_and_resolution() -> None:
    marked = chunks(png_with_metadata(tiny_png(), "Tü", FACTS, dpi=300))
    assert [kind for kind, _ in marked] == [b"IHDR", b"pHYs", b"iTXt", b"iTXt", b"tEXt", b"IDAT", b"IEND"]
    assert struct.unpack(">IIB", marked[1][1]) == (11811, 11811, 1)
    assert marked[2][1].endswith("Tü".encode())
    keyword, _, text = marked[4][1].partition(b"\0")
    assert (keyword, json.loads(text)) == (b"reflowlens", FACTS)
    with pytest.raises(ReflowlensError, match="did not draw a PNG"):
        png_with_metadata(b"GIF", "", {}, 96)


def test_a_pdf_is_only_added_to() -> None:
    marked = pdf_with_metadata(TINY_PDF, "Tü", FACTS)
    assert marked.startswith(TINY_PDF)
    information = pdf_information(marked)
    assert b"/Title <FEFF005400FC>" in information
    text = re.search(rb"/reflowlens \((.*)\)\n/CreationDate", information, re.DOTALL)[1]
    assert json.loads(re.sub(rb"\\(.)", rb"\1", text)) == FACTS
    with pytest.raises(ReflowlensError, match="did not draw a PDF"):
        pdf_with_metadata(b"%PDF-1.4", "", {})


def test_html_says_its_origin_without_markup_of_its_own() -> None:
    page = html_with_metadata("<html><head></head></html>", "a < b", {"text": '"></head>'})
    assert "<title>a &lt; b</title>" in page
    assert page.count("</head>") == 1


def test_a_figure_is_stamped_once_and_somebodys_meta_is_left_alone() -> None:
    figure = bars(pd.DataFrame({"x": ["a"], "y": [1.0]}), "x", "y")
    stamp(figure, experiment="first", figure="mine")
    stamp(figure, experiment="second")
    assert provenance(figure)["experiment"] == "first"
    assert figure.layout.meta["min_width"] > 0, "what the figure said before is still there"
    other = go.Figure(layout={"meta": "mine"})
    stamp(other, experiment="first")
    assert other.layout.meta == "mine"
    assert list(provenance(other)) == ["reflowlens"]


def test_a_results_figures_know_their_parameters_also_after_loading(tmp_path: Path) -> None:
    result = Result("mine", "Mine", params={"seed": 3, "model_hash": "abc"}, figures={"curve": curve()})
    path = result.figures["curve"].save(tmp_path / "curve.json")
    assert json.loads(path.read_text())["layout"]["meta"]["provenance"]["params"]["model_hash"] == "abc"
    loaded = Result.load(result.save(tmp_path / "mine")).figures["curve"]
    assert isinstance(loaded, Figure)
    assert provenance(loaded) == provenance(result.figures["curve"])
    page = (tmp_path / "mine" / "figures" / "curve.html").read_text(encoding="utf-8")
    assert '<meta name="reflowlens" content="{&quot;experiment&quot;: &quot;mine&quot;' in page


# -- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", ["one", "two"])
def test_a_sheet_fills_its_columns_whatever_the_figure_needs(columns: str) -> None:
    wide = curve().update_layout(meta={"min_width": 2000}, height=500)
    for figure in (curve(), wide):
        assert sheet_of(figure, columns).inches[0] == pytest.approx(INCHES[columns])
    assert sheet_of(wide, columns).width == 2000
    assert sheet_of(wide, "screen").width == 2000
    assert sheet_of(curve(), "screen").inches[0] == pytest.approx(760 / 96)


@pytest.mark.parametrize("columns", ["one", "two"])
def test_a_tall_figure_is_printed_in_proportion_with_a_line_for_every_name(columns: str) -> None:
    names = [f"section_{i}" for i in range(16)]
    rows = pd.DataFrame(
        [(name, space, 0.5) for name in names for space in "abcdef"], columns=["name", "space", "share"]
    )
    figure = bars(rows, "name", "share", color="space", horizontal=True)
    assert figure.layout.height > 1500
    wide, high = sheet_of(figure, columns).inches
    assert wide == pytest.approx(INCHES[columns])
    assert high <= 1.51 * wide
    assert high * 72 / len(names) > 12, "points, for a name of 7.5"
    assert list(figure.layout.yaxis.categoryarray)[:2] == ["section 0", "section 1"]


@needs_browser
def test_hatched_bars_and_transparent_points_are_lines_of_a_small_pdf(tmp_path: Path) -> None:
    rows = [(f"name {i}", space, i / 40) for i in range(40) for space in ("model", "untrained", "shuffled")]
    frame = pd.DataFrame(rows, columns=["name", "space", "share"])
    hatched = bars(frame, "name", "share", color="space", controls=["untrained", "shuffled"], horizontal=True)
    points = pd.DataFrame({"x": range(800), "y": [i * 7919 % 800 for i in range(800)], "group": ["a", "b"] * 400})
    files = {tmp_path / "bars.pdf": hatched, tmp_path / "points.pdf": scatter(points, "x", "y", "group")}
    for path in save_figures(files, width="one"):
        content = path.read_bytes()
        assert b"/Subtype /Image" not in content
        assert content.count(b"/Subtype /Form") < 10
        assert len(content) < 100_000


def test_a_large_heatmap_stays_small_and_says_so(tmp_path: Path) -> None:
    rows, columns = 800, 700
    y, x = np.divmod(np.arange(rows * columns), columns)
    frame = pd.DataFrame({"x": x, "y": y, "value": x + 1000.0 * y})
    figure = heatmap(frame, "x", "y", "value")
    assert save_figure(figure, tmp_path / "large.json").stat().st_size < 5_000_000
    z = np.asarray(figure.data[0].z)
    down, across = block_of(rows, columns, MOST_BYTES // 11)
    assert z.shape == (-(-rows // down), -(-columns // across))
    assert z[0, 0] == pytest.approx(frame[(frame.x < across) & (frame.y < down)].value.mean())
    assert f"{down} × {across}" in figure.layout.meta["note"]
    assert figure.layout.annotations[0].text.replace("<br>", " ") == figure.layout.meta["note"]
    assert (figure.data[0].dy, figure.data[0].y0) == (down, (down - 1) / 2), "the axis counts the rows of the frame"
    assert len(figure.layout.xaxis.ticktext) <= 80


def test_a_heatmap_too_large_for_its_texts_alone_keeps_every_cell() -> None:
    y, x = np.divmod(np.arange(200 * 300), 300)
    figure = heatmap(pd.DataFrame({"x": x, "y": y, "p": 0.5, "word": "w" * 40}), "x", "y", "p", hover=["word"])
    assert np.asarray(figure.data[0].z).shape == (200, 300)
    assert figure.data[0].customdata is None
    assert "too large to tell" in figure.layout.meta["note"]


def test_block_means_are_those_of_a_plain_loop() -> None:
    values = np.random.default_rng(0).normal(size=(7, 5))
    values[:3, :2] = np.nan
    means = block_means(values, 3, 2)
    for i in range(3):
        for j in range(3):
            block = values[3 * i : 3 * i + 3, 2 * j : 2 * j + 2]
            known = block[~np.isnan(block)]
            assert np.isnan(means[i, j]) if known.size == 0 else means[i, j] == pytest.approx(known.mean())


# -- what can go wrong ------------------------------------------------------------------------------------------------


def test_without_a_browser_one_error_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delenv("BROWSER_PATH", raising=False)
    with pytest.raises(ReflowlensError, match="none was found: apt-get install chromium"):
        save_figure(curve(), tmp_path / "a.png")
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "nothing"))
    with pytest.raises(ReflowlensError, match=r"BROWSER_PATH is .*nothing', which is no program"):
        save_figure(curve(), tmp_path / "a.svg")
    assert not list(tmp_path.iterdir())


def test_a_browser_that_ends_at_once_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROWSER_PATH", "/bin/true")
    with pytest.raises(ReflowlensError, match="the browser ended before"):
        save_figure(curve(), tmp_path / "a.pdf")
    assert not list(tmp_path.iterdir())


def test_unknown_widths_and_folders_without_results_are_told(tmp_path: Path) -> None:
    with pytest.raises(ReflowlensError, match="no width 'three'; there are screen, one, two"):
        save_figure(curve(), tmp_path / "a.png", width="three")  # type: ignore[arg-type]
    with pytest.raises(ReflowlensError, match=r"no results in .*: a folder that `reflowlens run`"):
        export_figures(tmp_path)
    (tmp_path / "a.json").write_text("[1")
    with pytest.raises(ValueError, match="Expecting"):
        read_figure(tmp_path / "a.json")


# -- drawn by a browser -----------------------------------------------------------------------------------------------


@needs_browser
def test_the_command_draws_a_runs_figures_in_every_format_with_one_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("first", "second"):
        Result(name, name, params={"model_hash": name}, figures={"curve": curve("Tü < b")}).save(tmp_path / "r" / name)
    starts = []
    find = browser.find_browser
    monkeypatch.setattr(browser, "find_browser", lambda: starts.append(1) or find())
    arguments = ["figures", str(tmp_path / "r"), "--format", "png", "svg", "pdf", "json", "--width", "one"]
    assert cli.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert "8 files in" in capsys.readouterr().out
    assert starts == [1]
    names = {f"{name}-curve.{suffix}" for name in ("first", "second") for suffix in ("png", "svg", "pdf", "json")}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names

    png = chunks((tmp_path / "out" / "second-curve.png").read_bytes())
    assert struct.unpack(">II", png[0][1][:8])[0] == pytest.approx(3.5 * 300, abs=2)
    texts = {data.partition(b"\0")[0]: data.partition(b"\0")[2] for kind, data in png if kind == b"tEXt"}
    assert json.loads(texts[b"reflowlens"])["params"]["model_hash"] == "second"

    svg = (tmp_path / "out" / "first-curve.svg").read_text(encoding="utf-8")
    assert '"model_hash": "first"' in svg
    assert "<title>Tü &lt; b</title>" in svg
    assert float(re.search(r'<svg[^>]* width="([\d.]+)"', svg)[1]) == pytest.approx(3.5 * 96, abs=1)

    pdf = (tmp_path / "out" / "first-curve.pdf").read_bytes()
    assert b'"model_hash": "first"' in pdf_information(pdf)
    box = [float(x) for x in re.search(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", pdf).groups()]
    assert box == pytest.approx([3.5 * 72, 72 * sheet_of(curve(), "one").inches[1]], abs=1)
    assert pdf.count(b"/Type /Page\n") == 1
    assert b"/Type /Font" in pdf, "text stays text"


@needs_browser
def test_what_the_browser_cannot_draw_is_one_error_and_leaves_no_file(tmp_path: Path) -> None:
    with browser.browser_page() as page:
        page.open("about:blank")
        assert page.evaluate("Promise.resolve({a: 'ü'})") == {"a": "ü"}
        with pytest.raises(ReflowlensError, match="could not draw this figure: ReferenceError: nothing is not defined"):
            page.evaluate("nothing()")
        with pytest.raises(ReflowlensError, match=r"refused No\.such"):
            page.call("No.such")
    assert save_figures({}) == []
