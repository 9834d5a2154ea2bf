"""A decoder run one head at a time, with a say in what every head, MLP and the readout reads: slow and plain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformer_lens.tools.analysis.attribution_patching import Node

from reflowlens.models.base import HookedModel
from tests.support.tiny import bias

Written = dict[str, Tensor]
Reads = Callable[[str, Written], Tensor]


def everything(receiver: str, written: Written) -> Tensor:
    """The stream as it is: all that was written so far."""
    return sum(written.values(), torch.zeros(1))


def graph_run(model: HookedModel, embedding: Tensor, reads: Reads = everything) -> tuple[Tensor, Written]:
    """Logits, and what every node wrote.

    ``reads(receiver, written)`` gives the stream [batch, pos, d_model] that a receiver reads; ``written`` holds what
    the nodes before it wrote, and the output biases as nodes of their own.
    """
    written = {"embed": embedding}
    for layer, block in enumerate(model.blocks):
        name = f"a{layer}.h"
        heads = [
            _head(block, h, *(reads(f"{name}{i}<{kind}>", written) for kind, i in _inputs(model, h)))
            for h in range(model.cfg.n_heads)
        ]
        written |= {f"{name}{h}": head for h, head in enumerate(heads)}
        written[f"bias{layer}"] = bias(block.attn.b_O)
        written[f"m{layer}"] = block.mlp(block.ln2(reads(f"m{layer}", written)))
    return model.unembed(model.ln_final(reads("logits", written))), written


def _inputs(model: HookedModel, head: int) -> list[tuple[str, int]]:
    group = model.cfg.n_heads // model.cfg.kv_heads
    return [("q", head), ("k", head // group), ("v", head // group)]


def _head(block: Any, h: int, q_input: Tensor, k_input: Tensor, v_input: Tensor) -> Tensor:
    attn, ln1, n = block.attn, block.ln1, q_input.shape[1]
    g = h // (attn.cfg.n_heads // attn.cfg.kv_heads)
    q = ln1(q_input) @ attn.W_Q[h] + bias(attn.b_Q).expand(attn.cfg.n_heads, -1)[h]
    k = ln1(k_input) @ attn.W_K[g] + bias(attn.b_K).expand(attn.cfg.kv_heads, -1)[g]
    v = ln1(v_input) @ attn.W_V[g] + bias(attn.b_V).expand(attn.cfg.kv_heads, -1)[g]
    if attn.cfg.positional_embedding_type == "rotary":
        q, k = (attn.rotary(x[:, :, None], slice(0, n))[:, :, 0] for x in (q, k))
    scores = (q @ k.mT) / attn.cfg.d_head**0.5
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    return scores.masked_fill(~causal, -torch.inf).softmax(dim=-1) @ v @ attn.W_O[h]


def edge_of(edge: tuple[Node, Node]) -> tuple[str, str]:
    """Our names for one of TransformerLens's edges, which are a position each."""
    return _name(edge[0]), _name(edge[1])


def _name(node: Node) -> str:
    if node.kind in ("q_input", "k_input", "v_input"):
        return f"a{node.layer}.h{node.head}<{node.kind[0]}>"
    names = {"embed": "embed", "logits": "logits", "attn_head_out": f"a{node.layer}.h{node.head}"}
    return names.get(node.kind, f"m{node.layer}")
