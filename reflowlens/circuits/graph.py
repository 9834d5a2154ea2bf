"""The residual stream as a graph: who writes into it, and who reads it.

Every head and every MLP reads the sum of what was written before it and adds its own output, so each pair of a sender
and a later receiver is joined by an edge. Nodes are named as in Hanna et al. (2024): ``embed``, ``a3.h2`` and ``m3``
write; ``a3.h2<q>``, ``a3.h0<k>``, ``a3.h0<v>``, ``m3`` and ``logits`` read. The head of a ``<k>`` or ``<v>`` is a
key/value head: under grouped-query attention there are fewer of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from reflowlens.errors import ReflowlensError, nearest
from reflowlens.models.architecture import HEADS_AND_MLPS
from reflowlens.models.base import HookedModel
from reflowlens.models.unwrapping import hooked_model

Edge = tuple[str, str]
_IN_BLOCK = {
    "head": "attn.hook_result",
    "mlp_out": "hook_mlp_out",
    "q": "attn.hook_q_input",
    "k": "attn.hook_k_input",
    "v": "attn.hook_v_input",
    "mlp_in": "hook_mlp_in",
    "logits": "hook_resid_post",
}


@dataclass(frozen=True)
class Endpoint:
    """An end of an edge: where a node writes or reads.

    Args:
        kind: what writes: ``"embed"``, ``"head"``, ``"mlp_out"``; what reads: ``"q"``, ``"k"``, ``"v"``, ``"mlp_in"``,
            ``"logits"``.
        layer: its block; the logits read behind the last.
        head: of heads and their inputs.
        parallel: whether the MLP of its block reads what attention reads.
    """

    kind: str
    layer: int
    head: int | None = None
    parallel: bool = False

    @property
    def stage(self) -> int:
        """Its half-block, which reads what was written in earlier ones.

        2 l is the attention of block l, 2 l + 1 its MLP, which where both are parallel is part of 2 l; the embedding
        comes before all of them, the logits after.
        """
        if self.kind == "embed":
            return -1
        behind = not self.parallel
        return 2 * self.layer + {"mlp_out": behind, "mlp_in": behind, "logits": 2}.get(self.kind, 0)

    @property
    def point(self) -> str:
        """The hook point of what it writes, or of what it reads before the norm."""
        return f"blocks.{self.layer}.{_IN_BLOCK.get(self.kind, 'hook_resid_pre')}"

    @property
    def stream(self) -> str:
        """The hook point of the stream that a receiver reads a copy of."""
        return f"blocks.{self.layer}.hook_resid_{('pre', 'mid', 'post')[self.stage - 2 * self.layer]}"


@dataclass(frozen=True)
class Graph:
    """The nodes of a decoder. Tensors over senders or receivers are in the order of these names.

    >>> graph = Graph(n_layers=1, n_heads=2, n_key_value_heads=1)
    >>> graph.senders
    ('embed', 'a0.h0', 'a0.h1', 'm0')
    >>> graph.receivers
    ('a0.h0<q>', 'a0.h1<q>', 'a0.h0<k>', 'a0.h0<v>', 'm0', 'logits')
    >>> len(graph.edges)
    11
    """

    n_layers: int
    n_heads: int
    n_key_value_heads: int
    parallel: bool = False

    @classmethod
    def of(cls, model: HookedModel) -> Graph:
        """The graph of a model.

        Raises:
            ReflowlensError: it does not consist of attention heads and MLPs, or what heads write is no sum.
        """
        model = hooked_model(model)
        if model.sublayers != HEADS_AND_MLPS:
            raise ReflowlensError(f"a {type(model).__name__} has no graph of attention heads and MLPs")
        if model.cfg.has_post_norms:
            raise ReflowlensError(
                "what heads of this model write passes a norm together (ln1_post), so that no edge is one head's: "
                "patch heads by rl.sweep, or hold the norms in rl.attribute(..., heads=True)"
            )
        return cls(model.cfg.n_layers, model.cfg.n_heads, model.cfg.kv_heads, model.cfg.parallel_attn_mlp)

    @cached_property
    def sender_places(self) -> dict[str, Endpoint]:
        places = {"embed": Endpoint("embed", 0)}
        for layer in range(self.n_layers):
            places |= {f"a{layer}.h{head}": Endpoint("head", layer, head) for head in range(self.n_heads)}
            places[f"m{layer}"] = Endpoint("mlp_out", layer, parallel=self.parallel)
        return places

    @cached_property
    def receiver_places(self) -> dict[str, Endpoint]:
        places: dict[str, Endpoint] = {}
        heads = {"q": self.n_heads, "k": self.n_key_value_heads, "v": self.n_key_value_heads}
        for layer in range(self.n_layers):
            for kind, n in heads.items():
                places |= {f"a{layer}.h{head}<{kind}>": Endpoint(kind, layer, head) for head in range(n)}
            places[f"m{layer}"] = Endpoint("mlp_in", layer, parallel=self.parallel)
        return places | {"logits": Endpoint("logits", self.n_layers - 1)}

    @cached_property
    def senders(self) -> tuple[str, ...]:
        return tuple(self.sender_places)

    @cached_property
    def receivers(self) -> tuple[str, ...]:
        return tuple(self.receiver_places)

    @cached_property
    def sender_points(self) -> dict[str, slice]:
        """Hook points of what the senders write, and which senders each is of.

        The embedding's is the first stream, learned positions included.
        """
        return _by_point(self.sender_places.values())

    @cached_property
    def receiver_points(self) -> dict[str, slice]:
        """Hook points of what the receivers read, before the norm, and which receivers each is of."""
        return _by_point(self.receiver_places.values())

    @cached_property
    def possible(self) -> Bool[Tensor, "sender receiver"]:
        """Which pairs are edges: the sender writes before the receiver reads."""
        writes = torch.tensor([place.stage for place in self.sender_places.values()])
        reads = torch.tensor([place.stage for place in self.receiver_places.values()])
        return writes[:, None] < reads

    @cached_property
    def edges(self) -> list[Edge]:
        return [(self.senders[s], self.receivers[r]) for s, r in self.possible.nonzero().tolist()]

    def only_edges(self, values: Float[Tensor, "sender receiver *rest"]) -> Float[Tensor, "sender receiver *rest"]:
        """With NaN where there is no edge."""
        if not isinstance(values, Tensor) or values.shape[:2] != self.possible.shape:
            raise ReflowlensError(f"values must be a tensor [sender, receiver, ...] = {list(self.possible.shape)}")
        values = values.clone()
        values[~self.possible.to(values.device)] = torch.nan
        return values

    def reads_of(self, sender: str) -> list[str]:
        """The inputs that decide what a sender writes: of a head its own query's, and its group's key's and value's.

        >>> Graph(n_layers=1, n_heads=4, n_key_value_heads=2).reads_of("a0.h3")
        ['a0.h3<q>', 'a0.h1<k>', 'a0.h1<v>']
        """
        place = self.sender_places[self.senders[self.sender(sender)]]
        if place.head is None:
            return [] if place.kind == "embed" else [sender]
        shared = place.head * self.n_key_value_heads // self.n_heads
        return [f"{sender}<q>", *(f"a{place.layer}.h{shared}<{kind}>" for kind in "kv")]

    def places(self, edge: Edge) -> tuple[Endpoint, Endpoint]:
        sender, receiver = self.edge(edge)
        return self.sender_places[sender], self.receiver_places[receiver]

    def sender(self, name: str) -> int:
        """Index of a sender."""
        return _index(name, self.senders, "sender")

    def receiver(self, name: str) -> int:
        """Index of a receiver."""
        return _index(name, self.receivers, "receiver")

    def edge(self, pair: Sequence[str]) -> Edge:
        """A pair of names as an edge.

        Raises:
            ReflowlensError: it is none.
        """
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise ReflowlensError(f"an edge is a pair (sender, receiver), got {pair!r}")
        self.check_edge(*pair)
        return pair[0], pair[1]

    def check_edge(self, sender: str, receiver: str) -> None:
        """Raise unless the pair is an edge."""
        if not self.possible[self.sender(sender), self.receiver(receiver)]:
            raise ReflowlensError(f"no edge from {sender!r} to {receiver!r}: a node reads what was written before it")


def _index(name: str, names: Sequence[str], what: str) -> int:
    if name not in names:
        listed = f"; {what}s are {', '.join(names[:3])}, ..., {names[-1]}"
        raise ReflowlensError(f"no {what} {name!r} in this model{nearest(name, list(names)) or listed}")
    return names.index(name)


def _by_point(places: Iterable[Endpoint]) -> dict[str, slice]:
    points: dict[str, slice] = {}
    for i, place in enumerate(places):
        points[place.point] = slice(points[place.point].start if place.point in points else i, i + 1)
    return points


def by_node(activations: Mapping[str, Tensor], points: Iterable[str]) -> Float[Tensor, "prompt pos node d_model"]:
    """Activations at the points of all senders, or of all receivers, side by side."""
    return torch.cat([with_node_axis(activations[name]) for name in points], dim=2)


def with_node_axis(activation: Float[Tensor, "prompt pos *node d_model"]) -> Float[Tensor, "prompt pos node d_model"]:
    """An activation of one node with an axis for it."""
    return activation if activation.ndim == 4 else activation.unsqueeze(2)
