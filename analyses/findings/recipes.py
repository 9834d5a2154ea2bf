"""What becomes of a recipe under a constraint: signals that die, directions that no stream sees, the rank that is left.

With S > d the basis B has a left null space of S - d dimensions: a change of recipes along it changes no embedding and
no logit. What a recipe has there is therefore free, and part of every cosine between recipes. With S < d the embedding
E = R B has rank S at most.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.controls.bases import rotated_views
from analyses.controls.nulls import untrained_view
from analyses.findings.runs import TrainedRun
from analyses.measures.knockout import real_tokens
from reflowlens.models.base import HookedModel
from reflowlens.signals import SignalView, signal_view

DEAD = 0.01
"""A signal is dead whose part of the embedding has less than this share of the energy of the mean signal's."""
ROTATIONS = 4
_NEGLIGIBLE = 1e-4  # singular values of a basis, of its largest: below, what is mixed with them is not seen


def signal_energies(view: SignalView) -> Float[Tensor, " S"]:
    """‖R_·s‖² ‖B_s‖², the energy of what each signal adds to the embeddings of real tokens: the same however a signal
    is scaled between recipe and basis."""
    return real_tokens(view).recipe.double().square().sum(0) * view.basis.double().square().sum(1)


def dead_share(view: SignalView) -> float:
    """Share of signals with less than `DEAD` of the mean signal's energy.

    Example: `dead_share(rl.signal_view(model))`
    """
    energies = signal_energies(view)
    return float((energies < DEAD * energies.mean()).double().mean())


def null_space_share(view: SignalView) -> float:
    """Share of ‖R‖² over real tokens that lies in the left null space of B, where r B = 0; 0 where S ≤ d and B has full
    rank, (S - d) / S of a recipe that knows nothing of B.

    Example: `null_space_share(rl.signal_view(model))`
    """
    recipe = real_tokens(view).recipe.double()
    U, singular_values, _ = torch.linalg.svd(view.basis.double(), full_matrices=False)
    seen = U[:, singular_values > _NEGLIGIBLE * singular_values.max()]
    return float(1 - (recipe @ seen).square().sum() / recipe.square().sum())


def embedding_rank(view: SignalView) -> float:
    """Entropy effective rank of E = R B over real tokens: exp of the entropy of σ² / Σσ², at most min(S, d).

    Example: `embedding_rank(rl.signal_view(model))`
    """
    recipe, basis = real_tokens(view).recipe.double(), view.basis.double()
    energy = torch.linalg.eigvalsh(basis.T @ (recipe.T @ recipe) @ basis).clamp_min(0)
    return float(torch.special.entr(energy / energy.sum()).sum().exp())


@torch.no_grad()
def recipe_measures(model: HookedModel, run: TrainedRun) -> dict[str, float]:
    """The sizes of a run's recipe, and the measures above with their controls, of the view that is the model's own.

    `topk`: the model's, 0 where there is none; `prunes`: whether the view's recipe, which logits are read with, is
    pruned, to `kept` signals a token. `dead_rotated` is the mean over random rotations, `_untrained` of the same
    architecture at initialisation, from another seed than the run's.
    """
    view, untrained = signal_view(model), untrained_view(signal_view(model), seed=run.seed + 1000)
    rotated = [dead_share(each) for _, each in rotated_views(view, ROTATIONS, 0, "recipes")]
    pruned = model.cfg.topk is not None and model.cfg.topk_ends != "input"
    return {
        "n_signals": float(view.n_signals),
        "d_model": float(model.cfg.d_model),
        "topk": float(model.cfg.topk or 0),
        "prunes": float(pruned),
        "kept": float(model.cfg.topk or 0) if pruned else float(view.n_signals),
        "dead": dead_share(view),
        "dead_rotated": sum(rotated) / len(rotated),
        "dead_untrained": dead_share(untrained),
        "null_space": null_space_share(view),
        "null_space_untrained": null_space_share(untrained),
        "embedding_rank": embedding_rank(view),
        "embedding_rank_untrained": embedding_rank(untrained),
    }
