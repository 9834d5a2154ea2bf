"""What the nodes of an attribution graph say: the tokens that each pushes up and down on its direct path to the logits.

The vector that a node writes on this prompt, through the final norm's weight and the unembedding, as if nothing came
between: what a label can tell without a text or a language model. It is a way to search, not an explanation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import FactoredMatrix

from reflowlens.circuits.attribution.grouped.alike import UNITS, written_by

if TYPE_CHECKING:
    from reflowlens.circuits.attribution.graph import AttributionGraph
    from reflowlens.circuits.attribution.traced import Traced

_CANDIDATES = 4  # times as many tokens are looked at, for blanks and repetitions are left out


@torch.no_grad()
def words_of(graph: AttributionGraph, nodes: pd.DataFrame, n: int = 5) -> dict[str, tuple[list[str], list[str]]]:
    """The tokens that nodes push up, and those that they push down, most first.

    Args:
        nodes: some rows of ``graph.nodes``. Features and neurons are told by what they write, readout signals by the
            tokens whose recipes have most of them, recipe signals the same, relative to the norm of the recipe; other
            kinds have no words, nor have graphs without ``traced``.
        n: the most tokens of each side.

    Example: ``words_of(graph, graph.prune().nodes)["feature:5.1220@4"]``
    """
    if graph.traced is None:
        return {}
    found: dict[str, tuple[list[str], list[str]]] = {}
    for _, rows in nodes[nodes["kind"].isin(["feature", "neuron"])].groupby("layer"):
        logits = written_by(graph.traced, rows) @ _unembedding(graph.traced).T
        found |= _named(graph.traced, rows["node"].tolist(), logits, n)
    model, rows = graph.traced.model, nodes[nodes["kind"].isin(["signal", "readout"])]
    if len(rows) and isinstance(model.W_E, FactoredMatrix) and isinstance(model.unembedding, FactoredMatrix):
        entering, recipe = (m.A.detach()[: model.tokenizer.n_vocab] for m in (model.W_E, model.unembedding))
        of_recipe = torch.tensor((rows["kind"] == "signal").to_numpy(), device=recipe.device)
        chosen = rows["feature"].astype(int).tolist()
        # Shares, lest rare tokens, whose recipes are large, be all.
        shares = entering[:, chosen] / entering.norm(dim=1, keepdim=True)
        recipe = torch.where(of_recipe, shares, recipe[:, chosen]).T
        sign = recipe.new_tensor([-1.0 if activation < 0 else 1.0 for activation in rows["activation"]])
        found |= _named(graph.traced, rows["node"].tolist(), sign[:, None] * recipe, n)
    return found


@torch.no_grad()
def pushed_up(graph: AttributionGraph, nodes: pd.DataFrame, n: int = 3) -> list[str]:
    """The tokens that features or neurons push up together, most first, beyond what they push up the mean token.

    Args:
        nodes: rows of a graph with ``traced``; other kinds push nothing.
    """
    traced = graph.traced
    units = nodes[nodes["kind"].isin(UNITS)]
    if traced is None or not len(units):
        return []
    logits = _unembedding(traced) @ written_by(traced, units).sum(0)
    ids = (logits - logits.mean()).topk(min(_CANDIDATES * n, len(logits)))
    return _distinct(traced, ids.indices.tolist(), ids.values.tolist(), n)


def _unembedding(traced: Traced) -> Float[Tensor, "token d_model"]:
    """Directions of the tokens in the stream, of a LayerNorm centred."""
    model = traced.model
    tokens = torch.arange(model.tokenizer.n_vocab, device=traced.tokens.device)
    rows = (model.unembedding_rows(tokens) * model.ln_final.w).detach()
    return rows - rows.mean(-1, keepdim=True) if getattr(model.ln_final, "centered", False) else rows


def _named(
    traced: Traced, names: Sequence[str], logits: Float[Tensor, "node token"], n: int
) -> dict[str, tuple[list[str], list[str]]]:
    k = min(_CANDIDATES * n, logits.shape[1])
    sides = [(sign * logits).topk(k) for sign in (1, -1)]
    texts = [
        [_distinct(traced, ids, size, n) for ids, size in zip(side.indices.tolist(), side.values.tolist(), strict=True)]
        for side in sides
    ]
    return {name: (up, down) for name, up, down in zip(names, *texts, strict=True)}


def _distinct(traced: Traced, ids: Sequence[int], sizes: Sequence[float], n: int) -> list[str]:
    """Tokens that differ by more than a blank, and are on this side of zero."""
    texts = [traced.model.to_single_str_token(token) for token, size in zip(ids, sizes, strict=True) if size > 0]
    return list({text.strip(): text for text in reversed(texts) if text.strip()}.values())[::-1][:n]
