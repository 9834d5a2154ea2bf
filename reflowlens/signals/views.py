"""The views that there are of a model's signals, by name, and what a ``view=`` argument means."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from transformer_lens import FactoredMatrix

from reflowlens.arguments import is_one_of
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.models.numerics import wide, without_autocast
from reflowlens.models.unwrapping import hooked_model
from reflowlens.signals.rotated import random_rotation, rotate, varimax_view
from reflowlens.signals.view import SignalView

if TYPE_CHECKING:
    from reflowlens.dictionaries.dictionary import Dictionary

ViewName = Literal["native", "identity", "svd", "rotated", "varimax"]
AnyView: TypeAlias = "SignalView | Dictionary | str | None"
"""What a ``view=`` argument may be: a view, the name of one, a dictionary, or a dictionary's name or folder."""
VIEWS: tuple[ViewName, ...] = ("native", "identity", "svd", "rotated", "varimax")


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
        name: ``native``, ``identity``, ``svd``, ``rotated`` or ``varimax`` (:mod:`reflowlens.signals`); by
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
