"""Function vectors: what heads carry of a task that is shown by examples alone (Todd et al., 2024).

A prompt shows pairs of an input and its output, then another input. Some heads write, at its last token, a vector that
says which function is asked for. They are found by their *indirect effect*: in prompts whose examples have the outputs
of others, and so show no function, a head's output at the last token is replaced by its mean over right prompts, and
the answer becomes likelier. The sum of the mean outputs of the heads with the largest effects, the function vector, is
added to the stream of an input without any examples.

Heads and layer are found on one half of the pairs; accuracy is that of the other half, whose inputs no example has
shown. Controls: ``zero_shot``, nothing added; ``random_heads``, the same of as many other heads; ``shuffled_labels``,
the same heads' means over the prompts that show no function.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from analyses.claims import bound_of
from analyses.result.finding import Finding
from analyses.result.result import Result
from analyses.statistics.draws import derive_rng
from analyses.statistics.intervals import bootstrap_band, bootstrap_interval, rate_interval
from analyses.statistics.pvalues import paired_permutation_pvalue, permutation_pvalue
from analyses.statistics.verdicts import verdict
from analyses.tasks.answered import (
    MINIMUM_PROMPTS,
    Scores,
    layers_given,
    numbers,
    priced,
    shown,
    task_params,
)
from analyses.tasks.by_group import group_figures, group_frames
from analyses.tasks.in_context import TEMPLATE, Alone, Pairs
from analyses.tasks.writers import check_heads_and_mlps, component_names, layers_by_writers, mean_head_outputs
from reflowlens.arguments import number_of_runs
from reflowlens.errors import ReflowlensError
from reflowlens.figures.builders import bars
from reflowlens.interventions.values import Replace
from reflowlens.metrics import target_prob
from reflowlens.models.base import HookedModel
from reflowlens.models.unwrapping import hooked_model
from reflowlens.progress import bar
from reflowlens.prompts import Prompts
from reflowlens.sweeps.sweep import sweep

_CONTEXTS = 32  # prompts with examples that means and effects are taken over, at least
DEFINITIONS = {
    "accuracy": "share of held-out inputs whose answer is the most probable token behind examples. shuffled_labels: "
    "behind examples with the outputs of others; zero_shot: behind none",
    "injected_accuracy": "the same without examples, the function vector added at the last token. zero_shot: nothing "
    "added; random_heads: as many other heads, mean over draws; shuffled_labels: the same heads behind examples with "
    "the outputs of others",
    "log_p_gain": "how much the function vector raises log p(answer), in nats, with the same controls",
    "layer": "where it is added, chosen on the half that heads were found on: the stream that this layer reads",
}


@torch.no_grad()
def function_vectors(
    model: HookedModel,
    prompts: Prompts,
    *,
    examples: int = 5,
    n_heads: int = 10,
    layers: int | Sequence[int] | None = None,
    template: str = TEMPLATE,
    draws: int = 40,
    seed: int = 0,
    quick: bool = False,
    progress: bool | None = None,
    memory: float | None = None,
) -> Result:
    """Find the heads that carry a function shown by examples, and inject what they carry where there are none.

    Args:
        model: a hooked model whose blocks are heads and MLPs.
        prompts: pairs: ``clean`` is an input (``"France"``), ``answer`` its output, one token (``" Paris"``).
        examples: pairs shown in front of an input.
        n_heads: heads whose mean outputs are added up; at most half of the model's, so that as many others are left
            to draw the control from.
        layers: where the vector may be added; default all, or 12 at equal distances.
        template: how a pair is written, with ``{input}`` and ``{answer}``; what is asked ends in front of the answer.
        draws: different sets of random heads; all that there are where these are fewer.
        quick: half of the draws, and half of the prompts with examples.
        memory: bytes that patched runs may take, as in ``rl.sweep``.

    Returns:
        A Result with frames ``heads`` (a row a head: mean indirect ``effect`` on p(answer), ``low``, ``high``, whether
        ``chosen``), ``layers`` (log p(answer) and accuracy with the vector at each layer, on the half that chooses),
        ``prompts`` (a row a held-out pair) and ``draws``; figures ``heads`` and ``accuracy``. The metrics begin with
        ``accuracy``, with examples.

    Raises:
        ReflowlensError: there are fewer than eight pairs, all of one answer, or fewer than ``examples`` to show; a
            prompt is too long for the model; the template lacks a place; or the model is not made of heads and MLPs,
            or has one head.

    Example: ``function_vectors(model, capitals, examples=4).metrics["injected_accuracy"]``
    """
    hooked = hooked_model(model)
    check_heads_and_mlps(hooked, "function vectors")
    pairs = Pairs.of(hooked, prompts, template)
    found_on, held_out = pairs.halves(seed)
    if hooked.cfg.n_layers * hooked.cfg.n_heads < 2:
        raise ReflowlensError("function vectors are held against other heads, and this model has a single one")
    n_shown, n_heads = number_of_runs(examples, "examples", 1), number_of_runs(n_heads, "n_heads", 1)
    if n_shown >= len(found_on):
        raise ReflowlensError(f"examples={examples} are to be shown, and half of the pairs are {len(found_on)}")
    n_all = hooked.cfg.n_layers * hooked.cfg.n_heads
    taken = min(n_heads, n_all // 2)
    n_sets = math.comb(n_all - taken, taken)
    draws = min(n_sets, max(20, number_of_runs(draws, "draws", 2) // (2 if quick else 1)))
    contexts = max(len(found_on), _CONTEXTS) // (2 if quick else 1)
    asked = np.resize(derive_rng(seed, "function_vectors", "asked").permutation(len(found_on)), contexts).tolist()
    at_layers = layers_given(hooked, layers)
    passes = 4 * contexts + (4 + draws) * len(held_out) + len(at_layers) * len(found_on)
    right, wrong = (found_on.in_context(asked, found_on, n_shown, seed, shuffled) for shuffled in (False, True))
    (z, written), (_, misleading) = mean_head_outputs(right), mean_head_outputs(wrong)
    cells = [
        Replace("z", z[layer, head], layer=layer, head=head, position="last") for layer, head in np.ndindex(z.shape[:2])
    ]
    show = shown(progress)
    metric = target_prob(wrong.answer.cpu())
    patched = sweep(hooked, None, wrong.texts, cells, metric, memory=memory, progress=show)
    effects = numbers(patched.effect().T)  # [prompt, head]
    order = np.argsort(-effects.mean(axis=0), kind="stable")
    best, others = order[:taken], order[taken:]
    written, misleading = written.flatten(0, 1), misleading.flatten(0, 1)
    vector = written[best].sum(dim=0)
    choosing, judging = Alone.of(found_on), Alone.of(held_out)
    rows = []
    for layer in bar(at_layers, show=show, unit="layer", desc=priced("function vector", passes)):
        scores = choosing.with_vectors(layer, vector[None])
        rows.append((layer, -float(scores.loss.mean()), float(scores.correct.mean())))
    by_layer = pd.DataFrame(rows, columns=["layer", "log_p", "accuracy"])
    layer = int(by_layer.nlargest(1, "log_p")["layer"].iloc[0])
    rng = derive_rng(seed, "function_vectors", "random_heads")
    drawn = head_sets(others, len(best), draws, rng)
    random = [written[heads].sum(dim=0) for heads in drawn]
    injected = judging.with_vectors(layer, torch.stack([vector, misleading[best].sum(dim=0), *random]))
    correct, log_p = (numbers(each).reshape(2 + draws, -1) for each in (injected.correct, -injected.loss))
    everyone = range(len(held_out))
    behind = {
        name: held_out.in_context(everyone, found_on, n_shown, seed, shuffled).unchanged()
        for name, shuffled in (("right", False), ("shuffled", True))
    }
    with_examples = {name: numbers(scores.correct) for name, scores in behind.items()}
    findings, notes = _findings(with_examples, judging.before, correct, log_p, seed, is_every_set=draws == n_sets)
    heads = _head_frame(hooked, effects, best, seed)
    names = ", ".join(heads["component"][heads["chosen"]])
    if taken < n_heads:
        notes.append(
            f"n_heads is {taken}, not {n_heads}: random heads are others, so that half of {len(order)} is most"
        )
    if draws == n_sets:
        notes.append(f"random heads are every set of {taken} others that there is: {n_sets}")
    notes.append(f"heads {names} and layer {layer}: found on {len(found_on)} pairs, judged on {len(held_out)} others")
    frames = {
        "heads": heads,
        "layers": by_layer,
        "prompts": pd.DataFrame(
            {
                "input": held_out.inputs,
                "answer": held_out.outputs,
                "with_examples": with_examples["right"] > 0,
                "zero_shot": numbers(judging.before.correct) > 0,
                "injected": correct[0] > 0,
                "log_p_zero_shot": -numbers(judging.before.loss),
                "log_p_injected": log_p[0],
            }
        ),
        "draws": pd.DataFrame({"accuracy": correct[2:].mean(axis=1), "log_p": log_p[2:].mean(axis=1)}),
        **group_frames(
            prompts,
            {
                "accuracy": with_examples["right"],
                "injected_accuracy": correct[0],
                "zero_shot": numbers(judging.before.correct),
            },
            seed,
            rows=held_out.rows,
            rates=("accuracy", "injected_accuracy", "zero_shot"),
        ),
    }
    return Result(
        name="function_vectors",
        title="Function Vectors",
        params=task_params(
            hooked,
            prompts,
            seed,
            quick,
            examples=n_shown,
            n_heads=len(best),
            template=template,
            draws=draws,
            contexts=contexts,
            passes=passes,
            last_token_runs=len(cells) * contexts,
        ),
        findings=findings | {"layer": Finding(layer)},
        frames=frames,
        figures=_figures(frames, findings) | group_figures(frames, "Accuracy on held-out inputs"),
        definitions=DEFINITIONS,
        notes=notes,
    )


def head_sets(others: NDArray[np.int64], size: int, draws: int, rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """Different sets of heads drawn at random, or all that there are: the same set again is no second draw.

    >>> len(head_sets(np.arange(3), 2, draws=20, rng=np.random.default_rng(0)))
    3
    """
    if math.comb(len(others), size) <= draws:
        return [np.array(heads) for heads in itertools.combinations(others, size)]
    found: dict[tuple[int, ...], NDArray[np.int64]] = {}
    while len(found) < draws:
        heads = np.sort(rng.choice(others, size, replace=False))
        found.setdefault(tuple(heads.tolist()), heads)
    return list(found.values())


def _findings(
    examples: dict[str, NDArray[np.float64]],
    before: Scores,
    correct: NDArray[np.float64],
    log_p: NDArray[np.float64],
    seed: int,
    is_every_set: bool,
) -> tuple[dict[str, Finding], list[str]]:
    """Accuracy with examples and with the vector; rows of `correct` and `log_p` are the vector, that of shuffled labels
    and random heads, columns held-out inputs.

    Random heads are a sample, of which the vector would be one more draw; of few heads they are all sets that there are
    (`is_every_set`), and the vector has to do better than each, over inputs."""
    alone, right, misled = numbers(before.correct), examples["right"], examples["shuffled"]
    interval = rate_interval(right, seed=seed)
    controls = {"zero_shot": alone.mean(), "shuffled_labels": misled.mean()}
    findings = {"accuracy": Finding(right.mean(), interval, controls)}
    notes = []
    if interval[0] <= max(controls.values()):
        notes.append(
            f"the model does not learn this function from examples: its accuracy is {right.mean():.3f} "
            f"({interval[0]:.3f} to {interval[1]:.3f}), with the outputs of others {misled.mean():.3f}, without "
            f"examples {alone.mean():.3f}. Heads that carry it are then not to be expected"
        )
    vector, shuffled, random = correct[0], correct[1], correct[2:]
    interval = rate_interval(vector, seed=seed)
    controls = {"zero_shot": alone.mean(), "random_heads": random.mean(), "shuffled_labels": shuffled.mean()}
    each_set = [paired_permutation_pvalue(vector - other, seed=seed) for other in random] if is_every_set else []
    p = max(
        *(each_set or [permutation_pvalue(vector.mean(), random.mean(axis=1))]),
        paired_permutation_pvalue(vector - shuffled, seed=seed),
        paired_permutation_pvalue(vector - alone, seed=seed),
    )
    bound = bound_of("function_vectors", "injected_accuracy", controls)
    judged = verdict(interval, bound, p, minimum_units=MINIMUM_PROMPTS, units=len(vector))
    findings["injected_accuracy"] = Finding(vector.mean(), interval, controls, judged)
    gain = log_p + numbers(before.loss)
    findings["log_p_gain"] = Finding(
        gain[0].mean(),
        bootstrap_interval(gain[0], seed=seed),
        {"random_heads": gain[2:].mean(), "shuffled_labels": gain[1].mean()},
    )
    return findings, notes


def _head_frame(model: HookedModel, effects: NDArray[np.float64], chosen: NDArray[np.int64], seed: int) -> pd.DataFrame:
    named = component_names(model).query("kind == 'head'").reset_index(drop=True)
    low, high = bootstrap_band(effects, seed=seed)
    among = np.isin(np.arange(len(named)), chosen)
    return named.assign(effect=effects.mean(axis=0), low=low, high=high, chosen=among)


def _figures(frames: dict[str, pd.DataFrame], findings: dict[str, Finding]) -> dict[str, Any]:
    rows = []
    for metric, name in (("accuracy", "with_examples"), ("injected_accuracy", "function_vector")):
        finding = findings[metric]
        assert finding.interval is not None
        rows.append((name, finding.value, *finding.interval, "measured"))
        rows += [(f"{name}, {control}", value, np.nan, np.nan, control) for control, value in finding.controls.items()]
    accuracy = pd.DataFrame(rows, columns=["series", "accuracy", "low", "high", "kind"])
    return {
        "heads": layers_by_writers(
            frames["heads"], "effect", ["low", "high", "chosen"], "Indirect effect of heads", "probability"
        ),
        "accuracy": bars(
            accuracy,
            "series",
            "accuracy",
            "low",
            "high",
            color="kind",
            controls=("zero_shot", "random_heads", "shuffled_labels"),
            horizontal=True,
            title="Accuracy on held-out inputs",
        ),
    }
