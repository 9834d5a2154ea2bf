"""The same model done otherwise: forming its embedding, without hook points, as the transformers library has it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from reflowlens.config import ModelConfig
from reflowlens.models import MODEL_CLASSES
from reflowlens.models.base import HookedModel
from reflowlens.models.places import Positions
from reflowlens.models.reflow import ReFlow
from reflowlens.models.residual import Unembed

NANO = ModelConfig(
    architecture="reflow",
    n_layers=6,
    d_model=256,
    n_heads=4,
    d_head=64,
    d_mlp=704,
    d_vocab=16768,
    n_ctx=256,
    n_signals=256,
    tokenizer_name="gpt2_16k",
    model_name="reflow_nano",
)


class FormingReFlow(ReFlow):
    """reFlow the published way: every pass forms E = R B and uses it at both ends."""

    def build_embedding(self, cfg: ModelConfig) -> None:
        super().build_embedding(cfg)
        self.unembed = Unembed(self)

    def tied_weights(self) -> tuple[Tensor, ...]:
        return (self.effective_recipe() @ self.embed.W_basis,)

    def embed_tokens(self, tokens: Tensor, weights: tuple[Tensor, ...], positions: Positions) -> Tensor:
        return self.hook_embed(F.embedding(tokens, weights[0]).to(self.embed.W_basis.dtype))


def forming(model: HookedModel) -> HookedModel:
    """A copy that forms E in each pass, where both ends share a factored one; otherwise a plain copy."""
    kind = MODEL_CLASSES[model.cfg.architecture]
    if model.cfg.is_factored and model.cfg.has_one_embedding:
        kind = type(f"Forming{kind.__name__}", (FormingReFlow, kind), {})
    copy = kind(dataclasses.replace(model.cfg, device="cpu"))
    copy.load_state_dict(model.state_dict())
    return copy.to(model.cfg.device)


def without_hook_points(model: HookedModel) -> HookedModel:
    """Replace every HookPoint by a bare function call, the least that can stand in its place."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, HookPoint):
                del module._modules[name]
                object.__setattr__(module, name, _Nothing())
    return model


class _Nothing:
    fwd_hooks = bwd_hooks = ()
    keep = None

    def __call__(self, x: Tensor) -> Tensor:
        return x


def as_llama(cfg: ModelConfig) -> Any:
    """A fresh ``transformers.LlamaForCausalLM`` of this shape, its embedding one tied matrix (``LLAMA.fits``)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from reflowlens.conversion.families import LLAMA

    llama: Any = LlamaForCausalLM(LlamaConfig.from_dict(LLAMA.hf_config(LLAMA.as_family(cfg))))
    return llama.to(cfg.device)
