"""Ablation of heads and MLPs: what a task loses without each of them.

What replaces a component's output, at every position of the prompt (``by``):

* ``"zero"``: nothing. The stream is then one that the model has never seen, and what is lost may be that alone.
* ``"mean"``: the mean over the prompts, at each position counted from the right (the last token's mean for the last
  token, and so on), over the prompts that reach so far. What the prompts have in common stays.
* ``"resample"``: what the component writes in another prompt, aligned in the same way, one with another answer where
  there is one. What is particular to this prompt is lost, and the stream stays one that occurs. A prompt that is longer
  than the other takes the other's first position for what lies in front of it.

Two baselines: ablating nothing, and a random direction as long as the change that the ablation makes to the stream, at
each position of each prompt. A component whose ablation does no more than that is one of many things that may be
pushed.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from analyses.claims import bound_of
from analyses.result.finding import Finding
from analyses.result.result import Result
from analyses.statistics.draws import derive_generator, derive_rng
from analyses.statistics.familywise import max_statistic_pvalues
from analyses.statistics.intervals import bootstrap_band, bootstrap_interval
from analyses.statistics.pvalues import paired_permutation_pvalue
from analyses.statistics.verdicts import SIGNIFICANCE, verdict
from analyses.tasks.answered import (
    DEFINITIONS,
    MINIMUM_PROMPTS,
    Answered,
    numbers,
    performance_findings,
    performance_note,
    priced,
    shown,
    some_prompts,
    task_params,
)
from analyses.tasks.by_group import group_figures, group_frames
from analyses.tasks.writers import (
    block_of,
    check_heads_and_mlps,
    component_names,
    divisor_behind,
    layers_by_writers,
    written_by_heads,
)
from reflowlens.arguments import is_one_of
from reflowlens.errors import ReflowlensError
from reflowlens.figures.builders import bars
from reflowlens.interventions.values import Intervention, Replace, Steer
from reflowlens.metrics import Logits, Metric, Reference, Score
from reflowlens.models.base import HookedModel
from reflowlens.models.unwrapping import hooked_model
from reflowlens.progress import bar
from reflowlens.prompts import Prompts
from reflowlens.sweeps.sweep import sweep

By: TypeAlias = Literal["zero", "mean", "resample"]
WAYS: tuple[By, ...] = ("zero", "mean", "resample")
SMALLEST = 0.05  # effect that is counted, as a share of the logit difference
_FLIPS = 2000
_BOTH = "logit_diff + i loss"
_SHOWN = 20
OWN_DEFINITIONS = {
    "largest_drop": "how much logit_diff falls, on one half of the prompts, without the component that lowers it most "
    "on the other half. random_direction: the same for a random direction as long as the change; nothing: for none",
    "largest_drop_loss": "how much the loss of the answer, -log p in nats, rises with it",
    "components_with_effect": "how many heads and MLPs change logit_diff by a twentieth of it or more, and otherwise "
    f"than a random direction as long does, family-wise p < {SIGNIFICANCE} of sign flips over prompts",
}


@torch.no_grad()
def head_ablation(
    model: HookedModel,
    prompts: Prompts,
    by: By = "zero",
    *,
    seed: int = 0,
    quick: bool = False,
    progress: bool | None = None,
    memory: float | None = None,
) -> Result:
    """The effect of ablating each head and each MLP on the logit difference and the loss of the answer.

    Each component alone, at every position, in the pass as it then goes on. The cost is stated in ``params["passes"]``,
    whole passes over a prompt: for n prompts about n times the number of layers times the heads of a layer.

    Args:
        model: a hooked model whose blocks are heads and MLPs.
        prompts: with columns ``clean`` and ``answer``; ``wrong_answer`` is used where it is.
        by: ``"zero"``, ``"mean"`` over the prompts by position from the right, or ``"resample"`` from other prompts.
        seed: of other prompts, random directions and resamples.
        quick: a third of the prompts.
        memory: bytes that patched runs may take, as in ``rl.sweep``.

    Returns:
        A Result with frames ``components`` (a row a component: the mean change ``effect`` of the logit difference and
        ``loss`` of -log p(answer), each with ``low`` and ``high`` over prompts; ``random`` and ``random_loss``, the
        same of a random direction; ``p``, family-wise, that ``effect`` is not ``random``; the first row is ``nothing``)
        and ``effects`` (a row a prompt and component); figures ``layers`` and ``strongest``. The metrics begin with
        ``accuracy`` and ``logit_diff``, of the model as it is.

    Raises:
        ReflowlensError: ``by`` is unknown, there are fewer than four prompts or no answers, or the model is not made of
            heads and MLPs.

    Example: ``head_ablation(model, prompts, by="mean").frames["components"].nsmallest(5, "effect")``
    """
    if not is_one_of(by, WAYS):
        raise ReflowlensError(f"by must be 'zero', 'mean' or 'resample', got {by!r}")
    hooked = hooked_model(model)
    check_heads_and_mlps(hooked, "ablation of heads and MLPs")
    chosen = some_prompts(prompts, quick, seed)
    answered = Answered.of(hooked, chosen, least=4)
    named, batches = component_names(hooked), list(answered.batches())
    replaced = Replacements(answered, by, seed)
    generator = derive_generator(seed, "head_ablation", "random_direction")
    changes: list[list[Complex[Tensor, "cell prompt"]]] = [[] for _ in range(hooked.cfg.n_layers)]
    passes = _passes(hooked, len(chosen))
    steps = [(batch, layer) for batch in batches for layer in range(hooked.cfg.n_layers)]
    for batch, layer in bar(steps, show=shown(progress), unit="layer", desc=priced(f"ablation by {by}", passes)):
        cells, metric = _cells(replaced, batch, layer, generator), Metric(_BOTH, "last", partial(_both, batch))
        found = sweep(hooked, None, batch.texts, cells, metric, memory=memory, progress=False)
        changes[layer].append(found.effect().cpu())
    change = torch.stack([torch.cat(parts, dim=1) for parts in changes])  # [layer, cell, prompt]
    ablated, random = (change[:, start::2].flatten(0, 1) for start in (1, 2))
    scores = answered.unchanged()
    findings = performance_findings(scores, seed)
    notes = performance_note(findings, answered.wrong is not None)
    frame = _component_frame(named, change[:, 0], ablated, random, seed)
    order = derive_rng(seed, "head_ablation", "halves").permutation(len(chosen))
    found_on, held_out = order[: len(order) // 2].tolist(), order[len(order) // 2 :].tolist()
    strongest = int(ablated.real[:, found_on].mean(dim=1).argmin())
    at_strongest, beside = (values[strongest, held_out] for values in (ablated, random))
    own = _findings(at_strongest, beside, findings["logit_diff"].value, seed)
    notes.append(
        f"largest_drop is of {named['component'][strongest]}: chosen on {len(found_on)} prompts, judged on "
        f"{len(held_out)} others"
    )
    frames = {
        "components": frame,
        "effects": _long(named, ablated),
        **group_frames(
            chosen,
            {"largest_drop": numbers(-at_strongest.real), "random_direction": numbers(-beside.real)},
            seed,
            rows=held_out,
        ),
    }
    matters = frame["effect"].abs() >= SMALLEST * abs(findings["logit_diff"].value)
    own["components_with_effect"] = Finding(float(((frame["p"] < SIGNIFICANCE) & matters).sum()))
    return Result(
        name="head_ablation",
        title="Ablation of Heads and MLPs",
        params=task_params(hooked, chosen, seed, quick, by=by, passes=passes),
        findings=findings | own,
        frames=frames,
        figures=_figures(frame, by) | group_figures(frames, "Loss of the strongest component"),
        definitions=DEFINITIONS | OWN_DEFINITIONS,
        notes=notes,
    )


def _both(batch: Answered, model: HookedModel, reference: Reference) -> Score:
    """Logit difference and loss as one complex number: a sweep measures one a prompt, and both come of the same run."""

    def score(logits: Logits, prompts: Int[Tensor, " row"]) -> Complex[Tensor, " row"]:
        found = batch.of_logits(logits.vocabulary()[:, 0], prompts)
        return torch.complex(found.logit_diff, found.loss)

    return score


class Replacements:
    """What stands in for the output of a layer's heads and MLP in an ablated run.

    Args:
        answered: all prompts, of which means are taken and others drawn.
        seed: of the other prompt that each takes from.
    """

    def __init__(self, answered: Answered, by: By, seed: int) -> None:
        self.answered, self.by = answered, by
        self.other = _others(answered.answer.tolist(), derive_rng(seed, "head_ablation", "others"))
        self._means: dict[int, list[Tensor]] = {}

    def of(self, batch: Answered, layer: int) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs ``z`` [prompt, pos, head, d_head] and ``mlp_out`` [prompt, pos, d_model], own and replaced."""
        own = outputs(batch, layer)
        if self.by == "zero":
            return own, [torch.zeros_like(x) for x in own]
        from_end = batch.last[:, None] - torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
        if self.by == "mean":
            return own, [mean[from_end.clamp(min=0)] for mean in self._means_of(layer)]
        donors = self.answered.select([self.other[row] for row in batch.rows])
        position = (donors.last[:, None] - from_end).clamp(min=0).minimum(donors.last[:, None])
        return own, [x[donors.each[:, None], position] for x in outputs(donors, layer)]

    def _means_of(self, layer: int) -> list[Float[Tensor, "from_end *rest"]]:
        """Means over all prompts by position from the right."""
        if layer not in self._means:
            totals: list[Tensor] = []
            count = torch.zeros(self.answered.tokens.shape[1], device=self.answered.tokens.device)
            for batch in self.answered.batches():
                width = batch.tokens.shape[1]
                position = batch.last[:, None] - torch.arange(width, device=count.device)
                reached = position >= 0
                count[:width] += reached.sum(dim=0)
                for i, x in enumerate(outputs(batch, layer)):
                    aligned = x[batch.each[:, None], position.clamp(min=0)]
                    part = torch.einsum("bp,bp...->p...", reached.to(x.dtype), aligned)
                    if len(totals) == i:
                        totals.append(part.new_zeros(len(count), *part.shape[1:]))
                    totals[i][:width] += part
            self._means = {layer: [total / count.view(-1, *[1] * (total.ndim - 1)) for total in totals]}
        return self._means[layer]


def outputs(batch: Answered, layer: int) -> list[Tensor]:
    """``z`` [prompt, pos, head, d_head] and ``mlp_out`` [prompt, pos, d_model] of a layer, and the divisor of the norm
    behind attention, [prompt, pos, 1], where there is one."""
    names = [f"blocks.{layer}.attn.hook_z", f"blocks.{layer}.hook_mlp_out"]
    names += divisor_behind(block_of(batch.model, layer), layer)
    _, cache = batch.model.run_with_cache(
        batch.tokens, stop_at_layer=layer + 1, names_filter=names, return_cache_object=False
    )
    return [cache[name] for name in names]


def _others(answers: list[int], rng: np.random.Generator) -> list[int]:
    """Another prompt for each, of another answer where there is one."""
    everyone = np.arange(len(answers))
    found = []
    for row, answer in enumerate(answers):
        different = everyone[np.asarray(answers) != answer]
        found.append(int(rng.choice(different if len(different) else np.delete(everyone, row))))
    return found


def _cells(replaced: Replacements, batch: Answered, layer: int, generator: torch.Generator) -> list[list[Intervention]]:
    """Ablating nothing, then each head and the MLP of a layer, each with its random direction behind it."""
    (z, mlp, *scale), (new_z, new_mlp, *_) = replaced.of(batch, layer)
    cells: list[list[Intervention]] = [[Replace("z", z, layer=layer)]]
    changes = written_by_heads(block_of(batch.model, layer), new_z - z, scale[0] if scale else None).unbind(dim=2)
    for head, change in enumerate(changes):
        cells.append([Replace("z", new_z[:, :, head : head + 1], layer=layer, head=head)])
        cells.append([Steer("attn_out", _as_long(change, generator), layer=layer)])
    cells.append([Replace("mlp_out", new_mlp, layer=layer)])
    cells.append([Steer("mlp_out", _as_long(new_mlp - mlp, generator), layer=layer)])
    return cells


def _as_long(change: Float[Tensor, "prompt pos d_model"], generator: torch.Generator) -> Tensor:
    """A random direction at every position, as long as the change there."""
    drawn = torch.randn(change.shape, generator=generator).to(change)
    return F.normalize(drawn, dim=-1) * change.norm(dim=-1, keepdim=True)


def _component_frame(
    named: pd.DataFrame,
    nothing: Complex[Tensor, "layer prompt"],
    ablated: Complex[Tensor, "component prompt"],
    random: Complex[Tensor, "component prompt"],
    seed: int,
) -> pd.DataFrame:
    columns: dict[str, NDArray[np.float64]] = {}
    for name, values in (("effect", ablated.real), ("loss", ablated.imag)):
        low, high = bootstrap_band(numbers(values.T), seed=seed)
        prefix = "" if name == "effect" else "loss_"
        columns |= {name: numbers(values.mean(dim=1)), f"{prefix}low": low, f"{prefix}high": high}
    columns |= {"random": numbers(random.real.mean(dim=1)), "random_loss": numbers(random.imag.mean(dim=1))}
    difference = numbers((ablated.real - random.real).T)
    signs = derive_rng(seed, "head_ablation", "signs").choice([-1.0, 1.0], (_FLIPS, len(difference)))
    p = max_statistic_pvalues(difference.mean(axis=0), signs @ difference / len(difference))
    none = float(nothing.real.mean())
    first = pd.DataFrame([{"component": "nothing", "kind": "nothing", "layer": -1, "head": -1}])
    first = first.assign(**dict.fromkeys(columns, 0.0), p=1.0)
    first["effect"], first["loss"] = none, float(nothing.imag.mean())
    return pd.concat([first, named.assign(**columns, p=p)], ignore_index=True)


def _findings(
    ablated: Complex[Tensor, " prompt"], random: Complex[Tensor, " prompt"], logit_diff: float, seed: int
) -> dict[str, Finding]:
    """What the component that matters most on the other half of the prompts does on this one."""
    drop, control = (numbers(-values.real) for values in (ablated, random))
    rise, beside = (numbers(values.imag) for values in (ablated, random))
    interval = bootstrap_interval(drop, seed=seed)
    p = paired_permutation_pvalue(drop - control, seed=seed)
    controls = {"random_direction": float(control.mean()), "nothing": 0.0}
    bound = bound_of("head_ablation", "largest_drop", controls, of=logit_diff)
    judged = verdict(interval, bound, p, minimum_units=MINIMUM_PROMPTS, units=len(drop))
    return {
        "largest_drop": Finding(drop.mean(), interval, controls, judged),
        "largest_drop_loss": Finding(
            rise.mean(), bootstrap_interval(rise, seed=seed), {"random_direction": beside.mean(), "nothing": 0.0}
        ),
    }


def _passes(model: HookedModel, n_prompts: int) -> int:
    """Whole passes over a prompt: a run that is changed at a layer is run from that layer on."""
    layers, per_layer = model.cfg.n_layers, 2 * (model.cfg.n_heads + 1)
    return round(n_prompts * (per_layer * (layers + 1) / 2 + 2 * layers))


def _long(named: pd.DataFrame, ablated: Complex[Tensor, "component prompt"]) -> pd.DataFrame:
    component, prompt = np.indices(ablated.shape).reshape(2, -1)
    rows = named.iloc[component].reset_index(drop=True)
    return rows.assign(prompt=prompt, effect=numbers(ablated.real).ravel(), loss=numbers(ablated.imag).ravel())


def _figures(frame: pd.DataFrame, by: By) -> dict[str, Any]:
    strongest = frame.loc[frame["effect"].abs().nlargest(_SHOWN).index]
    control = strongest.assign(effect=strongest["random"], low=np.nan, high=np.nan, replaced_by="random_direction")
    return {
        "layers": layers_by_writers(
            frame, "effect", ["low", "high", "random", "loss", "p"], f"Change of the logit difference: {by}", "logits"
        ),
        "strongest": bars(
            pd.concat([strongest.assign(replaced_by=by), control]),
            "component",
            "effect",
            "low",
            "high",
            color="replaced_by",
            controls=("random_direction",),
            horizontal=True,
            title="Largest effects of ablation",
            y_title="change of the logit difference",
        ),
    }
