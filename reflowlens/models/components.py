"""A decoder block and its MLP, each with its named activation points.

Points whose activations would cost memory nobody asked for (attention scores and patterns, per-head results, per-head
copies of the residual stream) are computed only when something is attached to them; the numbers are the same.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from reflowlens.config import ModelConfig
from reflowlens.models.attention import Attention, Past
from reflowlens.models.parts import HookPoint, NoNorm, Norm, SharedNorm, bias, plus, through_copy
from reflowlens.models.places import Places
from reflowlens.models.products import product


def _gelu_new(x: Tensor) -> Tensor:  # no lambda, which a model could not be pickled with
    return F.gelu(x, approximate="tanh")


def _leaky_relu_squared(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.5).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": _gelu_new,
    "relu": F.relu,
    "silu": F.silu,
    "leaky_relu_squared": _leaky_relu_squared,
}


class MLP(nn.Module):
    """``act(x W_in) W_out``."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.act = ACTIVATIONS[cfg.act_fn]
        self.W_in = nn.Parameter(torch.empty(cfg.d_model, cfg.d_mlp))
        self.W_out = nn.Parameter(torch.empty(cfg.d_mlp, cfg.d_model))
        self.b_in = bias(cfg.mlp_bias, cfg.d_mlp)
        self.b_out = bias(cfg.mlp_bias, cfg.d_model)
        self.hook_pre = HookPoint()  # [batch, pos, d_mlp]
        self.hook_post = HookPoint()  # [batch, pos, d_mlp]

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        post = self.hook_post(self.act(self.hook_pre(plus(product(x, self.W_in), self.b_in))))
        return plus(product(post, self.W_out), self.b_out)


class GatedMLP(nn.Module):
    """``(act(x W_gate) * x W_in) W_out``: SwiGLU when the activation is SiLU (Shazeer, 2020)."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.act = ACTIVATIONS[cfg.act_fn]
        self.W_gate = nn.Parameter(torch.empty(cfg.d_model, cfg.d_mlp))
        self.W_in = nn.Parameter(torch.empty(cfg.d_model, cfg.d_mlp))
        self.W_out = nn.Parameter(torch.empty(cfg.d_mlp, cfg.d_model))
        self.b_gate = bias(cfg.mlp_bias, cfg.d_mlp)
        self.b_in = bias(cfg.mlp_bias, cfg.d_mlp)
        self.b_out = bias(cfg.mlp_bias, cfg.d_model)
        self.hook_pre = HookPoint()  # [batch, pos, d_mlp], x W_gate
        self.hook_pre_linear = HookPoint()  # [batch, pos, d_mlp], x W_in
        self.hook_post = HookPoint()  # [batch, pos, d_mlp], their product after the activation

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        gate = self.hook_pre(plus(product(x, self.W_gate), self.b_gate))
        linear = self.hook_pre_linear(plus(product(x, self.W_in), self.b_in))
        return plus(product(self.hook_post(self.act(gate) * linear), self.W_out), self.b_out)


class Block(nn.Module):
    """Attention, then the MLP, each added to the residual stream that it reads through a norm.

    Where the configuration says so, what they write passes a norm, too, or it alone.
    """

    hook_out_is_single_residual_stream = True  # what TransformerLens's logit lens asks of a block

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        reads_as_is = cfg.use_normalization_after_only
        self.ln1 = NoNorm(cfg) if reads_as_is else Norm(cfg)
        self.attn = Attention(cfg, layer)
        self.ln2 = SharedNorm(self.ln1) if cfg.parallel_shared_ln else NoNorm(cfg) if reads_as_is else Norm(cfg)
        self.mlp = GatedMLP(cfg) if cfg.gated_mlp else MLP(cfg)
        self.ln1_post = Norm(cfg) if cfg.has_post_norms else None
        self.ln2_post = Norm(cfg) if cfg.has_post_norms else None
        self.hook_mlp_in = HookPoint()
        self.hook_resid_pre = HookPoint()
        self.hook_attn_out = HookPoint()
        self.add_middle()
        self.hook_mlp_out = HookPoint()
        self.hook_resid_post = HookPoint()
        self.dropout = cfg.dropout

    def add_middle(self) -> None:
        """The point between attention and MLP."""
        self.hook_resid_mid = HookPoint()

    def forward(
        self, resid: Float[Tensor, "batch pos d_model"], places: Places, past: Past | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        return self.feed(self.attend(resid, places, past))

    def attend(
        self, resid: Float[Tensor, "batch pos d_model"], places: Places, past: Past | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """The attention half: ``resid_pre`` to ``resid_mid``."""
        resid = self.hook_resid_pre(resid)
        return self.hook_resid_mid(resid + self.attention_written(resid, places, past))

    def feed(self, resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """The MLP half: ``resid_mid`` to ``resid_post``."""
        return self.hook_resid_post(resid + self.mlp_written(resid))

    def attention_written(
        self, resid: Float[Tensor, "batch pos d_model"], places: Places, past: Past | None
    ) -> Float[Tensor, "batch mixed_pos d_model"]:
        """What attention adds to the stream that it reads."""
        return self._dropped(self.hook_attn_out(self.after_attention(self.attn(resid, self.ln1, places, past))))

    def mlp_written(self, resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """What the MLP adds to the stream that it reads."""
        written = self.mlp(self.ln2(through_copy(self.hook_mlp_in, resid)))
        return self._dropped(self.hook_mlp_out(self.after_mlp(written)))

    def _dropped(self, out: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        return F.dropout(out, self.dropout) if self.training and self.dropout else out

    def after_attention(self, out: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """What of attention's output is added: normalised by ``ln1_post``, where there is one."""
        return out if self.ln1_post is None else self.ln1_post(out)

    def after_mlp(self, out: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """What of the MLP's output is added: normalised by ``ln2_post``, where there is one."""
        return out if self.ln2_post is None else self.ln2_post(out)


class ParallelBlock(Block):
    """Attention and MLP both read the stream in front of the block: there is none between them."""

    def add_middle(self) -> None:
        """None."""

    def forward(
        self, resid: Float[Tensor, "batch pos d_model"], places: Places, past: Past | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        resid = self.hook_resid_pre(resid)
        return self.hook_resid_post(resid + self.attention_written(resid, places, past) + self.mlp_written(resid))
