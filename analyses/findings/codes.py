"""Codes: what a place in a model holds, as a sum over coordinates, most of which can be left out.

Two places are looked at, both of which add to the last residual stream directly, so that what a coordinate does to a
prediction is a product: ``stream``, that stream itself, and ``mlp``, what the last block's MLP writes into it. What a
place holds is read *normed*: through the final norm's weight and under the divisor σ that the norm has at that
position, so that logits are W_U applied to the sum of everything normed.

A code says the normed v of a place as c + Σ_s z_s D_s (+ an error): coordinates z, writes D [S, d_model] and a constant
c. Of a view of `reflowlens.signals` z = B (v - v̄), its readout less the mean over training documents, with D the dual
rows (B⁺)ᵀ and c = v̄: all S of them are exact where B has rank d_model. Of a dictionary z = a / σ, D the decoder through
the norm's weight, c its bias. Of the MLP's neurons likewise their activations and W_out. Of k coordinates those are
kept whose writes move all logits most, |z_s| ‖W_U D_s‖, with logits centred over the vocabulary: one rule for all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from analyses.features.documents import document_batches
from analyses.units.points import written_by
from reflowlens.dictionaries.dictionary import Dictionary
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.models.loss import capped
from reflowlens.models.numerics import wide
from reflowlens.signals import SignalView, signal_view, view_of

STREAM, MLP = "stream", "mlp"
_ROWS = 256  # logits of so many positions are held at once
_TIMED = 512


@dataclass(frozen=True, eq=False)
class Held:
    """What a model holds at every position of documents that counts, n in all; normed as the module says.

    Args:
        document, position: where.
        target: the next token, -1 where there is none.
        scale: σ [n, 1].
        places: the normed vectors of ``stream`` and ``mlp`` [n, d_model].
        points: what was at hook points that codes read, by name.
        unembedding: W_U's rows [token, d_model] of real tokens, with its ``bias`` and ``cap``; ``offset`` is the norm's
            bias.
    """

    document: Int[Tensor, " n"]
    position: Int[Tensor, " n"]
    target: Int[Tensor, " n"]
    scale: Float[Tensor, "n 1"]
    places: dict[str, Float[Tensor, "n d_model"]]
    points: dict[str, Float[Tensor, "n _width"]]
    unembedding: Float[Tensor, "token d_model"]
    offset: Float[Tensor, " d_model"]
    bias: Float[Tensor, " token"] | None
    cap: float | None

    def __len__(self) -> int:
        return len(self.target)

    def of(self, rows: Tensor) -> Held:
        """Some of the positions."""
        where = (self.document[rows], self.position[rows], self.target[rows], self.scale[rows])
        places, points = ({name: x[rows] for name, x in some.items()} for some in (self.places, self.points))
        return Held(*where, places, points, self.unembedding, self.offset, self.bias, self.cap)

    @property
    def normed(self) -> Float[Tensor, "n d_model"]:
        """What logits are read off."""
        return self.places[STREAM] + self.offset

    def logits(self, normed: Float[Tensor, "n d_model"]) -> Float[Tensor, "n token"]:
        """Of normed vectors, which may be others than those that are held."""
        logits = normed @ self.unembedding.T
        return capped(logits if self.bias is None else logits + self.bias, self.cap)

    def losses(self, normed: Float[Tensor, "n d_model"]) -> Float[Tensor, " n"]:
        """Cross-entropy of the next token in nats, NaN where there is none."""
        found = [
            torch.nn.functional.cross_entropy(self.logits(some), targets.clamp(min=0), reduction="none")
            for some, targets in zip(normed.split(_ROWS), self.target.split(_ROWS), strict=True)
        ]
        return torch.cat(found).masked_fill(self.target < 0, torch.nan)

    def divergences(self, normed: Float[Tensor, "n d_model"]) -> Float[Tensor, " n"]:
        """KL(model ‖ changed) in nats."""
        found = []
        for own, other in zip(self.normed.split(_ROWS), normed.split(_ROWS), strict=True):
            before, after = (self.logits(x).log_softmax(dim=-1) for x in (own, other))
            found.append((before.exp() * (before - after)).sum(dim=-1).clamp(min=0))
        return torch.cat(found)


@dataclass(frozen=True, eq=False)
class Code:
    """What a place holds as c + Σ_s z_s D_s; the module says which codes there are.

    Args:
        name, place: which.
        encode: the coordinates of held positions.
        writes: D.
        constant: c of held positions.
        parameters: numbers that it adds to the model.
        training_tokens: that it was trained on beside the model's own; NaN where it is not known.
    """

    name: str
    place: str
    encode: Callable[[Held], Float[Tensor, "n S"]]
    writes: Float[Tensor, "S d_model"]
    constant: Callable[[Held], Float[Tensor, "n d_model"]]
    parameters: int
    training_tokens: float

    def lengths(self, held: Held) -> Float[Tensor, " S"]:
        """How far each coordinate's write moves all logits, centred over the vocabulary."""
        centred = held.unembedding - held.unembedding.mean(dim=0)
        return torch.einsum("sd,de,se->s", self.writes, centred.T @ centred, self.writes).clamp(min=0).sqrt()

    def kept(self, z: Float[Tensor, "n S"], k: int, held: Held) -> Float[Tensor, "n S"]:
        """The coordinates without all but the k that move all logits most."""
        chosen = (z.abs() * self.lengths(held)).topk(min(k, z.shape[1]), dim=1).indices
        return torch.zeros_like(z).scatter(1, chosen, z.gather(1, chosen))

    def with_kept(self, held: Held, k: int, z: Float[Tensor, "n S"] | None = None) -> Float[Tensor, "n d_model"]:
        """What logits are read off when the place holds the constant and k coordinates, and no error."""
        kept = self.kept(self.encode(held) if z is None else z, k, held)
        return held.normed - held.places[self.place] + self.constant(held) + kept @ self.writes

    def milliseconds(self, held: Held) -> float:
        """Of encoding a token, the least of three."""
        some = held.of(torch.arange(min(_TIMED, len(held))))
        taken = []
        for _ in range(3):
            started = time.perf_counter()
            self.encode(some)
            taken.append(time.perf_counter() - started)
        return 1000 * min(taken) / len(some)


def hold(
    model: HookedModel, rows: Sequence[Int[Tensor, " _token"]], points: Sequence[str], batch_size: int = 16
) -> Held:
    """Read documents once.

    Args:
        points: hook points that codes read, beside the two places.

    Raises:
        ReflowlensError: the model's logits are no sums over its last residual stream.
    """
    model.check_reads_last_stream("codes of a prediction")
    last = model.cfg.n_layers - 1
    stream, mlp = f"blocks.{last}.hook_resid_post", f"blocks.{last}.hook_mlp_out"
    names = [stream, *([mlp] if mlp in model.hook_dict else []), *points]
    view, parts = signal_view(model, "identity"), []
    for batch in document_batches(rows, batch_size):
        _, cache = model.run_with_cache(batch.tokens, return_type=None, names_filter=names, return_cache_object=False)
        target = torch.full((len(batch.document),), -1, device=batch.tokens.device)
        target[batch.predicts] = batch.targets
        position = batch.counted.nonzero()[:, 1]
        parts.append((batch.document, position, target, *(batch.within(cache[name]) for name in names)))
    document, position, target, *found = (torch.cat(each) for each in zip(*parts, strict=True))
    held = dict(zip(names, found, strict=True))
    x = held[stream] - held[stream].mean(-1, keepdim=True) if model.ln_final.centered else held[stream]
    scale = (x.square().mean(-1, keepdim=True) + model.ln_final.eps).sqrt()
    normed = {STREAM: held[stream]} | ({MLP: held[mlp]} if mlp in held else {})
    n = model.tokenizer.n_vocab
    return Held(
        document,
        position,
        target,
        scale,
        {name: view.normed(y, scale) for name, y in normed.items()},
        {point: held[point] for point in points},
        view.recipe[:n],
        view.norm_bias(),
        None if view.bias is None else view.bias[:n],
        view.cap,
    )


def view_codes(model: HookedModel, training: Held, seed: int) -> list[Code]:
    """The views of a model's own weights as codes of every place that it has, the model's own view first."""
    factored = bool(model.cfg.n_signals)
    names = (
        ("native", "varimax", "rotated", "svd", "identity") if factored else ("identity", "varimax", "rotated", "svd")
    )
    views = {name: view_of(model, name, seed=seed) for name in names}
    return [_of_view(view, place, training, name) for place in training.places for name, view in views.items()]


def dictionary_code(model: HookedModel, name: str, dictionary: Dictionary, training_tokens: float) -> Code:
    """The last block's features of a dictionary as a code.

    Raises:
        ReflowlensError: it has none that are of the last residual stream or of what the last MLP writes.
    """
    cfg, last = dictionary.cfg, model.cfg.n_layers - 1
    at = {f"blocks.{last}.hook_resid_post": STREAM, f"blocks.{last}.hook_mlp_out": MLP}
    index = next((i for i, write in enumerate(cfg.writes) if write in at), None)
    if index is None or cfg.cross_layer or cfg.skip or (at[cfg.writes[index]] == STREAM and cfg.kind != "sae"):
        raise ReflowlensError(
            f"{name} is no dictionary of {' or '.join(map(repr, at))} whose features write there alone: codes of a "
            "prediction are autoencoders of the last residual stream, and transcoders of the last MLP"
        )
    layer, read = dictionary.each_layer()[index], cfg.reads[index]
    view = signal_view(model, "identity")
    constant = view.normed(layer.b_dec.detach(), 1.0)
    return Code(
        name,
        at[cfg.writes[index]],
        lambda held: layer.encode(held.points[read]) / held.scale,
        view.normed(wide(layer.W_dec[:, 0].detach()), 1.0),
        lambda held: constant / held.scale,
        sum(parameter.numel() for parameter in layer.parameters()),
        training_tokens,
    )


def neuron_code(model: HookedModel) -> Code | None:
    """The neurons of the last block's MLP; None where it has none that write into the stream."""
    last = model.cfg.n_layers - 1
    read = f"blocks.{last}.mlp.hook_post"
    weight = written_by(model, read)
    if weight is None or read not in model.hook_dict:
        return None
    parameters = dict(model.named_parameters())
    bias = parameters.get(weight.replace("W_out", "b_out"))
    view = signal_view(model, "identity")
    writes = view.normed(wide(parameters[weight].detach()), 1.0)
    constant = writes.new_zeros(writes.shape[1]) if bias is None else view.normed(wide(bias.detach()), 1.0)
    return Code(
        "neurons", MLP, lambda held: held.points[read] / held.scale, writes, lambda held: constant / held.scale, 0, 0.0
    )


def points_read(model: HookedModel, dictionaries: Sequence[Dictionary]) -> list[str]:
    """The hook points that the codes of a model and some dictionaries read."""
    last = model.cfg.n_layers - 1
    reads = [point for one in dictionaries for point in one.cfg.reads if point.startswith(f"blocks.{last}.")]
    neurons = f"blocks.{last}.mlp.hook_post"
    return list(dict.fromkeys([*reads, *([neurons] if neurons in model.hook_dict else [])]))


def _of_view(view: SignalView, place: str, training: Held, name: str) -> Code:
    basis = view.basis.float()
    mean = training.places[place].mean(dim=0)
    added = {"varimax": view.n_signals**2, "rotated": view.n_signals**2}
    return Code(
        name,
        place,
        lambda held: (held.places[place] - mean) @ basis.T,
        torch.linalg.pinv(basis).T,
        lambda held: mean.expand(len(held), -1),
        len(mean) + added.get(name, 0),
        0.0,
    )
