"""Running several experiments on a model: one after the other, each timed, saved, and put into one report."""

from __future__ import annotations

import inspect
import itertools
import json
import re
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analyses.registry import EXPERIMENTS, Experiment, parse_selection
from analyses.report.messages import check_language, in_language, translate
from reflowlens.errors import ReflowlensError
from reflowlens.progress import bar
from reflowlens.storage.atomic import replacing, sole_writer

if TYPE_CHECKING:
    from analyses.result.result import Result
    from analyses.words.lexicon import Analogy
    from reflowlens.models.base import HookedModel

__all__ = [
    "EXPERIMENTS",
    "Experiment",
    "SuiteRun",
    "check_seed",
    "failure_message",
    "make_folder",
    "model_card",
    "parse_selection",
    "run_experiment",
    "run_suite",
]

INTERRUPTED = "interrupted before it was done"
ERROR_FILE = "error.txt"
METRICS_FILE = "results.json"
MAX_SEED = 2**31  # experiments count on from it, and generators of NumPy end at 2**32


@dataclass(frozen=True)
class SuiteRun:
    """What a run left behind. `results`, `errors` and `seconds` are by the experiments' names; `cached` are the results
    that an earlier run had computed, whose `seconds` are those of then."""

    folder: Path
    results: dict[str, Result] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    cached: set[str] = field(default_factory=set)

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
    lang: str = "en",
    cache: bool = False,
    spreadsheet: bool = False,
) -> SuiteRun:
    """Run experiments on a model and write their results and one report.

    Args:
        experiments: "all", numbers or names (`parse_selection`).
        out: the folder to write into; default `out/<model>/<YYYY-MM-DD_HH-MM-SS>`, new for every run.
        seed, quick: passed to every experiment.
        analogies: passed to the experiments that take analogies.
        progress: show a bar, or lines where stderr is no terminal; by default on a terminal alone.
        model_name: how the report calls the model; default the configuration's `model_name`.
        manifest: what is known of the training (tokens seen, validation loss, ...) for the report; default that of the
            packaged model if this is one.
        lang: the report's language, "en" or "zh"; the saved results stay in English.
        cache: take results that were computed before from the cache, and keep new ones there (`analyses.result.kept`).
            A model with hooks is not what its hash says: its results are computed and not kept.
        spreadsheet: write the frames' CSV so that a spreadsheet computes no token (`Result.save`).

    The folder holds `report.html`, `results.json` ({experiment: {"metrics", "seconds", "error"}}, written anew after
    each experiment) and a saved `Result` a folder. An experiment that fails leaves its traceback in `<name>/error.txt`
    and does not stop the others. Ctrl-C does: what is done is reported, and what is not is named. Other experiments
    that an earlier run left in `out` stay in the report and in `results.json`.

    Raises ReflowlensError for an unknown experiment or language, a seed out of range, a file of analogies that cannot
    be read, a folder that cannot be written, one that holds results of another model and one that another run is
    writing, before anything is run; and where the disk is full.

    Example: `run_suite(model, [5, 7], quick=True).results["layer_evolution"].metrics`
    """
    from analyses.result.kept import may_be_kept
    from analyses.result.model_identity import known_hash
    from analyses.words.lexicon import read_questions_words
    from reflowlens.checkpoints import model_hash

    check_language(lang)
    check_seed(seed)
    selected = [EXPERIMENTS[number] for number in parse_selection(experiments)]
    if isinstance(analogies, str | Path):
        analogies = Path(analogies)
        read_questions_words(analogies)
    name = model_name or model.cfg.model_name or model.cfg.architecture
    folder, identity = make_folder(out, name), model_hash(model)
    with sole_writer(folder, "writing results into"):
        run, earlier = SuiteRun(folder), _read_earlier(folder, selected, identity)
        with known_hash(model, identity):
            card = model_card(model, name, _packaged_manifest(model, name) if manifest is None else manifest)
        show = sys.stderr.isatty() if progress is None else progress
        steps = bar(selected, show=show, named=True, unit="experiment")
        key = identity if cache and may_be_kept(model) else ""
        options = {"seed": seed, "quick": quick, "analogies": analogies}
        try:
            for experiment in steps:
                with in_language(lang):
                    steps.set_description(translate(experiment.title))
                with known_hash(model, identity):
                    _run_one(run, experiment, model, options, key, spreadsheet)
                with _writing_into(folder):
                    _write_metrics(_merged(earlier, run))
        except KeyboardInterrupt:
            missing = [experiment.name for experiment in selected if experiment.name not in run.seconds]
            run.errors.update(dict.fromkeys(missing, INTERRUPTED))
            steps.close()
            print(f"interrupted: no result for {', '.join(missing)}; the report holds the others", file=sys.stderr)
        everything = _merged(earlier, run)
        with _writing_into(folder):
            _write_metrics(everything)
            _report(everything, card, lang, spreadsheet)
    return run


def check_seed(seed: int) -> None:
    """Raises ReflowlensError for a seed that not every generator takes."""
    if not 0 <= seed < MAX_SEED:
        raise ReflowlensError(f"seed must lie between 0 and {MAX_SEED - 1}, got {seed}")


@contextmanager
def _writing_into(folder: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ReflowlensError(f"cannot write into {folder}: {error.strerror or error}") from error


def run_experiment(
    experiment: Experiment, model: HookedModel, options: Mapping[str, Any], model_hash: str = ""
) -> tuple[Result, bool]:
    """An experiment's result, called with those of the options that it takes; and whether the cache had it.

    `model_hash`: of the model, to look in the cache and to keep the result there; "" computes anew and keeps nothing.
    """
    from analyses.result.kept import keep_result, read_result, result_folder
    from reflowlens.models import float32_by_default

    started, function = time.perf_counter(), experiment.load()
    takes = inspect.signature(function).parameters
    options = {name: value for name, value in options.items() if name in takes}
    kept = result_folder(model_hash, experiment.name, options | {"device": model.cfg.device}) if model_hash else None
    if kept and (known := read_result(kept)):
        return known, True
    with float32_by_default():
        result = function(model, progress=False, **options)
    result.seconds = time.perf_counter() - started
    if kept:
        keep_result(result, kept)
    return result, False


def model_card(model: HookedModel, name: str, manifest: Mapping[str, Any]) -> dict[str, str | int | float]:
    """What a report says of a model: its name, sizes and hash, and of its manifest what was seen and reached."""
    from analyses.result.model_identity import hash_of

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
    card["hash"] = hash_of(model)
    return {key: value for key, value in card.items() if value is not None}


def _run_one(
    run: SuiteRun,
    experiment: Experiment,
    model: HookedModel,
    options: Mapping[str, Any],
    model_hash: str,
    spreadsheet: bool,
) -> None:
    """Run, time and save one experiment; enter it in `run.results` or, if it fails, in `run.errors`."""
    folder, started = run.folder / experiment.name, time.perf_counter()
    try:
        result, cached = run_experiment(experiment, model, options, model_hash)
        result.save(folder, spreadsheet=spreadsheet)
        (folder / ERROR_FILE).unlink(missing_ok=True)
        run.results[experiment.name] = result
        if cached:
            run.cached.add(experiment.name)
    except Exception as error:
        run.errors[experiment.name] = failure_message(error)
        with suppress(OSError), replacing(folder / ERROR_FILE) as path:  # on a full disk the message has to do
            path.write_text(traceback.format_exc(), encoding="utf-8")
    run.seconds[experiment.name] = time.perf_counter() - started
    if experiment.name in run.cached:
        run.seconds[experiment.name] = run.results[experiment.name].seconds or 0.0


def failure_message(error: Exception) -> str:
    """An error for people: our own as it is, another with its type and the line that raised it."""
    if isinstance(error, ReflowlensError):
        return str(error)
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(where.filename).name}, line {where.lineno})"


def _read_earlier(folder: Path, selected: Sequence[Experiment], model_hash: str) -> SuiteRun:
    """What earlier runs on this model left in a folder."""
    earlier, path = SuiteRun(folder), folder / METRICS_FILE
    if not path.exists():
        return earlier
    try:
        entries = {name: (entry["error"], entry["seconds"]) for name, entry in json.loads(path.read_bytes()).items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ReflowlensError(f"cannot add to the results in {folder}: {path} is damaged ({error})") from error
    again = {experiment.name for experiment in selected}
    for name, (why, seconds) in entries.items():
        if why is not None and name not in again:
            earlier.errors[name] = why
        elif why is None:
            result = _load_earlier(folder / name, name in again)
            if result is None:
                continue
            if result.params.get("model_hash", model_hash) == model_hash:
                earlier.results[name] = result
            elif name not in again:
                raise ReflowlensError(f"{folder} holds the results of another model ({name}): choose another folder")
        earlier.seconds[name] = seconds
    return earlier


def _load_earlier(folder: Path, runs_again: bool) -> Result | None:
    """A result of an earlier run; None for one that cannot be read and is about to be replaced."""
    from analyses.result.result import Result

    try:
        return Result.load(folder)
    except ReflowlensError:
        if not runs_again:
            raise
        return None


def _merged(earlier: SuiteRun, run: SuiteRun) -> SuiteRun:
    """Both, in the order of the experiments; the later of two of one, unless it was interrupted."""
    failed = {name: why for name, why in run.errors.items() if why != INTERRUPTED or name not in earlier.results}
    results = {**{name: result for name, result in earlier.results.items() if name not in failed}, **run.results}
    errors = {**{name: why for name, why in earlier.errors.items() if name not in results}, **failed}
    names = [experiment.name for experiment in EXPERIMENTS.values()]
    return SuiteRun(
        run.folder,
        {name: results[name] for name in names if name in results},
        {name: errors[name] for name in names if name in errors},
        earlier.seconds | run.seconds,
    )


def _report(run: SuiteRun, card: Mapping[str, Any], lang: str, spreadsheet: bool) -> None:
    """Write the report, with what is known across experiments behind them."""
    from analyses.experiments.crystallisation_boundary import crystallisation_boundary
    from analyses.report.page import write_report

    across = crystallisation_boundary(run.results)
    if across is not None:
        across.save(run.folder / across.name, spreadsheet=spreadsheet)
    write_report([*run.results.values(), *([across] if across else [])], run.errors, card, run.report, lang=lang)


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
    with replacing(run.folder / METRICS_FILE) as path:
        path.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def make_folder(out: str | Path | None, name: str) -> Path:
    """`out`, or a new `out/<model>/<date-time>`, with a number behind it should that second have one already."""
    if out is not None:
        with _writing_into(out):
            Path(out).mkdir(parents=True, exist_ok=True)
        return Path(out)
    base = Path("out") / re.sub(r"[^\w.-]+", "_", name)
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for folder in itertools.chain([base / stamp], (base / f"{stamp}_{i}" for i in itertools.count(2))):
        with _writing_into(folder), suppress(FileExistsError):  # another run's, perhaps of this very moment
            folder.mkdir(parents=True)
            return folder
    raise AssertionError("there is always another number")


def _packaged_manifest(model: HookedModel, name: str) -> dict[str, Any]:
    """The manifest of the packaged model of that name, if its weights are these; else nothing is known."""
    from analyses.report.figure_code import is_packaged
    from analyses.result.model_identity import hash_of
    from reflowlens.checkpoints import read_manifest

    return read_manifest(name) if is_packaged(name, hash_of(model)) else {}
