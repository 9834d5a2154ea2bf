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
from reflowlens.prompts import Prompts


@dataclass(frozen=True)
class RunPrompts:
    """The prompts of a run that is changed.

    Args:
        tokens: padded on the right.
        lengths: each prompt's own number of tokens.
        clean: those of the clean run that a metric may compare with; None where there is none.
        clean_lengths: the same of these.
        table: what is known of the prompts, where they came as a table.
    """

    tokens: Int[Tensor, "prompt pos"]
    lengths: Sequence[int]
    clean: Int[Tensor, "prompt clean_pos"] | None = None
    clean_lengths: Sequence[int] = ()
    table: Prompts | None = None

    @classmethod
    def of(cls, model: HookedModel, prompts: TextInput | Prompts) -> RunPrompts:
        """Prompts without a clean run; of a table the clean texts."""
        if isinstance(prompts, Prompts):
            return cls(*model.tokens_and_lengths(prompts.clean), table=prompts)
        return cls(*model.tokens_and_lengths(prompts))

    @classmethod
    def sides(cls, model: HookedModel, clean: TextInput | Prompts, corrupted: TextInput | None) -> RunPrompts:
        """Corrupted prompts, which are run, and any number of clean ones.

        Args:
            clean: with a table, both are columns of it and ``corrupted`` is None.

        Raises:
            ReflowlensError: corrupted prompts are missing, or given twice.
        """
        table, clean, corrupted = both_texts(clean, corrupted)
        return cls(*model.tokens_and_lengths(corrupted), *model.tokens_and_lengths(clean), table)

    @classmethod
    def pair(cls, model: HookedModel, clean: TextInput | Prompts, corrupted: TextInput | None) -> RunPrompts:
        """The same where each corrupted prompt has its clean one; the two may differ in length.

        Raises:
            ReflowlensError: as :meth:`sides`; or they do not agree in their numbers.
        """
        pair = cls.sides(model, clean, corrupted)
        if len(pair.clean_lengths) != len(pair.lengths):
            raise of_one_length(pair.clean_lengths, pair.lengths)
        return pair

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def is_padded(self) -> bool:
        """Whether some of them end in padding."""
        return len(set(self.lengths)) > 1

    @property
    def is_even(self) -> bool:
        """Whether every clean prompt has as many tokens as the corrupted one."""
        return self.clean is None or list(self.clean_lengths) == list(self.lengths)

    def as_clean(self) -> RunPrompts:
        """The same, where the run that is changed is itself the clean one."""
        return dataclasses.replace(self, clean=self.tokens, clean_lengths=self.lengths)

    def as_pass(self) -> Prompt:
        """What interventions are told of a pass over them."""
        return Prompt(self.tokens.shape[1], self.tokens, self.lengths)


def both_texts(clean: TextInput | Prompts, corrupted: TextInput | None) -> tuple[Prompts | None, TextInput, TextInput]:
    """Clean and corrupted prompts as they are given, or as the columns of a table.

    Raises:
        ReflowlensError: corrupted prompts are missing, or given twice.
    """
    if isinstance(corrupted, Prompts):
        raise ReflowlensError("rl.Prompts stand where clean prompts do: give them as clean, and leave corrupted out")
    if isinstance(clean, Prompts):
        if corrupted is not None:
            raise ReflowlensError("prompts of a table bring their corrupted ones along: leave corrupted out")
        return clean, clean.clean, clean.corrupted
    if corrupted is None:
        raise ReflowlensError("corrupted prompts are missing: give them, or rl.Prompts with a column 'corrupted'")
    return None, clean, corrupted


def of_one_length(clean: Sequence[int], corrupted: Sequence[int], hint: str = "") -> ReflowlensError:
    """What is said of clean and corrupted prompts that differ in length."""
    return ReflowlensError(
        f"clean and corrupted prompts must have as many tokens: {list(clean)} against {list(corrupted)} "
        f"({hint or 'model.to_str_tokens shows them'})"
    )
