"""The families of decoders that transformers saves, each as a table of names, fields and traits."""

from __future__ import annotations

from reflowlens.conversion.families.family import Family
from reflowlens.conversion.families.table import FAMILIES, GPT2, LLAMA

__all__ = ["FAMILIES", "GPT2", "LLAMA", "Family"]
