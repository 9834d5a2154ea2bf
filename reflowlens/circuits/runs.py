"""Runs in which only a circuit carries what the clean prompts say.

Every node reads the stream of the replaced run plus, along the edges of the circuit, what the senders write otherwise
than there. The senders are computed anew, each from what it reads: so what a circuit lacks it lacks all the way down.
Where positions align prompts of different lengths, a clean position that stands for no corrupted one is not replaced:
the replaced run has there what the clean one has.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from reflowlens.circuits.graph import Edge, Graph, by_node, with_node_axis
from reflowlens.circuits.task import TaskPerformance, has_answers, performance_on
from reflowlens.errors import ReflowlensError
from reflowlens.metrics import Metric, check_metric
from reflowlens.models.decoder import Decoder
from reflowlens.models.text import TextInput
from reflowlens.models.unwrapping import hooked_model
from reflowlens.progress import bar
from reflowlens.prompts import Prompts
from reflowlens.sweeps.alignment import Positions, at_partners, mean_at, partners, places_of_means
from reflowlens.sweeps.batching import in_batches
from reflowlens.sweeps.reading import Reader, check_readout_is_free
from reflowlens.sweeps.run_prompts import RunPrompts

Circuit: TypeAlias = "Sequence[str | Edge]"  # nodes, or edges
Ablation = Literal["corrupted", "mean"]


def mask_of(graph: Graph, circuit: Circuit) -> Bool[Tensor, "sender receiver"]:
    """The edges of a circuit; of a node all those that leave it.

    Raises:
        ReflowlensError: a node or an edge does not exist.
    """
    mask = torch.zeros_like(graph.possible)
    for part in circuit:
        if isinstance(part, str):
            mask[graph.sender(part)] = True
        else:
            graph.check_edge(*part)
            mask[graph.sender(part[0]), graph.receiver(part[1])] = True
    return mask & graph.possible


class CircuitRuns:
    """Runs of the clean prompts in which only some edges carry what the senders write."""

    @torch.no_grad()
    def __init__(
        self,
        model: Any,
        clean: TextInput | Prompts,
        corrupted: TextInput | None,
        metric: Metric | None,
        ablation: Ablation = "corrupted",
        positions: Positions = None,
    ) -> None:
        if isinstance(metric, Metric) and metric.normalised:
            raise ReflowlensError("faithfulness is normalised itself: give the metric without recovery")
        self.model = cast(Decoder, hooked_model(model))
        self.graph = Graph.of(self.model)
        if ablation not in ("corrupted", "mean"):
            raise ReflowlensError(f"ablation must be 'corrupted' or 'mean', got {ablation!r}")
        check_readout_is_free(self.model)
        where: Tensor | None = None
        if ablation == "mean":  # over any number of them
            both = RunPrompts.sides(self.model, clean, corrupted)
            where, partner = places_of_means(self.model, both, positions)
        else:
            both = RunPrompts.pair(self.model, clean, corrupted)
            partner = partners(self.model, both, positions, of="clean")
        assert both.clean is not None
        self.table, self.tokens = both.table, both.clean
        self.reader = Reader(self.model, check_metric(metric), RunPrompts(self.tokens, both.clean_lengths).as_clean())
        self._check_replaces_what_is_read(partner, positions)
        replaced = self._activations(both.tokens)
        if where is not None:
            replaced = {name: mean_at(x, where) for name, x in replaced.items()}
        if partner is not None:
            own = self._activations(self.tokens)
            replaced = {name: at_partners(own[name], x, partner) for name, x in replaced.items()}
        self.replaced = by_node(replaced, self.graph.sender_points)
        self.streams = {place.stream: replaced[place.stream] for place in self.graph.receiver_places.values()}

    def _activations(self, tokens: Int[Tensor, "prompt pos"]) -> dict[str, Tensor]:
        """What senders write, and the streams that receivers read."""
        streams = [place.stream for place in self.graph.receiver_places.values()]
        names = [*self.graph.sender_points, *streams]
        return self.model.run_with_cache(tokens, names_filter=names, return_type=None, return_cache_object=False)[1]

    def _check_replaces_what_is_read(self, partner: Int[Tensor, "prompt pos"] | None, positions: Positions) -> None:
        replaced = self.reader.is_read if partner is None else self.reader.is_read & (partner >= 0)
        for row in (~replaced.any(dim=1)).nonzero()[:, 0].tolist():
            raise ReflowlensError(
                f"row {row}: positions={positions!r} hold none that the metric reads, so that its logits are never "
                "replaced: add it, such as 'last'"
            )

    def performance(self, ends: Float[Tensor, "2 prompt"]) -> TaskPerformance | None:
        """Whether the model does the task, where right and wrong answers are known: of a table, or by the metric.

        Args:
            ends: the metric of the whole model and of the empty circuit.
        """
        if has_answers(self.table):
            return performance_on(self.model, cast(Prompts, self.table))
        full, empty = ends
        return TaskPerformance(full, full - empty) if self.reader.metric.name == "logit_diff" else None

    @torch.no_grad()
    def values(
        self,
        masks: Sequence[Bool[Tensor, "sender receiver"]],
        memory: float | None = None,
        progress: bool | None = False,
    ) -> Float[Tensor, "circuit prompt"]:
        """The metric of each circuit, which is given by its edges; ``progress``: None shows a bar on a terminal."""
        show, parts = sys.stderr.isatty() if progress is None else progress, []
        with bar(total=len(masks), show=show, unit="circuit") as steps:
            for some, part in in_batches(masks, self._run, self.tokens.device, memory):
                parts.append(part)
                steps.update(len(some))
        return torch.cat(parts)

    def _run(self, masks: list[Bool[Tensor, "sender receiver"]]) -> Float[Tensor, "circuit prompt"]:
        n_prompts, n = len(self.tokens), len(masks)
        kept = torch.stack(masks).repeat_interleave(n_prompts, dim=0).to(self.replaced)  # [row, sender, receiver]
        changes = self.replaced.new_zeros(len(kept), *self.replaced.shape[1:])  # of what the senders write

        def in_rows(x: Float[Tensor, "prompt *rest"]) -> Float[Tensor, "row *rest"]:
            return x.expand(n_prompts, *x.shape[1:]).repeat(n, *[1] * (x.ndim - 1))

        def write(senders: slice, activation: Tensor, hook: HookPoint) -> None:
            changes[:, :, senders] = with_node_axis(activation) - in_rows(self.replaced[:, :, senders])

        def read(receivers: slice, stream: str, activation: Tensor, hook: HookPoint) -> Tensor:
            before = int(self.graph.possible[:, receivers.start].sum())
            change = torch.einsum("bpsd,bsr->bprd", changes[:, :, :before], kept[:, :before, receivers])
            return (in_rows(self.streams[stream]).unsqueeze(2) + change).reshape(activation.shape)

        places = list(self.graph.receiver_places.values())
        hooks: list[tuple[str, Callable[..., Any]]] = [
            (name, partial(write, s)) for name, s in self.graph.sender_points.items()
        ]
        hooks += [(name, partial(read, r, places[r.start].stream)) for name, r in self.graph.receiver_points.items()]
        with self.model.hooks(hooks):
            final = self.model.final_stream(self.tokens.repeat(n, 1))
        prompts = self.reader.each.repeat(n)
        return self.reader.of_residual(self.reader.read(final, prompts), prompts).unflatten(0, (n, n_prompts))
