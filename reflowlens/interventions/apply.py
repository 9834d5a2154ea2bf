"""Running a model under interventions."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from reflowlens.errors import ReflowlensError
from reflowlens.interventions.passes import UNCOMPILED, noting_passes
from reflowlens.interventions.selection import Selection
from reflowlens.interventions.selectors import Prompt, hook_names, select
from reflowlens.interventions.values import Intervention, Patch, Source
from reflowlens.models.base import HookedModel
from reflowlens.models.text import TextInput
from reflowlens.models.threads import changing
from reflowlens.models.unwrapping import hooked_model
from reflowlens.prompts import Prompts, Text


@dataclass
class Bound:
    """An intervention at one hook point, with the activation of its source."""

    intervention: Intervention
    name: str
    source: Tensor | None
    source_lengths: Sequence[int] = ()  # of its rows, where some end in padding
    applied: bool = field(default=False)


@contextlib.contextmanager
def intervene(
    model: Any, interventions: Sequence[Intervention] | Intervention, *, lengths: Sequence[int] | None = None
) -> Iterator[HookedModel]:
    """Run a model under interventions for the duration of a ``with`` block.

    They act in the order of the list, out of place, on every forward pass inside the block, generation included, where
    positions count from the start of the text. On exit, also after an exception or Ctrl-C, they are undone; blocks that
    overlap each undo their own, in any order. A compiled model runs uncompiled inside the block, because a compiled
    graph does not see new hooks. A pass in another thread, which would see the hooks too, is an error.

    Args:
        model: a hooked model, compiled or not.
        interventions: one or several. Their sources are run when the block begins, on the model as it is then.
        lengths: number of tokens per row without padding, needed only if passes are given tokens padded on the right;
            for texts it is known.

    Yields:
        The hooked model.

    Raises:
        ReflowlensError: a hook point does not exist, a selector is out of range, an intervention was never applied, or
            another thread is using the model.

    Example:
        >>> import reflowlens as rl
        >>> model = rl.load_model("reflow-nano")
        >>> with rl.intervene(model, rl.Ablate("unembed.hook_signal", index=17)):
        ...     logits = model("The capital of France is")
        >>> len(model.blocks[0].hook_resid_pre.fwd_hooks)
        0
    """
    hooked = hooked_model(model)
    if isinstance(interventions, Intervention):
        interventions = [interventions]
    if isinstance(interventions, str) or not isinstance(interventions, Iterable):
        raise ReflowlensError(f"interventions must be a list of them, got {interventions!r}")
    interventions = list(interventions)
    for intervention in interventions:
        if not isinstance(intervention, Intervention):
            raise ReflowlensError(f"{intervention!r} is no intervention such as rl.Ablate('z', layer=0)")
    with changing(hooked):
        bound = bind(hooked, interventions)
        passes: list[Prompt] = []  # the pass that is running, innermost last
        hooks = [(b.name, partial(_apply, hooked, b, passes)) for b in bound]
        patched = [b.source for b in bound if isinstance(b.intervention, Patch) and b.source is not None]
        source_prompts = max((len(source) for source in patched), default=1)
        with noting_passes(hooked, passes, lengths, source_prompts), hooked.hooks(fwd_hooks=hooks), UNCOMPILED:
            yield hooked
    for b in bound:
        if not b.applied:
            selector = "index" if b.intervention.position is None else "position"
            raise ReflowlensError(f"{selector}={getattr(b.intervention, selector)!r} at {b.name!r} was never reached")


def run(
    model: Any, prompt: TextInput | Prompts, interventions: Sequence[Intervention] | Intervention, **kwargs: Any
) -> Any:
    """One forward pass under interventions: ``model(prompt, **kwargs)`` inside :func:`intervene`.

    Args:
        model, interventions: as for :func:`intervene`. A ``position`` may be a role of :class:`reflowlens.Prompts`.
        prompt, kwargs: arguments of the forward pass; of :class:`reflowlens.Prompts` the clean texts.

    Returns:
        What the forward pass returns: by default logits [batch, pos, d_vocab].

    Raises:
        ReflowlensError: as for :func:`intervene`.

    Example: ``rl.run(model, "The capital of France is", [rl.Ablate("z", layer=2, head=1)])`` gives logits
    [1, pos, d_vocab].
    """
    if isinstance(prompt, Prompts):
        listed = [interventions] if isinstance(interventions, Intervention) else interventions
        if isinstance(listed, Iterable) and not isinstance(listed, str):
            interventions = [at_role(hooked_model(model), prompt, part) for part in listed]
        prompt = prompt.clean
    with intervene(model, interventions) as hooked:
        return hooked(prompt, **kwargs)


def at_role(model: HookedModel, prompts: Prompts, part: Intervention, text: Text = "clean") -> Intervention:
    """An intervention whose position is a role of some prompts, with each one's own position instead."""
    position = getattr(part, "position", None)
    if not isinstance(position, str) or position.partition(":")[0] not in prompts.frame:
        return part
    return dataclasses.replace(part, position=[[p] for p in prompts.positions(model, position, text)])


def bind(model: HookedModel, interventions: Sequence[Intervention]) -> list[Bound]:
    """Find the hook points and run the sources, each once, caching the points that are asked of it."""
    return bind_all(model, [interventions])[0]


def bind_all(model: HookedModel, cells: Sequence[Sequence[Intervention]]) -> list[list[Bound]]:
    """The same for several lists of interventions, which may share sources."""
    places = [[(part, name) for part in cell for name in hook_names(model, part)] for cell in cells]
    wanted: dict[int, tuple[Source, set[str]]] = {}
    for intervention, name in itertools.chain(*places):
        source = intervention.source()
        if source is not None:
            if "batch" not in model.hook_axes(name):
                raise ReflowlensError(f"{name!r} is the same in every run: there is nothing to take from another")
            wanted.setdefault(_key(source), (source, set()))[1].add(name)
    runs = {
        key: (source_cache(model, source, names), _source_lengths(model, source))
        for key, (source, names) in wanted.items()
    }
    taken: dict[tuple[Any, ...], tuple[Tensor, Sequence[int]]] = {}  # many cells may take the same

    def bound(intervention: Intervention, name: str) -> Bound:
        source = intervention.source()
        if source is None:
            return Bound(intervention, name, None)
        position = intervention.from_position if isinstance(intervention, Patch) else None
        key = (_key(source), name, intervention.kind, str(position))
        if key not in taken:
            cache, lengths = runs[_key(source)]
            taken[key] = _taken(intervention, name, model.hook_axes(name), cache[name], lengths)
        return Bound(intervention, name, *taken[key])

    return [[bound(intervention, name) for intervention, name in cell] for cell in places]


def _key(source: Source) -> int:
    return hash(source) if isinstance(source, str) else id(source)


def source_cache(model: HookedModel, source: Source, names: set[str]) -> Mapping[str, Tensor]:
    """The activations of a source at some points, read off a cache; anything else is run, without gradients.

    Raises:
        ReflowlensError: a cache has not the points, or not all positions.
    """
    if isinstance(source, Mapping) or hasattr(source, "cache_dict"):
        cache = cast(Mapping[str, Tensor], source)
        for name in names:
            if name not in cache:
                raise ReflowlensError(
                    f"{name!r} is not in the cache that an intervention takes it from: run_with_cache(..., "
                    "names_filter=lambda name: True) keeps every point"
                )
        without_batch = getattr(source, "has_batch_dim", True) is False
        activations = {name: cache[name][None] if without_batch else cache[name] for name in names}
        tokens = getattr(source, "tokens", None)
        for name, activation in activations.items():
            axes = model.hook_axes(name)
            held = activation.shape[axes.index("pos")] if "pos" in axes else None
            if held is not None and tokens is not None and held != tokens.shape[1]:
                raise ReflowlensError(
                    f"the cache has {held} positions of {name!r}, of {tokens.shape[1]} tokens: one that was cut with "
                    "pos_slice cannot say which they are"
                )
        return activations
    with torch.no_grad():
        return model.run_with_cache(source, names_filter=sorted(names), return_type=None)[1]


def _source_lengths(model: HookedModel, source: Source) -> Sequence[int] | None:
    """How many tokens are each row's own, where that is known: of texts, and of a cache of texts."""
    if isinstance(source, Mapping) or hasattr(source, "cache_dict"):
        return getattr(source, "lengths", None)
    return model.tokens_and_lengths(cast(TextInput, source))[1]


def _taken(
    intervention: Intervention, name: str, axes: Sequence[str], activation: Tensor, lengths: Sequence[int] | None
) -> tuple[Tensor, Sequence[int]]:
    """What an intervention takes from its source, and the rows' lengths if it may still hold padding."""
    if "pos" not in axes:
        if lengths is not None and len(set(lengths)) > 1:
            raise _of_one_length(intervention, name, lengths)
        if isinstance(intervention, Patch) and intervention.from_position is not None:
            raise ReflowlensError(
                f"{name!r} has no positions, but from_position={intervention.from_position!r} was given"
            )
        return activation, ()
    pos = axes.index("pos")
    if lengths is None:
        lengths = [activation.shape[pos]] * activation.shape[0]
    for axis in (i for i, axis in enumerate(axes) if axis in ("pos", "key_pos")):
        activation = activation.narrow(axis, 0, max(lengths))
    padded = lengths if len(set(lengths)) > 1 else ()
    if isinstance(intervention, Patch) and intervention.from_position is not None:
        return _at_own_position(activation, pos, intervention.from_position, lengths), padded
    if not padded or intervention.takes_same_positions:
        return activation, padded
    if "key_pos" in axes:
        raise _of_one_length(intervention, name, lengths)
    return torch.cat([row[:length] for row, length in zip(activation, lengths, strict=True)])[None], ()


def _of_one_length(intervention: Intervention, name: str, lengths: Sequence[int]) -> ReflowlensError:
    return ReflowlensError(
        f"{intervention.kind} at {name!r} needs source texts of equal length, got {list(lengths)} tokens"
    )


def _at_own_position(
    activation: Tensor, pos: int, position: int | str | Sequence[int], lengths: Sequence[int]
) -> Tensor:
    """One position of each row, counted within the row's own tokens; the position axis keeps length 1."""
    if isinstance(position, int | str):
        indices = [-1 if isinstance(position, str) else position] * len(lengths)
    else:
        indices = list(position)
    if len(indices) != len(lengths):
        raise ReflowlensError(f"from_position has {len(indices)} positions for {len(lengths)} prompts of the source")
    for i, (index, length) in enumerate(zip(indices, lengths, strict=True)):
        if not -length <= index < length:
            which = f"prompt {i} of the source" if len(lengths) > 1 else "the source"
            raise ReflowlensError(f"from_position={index} is out of range: {which} has {length} tokens")
    rows = zip(activation, indices, lengths, strict=True)
    return torch.stack([row.narrow(pos - 1, index % n, 1) for row, index, n in rows])


def resolve(model: HookedModel, bound: Bound, shape: torch.Size, prompt: Prompt) -> Selection | None:
    """The part of an activation that a bound intervention acts on in a pass; None as in :func:`select`.

    Raises:
        ReflowlensError: a selector does not fit, or a token would be given what its source has after its end.
    """
    selection = select(model, bound.intervention, bound.name, shape, prompt)
    if selection is not None and bound.source is not None and (bound.source_lengths or prompt.padded):
        if "key_pos" in selection.axes and not prompt.cached:
            _check_keys(bound, prompt)
        if bound.source_lengths and bound.intervention.takes_same_positions:
            _check_positions(bound, selection, prompt)
    return selection


def _check_keys(bound: Bound, prompt: Prompt) -> None:
    """Raise where a prompt and its source differ in their numbers of keys."""
    assert bound.source is not None
    rows = max(len(prompt.lengths), len(bound.source_lengths))
    theirs = bound.source_lengths or [bound.source.shape[-1]] * rows
    ours = prompt.lengths or [prompt.n_positions] * rows
    for i, (their, our) in enumerate(zip(theirs, ours, strict=False)):
        if their != our:
            raise ReflowlensError(f"the source has {their} key positions, prompt {i} has {our}")


def _check_positions(bound: Bound, selection: Selection, prompt: Prompt) -> None:
    """Raise where a token would be given what its source has after its end."""
    if prompt.lengths and len(prompt.lengths) != len(bound.source_lengths):
        return  # `apply` says so
    lengths = torch.tensor(bound.source_lengths)[:, None]
    here = torch.arange(prompt.n_positions)[selection.positions].expand(len(lengths), -1)
    ends = torch.tensor(prompt.lengths or [prompt.n_positions] * len(lengths))[:, None]
    asked = (here + prompt.offset >= lengths) & (here < ends)
    if selection.counted is not None:
        asked &= selection.counted
    for i, column in asked.nonzero().tolist():
        raise ReflowlensError(
            f"prompt {i} of the source has {bound.source_lengths[i]} tokens, but position "
            f"{int(here[i, column]) + prompt.offset} is asked of it"
        )


def apply(bound: Bound, selection: Selection, activation: Tensor, offset: int = 0) -> Tensor:
    """A point's activation with an intervention's new value in it, as a copy; arguments as for :func:`new_part`."""
    return selection.put(activation, new_part(bound, selection, activation, offset))


def new_part(bound: Bound, selection: Selection, activation: Tensor, offset: int = 0) -> Tensor:
    """An intervention's new value of the selected part of a point's activation, as ``selection.put`` takes it.

    Args:
        offset: position of the activation's first token in its text.

    Raises:
        ReflowlensError: the source has another number of prompts, or not the positions.
    """
    source = bound.source
    if source is not None:
        if isinstance(bound.intervention, Patch) and source.shape[0] not in (1, activation.shape[0]):
            raise ReflowlensError(
                f"{bound.intervention.kind} at {bound.name!r}: the source has {source.shape[0]} prompts, "
                f"the run has {activation.shape[0]}"
            )
        source = selection.in_source(source, activation, offset, bound.intervention.takes_same_positions)
        return bound.intervention.new_value(selection.get(activation), source)
    _check_one_for_all(bound, selection)
    own_order = selection.in_own_order(selection.get(activation))
    return selection.from_own_order(bound.intervention.new_value(own_order, None))


def _check_one_for_all(bound: Bound, selection: Selection) -> None:
    """Raise where numbers differ along an axis along which prompts have different numbers of selected places."""
    for name in selection.uneven:
        shape = bound.intervention.given_shape()
        axis = selection.axes.index(name) - len(selection.axes)
        if len(shape) >= -axis and shape[axis] > 1:
            what = "keys" if name == "key_pos" else "positions"
            raise ReflowlensError(
                f"{bound.intervention.kind} at {bound.name!r} selects different numbers of {what} in prompts of "
                f"several lengths: give one value for all of them instead of shape {list(shape)}, or one prompt a call"
            )


def _apply(model: HookedModel, bound: Bound, passes: list[Prompt], activation: Tensor, hook: HookPoint) -> Tensor:
    if not passes:
        raise ReflowlensError(f"{bound.name!r} was reached outside of the model's own forward pass: call the model")
    selection = resolve(model, bound, activation.shape, passes[-1])
    if selection is None:
        return activation
    bound.applied = True
    return apply(bound, selection, activation, passes[-1].offset)
