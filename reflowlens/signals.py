"""Signals: the coordinates in which a prediction is read.

A :class:`SignalView` is a recipe R (d_vocab x S) and a basis B (S x d_model) with R B = W_E. (Where a model reads its
logits through a matrix of its own, W_E stands for W_Uᵀ here.) A reFlow model was trained with one (its ``native``
view). Every other model gets one after the fact, and so does reFlow itself, so that a claim about signals can be held
against coordinates that nobody trained:

=============  =================  =============  ==================================================================
view           recipe             basis          what it is for
=============  =================  =============  ==================================================================
``native``     R                  B              the signals that the model was trained with
``identity``   W_E                I              every model: the residual stream's own axes
``svd``        U                  Σ Vᵀ           every model: principal directions of the embedding
``rotated``    R A                Aᵀ B           the same function for every orthogonal A: the null of any
                                                 statement about single signals
``varimax``    R A                Aᵀ B           the A that makes the columns of R A as kurtotic as can be: how sparse
                                                 single signals could be, with nothing trained
=============  =================  =============  ==================================================================

Readout and write coordinates differ unless B Bᵀ = I; each function says which one it uses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import FactoredMatrix

from reflowlens.arguments import integer, is_one_of, random_seed, whole_number
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.models.components import Norm, wide, without_autocast
from reflowlens.models.unwrapping import hooked_model
from reflowlens.tokenizers.targets import target_ids
from reflowlens.varimax import varimax_rotation

ViewName = Literal["native", "identity", "svd", "rotated", "varimax"]
VIEWS: tuple[ViewName, ...] = ("native", "identity", "svd", "rotated", "varimax")


@dataclass(frozen=True)
class SignalView:
    """A model seen through S signals.

    Args:
        name: which view it is.
        recipe: R, a row a token; rows from ``n_tokens`` on are padding that no tokenizer id reaches.
        basis: B, a row a signal.
        norm: the final norm that a readout goes through.
        model: the model that it was made from.

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
    norm: Norm = dataclasses.field(repr=False)
    model: HookedModel = dataclasses.field(repr=False)

    @property
    def n_signals(self) -> int:
        """S."""
        return self.basis.shape[0]

    @property
    def n_tokens(self) -> int:
        """How many rows of the recipe belong to real tokens."""
        return self.model.tokenizer.n_vocab

    def readout(self, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch S"]:
        """Readout coordinates a = B norm_final(x): ``logits(a)`` is the logit lens of x. No hook of the norm runs."""
        _check_vectors("a residual stream", resid, "d_model", self.basis.shape[1])
        with without_autocast(self.basis):
            return self.norm(resid.to(self.basis.dtype), hooked=False) @ self.basis.T

    def logits(self, signals: Float[Tensor, "*batch S"]) -> Float[Tensor, "*batch d_vocab"]:
        """R a."""
        _check_vectors("a readout", signals, "S", self.n_signals)
        with without_autocast(self.recipe):
            return signals @ self.recipe.T

    def write(self, recipe_vector: Float[Tensor, "*batch S"]) -> Float[Tensor, "*batch d_model"]:
        """Write coordinates: what a recipe adds to the residual stream, r B."""
        _check_vectors("a recipe", recipe_vector, "S", self.n_signals)
        with without_autocast(self.basis):
            return recipe_vector @ self.basis

    def contributions(
        self, resid: Float[Tensor, "*batch d_model"], target: str | int | Int[Tensor, "*batch"]
    ) -> Float[Tensor, "*batch S"]:
        """What each signal adds to the target's logit, ``a * R[target]``; sums to the logit (up to rounding).

        Raises:
            ReflowlensError: the target is no single token, there is no such id, or ids do not fit the streams.
        """
        readout, ids = self.readout(resid), self._ids(target)
        try:
            torch.broadcast_shapes(ids.shape, readout.shape[:-1])
        except RuntimeError:
            raise ReflowlensError(
                f"targets {list(ids.shape)} do not fit residual streams {list(resid.shape)}: one, or one for each"
            ) from None
        return readout * self.recipe[ids]

    def rows(self, words: list[str]) -> Float[Tensor, "word S"]:
        """Recipes of single-token words."""
        if isinstance(words, str | Tensor) or not isinstance(words, Iterable):
            raise ReflowlensError(f"rows takes a list of words, got {words!r}")
        return self.recipe[[self.model.to_single_token(word) for word in words]]

    def codebook(self, signal: int, k: int = 10) -> pd.DataFrame:
        """The tokens that a signal speaks for: the k largest entries of its recipe column of either sign.

        Returns:
            One row a token: ``sign`` (+1 or -1), ``token``, ``text``, ``recipe`` (R entry) and ``z`` (entry minus the
            column's mean over real tokens, in its standard deviations), strongest first within each sign.

        Raises:
            ReflowlensError: there is no such signal, or k is no positive integer.
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
        """The strongest signals, by the norm of their recipe column, with the tokens they speak for."""
        from reflowlens.notebook.html import table, titled

        norms = torch.linalg.vector_norm(self.recipe[: self.n_tokens].float(), dim=0)
        rows = []
        for signal in norms.topk(min(5, self.n_signals)).indices.tolist():
            tokens = self.codebook(signal, k=6).groupby("sign").text.agg(lambda texts: " ".join(map(repr, texts)))
            rows.append((signal, float(norms[signal]), tokens.get(1, ""), tokens.get(-1, "")))
        columns = ["signal", "norm", "tokens it speaks for", "and against"]
        return titled("SignalView", self._summary(), table(columns, rows))


@torch.no_grad()
def signal_view(model: HookedModel, name: ViewName | None = None, *, seed: int = 0) -> SignalView:
    """See a model through signals, in float32 at least: a model of 16 bits is read without rounding once more.

    The native view of a float32 model shares the weights' memory and follows their changes; any other is of the weights
    as they are now.

    Args:
        name: ``native``, ``identity``, ``svd``, ``rotated`` or ``varimax`` (module docstring); default ``native`` where
            the model has it, else ``identity``. The last two turn that default.
        seed: of the random rotation, and of the rows that varimax draws where the vocabulary is large.

    Raises:
        ReflowlensError: the name is unknown, or the model has no native signals.
    """
    model = hooked_model(model)
    factored = isinstance(model.W_E, FactoredMatrix)
    if name is None:
        name = "native" if factored else "identity"
    if not is_one_of(name, VIEWS):
        raise ReflowlensError(f"view must be one of {', '.join(map(repr, VIEWS))}, got {name!r}")
    if name == "native":
        if not factored:
            raise ReflowlensError(
                f"{model.cfg.architecture!r} has no native signals: its embedding is not factored; "
                "use the 'identity' or 'svd' view"
            )
        factors = model.W_E
        return SignalView("native", wide(factors.A.detach()), wide(factors.B.detach()), model.ln_final, model)
    if name == "rotated":
        view = signal_view(model)
        return rotate(view, random_rotation(view.n_signals, seed))
    if name == "varimax":
        return varimax_view(signal_view(model), seed=seed)
    with without_autocast(model.ln_final.w):
        embedding = wide(model.W_U.T.detach())
    if name == "identity":
        identity = torch.eye(embedding.shape[1], device=embedding.device, dtype=embedding.dtype)
        return SignalView("identity", embedding, identity, model.ln_final, model)
    U, singular_values, Vh = torch.linalg.svd(embedding, full_matrices=False)
    return SignalView("svd", U, singular_values[:, None] * Vh, model.ln_final, model)


def view_of(model: HookedModel, view: SignalView | ViewName | None, *, seed: int = 0) -> SignalView:
    """The view that a ``view=`` argument means: itself, or the one of that name (`signal_view`).

    Raises:
        ReflowlensError: it was made from another model, whose norm and weights would be mixed with this one's.
    """
    if not isinstance(view, SignalView):
        return signal_view(model, view, seed=seed)
    if view.model is not hooked_model(model):
        raise ReflowlensError("this view was made from another model: make one with rl.signal_view(model)")
    return view


def rotate(view: SignalView, rotation: Float[Tensor, "S S"]) -> SignalView:
    """The view in a rotated signal basis, (R A, Aᵀ B): every logit stays, every single signal changes.

    Raises:
        ReflowlensError: the rotation is no matrix [S, S].
    """
    if not isinstance(rotation, Tensor) or rotation.shape != (view.n_signals, view.n_signals):
        got = list(rotation.shape) if isinstance(rotation, Tensor) else repr(rotation)
        raise ReflowlensError(f"a rotation of this view is a matrix [S, S], S={view.n_signals}, got {got}")
    A = rotation.to(view.recipe)
    with without_autocast(A):
        return dataclasses.replace(view, name="rotated", recipe=view.recipe @ A, basis=A.T @ view.basis)


def varimax_view(view: SignalView, *, seed: int = 0) -> SignalView:
    """The view in the basis that :func:`reflowlens.varimax.varimax_rotation` finds for the recipes of its real tokens.

    Its signals are as sparse as a rotation makes them, by that criterion at least as sparse as the view's own, and
    every logit stays: the ceiling of what a basis with these predictions can show, where ``rotated`` is the floor.

    Example: ``varimax_view(signal_view(model)).codebook(0)``
    """
    with without_autocast(view.recipe):
        rotation = varimax_rotation(view.recipe[: view.n_tokens], seed=random_seed(seed))
    return dataclasses.replace(rotate(view, rotation), name="varimax")


def random_rotation(n: int, seed: int) -> Float[Tensor, "n n"]:
    """A Haar-distributed orthogonal matrix: QR of a Gaussian one, signs fixed by the diagonal of R (Mezzadri, 2007)."""
    gaussian = torch.randn(n, n, generator=torch.Generator().manual_seed(random_seed(seed)), dtype=torch.float64)
    Q, R = torch.linalg.qr(gaussian)
    return (Q * R.diagonal().sign()).float()


def _check_vectors(what: str, x: Tensor, axis: str, size: int) -> None:
    if not isinstance(x, Tensor) or not x.ndim or x.shape[-1] != size:
        got = list(x.shape) if isinstance(x, Tensor) else repr(x)
        raise ReflowlensError(f"{what} is a tensor [..., {axis}] with {axis}={size}, got {got}")
