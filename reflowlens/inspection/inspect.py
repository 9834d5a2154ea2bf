"""Find out what a path is, and say what is in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from reflowlens.checkpoints import ASSETS, PACKED, WEIGHTS, list_models, weights_in
from reflowlens.dictionaries.files import find_dictionary, holds_dictionary, is_dictionary, list_dictionaries
from reflowlens.errors import ReflowlensError, nearest
from reflowlens.inspection import kinds
from reflowlens.inspection.dictionaries import read_dictionary
from reflowlens.inspection.folders import (
    INDEX,
    METRICS,
    RUN,
    manifest_facts,
    missing_shards,
    read_metrics,
    read_object,
    read_prepared,
    transformers_facts,
)
from reflowlens.inspection.report import Inspection
from reflowlens.inspection.tensors import comparison, differences_frame, of_weights
from reflowlens.storage.folders import MANIFEST
from reflowlens.storage.opening import as_path, file_hash, shown
from reflowlens.storage.packed_file import read_header


def inspect_path(path: str | Path, *, against: str | Path | None = None) -> Inspection:
    """What a file or folder is and holds, whoever wrote it; nothing in it is executed.

    Args:
        path: the name of a packaged model or dictionary, a checkpoint, a dictionary, a training run (its newest
            checkpoint), prepared data, a folder of the transformers library, a safetensors file, or anything else.
        against: another model, whose tensors those of ``path`` are compared with by name.

    Returns:
        Damage is told in its ``problems`` and raises nothing.

    Raises:
        ReflowlensError: there is no such path, it cannot be read, or one side of a comparison holds no tensors.

    Example: ``inspect_path("reflow-nano").frames["signals"]``
    """
    found = _find(path)
    try:
        inspection = _folder(found) if found.is_dir() else _file(found)
        if against is not None:
            frame = differences_frame(found, _find(against))
            inspection = dataclasses.replace(
                inspection,
                facts={**inspection.facts, "against": comparison(str(against), frame)},
                frames={**inspection.frames, "differences": frame},
            )
    except OSError as error:
        raise ReflowlensError(f"cannot read {error.filename or found}: {error.strerror or error}") from error
    return dataclasses.replace(inspection, path=str(path))


def _find(path: str | Path) -> Path:
    found = as_path(path)
    if not found.exists():
        if str(path) in list_models():
            return ASSETS / str(path)
        if str(path) in list_dictionaries():
            return find_dictionary(path).parent
        packaged = [*list_models(), *list_dictionaries()]
        raise ReflowlensError(
            f"no file or folder {shown(str(path))}, and no packaged model or dictionary ({', '.join(packaged)})"
            f"{nearest(str(path), packaged)}"
        )
    if not (found.is_file() or found.is_dir()):
        raise ReflowlensError(f"{path} is neither a file nor a folder")  # reading a pipe would wait for a writer
    return found


# -- folders ----------------------------------------------------------------------------------------------------------


def _folder(folder: Path) -> Inspection:
    if not any(folder.iterdir()):
        return Inspection(str(folder), "empty folder", notes=("there is nothing in it",))
    if is_dictionary(folder):
        read = read_dictionary(folder)
        layers = {} if read.frame is None else {"layers": read.frame}
        frames = {"files": _files_frame(folder), **layers}
        return Inspection(str(folder), "dictionary", read.facts, frames, problems=tuple(read.problems))
    if dictionaries := [each.name for each in sorted(folder.iterdir()) if is_dictionary(each)]:
        facts = {"dictionaries": dictionaries}
        return Inspection(str(folder), "folder of dictionaries", facts, {"files": _files_frame(folder)})
    if (folder / METRICS).is_file() or any(folder.glob(f"step_*/{WEIGHTS}")):
        return _training_run(folder)
    manifest, problems = read_object(folder / MANIFEST) if (folder / MANIFEST).is_file() else ({}, [])
    if "splits" in manifest:
        read = read_prepared(folder, manifest)
        frames = {} if read.frame is None else {"splits": read.frame}
        return Inspection(str(folder), "prepared data", read.facts, frames, problems=tuple(read.problems))
    if (folder / WEIGHTS).is_file() and "config" in manifest:
        return _checkpoint(folder, manifest)
    if (weights := weights_in(folder)) and weights.name == PACKED:
        inspection = _packed(weights)
        return dataclasses.replace(inspection, frames={"files": _files_frame(folder), **inspection.frames})
    if (folder / "config.json").is_file():
        return _transformers_folder(folder)
    files = _files_frame(folder)
    tensors = sorted(folder.glob("*.safetensors"))
    inspection = of_weights(folder, "folder of safetensors files", tensors) if tensors else _listing(folder, files)
    return dataclasses.replace(
        inspection,
        frames={"files": files, **inspection.frames},
        notes=(*inspection.notes, *_unopened(folder, files)),
        problems=(*problems, *inspection.problems),
    )


def _training_run(folder: Path) -> Inspection:
    steps = sorted(path for path in folder.glob("step_*") if (path / WEIGHTS).is_file())
    facts: dict[str, Any] = {"checkpoints": [path.name for path in steps]}
    frames: dict[str, pd.DataFrame] = {}
    problems: list[str] = []
    notes: tuple[str, ...] = () if steps else ("there is no checkpoint yet",)
    if (folder / RUN).is_file():
        run, problems = read_object(folder / RUN)
        starts = run.get("starts")
        facts |= {"starts": starts} if isinstance(starts, list) else {}
    if (folder / METRICS).is_file():
        read = read_metrics(folder / METRICS)
        facts["log"] = read.facts
        frames |= {} if read.frame is None else {"curve": read.frame}
        problems += read.problems
    if steps:
        newest = _folder(steps[-1])
        facts |= {"newest_checkpoint": steps[-1].name, **newest.facts}
        frames |= newest.frames
        notes, problems = newest.notes, [*problems, *newest.problems]
    return Inspection(str(folder), "training run", facts, frames, notes, tuple(problems))


def _checkpoint(folder: Path, manifest: Mapping[str, Any]) -> Inspection:
    inspection = of_weights(folder, "checkpoint", [folder / WEIGHTS])
    problems = list(inspection.problems)
    recorded = manifest.get("weights_sha256")
    if recorded is not None and recorded != file_hash(folder / WEIGHTS):
        problems.append(f"{WEIGHTS} is not the file that {MANIFEST} was written with (its SHA-256 differs)")
    facts = {**inspection.facts, **manifest_facts(manifest)}
    frames = {"files": _files_frame(folder), **inspection.frames}
    return dataclasses.replace(inspection, facts=facts, frames=frames, problems=tuple(problems))


def _transformers_folder(folder: Path) -> Inspection:
    config, problems = read_object(folder / "config.json")
    files = _files_frame(folder)
    tensors = sorted(folder.glob("*.safetensors"))
    if (folder / INDEX).is_file():
        shards, _ = missing_shards(folder, set())
        tensors = [folder / shard for shard in sorted(shards) if (folder / shard).is_file()]
    elif (folder / WEIGHTS).is_file():
        tensors = [folder / WEIGHTS]
    facts = transformers_facts(config)
    kind = f"transformers folder ({facts['architecture'] or 'no architecture named'})"
    inspection = of_weights(folder, kind, tensors)
    if (folder / INDEX).is_file():
        names = set(inspection.frames["tensors"]["name"]) if "tensors" in inspection.frames else set[str]()
        problems += missing_shards(folder, names)[1]
    notes = [*inspection.notes, *_unopened(folder, files)]
    if not tensors:
        notes.append("it holds no safetensors file, so no weights were read")
    if sources := sorted(path.name for path in folder.glob("*.py")):
        notes.append(f"it brings code of its own ({', '.join(sources)}), which was not run")
    return dataclasses.replace(
        inspection,
        facts={**facts, **inspection.facts},
        frames={"files": files, **inspection.frames},
        notes=tuple(notes),
        problems=(*problems, *inspection.problems),
    )


def _listing(folder: Path, files: pd.DataFrame) -> Inspection:
    return Inspection(str(folder), "folder", {"entries": len(files)}, notes=("nothing in it that is a model or data",))


def _files_frame(folder: Path) -> pd.DataFrame:
    rows = [(path.name, *_kind_and_size(path)) for path in sorted(folder.iterdir())]
    return pd.DataFrame(rows, columns=["name", "kind", "bytes"])


def _kind_and_size(path: Path) -> tuple[str, int]:
    if path.is_dir():
        return "folder", 0
    if not path.is_file():
        return "broken link" if path.is_symlink() else "special file", 0
    try:
        return kinds.recognise(path), path.stat().st_size
    except OSError as error:
        return f"unreadable ({error.strerror})", 0


def _unopened(folder: Path, files: pd.DataFrame) -> list[str]:
    names = files["name"][files["kind"].isin(kinds.PICKLES)]
    return [f"{name}: {note}" for name in names for note in _file(folder / name).notes]


# -- files ------------------------------------------------------------------------------------------------------------


def _file(path: Path) -> Inspection:
    kind = kinds.recognise(path)
    facts = {"bytes": path.stat().st_size}
    if kind == kinds.SAFETENSORS:
        return of_weights(path, kind, [path])
    if kind == kinds.PACKED:
        return _packed(path)
    if kind in kinds.PICKLES:
        return _pickle(path, kind)
    if kind == kinds.DAMAGED_ZIP:
        return Inspection(str(path), kind, facts, problems=("its table of contents is missing: it may be cut short",))
    if kind == kinds.JSON:
        found, problems = read_object(path)
        return Inspection(str(path), kind, {**facts, **found}, problems=tuple(problems))
    if kind == kinds.JSON_LINES:
        read = read_metrics(path)
        if read.frame is not None:
            frames = {"curve": read.frame}
            return Inspection(str(path), "training log", facts | read.facts, frames, problems=tuple(read.problems))
    return Inspection(str(path), kind, facts, notes=("not a format that holds tensors for reflowlens to read",))


def _packed(path: Path) -> Inspection:
    """A packed model or dictionary: what it is, how it was packed, and its manifest."""
    try:
        header = read_header(path)
    except ReflowlensError as error:
        return Inspection(str(path), kinds.PACKED, {"bytes": path.stat().st_size}, problems=(str(error),))
    bits = {str(entry["bits"]) for entry in header.get("tensors", {}).values() if "bits" in entry}
    packing = {"bits": " and ".join(sorted(bits)), **{name: header[name] for name in ("method", "compressor")}}
    facts = {"bytes": path.stat().st_size, "packing": packing}
    if holds_dictionary(path):
        read = read_dictionary(path)
        frames = {} if read.frame is None else {"layers": read.frame}
        return Inspection(
            str(path), "packed dictionary", {**facts, **read.facts}, frames, problems=tuple(read.problems)
        )
    inspection = of_weights(path, "packed model", [path])
    manifest = header["manifest"] if isinstance(header["manifest"], dict) else {}
    return dataclasses.replace(inspection, facts={**inspection.facts, **facts, **manifest_facts(manifest)})


def _pickle(path: Path, kind: str) -> Inspection:
    facts: dict[str, Any] = {"bytes": path.stat().st_size}
    try:
        if kind == kinds.TORCH_ZIP:
            count, size = kinds.stored_tensors(path)
            facts |= {"storages": count, "tensor_bytes": size}
        calls = kinds.pickled_calls(path, kind)
    except Exception as error:  # zipfile raises many things at a damaged archive
        return Inspection(str(path), kind, facts, problems=(f"its archive cannot be read: {error}",))
    warning = "loading a pickle runs the program in it, so it was not loaded"
    if calls:
        facts["would_call"] = calls
        advice = "beyond tensors it asks for what would_call lists: load it only if you know why"
    elif kind in (kinds.TORCH_ZIP, kinds.TORCH_OLD):
        advice = (
            "it seems to hold tensors alone: torch.load(path, weights_only=True) reads them without running it, and "
            "safetensors.torch.save_file writes them as a file that reflowlens reads"
        )
    else:
        advice = "ask where it comes from for its tensors as a safetensors file"
    return Inspection(str(path), kind, facts, notes=(f"{warning}; {advice}",))
