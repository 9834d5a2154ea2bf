"""The code that makes a figure of a result again: the model, the experiment with its parameters, the figure."""

from __future__ import annotations

import inspect
import pprint
import textwrap
from collections.abc import Mapping
from functools import cache
from typing import Any

from analyses.experiments.crystallisation_boundary import BOUNDARY
from analyses.registry import EXPERIMENTS
from analyses.report.messages import translate
from analyses.result.result import Result
from analyses.words.lexicon import load_lexicon
from reflowlens.checkpoints import list_models, load_model, model_hash
from reflowlens.signals import VIEWS

# A result tells of these how many there were, not which.
_COUNTED = ("texts", "prompts", "analogies")


def figure_code(result: Result, figure: str, model_name: str) -> str:
    """A snippet that ends in the figure `figure` of `result`, to be run as it stands.

    Where it cannot be, a comment says so: of a model that is not packaged, the path is for the reader to put in; of an
    experiment that reflowlens does not have, the saved result is loaded. Arguments that a result does not hold are
    named, and left at their defaults. `model_name`: how the report calls the model.

    Example: `print(figure_code(layer_evolution(model), "probability", "reflow-nano"))`
    """
    experiment = next((known for known in EXPERIMENTS.values() if known.name == result.name), None)
    if experiment:
        lines = [*_experiment_lines(result, inspect.signature(experiment.load()).parameters)]
        imports = result.name
    elif result.name == BOUNDARY:
        names = ["experiments", "seed", "quick"]
        chosen = {name: result.params[name] for name in names if name in result.params}
        lines = [f"run = run_suite({', '.join(['model', *_keywords(chosen)])})", f"result = {BOUNDARY}(run.results)"]
        imports = f"{BOUNDARY}, run_suite"
    else:
        place = f"result = Result.load({result.name!r})  # {translate('the folder in which it was saved')}"
        return f"from analyses import Result\n\n{place}\n{_shown(figure)}"
    head = f"import reflowlens as rl\nfrom analyses import {imports}\n\n"
    return head + "\n".join([_model_line(model_name, result.params.get("model_hash", "")), *lines, _shown(figure)])


def is_packaged(name: str, identity: str) -> bool:
    """Whether `name` is a packaged model and `identity`, a `reflowlens.checkpoints.model_hash`, is of its weights."""
    return name in list_models() and _packaged_hash(name) == identity


@cache
def _packaged_hash(name: str) -> str:
    return model_hash(load_model(name))


def _model_line(name: str, identity: str) -> str:
    if is_packaged(name, identity):
        return f"model = rl.load_model({name!r})"
    path = translate("put in the path of this model")
    return f'model = rl.load_model("…")  # {path}: {" ".join(name.split())}, {identity[:12]}'.rstrip(", ")


def _experiment_lines(result: Result, parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    names = [name for name in parameters if name not in ("model", "progress")]
    unknown = [name for name in names if not _is_held(name, result.params)]
    given = {
        name: result.params[name]
        for name in names
        if name not in unknown and name != "lexicon" and (name == "seed" or _differs(result, parameters[name]))
    }
    arguments = ["model", *_keywords(given)]
    call = f"result = {result.name}({', '.join(arguments)})"
    if len(call) > 100 or "\n" in call:
        call = f"result = {result.name}(\n" + "".join(f"{textwrap.indent(text, '    ')},\n" for text in arguments) + ")"
    if not unknown:
        return [call]
    note = translate("not held by the result, so left at the default: {names}", names=", ".join(unknown))
    return [f"# {note}", call]


def _is_held(name: str, params: Mapping[str, Any]) -> bool:
    """Whether the result has the argument itself, not only a count or a name of it."""
    if name == "lexicon":
        return params.get(name) == _lexicon_version()
    if name == "view":
        return params.get(name) in VIEWS
    return name in params and name not in _COUNTED


@cache
def _lexicon_version() -> str:
    return load_lexicon().version


def _differs(result: Result, parameter: inspect.Parameter) -> bool:
    default = list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
    return result.params[parameter.name] != default


def _keywords(values: Mapping[str, Any]) -> list[str]:
    shown = {name: pprint.pformat(value, width=96, compact=True) for name, value in values.items() if value is not None}
    return [f"{name}={text}" for name, text in shown.items()]


def _shown(figure: str) -> str:
    return f"result.figures[{figure!r}].show()"
