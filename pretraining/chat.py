"""Chats, for a model to learn and to answer in: as plain text, or by the template of an instruct model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Bool, Int

from reflowlens.checkpoints import read_manifest
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.tokenizers.base import Tokenizer
from reflowlens.tokenizers.chat import chat_text, chat_tokens, turn_ends

_OF_TOKENIZER = "tokenizer"  # what a manifest records where the tokenizer's own template was used


class Part(NamedTuple):
    """A stretch of an example's text; the model learns to write completions, each followed by the document end."""

    text: str
    completion: bool


class Message(NamedTuple):
    """A turn of a chat; ``role`` is system, user or assistant."""

    role: str
    content: str


class Tokenised(NamedTuple):
    """An example's tokens, which of them the model learns to write, and what it reads before the first of these."""

    tokens: Int[np.ndarray, " length"]
    counted: Bool[np.ndarray, " length"]
    prompt: str


class ChatFormat(Protocol):
    """How a chat is written."""

    def tokenise(self, messages: Sequence[Message], tokenizer: Tokenizer) -> Tokenised | None:
        """A chat to learn from; turns after the last answer teach nothing. None if the assistant says nothing."""
        ...

    def prompt_tokens(self, messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
        """What the assistant's answer continues."""
        ...

    def ends(self, tokenizer: Tokenizer) -> set[int]:
        """The tokens that end an answer."""
        ...

    def record(self) -> Any:
        """What a checkpoint's manifest keeps of it."""
        ...


def tokenise(parts: Sequence[Part], tokenizer: Tokenizer) -> Tokenised:
    """The tokens of an example in parts; those of completions count, and the document end after each.

    Where the tokenizer has a token that begins texts, as imported models may, it comes first and does not count.
    """
    tokens = [] if tokenizer.bos_token is None else [tokenizer.bos_token]
    counted = [False] * len(tokens)
    for text, completion in parts:
        ids = tokenizer.encode(text) + [end_token(tokenizer)] * completion
        tokens += ids
        counted += [completion] * len(ids)
    return Tokenised(np.array(tokens, dtype=np.int64), np.array(counted), parts[0].text)


@dataclass(frozen=True)
class ChatTemplate:
    """How a chat is written as plain text, without new tokens.

    A role's label stands before its turn, a separator after each turn but the assistant's, which ends with the document
    end (shown as ⏹): ``User: Why?\\n\\nAssistant: Because.⏹User: And …``.

    >>> ChatTemplate().prompt("Why?")
    'User: Why?\\n\\nAssistant:'
    """

    system: str = "System:"
    user: str = "User:"
    assistant: str = "Assistant:"
    separator: str = "\n\n"

    def parts(self, messages: Sequence[Message]) -> list[Part]:
        """What is read and what is learned, in turn; turns after the last answer teach nothing and are left out."""
        parts, context = [], ""
        for role, content in messages:
            if role == "assistant":
                parts += [Part(context + self.assistant, False), Part(f" {content}", True)]
                context = ""
            else:
                context += f"{getattr(self, role)} {content}{self.separator}"
        return parts

    def prompt(self, question: str) -> str:
        """What the answer to a question continues."""
        return self.parts([Message("user", question), Message("assistant", "")])[0].text

    def tokenise(self, messages: Sequence[Message], tokenizer: Tokenizer) -> Tokenised | None:
        parts = self.parts(messages)
        return tokenise(parts, tokenizer) if parts else None

    def prompt_tokens(self, messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
        parts = self.parts([*messages, Message("assistant", "")])[:-1]
        return tokenise(parts, tokenizer).tokens.tolist()

    def ends(self, tokenizer: Tokenizer) -> set[int]:
        return {end_token(tokenizer)}

    def record(self) -> dict[str, str]:
        return asdict(self)


class TokenizerFormat:
    """The template that an instruct model's tokenizer brings, special tokens and all."""

    def tokenise(self, messages: Sequence[Message], tokenizer: Tokenizer) -> Tokenised | None:
        turns = [message._asdict() for message in messages]
        answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
        if not answers:
            return None
        tokens = chat_tokens(tokenizer, turns[: answers[-1] + 1], add_generation_prompt=False)
        counted = np.zeros(len(tokens), dtype=bool)
        special = set(tokenizer.special_tokens.values())
        for i in answers:
            before = chat_tokens(tokenizer, turns[:i])
            after = chat_tokens(tokenizer, turns[: i + 1], add_generation_prompt=False)
            if tokens[: len(after)] != after or after[: len(before)] != before:
                raise ReflowlensError(
                    f"the chat template of {tokenizer.name} writes earlier turns otherwise once others follow (turn "
                    f"{i + 1}): learn from chats of one answer each"
                )
            # Up to the token that ends the turn: the line break behind it is the template's.
            last = max((k for k in range(len(before), len(after)) if after[k] in special), default=len(after) - 1)
            counted[len(before) : last + 1] = True
        prompt = chat_text(tokenizer, turns[: answers[0]]) if answers[0] else ""
        return Tokenised(np.array(tokens, dtype=np.int64), counted, prompt)

    def prompt_tokens(self, messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
        return chat_tokens(tokenizer, [message._asdict() for message in messages])

    def ends(self, tokenizer: Tokenizer) -> set[int]:
        return turn_ends(tokenizer)

    def record(self) -> str:
        return _OF_TOKENIZER


def end_token(tokenizer: Tokenizer) -> int:
    """The document end; for ``bytes``, which has none, the byte 0, as in prepared data.

    Raises:
        ReflowlensError: the tokenizer of an imported model names none.
    """
    if tokenizer.eot_token is not None:
        return tokenizer.eot_token
    if tokenizer.name != "bytes":
        raise ReflowlensError(f"{tokenizer.name} names no token that ends a document: completions could not end")
    return 0


def format_to_learn(tokenizer: Tokenizer) -> ChatFormat:
    """How a model's chats are written from now on: as its tokenizer has it, plain text otherwise."""
    return ChatTemplate() if tokenizer.chat_template is None else TokenizerFormat()


def recorded_template(model: str | Path, tokenizer: Tokenizer | None = None) -> ChatFormat:
    """How the chats of a model are written: as it was fine-tuned on them, or by the template imported with it.

    Args:
        model: a packaged name, or a checkpoint folder, whose manifest tells.
        tokenizer: the model's.

    Raises:
        ReflowlensError: it was not fine-tuned on chats and came with no template, or the record is not a template.
    """
    finetuning = read_manifest(model).get("finetuning")
    recorded = finetuning.get("template") if isinstance(finetuning, dict) else None
    if recorded in (None, _OF_TOKENIZER) and tokenizer is not None and tokenizer.chat_template is not None:
        return TokenizerFormat()
    if recorded is None:
        raise ReflowlensError(
            f"{model} records no chat template: fine-tune it on chats (reflowlens finetune) first, or import an "
            "instruct model"
        )
    known = {field.name for field in fields(ChatTemplate)}
    if (
        not isinstance(recorded, dict)
        or set(recorded) != known
        or not all(isinstance(t, str) for t in recorded.values())
    ):
        raise ReflowlensError(f"{model}: the recorded chat template must have the texts {', '.join(sorted(known))}")
    return ChatTemplate(**recorded)


def chat(
    model: HookedModel,
    template: ChatFormat,
    questions: Sequence[str],
    max_new_tokens: int = 60,
    *,
    system: str | None = None,
    **settings: Any,
) -> list[str]:
    """The answer to each question, in the format that the model was fine-tuned on; ``settings`` are ``generate``'s.

    Args:
        system: what a system message says before each question.

    Example: ``chat(rl.load_model("out/sft"), recorded_template("out/sft"), ["What is a star?"], temperature=0)``
    """
    ends = template.ends(model.tokenizer)
    before = [] if system is None else [Message("system", system)]
    prompts = [template.prompt_tokens([*before, Message("user", question)], model.tokenizer) for question in questions]
    rows = model.generate(prompts, max_new_tokens, eos_token_id=ends, return_type="tokens", **settings)
    written = (row[len(n) :].tolist() for row, n in zip(rows, prompts, strict=True))
    answers = [takewhile(lambda token: token not in ends, tokens) for tokens in written]
    return [model.tokenizer.decode(answer).strip() for answer in answers]
