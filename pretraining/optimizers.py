"""Optimisers and learning-rate schedules.

Which optimiser commutes with a rotation Q of the residual stream: whether training from rotated weights (E Q, and every
matrix that reads or writes the stream rotated along) ends in the rotated weights, so that it can single out no axis?

==============  ==========================  ======================================================================
of a parameter  rotations                   commutes
==============  ==========================  ======================================================================
embedding       E → E Q                     ``sgd``, ``adam_rows``, ``muon``; not ``adamw``
recipe, basis   gauge R → R Q, B → Qᵀ B;    the same: ``adam_rows`` has one scale for all of B, whose rows the gauge
                stream B → B Q              mixes
block matrices  W → Qᵀ W, W → W Q           ``muon``; not ``adamw``
norm weights    none                        nothing: x ∘ w scales axes, whatever trains w. ``freeze_norms`` leaves w
                                            as it is: one, unless ``run.start_from`` brings others
==============  ==========================  ======================================================================

Decoupled weight decay, clipping by the norm of the whole gradient, averaging, and the Gaussian and orthogonal
initialisation single out no axis either. A run with ``name = "muon"``, a ``rest`` other than ``adamw`` and
``freeze_norms`` on a decoder with RMSNorm, each norm's weights one number, is therefore equivariant as a whole, up to
rounding (``matrix_dtype``, ``run.dtype``: float32) and given a model that is: a LayerNorm, which subtracts the mean
over axes, ReLU or top-k on a recipe, and the refiners of ``ttt_flow`` are not. Under ``rest = "muon"`` biases and other
vectors are AdamW's, and single out axes where there are any.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pretraining.adam_rows import AdamRows
from pretraining.config import OptimizerConfig
from pretraining.shards import cut_like, whole
from reflowlens.models.parts import Norm
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
    """``cfg.name`` over the blocks' matrices and ``cfg.rest`` over the rest; an average of all if asked for.

    Weight decay acts on the blocks' matrices and the signal basis: not on norms, which scale, nor on embeddings and
    recipes, whose rare rows get gradients rarely and would only shrink, unless ``cfg.decay_all`` says so.

    Args:
        names: the parameters to update, if they require gradients; None: all.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad and (names is None or name in names)}
    groups: dict[str, list[dict[str, Any]]] = {}
    for part, (kind, settings) in _parts(cfg).items():
        params = [p for name, p in named.items() if _part_of(name, p) == part]
        alike = [group for group in groups.setdefault(kind, []) if group == {"params": group["params"], **settings}]
        if alike:
            alike[0]["params"] += params
        else:  # without parameters too: every process has the same optimisers
            groups[kind].append({"params": params, **settings})
    optimizers = [_MAKERS[kind](groups[kind], cfg) for kind in _MAKERS if kind in groups]
    if cfg.average:
        optimizers.append(Average(named.values(), cfg.average))  # behind the others: of what they have done
    for group in itertools.chain(*(optimizer.param_groups for optimizer in optimizers)):
        group["peak_lr"] = group["lr"]
    return optimizers


def _parts(cfg: OptimizerConfig) -> dict[str, tuple[str, dict[str, Any]]]:
    """What updates each part of a model, and with which settings of its own."""
    decay = {"weight_decay": cfg.weight_decay}
    rest_decay = {"weight_decay": cfg.weight_decay if cfg.decay_all else 0.0}
    ends = rest_decay | ({"lr": cfg.embedding_learning_rate} if cfg.embedding_learning_rate else {})
    vectors = "adamw" if cfg.rest == "muon" else cfg.rest
    columns, rows = ({"shared_axis": axis} if cfg.rest == "adam_rows" else {} for axis in (0, -1))
    return {
        "matrices": (cfg.name, decay),
        "basis": (cfg.rest, {"weight_decay": 0.0} if cfg.rest == "sgd" else decay),
        "others": (vectors, rest_decay),
        "token columns": (cfg.rest, ends | columns),
        "token rows": (cfg.rest, ends | rows),
        "vectors at the ends": (vectors, ends),
    }


def updated_by(cfg: OptimizerConfig, name: str, parameter: Tensor) -> str:
    """Which optimiser, by its name in ``[optimizer]``, takes the steps of a parameter."""
    return _parts(cfg)[_part_of(name, parameter)][0]


def _part_of(name: str, parameter: Tensor) -> str:
    if is_block_matrix(name):
        return "matrices"
    if name == "embed.W_basis":
        return "basis"
    if not name.startswith(ENDS):
        return "others"
    if parameter.ndim != 2:
        return "vectors at the ends"
    return "token columns" if name == "unembed.W_U" else "token rows"


_Maker = Callable[[list[dict[str, Any]], OptimizerConfig], torch.optim.Optimizer]
_MAKERS: dict[str, _Maker] = {
    "adamw": lambda groups, cfg: torch.optim.AdamW(
        groups, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), fused=True
    ),
    "sgd": lambda groups, cfg: torch.optim.SGD(groups, lr=cfg.learning_rate, momentum=cfg.beta1),
    "adam_rows": lambda groups, cfg: AdamRows(groups, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2)),
    "muon": lambda groups, cfg: Muon(
        groups,
        lr=cfg.matrix_learning_rate,
        scale=cfg.matrix_scale,
        momentum=cfg.matrix_momentum,
        dtype=getattr(torch, cfg.matrix_dtype),
    ),
}


def freeze_norms(model: nn.Module) -> None:
    """Keep every norm's weight, and its bias, as it is."""
    for module in model.modules():
        if isinstance(module, Norm):
            module.requires_grad_(False)


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

    Args:
        dtype: in which steps are orthogonalised (:func:`orthogonalize`).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        scale: str = "widening",
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        settings = {"lr": lr, "scale": scale, "momentum": momentum, "weight_decay": weight_decay, "dtype": dtype}
        super().__init__(params, settings)

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
                direction = cut_like(orthogonalize(whole(nesterov), group["dtype"]), like=p)
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


def orthogonalize(
    matrix: Float[Tensor, "*batch rows columns"], dtype: torch.dtype = torch.bfloat16, steps: int = 5
) -> Float[Tensor, "*batch rows columns"]:
    """Approximately U Vᵀ of the singular value decomposition: all singular values moved near 1.

    A quintic Newton-Schulz iteration with Jordan's coefficients, which trade an exact limit for speed: singular values
    end between about 0.7 and 1.2. A polynomial in the matrix, so that it commutes with rotations of rows and columns.

    Args:
        dtype: in which it runs: bfloat16, as published, rounds coordinate by coordinate to three digits. A wider one
            runs in that of the matrix, if that is wider still.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[-2] > matrix.shape[-1]
    wide = dtype if dtype == torch.bfloat16 else torch.promote_types(dtype, matrix.dtype)
    x = (matrix.mT if tall else matrix).to(wide)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrix.dtype)
