"""What a forward pass is asked for, every argument checked before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reflowlens.arguments import integer, is_one_of
from reflowlens.config import ModelConfig
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.models.loss import IGNORE
from reflowlens.models.past import ReadPositions, read_before
from reflowlens.models.places import Places, packed_places
from reflowlens.models.text import PaddingSide, TextInput, is_cheap_to_read

ReturnType = Literal["logits", "loss", "both"] | Callable[[Any], Any] | None


class Pass(NamedTuple):
    """A forward pass that can be run.

    Attributes:
        input: tokens [batch, pos] or, with ``start_at_layer``, the residual stream [batch, pos, d_model].
        places: where its tokens stand in their texts.
        start, stop: the first block to run, and the first not to run.
        targets: what each position should predict, if a loss is asked for and this is known.
        starts_from_stream: the input is the residual stream.
    """

    input: Tensor
    places: Places
    start: int
    stop: int
    targets: Int[Tensor, "batch pos"] | None
    starts_from_stream: bool


def checked_pass(
    model: HookedModel,
    input: TextInput | Float[Tensor, "batch pos d_model"],
    return_type: ReturnType,
    targets: Int[Tensor, "batch pos"] | None,
    start_at_layer: int | None,
    stop_at_layer: int | None,
    past: ReadPositions | None,
    segments: Int[Tensor, "batch pos"] | None,
) -> Pass:
    """The pass that these arguments of ``model.forward`` describe.

    Raises:
        ReflowlensError: as :meth:`reflowlens.models.residual.ResidualModel.forward` says.
    """
    if not callable(return_type) and not is_one_of(return_type, ("logits", "loss", "both", None)):
        raise ReflowlensError(f"return_type must be 'logits', 'loss', 'both' or None, got {return_type!r}")
    offset = read_before(past)
    start, stop = _layers(start_at_layer, stop_at_layer, model.cfg.n_layers)
    if past is not None and (start_at_layer is not None or stop < model.cfg.n_layers):
        raise ReflowlensError(
            "a key-value cache goes with whole passes, for each layer keeps its own part of it: "
            "leave out start_at_layer and stop_at_layer"
        )
    if start_at_layer is not None:
        stream = _checked_stream(model, input, offset)
        places = _places(model.cfg, stream.shape[:2], segments, past)
        _check_targets(targets, stream.shape[:2], model.cfg.d_vocab)
        return Pass(stream, places, start, stop, targets, starts_from_stream=True)
    tokens, lengths = model.tokens_and_lengths(input, offset=offset)
    if past is not None:
        if len(set(lengths)) > 1:
            raise ReflowlensError(
                f"texts of one length go with a key-value cache, which would keep the padding of others; got "
                f"{', '.join(map(str, lengths))} tokens"
            )
        past.check(model, len(tokens))
    places = _places(model.cfg, tokens.shape, segments, past)
    if targets is None and return_type in ("loss", "both"):
        targets = _next_tokens(model, tokens, lengths, segments)
    _check_targets(targets, tokens.shape, model.cfg.d_vocab)
    return Pass(tokens, places, start, stop, targets, starts_from_stream=False)


def as_segments(
    model: HookedModel,
    input: TextInput | Float[Tensor, "batch pos d_model"],
    segments: Tensor | None,
    attention_mask: Tensor | None,
    padding_side: PaddingSide,
    past: ReadPositions | None,
) -> tuple[Any, Tensor | None]:
    """The input, and as segments what an attention mask or padding on the left says of it.

    Raises:
        ReflowlensError: a mask does not fit the input, is not 0 and 1, leaves a gap within a text or comes with
            segments; or a mask or padding on the left goes with a key-value cache, whose rows advance together.
    """
    if not is_one_of(padding_side, ("left", "right")):
        raise ReflowlensError(f"padding_side must be 'left' or 'right', got {padding_side!r}")
    if attention_mask is None and (padding_side == "right" or isinstance(input, Tensor | np.ndarray)):
        return input, segments
    if segments is not None:
        raise ReflowlensError("segments say what is padding: give no attention_mask and no padding_side with them")
    if attention_mask is None:
        input, lengths = model.tokens_and_lengths(input, padding_side="left", offset=read_before(past))
        first = input.shape[1] - torch.tensor(lengths, device=input.device)
        own = torch.arange(input.shape[1], device=input.device) >= first[:, None]
    else:
        if not isinstance(input, Tensor):
            input = model.tokens_and_lengths(input, padding_side=padding_side, offset=read_before(past))[0]
        input = input[None] if input.ndim == 1 else input
        own = checked_mask(attention_mask, input.shape[:2]).to(input.device)
    if own.all():
        return input, None
    if past is not None:
        raise ReflowlensError("padding cannot be read with a key-value cache: model.generate takes ragged prompts")
    return input, own.long() - 1


def checked_mask(mask: Any, shape: torch.Size) -> Bool[Tensor, "batch pos"]:
    """Which tokens are texts' own, of an attention mask of 0 and 1.

    Raises:
        ReflowlensError: it is none, of another shape, or leaves a gap within a text.
    """
    if isinstance(mask, Tensor) and mask.ndim == 1 and shape[:1] == (1,):
        mask = mask[None]  # of the one row that ids [pos] are
    if not isinstance(mask, Tensor) or mask.shape != shape:
        got = list(mask.shape) if isinstance(mask, Tensor) else repr(mask)
        raise ReflowlensError(f"attention_mask must be a tensor [batch, pos] = {list(shape)}, got {got}")
    if not ((mask == 0) | (mask == 1)).all():
        raise ReflowlensError("attention_mask must be 1 at a text's own tokens and 0 at padding")
    own = mask.bool()
    changes = (own[:, 1:] != own[:, :-1]).sum(1) + own[:, 0].long() + own[:, -1].long()
    if not (changes == 2).all():  # each text begins once and ends once
        raise ReflowlensError("attention_mask must leave every text in one piece, with padding before or behind it")
    return own


def _layers(start: int | None, stop: int | None, n_layers: int) -> tuple[int, int]:
    for name, layer in (("start_at_layer", start), ("stop_at_layer", stop)):
        if layer is not None and integer(layer) is None:
            raise ReflowlensError(f"{name} must be a block's number, 0 to {n_layers - 1}, got {layer!r}")
        if layer is not None and not -n_layers <= layer <= n_layers:
            raise ReflowlensError(f"{name}={layer} is out of range: this model has blocks 0 to {n_layers - 1}")
    first, last, _ = slice(start, stop).indices(n_layers)
    if first > last:
        raise ReflowlensError(f"start_at_layer={start} lies behind stop_at_layer={stop}")
    return first, last


def _checked_stream(model: HookedModel, input: object, offset: int) -> Float[Tensor, "batch pos d_model"]:
    if not isinstance(input, Tensor) or input.ndim != 3:
        raise ReflowlensError("with start_at_layer the input must be a residual stream [batch, pos, d_model]")
    if input.shape[2] != model.cfg.d_model:
        raise ReflowlensError(f"this residual stream is {input.shape[2]} wide, but d_model={model.cfg.d_model}")
    own = model.ln_final.w.dtype
    if input.dtype != own and not torch.is_autocast_enabled(input.device.type):
        raise ReflowlensError(f"this residual stream is {input.dtype}, but the model computes in {own}")
    model.check_length(input.shape[1], offset)
    return input


def _places(
    cfg: ModelConfig, shape: torch.Size, segments: Int[Tensor, "batch pos"] | None, past: ReadPositions | None
) -> Places:
    if segments is None:
        if past is not None and torch.compiler.is_compiling():  # which would compile for each value in a slice anew
            return Places(torch.arange(past.length, past.length + shape[1], device=cfg.device)[None])
        offset = past.length if past is not None else 0
        return Places(slice(offset, offset + shape[1]))
    if past is not None:
        raise ReflowlensError("segments cannot be read with a key-value cache: pass whole rows and no past_kv_cache")
    _check_integers("segments", segments, shape)
    return packed_places(segments.to(cfg.device))


def _next_tokens(
    model: HookedModel, tokens: Int[Tensor, "batch pos"], lengths: list[int], segments: Int[Tensor, "batch pos"] | None
) -> Int[Tensor, "batch pos"]:
    """The token after each; none at the end of a text or over padding."""
    targets = model.next_tokens(tokens, lengths)
    if segments is None:
        return targets
    unpredictive = (segments != segments.roll(-1, dims=1)) | (segments < 0)
    return targets.masked_fill(unpredictive.to(targets.device), IGNORE)


def _check_targets(targets: Int[Tensor, "batch pos"] | None, shape: torch.Size, d_vocab: int) -> None:
    if targets is None:
        return
    _check_integers("targets", targets, shape)
    highest = int(targets.max()) if is_cheap_to_read(targets) else 0
    if highest >= d_vocab:
        raise ReflowlensError(f"no token {highest}: this model's ids are 0 to {d_vocab - 1}")


def _check_integers(name: str, values: Tensor, shape: torch.Size) -> None:
    if not isinstance(values, Tensor) or values.is_floating_point():
        got = values.dtype if isinstance(values, Tensor) else repr(values)
        raise ReflowlensError(f"{name} must be a tensor of integers [batch, pos], got {got}")
    if values.shape != shape:
        raise ReflowlensError(f"{name} must be [batch, pos] = {list(shape)}, got {list(values.shape)}")
