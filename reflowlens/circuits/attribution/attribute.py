"""Attribution graphs of a prompt (Ameisen et al., 2025, "Circuit Tracing"), exact under what they hold constant.

On the prompt, attention patterns, norm scales and the gates of gated MLPs are held at what they are, and the output of
each MLP is a sum: of what active features (or neurons) write, a bias, a skip, and the error, whatever is missing. Then
every pre-activation and every logit is a sum over what was written earlier, and an edge is one term of it: the source's
activation times what its vector does to the target, over all paths that pass no other feature.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import replace
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor

from reflowlens.arguments import whole_number
from reflowlens.circuits.attribution.directions import DirectionAt, checked, directions_of
from reflowlens.circuits.attribution.edges.ends import ADDED, end_of, inputs_of, no_end
from reflowlens.circuits.attribution.edges.engine import Engine
from reflowlens.circuits.attribution.edges.layout import layout_of, possible_edges
from reflowlens.circuits.attribution.edges.rows import BYTES_AN_EDGE, SparseRows
from reflowlens.circuits.attribution.edges.table import graph_of
from reflowlens.circuits.attribution.graph import AttributionGraph
from reflowlens.circuits.attribution.linear.architectures import parts_of
from reflowlens.circuits.attribution.linear.replacement import FeatureAt, Replacement
from reflowlens.circuits.attribution.targets import Asked, Targets, split_targets
from reflowlens.circuits.attribution.traced import Traced, check_unhooked
from reflowlens.dictionaries.belonging import check_belongs, check_device
from reflowlens.dictionaries.dictionary import Dictionary
from reflowlens.errors import ReflowlensError
from reflowlens.models.numerics import without_autocast
from reflowlens.models.residual import ResidualModel
from reflowlens.models.text import TextInput
from reflowlens.models.threads import changing
from reflowlens.models.unwrapping import Function, guarded, hooked_model
from reflowlens.progress import bar
from reflowlens.sweeps.batching import check_budget

_BEFORE_CAP = "unembed.hook_logits_pre_cap"
_FEWEST_EDGES = 16  # of a target, below which a graph says little


def unrounded(function: Function) -> Function:
    """Without autocast: in 16 bits, edges do not add up."""

    @functools.wraps(function)
    def called(model: Any, *args: Any, **kwargs: Any) -> Any:
        with without_autocast(next(hooked_model(model).parameters())):
            return function(model, *args, **kwargs)

    return called  # type: ignore[return-value] # called as the function is


@guarded(changing, lower="the length of the prompt, neurons=, or memory= of the edges that are kept")
@unrounded
@torch.no_grad()
def attribute(
    model: Any,
    prompt: TextInput,
    dictionary: Dictionary | None = None,
    targets: Targets = None,
    *,
    against: str | int | None = None,
    neurons: int = 32,
    heads: bool = False,
    signals: bool | None = None,
    edges_per_node: int | None = None,
    memory: float = 1e9,
    other_model: bool = False,
    progress: bool | None = None,
) -> AttributionGraph:
    """The attribution graph of a prompt: what made which feature active, and what made the prediction.

    Args:
        model: a hooked decoder, TTTFlow or BDH, compiled or not.
        prompt: one text, or its tokens; two at least.
        dictionary: transcoders of the model's MLPs: a layer each or cross-layer, with a skip or without. Its active
            features are nodes. None: the model's own neurons are, of BDH the gated ones.
        targets: what is explained, at the last position: one token or several, as texts or ids; or features anywhere,
            as ``rl.FeatureAt(layer, index, position)``; or directions of the stream, as
            ``rl.DirectionAt(vector, layer, position)``. None: the likeliest tokens, as many as reach 95% of the
            probability, at most 10.
        against: a token; what is explained is by how much the target's logit is above its.
        neurons: without a dictionary: how many of each block and position are nodes, those that write the most; what
            the others write is the error.
        heads: whether attention heads are nodes too: what a head writes at a position, of which the activation is the
            norm. Then no other path passes through attention.
        signals: of reFlow: whether the inputs are the signals of the tokens' recipes, and the logits sums over the
            signals of the readout. Default: where there is no dictionary.
        edges_per_node: the most edges that a target keeps, its largest; what the others add is one edge from a node
            ``rest``. None: all, or as many as ``memory`` holds.
        memory: bytes for the edges, 12 an edge.
        other_model: the dictionary is meant to be another model's.
        progress: show a bar; by default on a terminal.

    Returns:
        The graph. For every target, incoming edges add up to its pre-activation or logit, of a model that caps its
        logits to the logit in front of the cap.

    Raises:
        ReflowlensError: the prompt is not one of two tokens or more, the model is no decoder, TTTFlow or BDH, is not in
            float32, or is changed by hooks, activations or a dictionary's output are not finite, the dictionary belongs
            to another model or is none of MLPs, no feature is active, a target does not exist, or not even 16 edges a
            node fit ``memory``.

    Example: ``rl.attribute(model, "The capital of France is", dictionary).prune().edges``
    """
    check_budget(memory)
    traced, asked = trace(model, prompt, dictionary, targets, against, neurons, heads, signals, other_model)
    rows = empty_rows(traced.engine, edges_per_node, memory)
    batches = traced.engine.batches()
    n_targets, work = sum(batch.n_targets for batch in batches), sum(batch.work for batch in batches)
    shown = sys.stderr.isatty() if progress is None else progress
    n_edges = len(rows.weights)
    size = f"{rows.n_nodes:,} nodes, at most {n_edges:,} edges, {BYTES_AN_EDGE * n_edges / 1e9:.2f} GB"
    with bar(show=shown, total=n_targets, unit="target", desc=size, leave=False) as progressed:
        done = 0.0
        for batch in batches:
            rows.add(batch.first, batch.values())
            done += batch.work  # targets are counted by what they cost, so that the time left is right
            progressed.update(round(n_targets * done / work) - progressed.n)
    return graph_of(traced, rows, asked)


def trace(
    model: Any,
    prompt: TextInput,
    dictionary: Dictionary | None,
    targets: Targets,
    against: str | int | None,
    neurons: int,
    heads: bool,
    signals: bool | None,
    other_model: bool,
) -> tuple[Traced, list[Asked]]:
    """The frozen prompt of a graph, and the targets that are no tokens; all as of :func:`attribute`."""
    model = _checked_model(model)
    neurons = whole_number(neurons, "neurons", 1)
    parts = parts_of(model, dictionary, neurons, bool(heads))
    if dictionary is not None:
        check_belongs(dictionary, model, other_model=other_model)
        check_device(model, dictionary)
        theirs, own = next(dictionary.parameters()).dtype, model.ln_final.w.dtype
        if theirs != own:
            raise ReflowlensError(f"the dictionary is in {theirs} and the model in {own}: dictionary.to({own})")
    tokens = one_prompt(model, prompt)
    asked_tokens, asked = split_targets(targets, model.cfg.n_layers, tokens.shape[1])
    features = [target for target in asked if isinstance(target, FeatureAt)]
    _check_features(features, model.cfg.d_mlp if dictionary is None else dictionary.cfg.n_features)
    directions = [checked(each, parts.places, model.ln_final.w) for each in asked if isinstance(each, DirectionAt)]
    if asked:
        if against is not None:
            raise ReflowlensError("against= compares tokens, and the targets are features or directions")
        tokens = tokens[:, : 1 + max(each.position for each in asked)]  # what comes behind does not matter
    factored = "hook_recipe" in model.hook_dict
    if signals and not factored:
        raise ReflowlensError(f"signals=True is for models with recipes, and a {type(model).__name__} has none")
    by_signals = factored and (dictionary is None if signals is None else bool(signals))

    ends = ("hook_embed", *ADDED.values(), "hook_recipe", "ln_final.hook_normalized", _BEFORE_CAP)
    points = parts.points(tokens.shape[1]) + [name for name in ends if name in model.hook_dict]
    points += [direction.point for direction in directions]
    logits, cache = model.run_with_cache(tokens, names_filter=points)
    _check_finite(logits, cache)
    replacement = parts.replacement(cache, features)
    if asked:
        replacement = _upstream(replacement, asked)
    inputs = inputs_of(model, tokens[0], cache, parts.embedded(cache), by_signals)
    if asked:
        end = no_end(cache["hook_embed"], directions_of(directions, cache))
    else:
        normalized = cache["ln_final.hook_normalized"][0, -1] if by_signals else None
        before_cap = cache[_BEFORE_CAP][0, -1] if _BEFORE_CAP in cache else None
        end = end_of(model, logits[0, -1], asked_tokens, against, normalized, before_cap)
    frozen = parts.frozen(cache, replacement)
    del cache, logits

    layout = layout_of(replacement, inputs, end, tokens.shape[1])
    return Traced(model, dictionary, tokens[0], Engine(frozen, replacement, inputs, end, layout)), asked


def empty_rows(engine: Engine, edges_per_node: int | None, memory: float) -> SparseRows:
    """Room for the edges that are kept.

    Raises:
        ReflowlensError: not even 16 edges a node fit ``memory``.
    """
    n_edges, n_targets = possible_edges(engine.layout, engine.replacement, engine.inputs, engine.frozen.alone)
    per_row = _edges_per_node(n_edges, n_targets, edges_per_node, memory)
    n_kept = engine.layout.first_input[0]
    if per_row is not None:
        n_edges = min(n_edges, n_targets * (per_row + n_kept))
    return SparseRows(engine.layout.n_nodes, n_edges, n_kept, per_row)


def _checked_model(model: Any) -> ResidualModel:
    model = hooked_model(model)
    check_unhooked(model)
    if model.ln_final.w.dtype not in (torch.float32, torch.float64):
        raise ReflowlensError(
            f"in {model.ln_final.w.dtype} the edges of a graph do not add up: load the model in float32"
        )
    return cast(ResidualModel, model)


def one_prompt(model: ResidualModel, prompt: TextInput) -> Int[Tensor, "1 pos"]:
    """Its tokens.

    Raises:
        ReflowlensError: it is not one, or of one token.
    """
    tokens = model.to_tokens(prompt)
    if len(tokens) != 1:
        raise ReflowlensError(f"an attribution graph is of one prompt, got {len(tokens)}: call it for each")
    if tokens.shape[1] < 2:
        raise ReflowlensError("an attribution graph needs a prompt of two tokens at least: of one there is no context")
    return tokens


def _check_features(asked: list[FeatureAt], n_features: int) -> None:
    for target in asked:
        if target.index >= n_features:
            raise ReflowlensError(f"no feature {target.index}: they are 0 to {n_features - 1}")


def _check_finite(logits: Tensor, cache: Any) -> None:
    for name, activation in (("logits", logits), *cache.items()):
        if not bool(activation.isfinite().all()):
            raise ReflowlensError(f"{name} of this prompt are not all finite: what is NaN or infinite has no parts")


def _upstream(replacement: Replacement, asked: list[Asked]) -> Replacement:
    """Without what none of the targets reads: all behind the last of them, and of the block that this one reads in the
    middle of the units that are no targets."""
    passed, is_middle = max(target.passed for target in asked)
    here = slice(passed + is_middle)
    units, written = list(replacement.units[here]), list(replacement.written[here])
    if is_middle:
        features = [target for target in asked if isinstance(target, FeatureAt) and target.layer == passed]
        chosen = {(target.index, target.position) for target in features}
        places = zip(units[passed].index.tolist(), units[passed].position.tolist(), strict=True)
        kept = torch.tensor([i for i, place in enumerate(places) if place in chosen], dtype=torch.long)
        units[passed], last = units[passed][kept], written[passed]
        own = {source: vectors[kept] if source == passed else vectors for source, vectors in last.by_units.items()}
        written[passed] = replace(last, by_units=own)
    return Replacement(replacement.kind, units, written, replacement.heads[here])


def _edges_per_node(n_edges: int, n_targets: int, asked: int | None, memory: float) -> int | None:
    if asked is not None:
        return whole_number(asked, "edges_per_node", 1)
    if BYTES_AN_EDGE * n_edges <= memory:
        return None
    fits = int(memory / BYTES_AN_EDGE / n_targets)
    if fits < _FEWEST_EDGES:
        needed = BYTES_AN_EDGE * n_targets * _FEWEST_EDGES
        raise ReflowlensError(
            f"this graph has {n_targets:,} targets, and memory={memory:.3g} bytes hold {fits} edges of each: give "
            f"{needed:.3g} or more, a shorter prompt, or fewer neurons"
        )
    return fits
