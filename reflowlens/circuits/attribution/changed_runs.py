"""Graphs performed: nodes set to a multiple of their activation in the model itself, and everything behind them read.

An edge says what a node adds under what the graph holds; whether the model does so is seen by doing it. What is held
meanwhile is one of

    direct        attention patterns, norm scales, gates, errors and all other nodes: what is left are the edges
    constrained   patterns, scales, gates and errors: later nodes answer, through their activation function
    free          errors: patterns, scales and gates are those of the changed stream
    model         nothing: MLPs compute what they compute, and with them the errors; a dictionary's features are changed
                  as by an intervention on ``dictionary.spliced(model)``

The first row of every batch is the prompt as it is, and what is held in the others is held at what it is there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from reflowlens.circuits.attribution.replacement import blocks_of
from reflowlens.circuits.attribution.traced import Traced, check_unhooked, traced_of
from reflowlens.errors import ReflowlensError
from reflowlens.interventions.passes import UNCOMPILED
from reflowlens.models.decoder import Decoder
from reflowlens.models.threads import changing
from reflowlens.out_of_memory import lower_if_it_does_not_fit
from reflowlens.sweeps.batching import in_batches

if TYPE_CHECKING:
    from reflowlens.circuits.attribution.graph import AttributionGraph

Level: TypeAlias = Literal["direct", "constrained", "free", "model"]

INPUT_POINTS = {"embedding": "hook_embed", "position": "hook_pos_embed", "signal": "hook_recipe"}
_SAME = 1e-3  # of the largest value, by which two passes of an unchanged model do not differ


class Place(NamedTuple):
    """Where an activation is: kind of node, block, position, and number of the feature, neuron or signal."""

    kind: str
    block: int
    position: int
    unit: int


@dataclass(frozen=True)
class Change:
    """What is done in one run.

    Args:
        by: by how much an activation is set above what it is on the prompt, of each place that is set.
        kept: by block, the features or neurons that are not removed [pos, unit]; those of other blocks all stay.
    """

    by: Mapping[Place, float]
    kept: Mapping[int, Bool[Tensor, "pos unit"]] | None = None


class Outcome(NamedTuple):
    """Of the prompt, in the first row, and of each change.

    Args:
        values: of all nodes; NaN of those that have none.
        logits: at the last position; of a graph of features none.
    """

    values: Float[np.ndarray, "row node"]
    logits: Float[np.ndarray, "row d_vocab"]


def performed(graph: AttributionGraph, changes: Sequence[Change], level: Level, memory: float | None = None) -> Outcome:
    """What becomes of the nodes and of the logits.

    Raises:
        ReflowlensError: as :func:`.performing.perform`, about the graph and the model.
    """
    traced = traced_of(graph)
    model = traced.model
    if not isinstance(model, Decoder):
        raise ReflowlensError(
            f"graphs are performed in decoders with attention heads and MLPs, and not in a {type(model).__name__} yet"
        )
    check_unhooked(model)

    def run(batch: list[Change]) -> tuple[Tensor, Tensor]:
        return _Pass(graph, traced, [Change({}), *batch], level).run()

    lower = "memory= of a batch, or the length of the prompt"
    with changing(model), torch.no_grad(), UNCOMPILED, lower_if_it_does_not_fit(lower):
        batches = [found for _, found in in_batches(changes, run, traced.tokens.device, memory)]
    _check_same(batches[0][0][0].double().cpu().numpy(), graph.nodes["value"].to_numpy())
    return Outcome(*(_joined([each.double().cpu().numpy() for each in parts]) for parts in zip(*batches, strict=True)))


def _joined(batches: Sequence[np.ndarray]) -> np.ndarray:
    """The prompt's row once, and the others as they differ from that of their batch, which is rounded alike."""
    first = batches[0][0]
    return np.concatenate([batches[0], *(batch[1:] + (first - batch[0]) for batch in batches[1:])])


def _check_same(values: Float[np.ndarray, " value"], expected: Float[np.ndarray, " value"]) -> None:
    differs = np.nanmax(np.abs(values - expected), initial=0.0)
    if not differs <= _SAME * np.nanmax(np.abs(expected), initial=1e-30):
        raise ReflowlensError(
            f"the model is not what it was when the graph was made: values differ by {differs:.3g}; make the graph anew"
        )


class _Pass:
    """A batch of runs, the first of which changes nothing."""

    def __init__(self, graph: AttributionGraph, traced: Traced, changes: Sequence[Change], level: Level) -> None:
        self.graph, self.traced, self.level, self.changes = graph, traced, level, changes
        self.replacement, self.end = traced.engine.replacement, traced.engine.end
        self.blocks = [] if traced.dictionary is None else blocks_of(traced.dictionary)
        self.layers = [] if traced.dictionary is None else list(traced.dictionary.each_layer())
        self.changed: dict[int, Tensor] = {}  # by layer of the dictionary, the change of its features
        self.read: dict[int, Tensor] = {}
        size = len(changes), len(graph.nodes)
        dtype = traced.model.ln_final.w.dtype
        self.found = torch.full(size, torch.nan, dtype=dtype, device=traced.tokens.device)
        places: dict[tuple[str, int], list[tuple[int, int, int, float]]] = {}
        for row, change in enumerate(changes):
            for place, by in change.by.items():
                places.setdefault(place[:2], []).append((row, place.position, place.unit, by))
        self.set = {key: _columns(entries, traced.tokens.device) for key, entries in places.items()}

    def run(self) -> tuple[Float[Tensor, "row node"], Float[Tensor, "row d_vocab"]]:
        """Values and logits."""
        model, n_blocks = self.traced.model, len(self.replacement.units)
        batch = self.traced.tokens.expand(len(self.changes), -1)
        stream = model.run_with_hooks(batch, fwd_hooks=self._hooks(n_blocks), stop_at_layer=n_blocks)
        if not self.end.targets.name:
            return self.found, stream.new_zeros(len(stream), 0)
        return self.found, self._read_out(stream[:, -1:])

    def _hooks(self, n_blocks: int) -> list[tuple[Any, Callable[..., Any]]]:
        hooks: list[tuple[Any, Callable[..., Any]]] = []
        gated = bool(self.traced.model.cfg.gated_mlp)
        for kind, name in INPUT_POINTS.items():
            if (kind, -1) in self.set:
                hooks.append((name, self._set_input(kind)))
        for block in range(n_blocks):
            name = f"blocks.{block}"
            if self.level in ("direct", "constrained"):
                hooks += [
                    (f"{name}.{point}", _held) for point in ("ln1.hook_scale", "attn.hook_pattern", "ln2.hook_scale")
                ]
            if block in self.blocks:
                hooks.append((f"{name}.ln2.hook_normalized", self._encode(block)))
            if self.traced.dictionary is None:
                if not gated:
                    hooks.append((f"{name}.mlp.hook_pre", self._read_neurons(block)))
                elif self.level in ("direct", "constrained"):
                    hooks.append((f"{name}.mlp.hook_pre", _held))
                hooks.append((f"{name}.mlp.hook_post", self._set_neurons(block, gated)))
            hooks.append((f"{name}.hook_mlp_out", self._write(block)))
        return hooks

    def _set_input(self, kind: str) -> Callable[..., Tensor]:
        def hook(x: Tensor, hook: Any) -> Tensor:
            row, position, unit, by = self.set[kind, -1]
            x = x.clone()
            if kind == "signal":
                x[row, position, unit] += by
            else:
                x[row, position] += by[:, None] * x[0, position]
            return x

        return hook

    def _encode(self, block: int) -> Callable[..., None]:
        number = self.blocks.index(block)
        layer = self.layers[number]

        def hook(x: Tensor, hook: Any) -> None:
            before = layer.preactivations(x)
            features = layer.activate(before)
            self._note("feature", block, before)
            self.read[block] = x
            answer = features[:1].expand_as(features) if self.level == "direct" else features
            base = features if self.level == "model" else features[:1]
            self.changed[number] = self._with_settings("feature", block, answer, features[0]) - base

        return hook

    def _read_neurons(self, block: int) -> Callable[..., None]:
        return lambda x, hook: self._note("neuron", block, x)

    def _set_neurons(self, block: int, gated: bool) -> Callable[..., Tensor]:
        units = self.replacement.units[block]

        def hook(x: Tensor, hook: Any) -> Tensor:
            if gated:
                self._note("neuron", block, x)
            answer = x
            if self.level != "model":
                answer = x[:1].repeat(len(x), 1, 1)
                if self.level != "direct":
                    answer[:, units.position, units.index] = x[:, units.position, units.index]
            return self._with_settings("neuron", block, answer, x[0])

        return hook

    def _with_settings(
        self, kind: str, block: int, activations: Float[Tensor, "row pos unit"], first: Float[Tensor, "pos unit"]
    ) -> Float[Tensor, "row pos unit"]:
        """Activations with those that are removed at zero, and those that are set as they are set."""
        activations = activations.clone()
        for number, change in enumerate(self.changes):
            if change.kept is not None and block in change.kept:
                activations[number] *= change.kept[block]
        if (kind, block) in self.set:
            row, position, unit, by = self.set[kind, block]
            activations[row, position, unit] = first[position, unit] + by
        return activations

    def _write(self, block: int) -> Callable[..., Tensor]:
        def hook(y: Tensor, hook: Any) -> Tensor:
            out = y
            if self.traced.dictionary is not None:
                out = y.clone() if self.level == "model" else y[:1].repeat(len(y), 1, 1)
                if block in self.blocks:
                    out += self._changes_written(self.blocks.index(block), block)
            if ("error", block) in self.set:
                row, position, _, by = self.set["error", block]
                out = out.clone()
                out[row, position] += by[:, None] * self.replacement.written[block].error[position]
            return out

        return hook

    def _changes_written(self, number: int, block: int) -> Float[Tensor, "row pos d_model"]:
        """What a layer of the dictionary writes more than on the prompt, or than it would of itself."""
        layer, x = self.layers[number], self.read[block]
        assert self.traced.dictionary is not None
        sources = range(number + 1) if self.traced.dictionary.cfg.cross_layer else [number]
        total = torch.zeros_like(x)
        for source in sources:
            change = self.changed[source]
            some = change.flatten(0, 1).any(dim=0).nonzero()[:, 0]
            total += change[..., some] @ self.layers[source].W_dec[some, number - source]
        if layer.W_skip is not None and self.level != "model":
            total += (x - x[:1]) @ layer.W_skip.T
        return total

    def _read_out(self, stream: Float[Tensor, "row 1 d_model"]) -> Float[Tensor, "row d_vocab"]:
        """The logits of the model at the last position, and the values of the nodes there."""
        model, nodes = self.traced.model, self.graph.nodes
        held = self.level in ("direct", "constrained")
        with model.hooks([("ln_final.hook_scale", _held)]) if held else contextlib.nullcontext():
            x = model.ln_final(stream)
        if self.end.signals is None:
            logits = model.unembed.readout(x, model.tied_weights()).logits()[:, 0]
        else:
            recipe, basis = model.tied_weights()
            signals = x[:, 0] @ basis.T
            numbers = np.flatnonzero(nodes["kind"] == "readout")
            self.found[:, numbers] = signals[:, nodes["feature"].to_numpy()[numbers].astype(int)]
            if self.level == "direct":
                signals = signals[:1].repeat(len(signals), 1)
            if ("readout", len(self.replacement.units)) in self.set:
                row, _, unit, by = self.set["readout", len(self.replacement.units)]
                signals[row, unit] = signals[0, unit] + by
            logits = signals @ recipe.T
        for number, name in nodes.loc[nodes["kind"] == "logit", "node"].items():
            token, *other = map(int, name.removeprefix("logit:").split("-"))
            self.found[:, number] = logits[:, token] - (logits[:, other[0]] if other else logits.mean(1))
        return logits

    def _note(self, kind: str, block: int, x: Float[Tensor, "row pos unit"]) -> None:
        """The values of a block's nodes."""
        nodes = self.graph.nodes
        number = np.flatnonzero((nodes["kind"] == kind) & (nodes["layer"] == block))
        position, index = (nodes[name].to_numpy()[number].astype(int) for name in ("pos", "feature"))
        self.found[:, number] = x[:, position, index]


def _held(x: Tensor, hook: Any) -> Tensor:
    """In all rows what it is in the first."""
    return x[:1].expand_as(x)


def _columns(entries: Iterable[tuple[int, int, int, float]], device: torch.device) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(column, device=device) for column in zip(*entries, strict=True))
