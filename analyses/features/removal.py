"""What removing a feature costs where it is active, beside what another feature costs that is active as often."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from analyses.features.corpus import Corpus
from analyses.features.layers import FeatureLayer
from analyses.features.survey import Survey
from analyses.statistics.draws import derive_rng
from reflowlens.models.base import HookedModel
from reflowlens.notebook.feature import FeatureEffect
from reflowlens.progress import bar

BLOCKS = 8  # of a feature
_NEIGHBOURS = 8  # features that are next to each other in firing rate, among which two are paired
_TOKENS_AT_ONCE = 2048


@torch.no_grad()
def removal_effects(
    model: HookedModel,
    corpus: Corpus,
    layers: Sequence[FeatureLayer],
    surveys: Sequence[Survey],
    n: int,
    seed: int,
    *,
    progress: bool,
) -> list[dict[int, FeatureEffect]]:
    """The effects of at most ``n`` features a layer, drawn at random, by layer and feature.

    A feature is removed from whole blocks, at most `BLOCKS`, which are those of a random sample of the positions where
    it is not 0. Of a dictionary's feature, what it writes is taken away and the dictionary's error stays; a unit is set
    to 0. The change of the loss is that of the next token, in nats, mean over the positions of these blocks where the
    feature is not 0 (position 0 and a block's last position, which predicts nothing that is read, aside).
    """
    width = corpus.tokens.shape[1]
    pairs, blocks = [], []
    for layer, part in zip(layers, surveys, strict=True):
        pairs.append(rate_matched_pairs(part.fired.cpu().numpy(), n, derive_rng(seed, "removal", layer.key)))
        rows = (part.sample.place // width).cpu()
        own = {
            feature: rows[feature][rows[feature] >= 0].tolist() for feature in {f for pair in pairs[-1] for f in pair}
        }
        blocks.append({feature: list(dict.fromkeys(found))[:BLOCKS] for feature, found in own.items()})
    needed = sorted({row for by_feature in blocks for rows in by_feature.values() for row in rows})
    clean = _clean_losses(model, corpus, needed)
    total = sum(len(rows) for by_feature in blocks for rows in by_feature.values())
    steps = bar(show=progress, total=total, desc="removing features", unit="block", leave=False)
    found = []
    with steps:
        for layer, own, chosen in zip(layers, blocks, pairs, strict=True):
            changes = _changes(model, corpus, layer, own, clean, steps)
            measured = [
                (f, control) for f, control in chosen if _positions(changes[f]) and _positions(changes[control])
            ]
            found.append({feature: _effect(changes, feature, control) for feature, control in measured})
    return found


def rate_matched_pairs(fired: Int[np.ndarray, " feature"], n: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """At most ``n`` features, each with its control, a feature that fires about as often.

    Those that fire are ranked by how often; in each run of `_NEIGHBOURS` of the ranking two and two are paired at
    random, so that each is the other's control. Of an odd number one is left out.

    >>> sorted(rate_matched_pairs(np.array([5, 0, 7]), 9, np.random.default_rng(0)))
    [(0, 2), (2, 0)]
    """
    ranked = np.argsort(fired, kind="stable")[(fired == 0).sum() :]
    mixed = [rng.permutation(run) for run in np.split(ranked, range(_NEIGHBOURS, len(ranked), _NEIGHBOURS))]
    pairs = [pair for run in mixed for pair in zip(run[::2].tolist(), run[1::2].tolist(), strict=False)]
    drawn = [pairs[number] for number in rng.permutation(len(pairs))[: n // 2]]
    return [ordered for a, b in drawn for ordered in ((a, b), (b, a))]


def _clean_losses(model: HookedModel, corpus: Corpus, rows: Sequence[int]) -> dict[int, Float[Tensor, " pred"]]:
    found: dict[int, Tensor] = {}
    for batch in _batches(corpus, rows):
        tokens = _blocks(corpus, batch)
        resid = model.final_stream(tokens)[:, :-1]
        losses = _losses(model, resid.flatten(0, 1), tokens[:, 1:].flatten())
        found |= dict(zip(batch, losses.unflatten(0, (len(batch), -1)), strict=True))
    return found


def _changes(
    model: HookedModel,
    corpus: Corpus,
    layer: FeatureLayer,
    blocks: dict[int, list[int]],
    clean: dict[int, Float[Tensor, " pred"]],
    steps: Any,
) -> dict[int, list[Float[Tensor, " active"]]]:
    """By feature: of each of its blocks the change of the loss where it is active."""
    runs = sorted((row, feature) for feature, rows in blocks.items() for row in rows)
    found: dict[int, list[Tensor]] = {feature: [] for feature in blocks}
    for batch in _batches(corpus, [row for row, _ in runs]):
        own, runs = runs[: len(batch)], runs[len(batch) :]
        tokens = _blocks(corpus, batch)
        features = torch.tensor([feature for _, feature in own], device=tokens.device)
        position, last = torch.arange(tokens.shape[1]), corpus.lengths[batch, None] - 1
        counts = ((position > 0) & (position < last)).to(tokens.device)
        at_end = layer.point.startswith("unembed.")
        hooks, seen = layer.remove(features)
        with model.hooks([] if at_end else hooks):
            resid = model.final_stream(tokens)
        row, position = (counts if at_end else counts & (seen["activations"] != 0)).nonzero(as_tuple=True)
        hooks, seen = layer.remove(features[row])
        with model.hooks(hooks if at_end else []):
            removed = _losses(model, resid[row, position], tokens[row, position + 1])
        before = torch.cat([clean[number][position[row == i].cpu()] for i, number in enumerate(batch)])
        changes = (removed - before).split(row.bincount(minlength=len(batch)).tolist())
        for (_, feature), change in zip(own, changes, strict=True):
            found[feature].append(change)
        steps.update(len(batch))
    return found


def _losses(model: HookedModel, resid: Float[Tensor, "n d_model"], targets: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Cross-entropy in nats of what each final stream predicts; each is a row of its own to hooks."""
    if not len(resid):
        return torch.zeros(0)
    logits = model.read_final(resid[:, None]).logits()[:, 0]
    return F.cross_entropy(logits.float(), targets, reduction="none").cpu()


def _positions(changes: Sequence[Tensor]) -> int:
    return sum(map(len, changes))


def _effect(changes: dict[int, list[Float[Tensor, " active"]]], feature: int, control: int) -> FeatureEffect:
    own, other = torch.cat(changes[feature]).double(), torch.cat(changes[control]).double()
    totals = torch.stack([part.double().sum() - own.mean() * len(part) for part in changes[feature]])
    blocks = len(totals)  # a ratio of sums over blocks: its error by the delta method
    error = float((blocks / max(blocks - 1, 1) * totals.square().sum()).sqrt() / len(own)) if blocks > 1 else torch.nan
    return FeatureEffect(float(own.mean()), error, len(own), blocks, control, float(other.mean()))


def _batches(corpus: Corpus, rows: Sequence[int]) -> Iterator[list[int]]:
    """Rows in order, which is by length, few at once."""
    batch: list[int] = []
    for row in rows:
        if batch and (len(batch) + 1) * int(corpus.lengths[batch[0]]) > _TOKENS_AT_ONCE:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _blocks(corpus: Corpus, rows: Sequence[int]) -> Int[Tensor, "row pos"]:
    return corpus.tokens[list(rows), : int(corpus.lengths[list(rows)].max())]
