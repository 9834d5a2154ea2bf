"""What a run writes down as it goes: ``metrics.jsonl``, one object a step, and ``run.json``, how it was started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from pretraining.config import AUTO, TrainConfig
from pretraining.distributed import Processes
from pretraining.machine import processor
from pretraining.state import writing
from reflowlens.errors import ReflowlensError
from reflowlens.storage.atomic import replacing

METRICS = "metrics.jsonl"
Field = TypeVar("Field")


class Log:
    """``metrics.jsonl``; a resumed run drops what it is about to repeat.

    Raises:
        ReflowlensError: it cannot be written, what is there is damaged, or wandb is asked for and not installed.
    """

    def __init__(self, out: Path, start: int, cfg: TrainConfig, *, enabled: bool) -> None:
        self.path, self.enabled, self.tokens_per_step = out / METRICS, enabled, cfg.tokens_per_step
        self.wandb: Any = None
        if not enabled:
            return
        with writing(self.path):
            out.mkdir(parents=True, exist_ok=True)
            whole = [line for line in self._lines() if line.endswith("\n")]  # a killed run may leave half a line
            kept = [line for line in whole if _field(self.path, line, "step", int) <= start]
            with replacing(self.path) as temporary:
                temporary.write_text("".join(kept), encoding="utf8")
        if cfg.run.wandb_project:
            try:
                import wandb
            except ImportError as error:
                raise ReflowlensError("run.wandb_project needs wandb: pip install 'reflowlens[wandb]'") from error

            self.wandb = wandb.init(project=cfg.run.wandb_project, config=cfg.to_dict(), resume="allow")

    def _lines(self) -> list[str]:
        return _text(self.path).splitlines(keepends=True) if self.path.exists() else []

    def write(self, step: int, record: dict[str, float]) -> None:
        if not self.enabled:
            return
        with writing(self.path), self.path.open("a", encoding="utf8") as file:
            file.write(json.dumps({"step": step, "tokens": step * self.tokens_per_step, **record}) + "\n")
        if self.wandb is not None:
            self.wandb.log(record, step=step)

    def complete(self, step: int, more: dict[str, float]) -> None:
        """Add to the record of the last step, which is rewritten in its place."""
        if not self.enabled:
            return
        with writing(self.path), self.path.open("r+b") as file:
            text = file.read()
            start = text.rstrip(b"\n").rfind(b"\n") + 1
            record = json.loads(text[start:] or "{}")
            if record.get("step") != step:  # the file was moved away
                start, record = len(text), {"step": step, "tokens": step * self.tokens_per_step}
            file.seek(start)
            file.write((json.dumps(record | more) + "\n").encode())
        if self.wandb is not None:
            self.wandb.log(more, step=step)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf8", errors="replace")  # bytes of no text are no JSON either


def _field(path: Path, text: str, name: str, kind: type[Field]) -> Field:
    """The field of an object that stands in ``path``."""
    try:
        value = json.loads(text)[name]
    except (ValueError, TypeError, LookupError):
        value = None
    if not isinstance(value, kind):
        raise ReflowlensError(
            f"{path} is damaged: an object with {name!r} was expected, got {text[:40]!r}; "
            "move it away to go on without it"
        )
    return value


def write_run_manifest(out: Path, cfg: TrainConfig, asked: TrainConfig, start: int, group: Processes) -> None:
    """``run.json``: the configuration as it was last started, its overrides, and each start in turn.

    Args:
        asked: the configuration before its ``auto`` was decided; what became of it is part of the start.

    Raises:
        ReflowlensError: it cannot be written, or the one that is there is damaged.
    """
    import torch

    path = out / "run.json"
    starts = _field(path, _text(path), "starts", list) if path.exists() else []
    this = {
        "step": start,
        "processes": group.world_size,
        "processor": processor(group.device),
        "torch": torch.__version__,
        "overrides": dict(cfg.overrides),
        "decided": {
            f"run.{name}": getattr(cfg.run, name) for name in ("dtype", "compile") if getattr(asked.run, name) == AUTO
        },
    }
    manifest = {"training": cfg.to_dict(), "overrides": dict(cfg.overrides), "starts": [*starts, this]}
    with writing(path), replacing(path) as temporary:
        temporary.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf8")
