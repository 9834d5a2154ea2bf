"""Changes performed in a decoder with attention heads and MLPs, with a dictionary in the place of these or without."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from reflowlens.circuits.attribution.linear.replacement import blocks_of, head_writes
from reflowlens.circuits.attribution.performed.changed_pass import Change, Hooks, Level, Pass, held
from reflowlens.circuits.attribution.traced import Traced
from reflowlens.models.components import Block

if TYPE_CHECKING:
    from reflowlens.circuits.attribution.graph import AttributionGraph


HELD = ("ln1.hook_scale", "attn.hook_pattern", "ln1_post.hook_scale", "ln2.hook_scale", "ln2_post.hook_scale")


class DecoderPass(Pass):
    """Of features, neurons, heads, errors, and inputs, signals of recipes and readouts among them."""

    def __init__(self, graph: AttributionGraph, traced: Traced, changes: Sequence[Change], level: Level) -> None:
        super().__init__(graph, traced, changes, level)
        self.blocks = [] if traced.dictionary is None else blocks_of(traced.dictionary)
        self.layers = [] if traced.dictionary is None else list(traced.dictionary.each_layer())
        self.changed: dict[int, Tensor] = {}  # by layer of the dictionary, the change of its features
        self.read: dict[int, Tensor] = {}

    def hooks(self, n_blocks: int) -> Hooks:
        hooks: Hooks = []
        gated = bool(self.traced.model.cfg.gated_mlp)
        for kind, name in (("embedding", "hook_embed"), ("position", "hook_pos_embed")):
            if (kind, -1) in self.set:
                hooks.append((name, self.set_vectors(kind)))
        if ("signal", -1) in self.set:
            hooks.append(("hook_recipe", self._set_recipes))
        for block in range(n_blocks):
            name = f"blocks.{block}"
            if self.is_frozen:
                points = [f"{name}.{point}" for point in HELD]
                hooks += [(point, held) for point in points if point in self.traced.model.hook_dict]
            if block >= self.n_units:
                continue  # read by directions, and by nothing else
            if self.replacement.heads:
                hooks.append((f"{name}.attn.hook_z", self._set_heads(block)))
            if block in self.blocks:
                hooks.append((f"{name}.ln2.hook_normalized", self._encode(block)))
            if self.traced.dictionary is None:
                if not gated:
                    hooks.append((f"{name}.mlp.hook_pre", self._read_neurons(block)))
                elif self.is_frozen:
                    hooks.append((f"{name}.mlp.hook_pre", held))
                hooks.append((f"{name}.mlp.hook_post", self._set_neurons(block, gated)))
            hooks.append((f"{name}.hook_mlp_out", self._write(block)))
        return hooks

    def logits(self, stream: Float[Tensor, "row 1 d_model"]) -> Float[Tensor, "row d_vocab"]:
        """The model's, by way of the signals of the readout where these are nodes."""
        model, nodes = self.traced.model, self.graph.nodes
        with model.hooks([("ln_final.hook_scale", held)]) if self.is_frozen else contextlib.nullcontext():
            x = model.ln_final(stream)
        if self.end.signals is None:
            return model.unembed.readout(x, model.tied_weights())._replace(cap=None).logits()[:, 0]
        recipe, basis = model.tied_weights()
        signals = x[:, 0] @ basis.T
        numbers = np.flatnonzero(nodes["kind"] == "readout")
        self.found[:, numbers] = signals[:, nodes["feature"].to_numpy()[numbers].astype(int)]
        if self.level == "direct":
            signals = signals[:1].repeat(len(signals), 1)
        if ("readout", self.n_units) in self.set:
            row, _, unit, by = self.set["readout", self.n_units]
            signals[row, unit] = signals[0, unit] + by
        return signals @ recipe.T

    def _set_recipes(self, x: Float[Tensor, "row pos signal"], hook: Any) -> Tensor:
        row, position, unit, by = self.set["signal", -1]
        x = x.clone()
        x[row, position, unit] += by
        return x

    def _set_heads(self, block: int) -> Callable[..., Tensor]:
        """A head writes its activation times a unit vector, along which it is read off, too."""
        units = self.replacement.heads[block].units
        W_O = head_writes(cast(Block, self.traced.model.blocks[block]))
        size = len(self.traced.tokens), len(W_O)
        written = torch.einsum("ud,ued->ue", units.rows, W_O[units.index])

        def hook(z: Float[Tensor, "row pos head d_head"], hook: Any) -> Tensor:
            # Of the unchanged run what is read is what was written: a norm behind heads divides by the same.
            along = written * (units.value / (z[0, units.position, units.index] * written).sum(-1))[:, None]
            read = z.new_zeros(len(z), *size)
            read[:, units.position, units.index] = (z[:, units.position, units.index] * along).sum(-1)
            self.note("head", block, read)
            answer = z[:1].repeat(len(z), 1, 1, 1) if self.level == "direct" else z.clone()
            if ("head", block) in self.set:
                row, position, head, by = self.set["head", block]
                first = z[0, position, head]
                answer[row, position, head] = first * (1 + by / read[0, position, head])[:, None]
            return answer

        return hook

    def _encode(self, block: int) -> Callable[..., None]:
        number = self.blocks.index(block)
        layer = self.layers[number]

        def hook(x: Tensor, hook: Any) -> None:
            before = layer.preactivations(x)
            features = layer.activate(before)
            self.note("feature", block, before)
            self.read[block] = x
            answer = features[:1].expand_as(features) if self.level == "direct" else features
            base = features if self.level == "model" else features[:1]
            self.changed[number] = self.with_settings("feature", block, answer, features[0]) - base

        return hook

    def _read_neurons(self, block: int) -> Callable[..., None]:
        return lambda x, hook: self.note("neuron", block, x)

    def _set_neurons(self, block: int, gated: bool) -> Callable[..., Tensor]:
        def hook(x: Tensor, hook: Any) -> Tensor:
            if gated:
                self.note("neuron", block, x)
            return self.neurons(block, x)

        return hook

    def _write(self, block: int) -> Callable[..., Tensor]:
        def hook(y: Tensor, hook: Any) -> Tensor:
            if self.traced.dictionary is not None:
                y = y.clone() if self.level == "model" else y[:1].repeat(len(y), 1, 1)
                if block in self.blocks:
                    y += self._changes_written(self.blocks.index(block), block)
            return self.with_errors(block, y)

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
