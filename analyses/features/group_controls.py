"""Whether the groups of attribution graphs are more than any nodes put together: random ones take the same test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

import reflowlens as rl
from analyses.claims import bound_of
from analyses.result import Finding, Result
from analyses.statistics import bootstrap_interval, derive_rng, holm, paired_permutation_pvalue, rate_interval, verdict
from reflowlens.circuits.attribution.grouped.alike import UNITS, Numbers
from reflowlens.circuits.attribution.grouped.groups import Groups
from reflowlens.circuits.attribution.grouped.jointly import JointRemoval
from reflowlens.dictionaries.dictionary import Dictionary
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel

TESTS = ("additive", "alike", "both")
_DEFINITIONS = {
    "additive": "share of clusters whose joint removal is the sum of their members' within the tolerance",
    "alike": "share of clusters of whose members the mean cosine of what their removal does is at least the least",
    "both": "share of clusters that pass both, and are groups as they are",
}


def group_controls(
    model: HookedModel,
    dictionary: Dictionary | None,
    prompts: Sequence[str],
    *,
    draws: int = 3,
    seed: int = 0,
    **options: Any,
) -> Result:
    """The test that groups must pass, of clusters before any is split, and of random nodes of the same layers.

    Args:
        prompts: two or more, the units of the intervals.
        draws: random groups a cluster.
        options: of ``graph.groups``.

    Returns:
        Metrics ``additive``, ``alike``, ``both``: the share of a prompt's clusters that pass, the mean over prompts,
        beside ``random groups``; ``likeness`` and ``deviation``: their means. Frame ``prompts``: a row a prompt:
        ``clusters``, ``groups`` that are kept in the end, and every metric of both.

    Raises:
        ReflowlensError: there are fewer than two prompts, or no prompt has a cluster.
    """
    rows = []
    for i, prompt in enumerate(prompts):
        groups = rl.attribute(model, prompt, dictionary, progress=False).groups(**options)
        rows.append({"prompt": prompt, **_of_prompt(groups, draws, derive_rng(seed, "random_groups", i))})
    frame = pd.DataFrame(rows)
    with_clusters = frame[frame["clusters"] > 0]
    if len(with_clusters) < 2:
        raise ReflowlensError(f"two prompts with clusters at least are needed, got {len(with_clusters)}")
    values = {
        metric: [with_clusters[f"{metric}{suffix}"].to_numpy() for suffix in ("", "_random")]
        for metric in (*TESTS, "deviation", "likeness")
    }
    p = holm([paired_permutation_pvalue(values[test][0] - values[test][1], seed=seed) for test in TESTS])
    findings = {}
    for (metric, (found, random)), p_value in zip(values.items(), p, strict=False):
        interval, control = rate_interval(found, seed=seed), float(random.mean())
        bound = bound_of("group_controls", metric, {"random groups": control})
        judged = verdict(interval, bound, float(p_value), minimum_units=6, units=len(found))
        findings[metric] = Finding(
            float(found.mean()), interval, {"random groups": control}, judged, _DEFINITIONS[metric]
        )
    for metric in ("deviation", "likeness"):
        found, random = values[metric]
        interval = bootstrap_interval(found, seed=seed)
        findings[metric] = Finding(float(found.mean()), interval, {"random groups": float(random.mean())})
    low, high = rate_interval(with_clusters["both_random"].to_numpy(), seed=seed)
    notes = [
        f"random groups pass both tests in {with_clusters['both_random'].mean():.3f} ({low:.3f} to {high:.3f}) of the "
        f"cases, the first in {with_clusters['additive_random'].mean():.3f}"
    ]
    params = {"prompts": list(prompts), "draws": draws, "seed": seed}
    return Result(
        "group_controls",
        "Groups beside random groups",
        params,
        frames={"prompts": frame},
        findings=findings,
        notes=notes,
    )


def _of_prompt(groups: Groups, draws: int, rng: np.random.Generator) -> dict[str, float]:
    clusters = groups.tested[groups.tested["round"] == 0] if len(groups.tested) else groups.tested
    row: dict[str, float] = {"clusters": len(clusters), "groups": len(groups)}
    if not len(clusters):
        return row
    number = {node: i for i, node in enumerate(groups.whole.nodes["node"])}
    drawn = [
        random_group(groups, [number[node] for node in members], rng)
        for members in clusters["members"]
        for _ in range(draws)
    ]
    random = groups.removals.agreement(drawn)
    own = [JointRemoval(*row) for row in clusters[["deviation", "likeness"]].to_numpy().tolist()]
    return row | _passed(groups, own, "") | _passed(groups, random, "_random")


def random_group(groups: Groups, members: Sequence[int], rng: np.random.Generator) -> Numbers:
    """As many features or neurons of the graph, of the same layers, each once."""
    nodes = groups.whole.nodes
    layers = nodes["layer"].where(nodes["kind"].isin(UNITS) & (nodes["activation"] != 0)).to_numpy()
    wanted, counts = np.unique(nodes["layer"].to_numpy()[list(members)], return_counts=True)
    parts = [
        rng.choice(np.flatnonzero(layers == layer), count, replace=False)
        for layer, count in zip(wanted, counts, strict=True)
    ]
    return tuple(sorted(int(node) for node in np.concatenate(parts)))


def _passed(groups: Groups, agreements: Sequence[JointRemoval], suffix: str) -> dict[str, float]:
    deviation, likeness = np.array(agreements).T
    additive, alike = deviation <= groups.tolerance, likeness >= groups.alike
    values = dict(
        zip((*TESTS, "deviation", "likeness"), (additive, alike, additive & alike, deviation, likeness), strict=True)
    )
    return {f"{name}{suffix}": float(each.mean()) for name, each in values.items()}
