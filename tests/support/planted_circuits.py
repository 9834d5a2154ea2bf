"""Transcoders trained on six planted circuits of two hops: which of them keep the second hop; the report of
docs/attribution.md, in a CPU minute:

python -m tests.support.planted_circuits
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import reflowlens as rl
from analyses.features.jacobians import jacobian_match
from analyses.features.planted_circuits import OTHER, SOURCES, TARGETS, PlantedCircuit, exact_dictionary, two_hop
from pretraining.dictionaries.config import DictionarySpec
from pretraining.dictionaries.learner import Learner
from reflowlens.dictionaries.config import WITH_K
from reflowlens.dictionaries.dictionary import Dictionary
from reflowlens.errors import ReflowlensError

LENGTH, PRESENT = 6, 0.3  # tokens of a text, and how many of them are sources


def texts(n: int, batch: int, generator: torch.Generator) -> Tensor:
    """Random tokens: sources of ``n`` circuits among others."""
    sources = torch.tensor(list(SOURCES[:n].encode()))
    chosen = sources[torch.randint(n, (batch, LENGTH), generator=generator)]
    return torch.where(torch.rand(batch, LENGTH, generator=generator) < PRESENT, chosen, ord(OTHER))


@torch.no_grad()
def activations(circuit: PlantedCircuit, n: int, batch: int, seed: int = 0) -> dict[str, Tensor]:
    """What the MLPs read and write in a batch of texts, by hook point."""
    cfg = exact_dictionary(circuit.model).cfg
    tokens = texts(n, batch, torch.Generator().manual_seed(seed))
    cache = circuit.model.run_with_cache(tokens, names_filter=[*cfg.reads, *cfg.writes])[1]
    return {point: cache[point].flatten(0, 1) for point in (*cfg.reads, *cfg.writes)}


def fit(circuit: PlantedCircuit, n: int, *, steps: int = 1500, batch: int = 384, **spec: object) -> Dictionary:
    """A dictionary of a circuit's model, trained as a run does."""
    described = DictionarySpec(name="planted", n_features=3 * n, **spec)  # type: ignore[arg-type]
    learner = Learner(
        described,
        described.of(circuit.model),
        learning_rate=4e-3,
        betas=(0.9, 0.999),
        dead_after=steps * batch // 10,
        device=torch.device("cpu"),
    )
    read, generator = activations(circuit, n, 4096), torch.Generator().manual_seed(0)
    squares = {name: float(x.square().sum(1).mean()) for name, x in read.items()}
    learner.start_from({name: x.mean(0) for name, x in read.items()}, squares)
    for step in range(steps):
        drawn = torch.randint(4096 * LENGTH, (batch,), generator=generator)
        chosen = {name: x[drawn] for name, x in read.items()}
        for group in learner.optimizer.param_groups:
            group["lr"] = 4e-3 * min(1, (step + 1) / 50, (steps - step) / (0.3 * steps))
        if described.activation not in WITH_K and 0 < step < steps // 2 and step % (steps // 10) == 0:
            learner.resample(chosen, seed=[0, step])
        learner.step(chosen, clip=1.0, dtype=torch.float32, world_size=1)
    return learner.result()


@torch.no_grad()
def kept(circuit: PlantedCircuit, dictionary: Dictionary, n: int) -> dict[str, float]:
    """What a dictionary has of the second hop.

    Returns:
        ``fvu`` and ``l0`` of both blocks on new texts, ``unexplained`` derivative of block 1, and ``second_hop``: of
        what features add to the logit of B behind A, the share that those of block 1 add (1 in the model), as graphs
        show it, the mean over the circuits.
    """
    read = activations(circuit, n, 512, seed=1)
    cfg, found = dictionary.cfg, dictionary.encode([read[point] for point in dictionary.cfg.reads])
    row: dict[str, float] = {}
    for i, (point, features) in enumerate(zip(cfg.writes, found, strict=True)):
        y, said = read[point], dictionary.reconstruct(i, found, read[cfg.reads[i]])
        row |= {f"fvu_{i}": float((y - said).square().sum() / (y - y.mean(0)).square().sum())}
        row |= {f"l0_{i}": float((features > 0).sum(1).float().mean())}
    generator = torch.Generator().manual_seed(2)
    some = [bytes(line.tolist()).decode() for line in texts(n, 40, generator)]
    row["unexplained"] = float(jacobian_match(circuit.model, dictionary, some)["unexplained"][1])  # type: ignore[arg-type]
    shares = []
    for source, target in zip(SOURCES[:n], TARGETS[:n], strict=True):
        try:
            graph = rl.attribute(circuit.model, f"{OTHER}{source}{OTHER}", dictionary, target, progress=False)
        except ReflowlensError:  # no feature is active
            continue
        edges = graph.edges.merge(graph.nodes, left_on="source", right_on="node").query("kind == 'feature'")
        added = edges[edges["target_x"] == f"logit:{ord(target)}"].groupby("layer")["weight"].sum()
        shares.append(added.get(1, 0.0) / added.sum())
    return row | {"second_hop": float(np.mean(shares))}


def main() -> None:
    n = 6
    circuit = two_hop(n)
    exact = exact_dictionary(circuit.model)
    active = exact.each_layer()[0].encode(activations(circuit, n, 512)[exact.cfg.reads[0]]) > 0
    l0 = float(active.sum(1).float().mean())
    print(f"{n} circuits, {l0:.2f} of them active at a position")
    specs: tuple[dict[str, Any], ...] = (
        {"activation": "relu", "l0": 1.2 * l0},
        {"activation": "jumprelu", "l0": l0},
        {"activation": "topk", "k": 2},
        {"activation": "batchtopk", "k": 2},
    )
    rows = [
        {"kind": kind, "activation": spec["activation"], **kept(circuit, fit(circuit, n, kind=kind, **spec), n)}
        for kind in ("transcoder", "cross_layer")
        for spec in specs
    ]
    print(pd.DataFrame(rows).to_string(index=False, float_format="{:.3f}".format))


if __name__ == "__main__":
    main()
