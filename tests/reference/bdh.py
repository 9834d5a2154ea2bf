"""BDH written out plainly, a head and a position at a time where that is clearest; weights by the names used here."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def logits(weights: Mapping[str, Tensor], tokens: Tensor, n_layers: int, base: float, eps: float) -> Tensor:
    """Logits [pos, vocab] of one text [pos]."""
    Dx, Dy, E = weights["neurons.W_x"], weights["neurons.W_y"], weights["neurons.W_out"]
    x = layer_norm(weights["embed.W_E"][tokens], eps)
    for _ in range(n_layers):
        written = torch.zeros_like(x)
        for head in range(len(Dx)):
            x_sparse = torch.relu(x @ Dx[head])
            y_sparse = torch.relu(layer_norm(attention(x_sparse, x, base), eps) @ Dy[head])
            written = written + (x_sparse * y_sparse) @ E[head]
        x = layer_norm(x + layer_norm(written, eps), eps)
    return x @ weights["unembed.W_U"]


def attention(x_sparse: Tensor, x: Tensor, base: float) -> Tensor:
    turned = [turn(row, position, base) for position, row in enumerate(x_sparse)]
    rows = []
    for t, query in enumerate(turned):
        total = torch.zeros_like(x[0])
        for s in range(t):
            total = total + (query @ turned[s]) * x[s]
        rows.append(total)
    return torch.stack(rows)


def turn(row: Tensor, position: int, base: float) -> Tensor:
    out = []
    for i in range(0, len(row), 2):
        turns = position * base ** (-i / len(row)) / (2 * math.pi)
        angle = 2 * math.pi * (turns - math.floor(turns))
        cos, sin = math.cos(angle), math.sin(angle)
        out += [row[i] * cos - row[i + 1] * sin, row[i + 1] * cos + row[i] * sin]
    return torch.stack(out)


def layer_norm(x: Tensor, eps: float) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return centered / torch.sqrt((centered**2).mean(-1, keepdim=True) + eps)
