"""Next-token cross-entropy that never holds a [batch * pos, d_vocab] matrix.

The loss of a chunk of positions needs the logits of that chunk alone, and so do its gradients. They are computed
together, chunk by chunk, in the forward pass: nothing is computed twice, and peak memory is
``chunk * d_vocab`` whatever the batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from reflowlens.models.numerics import wide
from reflowlens.models.parts import plus
from reflowlens.models.products import product

IGNORE = -100  # torch's own convention for a target that does not count
CHUNK = 1024  # positions
_CPU_CHUNK = 256  # on a CPU, so that logits stay in its caches between one operation and the next


def capped(logits: Float[Tensor, "*batch d_vocab"], cap: float | None) -> Float[Tensor, "*batch d_vocab"]:
    """``cap * tanh(logits / cap)``: between ±cap, and nearly as they are where they are small; None: as they are."""
    return logits if cap is None else cap * (logits / cap).tanh()


def cross_entropy(
    features: Float[Tensor, "n k"],
    matrix: Float[Tensor, "d_vocab k"],
    targets: Int[Tensor, " n"],
    chunk: int | None = None,
    bias: Float[Tensor, " d_vocab"] | None = None,
    cap: float | None = None,
) -> Float[Tensor, ""]:
    """Mean of ``-log softmax(features @ matrix.T + bias)[target]`` in nats, over the targets that are not negative.

    With a cap logits are ``cap * tanh(logits / cap)``. So many positions as ``chunk`` says are read out at once.

    Under autocast the products run in its dtype; the softmax and the sums are float32 at least.

    >>> features, matrix, targets = torch.randn(5, 3), torch.randn(7, 3), torch.tensor([0, 6, 2, 2, 1])
    >>> whole = F.cross_entropy(features @ matrix.T, targets)
    >>> torch.allclose(cross_entropy(features, matrix, targets, chunk=2), whole)
    True
    """
    targets = targets.masked_fill(targets < 0, IGNORE)  # others mark what does not count by -1
    if chunk is None:  # a compiler makes one operation of several, and has more to compile the more chunks there are
        chunk = _CPU_CHUNK if features.is_cpu and not torch.compiler.is_compiling() else CHUNK
    needs_bias = bias is not None and bias.requires_grad
    if torch.is_grad_enabled() and (features.requires_grad or matrix.requires_grad or needs_bias):
        return _ChunkedCrossEntropy.apply(features, matrix, targets, chunk, bias, cap)
    losses = [
        token_losses(features[i : i + chunk], matrix, targets[i : i + chunk], bias, cap)
        for i in range(0, len(targets), chunk)
    ]
    return torch.cat(losses).sum() / (targets != IGNORE).sum()


def token_losses(
    features: Float[Tensor, "n k"],
    matrix: Float[Tensor, "d_vocab k"],
    targets: Int[Tensor, " n"],
    bias: Float[Tensor, " d_vocab"] | None = None,
    cap: float | None = None,
) -> Float[Tensor, " n"]:
    """Cross-entropy of each position in nats, 0 where the target is ``IGNORE``."""
    logits = capped(wide(plus(product(features, matrix.T), bias)), cap)
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        matrix: Tensor,
        targets: Tensor,
        chunk: int,
        bias: Tensor | None,
        cap: float | None,
    ) -> Tensor:
        dtype = features.dtype
        device = features.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        W = matrix.to(dtype)
        counted = targets != IGNORE
        weight = counted.to(torch.promote_types(dtype, torch.float32)) / counted.sum()
        loss = torch.zeros((), device=features.device, dtype=weight.dtype)
        grad_features, grad_matrix = torch.empty_like(features), torch.zeros_like(matrix)
        grad_bias = None if bias is None else torch.zeros_like(bias)
        for start in range(0, features.shape[0], chunk):
            rows = slice(start, start + chunk)
            x = features[rows].to(dtype).masked_fill(~counted[rows, None], 0.0)  # 0 · NaN would count
            share, target = weight[rows, None], targets[rows, None].clamp(min=0)
            logits = capped(wide(plus(product(x, W.T), bias)), cap)
            slope = None if cap is None else 1 - (logits / cap).square()  # of tanh, 1 - tanh²
            # In place: passes over logits, and fresh memory for them, take longer than the products.
            of_target, highest = logits.gather(1, target), logits.amax(dim=-1, keepdim=True)
            p = logits.sub_(highest).exp_()
            total = p.sum(dim=-1, keepdim=True)
            loss = loss - ((of_target - highest - total.log()) * share).sum()
            grad_logits = p.div_(total).scatter_add_(1, target, torch.full_like(share, -1))  # before rows are weighted
            if slope is not None:
                grad_logits *= slope
            if grad_bias is not None:
                grad_bias += (grad_logits * share).sum(dim=0)
            grad_logits = grad_logits.to(dtype)
            grad_features[rows] = (product(grad_logits, W) * share).to(features.dtype)
            grad_matrix += product(grad_logits.T, (x * share).to(dtype))
        ctx.save_for_backward(grad_features, grad_matrix, grad_bias)
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if (
            torch.is_grad_enabled() and not torch.compiler.is_compiling()
        ):  # create_graph: their own part would be missing
            raise RuntimeError("the chunked loss has no second derivative: take F.cross_entropy of the logits")
        grad_features, grad_matrix, grad_bias = ctx.saved_tensors
        (scale,) = grad_output
        bias = None if grad_bias is None else grad_bias * scale
        return grad_features * scale, grad_matrix * scale, None, None, bias, None
