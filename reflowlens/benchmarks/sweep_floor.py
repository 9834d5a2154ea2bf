"""What a sweep cannot do without: its matrix products, and the rate that a plain product reaches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from reflowlens.benchmarks.timing import alternate
from reflowlens.flops import forward_flops_by_part
from reflowlens.models.base import HookedModel
from reflowlens.models.products import product

_TOKENS = 2048  # rows of the plain product


class BlockFlops(NamedTuple):
    """Operations of a block in matrix products.

    Args:
        keys: of a token that others attend to.
        queries: of a token that attends.
        mixing: of a query with one key.
        own_key: 1 where a query's own position is among its keys, otherwise 0.
        writing: of a token, from what it found to what the block adds to its stream.
        mlp: what of ``writing`` lies behind the stream's middle.
    """

    keys: float
    queries: float
    mixing: float
    own_key: int
    writing: float
    mlp: float


def whole_passes_flops(model: HookedModel, n_cells: int, n_tokens: int) -> float:
    """Operations in matrix products of one whole pass a cell, of a prompt."""
    return n_cells * n_tokens * sum(forward_flops_by_part(model.cfg, n_tokens).values())


def suffixes_flops(model: HookedModel, grid: str, cells: Iterable[tuple[int, int]], n_tokens: int) -> float:
    """Operations in matrix products of what cells change and the last logits need, of a prompt.

    A patch of the stream in front of a block changes queries, keys and values there at its own position alone, from the
    next block on at every later one; in the last block only the last query is needed. That of a head's output changes
    the MLP at its position, and is then one of the stream in front of the next block; in the last block it is needed at
    the last position alone.

    Args:
        grid: ``"resid_pre"``, or one of heads' outputs.
        cells: layer and position of each, of a grid of heads once a head.
    """
    block, n_layers, total = _block_flops(model, n_tokens), model.cfg.n_layers, 0.0
    for layer, position in cells:
        from_stream, suffix = grid == "resid_pre", n_tokens - position
        enters = layer if from_stream else layer + 1
        if not from_stream and (enters < n_layers or suffix == 1):
            total += block.mlp
        for at in range(enters, n_layers):
            changed = 1 if at == enters else suffix
            asked = 1 if at == n_layers - 1 else suffix
            pairs = sum(range(n_tokens - asked, n_tokens)) + asked * block.own_key
            total += changed * block.keys + min(changed, asked) * block.queries
            total += pairs * block.mixing + asked * block.writing
    return total


def _block_flops(model: HookedModel, n_tokens: int) -> BlockFlops:
    cfg = model.cfg
    parts = {part: flops / cfg.n_layers for part, flops in forward_flops_by_part(cfg, n_tokens).items()}
    if "neurons" in parts:  # a level's first reading is query and key at once, of the positions before
        mixing = parts["attention_mixing"] * 2 / max(n_tokens - 1, 1)  # (n_tokens - 1) / 2 keys in the mean
        return BlockFlops(parts["neurons"] / 3, 0.0, mixing, 0, parts["neurons"] * 2 / 3, 0.0)
    mixing = parts["attention_mixing"] * 2 / (n_tokens + 1)
    keys = parts["attention_projections"] * cfg.kv_heads / (cfg.kv_heads + cfg.n_heads)
    queries = (parts["attention_projections"] - keys) / 2  # as much as what heads write takes
    return BlockFlops(keys, queries, mixing, 1, queries + parts["mlp"], parts["mlp"])


def plain_rate(model: HookedModel) -> float:
    """Operations a second of a plain product in float32, [2048, d_model] by [d_model, d_mlp], in this process, now: of
    torch's own product or of the model's, whichever is faster."""
    d_model, d_mlp = model.cfg.d_model, model.cfg.d_mlp or 4 * model.cfg.d_model
    x, matrix = torch.randn(_TOKENS, d_model), torch.randn(d_model, d_mlp)
    with torch.no_grad():
        times = alternate({"torch's": lambda: x @ matrix, "the model's": lambda: product(x, matrix)}, rounds=7)
    return 2 * _TOKENS * d_model * d_mlp / min(map(min, times.values()))
