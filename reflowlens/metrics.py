"""What a sweep measures: small functions of the logits that say which of them they read.

A metric is a value; a sweep asks it which positions it reads and gives it only these, and only as many logits as it
asks for: a logit difference costs one direction of the unembedding, not the vocabulary.

    rl.sweep(model, clean, corrupted, "resid_pre", rl.metrics.logit_diff(" Paris", " Rome"))
    rl.sweep(model, clean, corrupted, "resid_pre", rl.metrics.recovery(rl.metrics.target_prob(" Paris")))

Every metric gives one number a prompt. On whole logits it is ``metric.of_logits(model, logits)``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from reflowlens.errors import ReflowlensError
from reflowlens.models.loss import IGNORE

if TYPE_CHECKING:
    from reflowlens.models.base import HookedModel

ReadPosition: TypeAlias = "int | Literal['last', 'all']"
Target: TypeAlias = "str | int | Sequence[str] | Sequence[int] | Int[Tensor, ' prompt']"


class Logits(Protocol):
    """Logits of some rows at the positions that a metric reads, not necessarily computed yet."""

    def tokens(self, ids: Int[Tensor, "row pos n"]) -> Float[Tensor, "row pos n"]:
        """Those of a few tokens."""
        ...

    def vocabulary(self) -> Float[Tensor, "row pos d_vocab"]:
        """All of them."""
        ...


@dataclass(frozen=True)
class WholeLogits:
    """Logits that exist already."""

    values: Float[Tensor, "row pos d_vocab"]

    def tokens(self, ids: Int[Tensor, "row pos n"]) -> Float[Tensor, "row pos n"]:
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
    """

    tokens: Int[Tensor, "prompt pos"]
    lengths: Sequence[int]
    clean: Logits | None = None


Score: TypeAlias = "Callable[[Logits, Int[Tensor, ' row']], Float[Tensor, ' row']]"


@dataclass(frozen=True)
class Metric:
    """One number a prompt.

    Args:
        name: what a result calls it.
        position: which logits it reads: those at one position, at ``"last"`` (each prompt's last token), at ``"all"``.
        bind: given the model and the prompts, the score: logits of some rows, and each row's prompt, to values.
        normalised: whether the value is restated as the share of the way from the corrupted run to the clean one.
    """

    name: str
    position: ReadPosition
    bind: Callable[[HookedModel, Reference], Score] = dataclasses.field(repr=False)
    normalised: bool = False

    def of_logits(
        self,
        model: HookedModel,
        logits: Float[Tensor, "prompt pos d_vocab"],
        tokens: Int[Tensor, "prompt pos"] | None = None,
    ) -> Float[Tensor, " prompt"]:
        """The metric of whole logits; ``"last"`` is their last position, ``tokens`` what they were computed from."""
        if self.normalised:
            raise ReflowlensError("recovery compares three runs: it has no value for one run's logits")
        prompts = torch.arange(logits.shape[0], device=logits.device)
        blank = torch.zeros(logits.shape[:2], dtype=torch.long, device=logits.device)
        lengths = [logits.shape[1]] * logits.shape[0]
        score = self.bind(model, Reference(blank if tokens is None else tokens, lengths))
        if self.position != "all":
            at = -1 if self.position == "last" else self.position
            logits = logits[:, at][:, None]
        return score(WholeLogits(logits), prompts)


def logit_diff(correct: Target, wrong: Target, *, position: ReadPosition = "last") -> Metric:
    """Logit of ``correct`` minus logit of ``wrong``; each one token, or one for each prompt."""

    def bind(model: HookedModel, reference: Reference) -> Score:
        pair = torch.stack([_ids(model, correct, reference), _ids(model, wrong, reference)], dim=-1)

        def score(logits: Logits, prompts: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
            both = logits.tokens(pair[prompts][:, None])
            return (both[..., 0] - both[..., 1]).mean(dim=1)

        return score

    return Metric("logit_diff", position, bind)


def target_prob(target: Target, *, position: ReadPosition = "last") -> Metric:
    """Probability of a token."""

    def bind(model: HookedModel, reference: Reference) -> Score:
        ids = _ids(model, target, reference)

        def score(logits: Logits, prompts: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
            log_p = logits.vocabulary().float().log_softmax(dim=-1)
            return WholeLogits(log_p).tokens(ids[prompts][:, None, None])[..., 0].exp().mean(dim=1)

        return score

    return Metric("target_prob", position, bind)


def target_rank(target: Target, *, position: ReadPosition = "last") -> Metric:
    """Rank of a token, 1 the most probable: one more than the number of tokens with a larger logit."""

    def bind(model: HookedModel, reference: Reference) -> Score:
        ids = _ids(model, target, reference)

        def score(logits: Logits, prompts: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
            whole = logits.vocabulary()
            own = WholeLogits(whole).tokens(ids[prompts][:, None, None])
            return 1 + (whole > own).sum(dim=-1).float().mean(dim=1)

        return score

    return Metric("target_rank", position, bind)


def kl(*, position: ReadPosition = "last") -> Metric:
    """KL(clean ‖ patched) of the next-token distributions in nats; 0 when a patch restores the clean run."""

    def bind(model: HookedModel, reference: Reference) -> Score:
        if reference.clean is None:
            raise ReflowlensError("the metric kl needs a clean run to compare with")
        clean = reference.clean.vocabulary().float().log_softmax(dim=-1)

        def score(logits: Logits, prompts: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
            patched = logits.vocabulary().float().log_softmax(dim=-1)
            return (clean[prompts].exp() * (clean[prompts] - patched)).sum(dim=-1).mean(dim=1)

        return score

    return Metric("kl", position, bind)


def loss() -> Metric:
    """Mean next-token cross-entropy of each prompt in nats, over all of its positions."""

    def bind(model: HookedModel, reference: Reference) -> Score:
        targets = model.next_tokens(reference.tokens, list(reference.lengths))

        def score(logits: Logits, prompts: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
            wanted = targets[prompts]
            losses = F.cross_entropy(logits.vocabulary().float().mT, wanted, ignore_index=IGNORE, reduction="none")
            return losses.sum(dim=1) / (wanted != IGNORE).sum(dim=1)

        return score

    return Metric("loss", "all", bind)


def recovery(metric: Metric) -> Metric:
    """Where a metric lies on the way from the corrupted run (0) to the clean one (1)."""
    return dataclasses.replace(metric, name=f"recovery of {metric.name}", normalised=True)


def _ids(model: HookedModel, target: Target, reference: Reference) -> Int[Tensor, " prompt"]:
    n, device = len(reference.tokens), reference.tokens.device
    words = [target] * n if isinstance(target, (str, int)) else list(target)
    if len(words) != n:
        raise ReflowlensError(f"the metric names {len(words)} target tokens for {n} prompts")
    ids = [model.to_single_token(word) if isinstance(word, str) else int(word) for word in words]
    for token in ids:
        if not 0 <= token < model.cfg.d_vocab:
            raise ReflowlensError(f"no token {token}: this model's ids are 0 to {model.cfg.d_vocab - 1}")
    return torch.tensor(ids, device=device)
