"""A layer of a dictionary in its place in a model: what it reads, what its hook points see, and what it writes."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor

from reflowlens.errors import ReflowlensError
from reflowlens.models.parts import HookPoint, is_hooked, through_copy
from reflowlens.models.pass_context import pass_memory

if TYPE_CHECKING:
    from reflowlens.dictionaries.splice import Splice


class Reading(NamedTuple):
    """What a layer read in a pass; its features, as encoded and after their hooks, if anything asks for them."""

    x: Tensor
    features: Tensor | None
    edited: Tensor | None

    @property
    def change(self) -> Tensor | None:
        """By how much hooks changed the features; None where there are none."""
        if self.features is None or self.edited is None or self.edited is self.features:
            return None
        return self.edited - self.features


class SplicedLayer:
    """A layer of a dictionary in its block.

    Attributes:
        block, index: number of the block, and of the layer in the dictionary.
        read, write: full names of the points that it reads and writes.
        points: those that it adds, by full name.
        writes: whether what it writes replaces what was there; of a cross-layer dictionary that is spliced in for some
            layers, earlier ones only supply features.
    """

    def __init__(self, splice: Splice, index: int, block: int, writes: bool) -> None:
        cfg = splice.dictionary.cfg
        self.splice, self.index, self.block, self.writes = splice, index, block, writes
        self.read, self.write = cfg.reads[index], cfg.writes[index]
        self.weights = splice.dictionary.each_layer()[index]
        self.features, self.reconstruction, self.error = HookPoint(), HookPoint(), HookPoint()
        named = {"hook_features": self.features}
        if writes:
            named["hook_reconstruction"] = self.reconstruction
        if writes and splice.error is not False:
            named["hook_reconstruction_error"] = self.error
        self.points = {f"blocks.{block}.{name}": point for name, point in named.items()}

    @property
    def n_features(self) -> int:
        return self.splice.dictionary.cfg.n_features

    @property
    def is_cross_layer(self) -> bool:
        return self.splice.dictionary.cfg.cross_layer

    @property
    def keeps_error(self) -> bool:
        """Whether the error term is kept: then a layer without hooks on its features changes nothing."""
        return self.splice.error is not False

    def on_read(self, x: Float[Tensor, "*batch d_in"]) -> None:
        """Called with what the point that is read has, after its hooks."""
        asked, features, edited = self._is_asked_for(), None, None
        reads = self._reads(asked)
        if asked:
            with _own_precision(x):
                features = self.weights.encode(x.to(self.weights.W_enc.dtype))
            edited = through_copy(self.features, features)
        reads[self.index] = Reading(x, features, edited)

    def on_write(self, y: Float[Tensor, "*batch d_out"]) -> Float[Tensor, "*batch d_out"]:
        """What goes into the point that is written, before its hooks."""
        asked = self._is_asked_for()
        reads = self._reads(asked)
        if asked and self.index not in reads:
            raise ReflowlensError(f"{self.write!r} is reached before {self.read!r}, which the dictionary reads for it")
        if not self.keeps_error:
            out = through_copy(self.reconstruction, self._reconstruct(reads, "edited"))
        elif self._error_is_constant():
            constant = (y - self._reconstruct(reads, "features")).detach().requires_grad_()  # a node of its own
            out = through_copy(self.reconstruction, self._reconstruct(reads, "edited"))
            out = out + through_copy(self.error, constant)
        else:
            out = y + changes if (changes := self._changes(y, reads)) is not None else y
        if not self.is_cross_layer:
            reads.pop(self.index, None)
        return out.to(y.dtype)

    def decoded(self, change: Float[Tensor, "*batch feature"], ahead: int = 0) -> Float[Tensor, "*batch d_out"]:
        """What a change of the features adds ``ahead`` layers after their own; edits are mostly of few of them."""
        with _own_precision(change):
            if change.requires_grad:  # features that are not changed have a gradient all the same
                return self.weights.write(change, ahead)
            some = change.flatten(0, -2).any(dim=0).nonzero()[:, 0]
            return change[..., some] @ self.weights.W_dec[some, ahead]

    def _changes(self, y: Float[Tensor, "*batch d_out"], reads: dict[int, Reading]) -> Tensor | None:
        """By how much hooks on features, reconstruction and error change what is written; None where there are none."""
        changes = []
        for writer in self.splice.layers:
            read = reads.get(writer.index)  # where a pass begins behind a layer, nothing changes its features
            if writer.index in self._sources() and read is not None and (change := read.change) is not None:
                changes.append(writer.decoded(change, self.index - writer.index))
        if is_hooked(self.reconstruction):
            reconstruction = self._reconstruct(reads, "edited")
            changes.append(through_copy(self.reconstruction, reconstruction) - reconstruction)
        if is_hooked(self.error):
            error = y - self._reconstruct(reads, "features")
            changes.append(through_copy(self.error, error) - error)
        return functools.reduce(torch.add, changes) if changes else None

    def _reconstruct(
        self, reads: dict[int, Reading], which: Literal["features", "edited"]
    ) -> Float[Tensor, "*batch d_out"]:
        if missing := [source for source in self._sources() if source not in reads]:
            reads_first = self.splice.dictionary.cfg.reads[missing[0]]
            raise ReflowlensError(
                f"the reconstruction at {self.write!r} needs the features of earlier layers, and this pass began "
                f"behind {reads_first!r}: a cross-layer dictionary goes with passes from its first layer on"
            )
        x = reads[self.index].x
        features = {source: getattr(reads[source], which) for source in self._sources()}
        with _own_precision(x):
            return self.splice.dictionary.reconstruct(self.index, features, x.to(self.weights.W_enc.dtype))

    def _sources(self) -> range:
        """The layers whose features it writes."""
        return range(0 if self.is_cross_layer else self.index, self.index + 1)

    def _is_asked_for(self) -> bool:
        """Whether anything needs the features: hooks, or a reconstruction that they are part of."""
        if not self.keeps_error or is_hooked(self.features) or self._error_is_constant():
            return True
        return any(
            is_hooked(other.reconstruction, other.error)
            for other in self.splice.layers
            if self.index in other._sources()
        )

    def _error_is_constant(self) -> bool:
        return self.splice.error == "detached" and torch.is_grad_enabled()

    def _reads(self, asked: bool) -> dict[int, Reading]:
        """What the layers read in the pass that is running, or in a block that is called by itself."""
        memory = pass_memory(self.splice.model)
        if memory is not None:
            return memory.setdefault(self.splice, {})
        if self.is_cross_layer and asked:
            raise ReflowlensError(f"{self.read!r} was reached outside of the model's own forward pass: call the model")
        return self.splice.outside

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise ReflowlensError(
            "a model cannot be copied or pickled while a dictionary is spliced into it: do it outside of the block"
        )


class ReadPoint(HookPoint):
    """What a point is while a dictionary reads it: hooks that are attached to it earlier or later come first."""

    def __call__(self, x: Tensor) -> Tensor:
        x = super().__call__(x)
        self.__dict__["spliced"].on_read(x)
        return x


class WritePoint(HookPoint):
    """What a point is while a dictionary writes it: hooks that were attached to it earlier or are later come after."""

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(self.__dict__["spliced"].on_write(x))


class ReadWritePoint(HookPoint):
    """Both, of an autoencoder."""

    def __call__(self, x: Tensor) -> Tensor:
        self.__dict__["spliced"].on_read(x)
        return super().__call__(self.__dict__["spliced"].on_write(x))


def _own_precision(x: Tensor) -> torch.autocast:
    """A dictionary computes in the type of its weights, under autocast too: features are what it encodes elsewhere."""
    return torch.autocast(x.device.type, enabled=False)
