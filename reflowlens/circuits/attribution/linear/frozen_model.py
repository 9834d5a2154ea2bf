"""What an engine needs of a model on one prompt: a linear map, pulled back stage by stage.

A frozen model is a row of stages, in each of which targets read the stream and sources write into it, and a readout.
What is carried is, for each of several targets, the gradient of the target with respect to the residual stream at every
position up to the last that a target reads, [pos, target, d_model]. What a bias adds to a target is collected on the
way: these are the constants, [target].
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reflowlens.circuits.attribution.linear.replacement import Units
from reflowlens.circuits.attribution.linear.ways import Branches, Ways, Within, dense

Carried: TypeAlias = "Float[Tensor, 'pos target d_model'] | Ways | Within | Branches"
Entered: TypeAlias = "tuple[Carried, Float[Tensor, ' target']]"


class EnteredAt(NamedTuple):
    """The number of a stage, gradients at its input, and what biases add behind that."""

    stage: int
    stream: Carried
    constant: Float[Tensor, " target"]


class PulledBack(NamedTuple):
    """Gradients at a stage's input and at what its sources write; what its biases add."""

    stream: Carried
    written: Float[Tensor, "pos target d_model"] | Within
    constant: Float[Tensor, " target"]


class FrozenModel(Protocol):
    """The linear map that a model is on one prompt, in stages, numbered as those of a replacement.

    Attributes:
        d_model: width of the stream.
        numbers_carried: of a target and position, while a stage is passed.
        products: multiply-adds of a target and position when a stage is passed, or so.
        alone: whether, where heads are nodes, what is at a position is connected with nothing else.
    """

    d_model: int
    numbers_carried: int
    products: int
    alone: bool

    def enter(self, stage: int, units: Units) -> Entered:
        """From where units of a stage read to the stage's input: gradients, and what biases add on the way."""
        ...

    def read_by(self, stage: int) -> int:
        """The stage in front of which units of a stage read the stream, at whose input :meth:`enter` ends."""
        ...

    def enter_at(
        self, at: str, layer: int, rows: Float[Tensor, "target d_model"], positions: Int[Tensor, " target"]
    ) -> EnteredAt:
        """From the stream, or what a norm made of it, at one position a target, to the input of the stage behind."""
        ...

    def enter_end(self, rows: Float[Tensor, "target d_model"]) -> Carried:
        """From what the readout reads at the last position to the output of the last stage."""
        ...

    def descend(self, stage: int, carried: Carried) -> PulledBack:
        """From a stage's output to its input, what its sources write left out."""
        ...

    def at_inputs(self, carried: Carried, kind: str) -> Float[Tensor, "pos target width"] | Within:
        """From the first stage's input to what inputs of a kind write."""
        ...

    def ahead(
        self, vectors: Float[Tensor, "input d_model"], positions: Int[Tensor, " input"]
    ) -> Float[Tensor, "pos d_model input"] | None:
        """What inputs have become where :meth:`descend_to_middle` ends; None where it is no shorter way."""
        ...

    def descend_to_middle(
        self, stream: Float[Tensor, "pos target d_model"]
    ) -> tuple[Float[Tensor, "pos target d_model"], Float[Tensor, " target"]]:
        """From the first stage's output to where attention has written, and what biases add before."""
        ...


class ReadAsStream:
    """Inputs of every kind are added to what the first stage reads."""

    alone = True

    def read_by(self, stage: int) -> int:
        return stage

    def at_inputs(self, carried: Carried, kind: str) -> Float[Tensor, "pos target d_model"] | Within:
        return carried if isinstance(carried, Within) else dense(carried)


def at_positions(
    gradient: Float[Tensor, "target d_model"], positions: Int[Tensor, " target"]
) -> Float[Tensor, "pos target d_model"]:
    """Of targets that read one position each, over the positions up to the last."""
    stream = gradient.new_zeros(int(positions.max()) + 1, *gradient.shape)
    stream[positions, torch.arange(len(gradient), device=gradient.device)] = gradient
    return stream
