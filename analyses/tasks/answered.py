"""Prompts that have an answer, as a model reads them: what every measure of a task begins with."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from analyses.result.finding import Finding
from analyses.result.model_identity import hash_of
from analyses.statistics.draws import derive_rng
from analyses.statistics.intervals import bootstrap_interval, rate_interval
from reflowlens.arguments import integer
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.models.residual import Readout
from reflowlens.prompts import Prompts

MINIMUM_PROMPTS = 20  # below which no verdict is given
_TOKENS_AT_ONCE = 4096
_MOST_LAYERS = 12
DEFINITIONS = {
    "accuracy": "share of prompts whose answer has a larger logit than the wrong answer; without wrong answers, than "
    "any other token",
    "logit_diff": "logit of the answer minus that of the wrong answer; without wrong answers, minus the mean logit of "
    "all tokens. Mean over prompts",
}


class Scores(NamedTuple):
    """What the logits behind some prompts say of their answers.

    `logit_diff` is taken from the mean logit where there is no wrong answer. `loss` is -log p(answer), in nats.
    """

    logit_diff: Float[Tensor, " row"]
    loss: Float[Tensor, " row"]
    correct: Float[Tensor, " row"]


@dataclass(frozen=True, eq=False)
class Answered:
    """Tokens of prompts, padded on the right, and the tokens that should and should not come next.

    Causal models read a padded prompt as they would read it alone, so that prompts of all lengths go together.

    Args:
        texts: of the prompts.
        tokens: [prompt, pos].
        lengths: tokens of each prompt, padding left out.
        answer, wrong: ids [prompt]; None where there are no wrong answers.
        rows: which of the prompts these are.
    """

    model: HookedModel
    texts: Sequence[str]
    tokens: Int[Tensor, "prompt pos"]
    lengths: Sequence[int]
    answer: Int[Tensor, " prompt"]
    wrong: Int[Tensor, " prompt"] | None
    rows: Sequence[int]

    @classmethod
    def of(cls, model: HookedModel, prompts: Prompts, least: int = 2) -> Answered:
        """Read prompts.

        Raises:
            ReflowlensError: they are no `Prompts`, have no answers, or are fewer than ``least``, of which no interval
                could be given.
        """
        if not isinstance(prompts, Prompts):
            raise ReflowlensError(f"prompts must be rl.Prompts, such as rl.Prompts.of(rows), got {prompts!r}")
        if len(prompts) < least:
            raise ReflowlensError(f"intervals over prompts need at least {least} of them, got {len(prompts)}")
        tokens, lengths = model.tokens_and_lengths(prompts.clean)
        answer = prompts.answer_ids(model).to(tokens.device)
        wrong = prompts.wrong_ids(model).to(tokens.device) if "wrong_answer" in prompts.frame else None
        return cls(model, prompts.clean, tokens, lengths, answer, wrong, range(len(prompts)))

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def each(self) -> Int[Tensor, " prompt"]:
        """The number of every row, 0, 1, ..."""
        return torch.arange(len(self), device=self.tokens.device)

    @property
    def last(self) -> Int[Tensor, " prompt"]:
        """The position of each prompt's last token."""
        return torch.tensor(self.lengths, device=self.tokens.device) - 1

    def select(self, rows: Sequence[int]) -> Answered:
        """Some of the prompts, padded no more than they need."""
        index = torch.tensor(list(rows), device=self.tokens.device)
        lengths = [self.lengths[row] for row in rows]
        return dataclasses.replace(
            self,
            texts=[self.texts[row] for row in rows],
            tokens=self.tokens[index, : max(lengths)],
            lengths=lengths,
            answer=self.answer[index],
            wrong=None if self.wrong is None else self.wrong[index],
            rows=[self.rows[row] for row in rows],
        )

    def batches(self, tokens: int = _TOKENS_AT_ONCE) -> Iterator[Answered]:
        """The prompts in order, as many at once as make no more than so many tokens."""
        size = max(1, tokens // self.tokens.shape[1])
        for start in range(0, len(self), size):
            yield self.select(range(start, min(start + size, len(self))))

    def read(self, stream: Float[Tensor, "prompt d_model"]) -> Readout:
        """The readout of streams that each prompt ends in."""
        return self.model.read_final(stream[:, None])

    def scores(self, stream: Float[Tensor, "row d_model"], prompt: Int[Tensor, " row"] | None = None) -> Scores:
        """What is read off streams that prompts end in.

        Args:
            prompt: which of the prompts each row ends; default one row a prompt.
        """
        return self.of_logits(self.read(stream).logits()[:, 0], prompt)

    def of_logits(self, logits: Float[Tensor, "row d_vocab"], prompt: Int[Tensor, " row"] | None = None) -> Scores:
        """The same of logits; ids beyond the tokenizer's are no tokens."""
        prompt = self.each if prompt is None else prompt
        logits = logits[:, : self.model.tokenizer.n_vocab].float()
        answer = self.answer[prompt, None]
        own = logits.gather(1, answer)[:, 0]
        if self.wrong is None:
            other, correct = logits.mean(dim=1), own > logits.scatter(1, answer, -torch.inf).amax(dim=1)
        else:
            other = logits.gather(1, self.wrong[prompt, None])[:, 0]
            correct = own > other
        return Scores(own - other, logits.logsumexp(dim=1) - own, correct.float())

    @torch.no_grad()
    def unchanged(self) -> Scores:
        """Of the model as it is, in batches."""
        parts = [batch.scores(batch.final()) for batch in self.batches()]
        return Scores(*map(torch.cat, zip(*parts, strict=True)))

    def final(self) -> Float[Tensor, "prompt d_model"]:
        """The stream that each prompt ends in, of a whole pass."""
        return self.model.final_stream(self.tokens)[self.each, self.last]


def performance_findings(scores: Scores, seed: int) -> dict[str, Finding]:
    """Whether the model does the task at all: ``accuracy`` and ``logit_diff`` over prompts."""
    correct, difference = numbers(scores.correct), numbers(scores.logit_diff)
    return {
        "accuracy": Finding(correct.mean(), rate_interval(correct, seed=seed), definition=DEFINITIONS["accuracy"]),
        "logit_diff": Finding(
            difference.mean(), bootstrap_interval(difference, seed=seed), definition=DEFINITIONS["logit_diff"]
        ),
    }


def performance_note(findings: dict[str, Finding], has_wrong: bool) -> list[str]:
    """A warning where the model does not do the task: what follows is then no account of how it does."""
    accuracy = findings["accuracy"]
    assert accuracy.interval is not None
    chance, of_what = (0.5, "wrong answer") if has_wrong else (0.0, "other tokens")
    if accuracy.interval[0] > chance:
        return []
    return [
        f"the model does not do this task: its accuracy against the {of_what} is {accuracy.value:.3f} "
        f"({accuracy.interval[0]:.3f} to {accuracy.interval[1]:.3f}), chance {chance:g}. What is measured here is not "
        "how it does the task"
    ]


def numbers(values: Tensor) -> NDArray[np.float64]:
    """As statistics take them."""
    return values.double().cpu().numpy()


def task_params(model: HookedModel, prompts: Prompts, seed: int, quick: bool, **others: Any) -> dict[str, Any]:
    """What every measure of a task tells of a run in `Result.params`."""
    return {"prompts": len(prompts), "seed": seed, "quick": quick, "model_hash": hash_of(model), **others}


def some_prompts(prompts: Prompts, quick: bool, seed: int) -> Prompts:
    """A third of the prompts for a quick look, where that leaves six: drawn at random, of each group about a third.

    Not every third row, for rows often stand in the order of their templates.
    """
    if not quick or len(prompts) < 18:
        return prompts
    order = derive_rng(seed, "quick").permutation(len(prompts))
    if "group" in prompts.frame:
        group = pd.factorize(prompts.frame["group"].astype(str))[0]
        order = order[np.argsort(group[order], kind="stable")]
    return prompts.select(np.sort(order[::3]))


def shown(progress: bool | None) -> bool:
    """Whether to show a bar: by default on a terminal."""
    return sys.stderr.isatty() if progress is None else progress


def priced(what: str, passes: float) -> str:
    """What a bar calls the work, with what it costs."""
    return f"{what}, about {round(passes):,} passes over a prompt"


def one_or_several(value: Any) -> list[Any]:
    """A list of what may be given alone: a text, or an array without axes, is one."""
    several = isinstance(value, Iterable) and not isinstance(value, str) and getattr(value, "ndim", None) != 0
    return list(value) if several else [value]


def layers_given(model: HookedModel, layers: int | Sequence[int] | None, ends: bool = False) -> list[int]:
    """A layer or several, in order; by default every one, or at most `_MOST_LAYERS` at equal distances.

    Args:
        ends: whether ``n_layers``, the end of the model, is one.

    Raises:
        ReflowlensError: there is no such layer, or none is given.
    """
    n_layers = model.cfg.n_layers
    if layers is None:
        return sorted({round(layer) for layer in np.linspace(0, n_layers - 1, min(n_layers, _MOST_LAYERS))})
    last, found = n_layers - 1 + ends, [integer(layer) for layer in one_or_several(layers)]
    if not found or any(layer is None or not 0 <= layer <= last for layer in found):
        raise ReflowlensError(f"layers must be from 0 to {last}, got {layers!r}")
    return sorted({layer for layer in found if layer is not None})


def halves(answered: Answered, seed: int) -> tuple[Answered, Answered]:
    """Two halves of the prompts, drawn at random: to choose on, and to judge on."""
    order = derive_rng(seed, "halves").permutation(len(answered)).tolist()
    return answered.select(sorted(order[: len(order) // 2])), answered.select(sorted(order[len(order) // 2 :]))
