"""What every model with one residual stream does: embed, run the blocks, read the stream out.

What a block is and what it remembers of a text is left to the families.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens import FactoredMatrix

from reflowlens.arguments import integer, is_one_of
from reflowlens.config import ModelConfig
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel, TextInput, is_cheap_to_read
from reflowlens.models.components import Places, Positions, packed_places
from reflowlens.models.loss import IGNORE, cross_entropy
from reflowlens.models.past import ReadPositions, read_before
from reflowlens.models.threads import reading_forward

ENDS = ("embed.", "pos_embed.", "unembed.")  # begin the names of the parameters at both ends
ReturnType = Literal["logits", "loss", "both"] | None


class Readout(NamedTuple):
    """The last linear map, not yet applied: ``logits = features @ matrix.T``."""

    features: Float[Tensor, "batch pos k"]
    matrix: Float[Tensor, "d_vocab k"]

    def logits(self) -> Float[Tensor, "batch pos d_vocab"]:
        return self.features @ self.matrix.T

    def loss(self, targets: Int[Tensor, "batch pos"]) -> Float[Tensor, ""]:
        return cross_entropy(self.features.flatten(0, 1), self.matrix, targets.flatten())


class Embed(nn.Module):
    """The token embedding, used at both ends of the model."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.W_E = nn.Parameter(torch.empty(cfg.d_vocab, cfg.d_model))


class Unembed(nn.Module):
    """The tied readout. It owns no weights: it asks the model for the embedding's."""

    def __init__(self, model: ResidualModel) -> None:
        super().__init__()
        self.tied_weights = model.tied_weights

    def readout(self, x: Float[Tensor, "batch pos d_model"], weights: tuple[Tensor, ...]) -> Readout:
        (W_E,) = weights
        return Readout(x, W_E)

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab"]:
        return self.readout(x, self.tied_weights()).logits()


class OwnUnembed(Unembed):
    """A readout with a matrix of its own, as large Llamas have it."""

    def __init__(self, model: ResidualModel) -> None:
        super().__init__(model)
        self.W_U = nn.Parameter(torch.empty(model.cfg.d_model, model.cfg.d_vocab))

    def readout(self, x: Float[Tensor, "batch pos d_model"], weights: tuple[Tensor, ...]) -> Readout:
        return Readout(x, self.W_U.T)


class ResidualModel(HookedModel):
    """Blocks along a residual stream, between an embedding and a readout.

    A family creates ``blocks``, each called as ``block(resid, places, past)``, and ``ln_final``; an architecture
    overrides what is its own of :meth:`build_embedding`, :meth:`tied_weights` and :meth:`embed_tokens`.
    """

    embed: nn.Module
    unembed: Unembed

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
        return self.hook_embed(F.embedding(tokens, W_E))

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
    ) -> Tensor | tuple[Tensor, Tensor] | None:
        """Read text or tokens and predict the next token at every position.

        Args:
            input: a text, a list of texts (padded on the right), tokens [batch, pos] or [pos]; with ``start_at_layer``
                the residual stream [batch, pos, d_model] that this layer reads.
            return_type: ``"logits"`` [batch, pos, d_vocab], ``"loss"`` (mean next-token cross-entropy in nats, padding
                left out), ``"both"`` (logits, loss) or None to run for the hooks alone.
            targets: what each position should predict, negative where nothing counts; default: the input shifted by
                one.
            start_at_layer: first block to run; negative counts from the end.
            stop_at_layer: first block not to run; the residual stream in front of it is returned.
            past_kv_cache: what :meth:`make_cache` gave: what the model keeps of earlier positions; extended by the new
                ones. It goes with whole passes over rows of one length.
            segments: several texts in a row, each a run of equal ids and read as if alone: attention stays within it,
                its positions start at 0, and its last token is left out of the default targets, as is padding, which
                negative ids mark.

        Raises:
            ReflowlensError: the input is empty, too long for ``n_ctx`` or holds ids outside the vocabulary, a layer
                does not exist or the first lies behind the last, a loss is asked for without targets, targets or
                segments do not fit the input, or a cache comes with segments, with a part of the layers or with texts
                of several lengths, or is another model's or made for another batch.
        """
        if not is_one_of(return_type, ("logits", "loss", "both", None)):
            raise ReflowlensError(f"return_type must be 'logits', 'loss', 'both' or None, got {return_type!r}")
        offset = read_before(past_kv_cache)
        start, stop = self._layer_range(start_at_layer, stop_at_layer)
        if past_kv_cache is not None and (start_at_layer is not None or stop < self.cfg.n_layers):
            raise ReflowlensError(
                "a key-value cache goes with whole passes, for each layer keeps its own part of it: "
                "leave out start_at_layer and stop_at_layer"
            )
        weights = self.tied_weights()
        if start_at_layer is None:
            tokens, lengths = self.tokens_and_lengths(input, offset=offset)
            if past_kv_cache is not None and len(set(lengths)) > 1:
                raise ReflowlensError(
                    f"texts of one length go with a key-value cache, which would keep the padding of others; got "
                    f"{', '.join(map(str, lengths))} tokens"
                )
            if past_kv_cache is not None:
                past_kv_cache.check(self, len(tokens))
            places = self._places(tokens.shape, segments, past_kv_cache)
            if targets is None and return_type in ("loss", "both"):
                targets = self.next_tokens(tokens, lengths)
                if segments is not None:
                    unpredictive = (segments != segments.roll(-1, dims=1)) | (segments < 0)
                    targets = targets.masked_fill(unpredictive.to(targets.device), IGNORE)
            resid = self.embed_tokens(tokens, weights, places.positions)
        else:
            if not isinstance(input, Tensor) or input.ndim != 3:
                raise ReflowlensError("with start_at_layer the input must be a residual stream [batch, pos, d_model]")
            if input.shape[2] != self.cfg.d_model:
                raise ReflowlensError(f"this residual stream is {input.shape[2]} wide, but d_model={self.cfg.d_model}")
            own = self.ln_final.w.dtype
            if input.dtype != own and not torch.is_autocast_enabled(input.device.type):
                raise ReflowlensError(f"this residual stream is {input.dtype}, but the model computes in {own}")
            self.check_length(input.shape[1], offset)
            places = self._places(input.shape[:2], segments, past_kv_cache)
            resid = input.clone()  # a hook that writes in place leaves the caller's stream alone
        if targets is not None:
            self._check_targets(targets, resid.shape[:2])
        for block in self.blocks[start:stop]:
            resid = block(resid, places, past_kv_cache)
        if past_kv_cache is not None:
            past_kv_cache.length += resid.shape[1]
        if stop_at_layer is not None:
            return resid
        readout = self.unembed.readout(self.ln_final(resid), weights)
        if return_type is None:
            return None
        if return_type == "logits":
            return readout.logits()
        if targets is None:
            raise ReflowlensError("a loss needs targets: with start_at_layer pass targets=[batch, pos]")
        if return_type == "loss":
            return readout.loss(targets)
        return readout.logits(), readout.loss(targets)

    def _check_targets(self, targets: Int[Tensor, "batch pos"], shape: torch.Size) -> None:
        _check_integers("targets", targets, shape)
        highest = int(targets.max()) if is_cheap_to_read(targets) else 0
        if highest >= self.cfg.d_vocab:
            raise ReflowlensError(f"no token {highest}: this model's ids are 0 to {self.cfg.d_vocab - 1}")

    def _places(
        self, shape: torch.Size, segments: Int[Tensor, "batch pos"] | None, past: ReadPositions | None
    ) -> Places:
        if segments is None:
            offset = past.length if past is not None else 0
            return Places(slice(offset, offset + shape[1]))
        if past is not None:
            raise ReflowlensError(
                "segments cannot be read with a key-value cache: pass whole rows and no past_kv_cache"
            )
        _check_integers("segments", segments, shape)
        return packed_places(segments.to(self.cfg.device))

    def _layer_range(self, start: int | None, stop: int | None) -> tuple[int, int]:
        n_layers = self.cfg.n_layers
        for name, layer in (("start_at_layer", start), ("stop_at_layer", stop)):
            if layer is not None and integer(layer) is None:
                raise ReflowlensError(f"{name} must be a block's number, 0 to {n_layers - 1}, got {layer!r}")
            if layer is not None and not -n_layers <= layer <= n_layers:
                raise ReflowlensError(f"{name}={layer} is out of range: this model has blocks 0 to {n_layers - 1}")
        first, last, _ = slice(start, stop).indices(n_layers)
        if first > last:
            raise ReflowlensError(f"start_at_layer={start} lies behind stop_at_layer={stop}")
        return first, last

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"] | FactoredMatrix:
        """The embedding; a ``FactoredMatrix`` where the architecture factors it."""
        return cast(Embed, self.embed).W_E

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """The unembedding as one matrix (TransformerLens's tools index it); a tied one is formed at each access."""
        if isinstance(self.unembed, OwnUnembed):
            return self.unembed.W_U
        W_E = self.W_E
        return (W_E.AB if isinstance(W_E, FactoredMatrix) else W_E).T

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        """The unembedding's bias: these architectures have none (a bias of the final norm is the norm's)."""
        return torch.zeros(self.cfg.d_vocab, device=self.cfg.device, dtype=torch.float32)


def _check_integers(name: str, values: Tensor, shape: torch.Size) -> None:
    if not isinstance(values, Tensor) or values.is_floating_point():
        got = values.dtype if isinstance(values, Tensor) else repr(values)
        raise ReflowlensError(f"{name} must be a tensor of integers [batch, pos], got {got}")
    if values.shape != shape:
        raise ReflowlensError(f"{name} must be [batch, pos] = {list(shape)}, got {list(values.shape)}")
