"""FlowRefiner: one Euler step of a learned velocity in a narrow space, added to the stream behind a gate.

    z = x D
    v = GELU(z A₁ + a₁) A₂ + a₂
    x ← x + σ(γ) (z + τ v) U          τ = 1

There is no time, and no flow-matching loss: the step is what the language model's loss makes of it. z U alone, which is
linear in x, unties the readout from the embedding by a matrix of the space's rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from reflowlens.models.parts import HookPoint
from reflowlens.ttt_flow_config import TTTFlowConfig

GATE_INIT = -5.0  # σ(-5) = 0.0067: a refiner begins as next to nothing


class FlowRefiner(nn.Module):
    """The refiner of a model ``d_model`` wide.

    Example:
        >>> refiner = FlowRefiner(TTTFlowConfig(flow_width=64, flow_hidden=256), d_model=512)
        >>> sum(parameter.numel() for parameter in refiner.parameters())
        98625
    """

    def __init__(self, cfg: TTTFlowConfig, d_model: int) -> None:
        super().__init__()
        self.W_down = nn.Parameter(torch.empty(d_model, cfg.flow_width))  # D
        self.W_in = nn.Parameter(torch.empty(cfg.flow_width, cfg.flow_hidden))  # A₁
        self.b_in = nn.Parameter(torch.empty(cfg.flow_hidden))
        self.W_out = nn.Parameter(torch.empty(cfg.flow_hidden, cfg.flow_width))  # A₂
        self.b_out = nn.Parameter(torch.empty(cfg.flow_width))
        self.W_up = nn.Parameter(torch.empty(cfg.flow_width, d_model))  # U
        self.gate = nn.Parameter(torch.empty(1))  # γ
        self.hook_latent = HookPoint()  # [batch, pos, flow_width], z
        self.hook_flow_pre = HookPoint()  # [batch, pos, flow_hidden], z A₁ + a₁
        self.hook_flow_post = HookPoint()  # [batch, pos, flow_hidden], its neurons
        self.hook_velocity = HookPoint()  # [batch, pos, flow_width], v
        self.hook_delta = HookPoint()  # [batch, pos, d_model], what is added to the stream

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """D, A₁ and U orthogonal at every width; A₂ and the biases 0, so that it begins as the linear map alone."""
        for weight in (self.W_down, self.W_in, self.W_up):
            nn.init.orthogonal_(weight, generator=generator)
        for weight in (self.b_in, self.W_out, self.b_out):
            weight.zero_()
        self.gate.fill_(GATE_INIT)

    def velocity(self, z: Float[Tensor, "*batch flow_width"]) -> Float[Tensor, "*batch flow_width"]:
        """v at a point of the narrow space."""
        neurons = self.hook_flow_post(F.gelu(self.hook_flow_pre(z @ self.W_in + self.b_in)))
        return neurons @ self.W_out + self.b_out

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        z = self.hook_latent(x @ self.W_down)
        v = self.hook_velocity(self.velocity(z))
        return x + self.hook_delta(self.gate.sigmoid() * ((z + v) @ self.W_up))
