"""Sparse autoencoders and transcoders: what a layer reads, as a sum over few features, and what they write.

Layer l reads x_l and is to say y_l, another activation of the model, or x_l itself::

    a_l = φ(W_enc_l x_l + b_enc_l)                                    features [feature]
    ŷ_l = Σ_{m ≤ l} W_dec_{m→l}ᵀ a_m + b_dec_l  (+ W_skip_l x_l)      m = l alone unless cross_layer

(Dunefsky et al., 2024, arXiv 2406.11944; Ameisen et al., 2025, "Circuit Tracing", for the cross-layer kind.) φ is one
of four: ReLU; JumpReLU (Rajamanoharan et al., 2024), zero up to a threshold of the feature; TopK (Gao et al., 2024),
the k largest of a position, if positive; BatchTopK (Bussmann et al., 2024), outside of training one threshold a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reflowlens.dictionaries.config import WITH_THRESHOLD, DictionaryConfig
from reflowlens.models.products import product

if TYPE_CHECKING:
    from reflowlens.models.base import HookedModel


class DictionaryLayer(nn.Module):
    """The encoder of a layer, and the decoders of its features; rows belong to features.

    ``W_enc`` [feature, d_in], ``b_enc`` [feature], ``W_dec`` [feature, reach, d_out] (reach: its own layer and, if
    cross-layer, each later one), ``b_dec`` [d_out], ``threshold`` [feature] or None, ``W_skip`` [d_out, d_in] or None.
    """

    def __init__(self, cfg: DictionaryConfig, layer: int) -> None:
        super().__init__()
        self.activation, self.k = cfg.activation, cfg.k
        self.W_enc = nn.Parameter(torch.empty(cfg.n_features, cfg.d_in))
        self.b_enc = nn.Parameter(torch.empty(cfg.n_features))
        self.W_dec = nn.Parameter(torch.empty(cfg.n_features, cfg.reach(layer), cfg.d_out))
        self.b_dec = nn.Parameter(torch.empty(cfg.d_out))
        self.threshold = nn.Parameter(torch.empty(cfg.n_features)) if cfg.activation in WITH_THRESHOLD else None
        self.W_skip = nn.Parameter(torch.empty(cfg.d_out, cfg.d_in)) if cfg.skip else None

    def preactivations(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch feature"]:
        return product(x, self.W_enc.T) + self.b_enc

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch feature"]:
        """The features' activations, not negative, as they are outside of training."""
        return self.activate(self.preactivations(x))

    def activate(self, before: Float[Tensor, "*batch feature"]) -> Float[Tensor, "*batch feature"]:
        """The activations of pre-activations."""
        if self.threshold is not None:
            return before.relu() * (before > self.threshold)
        if self.activation == "relu" or self.k is None:
            return before.relu()
        values, places = before.topk(self.k, dim=-1)
        return torch.zeros_like(before).scatter(-1, places, values.relu())

    def write(self, features: Float[Tensor, "*batch feature"], ahead: int = 0) -> Float[Tensor, "*batch d_out"]:
        """What the features add ``ahead`` layers after their own, without a bias."""
        return product(features, self.W_dec[:, ahead])

    def constant(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """What is written whatever the features are: the bias and, of what is read, the skip."""
        if self.W_skip is None:
            return self.b_dec.expand(*x.shape[:-1], -1)
        return x @ self.W_skip.T + self.b_dec


class Dictionary(nn.Module):
    """A sparse autoencoder or transcoder for one or several layers of a model.

    Example:
        >>> cfg = DictionaryConfig(("blocks.0.ln2.hook_normalized",), ("blocks.0.hook_mlp_out",), 16, 16, 64, "topk", 8)
        >>> dictionary = Dictionary.fresh(cfg, seed=0)
        >>> features = dictionary.layers[0].encode(torch.randn(5, 16))
        >>> features.shape, int((features > 0).sum(-1).max())
        (torch.Size([5, 64]), 8)
    """

    def __init__(self, cfg: DictionaryConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.layers = nn.ModuleList([DictionaryLayer(cfg, layer) for layer in range(cfg.n_layers)])

    @classmethod
    @torch.no_grad()
    def fresh(cls, cfg: DictionaryConfig, seed: int = 0) -> Dictionary:
        """Untrained: encoder rows uniform within ±1/√n_features; decoder rows of random direction and norm 1 over all
        layers that they write to, those of an autoencoder along their encoder rows; biases, skip and thresholds 0."""
        generator = torch.Generator().manual_seed(seed)
        dictionary = cls(cfg)
        for layer in dictionary.each_layer():
            layer.W_enc.uniform_(-1, 1, generator=generator).mul_(cfg.n_features**-0.5)
            if cfg.kind == "sae":
                layer.W_dec.copy_(layer.W_enc[:, None])
            else:
                layer.W_dec.normal_(generator=generator)
            layer.W_dec.div_(layer.W_dec.flatten(1).norm(dim=1)[:, None, None])
            for parameter in (layer.b_enc, layer.b_dec, layer.threshold, layer.W_skip):
                if parameter is not None:
                    parameter.zero_()
        return dictionary

    def each_layer(self) -> Sequence[DictionaryLayer]:
        """The layers, as the type checker knows them."""
        return cast("list[DictionaryLayer]", list(self.layers))

    def encode(self, x: Sequence[Float[Tensor, "*batch d_in"]]) -> list[Float[Tensor, "*batch feature"]]:
        """The features of every layer, from what every layer reads."""
        return [layer.encode(read) for layer, read in zip(self.each_layer(), x, strict=True)]

    def reconstruct(
        self,
        layer: int,
        features: Sequence[Float[Tensor, "*batch feature"]] | Mapping[int, Float[Tensor, "*batch feature"]],
        x: Float[Tensor, "*batch d_in"],
    ) -> Float[Tensor, "*batch d_out"]:
        """ŷ of a layer.

        Args:
            layer: counted from the dictionary's first.
            features: by layer: those of the layer itself and, if cross-layer, of every earlier one.
            x: what the layer reads, for the skip.
        """
        layers = self.each_layer()
        total = layers[layer].constant(x)
        for source in range(0 if self.cfg.cross_layer else layer, layer + 1):
            total = total + layers[source].write(features[source], layer - source)
        return total

    def forward(self, x: Sequence[Float[Tensor, "*batch d_in"]]) -> list[Float[Tensor, "*batch d_out"]]:
        """ŷ of every layer, from what every layer reads."""
        features = self.encode(x)
        return [self.reconstruct(layer, features, read) for layer, read in enumerate(x)]

    def spliced(
        self,
        model: Any,
        *,
        error: bool | Literal["detached"] = True,
        layers: int | Sequence[int] | None = None,
        other_model: bool = False,
    ) -> AbstractContextManager[HookedModel]:
        """Put the dictionary where it reads and writes, for a ``with`` block; its features are hook points meanwhile.

        Block l has ``hook_features`` [batch, pos, feature], ``hook_reconstruction`` and, with the error term,
        ``hook_reconstruction_error`` [batch, pos, d_out]: short names ``"features"``, ``"reconstruction"`` and
        ``"reconstruction_error"``. What the dictionary reads has been through every hook on its point, and what it
        writes goes through every hook on its own, in whatever order they are attached; see
        :mod:`reflowlens.dictionaries.splice` for the values and their gradients.

        Args:
            model: the hooked model that the dictionary was trained on, compiled (it runs uncompiled meanwhile) or not.
            error: True: what is written is the reconstruction from the features, after the hooks on them, plus what
                the reconstruction misses without these hooks: without any exactly what the model computes. False: the
                reconstruction alone, the replacement. ``"detached"``: as True, and the gradient takes the error as a
                constant, so that all of it goes through the features.
            layers: the blocks to splice it into; None: all that it has. Of a cross-layer dictionary those that are
                written, from the features of all earlier ones.
            other_model: a model of other weights on purpose, which has the hook points and their widths.

        Returns:
            A context manager that gives the hooked model.

        Raises:
            ReflowlensError: it is no dictionary of this model, or on another device; another dictionary has features in
                one of the blocks; another thread is using the model; a pass lacks what a cross-layer reconstruction
                needs; or hooks on the features are still open when the block ends.

        Example: ``with dictionary.spliced(model): rl.run(model, text, rl.Ablate("features", layer=2, index=17))``
        """
        from reflowlens.dictionaries.splice import splice

        return splice(model, self, error=error, layers=layers, other_model=other_model)

    def decoder_norms(self, layer: int) -> Float[Tensor, " feature"]:
        """Norm of each feature's decoder, over all layers that it writes to."""
        return self.each_layer()[layer].W_dec.flatten(1).norm(dim=1)

    def __repr__(self) -> str:
        cfg = self.cfg
        kind = "SAE" if cfg.kind == "sae" else "cross-layer transcoder" if cfg.cross_layer else "transcoder"
        chosen = f"{cfg.activation}({cfg.k})" if cfg.k else cfg.activation
        model = f" of {cfg.model_name}" if cfg.model_name else ""
        return f"{kind}({cfg.name or 'unnamed'}{model}: {cfg.n_layers} layers of {cfg.n_features:,} features, {chosen})"
