"""The TTT-Linear model with a flow refiner written out plainly: a position, a head and an inner step at a time.

Weights by their names in the model under test, so that only what is done with them is written twice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]


def rms_norm(x: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps)


def layer_norm(x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + eps)


def bigram_slot(token: int, before: int | None, slots: int) -> int:
    """The last slot is that of a token without one before it."""
    if before is None:
        return slots - 1
    return ((36313 * token) ^ (27191 * before)) % (slots - 1)


def smear(x: Tensor, gate: Tensor) -> Tensor:
    g = torch.sigmoid(gate)
    rows = [(1 - g) * row + g * (x[t - 1] if t else torch.zeros_like(row)) for t, row in enumerate(x)]
    return torch.stack(rows)


def rotated(row: Tensor, position: int, n_rotary: int, base: float) -> Tensor:
    """The first ``n_rotary`` channels turned in pairs (i, i + n_rotary / 2)."""
    out, half = row.clone(), n_rotary // 2
    for i in range(half):
        angle = position * base ** (-2 * i / n_rotary)
        cos, sin = math.cos(angle), math.sin(angle)
        out[i] = row[i] * cos - row[i + half] * sin
        out[i + half] = row[i] * sin + row[i + half] * cos
    return out


def attention(q: Tensor, k: Tensor, v: Tensor, project_out: bool) -> Tensor:
    """[pos, d_head] of one head: causal softmax; ``project_out``: without what lies along the position's own value."""
    rows = []
    for t in range(len(q)):
        scores = torch.stack([q[t] @ k[s] for s in range(t + 1)]) / math.sqrt(q.shape[1])
        out = torch.softmax(scores, 0) @ v[: t + 1]
        if project_out:
            own = v[t] / v[t].norm()
            out = out - (out @ own) * own
        rows.append(out)
    return torch.stack(rows)


def inner_loss(W: Tensor, c: Tensor, k: Tensor, v: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """½‖LN(kW + c) − (v − k)‖² of one token and head."""
    return 0.5 * ((layer_norm(k @ W + c, eps) * scale + shift - (v - k)) ** 2).sum()


def ttt_head(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    W: Tensor,
    c: Tensor,
    scale: Tensor,
    shift: Tensor,
    chunk: int,
    rate: float,
    eps: float,
) -> Tensor:
    """[pos, d_head] of one head by one inner gradient step a token, gradients taken at the start of each mini-batch.

    Each token is read with the state after its own step.
    """
    rows = []
    for start in range(0, len(q), chunk):
        step_W, step_c = torch.zeros_like(W), torch.zeros_like(c)
        for t in range(start, min(start + chunk, len(q))):
            with torch.enable_grad():
                at_W = W if W.requires_grad else W.clone().requires_grad_()
                at_c = c if c.requires_grad else c.clone().requires_grad_()
                loss = inner_loss(at_W, at_c, k[t], v[t], scale, shift, eps)
                grad_W, grad_c = torch.autograd.grad(loss, (at_W, at_c), create_graph=True)
            step_W, step_c = step_W + grad_W, step_c + grad_c
            read = q[t] @ (W - rate * step_W) + (c - rate * step_c)
            rows.append(q[t] + layer_norm(read, eps) * scale + shift)
        W, c = W - rate * step_W, c - rate * step_c
    return torch.stack(rows)


def ttt(x: Tensor, weights: Weights, n_heads: int, chunk: int, rate: float) -> Tensor:
    """What the inner learner adds to the stream, before its gate; tokens of an unfinished mini-batch are read too."""
    q, k, v = (x @ weights[f"ttt.W_{name}"] for name in "QKV")
    size, outs = q.shape[1] // n_heads, []
    for head in range(n_heads):
        part = slice(head * size, (head + 1) * size)
        start = weights["ttt.W_start"][head], weights["ttt.b_start"][head]
        norm = weights["ttt.w_inner"][head], weights["ttt.b_inner"][head]
        outs.append(ttt_head(q[:, part], k[:, part], v[:, part], *start, *norm, chunk, rate, 1e-6))
    normal = layer_norm(torch.cat(outs, dim=1), 1e-5) * weights["ttt.w_norm"] + weights["ttt.b_norm"]
    return normal @ weights["ttt.W_O"]


def flow(x: Tensor, weights: Weights) -> Tensor:
    """What the refiner adds to the stream, before its gate."""
    z = x @ weights["flow.W_down"]
    hidden = torch.nn.functional.gelu(z @ weights["flow.W_in"] + weights["flow.b_in"])
    return (z + hidden @ weights["flow.W_out"] + weights["flow.b_out"]) @ weights["flow.W_up"]


def first_stream(tokens: list[int], weights: Weights, eps: float) -> Tensor:
    rows = []
    for t, token in enumerate(tokens):
        slot = bigram_slot(token, tokens[t - 1] if t else None, len(weights["bigram.W_pairs"]))
        pair = weights["bigram.scale"] * (weights["bigram.W_pairs"][slot] @ weights["bigram.W_up"])
        rows.append(weights["embed.W_E"][token] + pair)
    return smear(rms_norm(torch.stack(rows), eps), weights["smear.gate"])


def block(
    x: Tensor, first: Tensor, earlier: Tensor | None, tokens: list[int], layer: int, weights: Weights, cfg: Any
) -> Tensor:
    own = {
        name.removeprefix(f"blocks.{layer}."): w for name, w in weights.items() if name.startswith(f"blocks.{layer}.")
    }
    if earlier is not None:
        x = x + own["w_skip"] * earlier
    x = own["w_stream"] * x + own["w_first"] * first
    read = rms_norm(x, cfg.eps) / math.sqrt(layer + 1)
    n, base = cfg.ttt_flow.rotary_channels, cfg.rotary_base
    if cfg.n_ctx > cfg.ttt_flow.rotary_context:
        base = base * (cfg.n_ctx / cfg.ttt_flow.rotary_context) ** (n / (n - 2))
    written, group = torch.zeros_like(x), cfg.n_heads // cfg.kv_heads
    for head in range(cfg.n_heads):
        q = rms_norm(read @ own["attn.W_Q"][head], cfg.eps)
        k = rms_norm(read @ own["attn.W_K"][head // group], cfg.eps)
        v = read @ own["attn.W_V"][head // group]
        of_last = layer - (cfg.n_layers - cfg.ttt_flow.value_layers)
        if of_last >= 0:
            scale = weights["values.scale"] * weights["values.layer_scale"][of_last]
            values = scale * (weights["values.W_values"][tokens] @ weights["values.W_up"])
            v = v + values.view(len(tokens), cfg.kv_heads, -1)[:, head // group]
        q = torch.stack([rotated(row, t, n, base) for t, row in enumerate(q)]) * own["attn.gain"][head]
        k = torch.stack([rotated(row, t, n, base) for t, row in enumerate(k)])
        is_exclusive = layer >= cfg.n_layers - cfg.ttt_flow.exclusive_layers
        written = written + attention(q, k, v, is_exclusive) @ own["attn.W_O"][head]
    x = x + own["w_attn"] * written
    hidden = rms_norm(x, cfg.eps) / math.sqrt(layer + 1) @ own["mlp.W_in"]
    return x + own["w_mlp"] * (torch.where(hidden > 0, hidden, 0.5 * hidden) ** 2 @ own["mlp.W_out"])


def logits(tokens: list[int], weights: Weights, cfg: Any) -> Tensor:
    """[pos, vocab] of one text."""
    first = first_stream(tokens, weights, cfg.eps)
    x, half, outputs = first, cfg.n_layers // 2, {}
    for layer in range(cfg.n_layers):
        earlier = outputs[2 * half - 1 - layer] if half <= layer < 2 * half else None
        x = outputs[layer] = block(x, first, earlier, tokens, layer, weights, cfg)
    x, own = rms_norm(x, cfg.eps), cfg.ttt_flow
    if own.ttt:
        rate = own.ttt_rate / (cfg.d_model // own.ttt_heads)
        x = x + torch.sigmoid(weights["ttt.gate"]) * ttt(x, weights, own.ttt_heads, own.ttt_chunk, rate)
    if own.flow:
        x = x + torch.sigmoid(weights["flow.gate"]) * flow(x, weights)
    return own.logit_cap * torch.tanh(x @ weights["embed.W_E"].T / own.logit_cap)
