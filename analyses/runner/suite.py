"""Running several experiments on a model: one after the other, each timed, saved, and put into one report."""

from __future__ import annotations

import inspect
import itertools
import json
import re
import sys
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analyses.registry import EXPERIMENTS, Experiment, parse_selection
from analyses.report.messages import check_language
from analyses.runner.earlier import (
    INTERRUPTED,
    LEFT_OUT,
    METRICS_FILE,
    NOT_STARTED,
    SuiteRun,
    merged,
    read_earlier,
    writing_into,
)
from analyses.runner.schedule import Schedule, say
from reflowlens.errors import ReflowlensError
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

ERROR_FILE = "error.txt"
MAX_SEED = 2**31  # experiments count on from it, and generators of NumPy end at 2**32


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
    resume: bool = False,
    again: bool = False,
    budget: float | None = None,
    spreadsheet: bool = False,
) -> SuiteRun:
    """Run experiments on a model and write their results and one report.

    Args:
        experiments: "all", numbers or names (`parse_selection`).
        out: the folder to write into; default `out/<model>/<YYYY-MM-DD_HH-MM-SS>`, new for every run.
        seed, quick: passed to every experiment.
        analogies: passed to the experiments that take analogies.
        progress: say on stderr what will be run and how long that takes, and a line per experiment with the time left;
            by default on a terminal alone.
        model_name: how the report calls the model; default the configuration's `model_name`.
        manifest: what is known of the training (tokens seen, validation loss, ...) for the report; default that of the
            packaged model if this is one.
        lang: the report's language, "en" or "zh"; the saved results stay in English.
        cache: take results that were computed before from the cache, and keep new ones there (`analyses.result.kept`).
            A model with hooks is not what its hash says: its results are computed and not kept.
        resume: leave out what an earlier run into `out` has finished, with this model, code and arguments.
        again: compute anew what the cache has, and keep the new results there.
        budget: seconds that the run may take, more or less: experiments are run in their quick form where that is
            needed, as few as can be; if that is not enough the most expensive are left out. Estimated from timed passes
            beforehand and from what has been run since.
        spreadsheet: write the frames' CSV so that a spreadsheet computes no token (`Result.save`).

    The folder holds `report.html`, `results.json` ({experiment: {"metrics", "seconds", "error", "made_of"}}, written
    anew after each experiment) and a saved `Result` a folder. An experiment that fails leaves its traceback in
    `<name>/error.txt` and does not stop the others. Ctrl-C does: what is done is reported, and what was interrupted or
    not started is named. Other experiments that an earlier run left in `out` stay in the report and in `results.json`.

    Raises ReflowlensError for an unknown experiment or language, a seed out of range, a file of analogies that cannot
    be read, a folder that cannot be written, one that holds results of another model and one that another run is
    writing, before anything is run; and where the disk is full.

    Example: `run_suite(model, [5, 7], quick=True).results["layer_evolution"].metrics`
    """
    from analyses.controls.nulls import shared_untrained
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
    options = {"seed": seed, "quick": quick, "analogies": analogies}
    show = sys.stderr.isatty() if progress is None else progress
    with sole_writer(folder, "writing results into"), shared_untrained():
        run, earlier = SuiteRun(folder), read_earlier(folder, selected, identity)
        known = identity if may_be_kept(model) else ""
        forms = [options, options | {"quick": True}] if budget is not None else [options]
        if resume and known:
            _take_finished(run, earlier, selected, model, forms, known)
        if len(run.results) == len(selected) and _is_written(run.report, lang):
            return run
        with known_hash(model, identity):
            card = model_card(model, name, _packaged_manifest(model, name) if manifest is None else manifest)
        waiting = [each for each in selected if each.name not in run.results]
        kept = [] if again or not cache else [each.name for each in waiting if _is_kept(each, model, options, known)]
        schedule = Schedule(waiting, quick, budget, kept)
        if (show or budget is not None) and waiting:
            schedule.measure(model)
        if show:
            say(schedule.announcement(lang))
        try:
            while (step := schedule.next()) is not None:
                if show:
                    say(schedule.line(lang))
                asked = options | {"quick": step.quick}
                with known_hash(model, identity):
                    _run_one(run, step.experiment, model, asked, known, cache, again, spreadsheet)
                schedule.done(run.seconds[step.experiment.name])
                with writing_into(folder):
                    _write_metrics(merged(earlier, run))
        except KeyboardInterrupt:
            _told_interrupted(run, schedule)
        run.errors.update(dict.fromkeys(schedule.left_out, LEFT_OUT))
        if show:
            say(schedule.line(lang))
        everything = merged(earlier, run)
        with writing_into(folder):
            _write_metrics(everything)
            _report(everything, card, lang, spreadsheet)
    return run


def _take_finished(
    run: SuiteRun,
    earlier: SuiteRun,
    selected: Sequence[Experiment],
    model: HookedModel,
    forms: Sequence[Mapping[str, Any]],
    model_hash: str,
) -> None:
    """Enter the results in `run` that an earlier run into the folder has left, made as they would be made now."""
    for experiment in selected:
        name = experiment.name
        wanted = [_made_of(experiment, model, form, model_hash) for form in forms]
        if name in earlier.results and earlier.made_of[name] in wanted:
            run.results[name], run.made_of[name] = earlier.results[name], earlier.made_of[name]
            run.seconds[name] = earlier.seconds[name]
            run.cached.add(name)


def _is_kept(experiment: Experiment, model: HookedModel, options: Mapping[str, Any], model_hash: str) -> bool:
    """Whether the cache has the result."""
    from analyses.result.kept import result_folder

    return bool(model_hash) and result_folder(model_hash, key_of(experiment, model, options)).is_dir()


def _is_written(report: Path, lang: str) -> bool:
    """Whether there is a report in this language, of all that the folder holds."""
    try:
        with report.open(encoding="utf-8") as file:
            return f'<html lang="{lang}"' in file.read(200)
    except OSError:
        return False


def _told_interrupted(run: SuiteRun, schedule: Schedule) -> None:
    """Name what Ctrl-C has left without a result, and say how to go on."""
    waiting = [experiment.name for experiment in schedule.waiting]
    running = [] if schedule.current is None else [schedule.current.experiment.name]
    run.errors.update(dict.fromkeys(running, INTERRUPTED) | dict.fromkeys(waiting, NOT_STARTED))
    missing = ", ".join([*running, *waiting])
    print(
        f"interrupted: no result for {missing}; the report holds the others. The same command with --out {run.folder} "
        "goes on from here",
        file=sys.stderr,
    )


def check_seed(seed: int) -> None:
    """Raises ReflowlensError for a seed that not every generator takes."""
    if not 0 <= seed < MAX_SEED:
        raise ReflowlensError(f"seed must lie between 0 and {MAX_SEED - 1}, got {seed}")


def run_experiment(
    experiment: Experiment,
    model: HookedModel,
    options: Mapping[str, Any],
    model_hash: str = "",
    *,
    again: bool = False,
) -> tuple[Result, bool]:
    """An experiment's result, called with those of the options that it takes; and whether the cache had it.

    `model_hash`: of the model, to look in the cache and to keep the result there; "" computes anew and keeps nothing.
    `again`: only keep it there.
    """
    from analyses.result.kept import keep_result, read_result, result_folder
    from reflowlens.models import float32_by_default

    started, function = time.perf_counter(), experiment.load()
    kept = result_folder(model_hash, key_of(experiment, model, options)) if model_hash else None
    if kept and not again and (known := read_result(kept)):
        return known, True
    with float32_by_default():
        result = function(model, progress=False, **_taken(experiment, options))
    result.seconds = time.perf_counter() - started
    if kept:
        keep_result(result, kept)
    return result, False


def key_of(experiment: Experiment, model: HookedModel, options: Mapping[str, Any]) -> str:
    """What an experiment's result depends on beside the weights (`analyses.result.kept.result_key`)."""
    from analyses.result.kept import result_key

    return result_key(experiment.name, _taken(experiment, options) | {"device": model.cfg.device})


def _made_of(experiment: Experiment, model: HookedModel, options: Mapping[str, Any], model_hash: str) -> str:
    """All that a result depends on."""
    return f"{model_hash[:16]}/{key_of(experiment, model, options)}"


def _taken(experiment: Experiment, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options that the experiment takes."""
    takes = inspect.signature(experiment.load()).parameters
    return {name: value for name, value in options.items() if name in takes}


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
    cache: bool,
    again: bool,
    spreadsheet: bool,
) -> None:
    """Run, time and save one experiment; enter it in `run.results` or, if it fails, in `run.errors`.

    `model_hash`: "" of a model that is not what its hash says.
    """
    folder, started = run.folder / experiment.name, time.perf_counter()
    result = None
    try:
        result, cached = run_experiment(experiment, model, options, model_hash if cache else "", again=again)
        result.save(folder, spreadsheet=spreadsheet)
        (folder / ERROR_FILE).unlink(missing_ok=True)
        run.results[experiment.name] = result
        run.made_of[experiment.name] = _made_of(experiment, model, options, model_hash) if model_hash else ""
        if cached:
            run.cached.add(experiment.name)
    except Exception as error:
        run.errors[experiment.name] = failure_message(error)
        if result is None and isinstance(error, ReflowlensError):
            run.refused.add(experiment.name)
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


def _report(run: SuiteRun, card: Mapping[str, Any], lang: str, spreadsheet: bool) -> None:
    """Write the report, with what is known across experiments behind them."""
    from analyses.experiments.crystallisation_boundary import crystallisation_boundary
    from analyses.report.page import write_report

    across = crystallisation_boundary(run.results)
    if across is not None:
        across.save(run.folder / across.name, spreadsheet=spreadsheet)
    write_report([*run.results.values(), *([across] if across else [])], run.errors, card, run.report, lang=lang)


def _write_metrics(run: SuiteRun) -> None:
    """Write `results.json`."""
    record = {
        experiment.name: _entry(run, experiment.name)
        for experiment in EXPERIMENTS.values()
        if experiment.name in run.results or experiment.name in run.errors
    }
    with replacing(run.folder / METRICS_FILE) as path:
        path.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _entry(run: SuiteRun, name: str) -> Mapping[str, Any]:
    entry = {
        "metrics": run.results[name].to_json_metrics() if name in run.results else {},
        "seconds": run.seconds.get(name),
        "error": run.errors.get(name),
    }
    return entry | ({"made_of": run.made_of[name]} if name in run.results and run.made_of.get(name) else {})


def make_folder(out: str | Path | None, name: str) -> Path:
    """`out`, or a new `out/<model>/<date-time>`, with a number behind it should that second have one already."""
    if out is not None:
        with writing_into(out):
            Path(out).mkdir(parents=True, exist_ok=True)
        return Path(out)
    base = Path("out") / re.sub(r"[^\w.-]+", "_", name)
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for folder in itertools.chain([base / stamp], (base / f"{stamp}_{i}" for i in itertools.count(2))):
        with writing_into(folder), suppress(FileExistsError):  # another run's, perhaps of this very moment
            folder.mkdir(parents=True)
            return folder
    raise AssertionError("there is always another number")


def _packaged_manifest(model: HookedModel, name: str) -> dict[str, Any]:
    """The manifest of the packaged model of that name, if its weights are these; else nothing is known."""
    from analyses.report.figure_code import is_packaged
    from analyses.result.model_identity import hash_of
    from reflowlens.checkpoints import read_manifest

    return read_manifest(name) if is_packaged(name, hash_of(model)) else {}
