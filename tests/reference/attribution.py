"""Attribution graphs the plain way: the whole frozen model by autograd, one backward pass a target, everything dense.

Attention patterns, norm scales and gates are detached; what an MLP writes is replaced by leaves: activations times
decoders, the error, and the parameters of biases. Where heads are nodes, so is what each head writes. Everything is of
degree one in its leaves, so that an edge is a leaf times its gradient, and a target the sum of its edges.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reflowlens.dictionaries.dictionary import Dictionary
from reflowlens.models.decoder import Decoder

HELD = (".hook_scale", "hook_pattern", "hook_z", "ln2.hook_normalized", "hook_mlp_out", "mlp.hook_pre", "mlp.hook_post")
POINTS_OF_LEVELS = ("resid_pre", "attn_scores", "attn_out", "x_sparse", "xy_sparse", "mlp_out")
INPUTS = {
    "hook_recipe": "signal", "hook_embed": "embedding", "hook_pos_embed": "position", "bigram.hook_bigram": "bigram",
    "values.hook_token_values": "token_value",
}  # fmt: skip
Leaves = dict[tuple[Any, ...], Tensor]


class Frozen:
    """A run of the frozen model: its leaves, and its targets before any backward pass.

    ``leaves``: ("embedding",), ("position",), ("signal",), ("error", block), ("unit", block) [pos, unit], ("readout",),
    ("head", block) [pos, head, d_model], and the parameters of biases ("bias", block, name). ``units`` [pos, unit] of
    each block, ``chosen`` which are nodes, ``heads`` [pos, head] the norms of what heads write, ``streams``
    [pos, d_model] by their points.
    """

    n_refiners = 0  # blocks behind the last

    def __init__(
        self,
        model: Any,
        tokens: Tensor,
        dictionary: Dictionary | None,
        neurons: int = 8,
        signals: bool = False,
        heads: bool = False,
    ) -> None:
        self.model, self.dictionary, self.neurons, self.signals = model, dictionary, neurons, signals
        self.leaves: Leaves = {}
        self.units: dict[int, Tensor] = {}
        self.chosen: dict[int, Tensor] = {}
        self.parameters = {name: p for name, p in model.named_parameters() if ".b" in name and not name.endswith("w")}
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        _, self.cache = model.run_with_cache(tokens[None], names_filter=lambda name: name.endswith(HELD))
        hooks: list[tuple[str, Any]] = [("hook_recipe" if signals else "hook_embed", self._leaf)]
        if "hook_pos_embed" in model.hook_dict:
            hooks.append(("hook_pos_embed", self._leaf))
        if signals:
            hooks.append(("unembed.hook_signal", self._read_out))
        hooks += [(name, self._hold) for name in model.hook_dict if name.endswith(("hook_scale", "hook_pattern"))]
        for block in range(model.cfg.n_layers):
            hooks.append((f"blocks.{block}.ln2.hook_normalized", self._read))
            hooks.append((f"blocks.{block}.hook_mlp_out", self._write))
            if dictionary is None:
                inner = "hook_pre_linear" if model.cfg.gated_mlp else "hook_pre"
                hooks.append((f"blocks.{block}.mlp.{inner}", self._read_neurons))
            if heads:
                hooks.append((f"blocks.{block}.attn.hook_result", self._write_heads))
            hooks += [(name, self._record) for name in streams_of(block) if name in model.hook_dict]
        hooks += self._own_hooks()
        self.heads: dict[int, Tensor] = {}
        self.streams: dict[str, Tensor] = {}
        self.reads: dict[int, Tensor] = {}
        with torch.enable_grad():
            if isinstance(model, Decoder) and model.unembed.cap is not None:
                hooks.append(("unembed.hook_logits_pre_cap", self._record))
            logits = model.run_with_hooks(tokens[None], fwd_hooks=hooks)[0]
            self.logits = self.streams.get("unembed.hook_logits_pre_cap", logits)[-1]

    def _own_hooks(self) -> list[tuple[str, Any]]:
        """Of an architecture."""
        return []

    def _leaf(self, x: Tensor, hook: Any) -> Tensor:
        kind = INPUTS[hook.name]
        self.leaves[(kind,)] = x[0].detach().requires_grad_()
        return self.leaves[(kind,)][None]

    def _read_out(self, x: Tensor, hook: Any) -> Tensor:
        self.readout = x[0, -1]
        leaf = x.detach().requires_grad_()
        self.leaves[("readout",)] = leaf
        return leaf

    def _write_heads(self, x: Tensor, hook: Any) -> Tensor:
        block = self.model.blocks[hook.layer()]
        z, scale = self.cache[f"blocks.{hook.layer()}.attn.hook_z"][0], getattr(block, "w_attn", torch.ones(()))
        leaf = torch.einsum("phe,hed->phd", z, block.attn.W_O).detach().requires_grad_()
        added, now = (self.behind("ln1_post", hook.layer(), scale * each) for each in (leaf.detach(), x[0]))
        self.heads[hook.layer()] = (now * added / added.norm(dim=-1, keepdim=True).clamp(min=1e-30)).sum(-1)
        self.leaves["head", hook.layer()] = leaf
        return leaf[None]

    def _record(self, x: Tensor, hook: Any) -> None:
        self.streams[hook.name] = x[0]

    def _hold(self, x: Tensor, hook: Any) -> Tensor:
        return self.cache[hook.name].detach()

    def _read(self, x: Tensor, hook: Any) -> None:
        self.reads[hook.layer()] = x[0]
        if self.dictionary is not None:
            layer = self.dictionary.each_layer()[hook.layer()]
            layer.b_enc.requires_grad_(True)
            self.parameters[f"blocks.{hook.layer()}.dictionary.b_enc"] = layer.b_enc
            before, after = layer.preactivations(x[0]), layer.encode(self.cache[hook.name][0]).detach()
            self._units(hook.layer(), before, after, after > 0)

    def _read_neurons(self, x: Tensor, hook: Any) -> None:
        block = hook.layer()
        value = x[0]
        if self.model.cfg.gated_mlp:
            value = self.model.blocks[block].mlp.act(self.cache[f"blocks.{block}.mlp.hook_pre"][0]).detach() * value
        after = self.cache[f"blocks.{block}.mlp.hook_post"][0]
        writes = self.behind("ln2_post", block, self._writes(block), divided=False)
        self._units(block, value, after, self._strongest(after, writes))

    def _units(self, block: int, value: Tensor, after: Tensor, chosen: Tensor) -> None:
        self.units[block], self.chosen[block] = value, chosen
        self.leaves["unit", block] = (after * chosen).detach().requires_grad_()

    def _write(self, y: Tensor, hook: Any) -> Tensor:
        block = hook.layer()
        out = self._written(block)
        self.leaves["error", block] = (self.cache[hook.name][0] - out).detach().requires_grad_()
        return (out + self.leaves["error", block])[None]

    def _writes(self, block: int) -> Tensor:
        scale = getattr(self.model.blocks[block], "w_mlp", torch.ones(()))
        return (self.model.blocks[block].mlp.W_out * scale).detach()

    def _written(self, block: int) -> Tensor:
        if self.dictionary is None:
            mlp = self.model.blocks[block].mlp
            out = self.behind("ln2_post", block, self.leaves["unit", block] @ self._writes(block))
            return out if mlp.b_out is None else out + mlp.b_out
        layers, cfg = self.dictionary.each_layer(), self.dictionary.cfg
        layers[block].b_dec.requires_grad_(True)
        self.parameters[f"blocks.{block}.dictionary.b_dec"] = layers[block].b_dec
        out = layers[block].b_dec.expand(len(self.reads[block]), -1)
        for source in range(block + 1) if cfg.cross_layer else [block]:
            out = out + self.leaves["unit", source] @ layers[source].W_dec[:, block - source]
        if cfg.skip:
            out = out + self.reads[block] @ layers[block].W_skip.T
        return out

    def behind(self, norm: str, block: int, x: Tensor, at: Any = slice(None), divided: bool = True) -> Tensor:
        """What an RMSNorm behind attention or MLP, if there is one, makes of it, its divisor held."""
        module = getattr(self.model.blocks[block], norm, None)
        if module is None:
            return x
        scale = self.cache[f"blocks.{block}.{norm}.hook_scale"][0, at] if divided else torch.ones(1)
        return x * module.w.detach() / (scale[:, None] if x.ndim > 2 else scale)

    def _strongest(self, after: Tensor, writes: Tensor) -> Tensor:
        size = after.abs() * writes.norm(dim=1)
        return size >= size.sort(dim=1, descending=True).values[:, self.neurons - 1, None].clamp(min=1e-30)

    def edges(self, target: Tensor) -> dict[tuple[Any, ...], Tensor]:
        """By kind of leaf what each adds to a scalar target: of a vector all of it, of biases all of a block's."""
        names, tensors = zip(*(*self.leaves.items(), *self.parameters.items()), strict=True)
        gradients = torch.autograd.grad(target, tensors, retain_graph=True, allow_unused=True)
        n_blocks, found = self.model.cfg.n_layers + self.n_refiners, {}
        biases = torch.zeros(n_blocks + 1)
        for name, leaf, gradient in zip(names, tensors, gradients, strict=True):
            product = torch.zeros_like(leaf) if gradient is None else (leaf * gradient).detach()
            if isinstance(name, str):
                biases[int(name.split(".")[1]) if name.startswith("blocks.") else n_blocks] += product.sum()
            elif name[0] == "constant":
                biases[name[1]] += product.sum()
            else:
                whole = ("unit", "signal", "readout")
                found[name] = product if name[0] in whole else product.flatten(2 if name[0] == "head" else 1).sum(-1)
        return found | {("bias",): biases}


def streams_of(block: int) -> list[str]:
    parts = ("hook_resid_pre", "ln1.hook_normalized", "hook_resid_mid", "ln2.hook_normalized", "hook_resid_post")
    return [f"blocks.{block}.{part}" for part in parts]


class FrozenTTTFlow(Frozen):
    """The same of a TTTFlow, whose refiners are two blocks more, read at the last position.

    The inner learner is written out as attention without softmax over all tokens so far, from the W and c that a text
    begins with: ẑ_t = q_t W₁ + c₁ − η Σ_s (1 + q_t · k_s) G_s, of which k_s and G_s are held.
    """

    n_refiners = 2

    def __init__(self, model: Any, tokens: Tensor, *args: Any, heads: bool = False, **options: Any) -> None:
        self.as_heads = heads
        _, self.full = model.run_with_cache(tokens[None], names_filter=lambda name: True)
        super().__init__(model, tokens, *args, heads=heads, **options)
        self.logits = self.uncapped

    def _own_hooks(self) -> list[tuple[str, Any]]:
        hooks: list[tuple[str, Any]] = [
            (name, self._leaf) for name in ("bigram.hook_bigram", "values.hook_token_values")
        ]
        hooks += [(name, lambda x, hook: self.full[hook.name]) for name in self.full if name.endswith("hook_excluded")]
        hooks += [("ln_final.hook_normalized", self._see), ("ttt.hook_delta", self._learn)]
        hooks += [("flow.hook_latent", self._see), ("flow.hook_delta", self._step)]
        return [*hooks, ("unembed.hook_logits_pre_cap", self._uncapped)]

    def _see(self, x: Tensor, hook: Any) -> None:
        self.seen = x[0, -1]

    def _uncapped(self, x: Tensor, hook: Any) -> None:
        self.uncapped = x[0, -1]

    def _constant(self, block: int, name: str, value: Tensor) -> Tensor:
        self.leaves["constant", block, name] = value.detach().clone().requires_grad_()
        return self.leaves["constant", block, name]

    def _learn(self, delta: Tensor, hook: Any) -> Tensor:
        ttt, block = self.model.ttt, self.model.cfg.n_layers
        n, n_heads = delta.shape[1], ttt.n_heads
        k = self.full["ttt.hook_k"][0]
        steps = [self.full[f"ttt.steps.{m}.hook_grad"][0] for m in range(-(-n // ttt.chunk))]
        G = torch.cat(steps, dim=1)
        q = (self.seen @ ttt.W_Q.detach()).view(n_heads, -1)
        outs = []
        for head in range(n_heads):
            learned = ttt.b_start[head] - ttt.rate * G[head].sum(0)
            z = q[head] @ ttt.W_start[head].detach() + self._constant(block, f"c{head}", learned)
            for s in range(n):
                z = z - ttt.rate * (q[head] @ k[s, head]) * G[head, s]
            divisor = (z.detach().var(correction=0) + 1e-6).sqrt()
            normal = ttt.w_inner[head].detach() * (z - z.mean()) / divisor
            outs.append(q[head] + normal + self._constant(block, f"b{head}", ttt.b_inner[head]))
        out = torch.stack(outs)
        divisor = (out.detach().var(correction=0) + 1e-5).sqrt()
        apart = torch.eye(n_heads)[:, :, None] * out  # each head with the others at 0
        normal = (apart.flatten(1) - apart.flatten(1).mean(1, keepdim=True)) / divisor * ttt.w_norm.detach()
        W_O = (ttt.gate.sigmoid() * ttt.W_O).detach()
        written = normal @ W_O
        if self.as_heads:
            unit = written.detach() / written.detach().norm(dim=1, keepdim=True)
            self.heads[block] = torch.cat([torch.zeros(n - 1, n_heads), (written * unit).sum(1)[None]])
            everywhere = torch.cat([torch.zeros(n - 1, *written.shape), written.detach()[None]])
            self.leaves["head", block] = everywhere.requires_grad_()
            written = everywhere[-1]
        self.leaves["error", block] = torch.zeros(n, delta.shape[2], requires_grad=True)
        last = written.sum(0) + self._constant(block, "norm", ttt.b_norm) @ W_O + self.leaves["error", block][-1]
        return torch.cat([delta[0, :-1].detach(), last[None]])[None]

    def _step(self, delta: Tensor, hook: Any) -> Tensor:
        flow, block = self.model.flow, self.model.cfg.n_layers + 1
        n, U = delta.shape[1], (flow.gate.sigmoid() * flow.W_up).detach()
        writes = flow.W_out.detach() @ U
        before = self.seen @ flow.W_in.detach() + self._constant(block, "in", flow.b_in)
        after = torch.nn.functional.gelu(before).detach()
        chosen = self._strongest(after[None], writes)[0] if self.dictionary is None else torch.zeros_like(after).bool()
        nothing = torch.zeros(n - 1, len(after))
        self._units(
            block,
            torch.cat([nothing, before[None]]),
            torch.cat([nothing, after[None]]),
            torch.cat([nothing.bool(), chosen[None]]),
        )
        missed = ((after * ~chosen) @ writes)[None]
        self.leaves["error", block] = torch.cat([torch.zeros(n - 1, delta.shape[2]), missed]).requires_grad_()
        last = self.seen @ U + self.leaves["unit", block][-1] @ writes + self.leaves["error", block][-1]
        last = last + self._constant(block, "out", flow.b_out) @ U
        return torch.cat([delta[0, :-1].detach(), last[None]])[None]


class FrozenBDH(Frozen):
    """The same of a BDH: first readings, attention scores and the divisors of all norms are constants."""

    def __init__(self, model: Any, tokens: Tensor, neurons: int = 8) -> None:
        self.model, self.neurons = model, neurons
        self.leaves, self.units, self.chosen, self.parameters, self.streams = {}, {}, {}, {}, {}
        _, self.cache = model.run_with_cache(tokens[None], names_filter=lambda name: True)
        embedding = self.leaves["embedding",] = self.cache["hook_embed"][0].detach().requires_grad_()
        shared = model.neurons
        reads, writes = shared.W_y.detach(), shared.W_out.detach().flatten(0, 1)
        x = self._norm(embedding, embedding)
        for level in range(model.cfg.n_layers):
            known = {part: self.cache[f"blocks.{level}.hook_{part}"][0].detach() for part in POINTS_OF_LEVELS}
            found = torch.einsum("hts,sd->thd", known["attn_scores"], x)
            before = torch.einsum("thd,hdn->thn", self._norm(found, known["attn_out"]), reads)
            after = known["xy_sparse"].flatten(1)
            value = (known["x_sparse"] * before).flatten(1)
            self._units(level, value, after, self._strongest(after, writes))
            out = self.leaves["unit", level] @ writes
            error = self.leaves["error", level] = (known["mlp_out"] - out).detach().requires_grad_()
            written = self._norm(out + error, known["mlp_out"])
            self.streams[f"blocks.{level}.hook_resid_pre"] = x
            x = self._norm(x + written, known["resid_pre"] + written)
            self.streams[f"blocks.{level}.hook_resid_post"] = x
        self.logits = x[-1] @ model.W_U.detach()

    def _norm(self, x: Tensor, at: Tensor) -> Tensor:
        """LayerNorm at the divisor of ``at``."""
        scale = (at.detach() - at.detach().mean(-1, keepdim=True)).pow(2).mean(-1, keepdim=True) + self.model.cfg.eps
        return (x - x.mean(-1, keepdim=True)) / scale.sqrt()
