"""The architectures by name, and how to build one with fresh weights."""

from __future__ import annotations

import dataclasses

import torch

from reflowlens.config import ModelConfig, preset
from reflowlens.models.base import HookedModel
from reflowlens.models.bdh import BDH
from reflowlens.models.gpt2 import GPT2
from reflowlens.models.gpt2_new import GPT2New
from reflowlens.models.llama import Llama
from reflowlens.models.reflow import ReFlow
from reflowlens.models.reflow_lite import ReFlowLite
from reflowlens.models.reflow_topk import ReFlowTopK

MODEL_CLASSES: dict[str, type[HookedModel]] = {
    "gpt2": GPT2,
    "gpt2_new": GPT2New,
    "llama": Llama,
    "reflow": ReFlow,
    "reflow_topk": ReFlowTopK,
    "reflow_lite": ReFlowLite,
    "bdh": BDH,
}


def build_model(config: ModelConfig | str, *, seed: int = 0, device: str | torch.device = "cpu") -> HookedModel:
    """A model with fresh weights, in evaluation mode.

    Args:
        config: a configuration or a preset's name, e.g. ``"reflow_1_small"``.
        seed: of the initialisation; the same seed gives the same weights on every device.
        device: ``"meta"`` builds the shapes alone and costs no memory.

    Example: ``build_model("reflow_1", device="meta").n_parameters  # 463,668,224``
    """
    cfg = preset(config) if isinstance(config, str) else config
    target = torch.device(device)
    with torch.device("meta" if target.type == "meta" else "cpu"):
        model = MODEL_CLASSES[cfg.architecture](dataclasses.replace(cfg, device=str(target)))
    if target.type != "meta":
        model.init_weights(torch.Generator().manual_seed(seed))
        model = model.to(target)
    return model.eval()
