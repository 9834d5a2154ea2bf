"""What a forward pass and a training step cost in floating-point operations, and the share of a GPU's peak they reach.

Only matrix products are counted, a multiplication and its addition as two operations: norms, activations, rotary
turns, the softmax and top-k selection are left out, as is usual.
"""

from __future__ import annotations

import re

import torch

from reflowlens.config import ModelConfig
from reflowlens.models import MODEL_CLASSES


def forward_flops_by_part(cfg: ModelConfig, context: int, *, batch: int = 1) -> dict[str, float]:
    """Operations of one forward pass a token, by part of the model, as its architecture declares them.

    ``attention_mixing``, the scores q kᵀ and the weighted values, is counted **causally**: the query at position p has
    p + 1 keys, (context + 1) / 2 in the mean, the half of the square that a causal kernel computes. Counts of the whole
    square (PaLM's, ``torch.utils.flop_counter``'s) are 2 context / (context + 1) times as large in this part.

    A factored embedding is counted as the model executes it: R[t] B at the input; at the output (x Bᵀ) Rᵀ, or, when
    the pass is long enough for that to be cheaper, forming E = R B once (``forming``) and x Eᵀ. A lookup costs nothing.

    Args:
        context: tokens of an example.
        batch: examples of one pass, which decides with ``context`` whether a factored readout forms E.
    """
    return MODEL_CLASSES[cfg.architecture].forward_flops(cfg, context, batch)


def forward_flops_per_token(cfg: ModelConfig, context: int, *, batch: int = 1) -> float:
    """Operations of one forward pass a token: the sum of :func:`forward_flops_by_part`.

    >>> from reflowlens.config import preset
    >>> f"{forward_flops_per_token(preset('reflow_1_small'), 1024):.4g}"
    '9.975e+07'
    """
    return sum(forward_flops_by_part(cfg, context, batch=batch).values())


def training_flops_per_token(cfg: ModelConfig, context: int, *, batch: int = 1) -> float:
    """Operations of a forward and a backward pass a token: three times the forward pass.

    Each product of the forward has two of its size in the backward, the gradients of its two factors. What a kernel
    computes twice to save memory (the scores in a flash backward, checkpointed activations) is not counted, nor is the
    optimiser, so that utilisation compares models and not implementations.

    Args:
        context: tokens of an example.
        batch: examples of one forward pass: a micro-batch where gradients are accumulated.
    """
    return 3 * forward_flops_per_token(cfg, context, batch=batch)


# TFLOP/s of dense matrix products (no structured sparsity), accumulated in float32, as NVIDIA's data sheets give them.
# The columns are float16, bfloat16, TF32, float32; None where the chip has no such units.
_PEAKS: dict[str, tuple[float | None, float | None, float | None, float]] = {
    "T4": (65, None, None, 8.1),
    "V100 SXM2": (125, None, None, 15.7),
    "V100 PCIE": (112, None, None, 14),
    "RTX 3090": (71, 71, 35.6, 35.6),
    "A10": (125, 125, 62.5, 31.2),
    "A100": (312, 312, 156, 19.5),
    "RTX 4090": (165.2, 165.2, 82.6, 82.6),
    "L4": (121, 121, 60, 30.3),
    "L40S": (362, 362, 183, 91.6),
    "H100": (989.4, 989.4, 494.7, 66.9),
    "H100 PCIE": (756, 756, 378, 51.2),
    "H100 NVL": (835.5, 835.5, 417.5, 60),
    "H200": (989.4, 989.4, 494.7, 66.9),
    "H200 NVL": (835.5, 835.5, 417.5, 60),
}
_ANOTHER_CHIP = {"TI", "SUPER", "D", "LAPTOP", "MIG"}  # "RTX 3090 Ti" is no RTX 3090, and a MIG slice no whole GPU


def peak_flops(device: torch.device | str, dtype: torch.dtype) -> float | None:
    """Operations a second that a device can do at most in matrix products of this type.

    float32 products count as TF32 where ``torch.set_float32_matmul_precision`` lets them run so.

    Returns:
        None where the figure is not known: a GPU outside the table, a type that it has no units for, or a CPU
        (``reflowlens bench train`` measures one).
    """
    device = torch.device(device)
    if device.type != "cuda":
        return None
    return named_peak_flops(
        torch.cuda.get_device_name(device), dtype, tf32=torch.get_float32_matmul_precision() != "highest"
    )


def named_peak_flops(name: str, dtype: torch.dtype, *, tf32: bool = False) -> float | None:
    """:func:`peak_flops` of the GPU that CUDA calls ``name``.

    >>> named_peak_flops("NVIDIA A100-SXM4-80GB", torch.bfloat16)
    312000000000000.0
    """
    words = set(re.split(r"[^A-Z0-9]+", name.upper()))
    known = [key for key in _PEAKS if set(key.split()) <= words]
    if not known or words & _ANOTHER_CHIP:
        return None
    half, brain, short, single = _PEAKS[max(known, key=len)]
    peaks = {torch.float16: half, torch.bfloat16: brain, torch.float32: short if tf32 and short else single}
    peak = peaks.get(dtype)
    return None if peak is None else peak * 1e12


def mfu(tokens_per_second: float, flops_per_token: float, peak: float | None) -> float | None:
    """Model FLOPs utilisation (Chowdhery et al., 2022): the share of the peak that the model's operations amount to.

    Args:
        flops_per_token: :func:`training_flops_per_token`, or of the forward pass alone for inference.
        peak: of all devices together; None, unknown, gives None.

    >>> mfu(1e6, 1e8, 312e12)
    0.32051282051282054
    """
    return None if peak is None else tokens_per_second * flops_per_token / peak
