"""What every hooked model does whatever its architecture: text in and out, named activations, readable errors.

A model here is a TransformerLens ``HookedRootModule`` that meets its ``TransformerLensModelWithWeights`` protocol, so
TransformerLens's patching, attribution and lens functions take it as it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint
from transformer_lens.utilities import Slice

from reflowlens.arguments import integer
from reflowlens.config import ModelConfig, nearest
from reflowlens.errors import ReflowlensError
from reflowlens.models.architecture import Architecture
from reflowlens.models.components import Norm
from reflowlens.models.hook_names import ModelHooks
from reflowlens.models.loss import IGNORE
from reflowlens.models.pass_context import lengths_given
from reflowlens.models.past import read_before
from reflowlens.models.threads import changing
from reflowlens.out_of_memory import lower_if_it_does_not_fit
from reflowlens.tokenizers.base import Tokenizer
from reflowlens.tokenizers.by_name import get_tokenizer

TextInput: TypeAlias = "str | Sequence[str] | Int[Tensor | np.ndarray, 'batch pos'] | Int[Tensor | np.ndarray, ' pos']"
NamesFilter: TypeAlias = "str | Sequence[str] | Callable[[str], bool] | None"
Hooks: TypeAlias = "Sequence[tuple[str | Callable[[str], bool], Callable[..., Any]]]"

_LEVELS = itertools.count(1)  # of blocks that attach hooks, as TransformerLens counts them
# Points that hold a [pos, pos] square or a copy of the residual stream a head: cached only when named or switched on.
_LARGE_POINTS = {
    "hook_attn_scores": "",
    "hook_pattern": "",
    "hook_result": "use_attn_result",
    "hook_q_input": "use_split_qkv_input",
    "hook_k_input": "use_split_qkv_input",
    "hook_v_input": "use_split_qkv_input",
    "hook_mlp_in": "use_hook_mlp_in",
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
    **dict.fromkeys(("hook_result", "hook_q_input", "hook_k_input", "hook_v_input"), _PER_HEAD_STREAM),
    **dict.fromkeys(("hook_attn_scores", "hook_pattern"), _SQUARE),
    **dict.fromkeys(("hook_pre", "hook_pre_linear", "hook_post"), ("batch", "pos", "d_mlp")),
    "hook_scale": ("batch", "pos", "one"),
}


def read_once(input: Any) -> Any:
    """Prompts as they are; those of an iterator, which gives them only once, as a list that can be read again."""
    return list(input) if isinstance(input, Iterator) else input


class HookedModel(Architecture, HookedRootModule):
    """Base class of the architectures, each of which declares what is its own (`Architecture`)."""

    blocks: torch.nn.ModuleList
    ln_final: Norm
    point_axes = AXES  # a family with points of its own adds theirs

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg

    # -- text ---------------------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the model was configured with."""
        return get_tokenizer(self.cfg.tokenizer_name)

    def to_tokens(self, input: TextInput, prepend_bos: bool | None = None) -> Int[Tensor, "batch pos"]:
        """Token ids of a text or of several, padded on the right with the document end.

        Args:
            prepend_bos: begin each text with the tokenizer's ``bos_token``, or with the document end where it has none.
                By default as the model was trained: an imported Llama with one, the architectures here without.

        Raises:
            ReflowlensError: the text is empty, too long for ``n_ctx``, or an id is outside the vocabulary.
        """
        return self.tokens_and_lengths(input, prepend_bos=prepend_bos)[0]

    def next_tokens(self, tokens: Int[Tensor, "batch pos"], lengths: list[int]) -> Int[Tensor, "batch pos"]:
        """What each position should predict: the next id, -100 at a row's end and over padding."""
        if max(lengths, default=0) < 2:
            raise ReflowlensError("a loss needs two tokens at least: one to predict from and one to predict")
        last = torch.as_tensor(lengths, device=tokens.device)[:, None] - 1
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return tokens.roll(-1, dims=1).masked_fill(positions >= last, IGNORE)

    def tokens_and_lengths(
        self, input: TextInput, *, prepend_bos: bool | None = None, offset: int = 0
    ) -> tuple[Int[Tensor, "batch pos"], list[int]]:
        """Ids padded on the right, and how many of each row are the prompt's own; ``offset`` were read before."""
        if isinstance(input, np.ndarray) and input.dtype.kind in "iu":
            input = torch.from_numpy(input.astype(np.int64))
        if isinstance(input, Tensor):
            tokens = input[None] if input.ndim == 1 else input
            if tokens.ndim != 2 or tokens.is_floating_point() or tokens.dtype == torch.bool:
                raise ReflowlensError(f"tokens must be integers [batch, pos], got {input.dtype} {list(input.shape)}")
            tokens = tokens.long()
            self.check_length(tokens.shape[1], offset)
            self._check_ids(tokens)
            return tokens.to(self.cfg.device), [tokens.shape[1]] * tokens.shape[0]
        several = isinstance(input, Iterable) and not isinstance(input, str | Mapping)
        texts: list[Any] = list(input) if several else [input]
        if strange := [text for text in texts if not isinstance(text, str)]:
            raise ReflowlensError(
                "a prompt is a text, a list of texts, or a tensor or array of token ids [batch, pos]; "
                f"got {'a list with ' if several else ''}{strange[0]!r}"
            )
        end = self.tokenizer.eot_token or 0
        begin = self.text_start(prepend_bos) if offset == 0 else []
        rows = [self.tokenizer.encode(text) for text in texts]
        if not rows or any(not row and not begin for row in rows):
            raise ReflowlensError("the prompt is empty: give at least one token of text")
        rows = [begin + row for row in rows]
        lengths = [len(row) for row in rows]
        self.check_length(max(lengths), offset)
        padded = [row + [end] * (max(lengths) - len(row)) for row in rows]
        tokens = torch.tensor(padded)
        self._check_ids(tokens)
        return tokens.to(self.cfg.device), lengths

    def text_start(self, prepend_bos: bool | None = None) -> list[int]:
        """What :meth:`to_tokens` puts in front of a text: a beginning-of-sequence token, or nothing."""
        tokenizer = self.tokenizer
        begin = next((i for i in (tokenizer.bos_token, tokenizer.eot_token) if i is not None), 0)
        wanted = tokenizer.bos_token is not None if prepend_bos is None else prepend_bos
        return [begin] if wanted else []

    def check_length(self, length: int, offset: int = 0) -> None:
        """Raise unless the model can read so many tokens after ``offset`` others."""
        if length == 0:
            raise ReflowlensError("the prompt is empty: give at least one token")
        if offset + length > self.cfg.n_ctx:
            raise ReflowlensError(
                f"the prompt is too long: {offset + length} tokens, but this model reads at most n_ctx={self.cfg.n_ctx}"
            )

    def _check_ids(self, tokens: Int[Tensor, "batch pos"]) -> None:
        if not is_cheap_to_read(tokens):
            return
        lowest, highest = map(int, tokens.aminmax())
        if lowest < 0 or highest >= self.cfg.d_vocab:
            raise ReflowlensError(
                f"no token {lowest if lowest < 0 else highest}: this model's ids are 0 to {self.cfg.d_vocab - 1}"
            )

    def _as_ids(self, tokens: Any) -> Int[Tensor, "*tokens"]:
        """Ids of any shape as a tensor: of a number, a list, an array or a tensor."""
        try:
            ids = tokens if isinstance(tokens, Tensor) else torch.as_tensor(np.asarray(tokens))
        except (TypeError, ValueError, RuntimeError):
            ids = torch.tensor(torch.nan)
        if ids.numel() and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool):
            raise ReflowlensError(f"token ids are integers, got {tokens!r}")
        return ids.long()

    def to_string(self, tokens: Int[Tensor, "*batch pos"] | Sequence[int]) -> str | list[str]:
        """The text of ids [pos], or a list of texts of ids [batch, pos]."""
        ids = self._as_ids(tokens)
        if ids.ndim == 2:
            return [self.tokenizer.decode(row.tolist()) for row in ids]
        return self.tokenizer.decode(ids.reshape(-1).tolist())

    def to_str_tokens(
        self, input: TextInput | np.ndarray | Sequence[int], prepend_bos: bool | None = None
    ) -> list[str]:
        """The text of each token of one prompt, for labels; of ids of any shape those in order."""
        if isinstance(input, Sequence) and not isinstance(input, str) and any(isinstance(text, str) for text in input):
            raise ReflowlensError("to_str_tokens takes one text, or ids: call it for each text")
        ids = self.to_tokens(input, prepend_bos) if isinstance(input, str) else self._as_ids(input)
        return self.tokenizer.to_str_tokens(ids.reshape(-1).tolist())

    def to_single_token(self, word: str) -> int:
        """The id of a word that is one token.

        Raises:
            ReflowlensError: it is several; the message shows the pieces.
        """
        return self.tokenizer.single_token(word)

    def to_single_str_token(self, token: int) -> str:
        """The text of one id."""
        return self.tokenizer.token_str(token)

    def tokens_to_residual_directions(self, tokens: str | int | Tensor) -> Float[Tensor, "*tokens d_model"]:
        """The direction that a *normalised* residual is read along for each token's logit, the norm's weight included.

        With it TransformerLens's ``logit_attrs``, which divides by the norm's scale alone, sums to the logit, rounded;
        where the final norm has a bias b, to the logit less ``b · W_U[:, token]``, which nothing in the stream writes.
        """
        ids = self._as_ids(self.to_single_token(tokens) if isinstance(tokens, str) else tokens)
        self._check_ids(ids)
        return self.unembedding_rows(ids.to(self.cfg.device)) * self.ln_final.w

    def unembedding_rows(self, tokens: Int[Tensor, "*tokens"]) -> Float[Tensor, "*tokens d_model"]:
        """Columns of W_U as rows, without forming the others of a tied embedding."""
        matrix = self.W_E if self.cfg.tie_word_embeddings else self.W_U.T
        rows = matrix[tokens.reshape(-1)]
        dense = rows if isinstance(rows, Tensor) else rows.AB
        return dense.reshape(*tokens.shape, self.cfg.d_model)

    # -- weights ------------------------------------------------------------------------------------------------------

    @property
    def n_parameters(self) -> int:
        """Number of parameters, learned positions included."""
        return sum(parameter.numel() for parameter in self.parameters())

    def init_weights(self, generator: torch.Generator) -> None:
        """Fill the parameters with fresh values."""
        raise NotImplementedError

    def make_cache(self, batch: int, dtype: torch.dtype = torch.float32) -> Any:
        """What the model keeps of texts that it reads piece by piece, empty: the ``past_kv_cache`` of its passes."""
        raise NotImplementedError

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """What biases have added to the stream that block ``layer`` (or its MLP) reads: nothing where there are none.

        Args:
            mlp_input: count the attention bias of block ``layer`` too.
            include_mlp_biases: False counts those of attention alone.

        Raises:
            ReflowlensError: the layer is none of 0 to ``n_layers``.
        """
        n_layers, index = self.cfg.n_layers, integer(layer)
        if index is None or not 0 <= index <= n_layers:
            raise ReflowlensError(f"layer must be an integer from 0 to n_layers={n_layers}, got {layer!r}")
        return torch.zeros(self.cfg.d_model, device=self.cfg.device, dtype=torch.float32)

    def tl_parameters(self) -> dict[str, Tensor]:
        """Parameters under TransformerLens's names: ``unembed.W_U`` always, shared keys and values per query head."""
        return dict(self.named_parameters()) | {"unembed.W_U": self.W_U}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HookedModel:
        super()._apply(fn, recurse)
        self.cfg = dataclasses.replace(self.cfg, device=str(next(self.parameters()).device))
        return self

    def set_use_attn_result(self, use: bool) -> None:
        """Cache ``attn.hook_result`` by default."""
        self.cfg = dataclasses.replace(self.cfg, use_attn_result=use)

    def set_use_split_qkv_input(self, use: bool) -> None:
        """Cache ``attn.hook_{q,k,v}_input`` by default."""
        self.cfg = dataclasses.replace(self.cfg, use_split_qkv_input=use)

    def set_use_hook_mlp_in(self, use: bool) -> None:
        """Cache ``hook_mlp_in`` by default."""
        self.cfg = dataclasses.replace(self.cfg, use_hook_mlp_in=use)

    # -- hooks --------------------------------------------------------------------------------------------------------

    def check_hook_name(self, name: str) -> None:
        """Raise unless the model has this hook point; the message names the nearest ones."""
        if not isinstance(name, str):
            raise ReflowlensError(f"a hook point is named by its text, such as 'hook_embed', got {name!r}")
        if name in self.hook_dict:
            return
        parts = name.split(".")
        if parts[0] == "blocks" and len(parts) > 1 and parts[1].isdigit() and int(parts[1]) >= self.cfg.n_layers:
            raise ReflowlensError(f"no hook {name!r}: this model has blocks 0 to {self.cfg.n_layers - 1}")
        raise ReflowlensError(
            f"no hook {name!r}{nearest(name, list(self.hook_dict)) or '; model.hook_dict lists them'}"
        )

    def hook_axes(self, name: str) -> tuple[str, ...]:
        """Names of the axes of a point's activation.

        >>> from reflowlens.models import build_model
        >>> build_model("reflow_1_small", device="meta").hook_axes("blocks.0.attn.hook_z")
        ('batch', 'pos', 'head', 'd_head')
        """
        self.check_hook_name(name)
        return self.point_axes.get(name.rsplit(".", 1)[-1], ("batch", "pos", "d_model"))

    def add_hook(self, name: str | Callable[[str], bool], hook: Callable, *args: Any, **kwargs: Any) -> None:
        if isinstance(name, str):
            self.check_hook_name(name)
        elif not callable(name):
            raise ReflowlensError(f"a hook goes with a point's name or a predicate of names, got {name!r}")
        super().add_hook(name, hook, *args, **kwargs)

    @property
    def hooks(self) -> ModelHooks:
        """``with model.hooks([(name, function)]):`` attaches hooks; ``model.hooks.blocks[3].`` completes names."""
        return ModelHooks(list(self.hook_dict), self._attached)

    @contextlib.contextmanager
    def _attached(
        self, fwd_hooks: Hooks, bwd_hooks: Hooks, reset_hooks_end: bool, clear_contexts: bool
    ) -> Iterator[HookedModel]:
        fwd_hooks, bwd_hooks = _hooks(fwd_hooks, "fwd_hooks"), _hooks(bwd_hooks, "bwd_hooks")
        for name, _ in (*fwd_hooks, *bwd_hooks):
            if isinstance(name, str):
                self.check_hook_name(name)
            elif not any(map(name, self.hook_dict)):
                raise ReflowlensError("a hook's name filter matches none of the model's hook points")
        fired: set[int] = set()
        watched = [(name, partial(_watched, hook, fired, i)) for i, (name, hook) in enumerate(fwd_hooks)]
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
        silent = [name for i, (name, _) in enumerate(fwd_hooks) if i not in fired and isinstance(name, str)]
        if silent and reset_hooks_end:
            raise ReflowlensError(
                f"the hook on {silent[0]!r} never ran: no forward pass reached it (see start_at_layer, stop_at_layer)"
            )

    def default_names(self, name: str) -> bool:
        """Whether a point is cached when no filter is given: all but attention squares and per-head residual copies."""
        switch = _LARGE_POINTS.get(name.rsplit(".", 1)[-1])
        return switch is None or bool(switch and getattr(self.cfg, switch))

    def get_caching_hooks(
        self,
        names_filter: NamesFilter = None,
        incl_bwd: bool = False,
        device: Any = None,
        remove_batch_dim: bool = False,
        cache: dict | None = None,
        pos_slice: Any = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[dict, list, list]:
        """As TransformerLens's, but a filter that matches nothing is an error and ``pos_slice`` cuts positions alone.

        A point that was named must be reached; of a predicate's, or of the default, those that are reached are cached.

        Args:
            dtype: what floating-point activations become before they are kept.
        """
        names: list[str] = []
        matches: Callable[[str], bool] = self.default_names
        if callable(names_filter):
            matches = names_filter
        elif names_filter is not None:
            is_one = isinstance(names_filter, str) or not isinstance(names_filter, Iterable)
            names = [names_filter] if is_one else list(names_filter)  # type: ignore[list-item]
            matches = names.__contains__
        for name in names:
            self.check_hook_name(name)
        if not any(map(matches, self.hook_dict)):
            raise ReflowlensError("names_filter matches none of the model's hook points; model.hook_dict lists them")
        if dtype is not None and (not isinstance(dtype, torch.dtype) or not dtype.is_floating_point):
            raise ReflowlensError(f"dtype must be a floating-point type such as torch.bfloat16, got {dtype!r}")
        _check_device(device)
        cache, fwd, bwd = super().get_caching_hooks(matches, incl_bwd, device, remove_batch_dim, cache)
        _position_slice(pos_slice)
        fwd, bwd = (
            [(name, partial(self._save_part, save, pos_slice, dtype)) for name, save in hooks] for hooks in (fwd, bwd)
        )
        return cache, fwd if names else [(matches, fwd[0][1])], bwd

    def _save_part(
        self, save: Callable, pos_slice: Any, dtype: torch.dtype | None, tensor: Tensor, hook: HookPoint
    ) -> None:
        axes, positions = self.hook_axes(hook.name or ""), _position_slice(pos_slice)
        if "pos" in axes and positions.mode != "identity":
            tensor = _at_positions(tensor, axes.index("pos"), positions, pos_slice)
        save(tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor, hook=hook)

    @lower_if_it_does_not_fit(
        "what is kept (names_filter, pos_slice, dtype=torch.bfloat16), or give fewer or shorter prompts at once"
    )
    def run_with_cache(
        self,
        *args: Any,
        names_filter: NamesFilter = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        pos_slice: Any = None,
        return_cache_object: bool = True,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """Run the model and keep its activations.

        Args:
            names_filter: full hook names, one, or a predicate; default: everything but attention squares and per-head
                copies of the residual stream.
            device, dtype: where activations are kept and in which floating-point type, e.g. ``torch.bfloat16`` for half
                the memory; each is converted when it is cached, not at the end.
            pos_slice: keep these positions alone: an index, a slice, or several indices.
            incl_bwd: run the output (a loss) backward and keep gradients too, under names ending in ``_grad``.
            return_cache_object: False gives a plain dict.
            remove_batch_dim, reset_hooks_end, clear_contexts: as in TransformerLens.

        Returns:
            What the model returns, and an :class:`reflowlens.activations.cache.ActivationCache`.

        Raises:
            ReflowlensError: a point does not exist or was not reached, ``pos_slice`` selects nothing,
                ``remove_batch_dim`` with several prompts, or the memory does not hold what is kept.
        """
        from reflowlens.activations.cache import ActivationCache

        if args:
            args = (read_once(args[0]), *args[1:])
        elif "input" in kwargs:
            kwargs["input"] = read_once(kwargs["input"])
        tokens, lengths = self._tokens_of_pass(args[0] if args else kwargs.get("input"), kwargs)
        if remove_batch_dim and tokens is not None and len(tokens) > 1:
            raise ReflowlensError(f"remove_batch_dim needs one prompt, got {len(tokens)}")
        activations, fwd, bwd = self.get_caching_hooks(
            names_filter, incl_bwd, device, remove_batch_dim, pos_slice=pos_slice, dtype=dtype
        )
        with self.hooks(fwd, bwd, reset_hooks_end, clear_contexts):
            out = self(*args, **kwargs)
            if incl_bwd:
                if not isinstance(out, Tensor) or out.numel() != 1 or not out.requires_grad:
                    raise ReflowlensError(
                        "incl_bwd needs a loss to go back from: pass return_type='loss', with gradients on"
                    )
                out.backward()
        if not return_cache_object:
            return out, activations
        return out, ActivationCache(
            activations, self, has_batch_dim=not remove_batch_dim, tokens=tokens, lengths=lengths
        )

    def _tokens_of_pass(
        self, input: Any, kwargs: dict[str, Any]
    ) -> tuple[Int[Tensor, "batch pos"] | None, list[int] | None]:
        """What a pass reads, where it starts from tokens, and how much of each row is its own, where that is known."""
        given = lengths_given(self, input)
        if kwargs.get("start_at_layer") is not None:
            return None, given
        tokens, lengths = self.tokens_and_lengths(input, offset=read_before(kwargs.get("past_kv_cache")))
        return tokens, given or lengths

    def generate(self, input: TextInput, max_new_tokens: int = 60, **kwargs: Any) -> Any:
        """Continue a prompt; see :func:`reflowlens.generation.generate`."""
        from reflowlens.generation import generate

        return generate(self, input, max_new_tokens, **kwargs)

    def __repr__(self) -> str:
        """One line; ``print(model.blocks)`` shows the modules."""
        cfg = self.cfg
        signals = f", {cfg.n_signals} signals" if cfg.n_signals else ""
        sizes = f"{self.n_parameters:,} parameters, {cfg.n_layers} layers, d_model {cfg.d_model}{signals}, {cfg.device}"
        return f"{type(self).__name__}({cfg.model_name or cfg.architecture}: {sizes})"

    def _repr_html_(self) -> str:
        from reflowlens.notebook.html import folded, table, titled

        rows: dict[str, list[str]] = {}
        for name in self.hook_dict:
            rows.setdefault(re.sub(r"^blocks\.\d+\.", "blocks.*.", name), []).append(name)
        points = [(name, len(names), ", ".join(self.hook_axes(names[0]))) for name, names in rows.items()]
        hooks = folded(f"{len(self.hook_dict)} hook points", table(["point", "how many", "axes"], points))
        kind, _, facts = repr(self).rstrip(")").partition("(")
        return titled(kind, facts, self.cfg._repr_html_(), hooks)


def _hooks(hooks: Any, what: str) -> list[tuple[str | Callable[[str], bool], Callable]]:
    """Pairs of a name and a function, which may come from an iterator, as a list."""
    pairs = list(hooks) if isinstance(hooks, Iterable) else [hooks]
    for pair in pairs:
        name, hook = pair if isinstance(pair, Sequence) and len(pair) == 2 else (None, None)
        if not (isinstance(name, str) or callable(name)) or not callable(hook):
            raise ReflowlensError(f"{what} must be a list of pairs (hook point, function), got {pair!r}")
    return pairs


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
        found = len(positions.indices(n))
    except (IndexError, TypeError):
        found = 0
    if not found:
        raise ReflowlensError(f"pos_slice={pos_slice} selects nothing: this pass has positions 0 to {n - 1}")
    return positions.apply(tensor, dim=axis).clone()  # a view would keep every position alive


def is_cheap_to_read(tokens: Int[Tensor, "*tokens"]) -> bool:
    """Whether there are values to look at, on no other device, which would be waited for, and in no compiled graph."""
    return tokens.device.type == "cpu" and not torch.compiler.is_compiling() and tokens.numel() > 0


def _watched(function: Callable, fired: set[int], index: int, tensor: Tensor, hook: HookPoint) -> Any:
    fired.add(index)
    return function(tensor, hook=hook)
