"""Dictionaries on disk in a table: what each is, and what its manifest says of it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reflowlens.dictionaries.config import DictionaryConfig
from reflowlens.dictionaries.files import dictionary_manifest, find_dictionary, is_dictionary, load_dictionary
from reflowlens.storage.opening import as_path

_HEADER = ("name", "kind", "model", "layers", "features", "activation", "L0", "FVU", "size")
# Of a number a layer: where a manifest may have it, what was measured on other text first.
_MEASURED = {
    "l0": (("metrics", "l0"), ("measured_in_training", "l0")),
    "fvu": (("metrics", "fvu"), ("measured_in_training", "val_fvu"), ("measured_in_training", "fvu")),
}


def found_in(folder: str | Path) -> list[str | Path]:
    """A dictionary's name, folder or file itself, or the dictionaries in a folder of several.

    Raises:
        ReflowlensError: there are none.
    """
    path = as_path(folder)
    inside = sorted(each for each in path.iterdir() if is_dictionary(each)) if path.is_dir() else []
    if inside and not is_dictionary(path):
        return list(inside)
    find_dictionary(folder)
    return [folder]


def table(dictionaries: Sequence[str | Path]) -> str:
    """One line a dictionary: L0 and FVU are means over layers, as the manifest has them."""
    rows = [_HEADER, *map(_row, dictionaries)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines) if dictionaries else "no dictionaries"


def _row(name: str | Path) -> tuple[str, ...]:
    path, manifest = find_dictionary(name), dictionary_manifest(name)
    stated = manifest.get("config")
    cfg = DictionaryConfig.from_dict(stated) if isinstance(stated, dict) else load_dictionary(name).cfg
    return (
        str(name),
        "SAE" if cfg.kind == "sae" else ("CLT" if cfg.cross_layer else "PLT") + (", skip" if cfg.skip else ""),
        cfg.model_name or "-",
        str(cfg.n_layers),
        f"{cfg.n_features:,}",
        f"{cfg.activation}({cfg.k})" if cfg.k else cfg.activation,
        _measured(manifest, "l0", ".1f"),
        _measured(manifest, "fvu", ".3f"),
        f"{path.stat().st_size / 1e6:.1f} MB",
    )


def _measured(manifest: Mapping[str, Any], name: str, how: str) -> str:
    for part, key in _MEASURED[name]:
        found = manifest.get(part)
        values = found.get(key) if isinstance(found, dict) else None
        numbers = values if isinstance(values, list) else [values]
        if numbers and all(isinstance(value, int | float) for value in numbers):
            return format(statistics.mean(numbers), how)
    return "-"
