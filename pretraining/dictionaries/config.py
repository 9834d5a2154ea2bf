"""A run that trains dictionaries, as a TOML file: ``[model]``, ``[data]``, ``[optimizer]``, ``[run]`` and one
``[[dictionary]]`` for each of those that learn from the same forward passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretraining.config import AUTO, OptimizerConfig, read_toml, section
from pretraining.config.toml import toml_value
from reflowlens.dictionaries.config import ACTIVATIONS, WITH_K, DictionaryConfig
from reflowlens.errors import ReflowlensError, nearest
from reflowlens.models.base import HookedModel
from reflowlens.storage.model_hash import model_hash

CONFIGS = Path(__file__).parent / "configs"
KINDS = ("sae", "transcoder", "cross_layer")
_DEFAULT_OPTIMIZER = {
    "learning_rate": 1e-3,
    "beta2": 0.999,
    "weight_decay": 0.0,
    "schedule": "wsd",
    "decay_fraction": 0.3,
    "final_fraction": 0.0,
}


@dataclass(frozen=True)
class SubjectConfig:
    """``[model]``: whose activations are learnt.

    Args:
        name: a packaged model or a checkpoint.
        untrained_seed: not negative: of this model only the configuration is used, with fresh weights of that seed.
    """

    name: str
    untrained_seed: int = -1


@dataclass(frozen=True)
class DataConfig:
    """``[data]``.

    Args:
        folder: made by ``reflowlens prepare``.
        context: tokens of a window; 0: as many as the model reads.
        windows: of documents, drawn from all over the data, whose positions are shuffled together.
        val_windows: beginnings of validation documents on which dictionaries are measured as they learn.
    """

    folder: str
    context: int = 0
    windows: int = 1280
    val_windows: int = 128


@dataclass(frozen=True)
class RunConfig:
    """``[run]``.

    Args:
        out: gets a folder per dictionary, ``metrics.jsonl``, ``run.json`` and ``state``, from which a run goes on.
        tokens: positions that each dictionary learns from, over all processes.
        batch_tokens: positions of a step.
        dtype: ``bfloat16`` harvests under autocast and compares pre-activations in it; weights, activations of features
            and optimiser stay float32. ``auto``: bfloat16 where the processor has instructions for it.
        log_interval, eval_interval, checkpoint_interval: steps.
    """

    out: str
    tokens: int
    batch_tokens: int = 2048
    seed: int = 0
    dtype: str = AUTO
    log_interval: int = 20
    eval_interval: int = 200
    checkpoint_interval: int = 500

    @property
    def steps(self) -> int:
        return max(1, self.tokens // self.batch_tokens)


@dataclass(frozen=True)
class DictionarySpec:
    """``[[dictionary]]``: one that is trained.

    Args:
        name: of its folder.
        kind: ``sae``, ``transcoder`` or ``cross_layer`` (a transcoder whose features write to later layers too).
        layers: blocks that it covers; empty: all.
        reads, writes: hook points, ``{layer}`` standing for the block. By default a transcoder reads what the norm
            before the MLP gives and writes the MLP's output; an autoencoder has the residual stream after the block.
        n_features, activation, k, skip: as in :class:`~reflowlens.dictionaries.config.DictionaryConfig`.
        l0: active features of a position that a penalty is steered to, for ``relu`` and ``jumprelu``.
        penalty: ``l1``, activations times decoder norms; or ``tanh`` of ``sharpness`` times that.
        bandwidth: of the kernel through which thresholds of ``jumprelu`` learn.
        frozen: ``decoder`` or ``encoder`` stays as drawn: what remains is a null.
        seed: of the first weights.
        dead_after: positions without activity after which a feature is dead; 0: a tenth of the run, at most 10⁷.
    """

    name: str
    kind: str = "transcoder"
    layers: list[int] = field(default_factory=list)
    reads: str = ""
    writes: str = ""
    n_features: int = 2048
    activation: str = "topk"
    k: int = 32
    l0: float = 32.0
    skip: bool = False
    penalty: str = "l1"
    sharpness: float = 4.0
    bandwidth: float = 0.1
    frozen: str = ""
    seed: int = 0
    dead_after: int = 0

    def __post_init__(self) -> None:
        choices = {"kind": KINDS, "activation": ACTIVATIONS, "penalty": ("l1", "tanh"), "frozen": FROZEN}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                listed = ", ".join(map(repr, allowed))
                raise ReflowlensError(f"dictionary.{name} must be one of {listed}, got {getattr(self, name)!r}")
        if Path(self.name).name != self.name or self.name in _TAKEN:
            raise ReflowlensError(f"dictionary.name must be the name of a folder of its own, got {self.name!r}")
        if any(later <= layer for layer, later in zip(self.layers, self.layers[1:], strict=False)):
            raise ReflowlensError(f"dictionary.layers must be in forward order, none twice, got {self.layers}")
        for name in ("n_features", "k", "l0", "sharpness", "bandwidth"):
            if not getattr(self, name) > 0:
                raise ReflowlensError(f"dictionary.{name} must be positive, got {getattr(self, name)!r}")
        for name in ("seed", "dead_after"):
            if getattr(self, name) < 0:
                raise ReflowlensError(f"dictionary.{name} must not be negative, got {getattr(self, name)!r}")

    def of(self, model: HookedModel) -> DictionaryConfig:
        """The dictionary of a model that this describes.

        Raises:
            ReflowlensError: the model has no such block or hook point, or a point has no width of its own.
        """
        reads, writes = _DEFAULT_POINTS[self.kind]
        layers = self.layers or range(model.cfg.n_layers)
        of_blocks = [
            tuple(pattern.replace("{layer}", str(layer)) for layer in layers)
            for pattern in (self.reads or reads, self.writes or writes)
        ]
        for name in (*of_blocks[0], *of_blocks[1]):
            if model.hook_axes(name)[:2] != ("batch", "pos") or len(model.hook_axes(name)) != 3:
                raise ReflowlensError(f"{name!r} is not [batch, pos, d]: a dictionary cannot read or write it")
        return DictionaryConfig(
            reads=of_blocks[0],
            writes=of_blocks[1],
            d_in=_width(model, of_blocks[0][0]),
            d_out=_width(model, of_blocks[1][0]),
            n_features=self.n_features,
            activation=self.activation,  # type: ignore[arg-type] # checked
            k=self.k if self.activation in WITH_K else None,
            cross_layer=self.kind == "cross_layer",
            skip=self.skip,
            model_name=model.cfg.model_name or "",
            model_hash=model_hash(model),
            name=self.name,
        )


FROZEN = ("", "decoder", "encoder")
_TAKEN = ("", "..", "state", "metrics.jsonl", "run.json")  # in the folder of a run
_DEFAULT_POINTS = {
    "sae": ("blocks.{layer}.hook_resid_post", "blocks.{layer}.hook_resid_post"),
    "transcoder": ("blocks.{layer}.ln2.hook_normalized", "blocks.{layer}.hook_mlp_out"),
    "cross_layer": ("blocks.{layer}.ln2.hook_normalized", "blocks.{layer}.hook_mlp_out"),
}


@dataclass(frozen=True)
class DictionaryRun:
    """Everything that determines a run."""

    model: SubjectConfig
    data: DataConfig
    run: RunConfig
    optimizer: OptimizerConfig
    dictionaries: tuple[DictionarySpec, ...]

    def __post_init__(self) -> None:
        if not self.dictionaries:
            raise ReflowlensError("a run needs at least one table [[dictionary]]")
        names = [spec.name for spec in self.dictionaries]
        if len(set(names)) < len(names):
            raise ReflowlensError(f"two dictionaries of a run have one name: {', '.join(sorted(names))}")
        if self.run.dtype not in (AUTO, "float32", "bfloat16"):
            raise ReflowlensError(f"run.dtype must be 'auto', 'float32' or 'bfloat16', got {self.run.dtype!r}")
        if self.optimizer.name != "adamw":
            raise ReflowlensError(f"optimizer.name must be 'adamw' for dictionaries, got {self.optimizer.name!r}")
        for place in ("run.tokens", "run.batch_tokens", "run.log_interval", "run.eval_interval"):
            self._check_positive(place)
        for place in ("run.checkpoint_interval", "data.windows", "data.val_windows", "optimizer.learning_rate"):
            self._check_positive(place)
        self._check_positive("optimizer.grad_clip")
        for place in ("run.seed", "data.context", "optimizer.warmup_steps"):
            if self._get(place) < 0:
                raise ReflowlensError(f"{place} must not be negative, got {self._get(place)!r}")
        if self.optimizer.weight_decay:
            raise ReflowlensError(f"optimizer.weight_decay must be 0 here, got {self.optimizer.weight_decay!r}")

    def _check_positive(self, place: str) -> None:
        if not self._get(place) > 0:
            raise ReflowlensError(f"{place} must be positive, got {self._get(place)!r}")

    def _get(self, place: str) -> Any:
        table, name = place.split(".")
        return getattr(getattr(self, table), name)

    def to_dict(self) -> dict[str, Any]:
        """The tables, every field filled in."""
        return {
            **{name: dataclasses.asdict(getattr(self, name)) for name in ("model", "data", "run", "optimizer")},
            "dictionary": [dataclasses.asdict(spec) for spec in self.dictionaries],
        }


def load_run(name: str | Path, settings: Sequence[str] = ()) -> DictionaryRun:
    """Read and check a configuration.

    Args:
        name: a TOML file, or the bare name of a shipped configuration.
        settings: ``"table.field=value"``, each in place of what the file says; of ``dictionary`` in every one.

    Raises:
        ReflowlensError: the file is missing, unreadable or not TOML, a table or field is unknown or missing, or a value
            is not allowed.
    """
    path = _find(name)
    tables = read_toml(path)
    for table in tables:
        if table not in _TABLES:
            raise ReflowlensError(f"{path}: unknown table [{table}]{nearest(table, list(_TABLES))}")
    for table in ("model", "data", "run", "dictionary"):
        if table not in tables:
            raise ReflowlensError(f"{path}: the table [{table}] is missing")
    if not isinstance(tables["dictionary"], list) or not all(isinstance(t, dict) for t in tables["dictionary"]):
        raise ReflowlensError(f"{path}: write [[dictionary]] with two brackets, one table a dictionary")
    for name in ("model", "data", "run", "optimizer"):
        if not isinstance(tables.get(name, {}), dict):
            raise ReflowlensError(f"{path}: [{name}] must be a table, got {tables[name]!r}")
    _override(tables, settings)
    return DictionaryRun(
        model=section("model", SubjectConfig, tables["model"]),
        data=section("data", DataConfig, tables["data"]),
        run=section("run", RunConfig, tables["run"]),
        optimizer=section("optimizer", OptimizerConfig, _DEFAULT_OPTIMIZER | tables.get("optimizer", {})),
        dictionaries=tuple(section("dictionary", DictionarySpec, fields) for fields in tables["dictionary"]),
    )


def list_runs() -> list[str]:
    """Names of the shipped configurations, for :func:`load_run`."""
    return sorted(path.stem for path in CONFIGS.glob("*.toml"))


_TABLES: dict[str, type] = {
    "model": SubjectConfig,
    "data": DataConfig,
    "optimizer": OptimizerConfig,
    "run": RunConfig,
    "dictionary": DictionarySpec,
}


def _find(name: str | Path) -> Path:
    path = Path(name)
    if path.is_file():
        return path
    shipped = list_runs()
    if str(name) in shipped:
        return CONFIGS / f"{name}.toml"
    raise ReflowlensError(
        f"no configuration {str(name)!r}: neither a TOML file nor one of the shipped ({', '.join(shipped)})"
        f"{nearest(str(name), shipped)}"
    )


def _override(tables: dict[str, Any], settings: Sequence[str]) -> None:
    for text in settings:
        place, equals, written = (part.strip() for part in text.partition("="))
        table, _, name = place.partition(".")
        known = [f"{t}.{f.name}" for t, kind in _TABLES.items() for f in dataclasses.fields(kind)]
        if not equals or place not in known:
            what = f"unknown field {place!r}" if equals else "expected table.field=value"
            raise ReflowlensError(f"--set {text}: {what}{nearest(place, known)}")
        for fields in tables[table] if table == "dictionary" else [tables.setdefault(table, {})]:
            fields[name] = toml_value(written)


def _width(model: HookedModel, name: str) -> int:
    axis = model.hook_axes(name)[2]
    sizes = {"d_model": model.cfg.d_model, "d_mlp": model.cfg.d_mlp, "signal": model.cfg.n_signals}
    if not sizes.get(axis):
        raise ReflowlensError(f"{name!r} has an axis {axis!r}: a dictionary reads and writes d_model, d_mlp or signal")
    return int(sizes[axis] or 0)
