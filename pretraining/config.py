"""A training run as a TOML file: four tables, or five of a student's, each a frozen dataclass, every field checked.

Shipped with the package, and known by their bare names, are the published family and its small relatives
(``pretraining/configs``).
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pretraining.distillation.config import DistillationConfig
from reflowlens.config import ModelConfig, nearest, preset
from reflowlens.errors import ReflowlensError
from reflowlens.ttt_flow_config import TTTFlowConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


CONFIGS = Path(__file__).parent / "configs"
AUTO = "auto"
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
class DataConfig:
    """``[data]``: a folder made by ``reflowlens prepare``, and how many tokens a training example has."""

    folder: str
    context: int


@dataclass(frozen=True)
class OptimizerConfig:
    """``[optimizer]``.

    Args:
        name: of the blocks' matrices: ``adamw`` or ``muon``.
        rest: of everything else: ``adamw``; ``sgd``, with momentum ``beta1`` and without weight decay; ``adam_rows``,
            AdamW whose scale all coordinates of a token's row share, and all entries of anything else (the basis, a
            norm's weight); or ``muon`` for tables and basis, with AdamW for vectors. Which of them single out no axis:
            :mod:`pretraining.optimizers`.
        freeze_norms: leave the norms' weights as the run finds them: at one, or as ``run.start_from`` has them. Where
            they are not one number a norm, each scales an axis of the stream by itself, whatever trains them.
        learning_rate: the peak rate of what Muon does not update.
        embedding_learning_rate: that of the tables at both ends (embedding, recipe, pairs and values of tokens); 0: the
            same as of the rest of their optimiser.
        matrix_learning_rate: Muon's peak rate, the spectral norm of a step on a square matrix.
        matrix_scale: which other matrices take larger steps under Muon, by the square root of their sides' ratio:
            ``widening``, those with more outputs than inputs, as published (Jordan et al., 2024); or ``narrowing``,
            those with fewer, as the packaged models were trained.
        matrix_dtype: in which Muon orthogonalises: ``bfloat16``, as published, or ``float32``, which rounds too little
            to single out an axis, and is faster where the processor only imitates bfloat16.
        matrix_momentum: Muon's momentum, reached from ``matrix_momentum_start`` over ``matrix_momentum_steps`` steps.
        weight_decay: decoupled, on the blocks' matrices and the signal basis.
        decay_all: on everything else too.
        grad_clip: largest norm of the whole gradient; ``inf`` never clips.
        schedule: after a linear warm-up ``constant``, ``cosine`` down to ``final_fraction`` of the peak, or ``wsd``,
            constant and then linear down to it over the last ``decay_fraction`` of the steps.
        average: decay of an exponential moving average of the weights, which validation losses are then of; it is
            written beside each checkpoint's own weights, in its folder ``average``. 0: none is kept.
    """

    name: str = "adamw"
    rest: str = "adamw"
    freeze_norms: bool = False
    learning_rate: float = 6e-4
    embedding_learning_rate: float = 0.0
    matrix_learning_rate: float = 0.01
    matrix_scale: str = "narrowing"
    matrix_dtype: str = "bfloat16"
    matrix_momentum: float = 0.95
    matrix_momentum_start: float = 0.95
    matrix_momentum_steps: int = 0
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    decay_all: bool = False
    grad_clip: float = 1.0
    schedule: str = "cosine"
    warmup_steps: int = 100
    decay_fraction: float = 0.2
    final_fraction: float = 0.1
    average: float = 0.0


@dataclass(frozen=True)
class RunConfig:
    """``[run]``.

    Args:
        steps: optimiser steps; tokens seen are ``steps * batch_size * context``.
        batch_size: examples a step, over all processes and accumulation steps.
        accumulation: forward passes a step.
        dtype: ``bfloat16`` runs matrix products under autocast; weights and optimiser stay float32. ``auto``: bfloat16
            where the processor has instructions for it, otherwise float32 (:func:`pretraining.machine.decided`).
        compile: run the model through ``torch.compile``. ``auto``: if the run is long enough to make up for it.
        sharding: what several processes share out: ``none``, ``zero1`` (optimiser state) or ``fsdp`` (optimiser state,
            gradients and weights); see :mod:`pretraining.replicas`. Checkpoints are the same whatever it is.
        topk_anneal_fraction: share of the steps over which a ``reflow_topk`` keeps more signals than ``model.topk``:
            all of them at first, half as many after each of equal stages (:mod:`pretraining.annealing`). Evaluations
            and checkpoints are of the model that keeps ``model.topk``.
        eval_tokens: validation tokens of an intermediate evaluation; the last one reads all of them.
        start_from: a checkpoint or a run's folder whose weights the first step finds, instead of fresh ones; ``{seed}``
            in it stands for ``seed``. Optimisers and schedule begin anew. Checkpoints record the step and the hash of
            what was found; of a run that is not at its end the checkpoint is to be named.
        start_rotation: turn what such weights are written in by a random rotation that leaves every logit as it is:
            ``signals``, the gauge of recipe and basis; or ``stream``, the axes of the residual stream
            (:mod:`reflowlens.rotations`). ``none``: as they are.
    """

    out: str
    steps: int
    batch_size: int
    accumulation: int = 1
    seed: int = 0
    dtype: str = AUTO
    compile: bool | str = AUTO
    eval_interval: int = 500
    eval_tokens: int = 131_072
    checkpoint_interval: int = 500
    keep_checkpoints: int = 2
    wandb_project: str = ""
    sharding: str = "none"
    topk_anneal_fraction: float = 0.0
    start_from: str = ""
    start_rotation: str = "none"


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


Section = TypeVar("Section")


def load_config(name: str | Path, settings: Sequence[str] = ()) -> TrainConfig:
    """Read and check a configuration; ``[model]`` takes ``preset = "name"`` and/or fields of ``ModelConfig``.

    Args:
        name: a TOML file, or the bare name of a shipped configuration.
        settings: ``"table.field=value"``, each in place of what the file says; text needs no quotes.

    Raises:
        ReflowlensError: the file is missing, unreadable or not TOML, a table or field is unknown or missing, or a value
            is not allowed.

    >>> load_config("reflow_1_small", ["run.steps=100"]).run.steps
    100
    """
    path = find_config(name)
    tables = read_toml(path)
    for table, fields in tables.items():
        if table not in _TABLES:
            raise ReflowlensError(f"{path}: unknown table [{table}]{nearest(table, list(_TABLES))}")
        if not isinstance(fields, dict):
            raise ReflowlensError(f"{path}: [{table}] must be a table, got {fields!r}")
    for table in ("model", "data", "run"):
        if table not in tables:
            raise ReflowlensError(f"{path}: the table [{table}] is missing")
    overrides = dict(map(_setting, settings))
    for place, value in overrides.items():
        *outer, key = place.split(".")
        fields = tables
        for name in outer:
            fields = fields.setdefault(name, {})
        fields[key] = value
    return TrainConfig(
        model=_model(tables["model"]),
        data=section("data", DataConfig, tables["data"]),
        optimizer=section("optimizer", OptimizerConfig, tables.get("optimizer", {})),
        run=section("run", RunConfig, tables["run"]),
        distillation=(
            section("distillation", DistillationConfig, tables["distillation"]) if "distillation" in tables else None
        ),
        overrides=overrides,
    )


def read_toml(path: Path) -> dict[str, Any]:
    """What a TOML file says.

    Raises:
        ReflowlensError: it cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ReflowlensError(f"{path} is not valid TOML: {error}") from error
    except OSError as error:
        raise ReflowlensError(f"cannot read {path}: {error.strerror or error}") from error


def list_configs() -> list[str]:
    """Names of the shipped configurations, for :func:`load_config`."""
    return sorted(path.stem for path in CONFIGS.glob("*.toml"))


def find_config(name: str | Path) -> Path:
    """The file that a path, or the bare name of a shipped configuration, stands for.

    Raises:
        ReflowlensError: there is none.
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.suffix or path.name != str(name):
        raise ReflowlensError(f"no configuration file {str(path)!r}")
    shipped = list_configs()
    if path.name not in shipped:
        hint = nearest(path.name, shipped)
        raise ReflowlensError(
            f"no configuration {path.name!r}{f'{hint} Shipped' if hint else '; shipped'} are {', '.join(shipped)}; "
            "otherwise give a TOML file"
        )
    return CONFIGS / f"{path.name}.toml"


_TABLES: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "optimizer": OptimizerConfig,
    "run": RunConfig,
    "distillation": DistillationConfig,
}


def _setting(text: str) -> tuple[str, Any]:
    """``"run.steps=100"`` as a place and a value of the type that TOML would give it."""
    place, equals, written = (part.strip() for part in text.partition("="))
    types = {f"{table}.{f.name}": str(f.type) for table, kind in _TABLES.items() for f in dataclasses.fields(kind)}
    types |= {f"model.ttt_flow.{f.name}": str(f.type) for f in dataclasses.fields(TTTFlowConfig)}
    types["model.preset"] = "str"
    if not equals or place not in types:
        what = f"unknown field {place!r}" if equals else "expected table.field=value"
        raise ReflowlensError(f"--set {text}: {what}{nearest(place, list(types))}")
    if types[place] == "str" and written[:1] not in ('"', "'"):
        return place, written
    try:
        return place, tomllib.loads(f"value = {written}")["value"]
    except tomllib.TOMLDecodeError:
        return place, written  # text that wants to be a name; what wants to be a number fails the field's own check


def _model(fields: dict[str, Any]) -> ModelConfig:
    base = preset(fields["preset"]).to_dict() if "preset" in fields else {}
    own = {name: value for name, value in fields.items() if name != "preset"}
    if isinstance(base.get("ttt_flow"), dict) and isinstance(own.get("ttt_flow"), dict):
        own["ttt_flow"] = base["ttt_flow"] | own["ttt_flow"]
    return ModelConfig.from_dict(base | own)


def section(name: str, kind: type[Section], fields: Mapping[str, Any]) -> Section:
    """A table of a configuration as the dataclass that describes it.

    Raises:
        ReflowlensError: a field is unknown or missing, or of another type.
    """
    known = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type] # each is a dataclass
    types: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float), "bool": (bool,)}
    types |= {"bool | str": (object,), "list[int]": (list,)}  # the first checks itself
    for key, value in fields.items():
        if key not in known:
            raise ReflowlensError(f"unknown field {name}.{key}{nearest(key, list(known))}")
        expected = str(known[key].type)
        if not isinstance(value, types[expected]) or (isinstance(value, bool) and not expected.startswith("bool")):
            raise ReflowlensError(f"{name}.{key} must be a {expected}, got {value!r}")
    required = (key for key, f in known.items() if f.default is f.default_factory is dataclasses.MISSING)
    missing = [key for key in required if key not in fields]
    if missing:
        raise ReflowlensError(f"the table [{name}] lacks {', '.join(missing)}")
    return kind(**fields)
