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
IN_LOGITS = (
    "|{0}| / (|features| + |constant| + |error|) of what the dictionary's features together, its constant and its "
    "error add to the top-1 token's logit; mean over prompts"
)


def recipe_error(view: SignalView) -> dict[str, Finding]:
    """``error_share`` of the recipes of a dictionary's view; nothing of an exact view."""
    if not isinstance(view, DictionaryView):
        return {}
    return {"error_share": Finding(view.error_share(), definition=f"{IN_RECIPES}constant leave out")}


@torch.no_grad()
def logit_error(view: SignalView, final: Float[Tensor, "prompt d_model"], seed: int) -> dict[str, Finding]:
    """``error_share`` and ``constant_share`` of predictions in a dictionary's features; nothing of an exact view.

    Shares of the parts' sizes, not of the logit: where parts cancel, a logit is near 0 and no measure of them.
    """
    if not view.n_carried:
        return {}
    parts = view.contributions(final, top_tokens(view, final))
    features, rest = parts[:, : view.n_signals].sum(dim=-1, keepdim=True), parts[:, view.n_signals :]
    sizes = torch.cat([rest, features], dim=-1).double().abs()
    shares = (sizes / sizes.sum(dim=-1, keepdim=True))[:, :-1].cpu().numpy()
    return {
        f"{name}_share": Finding(share.mean(), bootstrap_interval(share, seed=seed), definition=IN_LOGITS.format(name))
        for name, share in zip(("constant", "error"), shares.T, strict=True)
    }
