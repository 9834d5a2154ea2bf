"""What the parts of every block share: hook points that cost nothing unhooked, biases that may be absent, and norms."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from reflowlens.config import ModelConfig
from reflowlens.models.numerics import wide


def is_hooked(*points: HookPoint) -> bool:
    """Whether anything is attached to one of the points."""
    return any(point.fwd_hooks or point.bwd_hooks for point in points)


def through_copy(point: HookPoint, x: Tensor) -> Tensor:
    """Pass a tensor that others read too: a hook that writes in place then changes only what this point feeds."""
    return point(x.clone() if is_hooked(point) else x)


def bias(present: bool, *shape: int) -> nn.Parameter | None:
    return nn.Parameter(torch.zeros(shape)) if present else None


def is_bias(name: str) -> bool:
    """Whether a parameter is a bias, by TransformerLens's names: ``ln1.b``, ``attn.b_Q``, ``mlp.b_in``."""
    last = name.rsplit(".", 1)[-1]
    return last == "b" or last.startswith("b_")


def plus(x: Tensor, bias: Tensor | None) -> Tensor:
    """Add a bias where there is one."""
    return x if bias is None else x + bias


class Norm(nn.Module):
    """LayerNorm or RMSNorm with a weight, and a bias where the configuration has one; statistics in float32 at least.

    ``hook_scale`` is the divisor [batch, pos, 1]; ``hook_normalized`` is ``(x - mean) / scale`` before the weight.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.centered = cfg.normalization_type == "LN"
        self.eps = cfg.eps
        self.w = nn.Parameter(torch.ones(cfg.d_model))
        self.b = bias(cfg.norm_bias, cfg.d_model)
        self.hook_scale = HookPoint()
        self.hook_normalized = HookPoint()

    def forward(self, x: Float[Tensor, "*batch d_model"], hooked: bool = True) -> Float[Tensor, "*batch d_model"]:
        stream = wide(x)
        if self.centered:
            stream = stream - stream.mean(-1, keepdim=True)
        scale = (stream.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()
        normalized = self.hook_normalized(stream / self.hook_scale(scale)) if hooked else stream / scale
        return plus(normalized * self.w, self.b).to(x.dtype)
