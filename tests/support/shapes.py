"""With ``REFLOWLENS_SHAPES=1`` the shapes in annotations are checked whenever a test calls what is annotated so."""

from __future__ import annotations

import builtins
import inspect
import os
import re
import sys
from collections.abc import Mapping, Sequence
from functools import cache, wraps
from numbers import Integral, Real
from types import UnionType
from typing import Any, Union, get_args, get_origin

import jaxtyping
import torch

_SHAPE = re.compile(r"\b(Float|Int|Bool|Num|Shaped)\[")
_NUMBERS = {float: Real, int: Integral}
_jaxtyped = jaxtyping.jaxtyped


def check_shapes(*packages: str) -> None:
    """Checks the jaxtyping shapes of ``packages``, which are not yet imported: of arguments, results and fields.

    Only annotations with a shape are checked, and only after the call: what a function refuses by an error of its own
    is that error's matter. Tests of small models take about half as long again.
    """
    if os.environ.get("REFLOWLENS_SHAPES") == "1":
        jaxtyping.jaxtyped = lambda typechecker: checked  # what the import hook decorates functions and classes with
        jaxtyping.install_import_hook(packages, None)


def checked(what: Any) -> Any:
    """``what`` with its checks. A generator has none: decorators such as ``no_grad`` would not know it for one."""
    if not any(_SHAPE.search(str(hint)) for hint in inspect.get_annotations(what).values()):
        return what  # four fifths of all functions
    if inspect.isclass(what):
        return _class_checked(what)
    if inspect.isgeneratorfunction(what):
        return what
    hints, signature = cache(lambda: _hints(what, what.__globals__)), inspect.signature(what)

    @wraps(what)
    def call(*args: Any, **kwargs: Any) -> Any:
        result = what(*args, **kwargs)
        if not torch.compiler.is_compiling():
            arguments = signature.bind(*args, **kwargs).arguments
            _check(what.__qualname__, hints(), arguments | {"return": result})
        return result

    return call


def _class_checked(owner: type) -> type:
    """A dataclass or named tuple: its fields are checked when it is made."""
    name = "__new__" if issubclass(owner, tuple) else "__init__"
    make, hints = getattr(owner, name), cache(lambda: _hints(owner, vars(sys.modules[owner.__module__])))

    @wraps(make)
    def made(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = make(self, *args, **kwargs)
        fields = {field: getattr(self if result is None else result, field) for field in hints()}
        _check(owner.__qualname__, hints(), fields)
        return result

    setattr(owner, name, made)
    return owner


def _hints(what: Any, names: dict[str, Any]) -> dict[str, Any]:
    """The annotations with a shape; an alias that is a string, or for type checkers alone, stands for anything."""

    class Names(dict[str, Any]):
        def __missing__(self, name: str) -> Any:
            return Any

    known = {name: Any if isinstance(value, str) else value for name, value in names.items()}
    written = {name: getattr(hint, "__forward_arg__", hint) for name, hint in inspect.get_annotations(what).items()}
    return {
        name: eval(hint, names, Names(vars(builtins) | known)) if isinstance(hint, str) else hint
        for name, hint in written.items()
        if _SHAPE.search(str(hint))
    }


def _check(name: str, hints: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    with _jaxtyped("context"):  # within which a name stands for one length
        for part, hint in hints.items():
            value = values.get(part)
            refused_later = isinstance(value, str)  # nonsense that a test gives to a dataclass
            if part in values and not refused_later and not _fits(value, hint):
                shapes = {key: tuple(value.shape) for key, value in values.items() if hasattr(value, "shape")}
                raise AssertionError(f"{name}: {part} is no {hint} but {values[part]!r:.200}; all shapes {shapes}")


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, each) for each in inner)
    if origin is tuple and Ellipsis not in inner:
        return isinstance(value, tuple) and len(value) == len(inner) and all(map(_fits, value, inner))
    if origin in (list, tuple, Sequence):
        return isinstance(value, origin) and all(_fits(each, inner[0]) for each in value)
    if origin in (dict, Mapping):
        return isinstance(value, origin) and all(_fits(each, inner[1]) for each in value.values())
    kind = _NUMBERS.get(origin or hint, origin or hint)
    return kind is Any or not isinstance(kind, type) or isinstance(value, kind)
