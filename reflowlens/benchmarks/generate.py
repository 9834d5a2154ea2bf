"""Greedy generation beside that of transformers from the same weights, and the factored readout beside one matrix."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from reflowlens.benchmarks.table import Row
from reflowlens.benchmarks.timing import comparison
from reflowlens.checkpoints import load_model
from reflowlens.conversion import export_hf
from reflowlens.errors import ReflowlensError
from reflowlens.models import build_model
from reflowlens.models.base import HookedModel

_PROMPT = 16  # tokens


def bench_generate(
    batches: Sequence[int] = (1, 64), new_tokens: int = 48, rounds: int = 5, model: HookedModel | None = None
) -> Iterator[Row]:
    """Greedy continuations of random prompts of 16 tokens, by both libraries from the same weights.

    Args:
        batches: rows that are continued at once.
        new_tokens: of each row.
        model: a reFlow (default: reflow-nano).

    Yields:
        Two rows a batch, as of :func:`~reflowlens.benchmarks.timing.comparison`: against transformers, whose tokens
        must be the same, and against a GPT-2-New of equal shape, whose readout is one matrix.

    Raises:
        ReflowlensError: the two libraries generate other tokens.
    """
    model = model or load_model("reflow-nano")
    shape = dataclasses.replace(
        model.cfg, architecture="gpt2_new", n_signals=None, topk=None, basis_init="gpt2", model_name=""
    )
    one_matrix, exported = build_model(shape), _in_transformers(model)
    for batch in batches:
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(model.cfg.d_vocab // 2, (batch, _PROMPT), generator=generator)
        ours, unfactored = (partial(_ours, each, prompts, new_tokens) for each in (model, one_matrix))
        theirs = partial(_theirs, exported, prompts, new_tokens)
        same = ours() == theirs()
        if not same.all():
            raise ReflowlensError(f"transformers generates other tokens in {int((~same).any(1).sum())} of {batch} rows")
        what = f"{new_tokens} tokens, batch {batch}, {model.cfg.model_name or model.cfg.architecture}"
        yield comparison(f"transformers' generate, {what}", ours, theirs, rounds)
        yield comparison(f"GPT-2-New of equal shape, {what}", ours, unfactored, rounds)


def _ours(model: HookedModel, prompts: Int[Tensor, "batch pos"], n: int) -> Tensor:
    settings = {"do_sample": False, "stop_at_eos": False, "return_type": "tokens", "progress": False}
    return model.generate(prompts, n, **settings)


def _theirs(model: Any, prompts: Int[Tensor, "batch pos"], n: int) -> Tensor:
    settings = {"max_new_tokens": n, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(prompts, attention_mask=torch.ones_like(prompts), **settings)


def _in_transformers(model: HookedModel) -> Any:
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        return AutoModelForCausalLM.from_pretrained(export_hf(model, Path(folder) / "exported")).eval()
