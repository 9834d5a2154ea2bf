"""The nodes of a graph as a frame, in the order of its matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from reflowlens.circuits.attribution.directions import DirectionAt
from reflowlens.circuits.attribution.edges.rows import SparseRows
from reflowlens.circuits.attribution.graph import LEFT_OUT, AttributionGraph, shares_of
from reflowlens.circuits.attribution.linear.replacement import TOKEN_VALUES
from reflowlens.circuits.attribution.targets import Asked
from reflowlens.circuits.attribution.traced import Traced
from reflowlens.errors import ReflowlensError

_FAR_OFF = 0.01  # of the largest value: rounding is 1e-6
_INTEGERS = {"layer": "Int64", "pos": "Int64", "feature": "Int64"}


def nodes_of(traced: Traced) -> pd.DataFrame:
    """All nodes, in the order of the matrix, without what a graph adds: targets and influence."""
    engine, texts = traced.engine, traced.texts
    inputs, end, layout = engine.inputs, engine.end, engine.layout
    n_blocks, last = layout.n_blocks, len(texts) - 1
    places = range(len(texts))
    parts = [_nodes("rest", ["rest"], n_blocks)]
    parts += [_nodes("bias", [f"bias:{block}"], block) for block in range(n_blocks + 1)]
    for each in inputs:
        index, position = each.index.tolist(), each.position.tolist()
        is_signal, is_token = each.kind == "signal", each.kind == "embedding"
        names = [
            f"{each.kind}:{i}@{p}" if is_signal else f"{each.kind}@{p}" for i, p in zip(index, position, strict=True)
        ]
        labels = [texts[p] for p in position] if is_token or each.kind == TOKEN_VALUES else ""
        if each.kind == "bigram":
            labels = ["".join(texts[max(p - 1, 0) : p + 1]) for p in position]
        feature = index if is_signal or is_token else None
        parts.append(_nodes(each.kind, names, -1, position, feature, labels, _numbers(each.activation)))
    for block in range(n_blocks):
        parts.append(_nodes("error", [f"error:{block}@{p}" for p in places], block, list(places), activation=1.0))
    for stage in engine.stages:
        units, kind, block = stage.units, stage.kind, stage.block
        index, position = units.index.tolist(), units.position.tolist()
        names = [f"{kind}:{block}.{i}@{p}" for i, p in zip(index, position, strict=True)]
        numbers = _numbers(units.activation), _numbers(units.value)
        parts.append(_nodes(kind, names, block, position, index, "", *numbers))
    targets = end.targets
    if end.signals is not None:
        index = list(range(layout.n_signals))
        numbers = _numbers(end.signals), _numbers(end.signals)
        parts.append(_nodes("readout", [f"readout:{i}" for i in index], n_blocks, last, index, "", *numbers))
    token = [i if i >= 0 else None for i in targets.token]
    value = _numbers(targets.value)
    parts.append(
        _nodes("logit", targets.name, n_blocks + (end.signals is not None), last, token, targets.label, value, value)
    )
    for directions in end.directions:
        asked, value = directions.asked, _numbers(directions.value)
        names, labels = [each.node for each in asked], [each.name for each in asked]
        positions = directions.positions.tolist()
        parts.append(_nodes("direction", names, directions.layer, positions, None, labels, value, value))
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return pd.DataFrame(columns).astype(_INTEGERS)


def graph_of(traced: Traced, rows: SparseRows, asked: Sequence[Asked]) -> AttributionGraph:
    """The graph of finished rows."""
    engine, nodes = traced.engine, nodes_of(traced)
    layout, targets, kind = engine.layout, engine.end.targets, engine.replacement.kind
    nodes["target"], nodes["probability"] = 0.0, np.nan
    if asked:
        wanted = {
            target.node
            if isinstance(target, DirectionAt)
            else f"{kind}:{target.layer}.{target.index}@{target.position}"
            for target in asked
        }
        nodes.loc[nodes["node"].isin(wanted), "target"] = 1.0 / len(wanted)
    else:
        nodes.loc[layout.first_target :, "target"] = targets.share.double().cpu().numpy()
        if targets.token[0] >= 0:
            nodes.loc[layout.first_target :, "probability"] = _numbers(targets.probability).astype(np.float64)
    matrix = rows.matrix()
    _check_sums(nodes, matrix)
    shares = shares_of(nodes, matrix, rows.dropped)
    nodes["influence"] = shares.influence()
    nodes.loc[nodes["kind"] == "rest", "influence"] = float((nodes["influence"] + shares.targets) @ shares.rest)
    nodes["cumulative"] = cumulative_shares(np.where(nodes["kind"].isin(LEFT_OUT), 0.0, nodes["influence"]))
    name = "neurons" if traced.dictionary is None else traced.dictionary.cfg.name or "a dictionary"
    with_heads = " and heads" if engine.replacement.heads else ""
    of = f"{name}{with_heads} of {traced.model.cfg.model_name or 'a model'}"
    return AttributionGraph(nodes, matrix, traced.texts, of, rows.dropped, traced=traced, _prompt=traced.text)


def _nodes(
    kind: str,
    names: list[str],
    layer: int,
    pos: Any = None,
    feature: Any = None,
    label: Any = "",
    activation: Any = np.nan,
    value: Any = np.nan,
) -> dict[str, np.ndarray]:
    """Columns, of which a value that is one for all stands in every row."""
    columns = {"node": names, "kind": kind, "layer": layer, "pos": pos, "feature": feature, "label": label}
    numbers = {"activation": activation, "value": value}
    return {name: _column(each, len(names), object) for name, each in columns.items()} | {
        name: _column(each, len(names), np.float64) for name, each in numbers.items()
    }


def _column(values: Any, n: int, dtype: Any) -> np.ndarray:
    column = np.empty(n, dtype)
    column[:] = values
    return column


def _check_sums(nodes: pd.DataFrame, matrix: Any) -> None:
    """Raise where edges do not add up to what the forward pass gave: the model is no such sum of its weights."""
    value = nodes["value"].to_numpy(dtype=np.float64, na_value=np.nan)
    error = np.abs(np.asarray(matrix.sum(axis=1)).ravel() - value)
    worst = np.nanmax(error, initial=0.0)
    if worst > _FAR_OFF * np.nanmax(np.abs(value), initial=1e-30):
        raise ReflowlensError(
            f"edges into {nodes['node'][int(np.nanargmax(error))]} do not add up, by {worst:.3g}: this model computes "
            "something else than its weights say, as with a module or a method replaced"
        )


def cumulative_shares(influence: np.ndarray) -> np.ndarray:
    """The share of all influence that each node has together with those of more."""
    order = np.argsort(-influence, kind="stable")
    shares = np.empty(len(influence))
    shares[order] = influence[order].cumsum() / max(influence.sum(), 1e-30)
    return shares


def _numbers(x: Tensor) -> np.ndarray:
    return x.detach().float().cpu().numpy()
