"""The readout with some of its signals replaced, in closed form.

Logits are affine in the readout signals, ``logits = R a + b``, so replacing signal s moves them by ``d_s R_:s`` with
``d = a' - a``. What that does to a prediction needs no further run of the model, whichever signals are replaced: each
alone (:class:`SingleAblations`), or the first k of an order for each k (:class:`ProgressiveAblations`). Where the model
caps its logits, this is so in front of the cap; logits here are the model's, behind it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from reflowlens.arguments import integer
from reflowlens.errors import ReflowlensError
from reflowlens.models.loss import capped
from reflowlens.models.numerics import without_autocast
from reflowlens.signals import SignalView
from reflowlens.sweeps.batching import in_batches
from reflowlens.tokenizers.targets import Target, target_ids

_BLOCK = 2**19  # entries of a piece of the recipe: small enough to stay in a processor's cache
_PROMPTS = 16  # of which logits are held at once: a product of several reads the recipe once
_FAR = 30.0  # nats that a logit may move where exponentials are summed that have not been scaled


def contribution_order(view: SignalView, signals: Float[Tensor, "prompt S"], target: Target) -> Int[Tensor, "prompt S"]:
    """Signals by the size of what they add to a token's logit, ``|a_s R_target,s|``, largest first."""
    rows = view.logit_rows[_target_ids(view, signals, target)]
    return (signals * rows)[..., : view.n_signals].abs().argsort(dim=-1, descending=True, stable=True)


@dataclass(frozen=True, eq=False)
class ReadoutAblations:
    """What the readout says of each prompt under several replacements of its signals, the *cells*.

    A target is a token (text or id), or one for each prompt. Probabilities are over every row of the view's recipe.

    Args:
        view: whose signals; of a model that refines its last residual stream ``view.final``.
        signals: ``view.readout`` of each prompt's final stream at the position that is read. What is carried behind the
            signals of a dictionary's view is part of every sum and never removed.
        replacement: what a removed signal becomes.
    """

    view: SignalView
    signals: Float[Tensor, "prompt S"]
    replacement: Float[Tensor, "#prompt S"] | float

    def __post_init__(self) -> None:
        self.view.check_is_prediction()

    @property
    def cells(self) -> tuple[str, Sequence[int]]:
        """What the cells are, and which."""
        raise NotImplementedError

    def logit(self, target: Target) -> Float[Tensor, "prompt cell"]:
        """Logit of a token."""
        raise NotImplementedError

    def probability(self, target: Target) -> Float[Tensor, "prompt cell"]:
        """Probability of a token."""
        raise NotImplementedError

    def rank(self, target: Target) -> Int[Tensor, "prompt cell"]:
        """Rank of a token, 1 the most probable: one more than the number of tokens with a larger logit."""
        raise NotImplementedError

    def kl(self) -> Float[Tensor, "prompt cell"]:
        """KL(before ‖ after) of the next-token distributions in nats."""
        raise NotImplementedError

    def logit_diff(self, correct: Target, wrong: Target) -> Float[Tensor, "prompt cell"]:
        """Logit of ``correct`` minus logit of ``wrong``."""
        return self.logit(correct) - self.logit(wrong)

    def before(self) -> ProgressiveAblations:
        """The prompts with nothing removed, as one cell."""
        nothing = torch.empty(len(self.signals), 0, dtype=torch.long)
        return ProgressiveAblations(self.view, self.signals, 0.0, nothing, (0,))

    def frame(self, target: Target, against: Target | None = None) -> pd.DataFrame:
        """Everything said of a target: one row a prompt and cell.

        Returns:
            Columns ``prompt``, ``signal`` or ``count``, ``logit``, ``probability``, ``rank``, ``kl``, and where
            ``against`` names another token ``logit_diff``.
        """
        name, cells = self.cells
        values = {"logit": self.logit(target), "probability": self.probability(target), "rank": self.rank(target)}
        values["kl"] = self.kl()
        if against is not None:
            values["logit_diff"] = self.logit_diff(target, against)
        index = pd.MultiIndex.from_product([range(len(self.signals)), cells], names=["prompt", name])
        return pd.DataFrame({key: value.flatten().cpu().numpy() for key, value in values.items()}, index).reset_index()

    @cached_property
    def _replacement(self) -> Float[Tensor, "prompt S"]:
        replacement = torch.as_tensor(self.replacement, dtype=self.signals.dtype, device=self.signals.device)
        n_signals = self.view.n_signals
        own = (replacement[..., :n_signals] if replacement.ndim else replacement).expand(len(self.signals), n_signals)
        return torch.cat([own, self.signals[:, n_signals:]], dim=-1) if self.view.n_carried else own

    def _logits(self, signals: Float[Tensor, "row S"]) -> Float[Tensor, "row d_vocab"]:
        return self.view.logits(signals)


class SingleAblations(ReadoutAblations):
    """Each signal replaced alone; the cells are the signals.

    With p the distribution before and ``m = Rᵀ p``, the KL divergence of replacing signal s is a cumulant generating
    function, ``log Σ_v p_v exp(d_s (R_vs - m_s))``. Logits move by ``d_s R_vs``, and the logarithm of the sum of their
    exponentials by ``log Σ_v p_v exp(d_s R_vs)``. Behind a cap nothing is of that form, and all logits are formed, for
    some signals at a time.
    """

    @property
    def cells(self) -> tuple[str, Sequence[int]]:
        return "signal", range(self.view.n_signals)

    def logit(self, target: Target) -> Float[Tensor, "prompt S"]:
        return capped(self._before(target)[:, None] + self._change * self._rows(target), self.view.cap)

    def probability(self, target: Target) -> Float[Tensor, "prompt S"]:
        if self.view.cap is not None:
            return self._each_alone().probability(target)
        log_normaliser, growth = self._normalisers
        log_p = self._before(target) - log_normaliser
        return (log_p[:, None] + (self._change * self._rows(target) - growth)).exp()

    def kl(self) -> Float[Tensor, "prompt S"]:
        return self._divergence if self.view.cap is None else self._each_alone().kl()

    @torch.no_grad()
    def rank(self, target: Target) -> Int[Tensor, "prompt S"]:
        if self.view.cap is not None:
            return self._each_alone().rank(target)
        ranks = []
        for a, d, token in zip(self.signals, self._change, _target_ids(self.view, self.signals, target), strict=True):
            before = self._logits(a[None])[0]
            larger = torch.ones_like(d, dtype=torch.long)
            for recipe, ahead in self._pieces(before - before[token]):  # all logits relative to the token's
                larger += (torch.addcmul(ahead[:, None], recipe - self._own_rows[token], d) > 0).sum(dim=0)
            ranks.append(larger)
        return torch.stack(ranks)

    def _each_alone(self) -> OneByOne:
        return OneByOne(self.view, self.signals, self._replacement)

    @cached_property
    @torch.no_grad()
    def _normalisers(self) -> tuple[Float[Tensor, " prompt"], Float[Tensor, "prompt S"]]:
        """The logarithm of the sum of exponentials of the logits before, and by how much each replacement moves it."""
        with without_autocast(self.signals):
            found = [self._normalisers_of(*some) for some in self._with_logits()]
        before, growth = (torch.stack(values) for values in zip(*found, strict=True))
        return before, growth

    def _normalisers_of(
        self, logits: Float[Tensor, " d_vocab"], d: Float[Tensor, " S"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " S"]]:
        before = logits.logsumexp(dim=-1)
        growth, d_of_base_2 = torch.zeros_like(d), d / math.log(2)  # powers of 2 take half as long as those of e
        for recipe, p in self._pieces((logits - before).exp()):
            growth += p @ (recipe * d_of_base_2).exp2_()
        growth = growth.log()
        for s in (d.abs() * self._reach > _FAR).nonzero()[:, 0].tolist():  # too far apart for float32
            growth[s] = (logits - before + d[s] * self._own_rows[:, s]).logsumexp(dim=-1)
        return before, growth

    @cached_property
    @torch.no_grad()
    def _divergence(self) -> Float[Tensor, "prompt S"]:
        with without_autocast(self.signals):
            return torch.stack([self._divergence_of(*some) for some in self._with_logits()])

    def _divergence_of(self, logits: Float[Tensor, " d_vocab"], d: Float[Tensor, " S"]) -> Float[Tensor, " S"]:
        log_normaliser = logits.logsumexp(dim=-1)
        p = (logits - log_normaliser).exp()
        mean = p @ self._own_rows
        growth, off = torch.zeros_like(d), torch.zeros_like(d)
        for recipe, p_piece in self._pieces(p):
            centered = recipe - mean
            off += p_piece @ centered  # what rounding has left of the mean
            growth += p_piece @ centered.mul_(d).expm1_()  # most divergences are far below 1
        kl = growth.log1p() - d * off
        for s in (~kl.isfinite()).nonzero()[:, 0].tolist():  # too large for an exponential
            kl[s] = (logits - log_normaliser + d[s] * (self._own_rows[:, s] - mean[s])).logsumexp(dim=-1)
        return kl.clamp(min=0)

    def _with_logits(self) -> Iterator[tuple[Float[Tensor, " d_vocab"], Float[Tensor, " S"]]]:
        """Of each prompt the logits before, and what its signals change by."""
        for signals, changes in zip(self.signals.split(_PROMPTS), self._change.split(_PROMPTS), strict=True):
            yield from zip(self._logits(signals), changes, strict=True)

    @cached_property
    def _reach(self) -> Float[Tensor, " S"]:
        """The largest entry of each signal in the recipe, by its size."""
        least, most = self._own_rows.aminmax(dim=0)
        return torch.maximum(-least, most)

    @cached_property
    def _change(self) -> Float[Tensor, "prompt S"]:
        return (self._replacement - self.signals)[:, : self.view.n_signals]

    def _before(self, target: Target) -> Float[Tensor, " prompt"]:
        """The target's logit with nothing replaced."""
        ids = _target_ids(self.view, self.signals, target)
        return (self.signals * self.view.logit_rows[ids]).sum(dim=-1) + self.view.bias_of(ids)

    @property
    def _own_rows(self) -> Float[Tensor, "d_vocab S"]:
        """Of the signals alone."""
        return self.view.logit_rows[:, : self.view.n_signals]

    def _rows(self, target: Target) -> Float[Tensor, "prompt S"]:
        return self._own_rows[_target_ids(self.view, self.signals, target)]

    def _pieces(self, values: Float[Tensor, " d_vocab"]) -> Iterator[tuple[Tensor, Tensor]]:
        """Some rows of the recipe, and their values, at a time."""
        rows = max(1, _BLOCK // self.view.n_signals)
        return zip(self._own_rows.split(rows), values.split(rows), strict=True)


class FormedAblations(ReadoutAblations):
    """Of which all logits of each cell are formed, some cells at a time."""

    def _of_cells(self, of_signals: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """A function of the signals that are left in some cells and of the cells' prompts, for all, [prompt, cell]."""
        raise NotImplementedError

    def logit(self, target: Target) -> Float[Tensor, "prompt cell"]:
        ids = _target_ids(self.view, self.signals, target)
        rows, bias = self.view.logit_rows[ids], self.view.bias_of(ids)
        return self._of_cells(
            lambda signals, prompts: capped((signals * rows[prompts]).sum(dim=-1) + bias[prompts], self.view.cap)
        )

    def probability(self, target: Target) -> Float[Tensor, "prompt cell"]:
        ids = _target_ids(self.view, self.signals, target)[:, None]

        return self._of_cells(lambda signals, prompts: _probability(self._logits(signals), ids[prompts]))

    def rank(self, target: Target) -> Int[Tensor, "prompt cell"]:
        ids = _target_ids(self.view, self.signals, target)[:, None]

        def rank(signals: Tensor, prompts: Tensor) -> Tensor:
            logits = self._logits(signals)
            return 1 + (logits > logits.gather(1, ids[prompts])).sum(dim=-1)

        return self._of_cells(rank)

    def kl(self) -> Float[Tensor, "prompt cell"]:
        def divergence(signals: Tensor, prompts: Tensor) -> Tensor:
            before, after = (self._logits(a).log_softmax(dim=-1) for a in (self.signals, signals))
            return F.kl_div(after, before[prompts], log_target=True, reduction="none").sum(dim=-1).clamp(min=0)

        return self._of_cells(divergence)


class OneByOne(FormedAblations):
    """Each signal replaced alone; the cells are the signals."""

    @torch.no_grad()
    def _of_cells(self, of_signals: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        n_signals, device = self.view.n_signals, self.signals.device

        def run(cells: list[int]) -> Tensor:
            index = torch.tensor(cells, device=device)
            prompts, signal = index // n_signals, index % n_signals
            left = self.signals[prompts]
            left[torch.arange(len(index), device=device), signal] = self._replacement[prompts, signal]
            return of_signals(left, prompts)

        every = range(len(self.signals) * n_signals)
        values = torch.cat([part for _, part in in_batches(every, run, device, None)])
        return values.reshape(len(self.signals), n_signals)


@dataclass(frozen=True, eq=False)
class ProgressiveAblations(FormedAblations):
    """The first k signals of each prompt's order replaced, or all others; the cells are the values of k.

    Args:
        order: signals, each once; it may leave some out.
        counts: the values of k.
        keep: replace all but the first k.
        memory: bytes that logits may take at once; default: a share of what is free.
    """

    order: Int[Tensor, "prompt k"]
    counts: Sequence[int]
    keep: bool = False
    memory: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        length = self.order.shape[1]
        if len(self.order) != len(self.signals):
            raise ReflowlensError(f"the order has {len(self.order)} rows for {len(self.signals)} prompts")
        if not len(self.counts):
            raise ReflowlensError("there is no number of signals to remove: counts is empty")
        if not all(integer(count) is not None and 0 <= count <= length for count in self.counts):
            raise ReflowlensError(f"counts must be between 0 and {length}, the number of signals in the order")
        if ((self.order < 0) | (self.order >= self.view.n_signals)).any():
            raise ReflowlensError(f"the order must name signals 0 to {self.view.n_signals - 1}")
        if (self.order.sort(dim=-1).values.diff(dim=-1) == 0).any():
            raise ReflowlensError("the order names a signal twice")

    @property
    def cells(self) -> tuple[str, Sequence[int]]:
        return "count", self.counts

    def probability_and_kept(self, target: Target) -> tuple[Float[Tensor, "prompt cell"], Float[Tensor, "prompt cell"]]:
        """Probability of a token, and the same with ``keep`` the other way, for little more than one of them.

        What is replaced in one is left in the other, so that their logits add up to those with nothing and with
        everything replaced, where they are not capped.
        """
        if self.view.cap is not None:
            other = dataclasses.replace(self, keep=not self.keep)
            return self.probability(target), other.probability(target)
        ids = _target_ids(self.view, self.signals, target)[:, None]
        whole = self._logits(self.signals) + self._logits(self._replacement)

        def both(signals: Tensor, prompts: Tensor) -> Tensor:
            logits = self._logits(signals)
            others = whole[prompts].sub_(logits)
            return torch.stack([_probability(each, ids[prompts]) for each in (logits, others)], dim=-1)

        own, kept = self._of_cells(both).unbind(dim=-1)
        return own, kept

    @torch.no_grad()
    def _of_cells(self, of_signals: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """A function of the signals that are left in some cells and of the cells' prompts, for all, [prompt, count]."""
        device = self.signals.device
        place = torch.full(self.signals.shape, self.view.n_signals, device=device)
        place.scatter_(1, self.order.to(device), torch.arange(self.order.shape[1], device=device).expand_as(self.order))
        cuts = torch.tensor(self.counts, device=device)

        def run(cells: list[int]) -> Tensor:
            index = torch.tensor(cells, device=device)
            prompts, cut = index // len(cuts), cuts[index % len(cuts)]
            replaced = (place[prompts] < cut[:, None]) != self.keep
            left = torch.where(replaced, self._replacement[prompts], self.signals[prompts])
            return of_signals(left, prompts)

        every = range(len(self.signals) * len(cuts))
        values = torch.cat([part for _, part in in_batches(every, run, device, self.memory)])
        return values.unflatten(0, (len(self.signals), len(cuts)))


def _probability(logits: Float[Tensor, "cell d_vocab"], ids: Int[Tensor, "cell 1"]) -> Float[Tensor, " cell"]:
    return logits.log_softmax(dim=-1).gather(1, ids)[:, 0].exp()


def _target_ids(view: SignalView, signals: Float[Tensor, "prompt S"], target: Target) -> Int[Tensor, " prompt"]:
    return target_ids(view.model.to_single_token, target, len(signals), len(view.recipe)).to(signals.device)
