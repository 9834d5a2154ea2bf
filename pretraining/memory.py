"""What a training run holds in the memory of a GPU, foreseen from its configuration."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass

import torch

from pretraining.config import TrainConfig
from pretraining.optimizers import is_block_matrix
from pretraining.replicas import owners
from reflowlens.config import ModelConfig
from reflowlens.models import build_model
from reflowlens.models.loss import cross_entropy
from reflowlens.models.reflow import forming_is_cheaper

_WIDE = 4  # bytes of a float32 number
_LOGIT_COPIES = 3  # float32 copies of a chunk's logits that the loss holds at once: logits, log-probabilities, gradient


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the worst moment of a step. CUDA's own context and workspaces come on top.

    Args:
        weights: in float32, and the bfloat16 copies that autocast makes of matrices.
        gradients: in float32; under FSDP2 whole where a step has several passes, whose sum is shared once.
        optimizer_state: AdamW's two moments, Muon's one, in float32.
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
    sizes = {name: p.numel() for name, p in build_model(cfg.model, device="meta").named_parameters()}
    sharding, width = cfg.run.sharding if gpus > 1 else "none", _width(cfg)
    total, in_blocks = sum(sizes.values()), sum(n for name, n in sizes.items() if name.startswith("blocks."))
    state = {name: n * _state_width(cfg, name) for name, n in sizes.items()}
    weights = gradients = float(_WIDE * total)
    optimizer = float(sum(state.values()))
    copied = [n for name, n in sizes.items() if _is_matrix(name)]
    if sharding == "zero1":
        owner = owners(sizes, gpus)
        optimizer = float(max(sum(state[name] for name in sizes if owner[name] == rank) for rank in range(gpus)))
    if sharding == "fsdp":
        # The slices; whole while a pass lasts: what is outside the blocks, and two blocks, one of them on its way.
        outside, block = _WIDE * (total - in_blocks), in_blocks / cfg.model.n_layers
        weights = _WIDE * total / gpus + outside + 2 * width * block
        if cfg.run.accumulation == 1:
            gradients = _WIDE * total / gpus + outside + width * block
        optimizer /= gpus
        copied = [n for name, n in sizes.items() if _is_matrix(name) and not is_block_matrix(name)]
    activations, readout = activation_bytes(cfg.model, cfg.rows_per_process(gpus) * cfg.data.context, width)
    return Memory(
        weights=weights + (width * sum(copied) if width < _WIDE else 0),
        gradients=gradients,
        optimizer_state=optimizer,
        activations=activations,
        readout=readout + loss_chunk() * cfg.model.d_vocab * (_LOGIT_COPIES * _WIDE + width),
    )


def _is_matrix(name: str) -> bool:
    """Whether matrix products read the parameter, so that autocast copies it."""
    return name.rsplit(".", 1)[-1].startswith("W_") and name != "pos_embed.W_pos"


def _state_width(cfg: TrainConfig, name: str) -> int:
    return _WIDE if cfg.optimizer.name == "muon" and is_block_matrix(name) else 2 * _WIDE


def activation_bytes(cfg: ModelConfig, n: int, width: int) -> tuple[float, float]:
    """What one forward pass over ``n`` positions keeps for its backward pass: in the model, and in the readout.

    Counted for the blocks as they are written, attention by a kernel that keeps no scores. Per position and layer: each
    norm keeps its input, what it made of it and its scale in float32; each matrix product its input in ``width``
    bytes, for which autocast copies it anew; attention queries, keys, values, its output and a float32 sum a head; the
    MLP every activation of width ``d_mlp``. The readout's loss keeps its gradients by its two factors.

    Args:
        width: bytes of a number in matrix products: 4, or 2 under autocast.
    """
    if cfg.architecture == "bdh":
        return _bdh_activation_bytes(cfg, n, width), float(_WIDE * cfg.d_model * (n + cfg.d_vocab))
    d, heads = cfg.d_model, cfg.n_heads * cfg.d_head
    key_values = cfg.kv_heads * cfg.d_head
    norm = _WIDE * (2 * d + 1)
    readers = 3 + (2 if cfg.gated_mlp else 1)  # of the two norms' outputs; a float32 one is kept once for all of them
    copies = readers if width < _WIDE else 2
    block = (
        2 * norm
        + copies * width * d
        + width * (2 * heads + 2 * key_values)
        + _WIDE * cfg.n_heads
        + width * cfg.d_mlp * (4 if cfg.gated_mlp else 2)
    )
    ends = norm + 2 * 8  # the final norm, and the ids of inputs and targets
    signals = cfg.n_signals or 0
    model = float(n * (cfg.n_layers * block + ends + width * signals))
    if not signals:
        return model, float(_WIDE * d * (n + cfg.d_vocab))
    recipe, basis = torch.empty(cfg.d_vocab, signals, device="meta"), torch.empty(signals, d, device="meta")
    if cfg.topk is not None:
        # The rectified recipe, where its largest entries are, and the pruned recipe where no 16-bit copy stands for it.
        model += cfg.d_vocab * (_WIDE * signals * (2 if width == _WIDE else 1) + 8 * cfg.topk)
    if forming_is_cheaper(n, recipe, basis):
        return model, float(_WIDE * d * n + width * d * cfg.d_vocab)
    return model + width * d * n, float(width * signals * n + _WIDE * signals * cfg.d_vocab)


def _bdh_activation_bytes(cfg: ModelConfig, n: int, width: int) -> float:
    """Of BDH's levels: both rectified readings, the turned neurons and the product of both, one more where some are
    dropped; a head's find with its norm, and the stream. Scores and tables of angles, which depend on how the positions
    are cut into texts, are left out: together a few percent.
    """
    neurons = cfg.d_mlp * width * (4 + (cfg.dropout > 0))
    narrow = cfg.d_model * (cfg.n_heads * (_WIDE + 2 * width) + 3 * _WIDE + width)
    return float(n * (cfg.n_layers * (neurons + narrow) + _WIDE * 2 * cfg.d_model))


def loss_chunk() -> int:
    """Positions whose logits the loss holds at once."""
    return int(inspect.signature(cross_entropy).parameters["chunk"].default)


def _width(cfg: TrainConfig) -> int:
    return _WIDE if cfg.run.dtype == "float32" else 2  # a GPU's "auto" is bfloat16
