"""What a prompt is continued with when vectors are added to the outputs of its MLPs."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reflowlens.models.base import HookedModel
from reflowlens.sweeps.packed import Packed, UnpatchedRun

_AT_ONCE = 2**21  # entries of a [row, pos, d_model] block


@torch.no_grad()
def ends_with(
    model: HookedModel, tokens: Int[Tensor, " pos"], added: Float[Tensor, "row block place d_model"]
) -> Float[Tensor, "row d_model"]:
    """The stream that logits are read off at a prompt's end, when vectors are added to the outputs of its MLPs.

    Each row is a run of its own: from the first block and position on that anything is added to, where a pass can start
    there.

    Args:
        added: to which block (of a TTTFlow refiners too), at the last so many positions.
    """
    if model.stages not in ("halves", "levels"):
        return _whole_passes(model, tokens, added)
    run = UnpatchedRun(model, tokens[None], _points(model))
    ends = run.final[0, -1].expand(len(added), -1).clone()
    changed = added.any(dim=3).any(dim=2)
    first = torch.where(changed.any(dim=1), changed.int().argmax(dim=1), -1)
    for block in range(model.cfg.n_layers):
        for rows in (first == block).nonzero()[:, 0].split(max(1, _AT_ONCE // run.final.numel())):
            ends[rows] = _from_block(run, block, added[rows])
    return ends


@torch.no_grad()
def log_probabilities(model: HookedModel, ends: Float[Tensor, "row d_model"]) -> Float[Tensor, "row token"]:
    """Of every real token, read off the last stream."""
    return model.read_final(ends[None]).logits()[0, :, : model.tokenizer.n_vocab].float().log_softmax(dim=-1)


def _from_block(
    run: UnpatchedRun, block: int, added: Float[Tensor, "row block place d_model"]
) -> Float[Tensor, "row d_model"]:
    """Of rows to which something is added behind a block, and nothing before."""
    model, stages, points = run.stages.model, run.stages, _points(run.stages.model)
    before, is_changed = run.n_positions - added.shape[2], added.any(dim=3)
    written = run.cache[points[block]].repeat(len(added), 1, 1)
    written[:, before:] += added[:, block].to(written)
    entering = Packed.suffixes(
        cell=torch.arange(len(added), device=added.device),
        prompt=torch.zeros(len(added), dtype=torch.long, device=added.device),
        start=before + is_changed.any(dim=1).int().argmax(dim=1),
        resid=stages.entry(points[block], written[:, None], run.cache)[:, 0],
    )
    later = [
        point for point, changes in zip(points, is_changed.flatten(2).any(dim=2).any(dim=0), strict=True) if changes
    ]

    def adding(stage: int, packed: Packed) -> AbstractContextManager[Any]:
        row, place = packed.cell[packed.layout.row], packed.layout.position - before

        def add(y: Float[Tensor, "1 token d_model"], hook: Any) -> Tensor:
            return y + added[row, hook.layer(), place].to(y)

        return model.hooks([(point, add) for point in later if stages.stage(point) == stage])

    last = torch.arange(run.n_positions, device=added.device) == run.n_positions - 1
    entry = stages.entry_stage(points[block])
    assert entry is not None
    packed = run.finish({entry: [entering]}, is_read=last[None], hooking=adding)
    return packed.resid[0, last[packed.layout.position]]


def _whole_passes(
    model: HookedModel, tokens: Int[Tensor, " pos"], added: Float[Tensor, "row block place d_model"]
) -> Float[Tensor, "row d_model"]:
    """Where a pass cannot start from a block."""
    points = _points(model) + [point for point in ("ttt.hook_delta", "flow.hook_delta") if point in model.hook_dict]
    places, ends = added.shape[2], []
    for some in added.split(max(1, _AT_ONCE // (len(tokens) * model.cfg.d_model))):

        def add(y: Tensor, hook: Any, some: Tensor = some) -> Tensor:
            return torch.cat([y[:, :-places], y[:, -places:] + some[:, points.index(hook.name)].to(y)], dim=1)

        with model.hooks([(point, add) for point in points[: added.shape[1]]]):
            ends.append(model.final_stream(tokens.expand(len(some), -1))[:, -1])
    return torch.cat(ends)


def _points(model: HookedModel) -> list[str]:
    """Of each block where its MLP's output is."""
    return [f"blocks.{block}.hook_mlp_out" for block in range(model.cfg.n_layers)]
