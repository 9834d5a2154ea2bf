"""Words, analogies and prompts: the packaged lexicon, a user's own in the same form, and Google's analogy set.

Words are written without a leading space ("queen"); what is measured is " word", and a word counts only if that is one
token of the model's tokenizer (`single_token_categories`, `single_token_analogies`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from reflowlens.errors import ReflowlensError

if TYPE_CHECKING:
    from reflowlens.tokenizers.base import Tokenizer

TYPO_KINDS = ("swap", "drop", "double", "neighbour_key", "phonetic")

_T = TypeVar("_T")


@dataclass(frozen=True)
class Analogy:
    """a - b + c = expected, for example king - man + woman = queen.

    Except in the published king - man + woman, `c` is the word whose counterpart is asked for and `expected` that
    counterpart, so that the nearest neighbour of `c` alone is the shortcut to beat.
    `published_rank`: the rank of `expected` that the reFlow documents report, or None.
    """

    relation: str
    a: str
    b: str
    c: str
    expected: str
    published_rank: int | None = None

    @property
    def words(self) -> tuple[str, str, str, str]:
        """The four words, in the order a, b, c, expected."""
        return self.a, self.b, self.c, self.expected

    def __str__(self) -> str:
        return f"{self.a} - {self.b} + {self.c} = {self.expected}"


@dataclass(frozen=True)
class Typo:
    """A word and a misspelling of it; `kind` is one of `TYPO_KINDS`.

    swap: two neighbouring letters exchanged; drop: a letter left out; double: a letter typed twice; neighbour_key: the
    key beside the right one on a QWERTY keyboard; phonetic: spelled as it sounds.
    """

    kind: str
    clean: str
    misspelt: str


@dataclass(frozen=True)
class FactualPrompt:
    """A prompt and the token that should follow it, space included: "The capital of France is", " Paris"."""

    prompt: str
    target: str


@dataclass(frozen=True)
class Sentiment:
    """Carrier prompts that an adjective can follow, and continuations held out from every category.

    `subjects`: words of the prompts for what is judged ("film"); none of them occurs in a neutral text.
    """

    prompts: tuple[str, ...] = ()
    positive: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()
    subjects: tuple[str, ...] = ()


@dataclass(frozen=True)
class Lexicon:
    """Everything the experiments ask about.

    `categories`: words by category, each word in one category only; apart from the tenses of verbs a category holds no
    two forms of one word, so that similar pairs are not merely inflections.
    `short_prompts` and `long_prompts`: in the packaged lexicon the i-th long prompt is the i-th short one behind a
    subordinate clause, so that the two differ in nothing but what came before.
    `neutral_texts`: a few sentences of plain prose each, on which an intervention's damage is measured.
    """

    version: str
    categories: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    analogies: tuple[Analogy, ...] = ()
    typos: tuple[Typo, ...] = ()
    factual: tuple[FactualPrompt, ...] = ()
    sentiment: Sentiment = Sentiment()
    short_prompts: tuple[str, ...] = ()
    long_prompts: tuple[str, ...] = ()
    neutral_texts: tuple[str, ...] = ()


def load_lexicon(path: str | Path | None = None) -> Lexicon:
    """The packaged lexicon, or a JSON file of the same form: an object with the fields of `Lexicon`.

    Every field but "version" may be left out. Raises ReflowlensError that names the file and the entry.

    >>> load_lexicon().categories["weekdays"][0]
    'Monday'
    """
    if path is None:
        source = "the packaged lexicon"
        text = (resources.files("reflowlens") / "assets/lexicon.json").read_text(encoding="utf-8")
    else:
        source, text = str(path), _read_text(path)
    try:
        return _lexicon(json.loads(text))
    except json.JSONDecodeError as error:
        raise ReflowlensError(f"{source}: not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except ReflowlensError as error:
        raise ReflowlensError(f"{source}: {error}") from None


def read_questions_words(path: str | Path) -> tuple[Analogy, ...]:
    """Google's analogies, `questions-words.txt` (Mikolov et al. 2013): ": section" lines, each followed by quadruples.

    "Athens Greece Baghdad Iraq" asks Greece - Athens + Baghdad = Iraq; the section becomes the `relation`.
    Raises ReflowlensError with the line number for a line that is neither, blank ones included.
    """
    analogies: list[Analogy] = []
    section = ""
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        words = line.split()
        if line.startswith(":") and line[1:].strip():
            section = line[1:].strip()
        elif len(words) == 4 and section:
            first, second, third, fourth = words
            analogies.append(Analogy(relation=section, a=second, b=first, c=third, expected=fourth))
        elif len(words) == 4:
            raise ReflowlensError(f"{path}, line {number}: a line ': section' was expected before the first quadruple")
        else:
            raise ReflowlensError(
                f"{path}, line {number}: four words or ': section' were expected, got {line.strip()!r}"
            )
    if not analogies:
        raise ReflowlensError(f"{path}: no analogies; lines of four words below a line ': section' were expected")
    return tuple(analogies)


def single_token_analogies(analogies: Iterable[Analogy], tokenizer: Tokenizer) -> tuple[list[Analogy], list[str]]:
    """The analogies whose four words are each one token of `tokenizer`, and, of each other, why it was skipped.

    >>> from reflowlens.tokenizers import get_tokenizer
    >>> aunt = Analogy("gender", "king", "man", "aunt", "uncle")
    >>> kept, skipped = single_token_analogies([aunt], get_tokenizer("gpt2_16k"))
    >>> skipped
    ["king - man + aunt = uncle: more than one token: 'aunt'"]
    """
    analogies = list(analogies)
    single = {
        word: tokenizer.is_single_token(f" {word}") for word in {w for analogy in analogies for w in analogy.words}
    }
    kept, skipped = [], []
    for analogy in analogies:
        split = [word for word in analogy.words if not single[word]]
        if split:
            skipped.append(f"{analogy}: more than one token: {', '.join(map(repr, split))}")
        else:
            kept.append(analogy)
    return kept, skipped


def single_token_categories(
    categories: Mapping[str, Iterable[str]], tokenizer: Tokenizer
) -> tuple[dict[str, list[int]], list[str]]:
    """Token ids of each category's words, and the words skipped because " word" is more than one token.

    A category of which no word is left is absent.
    """
    ids: dict[str, list[int]] = {}
    skipped: list[str] = []
    for category, words in categories.items():
        for word in words:
            if tokenizer.is_single_token(f" {word}"):
                ids.setdefault(category, []).append(tokenizer.single_token(f" {word}"))
            else:
                skipped.append(word)
    return ids, skipped


# From JSON to the dataclasses: every function below takes a value and where it stands, and says there what is wrong.


def _read_text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ReflowlensError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ReflowlensError(f"cannot read {path}: UTF-8 text was expected") from None


def _lexicon(raw: Any) -> Lexicon:
    raw = _object(raw, "the file", Lexicon)
    parts: dict[str, Callable[[Any, str], Any]] = {
        "version": _text,
        "categories": _categories,
        "analogies": lambda value, where: _list(value, where, _analogy),
        "typos": lambda value, where: _list(value, where, _typo),
        "factual": lambda value, where: _list(value, where, _factual),
        "sentiment": _sentiment,
        "short_prompts": _texts,
        "long_prompts": _texts,
        "neutral_texts": _texts,
    }
    return Lexicon(**{name: parts[name](value, name) for name, value in raw.items()})


def _object(value: Any, where: str, kind: type) -> dict[str, Any]:
    """A JSON object with the fields of the dataclass `kind`: none unknown, none missing that has no default."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if not isinstance(value, dict):
        raise ReflowlensError(f"{where}: an object with the fields {', '.join(fields)} was expected, got {value!r}")
    for name in value:
        if name not in fields:
            raise ReflowlensError(f"{where}: no field {name!r}; there are {', '.join(fields)}")
    for name, field in fields.items():
        optional = (field.default, field.default_factory) != (dataclasses.MISSING, dataclasses.MISSING)
        if name not in value and not optional:
            raise ReflowlensError(f"{where}: the field {name!r} is missing")
    return value


def _list(value: Any, where: str, item: Callable[[Any, str], _T]) -> tuple[_T, ...]:
    if not isinstance(value, list):
        raise ReflowlensError(f"{where}: a list was expected, got {value!r}")
    items = tuple(item(entry, f"{where}[{i}]") for i, entry in enumerate(value))
    first: dict[_T, int] = {}
    for i, entry in enumerate(items):
        if first.setdefault(entry, i) != i:
            raise ReflowlensError(f"{where}[{i}]: {value[i]!r} is already at {where}[{first[entry]}]")
    return items


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ReflowlensError(f"{where}: text was expected, got {value!r}")
    return value


def _unpadded(value: Any, where: str) -> str:
    text = _text(value, where)
    if text != text.strip():
        raise ReflowlensError(f"{where}: {text!r} has a space at its start or end; write {text.strip()!r}")
    return text


def _texts(value: Any, where: str) -> tuple[str, ...]:
    return _list(value, where, _unpadded)


def _categories(value: Any, where: str) -> dict[str, tuple[str, ...]]:
    if not isinstance(value, dict):
        raise ReflowlensError(f"{where}: an object of category names and lists of words was expected, got {value!r}")
    categories = {name: _texts(words, f"{where}.{name}") for name, words in value.items()}
    category_of: dict[str, str] = {}
    for name, words in categories.items():
        for word in words:
            if category_of.setdefault(word, name) != name:
                raise ReflowlensError(
                    f"{where}.{name}: {word!r} is already in {category_of[word]!r}; a word belongs to one category"
                )
    return categories


def _analogy(value: Any, where: str) -> Analogy:
    entry = dict(_object(value, where, Analogy))
    rank = entry.pop("published_rank", None)
    if rank is not None and (type(rank) is not int or rank < 1):
        raise ReflowlensError(f"{where}.published_rank: a whole number from 1 on, or null, was expected, got {rank!r}")
    return Analogy(published_rank=rank, **{name: _unpadded(text, f"{where}.{name}") for name, text in entry.items()})


def _typo(value: Any, where: str) -> Typo:
    entry = _object(value, where, Typo)
    typo = Typo(**{name: _unpadded(text, f"{where}.{name}") for name, text in entry.items()})
    if typo.kind not in TYPO_KINDS:
        raise ReflowlensError(f"{where}.kind: no kind {typo.kind!r}; there are {', '.join(TYPO_KINDS)}")
    if typo.clean == typo.misspelt:
        raise ReflowlensError(f"{where}: {typo.clean!r} is not misspelt")
    return typo


def _factual(value: Any, where: str) -> FactualPrompt:
    entry = _object(value, where, FactualPrompt)
    target = _text(entry["target"], f"{where}.target")
    if not target.startswith(" "):
        raise ReflowlensError(f"{where}.target: a token of running text begins with a space; write {' ' + target!r}")
    return FactualPrompt(prompt=_unpadded(entry["prompt"], f"{where}.prompt"), target=target)


def _sentiment(value: Any, where: str) -> Sentiment:
    entry = _object(value, where, Sentiment)
    return Sentiment(**{name: _texts(texts, f"{where}.{name}") for name, texts in entry.items()})
