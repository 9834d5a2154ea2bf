"""What writes into the outputs of MLPs, features of a dictionary or neurons: how strongly, and for which tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from analyses.features.layers import unembedding_of
from analyses.units.points import written_by
from reflowlens.circuits.attribution.linear.refiners import flow_writes
from reflowlens.circuits.attribution.linear.replacement import blocks_of, neuron_writes
from reflowlens.dictionaries.dictionary import Dictionary
from reflowlens.models.base import HookedModel
from reflowlens.models.refined_block import RefinedBlock
from reflowlens.models.ttt_flow import TTTFlow


@dataclass(frozen=True)
class Writers:
    """The features of a transcoder, or, without one, the neurons of a decoder's MLPs or a BDH's levels, by block.

    Of a TTTFlow the refiners are two blocks more: the inner learner, which has none, and the flow step's neurons.

    Args:
        points: of each block the hook point from which activations are read.
        decoders: of each block what its units write at activation 1, into its own MLP's output and, if cross-layer,
            into each later one: [unit, reach, d_model]; no units of a block that a dictionary lacks.
        unembedding: by which tokens are read off the stream behind the final norm's division.
    """

    model: HookedModel
    dictionary: Dictionary | None
    points: Sequence[str]
    decoders: Sequence[Float[Tensor, "unit reach d_model"]]
    unembedding: Float[Tensor, "token d_model"]

    @classmethod
    @torch.no_grad()
    def of(cls, model: HookedModel, dictionary: Dictionary | None) -> Writers:
        blocks, unembedding = range(model.cfg.n_layers), unembedding_of(model)
        if dictionary is None and isinstance(model, TTTFlow):
            points, writes = _of_refined(model)
            return cls(model, None, points, [each[:, None] for each in writes], unembedding)
        if dictionary is None:
            kind = "hook_xy_sparse" if "hook_xy_sparse" in model.units else "mlp.hook_post"
            points = [f"blocks.{block}.{kind}" for block in blocks]
            weights = [model.get_parameter(str(written_by(model, point))).detach() for point in points]
            return cls(model, None, points, [weight.flatten(0, -2)[:, None] for weight in weights], unembedding)
        points = [f"blocks.{block}.ln2.hook_normalized" for block in blocks]
        own = dict(zip(blocks_of(dictionary), dictionary.each_layer(), strict=True))
        none = torch.zeros(0, 1, dictionary.cfg.d_out, device=model.cfg.device)
        decoders = [own[block].W_dec.detach() if block in own else none for block in blocks]
        return cls(model, dictionary, points, decoders, unembedding)

    def activations(self, block: int, read: Float[Tensor, "pos *d"]) -> Float[Tensor, "pos unit"]:
        """Of a block's units, from what is at its point."""
        if self.dictionary is None:
            return read.flatten(1) if len(self.decoders[block]) else read.new_zeros(len(read), 0)
        blocks = blocks_of(self.dictionary)
        if block not in blocks:
            return read.new_zeros(len(read), 0)
        return self.dictionary.each_layer()[blocks.index(block)].encode(read)

    def norms(self, block: int) -> Float[Tensor, " unit"]:
        """Of what each unit of a block writes at activation 1, over all blocks."""
        return self.decoders[block].flatten(1).norm(dim=1)

    def written(
        self, block: Int[Tensor, " unit"], index: Int[Tensor, " unit"], activation: Float[Tensor, " unit"]
    ) -> Float[Tensor, "unit block d_model"]:
        """What some units write into the MLP output of every block."""
        n_blocks = len(self.decoders)
        found = activation.new_zeros(len(block), n_blocks, self.model.cfg.d_model)
        reached = range(n_blocks) if self.dictionary is None else blocks_of(self.dictionary)
        for row, (own, unit) in enumerate(zip(block.tolist(), index.tolist(), strict=True)):
            decoder = self.decoders[own][unit]
            later = [other for other in reached if other >= own][: len(decoder)]
            found[row, later] = activation[row] * decoder
        return found

    def promoted(self, written: Float[Tensor, "n block d_model"], k: int) -> Int[Tensor, "n k"]:
        """The k tokens whose logits rise most by what is written, on the direct path alone."""
        return (written.sum(1) @ self.unembedding.T).topk(min(k, len(self.unembedding))).indices

    @torch.no_grad()
    def largest(self, texts: Sequence[str]) -> list[Float[Tensor, " unit"]]:
        """Of each block's units the activation of the largest size in some texts, with its sign.

        The first position of a text, which sees nothing before it, does not count.
        """
        found = [decoder.new_zeros(len(decoder)) for decoder in self.decoders]
        for text in texts:
            ids = (self.model.text_start() + self.model.tokenizer.encode(text))[: self.model.cfg.n_ctx]
            tokens = torch.tensor([ids], device=self.model.cfg.device)
            cache = self.model.run_with_cache(tokens, names_filter=list(self.points), return_type=None)[1]
            for block, point in enumerate(self.points):
                activations = self.activations(block, cache[point][0, 1:])
                for end in (activations.amax(0), activations.amin(0)) if len(activations) else ():
                    found[block] = torch.where(end.abs() > found[block].abs(), end, found[block])
        return found


def _of_refined(model: TTTFlow) -> tuple[list[str], list[Float[Tensor, "unit d_model"]]]:
    """Of each block, refiners among them, where its units are read, and what they write."""
    blocks = cast("list[RefinedBlock]", list(model.blocks))
    points, writes = [f"blocks.{block}.mlp.hook_post" for block in range(len(blocks))], list(map(neuron_writes, blocks))
    if model.ttt is not None:
        points, writes = [*points, "ttt.hook_delta"], [*writes, writes[0][:0]]
    if model.flow is not None:
        points, writes = [*points, "flow.hook_flow_post"], [*writes, flow_writes(model.flow)]
    return points, writes
