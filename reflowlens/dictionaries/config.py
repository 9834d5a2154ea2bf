"""What a dictionary is: where it reads a model, where it writes, and how its features become active."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from reflowlens.errors import ReflowlensError, nearest

Activation: TypeAlias = Literal["relu", "jumprelu", "topk", "batchtopk"]
ACTIVATIONS: tuple[str, ...] = get_args(Activation)
WITH_K = ("topk", "batchtopk")
WITH_THRESHOLD = ("jumprelu", "batchtopk")


@dataclass(frozen=True)
class DictionaryConfig:
    """A dictionary of L layers.

    Args:
        reads, writes: the hook points [batch, pos, d] that its layers read and write, one pair a layer, in forward
            order. A layer whose two are the same point is a sparse autoencoder, otherwise a transcoder.
        d_in, d_out: width of what is read and of what is written.
        n_features: features a layer.
        activation: ``"relu"``; ``"jumprelu"``: a feature's own threshold; ``"topk"``: the k largest of a position;
            ``"batchtopk"``: trained as the k largest a position on average, used with the threshold that this came to.
        k: active features of a position, of ``"topk"`` and ``"batchtopk"``.
        cross_layer: whether a feature writes at its own layer and at every later one.
        skip: whether a linear map of what is read is added to what is written.
        model_name, model_hash: of the model that it was trained on.
        name: its own.

    Raises:
        ReflowlensError: a value is not allowed; the message names the field.

    >>> DictionaryConfig(("blocks.0.hook_resid_post",), ("blocks.0.hook_resid_post",), 16, 16, 64, "topk", k=8).kind
    'sae'
    """

    reads: tuple[str, ...]
    writes: tuple[str, ...]
    d_in: int
    d_out: int
    n_features: int
    activation: Activation = "topk"
    k: int | None = None
    cross_layer: bool = False
    skip: bool = False
    model_name: str = ""
    model_hash: str = ""
    name: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "reads", _points("reads", self.reads))
        object.__setattr__(self, "writes", _points("writes", self.writes))
        if len(self.reads) != len(self.writes):
            raise ReflowlensError(f"reads names {len(self.reads)} hook points and writes {len(self.writes)}")
        for name in ("d_in", "d_out", "n_features"):
            _positive(name, getattr(self, name))
        blocks = [int(point.split(".")[1]) for point in self.writes if re.match(r"blocks\.\d+\.", point)]
        if self.cross_layer and blocks != sorted(blocks):
            raise ReflowlensError(f"a cross-layer dictionary's layers must be in forward order, got blocks {blocks}")
        if self.activation not in ACTIVATIONS:
            raise ReflowlensError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        if self.activation in WITH_K:
            _positive("k", self.k)
            if self.k is not None and self.k > self.n_features:
                raise ReflowlensError(f"k must not be larger than n_features ({self.n_features}), got {self.k}")
        elif self.k is not None:
            raise ReflowlensError(f"k belongs to topk and batchtopk, not to activation {self.activation!r}")
        for name in ("cross_layer", "skip"):
            if not isinstance(getattr(self, name), bool):
                raise ReflowlensError(f"{name} must be true or false, got {getattr(self, name)!r}")
        for name in ("model_name", "model_hash", "name"):
            if not isinstance(getattr(self, name), str):
                raise ReflowlensError(f"{name} must be a text, got {getattr(self, name)!r}")
        if self.kind == "sae" and (self.d_in != self.d_out or self.cross_layer or self.skip):
            raise ReflowlensError("an autoencoder reads and writes one width, at its own layer, and has no skip")

    @property
    def kind(self) -> Literal["sae", "transcoder"]:
        """``"sae"`` where each layer writes what it reads, otherwise ``"transcoder"``."""
        return "sae" if self.reads == self.writes else "transcoder"

    @property
    def n_layers(self) -> int:
        return len(self.reads)

    def reach(self, layer: int) -> int:
        """To how many layers, from its own on, the features of a layer write."""
        return self.n_layers - layer if self.cross_layer else 1

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return dataclasses.asdict(self) | {"reads": list(self.reads), "writes": list(self.writes)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> DictionaryConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            ReflowlensError: a field is unknown or missing, or a value is not allowed.
        """
        known = {f.name: f for f in dataclasses.fields(cls)}
        for name in fields:
            if name not in known:
                raise ReflowlensError(f"a dictionary has no field {name!r}{nearest(name, list(known))}")
        required = [name for name, f in known.items() if f.default is dataclasses.MISSING]
        if missing := [name for name in required if name not in fields]:
            raise ReflowlensError(f"the dictionary's configuration lacks {', '.join(missing)}")
        return cls(**fields)


def _points(name: str, points: Any) -> tuple[str, ...]:
    if isinstance(points, str) or not isinstance(points, Sequence) or not all(isinstance(p, str) for p in points):
        raise ReflowlensError(f"{name} must be a list of hook points, got {points!r}")
    if not points or len(set(points)) < len(points):
        raise ReflowlensError(f"{name} must name at least one hook point, and none twice, got {list(points)}")
    return tuple(points)


def _positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ReflowlensError(f"{name} must be a positive integer, got {value!r}")
