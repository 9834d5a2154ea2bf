"""What a graph was made of, kept for what is asked of it later: attention explained, interventions performed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxtyping import Int
from torch import Tensor

from reflowlens.arguments import integer
from reflowlens.circuits.attribution.edges.engine import Engine
from reflowlens.dictionaries.dictionary import Dictionary
from reflowlens.dictionaries.splice import spliced_layers
from reflowlens.errors import ReflowlensError
from reflowlens.models.residual import ResidualModel
from reflowlens.sweeps.reading import attached_points

if TYPE_CHECKING:
    from reflowlens.circuits.attribution.graph import AttributionGraph


@dataclass(frozen=True)
class Traced:
    """The model on the prompt of a graph.

    Args:
        tokens: of the prompt; of a graph of features those up to the last target.
        engine: the frozen model with its MLPs replaced, by which edges are computed.
    """

    model: ResidualModel
    dictionary: Dictionary | None
    tokens: Int[Tensor, " pos"]
    engine: Engine

    @property
    def texts(self) -> list[str]:
        """Of the tokens; ids beyond the tokenizer's have none."""
        model, n_vocab = self.model, self.model.tokenizer.n_vocab
        return [model.to_single_str_token(token) if token < n_vocab else "" for token in self.tokens.tolist()]

    @property
    def text(self) -> str:
        """Of all of them."""
        known = self.tokens[self.tokens < self.model.tokenizer.n_vocab]
        return str(self.model.to_string(known))

    def n_units(self, block: int) -> int:
        """How many features or neurons a block has, nodes or not; a dictionary has none in the place of a refiner."""
        cfg = self.model.cfg
        if cfg.ttt_flow is not None and block >= cfg.n_layers:
            return cfg.ttt_flow.flow_hidden if self.dictionary is None else 0
        return cfg.d_mlp if self.dictionary is None else self.dictionary.cfg.n_features

    def position(self, where: Any, name: str) -> int:
        """A position of the prompt, counted from its beginning.

        Args:
            where: a position, negative from the end, a token that occurs once, or ``"last"``.
            name: of the argument.

        Raises:
            ReflowlensError: there is none, or the token occurs several times.
        """
        n = len(self.tokens)
        if isinstance(where, str) and where != "last":
            places = (self.tokens == self.model.to_single_token(where)).nonzero()[:, 0].tolist()
            if not places:
                raise ReflowlensError(f"{name}={where!r}: the token does not occur in the prompt")
            if len(places) > 1:
                every = ", ".join(map(str, places))
                raise ReflowlensError(f"{name}={where!r}: the token occurs at positions {every}: give one of them")
            return int(places[0])
        place = n - 1 if where == "last" else integer(where)
        if place is None or not -n <= place < n:
            raise ReflowlensError(f"no {name} {where!r}: the prompt has {n} tokens")
        return place % n


def check_unhooked(model: ResidualModel) -> None:
    """Raise where something is attached to a model of which a graph is, or is to be: as it was without.

    Hooks of hook points, those of any other module (a graph would be of weights that are not what is computed), and
    dictionaries.
    """
    hooked = [name for name, module in model.named_modules() if module._forward_hooks or module._forward_pre_hooks]
    attached = [*attached_points(model), *hooked, *(layer.write for layer in spliced_layers(model))]
    if attached:
        raise ReflowlensError(
            f"something is attached to {attached[0] or 'the model'!r}, and a graph is of the model as it is: remove "
            "hooks, and leave blocks of interventions or dictionaries first"
        )


def traced_of(graph: AttributionGraph) -> Traced:
    """The frozen prompt that a graph was made of.

    Raises:
        ReflowlensError: it was made without one.
    """
    if graph.traced is None:
        raise ReflowlensError("this graph comes without its model, which is needed here: make it with rl.attribute")
    return graph.traced
