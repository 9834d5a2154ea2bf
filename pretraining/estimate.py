"""What a run will cost, before it starts: parameters, tokens, operations, memory of a GPU and time.

reflowlens train CONFIG --dry-run --gpus 4 --flops A100 --mfu 0.4
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from datetime import timedelta

import torch

from pretraining.annealing import topk_of_step, topk_stages
from pretraining.config import AUTO, TrainConfig
from pretraining.memory import Memory, loss_chunk, memory_per_gpu
from reflowlens.errors import ReflowlensError
from reflowlens.flops import named_peak_flops, training_flops_per_token
from reflowlens.models import build_model
from reflowlens.models.base import HookedModel


@dataclass(frozen=True)
class Estimate:
    """What a run will cost.

    Args:
        rows: examples of one forward pass on one GPU.
        parameters_outside_embedding: without what reads and writes the vocabulary, and without learned positions.
        flops_per_token: of forward and backward, as :func:`reflowlens.flops.training_flops_per_token` counts them.
        memory: of each GPU; of a k that is annealed, while it is largest.
        rate: tokens a second of all GPUs together, if given or derived from a peak.
    """

    cfg: TrainConfig
    gpus: int
    rows: int
    parameters: int
    parameters_outside_embedding: int
    flops_per_token: float
    memory: Memory
    rate: float | None

    @property
    def tokens(self) -> int:
        return self.cfg.run.steps * self.cfg.tokens_per_step

    @property
    def flops(self) -> float:
        return self.tokens * self.flops_per_token

    @property
    def seconds(self) -> float | None:
        return None if self.rate is None else self.tokens / self.rate

    @property
    def _sums_whole(self) -> bool:
        return self.gpus > 1 and self.cfg.run.sharding == "fsdp" and self.cfg.run.accumulation > 1

    def _annealing(self) -> list[str]:
        """What an annealed k does, in a line."""
        kept = self.cfg.model.topk
        stages = topk_stages(self.cfg)
        if all(k == kept for _, k in stages):
            return []
        (_, first), *later = stages
        falls = [", ".join(f"{k} from step {step:,}" for step, k in later)] if later else []
        return [
            _line("signals a token keeps", f"{first} at first", "; ".join([*falls, f"evaluated and saved: {kept}"]))
        ]

    def __str__(self) -> str:
        cfg, run = self.cfg, self.cfg.run
        passes = f"{run.accumulation} forward pass{'es' * (run.accumulation > 1)} a step"
        lines = [
            f"{cfg.model.model_name or cfg.model.architecture} on {self.gpus} GPU{'s' * (self.gpus > 1)}, "
            f"sharding {run.sharding!r}, {run.dtype}, {cfg.optimizer.name}, schedule {cfg.optimizer.schedule!r}",
            _line("parameters", f"{self.parameters:,}"),
            _line("  outside the embedding", f"{self.parameters_outside_embedding:,}"),
            _line("tokens a step", f"{cfg.tokens_per_step:,}", f"{run.batch_size} examples of {cfg.data.context}"),
            _line("  a GPU and pass", f"{self.rows * cfg.data.context:,}", f"{self.rows} examples, {passes}"),
            _line("tokens in all", f"{self.tokens:,}", f"{run.steps:,} steps"),
            *self._annealing(),
            _line("FLOPs a token", f"{self.flops_per_token:.4g}", "matrix products, forward and backward; causal"),
            _line("FLOPs in all", f"{self.flops:.4g}"),
            _line("memory per GPU", _gib(self.memory.total), "plus CUDA's context and workspaces"),
        ]
        remarks = {
            "weights": "float32, and bfloat16 copies of matrices" if run.dtype == "bfloat16" else "float32",
            "gradients": "float32, whole until a step's passes are summed" if self._sums_whole else "float32",
            "optimizer_state": "float32 moments: AdamW two, others one",
            "activations": "kept for the backward pass, nothing recomputed; less if compiled",
            "readout": f"a chunk of {loss_chunk()} positions' logits, and the loss's gradients",
        }
        lines += [
            _line("  " + name.replace("_", " "), _gib(getattr(self.memory, name)), remarks[name]) for name in remarks
        ]
        if self.rate is None:
            lines.append(_line("time", "?", "give --rate, or --flops and --mfu"))
        else:
            time = str(timedelta(seconds=round(self.tokens / self.rate)))
            lines.append(_line("time", time, f"at {self.rate:,.0f} tokens/s"))
        return "\n".join(lines)


def estimate(
    cfg: TrainConfig,
    *,
    gpus: int = 1,
    rate: float | None = None,
    flops: str | float | None = None,
    mfu: float | None = None,
) -> Estimate:
    """Foresee a run; nothing is computed or allocated.

    Args:
        gpus: how many share it.
        rate: tokens a second of all of them together.
        flops: instead of a rate, the peak of one in operations a second, or its name.
        mfu: the share of the peak that training reaches; 0.4 unless given.

    Raises:
        ReflowlensError: the batch does not divide among the GPUs, they cannot share out what ``run.sharding`` says, or
            a rate cannot be derived from what is given.

    >>> from pretraining.config import load_config
    >>> found = estimate(load_config("reflow_1_big"), gpus=4, flops="A100")
    >>> found.parameters, found.tokens
    (515056640, 9011200000)
    """
    if gpus < 1:
        raise ReflowlensError(f"gpus must be positive, got {gpus}")
    if cfg.run.dtype == AUTO:  # what it is on a GPU
        cfg = dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, dtype="bfloat16"))
    cfg.check_sharding(gpus)
    rows = cfg.rows_per_process(gpus)
    model = build_model(cfg.model, device="meta")
    at_first = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, topk=topk_of_step(0, cfg)))
    flops_per_token = training_flops_per_token(cfg.model, cfg.data.context, batch=rows)
    return Estimate(
        cfg=cfg,
        gpus=gpus,
        rows=rows,
        parameters=model.n_parameters,
        parameters_outside_embedding=parameters_outside_embedding(model),
        flops_per_token=flops_per_token,
        memory=memory_per_gpu(at_first, gpus),
        rate=_given(rate, mfu) if flops is None else gpus * _reached(cfg, rate, flops, mfu) / flops_per_token,
    )


def parameters_outside_embedding(model: HookedModel) -> int:
    """How many parameters are not of the token, position or output embedding: those of blocks and norms."""
    vocabulary = ("embed.", "pos_embed.", "unembed.")
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith(vocabulary))


def _given(rate: float | None, mfu: float | None) -> float | None:
    if mfu is not None:
        raise ReflowlensError("--mfu is a share of --flops: give that too")
    if rate is not None and not rate > 0:
        raise ReflowlensError(f"--rate must be positive, got {rate}")
    return rate


def _reached(cfg: TrainConfig, rate: float | None, flops: str | float, mfu: float | None) -> float:
    """Operations a second on one GPU."""
    if rate is not None:
        raise ReflowlensError("give --rate, or --flops and --mfu, not both")
    share = 0.4 if mfu is None else mfu
    if not 0 < share <= 1:
        raise ReflowlensError(f"--mfu must be between 0 and 1, got {mfu}")
    try:
        peak: float | None = float(flops)
    except ValueError:
        peak = named_peak_flops(str(flops), getattr(torch, cfg.run.dtype))
    if peak is None or not peak > 0:
        raise ReflowlensError(
            f"--flops {flops} is neither a number of operations a second, such as 312e12, nor a GPU whose peak in "
            f"{cfg.run.dtype} is known, such as A100 or H100"
        )
    return peak * share


def _line(name: str, value: str, remark: str = "") -> str:
    return f"{name:<24}{value:>22}  {remark}".rstrip()


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
