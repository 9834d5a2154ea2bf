"""reflowlens: language models whose predictions are sums over readable signals, and the tools to test that.

    import reflowlens as rl
    model = rl.load_model("reflow-nano")
    logits, cache = model.run_with_cache("The capital of France is")

Names are imported when first used, so that ``import reflowlens`` costs little.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reflowlens.cache import ActivationCache as ActivationCache
    from reflowlens.checkpoints import list_models as list_models
    from reflowlens.checkpoints import load_model as load_model
    from reflowlens.checkpoints import model_hash as model_hash
    from reflowlens.checkpoints import save_model as save_model
    from reflowlens.config import PRESETS as PRESETS
    from reflowlens.config import ModelConfig as ModelConfig
    from reflowlens.errors import ReflowlensError as ReflowlensError
    from reflowlens.generation import generate as generate
    from reflowlens.models import build_model as build_model
    from reflowlens.signals import SignalView as SignalView
    from reflowlens.signals import signal_view as signal_view
    from reflowlens.tokenizers import get_tokenizer as get_tokenizer

_HOMES = {
    "ActivationCache": "cache",
    "ModelConfig": "config",
    "PRESETS": "config",
    "ReflowlensError": "errors",
    "SignalView": "signals",
    "build_model": "models",
    "generate": "generation",
    "get_tokenizer": "tokenizers",
    "list_models": "checkpoints",
    "load_model": "checkpoints",
    "model_hash": "checkpoints",
    "save_model": "checkpoints",
    "signal_view": "signals",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'reflowlens' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"reflowlens.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
