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
    ``heads`` [pos, head] what each head writes along what it writes on the prompt; ``readout`` [signal] of the last
    position as the stream has it; ``logits`` of the last position.
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
        heads: bool = False,
    ) -> None:
        self.model, self.dictionary, self.factors, self.level, self.neurons = model, dictionary, factors, level, neurons
        self.signals = signals
        self.cache = model.run_with_cache(tokens[None], names_filter=lambda name: "basis" not in name)[1]
        self.units: dict[int, Tensor] = {}
        self.reads: dict[int, Tensor] = {}
        self.features: dict[int, Tensor] = {}
        self.heads: dict[int, Tensor] = {}
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
            if heads:
                hooks.append((f"blocks.{block}.attn.hook_z", self._set_heads))
        with torch.no_grad():
            if model.unembed.cap is not None:
                hooks.append(("unembed.hook_logits_pre_cap", self._see_logits))
            logits = model.run_with_hooks(tokens[None], fwd_hooks=hooks)
            self.logits = (logits if model.unembed.cap is None else self.before_cap)[0, -1]

    def _see_logits(self, x: Tensor, hook: Any) -> None:
        self.before_cap = x

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

    def _set_heads(self, z: Tensor, hook: Any) -> Tensor:
        block, first = hook.layer(), self.cache[hook.name][0]
        W_O = self.model.blocks[block].attn.W_O
        before, after = (self._behind("ln1_post", block, torch.einsum("phe,hed->phd", x, W_O)) for x in (first, z[0]))
        self.heads[block] = (before * after).sum(-1) / before.norm(dim=-1)
        z = first.clone() if self.level == "direct" else z[0].clone()
        return self._set_units("head", block, z, first)[None]

    def _behind(self, norm: str, block: int, x: Tensor) -> Tensor:
        """What an RMSNorm behind attention or MLP, if there is one, makes of it, its divisor that of the prompt."""
        module = getattr(self.model.blocks[block], norm, None)
        if module is None:
            return x
        scale = self.cache[f"blocks.{block}.{norm}.hook_scale"][0]
        return x * module.w / (scale[:, None] if x.ndim > 2 else scale)

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
        writes, norm = self.model.blocks[block].mlp.W_out, getattr(self.model.blocks[block], "ln2_post", None)
        size = after.abs() * (writes if norm is None else writes * norm.w).norm(dim=1)
        return size >= size.sort(dim=1, descending=True).values[:, self.neurons - 1, None]

    def _neuron_error(self, block: int) -> Tensor:
        after = self.cache[f"blocks.{block}.mlp.hook_post"][0]
        return self._behind("ln2_post", block, (after * ~self._chosen(block)) @ self.model.blocks[block].mlp.W_out)

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


class PerformedBDH:
    """The same in a BDH, whose levels are written out: ``units`` [pos, neuron] x_sparse · y_pre of each level."""

    def __init__(self, model: Any, tokens: Tensor, factors: dict[Node, float], level: str, neurons: int = 8) -> None:
        self.model, self.factors, self.level, self.neurons = model, factors, level, neurons
        self.positions = torch.arange(len(tokens))
        self.units: dict[int, Tensor] = {}
        with torch.no_grad():
            first: list[dict[str, Tensor]] = []
            self._run(tokens, first, None)
            stream = self._run(tokens, [], first)
            self.logits = stream[-1] @ model.W_U

    def _run(self, tokens: Tensor, kept: list[dict[str, Tensor]], first: list[dict[str, Tensor]] | None) -> Tensor:
        shared, eps = self.model.neurons, self.model.cfg.eps
        frozen = first is not None and self.level in ("direct", "constrained")

        def divided(x: Tensor, by: Tensor) -> Tensor:
            """LayerNorm of x by the divisor of another."""
            return (x - x.mean(-1, keepdim=True)) / (by.var(-1, keepdim=True, correction=0) + eps).sqrt()

        x = self.model.embed.W_E[tokens]
        x = divided(x, x)
        for (kind, _, position, _), factor in (self.factors if first else {}).items():
            if kind == "embedding":
                x[position] *= factor
        for level in range(self.model.cfg.n_layers):
            now: dict[str, Tensor] = {"x": x}
            then = first[level] if first else now
            now["gate"] = torch.einsum("pd,hdn->phn", x, shared.W_x).relu()
            turned = shared.turn(now["gate"][None], slice(0, len(tokens)))[:, 0]
            now["scores"] = torch.einsum("hqn,hkn->hqk", turned, turned).tril(-1)
            gate, scores = (then if frozen else now)["gate"], (then if frozen else now)["scores"]
            now["found"] = torch.einsum("hqk,kd->qhd", scores, x)
            a = divided(now["found"], (then if frozen else now)["found"])
            before = torch.einsum("phd,hdn->phn", a, shared.W_y)
            now["written"] = (gate * before.relu()).flatten(1)
            self.units[level] = (gate * before).flatten(1)
            written = self._changed(level, now["written"], then["written"]) if first else now["written"]
            now["out"] = written @ shared.W_out.flatten(0, 1)
            for (kind, block, position, _), factor in (self.factors if first else {}).items():
                if (kind, block) == ("error", level):
                    error = (then["written"] * ~self._chosen(then["written"]))[position] @ shared.W_out.flatten(0, 1)
                    now["out"][position] += (factor - 1) * error
            out = divided(now["out"], (then if frozen else now)["out"])
            now["sum"] = x + out
            x = divided(now["sum"], (then if frozen else now)["sum"])
            kept.append(now)
        return x

    def _chosen(self, written: Tensor) -> Tensor:
        size = written.abs() * self.model.neurons.W_out.flatten(0, 1).norm(dim=1)
        return (size >= size.sort(dim=1, descending=True).values[:, self.neurons - 1, None]) & (size > 0)

    def _changed(self, level: int, now: Tensor, then: Tensor) -> Tensor:
        answer = now.clone()
        if self.level == "direct":
            answer = then.clone()
        elif self.level != "model":
            answer = torch.where(self._chosen(then), now, then)
        for (kind, block, position, index), factor in self.factors.items():
            if (kind, block) == ("neuron", level):
                answer[position, index] = factor * then[position, index]
        return answer
