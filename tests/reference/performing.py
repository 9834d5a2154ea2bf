"""Nodes of a graph set by plain hooks, one prompt and one intervention a pass: what performing a graph has to equal.

Everything that is held is taken from a cache of the prompt, and what is written is put together anew.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reflowlens.dictionaries.dictionary import Dictionary

Node = tuple[str, int, int, int]  # kind, block, position, number


class Performed:
    """A run with nodes at factors of their activation.

    ``units`` of each block [pos, unit]: pre-activations of features and ungated neurons, activations of gated ones;
    ``readout`` [signal] of the last position as the stream has it; ``logits`` of the last position.
    """

    def __init__(
        self,
        model: Any,
        tokens: Tensor,
        dictionary: Dictionary | None,
        factors: dict[Node, float],
        level: str,
        neurons: int = 8,
        signals: bool = False,
    ) -> None:
        self.model, self.dictionary, self.factors, self.level, self.neurons = model, dictionary, factors, level, neurons
        self.signals = signals
        self.cache = model.run_with_cache(tokens[None], names_filter=lambda name: "basis" not in name)[1]
        self.units: dict[int, Tensor] = {}
        self.reads: dict[int, Tensor] = {}
        self.features: dict[int, Tensor] = {}
        self.readout: Tensor | None = None
        hooks: list[tuple[str, Any]] = [("hook_embed", self._set_whole("embedding"))]
        if "hook_pos_embed" in model.hook_dict:
            hooks.append(("hook_pos_embed", self._set_whole("position")))
        if "hook_recipe" in model.hook_dict:
            hooks += [("hook_recipe", self._set_recipe), ("unembed.hook_signal", self._set_readout)]
        held = ("hook_scale", "hook_pattern") if level in ("direct", "constrained") else ()
        hooks += [(name, self._hold) for name in model.hook_dict if held and name.endswith(held)]
        for block in range(model.cfg.n_layers):
            if dictionary is not None:
                hooks.append((f"blocks.{block}.ln2.hook_normalized", self._encode))
            else:
                if held and model.cfg.gated_mlp:
                    hooks.append((f"blocks.{block}.mlp.hook_pre", self._hold))
                elif not model.cfg.gated_mlp:
                    hooks.append((f"blocks.{block}.mlp.hook_pre", self._read_neurons))
                hooks.append((f"blocks.{block}.mlp.hook_post", self._set_neurons))
            hooks.append((f"blocks.{block}.hook_mlp_out", self._write))
        with torch.no_grad():
            self.logits = model.run_with_hooks(tokens[None], fwd_hooks=hooks)[0, -1]

    def _hold(self, x: Tensor, hook: Any) -> Tensor:
        return self.cache[hook.name]

    def _set_whole(self, kind: str) -> Any:
        def hook(x: Tensor, hook: Any) -> Tensor:
            for (of, _, position, _), factor in self.factors.items():
                if of == kind:
                    x[0, position] *= factor
            return x

        return hook

    def _set_recipe(self, x: Tensor, hook: Any) -> Tensor:
        for (kind, _, position, signal), factor in self.factors.items():
            if kind == "signal":
                x[0, position, signal] *= factor
        return x

    def _set_readout(self, x: Tensor, hook: Any) -> Tensor:
        first = self.cache[hook.name]
        self.readout = x[0, -1].clone()
        if self.level == "direct" and self.signals:
            x = first.clone()
        for (kind, _, _, signal), factor in self.factors.items():
            if kind == "readout":
                x[0, -1, signal] = factor * first[0, -1, signal]
        return x

    def _set_units(self, kind: str, block: int, answer: Tensor, first: Tensor) -> Tensor:
        for (of, layer, position, index), factor in self.factors.items():
            if (of, layer) == (kind, block):
                answer[position, index] = factor * first[position, index]
        return answer

    def _encode(self, x: Tensor, hook: Any) -> None:
        block = hook.layer()
        layer = self.dictionary.each_layer()[block]
        first = layer.encode(self.cache[hook.name][0])
        self.reads[block], self.units[block] = x[0], layer.preactivations(x[0])
        answer = first.clone() if self.level == "direct" else layer.encode(x[0])
        self.features[block] = self._set_units("feature", block, answer, first)

    def _reconstructed(self, block: int, features: list[Tensor], x: Tensor) -> Tensor:
        return self.dictionary.reconstruct(block, features, x)

    def _write(self, y: Tensor, hook: Any) -> Tensor:
        block, out = hook.layer(), y[0]
        error = self._neuron_error(block)
        if self.dictionary is not None:
            layers = self.dictionary.each_layer()
            first = [self.cache[f"blocks.{b}.ln2.hook_normalized"][0] for b in range(len(layers))]
            before = [layer.encode(x) for layer, x in zip(layers, first, strict=True)]
            error = self.cache[hook.name][0] - self._reconstructed(block, before, first[block])
            changed = self._reconstructed(block, self.features, self.reads[block])
            if self.level == "model":
                natural = [layer.encode(self.reads[b]) for b, layer in enumerate(layers) if b in self.reads]
                out = y[0] + changed - self._reconstructed(block, natural, self.reads[block])
            else:
                out = changed + error
        for (kind, layer, position, _), factor in self.factors.items():
            if (kind, layer) == ("error", block):
                out[position] += (factor - 1) * error[position]
        return out[None]

    def _chosen(self, block: int) -> Tensor:
        after = self.cache[f"blocks.{block}.mlp.hook_post"][0]
        size = after.abs() * self.model.blocks[block].mlp.W_out.norm(dim=1)
        return size >= size.sort(dim=1, descending=True).values[:, self.neurons - 1, None]

    def _neuron_error(self, block: int) -> Tensor:
        after = self.cache[f"blocks.{block}.mlp.hook_post"][0]
        return (after * ~self._chosen(block)) @ self.model.blocks[block].mlp.W_out

    def _read_neurons(self, x: Tensor, hook: Any) -> None:
        self.units[hook.layer()] = x[0].clone()

    def _set_neurons(self, x: Tensor, hook: Any) -> Tensor:
        block, first = hook.layer(), self.cache[hook.name][0]
        if self.model.cfg.gated_mlp:
            self.units[block] = x[0].clone()
        answer = x[0]
        if self.level == "direct":
            answer = first.clone()
        elif self.level != "model":
            answer = torch.where(self._chosen(block), answer, first)
        return self._set_units("neuron", block, answer, first)[None]
