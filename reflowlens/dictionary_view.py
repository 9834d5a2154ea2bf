"""A dictionary's features as a signal view, with what they leave out carried along.

A layer of a dictionary says the vector y at the point that it writes as Σ_f a_f d_f + b + e: activations a = encode(x)
of what it reads, decoder rows d_f, its bias b, and the *error* e. In a :class:`DictionaryView`

=============  ========================================================================================================
``basis``      the decoder's rows d_f [S, d_model]: what a feature writes
``recipe``     of each token the activations [S] that its features have where the token stands alone, behind the token
               that begins a text, at the point that the dictionary reads; ``embedding`` is the vector y there, so that
               embedding = recipe @ basis + b + ``recipe_error``
``readout``    of a residual stream x its features a / σ, then 1 / σ, of the *constant* b, and then the d_model
               coordinates of the error: what the final norm makes of x less the other two; σ is the norm's divisor
``logit_rows`` what each of these coordinates adds to every logit: through the final norm's weight and the unembedding
=============  ========================================================================================================

so that ``logits(readout(x))`` are the model's logit lens exactly, whatever the dictionary misses. Only features are
signals (``n_signals``): an ablation takes a feature's write away, and the constant and the error stay.
``contributions`` end in two more entries, the constant's and the error's; ``error_share`` says how much is not in the
features.

Residual streams can be read by an autoencoder of the residual stream. A transcoder, or an autoencoder of something
else, has recipes all the same: ``readout`` refuses.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from reflowlens.arguments import integer
from reflowlens.dictionaries.belonging import check_belongs, check_device
from reflowlens.dictionaries.dictionary import Dictionary, DictionaryLayer
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.models.numerics import wide, without_autocast
from reflowlens.signals.view import SignalView, check_vectors

_STREAM = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)")
_TOKENS_AT_ONCE = 1024


@dataclass(frozen=True)
class DictionaryView(SignalView):
    """A model's logits written in a dictionary's features; :func:`dictionary_view` makes one.

    Args:
        dictionary, index: whose features, and of which of its layers.
        vectors: of each token, what the dictionary is to say where the token stands alone.
        unembedding: ``logit_rows``; empty where the features are no coordinates of the residual stream.
        turn: a rotation of the features, after which ``recipe`` and ``basis`` are in the rotated ones.

    Example: ``rl.signal_view(model, "reflow-nano-sae").contributions(stream, " Paris").topk(5)``
    """

    dictionary: Dictionary = field(kw_only=True, repr=False)
    index: int = field(kw_only=True, repr=False)
    vectors: Float[Tensor, "d_vocab d_model"] = field(kw_only=True, repr=False)
    unembedding: Float[Tensor, "d_vocab S_carried"] = field(kw_only=True, repr=False)
    turn: Float[Tensor, "S S"] | None = field(default=None, kw_only=True, repr=False)

    @property
    def layer(self) -> DictionaryLayer:
        """The weights."""
        return self.dictionary.each_layer()[self.index]

    @property
    def site(self) -> int:
        """The block that reads the stream in which the features are: ``n_layers`` is the readout."""
        block, place = self._checked_stream()
        return block + (place == "post")

    @property
    def n_carried(self) -> int:
        return 1 + self.basis.shape[1]

    @property
    def logit_rows(self) -> Float[Tensor, "d_vocab S_carried"]:
        self._checked_stream()
        return self.unembedding

    @property
    def embedding(self) -> Float[Tensor, "d_vocab d_model"]:
        return self.vectors

    @property
    def recipe_error(self) -> Float[Tensor, "d_vocab d_model"]:
        """What features and constant leave out of each token's vector."""
        return self.vectors - self.recipe @ self.basis - self.layer.b_dec

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch S"]:
        """The features' activations, turned if the view is."""
        a = self.layer.encode(x.to(self.basis.dtype))
        return a if self.turn is None else a @ self.turn

    @torch.no_grad()
    def readout(self, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch S_carried"]:
        """Features, constant and error of a residual stream, as the module says.

        Raises:
            ReflowlensError: the last axis is not d_model, or the dictionary is not one of the residual stream.

        Example: ``view.readout(cache["resid_post", -1])[..., : view.n_signals]  # the features alone``
        """
        self._checked_stream()
        check_vectors("a residual stream", resid, "d_model", self.basis.shape[1])
        with without_autocast(self.basis):
            x = resid.to(self.basis.dtype)
            assert self.norm is not None
            centred = x - x.mean(-1, keepdim=True) if self.norm.centered else x
            scale = (centred.square().mean(-1, keepdim=True) + self.norm.eps).sqrt()
            return self._with_rest(self.encode(x) / scale, 1 / scale, self.norm(x, hooked=False))

    def readout_of_part(
        self, part: Float[Tensor, "*part batch d_model"], scale: Float[Tensor, "batch 1"], at: Float[Tensor, "batch d"]
    ) -> Float[Tensor, "*part batch S_carried"]:
        """As :meth:`SignalView.readout_of_part`, with the features that are active in the streams ``at`` held so."""
        part = part.to(self.basis.dtype)
        features = (part @ self.layer.W_enc.T) * self._active(at) / scale
        features = features if self.turn is None else features @ self.turn
        return self._with_rest(features, torch.zeros_like(part[..., :1]), self.normed(part, scale))

    def readout_of_bias(
        self, scale: Float[Tensor, "batch 1"], at: Float[Tensor, "batch d_model"]
    ) -> Float[Tensor, "#batch S_carried"]:
        features = self.layer.b_enc * self._active(at) / scale
        features = features if self.turn is None else features @ self.turn
        return self._with_rest(features, 1 / scale, self.norm_bias().expand(len(scale), -1))

    def removals(
        self, stream: Float[Tensor, "*batch d_model"]
    ) -> tuple[Float[Tensor, "*batch S"], Float[Tensor, "S d_model"]]:
        return self.encode(stream), self.basis

    @torch.no_grad()
    def error_share(self, stream: Float[Tensor, "*batch d_model"] | None = None) -> float:
        """Σ‖y - ŷ‖² / Σ‖y - ȳ‖², the share of the variance that features and constant leave out.

        Args:
            stream: residual streams y; by default what the recipes are of, over the real tokens.
        """
        if stream is None:
            n = min(self.n_tokens, len(self.vectors))
            y, error = self.vectors[:n], self.recipe_error[:n]
        else:
            self._checked_stream()
            y = stream.to(self.basis.dtype).flatten(0, -2)
            error = y - self.encode(y) @ self.basis - self.layer.b_dec
        return float(error.double().square().sum() / (y - y.mean(dim=0)).double().square().sum())

    def of_tokens(self, n: int) -> DictionaryView:
        bias = None if self.bias is None else self.bias[:n]
        unembedding = self.unembedding[:n]
        return dataclasses.replace(
            self, bias=bias, recipe=self.recipe[:n], vectors=self.vectors[:n], unembedding=unembedding
        )

    def with_recipe(self, recipe: Float[Tensor, "d_vocab S"]) -> DictionaryView:
        """Its vectors are what this recipe and the constant write: a recipe with nothing in it has no error either."""
        return dataclasses.replace(self, recipe=recipe, vectors=recipe @ self.basis + self.layer.b_dec)

    def untrained(self, model: HookedModel, seed: int) -> SignalView:
        """A view of an untrained model of the same sizes, in a dictionary of this one's sizes that is untrained too."""
        cfg = dataclasses.replace(self.dictionary.cfg, model_name="", model_hash="", name="untrained")
        return dictionary_view(model, Dictionary.fresh(cfg, seed), of_layer=self.index)

    def _rotated(self, A: Float[Tensor, "S S"]) -> DictionaryView:
        basis, carried = A.T @ self.basis, self.unembedding[:, self.n_signals :]
        features = carried[:, 1:] @ self.normed(basis, 1.0).T  # as wide as the stream: cheaper than turning them
        return dataclasses.replace(
            self,
            name="rotated",
            recipe=self.recipe.to_sparse() @ A if self.turn is None else self.recipe @ A,
            basis=basis,
            unembedding=torch.cat([features, carried], dim=1),
            turn=A if self.turn is None else self.turn @ A,
        )

    def _summed(self, contributions: Float[Tensor, "*batch S_carried"]) -> Float[Tensor, "*batch S_2"]:
        known = self.n_signals + 1
        return torch.cat([contributions[..., :known], contributions[..., known:].sum(-1, keepdim=True)], dim=-1)

    def _active(self, at: Float[Tensor, "batch d_model"]) -> Bool[Tensor, "batch S"]:
        return self.layer.encode(at.to(self.basis.dtype)) > 0

    def _with_rest(
        self, features: Float[Tensor, "*batch S"], constant: Float[Tensor, "*batch 1"], whole: Float[Tensor, "*batch d"]
    ) -> Float[Tensor, "*batch S_carried"]:
        """With the error behind them: what is left of the normed stream, so that nothing is lost by construction."""
        said = features @ self.normed(self.basis, 1.0) + constant * self.normed(self.layer.b_dec, 1.0)
        return torch.cat([features, constant, whole - said], dim=-1)

    def _checked_stream(self) -> tuple[int, str]:
        cfg = self.dictionary.cfg
        read, write = cfg.reads[self.index], cfg.writes[self.index]
        found = _STREAM.fullmatch(read) if read == write else None
        if found is None:
            raise ReflowlensError(
                f"the features of {self.name} read {read!r} and write {write!r}: they are no coordinates of the "
                "residual stream, and predictions (signal_flow, causal_ablation) are read in those of an autoencoder "
                "of it; their recipes can be looked at (recipe_atlas, sparsity_profile, semantic_galaxy)"
            )
        return int(found[1]), found[2]


@torch.no_grad()
def dictionary_view(
    model: HookedModel, dictionary: Dictionary, layer: int | None = None, *, of_layer: int | None = None
) -> DictionaryView:
    """A dictionary's features as a view of its model.

    Args:
        model: the one that the dictionary was trained on.
        layer: of which block, the features that it has there; default the last.
        of_layer: instead of ``layer``, the number of a layer of the dictionary, of which a block may have several.

    Raises:
        ReflowlensError: the dictionary is another model's, has no layer there, or several, or another width than the
            residual stream, its features write at several layers, or the model's logits are no sums over its last
            stream.

    Example: ``dictionary_view(model, rl.load_dictionary("reflow-nano-sae"), layer=3).error_share()``
    """
    model = check_belongs(dictionary, model)
    check_device(model, dictionary)
    model.check_reads_last_stream("the features of a dictionary")
    cfg = dictionary.cfg
    name = cfg.name or "dictionary"
    if cfg.cross_layer or cfg.skip or cfg.d_out != model.cfg.d_model:
        raise ReflowlensError(
            f"{name} has features that write at several layers, a skip, or another width than the residual stream's "
            f"{model.cfg.d_model}: a view needs one vector of this width a feature, and no more"
        )
    index = _index(dictionary, layer) if of_layer is None else of_layer
    with without_autocast(model.ln_final.w):
        embedding = wide(model.W_U.T.detach())
    dictionary, dtype = _as_wide(dictionary, embedding.dtype)
    embedding = embedding.to(dtype)
    own = dictionary.each_layer()[index]
    recipe, vectors = _alone(model, own, cfg.reads[index], cfg.writes[index])
    basis = own.W_dec[:, 0].detach()
    bias = model.b_U.detach().to(dtype) if model.cfg.unembed_bias else None
    found = DictionaryView(
        name,
        recipe,
        basis,
        model.ln_final,
        model,
        bias,
        getattr(model.unembed, "cap", None),
        dictionary=dictionary,
        index=index,
        vectors=vectors,
        unembedding=embedding,
    )
    written = found.normed(torch.cat([basis, own.b_dec[None]]), 1.0)
    return dataclasses.replace(found, unembedding=torch.cat([embedding @ written.T, embedding], dim=1))


def _as_wide(dictionary: Dictionary, at_least: torch.dtype) -> tuple[Dictionary, torch.dtype]:
    """The dictionary in one type for all that a view computes, so that its parts add up, and the type: 32 bits or more.

    It is copied where it has another: it stays as it is.
    """
    own = dictionary.each_layer()[0].W_dec
    dtype = torch.promote_types(wide(own).dtype, at_least)
    return dictionary if own.dtype == dtype else copy.deepcopy(dictionary).to(dtype), dtype


def _index(dictionary: Dictionary, layer: Any) -> int:
    """The number of the layer that a block has."""
    blocks = [int(point.split(".")[1]) if point.startswith("blocks.") else -1 for point in dictionary.cfg.writes]
    if layer is None:
        return len(blocks) - 1
    if integer(layer) not in blocks:
        raise ReflowlensError(
            f"layer must be one of the dictionary's blocks, {', '.join(map(str, blocks))}, got {layer!r}"
        )
    found = [index for index, block in enumerate(blocks) if block == int(layer)]
    if len(found) > 1:
        points = " and ".join(f"{dictionary.cfg.writes[index]!r} (of_layer={index})" for index in found)
        raise ReflowlensError(
            f"block {layer} has several of the dictionary's layers, which write {points}: name one of them, "
            "dictionary_view(model, dictionary, of_layer=...)"
        )
    return found[0]


class _Alone(NamedTuple):
    recipe: Float[Tensor, "d_vocab S"]
    vectors: Float[Tensor, "d_vocab d_model"]


def _alone(model: HookedModel, layer: DictionaryLayer, read: str, write: str) -> _Alone:
    """The features of every token behind the token that begins a text, and what they are to say; 0 of padding rows."""
    (begin,) = model.text_start(prepend_bos=True)
    n, device = model.tokenizer.n_vocab, model.cfg.device
    recipe = torch.zeros(model.cfg.d_vocab, len(layer.W_enc), dtype=layer.W_dec.dtype, device=device)
    vectors = torch.zeros(model.cfg.d_vocab, layer.W_dec.shape[-1], dtype=layer.W_dec.dtype, device=device)
    for tokens in torch.arange(n, device=device).split(_TOKENS_AT_ONCE):
        pairs = torch.stack([torch.full_like(tokens, begin), tokens], dim=1)
        _, cache = model.run_with_cache(
            pairs, return_type=None, names_filter=list({read, write}), return_cache_object=False
        )
        recipe[tokens] = layer.encode(cache[read][:, 1].to(recipe.dtype))
        vectors[tokens] = cache[write][:, 1].to(vectors.dtype)
    return _Alone(recipe, vectors)
