"""Everything that determines a run: its tables, checked one by one and together."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pretraining.config.tables import AUTO, DataConfig, OptimizerConfig, RunConfig
from pretraining.distillation.config import DistillationConfig
from reflowlens.config import ModelConfig
from reflowlens.errors import ReflowlensError

_POSITIVE = (
    "data.context",
    "run.steps",
    "run.batch_size",
    "run.accumulation",
    "run.eval_interval",
    "run.eval_tokens",
    "run.checkpoint_interval",
    "run.keep_checkpoints",
    "optimizer.learning_rate",
    "optimizer.matrix_learning_rate",
    "optimizer.grad_clip",
)
_NOT_NEGATIVE = (
    "run.seed",
    "optimizer.weight_decay",
    "optimizer.warmup_steps",
    "optimizer.embedding_learning_rate",
    "optimizer.matrix_momentum_steps",
)
_SHARES = (
    "optimizer.beta1",
    "optimizer.beta2",
    "run.topk_anneal_fraction",
    "optimizer.decay_fraction",
    "optimizer.final_fraction",
    "optimizer.matrix_momentum",
    "optimizer.matrix_momentum_start",
    "optimizer.average",
)


@dataclass(frozen=True)
class TrainConfig:
    """Everything that determines a run.

    Args:
        distillation: what a student takes from its teacher; None of a run without one.
        overrides: the values that ``--set`` put in place of the file's, by ``table.field``.
    """

    model: ModelConfig
    data: DataConfig
    run: RunConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    distillation: DistillationConfig | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        choices = {
            "optimizer.name": ("adamw", "muon"),
            "optimizer.rest": ("adamw", "sgd", "adam_rows", "muon"),
            "optimizer.matrix_scale": ("narrowing", "widening"),
            "optimizer.matrix_dtype": ("bfloat16", "float32"),
            "optimizer.schedule": ("constant", "cosine", "wsd"),
            "run.dtype": (AUTO, "float32", "bfloat16"),
            "run.sharding": ("none", "zero1", "fsdp"),
            "run.start_rotation": ("none", "signals", "stream"),
        }
        for path, allowed in choices.items():
            if (value := self._get(path)) not in allowed:
                raise ReflowlensError(f"{path} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
        if not isinstance(self.run.compile, bool) and self.run.compile != AUTO:
            raise ReflowlensError(f"run.compile must be true, false or {AUTO!r}, got {self.run.compile!r}")
        for path in _POSITIVE:
            if not self._get(path) > 0:
                raise ReflowlensError(f"{path} must be positive, got {self._get(path)!r}")
        for path in _NOT_NEGATIVE:
            if not self._get(path) >= 0:
                raise ReflowlensError(f"{path} must not be negative, got {self._get(path)!r}")
        for path in _SHARES:
            if not 0 <= self._get(path) <= 1:
                raise ReflowlensError(f"{path} must be between 0 and 1, got {self._get(path)!r}")
        if self.run.topk_anneal_fraction and self.model.topk is None:
            raise ReflowlensError(
                f"run.topk_anneal_fraction must be 0 for architecture {self.model.architecture!r}: only reflow_topk "
                "prunes"
            )
        if self.run.start_rotation != "none" and not self.run.start_from:
            raise ReflowlensError("run.start_rotation rotates the weights of run.start_from, which is not given")
        if self.run.start_from and self.distillation and self.distillation.shares_basis:
            raise ReflowlensError(
                "run.start_from fills all weights, and "
                f"distillation.basis={self.distillation.basis!r} is the teacher's: give one of them"
            )
        if self.optimizer.rest == "sgd" and self.optimizer.decay_all:
            raise ReflowlensError("optimizer.rest sgd decays nothing: set optimizer.decay_all to false")
        if self.data.context > self.model.n_ctx:
            raise ReflowlensError(f"data.context={self.data.context} exceeds model.n_ctx={self.model.n_ctx}")
        if self.run.batch_size % self.run.accumulation:
            raise ReflowlensError(f"run.accumulation must divide run.batch_size={self.run.batch_size}")

    def _get(self, path: str) -> Any:
        section, name = path.split(".")
        return getattr(getattr(self, section), name)

    @property
    def tokens_per_step(self) -> int:
        return self.run.batch_size * self.data.context

    @property
    def weights_seed(self) -> int:
        """Of the first weights: the run's own, of a student moved away from its teacher's."""
        return self.run.seed + (self.distillation.seed_offset if self.distillation else 0)

    def check_sharding(self, world_size: int) -> None:
        """Raise unless so many processes can share out what ``run.sharding`` says; alone, one has everything."""
        if world_size == 1:
            return
        if self.optimizer.average and self.run.sharding == "zero1":
            raise ReflowlensError("optimizer.average goes with run.sharding none or fsdp: of zero1 no process has all")
        if self.optimizer.rest == "adam_rows" and self.run.sharding == "fsdp":
            raise ReflowlensError("optimizer.rest adam_rows goes with run.sharding none or zero1: fsdp cuts its rows")

    def rows_per_process(self, world_size: int) -> int:
        """Examples that a process reads in one forward pass.

        Raises:
            ReflowlensError: the examples of a pass do not divide among the processes.
        """
        rows = self.run.batch_size // self.run.accumulation
        if rows % world_size:
            raise ReflowlensError(
                f"run.batch_size / run.accumulation = {rows} examples do not divide among {world_size} processes"
            )
        return rows // world_size

    def to_dict(self) -> dict[str, Any]:
        """The tables, every field filled in."""
        names = ["data", "optimizer", "run", *(["distillation"] if self.distillation else [])]
        sections = {name: dataclasses.asdict(getattr(self, name)) for name in names}
        return {"model": self.model.to_dict(), **sections}
