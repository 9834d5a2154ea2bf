"""Execute the notebooks: `make notebooks` rewrites them with outputs in full, the tests run their quick form.

A notebook has one cell tagged `parameters`, whose line `QUICK = False` the quick form turns to True. Figures are
committed twice in one output: plotly's JSON, which JupyterLab and VS Code draw, and a PNG, which GitHub and every other
reader shows. Neither holds plotly.js or fetches it. The PNGs are added after the run, so that running a notebook
needs no browser.

    python -m notebooks.execute                # all
    python -m notebooks.execute 01 06          # those whose names begin so
"""

from __future__ import annotations

import argparse
import base64
import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from reflowlens.figures.export import save_figures
from reflowlens.figures.figure import Figure
from reflowlens.storage.atomic import replacing

FOLDER = Path(__file__).parent
NOTEBOOKS = sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))
PARAMETERS = "QUICK = False"
PLOTLY, PNG = "application/vnd.plotly.v1+json", "image/png"
MACHINE_PATH = re.compile(r"/(home|root|work|tmp|Users|private|mnt)/|[A-Z]:\\\\Users")
# Figures as plotly's JSON alone; no advice to install widgets; sums in the same order in every run.
KERNEL_ENVIRONMENT = {
    "PLOTLY_RENDERER": "plotly_mimetype",
    "PYTHONWARNINGS": "ignore:IProgress not found",
    "OMP_NUM_THREADS": "1",
}
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def read(path: Path) -> NotebookNode:
    """The notebook, checked against the format's schema."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def quick_form(notebook: NotebookNode) -> NotebookNode:
    """A copy that is executed in seconds: its parameters cell says `QUICK = True`.

    Raises ValueError if the notebook has not exactly one such cell with that line.
    """
    copy = nbformat.from_dict(notebook)
    cells = [cell for cell in copy.cells if "parameters" in cell.metadata.get("tags", [])]
    if len(cells) != 1 or PARAMETERS not in cells[0].source:
        raise ValueError(f"one cell tagged 'parameters' with the line {PARAMETERS!r} was expected")
    cells[0].source = cells[0].source.replace(PARAMETERS, "QUICK = True")
    return copy


def execute(notebook: NotebookNode, folder: str | Path, *, timeout: int = 1200) -> NotebookNode:
    """A copy with the outputs of a run from top to bottom in a new kernel, which works in `folder`.

    Raises nbclient's CellExecutionError, which shows the cell, if one fails.
    """
    copy = nbformat.from_dict(notebook)
    client = NotebookClient(
        copy, timeout=timeout, kernel_name="python3", record_timing=False, resources={"metadata": {"path": str(folder)}}
    )
    client.execute(env=os.environ | KERNEL_ENVIRONMENT)
    return copy


def without_traces(notebook: NotebookNode) -> NotebookNode:
    """A copy that keeps nothing of the session but its outputs: no metadata of the kernel or of cells but tags."""
    copy = nbformat.from_dict(notebook)
    copy.metadata = nbformat.from_dict(METADATA)
    for number, cell in enumerate(copy.cells):
        cell.id = f"cell-{number:02}"
        cell.metadata = nbformat.from_dict({key: cell.metadata[key] for key in ("tags",) if key in cell.metadata})
        for output in cell.get("outputs", []):
            if "metadata" in output:
                output.metadata = nbformat.from_dict({})
    return copy


def outputs(notebook: NotebookNode) -> Iterator[NotebookNode]:
    """Every output of every cell."""
    for cell in notebook.cells:
        yield from cell.get("outputs", [])


def texts(notebook: NotebookNode) -> Iterator[str]:
    """What the outputs say in text or markup, without images and figures' data."""
    for output in outputs(notebook):
        if "text" in output:
            yield output.text
        yield from (data for kind, data in output.get("data", {}).items() if kind.startswith("text/"))


def add_images(notebook: NotebookNode) -> int:
    """Put a PNG beside every plotly figure, all drawn with one start of the browser; how many there are.

    Raises ReflowlensError if there is no Chrome or Chromium.
    """
    drawn = [output.data for output in outputs(notebook) if PLOTLY in output.get("data", {})]
    with tempfile.TemporaryDirectory(prefix="reflowlens-notebooks-") as folder:
        paths = [Path(folder) / f"{number}.png" for number in range(len(drawn))]
        figures = [Figure({part: data[PLOTLY][part] for part in ("data", "layout")}) for data in drawn]
        save_figures(dict(zip(paths, figures, strict=True)))
        for path, data in zip(paths, drawn, strict=True):
            data[PNG] = base64.b64encode(path.read_bytes()).decode()
    return len(drawn)


def main() -> None:
    """Execute the chosen notebooks in full and write each back when it has run."""
    parser = argparse.ArgumentParser(description="execute the notebooks in full and write them back with outputs")
    parser.add_argument("names", nargs="*", help="beginnings of their names (default: all)")
    parser.add_argument("--quick", action="store_true", help="run the quick form and write nothing")
    arguments = parser.parse_args()
    for path in NOTEBOOKS:
        if arguments.names and not path.name.startswith(tuple(arguments.names)):
            continue
        started, notebook = time.perf_counter(), read(path)
        with tempfile.TemporaryDirectory(prefix="reflowlens-notebook-") as folder:
            done = without_traces(execute(quick_form(notebook) if arguments.quick else notebook, folder))
        seconds = time.perf_counter() - started
        if not arguments.quick:
            add_images(done)
            with replacing(path) as temporary:
                nbformat.write(done, temporary)
        print(f"{path.name}: {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
