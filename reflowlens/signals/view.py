"""A model's logits written in signals: what each says, writes and adds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from reflowlens.arguments import integer, whole_number
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.models.loss import capped
from reflowlens.models.numerics import without_autocast
from reflowlens.models.parts import Norm, plus
from reflowlens.models.products import product
from reflowlens.tokenizers.targets import target_ids


@dataclass(frozen=True)
class SignalView:
    """A model's logits written in S signals; :func:`signal_view` makes one.

    Args:
        name: which view it is.
        recipe: R, a row per token; rows from ``n_tokens`` on are padding that no token id reaches.
        basis: B, a row per signal.
        norm: the final norm, which a readout goes through; None: the stream is read as it is (:attr:`final`).
        model: the model that the view was made from.
        bias: what the readout adds to the logits whatever the signals are; None if it has no bias.
        cap: logits are held between ±cap, as the model's are; None if they are not.

    Example:
        >>> import reflowlens as rl
        >>> model = rl.load_model("reflow-nano")
        >>> view = rl.signal_view(model)
        >>> logits, cache = model.run_with_cache("The capital of France is")
        >>> parts = view.contributions(cache["resid_post", -1][0, -1], " Paris")
        >>> bool((parts.sum() - logits[0, -1, model.to_single_token(" Paris")]).abs() < 1e-3)
        True
    """

    name: str
    recipe: Float[Tensor, "d_vocab S"]
    basis: Float[Tensor, "S d_model"]
    norm: Norm | None = dataclasses.field(repr=False)
    model: HookedModel = dataclasses.field(repr=False)
    bias: Float[Tensor, " d_vocab"] | None = dataclasses.field(default=None, repr=False)
    cap: float | None = None

    def __post_init__(self) -> None:
        if self.bias is not None and len(self.bias) != len(self.recipe):
            raise ReflowlensError(
                f"a view's bias has an entry for each row of its recipe, got {len(self.bias):,} for "
                f"{len(self.recipe):,}: view.of_tokens(n) cuts both"
            )

    @property
    def n_signals(self) -> int:
        """S, the number of signals."""
        return self.basis.shape[0]

    @property
    def n_carried(self) -> int:
        """How many coordinates stand behind the signals in a readout and are none: what signals leave out."""
        return 0

    @property
    def logit_rows(self) -> Float[Tensor, "d_vocab S_carried"]:
        """What logits are read off a readout with: the recipe, and where something is carried its columns behind."""
        return self.recipe

    @property
    def embedding(self) -> Float[Tensor, "d_vocab d_model"]:
        """The vectors that the recipes are of, with what the signals leave out of them."""
        return self.write(self.recipe)

    @property
    def n_tokens(self) -> int:
        """Number of rows of the recipe that belong to real tokens."""
        return self.model.tokenizer.n_vocab

    @property
    def is_prediction(self) -> bool:
        """Whether the logits of the stream that it reads are the model's: False of a view that reads the last residual
        stream of a model that refines it."""
        return self.norm is None or self.model.reads_last_stream

    @property
    def final(self) -> SignalView:
        """The view of ``model.final_stream(text)``, whose logits are the model's at every position.

        That is the view itself where the model reads logits off its last residual stream; otherwise it reads the
        refined stream, which no norm comes behind.

        Example: ``view.final.contributions(model.final_stream("The king")[0, -1], " is").sum()  # before a cap``
        """
        return self if self.is_prediction else dataclasses.replace(self, norm=None)

    def readout(self, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch S"]:
        """Readout coordinates a = B norm_final(x); ``logits(a)`` is the logit lens of x. No hook of the norm runs.

        Without a norm (:attr:`final`) B x, of the refined stream x.

        Raises:
            ReflowlensError: the last axis is not d_model.

        Example: ``view.readout(cache["resid_post", -1])  # [batch, pos, S]``
        """
        check_vectors("a residual stream", resid, "d_model", self.basis.shape[1])
        with without_autocast(self.basis):
            x = resid.to(self.basis.dtype)
            return product(x if self.norm is None else self.norm(x, hooked=False), self.basis.T)

    def logits(self, signals: Float[Tensor, "*batch S"]) -> Float[Tensor, "*batch d_vocab"]:
        """The logits R a of readout coordinates a, with the readout's bias and its cap.

        Raises:
            ReflowlensError: the last axis is not S.

        Example: ``view.logits(view.readout(cache["resid_post", -1]))  # the model's logits, up to rounding``
        """
        rows = self.logit_rows
        check_vectors("a readout", signals, "S", rows.shape[1])
        with without_autocast(rows):
            return capped(plus(product(signals, rows.T), self.bias), self.cap)

    def bias_of(self, tokens: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """What the readout adds to some tokens' logits whatever the signals are; 0 where it has no bias."""
        return self.recipe.new_zeros(tokens.shape) if self.bias is None else self.bias[tokens]

    def of_tokens(self, n: int) -> SignalView:
        """The view of the first n tokens alone.

        Example: ``view.of_tokens(view.n_tokens)  # without padding, which no token id reaches``
        """
        bias = None if self.bias is None else self.bias[:n]
        return dataclasses.replace(self, recipe=self.recipe[:n], bias=bias)

    def with_recipe(self, recipe: Float[Tensor, "d_vocab S"]) -> SignalView:
        """The view with another recipe and the same basis; what the embedding is, follows from these two."""
        return dataclasses.replace(self, recipe=recipe)

    def write(self, recipe_vector: Float[Tensor, "*batch S"]) -> Float[Tensor, "*batch d_model"]:
        """The vector r B that write coordinates r, such as a row of R, stand for in the residual stream.

        Raises:
            ReflowlensError: the last axis is not S.

        Example: ``view.write(view.rows([" king"]))  # the embedding of " king", [1, d_model]``
        """
        check_vectors("a recipe", recipe_vector, "S", self.n_signals)
        with without_autocast(self.basis):
            return product(recipe_vector, self.basis)

    def contributions(
        self, resid: Float[Tensor, "*batch d_model"], target: str | int | Int[Tensor, "*batch"]
    ) -> Float[Tensor, "*batch S"]:
        """What each signal adds to the target's logit, aₛ · R[target, s], in logits.

        The sum over S is the logit, less the readout's bias where it has one (:meth:`bias_of`), and in front of the cap
        where it has one.

        Args:
            resid: residual streams x, which are read out: a = B norm_final(x).
            target: one token (its text or id), or an id for each stream.

        Raises:
            ReflowlensError: the target is not a single token, there is no such id, or ids do not fit the streams; or
                the model's logits are no sums over this stream (:attr:`is_prediction`).

        Example: ``view.contributions(cache["resid_post", -1][0, -1], " Paris").topk(5)``
        """
        self.check_is_prediction()
        readout, ids = self.readout(resid), self._ids(target)
        try:
            torch.broadcast_shapes(ids.shape, readout.shape[:-1])
        except RuntimeError:
            raise ReflowlensError(
                f"targets {list(ids.shape)} do not fit residual streams {list(resid.shape)}: one, or one for each"
            ) from None
        return self._summed(readout * self.logit_rows[ids])

    def _summed(self, contributions: Float[Tensor, "*batch S_carried"]) -> Float[Tensor, "*batch S"]:
        """The contributions of signals, and of each part that is carried behind them."""
        return contributions

    def readout_of_part(
        self, part: Float[Tensor, "*part batch d_model"], scale: Float[Tensor, "batch 1"], at: Float[Tensor, "batch d"]
    ) -> Float[Tensor, "*part batch S"]:
        """The readout of a part of the streams ``at``, under their final norm's divisor and without its bias: linear,
        so that parts add up."""
        return product(self.normed(part, scale), self.basis.T)

    def readout_of_bias(
        self, scale: Float[Tensor, "batch 1"], at: Float[Tensor, "batch d_model"]
    ) -> Float[Tensor, "#batch S"]:
        """What no part of the streams writes: with :meth:`readout_of_part` of all parts it makes up the readout."""
        return self.norm_bias()[None] @ self.basis.T

    def removals(
        self, stream: Float[Tensor, "*batch d_model"]
    ) -> tuple[Float[Tensor, "*batch S"], Float[Tensor, "S d_model"]]:
        """How much of each signal is in a residual stream, and along which direction: what removing it takes away.

        Here the component along B_s; of a dictionary what its feature writes.
        """
        directions = F.normalize(self.basis, dim=-1)
        return product(stream.to(directions.dtype), directions.T), directions

    def normed(self, x: Float[Tensor, "*batch d_model"], scale: Tensor | float) -> Float[Tensor, "*batch d"]:
        """A vector as the final norm passes it on under a given divisor: centred where it centres, and weighted."""
        x = x.to(self.basis.dtype)
        if self.norm is None:
            return x / scale
        return (x - x.mean(dim=-1, keepdim=True) if self.norm.centered else x) / scale * self.norm.w

    def norm_bias(self) -> Float[Tensor, " d_model"]:
        zero = torch.zeros_like(self.basis[0])
        return zero if self.norm is None else plus(zero, self.norm.b)

    def _rotated(self, A: Float[Tensor, "S S"]) -> SignalView:
        return dataclasses.replace(self, name="rotated", recipe=product(self.recipe, A), basis=A.T @ self.basis)

    def check_is_prediction(self) -> None:
        """Raise unless the logits of the stream that it reads are the model's."""
        if not self.is_prediction:
            raise ReflowlensError(
                f"a {type(self.model).__name__} refines its last residual stream before logits are read off it: take "
                "view.final and model.final_stream(text)"
            )

    def rows(self, words: list[str]) -> Float[Tensor, "word S"]:
        """Rows of R, the recipes of words that are single tokens, leading space included.

        Raises:
            ReflowlensError: it is not a list, or a word is several tokens.

        Example: ``view.rows([" king", " queen"])``
        """
        if isinstance(words, str | Tensor) or not isinstance(words, Iterable):
            raise ReflowlensError(f"rows takes a list of words, got {words!r}")
        return self.recipe[[self.model.to_single_token(word) for word in words]]

    def codebook(self, signal: int, k: int = 10) -> pd.DataFrame:
        """The tokens that a signal stands for: the k largest positive and negative entries of its recipe column.

        Returns:
            A row per token: ``sign`` (+1 or -1), ``token`` (its id), ``text``, ``recipe`` (the entry of R) and ``z``
            (the entry minus the column's mean over real tokens, in standard deviations), strongest first within each
            sign.

        Raises:
            ReflowlensError: there is no such signal, or k is not a positive integer.

        Example: ``rl.signal_view(model).codebook(17, k=5)``
        """
        index, k = integer(signal), whole_number(k, "k", 1)
        if index is None or not 0 <= index < self.n_signals:
            raise ReflowlensError(f"no signal {signal!r}: this view has signals 0 to {self.n_signals - 1}")
        column = self.recipe[: self.n_tokens, index].float()
        z = (column - column.mean()) / column.std()
        frames = []
        for sign in (1, -1):
            values, ids = (sign * column).topk(min(k, len(column)))
            kept = ids[values > 0].tolist()
            text = self.model.tokenizer.to_str_tokens(kept)
            frame = {"sign": sign, "token": kept, "text": text, "recipe": column[kept].tolist(), "z": z[kept].tolist()}
            frames.append(pd.DataFrame(frame))
        return pd.concat(frames, ignore_index=True)

    def _ids(self, target: str | int | Tensor) -> Tensor:
        if not isinstance(target, Tensor) or target.ndim == 0:
            return target_ids(self.model.to_single_token, target, 1, len(self.recipe))[0]
        if not target.numel() or target.is_floating_point() or target.dtype == torch.bool:
            raise ReflowlensError(f"token ids are integers, got {target!r}")
        for token in map(int, target.aminmax()):
            if not 0 <= token < len(self.recipe):
                raise ReflowlensError(f"no token {token}: ids are 0 to {len(self.recipe) - 1}")
        return target

    def __repr__(self) -> str:
        return f"SignalView({self._summary()})"

    def _summary(self) -> str:
        whose = self.model.cfg.model_name or self.model.cfg.architecture
        sizes = f"{self.n_signals} signals, {self.n_tokens:,} tokens, d_model {self.basis.shape[1]}"
        return f"{self.name} of {whose}: {sizes}"

    def _repr_html_(self) -> str:
        """The strongest signals, by the norm of their recipe column, with the tokens that they stand for."""
        from reflowlens.notebook.html import table, titled

        norms = torch.linalg.vector_norm(self.recipe[: self.n_tokens].float(), dim=0)
        rows = []
        for signal in norms.topk(min(5, self.n_signals)).indices.tolist():
            tokens = self.codebook(signal, k=6).groupby("sign").text.agg(lambda texts: " ".join(map(repr, texts)))
            rows.append((signal, float(norms[signal]), tokens.get(1, ""), tokens.get(-1, "")))
        columns = ["signal", "norm", "tokens it speaks for", "and against"]
        return titled("SignalView", self._summary(), table(columns, rows))


def check_vectors(what: str, x: Tensor, axis: str, size: int) -> None:
    """Raise unless the last axis of a tensor has this size."""
    if not isinstance(x, Tensor) or not x.ndim or x.shape[-1] != size:
        got = list(x.shape) if isinstance(x, Tensor) else repr(x)
        raise ReflowlensError(f"{what} is a tensor [..., {axis}] with {axis}={size}, got {got}")
