"""The notebooks run from top to bottom in their quick form, and what is committed of them is clean and offline."""

from __future__ import annotations

import base64
import re
from itertools import islice
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

from notebooks.execute import (
    FOLDER,
    MACHINE_PATH,
    NOTEBOOKS,
    PLOTLY,
    PNG,
    add_images,
    execute,
    outputs,
    quick_form,
    read,
    texts,
    without_traces,
)
from reflowlens.errors import ReflowlensError
from reflowlens.figures.browser import find_browser

NAMES = [path.stem for path in NOTEBOOKS]
LARGEST = 1_500_000
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)


def notebook_of(*sources: str, parameters: str = "QUICK = False") -> NotebookNode:
    """One that holds these cells behind its parameters."""
    cells = [nbformat.v4.new_code_cell(source) for source in (parameters, *sources)]
    cells[0].metadata["tags"] = ["parameters"]
    return nbformat.v4.new_notebook(cells=cells)


def code(notebook: NotebookNode) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


# -- they run ---------------------------------------------------------------------------------------------------------


# Nothing of the one before: neither names nor settings of libraries. %reset collects garbage; what is imported is none.
AFRESH = """\
import gc
if not gc.get_freeze_count():
    gc.disable()
    import pandas, reflowlens.models
    gc.freeze()
    gc.enable()
%reset -f
import os, pandas, torch
os.chdir({folder!r})
torch.set_grad_enabled(True)
pandas.reset_option("^display")
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, NotebookNode]:
    """Every notebook in its quick form, one after the other in one kernel, each in a folder of its own.

    A kernel takes longer to import than most notebooks take to run.
    """
    parts = {path: quick_form(read(path)).cells for path in NOTEBOOKS}
    cells = []
    for path, part in parts.items():
        cells += [nbformat.v4.new_code_cell(AFRESH.format(folder=str(tmp_path_factory.mktemp(path.stem)))), *part]
    for number, cell in enumerate(cells):
        cell.id = str(number)
        cell.metadata["tags"] = [*cell.metadata.get("tags", []), "raises-exception"]  # the notebooks after it run too
    done = iter(execute(nbformat.v4.new_notebook(cells=cells), tmp_path_factory.mktemp("kernel"), timeout=300).cells)
    return {path: nbformat.v4.new_notebook(cells=list(islice(done, 1 + len(part)))) for path, part in parts.items()}


@each
def test_the_quick_form_runs(path: Path, runs: dict[Path, NotebookNode]) -> None:
    done = runs[path]
    assert ["\n".join(output.traceback) for output in outputs(done) if output.output_type == "error"] == []
    assert len(list(outputs(done))) >= 8
    assert [text for text in texts(without_traces(done)) if MACHINE_PATH.search(text)] == []


# -- what is committed ------------------------------------------------------------------------------------------------


def test_the_eleven_notebooks_are_there() -> None:
    assert [name[:2] for name in NAMES] == ["01", "02", "03", "04", "05", "06", "07", "08", "09", "10", "11"]


@each
def test_committed_outputs_are_those_of_one_run_from_top_to_bottom(path: Path) -> None:
    cells = [cell for cell in read(path).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(output.output_type != "error" for cell in cells for output in cell.outputs)


@each
def test_committed_outputs_are_in_full_form(path: Path) -> None:
    assert "QUICK = False" in code(read(path))[0]
    assert "QUICK = True" not in "".join(code(read(path))[1:])


@each
def test_nothing_of_the_machine_is_committed(path: Path) -> None:
    notebook = read(path)
    assert path.stat().st_size < LARGEST
    assert [text for text in texts(notebook) if MACHINE_PATH.search(text)] == []
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert all(set(cell.metadata) <= {"tags"} for cell in notebook.cells)
    assert all(not output.get("metadata") for output in outputs(notebook))


@each
def test_what_is_committed_opens_offline(path: Path) -> None:
    """Figures have an image for readers without plotly; no output loads anything or holds plotly.js."""
    notebook = read(path)
    for output in outputs(notebook):
        if PLOTLY in output.get("data", {}):
            assert base64.b64decode(output.data[PNG]).startswith(b"\x89PNG")
    for text in texts(notebook):
        assert not re.search(r"""(src|href)=["'](?!data:|#)|url\(|@import|fetch\(|Plotly\.newPlot""", text)


@each
def test_links_between_notebooks_lead_somewhere(path: Path) -> None:
    for cell in read(path).cells:
        if cell.cell_type == "markdown":
            for target in re.findall(r"\]\(([\w./-]+\.ipynb)\)", cell.source):
                assert (FOLDER / target).is_file(), target


# -- the tool ---------------------------------------------------------------------------------------------------------


def test_the_quick_form_changes_the_parameter_alone() -> None:
    notebook = notebook_of("QUICK", "1 + 1")
    quick = quick_form(notebook)
    assert code(quick) == ["QUICK = True", "QUICK", "1 + 1"]
    assert code(notebook)[0] == "QUICK = False", "the notebook itself stays"
    with pytest.raises(ValueError, match="one cell tagged 'parameters'"):
        quick_form(notebook_of(parameters="FAST = False"))


def test_traces_of_a_session_go_and_outputs_stay() -> None:
    notebook = notebook_of("print(1)")
    cell = notebook.cells[1]
    cell.metadata["execution"] = {"iopub.execute_input": "2026-01-01T00:00:00Z"}
    cell.outputs = [nbformat.v4.new_output("stream", text="1\n")]
    cell.outputs += [nbformat.v4.new_output("display_data", {"text/plain": "x"}, metadata={"session": 7})]
    notebook.metadata["widgets"] = {"state": {}}
    clean = without_traces(notebook)
    assert "widgets" not in clean.metadata
    assert clean.cells[1].metadata == {}
    assert clean.cells[0].metadata == {"tags": ["parameters"]}
    assert list(texts(clean)) == ["1\n", "x"]
    assert not clean.cells[1].outputs[1].metadata
    nbformat.validate(clean)


@pytest.mark.parametrize("text", ["/home/me/x", "in /tmp/tmpab12/out", "/Users/me/x"])
def test_machine_paths_are_recognised(text: str) -> None:
    assert MACHINE_PATH.search(text)
    assert not MACHINE_PATH.search("out/suite/report.html and blocks.0/attn")


def test_every_figure_gets_an_image_of_itself() -> None:
    try:
        find_browser()
    except ReflowlensError:
        pytest.skip("PNGs need Chrome or Chromium")
    figure = {"data": [{"type": "bar", "x": ["a"], "y": [1]}], "layout": {}}
    notebook = notebook_of("figure")
    notebook.cells[1].outputs = [nbformat.v4.new_output("display_data", {PLOTLY: figure})]
    assert add_images(notebook) == 1
    assert base64.b64decode(notebook.cells[1].outputs[0].data[PNG]).startswith(b"\x89PNG")
    nbformat.validate(notebook)
