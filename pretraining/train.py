"""The training loop: one process or many under torchrun, checkpoints that resume bit for bit.

reflowlens train CONFIG [--resume]
torchrun --nproc_per_node=N -m pretraining.train CONFIG [--resume]
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from pretraining.annealing import keeping, topk_of_step
from pretraining.batches import batch_at
from pretraining.compilation import compiling
from pretraining.config import AUTO, TrainConfig
from pretraining.distillation.objective import objective_of
from pretraining.distributed import Processes, any_rank, from_first_process, on_first_process, processes
from pretraining.evaluate import evaluate
from pretraining.log import METRICS, Log, write_run_manifest
from pretraining.machine import autocast, decided, processor
from pretraining.optimizers import averaged, momentum, schedule, set_rates
from pretraining.prefetch import prefetched
from pretraining.replicas import Replica, make_replica
from pretraining.shards import whole
from pretraining.starting import start_from
from pretraining.state import (
    awaits_validation,
    begun_with,
    how_to_go_on,
    newest_checkpoint,
    origin,
    record_validation,
    resume_state,
    save_average,
    save_state,
    start_fresh,
    writing,
)
from pretraining.stopping import StopRequests, stop_requests
from pretraining.token_files import SPLITS, TokenData, check_tokens, open_tokens
from reflowlens.errors import ReflowlensError
from reflowlens.flops import mfu, peak_flops, training_flops_per_token
from reflowlens.progress import bar
from reflowlens.storage.atomic import sole_writer

if TYPE_CHECKING:
    from pretraining.batches import Batch


def train(cfg: TrainConfig, *, resume: bool = False, progress: bool | None = None) -> Path:
    """Train a model and return the folder of its last checkpoint.

    The data order is a function of the seed and the step, and the state on disk is complete, so a resumed run takes the
    same steps, to the bit, as one that was never stopped; on another processor, another number of processes, or sharded
    otherwise, the same steps up to rounding (but with dropout other processes drop other neurons). Ctrl-C (and
    SIGTERM) finishes the step, saves and stops; before the first step has ended, as when the model is compiled, it
    stops at once. Where a checkpoint and an evaluation are both due, the checkpoint comes first; an evaluation that did
    not come to its end is made up for on resuming.

    Args:
        resume: continue from the newest checkpoint in ``cfg.run.out``.
        progress: show a bar, or lines where there is no terminal; by default only on a terminal.

    Raises:
        ReflowlensError: the data do not fit the model or are not as they were prepared, ``out`` already holds a run, is
            in use by another process or cannot be written, there is nothing to resume, the model cannot be compiled, or
            the loss stops being finite.
        KeyboardInterrupt: asked to stop before the first step had ended.
    """
    with (
        processes(partial(how_to_go_on, Path(cfg.run.out))) as group,
        contextlib.ExitStack() as held,
        stop_requests(at_once=True) as stop,
    ):
        on_first_process(group, partial(_hold, Path(cfg.run.out), held))
        return _train(cfg, group, stop, resume, sys.stderr.isatty() if progress is None else progress)


def _train(asked: TrainConfig, group: Processes, stop: StopRequests, resume: bool, progress: bool) -> Path:
    asked.check_sharding(group.world_size)
    asked.rows_per_process(group.world_size)  # an error if the processes cannot share a pass evenly
    out, train_data, val_data = Path(asked.run.out), _open(asked, "train"), _open(asked, "val")
    cfg = from_first_process(group, partial(_decide, asked, group, resume))
    if group.device.type == "cuda" and cfg.run.dtype == "bfloat16":
        torch.set_float32_matmul_precision("high")  # TF32 for the few products that autocast leaves in float32
    cfg, objective = objective_of(cfg, train_data.tokens, group.device)
    comes_from = from_first_process(group, partial(origin, cfg, train_data.manifest, resume))
    replica = make_replica(cfg, group, objective)
    start = _first_step(replica, comes_from["training_data"], resume)
    log = Log(out, start, cfg, enabled=group.is_first)
    validate = partial(_validate, replica, val_data.tokens, log, progress)
    if resume and awaits_validation(out):
        validate(start, saved=True)
    on_first_process(group, partial(write_run_manifest, out, cfg, asked, start, group))

    done, steps = start, range(start, cfg.run.steps)
    shown = bar(show=progress and group.is_first, total=cfg.run.steps, initial=start, unit="step")
    with shown, prefetched(partial(_load, train_data.tokens, cfg, group), steps, group.device) as batches:
        for step in steps:
            compiles = cfg.run.compile and step == start
            with compiling(stop, say=group.is_first) if compiles else contextlib.nullcontext():
                record = _take_step(replica, batches, step)
            stop.at_once = False
            done = step + 1
            _show(shown, record)
            log.write(done, record)
            stopping, last = any_rank(stop(), group), done == cfg.run.steps
            saving = stopping or last or done % cfg.run.checkpoint_interval == 0
            if saving:  # before the evaluation, which takes long: killed there, no step is lost
                _save(replica, comes_from, done, record)
            if last or (done % cfg.run.eval_interval == 0 and not stopping):
                validate(done, saved=saving)
            if stopping:
                break
    if done < cfg.run.steps and group.is_first:
        print(f"stopped at step {done} of {cfg.run.steps}; continue with --resume", file=sys.stderr)
    return newest_checkpoint(out)


def _decide(asked: TrainConfig, group: Processes, resume: bool) -> TrainConfig:
    """The configuration with what this machine makes of ``auto``, which is said; a resumed run keeps what it had."""
    before = begun_with(Path(asked.run.out)) if resume else None
    cfg = decided(asked, group.device, group.world_size, before)
    places = [name for name in ("dtype", "compile") if getattr(asked.run, name) == AUTO]
    if places and not resume:
        values = ", ".join(f"run.{name}={str(getattr(cfg.run, name)).lower()}" for name in places)
        print(f"{processor(group.device)}: {values}", file=sys.stderr)
    return cfg


def _hold(out: Path, held: contextlib.ExitStack) -> None:
    """Keep other processes out of the folder of a run."""
    with writing(out / METRICS):
        held.enter_context(sole_writer(out, "training in"))


def _first_step(replica: Replica, data: Mapping[str, Any], resume: bool) -> int:
    """The step to begin with: 0, or that of the newest checkpoint, from which model and optimisers are filled.

    Args:
        data: :func:`pretraining.state.training_data`.

    Raises:
        ReflowlensError: a new run finds another in its folder, a resumed one nothing to go on from or what another
            configuration or other data gave, or a token file is not as it was prepared.
    """
    cfg = replica.cfg
    start = resume_state(cfg, data, replica.model, replica.optimizers) if resume else start_fresh(Path(cfg.run.out))
    if cfg.run.start_from and not resume:
        start_from(cfg, replica.model)
    for split in SPLITS:
        on_first_process(replica.group, partial(check_tokens, cfg.data.folder, split))
    return start


def _save(replica: Replica, comes_from: Mapping[str, Any], step: int, record: dict[str, float]) -> None:
    """Write the checkpoint of a step: the processes put it together, the first writes it."""
    model, state = replica.gather()
    on_first_process(replica.group, partial(save_state, replica.cfg, comes_from, model, state, step, record))
    if replica.cfg.optimizer.average:
        with averaged(replica.optimizers):
            model, _ = replica.gather()
            on_first_process(replica.group, partial(save_average, replica.cfg, model, step))


def _validate(replica: Replica, tokens: Any, log: Log, progress: bool, step: int, *, saved: bool) -> None:
    """Evaluate after a step, and enter the loss in its record and, where there is one, in its checkpoint."""
    cfg, group = replica.cfg, replica.group
    max_tokens = None if step == cfg.run.steps else cfg.run.eval_tokens
    with averaged(replica.optimizers):
        loss = evaluate(replica.model, tokens, cfg, group, max_tokens, progress)
    log.complete(step, {"val_loss": loss})
    if saved:
        on_first_process(group, partial(record_validation, Path(cfg.run.out), step, loss))
    if group.is_first:
        tqdm.write(f"step {step}: validation loss {loss:.4f}", file=sys.stderr)


def _take_step(replica: Replica, batches: Iterator[Batch], step: int) -> dict[str, float]:
    """Set the learning rates, read a batch, clip its gradients and let the optimisers act.

    Returns:
        ``loss``, the mean over all processes in nats a token, and a student's parts of it (``loss_tokens``,
        ``loss_logits``, ``loss_signals``, before they are weighted); ``grad_norm``, before clipping; ``lr_share``, of
        the peak learning rates; ``tokens_per_s`` and, where the device's peak is known, ``mfu``, of the operations that
        the trained model takes.

    Raises:
        ReflowlensError: loss or norm is not finite; then no weight has changed.
    """
    cfg, group = replica.cfg, replica.group
    began = time.perf_counter()
    share = schedule(step, cfg.optimizer, cfg.run.steps)
    set_rates(replica.optimizers, share, momentum(step, cfg.optimizer))
    if cfg.model.dropout:
        _seed_dropout(cfg.run.seed, step, group.rank)
    with keeping(replica.model, topk_of_step(step, cfg)):
        losses = _accumulate(replica, next(batches))
    loss = losses["loss"]
    grad_norm = float(whole(torch.nn.utils.clip_grad_norm_(replica.model.parameters(), cfg.optimizer.grad_clip)))
    if not math.isfinite(loss) or not math.isfinite(grad_norm):
        raise ReflowlensError(
            f"the loss stopped being finite at step {step} (loss {loss}, gradient norm {grad_norm}): "
            "lower optimizer.learning_rate or lengthen optimizer.warmup_steps"
        )
    replica.step()
    throughput = _throughput(cfg, group, time.perf_counter() - began)
    return {**losses, "grad_norm": grad_norm, "lr_share": share, **throughput}


def _seed_dropout(seed: int, step: int, rank: int) -> None:
    """What a step drops is a function of it, so that a resumed run drops the same."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))


def _throughput(cfg: TrainConfig, group: Processes, seconds: float) -> dict[str, float]:
    """Tokens a second of a step and, where the device's peak is known, the share of it that was used."""
    rate, rows = cfg.tokens_per_step / seconds, cfg.rows_per_process(group.world_size)
    peak = peak_flops(group.device, getattr(torch, cfg.run.dtype))
    flops = training_flops_per_token(cfg.model, cfg.data.context, batch=rows)
    utilisation = mfu(rate, flops, peak and peak * group.world_size)
    return {"tokens_per_s": rate} | ({} if utilisation is None else {"mfu": utilisation})


def _accumulate(replica: Replica, batch: Batch) -> dict[str, float]:
    """Gradients of the step's mean loss, summed over micro-batches; processes average once, on the last of them."""
    cfg, group = replica.cfg, replica.group
    n = cfg.run.accumulation
    totals: dict[str, Tensor] = {}
    for i, micro_batch in enumerate(zip(*(part.chunk(n) for part in batch), strict=True)):
        x, y = (part.to(group.device, non_blocking=True) for part in micro_batch)
        with replica.backward_pass(last=i == n - 1):
            with autocast(group.device, cfg.run.dtype):
                losses = {name: value / n for name, value in replica.losses(x, y).items()}
            losses["loss"].backward()
        totals = {name: value.detach() + totals.get(name, 0.0) for name, value in losses.items()}
    if group.world_size > 1:
        for total in totals.values():
            dist.all_reduce(total)
            total /= group.world_size
    return {name: total.item() for name, total in totals.items()}


def _open(cfg: TrainConfig, split: str) -> TokenData:
    data = open_tokens(cfg.data.folder, split)
    if data.manifest.tokenizer != cfg.model.tokenizer_name:
        raise ReflowlensError(
            f"{cfg.data.folder} was prepared with {data.manifest.tokenizer!r}, "
            f"but model.tokenizer_name is {cfg.model.tokenizer_name!r}"
        )
    if data.manifest.n_vocab > cfg.model.d_vocab:
        raise ReflowlensError(
            f"{cfg.data.folder} holds ids up to {data.manifest.n_vocab - 1}, but model.d_vocab is {cfg.model.d_vocab}: "
            f"at least {data.manifest.n_vocab} is needed"
        )
    return data


def _load(tokens: Any, cfg: TrainConfig, group: Processes, step: int) -> Batch:
    """This process's rows of a step's batch."""
    return batch_at(tokens, step, cfg.run.batch_size, cfg.data.context, cfg.run.seed, group.rank, group.world_size)


def _show(shown: tqdm[Any], record: dict[str, float]) -> None:
    """Advance the progress bar by a step."""
    utilisation = {"mfu": f"{record['mfu']:.1%}"} if "mfu" in record else {}
    said = {"loss": f"{record['loss']:.3f}", "tokens_per_s": f"{record['tokens_per_s']:,.0f}", **utilisation}
    shown.set_postfix(said, refresh=False)
    shown.update()


def main(arguments: list[str] | None = None) -> None:
    """Entry point of ``python -m pretraining.train`` (what torchrun starts)."""
    from pretraining.command import add_arguments, run, start

    start("Train a model; start with torchrun for several processes.", add_arguments, run, arguments)


if __name__ == "__main__":
    main()
