"""The part of YAML that a flat configuration needs: top-level names with a text, a number, a truth value or nothing.

Anything deeper is left unread: no aliases, no tags, nothing that grows or runs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reflowlens.errors import ReflowlensError

_WORDS = {"true": True, "false": False, "null": None, "~": None, "": None}


def write_yaml(path: Path, fields: Mapping[str, Any]) -> None:
    """One line a field, its value as JSON, which YAML reads."""
    lines = [f"{name}: {json.dumps(value)}\n" for name, value in fields.items()]
    path.write_text("".join(lines), encoding="utf8")


def read_yaml(path: Path) -> dict[str, Any]:
    """The top-level fields of a file; those with a nested value are there as None.

    Raises:
        ReflowlensError: it cannot be read, or a line at the top is no field.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise ReflowlensError(f"{path} is damaged: {error}") from error
    fields: dict[str, Any] = {}
    for line in lines:
        if not line.strip() or line[0] in " \t#-" or line.startswith(("---", "...")):
            continue
        found = re.fullmatch(r"""(["']?)([\w.-]+)\1\s*:(?:\s+(.*))?""", line)
        if found is None:
            raise ReflowlensError(f"{path} is no flat YAML: {line[:80]!r}")
        fields[found[2]] = _value(found[3] or "")
    return fields


def _value(text: str) -> Any:
    text = text.strip()
    if text[:1] not in ("'", '"', "[", "{"):
        text = re.sub(r"(?:^|(?<=\s))#.*", "", text).rstrip()  # a comment
    if text in _WORDS:
        return _WORDS[text]
    if len(text) > 1 and text[0] == text[-1] == "'":
        return text[1:-1].replace("''", "'")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
