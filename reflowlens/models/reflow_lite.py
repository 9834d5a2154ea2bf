"""reFlow-Lite: reFlow with grouped-query attention (Ainslie et al., 2023)."""

from __future__ import annotations

from reflowlens.models.reflow import ReFlow


class ReFlowLite(ReFlow):
    """Queries share ``cfg.n_key_value_heads`` heads of keys and values; everything else is reFlow.

    The published parameter count leaves the MLP at its full width (docs: the architecture page), so it is not reduced
    here.
    """
