"""GPT-2-New: the baseline that reFlow is compared with, a modern decoder whose embedding is one matrix."""

from __future__ import annotations

from reflowlens.models.decoder import Decoder


class GPT2New(Decoder):
    """Rotary positions (halves rotated), SwiGLU, RMSNorm, tied embedding: the shared decoder and nothing else."""
