"""In which form experiments are run and how long that takes: estimated beforehand, corrected by what has been run."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from analyses.costs import Sizes, Speed
from analyses.registry import Experiment
from analyses.report.messages import in_language, translate

if TYPE_CHECKING:
    from reflowlens.models.base import HookedModel

_TRUST = (
    0.25  # of the whole estimate: until so much has been run, what was estimated counts for more than what was seen
)


class Step(NamedTuple):
    """An experiment that is run next, in its quick form or in full."""

    experiment: Experiment
    quick: bool


class Schedule:
    """What is still to be run, and in which form.

    Args:
        experiments: to be run, in this order.
        quick: all of them in their quick form.
        budget: seconds for all of them; None for as long as it takes.
        kept: names of those whose results are only read.

    Attributes:
        current: what is being run.
        waiting: what has not begun.
        left_out: names of what does not fit into the budget.
    """

    def __init__(
        self, experiments: Sequence[Experiment], quick: bool, budget: float | None, kept: Collection[str] = ()
    ) -> None:
        self.waiting, self.quick, self.budget, self._kept = list(experiments), quick, budget, kept
        self.current: Step | None = None
        self.left_out: list[str] = []
        self._titles = {experiment.name: experiment.title for experiment in experiments}
        self._total, self._begun = len(self.waiting), time.perf_counter()
        self._estimates: dict[tuple[str, bool], float] = {}
        self._told: dict[tuple[str, bool], str] = {}
        self._run_estimate = self._run_seconds = 0.0
        self._whole = 1.0

    def measure(self, model: HookedModel) -> None:
        """Estimate every experiment, in full and in its quick form, from passes that are timed now."""
        speed = measure_speed(model)
        for quick in (False, True):
            sizes = Sizes.of(model, quick)
            for experiment in self.waiting:
                work = experiment.cost(sizes)
                seconds = 0.0 if experiment.name in self._kept else work.seconds(speed)
                self._estimates[experiment.name, quick] = seconds
                self._told[experiment.name, quick] = work.told
        self._whole = max(1.0, sum(self._estimate(experiment, self.quick) for experiment in self.waiting))
        self._plan()

    def next(self) -> Step | None:
        """What is run now; None when nothing is left that fits."""
        self._plan()
        self.current = None
        if self.waiting:
            experiment = self.waiting.pop(0)
            self.current = Step(experiment, self._quick_ones[experiment.name])
        return self.current

    def done(self, seconds: float) -> None:
        """The current one has taken so long."""
        assert self.current is not None
        estimate = self._estimate(*self.current)
        if estimate:  # what was only read says nothing of the others
            self._run_estimate, self._run_seconds = self._run_estimate + estimate, self._run_seconds + seconds
        self.current = None

    def announcement(self, lang: str = "en") -> str:
        """What will be run and how long each takes, a line an experiment, and all of them together."""
        with in_language(lang):
            lines = []
            for experiment in self.waiting:
                quick = self._quick_ones[experiment.name]
                form = "quick, " if quick and not self.quick else ""
                told = "computed before" if experiment.name in self._kept else self._told[experiment.name, quick]
                about = _clock(self._estimate(experiment, quick))
                lines.append(f"{experiment.number:>3}  {translate(experiment.title)}: {form}about {about}; {told}")
            lines += [f"     {translate(self._titles[name])}: does not fit into the time" for name in self.left_out]
            return "\n".join([*lines, f"about {_clock(self._left())} in all, estimated from timed passes"])

    def line(self, lang: str = "en") -> str:
        """How far it is: "2/13 experiments, Signal Flow, 01:20 elapsed, about 04:00 left"."""
        finished = self._total - len(self.waiting) - len(self.left_out) - (self.current is not None)
        parts = [f"{finished}/{self._total} experiments"]
        if self.current is not None:
            with in_language(lang):
                parts.append(translate(self.current.experiment.title) + (" (quick)" if self._differs() else ""))
        parts.append(f"{_clock(time.perf_counter() - self._begun)} elapsed")
        left = self._left()
        return ", ".join(parts + ([f"about {_clock(left)} left"] if left else []))

    def _differs(self) -> bool:
        """Whether the current one is run in another form than was asked for."""
        return self.current is not None and self.current.quick and not self.quick

    def _estimate(self, experiment: Experiment, quick: bool) -> float:
        return self._estimates.get((experiment.name, quick), 0.0) * self._ratio()

    def _ratio(self) -> float:
        """How much longer than estimated experiments take, by those that have been run."""
        prior = _TRUST * self._whole
        return (self._run_seconds + prior) / (self._run_estimate + prior)

    def _left(self) -> float:
        steps = [Step(each, self._quick_ones[each.name]) for each in self.waiting]
        return sum(self._estimate(*step) for step in [*steps, *([self.current] if self.current else [])])

    def _plan(self) -> None:
        """Decide the form of every waiting experiment, and which ones are left out."""
        self._quick_ones = {experiment.name: self.quick for experiment in self.waiting}
        if self.budget is None:
            return
        room = self.budget - (time.perf_counter() - self._begun)
        costs = {
            each.name: (self._estimate(each, quick=False), self._estimate(each, quick=True)) for each in self.waiting
        }
        self._quick_ones, out = fitted(costs, room, self.quick)
        self.left_out += out
        self.waiting = [each for each in self.waiting if each.name not in out]


def fitted(costs: dict[str, tuple[float, float]], room: float, quick: bool) -> tuple[dict[str, bool], list[str]]:
    """Which experiments are run in their quick form so that all fit into so many seconds, and which are left out.

    As few as can be become quick: the one that saves just enough, or where none does the one that saves the most, and
    so on; where all are quick and do not fit the most expensive is left out.

    Args:
        costs: seconds in full and quick, by name.
        quick: all of them are quick from the start.

    >>> fitted({"a": (60.0, 20.0), "b": (30.0, 25.0), "c": (5.0, 5.0)}, room=60.0, quick=False)
    ({'a': True, 'b': False, 'c': False}, [])
    >>> fitted({"a": (60.0, 20.0), "b": (30.0, 25.0), "c": (5.0, 5.0)}, room=90.0, quick=False)
    ({'a': False, 'b': True, 'c': False}, [])
    >>> fitted({"a": (60.0, 20.0), "b": (30.0, 25.0), "c": (5.0, 5.0)}, room=30.0, quick=False)
    ({'a': True, 'c': True}, ['b'])
    """
    forms, out = dict.fromkeys(costs, quick), list[str]()

    def total() -> float:
        return sum(costs[name][form] for name, form in forms.items())

    while forms and total() > room:
        savings = {name: costs[name][0] - costs[name][1] for name, form in forms.items() if not form}
        enough = {name: saved for name, saved in savings.items() if saved >= total() - room}
        if savings:
            forms[min(enough, key=enough.__getitem__) if enough else max(savings, key=savings.__getitem__)] = True
        else:
            out.append(max(forms, key=lambda name: costs[name][1]))
            del forms[out[-1]]
    return forms, out


@torch.no_grad()
def measure_speed(model: HookedModel) -> Speed:
    """Times a few passes, readouts and products of the recipe, each after one that warms up."""
    from reflowlens.signals import signal_view

    view, cfg = signal_view(model), model.cfg
    tokens = torch.arange(4 * min(32, cfg.n_ctx), device=cfg.device).reshape(4, -1) % model.tokenizer.n_vocab
    stream = model.final_stream(tokens).flatten(0, 1)[:32]
    rows = view.recipe[:4096]
    square = torch.randn(view.n_signals, view.n_signals, generator=torch.Generator().manual_seed(0)).to(rows)
    return Speed(
        token=_seconds(lambda: model.final_stream(tokens)) / tokens.numel(),
        read=_seconds(lambda: view.logits(view.readout(stream)).log_softmax(-1).exp()) / len(stream),
        product=_seconds(lambda: rows @ square) / len(rows) * len(view.recipe),
        row=_seconds(lambda: torch.expm1(view.recipe[: 2**19 // view.n_signals])) / 2**19 * len(view.recipe),
    )


def _seconds(work: Callable[[], object]) -> float:
    """Of one call, the shorter of two after a first one."""
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return min(times[1:])


def say(text: str) -> None:
    """On stderr, at once: a log shows it as it happens."""
    print(text, file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    """Minutes and seconds; hours where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"
