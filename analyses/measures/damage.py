"""Damage: what an intervention does to texts that it is not about, and what the model as it is thinks of a text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reflowlens.models.base import HookedModel
from reflowlens.models.loss import IGNORE

_TOKENS = 128  # read at once: their probabilities over a large vocabulary are 26 MB


class Damage(NamedTuple):
    """By text: how much the mean loss of its tokens has risen, and KL(before ‖ after) a token; in nats."""

    loss: Float[Tensor, " text"]
    kl: Float[Tensor, " text"]

    @property
    def cost(self) -> float:
        """Relative rise of the perplexity, texts counting alike: 0.05 is 5% more."""
        return float(self.loss.mean().exp()) - 1


class NeutralTexts:
    """Texts, and what the model as it is makes of them.

    Args:
        texts: cut at the model's context.

    Example:
        >>> import reflowlens as rl
        >>> model = rl.load_model("reflow-nano")
        >>> neutral = NeutralTexts(model, ["The river runs to the sea."])
        >>> with rl.edit(model, rl.ScaleWeights("embed.W_recipe", 0.0, columns=3)):
        ...     damage = neutral.damage()
        >>> bool(damage.kl[0] > 0)
        True
    """

    def __init__(self, model: HookedModel, texts: Sequence[str]) -> None:
        room = model.cfg.n_ctx - len(model.text_start())
        ids = [model.tokenizer.encode(text) for text in texts]
        cut = [
            text if len(row) <= room else model.tokenizer.decode(row[:room])
            for text, row in zip(texts, ids, strict=True)
        ]
        self.model, self.texts = model, list(texts)
        self.tokens, lengths = model.tokens_and_lengths(cut)
        self.targets = model.next_tokens(self.tokens, lengths)
        self.before = [log_p for log_p, _ in self._read(None)]

    def damage(self, resid: Float[Tensor, "text pos d_model"] | None = None) -> Damage:
        """What is lost when the texts end in this stream, default the one that the model now makes, and the model as it
        now is reads it."""
        losses, divergences = [], []
        for before, (after, target) in zip(self.before, self._read(resid), strict=True):
            of_target = [log_p.gather(1, target[:, None])[:, 0] for log_p in (before, after)]
            losses.append(of_target[0] - of_target[1])
            divergences.append((before.exp() * (before - after)).sum(dim=-1))
        return Damage(*(means_by_text(torch.cat(parts), self.targets != IGNORE) for parts in (losses, divergences)))

    def _read(self, resid: Float[Tensor, "text pos d_model"] | None) -> Iterator[tuple[Tensor, Tensor]]:
        return read_tokens(self.model, self.tokens, self.targets, resid)


def continuation_losses(
    model: HookedModel, tokens: Int[Tensor, "text pos"], continued: Bool[Tensor, "text pos"]
) -> Float[Tensor, " text"]:
    """Mean loss in nats of the marked tokens of each text; 0 of a text that has none marked."""
    targets = tokens.roll(-1, dims=1).masked_fill(~continued.roll(-1, dims=1), IGNORE)
    targets[:, -1] = IGNORE
    losses = [-log_p.gather(1, target[:, None])[:, 0] for log_p, target in read_tokens(model, tokens, targets)]
    return means_by_text(torch.cat(losses), targets != IGNORE)


@torch.no_grad()
def read_tokens(
    model: HookedModel,
    tokens: Int[Tensor, "text pos"],
    targets: Int[Tensor, "text pos"],
    resid: Float[Tensor, "text pos d_model"] | None = None,
) -> Iterator[tuple[Float[Tensor, "token d_vocab"], Int[Tensor, " token"]]]:
    """Log probabilities of all real tokens where something is to be predicted, and what is, some positions at a time.

    Args:
        targets: the next tokens; -100 where nothing is to be predicted.
        resid: the final stream; default the one that the model makes of the tokens.
    """
    if resid is None:
        resid = model.final_stream(tokens)
    places = targets != IGNORE
    n_vocab = model.tokenizer.n_vocab
    for rows, target in zip(resid[places].split(_TOKENS), targets[places].split(_TOKENS), strict=True):
        logits = model.read_final(rows[None]).logits()[0, :, :n_vocab]
        yield logits.float().log_softmax(dim=-1), target


def means_by_text(values: Float[Tensor, " token"], places: Bool[Tensor, "text pos"]) -> Float[Tensor, " text"]:
    """Mean over the marked positions of each text; 0 where there is none."""
    totals = torch.zeros(places.shape, device=values.device)
    totals[places] = values
    return totals.sum(dim=1) / places.sum(dim=1).clamp(min=1)
