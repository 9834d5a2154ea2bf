"""Whether a dictionary can be used on a model: its hook points, their widths, and the model's weights."""

from __future__ import annotations

from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

from reflowlens.dictionaries.dictionary import Dictionary
from reflowlens.errors import ReflowlensError, nearest
from reflowlens.models.base import HookedModel
from reflowlens.models.numerics import wide
from reflowlens.models.unwrapping import hooked_model
from reflowlens.storage.model_hash import model_hash

_State: TypeAlias = "tuple[tuple[int, int, float], ...]"
_HASHES: WeakKeyDictionary[HookedModel, tuple[_State, str]] = WeakKeyDictionary()


def check_belongs(dictionary: Dictionary, model: Any, *, other_model: bool = False) -> HookedModel:
    """The hooked model itself, if the dictionary is one of it; otherwise an error.

    Args:
        dictionary: with ``cfg.model_hash`` empty, the model's weights are not compared.
        model: a hooked model, compiled or not; it is not run.
        other_model: on purpose a model of other weights, e.g. with the dictionary of its untrained twin: then only the
            hook points and their widths must be there.

    Raises:
        ReflowlensError: the model lacks a hook point, has another width there, or is another model.
    """
    model, cfg = hooked_model(model), dictionary.cfg
    for point in (*cfg.reads, *cfg.writes):
        if point not in model.hook_dict:
            raise ReflowlensError(
                f"{_of(dictionary)} has {point!r}, and this model has no such hook point"
                f"{nearest(point, list(model.hook_dict))}"
            )
    for points, width in ((cfg.reads, cfg.d_in), (cfg.writes, cfg.d_out)):
        for point in points:
            if (shape := _shape(model, point)) != [1, 1, width]:
                raise ReflowlensError(
                    f"{_of(dictionary)} expects activations [batch, pos, {width}] at {point}; one token of this model "
                    f"has {shape} there"
                )
    if not other_model and cfg.model_hash and (own := _hash_of(model)) != cfg.model_hash:
        raise ReflowlensError(
            f"{_of(dictionary)} was trained on a model of other weights (hash {cfg.model_hash[:12]}…, this one has "
            f"{own[:12]}…; edits and other types of numbers count): load that model, or use this one on "
            "purpose: other_model=True"
        )
    return model


def _hash_of(model: HookedModel) -> str:
    """The model's hash, remembered until its weights are others: of a billion it takes seconds, and every graph asks.

    What is written past torch's count of changes (``weight.data``) shows in the sums.
    """
    weights = model.state_dict().values()
    state = tuple((x.data_ptr(), 0 if x.is_inference() else x._version, float(wide(x).sum())) for x in weights)
    known = _HASHES.get(model)
    if known is None or known[0] != state:
        _HASHES[model] = known = state, model_hash(model)
    return known[1]


def check_device(model: HookedModel, dictionary: Dictionary) -> None:
    """Raise where a dictionary is on another device than a model."""
    theirs, own = next(dictionary.parameters()).device, next(model.parameters()).device
    if theirs != own:
        raise ReflowlensError(f"the dictionary is on {theirs} and the model on {own}: dictionary.to({str(own)!r})")


def _of(dictionary: Dictionary) -> str:
    cfg = dictionary.cfg
    return f"the dictionary {cfg.name or 'without a name'}" + (f" of {cfg.model_name}" if cfg.model_name else "")


def _shape(model: HookedModel, point: str) -> list[int | str]:
    """The shape of one token's activation, by the names of its axes: a pass would see what is attached to the model."""
    cfg = model.cfg
    sizes = {"batch": 1, "pos": 1, "one": 1, "d_model": cfg.d_model, "d_mlp": cfg.d_mlp, "signal": cfg.n_signals or 0}
    sizes |= {"head": cfg.n_heads, "d_head": cfg.d_head, "neuron": cfg.d_head}
    return [sizes.get(axis, axis) for axis in model.hook_axes(point)]
