"""Interventions as values: what to change, where, and to what.

An intervention names a hook point and selects a part of its activation; when the model runs under
:func:`reflowlens.interventions.apply.intervene` that part is replaced, out of place.

    Ablate("unembed.hook_signal", index=17)                                  one signal of the readout, zeroed
    Ablate("z", layer=3, head=2, by="mean", reference=["Some text.", ...])   one head, at its mean
    Patch("resid_pre", "The capital of Italy is", layer=4, position="last")  what another prompt has there
    Steer("resid_post", direction, 4.0, layer=[2, 3], position=" France")    add 4 directions at a token
    Scale("mlp.hook_post", 0.5, layer=1, index=[5, 7])                       two neurons at half strength
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from reflowlens.arguments import integer, random_seed, real
from reflowlens.config import nearest
from reflowlens.errors import ReflowlensError
from reflowlens.models.text import read_once

Position: TypeAlias = "int | slice | Sequence[int] | str | None"
Selector: TypeAlias = "int | slice | Sequence[int] | None"
Source: TypeAlias = "str | Sequence[str] | Tensor | Mapping[str, Tensor] | None"


@dataclass(frozen=True, eq=False)
class Intervention:
    """Where an intervention acts. The kinds below say what it does there.

    Args:
        hook: a hook point's full name (``"blocks.3.attn.hook_z"``), or its short name (``"z"``, ``"resid_pre"``,
            ``"mlp.hook_post"``) together with ``layer``.
        layer: one block, several, or ``"all"``; negative counts from the end.
        position: index, slice, indices, ``"last"`` or the text of a token, which selects its every occurrence; None is
            every position. ``"last"`` and negative numbers count from each prompt's own end, padding left out; while
            text is generated ``"last"`` is the prompt's last token and then each new one. Of attention squares it is
            the query's.
        head: which heads, where the activation has a head axis (grouped-query keys and values: key/value heads).
        index: which entries of the last axis: signals, neurons, features; rows of ``hook_basis``; key positions, of
            which negative ones count from each prompt's own end, and padding is never among them.

    Selectors may be NumPy's or torch's integers, ranges and arrays of integers; they become plain ones.

    Raises:
        ReflowlensError: the hook is no name, or a selector is empty, a mask, or neither an index, a slice, nor several
            indices.
    """

    kind: ClassVar[str]

    hook: str
    layer: int | Sequence[int] | Literal["all"] | None = field(default=None, kw_only=True)
    position: Position = field(default=None, kw_only=True)
    head: Selector = field(default=None, kw_only=True)
    index: Selector = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.hook, str):
            raise ReflowlensError(f"{type(self).__name__}.hook must be a hook point's name, got {self.hook!r}")
        for name in ("layer", "position", "head", "index"):
            object.__setattr__(self, name, _selector(getattr(self, name), f"{type(self).__name__}.{name}"))

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        return all(_same(getattr(self, f.name), getattr(other, f.name)) for f in dataclasses.fields(self))

    def __hash__(self) -> int:
        return hash((self.kind, self.hook))  # of what is hashable whatever the selectors and directions are

    def source(self) -> Source:
        """The run that the new value is taken from, where there is one."""
        return None

    def new_value(self, part: Tensor, source: Tensor | None) -> Tensor:
        """The new value of the selected part.

        Args:
            part: the activation at the selected places, [batch, pos, (head), feature]; without a source in the
                point's own order of axes, as numbers are given for it.
            source: the same heads and features in the run that :meth:`source` names; at the same positions, at the one
                that a patch asks for, or at all of its own, padding left out.
        """
        raise NotImplementedError

    @property
    def takes_same_positions(self) -> bool:
        """Whether the source is read at the selected positions."""
        return False

    def given_shape(self) -> tuple[int, ...]:
        """The shape of the numbers that come with the intervention itself; () of one, or none."""
        return ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields; tensors become nested lists.

        Raises:
            ReflowlensError: a source is a cache of activations: give its text or tokens instead.
        """
        names = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) is not None]
        return {"kind": self.kind} | {name: _to_plain(getattr(self, name), f"{self.kind}.{name}") for name in names}


@dataclass(frozen=True, eq=False)
class Ablate(Intervention):
    """Remove: zero, the mean over a reference batch, or values drawn from it.

    Args:
        by: ``"zero"``; ``"mean"`` over every position of every reference prompt; ``"resample"``, where each selected
            place takes the values of a place of the reference drawn at random.
        reference: text, texts, tokens [batch, pos] or a cache, all of whose positions count; the padding of texts, and
            of a cache of texts, is left out. Not for ``"zero"``.
        seed: of the draw. Each pass draws anew from it, one place after the other through the rows of the batch: rows
            of the same text draw different places, and so does a text alone from what it draws in a batch, or written
            with a key-value cache from what it draws when read whole.
    """

    kind = "ablate"
    by: Literal["zero", "mean", "resample"] = "zero"
    reference: Source = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "reference", read_once(self.reference))
        if self.by not in ("zero", "mean", "resample"):
            raise ReflowlensError(f"Ablate.by must be 'zero', 'mean' or 'resample', got {self.by!r}")
        random_seed(self.seed)
        if (self.by == "zero") != (self.reference is None):
            raise ReflowlensError(f"Ablate(by={self.by!r}) {'takes no' if self.by == 'zero' else 'needs a'} reference")

    def source(self) -> Source:
        return self.reference

    def new_value(self, part: Tensor, source: Tensor | None) -> Tensor:
        if source is None:
            return torch.zeros_like(part)
        places = source.flatten(0, 1)
        if self.by == "mean":
            return places.mean(dim=0).expand_as(part)
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randint(len(places), tuple(part.shape[:2]), generator=generator)
        return places[drawn.to(places.device)]


@dataclass(frozen=True, eq=False)
class Patch(Intervention):
    """Put in what another run has at the same places.

    Args:
        prompt: that run: text, texts, tokens or a cache; one row serves every row. In a sweep None is the clean run.
        from_position: take this position of the other run for every selected one; ``"last"`` is its last. Of several
            prompts it counts within each one's own tokens.
    """

    kind = "patch"
    prompt: Source = None
    from_position: int | Literal["last"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "prompt", read_once(self.prompt))
        if self.from_position not in (None, "last"):
            index = integer(self.from_position)
            if index is None:
                raise ReflowlensError(f"Patch.from_position must be an index or 'last', got {self.from_position!r}")
            object.__setattr__(self, "from_position", index)

    def source(self) -> Source:
        if self.prompt is None:
            raise ReflowlensError(f"Patch({self.hook!r}) needs a prompt or a cache to take the activation from")
        return self.prompt

    def new_value(self, part: Tensor, source: Tensor | None) -> Tensor:
        assert source is not None
        return source.expand_as(part)

    @property
    def takes_same_positions(self) -> bool:
        return self.from_position is None


@dataclass(frozen=True, eq=False)
class Steer(Intervention):
    """Add ``alpha`` times a direction, [feature] or any shape that broadcasts to the selected part of the activation,
    its axes in the order of ``model.hook_axes``."""

    kind = "steer"
    direction: Float[Tensor, "*shape"] | Sequence[float]
    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_number(self.alpha, "Steer.alpha")

    def given_shape(self) -> tuple[int, ...]:
        return np.shape(self.direction)

    def new_value(self, part: Tensor, source: Tensor | None) -> Tensor:
        return part + _factor(self.alpha) * fit(self.direction, part, "Steer.direction")


@dataclass(frozen=True, eq=False)
class Replace(Intervention):
    """Put in a number, or a tensor that broadcasts to the selected part, its axes in the order of ``model.hook_axes``:
    a cached activation, for example."""

    kind = "replace"
    value: float | Float[Tensor, "*shape"] | Sequence[float]

    def given_shape(self) -> tuple[int, ...]:
        return np.shape(self.value)

    def new_value(self, part: Tensor, source: Tensor | None) -> Tensor:
        return fit(self.value, part, "Replace.value")


@dataclass(frozen=True, eq=False)
class Scale(Intervention):
    """Multiply by a factor."""

    kind = "scale"
    factor: float

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_number(self.factor, "Scale.factor")

    def new_value(self, part: Tensor, source: Tensor | None) -> Tensor:
        return part * _factor(self.factor)


KINDS: dict[str, type[Intervention]] = {cls.kind: cls for cls in (Ablate, Patch, Steer, Replace, Scale)}


def to_json(interventions: Sequence[Intervention] | Intervention) -> str:
    """Interventions, one or several, as a JSON list.

    >>> from_json(to_json([Ablate("unembed.hook_signal", index=17)])) == [Ablate("unembed.hook_signal", index=17)]
    True
    """
    several = [interventions] if isinstance(interventions, Intervention) else interventions
    return json.dumps([intervention.to_dict() for intervention in several])


def from_json(text: str) -> list[Intervention]:
    """The inverse of :func:`to_json`.

    Raises:
        ReflowlensError: it is not JSON, or a kind or field is unknown, missing or malformed.
    """
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        raise ReflowlensError(f"not a JSON list of interventions: {error}") from error
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise ReflowlensError("interventions must be a JSON list of objects, each with a 'kind'")
    return [_from_dict(item) for item in items]


def _from_dict(item: dict[str, Any]) -> Intervention:
    kind = item.get("kind", "")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ReflowlensError(f"unknown intervention kind {kind!r}{nearest(str(kind), list(KINDS))}")
    known = [f.name for f in dataclasses.fields(KINDS[kind])]
    for name in item:
        if name != "kind" and name not in known:
            raise ReflowlensError(f"unknown field {name!r} of {kind!r}{nearest(name, known)}")
    try:
        return KINDS[kind](**{name: _from_plain(value) for name, value in item.items() if name != "kind"})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ReflowlensError(f"a {kind!r} is incomplete or malformed: {error}") from error


def _selector(value: Any, name: str) -> int | slice | list[int] | str | None:
    """A selector as plain Python, so that it compares, prints and is written as one."""
    if value is None or type(value) is int:
        return value
    if isinstance(value, str):
        if name.endswith(".position") or (name.endswith(".layer") and value == "all"):
            return value
    elif isinstance(value, slice):
        start, stop, step = (part if part is None else integer(part) for part in (value.start, value.stop, value.step))
        if step != 0 and (start, stop, step) == (value.start, value.stop, value.step) and not name.endswith(".layer"):
            return slice(start, stop, step)
    elif (one := integer(value)) is not None:
        return one
    elif isinstance(value, Sequence | Tensor | np.ndarray) and len(value):
        several = [integer(item) for item in value]
        if None not in several:
            return several  # type: ignore[return-value]
    shown = f"a mask or list like {value[:3]!r}..." if isinstance(value, list) and len(value) > 3 else repr(value)
    words = {"layer": ", or 'all'", "position": ", 'last', or the text of a token"}.get(name.rsplit(".", 1)[-1], "")
    ranges = "" if name.endswith(".layer") else ", a slice"
    raise ReflowlensError(f"{name} must be an index{ranges}, or several indices (no mask){words}; got {shown}")


def _check_number(value: Any, name: str) -> None:
    is_number = isinstance(value, int | float) and real(value) is not None
    if not (is_number or isinstance(value, np.number) or _is_scalar(value)):
        raise ReflowlensError(f"{name} must be a number, got {value!r}")


def _factor(number: float | Tensor) -> float | Tensor:
    """A tensor as it is, for its gradient; torch takes no Python integer of more than 64 bits."""
    return float(number) if isinstance(number, int) else number


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray) and value.ndim == 0


def _same(one: Any, other: Any) -> bool:
    """Equality of two fields; of tensors and arrays that of type, shape and values, of caches identity."""
    if one is other:
        return True
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one.cpu(), other.cpu())
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    not_values = Tensor | np.ndarray | Mapping
    return not isinstance(one, not_values) and not isinstance(other, not_values) and bool(one == other)


def _to_plain(value: Any, name: str) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if isinstance(value, Tensor):
        return {"tensor": value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, slice):
        return {"slice": [value.start, value.stop, value.step]}
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, Sequence):
        return list(value)
    raise ReflowlensError(f"{name} is a cache of activations and cannot be JSON: give its text or tokens instead")


def _from_plain(value: Any) -> Any:
    if isinstance(value, dict) and "slice" in value:
        return slice(*value["slice"])
    if isinstance(value, dict) and "tensor" in value:
        return torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"]))
    return value


def fit(value: Any, part: Tensor, name: str) -> Tensor:
    """A number, or numbers that broadcast to the selected part, in its shape and type.

    Raises:
        ReflowlensError: they are no numbers, or do not fit.
    """
    try:
        tensor = torch.as_tensor(value, dtype=part.dtype, device=part.device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ReflowlensError(f"{name} must be numbers, got {value!r}") from error
    try:
        return tensor.expand_as(part)
    except RuntimeError as error:
        raise ReflowlensError(f"{name} has shape {list(tensor.shape)}, the selected part {list(part.shape)}") from error
