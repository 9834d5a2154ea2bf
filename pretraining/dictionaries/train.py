"""Several dictionaries learn from one stream of activations.

reflowlens dictionary train CONFIG [--resume]
torchrun --nproc_per_node=N -m pretraining.dictionaries.train CONFIG [--resume]
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from pretraining.config import AUTO
from pretraining.dictionaries.config import DictionaryRun, SubjectConfig
from pretraining.dictionaries.documents import Windows, document_windows, drawn_rounds
from pretraining.dictionaries.harvest import batches, harvest, n_vectors
from pretraining.dictionaries.learner import Learner
from pretraining.dictionaries.state import begun_with, check_fresh, resume_run, save_run
from pretraining.distributed import Processes, any_rank, on_first_process, processes
from pretraining.machine import has_bfloat16, processor
from pretraining.optimizers import schedule, set_rates
from pretraining.state import training_data, writing
from pretraining.stopping import stop_requests
from pretraining.token_files import TokenData, open_tokens
from reflowlens.checkpoints import load_model
from reflowlens.dictionaries.config import WITH_K
from reflowlens.errors import ReflowlensError
from reflowlens.models import build_model
from reflowlens.models.base import HookedModel
from reflowlens.progress import bar
from reflowlens.storage.atomic import replacing, sole_writer

METRICS = "metrics.jsonl"
_RESAMPLINGS = 5  # of dead features in a run, in its first half
_VALIDATION = 2**31  # a round's number that training does not reach: seeds the order of validation


def train_dictionaries(cfg: DictionaryRun, *, resume: bool = False, progress: bool | None = None) -> list[Path]:
    """Train the dictionaries of a configuration and return their folders.

    A round of document windows is run through the model once, for all of them; its positions, shuffled, are the batches
    of many steps. Which windows and in which order is a function of the seed and the round, so a resumed run takes the
    same steps, to the bit, as one that was never stopped (on the same processor, with as many processes and threads).
    Of several processes each harvests its own windows of a round, and gradients are averaged. Ctrl-C (and SIGTERM)
    finishes the step, saves and stops.

    Args:
        resume: continue from ``cfg.run.out``.
        progress: show a bar, or lines where there is no terminal; by default only on a terminal.

    Raises:
        ReflowlensError: model, data or hook points do not fit, ``out`` already holds a run or cannot be written, there
            is nothing to resume, or activations or gradients stop being finite.
    """
    out = Path(cfg.run.out)
    with processes() as group, contextlib.ExitStack() as held, stop_requests() as stop:
        on_first_process(group, lambda: held.enter_context(_held(out)))
        if not resume:
            on_first_process(group, partial(check_fresh, out, cfg))
        training = _Training(cfg, group, resume=resume)
        training.run(resume, stop, sys.stderr.isatty() if progress is None else progress)
    return [out / spec.name for spec in cfg.dictionaries]


class _Training:
    """A run: what it reads, and what learns."""

    def __init__(self, cfg: DictionaryRun, group: Processes, *, resume: bool = False) -> None:
        if cfg.run.batch_tokens % group.world_size:
            raise ReflowlensError(
                f"run.batch_tokens={cfg.run.batch_tokens} does not divide among {group.world_size} processes"
            )
        self.cfg, self.group, self.out = cfg, group, Path(cfg.run.out)
        self.model = _subject(cfg.model).to(group.device).requires_grad_(False)
        self.data, self.val_data = (_open(cfg, self.model, split) for split in ("train", "val"))
        context = cfg.data.context or self.model.cfg.n_ctx
        if context > self.model.cfg.n_ctx:
            raise ReflowlensError(f"data.context={context} exceeds the model's n_ctx={self.model.cfg.n_ctx}")
        self.windows = document_windows(self.data, context)
        self.val_windows = document_windows(self.val_data, context, first_only=True)[: cfg.data.val_windows]
        self.dtype = begun_with(self.out, "dtype") if resume else cfg.run.dtype
        if self.dtype == AUTO:
            self.dtype = "bfloat16" if has_bfloat16(group.device) else "float32"
        self.machine = {"dtype": self.dtype, "processes": group.world_size, "processor": processor(group.device)}
        self.learners = [
            Learner(
                spec,
                spec.of(self.model),
                learning_rate=cfg.optimizer.learning_rate,
                betas=(cfg.optimizer.beta1, cfg.optimizer.beta2),
                dead_after=spec.dead_after or max(1, min(10**7, cfg.run.tokens // 10)),
                device=group.device,
            )
            for spec in cfg.dictionaries
        ]
        configs = [learner.dictionary.cfg for learner in self.learners]
        self.points = sorted({point for of in configs for point in (*of.reads, *of.writes)})

    def run(self, resume: bool, stop: Callable[[], bool], progress: bool) -> None:
        """Take the steps that are left, and write down and save what is due after each."""
        cfg, group = self.cfg, self.group
        tokens = training_data(self.data.manifest)
        done = resume_run(cfg, self.learners, tokens, self.machine) if resume else 0
        on_first_process(group, partial(_begin_log, self.out, cfg, done, self.machine))
        validation = self._harvest(self.val_data, self.val_windows, _VALIDATION)
        clock = _Clock(done)
        with bar(show=progress and group.is_first, total=cfg.run.steps, initial=done, unit="step") as shown:
            for step, batch, seconds in self._batches(done):
                share = schedule(step, cfg.optimizer, cfg.run.steps)
                records = {of.spec.name: self._step(of, batch, step, share) for of in self.learners}
                done = step + 1
                clock.harvest_s += seconds
                shown.update()
                evaluating = self._is_due(done, cfg.run.eval_interval)
                if evaluating:
                    for learner in self.learners:
                        records[learner.spec.name]["val_fvu"] = _explained(learner, validation)
                if evaluating or self._is_due(done, cfg.run.log_interval):
                    speed = clock.read(done, cfg.run.batch_tokens)
                    on_first_process(group, partial(_log, self.out, cfg, done, speed, records))
                    shown.set_postfix(
                        {"tokens_per_s": f"{speed['tokens_per_s']:,.0f}", **_said(records)}, refresh=False
                    )
                stopping = any_rank(stop(), group)
                if stopping or self._is_due(done, cfg.run.checkpoint_interval):
                    on_first_process(group, partial(save_run, cfg, self.learners, done, tokens, records, self.machine))
                if stopping:
                    break
        if done < cfg.run.steps and group.is_first:
            print(f"stopped at step {done} of {cfg.run.steps}; continue with --resume", file=sys.stderr)

    def _is_due(self, done: int, interval: int) -> bool:
        return done % interval == 0 or done == self.cfg.run.steps

    def _batches(self, start: int) -> Iterator[tuple[int, dict[str, Tensor], float]]:
        """Each step from ``start`` on, its batch, and the seconds that harvesting it took, if it was the first of its
        round."""
        cfg, group = self.cfg, self.group
        size = cfg.run.batch_tokens // group.world_size
        before = 0  # steps of the rounds before
        for number, drawn in enumerate(drawn_rounds(self.windows, cfg.data.windows, cfg.run.seed)):
            if max(before, start) >= cfg.run.steps:
                return
            shares = [drawn[rank :: group.world_size] for rank in range(group.world_size)]
            n_steps = min(n_vectors(share) for share in shares) // size
            if n_steps == 0:
                raise ReflowlensError(
                    f"a round of {len(drawn)} windows holds fewer positions than "
                    f"run.batch_tokens={cfg.run.batch_tokens}: raise data.windows or prepare more data"
                )
            n_steps = min(n_steps, cfg.run.steps - before)
            if before + n_steps > start:
                began = time.perf_counter()
                activations = self._harvest(self.data, shares[group.rank], number)
                seconds = time.perf_counter() - began
                if number == 0 and start == 0:
                    self._look(activations)
                first = max(0, start - before)
                for i, batch in enumerate(batches(activations, size, first)):
                    if first + i == n_steps:
                        break
                    yield before + first + i, batch, seconds if i == 0 else 0.0
                del activations
            before += n_steps

    def _harvest(self, data: TokenData, windows: Windows, number: int) -> dict[str, Float[Tensor, "n d"]]:
        seed = [self.cfg.run.seed, number, self.group.rank]
        return harvest(self.model, data.tokens, windows, self.points, seed=seed, dtype=self.dtype)

    def _look(self, activations: dict[str, Float[Tensor, "n d"]]) -> None:
        """Give every learner the scales and means of the first round, those of all processes together."""
        means, squares = {}, {}
        for name, part in activations.items():
            wide = part.float()
            sums = torch.cat([wide.sum(0), wide.square().sum()[None], wide.new_tensor([float(len(wide))])])
            if self.group.world_size > 1:
                dist.all_reduce(sums)
            means[name], squares[name] = sums[:-2] / sums[-1], float(sums[-2] / sums[-1])
        for learner in self.learners:
            learner.start_from(means, squares)

    def _step(self, learner: Learner, batch: dict[str, Tensor], step: int, share: float) -> dict[str, Any]:
        cfg, group = self.cfg, self.group
        set_rates([learner.optimizer], share)
        if learner.spec.activation not in WITH_K and step in _resampled_at(cfg.run.steps):
            learner.resample(batch, seed=[cfg.run.seed, step])
        dtype = getattr(torch, self.dtype)
        record = learner.step(batch, clip=cfg.optimizer.grad_clip, dtype=dtype, world_size=group.world_size)
        norm = record["grad_norm"]
        if not isinstance(norm, float) or not math.isfinite(norm):
            raise ReflowlensError(
                f"{learner.spec.name}: the gradient stopped being finite at step {step}: lower optimizer.learning_rate"
            )
        return record


@dataclass
class _Clock:
    """The time since the last reading.

    Args:
        step: of that reading.
        harvest_s: seconds of it that went into harvests.
    """

    step: int
    harvest_s: float = 0.0
    began: float = field(default_factory=time.perf_counter)

    def read(self, step: int, batch_tokens: int) -> dict[str, float]:
        """``tokens_per_s`` and ``harvest_s`` since the last reading, from which the next one counts."""
        now = time.perf_counter()
        found = {"tokens_per_s": (step - self.step) * batch_tokens / (now - self.began), "harvest_s": self.harvest_s}
        self.step, self.harvest_s, self.began = step, 0.0, now
        return found


@contextlib.contextmanager
def _held(out: Path) -> Iterator[None]:
    with writing(out / METRICS), sole_writer(out, "training in"):
        yield


def _resampled_at(steps: int) -> set[int]:
    """Before which steps dead features are resampled."""
    return {steps * i // (2 * _RESAMPLINGS) for i in range(1, _RESAMPLINGS + 1)}


def _subject(cfg: SubjectConfig) -> HookedModel:
    model = load_model(cfg.name)
    return model if cfg.untrained_seed < 0 else build_model(model.cfg, seed=cfg.untrained_seed).eval()


def _open(cfg: DictionaryRun, model: HookedModel, split: str) -> TokenData:
    data = open_tokens(cfg.data.folder, split)
    if data.manifest.tokenizer != model.cfg.tokenizer_name:
        raise ReflowlensError(
            f"{cfg.data.folder} was prepared with {data.manifest.tokenizer!r}, but {cfg.model.name} reads "
            f"{model.cfg.tokenizer_name!r}"
        )
    return data


@torch.no_grad()
def _explained(learner: Learner, activations: dict[str, Float[Tensor, "n d"]]) -> list[float]:
    """FVU of each layer on held-out positions, as the dictionary is used outside of training."""
    errors = [0.0] * learner.dictionary.cfg.n_layers
    spreads = list(errors)
    for batch in batches(activations, min(2048, len(next(iter(activations.values()))))):
        x, y = learner.scaled(batch)
        for l, (target, said) in enumerate(zip(y, learner.dictionary(x), strict=True)):  # noqa: E741 (a layer)
            errors[l] += float((target - said).square().sum())
            spreads[l] += float((target - target.mean(0)).square().sum())
    return [error / spread for error, spread in zip(errors, spreads, strict=True)]


def _said(records: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {f"fvu {name}": f"{sum(r['fvu']) / len(r['fvu']):.3f}" for name, r in records.items()}


def _begin_log(out: Path, cfg: DictionaryRun, start: int, machine: Mapping[str, Any]) -> None:
    """``run.json``, and ``metrics.jsonl`` without what is about to be repeated."""
    with writing(out / METRICS):
        path = out / METRICS
        lines = path.read_text(encoding="utf8").splitlines(keepends=True) if path.exists() else []
        with replacing(path) as temporary:
            kept = [line for line in lines if line.endswith("\n") and _step_of(path, line) <= start]
            temporary.write_text("".join(kept), encoding="utf8")
        record = {"training": cfg.to_dict(), "step": start, "torch": torch.__version__, **machine}
        with replacing(out / "run.json") as temporary:
            temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf8")


def _step_of(path: Path, line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, LookupError) as error:
        raise ReflowlensError(f"{path} is damaged: move it away to go on without it") from error


def _log(out: Path, cfg: DictionaryRun, step: int, speed: dict[str, float], records: dict[str, dict[str, Any]]) -> None:
    line = {"step": step, "tokens": step * cfg.run.batch_tokens, **speed, "dictionaries": records}
    with writing(out / METRICS), (out / METRICS).open("a", encoding="utf8") as file:
        file.write(json.dumps(line) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m pretraining.dictionaries.train`` (what torchrun starts)."""
    from pretraining.command import start
    from pretraining.dictionaries.command import add_arguments, run

    start("Train dictionaries; start with torchrun for several processes.", add_arguments, run, arguments)


if __name__ == "__main__":
    main()
