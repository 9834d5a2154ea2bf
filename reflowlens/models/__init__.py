"""The architectures by name, and how to build one with fresh weights."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import nn

from reflowlens.arguments import random_seed
from reflowlens.config import ModelConfig, preset
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.models.bdh import BDH
from reflowlens.models.decoder import Decoder
from reflowlens.models.gpt2 import GPT2
from reflowlens.models.gpt2_new import GPT2New
from reflowlens.models.llama import Llama
from reflowlens.models.reflow import ReFlow
from reflowlens.models.reflow_lite import ReFlowLite
from reflowlens.models.reflow_topk import ReFlowTopK
from reflowlens.models.ttt_flow import TTTFlow

MODEL_CLASSES: dict[str, type[HookedModel]] = {
    "gpt2": GPT2,
    "gpt2_new": GPT2New,
    "llama": Llama,
    "decoder": Decoder,
    "reflow": ReFlow,
    "reflow_topk": ReFlowTopK,
    "reflow_lite": ReFlowLite,
    "bdh": BDH,
    "ttt_flow": TTTFlow,
}

Module = TypeVar("Module", bound=nn.Module)

_FIRST_BLOCK = "blocks.0."


@contextlib.contextmanager
def float32_by_default() -> Iterator[None]:
    """Tensors created without a dtype are float32, whatever ``torch.set_default_dtype`` says."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def unfilled_model(cfg: ModelConfig) -> HookedModel:
    """A model in float32 whose parameters are not initialised."""
    with float32_by_default():
        return MODEL_CLASSES[cfg.architecture](cfg)


def build_model(config: ModelConfig | str, *, seed: int = 0, device: str | torch.device = "cpu") -> HookedModel:
    """A model with fresh weights in float32, in evaluation mode.

    Args:
        config: a configuration or a preset's name, e.g. ``"reflow_1_small"``.
        seed: of the initialisation; weights are drawn on the CPU, so that a seed gives the same ones on every device.
        device: ``"meta"`` builds the shapes alone and costs no memory.

    Raises:
        ReflowlensError: there is no such preset or device, or the model is larger than the machine's memory.

    Example: ``build_model("reflow_1", device="meta").n_parameters  # 463,668,224``
    """
    cfg, seed = preset(config) if isinstance(config, str) else config, random_seed(seed)
    if not isinstance(cfg, ModelConfig):
        raise ReflowlensError(f"config must be a ModelConfig or the name of a preset, got {cfg!r}")
    place = "meta" if str(device) == "meta" else "cpu"
    if place == "cpu":
        check_memory(cfg)
    with torch.device(place):
        model = unfilled_model(dataclasses.replace(cfg, device=place)).eval()
    if place == "meta":
        return model
    with float32_by_default():
        model.init_weights(torch.Generator().manual_seed(random_seed(seed)))
    return moved(model, device)


def parameter_shapes(cfg: ModelConfig) -> dict[str, torch.Size]:
    """Shapes of a model's parameters by name; of blocks that are alike only one is built, on the meta device."""
    # Rotary angles are no parameters, and would be computed.
    n_ctx = 1 if cfg.positional_embedding_type == "rotary" else cfg.n_ctx
    if not MODEL_CLASSES[cfg.architecture].blocks_are_alike:
        built = build_model(dataclasses.replace(cfg, n_ctx=n_ctx), device="meta")
        return {name: parameter.shape for name, parameter in built.named_parameters()}
    built = build_model(dataclasses.replace(cfg, n_layers=1, n_ctx=n_ctx), device="meta")
    shapes = {name: parameter.shape for name, parameter in built.named_parameters()}
    block = {
        name.removeprefix(_FIRST_BLOCK): shapes.pop(name) for name in list(shapes) if name.startswith(_FIRST_BLOCK)
    }
    layers = range(cfg.n_layers)
    return shapes | {f"blocks.{layer}.{name}": shape for layer in layers for name, shape in block.items()}


def check_memory(cfg: ModelConfig, dtype: torch.dtype = torch.float32) -> None:
    """Raise if a model is larger than all the memory of the machine, where the system tells how much there is."""
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return
    angles = MODEL_CLASSES[cfg.architecture].table_bytes(cfg)
    needed = dtype.itemsize * sum(shape.numel() for shape in parameter_shapes(cfg).values()) + angles
    if needed > memory:
        angles_of = f" ({angles / 2**30:,.1f} of them the angles of n_ctx={cfg.n_ctx:,} positions)" if angles else ""
        raise ReflowlensError(
            f"this model takes {needed / 2**30:,.1f} GiB{angles_of}, and this machine has {memory / 2**30:,.1f}"
        )


def moved(model: Module, device: str | torch.device, dtype: torch.dtype | None = None) -> Module:
    """``model.to(device, dtype)``, where a device that torch does not know or have is a readable error."""
    try:
        return model.to(device=device, dtype=dtype)
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        raise ReflowlensError(f"cannot compute on device {str(device)!r}: {str(error).splitlines()[0]}") from error
