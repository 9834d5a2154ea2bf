"""Examples for supervised fine-tuning: read, tokenised together with what counts towards the loss, and split.

A line of a JSON-lines file (also .gz or .xz) is one example, in one of these forms:

    {"prompt": "...", "completion": "..."}                       joined as they are, with nothing in between
    {"messages": [{"role": "user", "content": "..."}, ...]}      roles system, user and assistant
    {"conversations": ["...", "...", ...]}                       user and assistant in turn (LIMA), or messages with
                                                                 "from" and "value", human and gpt (ShareGPT)

A completion, and each answer of a chat, ends with the tokenizer's document end. These tokens count; all others are read
only. Prompts and completions are tokenised apart, so that the tokens of a prompt are those that sampling starts from.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from jaxtyping import Bool, Int

from pretraining.chat import ChatFormat, Message, Part, Tokenised, tokenise
from pretraining.readers import TEXT_ENCODING
from reflowlens.errors import ReflowlensError, nearest
from reflowlens.storage.opening import file_hash
from reflowlens.tokenizers.base import Tokenizer

_ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Example:
    """One example.

    Args:
        tokens: ids, document ends included.
        counted: whether a token belongs to a completion (its document end included).
        prompt: the text before the first completion.
        is_chat: whether the template was used.
    """

    tokens: Int[np.ndarray, " length"]
    counted: Bool[np.ndarray, " length"]
    prompt: str
    is_chat: bool

    @property
    def positions(self) -> int:
        """Places that it takes in a row: its last token is predicted and not read."""
        return len(self.tokens) - 1


@dataclass(frozen=True)
class Data:
    """The examples of a run.

    Args:
        train, val: to learn from, and held out.
        left_out: how many were longer than the context. They are left out whole: a prompt cut short would teach to
            answer what was not asked, and is never met in use, where a prompt beyond ``n_ctx`` is an error.
        files: name, hash, role and number of examples of each file.
    """

    train: list[Example]
    val: list[Example]
    left_out: int
    files: list[dict[str, Any]]


def load_data(
    data: Sequence[str | Path],
    val: Sequence[str | Path],
    tokenizer: Tokenizer,
    template: ChatFormat,
    *,
    context: int,
    val_fraction: float,
    seed: int,
) -> Data:
    """Read the files, split off what validates and leave out what is too long.

    Raises:
        ReflowlensError: a file or line is not as it should be, or nothing is left to learn from or to validate on.
    """
    kept: dict[str, list[Example]] = {"train": [], "val": []}
    files: list[dict[str, Any]] = []
    left_out = 0
    training, validating = (_once(files) for files in (data, val))
    for role, path in [*(("train" if val else "both", path) for path in training), *(("val", p) for p in validating)]:
        examples = read_examples(path, tokenizer, template)
        digest = file_hash(path)
        if role == "val" and any(file["sha256"] == digest for file in files if file["role"] == "train"):
            raise ReflowlensError(f"{path.name} is given both to learn from and to validate on")
        files.append({"name": path.name, "sha256": digest, "role": role, "examples": len(examples)})
        for example in examples:
            side = role
            if role == "both":
                side = "val" if is_held_out(example, val_fraction, seed) else "train"
            if example.positions <= context:
                kept[side].append(example)
            else:
                left_out += 1
    total = sum(file["examples"] for file in files)
    for side, advice in (
        ("train", "raise the context or lower val_fraction"),
        ("val", "raise the context or val_fraction, or give files to validate on"),
    ):
        if not kept[side]:
            raise ReflowlensError(
                f"none of {total} examples fell to {side!r} with val_fraction={val_fraction}, and {left_out} are "
                f"longer than the context of {context} tokens: {advice}"
            )
    return Data(kept["train"], kept["val"], left_out, files)


def _once(files: Sequence[str | Path]) -> list[Path]:
    """The files in order, without those given before."""
    return list({os.path.realpath(file): Path(file) for file in reversed(files)}.values())[::-1]


def is_held_out(example: Example, fraction: float, seed: int) -> bool:
    """Whether an example validates: by a hash of (seed, prompt), so that examples with one prompt stay together."""
    text = example.prompt or example.tokens.tobytes().hex()
    digest = hashlib.blake2b(f"{seed}\0{text}".encode("utf8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < fraction


def read_examples(path: str | Path, tokenizer: Tokenizer, template: ChatFormat) -> list[Example]:
    """The examples of a JSON-lines file, in its order.

    Raises:
        ReflowlensError: the file is missing, damaged or empty, or a line (named by its number) is not JSON, has none of
            the forms above, an unknown role, or no completion.
    """
    path = Path(path)
    examples = []
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path.name}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ReflowlensError(f"{where} is not JSON: {error}") from error
        is_chat, found = _tokenised(record, where, tokenizer, template)
        examples.append(Example(found.tokens, found.counted, found.prompt, is_chat))
    if not examples:
        raise ReflowlensError(f"{path.name} holds no examples")
    return examples


def _lines(path: Path) -> Iterator[str]:
    openers: dict[str, Any] = {".xz": lzma.open, ".gz": gzip.open}
    try:
        file: IO[str]
        with openers.get(path.suffix.lower(), open)(path, "rt", encoding=TEXT_ENCODING) as file:
            yield from file
    except FileNotFoundError as error:
        raise ReflowlensError(f"no file {str(path)!r}") from error
    except UnicodeDecodeError as error:
        raise ReflowlensError(f"{path.name} is not valid UTF-8: {error.reason}") from error
    except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ReflowlensError(f"{path.name} cannot be unpacked, it is damaged or cut short: {error}") from error
    except OSError as error:
        raise ReflowlensError(f"cannot read {str(path)!r}: {error.strerror}") from error


def _tokenised(record: Any, where: str, tokenizer: Tokenizer, template: ChatFormat) -> tuple[bool, Tokenised]:
    """Whether the record is a chat, and its tokens."""
    if not isinstance(record, dict):
        raise ReflowlensError(f"{where} is not a JSON object")
    turns = record.get("messages", record.get("conversations"))
    if isinstance(turns, list):
        messages = [_message(turn, i, where) for i, turn in enumerate(turns)]
        if not all(message.content.strip() for message in messages if message.role == "assistant"):
            raise ReflowlensError(f"{where} has no completion: its text is empty")
        try:
            found = template.tokenise(messages, tokenizer)
        except ReflowlensError as error:  # a template of an instruct model may want turns in another order
            raise ReflowlensError(f"{where}: {error}") from error
        if found is None:
            raise ReflowlensError(f"{where} has no completion: the assistant says nothing in it")
        return True, found
    if "prompt" not in record or "completion" not in record:
        raise ReflowlensError(
            f"{where} has the fields {', '.join(record) or '(none)'}: expected prompt and completion, a list of "
            "messages, or a list of conversations"
        )
    for name in ("prompt", "completion"):
        if not isinstance(record[name], str):
            raise ReflowlensError(f"{where}: {name} must be text, got {record[name]!r}")
    if not record["completion"].strip():
        raise ReflowlensError(f"{where} has no completion: its text is empty")
    return False, tokenise([Part(record["prompt"], False), Part(record["completion"], True)], tokenizer)


def _message(turn: Any, index: int, where: str) -> Message:
    if isinstance(turn, str):
        return Message("assistant" if index % 2 else "user", turn)
    if not isinstance(turn, dict):
        raise ReflowlensError(f"{where}: turn {index + 1} must be text or a role with its content, got {turn!r}")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(role, str) or role not in _ROLES:
        hint = nearest(str(role), list(_ROLES))
        raise ReflowlensError(
            f"{where}: turn {index + 1} has the unknown role {role!r}{f'{hint} Roles' if hint else '; roles'} are "
            "system, user and assistant"
        )
    if not isinstance(content, str):
        raise ReflowlensError(f"{where}: the content of turn {index + 1} must be text, got {content!r}")
    return Message(_ROLES[role], content)
