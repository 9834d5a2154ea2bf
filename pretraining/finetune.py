"""Supervised fine-tuning: a model learns from examples to complete prompts, or to answer in chats.

reflowlens finetune MODEL DATA... --out DIR
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from pretraining.chat import format_to_learn
from pretraining.config import OptimizerConfig
from pretraining.machine import autocast
from pretraining.optimizers import make_optimizers, schedule, set_rates
from pretraining.packing import Batch, pack, shuffled_rows, to_batch
from pretraining.sft import Data, Example, load_data
from pretraining.state import writing
from pretraining.stopping import stop_requests
from reflowlens.checkpoints import load_model, model_hash, read_manifest, save_model
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.models.loss import IGNORE
from reflowlens.progress import bar
from reflowlens.storage.atomic import sole_writer


@dataclass(frozen=True)
class FinetuneConfig:
    """The settings of a fine-tuning.

    The optimiser is AdamW with β = (0.9, 0.95); weight decay of 0.1 acts on the blocks' matrices and the signal basis,
    and the whole gradient is clipped to norm 1. The checkpoint's manifest records its settings.

    Args:
        epochs: passes over the examples.
        learning_rate: AdamW's peak rate, larger for smaller models (3e-4 suits reflow-nano); it rises over the first 5%
            of the steps and falls to 0 along a cosine.
        batch_size: rows a step.
        context: positions of a row, into which as many examples are packed as fit; None: the model's ``n_ctx``.
        seed: of the split, of each epoch's order and of what dropout drops.
        val_fraction: share of the prompts that is held out, where no files to validate on are given.
        dtype: ``bfloat16`` runs matrix products under autocast; weights and optimiser stay float32.
    """

    epochs: int = 3
    learning_rate: float = 1e-4
    batch_size: int = 16
    context: int | None = None
    seed: int = 0
    val_fraction: float = 0.05
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("epochs", "learning_rate", "batch_size", "context"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ReflowlensError(f"{name} must be positive, got {value!r}")
        if self.seed < 0:
            raise ReflowlensError(f"seed must not be negative, got {self.seed}")
        if not 0 < self.val_fraction < 1:
            raise ReflowlensError(f"val_fraction must lie between 0 and 1, got {self.val_fraction}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ReflowlensError(f"dtype must be 'float32' or 'bfloat16', got {self.dtype!r}")


Rows: TypeAlias = "list[list[Example]]"
METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Args:
        step, steps: taken, and in all.
        tokens: read so far, padding apart.
        metrics: of the last step (``loss``, ``grad_norm``, ``lr_share``, ``tokens_per_s``).
        val_loss: mean loss of the held-out completions in nats a token; before the first step and after each epoch.
    """

    step: int
    steps: int
    tokens: int
    metrics: dict[str, float]
    val_loss: float | None

    def record(self) -> dict[str, float]:
        """A line of ``metrics.jsonl``."""
        held_out = {} if self.val_loss is None else {"val_loss": self.val_loss}
        return {"step": self.step, "tokens": self.tokens, **self.metrics, **held_out}


@dataclass(frozen=True)
class Finetuned:
    """What a run gave: the model's folder, the held-out losses in turn (the first before any step), where it ended."""

    folder: Path
    val_losses: list[float]
    last: Progress


def finetune(
    model: str | Path,
    data: Sequence[str | Path],
    out: str | Path,
    cfg: FinetuneConfig | None = None,
    *,
    val: Sequence[str | Path] = (),
    device: str = "cpu",
    progress: bool | None = None,
) -> Finetuned:
    """Fine-tune a model on the completions of examples and save it.

    ``out`` gets ``metrics.jsonl``, a line a step, and ``step_N``, the model after the last whole epoch, which
    ``load_model(out)`` opens. Ctrl-C finishes the step, saves and stops.

    Args:
        model: a packaged name, a checkpoint folder or a file.
        data: JSON-lines files; :mod:`pretraining.sft` says what a line may be.
        val: files to validate on instead of a share of ``data``.
        progress: show a bar, or lines where there is no terminal; by default only on a terminal.

    Raises:
        ReflowlensError: a file or line is not as it should be, nothing is left to learn from or to validate on, the
            model's vocabulary does not hold its tokenizer's tokens, ``out`` is taken, or the loss stops being finite.

    Example: ``finetune("reflow-nano", ["questions.jsonl"], "out/sft", FinetuneConfig(epochs=2)).val_losses``
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or {path.name for path in out.iterdir()} - {METRICS}):
        raise ReflowlensError(f"{out} is not empty: choose a new folder")
    tuned = load_model(model, device=device).train()
    cfg = cfg or FinetuneConfig()
    context = cfg.context or tuned.cfg.n_ctx
    if context > tuned.cfg.n_ctx:
        raise ReflowlensError(f"context={context} exceeds the model's n_ctx={tuned.cfg.n_ctx}")
    template = format_to_learn(tuned.tokenizer)
    examples = load_data(
        data, val, tuned.tokenizer, template, context=context, val_fraction=cfg.val_fraction, seed=cfg.seed
    )
    highest = max(int(example.tokens.max()) for example in (*examples.train, *examples.val))
    if highest >= tuned.cfg.d_vocab:
        raise ReflowlensError(
            f"the examples hold token {highest} of the tokenizer {tuned.cfg.tokenizer_name!r}, but the model's "
            f"vocabulary ends at {tuned.cfg.d_vocab - 1} (d_vocab={tuned.cfg.d_vocab})"
        )
    facts = {
        "base": {"name": Path(model).name, "model_hash": model_hash(tuned)},
        "template": template.record() if any(example.is_chat for example in examples.train) else None,
        "settings": dataclasses.asdict(cfg) | {"context": context},
        "files": examples.files,
        "examples": {"train": len(examples.train), "val": len(examples.val), "left_out": examples.left_out},
    }
    tuned.cfg = dataclasses.replace(tuned.cfg, model_name=out.name)
    tokens_before = read_manifest(model).get("tokens_seen", 0)
    losses: list[float] = []
    shown = bar(show=sys.stderr.isatty() if progress is None else progress, unit="step")
    with (
        shown,
        sole_writer(out, "fine-tuning into"),
        (out / METRICS).open("w", encoding="utf8") as log,
        stop_requests() as stop,
    ):
        shown.write(_summary(examples, context), file=sys.stderr)
        for state in training(tuned, examples, cfg, context):
            with writing(out / METRICS):
                log.write(json.dumps(state.record()) + "\n")
                log.flush()
            shown.total = state.steps
            metrics = {name: f"{state.metrics[name]:.4g}" for name in ("loss", "tokens_per_s") if state.step}
            shown.set_postfix(metrics, refresh=False)
            shown.update(state.step - shown.n)
            if state.val_loss is not None:
                losses.append(state.val_loss)
                shown.write(f"step {state.step}: held-out completion loss {state.val_loss:.4f}", file=sys.stderr)
            stopping = stop() and 0 < state.step < state.steps
            if state.step and (state.val_loss is not None or stopping):
                record = facts | {
                    "optimizer": dataclasses.asdict(_optimizer_settings(cfg, state.steps)),
                    "steps": state.steps,
                    "tokens": state.tokens,
                    "val_losses": losses,
                }
                manifest = {"step": state.step, "tokens_seen": tokens_before + state.tokens, "finetuning": record}
                folder = out / f"step_{state.step:07d}"
                with writing(folder):
                    save_model(folder, tuned, manifest)
                for old in sorted(out.glob("step_*"))[:-1]:
                    shutil.rmtree(old)
            if stopping:
                break
    return Finetuned(folder, losses, state)


def training(model: HookedModel, data: Data, cfg: FinetuneConfig, context: int) -> Iterator[Progress]:
    """Train in place, reporting before the first step and after each.

    The loss of a step is the mean over the completion tokens of its rows; examples in one row do not see each other.

    Raises:
        ReflowlensError: the loss stops being finite.
    """
    epochs = [_in_batches(shuffled_rows(data.train, context, [cfg.seed, epoch]), cfg) for epoch in range(cfg.epochs)]
    val_batches = _in_batches(pack(data.val, context), cfg)
    steps = sum(map(len, epochs))
    optimizer_cfg = _optimizer_settings(cfg, steps)
    (optimizer,) = make_optimizers(model, optimizer_cfg)
    if model.cfg.dropout:
        torch.manual_seed(cfg.seed)
    step = tokens = 0
    yield Progress(step, steps, tokens, {}, evaluate(model, val_batches, cfg, context))
    for batches in epochs:
        for i, rows in enumerate(batches, start=1):
            began, share = time.perf_counter(), schedule(step, optimizer_cfg, steps)
            set_rates([optimizer], share)
            with autocast(model.cfg.device, cfg.dtype):
                loss = completion_loss(model, to_batch(rows, context))
            loss.backward()
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), optimizer_cfg.grad_clip)
            if not torch.isfinite(loss) or not torch.isfinite(grad_norm):
                raise ReflowlensError(f"the loss stopped being finite at step {step}: lower the learning rate")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            read = sum(example.positions for row in rows for example in row)
            step, tokens = step + 1, tokens + read
            metrics = {
                "loss": loss.item(),
                "grad_norm": grad_norm.item(),
                "lr_share": share,
                "tokens_per_s": read / (time.perf_counter() - began),
            }
            val_loss = evaluate(model, val_batches, cfg, context) if i == len(batches) else None
            yield Progress(step, steps, tokens, metrics, val_loss)


def _optimizer_settings(cfg: FinetuneConfig, steps: int) -> OptimizerConfig:
    return OptimizerConfig(
        name="adamw",
        learning_rate=cfg.learning_rate,
        beta1=0.9,
        beta2=0.95,
        weight_decay=0.1,
        grad_clip=1.0,
        schedule="cosine",
        warmup_steps=math.ceil(steps / 20),
        final_fraction=0.0,
    )


def completion_loss(model: HookedModel, batch: Batch) -> Float[Tensor, ""]:
    """Mean cross-entropy in nats of the tokens that count.

    As ``model(batch.tokens, "loss", targets=batch.targets, segments=batch.segments)``, but only the positions that
    predict such a token are read out over the vocabulary: most belong to prompts.
    """
    tokens, targets, segments = (part.to(model.cfg.device) for part in batch)
    counted = targets != IGNORE
    stream = model.final_stream(tokens, segments=segments)[counted][:, None]
    return model.read_final(stream).loss(targets[counted][:, None])


@torch.no_grad()
def evaluate(model: HookedModel, batches: Sequence[Rows], cfg: FinetuneConfig, context: int) -> float:
    """Mean completion loss over batches of rows, every completion token weighing the same; nothing is dropped."""
    total, count = 0.0, 0
    training = model.training
    model.eval()
    for rows in batches:
        batch = to_batch(rows, context)
        with autocast(model.cfg.device, cfg.dtype):
            loss = completion_loss(model, batch).item()
        counted = int((batch.targets != IGNORE).sum())
        total, count = total + loss * counted, count + counted
    model.train(training)
    return total / count


def _in_batches(rows: Rows, cfg: FinetuneConfig) -> list[Rows]:
    return [rows[i : i + cfg.batch_size] for i in range(0, len(rows), cfg.batch_size)]


def _summary(data: Data, context: int) -> str:
    train, val = (
        f"{len(part):,} examples ({sum(int(example.counted[1:].sum()) for example in part):,} completion tokens)"
        for part in (data.train, data.val)
    )
    return f"{train} to learn from, {val} held out; {data.left_out:,} left out, longer than {context} tokens"
