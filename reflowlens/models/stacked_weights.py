"""Weights of all blocks as one tensor, under TransformerLens's names: ``model.W_Q``, ``model.b_O``, ``model.OV``.

Code that reads circuits off weights (TransformerLens's demos, ARENA's exercises) runs as it is. Keys and values that
query heads share stand there once a query head, and a bias that an architecture has not is zero, so that a formula
needs no case for either. Each access stacks the blocks' parameters anew; gradients reach these.
"""

from __future__ import annotations

from operator import attrgetter

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens import FactoredMatrix
from transformer_lens.utilities.matrix import composition_scores

from reflowlens.arguments import is_one_of
from reflowlens.config import ModelConfig
from reflowlens.errors import ReflowlensError

SHARED = ("attn.W_K", "attn.W_V", "attn.b_K", "attn.b_V")  # by the query heads of a group, one a key/value head


def per_query_head(weight: Float[Tensor, "kv_head *rest"], cfg: ModelConfig) -> Float[Tensor, "head *rest"]:
    """Keys' or values' parameters once a query head: head h reads key/value head h // (n_heads / kv_heads)."""
    return weight.repeat_interleave(cfg.n_heads // cfg.kv_heads, dim=0)


class StackedWeights:
    """What decoders have beside their parameters."""

    cfg: ModelConfig
    blocks: nn.ModuleList

    def _stacked(self, name: str) -> Tensor:
        weights = list(map(attrgetter(name), self.blocks))
        if name in SHARED:
            weights = [per_query_head(weight, self.cfg) for weight in weights]
        return torch.stack(weights)

    def _stacked_biases(self, name: str, *shape: int) -> Tensor:
        if attrgetter(name)(self.blocks[0]) is not None:
            return self._stacked(name)
        return attrgetter("attn.W_O")(self.blocks[0]).new_zeros(len(self.blocks), *shape)

    @property
    def W_Q(self) -> Float[Tensor, "layer head d_model d_head"]:
        """Queries."""
        return self._stacked("attn.W_Q")

    @property
    def W_K(self) -> Float[Tensor, "layer head d_model d_head"]:
        """Keys, once a query head."""
        return self._stacked("attn.W_K")

    @property
    def W_V(self) -> Float[Tensor, "layer head d_model d_head"]:
        """Values, once a query head."""
        return self._stacked("attn.W_V")

    @property
    def W_O(self) -> Float[Tensor, "layer head d_head d_model"]:
        """What heads write."""
        return self._stacked("attn.W_O")

    @property
    def W_in(self) -> Float[Tensor, "layer d_model d_mlp"]:
        """What the MLPs' neurons read; of a gated MLP the linear half."""
        return self._stacked("mlp.W_in")

    @property
    def W_gate(self) -> Float[Tensor, "layer d_model d_mlp"] | None:
        """What the gates of gated MLPs read; None where MLPs have none."""
        return self._stacked("mlp.W_gate") if self.cfg.gated_mlp else None

    @property
    def W_out(self) -> Float[Tensor, "layer d_mlp d_model"]:
        """What the MLPs' neurons write."""
        return self._stacked("mlp.W_out")

    @property
    def b_Q(self) -> Float[Tensor, "layer head d_head"]:
        """Queries' biases."""
        return self._stacked_biases("attn.b_Q", self.cfg.n_heads, self.cfg.d_head)

    @property
    def b_K(self) -> Float[Tensor, "layer head d_head"]:
        """Keys' biases, once a query head."""
        return self._stacked_biases("attn.b_K", self.cfg.n_heads, self.cfg.d_head)

    @property
    def b_V(self) -> Float[Tensor, "layer head d_head"]:
        """Values' biases, once a query head."""
        return self._stacked_biases("attn.b_V", self.cfg.n_heads, self.cfg.d_head)

    @property
    def b_O(self) -> Float[Tensor, "layer d_model"]:
        """What attention adds whatever it reads."""
        return self._stacked_biases("attn.b_O", self.cfg.d_model)

    @property
    def b_in(self) -> Float[Tensor, "layer d_mlp"]:
        """Biases of the MLPs' neurons; of a gated MLP those of the linear half."""
        return self._stacked_biases("mlp.b_in", self.cfg.d_mlp)

    @property
    def b_out(self) -> Float[Tensor, "layer d_model"]:
        """What the MLPs add whatever they read."""
        return self._stacked_biases("mlp.b_out", self.cfg.d_model)

    @property
    def QK(self) -> FactoredMatrix:
        """W_Q W_Kᵀ [layer, head, d_model, d_model]: the bilinear form of each head's attention scores.

        Rotary positions turn queries and keys in between: of such a model it is the score of two tokens at one
        position, times √d_head.
        """
        return FactoredMatrix(self.W_Q, self.W_K.transpose(-2, -1))

    @property
    def OV(self) -> FactoredMatrix:
        """W_V W_O [layer, head, d_model, d_model]: what a head writes of the stream that it attends to."""
        return FactoredMatrix(self.W_V, self.W_O)

    @property
    def all_head_labels(self) -> list[str]:
        """``["L0H0", "L0H1", ...]``, in the order of ``W_Q.flatten(0, 1)``."""
        return [f"L{layer}H{head}" for layer in range(self.cfg.n_layers) for head in range(self.cfg.n_heads)]

    def all_composition_scores(self, mode: str) -> Float[Tensor, "layer head later_layer later_head"]:
        """How much each later head reads of what each earlier one writes (Elhage et al., 2021).

        ``‖left right‖ / (‖left‖ ‖right‖)`` of the earlier head's OV and the later head's QK (mode ``"Q"``), its
        transpose (``"K"``) or OV (``"V"``), in Frobenius norms; 0 where the second head is not in a later layer. The
        norms between the blocks are left out, as in TransformerLens.

        Raises:
            ReflowlensError: the mode is none of the three.
        """
        if not is_one_of(mode, ("Q", "K", "V")):
            raise ReflowlensError(f"mode must be 'Q', 'K' or 'V', got {mode!r}")
        right = {"Q": lambda: self.QK, "K": lambda: self.QK.T, "V": lambda: self.OV}[mode]()
        scores = composition_scores(self.OV, right, broadcast_dims=True)
        layer = torch.arange(self.cfg.n_layers, device=scores.device)
        return scores.where(layer[:, None, None, None] < layer[:, None], 0.0)
