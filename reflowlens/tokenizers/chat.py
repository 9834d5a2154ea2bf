"""Chats of an instruct model as token ids, by the template that comes with its tokenizer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from reflowlens.errors import ReflowlensError
from reflowlens.tokenizers.base import Tokenizer

_PRIVATE = 0xF0000  # Unicode's private use, which no text of a chat should hold


def chat_text(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
) -> str:
    """A chat as its template writes it.

    Args:
        tokenizer: with a `chat_template`, a Jinja program, which runs in transformers' sandbox.
        messages: the turns, each with `role` (system, user or assistant, as the template knows them) and `content`.
        add_generation_prompt: end with what the assistant's answer follows.

    Raises:
        ReflowlensError: there is no template, a message lacks its role or content, or the template refuses the chat.
    """
    if tokenizer.chat_template is None:
        raise ReflowlensError(f"{tokenizer.name} has no chat template: the model is not one that chats")
    for i, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or not all(isinstance(message.get(n), str) for n in ("role", "content")):
            raise ReflowlensError(f"message {i} must have a role and a content, both text, got {message!r}")
    if not messages:
        raise ReflowlensError("the chat is empty: give at least one message")
    # The first import of this module of transformers' takes a second.
    from transformers.utils import chat_template_utils

    render: Any = chat_template_utils.render_jinja_template  # annotated with less than it returns
    spelled = {name: "" if i is None else tokenizer.token_str(i) for name, i in _ends(tokenizer).items()}
    try:
        chats, _ = render(
            conversations=[[dict(message) for message in messages]],
            chat_template=tokenizer.chat_template,
            add_generation_prompt=add_generation_prompt,
            **spelled,
        )
    except Exception as error:  # a template raises whatever it likes
        raise ReflowlensError(f"the chat template of {tokenizer.name} refuses the chat: {error}") from error
    return str(chats[0])


def chat_tokens(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
) -> list[int]:
    """The token ids of a chat: special tokens where the template writes them, plain text in what the messages say.

    Where no message spells a special token, these are the ids of transformers' `apply_chat_template`. A message that
    spells one (`"<|im_end|>"`) cannot end its turn: its characters are read as characters, and no role may spell one.

    Args:
        tokenizer, messages, add_generation_prompt: as for :func:`chat_text`.

    Raises:
        ReflowlensError: as :func:`chat_text`.

    Example: ``model.generate([model.to_chat_tokens([{"role": "user", "content": "Why?"}])])``
    """
    text = chat_text(tokenizer, messages, add_generation_prompt=add_generation_prompt)
    spellings = tokenizer.special_tokens
    said = [message["content"] for message in messages]
    if not any(spelling in content for content in said for spelling in spellings):
        return tokenizer.encode(text, split_special_tokens=False)
    if strange := [m["role"] for m in messages if any(spelling in m["role"] for spelling in spellings)]:
        raise ReflowlensError(f"a role is a word, and {strange[0]!r} spells a special token")
    # Each spelling inside a content is rendered as a mark as long as it, which templates treat like any text.
    longest_first = sorted(spellings, key=len, reverse=True)
    marks = {spelling: (chr(_PRIVATE + i) * len(spelling)) for i, spelling in enumerate(longest_first)}
    marked = [dict(message) for message in messages]
    for message in marked:
        for spelling in longest_first:
            message["content"] = message["content"].replace(spelling, marks[spelling])
    outline = chat_text(tokenizer, marked, add_generation_prompt=add_generation_prompt)
    ids: list[int] = []
    for piece in re.split("(" + "|".join(map(re.escape, longest_first)) + ")", outline):
        if piece in spellings:
            ids.append(spellings[piece])
            continue
        for spelling, mark in marks.items():
            piece = piece.replace(mark, spelling)
        ids += tokenizer.encode(piece)
    return ids


def turn_ends(tokenizer: Tokenizer) -> set[int]:
    """The tokens that end an answer: the tokenizer's own, and what its template ends the assistant's turn with."""
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ids = chat_tokens(tokenizer, said, add_generation_prompt=False)
    special = set(tokenizer.special_tokens.values())
    return {*tokenizer.end_tokens, *[i for i in ids if i in special][-1:]}


def _ends(tokenizer: Tokenizer) -> dict[str, int | None]:
    """The tokens that templates name."""
    begin = tokenizer.bos_token if tokenizer.named_bos is None else tokenizer.named_bos
    return {"bos_token": begin, "eos_token": tokenizer.eot_token}
