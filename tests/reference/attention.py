"""Attention in attribution graphs the plain way: queries, keys, values of the frozen model, pulled back by autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tests.reference.attribution import Frozen

Edges = dict[tuple[Any, ...], Tensor]


def watched(make: Callable[[], Frozen], model: Any, part: str, cut: bool = False) -> tuple[Frozen, dict[int, Tensor]]:
    """A frozen run, and by block what passed a hook point of it; cut: as leaves, behind which the run goes on."""
    seen: dict[int, Tensor] = {}

    def keep(block: int) -> Callable[..., Tensor]:
        def hook(module: Any, inputs: Any, x: Tensor) -> Tensor:
            seen[block] = x.detach().requires_grad_() if cut else x
            return seen[block]

        return hook

    points = [model.hook_dict[f"blocks.{block}.{part}"] for block in range(model.cfg.n_layers)]
    handles = [point.register_forward_hook(keep(block)) for block, point in enumerate(points)]
    try:
        return make(), seen
    finally:
        for handle in handles:
            handle.remove()


def score_parts(
    make: Callable[[], Frozen], model: Any, layer: int, head: int, query: int, key: int
) -> tuple[list[Edges], list[Edges], Edges, Edges]:
    """By autograd what sources add to each channel of a query over √d_head, and of a key, and to their product by way
    of either."""
    cfg = model.cfg
    turned = "rot_" if cfg.positional_embedding_type == "rotary" else ""
    frozen, queries = watched(make, model, f"attn.hook_{turned}q")
    of_keys, keys = watched(make, model, f"attn.hook_{turned}k")
    q = queries[layer][0, query, head] / cfg.d_head**0.5
    k = keys[layer][0, key, head // (cfg.n_heads // cfg.kv_heads)]
    by_query, by_key = frozen.edges(q @ k.detach()), of_keys.edges(q.detach() @ k)
    return [frozen.edges(channel) for channel in q], [of_keys.edges(channel) for channel in k], by_query, by_key


def last_heads(
    make: Callable[[], Frozen], model: Any, read: Callable[[Frozen], Tensor], position: int
) -> Iterator[tuple[tuple[int, int, int] | None, Edges]]:
    """The edges into what is read of a frozen run at a position, by the last head: None where they pass none, otherwise
    (block, head, key).

    Outputs of attention are leaves in one run, in which the target's gradients at them pass no head. In another, these
    multiply what a head brings from one position.
    """
    direct, outputs = watched(make, model, "hook_attn_out", cut=True)
    target = read(direct)
    gradients = torch.autograd.grad(target, list(outputs.values()), retain_graph=True, allow_unused=True)
    edges = direct.edges(target)
    for block, gradient in zip(outputs, gradients, strict=True):
        b_O = model.blocks[block].attn.b_O
        if gradient is not None and b_O is not None:  # added before the output was cut off, and no head's
            edges["bias",][block] += gradient.sum((0, 1)) @ b_O.detach()
    yield None, edges
    whole, values = watched(make, model, "attn.hook_v")
    group = model.cfg.n_heads // model.cfg.kv_heads
    for block, gradient in zip(outputs, gradients, strict=True):
        if gradient is None:
            continue
        W_O, pattern = model.blocks[block].attn.W_O.detach(), whole.cache[f"blocks.{block}.attn.hook_pattern"][0]
        for head in range(model.cfg.n_heads):
            for key in range(position + 1):
                value = values[block][0, key, head // group] * pattern[head, position, key].detach()
                written = whole.behind("ln1_post", block, value @ W_O[head], at=position)
                yield (block, head, key), whole.edges(written @ gradient[0, position])
