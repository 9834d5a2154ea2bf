"""What a dictionary's weights are used for on given activations, so that packing errs where it matters least."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from reflowlens.dictionaries.dictionary import Dictionary
from reflowlens.errors import ReflowlensError
from reflowlens.storage.quantised import Use


@torch.no_grad()
def uses_of(dictionary: Dictionary, reads: Sequence[Float[Tensor, "token d_in"]]) -> dict[str, Use]:
    """By the name of a parameter.

    The reconstruction's squared error is, of an error δ in decoders, E‖Σ_i a_i δ_i‖², and of one in a feature's
    encoder, while it is active, ‖W_dec_i‖² E[(δ x)²].

    Args:
        reads: what each layer reads.

    Raises:
        ReflowlensError: they are of another number of layers, are none, or are not finite.
    """
    if len(reads) != dictionary.cfg.n_layers or not all(len(x) and x.isfinite().all() for x in reads):
        raise ReflowlensError(
            f"packing goes by what each of the {dictionary.cfg.n_layers} layers reads: a list of as many tensors "
            "[token, d_in] of finite numbers"
        )
    uses: dict[str, Use] = {}
    for i, (layer, x) in enumerate(zip(dictionary.each_layer(), reads, strict=True)):
        a = layer.encode(x)
        active = (a > 0).float().mean(0)
        norms = dictionary.decoder_norms(i)
        uses[f"layers.{i}.W_enc"] = Use(active * norms**2, x.T @ x / len(x), "columns")
        uses[f"layers.{i}.W_dec"] = Use(a.square().mean(0), a.T @ a / len(a), "rows")
    return uses
