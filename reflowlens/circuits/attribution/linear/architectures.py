"""What an architecture offers a graph: the units that are nodes, and the linear map that the rest of it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, cast

from jaxtyping import Float
from torch import Tensor

from reflowlens.circuits.attribution.directions import PLACES
from reflowlens.circuits.attribution.linear.frozen import FrozenDecoder
from reflowlens.circuits.attribution.linear.frozen_model import FrozenModel
from reflowlens.circuits.attribution.linear.levels import FrozenLevels, gated_points, of_gated_neurons
from reflowlens.circuits.attribution.linear.refined import FrozenRefined
from reflowlens.circuits.attribution.linear.refiners import with_refiners
from reflowlens.circuits.attribution.linear.replacement import (
    FeatureAt,
    Replacement,
    heads_of,
    of_dictionary,
    of_neurons,
    points_of,
)
from reflowlens.dictionaries.dictionary import Dictionary
from reflowlens.errors import ReflowlensError
from reflowlens.models.architecture import HEADS_AND_MLPS
from reflowlens.models.bdh import BDH
from reflowlens.models.decoder import Decoder
from reflowlens.models.residual import ResidualModel
from reflowlens.models.ttt_flow import TTTFlow


class Parts(Protocol):
    """A model with what of it are nodes.

    Attributes:
        places: where directions can be read.
    """

    places: ClassVar[tuple[str, ...]]

    def points(self, n_tokens: int) -> list[str]:
        """The hook points whose activations are needed of a prompt so long."""
        ...

    def embedded(self, cache: Mapping[str, Tensor]) -> Float[Tensor, "pos d_model"]:
        """What the tokens' embeddings add to the stream."""
        ...

    def replacement(self, cache: Mapping[str, Tensor], asked: Sequence[FeatureAt]) -> Replacement:
        """What stands for the blocks, targets that are asked for among it."""
        ...

    def frozen(self, cache: Mapping[str, Tensor], replacement: Replacement) -> FrozenModel:
        """All else."""
        ...


@dataclass(frozen=True)
class DecoderParts:
    """Features of a dictionary, or of each block and position the ``neurons`` that write the most; ``heads`` too."""

    places: ClassVar[tuple[str, ...]] = tuple(PLACES)
    model: Decoder | TTTFlow
    dictionary: Dictionary | None
    neurons: int
    heads: bool

    def points(self, n_tokens: int) -> list[str]:
        return FrozenDecoder.points(self.model.cfg.n_layers) + points_of(self.model, self.dictionary, self.heads)

    def embedded(self, cache: Mapping[str, Tensor]) -> Float[Tensor, "pos d_model"]:
        return cache["hook_embed"][0]

    def replacement(self, cache: Mapping[str, Tensor], asked: Sequence[FeatureAt]) -> Replacement:
        if self.dictionary is None:
            found = of_neurons(self.model, cache, self.neurons, asked)
        else:
            found = of_dictionary(self.model, self.dictionary, cache, asked)
        return dataclasses.replace(found, heads=heads_of(self.model, cache)) if self.heads else found

    def frozen(self, cache: Mapping[str, Tensor], replacement: Replacement) -> FrozenModel:
        skips = [written.skip for written in replacement.written]
        return FrozenDecoder(cast(Decoder, self.model), cache, skips, self.heads)


@dataclass(frozen=True)
class RefinedParts(DecoderParts):
    """The same of a TTTFlow, whose refiners are blocks behind the last: with neurons those of the flow step too."""

    model: TTTFlow

    def points(self, n_tokens: int) -> list[str]:
        return FrozenRefined.points(self.model, n_tokens) + points_of(self.model, self.dictionary, self.heads)

    def replacement(self, cache: Mapping[str, Tensor], asked: Sequence[FeatureAt]) -> Replacement:
        of_flow = self.neurons if self.dictionary is None else 0
        return with_refiners(super().replacement(cache, asked), self.model, cache, of_flow)

    def frozen(self, cache: Mapping[str, Tensor], replacement: Replacement) -> FrozenModel:
        return FrozenRefined(self.model, cache, [written.skip for written in replacement.written], self.heads)


@dataclass(frozen=True)
class LevelParts:
    """Of each level and position the gated ``neurons`` that write the most. The embedding is taken behind its norm."""

    places: ClassVar[tuple[str, ...]] = ("resid_pre", "resid_post")
    model: BDH
    neurons: int

    def points(self, n_tokens: int) -> list[str]:
        return FrozenLevels.points(self.model.cfg.n_layers) + gated_points(self.model.cfg.n_layers)

    def embedded(self, cache: Mapping[str, Tensor]) -> Float[Tensor, "pos d_model"]:
        return self.model.first_stream(cache["hook_embed"][0])

    def replacement(self, cache: Mapping[str, Tensor], asked: Sequence[FeatureAt]) -> Replacement:
        return of_gated_neurons(self.model, cache, self.neurons, asked)

    def frozen(self, cache: Mapping[str, Tensor], replacement: Replacement) -> FrozenModel:
        return FrozenLevels(self.model, cache)


def parts_of(model: ResidualModel, dictionary: Dictionary | None, neurons: int, heads: bool) -> Parts:
    """What is to be nodes of a model.

    Raises:
        ReflowlensError: the architecture has no graphs, or none with a dictionary or heads.
    """
    if model.sublayers == HEADS_AND_MLPS and isinstance(model, Decoder):
        _check_options(model, dictionary, heads)
        return DecoderParts(model, dictionary, neurons, heads)
    if isinstance(model, TTTFlow):
        return RefinedParts(model, dictionary, neurons, heads)
    name = type(model).__name__
    if not isinstance(model, BDH):
        raise ReflowlensError(
            f"attribution graphs are of decoders with heads and MLPs, of TTTFlow and of BDH; of a {name} there is none"
        )
    if dictionary is not None:
        raise ReflowlensError(
            f"a {name} has no MLPs that a dictionary could stand for: leave it out, and the nodes are gated neurons"
        )
    if heads:
        raise ReflowlensError(
            f"heads of a {name} write nothing but by their neurons, which are nodes already: leave out heads="
        )
    return LevelParts(model, neurons)


def _check_options(model: Decoder, dictionary: Dictionary | None, heads: bool) -> None:
    cfg = model.cfg
    if cfg.has_post_norms and (cfg.attn_out_bias or cfg.mlp_bias):
        raise ReflowlensError(
            "a norm behind attention or MLP divides their biases by another number at every position, and biases of a "
            "graph are constants: attn_out_bias and mlp_bias with norms behind are not explained"
        )
    if heads and cfg.parallel_attn_mlp and dictionary is not None and dictionary.cfg.skip:
        raise ReflowlensError(
            "where attention and MLP are parallel, a transcoder with a skip and heads are not nodes of one graph: "
            "leave out heads="
        )
