"""What people read, in their language: one catalogue from the English text to its translation.

The English text is the key, so that code reads as what it shows. A key may have fields, "{count} experiments", which
stand for whatever the text holds there. `templates/messages_zh.json` is the catalogue. Its sections "report", "menu"
and "experiments" are texts of the code; the others are texts that experiments leave in a `Result`: "figures" (titles),
"axes", "series" (names of series, controls and categories), "metrics", "definitions" and "notes".
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any, NamedTuple

from analyses.report.wording import of_axes
from reflowlens.errors import ReflowlensError

if TYPE_CHECKING:
    import plotly.graph_objects as go

LANGUAGES = ("en", "zh")
FIGURE_TEXTS = ("figures", "axes")
NAMES = ("metrics", "series")
_FIELD = re.compile(r"\{(\w+)\}")
_language: ContextVar[str] = ContextVar("language", default="en")
_without_signals: ContextVar[bool] = ContextVar("without_signals", default=False)


@contextmanager
def in_language(language: str) -> Iterator[None]:
    """`translate` translates into this language within the block. Raises ReflowlensError for one there is not.

    Example: `with in_language("zh"): write_report(results, {}, card, "out/report.html")`
    """
    check_language(language)
    token = _language.set(language)
    try:
        yield
    finally:
        _language.reset(token)


@contextmanager
def without_signals(applies: bool = True) -> Iterator[None]:
    """Within the block texts are about a model that has no signals (`analyses.report.wording`), if that applies."""
    token = _without_signals.set(applies)
    try:
        yield
    finally:
        _without_signals.reset(token)


def is_without_signals() -> bool:
    """Whether texts are about a model that has no signals now."""
    return _without_signals.get()


def check_language(language: str) -> None:
    """Raise ReflowlensError for a language there is not."""
    if language not in LANGUAGES:
        raise ReflowlensError(f"no language {language!r}: one of {', '.join(LANGUAGES)} was expected")


def language() -> str:
    """The language of now, "en" or "zh"."""
    return _language.get()


def translate(text: str, **fields: object) -> str:
    """A text that the code shows, in the language of now, its fields filled in.

    >>> with in_language("zh"):
    ...     translate("{count} experiments", count=3)
    '3 项实验'
    """
    shown = _exact(_wording(), ()).get(text, text)
    return shown.format(**fields) if fields else shown


def recognise(text: str, *sections: str) -> str:
    """A text that a result holds, in the language of now if one of these sections has it, else as it is.

    It may be the filled form of a key; what its fields hold is translated where it has an entry there too.

    >>> with in_language("zh"):
    ...     recognise("Signal 3 at every position", "figures"), recognise("no such text", "figures")
    ('信号 3 在各位置', 'no such text')
    """
    found = _find(text, sections)
    return text if found is None else found


def has_translation(text: str, *sections: str) -> bool:
    """Whether `recognise` finds the text in these sections; English needs none."""
    return language() == "en" or _find(text, sections) is not None


@cache
def read_catalogue(language: str) -> dict[str, dict[str, str]]:
    """section -> English text -> translation; of English, which needs none, empty."""
    if language == "en":
        return {}
    file = resources.files("analyses.report") / "templates" / f"messages_{language}.json"
    return json.loads(file.read_text(encoding="utf-8"))


class _Wording(NamedTuple):
    """A language, and whether it is spoken of a model without signals."""

    language: str
    without_signals: bool

    def catalogue(self) -> dict[str, dict[str, str]]:
        """As `read_catalogue`; of a model without signals English has one too: all texts that have a translation."""
        if not self.without_signals:
            return read_catalogue(self.language)
        known = read_catalogue("zh").items()
        if self.language == "en":
            known = {section: {text: text for text in entries} for section, entries in known}.items()
        return {
            section: {text: of_axes(shown, self.language) for text, shown in entries.items()}
            for section, entries in known
        }


def _wording() -> _Wording:
    return _Wording(language(), _without_signals.get())


def translate_figure(figure: go.Figure) -> go.Figure:
    """A copy with its titles (of axes and colour scales too), annotations, legend and categories translated.

    Names in a legend and on an axis may be data, tokens and words: only those of the catalogue's section "series" are
    translated.
    """
    import plotly.graph_objects as go

    copy = go.Figure(figure)
    if _wording() == ("en", False):
        return copy
    titles = [copy.layout.title, *copy.layout.annotations]
    titles += [axis.title for axis in (*copy.select_xaxes(), *copy.select_yaxes())]
    coloured = [*copy.select_coloraxes(), *(trace for trace in copy.data if "colorbar" in trace)]
    for title in [*titles, *(scale.colorbar.title for scale in coloured)]:
        if title.text:
            title.text = _marked_up(title.text, *FIGURE_TEXTS)
    for trace in copy.data:
        if trace.name:
            trace.name = _marked_up(trace.name, "series")
        if trace.type == "table":
            trace.header.values = [_marked_up(name, *NAMES, "axes") for name in trace.header["values"]]
            trace.cells.values = [_categories(column) for column in trace.cells["values"]]
        for axis in ("x", "y"):
            if axis in trace and trace[axis] is not None:
                trace[axis] = _categories(trace[axis])
    for shape in copy.layout.shapes:
        if shape.name:
            shape.name = _marked_up(shape.name, *FIGURE_TEXTS)
    for axis in (*copy.select_xaxes(), *copy.select_yaxes()):
        if axis.categoryarray is not None:
            axis.categoryarray = _categories(axis.categoryarray)
        if axis.ticktext is not None:
            axis.ticktext = _categories(axis.ticktext)
    return copy


def plain(text: str) -> str:
    """The text of a figure's title without plotly's markup and the line breaks of a long one."""
    return html.unescape(re.sub(r"<[^>]*>", " ", text))


def _categories(values: Any) -> Any:
    """Names along an axis translated; a figure that was read from a file has its numbers in plotly's binary form, a
    dictionary, which is left as it is."""
    if isinstance(values, Mapping):
        return values
    return [_marked_up(value, "series") if isinstance(value, str) else value for value in values]


def _marked_up(text: str, *sections: str) -> str:
    """A text of a figure translated, names of columns and series as people write them; as it was if there is none."""
    for known in (plain(text), plain(text).replace("_", " ")):
        found = _find(known, sections)
        if found is not None:
            return html.escape(found, quote=False)
    return text


def _find(text: str, sections: tuple[str, ...]) -> str | None:
    exact = _exact(_wording(), sections)
    if text in exact:
        return exact[text]
    for pattern, translation in _patterns(_wording(), sections):
        if match := pattern.fullmatch(text):
            return translation.format(**{name: exact.get(value, value) for name, value in match.groupdict().items()})
    return None


@cache
def _exact(wording: _Wording, sections: tuple[str, ...]) -> dict[str, str]:
    """The entries of some sections, of all if none is named."""
    catalogue = wording.catalogue()
    return {text: shown for section in sections or catalogue for text, shown in catalogue.get(section, {}).items()}


@cache
def _patterns(wording: _Wording, sections: tuple[str, ...]) -> list[tuple[re.Pattern[str], str]]:
    """Those with fields, the most literal first."""
    exact = _exact(wording, sections)
    with_fields = sorted((text for text in exact if _FIELD.search(text)), key=lambda t: -len(_FIELD.sub("", t)))
    return [(_pattern(text), exact[text]) for text in with_fields]


def _pattern(text: str) -> re.Pattern[str]:
    literal, names = _FIELD.split(text)[::2], _FIELD.findall(text)
    fields = [f"(?P<{name}>.+?)" for name in names]
    parts = [re.escape(part) + field for part, field in zip(literal, [*fields, ""], strict=True)]
    return re.compile("".join(parts), re.DOTALL)
