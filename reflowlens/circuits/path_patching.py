"""Path patching: the exact effect of an edge, or of all paths through chosen nodes.

The corrupted run is repeated with one difference: a receiver reads what a sender would have written in the clean run.
What lies between the two stays as it was, except for nodes that the path may go through, which are computed anew from
what reaches them along it; what lies behind the receiver follows (Wang et al., 2022, arXiv 2211.00593; Goldowsky-Dill
et al., 2023, arXiv 2304.05969). The stream is a sum, so a receiver reads the corrupted stream plus a change: the
sender's, and that of every node on the way.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, cast

import pandas as pd
import torch
from einops import rearrange, reduce, repeat
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from reflowlens.arguments import names_given
from reflowlens.circuits.edges import EdgeScores, check_finite, sent_otherwise
from reflowlens.circuits.graph import Edge, Endpoint, Graph
from reflowlens.circuits.runs import mask_of
from reflowlens.dictionaries.splice import spliced_layers
from reflowlens.errors import ReflowlensError
from reflowlens.interventions.values import Steer
from reflowlens.metrics import Metric, check_metric
from reflowlens.models.components import Block
from reflowlens.models.decoder import Decoder
from reflowlens.models.text import TextInput
from reflowlens.models.threads import changing
from reflowlens.models.unwrapping import guarded, hooked_model
from reflowlens.prompts import Prompts
from reflowlens.sweeps.alignment import Positions
from reflowlens.sweeps.patching_result import PatchingResult
from reflowlens.sweeps.reading import Reader, attached_points
from reflowlens.sweeps.run_prompts import RunPrompts
from reflowlens.sweeps.runs import PackedRuns

_NUMBERS_AT_ONCE = 2**26  # of the changes that edges make to the stream, held together


@guarded(changing)
@torch.no_grad()
def path_patch(
    model: Any,
    clean: TextInput | Prompts,
    corrupted: TextInput | None = None,
    sender: str | Sequence[str] = (),
    receiver: str | Sequence[str] = (),
    metric: Metric | None = None,
    *,
    through: str | Sequence[str] = (),
    positions: Positions = None,
    memory: float | None = None,
) -> PatchingResult:
    """Patch what a sender writes from the clean run into the corrupted one, along chosen paths to receivers.

    Args:
        clean, corrupted: prompts, those of a pair of equal length in tokens unless ``positions`` aligns them; of
            :class:`reflowlens.Prompts` both columns are used, and ``corrupted`` is left out.
        sender: ``"embed"``, a head (``"a3.h2"``) or an MLP (``"m3"``); each of several makes a cell of its own.
        receiver: the query, key or value input of a head (``"a5.h0<q>"``; keys and values have their own heads under
            grouped-query attention), an MLP (``"m5"``) or ``"logits"``; several are patched together.
        metric: one of :mod:`reflowlens.metrics`.
        through: heads and MLPs that the path may go through, beside the direct edge; others stay as they were.
        positions: where the sender is patched: None, at every position; ``"right"``, at those that both prompts of a
            pair have, counted from their ends; or a list of roles, ``"last"`` and indices, as of
            :func:`reflowlens.sweep`. Elsewhere it writes what it writes in the corrupted run.

    Returns:
        TransformerLens's ``PatchingResult``, one cell a sender: ``values`` [sender, prompt]; ``effect()`` takes off the
        corrupted run's.

    Raises:
        ReflowlensError: a node does not exist, a receiver comes before the sender, the prompts of a pair differ in
            length and nothing aligns them, or hooks are attached to the model.

    Example:
        >>> import reflowlens as rl
        >>> model = rl.load_model("reflow-nano")
        >>> texts = "The king of France", "The king of China"
        >>> rl.path_patch(model, *texts, "a0.h2", "a5.h2<v>", rl.metrics.kl(), through=["m0", "m1"]).values.shape
        torch.Size([1, 1])
    """
    pair = _Pair(model, clean, corrupted, metric, positions)
    senders, receivers, through = (
        list(dict.fromkeys(names_given(value, name)))
        for name, value in (("sender", sender), ("receiver", receiver), ("through", through))
    )
    if not senders or not receivers:
        raise ReflowlensError("a path needs a sender and a receiver")
    for one in senders:
        for other in receivers:
            pair.graph.check_edge(one, other)
    for node in through:
        if pair.graph.sender(node) == 0:
            raise ReflowlensError(f"a path cannot go through {node!r}, which reads nothing")
    cells = [pair.path(one, receivers, through) for one in senders]
    runs = pair.packed(cells)
    values = torch.cat([part for _, part in runs.values(range(len(cells)), memory)])
    index = pd.DataFrame({"sender": senders, "receiver": ", ".join(receivers), "through": ", ".join(through)})
    return PatchingResult(values, [], index, [pair.reader.metric.name], reduced=False, baseline=pair.baseline)


@guarded(changing)
@torch.no_grad()
def exact_edges(
    model: Any,
    clean: TextInput | Prompts,
    corrupted: TextInput | None = None,
    metric: Metric | None = None,
    *,
    edges: Sequence[Edge] | None = None,
    positions: Positions = None,
    memory: float | None = None,
    progress: bool | None = None,
) -> EdgeScores:
    """Measure the effect of patching each edge from the clean run into the corrupted one.

    The numbers are those of :func:`path_patch` for every edge by itself. An edge into a head changes what this head
    writes and nothing else up to the end of its half-block; so all edges of a sender into a block's heads cost one pass
    of its attention, and each then one run of what follows, as many at once as memory holds.

    Args:
        clean, corrupted, metric, positions: as in :func:`path_patch`.
        edges: pairs of sender and receiver; default: every edge.
        memory: bytes that the folded runs may take; default: a share of what is free.
        progress: show a bar; by default on a terminal.

    Returns:
        ``values`` are effects: the metric under the patch less that of the corrupted run.

    Raises:
        ReflowlensError: as :func:`path_patch`; or what overflows reaches an effect.
    """
    pair = _Pair(model, clean, corrupted, metric, positions)
    if edges is not None and not isinstance(edges, Iterable):
        raise ReflowlensError(f"edges must be a list of pairs (sender, receiver), got {edges!r}")
    wanted = set(pair.graph.edges if edges is None else [pair.graph.edge(edge) for edge in edges])
    values = pair.baseline.new_full((*pair.graph.possible.shape, len(pair.prompts)), torch.nan)
    show = sys.stderr.isatty() if progress is None else progress
    with tqdm(total=len(wanted), unit="edge", disable=not show) as bar:
        for some in pair.folded(wanted):
            runs = pair.packed([[change] for change in some.values()])
            names = list(some)
            for cells, part in runs.values(range(len(names)), memory):
                for cell, value in zip(cells, part - pair.baseline, strict=True):
                    sender, receiver = names[cell]
                    values[pair.graph.sender(sender), pair.graph.receiver(receiver)] = value
                bar.update(len(cells))
    check_finite(values, pair.graph, mask_of(pair.graph, list(wanted)))
    return EdgeScores(pair.graph, values, pair.baseline)


class _Pair:
    """A corrupted run, and what every sender writes otherwise in the clean one."""

    def __init__(
        self,
        model: Any,
        clean: TextInput | Prompts,
        corrupted: TextInput | None,
        metric: Metric | None,
        positions: Positions,
    ) -> None:
        self.model = cast(Decoder, hooked_model(model))
        if attached_points(self.model):
            raise ReflowlensError("paths are patched in the model as it is: leave rl.intervene and remove hooks first")
        if not all(layer.keeps_error for layer in spliced_layers(self.model)):
            raise ReflowlensError(
                "paths go through the model's own MLPs, and a dictionary stands in for them (error=False): splice it "
                "with its error term"
            )
        self.graph = Graph.of(self.model)
        self.prompts = RunPrompts.pair(self.model, clean, corrupted)
        self.reader = Reader(self.model, check_metric(metric), self.prompts)
        self.changes = sent_otherwise(self.model, self.prompts, positions)
        n_layers = self.graph.n_layers
        names = {place.stage: place.stream for place in self.graph.receiver_places.values()}
        _, cache = self.model.run_with_cache(self.prompts.tokens, names_filter=[*names.values()], return_type=None)
        # What each half-block starts from, or where its halves are parallel each block; the readout last.
        self.streams = {stage: cache[name] for stage, name in names.items()}
        self.baseline = self.reader.of_final(self.streams[2 * n_layers])

    def packed(self, cells: Sequence[Sequence[Steer]]) -> PackedRuns:
        """The corrupted run under each cell's changes."""
        return PackedRuns([tuple(cell) for cell in cells], self.reader)

    def path(self, sender: str, receivers: Sequence[str], through: Sequence[str]) -> list[Steer]:
        """What each receiver reads otherwise when a sender's clean output reaches it along the allowed paths."""
        nodes = [self.graph.sender_places[name] for name in through]
        places = [self.graph.receiver_places[name] for name in receivers]
        first = self.graph.sender_places[sender].stage
        change = self.changes[:, :, self.graph.sender(sender)]  # of the stream, by the sender and the nodes so far
        steers = []
        for stage in range(first + 1, 2 * self.graph.n_layers + 1):
            for place in places:
                if place.stage == stage:
                    added = change if place.head is None else change.unsqueeze(2)
                    steers.append(Steer(place.point, added, head=place.head))
            here = [node for node in nodes if node.stage == stage]
            if here:
                change = change + self._rewritten(stage, change, here)
        return steers

    def _rewritten(
        self, stage: int, change: Float[Tensor, "prompt pos d_model"], nodes: list[Endpoint]
    ) -> Float[Tensor, "prompt pos d_model"]:
        """By how much a half-block's nodes write otherwise when their whole input changes."""
        heads = [node.head for node in nodes if node.head is not None]
        total = torch.zeros_like(change)
        if heads:
            total = total + self._heads_rewritten(stage, change, heads)
        return total + self._mlp_rewritten(stage, change) if len(heads) < len(nodes) else total

    def _heads_rewritten(
        self, stage: int, change: Float[Tensor, "prompt pos d_model"], heads: list[int]
    ) -> Float[Tensor, "prompt pos d_model"]:
        stream = self.streams[stage]
        z = self._mix(stage, self._queries_keys_values(stage, stream + change))
        z = z - self._mix(stage, self._queries_keys_values(stage, stream))
        return torch.einsum("bphe,hed->bpd", z[:, :, heads], self._block(stage).attn.W_O[heads])

    def _mlp_rewritten(
        self, stage: int, change: Float[Tensor, "*batch prompt pos d_model"]
    ) -> Float[Tensor, "*batch prompt pos d_model"]:
        """By how much an MLP writes otherwise when its input changes."""
        block, stream = self._block(stage), self.streams[stage]
        return block.mlp(block.ln2(stream + change)) - block.mlp(block.ln2(stream))

    def folded(self, wanted: Collection[Edge]) -> Iterator[dict[Edge, Steer]]:
        """Edges as changes of the stream behind the receiver's half-block, some at a time."""
        change_size = self.changes[:, :, 0].numel()
        receivers_of_heads = self.graph.n_heads + 2 * self.graph.n_key_value_heads
        at_once = max(1, _NUMBERS_AT_ONCE // (change_size * receivers_of_heads))
        by_stage: dict[int, list[str]] = {}
        for name, place in self.graph.receiver_places.items():
            by_stage.setdefault(place.stage, []).append(name)
        found: dict[Edge, Steer] = {}
        for stage, receivers in sorted(by_stage.items()):
            senders = [s for s in self.graph.senders if any((s, receiver) in wanted for receiver in receivers)]
            for i in range(0, len(senders), at_once):
                some = senders[i : i + at_once]
                changes = self.changes[:, :, [self.graph.sender(name) for name in some]]
                written = self._written(stage, rearrange(changes, "prompt pos s d -> s prompt pos d"))
                for edge, change in zip(itertools.product(some, receivers), written.flatten(0, 1), strict=True):
                    if edge in wanted:
                        found[edge] = _behind(stage, self.graph, change)
                if len(found) * change_size > _NUMBERS_AT_ONCE:
                    yield found
                    found = {}
        if found:
            yield found

    def _written(
        self, stage: int, changes: Float[Tensor, "sender prompt pos d_model"]
    ) -> Float[Tensor, "sender receiver prompt pos d_model"]:
        """By how much each receiver of a half-block writes otherwise, for each change of its input alone."""
        if stage == 2 * self.graph.n_layers:  # the logits read the stream itself
            return changes.unsqueeze(1)
        if stage % 2:
            return self._mlp_rewritten(stage, changes).unsqueeze(1)
        of_heads = self._heads_written(stage, changes)
        if not self.graph.parallel:
            return of_heads
        return torch.cat([of_heads, self._mlp_rewritten(stage, changes).unsqueeze(1)], dim=1)

    def _heads_written(
        self, stage: int, changes: Float[Tensor, "sender prompt pos d_model"]
    ) -> Float[Tensor, "sender receiver prompt pos d_model"]:
        """The same of attention, whose receivers are the heads of queries, then those of keys, then those of values."""
        stream, n, n_key_value = self.streams[stage], len(changes), self.graph.n_key_value_heads
        before = self._queries_keys_values(stage, stream)
        after = self._queries_keys_values(stage, (stream + changes).flatten(0, 1))
        *unchanged, z_before = (
            repeat(x, "prompt ... -> (s prompt) ...", s=n) for x in (*before, self._mix(stage, before))
        )
        written = []
        for i, changed in enumerate(after):  # alone: the other two are as they were
            z = self._mix(stage, [*unchanged[:i], changed, *unchanged[i + 1 :]]) - z_before
            by_head = torch.einsum("bphe,hed->hbpd", z, self._block(stage).attn.W_O)
            if i:  # a head of keys or values is read by a group of heads
                by_head = reduce(by_head, "(kv group) b pos d -> kv b pos d", "sum", kv=n_key_value)
            written.append(by_head)
        return rearrange(torch.cat(written), "r (s prompt) pos d -> s r prompt pos d", s=n)

    def _block(self, stage: int) -> Block:
        return cast(Block, self.model.blocks[stage // 2])

    def _queries_keys_values(
        self, stage: int, stream: Float[Tensor, "row pos d_model"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys as scores are products of them, and values."""
        block = self._block(stage)
        q, k, v = block.attn.queries_keys_values(stream, block.ln1)
        return *block.attn.placed(q, k, slice(0, stream.shape[1])), v

    def _mix(self, stage: int, inputs: Sequence[Tensor]) -> Float[Tensor, "row pos head d_head"]:
        q, k, v = inputs
        return self._block(stage).attn.mix(q, k, v, mask=None)


def _behind(stage: int, graph: Graph, change: Float[Tensor, "prompt pos d_model"]) -> Steer:
    """Add a change to the stream behind a half-block, or a block whose halves are parallel."""
    layer = min(stage // 2, graph.n_layers - 1)
    middle = stage % 2 == 0 and stage < 2 * graph.n_layers and not graph.parallel
    return Steer("resid_mid" if middle else "resid_post", change, layer=layer)
