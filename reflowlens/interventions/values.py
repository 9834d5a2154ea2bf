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

from reflowlens.arguments import integer, random_seed
from reflowlens.errors import ReflowlensError, nearest
from reflowlens.interventions.fields import as_factor, check_number, fit, from_plain, integers, same, selector, to_plain
from reflowlens.models.text import read_once

Position: TypeAlias = "int | slice | Sequence[int] | Sequence[Sequence[int]] | str | None"
Selector: TypeAlias = "int | slice | Sequence[int] | None"
Source: TypeAlias = "str | Sequence[str] | Tensor | Mapping[str, Tensor] | None"


@dataclass(frozen=True, eq=False)
class Intervention:
    """Where an intervention acts; its subclasses say what it does there.

    Args:
        hook: a hook point's full name (``"blocks.3.attn.hook_z"``), or its short name (``"z"``, ``"resid_pre"``,
            ``"mlp.hook_post"``) together with ``layer``.
        layer: one block, several, or ``"all"``; negative counts from the end.
        position: index, slice, indices, ``"last"``, or the text of a token, which selects its every occurrence; None:
            all; or a list of indices for each prompt, ``[[3], [4, 5], []]``, of which an empty one leaves its prompt as
            it is. ``"last"`` and negative numbers count from the end of each prompt, padding left out; during
            generation ``"last"`` is the last token of the prompt and then each new one. In attention scores and
            patterns it is the query position.
        head: which heads, if the activation has a head axis (of grouped-query keys and values: key/value heads).
        index: which entries of the last axis: signals, neurons, features; rows of ``hook_basis``; key positions, where
            negative numbers count from the end of each prompt and padding is never selected.

    Selectors may be integers, ranges and integer arrays of NumPy or torch; they are stored as plain Python.

    Raises:
        ReflowlensError: ``hook`` is not a text, or a selector is empty, a mask, or not an index, a slice or several
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
            object.__setattr__(self, name, selector(getattr(self, name), f"{type(self).__name__}.{name}"))

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        return all(same(getattr(self, f.name), getattr(other, f.name)) for f in dataclasses.fields(self))

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
        return {"kind": self.kind} | {name: to_plain(getattr(self, name), f"{self.kind}.{name}") for name in names}


@dataclass(frozen=True, eq=False)
class Ablate(Intervention):
    """Remove: zero, the mean over a reference batch, or values drawn from it.

    Args:
        by: ``"zero"``; ``"mean"``, over all positions of all reference prompts; ``"resample"``: each selected position
            takes the values at a position of the reference, drawn at random with replacement.
        reference: text, texts, tokens [batch, pos] or a cache, padding of texts left out; needed unless ``"zero"``.
        seed: of the draw. Each pass starts from it anew and draws in order through the rows of the batch. So two rows
            with the same text draw different positions, and a text draws others alone than in a batch, and with a
            key-value cache than when read whole.

    Raises:
        ReflowlensError: as for :class:`Intervention`; or ``by`` is unknown, the reference is missing or superfluous, or
            ``seed`` is not an integer.

    Example: ``rl.Ablate("z", layer=3, head=2, by="mean", reference=["Some text.", "More."])``
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
    """Replace by the activation of another run (activation patching).

    Args:
        prompt: the input of the other run, text, texts or tokens, or its cache; one row is used for all rows. In a
            sweep None is the clean run.
        from_position: the position of the other run to take for all selected ones; ``"last"`` is its last; a list has
            one for each prompt; None: the same positions. Of several prompts it counts within each, padding left out.

    Raises:
        ReflowlensError: as for :class:`Intervention`; or ``from_position`` is neither an index, one a prompt, nor
            ``"last"``.

    Example: ``rl.Patch("resid_pre", "The capital of Italy is", layer=4, position="last")``
    """

    kind = "patch"
    prompt: Source = None
    from_position: int | Sequence[int] | Literal["last"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "prompt", read_once(self.prompt))
        if self.from_position not in (None, "last"):
            index = integer(self.from_position)
            where = integers(self.from_position) if index is None else index
            if where is None or where == []:
                raise ReflowlensError(
                    f"Patch.from_position must be an index, one for each prompt, or 'last', got {self.from_position!r}"
                )
            object.__setattr__(self, "from_position", where)

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
    """Add ``alpha * direction``.

    Args:
        direction: [feature], or any shape that broadcasts to the selected part of the activation, whose axes are in the
            order of ``model.hook_axes``.
        alpha: a number, in units of ``direction``: it is not normalised.

    Raises:
        ReflowlensError: as for :class:`Intervention`; or ``alpha`` is not a number.

    Example: ``rl.Steer("resid_post", direction, 4.0, layer=[2, 3], position=" France")``
    """

    kind = "steer"
    direction: Float[Tensor, "*shape"] | Sequence[Any]
    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self.alpha, "Steer.alpha")

    def given_shape(self) -> tuple[int, ...]:
        return np.shape(self.direction)

    def new_value(self, part: Tensor, source: Tensor | None) -> Tensor:
        return part + as_factor(self.alpha) * fit(self.direction, part, "Steer.direction")


@dataclass(frozen=True, eq=False)
class Replace(Intervention):
    """Replace by given numbers.

    Args:
        value: a number, or any shape that broadcasts to the selected part of the activation, whose axes are in the
            order of ``model.hook_axes``; a cached activation, for example.

    Raises:
        ReflowlensError: as for :class:`Intervention`.

    Example: ``rl.Replace("resid_post", cache["resid_post", 2], layer=2)``
    """

    kind = "replace"
    value: float | Float[Tensor, "*shape"] | Sequence[Any]

    def given_shape(self) -> tuple[int, ...]:
        return np.shape(self.value)

    def new_value(self, part: Tensor, source: Tensor | None) -> Tensor:
        return fit(self.value, part, "Replace.value")


@dataclass(frozen=True, eq=False)
class Scale(Intervention):
    """Multiply by a factor.

    Raises:
        ReflowlensError: as for :class:`Intervention`; or ``factor`` is not a number.

    Example: ``rl.Scale("mlp.hook_post", 0.5, layer=1, index=[5, 7])`` halves two neurons.
    """

    kind = "scale"
    factor: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self.factor, "Scale.factor")

    def new_value(self, part: Tensor, source: Tensor | None) -> Tensor:
        return part * as_factor(self.factor)


KINDS: dict[str, type[Intervention]] = {cls.kind: cls for cls in (Ablate, Patch, Steer, Replace, Scale)}


def to_json(interventions: Sequence[Intervention] | Intervention) -> str:
    """Interventions, one or several, as a JSON list, for :func:`from_json`.

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
        return KINDS[kind](**{name: from_plain(value) for name, value in item.items() if name != "kind"})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ReflowlensError(f"a {kind!r} is incomplete or malformed: {error}") from error
