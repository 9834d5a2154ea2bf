"""reFlow-Lite: reFlow with grouped-query attention (Ainslie et al., 2023)."""

from __future__ import annotations

from reflowlens.models.reflow import ReFlow


class ReFlowLite(ReFlow):
    """Queries share ``cfg.n_key_value_heads`` heads of keys and values; everything else is reFlow.

    The published parameter count leaves no room for the reduced MLP that the publication mentions beside it: the MLP
    has its full width here.
    """
