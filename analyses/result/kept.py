"""Results kept between runs: what ran on this model, with these options and this code, need not run again.

A result is kept in the folder that `result_folder` names, by a hash of everything that it depends on: the model's
configuration and weights, the experiment, its options (of a file its content), the device, and the code: the sources
of reflowlens and analyses with the versions of the libraries that compute. Nothing is ever read that was made
otherwise, so the folder can grow but not go stale, and may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from analyses.result.result import Result
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.storage.opening import file_hash

_LIBRARIES = ("torch", "transformer-lens", "numpy", "pandas", "scipy", "scikit-learn", "plotly")
_PACKAGES = Path(__file__).parent.parent.parent
_SOURCES = ("analyses/**/*.py", "reflowlens/**/*.py", "reflowlens/assets/*.json", "reflowlens/assets/*/*.[bt]*")


def cache_folder() -> Path:
    """`$REFLOWLENS_CACHE`, else `reflowlens` in `$XDG_CACHE_HOME` or `~/.cache`, without a home one in the temporary
    folder; results are in `results` below it."""
    if own := os.environ.get("REFLOWLENS_CACHE"):
        return Path(own)
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg) / "reflowlens"
    try:
        return Path.home() / ".cache" / "reflowlens"
    except RuntimeError:  # a container's user without a home
        return Path(tempfile.gettempdir()) / f"reflowlens-{os.getuid()}"


def result_key(experiment: str, options: Mapping[str, Any]) -> str:
    """What the result of an experiment depends on beside the model: its name, a hash of the code and of the options. A
    `Path` among the options stands for its content too."""
    made_of = {
        "code": code_version(),
        "experiment": experiment,
        "options": {name: _identity(value) for name, value in options.items()},
    }
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    return f"{experiment}-{digest[:32]}"


def result_folder(model_hash: str, key: str) -> Path:
    """Where the result of an experiment on a model is kept, by its `result_key`."""
    return cache_folder() / "results" / model_hash[:16] / key


def read_result(folder: Path) -> Result | None:
    """The result kept in a folder; None if there is none that can be read."""
    try:
        return Result.load(folder)
    except (ReflowlensError, OSError):
        return None


def keep_result(result: Result, folder: Path) -> None:
    """Keep a result in a folder. One that cannot be written is not kept: the run has it all the same; nor is one that
    may have been made by code that was changed meanwhile."""
    if _hash_of_code() != code_version():
        return
    try:
        result.save(folder, pages=False)
    except OSError:
        return


@cache
def code_version() -> str:
    """A hash of what computes: our sources and word lists, as they are when first asked for, and the libraries."""
    return _hash_of_code()


def may_be_kept(model: HookedModel) -> bool:
    """Whether results are functions of the model's weights: nothing hooks into it, and it drops nothing at random."""
    hooked = any(point.fwd_hooks or point.bwd_hooks for point in model.hook_dict.values())
    return not hooked and not (model.training and model.cfg.dropout)


def _hash_of_code() -> str:
    digest = hashlib.sha256()
    for path in sorted(path for pattern in _SOURCES for path in _PACKAGES.glob(pattern)):
        digest.update(f"{path.relative_to(_PACKAGES)} {file_hash(path)}\n".encode())
    for library in _LIBRARIES:
        digest.update(f"{library} {importlib.metadata.version(library)}\n".encode())
    return digest.hexdigest()


def _identity(value: Any) -> Any:
    """What an option is, for JSON."""
    if isinstance(value, Path):
        return [str(value), file_hash(value)]
    return value if isinstance(value, str | int | float | bool | None) else repr(value)
