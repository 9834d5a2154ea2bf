"""What every hooked model does whatever its architecture: text in and out, named activations, readable errors.

A model here is a TransformerLens ``HookedRootModule`` that meets its ``TransformerLensModelWithWeights`` protocol, so
TransformerLens's patching, attribution and lens functions take it as it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import FactoredMatrix

from reflowlens.arguments import integer
from reflowlens.config import ModelConfig
from reflowlens.errors import ReflowlensError
from reflowlens.models.architecture import Architecture
from reflowlens.models.hooking import HookingModel, NamesFilter
from reflowlens.models.numerics import dense
from reflowlens.models.parts import Norm, is_hooked
from reflowlens.models.pass_context import lengths_given
from reflowlens.models.past import read_before
from reflowlens.models.text import TextInput, read_once
from reflowlens.out_of_memory import lower_if_it_does_not_fit

if TYPE_CHECKING:
    from reflowlens.models.residual import Readout


_SQUARES = ("hook_attn_scores", "hook_pattern")
# Arguments of a pass with which positions attend to others than to all of their row up to themselves.
_APART = {"segments", "attention_mask", "padding_side", "past_kv_cache"}


class HookedModel(Architecture, HookingModel):
    """Base class of the architectures, each of which declares what is its own (`Architecture`)."""

    blocks: torch.nn.ModuleList
    ln_final: Norm
    unembed: torch.nn.Module

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg

    def check_reads_last_stream(self, what: str) -> None:
        """Raise unless logits are sums over what is in the last residual stream (``reads_last_stream``).

        Args:
            what: takes it for granted, in the plural.
        """
        if not self.reads_last_stream:
            raise ReflowlensError(
                f"{what} need logits that are sums over the last residual stream, and a {type(self).__name__} refines "
                "that stream and caps its logits: change activations in whole passes, by rl.sweep or rl.intervene"
            )

    def tokens_to_residual_directions(self, tokens: str | int | Tensor) -> Float[Tensor, "*tokens d_model"]:
        """The unembedding direction of each token, ``W_U[:, token]`` times the final norm's weight.

        The inner product with the residual stream divided by the final norm's scale is the token's logit, less
        ``b · W_U[:, token]`` if that norm has a bias b, and less ``b_U[token]``. TransformerLens's ``logit_attrs``,
        which divides by the scale alone, therefore sums to it.

        Args:
            tokens: a text that is one token, an id, or ids of any shape.

        Returns:
            [*tokens, d_model].

        Raises:
            ReflowlensError: a text is several tokens, or an id is outside the vocabulary; or logits are no such
                products (``reads_last_stream``).
        """
        self.check_reads_last_stream("directions of logits")
        ids = self._as_ids(self.to_single_token(tokens) if isinstance(tokens, str) else tokens)
        self._check_ids(ids)
        return self.unembedding_rows(ids.to(self.cfg.device)) * self.ln_final.w

    def unembedding_rows(self, tokens: Int[Tensor, "*tokens"]) -> Float[Tensor, "*tokens d_model"]:
        """Columns of ``W_U`` for some tokens, [*tokens, d_model]; of a factored embedding only these are formed."""
        rows = self.unembedding[tokens.reshape(-1)]  # type: ignore[index] # of factors by a tensor too
        return dense(rows).reshape(*tokens.shape, self.cfg.d_model)

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"] | FactoredMatrix:
        """The embedding; a ``FactoredMatrix`` where the architecture factors it."""
        raise NotImplementedError

    @property
    def unembedding(self) -> Float[Tensor, "d_vocab d_model"] | FactoredMatrix:
        """What logits are read with, W_Uᵀ: the embedding where they are tied; in factors where that has them."""
        return self.W_E if self.cfg.tie_word_embeddings else self.W_U.T

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """The unembedding as one matrix; a tied one is formed at each access."""
        raise NotImplementedError

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        """The unembedding's bias; zeros where it has none."""
        raise NotImplementedError

    def final_stream(
        self, input: TextInput, *, segments: Int[Tensor, "batch pos"] | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """The stream that :meth:`read_final` reads: the logits of a position follow from its own."""
        raise NotImplementedError

    def read_final(self, stream: Float[Tensor, "batch pos d_model"]) -> Readout:
        """The readout of any positions of :meth:`final_stream`."""
        raise NotImplementedError

    @property
    def n_parameters(self) -> int:
        """Number of parameters, learned positions included."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def n_params_total(self) -> int:
        """TransformerLens's name of :attr:`n_parameters`."""
        return self.n_parameters

    def init_weights(self, generator: torch.Generator) -> None:
        """Fill the parameters with fresh values."""
        raise NotImplementedError

    def make_cache(self, batch: int, dtype: torch.dtype = torch.float32) -> Any:
        """An empty cache for incremental decoding, the ``past_kv_cache`` of forward passes.

        Args:
            batch: rows it is made for.
            dtype: floating-point type in which activations are kept.

        Returns:
            A :class:`~reflowlens.models.past.ReadPositions`: keys and values per layer, or a recurrent state. Each pass
            appends its positions to it.

        Raises:
            ReflowlensError: ``batch`` is not a positive integer, or ``dtype`` not a floating-point type.
        """
        raise NotImplementedError

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """Sum of the output biases of earlier blocks; zeros if bias-free.

        Args:
            layer: biases of blocks before this one; ``n_layers`` for all.
            mlp_input: add the attention bias of block ``layer`` too: what its MLP reads.
            include_mlp_biases: False sums those of attention alone.

        Returns:
            float32 [d_model].

        Raises:
            ReflowlensError: ``layer`` is not an integer from 0 to ``n_layers``.
        """
        n_layers, index = self.cfg.n_layers, integer(layer)
        if index is None or not 0 <= index <= n_layers:
            raise ReflowlensError(f"layer must be an integer from 0 to n_layers={n_layers}, got {layer!r}")
        return torch.zeros(self.cfg.d_model, device=self.cfg.device, dtype=torch.float32)

    def tl_parameters(self) -> dict[str, Tensor]:
        """Parameters by TransformerLens's names: ``unembed.W_U`` even if tied, keys and values once per query head."""
        return {**dict(self.named_parameters()), "unembed.W_U": self.W_U}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HookedModel:
        super()._apply(fn, recurse)
        first = next(self.parameters())
        dtype = str(first.dtype).removeprefix("torch.")
        self.cfg = dataclasses.replace(self.cfg, device=str(first.device), weights_dtype=dtype)
        return self

    def set_use_attn_result(self, use: bool) -> None:
        """Cache ``attn.hook_result`` by default.

        Raises:
            ReflowlensError: this architecture has no such point; so of the other switches.
        """
        self._switch("use_attn_result", use)

    def set_use_split_qkv_input(self, use: bool) -> None:
        """Cache ``attn.hook_{q,k,v}_input`` by default."""
        self._switch("use_split_qkv_input", use)

    def set_use_attn_in(self, use: bool) -> None:
        """Cache ``attn.hook_attn_in`` by default: of models whose heads have keys and values of their own."""
        self._switch("use_attn_in", use)

    def set_use_hook_mlp_in(self, use: bool) -> None:
        """Cache ``hook_mlp_in`` by default."""
        self._switch("use_hook_mlp_in", use)

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
            args, kwargs: arguments of the forward pass.
            names_filter: full hook names, one of them, or a predicate of names; None: all but attention scores and
                patterns and per-head copies of the residual stream.
            device, dtype: where activations are kept and in which floating-point type, e.g. ``torch.bfloat16`` for half
                the memory; each is converted as it is cached.
            pos_slice: keep only these positions: an index, a slice, or several indices.
            incl_bwd: run the output, a loss, backward and keep gradients too, under names ending in ``_grad``.
            return_cache_object: False gives a plain dict.
            remove_batch_dim, reset_hooks_end, clear_contexts: as in TransformerLens.

        Returns:
            The output of the forward pass, and an :class:`reflowlens.activations.cache.ActivationCache` of tensors
            whose axes :meth:`hook_axes` names.

        Raises:
            ReflowlensError: a point does not exist or was not reached, ``pos_slice`` selects nothing,
                ``remove_batch_dim`` with several prompts, or the memory does not hold what is kept.

        Example: ``logits, cache = model.run_with_cache("The king"); cache["resid_post", 2]  # [1, 2, d_model]``
        """
        from reflowlens.activations.cache import ActivationCache

        if args:
            args = (read_once(args[0]), *args[1:])
        elif "input" in kwargs:
            kwargs["input"] = read_once(kwargs["input"])
        tokens, lengths = self._tokens_of_pass(args[0] if args else kwargs.get("input"), kwargs)
        if remove_batch_dim and tokens is not None and len(tokens) > 1:
            raise ReflowlensError(f"remove_batch_dim needs one prompt, got {len(tokens)}")
        changed = any(is_hooked(point) for name, point in self.hook_dict.items() if name.endswith(_SQUARES))
        activations, fwd, bwd = self.get_caching_hooks(
            names_filter, incl_bwd, device, remove_batch_dim, pos_slice=pos_slice, dtype=dtype
        )
        kept = self._showing(fwd, activations) if reset_hooks_end else contextlib.nullcontext()
        with kept, self._attached([] if reset_hooks_end else fwd, bwd, reset_hooks_end, clear_contexts):
            out = self(*args, **kwargs)
            if incl_bwd:
                if not isinstance(out, Tensor) or out.numel() != 1 or not out.requires_grad:
                    raise ReflowlensError(
                        "incl_bwd needs a loss to go back from: pass return_type='loss', with gradients on"
                    )
                out.backward()
        if not return_cache_object:
            return out, activations
        cache = ActivationCache(activations, self, has_batch_dim=not remove_batch_dim, tokens=tokens, lengths=lengths)
        cache.patterns_follow = pos_slice is None and dtype is None and not changed and not _APART & kwargs.keys()
        return out, cache

    def _tokens_of_pass(
        self, input: Any, kwargs: dict[str, Any]
    ) -> tuple[Int[Tensor, "batch pos"] | None, list[int] | None]:
        """The tokens of a pass, if it starts from tokens, and the number per row without padding, if known."""
        given = lengths_given(self, input)
        if kwargs.get("start_at_layer") is not None:
            return None, given
        side, offset = kwargs.get("padding_side", "right"), read_before(kwargs.get("past_kv_cache"))
        tokens, lengths = self.tokens_and_lengths(input, padding_side=side, offset=offset)
        if side == "left" or kwargs.get("attention_mask") is not None:
            return tokens, None  # lengths count from the beginning of a row
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
