"""Named activations of a model: hooks that read or change them, and the hooks that keep them in a cache."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from transformer_lens import hook_points
from transformer_lens.utilities.slice import Slice
from transformer_lens.utilities.tensors import remove_batch_dim as drop_batch_dim

from reflowlens.errors import ReflowlensError, nearest
from reflowlens.models.hook_names import ModelHooks, point_name
from reflowlens.models.parts import HookPoint
from reflowlens.models.text import TextModel
from reflowlens.models.threads import changing

NamesFilter: TypeAlias = "str | Sequence[str] | Callable[[str], bool] | None"
Hooks: TypeAlias = "Sequence[tuple[str | Callable[[str], bool], Callable[..., Any]]]"

_LEVELS = itertools.count(1)  # of blocks that attach hooks, as TransformerLens counts them
# Points that hold [pos, pos], a copy of the residual stream per head, the state of one of many steps, or logits: cached
# only when named or switched on.
_LARGE_POINTS = {
    "hook_attn_scores": "",
    "hook_pattern": "",
    "hook_result": "use_attn_result",
    "hook_attn_in": "use_attn_in",
    "hook_q_input": "use_split_qkv_input",
    "hook_k_input": "use_split_qkv_input",
    "hook_v_input": "use_split_qkv_input",
    "hook_mlp_in": "use_hook_mlp_in",
    **dict.fromkeys(("hook_W", "hook_c", "hook_grad", "hook_logits_pre_cap"), ""),
}
# Axes of the activations that are not [batch, pos, d_model], by the last part of their point's name.
_PER_HEAD = ("batch", "pos", "head", "d_head")
_PER_HEAD_STREAM = ("batch", "pos", "head", "d_model")
_SQUARE = ("batch", "head", "pos", "key_pos")
AXES: dict[str, tuple[str, ...]] = {
    "hook_recipe": ("batch", "pos", "signal"),
    "hook_signal": ("batch", "pos", "signal"),
    "hook_basis": ("signal", "d_model"),
    **dict.fromkeys(("hook_q", "hook_k", "hook_v", "hook_rot_q", "hook_rot_k", "hook_z"), _PER_HEAD),
    **dict.fromkeys(("hook_result", "hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input"), _PER_HEAD_STREAM),
    **dict.fromkeys(("hook_attn_scores", "hook_pattern"), _SQUARE),
    **dict.fromkeys(("hook_pre", "hook_pre_linear", "hook_post"), ("batch", "pos", "d_mlp")),
    "hook_scale": ("batch", "pos", "one"),
    "hook_logits_pre_cap": ("batch", "pos", "d_vocab"),
    "hook_features": ("batch", "pos", "feature"),
}
# Points that a dictionary adds to the blocks that it is spliced into (reflowlens.dictionaries.splice).
OF_DICTIONARIES = ("hook_features", "hook_reconstruction", "hook_reconstruction_error")


class HookingModel(TextModel):
    """A model whose activations have names, to which hooks are attached."""

    hook_dict: dict[str, HookPoint]  # type: ignore[assignment] # TransformerLens's are wider
    point_axes = AXES  # a family with points of its own adds theirs

    def setup(self) -> None:
        """Find the points, and make those of TransformerLens's class, which an architecture may have, of ours."""
        super().setup()
        for point in self.hook_dict.values():
            if type(point) is hook_points.HookPoint:
                point.__class__ = HookPoint

    def check_hook_name(self, name: str) -> None:
        """Raise unless the model has a hook point of this full name; the message suggests similar ones."""
        if not isinstance(name, str):
            raise ReflowlensError(f"a hook point is named by its text, such as 'hook_embed', got {name!r}")
        if name in self.hook_dict:
            return
        parts = name.split(".")
        if parts[0] == "blocks" and len(parts) > 1 and parts[1].isdigit() and int(parts[1]) >= self.cfg.n_layers:
            raise ReflowlensError(f"no hook {name!r}: this model has blocks 0 to {self.cfg.n_layers - 1}")
        if parts[-1] in OF_DICTIONARIES:
            raise ReflowlensError(
                f"no hook {name!r}: splice a dictionary into this block first, with dictionary.spliced(model)"
            )
        if parts[-1] == "hook_attn_in":
            raise self._without("hook_attn_in")
        raise ReflowlensError(
            f"no hook {name!r}{nearest(name, list(self.hook_dict)) or '; model.hook_dict lists them'}"
        )

    def hook_axes(self, name: str) -> tuple[str, ...]:
        """Names of the axes of a hook point's activation, in order.

        Raises:
            ReflowlensError: there is no such hook point.

        >>> from reflowlens.models import build_model
        >>> build_model("reflow_1_small", device="meta").hook_axes("blocks.0.attn.hook_z")
        ('batch', 'pos', 'head', 'd_head')
        """
        self.check_hook_name(name)
        return self.point_axes.get(name.rsplit(".", 1)[-1], ("batch", "pos", "d_model"))

    def add_hook(self, name: str | Callable[[str], bool], hook: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        if isinstance(name, str):
            name = point_name(name)
            self.check_hook_name(name)
        elif not callable(name):
            raise ReflowlensError(f"a hook goes with a point's name or a predicate of names, got {name!r}")
        super().add_hook(name, hook, *args, **kwargs)

    @property
    def hooks(self) -> ModelHooks:  # type: ignore[override] # a method of TransformerLens, which this is called like
        """``with model.hooks([(name, function)]):`` attaches hooks; ``model.hooks.blocks[3].`` completes names."""
        return ModelHooks(list(self.hook_dict), self._attached)

    @contextlib.contextmanager
    def _attached(
        self, fwd_hooks: Hooks, bwd_hooks: Hooks, reset_hooks_end: bool, clear_contexts: bool
    ) -> Iterator[HookingModel]:
        fwd_hooks, bwd_hooks = _hooks(fwd_hooks, "fwd_hooks"), _hooks(bwd_hooks, "bwd_hooks")
        for name, _ in (*fwd_hooks, *bwd_hooks):
            if isinstance(name, str):
                self.check_hook_name(point_name(name))
            elif not any(map(name, self.hook_dict)):
                raise ReflowlensError("a hook's name filter matches none of the model's hook points")
        fired: set[int] = set()
        watched = [
            (
                name,
                partial(_watched, hook, fired, i) if isinstance(name, str) else hook,
            )  # a predicate may match in vain
            for i, (name, hook) in enumerate(fwd_hooks)
        ]
        level = next(_LEVELS)  # its own: whichever of several blocks is closed first removes its own hooks
        with changing(self):
            try:
                for name, observed in watched:
                    self.add_hook(name, observed, "fwd", level=level)
                for name, hook in bwd_hooks:
                    self.add_hook(name, hook, "bwd", level=level)
                yield self
            finally:
                if reset_hooks_end:
                    self.reset_hooks(clear_contexts, level=level)
        if reset_hooks_end:
            _check_ran(name for i, (name, _) in enumerate(fwd_hooks) if i not in fired and isinstance(name, str))

    @contextlib.contextmanager
    def _showing(self, fwd_hooks: Hooks, shown: Container[str]) -> Iterator[None]:
        """As :meth:`_attached` with hooks that change nothing, which come behind all others.

        A short pass takes hardly longer than attaching a hook to each of its points, torch's way: that is for points of
        a class of somebody's own.

        Args:
            shown: the points that the hooks have been shown, after the block.
        """
        named = [name for name, _ in fwd_hooks if isinstance(name, str)]
        chosen = [([name] if isinstance(name, str) else filter(name, self.hook_dict), hook) for name, hook in fwd_hooks]
        every = [(self.hook_dict[name], hook) for names, hook in chosen for name in names]
        hooks = [(point, hook) for point, hook in every if isinstance(point, HookPoint)]
        foreign = [(point, hook) for point, hook in every if not isinstance(point, HookPoint)]
        level = next(_LEVELS)
        with changing(self):
            before = [point.keep for point, _ in hooks]
            try:
                for point, hook in hooks:
                    vars(point)["keep"] = hook  # neither a parameter nor a module, which torch would ask first
                for point, hook in foreign:
                    point.add_hook(hook, "fwd", level=level)
                yield
            finally:
                for (point, _), former in zip(hooks, before, strict=True):
                    vars(point)["keep"] = former
                for point, _ in foreign:
                    point.remove_hooks("fwd", level=level)
                self.is_caching = False
        _check_ran(name for name in named if name not in shown)

    def default_names(self, name: str) -> bool:
        """Whether a hook point is cached by default: all but attention squares and per-head residual copies."""
        switch = _LARGE_POINTS.get(name.rsplit(".", 1)[-1])
        return switch is None or bool(switch and getattr(self.cfg, switch))

    def _switch(self, switch: str, use: bool) -> None:
        """Cache the points of one of TransformerLens's switches by default, or no longer.

        Raises:
            ReflowlensError: they are to be cached, and this model has not all of them.
        """
        for point in [point for point, its in _LARGE_POINTS.items() if its == switch] if use else []:
            if not any(name.rsplit(".", 1)[-1] == point for name in self.hook_dict):
                raise self._without(point)
        changed: dict[str, Any] = {switch: use}
        self.cfg = dataclasses.replace(self.cfg, **changed)

    def _without(self, point: str) -> ReflowlensError:
        """What is said of a point that a switch is for and this model has not."""
        if point == "hook_attn_in" and any(name.endswith(".hook_q_input") for name in self.hook_dict):
            return ReflowlensError(
                "there is no hook_attn_in where heads share keys and values (n_key_value_heads="
                f"{self.cfg.kv_heads} for n_heads={self.cfg.n_heads}), so that no copy of the stream is one head's: "
                "attn.hook_q_input, attn.hook_k_input and attn.hook_v_input are there (set_use_split_qkv_input)"
            )
        return ReflowlensError(f"a {type(self).__name__} has no {point}: model.hook_dict lists its points")

    def get_caching_hooks(
        self,
        names_filter: NamesFilter = None,
        incl_bwd: bool = False,
        device: Any = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
        pos_slice: Any = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[dict[str, Tensor], list[Any], list[Any]]:
        """As in TransformerLens, but a filter that matches nothing is an error, and ``pos_slice`` cuts positions only.

        A hook point that is named must be reached by the pass; of those that a predicate or the default matches, the
        ones that are reached are cached.

        Args:
            dtype: floating-point type in which activations are kept; None: as computed.

        Returns:
            The cache, which the hooks fill, and pairs (hook point, function) for the forward and the backward pass.

        Raises:
            ReflowlensError: a name does not exist, nothing matches, or ``device``, ``dtype`` or ``pos_slice`` is none.
        """
        names: list[str] = []
        matches: Callable[[str], bool] = self.default_names
        if callable(names_filter):
            matches = names_filter
        elif names_filter is not None:
            is_one = isinstance(names_filter, str) or not isinstance(names_filter, Iterable)
            names = [names_filter] if is_one else list(names_filter)  # type: ignore[list-item] # what is no name is refused below
            names = [point_name(name) if isinstance(name, str) else name for name in names]
            matches = names.__contains__
        for name in names:
            self.check_hook_name(name)
        found = [name for name in self.hook_dict if matches(name)]
        if not found:
            raise ReflowlensError("names_filter matches none of the model's hook points; model.hook_dict lists them")
        if dtype is not None and (not isinstance(dtype, torch.dtype) or not dtype.is_floating_point):
            raise ReflowlensError(f"dtype must be a floating-point type such as torch.bfloat16, got {dtype!r}")
        _check_device(device)
        positions = _position_slice(pos_slice)
        cache = {} if cache is None else cache
        self.is_caching = True

        def save(tensor: Tensor, hook: HookPoint, suffix: str = "") -> None:
            name, kept = cast(str, hook.name), tensor.detach()
            if positions.mode != "identity" and "pos" in (axes := self.hook_axes(name)):
                kept = _at_positions(kept, axes.index("pos"), positions, pos_slice)
            if device is not None or (dtype is not None and kept.is_floating_point()):
                kept = kept.to(device=device, dtype=dtype if kept.is_floating_point() else None)
            cache[name + suffix] = drop_batch_dim(kept) if remove_batch_dim else kept

        fwd = [(name, save) for name in found] if names else [(frozenset(found).__contains__, save)]
        return cache, fwd, [(name, partial(save, suffix="_grad")) for name in found] if incl_bwd else []


def _hooks(hooks: Any, what: str) -> list[tuple[str | Callable[[str], bool], Callable[..., Any]]]:
    """Pairs (name, function), perhaps from an iterator, as a list."""
    pairs = list(hooks) if isinstance(hooks, Iterable) else [hooks]
    for pair in pairs:
        name, hook = pair if isinstance(pair, Sequence) and len(pair) == 2 else (None, None)
        if not (isinstance(name, str) or callable(name)) or not callable(hook):
            raise ReflowlensError(f"{what} must be a list of pairs (hook point, function), got {pair!r}")
    return pairs


def _check_ran(silent: Iterable[str]) -> None:
    """Raise of the first of the points that a hook was attached to by name and that no pass reached."""
    for name in silent:
        raise ReflowlensError(
            f"the hook on {name!r} never ran: no forward pass reached it (see start_at_layer, stop_at_layer)"
        )


def _check_device(device: Any) -> None:
    try:
        torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ReflowlensError(f"no device {device!r}: 'cpu' and 'cuda' are devices, if the machine has them") from error


def _position_slice(pos_slice: Any) -> Slice:
    try:
        if not isinstance(pos_slice, bool):
            return Slice.unwrap(pos_slice)
    except ValueError:
        pass
    raise ReflowlensError(f"pos_slice must be an index, a slice or several indices, got {pos_slice!r}")


def _at_positions(tensor: Tensor, axis: int, positions: Slice, pos_slice: Any) -> Tensor:
    n = tensor.shape[axis]
    try:
        found = len(positions.indices(n))  # type: ignore[arg-type] # several, or a TypeError
    except (IndexError, TypeError):
        found = 0
    if not found:
        raise ReflowlensError(f"pos_slice={pos_slice} selects nothing: this pass has positions 0 to {n - 1}")
    return positions.apply(tensor, dim=axis).clone()  # a view would keep every position alive


def _watched(function: Callable[..., Any], fired: set[int], index: int, tensor: Tensor, hook: HookPoint) -> Any:
    fired.add(index)
    return function(tensor, hook=hook)
