"""The training loop: one process or many under torchrun, checkpoints that resume bit for bit.

reflowlens train CONFIG [--resume]
torchrun --nproc_per_node=N -m pretraining.train CONFIG [--resume]
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from pretraining.batches import batch_at, sequential_batches
from pretraining.config import TrainConfig, load_config
from pretraining.data import open_tokens
from pretraining.evaluate import summed_loss
from pretraining.optimizers import make_optimizers, schedule
from pretraining.state import newest_checkpoint, resume_state, save_state, start_fresh
from reflowlens.errors import ReflowlensError
from reflowlens.files import replacing
from reflowlens.models import build_model
from reflowlens.models.base import HookedModel


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this is, and where it computes."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0


@contextlib.contextmanager
def processes() -> Iterator[Processes]:
    """Join the group that torchrun describes in the environment, or be alone."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size == 1:
        yield Processes(0, 1, device)
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), world_size, device)
    finally:
        dist.destroy_process_group()


def train(cfg: TrainConfig, *, resume: bool = False, progress: bool | None = None) -> Path:
    """Train a model and return the folder of its last checkpoint.

    The data order is a function of the seed and the step, and the state on disk is complete, so a resumed run takes the
    same steps, to the bit, as one that was never stopped. Ctrl-C (and SIGTERM) finishes the step, saves and stops.

    Args:
        resume: continue from the newest checkpoint in ``cfg.run.out``.
        progress: show a bar; by default on a terminal.

    Raises:
        ReflowlensError: the data do not fit the model, ``out`` already holds a run, there is nothing to resume, or the
            loss stops being finite.
    """
    with processes() as group, _stop_requests() as stop:
        return _train(cfg, group, stop, resume, sys.stderr.isatty() if progress is None else progress)


def _train(cfg: TrainConfig, group: Processes, stop: Callable[[], bool], resume: bool, progress: bool) -> Path:
    run, out = cfg.run, Path(cfg.run.out)
    rows = run.batch_size // run.accumulation
    if rows % group.world_size:
        raise ReflowlensError(
            f"run.batch_size / run.accumulation = {rows} examples do not divide among {group.world_size} processes"
        )
    train_tokens, val_tokens = (_open(cfg, split) for split in ("train", "val"))
    model = build_model(cfg.model, seed=run.seed, device=group.device).train()
    optimizers = make_optimizers(model, cfg.optimizer)
    start = resume_state(cfg, model, optimizers) if resume else start_fresh(out)
    forward = _forward(model, cfg, group)
    log = Log(out, start, cfg, enabled=group.is_first)
    peak_rates = [[g["lr"] for g in optimizer.param_groups] for optimizer in optimizers]
    bar = tqdm(total=run.steps, initial=start, unit="step", disable=not (progress and group.is_first))
    for step in range(start, run.steps):
        began = time.perf_counter()
        share = schedule(step, cfg.optimizer, run.steps)
        for optimizer, rates in zip(optimizers, peak_rates, strict=True):
            for param_group, rate in zip(optimizer.param_groups, rates, strict=True):
                param_group["lr"] = rate * share
        batch = batch_at(train_tokens, step, run.batch_size, cfg.data.context, run.seed, group.rank, group.world_size)
        loss = _accumulate(forward, batch, cfg, group)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.optimizer.grad_clip)
        if not math.isfinite(loss) or not torch.isfinite(grad_norm):
            raise ReflowlensError(
                f"the loss stopped being finite at step {step} (loss {loss}, gradient norm {float(grad_norm)}): "
                "lower optimizer.learning_rate or lengthen optimizer.warmup_steps"
            )
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        rate = cfg.tokens_per_step / (time.perf_counter() - began)
        bar.set_postfix(loss=f"{loss:.3f}", tokens_per_s=f"{rate:,.0f}", refresh=False)
        bar.update()
        done = step + 1
        record: dict[str, float] = {
            "loss": loss,
            "grad_norm": float(grad_norm),
            "lr_share": share,
            "tokens_per_s": rate,
        }
        last = done == run.steps
        if last or done % run.eval_interval == 0:
            record["val_loss"] = evaluate(model, val_tokens, cfg, group, None if last else run.eval_tokens)
            if group.is_first:
                bar.write(f"step {done}: validation loss {record['val_loss']:.4f}", file=sys.stderr)
        log.write(done, record)
        stopping = _any_rank(stop(), group)
        if last or stopping or done % run.checkpoint_interval == 0:
            _on_first_process(group, partial(save_state, cfg, model, optimizers, done, record))
        if stopping and not last:
            bar.close()
            if group.is_first:
                print(f"stopped at step {done} of {run.steps}; continue with --resume", file=sys.stderr)
            break
    bar.close()
    return newest_checkpoint(out)


def _open(cfg: TrainConfig, split: str) -> Any:
    data = open_tokens(cfg.data.folder, split)
    if data.manifest.tokenizer != cfg.model.tokenizer_name:
        raise ReflowlensError(
            f"{cfg.data.folder} was prepared with {data.manifest.tokenizer!r}, "
            f"but model.tokenizer_name is {cfg.model.tokenizer_name!r}"
        )
    return data.tokens


def _forward(model: HookedModel, cfg: TrainConfig, group: Processes) -> Callable[..., Tensor]:
    wrapped: Any = model
    if group.world_size > 1:
        wrapped = DistributedDataParallel(model, device_ids=[group.device] if group.device.type == "cuda" else None)
    return torch.compile(wrapped) if cfg.run.compile else wrapped


def _autocast(cfg: TrainConfig, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=cfg.run.dtype == "bfloat16")


def _accumulate(forward: Any, batch: tuple[Tensor, Tensor], cfg: TrainConfig, group: Processes) -> float:
    """Gradients of the step's mean loss, summed over micro-batches; processes average once, on the last of them."""
    n = cfg.run.accumulation
    total = torch.zeros((), device=group.device)
    for i, (x, y) in enumerate(zip(*(part.chunk(n) for part in batch), strict=True)):
        synchronise = i == n - 1 or group.world_size == 1
        with contextlib.nullcontext() if synchronise else forward.no_sync(), _autocast(cfg, group.device):
            loss = forward(x.to(group.device), "loss", targets=y.to(group.device)) / n
        loss.backward()
        total += loss.detach()
    if group.world_size > 1:
        dist.all_reduce(total)
        total /= group.world_size
    return total.item()


def evaluate(
    model: HookedModel, tokens: Any, cfg: TrainConfig, group: Processes, max_tokens: int | None = None
) -> float:
    """Mean next-token loss in nats over the validation stream, or its first ``max_tokens``; shared by processes."""
    rows = max(1, cfg.run.batch_size // cfg.run.accumulation)
    limit = len(tokens) if max_tokens is None else min(len(tokens), max_tokens + 1)
    batches = sequential_batches(tokens[:limit], rows, cfg.data.context)
    with _autocast(cfg, group.device):
        share = summed_loss(model, islice(batches, group.rank, None, group.world_size))
    sums = torch.tensor(share, dtype=torch.float64, device=group.device)
    if group.world_size > 1:
        dist.all_reduce(sums)
    return float(sums[0] / sums[1])


class Log:
    """``metrics.jsonl``, one object a step; a resumed run drops what it is about to repeat."""

    def __init__(self, out: Path, start: int, cfg: TrainConfig, *, enabled: bool) -> None:
        self.path, self.enabled, self.tokens_per_step = out / "metrics.jsonl", enabled, cfg.tokens_per_step
        self.wandb: Any = None
        if not enabled:
            return
        out.mkdir(parents=True, exist_ok=True)
        whole = [line for line in self._lines() if line.endswith("\n")]  # a killed run may leave half a line
        kept = [line for line in whole if json.loads(line)["step"] <= start]
        with replacing(self.path) as temporary:
            temporary.write_text("".join(kept), encoding="utf8")
        if cfg.run.wandb_project:
            try:
                import wandb
            except ImportError as error:
                raise ReflowlensError("run.wandb_project needs wandb: pip install 'reflowlens[wandb]'") from error

            self.wandb = wandb.init(project=cfg.run.wandb_project, config=cfg.to_dict(), resume="allow")

    def _lines(self) -> list[str]:
        return self.path.read_text(encoding="utf8").splitlines(keepends=True) if self.path.exists() else []

    def write(self, step: int, record: dict[str, float]) -> None:
        if not self.enabled:
            return
        with self.path.open("a", encoding="utf8") as file:
            file.write(json.dumps({"step": step, "tokens": step * self.tokens_per_step, **record}) + "\n")
        if self.wandb is not None:
            self.wandb.log(record, step=step)


# -- stopping ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C or SIGTERM into a request that the loop reads between steps; a second one interrupts."""
    requested = False

    def request(number: int, frame: FrameType | None) -> None:
        nonlocal requested
        if requested:
            raise KeyboardInterrupt
        requested = True

    try:
        previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: nobody sends it signals
        previous = {}
    try:
        yield lambda: requested
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _on_first_process(group: Processes, action: Callable[[], object]) -> None:
    """Let the first process act while the others wait; if it fails, all of them stop, none waits for ever."""
    error: Exception | None = None
    if group.is_first:
        try:
            action()
        except Exception as caught:
            error = caught
    failed = _any_rank(error is not None, group)
    if error is not None:
        raise error
    if failed:
        raise ReflowlensError("the first process could not write the checkpoint")


def _any_rank(flag: bool, group: Processes) -> bool:
    if group.world_size == 1:
        return flag
    shared = torch.tensor(float(flag), device=group.device)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return bool(shared)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of ``python -m pretraining.train`` (what torchrun starts)."""
    import argparse

    parser = argparse.ArgumentParser(description="Train a model; start with torchrun for several processes.")
    parser.add_argument("config", help="a TOML file, see pretraining/configs")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint")
    options = parser.parse_args(arguments)
    try:
        print(train(load_config(options.config), resume=options.resume))
    except ReflowlensError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
