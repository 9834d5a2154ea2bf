"""Text in and out of a model: prompts as tokens, tokens as text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens import HookedRootModule

from reflowlens.arguments import integer, is_one_of
from reflowlens.config import ModelConfig
from reflowlens.errors import ReflowlensError
from reflowlens.models.loss import IGNORE
from reflowlens.tokenizers.base import Tokenizer
from reflowlens.tokenizers.by_name import get_tokenizer

TextInput: TypeAlias = (
    "str | Sequence[str] | Sequence[Sequence[int]] | Int[Tensor | np.ndarray, 'batch pos'] "
    "| Int[Tensor | np.ndarray, ' pos']"
)


def read_once(input: Any) -> Any:
    """Prompts as given; those of an iterator, which can be read only once, as a list."""
    return list(input) if isinstance(input, Iterator) else input


PaddingSide: TypeAlias = Literal["left", "right"]


def is_row_of_ids(row: Any) -> bool:
    """Whether it is a text's token ids: a list, an array or a tensor of whole numbers."""
    if isinstance(row, Tensor | np.ndarray):
        return row.ndim == 1 and not (torch.is_floating_point(torch.as_tensor(row)) or row.dtype in (bool, torch.bool))
    return isinstance(row, list | tuple) and bool(row) and all(integer(i) is not None for i in row)


def is_cheap_to_read(tokens: Int[Tensor, "*tokens"]) -> bool:
    """Whether values can be checked at little cost: on the CPU (a GPU would be waited for) and not being compiled."""
    return tokens.device.type == "cpu" and not torch.compiler.is_compiling() and tokens.numel() > 0


class TextModel(HookedRootModule):
    """A model that reads text through a tokenizer."""

    cfg: ModelConfig

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the model was configured with."""
        return get_tokenizer(self.cfg.tokenizer_name)

    def to_tokens(
        self,
        input: TextInput,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide = "right",
        *,
        split_special_tokens: bool = False,
    ) -> Int[Tensor, "batch pos"]:
        """Token ids of one text or several.

        Args:
            input: a text, a list of texts, a list of rows of token ids, or token ids [batch, pos] or [pos].
            prepend_bos: begin each text with the tokenizer's ``bos_token``, or with its end-of-document token if it has
                no other. None: as the model was trained, an imported Llama with one, the architectures here without.
                A text that begins with this token gets no second one.
            padding_side: where shorter texts are padded. A pass over tokens that are padded on the left needs their
                ``attention_mask``; over the texts, ``padding_side="left"``.
            split_special_tokens: read ``<|endoftext|>`` in a text as the characters that it is, not as the token
                (transformers' name), as texts of others should be; data and the contents of chats always are.

        Returns:
            int64 [batch, pos] on the model's device; shorter texts are padded with the end-of-document token.

        Raises:
            ReflowlensError: the text is empty, too long for ``n_ctx``, or an id is outside the vocabulary.

        Example: ``model.to_tokens("The capital of France is").shape  # [1, 5]``
        """
        return self.tokens_and_lengths(
            input, prepend_bos=prepend_bos, padding_side=padding_side, split_special_tokens=split_special_tokens
        )[0]

    def to_chat_tokens(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
    ) -> Int[Tensor, "1 pos"]:
        """A chat as an instruct model reads it, by the template that was imported with it.

        Args:
            messages: the turns, each with ``role`` and ``content``; a content is plain text, whatever it spells.
            add_generation_prompt: end with what the answer follows.

        Raises:
            ReflowlensError: there is no template, it refuses the chat, or the chat is too long for ``n_ctx``.

        Example: ``model.generate(model.to_chat_tokens([{"role": "user", "content": "What is a star?"}]))``
        """
        from reflowlens.tokenizers.chat import chat_tokens

        return self.to_tokens([chat_tokens(self.tokenizer, messages, add_generation_prompt=add_generation_prompt)])

    def next_tokens(self, tokens: Int[Tensor, "batch pos"], lengths: list[int]) -> Int[Tensor, "batch pos"]:
        """Targets of next-token prediction.

        Args:
            tokens: padded on the right.
            lengths: tokens per row, padding left out.

        Returns:
            For each position the id at the next one; -100, which counts nothing, at the end of a row and over padding.

        Raises:
            ReflowlensError: no row has two tokens.
        """
        if max(lengths, default=0) < 2:
            raise ReflowlensError("a loss needs two tokens at least: one to predict from and one to predict")
        last = torch.as_tensor(lengths, device=tokens.device)[:, None] - 1
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return tokens.roll(-1, dims=1).masked_fill(positions >= last, IGNORE)

    def tokens_and_lengths(
        self,
        input: TextInput,
        *,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide = "right",
        offset: int = 0,
        split_special_tokens: bool = False,
    ) -> tuple[Int[Tensor, "batch pos"], list[int]]:
        """Token ids, and the number of tokens per row, padding left out.

        Args:
            input, prepend_bos, padding_side, split_special_tokens: as in :meth:`to_tokens`.
            offset: tokens that were read before, which count towards ``n_ctx``; then no ``bos_token`` is prepended.

        Raises:
            ReflowlensError: as in :meth:`to_tokens`.
        """
        if not is_one_of(padding_side, ("left", "right")):
            raise ReflowlensError(f"padding_side must be 'left' or 'right', got {padding_side!r}")
        if isinstance(input, np.ndarray) and input.dtype.kind in "iu":
            input = torch.from_numpy(input.astype(np.int64))
        if isinstance(input, Tensor):
            tokens = input[None] if input.ndim == 1 else input
            if tokens.ndim != 2 or tokens.is_floating_point() or tokens.dtype == torch.bool:
                raise ReflowlensError(f"tokens must be integers [batch, pos], got {input.dtype} {list(input.shape)}")
            tokens = tokens.long()
            self.check_length(tokens.shape[1], offset)
            self._check_ids(tokens)
            return tokens.to(self.cfg.device), [tokens.shape[1]] * tokens.shape[0]
        several = isinstance(input, Iterable) and not isinstance(input, str | Mapping)
        texts: list[Any] = list(input) if several else [input]
        if several and texts and all(is_row_of_ids(text) for text in texts):
            rows = [[int(i) for i in row] for row in texts]
        else:
            rows = self._rows(texts, several, prepend_bos if offset == 0 else False, split_special_tokens)
        lengths = [len(row) for row in rows]
        self.check_length(max(lengths), offset)
        end = self.tokenizer.eot_token or 0
        padding = [[end] * (max(lengths) - n) for n in lengths]
        on_left = padding_side == "left"
        tokens = torch.tensor([pad + row if on_left else row + pad for row, pad in zip(rows, padding, strict=True)])
        self._check_ids(tokens)
        return tokens.to(self.cfg.device), lengths

    def _rows(
        self, texts: list[Any], several: bool, prepend_bos: bool | None, split_special_tokens: bool
    ) -> list[list[int]]:
        """The ids of each text."""
        if strange := [text for text in texts if not isinstance(text, str)]:
            raise ReflowlensError(
                "a prompt is a text, a list of texts, or a tensor or array of token ids [batch, pos]; "
                f"got {'a list with ' if several else ''}{strange[0]!r}"
            )
        begin = self.text_start(prepend_bos)
        rows = [self.tokenizer.encode(text, split_special_tokens=split_special_tokens) for text in texts]
        if not rows or any(not row and not begin for row in rows):
            raise ReflowlensError("the prompt is empty: give at least one token of text")
        return [row if begin and row[:1] == begin else begin + row for row in rows]

    def text_start(self, prepend_bos: bool | None = None) -> list[int]:
        """The ids that :meth:`to_tokens` prepends to a text: one beginning-of-sequence token, or none."""
        tokenizer = self.tokenizer
        candidates = (tokenizer.bos_token, tokenizer.named_bos, tokenizer.eot_token)
        begin = next((i for i in candidates if i is not None), 0)
        wanted = tokenizer.bos_token is not None if prepend_bos is None else prepend_bos
        return [begin] if wanted else []

    def check_length(self, length: int, offset: int = 0) -> None:
        """Raise unless ``length`` tokens after ``offset`` others fit into ``n_ctx``."""
        if length == 0:
            raise ReflowlensError("the prompt is empty: give at least one token")
        if offset + length > self.cfg.n_ctx:
            raise ReflowlensError(
                f"the prompt is too long: {offset + length} tokens, but this model reads at most n_ctx={self.cfg.n_ctx}"
            )

    def _check_ids(self, tokens: Int[Tensor, "*tokens"]) -> None:
        if not is_cheap_to_read(tokens):
            return
        lowest, highest = map(int, tokens.aminmax())
        if lowest < 0 or highest >= self.cfg.d_vocab:
            raise ReflowlensError(
                f"no token {lowest if lowest < 0 else highest}: this model's ids are 0 to {self.cfg.d_vocab - 1}"
            )

    def _as_ids(self, tokens: Any) -> Int[Tensor, "*tokens"]:
        """Ids of any shape as a tensor: of a number, a list, an array or a tensor."""
        try:
            ids = tokens if isinstance(tokens, Tensor) else torch.as_tensor(np.asarray(tokens))
        except (TypeError, ValueError, RuntimeError):
            ids = torch.tensor(torch.nan)
        if ids.numel() and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool):
            raise ReflowlensError(f"token ids are integers, got {tokens!r}")
        return ids.long()

    def to_string(self, tokens: Int[Tensor, "*batch pos"] | Sequence[int]) -> str | list[str]:
        """Decode token ids.

        Returns:
            A text for ids [pos], a list of texts for ids [batch, pos].

        Raises:
            ReflowlensError: they are not integers, or one is outside the vocabulary.
        """
        ids = self._as_ids(tokens)
        if ids.ndim == 2:
            return [self.tokenizer.decode(row.tolist()) for row in ids]
        return self.tokenizer.decode(ids.reshape(-1).tolist())

    def to_str_tokens(self, input: TextInput | Sequence[int], prepend_bos: bool | None = None) -> Any:
        """The text of each token, for labels.

        Args:
            input: one text, ids of any shape, which are taken in order, or a list of texts.

        Returns:
            One string per token, its leading space included; of a list of texts a list of them each.

        Raises:
            ReflowlensError: the input is neither.

        Example: ``model.to_str_tokens("The king")  # ["The", " king"]``
        """
        if isinstance(input, Sequence) and not isinstance(input, str) and any(isinstance(text, str) for text in input):
            if strange := [text for text in input if not isinstance(text, str)]:
                raise ReflowlensError(f"to_str_tokens takes texts, or ids, not both: got {strange[0]!r} among texts")
            return [self.to_str_tokens(text, prepend_bos) for text in cast("Sequence[str]", input)]
        ids = self.to_tokens(input, prepend_bos) if isinstance(input, str) else self._as_ids(input)
        return self.tokenizer.to_str_tokens(ids.reshape(-1).tolist())

    def to_single_token(self, word: str) -> int:
        """The id of a text that is a single token, such as ``" king"``.

        Raises:
            ReflowlensError: it is several tokens; the message shows them.
        """
        return self.tokenizer.single_token(word)

    def get_token_position(
        self,
        single_token: str | int,
        input: str | Int[Tensor, " pos"] | Int[Tensor, "1 pos"],
        mode: Literal["first", "last"] = "first",
        prepend_bos: bool | None = None,
    ) -> int:
        """Where a token stands in a text.

        Args:
            single_token: its text or its id.
            input: one text, or its ids.
            mode: which occurrence, if there are several.

        Raises:
            ReflowlensError: there are several texts, the token does not occur, or it is no single token.

        Example: ``model.get_token_position(" king", "The king and the king", mode="last")  # 4``
        """
        if not is_one_of(mode, ("first", "last")):
            raise ReflowlensError(f"mode must be 'first' or 'last', got {mode!r}")
        tokens = self.to_tokens(input, prepend_bos)
        if len(tokens) != 1:
            raise ReflowlensError(f"a token's position is that in one text, got {len(tokens)}")
        token = self.to_single_token(single_token) if isinstance(single_token, str) else integer(single_token)
        found = [i for i, other in enumerate(tokens[0].tolist()) if other == token]
        if not found:
            raise ReflowlensError(f"the token {single_token!r} does not occur in {self.to_str_tokens(tokens)}")
        return found[0 if mode == "first" else -1]

    def to_single_str_token(self, token: int) -> str:
        """The text of one token id, its leading space included."""
        return self.tokenizer.token_str(token)
