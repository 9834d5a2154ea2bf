"""What replacing activations by reconstructions does, document by document in plain loops: slow and plain."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import permutations

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from reflowlens.dictionaries.dictionary import Dictionary
from reflowlens.models.base import HookedModel

Replacement = Callable[[int, dict[int, Tensor], Tensor], Tensor]
"""ŷ of a layer, at all positions, from what every layer up to it reads in this pass, and what it writes."""


def plain_run(
    model: HookedModel,
    document: Tensor,
    reads: Sequence[str],
    writes: Sequence[str],
    replaced: Mapping[int, Replacement],
) -> tuple[Tensor, dict[int, Tensor], dict[int, Tensor]]:
    """Log-probabilities [pos, d_vocab] of one document, and what each layer reads and writes, with some replaced."""
    read: dict[int, Tensor] = {}
    written: dict[int, Tensor] = {}

    def catch(layer: int, activation: Tensor, hook: HookPoint) -> None:
        read[layer] = activation.detach().clone()

    def write(layer: int, activation: Tensor, hook: HookPoint) -> Tensor | None:
        written[layer] = activation.detach().clone()
        if layer not in replaced:
            return None
        out = activation.clone()
        out[:, 1:] = replaced[layer](layer, read, activation)[:, 1:]
        return out

    hooks: list[tuple[str, Callable[..., Tensor | None]]] = []
    for layer, (source, target) in enumerate(zip(reads, writes, strict=True)):
        hooks += [(source, partial(catch, layer)), (target, partial(write, layer))]
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        logits = model(document[None])[0]
    first = {layer: x[0] for layer, x in read.items()}
    return logits.double().log_softmax(-1), first, {layer: y[0] for layer, y in written.items()}


def said_by(dictionary: Dictionary) -> Replacement:
    """A dictionary as a replacement."""

    def say(layer: int, read: dict[int, Tensor], written: Tensor) -> Tensor:
        total = dictionary.layers[layer].constant(read[layer])
        for source in range(layer + 1) if dictionary.cfg.cross_layer else [layer]:
            of = dictionary.layers[source]
            total = total + of.encode(read[source]) @ of.W_dec[:, layer - source]
        return total.detach()

    return say


def plain_metrics(
    model: HookedModel, dictionary: Dictionary, documents: Sequence[Tensor], means: Sequence[Tensor], layer: int | None
) -> dict[str, float]:
    """Metrics of one layer, or with None of the predictions with all layers replaced."""
    cfg = dictionary.cfg
    layers = range(cfg.n_layers) if layer is None else [layer]
    ways: dict[str, dict[int, Replacement]] = {
        "own": {},
        "said": dict.fromkeys(layers, said_by(dictionary)),
        "zero": dict.fromkeys(layers, lambda layer, read, written: torch.zeros_like(written)),
        "mean": dict.fromkeys(layers, lambda layer, read, written: means[layer].expand_as(written)),
    }
    losses: dict[str, list[float]] = {way: [] for way in ways}
    kl, agreement = [], []
    targets, said, active, cosines = [], [], [], []
    for document in documents:
        logs = {}
        for way, replaced in ways.items():
            logs[way], read, written = plain_run(model, document, cfg.reads, cfg.writes, replaced)
            losses[way] += [-float(logs[way][i, document[i + 1]]) for i in range(1, len(document) - 1)]
            if way == "own" and layer is not None:
                batched = {source: x[None] for source, x in read.items()}
                every = said_by(dictionary)(layer, batched, written[layer][None])[0]
                for position in range(1, len(document)):
                    y, hat = written[layer][position], every[position]
                    targets.append(y.double())
                    said.append(hat.double())
                    active.append(int((dictionary.layers[layer].encode(read[layer][position]) > 0).sum()))
                    cosines.append(float(y.double() @ hat.double() / (y.double().norm() * hat.double().norm())))
        for position in range(1, len(document) - 1):
            p, q = logs["own"][position], logs["said"][position]
            kl.append(float((p.exp() * (p - q)).sum()))
            agreement.append(int(p.argmax() == q.argmax()))
    loss = {way: sum(values) / len(values) for way, values in losses.items()}
    found = {
        "model_loss": loss["own"],
        "loss": loss["said"],
        "kl": sum(kl) / len(kl),
        "agreement": sum(agreement) / len(agreement),
        "recovered_zero": (loss["zero"] - loss["said"]) / (loss["zero"] - loss["own"]),
        "recovered_mean": (loss["mean"] - loss["said"]) / (loss["mean"] - loss["own"]),
    }
    if layer is None:
        return found
    centre = torch.stack(targets).mean(0)
    error = sum(float((y - hat).square().sum()) for y, hat in zip(targets, said, strict=True))
    spread = sum(float((y - centre).square().sum()) for y in targets)
    return found | {"fvu": error / spread, "l0": sum(active) / len(active), "cosine": sum(cosines) / len(cosines)}


def brute_force_matching(similarity: Tensor) -> float:
    """The largest mean similarity of any one-to-one matching of rows to columns."""
    rows, columns = similarity.shape
    return max(
        sum(float(similarity[row, column]) for row, column in enumerate(chosen)) / rows
        for chosen in permutations(range(columns), rows)
    )
