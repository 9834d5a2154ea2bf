"""Adam with one scale for all coordinates that a rotation mixes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

SHARED_SQUARE = "exp_avg_sq_shared"


class AdamRows(torch.optim.Optimizer):
    """AdamW whose second moment is the mean over an axis, or over the whole parameter.

    AdamW divides each coordinate by its own root mean square, and so depends on the axes in which a vector is written.
    Here all coordinates along ``shared_axis`` are divided by one number, which no rotation of that axis changes:
    rotated weights and gradients take the rotated step. Weight decay is decoupled.

    Args:
        params: parameters or groups; ``shared_axis`` of a group is an axis, or None: all of them.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        shared_axis: int | None = None,
    ) -> None:
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "shared_axis": shared_axis}
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                axes = tuple(range(p.ndim)) if group["shared_axis"] is None else group["shared_axis"]
                square = p.grad.square().mean(axes, keepdim=True)
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros((), device=p.device)
                    state["exp_avg"], state[SHARED_SQUARE] = torch.zeros_like(p), torch.zeros_like(square)
                state["step"] += 1
                state["exp_avg"].lerp_(p.grad, 1 - beta1)
                state[SHARED_SQUARE].lerp_(square, 1 - beta2)
                steps = float(state["step"])
                scale = (state[SHARED_SQUARE] / (1 - beta2**steps)).sqrt() + group["eps"]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.addcdiv_(state["exp_avg"], scale, value=-group["lr"] / (1 - beta1**steps))
