"""A student's losses on logits, chunk by chunk: neither its logits nor its teacher's are ever held for all positions.

As in :mod:`reflowlens.models.loss` gradients are computed together with the losses, in the forward pass.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reflowlens.models.loss import capped
from reflowlens.models.numerics import wide
from reflowlens.models.parts import plus
from reflowlens.models.residual import Readout

_CHUNK = 512  # positions; a chunk holds logits of two models, half as many positions as the plain loss


class LogitLosses(NamedTuple):
    """In nats a token; gradients go back from ``total`` alone.

    Args:
        total: the weighted sum of the other two.
        tokens: cross-entropy with the targets.
        logits: T² · KL(teacher ‖ student) at temperature T.
    """

    total: Float[Tensor, ""]
    tokens: Float[Tensor, ""]
    logits: Float[Tensor, ""]


def logit_losses(
    student: Readout,
    teacher: Readout,
    targets: Int[Tensor, "batch pos"],
    *,
    tokens: float,
    logits: float,
    temperature: float = 1.0,
    chunk: int = _CHUNK,
) -> LogitLosses:
    """Cross-entropy and divergence from a teacher, means over all positions.

    Under autocast the products run in its dtype; softmaxes and sums are float32 at least.

    Args:
        teacher: the readout of the same positions, of the same vocabulary; no gradient reaches it.
        tokens, logits: weights in the total.
        temperature: T, by which both models' logits are divided.
        chunk: positions whose logits are formed at once.
    """
    return LogitLosses(
        *_ChunkedLosses.apply(
            student.features.flatten(0, 1),
            student.matrix,
            student.bias,
            targets.flatten(),
            teacher.features.flatten(0, 1),
            teacher.matrix,
            teacher.bias,
            (student.cap, teacher.cap),
            (tokens, logits),
            temperature,
            chunk,
        )
    )


class _ChunkedLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        matrix: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        teacher_features: Tensor,
        teacher_matrix: Tensor,
        teacher_bias: Tensor | None,
        caps: tuple[float | None, float | None],
        weights: tuple[float, float],
        temperature: float,
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype, device, n = features.dtype, features.device.type, len(features)
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        W, teacher_W = matrix.to(dtype), teacher_matrix.to(dtype)
        (cap, teacher_cap), (of_tokens, of_logits), T = caps, weights, temperature
        grad_features, grad_matrix = torch.empty_like(features), torch.zeros_like(matrix)
        grad_bias = None if bias is None else torch.zeros_like(bias)
        tokens = torch.zeros((), device=features.device, dtype=torch.promote_types(dtype, torch.float32))
        divergence = torch.zeros_like(tokens)
        for start in range(0, n, chunk):
            rows = slice(start, start + chunk)
            x, target = features[rows].to(dtype), targets[rows, None]
            logits = capped(wide(plus(x @ W.T, bias)), cap)
            log_p = logits.log_softmax(dim=-1)
            tokens = tokens - log_p.gather(1, target).sum() / n
            grad = (log_p.exp() * (of_tokens / n)).scatter_add(1, target, log_p.new_full(target.shape, -of_tokens / n))
            theirs = capped(wide(plus(teacher_features[rows].to(dtype) @ teacher_W.T, teacher_bias)), teacher_cap)
            log_teacher = (theirs / T).log_softmax(dim=-1)
            log_student = (logits / T).log_softmax(dim=-1)
            p = log_teacher.exp()
            divergence = divergence + T * T * (p * (log_teacher - log_student)).sum() / n
            grad += (log_student.exp() - p) * (of_logits * T / n)
            if cap is not None:
                grad *= 1 - (logits / cap).square()  # of tanh, 1 - tanh²
            if grad_bias is not None:
                grad_bias += grad.sum(dim=0)
            grad = grad.to(dtype)
            grad_features[rows] = (grad @ W).to(features.dtype)
            grad_matrix += grad.T @ x
        ctx.save_for_backward(grad_features, grad_matrix, grad_bias)
        ctx.mark_non_differentiable(tokens, divergence)
        return of_tokens * tokens + of_logits * divergence, tokens, divergence

    @staticmethod
    def backward(ctx: Any, *grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grad_features, grad_matrix, grad_bias = ctx.saved_tensors
        scale = grad_output[0]
        bias = None if grad_bias is None else grad_bias * scale
        return grad_features * scale, grad_matrix * scale, bias, *[None] * 8
