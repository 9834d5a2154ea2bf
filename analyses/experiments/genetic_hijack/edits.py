"""Edits of a recipe matrix as weight edits, through any view of an embedding, for the duration of a ``rl.edit`` block.

A view's recipe R_v stands for the same embedding as the stored parameter: R_v B_v = W B, with B the basis that goes
with the parameter (the identity where it is W_E itself). A change ΔR of R_v is therefore the change ΔR B_v B⁺ of the
stored one, and no more is needed than B_v B⁺; of a ΔR B_v that no recipe over B can make it is the nearest that can.
Of a model whose unembedding is its own the view speaks of the unembedding, and that is what is edited.

reFlow-TopK stores its recipe before ReLU and top-k, which a change does not pass through unchanged: it can be edited in
its native view only, where a place that falls free is taken by the next largest entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformer_lens import FactoredMatrix

from analyses.statistics.draws import derive_generator
from reflowlens.errors import ReflowlensError
from reflowlens.interventions.edit import AddWeights, SetWeights, SwapWeights, WeightEdit
from reflowlens.signals import SignalView


@dataclass(frozen=True)
class RecipeEdits:
    """How changes of a view's recipe are written into the model's weights.

    Args:
        parameter: the stored matrix.
        transposed: whether its columns are the tokens.
        to_stored: B_v B⁺, which takes a row of the view's recipe to one of the parameter; None where they are the same.

    Example:
        >>> import reflowlens as rl
        >>> model = rl.load_model("reflow-nano")
        >>> view = rl.signal_view(model)
        >>> king, queen = map(model.to_single_token, (" king", " queen"))
        >>> with rl.edit(model, RecipeEdits.of(view).shift([king], view.recipe[queen] - view.recipe[king])):
        ...     bool(torch.allclose(model.W_E[king].AB, model.W_E[queen].AB, atol=1e-6))
        True
    """

    view: SignalView
    parameter: str
    transposed: bool
    to_stored: Float[Tensor, "S stored"] | None

    @classmethod
    def of(cls, view: SignalView) -> RecipeEdits:
        """For a view of a model with one embedding, or of its unembedding.

        Raises:
            ReflowlensError: the view's recipe is no linear image of the stored one.
        """
        model = view.model
        W_E = model.W_E
        factored = isinstance(W_E, FactoredMatrix)
        if not model.recipe_is_stored and view.name != "native":
            raise ReflowlensError(
                f"the recipe of {model.cfg.architecture!r} is computed from the stored one: it can be edited in its "
                f"native view, not in {view.name!r}"
            )
        if not model.cfg.tie_word_embeddings:
            parameter, stored = "unembed.W_U", None
        elif isinstance(W_E, FactoredMatrix):
            parameter, stored = "embed.W_recipe", W_E.B
        else:
            parameter, stored = "embed.W_E", None
        if view.name == ("native" if factored else "identity"):
            return cls(view, parameter, not model.cfg.tie_word_embeddings, None)
        to_stored = view.basis if stored is None else view.basis @ torch.linalg.pinv(stored.to(view.basis))
        return cls(view, parameter, not model.cfg.tie_word_embeddings, to_stored)

    def swap(self, first: int, second: int) -> WeightEdit:
        """Exchange the recipes of two tokens."""
        if self.transposed:
            return SwapWeights(self.parameter, columns=(first, second))
        return SwapWeights(self.parameter, rows=(first, second))

    def shift(self, tokens: Sequence[int], change: Float[Tensor, "#token S"] | Float[Tensor, " S"]) -> WeightEdit:
        """Add a change to the recipes of some tokens: one for all, or one for each."""
        stored = change if self.to_stored is None else change @ self.to_stored
        rows = stored.expand(len(tokens), -1)
        if self.transposed:
            return AddWeights(self.parameter, rows.T, columns=list(tokens))
        return AddWeights(self.parameter, rows, rows=list(tokens))

    def add(self, column: Float[Tensor, " d_vocab"], signal: Float[Tensor, " S"]) -> WeightEdit:
        """Add to every token's recipe its entry of a column times a direction of signals."""
        stored = signal if self.to_stored is None else signal @ self.to_stored
        change = torch.outer(column, stored)
        return AddWeights(self.parameter, change.T if self.transposed else change)

    def graft(self, signal: int, column: Float[Tensor, " d_vocab"]) -> WeightEdit:
        """Replace a signal's column of the recipe."""
        if self.to_stored is None:
            if self.transposed:
                return SetWeights(self.parameter, column[None], rows=signal)
            return SetWeights(self.parameter, column[:, None], columns=signal)
        one = F.one_hot(torch.tensor(signal), self.view.n_signals).to(column)
        return self.add(column - self.view.recipe[:, signal], one)

    def silence(self, signal: int) -> WeightEdit:
        """Zero a signal's column of the recipe."""
        return self.graft(signal, torch.zeros_like(self.view.recipe[:, signal]))


@dataclass(frozen=True)
class Shift:
    """β times a direction added to the recipes of some tokens, β = 1 being as long as these are on average.

    Args:
        direction: of the shift; its length does not matter.
        size: mean norm of the tokens' recipes.
    """

    edits: RecipeEdits
    tokens: list[int]
    direction: Float[Tensor, " S"]
    size: float

    @classmethod
    def of(cls, view: SignalView, tokens: list[int], direction: Float[Tensor, " S"]) -> Shift:
        return cls(RecipeEdits.of(view), tokens, direction, float(view.recipe[tokens].norm(dim=-1).mean()))

    def by(self, beta: float, direction: Float[Tensor, " S"] | None = None) -> list[WeightEdit]:
        """The edit, or its control along another direction."""
        unit = F.normalize(self.direction if direction is None else direction, dim=0)
        return [self.edits.shift(self.tokens, beta * self.size * unit)]


def random_recipes(n: int, view: SignalView, seed: int) -> Float[Tensor, "n S"]:
    """The control `random_direction` in the coordinates of a recipe: isotropic, of length 1.

    The same seed gives the same directions: what each is for belongs into it (`analyses.statistics.draws.derive_seed`).
    """
    gaussian = torch.randn(n, view.n_signals, generator=derive_generator(seed, "random_direction"))
    return F.normalize(gaussian, dim=-1).to(view.recipe)


def random_swap(view: SignalView, pairs: Sequence[tuple[int, int]], seed: int) -> list[WeightEdit]:
    """The control of a swap of some pairs: each recipe moved as far as it would be, in a random direction."""
    editor, directions = RecipeEdits.of(view), random_recipes(2 * len(pairs), view, seed)
    moved = [(view.recipe[a] - view.recipe[b]).norm() for a, b in pairs for _ in range(2)]
    steps = torch.stack(moved)[:, None] * directions if moved else directions
    return [editor.shift(pair, steps[2 * i : 2 * i + 2]) for i, pair in enumerate(pairs)]


def strongest_signal(direction: Float[Tensor, " S"]) -> int:
    """The signal that carries most of a direction."""
    return int(direction.abs().argmax())


def replacements(view: SignalView, direction: Float[Tensor, " S"]) -> dict[str, Float[Tensor, " d_vocab"]]:
    """What may take the place of the strongest signal's column: ``silence``, zeros; ``graft``, the column of the signal
    that carries least of the direction, scaled to the same norm."""
    column, donor = view.recipe[:, strongest_signal(direction)], view.recipe[:, int(direction.abs().argmin())]
    scale = column.norm() / donor.norm().clamp(min=torch.finfo(donor.dtype).tiny)
    return {"silence": torch.zeros_like(column), "graft": scale * donor}


def random_replacement(view: SignalView, signal: int, column: Float[Tensor, " d_vocab"], seed: int) -> WeightEdit:
    """The control of a replaced column: as large a share of R taken away along a random direction of signals."""
    direction = random_recipes(1, view, seed)[0]
    along = view.recipe @ direction
    size = (column - view.recipe[:, signal]).norm() / along.norm()
    return RecipeEdits.of(view).add(-size * along, direction)
