"""Edge attribution: how much each edge of the residual stream matters, all of them from gradients.

The effect of an edge is that of giving its receiver, and nothing else, what the sender writes in the clean run. To
first order it is (the sender's clean output - its corrupted output) · ∂metric/∂(the receiver's input), the gradient
through the receiver's own norm (EAP: Syed et al., 2023, arXiv 2310.10348); with integrated gradients, the mean gradient
of runs on the way from the corrupted to the clean input (EAP-IG: Hanna et al., 2024, arXiv 2403.17806). Heads of keys
and values are the real ones, also under grouped-query attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from reflowlens.arguments import whole_number
from reflowlens.circuits.gradients import GradientRuns, Row, steps_of
from reflowlens.circuits.graph import Edge, Graph, by_node
from reflowlens.errors import ReflowlensError
from reflowlens.metrics import Metric, check_metric
from reflowlens.models.decoder import Decoder
from reflowlens.models.numerics import weighted_sum, without_autocast
from reflowlens.models.text import TextInput
from reflowlens.models.threads import changing
from reflowlens.models.unwrapping import guarded, hooked_model
from reflowlens.prompts import Prompts
from reflowlens.sweeps.alignment import Positions, at_partners, partners
from reflowlens.sweeps.batching import in_batches
from reflowlens.sweeps.run_prompts import RunPrompts


@dataclass(frozen=True)
class EdgeScores:
    """A number for every edge and prompt: an estimated or an exact effect on the metric.

    Args:
        graph: the nodes that the axes of ``values`` are.
        values: NaN where there is no edge, or where it was not measured.
        baseline: the metric of the corrupted run.
    """

    graph: Graph
    values: Float[Tensor, "sender receiver prompt"]
    baseline: Float[Tensor, " prompt"]

    def __repr__(self) -> str:
        return f"EdgeScores({len(self.frame):,} edges, {self.values.shape[-1]} prompts)"

    def _repr_html_(self) -> str:
        from reflowlens.notebook.html import table, titled

        strongest = self.frame.sort_values("score", key=abs, ascending=False, kind="stable").head(10)
        rows = strongest.astype(object).itertuples(index=False)
        return titled(repr(self), "the strongest of them", table(list(strongest.columns), rows))

    @property
    def frame(self) -> pd.DataFrame:
        """One row an edge: ``sender``, ``receiver``, ``score``, the mean over prompts."""
        rows, columns = (~self.values.isnan().all(dim=-1)).nonzero(as_tuple=True)
        return pd.DataFrame(
            {
                "sender": [self.graph.senders[i] for i in rows.tolist()],
                "receiver": [self.graph.receivers[i] for i in columns.tolist()],
                "score": self.values[rows, columns].mean(dim=-1).tolist(),
            }
        )

    @property
    def matrix(self) -> pd.DataFrame:
        """Senders down, receivers across, NaN where there is no edge."""
        values = self.values.mean(dim=-1).cpu().numpy()
        return pd.DataFrame(values, index=list(self.graph.senders), columns=list(self.graph.receivers))

    def top(self, n: int = 10) -> list[Edge]:
        """The edges with the largest absolute scores, strongest first."""
        frame, n = self.frame, whole_number(n, "n", 0)
        strongest = frame.loc[frame.score.abs().sort_values(ascending=False, kind="stable").index[:n]]
        return list(zip(strongest.sender, strongest.receiver, strict=True))

    @property
    def nodes(self) -> pd.Series:
        """Each sender's score: the sum over its edges. To first order, the effect of patching its whole output."""
        return self.matrix.sum(axis=1)


@guarded(changing)
def edge_attribution(
    model: Any,
    clean: TextInput | Prompts,
    corrupted: TextInput | None = None,
    metric: Metric | None = None,
    *,
    positions: Positions = None,
    mode: Literal["gradient", "integrated"] = "integrated",
    steps: int = 8,
    memory: float | None = None,
) -> EdgeScores:
    """Estimate the effect of patching each edge from the clean run into the corrupted one.

    Costs one forward and one backward pass per prompt, with ``"integrated"`` one per prompt and step, whatever the
    number of edges. Scores are summed over positions.

    Args:
        clean, corrupted: prompts, those of a pair of equal length in tokens unless ``positions`` aligns them; of
            :class:`reflowlens.Prompts` both columns are used, and ``corrupted`` is left out.
        metric: one of :mod:`reflowlens.metrics` that has a gradient.
        positions: where senders are patched: None, at every position; ``"right"``, at those that both prompts of a pair
            have, counted from their ends; or a list of roles, ``"last"`` and indices, as of :func:`reflowlens.sweep`.
            Elsewhere they write what they write in the corrupted run.
        mode: ``"gradient"`` takes the gradient at the corrupted run (EAP), ``"integrated"`` the mean over ``steps``
            runs on the way to the clean input (EAP-IG), at the midpoints of that many equal parts.
        memory: bytes that the folded runs may take; default: a share of what is free.

    Raises:
        ReflowlensError: the prompts of a pair differ in length and nothing aligns them, the metric does not fit the
            model or has no gradient, or what overflows reaches a score.

    Example:
        >>> import reflowlens as rl
        >>> model = rl.load_model("reflow-nano")
        >>> scores = rl.edge_attribution(model, "The king of France", "The king of China", rl.metrics.kl())
        >>> scores.matrix.shape, len(scores.frame)
        ((31, 79), 1108)
    """
    if mode not in ("gradient", "integrated"):
        raise ReflowlensError(f"mode must be 'gradient' or 'integrated', got {mode!r}")
    hooked = cast(Decoder, hooked_model(model))
    with torch.inference_mode(False):
        prompts = RunPrompts.pair(hooked, clean, corrupted)
        changes = sent_otherwise(hooked, prompts, positions).float()
        runs = GradientRuns(hooked, check_metric(metric), prompts, positions)
        graph = Graph.of(hooked)
        names = list(graph.receiver_points)

        def scores(rows: list[Row]) -> Float[Tensor, "sender receiver row"]:
            gradients = by_node(runs.gradients(names, rows), names).float()
            slopes = rearrange(gradients, "row pos receiver d -> row receiver (pos d)")
            changed = rearrange(changes[[prompt for prompt, _ in rows]], "row pos sender d -> row (pos d) sender")
            with without_autocast(changes):
                return rearrange(weighted_sum(slopes, changed), "row receiver sender -> sender receiver row")

        values = changes.new_zeros(*graph.possible.shape, len(prompts))
        todo = runs.rows(steps_of(mode, steps))
        for rows, part in in_batches(todo, scores, changes.device, memory):
            owners = torch.tensor([prompt for prompt, _ in rows], device=changes.device)
            values.index_add_(2, owners, part, alpha=len(prompts) / len(todo))
    check_finite(values, graph, graph.possible)
    return EdgeScores(graph, graph.only_edges(values), runs.baseline)


def check_finite(
    values: Float[Tensor, "sender receiver prompt"], graph: Graph, edges: Bool[Tensor, "sender receiver"]
) -> None:
    """Raise where one of some edges has no finite score: NaN would say that there is no edge."""
    for s, r, prompt in (edges.to(values.device)[..., None] & ~values.isfinite()).nonzero().tolist():
        raise ReflowlensError(
            f"prompt {prompt}: the score of the edge from {graph.senders[s]!r} to {graph.receivers[r]!r} is "
            f"{values[s, r, prompt]:g}: activations overflow in this prompt; run the model in float32, or leave it out"
        )


@torch.no_grad()
def sent_otherwise(
    model: Decoder, prompts: RunPrompts, positions: Positions = None
) -> Float[Tensor, "prompt pos sender d_model"]:
    """What every sender writes in the clean run, less what it writes in the corrupted one.

    Args:
        positions: which of both runs correspond; at a corrupted position that stands for none it is 0.
    """
    points = list(Graph.of(model).sender_points)
    partner = partners(model, prompts, positions)
    sent = []
    for tokens in (prompts.tokens, prompts.clean):
        _, cache = model.run_with_cache(tokens, names_filter=points, return_type=None, return_cache_object=False)
        sent.append(by_node(cache, points))
    corrupted, clean = sent
    return at_partners(corrupted, clean, partner) - corrupted
