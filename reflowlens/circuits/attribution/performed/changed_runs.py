"""Graphs performed: nodes set to a multiple of their activation in the model itself, and everything behind them read.

An edge says what a node adds under what the graph holds; whether the model does so is seen by doing it. What is held
meanwhile is one of

    direct        attention patterns, norm scales, gates, errors and all other nodes: what is left are the edges
    constrained   patterns, scales, gates and errors: later nodes answer, through their activation function
    free          errors: patterns, scales and gates are those of the changed stream
    model         nothing: MLPs compute what they compute, and with them the errors; a dictionary's features are changed
                  as by an intervention on ``dictionary.spliced(model)``

The first row of every batch is the prompt as it is, and what is held in the others is held at what it is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from reflowlens.circuits.attribution.performed.changed_decoder import DecoderPass
from reflowlens.circuits.attribution.performed.changed_levels import LevelPass
from reflowlens.circuits.attribution.performed.changed_pass import Change, Level, Pass
from reflowlens.circuits.attribution.performed.changed_refined import RefinedPass
from reflowlens.circuits.attribution.traced import check_unhooked, traced_of
from reflowlens.errors import ReflowlensError
from reflowlens.interventions.passes import UNCOMPILED
from reflowlens.models.bdh import BDH
from reflowlens.models.numerics import without_autocast
from reflowlens.models.residual import ResidualModel
from reflowlens.models.threads import changing
from reflowlens.models.ttt_flow import TTTFlow
from reflowlens.out_of_memory import lower_if_it_does_not_fit
from reflowlens.sweeps.batching import in_batches

if TYPE_CHECKING:
    from reflowlens.circuits.attribution.graph import AttributionGraph

_PASSES: dict[type[ResidualModel], type[Pass]] = {BDH: LevelPass, TTTFlow: RefinedPass}  # of others a decoder's
_SAME = 1e-3  # of the largest value, by which two passes of an unchanged model do not differ


class Outcome(NamedTuple):
    """Of the prompt, in the first row, and of each change.

    Args:
        values: of all nodes; NaN of those that have none.
        logits: at the last position; of a graph of features none.
    """

    values: Float[np.ndarray, "row node"]
    logits: Float[np.ndarray, "row d_vocab"]


def performed(graph: AttributionGraph, changes: Sequence[Change], level: Level, memory: float | None = None) -> Outcome:
    """What becomes of the nodes and of the logits.

    Raises:
        ReflowlensError: as :func:`.performing.perform`, about the graph and the model.
    """
    traced = traced_of(graph)
    model = traced.model
    check_unhooked(model)

    def run(batch: list[Change]) -> tuple[Tensor, Tensor]:
        kind = _PASSES.get(type(model), DecoderPass)
        return kind(graph, traced, [Change({}), *batch], level).run()

    lower = "memory= of a batch, or the length of the prompt"
    with (
        changing(model),
        torch.no_grad(),
        without_autocast(model.ln_final.w),
        UNCOMPILED,
        lower_if_it_does_not_fit(lower),
    ):
        batches = [found for _, found in in_batches(changes, run, traced.tokens.device, memory)]
    _check_same(batches[0][0][0].double().cpu().numpy(), graph.nodes["value"].to_numpy())
    return Outcome(*(_joined([each.double().cpu().numpy() for each in parts]) for parts in zip(*batches, strict=True)))


def _joined(batches: Sequence[np.ndarray]) -> np.ndarray:
    """The prompt's row once, and the others as they differ from that of their batch, which is rounded alike."""
    first = batches[0][0]
    return np.concatenate([batches[0], *(batch[1:] + (first - batch[0]) for batch in batches[1:])])


def _check_same(values: Float[np.ndarray, " value"], expected: Float[np.ndarray, " value"]) -> None:
    differs = np.nanmax(np.abs(values - expected), initial=0.0)
    if not differs <= _SAME * np.nanmax(np.abs(expected), initial=1e-30):
        raise ReflowlensError(
            f"the model is not what it was when the graph was made: values differ by {differs:.3g}; make the graph anew"
        )
