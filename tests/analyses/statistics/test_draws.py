from __future__ import annotations

import sys
from collections import Counter
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from transformer_lens.utilities.statistics import derive_generator

from analyses.claims import QUICK_UNTRAINED
from analyses.registry import EXPERIMENTS
from analyses.runner.suite import run_experiment
from analyses.statistics.draws import derive_rng, derive_seed
from reflowlens.models import build_model
from tests.support.planted import CONFIG, of_architecture

FEW = {"rotations": 2, "permutations": 5, "new_tokens": 2}
SHARED = {
    "bootstrap_band": "resampling is no control: every metric over the same units takes the same resamples",
    "paired_permutation_pvalue": "neither are sign flips",
    "resampled_means": "as bootstrap_band",
    "agreement": "as bootstrap_band: effects of interventions and of their controls are resampled alike",
    "relative_size": "as agreement",
    "build_model": "the same untrained models for all experiments",
    "generate": "texts are continued from the same seeds with and without an edit",
}
CONTROLS = {
    "gaussian_view",
    "gaussian_matrix",
    "gaussian_singular_values",
    "permuted_labels",
    "random_directions",
    "random_order",
    "random_recipes",
    "random_rotation",
    "random_subspace",
    "shuffle_columns",
    "shuffled",
    "with_random_recipes",
    "others_of_same_length",
    "frequency_matched",
    "context_prompts",
    "_shuffled_norm",
}


class Made(NamedTuple):
    """A generator: whose, from which seed, and the function that draws from it."""

    library: str
    seed: int
    maker: str


def _maker(frame: FrameType | None) -> str:
    """The first function outside the module that makes generators by name; "" for a seed that is handed on."""
    while frame is not None:
        name, module = frame.f_code.co_name, frame.f_globals["__name__"]
        if name == "derive_seed":
            return ""
        if name not in ("derive_generator", "derive_rng") and module != __name__ and not name.startswith("<"):
            return name
        frame = frame.f_back
    raise AssertionError("a generator is made by some function")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Made]:
    """Every generator that is made from now on."""
    found: list[Made] = []
    for experiment in EXPERIMENTS.values():
        experiment.load()  # libraries make generators of their own while they are imported

    def note(library: str, seed: Any) -> None:
        if maker := _maker(sys._getframe(2)):
            found.append(Made(library, int(seed), maker))

    class Recorded(torch.Generator):
        def manual_seed(self, seed: int) -> torch.Generator:
            note("torch", seed)
            return super().manual_seed(seed)

    default_rng = np.random.default_rng

    def recorded_rng(seed: Any = None) -> np.random.Generator:
        if not isinstance(seed, np.random.Generator):  # SciPy asks again with the generator that it was given
            note("numpy", seed)
        return default_rng(seed)

    monkeypatch.setattr(torch, "Generator", Recorded)
    monkeypatch.setattr(np.random, "default_rng", recorded_rng)
    return found


def test_no_two_random_controls_of_a_run_are_one_draw_and_another_seed_draws_all_anew(made: list[Made]) -> None:
    model = build_model(of_architecture("reflow", n_layers=2, d_model=16, d_head=8, n_signals=16, d_mlp=16))
    with torch.no_grad():
        model.embed.W_basis[0] *= 2  # a basis has strongest directions, which are held against random ones
    runs = []
    for seed in (0, 1):
        made.clear()
        for experiment in EXPERIMENTS.values():
            run_experiment(experiment, model, {"seed": seed, "quick": True, **FEW})
        runs.append(list(made))
    for run in runs:
        drawn = [each for each in run if each.maker not in SHARED]
        assert {each.maker for each in drawn} >= CONTROLS
        assert not [each for each, times in Counter(drawn).items() if times > 1]
        assert len({each.seed for each in drawn}) == len(drawn)  # nor does one library's seed serve the other
        assert len({each.seed for each in run if each.maker == "build_model"}) == QUICK_UNTRAINED
        assert not {each.seed for each in drawn} & {each.seed for each in run if each.maker in SHARED}
    first, second = ({each.seed for each in run if each.maker not in {"generate"}} for run in runs)
    assert not first & second


def test_generators_are_those_of_their_labels() -> None:
    assert derive_seed(3, "swap", 1) == derive_generator(3, "swap", 1).initial_seed()
    draws = {
        (seed, *labels): float(derive_rng(seed, *labels).normal())
        for seed in (0, 1)
        for labels in ((), ("swap",), ("graft",), ("swap", 0), ("swap", 1))
    }
    assert len(set(draws.values())) == len(draws)
    assert draws[0, "swap", 1] == float(derive_rng(0, "swap", 1).normal())


@pytest.mark.parametrize("seed", [0, 7])
def test_untrained_models_have_numbers_and_seeds_of_their_own(seed: int) -> None:
    from analyses.controls.nulls import untrained_model

    model = build_model(CONFIG)
    one, two, other = (
        untrained_model(model, *of).state_dict()["embed.W_recipe"] for of in ((seed, 1), (seed, 2), (seed + 1, 1))
    )
    assert not torch.equal(one, two)
    assert not torch.equal(two, other)
    assert torch.equal(one, untrained_model(model, seed).state_dict()["embed.W_recipe"])
