"""The parts of pages that are read from the code when the site is built, so that they cannot fall behind it.

A page asks for one by a comment: ``<!-- metrics -->``, ``<!-- claims -->``, ``<!-- verdicts -->``,
``<!-- messages -->``.
MkDocs calls :func:`on_page_markdown` (``hooks`` in mkdocs.yml).
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
PACKAGES = ("reflowlens", "analyses", "pretraining")
ELLIPSIS = "…"  # stands for what a message fills in


class Message(NamedTuple):
    """A text that an error is raised with: its fixed parts, in order, and the module and function that raise it."""

    module: str
    function: str
    parts: tuple[str, ...]

    @property
    def shown(self) -> str:
        return re.sub(r"\s+", " ", ELLIPSIS.join(self.parts))


@cache
def error_messages() -> list[Message]:
    """Every message of a `ReflowlensError` that is raised in the packages, in the order of the files."""
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return [message for path in files for message in _messages_of(path)]


def _messages_of(path: Path) -> Iterator[Message]:
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")

    def visit(node: ast.AST, function: str) -> Iterator[Message]:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            function = f"{function}.{node.name}".lstrip(".")
        if (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).endswith(("ReflowlensError", "OutOfMemory"))
            and node.args
        ):
            yield Message(module, function, tuple(_fixed_parts(node.args[0])))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, function)

    yield from visit(ast.parse(path.read_text(encoding="utf8")), "")


def _fixed_parts(text: ast.expr) -> list[str]:
    """What of an expression of text is written out; between two parts stands what is filled in."""
    if isinstance(text, ast.Constant):
        return [str(text.value)]
    if isinstance(text, ast.JoinedStr):
        parts = [""]
        for value in text.values:
            if isinstance(value, ast.Constant):
                parts[-1] += str(value.value)
            else:
                parts.append("")
        return parts
    if isinstance(text, ast.BinOp) and isinstance(text.op, ast.Add):
        left, right = _fixed_parts(text.left), _fixed_parts(text.right)
        return [*left[:-1], left[-1] + right[0], *right[1:]]
    return ["", ""]


def metric_definitions(name: str) -> dict[str, str]:
    """What an experiment says of its metrics, with its arguments at their defaults."""
    module = importlib.import_module(f"analyses.experiments.{name}.experiment")
    if hasattr(module, "definitions"):
        return module.definitions(*_defaults(module, name))
    found = dict(module.DEFINITIONS)
    if hasattr(module, "DELAY"):
        found[module.DELAY] = module.DEFINITION
    for measure, text in getattr(module, "MEASURES", {}).items():
        found[measure] = f"{text}; `_E` for the embedding E, otherwise in R; with the way of ranking in its name"
    return found


def _defaults(module: ModuleType, name: str) -> list[Any]:
    """What the experiment's own function gives to ``definitions``; or the argument's name."""
    arguments = inspect.signature(getattr(module, name)).parameters
    wanted = inspect.signature(module.definitions).parameters
    given = [arguments[key].default if key in arguments else None for key in wanted]
    return [key if value is None else value for key, value in zip(wanted, given, strict=True)]


def metrics_table() -> str:
    """Every experiment's metrics and how they are defined."""
    from analyses.registry import EXPERIMENTS

    lines = []
    for experiment in EXPERIMENTS.values():
        lines += [f"### {experiment.number}. {experiment.title}", "", experiment.question, ""]
        lines += ["| metric | definition |", "|---|---|"]
        for metric, text in metric_definitions(experiment.name).items():
            lines.append(f"| `{metric}` | {_cell(text)} |")
        lines.append("")
    return "\n".join(lines)


def claims_table() -> str:
    """What every verdict asks for: the controls to beat, and the smallest effect that matters."""
    from analyses.claims import CLAIMS, MEASURES
    from analyses.registry import EXPERIMENTS

    lines = ["| | metric | must beat | by at least | |", "|---|---|---|---|---|"]
    numbered = {str(experiment.number): CLAIMS[experiment.name] for experiment in EXPERIMENTS.values()}
    for place, claims in (numbered | {f"`{name}`": claims for name, claims in MEASURES.items()}).items():
        for metric, claim in claims.items():
            beaten = [f"`{name}`" for name in claim.beats] + ([] if claim.beyond is None else [f"{claim.beyond:g}"])
            amount = f"{claim.amount} of it" if claim.relative else claim.amount
            less = "less: " if claim.below else ""
            cells = [place, f"`{metric}`", less + ", ".join(beaten), _cell(amount) if claim.smallest else ""]
            lines.append(f"| {' | '.join(cells)} | {_cell(claim.why)} |")
    return "\n".join(lines)


def verdict_rules() -> str:
    """The docstrings of the functions that judge, by module: the rule as it stands beside the claim."""
    lines = []
    for path in sorted((ROOT / "analyses").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for node in ast.parse(path.read_text(encoding="utf8")).body:
            if isinstance(node, ast.FunctionDef) and re.fullmatch(r"\w*_verdicts?", node.name):
                text = (ast.get_docstring(node) or "").split("\n\nArgs:")[0].replace("``", "`")
                lines += [f"**`{module}.{node.name}`**", "", text, ""] if text else []
    return "\n".join(lines)


def messages_table() -> str:
    """Every message by module."""
    by_module: dict[str, list[Message]] = {}
    for message in error_messages():
        by_module.setdefault(message.module, []).append(message)
    lines = []
    for module, messages in by_module.items():
        lines += [f"**`{module}`**", "", "| message | raised by |", "|---|---|"]
        lines += [f"| {_cell(message.shown)} | `{message.function}` |" for message in messages]
        lines.append("")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Text as a cell of a Markdown table shows it literally."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;").replace("\n", " ")
    return re.sub(r"([*_\[\]`])", r"\\\1", text)


PARTS: Mapping[str, Callable[[], str]] = {
    "metrics": metrics_table,
    "claims": claims_table,
    "verdicts": verdict_rules,
    "messages": messages_table,
}


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """MkDocs's event: a page's text before it is rendered."""
    for name, part in PARTS.items():
        marker = f"<!-- {name} -->"
        if marker in markdown:
            markdown = markdown.replace(marker, part())
    return markdown
