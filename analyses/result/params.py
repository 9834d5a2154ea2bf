"""What every experiment tells of a run in `Result.params`, beside its own arguments."""

from __future__ import annotations

from analyses.result.model_identity import hash_of
from analyses.words.lexicon import Lexicon
from reflowlens.signals import SignalView


def run_params(view: SignalView, lexicon: Lexicon, seed: int, quick: bool) -> dict[str, str | int]:
    """The view, the lexicon, the seed, and which model it was: what has to be alike for two runs to be compared."""
    return {
        "view": view.name,
        "seed": seed,
        "quick": quick,
        "lexicon": lexicon.version,
        "model_hash": hash_of(view.model),
    }
