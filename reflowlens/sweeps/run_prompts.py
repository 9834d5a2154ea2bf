"""The prompts of a run that is changed, and of the clean run beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from reflowlens.errors import ReflowlensError
from reflowlens.interventions.selectors import Prompt
from reflowlens.models.base import HookedModel
from reflowlens.models.text import TextInput


@dataclass(frozen=True)
class RunPrompts:
    """The prompts of a run that is changed.

    Args:
        tokens: padded on the right.
        lengths: each prompt's own number of tokens.
        clean: those of the clean run, of the same lengths, that a metric may compare with; None where there is none.
    """

    tokens: Int[Tensor, "prompt pos"]
    lengths: Sequence[int]
    clean: Int[Tensor, "prompt pos"] | None = None

    @classmethod
    def of(cls, model: HookedModel, prompts: TextInput) -> RunPrompts:
        """RunPrompts without a clean run."""
        return cls(*model.tokens_and_lengths(prompts))

    @classmethod
    def pair(cls, model: HookedModel, clean: TextInput, corrupted: TextInput) -> RunPrompts:
        """Corrupted prompts, which are run, and the clean ones.

        Raises:
            ReflowlensError: they do not agree in their lengths.
        """
        tokens, lengths = model.tokens_and_lengths(corrupted)
        clean_tokens, clean_lengths = model.tokens_and_lengths(clean)
        if clean_lengths != lengths:
            raise ReflowlensError(
                f"clean and corrupted prompts must have as many tokens: {clean_lengths} against {lengths} "
                "(model.to_str_tokens shows them)"
            )
        return cls(tokens, lengths, clean_tokens)

    def __len__(self) -> int:
        return len(self.tokens)

    def as_clean(self) -> RunPrompts:
        """The same, where the run that is changed is itself the clean one."""
        return dataclasses.replace(self, clean=self.tokens)

    def as_pass(self) -> Prompt:
        """What interventions are told of a pass over them."""
        return Prompt(self.tokens.shape[1], self.tokens, self.lengths)
