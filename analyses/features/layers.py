"""What can have feature pages: the features of a dictionary, and the units that a model is made of itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import FactoredMatrix
from transformer_lens.hook_points import HookPoint

from analyses.units.points import default_points, kind_of, level_of, points_named, written_by
from reflowlens.dictionaries.belonging import check_belongs
from reflowlens.dictionaries.dictionary import Dictionary, DictionaryLayer
from reflowlens.errors import ReflowlensError, nearest
from reflowlens.models.base import HookedModel
from reflowlens.models.numerics import wide

Encode: TypeAlias = Callable[[Float[Tensor, "n *unit"]], Float[Tensor, "n feature"]]
Promote: TypeAlias = Callable[[Int[Tensor, " feature"]], Float[Tensor, "feature token"]]
DirectPath: TypeAlias = "Callable[[Float[Tensor, 'feature d_model'] | None], Promote | None]"
_IN_THE_STREAM = (  # last parts of the names of points whose activations are in the residual stream or added to it
    "hook_embed",
    "hook_resid_pre",
    "hook_resid_mid",
    "hook_resid_post",
    "hook_attn_out",
    "hook_mlp_out",
)
Hook: TypeAlias = "tuple[str, Callable[[Tensor, HookPoint], Tensor | None]]"


@dataclass(frozen=True, eq=False)
class FeatureLayer:
    """Features that are read at one hook point.

    Args:
        key: what addresses it: the number of its block, with the kind of its units if it has no dictionary.
        name: for people.
        point: the hook point [batch, pos, ...] that its features are made from.
        encode: what is there at n positions -> the features' activations.
        n_features: number of features.
        signed: whether an activation can be negative.
        directions: what a feature adds to the residual stream at activation 1 (of readout signals: what they read
            from it); None of units that write nothing.
        promote: some features -> what each adds to the logits of all tokens at activation 1, on the direct path alone.
        remove: a feature a row -> hooks that take it out of a pass, and the feature's activations in this pass, once
            the hooks have run.
    """

    key: str
    name: str
    point: str
    encode: Encode
    n_features: int
    signed: bool
    directions: Float[Tensor, "feature d_model"] | None
    promote: Promote | None
    remove: Callable[[Int[Tensor, " row"]], tuple[list[Hook], dict[str, Float[Tensor, "row pos"]]]]

    def first(self, n: int | None) -> FeatureLayer:
        """The layer with its first n features alone; all for None."""
        if n is None or n >= self.n_features:
            return self
        directions = None if self.directions is None else self.directions[:n]
        return replace(self, n_features=n, encode=lambda x: self.encode(x)[:, :n], directions=directions)


def dictionary_layers(model: HookedModel, dictionary: Dictionary) -> list[FeatureLayer]:
    """The layers of a dictionary.

    Raises:
        ReflowlensError: it is no dictionary of this model.
    """
    check_belongs(dictionary, model)
    cfg, promoted_by = dictionary.cfg, _direct_path(model)
    numbers = [level_of(point) for point in cfg.reads]
    usual = len(set(numbers)) == len(numbers) and -1 not in numbers
    found = []
    for place, (layer, reads) in enumerate(zip(dictionary.each_layer(), cfg.reads, strict=True)):
        writes = cfg.writes[place : place + cfg.reach(place)]
        into_stream = all(point.rsplit(".", 1)[-1] in _IN_THE_STREAM for point in writes)
        directions = layer.W_dec.detach().sum(dim=1) if into_stream else None
        found.append(
            FeatureLayer(
                key=str(numbers[place] if usual else place),
                name=reads if reads == writes[0] else f"{reads} → {writes[0]}{' and later' * (len(writes) > 1)}",
                point=reads,
                encode=layer.encode,
                n_features=cfg.n_features,
                signed=False,
                directions=directions,
                promote=promoted_by(directions),
                remove=partial(_without_features, layer, reads, writes),
            )
        )
    return found


def unit_layers(model: HookedModel, names: str | Sequence[str] | None = None) -> list[FeatureLayer]:
    """The units of a model's hook points.

    Args:
        names: hook points or kinds of units (`analyses.units.points.points_named`); default what the architecture is
            made of, and the signals of a reFlow, as they enter (``recipe``) and as they are read out.

    Raises:
        ReflowlensError: the model has no such point or kind, or no usual units.
    """
    if names is None:
        points = ["hook_recipe"] * ("hook_recipe" in model.hook_dict) + default_points(model)
    else:
        points = points_named(model, names)
    sizes, promoted_by = _sizes(model, points), _direct_path(model)
    return [_unit_layer(model, point, sizes[point], promoted_by) for point in points]


def chosen_layers(layers: Sequence[FeatureLayer], wanted: Sequence[str] | None) -> list[FeatureLayer]:
    """Those layers whose keys are wanted, or whose block is; all for None.

    Raises:
        ReflowlensError: there is no such layer.
    """
    if wanted is None:
        return list(layers)
    chosen: list[FeatureLayer] = []
    for name in map(str, wanted):
        found = [layer for layer in layers if layer.key == name or layer.key.split("-")[0] == name]
        if not found:
            keys = [layer.key for layer in layers]
            raise ReflowlensError(f"no layer {name!r}{nearest(name, keys)}; there are {', '.join(keys)}")
        chosen += [layer for layer in found if layer not in chosen]
    return chosen


@torch.no_grad()
def _sizes(model: HookedModel, points: Sequence[str]) -> dict[str, int]:
    _, cache = model.run_with_cache(torch.zeros(1, 1, dtype=torch.long), names_filter=list(points), return_type=None)
    return {point: cache[point][0, 0].numel() for point in points}


def _unit_layer(model: HookedModel, point: str, n_units: int, promoted_by: DirectPath) -> FeatureLayer:
    directions, promote = _written(model, point, promoted_by)
    kind = kind_of(point)
    return FeatureLayer(
        key=f"{level_of(point)}-{kind}" if level_of(point) >= 0 else kind,
        name=point,
        point=point,
        encode=lambda x: x.flatten(1),
        n_features=n_units,
        signed=True,
        directions=directions,
        promote=promote,
        remove=partial(_without_units, point),
    )


def _written(
    model: HookedModel, point: str, promoted_by: DirectPath
) -> tuple[Float[Tensor, "unit d_model"] | None, Promote | None]:
    """What units write into the stream, and what that does to the logits; of readout signals their own weights."""
    factors = model.unembedding
    if point in ("hook_recipe", "unembed.hook_signal") and isinstance(factors, FactoredMatrix):
        basis, recipe = wide(factors.B.detach()), wide(factors.A.detach()[: model.tokenizer.n_vocab])
        if point == "hook_recipe":
            return basis, promoted_by(basis)
        return basis, lambda signals: recipe[:, signals].T
    weight = written_by(model, point)
    if weight is None:
        return None, None
    directions = wide(model.get_parameter(weight).detach()).flatten(0, -2)
    return directions, promoted_by(directions)


def _direct_path(model: HookedModel) -> DirectPath:
    """Makes of directions what they do to the logits; None of none, and where logits are no products with them."""
    if not model.reads_last_stream:
        return lambda directions: None
    unembedding = unembedding_of(model)
    return lambda directions: None if directions is None else partial(_direct_logits, directions, unembedding)


def unembedding_of(model: HookedModel) -> Float[Tensor, "token d_model"]:
    """What the final norm's scale is divided into: its weight and the unembedding; of a LayerNorm its centring too."""
    tokens = torch.arange(model.tokenizer.n_vocab, device=model.cfg.device)
    rows = wide((model.unembedding_rows(tokens) * model.ln_final.w).detach())
    return rows - rows.mean(dim=-1, keepdim=True) if getattr(model.ln_final, "centered", False) else rows


def _direct_logits(
    directions: Float[Tensor, "feature d_model"],
    unembedding: Float[Tensor, "token d_model"],
    features: Int[Tensor, " chosen"],
) -> Float[Tensor, "chosen token"]:
    """Directions through the unembedding as if nothing came between, and before the final norm divides by its scale."""
    return wide(directions[features]) @ unembedding.T


def _without_features(
    layer: DictionaryLayer, reads: str, writes: Sequence[str], features: Int[Tensor, " row"]
) -> tuple[list[Hook], dict[str, Float[Tensor, "row pos"]]]:
    """The error of the dictionary stays: only what the feature writes is taken away, wherever it writes."""
    rows = torch.arange(len(features), device=features.device)
    found: dict[str, Tensor] = {}

    def read(x: Tensor, hook: HookPoint) -> None:
        found["activations"] = layer.encode(x)[rows, :, features]

    def take(ahead: int, y: Tensor, hook: HookPoint) -> Tensor:
        return y - found["activations"][..., None] * layer.W_dec[features, ahead, None].to(y)

    return [(reads, read), *((point, partial(take, ahead)) for ahead, point in enumerate(writes))], found


def _without_units(point: str, features: Int[Tensor, " row"]) -> tuple[list[Hook], dict[str, Float[Tensor, "row pos"]]]:
    rows = torch.arange(len(features), device=features.device)
    found: dict[str, Tensor] = {}

    def silence(x: Tensor, hook: HookPoint) -> Tensor:
        flat = x.flatten(2).clone()
        found["activations"] = flat[rows, :, features]
        flat[rows, :, features] = 0
        return flat.view_as(x)

    return [(point, silence)], found
