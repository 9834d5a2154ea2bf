"""Tensors of which every process holds a part (FSDP2's ``DTensor``), made whole and cut again."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all processes' parts of it put together (they ask together)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def cut_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that every process holds whole, cut as ``like`` is; nothing is sent."""
    if not isinstance(like, DTensor):
        return tensor
    everywhere = DTensor.from_local(tensor, like.device_mesh, [Replicate()], run_check=False)
    return everywhere.redistribute(placements=like.placements)
