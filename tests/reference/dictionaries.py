"""A transcoder's step as the papers write it: dense matrices, every feature, autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reflowlens.dictionaries.dictionary import Dictionary


def top_of_each(before: Tensor, k: int) -> Tensor:
    """ReLU of each row's k largest, zero elsewhere."""
    out = torch.zeros_like(before)
    for row in range(len(before)):
        for place in before[row].argsort(descending=True)[:k].tolist():
            out = out.index_put((torch.tensor(row), torch.tensor(place)), before[row, place].clamp_min(0))
    return out


def top_of_batch(before: Tensor, k: int) -> Tensor:
    """ReLU of the k · rows largest of all, zero elsewhere."""
    cut = before.flatten().sort(descending=True).values[k * len(before) - 1]
    return before.clamp_min(0) * (before >= cut)


def reconstructions(dictionary: Dictionary, features: Sequence[Tensor], x: Sequence[Tensor]) -> list[Tensor]:
    """ŷ of each layer, feature by feature."""
    said = []
    for l, layer in enumerate(dictionary.each_layer()):  # noqa: E741
        total = layer.b_dec.expand(len(x[l]), -1)
        if layer.W_skip is not None:
            total = total + x[l] @ layer.W_skip.T
        for m in range(l + 1):
            if m == l or dictionary.cfg.cross_layer:
                for i in range(dictionary.cfg.n_features):
                    total = total + features[m][:, i, None] * dictionary.each_layer()[m].W_dec[i, l - m]
        said.append(total)
    return said
