"""What a graph explains: logits of tokens, the difference between two, features, or directions of the stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reflowlens.arguments import integer
from reflowlens.circuits.attribution.directions import DirectionAt
from reflowlens.circuits.attribution.linear.replacement import FeatureAt
from reflowlens.errors import ReflowlensError
from reflowlens.models.residual import ResidualModel
from reflowlens.tokenizers.targets import target_ids

Asked: TypeAlias = "FeatureAt | DirectionAt"
Targets: TypeAlias = "str | int | Asked | Sequence[str | int | Asked] | Int[Tensor, ' target'] | None"
MASS, MOST = 0.95, 10


@dataclass(frozen=True)
class LogitTargets:
    """Directions of the readout that are explained at the last position.

    Args:
        name, label: of each its node's, and its text.
        token: the id of each; -1 of a difference.
        probability: of each token; of a difference 1.
        share: of each in what is explained: of tokens the probabilities, normalised to 1, also where each is so small
            that it is 0 in float32; of differences all the same.
        vectors: what is multiplied with the readout's features: of a token its column less the vocabulary's mean, of a
            difference one column less the other.
        bias: the same of the readout's bias.
        value: the logit less the mean logit, or the difference of two; in front of a cap where the model has one.
    """

    name: list[str]
    label: list[str]
    token: list[int]
    probability: Float[Tensor, " target"]
    share: Float[Tensor, " target"]
    vectors: Float[Tensor, "target k"]
    bias: Float[Tensor, " target"]
    value: Float[Tensor, " target"]


def split_targets(targets: Targets, n_layers: int, n_positions: int) -> tuple[Any, list[Asked]]:
    """Tokens, and what else is asked for; positions counted from the beginning, directions named.

    Raises:
        ReflowlensError: a layer or position does not exist, a direction is named twice, or tokens stand beside others.
    """
    several = getattr(targets, "ndim", isinstance(targets, Sequence) and not isinstance(targets, str))
    asked: list[Any] = list(cast(Any, targets)) if several else [targets]
    if not asked:
        raise ReflowlensError("targets is empty: name tokens or features, or leave it out for the likeliest tokens")
    others = [target for target in asked if isinstance(target, FeatureAt | DirectionAt)]
    if not others:
        return (None if targets is None else asked), []
    if len(others) < len(asked):
        raise ReflowlensError("targets are tokens, or features and directions, not both: make a graph of each")
    found: list[Asked] = []
    for number, target in enumerate(others):
        layer, position = integer(target.layer), integer(target.position)
        what = "feature" if isinstance(target, FeatureAt) else "direction"
        if layer is None or not 0 <= layer < n_layers:
            raise ReflowlensError(f"no layer {target.layer!r} for a {what}: this model has blocks 0 to {n_layers - 1}")
        if position is None or not -n_positions <= position < n_positions:
            raise ReflowlensError(f"no position {target.position!r}: the prompt has {n_positions} tokens")
        where: dict[str, Any] = {"layer": layer, "position": position % n_positions}
        if isinstance(target, DirectionAt):
            found.append(replace(target, name=str(target.name) or str(number), **where))
            continue
        index = integer(target.index)
        if index is None or index < 0:
            raise ReflowlensError(f"a feature's index is its number, got {target.index!r}")
        found.append(replace(target, index=index, **where))
    names = [target.node for target in found if isinstance(target, DirectionAt)]
    if len(set(names)) < len(names):
        raise ReflowlensError("targets names a direction twice: give each a name of its own")
    return None, found


def logit_targets(
    model: ResidualModel,
    logits: Float[Tensor, " d_vocab"],
    tokens: list[Any] | None,
    against: Any,
    readout: Float[Tensor, "d_vocab k"],
    before_cap: Float[Tensor, " d_vocab"] | None = None,
) -> LogitTargets:
    """Tokens, or the likeliest, of the last position.

    Args:
        logits: there.
        tokens: texts or ids; None: the smallest set that reaches 95% of the probability, at most 10.
        against: the text or id of the token that each is compared with, or None.
        readout: the matrix by which logits are read.
        before_cap: logits in front of the model's cap; None: it has none.

    Raises:
        ReflowlensError: a text is not a single token, or ``against`` comes without a token.
    """
    probability, b_U = logits.softmax(-1), model.b_U.detach().to(logits.dtype)
    if tokens is None:
        if against is not None:
            raise ReflowlensError("against= is compared with targets=: name a token there too")
        likeliest = probability.sort(descending=True)
        n = int((likeliest.values.cumsum(0) < MASS).sum()) + 1
        ids = likeliest.indices[: min(n, MOST)]
    else:
        ids = token_ids(model, tokens).to(logits.device)
    texts = [_text(model, token) for token in ids.tolist()]
    share = logits[ids].cpu().double().softmax(-1)
    logits = logits if before_cap is None else before_cap
    if against is None:
        vectors, bias = readout[ids] - readout.mean(0), b_U[ids] - b_U.mean()
        value, names = logits[ids] - logits.mean(), [f"logit:{token}" for token in ids.tolist()]
        return LogitTargets(names, texts, ids.tolist(), probability[ids], share, vectors, bias, value)
    (other,) = token_ids(model, [against]).tolist()
    if other in ids.tolist():
        raise ReflowlensError(f"{_text(model, other)!r} is compared with itself: name another token in against=")
    names = [f"logit:{token}-{other}" for token in ids.tolist()]
    labels = [f"{text} − {_text(model, other)}" for text in texts]
    vectors, bias, value = readout[ids] - readout[other], b_U[ids] - b_U[other], logits[ids] - logits[other]
    ones = torch.ones_like(value)
    return LogitTargets(names, labels, [-1] * len(ids), ones, ones / len(ids), vectors, bias, value)


def token_ids(model: ResidualModel, tokens: list[Any]) -> Int[Tensor, " target"]:
    """The ids of texts or ids.

    Raises:
        ReflowlensError: a text is not a single token, there is no such id, or one is named twice.
    """
    ids = target_ids(model.to_single_token, tokens, len(tokens), model.cfg.d_vocab)
    if len(set(ids.tolist())) < len(ids):
        raise ReflowlensError("targets names a token twice")
    return ids


def _text(model: ResidualModel, token: int) -> str:
    """A token's text; ids beyond the tokenizer's are the padding of the vocabulary."""
    return model.to_single_str_token(token) if token < model.tokenizer.n_vocab else f"[{token}]"
