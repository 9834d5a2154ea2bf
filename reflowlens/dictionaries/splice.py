"""Features as hook points: a dictionary in its place in a model, for the duration of a block.

    with dictionary.spliced(model):               # the model computes exactly what it did
        model.run_with_cache(text)[1]["features", 2]                            # [batch, pos, feature]
        rl.run(model, text, rl.Ablate("features", layer=2, index=17))
        rl.sweep(model, clean, corrupted, "features", metric)
    with dictionary.spliced(model, error=False):  # the replacement model: what is written is the reconstruction

A layer that reads x at one point of a block and is to say y at another adds to this block

    hook_features              f  = encode(x)           [batch, pos, feature]
    hook_reconstruction        ŷ(f), cross-layer of every layer up to its own       [batch, pos, d_out]
    hook_reconstruction_error  y - ŷ(f), with the error term alone                  [batch, pos, d_out]

Let f' be the features after the hooks on them, and ŷ, e the other two after theirs. What is written is

    y' = ŷ(f') + e    with the error term, e = y - ŷ(f) of the features as they were encoded, or
    y' = ŷ(f')        without it.

With the error term it is computed as y plus what the hooks change, so that without any it is y to the bit.

x is what the last hook on its point leaves, whenever that was attached; y' enters the other point before the first hook
on it. Of an autoencoder, which reads and writes at one point, both come before the point's hooks.

Gradients: ∂y'/∂f' is the decoder. Of points before the dictionary, the gradient is that of what is computed, with the
error term therefore the model's own, to which the features' decoding and encoding add nothing. ``error="detached"`` has
the same values and takes the error as a constant: all gradient goes through the features (and the skip), none around
them, as attribution graphs want it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, TypeAlias
from weakref import WeakKeyDictionary

import torch
from transformer_lens import hook_points

from reflowlens.arguments import integer
from reflowlens.dictionaries.belonging import check_belongs, check_device
from reflowlens.dictionaries.dictionary import Dictionary
from reflowlens.dictionaries.spliced_layer import Reading, ReadPoint, ReadWritePoint, SplicedLayer, WritePoint
from reflowlens.errors import ReflowlensError
from reflowlens.interventions.passes import UNCOMPILED
from reflowlens.models.base import HookedModel
from reflowlens.models.parts import HookPoint
from reflowlens.models.threads import changing
from reflowlens.storage.model_hash import model_hash

ErrorTerm: TypeAlias = bool | Literal["detached"]


@contextlib.contextmanager
def splice(
    model: Any,
    dictionary: Dictionary,
    *,
    error: ErrorTerm = True,
    layers: int | Sequence[int] | None = None,
    other_model: bool = False,
) -> Iterator[HookedModel]:
    """:meth:`reflowlens.dictionaries.dictionary.Dictionary.spliced`, which has the documentation."""
    hooked = check_belongs(dictionary, model, other_model=other_model)
    with changing(hooked), UNCOMPILED:
        spliced = Splice(hooked, dictionary, error, layers)
        spliced.attach()
        try:
            yield hooked
        finally:
            open_blocks = spliced.hooked_points()
            spliced.detach()
    if open_blocks:
        raise ReflowlensError(
            f"{open_blocks[0]!r} is gone with its dictionary, and a block of hooks or interventions on it is still "
            "open: leave that one first"
        )


def spliced_layers(model: HookedModel) -> list[SplicedLayer]:
    """The layers of all dictionaries that are spliced into a model, in the order of its blocks."""
    return sorted((layer for one in _SPLICED.get(model, ()) for layer in one.layers), key=lambda layer: layer.block)


def identity_of(model: HookedModel) -> str:
    """Of results that are to be continued or merged: the model's hash, and of what is spliced into it, if anything is.

    A model with dictionaries in it has its own hash still, but other activations.
    """
    own, spliced = model_hash(model), [one.identity() for one in _SPLICED.get(model, ())]
    return hashlib.sha256(json.dumps([own, *spliced]).encode()).hexdigest() if spliced else own


class Splice:
    """A dictionary in a model.

    Attributes:
        layers: those that take part, in order.
        outside: what layers read in blocks that are called by themselves, outside of a pass of the model.
    """

    def __init__(
        self, model: HookedModel, dictionary: Dictionary, error: ErrorTerm, layers: int | Sequence[int] | None
    ) -> None:
        if not (isinstance(error, bool) or (isinstance(error, str) and error == "detached")):
            raise ReflowlensError(f"error must be True, False or 'detached', got {error!r}")
        self.model, self.dictionary, self.error = model, dictionary, error
        self.outside: dict[int, Reading] = {}
        check_device(model, dictionary)
        cfg = dictionary.cfg
        blocks = [_block(read, write) for read, write in zip(cfg.reads, cfg.writes, strict=True)]
        chosen = _chosen(blocks, layers)
        first = 0 if cfg.cross_layer else min(chosen)
        taking_part = [i for i in range(first, max(chosen) + 1) if cfg.cross_layer or i in chosen]
        self.layers = [SplicedLayer(self, i, blocks[i], writes=i in chosen) for i in taking_part]
        taken = {layer.block for layer in spliced_layers(model)}
        for layer in self.layers:
            if layer.block in taken:
                raise ReflowlensError(
                    f"block {layer.block} has the features of another layer of a dictionary already: splice each into "
                    "blocks of its own, with layers="
                )
            taken.add(layer.block)
            for point in self._own_points(layer):
                if type(point) is not HookPoint:  # which it is made again afterwards
                    raise ReflowlensError(
                        f"{point.name!r} is of class {type(point).__name__}: a dictionary is spliced in at points of "
                        "class reflowlens.models.parts.HookPoint"
                    )

    def attach(self) -> None:
        """Add the points, and listen at those that are read and written."""
        _SPLICED.setdefault(self.model, []).append(self)
        for layer in self.layers:
            for name, point in layer.points.items():
                point.name = name
                point.train(self.model.training)
                self.model.hook_dict[name] = self.model.mod_dict[name] = point
                setattr(self.model.blocks[layer.block], name.rsplit(".", 1)[-1], point)
            for heard in self._own_points(layer):
                written = layer.writes and heard.name == layer.write
                read = heard.name == layer.read
                heard.__class__ = ReadWritePoint if read and written else ReadPoint if read else WritePoint
                heard.__dict__["spliced"] = layer

    def detach(self) -> None:
        """Undo :meth:`attach`."""
        _SPLICED[self.model].remove(self)
        for layer in self.layers:
            for name in layer.points:
                del self.model.hook_dict[name], self.model.mod_dict[name]
                delattr(self.model.blocks[layer.block], name.rsplit(".", 1)[-1])
            for point in self._own_points(layer):
                point.__class__ = HookPoint
                del point.__dict__["spliced"]

    def hooked_points(self) -> list[str]:
        """The added points on which a block of hooks is open."""
        return [
            name
            for layer in self.layers
            for name, point in layer.points.items()
            if any(handle.context_level is not None for handle in (*point.fwd_hooks, *point.bwd_hooks))
        ]

    def identity(self) -> list[Any]:
        """Of which numbers, where and how it is spliced in."""
        digest = hashlib.sha256(json.dumps(self.dictionary.cfg.to_dict(), sort_keys=True).encode())
        for name, tensor in sorted(self.dictionary.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
        return [digest.hexdigest(), self.error, [layer.block for layer in self.layers if layer.writes]]

    def _own_points(self, layer: SplicedLayer) -> list[hook_points.HookPoint]:
        """The model's points at which a layer listens."""
        return [self.model.hook_dict[name] for name in {layer.read, *([layer.write] if layer.writes else [])}]


_SPLICED: WeakKeyDictionary[HookedModel, list[Splice]] = WeakKeyDictionary()


def _block(read: str, write: str) -> int:
    """The block that a layer of a dictionary belongs to."""
    blocks = {tuple(name.split(".")[:2]) for name in (read, write)}
    first, *number = blocks.pop()
    if blocks or first != "blocks" or not number:
        raise ReflowlensError(f"features belong to a block: {read!r} and {write!r} are not two points of one block")
    return int(number[0])


def _chosen(blocks: Sequence[int], layers: int | Sequence[int] | None) -> set[int]:
    """Which of a dictionary's layers lie in the blocks that are asked for."""
    if layers is None:
        return set(range(len(blocks)))
    asked = list(layers) if isinstance(layers, Iterable) else [layers]
    for block in asked:
        if integer(block) not in blocks:
            raise ReflowlensError(
                f"layers must be blocks of the dictionary, {', '.join(map(str, blocks))}, got {block!r}"
            )
    if not asked:
        raise ReflowlensError("layers names no block to splice the dictionary into")
    return {i for i, block in enumerate(blocks) if block in set(map(integer, asked))}
