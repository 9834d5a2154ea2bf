"""reFlow from its description, one token and one head at a time: slow, short, and without anything of reflowlens.

weights: the checkpoint's tensors by name. The architecture: E = R B, with R pruned row by row to its k largest positive
entries in reFlow-TopK, at both ends or at one (where every entry learns, what pruning takes away is a constant);
pre-norm blocks; RMSNorm; rotary positions that turn adjacent channels; SwiGLU; the same E reads the logits out. Query
head h uses key/value head h // (n_heads / n_kv_heads).
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    weights: dict[str, Tensor],
    tokens: Tensor,
    *,
    n_layers: int,
    topk: int | None = None,
    topk_ends: str = "both",
    topk_gradient: str = "kept",
    eps: float = 1e-6,
    base: float = 10_000.0,
) -> Tensor:
    """Logits [pos, d_vocab] of one sequence of token ids [pos]."""
    recipe, basis = weights["embed.W_recipe"], weights["embed.W_basis"]
    pruned = recipe if topk is None else prune(recipe, topk)
    if topk_gradient == "straight_through":
        pruned = recipe - (recipe - pruned).detach()
    E_in, E_out = ((recipe if topk_ends == other else pruned) @ basis for other in ("output", "input"))
    stream = [E_in[token] for token in tokens]
    for layer in range(n_layers):
        part = {name.split(".", 2)[2]: w for name, w in weights.items() if name.startswith(f"blocks.{layer}.")}
        normed = [rms_norm(x, part["ln1.w"], eps) for x in stream]
        stream = [x + y for x, y in zip(stream, attention(normed, part, base), strict=True)]
        normed = [rms_norm(x, part["ln2.w"], eps) for x in stream]
        stream = [x + swiglu(y, part) for x, y in zip(stream, normed, strict=True)]
    return torch.stack([E_out @ rms_norm(x, weights["ln_final.w"], eps) for x in stream])


def prune(recipe: Tensor, k: int) -> Tensor:
    rows = []
    for row in recipe:
        threshold = row.detach().sort(descending=True).values[k - 1]
        rows.append(torch.where((row >= threshold) & (row > 0), row, 0.0))
    return torch.stack(rows)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean() + eps) * weight


def swiglu(x: Tensor, part: dict[str, Tensor]) -> Tensor:
    gate = x @ part["mlp.W_gate"]
    return (gate / (1 + torch.exp(-gate)) * (x @ part["mlp.W_in"])) @ part["mlp.W_out"]


def attention(xs: list[Tensor], part: dict[str, Tensor], base: float) -> list[Tensor]:
    W_Q, W_K, W_V, W_O = (part[f"attn.W_{name}"] for name in "QKVO")
    group = len(W_Q) // len(W_K)
    outs = []
    for p, x in enumerate(xs):
        out = torch.zeros_like(x)
        for h in range(len(W_Q)):
            q = rotate(x @ W_Q[h], p, base)
            keys = torch.stack([rotate(y @ W_K[h // group], s, base) for s, y in enumerate(xs[: p + 1])])
            values = torch.stack([y @ W_V[h // group] for y in xs[: p + 1]])
            out = out + torch.softmax(keys @ q / len(q) ** 0.5, dim=0) @ values @ W_O[h]
        outs.append(out)
    return outs


def rotate(x: Tensor, position: int, base: float) -> Tensor:
    """Channels 2i and 2i + 1 are a complex number that turns by position * base^(-2i / width)."""
    numbers = torch.view_as_complex(x.reshape(-1, 2))
    angle = position * base ** (-2 * torch.arange(len(numbers), dtype=torch.float64) / len(x))
    return torch.view_as_real(numbers * torch.polar(torch.ones_like(angle), angle)).reshape(-1).to(x.dtype)
