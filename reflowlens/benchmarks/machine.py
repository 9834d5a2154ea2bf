"""The machine that a figure was measured on, in words: kernels and types are chosen by what it has."""

from __future__ import annotations

import torch


def machine(device: str = "cpu") -> str:
    """The processor by its name, how many threads compute, the widest instructions that torch uses, and whether
    bfloat16 is multiplied by the processor itself or imitated.

    Example: ``"AMD EPYC, 2 threads, AVX512, bfloat16 in hardware, torch 2.6.0"``
    """
    from pretraining.machine import has_bfloat16, processor

    where = torch.device(device)
    instructions = [] if where.type == "cuda" else [torch.backends.cpu.get_cpu_capability()]
    bfloat16 = "bfloat16 in hardware" if has_bfloat16(where) else "no fast bfloat16"
    return ", ".join([processor(where), *instructions, bfloat16, f"torch {torch.__version__}"])
