"""What every model with one residual stream does: embed, run the blocks, read the stream out.

What a block is and what it remembers of a text is left to the families.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens import FactoredMatrix

from reflowlens.config import ModelConfig
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.models.checked_pass import Pass, ReturnType, as_segments, checked_pass
from reflowlens.models.loss import IGNORE, capped, cross_entropy, token_losses
from reflowlens.models.numerics import dense, wide
from reflowlens.models.parts import HookPoint, is_hooked, plus
from reflowlens.models.past import ReadPositions
from reflowlens.models.places import Places, Positions
from reflowlens.models.products import product
from reflowlens.models.text import PaddingSide, TextInput
from reflowlens.models.threads import reading_forward

_POSITIONS = 1024  # whose logits are formed at once
# Begin the names of the parameters at both ends, and of what stands between the last block and the readout.
ENDS = ("embed.", "pos_embed.", "unembed.", "bigram.", "values.")
REFINERS = ("ttt.", "flow.")


class Readout(NamedTuple):
    """The last map, not yet applied: ``logits = features @ matrix.T + bias``, held between ±cap where there is one."""

    features: Float[Tensor, "batch pos k"]
    matrix: Float[Tensor, "d_vocab k"]
    bias: Float[Tensor, " d_vocab"] | None
    cap: float | None = None

    def logits(self) -> Float[Tensor, "batch pos d_vocab"]:
        return capped(plus(product(self.features, self.matrix.T), self.bias), self.cap)

    def logits_of(self, tokens: Int[Tensor, "batch pos n"]) -> Float[Tensor, "batch pos n"]:
        """Those of a few tokens, which cost a few rows of the matrix."""
        logits = torch.einsum("bpk,bpnk->bpn", self.features, self.matrix[tokens])
        return capped(plus(logits, None if self.bias is None else self.bias[tokens]), self.cap)

    def losses(self, targets: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos"]:
        """Cross-entropy of each position in nats, 0 where the target is negative."""
        features, ids = self.features.flatten(0, 1), targets.flatten()
        ids = ids.masked_fill(ids < 0, IGNORE)
        parts = [
            token_losses(features[i : i + _POSITIONS], self.matrix, ids[i : i + _POSITIONS], self.bias, self.cap)
            for i in range(0, len(ids), _POSITIONS)
        ]
        return torch.cat(parts).view_as(targets)

    def loss(self, targets: Int[Tensor, "batch pos"] | None) -> Float[Tensor, ""]:
        ids = _given(targets).flatten()
        return cross_entropy(self.features.flatten(0, 1), self.matrix, ids, bias=self.bias, cap=self.cap)


class FormedReadout(Readout):
    """A readout whose ``features`` are logits already, perhaps changed, in front of the cap; its matrix is not read."""

    def logits(self) -> Float[Tensor, "batch pos d_vocab"]:
        return capped(self.features, self.cap)

    def logits_of(self, tokens: Int[Tensor, "batch pos n"]) -> Float[Tensor, "batch pos n"]:
        return capped(self.features.gather(-1, tokens), self.cap)

    def losses(self, targets: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos"]:
        ids = targets.masked_fill(targets < 0, IGNORE)
        return F.cross_entropy(capped(wide(self.features), self.cap).mT, ids, ignore_index=IGNORE, reduction="none")

    def loss(self, targets: Int[Tensor, "batch pos"] | None) -> Float[Tensor, ""]:
        ids = _given(targets)
        return self.losses(ids).sum() / (ids >= 0).sum()


def _given(targets: Int[Tensor, "batch pos"] | None) -> Int[Tensor, "batch pos"]:
    if targets is None:
        raise ReflowlensError("a loss needs targets: with start_at_layer pass targets=[batch, pos]")
    return targets


class Embed(nn.Module):
    """The token embedding, used at both ends of the model."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.W_E = nn.Parameter(torch.empty(cfg.d_vocab, cfg.d_model))


class Unembed(nn.Module):
    """The tied readout. It owns no weights: it asks the model for the embedding's."""

    b_U: Float[Tensor, " d_vocab"]

    def __init__(self, model: ResidualModel, cap: float | None = None) -> None:
        super().__init__()
        self.tied_weights = model.tied_weights
        self.cap = model.cfg.output_logits_soft_cap if cap is None else cap
        if self.cap is not None:
            self.hook_logits_pre_cap = HookPoint()  # [batch, pos, d_vocab]
        self.register_buffer("b_U", torch.zeros(model.cfg.d_vocab), persistent=False)  # TransformerLens's tools ask

    def readout(self, x: Float[Tensor, "batch pos d_model"], weights: tuple[Tensor, ...]) -> Readout:
        (W_E,) = weights
        return self.read(x, W_E, None)

    def read(
        self,
        x: Float[Tensor, "batch pos k"],
        matrix: Float[Tensor, "d_vocab k"],
        bias: Float[Tensor, " d_vocab"] | None,
    ) -> Readout:
        """What a matrix reads off the features; formed at once where something is attached in front of the cap."""
        if self.cap is None or not is_hooked(self.hook_logits_pre_cap):
            return Readout(x, matrix, bias, self.cap)
        unread = matrix[:, :1].expand(-1, len(matrix))  # where others have a matrix; it takes no memory
        return FormedReadout(self.hook_logits_pre_cap(plus(product(x, matrix.T), bias)), unread, None, self.cap)

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab"]:
        return self.readout(x, self.tied_weights()).logits()


class OwnUnembed(Unembed):
    """A readout with a matrix of its own, as large Llamas have it, and perhaps a bias."""

    def __init__(self, model: ResidualModel) -> None:
        super().__init__(model)
        self.W_U = nn.Parameter(torch.empty(model.cfg.d_model, model.cfg.d_vocab))
        if model.cfg.unembed_bias:
            self.b_U = nn.Parameter(torch.zeros(model.cfg.d_vocab))

    def readout(self, x: Float[Tensor, "batch pos d_model"], weights: tuple[Tensor, ...]) -> Readout:
        return self.read(x, self.W_U.T, self.b_U if isinstance(self.b_U, nn.Parameter) else None)


class ResidualModel(HookedModel):
    """Blocks along a residual stream, between an embedding and a readout.

    A family creates ``blocks``, each called as ``block(resid, places, past)``, and ``ln_final``; an architecture
    overrides what is its own of :meth:`build_embedding`, :meth:`tied_weights` and :meth:`embed_tokens`.
    """

    embed: nn.Module
    unembed: Unembed
    hook_embed: HookPoint

    @classmethod
    def forward_flops(cls, cfg: ModelConfig, context: int, batch: int) -> dict[str, float]:
        """Of both ends: a lookup costs nothing."""
        return {"embedding": 0.0, "forming": 0.0, "readout": 2.0 * cfg.d_model * cfg.d_vocab}

    def build_embedding(self, cfg: ModelConfig) -> None:
        """Create the modules at both ends."""
        self.embed = Embed(cfg)
        self.unembed = Unembed(self) if cfg.tie_word_embeddings else OwnUnembed(self)

    def tied_weights(self) -> tuple[Tensor, ...]:
        """The embedding's factors as this pass uses them, at both ends."""
        return (cast(Embed, self.embed).W_E,)

    def embed_tokens(
        self, tokens: Int[Tensor, "batch pos"], weights: tuple[Tensor, ...], positions: Positions
    ) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream before the first block."""
        (W_E,) = weights
        vectors = F.embedding(tokens, W_E)
        return self.hook_embed(vectors if self.cfg.embed_scale == 1 else vectors * self.cfg.embed_scale)

    @reading_forward
    def forward(
        self,
        input: TextInput | Float[Tensor, "batch pos d_model"],
        return_type: ReturnType = "logits",
        *,
        targets: Int[Tensor, "batch pos"] | None = None,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        past_kv_cache: ReadPositions | None = None,
        segments: Int[Tensor, "batch pos"] | None = None,
        attention_mask: Tensor | None = None,
        padding_side: PaddingSide = "right",
        loss_per_token: bool = False,
    ) -> Any:
        """Read text or tokens and predict the next token at every position.

        Args:
            input: a text, a list of texts (padded on the right), tokens [batch, pos] or [pos]; with ``start_at_layer``
                the residual stream [batch, pos, d_model] that this layer reads.
            return_type: ``"logits"`` [batch, pos, d_vocab], ``"loss"`` (mean next-token cross-entropy in nats, padding
                left out), ``"both"`` (logits, loss) or None to run for the hooks alone; or a function of the pass's
                :class:`Readout`, whose value is returned, for what needs a part of the logits.
            targets: what each position should predict, negative where nothing counts; default: the input shifted by
                one.
            start_at_layer: first block to run; negative counts from the end.
            stop_at_layer: first block not to run; the residual stream that it would read is returned.
            past_kv_cache: a cache from :meth:`make_cache` with the earlier positions, to which the new ones are
                appended; only for passes through all layers over rows of one length.
            segments: ids [batch, pos] of texts packed into one row. A run of equal ids is one text, read as if alone:
                attention stays within it and its positions start at 0. Its last token is left out of the default
                targets, as is padding, which negative ids mark.
            attention_mask: [batch, pos], 1 where a token is a text's own and 0 where it is padding, in front of it or
                behind it: a text is read as if alone.
            padding_side: the side on which texts of several lengths are padded, ``"right"`` or ``"left"``.
            loss_per_token: the loss of each position [batch, pos - 1], as in TransformerLens, 0 where none counts,
                instead of their mean.

        Returns:
            As ``return_type`` says; with ``stop_at_layer`` the residual stream [batch, pos, d_model].

        Raises:
            ReflowlensError: the input is empty, too long for ``n_ctx`` or holds ids outside the vocabulary, a layer
                does not exist or the first comes after the last, a loss is asked for without targets, targets or
                segments do not fit the input, or a cache comes with segments, with a part of the layers or with texts
                of several lengths, or is another model's or made for another batch.
        """
        input, segments = as_segments(self, input, segments, attention_mask, padding_side, past_kv_cache)
        asked = checked_pass(self, input, return_type, targets, start_at_layer, stop_at_layer, past_kv_cache, segments)
        weights = self.tied_weights()
        resid = self.resid_of(asked, weights, past_kv_cache)
        if stop_at_layer is not None:
            return resid
        readout = self.unembed.readout(self.features_of(resid, asked.places, past_kv_cache), weights)
        if past_kv_cache is not None:
            past_kv_cache.length += resid.shape[1]
        if return_type is None:
            return None
        if callable(return_type):
            return return_type(readout)
        if return_type == "logits":
            return readout.logits()
        loss = readout.losses(_given(asked.targets))[:, :-1] if loss_per_token else readout.loss(asked.targets)
        return loss if return_type == "loss" else (readout.logits(), loss)

    def resid_of(
        self, asked: Pass, weights: tuple[Tensor, ...], past: ReadPositions | None
    ) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream behind the last block that is asked for."""
        if asked.starts_from_stream:
            resid = asked.input.clone()  # a hook that writes in place leaves the caller's stream alone
        else:
            resid = self.embed_tokens(asked.input, weights, asked.places.positions)
        for block in list(self.blocks)[asked.start : asked.stop]:  # of a ModuleList a slice is a module, made anew
            resid = block(resid, asked.places, past)
        return resid

    def features_of(
        self, resid: Float[Tensor, "batch pos d_model"], places: Places, past: ReadPositions | None
    ) -> Float[Tensor, "batch pos d_model"]:
        """What logits are read off."""
        return self.ln_final(resid)

    def final_stream(
        self, input: TextInput, *, segments: Int[Tensor, "batch pos"] | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """The stream that :meth:`read_final` reads: the logits of a position follow from its own. Here the last one.

        Args:
            input, segments: as in :meth:`forward`.

        Example: ``model.read_final(model.final_stream("The king")[:, -1:]).logits()  # of the last position alone``
        """
        return cast(Tensor, self(input, stop_at_layer=self.cfg.n_layers, segments=segments))

    def read_final(
        self, stream: Float[Tensor, "batch pos d_model"], weights: tuple[Tensor, ...] | None = None
    ) -> Readout:
        """The readout of any positions of :meth:`final_stream`.

        Args:
            weights: of the embedding; default: as they are.
        """
        return self.unembed.readout(self.ln_final(stream), self.tied_weights() if weights is None else weights)

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"] | FactoredMatrix:
        """The embedding; a ``FactoredMatrix`` where the architecture factors it."""
        return cast(Embed, self.embed).W_E

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """The unembedding as one matrix (TransformerLens's tools index it); a tied one is formed at each access."""
        if isinstance(self.unembed, OwnUnembed):
            return self.unembed.W_U
        return dense(self.unembedding).T

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        """The unembedding's bias; zeros where it has none (a bias of the final norm is the norm's)."""
        if isinstance(self.unembed.b_U, nn.Parameter):
            return self.unembed.b_U
        return torch.zeros(self.cfg.d_vocab, device=self.cfg.device, dtype=torch.float32)
