"""Optimisers and learning-rate schedules."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pretraining.config import OptimizerConfig
from pretraining.shards import cut_like, whole
from reflowlens.models.residual import ENDS, REFINERS


def schedule(step: int, cfg: OptimizerConfig, total: int) -> float:
    """The learning rate of a step as a share of the peak: linear warm-up, then as ``cfg.schedule`` says.

    >>> schedule(0, OptimizerConfig(warmup_steps=10), 100), schedule(9, OptimizerConfig(warmup_steps=10), 100)
    (0.1, 1.0)
    """
    if step < cfg.warmup_steps:
        return (step + 1) / cfg.warmup_steps
    if cfg.schedule == "constant":
        return 1.0
    length = max(1, total - cfg.warmup_steps if cfg.schedule == "cosine" else round(cfg.decay_fraction * total))
    progress = min(max((step - (total - length)) / length, 0.0), 1.0)
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if cfg.schedule == "cosine" else 1 - progress
    return cfg.final_fraction + (1 - cfg.final_fraction) * remaining


def make_optimizers(
    model: nn.Module, cfg: OptimizerConfig, names: Collection[str] | None = None
) -> list[torch.optim.Optimizer]:
    """AdamW over everything, or Muon over the blocks' matrices and AdamW over the rest; an average of all if asked for.

    Weight decay acts on the blocks' matrices and the signal basis: not on norms, which scale, nor on embeddings and
    recipes, whose rare rows get gradients rarely and would only shrink, unless ``cfg.decay_all`` says so.

    Args:
        names: the parameters to update; None: all.
    """
    named = {name: p for name, p in model.named_parameters() if names is None or name in names}
    matrices = [p for name, p in named.items() if is_block_matrix(name)]
    basis = [p for name, p in named.items() if name == "embed.W_basis"]
    taken = {id(p) for p in (*matrices, *basis)}
    own_rate = cfg.embedding_learning_rate > 0
    tables = [p for name, p in named.items() if own_rate and name.startswith(ENDS) and id(p) not in taken]
    taken |= {id(p) for p in tables}
    rest = [p for p in named.values() if id(p) not in taken]
    adamw_decayed = basis if cfg.name == "muon" else [*matrices, *basis]
    rest_decay = cfg.weight_decay if cfg.decay_all else 0.0
    groups: list[dict[str, Any]] = [
        {"params": adamw_decayed, "weight_decay": cfg.weight_decay},
        {"params": rest, "weight_decay": rest_decay},
    ]
    if tables:
        groups.append({"params": tables, "weight_decay": rest_decay, "lr": cfg.embedding_learning_rate})
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), fused=True)
    ]
    if cfg.name == "muon":
        group = {"params": matrices}
        optimizers.append(
            Muon(
                [group],
                lr=cfg.matrix_learning_rate,
                scale=cfg.matrix_scale,
                momentum=cfg.matrix_momentum,
                weight_decay=cfg.weight_decay,
            )
        )
    if cfg.average:
        optimizers.append(Average(named.values(), cfg.average))  # behind the others: of what they have done
    for group in itertools.chain(*(optimizer.param_groups for optimizer in optimizers)):
        group["peak_lr"] = group["lr"]
    return optimizers


def set_rates(optimizers: Iterable[torch.optim.Optimizer], share: float, momentum: float | None = None) -> None:
    """Let every parameter learn at this share of its peak rate (:func:`schedule`).

    Args:
        momentum: of Muon; None leaves it.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * share
            if momentum is not None and isinstance(optimizer, Muon):
                group["momentum"] = momentum


def momentum(step: int, cfg: OptimizerConfig) -> float:
    """Muon's at a step: linear from its start, then constant.

    >>> cfg = OptimizerConfig(matrix_momentum=0.99, matrix_momentum_start=0.92, matrix_momentum_steps=1500)
    >>> [round(momentum(step, cfg), 3) for step in (0, 750, 1500, 9000)]
    [0.92, 0.955, 0.99, 0.99]
    """
    if step >= cfg.matrix_momentum_steps:
        return cfg.matrix_momentum
    share = step / cfg.matrix_momentum_steps
    return cfg.matrix_momentum_start + (cfg.matrix_momentum - cfg.matrix_momentum_start) * share


def is_block_matrix(name: str) -> bool:
    """Whether a parameter is a matrix of blocks (or a stack of them, one a head), which Muon can take.

    That is any but those at both ends and of refiners: what blocks share lies beside them.
    """
    return not name.startswith((*ENDS, *REFINERS)) and name.rsplit(".", 1)[-1].startswith("W_")


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix steps are orthogonalised (Jordan et al., 2024).

    torch's own takes two-dimensional parameters only; here each head of a [head, rows, columns] parameter is a matrix
    of its own. Parameters here map rows to columns (inputs to outputs). A step has spectral norm ``lr * factor``, with
    ``factor = max(1, columns / rows) ** 0.5`` if ``scale`` is ``"widening"``, as published, and
    ``max(1, rows / columns) ** 0.5`` if it is ``"narrowing"``.

    A parameter that processes hold in parts (FSDP2) is put together for its step, which each of them computes.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        scale: str = "widening",
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "scale": scale, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                nesterov = p.grad.lerp(state["momentum"], group["momentum"])
                rows, columns = p.shape[-2:]
                ratio = columns / rows if group["scale"] == "widening" else rows / columns
                p.mul_(1 - group["lr"] * group["weight_decay"])
                direction = cut_like(orthogonalize(whole(nesterov)), like=p)
                p.add_(direction, alpha=-group["lr"] * max(1.0, ratio) ** 0.5)


class Average(torch.optim.Optimizer):
    """No optimiser: an exponential moving average of the weights that the others step, kept as their state is.

    After step t it is ``decay * average + (1 - decay) * weight``; it begins as the weights after the first step.
    """

    def __init__(self, params: Iterable[Any], decay: float) -> None:
        super().__init__(params, {"lr": 0.0, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p]["average"] = p.clone()
                self.state[p]["average"].lerp_(p, 1 - group["decay"])


@contextlib.contextmanager
def averaged(optimizers: Iterable[torch.optim.Optimizer]) -> Iterator[None]:
    """The model with the average of its weights, where one is kept, in a ``with`` block."""
    kept = [
        (p, entry["average"]) for each in optimizers if isinstance(each, Average) for p, entry in each.state.items()
    ]
    _exchange(kept)
    try:
        yield
    finally:
        _exchange(kept)


@torch.no_grad()
def _exchange(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    for a, b in pairs:
        before = a.clone()
        a.copy_(b)
        b.copy_(before)


def orthogonalize(matrix: Float[Tensor, "*batch rows columns"], steps: int = 5) -> Float[Tensor, "*batch rows columns"]:
    """Approximately U Vᵀ of the singular value decomposition: all singular values moved near 1.

    A quintic Newton-Schulz iteration with Jordan's coefficients, which trade an exact limit for speed: singular values
    end between about 0.7 and 1.2. Run in bfloat16, as published.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = (matrix.mT if tall else matrix).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrix.dtype)
