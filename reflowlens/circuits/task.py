"""Does the model do the task at all? What a circuit or a graph of a task is worth begins there.

A circuit may restore "what the model does" faithfully where the model does nothing: of a task that it fails, a high
faithfulness says that the same failure was reproduced. So whatever is found on prompts with answers carries how often
the model is right on them, and by how much more than on the corrupted ones.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from scipy.stats import beta
from torch import Tensor

from reflowlens.metrics import Metric, logit_diff
from reflowlens.models.residual import ResidualModel
from reflowlens.models.unwrapping import hooked_model
from reflowlens.prompts import Prompts, Text
from reflowlens.sweeps.reading import Reader
from reflowlens.sweeps.run_prompts import RunPrompts

CHANCE = 0.5  # of the right answer being above the wrong one
_AT_ONCE = 32  # prompts of a pass
Verdict = Literal["done", "not done: not to be read", "too few prompts to tell"]


@dataclass(frozen=True)
class TaskPerformance:
    """Whether a model does a task of right and wrong answers.

    Args:
        margin: the logit of each prompt's right answer less that of the wrong one.
        gap: the margin less that in the corrupted run, or with everything replaced; None where there is none.
    """

    margin: Float[Tensor, " prompt"]
    gap: Float[Tensor, " prompt"] | None = None

    @property
    def accuracy(self) -> float:
        """The share of prompts whose right answer is above the wrong one."""
        return float((self.margin > 0).float().mean())

    @property
    def interval(self) -> tuple[float, float]:
        """Of 95% around :attr:`accuracy`, exact (Clopper and Pearson, 1934).

        >>> low, high = TaskPerformance(torch.ones(6)).interval
        >>> round(low, 3), high
        (0.541, 1.0)
        """
        n, right = len(self.margin), int((self.margin > 0).sum())
        low = float(beta.ppf(0.025, right, n - right + 1)) if right else 0.0
        return low, float(beta.ppf(0.975, right + 1, n - right)) if right < n else 1.0

    @property
    def verdict(self) -> Verdict:
        """``done`` where the interval lies above chance and the gap above 0; not where the mean of either does not."""
        gap = 1.0 if self.gap is None else float(self.gap.mean())
        if not (self.accuracy > CHANCE and gap > 0):
            return "not done: not to be read"
        return "done" if self.interval[0] > CHANCE else "too few prompts to tell"

    def __getitem__(self, place: slice) -> TaskPerformance:
        """That of some of the prompts."""
        return TaskPerformance(self.margin[place], None if self.gap is None else self.gap[place])

    def __str__(self) -> str:
        low, high = self.interval
        gap = "" if self.gap is None else f", clean - corrupted gap {float(self.gap.mean()):.3g}"
        return f"accuracy {self.accuracy:.3f} ({low:.3f} to {high:.3f}) of {len(self.margin)}, chance {CHANCE}{gap}"


def performance_on(model: Any, prompts: Prompts) -> TaskPerformance:
    """How a model does on prompts with answers and wrong answers.

    Args:
        model: a hooked model.
        prompts: with ``answer`` and ``wrong_answer``; with ``corrupted`` the gap is measured too.

    Raises:
        ReflowlensError: a column is missing, or an answer is not a single token.

    Example: ``performance_on(model, prompts).verdict``
    """
    margin = values_of(model, prompts, logit_diff)
    if "corrupted" not in prompts.frame:
        return TaskPerformance(margin)
    return TaskPerformance(margin, margin - values_of(model, prompts, logit_diff, "corrupted"))


@torch.no_grad()
def values_of(
    model: Any, prompts: Prompts, metric: Callable[[Prompts], Metric], text: Text = "clean"
) -> Float[Tensor, " prompt"]:
    """A metric of each prompt's own run, some prompts at a time.

    Args:
        metric: made for the prompts of a pass, as ``rl.metrics.logit_diff`` is.
    """
    hooked, parts = cast(ResidualModel, hooked_model(model)), []
    for start in range(0, len(prompts), _AT_ONCE):
        some = prompts.select(range(start, min(start + _AT_ONCE, len(prompts))))
        parts.append(Reader(hooked, metric(some), RunPrompts.of(hooked, some.column(text))).of_run())
    return torch.cat(parts)


def has_answers(prompts: Any) -> bool:
    """Whether these are prompts of which a right and a wrong answer are known."""
    return isinstance(prompts, Prompts) and {"answer", "wrong_answer"} <= set(prompts.frame.columns)


def warn_unless_done(performance: TaskPerformance | None, what: str, stacklevel: int = 4) -> None:
    """Say that the model fails the task that something was found on."""
    if performance is not None and performance.verdict.startswith("not done"):
        warnings.warn(
            f"the model does not do this task ({performance}): {what} is not to be read", stacklevel=stacklevel
        )
