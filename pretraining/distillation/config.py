"""The table ``[distillation]`` of a training run: what a student takes from its teacher."""

from __future__ import annotations

import math
from dataclasses import dataclass

from reflowlens.errors import ReflowlensError

_BASES = ("own", "start", "frozen", "rotated")
_RECIPES = ("own", "start", "frozen")


@dataclass(frozen=True)
class DistillationConfig:
    """``[distillation]``: what is minimised is the sum of three losses, each times its weight here.

    Args:
        teacher: a packaged model, a checkpoint's folder or a file.
        hash: of the teacher's configuration and weights (:func:`reflowlens.model_hash`), entered when a run begins;
            given beforehand, the teacher must have it.
        tokens: weight of the cross-entropy with the next token.
        logits: weight of T² · KL(teacher ‖ student), both distributions whole and at temperature T.
        temperature: T.
        signals: weight of the readout signals' loss: the mean over positions and signals of (a - a')² / v, of a
            student's signal a, its teacher's a' and the variance v of a' over the positions of the run's first batch;
            1 is what the mean of a' would give.
        basis: the student's signal basis B: its ``own``; the teacher's as a ``start``; the teacher's, ``frozen``; or,
            as the control of the latter, ``rotated``: Q B, frozen, with a random orthogonal Q of the run's seed. The
            teacher is then read in that basis too, as signals Q a' and recipes R Qᵀ: the same logits, the same span and
            the same inner products of streams, and other axes. What differs between ``frozen`` and ``rotated`` is
            therefore owed to single signals; what is alike, to the space that they span.
        recipe: the student's recipe R: its ``own``; the teacher's as a ``start``; or the teacher's, ``frozen``. The
            last two need a basis of the teacher's.
        seed_offset: what is added to the run's seed for the student's first weights. Models that begin with the same
            weights keep much of the same signals, however they are trained: a student of its teacher's seed would seem
            to have learned them.
    """

    teacher: str = ""
    hash: str = ""
    tokens: float = 0.5
    logits: float = 0.5
    signals: float = 0.0
    temperature: float = 1.0
    basis: str = "own"
    recipe: str = "own"
    seed_offset: int = 1000

    def __post_init__(self) -> None:
        for name, allowed in (("basis", _BASES), ("recipe", _RECIPES)):
            if (value := getattr(self, name)) not in allowed:
                choices = ", ".join(map(repr, allowed))
                raise ReflowlensError(f"distillation.{name} must be one of {choices}, got {value!r}")
        weights = {name: getattr(self, name) for name in ("tokens", "logits", "signals")}
        for name, weight in weights.items():
            if not 0 <= weight < math.inf:
                raise ReflowlensError(f"distillation.{name} must not be negative, and finite, got {weight!r}")
        if not any(weights.values()):
            raise ReflowlensError(
                "one of distillation.tokens, logits and signals must be positive: nothing is minimised"
            )
        if self.seed_offset < 0:
            raise ReflowlensError(f"distillation.seed_offset must not be negative, got {self.seed_offset!r}")
        if not 0 < self.temperature < math.inf:
            raise ReflowlensError(f"distillation.temperature must be positive and finite, got {self.temperature!r}")
        if self.recipe != "own" and self.basis == "own":
            raise ReflowlensError(
                f"distillation.recipe={self.recipe!r} mixes signals of the teacher's basis: give distillation.basis too"
            )
        if self.needs_teacher and not self.teacher:
            raise ReflowlensError("distillation.teacher is missing: reflowlens distill TEACHER CONFIG")

    @property
    def needs_teacher(self) -> bool:
        """Whether anything is taken from the teacher: not in the control without one."""
        return self.logits > 0 or self.signals > 0 or self.shares_basis

    @property
    def shares_basis(self) -> bool:
        """Whether the student's basis is made from the teacher's."""
        return self.basis != "own"
