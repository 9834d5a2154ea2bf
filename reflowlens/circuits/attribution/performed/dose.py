"""What a feature does to a token as it is turned up, in units of its activations in text, beside random features."""

from __future__ import annotations

import contextlib
import lzma
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from reflowlens.arguments import number_of_runs, random_seed, real_number
from reflowlens.circuits.attribution.linear.replacement import FeatureAt, blocks_of, neuron_writes
from reflowlens.circuits.attribution.performed.matched import nearest_norms, ratio_of
from reflowlens.circuits.attribution.targets import split_targets
from reflowlens.dictionaries.belonging import check_belongs
from reflowlens.dictionaries.dictionary import Dictionary
from reflowlens.errors import ReflowlensError
from reflowlens.examples import ASSETS, TRAIN_BYTES
from reflowlens.models.components import Block
from reflowlens.models.decoder import Decoder
from reflowlens.models.text import TextInput
from reflowlens.models.threads import changing
from reflowlens.models.ttt_flow import TTTFlow
from reflowlens.models.unwrapping import guarded, hooked_model
from reflowlens.sweeps.batching import check_budget, in_batches
from reflowlens.tokenizers.targets import target_ids

DOSES = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
_QUANTILE = 0.999
_POSITIONS_AT_ONCE = 2048
_EXAMPLE_BYTES = 40_000  # of the packaged plays that no packaged model was trained on


@guarded(changing, lower="the length of the prompt or of text=, or memory=")
@torch.no_grad()
def dose_response(
    model: Any,
    dictionary: Dictionary | None,
    feature: FeatureAt,
    token: str | int,
    prompt: TextInput,
    doses: Sequence[float] = DOSES,
    *,
    text: str | None = None,
    quantile: Any = None,
    controls: int = 20,
    seed: int = 0,
    other_model: bool = False,
    memory: float | None = None,
) -> pd.DataFrame:
    """Set a feature to doses, at one position of a prompt in the model as it is, and read a token behind the last.

    A dose of 1 is the 99.9th percentile of the feature's activations in text, among the tokens at which it is active:
    among all tokens it would be 0 of a feature that is active at fewer than one in a thousand.

    Args:
        model: a hooked decoder or TTTFlow.
        dictionary: transcoders of its MLPs; None: ``feature`` is a neuron.
        feature: which, and where it is set.
        token: a text of one token, or its id.
        prompt: one text, or its tokens.
        doses: any finite numbers; 0 removes the feature.
        text: in which activations are found; default: 40,000 characters of packaged plays.
        quantile: the percentile, where it is known: a number, or an array [layer of the dictionary (block), feature].
        controls: number of random features of the same layer, drawn among the tenth whose decoder norms are nearest.
            Each is set to write a vector of the same size as the feature at each dose.
        seed: of their draw.
        other_model: the dictionary is meant to be another model's.
        memory: bytes for a batch; default: as for :func:`rl.sweep`.

    Returns:
        A row a feature and dose: ``feature`` (its number), ``control``, ``dose``, ``activation`` (that is set),
        ``logit`` (less the mean logit), ``probability``, ``log_prob`` of the token.

    Raises:
        ReflowlensError: the feature, its layer or position does not exist, the token is none, the prompt is not one,
            doses are no finite numbers, the feature is not active anywhere in the text, or the dictionary belongs to
            another model.

    Example: ``rl.dose_response(model, dictionary, rl.FeatureAt(0, 6764), " worry", "The old man said, I can't")``
    """
    hooked = hooked_model(model)
    if not isinstance(hooked, Decoder | TTTFlow):
        raise ReflowlensError(f"a dose is given in a decoder with MLPs, and not in a {type(hooked).__name__}")
    if dictionary is not None:
        check_belongs(dictionary, hooked, other_model=other_model)
    check_budget(memory)
    controls, seed = number_of_runs(controls, "controls", 0), random_seed(seed)
    tokens = hooked.to_tokens(prompt)
    if len(tokens) != 1:
        raise ReflowlensError(f"a dose is given in one prompt, got {len(tokens)}")
    place = _place(hooked, dictionary, feature, tokens.shape[1])
    id = int(target_ids(hooked.to_single_token, token, 1, hooked.cfg.d_vocab)[0])
    given = [real_number(dose, "a dose") for dose in np.atleast_1d(np.asarray(doses, dtype=object))]
    if not given or not np.isfinite(given).all():
        raise ReflowlensError(f"doses must be finite numbers, at least one, got {doses!r}")
    number = place.layer if dictionary is None else blocks_of(dictionary).index(place.layer)
    norms = _norms(hooked, dictionary, place.layer)
    others = _others(norms, place.index, controls, seed)
    point = f"blocks.{place.layer}.{'mlp.hook_post' if dictionary is None else 'hook_features'}"
    with contextlib.nullcontext() if dictionary is None else dictionary.spliced(hooked, other_model=other_model):
        one = _one(quantile, number, place) if quantile is not None else _percentile(hooked, point, place, text)
        rows = [
            (unit, dose, dose * one * ratio_of(norms, place.index, unit))
            for unit in (place.index, *others)
            for dose in given
        ]

        def run(batch: list[tuple[int, float, float]]) -> Float[Tensor, "row d_vocab"]:
            units = torch.tensor([row[0] for row in batch])
            activations = torch.tensor([row[2] for row in batch], dtype=torch.float64)

            def set_them(x: Float[Tensor, "row pos unit"], hook: Any) -> Tensor:
                x = x.clone()
                x[torch.arange(len(x)), place.position, units] = activations.to(x)
                return x

            with hooked.hooks([(point, set_them)]):
                stream = hooked.final_stream(tokens.expand(len(batch), -1))
            read = hooked.read_final(stream[:, -1:]).logits()[:, 0]
            return torch.stack([read[:, id] - read.mean(1), read.log_softmax(-1)[:, id]], dim=1).double().cpu()

        found = torch.cat([read for _, read in in_batches(rows, run, tokens.device, memory)]).numpy()
    frame = pd.DataFrame(rows, columns=["feature", "dose", "activation"])
    frame.insert(1, "control", np.arange(len(frame)) >= len(given))
    return frame.assign(logit=found[:, 0], probability=np.exp(found[:, 1]), log_prob=found[:, 1])


def _place(model: Decoder | TTTFlow, dictionary: Dictionary | None, feature: FeatureAt, n_positions: int) -> FeatureAt:
    if not isinstance(feature, FeatureAt):
        raise ReflowlensError(f"a dose is of one feature, as rl.FeatureAt(layer, index, position), got {feature!r}")
    place = cast(FeatureAt, split_targets(feature, model.cfg.n_layers, n_positions)[1][0])
    n_units = model.cfg.d_mlp if dictionary is None else dictionary.cfg.n_features
    if place.index >= n_units:
        raise ReflowlensError(f"no feature {place.index}: they are 0 to {n_units - 1}")
    if dictionary is not None and place.layer not in blocks_of(dictionary):
        there = ", ".join(map(str, blocks_of(dictionary)))
        raise ReflowlensError(f"the dictionary has no layer in block {place.layer}: it has {there}")
    return place


def _norms(model: Decoder | TTTFlow, dictionary: Dictionary | None, block: int) -> Float[Tensor, " unit"]:
    if dictionary is not None:
        return dictionary.decoder_norms(blocks_of(dictionary).index(block)).detach()
    return neuron_writes(cast(Block, model.blocks[block])).norm(dim=1)


def _others(norms: Float[Tensor, " unit"], unit: int, n: int, seed: int) -> list[int]:
    """Random units whose norms are near a unit's."""
    candidates = torch.arange(len(norms), device=norms.device)
    nearest = nearest_norms(norms, unit, candidates[candidates != unit], least=n).tolist()
    if len(nearest) < n:
        raise ReflowlensError(f"controls={n} is more than there are other features of the layer, {len(nearest)}")
    return [int(other) for other in np.random.default_rng(seed).permutation(nearest)[:n]]


def _one(quantile: Any, number: int, place: FeatureAt) -> float:
    """The activation at a dose of 1, of what the caller knows."""
    known = np.asarray(quantile.detach().cpu() if isinstance(quantile, Tensor) else quantile)
    if known.ndim == 2 and number < len(known) and place.index < known.shape[1]:
        known = known[number, place.index]
    one = real_number(known.item(), "quantile") if known.ndim == 0 or known.size == 1 else float("nan")
    if not 0 < one < float("inf"):
        raise ReflowlensError(
            "quantile is the 99.9th percentile of the feature's activations, above 0: a number, or an array [layer, "
            f"feature]; got {one} of shape {list(np.shape(quantile))}"
        )
    return one


def _percentile(model: Decoder | TTTFlow, point: str, place: FeatureAt, text: str | None) -> float:
    """Of the activations above 0 in a text, cut into the model's contexts."""
    if text is None:
        plays = lzma.decompress((ASSETS / "shakespeare.txt.xz").read_bytes())
        text = plays[TRAIN_BYTES : TRAIN_BYTES + _EXAMPLE_BYTES].decode(errors="ignore")
    if not isinstance(text, str):
        raise ReflowlensError(f"text must be one text, got {text!r}")
    tokens = torch.tensor(model.tokenizer.encode(text), dtype=torch.long, device=model.cfg.device)
    n_whole = len(tokens) // model.cfg.n_ctx * model.cfg.n_ctx
    windows = tokens[:n_whole].view(-1, model.cfg.n_ctx).split(max(1, _POSITIONS_AT_ONCE // model.cfg.n_ctx))
    found = [tokens.new_zeros(0)]
    for batch in (*windows, tokens[None, n_whole:]):
        if batch.numel():
            cache = model.run_with_cache(batch, names_filter=[point], stop_at_layer=place.layer + 1)[1]
            found.append(cache[point][..., place.index].flatten())
    active = torch.cat(found).double()
    active = active[active > 0]
    if not len(active):
        raise ReflowlensError(
            f"feature {place.index} of block {place.layer} is not active in the text: give another text=, or quantile="
        )
    return float(active.quantile(_QUANTILE))
