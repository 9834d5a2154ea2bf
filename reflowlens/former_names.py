"""Modules that have moved: their former names still import them, with a warning that names the new one."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Mapping
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _FormerNames(MetaPathFinder, Loader):
    def __init__(self, new_names: Mapping[str, str]) -> None:
        self.new_names = new_names

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in self.new_names else None

    def exec_module(self, module: ModuleType) -> None:
        former, new = module.__name__, self.new_names[module.__name__]
        warnings.warn(f"{former} has moved: import {new}", DeprecationWarning, stacklevel=2)
        sys.modules[former] = importlib.import_module(new)  # what the import statement then binds


def keep_former_names(package: str, new_names: Mapping[str, str]) -> None:
    """Let modules of a package be imported by the names that they had.

    Args:
        package: its name.
        new_names: former name -> name now, both within the package.

    Example:
        ``keep_former_names("reflowlens", {"figure_export": "figures.export"})``
    """
    sys.meta_path.insert(0, _FormerNames({f"{package}.{a}": f"{package}.{b}" for a, b in new_names.items()}))
