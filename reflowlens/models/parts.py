"""What the parts of every block share: hook points that cost nothing unhooked, biases that may be absent, and norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformer_lens import hook_points

from reflowlens.config import ModelConfig
from reflowlens.models.numerics import wide


class HookPoint(hook_points.HookPoint):
    """TransformerLens's, which passes a tensor on at once where no hook is attached, to it or to all modules.

    Most points of most passes have none, and torch's way to call a module takes longer than to look.

    Attributes:
        keep: is shown what passes, as hooks left it, and this point; None: nothing is kept.
    """

    keep: Callable[[Tensor, Any], None] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        own = self._forward_hooks or self._backward_hooks or self._forward_pre_hooks or self._backward_pre_hooks
        if own or _has_any_global_hook() or torch.compiler.is_compiling():  # a compiler sees torch's own call
            x = super().__call__(x)
        if self.keep is not None:
            self.keep(x, self)
        return x

    def remove_hooks(
        self, dir: Literal["fwd", "bwd", "both"] = "fwd", including_permanent: bool = False, level: int | None = None
    ) -> None:
        if self.fwd_hooks or self.bwd_hooks or dir not in ("fwd", "bwd", "both"):
            super().remove_hooks(dir, including_permanent, level)


def is_hooked(*points: hook_points.HookPoint) -> bool:
    """Whether anything is attached to one of the points, or what passes it is kept."""
    for point in points:  # noqa: SIM110 # a generator takes longer than what it asks
        if point.fwd_hooks or point.bwd_hooks or getattr(point, "keep", None) is not None:
            return True
    return False


def through_copy(point: hook_points.HookPoint, x: Tensor) -> Tensor:
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

    Args:
        width: of what is normalised, where it is not ``d_model``.
    """

    def __init__(self, cfg: ModelConfig, width: int | None = None) -> None:
        super().__init__()
        self.centered = cfg.normalization_type == "LN"
        self.eps = cfg.eps
        self.w = nn.Parameter(torch.ones(width or cfg.d_model))
        self.b = bias(cfg.norm_bias, width or cfg.d_model)
        self.hook_scale = HookPoint()
        self.hook_normalized = HookPoint()

    def forward(self, x: Float[Tensor, "*batch d_model"], hooked: bool = True) -> Float[Tensor, "*batch d_model"]:
        stream = wide(x)
        if self.centered:
            stream = stream - stream.mean(-1, keepdim=True)
        scale = (stream.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()
        normalized = self.hook_normalized(stream / self.hook_scale(scale)) if hooked else stream / scale
        return plus(normalized * self.w, self.b).to(x.dtype)


class SharedNorm(Norm):
    """Another norm's weights with activation points of its own: two readers of the stream, one norm."""

    def __init__(self, norm: Norm) -> None:
        nn.Module.__init__(self)
        self.centered, self.eps = norm.centered, norm.eps
        self._shared = (norm,)  # whose parameters are not this module's, too
        self.hook_scale = HookPoint()
        self.hook_normalized = HookPoint()

    @property
    def w(self) -> nn.Parameter:  # type: ignore[override]
        return self._shared[0].w

    @property
    def b(self) -> nn.Parameter | None:  # type: ignore[override]
        return self._shared[0].b


class NoNorm(Norm):
    """Stands where others have a norm, so that what is read there has the same names: its scale is 1."""

    w: Tensor  # type: ignore[assignment] # no parameter

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__(cfg)
        self.centered, self.b = False, None
        del self.w
        self.register_buffer("w", torch.ones(cfg.d_model), persistent=False)

    def forward(self, x: Float[Tensor, "*batch d_model"], hooked: bool = True) -> Float[Tensor, "*batch d_model"]:
        if not hooked:
            return x
        return self.hook_normalized(x / self.hook_scale(x.new_ones(*x.shape[:-1], 1)))
