"""Both ends of a graph: what the stream begins with, and what is read off its last position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import FactoredMatrix

from reflowlens.circuits.attribution.directions import Directions
from reflowlens.circuits.attribution.edges.layout import End, Inputs
from reflowlens.circuits.attribution.linear.replacement import TOKEN_VALUES
from reflowlens.circuits.attribution.targets import LogitTargets, logit_targets
from reflowlens.models.residual import ResidualModel

ADDED = {
    "position": "hook_pos_embed",
    "bigram": "bigram.hook_bigram",
    TOKEN_VALUES: "values.hook_token_values",
}  # what is read beside embeddings, and where


def inputs_of(
    model: ResidualModel,
    tokens: Int[Tensor, " pos"],
    cache: Mapping[str, Tensor],
    embedded: Float[Tensor, "pos d_model"],
    by_signals: bool,
) -> list[Inputs]:
    """What the stream begins with: what the tokens' embeddings add, or the signals of their recipes; and positions.

    Of a TTTFlow also what pairs of tokens add, and what tokens add to the values of the last blocks.
    """
    positions = torch.arange(len(tokens), device=tokens.device)
    if by_signals:
        recipe = cache["hook_recipe"][0]
        position, signal = recipe.nonzero().unbind(1)
        entries = recipe[position, signal]
        basis = model.tied_weights()[1]
        return [Inputs("signal", signal, position, entries, entries[:, None] * basis[signal])]
    ones = embedded.new_ones(len(tokens))
    found = [Inputs("embedding", tokens, positions, ones, embedded)]
    return found + [
        Inputs(kind, positions, positions, ones, cache[point][0].flatten(1))
        for kind, point in ADDED.items()
        if point in model.hook_dict
    ]


def end_of(
    model: ResidualModel,
    logits: Float[Tensor, " d_vocab"],
    tokens: list[Any] | None,
    against: Any,
    normalized: Float[Tensor, " d_model"] | None,
    before_cap: Float[Tensor, " d_vocab"] | None,
) -> End:
    """Tokens as targets.

    Args:
        logits: of the last position.
        tokens, against: as in :func:`~reflowlens.circuits.attribution.targets.logit_targets`.
        normalized: what the final norm made of the stream, of a readout by way of signals.
        before_cap: the logits in front of a cap, which are what is explained.
    """
    weights, norm = model.tied_weights(), model.ln_final
    norm_bias = getattr(norm, "b", None)  # of a BDH, whose stream is read as it is, there is none
    if normalized is not None:
        recipe, basis = weights
        targets = logit_targets(model, logits, tokens, against, recipe, before_cap)
        rows, bias = basis, torch.zeros_like(basis[:, 0])
    else:
        read = model.unembedding
        if isinstance(read, FactoredMatrix):  # the product is formed of a few rows, not of the whole vocabulary
            targets = logit_targets(model, logits, tokens, against, read.A, before_cap)
            targets = replace(targets, vectors=targets.vectors @ read.B)
        else:
            targets = logit_targets(model, logits, tokens, against, read, before_cap)
        rows, bias = targets.vectors, targets.bias
    constant = bias if norm_bias is None else bias + rows @ norm_bias
    rows = rows * norm.w
    return End(targets, rows, constant, None if normalized is None else rows @ normalized + constant)


def no_end(like: Float[Tensor, "*batch d_model"], directions: Sequence[Directions]) -> End:
    """Of a graph whose targets are no tokens, but features or directions."""
    nothing = like.new_zeros(0)
    targets = LogitTargets([], [], [], nothing, nothing, like.new_zeros(0, 0), nothing, nothing)
    return End(targets, like.new_zeros(0, like.shape[-1]), nothing, None, directions)
