"""What every hooked model does whatever its architecture: text in and out, named activations, readable errors.

A model here is a TransformerLens ``HookedRootModule`` that meets its ``TransformerLensModelWithWeights`` protocol, so
TransformerLens's patching, attribution and lens functions take it as it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint
from transformer_lens.utilities import Slice

from reflowlens.config import ModelConfig, nearest
from reflowlens.errors import ReflowlensError
from reflowlens.models.components import Norm
from reflowlens.models.loss import IGNORE
from reflowlens.tokenizers import Tokenizer, get_tokenizer

TextInput: TypeAlias = "str | Sequence[str] | Int[Tensor, 'batch pos'] | Int[Tensor, ' pos']"
NamesFilter: TypeAlias = "str | Sequence[str] | Callable[[str], bool] | None"
Hooks: TypeAlias = "Sequence[tuple[str | Callable[[str], bool], Callable[..., Any]]]"

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
# Where the positions are if not on axis 1.
_POSITION_AXES = {"hook_attn_scores": 2, "hook_pattern": 2, "hook_basis": None}


class HookedModel(HookedRootModule):
    """Base class of the architectures."""

    blocks: torch.nn.ModuleList
    ln_final: Norm

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg

    # -- text ---------------------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the model was configured with."""
        return get_tokenizer(self.cfg.tokenizer_name)

    def to_tokens(self, input: TextInput, prepend_bos: bool = False) -> Int[Tensor, "batch pos"]:
        """Token ids of a text or of several, padded on the right with the document end.

        These models are trained without a beginning-of-sequence token, so none is added unless asked for.

        Raises:
            ReflowlensError: the text is empty, too long for ``n_ctx``, or an id is outside the vocabulary.
        """
        return self.tokens_and_lengths(input, prepend_bos=prepend_bos)[0]

    def next_tokens(self, tokens: Int[Tensor, "batch pos"], lengths: list[int]) -> Int[Tensor, "batch pos"]:
        """What each position should predict: the next id, -100 at a row's end and over padding."""
        if max(lengths) < 2:
            raise ReflowlensError("a loss needs two tokens at least: one to predict from and one to predict")
        last = torch.as_tensor(lengths, device=tokens.device)[:, None] - 1
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return tokens.roll(-1, dims=1).masked_fill(positions >= last, IGNORE)

    def tokens_and_lengths(
        self, input: TextInput, *, prepend_bos: bool = False, offset: int = 0
    ) -> tuple[Int[Tensor, "batch pos"], list[int]]:
        """Ids padded on the right, and how many of each row are the prompt's own."""
        if isinstance(input, Tensor):
            tokens = input[None] if input.ndim == 1 else input
            if tokens.ndim != 2 or tokens.is_floating_point():
                raise ReflowlensError(f"tokens must be integers [batch, pos], got {input.dtype} {list(input.shape)}")
            self._check_length(tokens.shape[1], offset)
            self._check_ids(tokens)
            return tokens.to(self.cfg.device), [tokens.shape[1]] * tokens.shape[0]
        texts = [input] if isinstance(input, str) else list(input)
        end = self.tokenizer.eot_token or 0
        rows = [[end] * prepend_bos + self.tokenizer.encode(text) for text in texts]
        if not rows or any(not row for row in rows):
            raise ReflowlensError("the prompt is empty: give at least one token of text")
        lengths = [len(row) for row in rows]
        self._check_length(max(lengths), offset)
        padded = [row + [end] * (max(lengths) - len(row)) for row in rows]
        tokens = torch.tensor(padded)
        self._check_ids(tokens)
        return tokens.to(self.cfg.device), lengths

    def _check_length(self, length: int, offset: int) -> None:
        if length == 0:
            raise ReflowlensError("the prompt is empty: give at least one token")
        if offset + length > self.cfg.n_ctx:
            raise ReflowlensError(
                f"the prompt is too long: {offset + length} tokens, but this model reads at most n_ctx={self.cfg.n_ctx}"
            )

    def _check_ids(self, tokens: Int[Tensor, "batch pos"]) -> None:
        # On another device the check would wait for it, and in a compiled graph it would break the graph.
        if tokens.device.type != "cpu" or torch.compiler.is_compiling() or not tokens.numel():
            return
        lowest, highest = map(int, tokens.aminmax())
        if lowest < 0 or highest >= self.cfg.d_vocab:
            raise ReflowlensError(
                f"no token {lowest if lowest < 0 else highest}: this model's ids are 0 to {self.cfg.d_vocab - 1}"
            )

    def to_string(self, tokens: Int[Tensor, "*batch pos"] | Sequence[int]) -> str | list[str]:
        """The text of ids [pos], or a list of texts of ids [batch, pos]."""
        ids = torch.as_tensor(tokens)
        if ids.ndim == 2:
            return [self.tokenizer.decode(row.tolist()) for row in ids]
        return self.tokenizer.decode(ids.reshape(-1).tolist())

    def to_str_tokens(self, input: TextInput | np.ndarray | Sequence[int], prepend_bos: bool = False) -> list[str]:
        """The text of each token of one prompt, for labels."""
        if isinstance(input, str):
            input = self.to_tokens(input, prepend_bos)
        ids = input if isinstance(input, Tensor) else torch.as_tensor(np.asarray(input))
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

        With it TransformerLens's ``logit_attrs``, which divides by the norm's scale alone, sums to the logit exactly.
        """
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        ids = torch.as_tensor(tokens, device=self.cfg.device)
        return self.unembedding_rows(ids) * self.ln_final.w

    def unembedding_rows(self, tokens: Int[Tensor, "*tokens"]) -> Float[Tensor, "*tokens d_model"]:
        """Rows of W_E (columns of W_U) without forming the others."""
        rows = self.W_E[tokens.reshape(-1)]
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

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """Sum of the biases up to a layer: zero, none of these architectures has any."""
        return torch.zeros(self.cfg.d_model, device=self.cfg.device)

    def tl_parameters(self) -> dict[str, Tensor]:
        """Parameters under TransformerLens's names: ``unembed.W_U`` too, and shared keys and values per query head."""
        parameters: dict[str, Tensor] = dict(self.named_parameters())
        group = self.cfg.n_heads // self.cfg.kv_heads
        for name, parameter in parameters.items():
            if name.endswith(("attn.W_K", "attn.W_V")):
                parameters[name] = parameter.repeat_interleave(group, dim=0)
        return parameters | {"unembed.W_U": self.W_U}

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
        if name in self.hook_dict:
            return
        parts = name.split(".")
        if parts[0] == "blocks" and len(parts) > 1 and parts[1].isdigit() and int(parts[1]) >= self.cfg.n_layers:
            raise ReflowlensError(f"no hook {name!r}: this model has blocks 0 to {self.cfg.n_layers - 1}")
        raise ReflowlensError(
            f"no hook {name!r}{nearest(name, list(self.hook_dict)) or '; model.hook_dict lists them'}"
        )

    def add_hook(self, name: str | Callable[[str], bool], hook: Callable, *args: Any, **kwargs: Any) -> None:
        if isinstance(name, str):
            self.check_hook_name(name)
        super().add_hook(name, hook, *args, **kwargs)

    @contextlib.contextmanager
    def hooks(
        self,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator[HookedModel]:
        """Attach hooks for the duration of a ``with`` block; always removed, also after an exception.

        Raises:
            ReflowlensError: a hook point does not exist, or a forward hook had not run by the end of the block.
        """
        for name, _ in (*fwd_hooks, *bwd_hooks):
            if isinstance(name, str):
                self.check_hook_name(name)
            elif not any(map(name, self.hook_dict)):
                raise ReflowlensError("a hook's name filter matches none of the model's hook points")
        fired: set[int] = set()
        watched = [(name, partial(_watched, hook, fired, i)) for i, (name, hook) in enumerate(fwd_hooks)]
        with super().hooks(watched, list(bwd_hooks), reset_hooks_end, clear_contexts):
            yield self
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
    ) -> tuple[dict, list, list]:
        """As TransformerLens's, but a filter that matches nothing is an error and ``pos_slice`` cuts positions alone.

        A point that was named must be reached; of a predicate's, or of the default, those that are reached are cached.
        """
        names: list[str] = []
        matches: Callable[[str], bool] = self.default_names
        if callable(names_filter):
            matches = names_filter
        elif names_filter is not None:
            names = [names_filter] if isinstance(names_filter, str) else list(names_filter)
            matches = names.__contains__
        for name in names:
            self.check_hook_name(name)
        if not any(map(matches, self.hook_dict)):
            raise ReflowlensError("names_filter matches none of the model's hook points; model.hook_dict lists them")
        cache, fwd, bwd = super().get_caching_hooks(matches, incl_bwd, device, remove_batch_dim, cache)
        positions = Slice.unwrap(pos_slice)
        fwd, bwd = ([(name, partial(_sliced, save, positions)) for name, save in hooks] for hooks in (fwd, bwd))
        return cache, fwd if names else [(matches, fwd[0][1])], bwd

    def run_with_cache(
        self, *args: Any, return_cache_object: bool = True, remove_batch_dim: bool = False, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Run the model and keep its activations.

        Args:
            names_filter: hook names, one name, or a predicate; default: everything but attention squares and per-head
                copies of the residual stream.
            return_cache_object: False gives a plain dict.
            remove_batch_dim, device, pos_slice, incl_bwd: as in TransformerLens.

        Returns:
            What the model returns, and an :class:`reflowlens.cache.ActivationCache`.
        """
        from reflowlens.cache import ActivationCache

        out, activations = super().run_with_cache(*args, remove_batch_dim=remove_batch_dim, **kwargs)
        if not return_cache_object:
            return out, activations
        return out, ActivationCache(activations, self, has_batch_dim=not remove_batch_dim)

    def generate(self, input: TextInput, max_new_tokens: int = 60, **kwargs: Any) -> Any:
        """Continue a prompt; see :func:`reflowlens.generation.generate`."""
        from reflowlens.generation import generate

        return generate(self, input, max_new_tokens, **kwargs)

    def _repr_html_(self) -> str:
        title = self.cfg.model_name or self.cfg.architecture
        sizes = f"{self.n_parameters:,} parameters, {len(self.hook_dict)} hook points"
        return f"<b>{title}</b>: {sizes}{self.cfg._repr_html_()}"


def _watched(function: Callable, fired: set[int], index: int, tensor: Tensor, hook: HookPoint) -> Any:
    fired.add(index)
    return function(tensor, hook=hook)


def _sliced(save: Callable, positions: Slice, tensor: Tensor, hook: HookPoint) -> None:
    axis = _POSITION_AXES.get((hook.name or "").rsplit(".", 1)[-1], 1)
    save(tensor if axis is None else positions.apply(tensor, dim=axis), hook=hook)
