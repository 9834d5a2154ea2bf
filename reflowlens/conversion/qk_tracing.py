"""Why heads attended, as the ``qk_tracing_results`` of nodes in published attribution graphs.

    {"pair_wise_contributors": [[query's source, key's source, weight], ...],
     "top_q_marginal_contributors": [[source, weight], ...], "top_k_marginal_contributors": [[source, weight], ...]}

Sources are ids of nodes, of such too that pruning took away. What the JSON folds into a token is added up there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from reflowlens.circuits.attribution.explained.attention import WhyAttended
from reflowlens.errors import ReflowlensError

SHOWN = 10


def qk_tracing_results(
    attended: Iterable[WhyAttended], heads: Iterable[str], ids: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """By the name of a head's node what made it attend where it did.

    Args:
        attended: what ``graph.why_attended`` gave.
        heads: names of the nodes of heads that are drawn.
        ids: of every node of the whole graph by its name.

    Raises:
        ReflowlensError: a head is no node of the graph that is drawn, or is explained twice or by comparison.
    """
    drawn, found = set(heads), {}
    for why in attended:
        name = f"head:{why.layer}.{why.head}@{why.query}"
        if name not in drawn:
            raise ReflowlensError(
                f"no node {name!r} in the graph that is drawn: rl.attribute(..., heads=True) has heads as nodes, and "
                "pruning keeps some"
            )
        if why.other_key is not None or name in found:
            raise ReflowlensError(f"a node has one score to explain: give one of graph.why_attended for {name!r}")
        found[name] = {
            "pair_wise_contributors": _largest(why.pairs.iloc[:-1], ["query_source", "key_source"], ids),
            "top_q_marginal_contributors": _largest(why.queries, ["source"], ids),
            "top_k_marginal_contributors": _largest(why.keys, ["source"], ids),
        }
    return found


def _largest(frame: pd.DataFrame, sources: list[str], ids: Mapping[str, str]) -> list[list[Any]]:
    """The largest weights behind the ids of their sources, summed where several have one id."""
    named = frame[[*sources, "weight"]].assign(**{name: frame[name].map(ids) for name in sources})
    summed = named.groupby(sources, sort=False)["weight"].sum().reset_index()
    kept = summed.sort_values("weight", key=np.abs, ascending=False, kind="stable").head(SHOWN)
    return [[*names, float(weight)] for *names, weight in kept.itertuples(index=False, name=None)]
