"""What a sweep measures: small functions of the logits that say which of them they read.

A metric is a value; a sweep asks it which positions it reads and gives it only these, and only as many logits as it
asks for: a logit difference costs one direction of the unembedding, not the vocabulary.

    rl.sweep(model, clean, corrupted, "resid_pre", rl.metrics.logit_diff(" Paris", " Rome"))
    rl.sweep(model, clean, corrupted, "resid_pre", rl.metrics.recovery(rl.metrics.target_prob(" Paris")))

The tokens of a data set are its columns: ``rl.metrics.logit_diff(prompts)``. Every metric gives one number a prompt,
the mean over the positions that it reads; padding is not read. On whole logits it is ``metric.of_logits(model, logits,
prompts)``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from reflowlens.arguments import integer
from reflowlens.errors import ReflowlensError
from reflowlens.models.loss import IGNORE
from reflowlens.models.unwrapping import hooked_model
from reflowlens.prompts import Prompts
from reflowlens.tokenizers.targets import Target, target_ids

if TYPE_CHECKING:
    from reflowlens.models.base import HookedModel
    from reflowlens.models.text import TextInput

ReadPosition: TypeAlias = "int | Literal['last', 'all']"


class Logits(Protocol):
    """Logits of some rows at the positions that a metric reads, not necessarily computed yet."""

    def tokens(self, ids: Int[Tensor, "#row #pos n"]) -> Float[Tensor, "row pos n"]:
        """Those of a few tokens."""
        ...

    def vocabulary(self) -> Float[Tensor, "row pos d_vocab"]:
        """All of them."""
        ...


@dataclass(frozen=True)
class WholeLogits:
    """Logits that exist already."""

    values: Float[Tensor, "row pos d_vocab"]

    def tokens(self, ids: Int[Tensor, "#row #pos n"]) -> Float[Tensor, "row pos n"]:
        return self.values.gather(-1, ids.expand(*self.values.shape[:2], -1))

    def vocabulary(self) -> Float[Tensor, "row pos d_vocab"]:
        return self.values


@dataclass(frozen=True)
class Reference:
    """The prompts behind the rows: what a metric may compare with.

    Args:
        tokens: of the run that is patched, padded on the right.
        lengths: each prompt's own number of tokens.
        clean: the clean run's logits at the positions that the metric reads.
        rows: which of the prompts that the metric was made for these are, and of how many; None: all of them.
    """

    tokens: Int[Tensor, "prompt pos"]
    lengths: Sequence[int]
    clean: Logits | None = None
    rows: tuple[range, int] | None = None


Score: TypeAlias = "Callable[[Logits, Int[Tensor, ' row']], Float[Tensor, ' row']]"


@dataclass(frozen=True)
class Metric:
    """One number a prompt. A value: it can be pickled, and so sent to another process.

    Args:
        name: what a result calls it.
        position: which logits it reads: those at one position, at ``"last"`` (each prompt's last token), at ``"all"``.
        bind: given the model and the prompts, the score: logits of some rows, and each row's prompt, to values. A
            function of a module, or a partial of one, where the metric is to be pickled.
        normalised: whether the value is restated as the share of the way from the corrupted run to the clean one.
        reads_tokens: whether logits are compared with the prompts themselves.
        rows: where it is measured on a part of the prompts that it was made for: which they are, and of how many.
    """

    name: str
    position: ReadPosition
    bind: Callable[[HookedModel, Reference], Score] = dataclasses.field(repr=False)
    normalised: bool = False
    reads_tokens: bool = False
    rows: tuple[range, int] | None = None

    @property
    def takes_parts(self) -> bool:
        """Whether it can be measured on a part of its prompts: those here can, others may hold something of each."""
        return getattr(self.bind, "func", self.bind).__module__ == __name__

    def of_logits(
        self, model: HookedModel, logits: Float[Tensor, "prompt pos d_vocab"], prompts: TextInput | None = None
    ) -> Float[Tensor, " prompt"]:
        """The metric of whole logits.

        Args:
            prompts: what the logits were computed from: texts, whose padding is left out, or tokens. Without them every
                position is taken for a prompt's own.

        Raises:
            ReflowlensError: the metric needs the prompts or another run, or the logits do not fit.
        """
        if self.normalised:
            raise ReflowlensError("recovery compares three runs: it has no value for one run's logits")
        hooked = hooked_model(model)
        d_vocab = hooked.cfg.d_vocab
        if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[2] != d_vocab or not logits.numel():
            got = list(logits.shape) if isinstance(logits, Tensor) else repr(logits)
            raise ReflowlensError(f"logits must be [prompt, pos, d_vocab] with d_vocab={d_vocab}, got {got}")
        if prompts is None and self.reads_tokens:
            raise ReflowlensError(f"{self.name} compares logits with the prompts: give these too")
        tokens, lengths = torch.zeros(logits.shape[:2], dtype=torch.long), [logits.shape[1]] * logits.shape[0]
        if prompts is not None:
            tokens, lengths = hooked.tokens_and_lengths(prompts)
            if tokens.shape != logits.shape[:2]:
                raise ReflowlensError(f"prompts of {list(tokens.shape)} tokens, but logits {list(logits.shape)}")
        score = self.bind(hooked, Reference(tokens.to(logits.device), lengths))
        rows = torch.arange(logits.shape[0], device=logits.device)
        positions = read_positions(self.position, lengths, logits.shape[1]).to(logits.device)
        return score(WholeLogits(logits[rows[:, None], positions]), rows)


def read_positions(position: ReadPosition, lengths: Sequence[int], n_positions: int) -> Int[Tensor, "prompt read"]:
    """Which positions of each prompt a metric reads; negative ones count from its own end.

    Raises:
        ReflowlensError: a prompt has no such position.
    """
    if isinstance(position, str) and position == "all":
        return torch.arange(n_positions).repeat(len(lengths), 1)
    if isinstance(position, str) and position == "last":
        return torch.tensor(lengths)[:, None] - 1
    index = integer(position)
    if index is None:
        raise ReflowlensError(f"a metric reads one position, 'last' or 'all', got position={position!r}")
    if not -min(lengths) <= index < min(lengths):
        raise ReflowlensError(f"the metric reads position {index}, but a prompt has {min(lengths)} tokens")
    return torch.tensor([[index % length] for length in lengths])


def logit_diff(correct: Target | Prompts, wrong: Target | None = None, *, position: ReadPosition = "last") -> Metric:
    """Logit of ``correct`` minus logit of ``wrong``; each one token, or one for each prompt.

    Of :class:`reflowlens.Prompts` they are the answers and the wrong answers: ``logit_diff(prompts)``.

    Raises:
        ReflowlensError: the prompts have no such column, or the wrong token is missing or given twice.
    """
    if isinstance(correct, Prompts) and wrong is not None:
        raise ReflowlensError("logit_diff takes the wrong answers of the prompts: leave wrong out")
    other = correct.wrong_answers if isinstance(correct, Prompts) else wrong
    if other is None:
        raise ReflowlensError("logit_diff compares two tokens: give the wrong one too")
    return Metric("logit_diff", position, partial(_logit_diff, _answers(correct), other))


def _logit_diff(correct: Target, wrong: Target, model: HookedModel, reference: Reference) -> Score:
    pair = torch.stack([_ids(model, correct, reference), _ids(model, wrong, reference)], dim=-1)

    def score(logits: Logits, prompts: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
        both = logits.tokens(pair[prompts][:, None])
        return _mean(both[..., 0] - both[..., 1], prompts, reference)

    return score


def target_prob(target: Target | Prompts, *, position: ReadPosition = "last") -> Metric:
    """Probability of a token, one or one for each prompt; of :class:`reflowlens.Prompts` of the answers."""
    return Metric("target_prob", position, partial(_target_prob, _answers(target)))


def _target_prob(target: Target, model: HookedModel, reference: Reference) -> Score:
    ids = _ids(model, target, reference)

    def score(logits: Logits, prompts: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
        log_p = logits.vocabulary().float().log_softmax(dim=-1)
        return _mean(WholeLogits(log_p).tokens(ids[prompts][:, None, None])[..., 0].exp(), prompts, reference)

    return score


def target_rank(target: Target | Prompts, *, position: ReadPosition = "last") -> Metric:
    """Rank of a token, 1 the most probable: one more than the number of tokens with a larger logit.

    Of :class:`reflowlens.Prompts` that of the answers.
    """
    return Metric("target_rank", position, partial(_target_rank, _answers(target)))


def _target_rank(target: Target, model: HookedModel, reference: Reference) -> Score:
    ids = _ids(model, target, reference)

    def score(logits: Logits, prompts: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
        whole = logits.vocabulary()
        own = WholeLogits(whole).tokens(ids[prompts][:, None, None])
        return 1 + _mean((whole > own).sum(dim=-1).float(), prompts, reference)

    return score


def kl(*, position: ReadPosition = "last") -> Metric:
    """KL(clean ‖ patched) of the next-token distributions in nats; 0 when a patch restores the clean run."""
    return Metric("kl", position, _kl)


def _kl(model: HookedModel, reference: Reference) -> Score:
    if reference.clean is None:
        raise ReflowlensError("the metric kl needs a clean run to compare with")
    clean = reference.clean.vocabulary().float().log_softmax(dim=-1)

    def score(logits: Logits, prompts: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
        patched = logits.vocabulary().float().log_softmax(dim=-1)
        return _mean((clean[prompts].exp() * (clean[prompts] - patched)).sum(dim=-1), prompts, reference)

    return score


def loss() -> Metric:
    """Mean next-token cross-entropy of each prompt in nats, over all of its positions; a prompt has two at least."""
    return Metric("loss", "all", _loss, reads_tokens=True)


def _loss(model: HookedModel, reference: Reference) -> Score:
    if min(reference.lengths) < 2:
        raise ReflowlensError("the metric loss needs prompts of two tokens at least: the first predicts the second")
    targets = model.next_tokens(reference.tokens, list(reference.lengths))

    def score(logits: Logits, prompts: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
        wanted = targets[prompts]
        losses = F.cross_entropy(logits.vocabulary().float().mT, wanted, ignore_index=IGNORE, reduction="none")
        return losses.sum(dim=1) / (wanted != IGNORE).sum(dim=1)

    return score


def recovery(metric: Metric) -> Metric:
    """Where a metric lies on the way from the corrupted run (0) to the clean one (1); NaN where these two agree."""
    check_metric(metric)
    return dataclasses.replace(metric, name=f"recovery of {metric.name}", normalised=True)


def check_metric(metric: Any) -> Metric:
    """A metric that is one of those here, or made like them; raise unless it is."""
    if not isinstance(metric, Metric):
        raise ReflowlensError(f"the metric must be one of reflowlens.metrics, such as metrics.kl(), got {metric!r}")
    return metric


def _answers(target: Target | Prompts) -> Target:
    return target.answers if isinstance(target, Prompts) else target


def _ids(model: HookedModel, target: Target, reference: Reference) -> Int[Tensor, " prompt"]:
    rows, n_prompts = reference.rows or (range(len(reference.tokens)), len(reference.tokens))
    ids = target_ids(model.to_single_token, target, n_prompts, model.cfg.d_vocab)[list(rows)]
    return ids.to(reference.tokens.device)


def _mean(
    values: Float[Tensor, "row read"], prompts: Int[Tensor, " row"], reference: Reference
) -> Float[Tensor, " row"]:
    """Mean over the positions that are read; where these are all of them, over each prompt's own."""
    n_read, lengths = values.shape[1], reference.lengths
    if n_read == 1 or len(set(lengths)) == 1:
        return values.mean(dim=1)
    own_length = torch.tensor(lengths, device=values.device)[prompts]
    is_own = torch.arange(n_read, device=values.device) < own_length[:, None]
    return values.where(is_own, 0.0).sum(dim=1) / own_length
