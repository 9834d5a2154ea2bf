"""Signals: the coordinates in which a prediction is read.

A :class:`SignalView` is a recipe R [d_vocab, S] and a basis B [S, d_model] with R B = W_E. (Where a model has an
unembedding of its own, or prunes R at one end alone, W_E stands for W_Uᵀ here; a bias b_U is no signal's.) A reFlow
model was trained with one, its ``native`` view. The other views are computed from any model's weights, of reFlow's too,
so that a claim about signals can be compared with coordinates that were not trained:

=============  =================  =============  ==================================================================
view           recipe             basis          what it is for
=============  =================  =============  ==================================================================
``native``     R                  B              the signals that the model was trained with
``identity``   W_E                I              every model: the residual stream's own axes
``svd``        U                  Σ Vᵀ           every model: principal directions of the embedding
``rotated``    R A                Aᵀ B           the same logits for every orthogonal A: the null of any
                                                 statement about single signals
``varimax``    R A                Aᵀ B           the A with the largest kurtosis of the columns of R A: how sparse
                                                 single signals can be without training
=============  =================  =============  ==================================================================

A dictionary's features are a view too (:mod:`reflowlens.dictionary_view`), of which R B = W_E does not hold: what its
features leave out is carried along behind its signals in every readout and every row that logits are read off with.

A view reads a residual stream through the final norm. Where a model refines that stream before it reads logits off it
(``ttt_flow``), this is a logit lens and no prediction; ``view.final`` reads ``model.final_stream`` instead, of which
logits in front of the cap are exact sums.

Readout coordinates, a = B norm_final(x), and write coordinates, r in x = r B, differ unless B Bᵀ = I; each function
says which it uses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import FactoredMatrix

from reflowlens.arguments import integer, is_one_of, random_seed, whole_number
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.models.loss import capped
from reflowlens.models.numerics import wide, without_autocast
from reflowlens.models.parts import Norm, plus
from reflowlens.models.unwrapping import hooked_model
from reflowlens.tokenizers.targets import target_ids
from reflowlens.varimax import varimax_rotation

if TYPE_CHECKING:
    from reflowlens.dictionaries.dictionary import Dictionary

ViewName = Literal["native", "identity", "svd", "rotated", "varimax"]
AnyView: TypeAlias = "SignalView | Dictionary | str | None"
"""What a ``view=`` argument may be: a view, the name of one, a dictionary, or a dictionary's name or folder."""
VIEWS: tuple[ViewName, ...] = ("native", "identity", "svd", "rotated", "varimax")
_TURNED = 256


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
        _check_vectors("a residual stream", resid, "d_model", self.basis.shape[1])
        with without_autocast(self.basis):
            x = resid.to(self.basis.dtype)
            return (x if self.norm is None else self.norm(x, hooked=False)) @ self.basis.T

    def logits(self, signals: Float[Tensor, "*batch S"]) -> Float[Tensor, "*batch d_vocab"]:
        """The logits R a of readout coordinates a, with the readout's bias and its cap.

        Raises:
            ReflowlensError: the last axis is not S.

        Example: ``view.logits(view.readout(cache["resid_post", -1]))  # the model's logits, up to rounding``
        """
        rows = self.logit_rows
        _check_vectors("a readout", signals, "S", rows.shape[1])
        with without_autocast(rows):
            return capped(plus(signals @ rows.T, self.bias), self.cap)

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
        _check_vectors("a recipe", recipe_vector, "S", self.n_signals)
        with without_autocast(self.basis):
            return recipe_vector @ self.basis

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
        return self.normed(part, scale) @ self.basis.T

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
        return stream.to(directions.dtype) @ directions.T, directions

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
        return dataclasses.replace(self, name="rotated", recipe=self.recipe @ A, basis=A.T @ self.basis)

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


@torch.no_grad()
def signal_view(
    model: HookedModel, name: ViewName | Dictionary | str | None = None, *, layer: int | None = None, seed: int = 0
) -> SignalView:
    """A model's signals: a recipe R [d_vocab, S] and a basis B [S, d_model] whose product is the (un)embedding.

    Of a dictionary, its features with what they leave out (:func:`reflowlens.dictionary_view.dictionary_view`).

    Both are float32 or wider; the weights of a 16-bit model are widened, not rounded again. The native view of a
    float32 model shares the weights' memory and follows their changes; any other view is of the weights as they are
    now.

    Args:
        model: a hooked model.
        name: ``native``, ``identity``, ``svd``, ``rotated`` or ``varimax`` (defined at the top of this module); by
            default ``native`` if the model has it, otherwise ``identity``. The last two rotate that default. Or a
            dictionary of the model: itself, its packaged name or its folder.
        layer: of a dictionary, which block's features; default the last that it has.
        seed: of the random rotation, and of the rows that varimax samples from a large vocabulary.

    Raises:
        ReflowlensError: the name is unknown, the model has no native signals, or the dictionary is another model's.

    Example: ``rl.signal_view(model, "svd").codebook(0)``
    """
    model = hooked_model(model)
    if (dictionary := _dictionary(name)) is not None:
        from reflowlens.dictionary_view import dictionary_view

        return dictionary_view(model, dictionary, layer)
    if layer is not None:
        raise ReflowlensError(f"layer chooses among those of a dictionary, and {name!r} is none")
    factored = isinstance(model.W_E, FactoredMatrix)
    if name is None:
        name = "native" if factored else "identity"
    if not is_one_of(name, VIEWS):
        raise ReflowlensError(
            f"view must be one of {', '.join(map(repr, VIEWS))}, a dictionary, or a dictionary's name or folder, got "
            f"{name!r}"
        )
    if name == "native":
        factors = model.unembedding
        if not isinstance(factors, FactoredMatrix):
            raise ReflowlensError(
                f"{model.cfg.architecture!r} has no native signals: its embedding is not factored; "
                "use the 'identity' or 'svd' view"
            )
        return SignalView("native", wide(factors.A.detach()), wide(factors.B.detach()), model.ln_final, model)
    if name == "rotated":
        view = signal_view(model)
        return rotate(view, random_rotation(view.n_signals, seed))
    if name == "varimax":
        return varimax_view(signal_view(model), seed=seed)
    with without_autocast(model.ln_final.w):
        embedding = wide(model.W_U.T.detach())
    bias = wide(model.b_U.detach()) if model.cfg.unembed_bias else None
    cap = getattr(model.unembed, "cap", None)
    if name == "identity":
        identity = torch.eye(embedding.shape[1], device=embedding.device, dtype=embedding.dtype)
        return SignalView("identity", embedding, identity, model.ln_final, model, bias, cap)
    U, singular_values, Vh = torch.linalg.svd(embedding, full_matrices=False)
    return SignalView("svd", U, singular_values[:, None] * Vh, model.ln_final, model, bias, cap)


def view_of(model: HookedModel, view: AnyView, *, seed: int = 0, exact_for: str = "") -> SignalView:
    """The view that a ``view=`` argument means: a view itself, or the one of that name (:func:`signal_view`).

    Args:
        exact_for: what asks for it, if it takes only views whose signals make up the embedding without a rest.

    Raises:
        ReflowlensError: the view was made from another model, whose norm and weights would be mixed with this one's; or
            something is carried behind its signals, which what asks for it does not take.
    """
    found = view if isinstance(view, SignalView) else signal_view(model, view, seed=seed)
    if found.model is not hooked_model(model):
        raise ReflowlensError("this view was made from another model: make one with rl.signal_view(model)")
    if exact_for and found.n_carried:
        raise ReflowlensError(
            f"{exact_for} takes views whose signals make up the embedding exactly ({', '.join(VIEWS)}), and the "
            f"features of {found.name} leave an error"
        )
    return found


def _dictionary(name: object) -> Dictionary | None:
    """The dictionary that a view's name stands for, if it is no view's."""
    if name is None or is_one_of(name, VIEWS):
        return None
    from reflowlens.dictionaries.dictionary import Dictionary
    from reflowlens.dictionaries.files import holds_dictionary, load_dictionary

    if isinstance(name, Dictionary):
        return name
    return load_dictionary(name) if isinstance(name, str | Path) and holds_dictionary(name) else None


def rotate(view: SignalView, rotation: Float[Tensor, "S S"]) -> SignalView:
    """The view (R A, Aᵀ B) in a basis that is rotated by A: every logit stays, every single signal changes.

    Args:
        rotation: A, orthogonal; not checked beyond its shape.

    Raises:
        ReflowlensError: the rotation is not a matrix [S, S].
    """
    if not isinstance(rotation, Tensor) or rotation.shape != (view.n_signals, view.n_signals):
        got = list(rotation.shape) if isinstance(rotation, Tensor) else repr(rotation)
        raise ReflowlensError(f"a rotation of this view is a matrix [S, S], S={view.n_signals}, got {got}")
    A = rotation.to(view.recipe)
    with without_autocast(A):
        return view._rotated(A)


def varimax_of(view: SignalView, *, seed: int = 0) -> Float[Tensor, "S S"]:
    """The rotation that :func:`varimax_view` turns a view by.

    Of a dictionary's features it turns the 256 that most tokens have, and leaves the others: among thousands of
    features, which no rotation makes much sparser, the search would take hours.
    """
    rows = view.recipe[: view.n_tokens]
    with without_autocast(rows):
        if not view.n_carried or view.n_signals <= _TURNED:
            return varimax_rotation(rows, seed=random_seed(seed))
        often = (rows != 0).sum(dim=0).topk(_TURNED).indices
        turn = torch.eye(view.n_signals, device=rows.device, dtype=rows.dtype)
        some = rows[:, often]
        turn[often[:, None], often] = varimax_rotation(some[some.any(dim=1)], seed=random_seed(seed)).to(turn)
        return turn


def varimax_view(view: SignalView, *, seed: int = 0) -> SignalView:
    """The view in the basis that :func:`reflowlens.varimax.varimax_rotation` finds for the recipes of its real tokens.

    By varimax's criterion its signals are at least as sparse as the view's own, and every logit stays: an upper bound
    of the sparsity that a basis with these logits can show, as ``rotated`` is the lower one.

    Args:
        seed: of the rows that are sampled from a large vocabulary.

    Example: ``varimax_view(signal_view(model)).codebook(0)``
    """
    return dataclasses.replace(rotate(view, varimax_of(view, seed=seed)), name="varimax")


def random_rotation(n: int, seed: int) -> Float[Tensor, "n n"]:
    """A Haar-distributed orthogonal matrix: QR of a Gaussian one, signs fixed by the diagonal of R (Mezzadri, 2007)."""
    gaussian = torch.randn(n, n, generator=torch.Generator().manual_seed(random_seed(seed)), dtype=torch.float64)
    Q, R = torch.linalg.qr(gaussian)
    return (Q * R.diagonal().sign()).float()


def _check_vectors(what: str, x: Tensor, axis: str, size: int) -> None:
    if not isinstance(x, Tensor) or not x.ndim or x.shape[-1] != size:
        got = list(x.shape) if isinstance(x, Tensor) else repr(x)
        raise ReflowlensError(f"{what} is a tensor [..., {axis}] with {axis}={size}, got {got}")
