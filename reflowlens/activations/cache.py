"""TransformerLens's activation cache, with signals, and on disk."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import transformer_lens
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.utilities.slice import Slice

from reflowlens.activations.cache_functions import with_checked_arguments
from reflowlens.arguments import integer
from reflowlens.errors import ReflowlensError, nearest
from reflowlens.models.attention import Attention
from reflowlens.models.base import HookedModel
from reflowlens.models.hook_names import point_name
from reflowlens.models.unwrapping import hooked_model
from reflowlens.signals import AnyView, SignalView, view_of
from reflowlens.storage.model_hash import model_hash
from reflowlens.storage.tensor_folder import open_tensors, save_tensors

_KIND = "activations"


@with_checked_arguments
class ActivationCache(transformer_lens.ActivationCache):
    """The activations of one forward pass, by hook point: TransformerLens's cache, with signals, and files.

    ``run_with_cache`` makes one. Activations keep the shapes of their hook points, mostly [batch, pos, d_model].

    Attributes:
        tokens: ids that the pass read, [batch, pos], padded on the right; None if the pass did not start from tokens.
        lengths: number of each prompt's own positions, the rest being padding; None if only token ids were given,
            without ``rl.intervene(lengths=...)``.
        patterns_follow: whether attention patterns are those of the queries and keys that are kept: one causal text a
            row from its beginning, every position kept, and nothing that changes patterns or scores.

    Raises:
        ReflowlensError: it is made of something that is not a dict of activations.

    Example:
        >>> import reflowlens as rl
        >>> model = rl.load_model("reflow-nano")
        >>> logits, cache = model.run_with_cache("The capital of France is")
        >>> cache.signals(layer=3).shape
        torch.Size([1, 5, 256])
    """

    model: HookedModel | None  # type: ignore[assignment] # TransformerLens's is its own protocol of models, never None

    def __init__(
        self,
        cache_dict: MutableMapping[str, Tensor],
        model: Any,
        has_batch_dim: bool = True,
        tokens: Int[Tensor, "batch pos"] | None = None,
        lengths: Sequence[int] | None = None,
    ) -> None:
        if not isinstance(cache_dict, MutableMapping):
            raise ReflowlensError(f"a cache is made of a dict of activations by name, got {cache_dict!r}")
        super().__init__(cache_dict, model, has_batch_dim)  # type: ignore[arg-type] # it only reads, any mapping will do
        self.tokens = tokens
        self.lengths = lengths
        self.patterns_follow = False
        self._origin: dict[str, Any] = {"model": None, "model_hash": None}  # of a cache that was loaded without a model

    def __getitem__(self, key: str | tuple[Any, ...]) -> Tensor:
        """An activation by name, or by TransformerLens's shorthand such as ``("resid_pre", 3)``.

        Raises:
            ReflowlensError: there is no such point, or it was not cached; the message says how to cache it.
        """
        name, *where = key if isinstance(key, tuple) and key else (key,)
        layer = integer(where[0]) if where else None
        if not isinstance(name, str) or (where and where[0] is not None and layer is None):
            raise ReflowlensError(f"an activation is named by its point, or by ('resid_pre', layer), got {key!r}")
        if layer is not None and layer < 0:
            self._hooked_model()
        try:
            return super().__getitem__(key)
        except KeyError as error:
            name = point_name(str(error.args[0]))
            if name in self.cache_dict:
                return super().__getitem__(name)
            if self.model is None:
                raise ReflowlensError(f"{name!r} is not in this cache{nearest(name, list(self))}") from error
            self._hooked_model().check_hook_name(name)
            if name.endswith("attn.hook_pattern") and (pattern := self._pattern(name)) is not None:
                return pattern
            raise ReflowlensError(
                f"{name!r} is not in this cache; run_with_cache(..., names_filter=lambda name: True) keeps every "
                "point, attention squares too"
            ) from error

    def _pattern(self, name: str) -> Float[Tensor, "*batch head pos key_pos"] | None:
        """An attention pattern that was not cached, from the queries and keys that were; None without them."""
        model, prefix = self._hooked_model(), name.removesuffix("hook_pattern")
        turned = "rot_" if f"{prefix}hook_rot_q" in model.hook_dict else ""
        kept = [self.cache_dict.get(f"{prefix}hook_{turned}{which}") for which in "qk"]
        normalised = model.cfg.use_qk_norm and not turned  # after what is kept
        if not self.patterns_follow or normalised or any(x is None for x in kept):
            return None
        q, k = (cast(Tensor, x) if self.has_batch_dim else cast(Tensor, x)[None] for x in kept)
        with torch.no_grad():
            pattern = cast(Attention, model.get_submodule(prefix[:-1])).pattern_of(q, k)
        return pattern if self.has_batch_dim else pattern[0]

    # -- signals ------------------------------------------------------------------------------------------------------

    def resid(self, layer: int | None = None) -> Float[Tensor, "*batch pos d_model"]:
        """The residual stream that block ``layer`` reads, before any normalisation.

        Args:
            layer: 0 to ``n_layers``; ``n_layers``, or None, is the stream after the last block, which is unembedded.

        Raises:
            ReflowlensError: there is no such layer, or its stream was not cached.

        Example: ``cache.resid(3)  # [batch, pos, d_model]``
        """
        n_layers = self._hooked_model().cfg.n_layers
        index = n_layers if layer is None else integer(layer)
        if index is None or not 0 <= index <= n_layers:
            raise ReflowlensError(f"layer must be between 0 and {n_layers} (the end of the model), got {layer!r}")
        return self["resid_post", n_layers - 1] if index == n_layers else self["resid_pre", index]

    def signals(self, layer: int | None = None, view: AnyView = None) -> Float[Tensor, "*batch pos S"]:
        """The readout a = B norm_final(x) of the residual stream x that block ``layer`` reads.

        After the last block of a reFlow this is ``unembed.hook_signal``; at earlier layers it is the factored logit
        lens: ``view.logits(a)`` are the logit lens's logits.

        Args:
            layer: 0 to ``n_layers``; None is the end of the model.
            view: signals to read in, or the name of a view (:func:`reflowlens.signals.signal_view`); by default the
                model's own.

        Raises:
            ReflowlensError: there is no such layer or view, or the view is of another model.

        Example: ``cache.signals(layer=3, view="svd")  # [batch, pos, S]``
        """
        return self._view(view).readout(self.resid(layer))

    def signal_contributions(
        self,
        target: str | int | Int[Tensor, "*batch pos"],
        layer: int | None = None,
        view: AnyView = None,
    ) -> Float[Tensor, "*batch pos S"]:
        """What each signal adds to the target's logit at every position: aₛ · R[target, s], in logits.

        The sum over S is the target's logit at the end of the model, and that of the logit lens at earlier layers, less
        the readout's bias ``model.b_U`` where it has one.

        Args:
            target: one token for all positions (its text or id), or ids [batch, pos], one per position.
            layer, view: as for :meth:`signals`.

        Raises:
            ReflowlensError: the target is neither a token nor one per position, or as of :meth:`signals`.

        Example: ``cache.signal_contributions(" Paris")[0, -1].topk(5)``
        """
        resid = self.resid(layer)
        places = resid.shape[:-1]
        allowed = [torch.Size([]), places, *([places[1:]] if places[0] == 1 else [])]
        if isinstance(target, Tensor) and target.shape not in allowed:
            raise ReflowlensError(
                f"target must be one token or one a position, {list(places)}, got {list(target.shape)}"
            )
        return self._view(view).contributions(resid, target)

    def _view(self, view: AnyView) -> SignalView:
        return view_of(self._hooked_model(), view)

    # -- parts --------------------------------------------------------------------------------------------------------

    def apply_slice_to_batch_dim(self, batch_slice: Any) -> ActivationCache:
        """The cache of some of the prompts.

        Points that have no batch axis, such as ``hook_basis``, stay whole.

        Args:
            batch_slice: an index (which drops the batch axis), a slice, a tuple or a list.

        Raises:
            ReflowlensError: the cache has no batch axis, or not these rows.

        Example: ``cache.apply_slice_to_batch_dim(0)["resid_post", -1]  # [pos, d_model]``
        """
        rows = batch_slice if isinstance(batch_slice, Slice) else Slice(batch_slice)
        if not self.has_batch_dim and rows.mode != "identity":
            raise ReflowlensError("this cache has no batch axis to take rows from: it holds one prompt")
        parts = {name: rows.apply(x, dim=0) if self._has_rows(name) else x for name, x in self.items()}
        tokens = (
            self.tokens if self.tokens is None else rows.apply(self.tokens, dim=0).reshape(-1, self.tokens.shape[1])
        )
        lengths = self.lengths if self.lengths is None else rows.apply(torch.tensor(self.lengths)).reshape(-1).tolist()
        part = ActivationCache(parts, self.model, self.has_batch_dim and rows.mode != "int", tokens, lengths)
        part._origin = self._origin
        return part

    def _has_rows(self, name: str) -> bool:
        point = name.removesuffix("_grad")
        if self.model is not None and point in self.model.hook_dict:
            return "batch" in self._hooked_model().hook_axes(point)
        return point != "hook_basis"

    # -- on disk ------------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Write ``activations.safetensors`` and ``manifest.json``, replacing an earlier cache when both are complete.

        An activation that is cached under two names is written once. The manifest holds the model's hash (of its
        weights as they are now), the tokens, each prompt's length, the shape and type of every point, and the versions
        of the libraries.

        Args:
            folder: an empty or a new one, or that of an earlier cache, which is replaced.

        Returns:
            The folder.

        Raises:
            ReflowlensError: the folder holds something else, the disk is full or it cannot be written; nothing has
                changed then.

        Example: ``cache.save("out/cache"); rl.ActivationCache.load("out/cache", model)["resid_post", -1]``
        """
        first: dict[tuple[Any, ...], str] = {}
        same_as = {name: other for name, x in self.items() if (other := first.setdefault(_identity(x), name)) != name}
        stored = _with_own_memory({name: x for name, x in self.items() if name not in same_as})
        model = self.model
        origin = self._origin if model is None else {"model": model.cfg.model_name, "model_hash": model_hash(model)}
        manifest = {
            **origin,
            "tokens": None if self.tokens is None else self.tokens.tolist(),
            "lengths": None if self.lengths is None else list(self.lengths),
            "has_batch_dim": self.has_batch_dim,
            "points": {name: {"shape": list(x.shape), "dtype": _type_name(x)} for name, x in self.items()},
            "same_as": same_as,
        }
        return save_tensors(folder, _KIND, stored, manifest)

    @classmethod
    def load(cls, folder: str | Path, model: HookedModel | None = None) -> ActivationCache:
        """A cache that :meth:`save` wrote, memory-mapped: an activation is read from disk when it is indexed.

        Args:
            folder: what :meth:`save` was given.
            model: the model that was run. Without it activations can be read by name, but nothing that needs weights or
                the number of layers, such as :meth:`signals` and ``cache["resid_post", -1]``.

        Raises:
            ReflowlensError: there is no such folder, it holds something else or is corrupt, or the cache is of another
                model, or of the same with other weights.

        Example: ``cache = rl.ActivationCache.load("out/cache"); cache["blocks.3.hook_resid_pre"].shape``
        """
        model = None if model is None else hooked_model(model)
        manifest, stored = open_tensors(folder, _KIND)
        try:
            points, same_as, hashed = manifest["points"], manifest["same_as"], manifest["model_hash"]
            tokens = None if manifest["tokens"] is None else torch.tensor(manifest["tokens"])
            lengths = manifest.get("lengths")  # caches of earlier versions do not say
            lengths = None if lengths is None else [int(length) for length in lengths]
            origin, has_batch_dim = {"model": manifest["model"], "model_hash": hashed}, bool(manifest["has_batch_dim"])
            if lengths is not None and tokens is not None and len(lengths) != len(tokens):
                raise ValueError(f"{len(lengths)} lengths")
            complete = set(points) == {*stored, *same_as} and set(same_as.values()) <= set(stored)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ReflowlensError(f"the manifest of {folder} is corrupt: {error!r}") from error
        if not complete:
            raise ReflowlensError(f"{folder} is corrupt: its tensors are not the points that its manifest lists")
        if model is not None and hashed is not None and model_hash(model) != hashed:
            raise ReflowlensError(
                f"{folder} is a cache of another model, or of other weights ({origin['model'] or 'unnamed'}, "
                f"hash {str(hashed)[:12]}): load it with that one, or without a model"
            )
        cache = cls(_OnDisk(stored, same_as, list(points)), model, has_batch_dim, tokens, lengths)
        cache._origin = origin
        return cache

    def _hooked_model(self) -> HookedModel:
        if self.model is None:
            raise ReflowlensError(
                "this cache was loaded without its model: give it, ActivationCache.load(folder, model)"
            )
        return self.model

    # -- in a notebook ------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        return f"ActivationCache({self._summary()})"

    def _summary(self) -> str:
        total = {_identity(x): x.numel() * x.element_size() / 1e6 for x in self.values()}
        where = "on disk" if isinstance(self.cache_dict, _OnDisk) else "in memory"
        return f"{len(self)} points, {sum(total.values()):.2f} MB {where}"

    def _repr_html_(self) -> str:
        from reflowlens.notebook.html import table, titled

        rows: dict[tuple[str, str, str], list[float]] = {}
        for name, x in self.items():
            megabytes = x.numel() * x.element_size() / 1e6
            shape = " × ".join(map(str, x.shape))
            rows.setdefault((re.sub(r"\.\d+\.", ".*.", name), shape, _type_name(x)), []).append(megabytes)
        lines = [(*what, len(sizes), f"{sum(sizes):.2f}") for what, sizes in rows.items()]
        return titled("ActivationCache", self._summary(), table(["point", "shape", "dtype", "points", "MB"], lines))


class _OnDisk(MutableMapping[str, Tensor]):
    """Activations in a file; what is set is kept in memory over them."""

    def __init__(self, stored: Mapping[str, Tensor], same_as: Mapping[str, str], names: list[str]) -> None:
        self._stored, self._same_as = stored, same_as
        self._in_memory: dict[str, Tensor] = {}
        self._names = dict.fromkeys(names)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._in_memory[name] if name in self._in_memory else self._stored[self._same_as.get(name, name)]

    def __setitem__(self, name: str, activation: Tensor) -> None:
        self._names[name] = None
        self._in_memory[name] = activation

    def __delitem__(self, name: str) -> None:
        del self._names[name]
        self._in_memory.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _identity(x: Tensor) -> tuple[Any, ...]:
    """The same for tensors that are the same part of memory."""
    return x.data_ptr(), tuple(x.shape), x.stride(), x.dtype


def _with_own_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous values, copied where memory is shared or is only a part of what is kept alive."""
    taken: set[int] = set()
    own = {}
    for name, x in tensors.items():
        storage = x.untyped_storage()
        whole = x.is_contiguous() and storage.nbytes() == x.nbytes and storage.data_ptr() not in taken
        own[name] = x.detach() if whole else x.detach().clone(memory_format=torch.contiguous_format)
        taken.add(storage.data_ptr())
    return own


def _type_name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
