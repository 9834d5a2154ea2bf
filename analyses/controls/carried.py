"""How much of what is measured in a dictionary's features is not in them: told beside the metrics of such a view."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.measures.lens import top_tokens
from analyses.result.finding import Finding
from analyses.statistics.intervals import bootstrap_interval
from reflowlens.dictionary_view import DictionaryView
from reflowlens.signals import SignalView

IN_RECIPES = "share of the variance of the tokens' vectors, each alone at the dictionary's point, that features and "
IN_LOGITS = "share of the top-1 token's logit that the dictionary's {} adds; mean over prompts"


def recipe_error(view: SignalView) -> dict[str, Finding]:
    """``error_share`` of the recipes of a dictionary's view; nothing of an exact view."""
    if not isinstance(view, DictionaryView):
        return {}
    return {"error_share": Finding(view.error_share(), definition=f"{IN_RECIPES}constant leave out")}


@torch.no_grad()
def logit_error(view: SignalView, final: Float[Tensor, "prompt d_model"], seed: int) -> dict[str, Finding]:
    """``error_share`` and ``constant_share`` of predictions in a dictionary's features; nothing of an exact view."""
    if not view.n_carried:
        return {}
    parts = view.contributions(final, top_tokens(view, final))
    shares = (parts[:, view.n_signals :] / parts.sum(dim=-1, keepdim=True)).double().cpu().numpy()
    return {
        f"{name}_share": Finding(share.mean(), bootstrap_interval(share, seed=seed), definition=IN_LOGITS.format(name))
        for name, share in zip(("constant", "error"), shares.T, strict=True)
    }
