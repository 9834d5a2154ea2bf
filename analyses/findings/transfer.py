"""What of a teacher's signals a student has: the words they stand for, what they cause, and what edits made on the
teacher do to the student.

A *pairing* says which of the student's signals stands for which of the teacher's, and with which sign: the one of the
same number, which a student with the teacher's basis should have, or the one whose recipe column is most alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from analyses.experiments.genetic_hijack.edits import Shift, random_recipes
from analyses.experiments.genetic_hijack.measure import Probe
from analyses.measures.knockout import real_tokens
from analyses.measures.lens import residual_stack
from analyses.measures.sentiment import Poles
from analyses.statistics.draws import derive_generator, derive_seed
from reflowlens.ablations.closed_form import SingleAblations
from reflowlens.signals import SignalView

FREQUENT = 4096
"""Tokens by which codebooks are compared: the first of the vocabulary, which byte-pair encoding merged first and a
short run sees often."""
LEAST = 0.02
"""Nats that a student's own signal, direction or vector has to move for another's effect to be a share of it."""


class Pairing(NamedTuple):
    """For each of the teacher's signals the student's, and 1 or -1."""

    student: Int[Tensor, " S"]
    sign: Float[Tensor, " S"]

    def carried_over(self, recipe: Float[Tensor, " S"]) -> Float[Tensor, " S"]:
        """A vector in the teacher's signals, in the student's.

        >>> Pairing(torch.tensor([1, 0]), torch.tensor([1.0, -1.0])).carried_over(torch.tensor([2.0, 5.0]))
        tensor([-5.,  2.])
        """
        return torch.zeros_like(recipe).index_put((self.student,), self.sign * recipe)


def by_number(n_signals: int) -> Pairing:
    """Every signal stands for that of its own number."""
    return Pairing(torch.arange(n_signals), torch.ones(n_signals))


def by_recipe(student: SignalView, teacher: SignalView) -> Pairing:
    """The one-to-one pairing with the largest sum of absolute correlations of recipe columns, over every other token of
    the frequent ones: those that :func:`codebook_agreement` does not look at."""
    rows = torch.arange(0, _frequent(student), 2)
    correlation = _columns(teacher, rows).T @ _columns(student, rows)
    _, matched = linear_sum_assignment(-correlation.abs().numpy())
    paired = torch.from_numpy(matched)
    return Pairing(paired, correlation.gather(1, paired[:, None])[:, 0].sign().float())


def codebook_agreement(student: SignalView, teacher: SignalView, pairing: Pairing, k: int = 10) -> Float[Tensor, " S"]:
    """For each of the teacher's signals the share of its k top words that are among the k of the student's signal, over
    every other token of the frequent ones (see :func:`by_recipe`); k / n of n are so by chance."""
    rows = torch.arange(1, _frequent(student), 2)
    theirs = teacher.recipe[rows].topk(k, dim=0).indices
    ours = (student.recipe[rows][:, pairing.student] * pairing.sign).topk(k, dim=0).indices
    return (theirs[:, None] == ours[None]).any(dim=1).float().mean(dim=0)


def recipe_agreement(student: SignalView, teacher: SignalView, pairing: Pairing) -> Float[Tensor, " S"]:
    """The absolute correlation of each of the teacher's recipe columns with its partner's, over the tokens of
    :func:`codebook_agreement`."""
    rows = torch.arange(1, _frequent(student), 2)
    products = _columns(teacher, rows) * _columns(student, rows)[:, pairing.student]
    return products.sum(dim=0).abs()


def shuffled_agreement(student: SignalView, teacher: SignalView, seed: int, draws: int = 20) -> float:
    """The control of :func:`codebook_agreement`: the mean over signals that are paired at random."""
    generator = derive_generator(seed, "shuffled_pairing")
    permutations = [torch.randperm(teacher.n_signals, generator=generator) for _ in range(draws)]
    ones = torch.ones(teacher.n_signals)
    return float(np.mean([codebook_agreement(student, teacher, Pairing(p, ones)).mean() for p in permutations]))


@torch.no_grad()
def causal_transfer(
    student: SignalView, teacher: SignalView, pairing: Pairing, prompts: Sequence[str]
) -> dict[str, float]:
    """What the signal that causes the teacher's prediction does to the student's.

    Of each prompt the token is the teacher's most probable one, and the signal the one without which the teacher gives
    it least, as in experiment 9. Zeroed at the student's readout, it takes some nats off the token's log probability.

    Returns ``causal_teacher``, these nats, mean over prompts; ``causal_random``, of any signal; ``causal_own``, of the
    one that takes most; and ``causal_share``, (teacher - random) / (own - random).
    """
    teacher, student = real_tokens(teacher), real_tokens(student)
    theirs = teacher.readout(residual_stack(teacher.model, list(prompts))[-1])
    targets = teacher.logits(theirs).argmax(dim=-1)
    causes = SingleAblations(teacher, theirs, 0.0).probability(targets).argmin(dim=-1)
    ours = SingleAblations(student, student.readout(residual_stack(student.model, list(prompts))[-1]), 0.0)
    nats = (ours.before().probability(targets).log() - ours.probability(targets).log()).double()
    of_teacher = float(nats.gather(1, pairing.student[causes][:, None]).mean())
    random, own = float(nats.mean()), float(nats.max(dim=-1).values.mean())
    return {
        "causal_teacher": of_teacher,
        "causal_random": random,
        "causal_own": own,
        "causal_share": share(of_teacher - random, own - random),
    }


def edit_transfer(
    probe: Probe,
    tokens: Sequence[int],
    own: Float[Tensor, " S"],
    of_teacher: Float[Tensor, " S"],
    view: SignalView,
    *,
    beta: float = 0.5,
    draws: int = 6,
    seed: int = 0,
) -> dict[str, float]:
    """Experiment 12's shift of some tokens' recipes, by a direction made on the teacher.

    Half the difference of the log odds of positive against negative words under +β and -β, mean over carriers, in nats.

    Args:
        tokens: whose recipes are edited.
        own, of_teacher: the directions, in the student's signals; their lengths do not matter.

    Returns ``edit_teacher``, ``edit_own``, ``edit_random`` (mean of the sizes over random directions) and
    ``edit_share``, teacher / own.
    """
    shift = Shift.of(view, list(tokens), own)

    def effect(direction: Float[Tensor, " S"]) -> float:
        plus, minus = (probe.log_odds(shift.by(signed, direction)) for signed in (beta, -beta))
        return float((plus - minus).mean() / 2)

    random = random_recipes(draws, view, derive_seed(seed, "edit_transfer"))
    return _effects("edit", effect(of_teacher), effect(own), [effect(direction) for direction in random])


@torch.no_grad()
def steering_transfer(
    view: SignalView,
    carriers: Sequence[str],
    heldout: Poles,
    own: Float[Tensor, " d_model"],
    of_teacher: Mapping[str, Float[Tensor, " d_model"]],
    *,
    strength: float = 0.5,
    draws: int = 6,
    seed: int = 0,
) -> dict[str, float]:
    """Experiment 10's steering of the stream in front of the middle block, by vectors made on the teacher.

    Added at every position of the carriers, ±, as long as ``strength`` times the stream there; the log odds as in
    :func:`edit_transfer`.

    Args:
        of_teacher: name -> vector; lengths do not matter.

    Returns ``NAME_teacher``, ``NAME_own``, ``NAME_random`` and ``NAME_share`` for each, as :func:`edit_transfer`.
    """
    model = view.model
    tokens, lengths = model.tokens_and_lengths(list(carriers))
    layer = model.cfg.n_layers // 2
    stream = model(tokens, stop_at_layer=layer)
    rows = torch.arange(len(lengths))

    def log_odds(added: Tensor) -> Tensor:
        end = model(stream + added, start_at_layer=layer, stop_at_layer=model.cfg.n_layers)
        return heldout.log_odds(heldout.logits(view, end[rows, torch.tensor(lengths) - 1]).float())

    def effect(vector: Float[Tensor, " d_model"]) -> float:
        step = strength * stream.norm(dim=-1, keepdim=True) * vector / vector.norm()
        return float((log_odds(step) - log_odds(-step)).double().mean() / 2)

    gaussian = torch.randn(draws, len(own), generator=derive_generator(seed, "steering_transfer"))
    random, native = [effect(vector) for vector in gaussian], effect(own)
    found: dict[str, float] = {}
    for name, vector in of_teacher.items():
        found |= _effects(name, effect(vector), native, random)
    return found


def _effects(name: str, of_teacher: float, own: float, random: Sequence[float]) -> dict[str, float]:
    return {
        f"{name}_teacher": of_teacher,
        f"{name}_own": own,
        f"{name}_random": float(np.abs(random).mean()),
        f"{name}_share": share(of_teacher, own),
    }


def share(part: float, whole: float) -> float:
    """part / whole; NaN where the whole is below `LEAST` nats, of which shares mean nothing.

    >>> share(0.5, 2.0), share(0.001, 0.002)
    (0.25, nan)
    """
    return part / whole if whole >= LEAST else math.nan


def _frequent(view: SignalView) -> int:
    return min(FREQUENT, view.n_tokens)


def _columns(view: SignalView, rows: Int[Tensor, " row"]) -> Float[Tensor, "row S"]:
    """Recipe columns over some tokens, centred and of length 1; in float64, for they are summed over thousands."""
    centred = view.recipe[rows].double()
    centred = centred - centred.mean(dim=0)
    return centred / centred.norm(dim=0).clamp(min=1e-12)
