"""A training step of a model, and the same step taken in three other ways."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reflowlens.benchmarks.variants import NANO, as_llama, forming, without_hook_points
from reflowlens.config import ModelConfig, preset
from reflowlens.errors import ReflowlensError
from reflowlens.models import build_model

OURS = "reflowlens"
VARIANTS = {
    OURS: "as trained: R and B in turn, loss in chunks of positions",
    "forming E": "E = R B formed each step, whole logits, F.cross_entropy",
    "no hooks": "as trained, without HookPoints",
    "transformers": "LlamaForCausalLM, R B merged into one tied matrix, its own loss",
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class TrainBench:
    """What is trained, and how.

    Args:
        model: the model's shape.
        batch, context: examples of a step and tokens of each.
        dtype: of matrix products, under autocast; weights and optimiser are float32.
        device: where.
        compiled: whether every variant goes through ``torch.compile``, as in pretraining by default.

    Raises:
        ReflowlensError: a value is not possible, or the device is not there.
    """

    model: ModelConfig
    batch: int = 16
    context: int = 256
    dtype: str = "bfloat16"
    device: str = "cpu"
    compiled: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ReflowlensError(f"dtype must be one of {', '.join(map(repr, DTYPES))}, got {self.dtype!r}")
        if min(self.batch, self.context) < 1:
            raise ReflowlensError(f"batch and context must be positive, got {self.batch} and {self.context}")
        if self.context > self.model.n_ctx:
            raise ReflowlensError(f"context {self.context} exceeds the model's n_ctx={self.model.n_ctx}")
        if not (self.on_gpu or self.device == "cpu"):
            raise ReflowlensError(f"device must be 'cpu' or 'cuda', got {self.device!r}")
        if self.on_gpu and not torch.cuda.is_available():
            raise ReflowlensError(f"cannot compute on device {self.device!r}: torch sees no GPU")

    @classmethod
    def named(cls, name: str | None = None, *, device: str = "cpu", **changes: Any) -> TrainBench:
        """A published configuration, or ``"reflow_nano"``, at its full context.

        The default is small enough for the device: on a GPU reflow_1_small, compiled; on a CPU reflow_nano, eager. The
        type of products is bfloat16 where the processor multiplies in it, otherwise float32.

        Args:
            changes: other fields; those that are None keep their default.

        Raises:
            ReflowlensError: there is no such preset, or as above.
        """
        from pretraining.machine import has_bfloat16

        on_gpu = device.startswith("cuda")
        dtype = "bfloat16" if has_bfloat16(torch.device("cuda" if on_gpu else "cpu")) else "float32"
        name = name or ("reflow_1_small" if on_gpu else NANO.model_name)
        model = NANO if name == NANO.model_name else preset(name)
        given = {field: value for field, value in changes.items() if value is not None}
        defaults: dict[str, Any] = {"context": model.n_ctx, "compiled": on_gpu, "dtype": dtype}
        return cls(model=model, device=device, **defaults | given)

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * self.context

    @property
    def variants(self) -> list[str]:
        """Those that there are: no Llama has GPT-2's shape."""
        from reflowlens.conversion.families import LLAMA

        return [name for name in VARIANTS if name != "transformers" or LLAMA.fits(self.model)]


def model_and_loss(bench: TrainBench, variant: str) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    """A fresh model of a variant, and its mean loss over inputs and targets [batch, context]."""
    if variant == "transformers":
        llama = as_llama(dataclasses.replace(bench.model, device=bench.device))
        return llama, lambda x, y: llama(input_ids=x, labels=y, shift_labels=y, use_cache=False).loss
    model = build_model(bench.model, device=bench.device)
    if variant == "forming E":
        formed = forming(model)
        return formed, lambda x, y: F.cross_entropy(formed(x).flatten(0, 1).float(), y.flatten())
    if variant == "no hooks":
        model = without_hook_points(model)
    return model, lambda x, y: model(x, "loss", targets=y)


def training_step(bench: TrainBench, variant: str) -> Callable[[], None]:
    """A step of a fresh model with an optimiser of its own: forward, backward, clipping, fused AdamW."""
    model, loss = model_and_loss(bench, variant)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(bench.model.d_vocab, (bench.batch, bench.context + 1), generator=generator)
    x, y = (part.contiguous().to(bench.device) for part in (tokens[:, :-1], tokens[:, 1:]))
    forward = torch.compile(loss) if bench.compiled else loss
    dtype = DTYPES[bench.dtype]

    def step() -> None:
        with torch.autocast(torch.device(bench.device).type, dtype, enabled=dtype != torch.float32):
            value = forward(x, y)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
