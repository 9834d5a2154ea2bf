"""TOML files, and a table of one as the dataclass that describes it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from reflowlens.errors import ReflowlensError, nearest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Section = TypeVar("Section")


def read_toml(path: Path) -> dict[str, Any]:
    """What a TOML file says.

    Raises:
        ReflowlensError: it cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ReflowlensError(f"{path} is not valid TOML: {error}") from error
    except OSError as error:
        raise ReflowlensError(f"cannot read {path}: {error.strerror or error}") from error


def toml_value(written: str) -> Any:
    """What a value written as in TOML is; what is none is text.

    >>> toml_value("1e-3"), toml_value("[1, 2]"), toml_value("wsd")
    (0.001, [1, 2], 'wsd')
    """
    try:
        return tomllib.loads(f"value = {written}")["value"]
    except tomllib.TOMLDecodeError:
        return written


def section(name: str, kind: type[Section], fields: Mapping[str, Any]) -> Section:
    """A table of a configuration as the dataclass that describes it.

    Raises:
        ReflowlensError: a field is unknown or missing, or of another type.
    """
    known = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type] # each is a dataclass
    types: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float), "bool": (bool,)}
    types |= {"bool | str": (object,), "list[int]": (list,)}  # the first checks itself
    for key, value in fields.items():
        if key not in known:
            raise ReflowlensError(f"unknown field {name}.{key}{nearest(key, list(known))}")
        expected = str(known[key].type)
        if not isinstance(value, types[expected]) or (isinstance(value, bool) and not expected.startswith("bool")):
            raise ReflowlensError(f"{name}.{key} must be a {expected}, got {value!r}")
    required = (key for key, f in known.items() if f.default is f.default_factory is dataclasses.MISSING)
    missing = [key for key in required if key not in fields]
    if missing:
        raise ReflowlensError(f"the table [{name}] lacks {', '.join(missing)}")
    return kind(**fields)
