"""What every experiment returns: headline metrics with their controls, tidy frames, figures; saved to a folder.

A saved result is `result.json` (everything but frames and figures), `frames/NAME.csv`, and for each figure
`figures/NAME.json` (plotly's form, which `Result.load` reads) and `figures/NAME.html`, which opens offline beside the
`plotly.min.js` that all figures of the folder share.

Frames hold columns of whole numbers, floats, booleans or text, and their dtypes are kept. In a float column a missing
value is NaN, an empty field in the CSV. A text column has no missing values: what a row does not have is the empty
string, and spaces (" king"), "NA" and line breaks are text like any other. Text is quoted in the CSV. A token
may look like a formula: `save(..., spreadsheet=True)` writes a CSV that Excel and its kind show and do not compute.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pandas as pd

from analyses.claims import joined_draws
from analyses.result.finding import Finding, Table, checked, entries, finite_floats, joined
from analyses.result.frames import read_frame, tidy
from analyses.result.spreadsheets import guarded
from analyses.statistics.intervals import Interval
from analyses.statistics.verdicts import Verdict
from reflowlens.errors import ReflowlensError
from reflowlens.figures.export import read_figure, save_figure, save_figures, stamp

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from reflowlens.figures.export import Width

_MANIFEST = "result.json"
NONE: Mapping[str, Any] = MappingProxyType({})
_TABLES = ("metrics", "controls", "intervals", "published", "verdicts", "definitions")


class Result:
    """The outcome of one experiment.

    `name`: file-safe ("layer_evolution"); `title`: for people ("Layer Evolution").
    `params`: every argument, the seed and the model's hash; anything JSON can hold (tuples become lists).
    `findings`: metric -> `Finding`, of a control's several draws one number each (`analyses.claims.joined_draws`). One
    that could not be computed is absent, with a note that says why. They can be
    given as tables by metric too, and are read as such: `metrics` (the values), `controls`, `intervals`, `verdicts`.
    `published` and `definitions`: metric -> value in the reFlow documents, and the definition used here; both may also
    speak of a metric that is absent.
    `frames`, `figures`: by file-safe names. Frames are copied on the way in, numbered anew from 0.
    `notes`: what was skipped and why. `seconds`: how long it took, if it was timed.

    Raises ReflowlensError for a metric that is not finite, a control, interval or verdict of no metric, params that are
    not JSON, and frames that a CSV cannot keep.

    >>> result = Result("algebra", "Semantic Algebra", findings={"accuracy": Finding(0.34, controls={"c": 0.1})})
    >>> Result.load(result.save("out/algebra")).metrics
    {'accuracy': 0.34}
    """

    def __init__(
        self,
        name: str,
        title: str,
        params: Mapping[str, Any] = NONE,
        metrics: Mapping[str, float] = NONE,
        controls: Mapping[str, Mapping[str, float]] = NONE,
        intervals: Mapping[str, tuple[float, float]] = NONE,
        published: Mapping[str, float] = NONE,
        verdicts: Mapping[str, Verdict] = NONE,
        frames: Mapping[str, pd.DataFrame] = NONE,
        figures: Mapping[str, go.Figure] = NONE,
        notes: Sequence[str] = (),
        definitions: Mapping[str, str] = NONE,
        seconds: float | None = None,
        *,
        findings: Mapping[str, Finding] = NONE,
    ) -> None:
        self.name, self.title, self.seconds = name, title, seconds
        for file in (name, *frames, *figures):
            _check_file_name(file)
        self.params = {key: _json_value(value, f"params[{key!r}]") for key, value in params.items()}
        findings = joined(metrics, controls, intervals, verdicts) | dict(findings)
        self._definitions = dict(definitions) | entries(findings, "definition")
        self._published = finite_floats(dict(published) | entries(findings, "published"), "published")
        self.findings = {
            metric: checked(
                dataclasses.replace(finding, controls=joined_draws(name, metric, finding.controls)),
                metric,
                self._definitions.get(metric, ""),
                self._published.get(metric),
            )
            for metric, finding in findings.items()
        }
        self.frames = {key: tidy(frame, key) for key, frame in frames.items()}
        self.figures = dict(figures)
        self.notes = list(notes)
        for key, figure in figures.items():
            stamp(figure, experiment=name, title=title, figure=key, params=self.params)

    @property
    def metrics(self) -> Table[float]:
        """Metric -> value."""
        return Table(entries(self.findings, "value"))

    @property
    def controls(self) -> Table[Mapping[str, float]]:
        """Metric -> control's name -> its value, of the metrics that have controls."""
        return Table(entries(self.findings, "controls"))

    @property
    def intervals(self) -> Table[Interval]:
        """Metric -> 95% interval, of the metrics that have one."""
        return Table(entries(self.findings, "interval"))

    @property
    def verdicts(self) -> Table[Verdict]:
        """Metric -> verdict, of the metrics that were judged."""
        return Table(entries(self.findings, "verdict"))

    @property
    def definitions(self) -> Table[str]:
        """Metric -> how it is computed, of those that are absent too."""
        return Table(self._definitions | entries(self.findings, "definition"))

    @property
    def published(self) -> Table[float]:
        """Metric -> value in the reFlow documents, of those that are absent too."""
        return Table(self._published | entries(self.findings, "published"))

    def __repr__(self) -> str:
        metrics = ", ".join(f"{name}={value:.4g}" for name, value in self.metrics.items())
        return f"Result({self.name!r}, {metrics or 'no metrics'}, frames={[*self.frames]}, figures={[*self.figures]})"

    def to_json_metrics(self) -> dict[str, dict[str, Any]]:
        """{metric: {"value", "interval", "controls", "published", "verdict"}}, with None (controls: {}) for none."""
        return {
            metric: {
                "value": finding.value,
                "interval": None if finding.interval is None else list(finding.interval),
                "controls": dict(finding.controls),
                "published": finding.published,
                "verdict": finding.verdict,
            }
            for metric, finding in self.findings.items()
        }

    def summary(self) -> pd.DataFrame:
        """One row a metric and control: metric, value, low, high, control, control_value, published, verdict.

        A metric without controls has one row with control "". Numbers there are none of are NaN, a verdict is "".
        """
        rows = []
        for metric, finding in self.findings.items():
            low, high = finding.interval or (math.nan, math.nan)
            published = math.nan if finding.published is None else finding.published
            for control, value in (finding.controls or {"": math.nan}).items():
                rows.append((metric, finding.value, low, high, control, value, published, finding.verdict or ""))
        columns = ["metric", "value", "low", "high", "control", "control_value", "published", "verdict"]
        return pd.DataFrame(rows, columns=columns)

    def _repr_html_(self) -> str:
        """The headline for a notebook: one row a metric, its controls beside it, and the notes."""
        from reflowlens.notebook.html import escape, table, titled

        rows = [
            (
                metric,
                finding.value,
                "{:.4g} to {:.4g}".format(*finding.interval) if finding.interval else "",
                ", ".join(f"{name} {value:.4g}" for name, value in finding.controls.items()),
                "" if finding.published is None else f"{finding.published:.4g}",
                finding.verdict or "",
            )
            for metric, finding in self.findings.items()
        ]
        columns = ["metric", "value", "95% interval", "controls", "published", "verdict"]
        holds = f"frames: {', '.join(self.frames) or 'none'}; figures: {', '.join(self.figures) or 'none'}"
        notes = "".join(f"<li>{escape(note)}</li>" for note in self.notes)
        parts = [table(columns, rows) if rows else "<p>no metrics</p>", f"<ul>{notes}</ul>" if notes else ""]
        return titled(self.title, "", *parts, f"<small>{escape(holds)}</small>")

    def save(self, folder: str | Path, *, pages: bool = True, spreadsheet: bool = False) -> Path:
        """Write the result into `folder` (made if need be) and return it; `pages=False` leaves out the figures' HTML.

        A frame's text may be a token such as "=1+2" or "@x", which Excel and its kind compute when they open the CSV.
        `spreadsheet=True` puts an apostrophe before text that begins so (`analyses.result.spreadsheets.guarded`);
        `load` takes it away again, any other reader of the CSV has to.

        An earlier result there is replaced; other files are left alone. Everything is written aside first and
        `result.json` moves in last, so that a folder that has one is complete.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".result-", dir=folder))
        try:
            self._checked()._write(staging, pages, spreadsheet)
            for path in _listed_files(folder):
                path.unlink(missing_ok=True)
            written = [path.relative_to(staging) for path in staging.rglob("*") if path.is_file()]
            for path in sorted(written, key=lambda path: path.name == _MANIFEST):
                (folder / path).parent.mkdir(exist_ok=True)
                os.replace(staging / path, folder / path)
        finally:
            shutil.rmtree(staging)
        return folder

    def _checked(self) -> Result:
        """A copy, so that what was added since `__init__` is checked too."""
        return Result(
            self.name,
            self.title,
            self.params,
            published=self.published,
            frames=self.frames,
            figures=self.figures,
            notes=self.notes,
            definitions=self.definitions,
            seconds=self.seconds,
            findings=self.findings,
        )

    def _write(self, folder: Path, pages: bool, spreadsheet: bool) -> None:
        manifest: dict[str, Any] = {"name": self.name, "title": self.title, "params": self.params}
        manifest |= {table: getattr(self, table) for table in _TABLES}
        manifest |= {"notes": self.notes, "seconds": self.seconds}
        dtypes = {name: {column: str(frame[column].dtype) for column in frame} for name, frame in self.frames.items()}
        manifest |= {"frames": dtypes, "figures": list(self.figures)}
        manifest |= {"spreadsheet": True} if spreadsheet else {}
        text = json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False)
        (folder / _MANIFEST).write_text(text + "\n", encoding="utf-8")
        for name, frame in self.frames.items():
            path = _frame_path(folder, name)
            path.parent.mkdir(exist_ok=True)
            shown = guarded(frame) if spreadsheet else frame
            shown.to_csv(path, index=False, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
        for name, figure in self.figures.items():
            path = _figure_path(folder, name)
            path.parent.mkdir(exist_ok=True)
            figure.write_json(path)
            if pages:
                save_figure(figure, path.with_suffix(".html"), share_plotlyjs=True)

    def save_figures(self, folder: str | Path, format: str = "pdf", *, width: Width = "screen") -> list[Path]:
        """Write every figure as `folder/NAME.FORMAT`, with one start of the browser, and return the paths.

        `format`: html, json, png, svg or pdf; `width`: "screen", or "one" or "two" columns of a journal. Raises
        ReflowlensError as `reflowlens.figures.builders.save_figure`.

        Example: `layer_evolution(model).save_figures("paper/figures", "pdf", width="one")`
        """
        return save_figures({Path(folder) / f"{name}.{format}": f for name, f in self.figures.items()}, width=width)

    @classmethod
    def load(cls, folder: str | Path) -> Result:
        """The result that `save` wrote into `folder`. Raises ReflowlensError if there is none or a file is damaged."""
        folder = Path(folder)
        manifest = _read_manifest(folder)
        if manifest is None:
            raise ReflowlensError(f"no result in {folder}: a folder that holds {_MANIFEST} was expected")
        try:
            is_guarded = manifest.pop("spreadsheet", False)
            manifest["frames"] = {
                name: read_frame(_frame_path(folder, name), dtypes, is_guarded)
                for name, dtypes in manifest["frames"].items()
            }
            manifest["figures"] = {name: read_figure(_figure_path(folder, name)) for name in manifest["figures"]}
            return cls(**manifest)
        except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise ReflowlensError(f"the result in {folder} is damaged: {error}") from error


def _frame_path(folder: Path, name: str) -> Path:
    return folder / "frames" / f"{_check_file_name(name)}.csv"


def _figure_path(folder: Path, name: str) -> Path:
    return folder / "figures" / f"{_check_file_name(name)}.json"


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ReflowlensError(f"the result in {folder} is damaged: {_MANIFEST}: {error}") from None
    if not isinstance(manifest, dict):
        raise ReflowlensError(f"the result in {folder} is damaged: {_MANIFEST} is no JSON object")
    return manifest


def _listed_files(folder: Path) -> list[Path]:
    """The files of the result in `folder`, its manifest first; of a damaged one the manifest only."""
    try:
        manifest = _read_manifest(folder) or {}
        frames = [_frame_path(folder, name) for name in manifest.get("frames", {})]
        figures = [_figure_path(folder, name) for name in manifest.get("figures", [])]
    except ReflowlensError:
        frames = figures = []
    return [folder / _MANIFEST, *frames, *figures, *(path.with_suffix(".html") for path in figures)]


def _check_file_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ReflowlensError(f"{name!r} is used as a file name: letters, digits, '_' and '-' were expected")
    return name


def _json_value(value: Any, where: str) -> Any:
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ReflowlensError(f"{where}: a value that JSON can hold was expected, got {value!r} ({error})") from None
