"""Chats as plain text, for a model to learn and to answer in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from reflowlens.checkpoints import read_manifest
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.tokenizers.base import Tokenizer


class Part(NamedTuple):
    """A stretch of an example's text; the model learns to write completions, each followed by the document end."""

    text: str
    completion: bool


class Message(NamedTuple):
    """A turn of a chat; ``role`` is system, user or assistant."""

    role: str
    content: str


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


def recorded_template(model: str | Path) -> ChatTemplate:
    """The template of the chats that a checkpoint was fine-tuned on, from its manifest.

    Raises:
        ReflowlensError: it was not fine-tuned on chats, or the record is not a template.
    """
    finetuning = read_manifest(model).get("finetuning")
    recorded = finetuning.get("template") if isinstance(finetuning, dict) else None
    if recorded is None:
        raise ReflowlensError(f"{model} records no chat template: fine-tune it on chats (reflowlens finetune) first")
    known = {field.name for field in fields(ChatTemplate)}
    if (
        not isinstance(recorded, dict)
        or set(recorded) != known
        or not all(isinstance(t, str) for t in recorded.values())
    ):
        raise ReflowlensError(f"{model}: the recorded chat template must have the texts {', '.join(sorted(known))}")
    return ChatTemplate(**recorded)


def chat(
    model: HookedModel, template: ChatTemplate, questions: Sequence[str], max_new_tokens: int = 60, **settings: Any
) -> list[str]:
    """The answer to each question, in the format that the model was fine-tuned on; ``settings`` are ``generate``'s.

    Example: ``chat(rl.load_model("out/sft"), recorded_template("out/sft"), ["What is a star?"], temperature=0)``
    """
    end = end_token(model.tokenizer)
    prompts = [template.prompt(question) for question in questions]
    lengths = model.tokens_and_lengths(prompts)[1]
    rows = model.generate(prompts, max_new_tokens, stop_token=end, return_type="tokens", **settings)
    answers = [takewhile(end.__ne__, row[n:].tolist()) for row, n in zip(rows, lengths, strict=True)]
    return [model.tokenizer.decode(answer).strip() for answer in answers]
