"""Circuits of features: found on many prompts of a task, and judged on others.

    for prompts in split(task_prompts("agreement")): ...
    circuit = find_circuit(model, dictionary, found_on)             # features that survive in a quarter of the graphs
    judged = judge_circuit(model, dictionary, circuit.features, held_out, found_on)

A circuit is a set of features of a dictionary, at all positions. It is judged as circuits of heads and MLPs are
(:mod:`reflowlens.circuits.circuits`) by runs of whole prompts in which features outside of it are ablated at every
position, at its own layer, before those above are computed:

* faithfulness (m(C) - m(∅)) / (m(M) - m(∅)): 1 where the features of the circuit alone do what all of them do, 0 where
  they do no more than none. m is the logit of the right token less that of the wrong one, the mean over prompts.
* completeness: the faithfulness of the features without the circuit; near 0 where it holds all that matters.

Both are measured with ablated features set to 0 and to their ``mean`` over all positions of the prompts that the
circuit was found on; and with the ``error`` of the dictionary, as the pass has it, added to what is written, or left
out, so that M is the model or the replacement model. Controls are as many random features of each layer outside of the
circuit, each of about the mean activation of the feature that it stands for, as far as there are such; and as many of
each layer that are most active on average, whether in the circuit or not: they are more active than the circuit is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from analyses.features.task_prompts import TaskPrompt
from analyses.statistics.draws import derive_rng
from analyses.statistics.intervals import rate_interval
from analyses.statistics.pvalues import permutation_pvalue
from analyses.statistics.resampling import percentile_interval
from analyses.units.points import level_of
from reflowlens.arguments import number_of_runs
from reflowlens.circuits.attribution.many import attribute_each
from reflowlens.circuits.attribution.merged import MergedGraph
from reflowlens.circuits.circuits import shares_of
from reflowlens.dictionaries.dictionary import Dictionary
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.tokenizers.targets import target_ids

Features: TypeAlias = "Sequence[tuple[int, int]]"  # (block, number)
Means: TypeAlias = "dict[int, Float[Tensor, ' feature']]"  # by block
Kept: TypeAlias = "dict[int, Bool[Tensor, ' feature']]"
SHARE = 0.25  # of the prompts, in which a feature survives pruning: of two answers each has half of the prompts
_NEAREST = 10  # in mean activation, of which a control is drawn


@torch.no_grad()
def accuracy(model: HookedModel, prompts: Sequence[TaskPrompt]) -> tuple[float, float, float]:
    """The share of prompts whose right token is likelier than the wrong one, with the ends of its interval.

    A model that is right no more often than a coin cannot do the task, and there is no circuit to find.
    """
    right = _Runs.of(model, prompts).plain() > 0
    return (float(right.float().mean()), *rate_interval(right.float().numpy()))


def find_circuit(
    model: HookedModel,
    dictionary: Dictionary,
    prompts: Sequence[TaskPrompt],
    *,
    share: float = SHARE,
    progress: bool = False,
) -> MergedGraph:
    """What survives pruning in the graphs of so many of a task's prompts, of why the right token and not the wrong."""
    texts, correct, wrong = ([getattr(prompt, part) for prompt in prompts] for part in ("text", "correct", "wrong"))
    graphs = attribute_each(model, texts, dictionary, correct, against=wrong, progress=progress)
    return graphs.merged(share)


@torch.no_grad()
def judge_circuit(
    model: HookedModel,
    dictionary: Dictionary,
    circuit: Features,
    prompts: Sequence[TaskPrompt],
    found_on: Sequence[TaskPrompt],
    *,
    controls: int = 20,
    resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Faithfulness and completeness of a circuit on prompts held out, beside random features.

    Args:
        circuit: (block, number) of its features, such as ``find_circuit(...).features``.
        prompts: those to judge it on.
        found_on: those for the means, and the activations that controls are matched in.
        controls: how many random sets.
        resamples: of the prompts, for the intervals.
        seed: of controls and resamples.

    Returns:
        A row an ``ablation``, ``errors`` (whether they are kept) and ``score``, faithfulness or completeness: its
        ``value``, ``low`` and ``high`` over prompts, ``random``, the mean over random controls, ``pvalue``, the rank of
        the value among them (of completeness, how many leave as little), ``most_active``, that of the most active
        features, ``activation`` and ``random_activation``, sums of mean activations of the circuit and of a random
        control, ``accuracy`` of the circuit's run and its ``logit_diff``,
        those of all features and none, ``full`` and ``empty``, and ``effect_low`` and ``effect_high``, the interval of
        what is between these. Where that contains 0, the features have no effect to explain, and ``value`` is NaN;
        where it is negative, the model is more right without them.

    Raises:
        ReflowlensError: a feature does not exist, there is none, or the metric is the same without any feature.
    """
    number_of_runs(controls, "controls", 1)
    means = mean_activations(model, dictionary, found_on)
    kept = kept_of(dictionary, circuit)
    drawn = matched_features(circuit, means, controls, seed)
    random = [kept_of(dictionary, each) for each in drawn]
    strong = kept_of(dictionary, most_active_features(circuit, means))
    activity = {
        "activation": _activity(circuit, means),
        "random_activation": float(np.mean([_activity(each, means) for each in drawn])),
    }
    everything = {block: torch.ones_like(of_block) for block, of_block in kept.items()}
    runs, rows = _Runs.of(model, prompts), []
    for errors in (True, False):
        with dictionary.spliced(model, error=errors):
            for ablation in ("zero", "mean"):
                value = means if ablation == "mean" else {block: torch.zeros_like(m) for block, m in means.items()}
                run = partial(runs.ablated, value)
                ends = [run(everything), run(_without(everything))]
                for score, removed in (("faithfulness", False), ("completeness", True)):
                    circuits = [_without(each) if removed else each for each in (kept, strong, *random)]
                    values = torch.stack([*ends, *map(run, circuits)])
                    row = {"ablation": ablation, "errors": errors, "score": score, "size": len(set(circuit))}
                    rows.append(row | _scored(values, removed, resamples, seed) | activity)
    return pd.DataFrame(rows)


@torch.no_grad()
def mean_activations(model: HookedModel, dictionary: Dictionary, prompts: Sequence[TaskPrompt]) -> Means:
    """Of every feature, over all positions of all prompts, by block."""
    reads = list(dictionary.cfg.reads)
    tokens, lengths = model.tokens_and_lengths([prompt.text for prompt in prompts])
    cache = model.run_with_cache(tokens, names_filter=reads, return_cache_object=False)[1]
    within = torch.arange(tokens.shape[1]) < torch.tensor(lengths)[:, None]
    features = dictionary.encode([cache[point][within.to(tokens.device)] for point in reads])
    blocks = [level_of(point) for point in reads]
    return {int(block): of_layer.mean(0) for block, of_layer in zip(blocks, features, strict=True)}


def matched_features(circuit: Features, means: Means, n: int, seed: int = 0) -> list[list[tuple[int, int]]]:
    """Random sets of features outside of a circuit: for each of its own one of the same block, drawn of the ten nearest
    in mean activation that are free, the most active first.

    Raises:
        ReflowlensError: a block has not as many features outside of the circuit as in it.
    """
    rng = derive_rng(seed, "matched_features")
    found: list[list[tuple[int, int]]] = []
    by_block = {block: sorted({i for b, i in circuit if b == block}) for block in sorted({b for b, _ in circuit})}
    for _ in range(n):
        drawn: list[tuple[int, int]] = []
        for block, inside in by_block.items():
            mean = means[block].cpu().numpy()
            free = np.setdiff1d(np.arange(len(mean)), inside)
            if len(free) < len(inside):
                raise ReflowlensError(
                    f"block {block} has {len(inside)} features in the circuit, and {len(free)} others to draw from"
                )
            for feature in sorted(inside, key=lambda i: -mean[i]):
                nearest = np.argsort(np.abs(mean[free] - mean[feature]), kind="stable")[:_NEAREST]
                place = rng.choice(nearest)
                drawn.append((block, int(free[place])))
                free = np.delete(free, place)
        found.append(drawn)
    return found


def most_active_features(circuit: Features, means: Means) -> list[tuple[int, int]]:
    """As many features of each block as a circuit has, those of the largest mean activation."""
    counts = Counter(block for block, _ in set(circuit))
    return [(block, int(i)) for block, n in counts.items() for i in means[block].topk(n).indices]


def _activity(features: Features, means: Means) -> float:
    return float(sum(means[block][feature] for block, feature in features))


def kept_of(dictionary: Dictionary, circuit: Features) -> Kept:
    """Which features of every block are in a circuit.

    Raises:
        ReflowlensError: one does not exist, or there is none.
    """
    blocks = [int(level_of(point)) for point in dictionary.cfg.writes]
    n_features = dictionary.cfg.n_features
    kept = {block: torch.zeros(n_features, dtype=torch.bool) for block in blocks}
    for block, feature in circuit:
        if block not in kept or not 0 <= feature < n_features:
            raise ReflowlensError(
                f"no feature {feature} of block {block}: there are 0 to {n_features - 1} of blocks "
                f"{', '.join(map(str, blocks))}"
            )
        kept[block][feature] = True
    if not circuit:
        raise ReflowlensError("a circuit without features is the empty one, which it would be compared with")
    return kept


def _without(kept: Kept) -> Kept:
    return {block: ~of_block for block, of_block in kept.items()}


@dataclass(frozen=True, eq=False)
class _Runs:
    """Passes over the prompts of a task, of which only the last position is read out."""

    model: HookedModel
    tokens: Int[Tensor, "prompt pos"]
    last: Int[Tensor, " prompt"]
    correct: Int[Tensor, " prompt"]
    wrong: Int[Tensor, " prompt"]

    @classmethod
    def of(cls, model: HookedModel, prompts: Sequence[TaskPrompt]) -> _Runs:
        tokens, lengths = model.tokens_and_lengths([prompt.text for prompt in prompts])
        ids = [
            target_ids(model.to_single_token, words, len(prompts), model.cfg.d_vocab).to(tokens.device)
            for words in ([prompt.correct for prompt in prompts], [prompt.wrong for prompt in prompts])
        ]
        return cls(model, tokens, torch.tensor(lengths, device=tokens.device) - 1, *ids)

    def plain(self) -> Float[Tensor, " prompt"]:
        """The logit of the right token less that of the wrong one."""
        stream = self.model.final_stream(self.tokens)
        rows = torch.arange(len(stream), device=stream.device)
        logits = self.model.read_final(stream[rows, self.last][:, None]).logits()[:, 0]
        return logits[rows, self.correct] - logits[rows, self.wrong]

    def ablated(self, values: Means, kept: Kept) -> Float[Tensor, " prompt"]:
        """The same with the features that are not kept at some values; a dictionary is spliced into the model."""
        hooks = [
            (f"blocks.{block}.hook_features", partial(_set, kept[block].to(value.device), value))
            for block, value in values.items()
        ]
        with self.model.hooks(hooks):
            return self.plain()


def _set(
    kept: Bool[Tensor, " feature"], value: Float[Tensor, " feature"], features: Float[Tensor, "prompt pos feature"],
    hook: HookPoint,
) -> Float[Tensor, "prompt pos feature"]:  # fmt: skip
    return torch.where(kept, features, value)


def _scored(values: Float[Tensor, "run prompt"], removed: bool, resamples: int, seed: int) -> dict[str, Any]:
    """Of runs with all features, none, those that are scored, the most active ones, and random controls."""
    full, empty, own = (one.double().cpu().numpy() for one in values[:3])
    effect, n = full - empty, len(own)
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    ends = percentile_interval(weights @ effect / n)
    found = {"accuracy": float((own > 0).mean()), "logit_diff": float(own.mean())}
    found |= {
        "full": float(full.mean()),
        "empty": float(empty.mean()),
        "effect_low": ends.low,
        "effect_high": ends.high,
    }
    if ends.low <= 0 <= ends.high:
        return dict.fromkeys(("value", "low", "high", "random", "pvalue", "most_active"), float("nan")) | found
    value, strong, *random = shares_of(values)
    low, high = percentile_interval((weights @ (own - empty)) / (weights @ effect))
    pvalue = permutation_pvalue(value, random, "less" if removed else "greater")
    scored = {"value": value, "low": low, "high": high, "random": float(np.mean(random)), "pvalue": pvalue}
    return scored | {"most_active": strong} | found
