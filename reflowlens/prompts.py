"""A data set of prompts: a row each, with its corrupted twin, its answers, its group, and where its words stand.

    prompts = rl.Prompts.of([
        {"clean": "The capital of France is", "corrupted": "The capital of Sri Lanka is", "answer": " Paris",
         "wrong_answer": " Colombo", "subject": "France", "corrupted_subject": "Sri Lanka"},
    ])
    prompts.positions(model, "subject")  # the last token of " France" in each clean prompt

Every further column is a *role*: the text of a part of the prompt, or the position of a token. A role of the corrupted
prompt that reads otherwise is the column of the same name behind ``corrupted_``.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from reflowlens.arguments import integer, path_given, random_seed, real_number
from reflowlens.errors import ReflowlensError, nearest

if TYPE_CHECKING:
    from reflowlens.models.text import TextModel

At: TypeAlias = "int | str | Sequence[int]"
Text = Literal["clean", "corrupted"]
COLUMNS = ("clean", "corrupted", "answer", "wrong_answer", "group")
_TEXTS, _TOKENS = ("clean", "corrupted"), ("answer", "wrong_answer")


@dataclass(frozen=True, eq=False, repr=False)
class Prompts:
    """Prompts and what is known of each; made by :meth:`of` or :meth:`read`.

    Args:
        frame: a row a prompt. ``clean`` is its text; ``corrupted`` the text that it is compared with; ``answer`` and
            ``wrong_answer`` single tokens that may follow, as text (leading space included) or id; ``group`` what
            results are told apart by; every further column a role.

    Raises:
        ReflowlensError: a column is missing, or a row of one is empty or of another kind; or two groups are written
            alike, such as 1 and "1".

    Example:
        >>> prompts = Prompts.of([{"clean": "Sky is", "answer": " blue"}, {"clean": "Grass is", "answer": " green"}])
        >>> len(prompts), prompts.answers
        (2, [' blue', ' green'])
    """

    frame: pd.DataFrame

    def __post_init__(self) -> None:
        frame = self.frame
        if not isinstance(frame, pd.DataFrame):
            raise ReflowlensError(f"prompts are a table with a row each: Prompts.of makes it, got {frame!r}")
        if not len(frame):
            raise ReflowlensError("there are no prompts: at least one row is needed")
        names = list(frame.columns)
        if strange := [name for name in names if not isinstance(name, str)]:
            raise ReflowlensError(f"columns of prompts have names, got {strange[0]!r}")
        if twice := [name for name in names if names.count(name) > 1]:
            raise ReflowlensError(f"prompts have two columns {twice[0]!r}")
        if "clean" not in names:
            raise ReflowlensError(f"prompts need a column 'clean', the text of each{_listed(names, 'clean')}")
        frame = frame.reset_index(drop=True)
        for name in COLUMNS:
            rows = list(enumerate(frame[name])) if name in names else []
            for row, value in sorted(rows, key=lambda each: not _is_missing(each[1])):  # which made integers floats
                _check(name, row, value)
        if "group" in names:
            group_names(frame["group"].tolist())
        object.__setattr__(self, "frame", frame)

    @classmethod
    def of(cls, rows: Any) -> Prompts:
        """Prompts from rows.

        Args:
            rows: a list of dicts, a DataFrame, a ``datasets.Dataset``, or Prompts.

        Raises:
            ReflowlensError: as for :class:`Prompts`; or they are no rows.

        Example: ``rl.Prompts.of([{"clean": "The capital of France is", "answer": " Paris"}])``
        """
        if isinstance(rows, Prompts):
            return rows
        if isinstance(rows, pd.DataFrame):
            return cls(rows)
        if hasattr(rows, "to_pandas"):  # of the datasets package
            return cls(rows.to_pandas())
        listed = list(rows) if isinstance(rows, Iterable) and not isinstance(rows, str | Mapping) else [rows]
        for row, value in enumerate(listed):
            if not isinstance(value, Mapping):
                raise ReflowlensError(
                    f"row {row}: a prompt is a dict such as {{'clean': text, 'answer': token}}, got {value!r}"
                )
        return cls(pd.DataFrame(listed))

    @classmethod
    def read(cls, path: str | Path) -> Prompts:
        """Prompts from a file of JSON lines (``.jsonl``) or a table (``.csv``), in UTF-8.

        Raises:
            ReflowlensError: as for :class:`Prompts`, or the file is missing or of neither kind.

        Example: ``rl.Prompts.read("capitals.jsonl")``
        """
        path = path_given(path, "path")
        if path.suffix not in (".jsonl", ".csv"):
            raise ReflowlensError(f"{path} is neither .jsonl nor .csv")
        if not path.is_file():
            raise ReflowlensError(f"there is no file {path}")
        try:
            return cls(_read_csv(path)) if path.suffix == ".csv" else cls.of(_read_json_lines(path))
        except (ReflowlensError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
            raise ReflowlensError(f"{path}: {error}") from error

    def __len__(self) -> int:
        return len(self.frame)

    def __repr__(self) -> str:
        return f"Prompts({len(self)} prompts; columns {', '.join(self.frame.columns)})"

    def _repr_html_(self) -> str:
        from reflowlens.notebook.html import table, titled

        rows = self.frame.head(10).astype(object).itertuples(index=False)
        return titled("Prompts", f"{len(self)} prompts", table(["row", *self.frame.columns], _numbered(rows)))

    def column(self, name: str) -> list[Any]:
        """The values of a column.

        Raises:
            ReflowlensError: there is none of this name.
        """
        if name not in self.frame:
            raise ReflowlensError(f"these prompts have no column {name!r}{_listed(list(self.frame.columns), name)}")
        return self.frame[name].tolist()

    @property
    def clean(self) -> list[str]:
        return self.column("clean")

    @property
    def corrupted(self) -> list[str]:
        return self.column("corrupted")

    @property
    def answers(self) -> list[str | int]:
        return self.column("answer")

    @property
    def wrong_answers(self) -> list[str | int]:
        return self.column("wrong_answer")

    @property
    def groups(self) -> list[Any]:
        return self.column("group")

    def select(self, which: Any) -> Prompts:
        """Some of the prompts, in the order asked for.

        Args:
            which: a truth value a prompt, or numbers of rows.

        Raises:
            ReflowlensError: there is no such row, no row is chosen, or the truth values are not as many as prompts.

        Example: ``prompts.select(prompts.frame.subject == "France")``
        """
        wanted = np.asarray(which.cpu() if isinstance(which, Tensor) else which)
        if wanted.dtype == bool and wanted.shape != (len(self),):
            raise ReflowlensError(f"select takes a truth value for each of {len(self)} prompts, got {wanted.shape}")
        if wanted.dtype != bool and (wanted.ndim != 1 or (len(wanted) and wanted.dtype.kind not in "iu")):
            raise ReflowlensError(f"select takes truth values or numbers of rows, got {which!r}")
        rows = np.flatnonzero(wanted) if wanted.dtype == bool else wanted.astype(int)
        if not len(rows):
            raise ReflowlensError("no prompt is selected")
        for row in rows:
            if not -len(self) <= row < len(self):
                raise ReflowlensError(f"there is no row {row}: rows are 0 to {len(self) - 1}")
        return Prompts(self.frame.iloc[rows])

    def of_group(self, name: Any) -> Prompts:
        """The prompts of a group.

        Raises:
            ReflowlensError: there is no such group.
        """
        groups = self.groups
        if name not in groups:
            known = ", ".join(map(repr, dict.fromkeys(groups)))
            raise ReflowlensError(f"no prompt is of group {name!r}; groups: {known}")
        return self.select([group == name for group in groups])

    def split(self, share: float = 0.5, *, seed: int = 0) -> tuple[Prompts, Prompts]:
        """Two parts drawn at random, the first with this share of the prompts: to choose on one and judge on the other.

        Raises:
            ReflowlensError: one part would be empty.

        Example: ``found, held_out = prompts.split(0.5, seed=0)``
        """
        first = round(real_number(share, "share") * len(self))
        if not 0 < first < len(self):
            raise ReflowlensError(f"a share of {share:g} of {len(self)} prompts leaves a part empty")
        order = np.random.default_rng(abs(random_seed(seed))).permutation(len(self))
        return self.select(np.sort(order[:first])), self.select(np.sort(order[first:]))

    def answer_ids(self, model: TextModel) -> Int[Tensor, " prompt"]:
        """The id of each prompt's answer.

        Raises:
            ReflowlensError: an answer is not a single token; the row is named.
        """
        return self._ids(model, "answer")

    def wrong_ids(self, model: TextModel) -> Int[Tensor, " prompt"]:
        """The id of each prompt's wrong answer; as :meth:`answer_ids`."""
        return self._ids(model, "wrong_answer")

    def _ids(self, model: TextModel, column: str) -> Int[Tensor, " prompt"]:
        from reflowlens.tokenizers.targets import target_ids

        ids = []
        for row, value in enumerate(self.column(column)):
            try:
                ids.append(int(target_ids(model.to_single_token, [value], 1, model.cfg.d_vocab)))
            except ReflowlensError as error:
                raise ReflowlensError(f"row {row}, column {column!r}: {error}") from error
        return torch.tensor(ids)

    def positions(self, model: TextModel, at: At, text: Text = "clean") -> list[int]:
        """A position in each prompt, counted in the model's tokens.

        Args:
            at: ``"last"``; an integer, negative from each prompt's own end; a list with one a prompt; or a role: the
                last token of that column's text in the prompt, of ``"subject:first"`` its first. A column of integers
                holds positions itself. A role's text has to occur once.
            text: of which prompts. Roles of corrupted ones are looked up under ``corrupted_subject`` first.

        Raises:
            ReflowlensError: there is no such column, a prompt has no such position, or the text occurs in it never or
                several times; the row is named.

        Example: ``prompts.positions(model, "subject")``
        """
        if text not in _TEXTS:
            raise ReflowlensError(f"text must be 'clean' or 'corrupted', got {text!r}")
        tokens, lengths = model.tokens_and_lengths(self.column(text))
        if isinstance(at, str) and at != "last":
            return self._of_role(model, at, text, [row[:n] for row, n in zip(tokens.tolist(), lengths, strict=True)])
        one = -1 if isinstance(at, str) else integer(at)
        if one is None and (isinstance(at, str) or not isinstance(at, Iterable) or getattr(at, "ndim", 1) != 1):
            raise ReflowlensError(f"a position is 'last', an integer, a list of them or a role, got {at!r}")
        asked = [one] * len(self) if one is not None else list(at)  # type: ignore[arg-type] # a sequence
        if len(asked) != len(self):
            raise ReflowlensError(f"{len(asked)} positions are given for {len(self)} prompts")
        return [_place(row, p, n) for row, (p, n) in enumerate(zip(asked, lengths, strict=True))]

    def _of_role(self, model: TextModel, at: str, text: Text, rows: list[list[int]]) -> list[int]:
        role, _, end = at.partition(":")
        if end not in ("", "first", "last"):
            raise ReflowlensError(f"a role's token is its 'first' or its 'last', got {at!r}")
        own = f"corrupted_{role}"
        role = own if text == "corrupted" and own in self.frame else role
        for row, value in enumerate(self.column(role)):
            if _is_missing(value):
                raise ReflowlensError(f"row {row}, column {role!r}: a text or a position was expected, got {value!r}")
        found = []
        for row, (value, ids) in enumerate(zip(self.column(role), rows, strict=True)):
            if isinstance(value, str):
                found.append(_occurrence(model, ids, value, end == "first", f"row {row}, column {role!r}", text))
            else:
                found.append(_place(row, value, len(ids)))
        return found


def _occurrence(model: TextModel, ids: list[int], value: str, first: bool, where: str, text: str) -> int:
    """The first or last token of a text's only occurrence among tokens."""
    pieces = [model.tokenizer.token_bytes(i) for i in ids]
    whole, wanted = b"".join(pieces), value.encode()
    start = whole.find(wanted) if wanted else -1
    if start < 0:
        hint = f"; name its text there in a column 'corrupted_{where.split(chr(39))[1]}'" if text == "corrupted" else ""
        raise ReflowlensError(
            f"{where}: {value!r} does not occur in the {text} prompt {whole.decode(errors='replace')!r}{hint}"
        )
    if whole.find(wanted, start + 1) >= 0:
        raise ReflowlensError(
            f"{where}: {value!r} occurs several times in the {text} prompt: give more of the text around it, or a "
            "column of integers, the positions themselves"
        )
    ends = np.cumsum([len(piece) for piece in pieces])
    return int(np.searchsorted(ends, start if first else start + len(wanted) - 1, side="right"))


def _place(row: int, position: Any, length: int) -> int:
    index = integer(position)
    if index is None:
        raise ReflowlensError(f"row {row}: a position is an integer, got {position!r}")
    if not -length <= index < length:
        raise ReflowlensError(f"row {row}: there is no position {index}, the prompt has {length} tokens")
    return index % length


def group_names(groups: Iterable[Any]) -> list[str]:
    """Groups as tables and figures write them.

    Raises:
        ReflowlensError: two are written alike, a number and its text for example, and would share a row.

    >>> group_names(["Europe", 7, "Europe"])
    ['Europe', '7', 'Europe']
    """
    named, written = list(groups), dict[str, Any]()
    for group in named:
        other = written.setdefault(str(group), group)
        if not _is_missing(group) and other != group:  # what is missing is unlike itself
            raise ReflowlensError(
                f"groups {other!r} and {group!r} are written alike: make them one group, or write one otherwise"
            )
    return list(map(str, named))


def _check(column: str, row: int, value: Any) -> None:
    if column in _TEXTS:
        if not isinstance(value, str) or not value:
            raise ReflowlensError(f"row {row}, column {column!r}: a text was expected, got {value!r}")
    elif column in _TOKENS:
        if integer(value) is None and not (isinstance(value, str) and value):
            raise ReflowlensError(
                f"row {row}, column {column!r}: the text or the id of a token was expected, got {value!r}"
            )
    elif isinstance(value, str) and value == "all":
        raise ReflowlensError(f"row {row}, column {column!r}: 'all' is what results call all prompts, not a group")
    elif not isinstance(value, Hashable) or _is_missing(value) or value == "":
        raise ReflowlensError(f"row {row}, column {column!r}: the name of a group was expected, got {value!r}")


def _is_missing(value: Any) -> bool:
    return bool(pd.api.types.is_scalar(value) and pd.isna(value))


def _read_csv(path: Path) -> pd.DataFrame:
    """A table whose texts stay texts: 'NA' is one, and the answer '1984' is no id."""
    return pd.read_csv(path, dtype=dict.fromkeys(COLUMNS, str), keep_default_na=False, encoding="utf-8")


def _read_json_lines(path: Path) -> Iterator[Any]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            raise ReflowlensError(f"line {number} is not JSON: {error}") from error


def _numbered(rows: Iterable[Sequence[Any]]) -> Iterator[list[Any]]:
    for number, row in enumerate(rows):
        yield [number, *row]


def _listed(names: list[str], wanted: str) -> str:
    return nearest(wanted, names) or f"; columns: {', '.join(names)}"
