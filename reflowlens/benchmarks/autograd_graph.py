"""Attribution graphs by autograd, as circuit-tracer makes them: what `reflowlens bench graph` compares with.

A batch of targets at a time, in the order of the nodes, is pulled back through the frozen model by one backward pass
from the last block of the batch, over all positions, into a dense matrix of all nodes. In two ways:

- ``copies``: as circuit-tracer 0.5 does it. The model runs on 256 copies of the prompt, each of which takes the
  gradient of one target; edges are sums over the gradient, gathered for every feature, times its decoder.
- ``tuned``: the fastest that we found by autograd. The model runs on the prompt, the gradients of 64 targets are a
  batch of autograd (``is_grads_batched``), and edges are one matrix product a position.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from reflowlens.circuits.attribution.targets import logit_targets
from reflowlens.dictionaries.dictionary import Dictionary
from reflowlens.models.decoder import Decoder

BATCH = {"copies": 256, "tuned": 64}
_INPUTS = ("hook_embed", "hook_pos_embed")


@dataclass(frozen=True)
class DenseGraph:
    """Edges [target, source] and influence of inputs, errors by block, features by block and logits, in this order."""

    edges: Float[Tensor, "node node"]
    influence: Float[Tensor, " node"]


class _Frozen:
    """A run with patterns, norm scales and MLP outputs held, and what its nodes write and read.

    Args:
        dictionary: transcoders without a skip, a layer for every block.
    """

    def __init__(self, model: Decoder, tokens: Int[Tensor, " pos"], dictionary: Dictionary, way: str) -> None:
        n = model.cfg.n_layers
        self.model, self.way, self.n_positions = model, way, len(tokens)
        self.reads = [f"blocks.{block}.ln2.hook_normalized" for block in range(n)] + ["ln_final.hook_normalized"]
        self.inputs = [name for name in _INPUTS if name in model.hook_dict]
        self.outputs = [f"blocks.{block}.hook_mlp_out" for block in range(n)]
        logits, cache = model.run_with_cache(tokens[None], names_filter=self.reads[:n] + self.inputs + self.outputs)
        read = [cache[name][0] for name in self.reads[:n]]
        features, layers = dictionary.encode(read), dictionary.each_layer()
        self.logits = logits[0, -1]
        self.written = {name: cache[name][0] for name in self.inputs}
        self.active = [each.nonzero() for each in features]  # of each block positions and numbers, by position
        self.rows = [layer.W_enc[active[:, 1]] for layer, active in zip(layers, self.active, strict=True)]
        self.decoders: dict[tuple[int, int], Tensor] = {}  # by the block of the features and the one written to
        for block, output in enumerate(self.outputs):
            self.written[output] = cache[output][0] - dictionary.reconstruct(block, features, read[block])
            for source in range(block + 1) if dictionary.cfg.cross_layer else [block]:
                position, index = self.active[source].unbind(1)
                activation = features[source][position, index]
                self.decoders[source, block] = activation[:, None] * layers[source].W_dec[index, block - source]
        self._run(tokens.expand(BATCH[way] if way == "copies" else 1, -1))
        self.padded = {key: self._by_position(key[0], each) for key, each in self.decoders.items()}

    def _run(self, tokens: Int[Tensor, "copy pos"]) -> None:
        """Keep what targets read, and the leaves that their gradients are taken of."""
        self.leaves: dict[str, Tensor] = {}
        self.at: dict[str, Tensor] = {}

        def cut(x: Tensor, hook: Any) -> Tensor:
            self.leaves[hook.name] = x.detach().requires_grad_()
            return self.leaves[hook.name]

        def keep(x: Tensor, hook: Any) -> None:
            self.at[hook.name] = x

        held = [name for name in self.model.hook_dict if name.endswith(("hook_scale", "hook_pattern"))]
        hooks: list[tuple[str | Callable[..., Any], Callable[..., Any]]] = [
            (name, lambda x, hook: x.detach()) for name in held
        ]
        hooks += [(name, cut) for name in self.inputs + self.outputs] + [(name, keep) for name in self.reads]
        with torch.enable_grad():
            self.model.run_with_hooks(tokens, fwd_hooks=hooks, return_type=None)

    def _by_position(
        self, block: int, vectors: Float[Tensor, "source d_model"]
    ) -> tuple[Float[Tensor, "pos most d_model"], Tensor]:
        """Vectors with as many places at every position, and which of them are taken."""
        counts = self.active[block][:, 0].bincount(minlength=self.n_positions)
        taken = torch.arange(int(counts.max()))[None] < counts[:, None]
        return vectors.new_zeros(*taken.shape, vectors.shape[1]).masked_scatter(taken[..., None], vectors), taken

    def gradients(
        self, blocks: Int[Tensor, " target"], positions: Int[Tensor, " target"], rows: Float[Tensor, "target d_model"]
    ) -> dict[str, Float[Tensor, "target pos d_model"]]:
        """Of a batch of targets, with respect to inputs and to what the blocks before its last one write."""
        read, seeds = [], []
        for block in blocks.unique().tolist():
            x, here = self.at[self.reads[block]], (blocks == block).nonzero()[:, 0]
            seed = x.new_zeros(len(rows) if self.way == "tuned" else len(x), self.n_positions, x.shape[2])
            seed[here, positions[here]] = rows[here]
            read.append(x)
            seeds.append(seed[:, None] if self.way == "tuned" else seed)
        names = self.inputs + self.outputs[: int(blocks.max())]
        leaves = [self.leaves[name] for name in names]
        batched = {"is_grads_batched": self.way == "tuned", "allow_unused": True, "retain_graph": True}
        found = torch.autograd.grad(read, leaves, seeds, **batched)
        return {
            name: each[:, 0] if self.way == "tuned" else each[: len(rows)]
            for name, each in zip(names, found, strict=True)
        }

    def products(self, source: int, block: int, gradient: Float[Tensor, "target pos d_model"]) -> Tensor:
        """The edges [target, feature] from a block's features by what they write in another."""
        if self.way == "tuned":
            vectors, taken = self.padded[source, block]
            return torch.einsum("tpd,psd->tps", gradient, vectors)[:, taken]
        return torch.einsum("tsd,sd->ts", gradient[:, self.active[source][:, 0]], self.decoders[source, block])


@torch.no_grad()
def autograd_graph(model: Decoder, tokens: Int[Tensor, " pos"], dictionary: Dictionary, way: str) -> DenseGraph:
    """The graph of the likeliest tokens, by ``copies`` or ``tuned``."""
    frozen, n = _Frozen(model, tokens, dictionary, way), len(tokens)
    targets = logit_targets(model, frozen.logits, None, None, model.W_U.T)
    counts = [len(active) for active in frozen.active] + [len(targets.token)]
    starts = torch.tensor([n * len(frozen.written), *counts]).cumsum(0).tolist()
    first = {name: i * n for i, name in enumerate(frozen.written)}
    blocks = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    positions = torch.cat([*(active[:, 0] for active in frozen.active), torch.full((counts[-1],), n - 1)])
    rows = torch.cat([*frozen.rows, targets.vectors * model.ln_final.w])
    edges = rows.new_zeros(starts[-1], starts[-1])
    for start in range(0, len(rows), BATCH[way]):
        part = slice(start, start + BATCH[way])
        out = edges[starts[0] :][part]
        gradients = frozen.gradients(blocks[part], positions[part], rows[part])
        for name, gradient in gradients.items():
            out[:, first[name] : first[name] + n] = torch.einsum("tpd,pd->tp", gradient, frozen.written[name])
        for source, block in frozen.decoders:
            if frozen.outputs[block] in gradients:
                products = frozen.products(source, block, gradients[frozen.outputs[block]])
                out[:, starts[source] : starts[source + 1]] += products
    share = pad(targets.probability / targets.probability.sum(), (starts[-2], 0))
    return DenseGraph(edges, _influence(edges, share))


def _influence(edges: Float[Tensor, "node node"], share: Float[Tensor, " node"]) -> Float[Tensor, " node"]:
    """p (Â + Â² + …), for there are no constants in this matrix."""
    normalised = edges.abs()
    normalised /= normalised.sum(1, keepdim=True).clamp_min(1e-30)
    total = torch.zeros_like(share)
    while share.any():
        share = share @ normalised
        total += share
    return total
