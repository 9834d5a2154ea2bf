"""Running several experiments on a model: one after the other, each timed, saved, and put into one report."""

from __future__ import annotations

import inspect
import itertools
import json
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from analyses.registry import EXPERIMENTS, Experiment, parse_selection
from reflowlens.errors import ReflowlensError
from reflowlens.files import replacing

if TYPE_CHECKING:
    from analyses.lexicon import Analogy
    from analyses.result import Result
    from reflowlens.models.base import HookedModel

__all__ = ["EXPERIMENTS", "Experiment", "SuiteRun", "model_card", "parse_selection", "run_suite"]

INTERRUPTED = "interrupted before it was done"
ERROR_FILE = "error.txt"


@dataclass(frozen=True)
class SuiteRun:
    """What a run left behind. `results`, `errors` and `seconds` are by the experiments' names."""

    folder: Path
    results: dict[str, Result] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def report(self) -> Path:
        """The HTML file."""
        return self.folder / "report.html"

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C stopped it."""
        return INTERRUPTED in self.errors.values()


def run_suite(
    model: HookedModel,
    experiments: str | int | Iterable[str | int] = "all",
    *,
    out: str | Path | None = None,
    seed: int = 0,
    quick: bool = False,
    analogies: Sequence[Analogy] | str | Path | None = None,
    progress: bool | None = None,
    model_name: str | None = None,
    manifest: Mapping[str, Any] | None = None,
) -> SuiteRun:
    """Run experiments on a model and write their results and one report.

    Args:
        experiments: "all", numbers or names (`parse_selection`).
        out: the folder to write into; default `out/<model>/<YYYY-MM-DD_HH-MM-SS>`, new for every run.
        seed, quick: passed to every experiment.
        analogies: passed to the experiments that take analogies.
        progress: show a bar; by default on a terminal.
        model_name: how the report calls the model; default the configuration's `model_name`.
        manifest: what is known of the training (tokens seen, validation loss, ...) for the report; default that of the
            packaged model if this is one.

    The folder holds `report.html`, `results.json` ({experiment: {"metrics", "seconds", "error"}}, written anew after
    each experiment) and a saved `Result` a folder. An experiment that fails leaves its traceback in `<name>/error.txt`
    and does not stop the others. Ctrl-C does: what is done is reported, and what is not is named.

    Raises ReflowlensError for an unknown experiment, a file of analogies that cannot be read and a folder that cannot
    be written, before anything is run.

    Example: `run_suite(model, [5, 7], quick=True).results["layer_evolution"].metrics`
    """
    from analyses.lexicon import read_questions_words
    from analyses.report import write_report

    selected = [EXPERIMENTS[number] for number in parse_selection(experiments)]
    if isinstance(analogies, str | Path):
        read_questions_words(analogies)
    name = model_name or model.cfg.model_name or model.cfg.architecture
    run = SuiteRun(_make_folder(out, name))
    card = model_card(model, name, _packaged_manifest(model, name) if manifest is None else manifest)
    bar = tqdm(selected, unit="experiment", disable=not (sys.stderr.isatty() if progress is None else progress))
    try:
        for experiment in bar:
            bar.set_description(experiment.title)
            _run_one(run, experiment, model, seed=seed, quick=quick, analogies=analogies)
            _write_metrics(run)
    except KeyboardInterrupt:
        missing = [experiment.name for experiment in selected if experiment.name not in run.seconds]
        run.errors.update(dict.fromkeys(missing, INTERRUPTED))
        bar.close()
        print(f"interrupted: no result for {', '.join(missing)}; the report holds the others", file=sys.stderr)
    _write_metrics(run)
    write_report([*run.results.values()], run.errors, card, run.report)
    return run


def model_card(model: HookedModel, name: str, manifest: Mapping[str, Any]) -> dict[str, str | int | float]:
    """What a report says of a model: its name, sizes and hash, and of its manifest what was seen and reached."""
    from reflowlens.checkpoints import model_hash

    cfg = model.cfg
    card: dict[str, str | int | float | None] = {
        "name": name,
        "architecture": cfg.architecture,
        "parameters": model.n_parameters,
        "layers": cfg.n_layers,
        "width": cfg.d_model,
        "heads": cfg.n_heads,
        "signals": cfg.n_signals,
        "signals kept (top-k)": cfg.topk,
        "tokenizer": cfg.tokenizer_name,
        "context": cfg.n_ctx,
    }
    facts = {"tokens_seen": "tokens seen", "val_loss": "validation loss"}
    card |= {name: manifest[key] for key, name in facts.items() if key in manifest}
    card["hash"] = model_hash(model)
    return {key: value for key, value in card.items() if value is not None}


def _run_one(run: SuiteRun, experiment: Experiment, model: HookedModel, **options: Any) -> None:
    """Run, time and save one experiment; enter it in `run.results` or, if it fails, in `run.errors`."""
    folder, started = run.folder / experiment.name, time.perf_counter()
    try:
        result = _call(experiment.load(), model, **options)
        result.seconds = time.perf_counter() - started
        result.save(folder)
        (folder / ERROR_FILE).unlink(missing_ok=True)
        run.results[experiment.name] = result
    except Exception as error:
        run.errors[experiment.name] = _message(error)
        with replacing(folder / ERROR_FILE) as path:
            path.write_text(traceback.format_exc(), encoding="utf-8")
    run.seconds[experiment.name] = time.perf_counter() - started


def _call(function: Callable[..., Result], model: HookedModel, **options: Any) -> Result:
    """Call an experiment with those of the options that it takes; no bar of its own."""
    takes = inspect.signature(function).parameters
    return function(model, progress=False, **{key: value for key, value in options.items() if key in takes})


def _message(error: Exception) -> str:
    """An error for people: our own as it is, another with its type and the line that raised it."""
    if isinstance(error, ReflowlensError):
        return str(error)
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(where.filename).name}, line {where.lineno})"


def _write_metrics(run: SuiteRun) -> None:
    record = {
        experiment.name: {
            "metrics": run.results[experiment.name].to_json_metrics() if experiment.name in run.results else {},
            "seconds": run.seconds.get(experiment.name),
            "error": run.errors.get(experiment.name),
        }
        for experiment in EXPERIMENTS.values()
        if experiment.name in run.results or experiment.name in run.errors
    }
    with replacing(run.folder / "results.json") as path:
        path.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _make_folder(out: str | Path | None, name: str) -> Path:
    """`out`, or a new `out/<model>/<date-time>`, with a number behind it should that second have one already."""
    if out is None:
        base = Path("out") / re.sub(r"[^\w.-]+", "_", name)
        stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        names = itertools.chain([stamp], (f"{stamp}_{i}" for i in itertools.count(2)))
        out = next(base / name for name in names if not (base / name).exists())
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ReflowlensError(f"cannot write into {out}: {error.strerror}") from error
    return Path(out)


def _packaged_manifest(model: HookedModel, name: str) -> dict[str, Any]:
    """The manifest of the packaged model of that name, if its weights are these; else nothing is known."""
    from reflowlens.checkpoints import list_models, load_model, model_hash, read_manifest

    packaged = name in list_models() and model_hash(load_model(name)) == model_hash(model)
    return read_manifest(name) if packaged else {}
