"""What a training run holds in the memory of a GPU, foreseen from its configuration."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor

from pretraining.config import TrainConfig
from pretraining.optimizers import is_block_matrix, updated_by
from pretraining.replicas import owners
from reflowlens.models import MODEL_CLASSES, build_model
from reflowlens.models.architecture import FLOAT32
from reflowlens.models.loss import CHUNK

_LOGIT_COPIES = 1  # float32 copies of a chunk's logits that the loss holds at once: it works in place


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the worst moment of a step. CUDA's own context and workspaces come on top.

    Args:
        weights: in float32, and the bfloat16 copies that autocast makes of matrices.
        gradients: in float32; under FSDP2 whole where a step has several passes, whose sum is shared once.
        optimizer_state: AdamW's two moments, the others' one, in float32.
        activations: what a forward pass keeps for its backward pass if nothing is recomputed; less if compiled.
        readout: one chunk of logits with what the loss makes of it, and the gradients that it already holds.
    """

    weights: float
    gradients: float
    optimizer_state: float
    activations: float
    readout: float

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))


def memory_per_gpu(cfg: TrainConfig, gpus: int) -> Memory:
    """The memory of each GPU, or of the fullest of them; nothing is allocated.

    Raises:
        ReflowlensError: the batch does not divide among the GPUs.
    """
    parameters = dict(build_model(cfg.model, device="meta").named_parameters())
    sizes = {name: p.numel() for name, p in parameters.items()}
    sharding, width = cfg.run.sharding if gpus > 1 else "none", _width(cfg)
    total, in_blocks = sum(sizes.values()), sum(n for name, n in sizes.items() if name.startswith("blocks."))
    state = {name: n * _state_width(cfg, name, parameters[name]) for name, n in sizes.items()}
    weights = gradients = float(FLOAT32 * total)
    optimizer = float(sum(state.values()))
    copied = [n for name, n in sizes.items() if _is_matrix(name)]
    if sharding == "zero1":
        owner = owners(sizes, gpus)
        optimizer = float(max(sum(state[name] for name in sizes if owner[name] == rank) for rank in range(gpus)))
    if sharding == "fsdp":
        # The slices; whole while a pass lasts: what is outside the blocks, and two blocks, one of them on its way.
        outside, block = FLOAT32 * (total - in_blocks), in_blocks / cfg.model.n_layers
        weights = FLOAT32 * total / gpus + outside + 2 * width * block
        if cfg.run.accumulation == 1:
            gradients = FLOAT32 * total / gpus + outside + width * block
        optimizer /= gpus
        copied = [n for name, n in sizes.items() if _is_matrix(name) and not is_block_matrix(name)]
    n = cfg.rows_per_process(gpus) * cfg.data.context
    activations, readout = MODEL_CLASSES[cfg.model.architecture].activation_bytes(cfg.model, n, width)
    return Memory(
        weights=weights + (width * sum(copied) if width < FLOAT32 else 0),
        gradients=gradients,
        optimizer_state=optimizer,
        activations=activations,
        readout=readout + loss_chunk() * cfg.model.d_vocab * (_LOGIT_COPIES * FLOAT32 + width),
    )


def _is_matrix(name: str) -> bool:
    """Whether matrix products read the parameter, so that autocast copies it."""
    return name.rsplit(".", 1)[-1].startswith("W_") and name != "pos_embed.W_pos"


def _state_width(cfg: TrainConfig, name: str, parameter: Tensor) -> int:
    """Bytes an entry; the scale that a row shares under ``adam_rows`` is not counted."""
    moments = 2 if updated_by(cfg.optimizer, name, parameter) == "adamw" else 1
    return FLOAT32 * (moments + (cfg.optimizer.average > 0))


def loss_chunk() -> int:
    """Positions whose logits the loss holds at once."""
    return CHUNK


def _width(cfg: TrainConfig) -> int:
    return FLOAT32 if cfg.run.dtype == "float32" else 2  # a GPU's "auto" is bfloat16
