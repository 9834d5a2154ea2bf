"""A decoder as nanoGPT's readers write it: torch modules, projections fused or not, for the importer to take over.

GPT-2 has learned positions, LayerNorm and GELU. The modern kind has RMSNorm, SwiGLU and rotary positions that turn
adjacent channels as complex numbers. With signals, the embedding is a vocabulary-to-signals matrix times a basis.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Arguments:
    """nanoGPT's ``model_args``."""

    vocab_size: int = 288
    block_size: int = 24
    n_layer: int = 2
    n_embd: int = 32
    n_head: int = 4
    n_kv_head: int = 4
    hidden: int = 48
    bias: bool = False
    modern: bool = False
    fused: bool = True
    n_signals: int | None = None


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, 1e-6)


class SelfAttention(nn.Module):
    def __init__(self, a: Arguments) -> None:
        super().__init__()
        self.a, self.kv_width = a, a.n_embd // a.n_head * a.n_kv_head
        widths = (a.n_embd, self.kv_width, self.kv_width)
        if a.fused:
            self.c_attn = nn.Linear(a.n_embd, sum(widths), bias=a.bias)
        else:
            self.wq, self.wk, self.wv = (nn.Linear(a.n_embd, width, bias=a.bias) for width in widths)
        self.c_proj = nn.Linear(a.n_embd, a.n_embd, bias=a.bias)
        self.register_buffer("bias", torch.tril(torch.ones(1, 1, a.block_size, a.block_size)))

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        d = C // self.a.n_head
        parts = (
            self.c_attn(x).split((C, self.kv_width, self.kv_width), dim=2)
            if self.a.fused
            else (self.wq(x), self.wk(x), self.wv(x))
        )
        q, k, v = (part.view(B, T, -1, d).transpose(1, 2) for part in parts)
        if self.a.modern:
            q, k = turn(q), turn(k)
        k, v = (y.repeat_interleave(self.a.n_head // self.a.n_kv_head, dim=1) for y in (k, v))
        scores = (q @ k.transpose(2, 3) / d**0.5).masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
        return self.c_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, C))


def turn(x: Tensor) -> Tensor:
    """[batch, head, pos, channel]: channels 2i and 2i + 1 are a complex number."""
    T, d = x.shape[-2:]
    angle = torch.outer(torch.arange(T).double(), 10_000.0 ** (-torch.arange(0, d, 2).double() / d))
    numbers = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * torch.polar(torch.ones_like(angle), angle).to(
        torch.complex64
    )
    return torch.view_as_real(numbers).flatten(-2)


class MLP(nn.Module):
    def __init__(self, a: Arguments) -> None:
        super().__init__()
        self.c_fc = nn.Linear(a.n_embd, a.hidden, bias=a.bias)
        self.c_proj = nn.Linear(a.hidden, a.n_embd, bias=a.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class SwiGLU(nn.Module):
    def __init__(self, a: Arguments) -> None:
        super().__init__()
        self.w1 = nn.Linear(a.n_embd, a.hidden, bias=False)
        self.w2 = nn.Linear(a.hidden, a.n_embd, bias=False)
        self.w3 = nn.Linear(a.n_embd, a.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, a: Arguments) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = norm(a), norm(a)
        self.attn = SelfAttention(a)
        self.mlp = SwiGLU(a) if a.modern else MLP(a)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


def norm(a: Arguments) -> nn.Module:
    return RMSNorm(a.n_embd) if a.modern else nn.LayerNorm(a.n_embd, bias=a.bias)


class GPT(nn.Module):
    def __init__(self, a: Arguments) -> None:
        super().__init__()
        self.a = a
        self.transformer = nn.ModuleDict({"h": nn.ModuleList(Block(a) for _ in range(a.n_layer)), "ln_f": norm(a)})
        if a.n_signals is not None:
            self.vocab_to_signals = nn.Embedding(a.vocab_size, a.n_signals)
            self.signal_basis = nn.Parameter(torch.empty(a.n_signals, a.n_embd))
        else:
            self.transformer["wte"] = nn.Embedding(a.vocab_size, a.n_embd)
            self.lm_head = nn.Linear(a.n_embd, a.vocab_size, bias=False)
            self.lm_head.weight = self.transformer["wte"].weight
        if not a.modern:
            self.transformer["wpe"] = nn.Embedding(a.block_size, a.n_embd)

    def forward(self, tokens: Tensor) -> Tensor:
        E = (
            self.transformer["wte"].weight
            if self.a.n_signals is None
            else self.vocab_to_signals.weight @ self.signal_basis
        )
        x = E[tokens]
        if not self.a.modern:
            x = x + self.transformer["wpe"].weight[: tokens.shape[1]]
        for block in self.transformer["h"]:
            x = block(x)
        return self.transformer["ln_f"](x) @ E.T


def random_gpt(a: Arguments, seed: int = 0) -> GPT:
    """Every parameter random and large enough that a wrong place shows."""
    model, generator = GPT(a).eval(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5
            parameter.copy_(1 + noise if "ln_" in name and name.endswith("weight") else noise)
    return model
