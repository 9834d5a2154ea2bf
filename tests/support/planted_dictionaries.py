"""Dictionaries of every kind trained on planted features; the report of docs/dictionaries.md, in a CPU minute:

python -m tests.support.planted_dictionaries
"""

from __future__ import annotations

import pandas as pd
import torch

from analyses.features.planted import Planted, planted_data, recover, summary
from pretraining.dictionaries.config import DictionarySpec
from pretraining.dictionaries.learner import Learner
from reflowlens.dictionaries.config import ACTIVATIONS, WITH_K, DictionaryConfig
from reflowlens.dictionaries.dictionary import Dictionary

POINT = ("planted",)


def planted_config(planted: Planted, activation: str, n_features: int) -> DictionaryConfig:
    """An autoencoder of the planted vectors, with as many features active as fire."""
    d = planted.directions.shape[1]
    k = round(planted.l0) if activation in WITH_K else None
    return DictionaryConfig(POINT, POINT, d, d, n_features, activation, k)  # type: ignore[arg-type]


def fit_planted(
    planted: Planted, activation: str, *, n_features: int, steps: int, batch: int, learning_rate: float
) -> Dictionary:
    """Train one, with warm-up, decay and the resampling of dead features that a run has."""
    spec = DictionarySpec(
        name="planted", kind="sae", n_features=n_features, activation=activation, k=round(planted.l0), l0=planted.l0
    )
    learner = Learner(
        spec,
        planted_config(planted, activation, n_features),
        learning_rate=learning_rate,
        betas=(0.9, 0.999),
        dead_after=steps * batch // 10,
        device=torch.device("cpu"),
    )
    first = planted.sample(4096)[0]
    learner.start_from({"planted": first.mean(0)}, {"planted": float(first.square().sum(1).mean())})
    for step in range(steps):
        x = planted.sample(batch, part=step + 1)[0]
        for group in learner.optimizer.param_groups:
            group["lr"] = learning_rate * min(1, (step + 1) / 50, (steps - step) / (0.3 * steps))
        if activation not in WITH_K and 0 < step < steps // 2 and step % (steps // 10) == 0:
            learner.resample({"planted": x}, seed=[0, step])
        learner.step({"planted": x}, clip=1.0, dtype=torch.float32, world_size=1)
    return learner.result()


def main() -> None:
    planted = planted_data()
    fresh = Dictionary.fresh(planted_config(planted, "topk", 64))
    frames = [summary(recover(fresh, planted)).assign(activation="fresh")]
    for activation in ACTIVATIONS:
        found = fit_planted(planted, activation, n_features=64, steps=1500, batch=512, learning_rate=4e-3)
        frames.append(summary(recover(found, planted)).assign(activation=activation))
    print(f"{len(planted.kind)} features, {planted.l0:.2f} of them fire in a vector")
    print(pd.concat(frames).to_string(index=False, float_format="{:.3f}".format))


if __name__ == "__main__":
    main()
