"""Critical strengths: how strongly a concept's recipe must be injected at a prompt's end for the model to say it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from analyses.measures.steering import Critical, critical_strength, lost_again
from analyses.statistics.draws import derive_generator
from reflowlens.signals import SignalView
from reflowlens.sweeps.injections import Injections, rms

DOUBLINGS = 8  # from the smallest strength that is tried to the limit
_LOGITS_AT_ONCE = 2**22


@dataclass(frozen=True)
class Setup:
    """Concepts in prompts at layers, the *problems*; arrays are [problem]."""

    view: SignalView
    runs: Injections
    prompts: Sequence[str]
    words: Sequence[str]
    written: Float[Tensor, "concept d_model"]  # r B
    concept: NDArray[np.int64]
    prompt: NDArray[np.int64]
    layer: NDArray[np.int64]

    @classmethod
    def of(
        cls,
        view: SignalView,
        words: Sequence[str],
        pairs: Sequence[tuple[int, int]],
        prompts: Sequence[str],
        layers: Sequence[int],
    ) -> Setup:
        view, runs = view.final, Injections(view.model, list(prompts))
        written = view.write(view.rows([f" {word}" for word in words]))
        rows = np.array([(*pair, layer) for pair in pairs for layer in layers])
        return cls(view, runs, prompts, words, written, *rows.T)

    def with_random_recipes(self, seed: int) -> Setup:
        """The control: Gaussian recipes, each as long as the concept's."""
        recipes = self.view.rows([f" {word}" for word in self.words])
        gaussian = torch.randn(recipes.shape, generator=derive_generator(seed, "random_recipe")).to(recipes)
        lengths = recipes.norm(dim=-1, keepdim=True) / gaussian.norm(dim=-1, keepdim=True)
        return dataclasses.replace(self, written=self.view.write(gaussian * lengths))

    @property
    def alpha_of_one(self) -> NDArray[np.float64]:
        """α at strength 1."""
        stream = self.runs.rms().cpu().double().numpy()[self.layer, self.prompt]
        return stream / rms(self.written).cpu().double().numpy()[self.concept]

    def reached(self, problems: NDArray[np.int64], strengths: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Whether the concept's token is the most probable one."""
        alpha = strengths * self.alpha_of_one[problems]
        targets = torch.tensor([self.view.model.to_single_token(f" {word}") for word in self.words])
        concept, layer, prompt = (torch.from_numpy(x[problems]) for x in (self.concept, self.layer, self.prompt))
        change = torch.from_numpy(alpha).to(self.written)[:, None] * self.written[concept]
        ends = self.runs.final(layer, prompt.to(change.device), change)
        rows = ends.split(max(1, _LOGITS_AT_ONCE // len(self.view.recipe)))
        top = [self.view.logits(self.view.readout(some)).argmax(dim=-1) for some in rows]
        return (torch.cat(top).cpu() == targets[concept]).numpy()

    def solve(self, limit: float, tolerance: float, check: bool) -> tuple[Critical, NDArray[np.bool_]]:
        """Critical strengths; and by problem whether success is lost at a larger one, if that is checked."""
        n, smallest = len(self.layer), limit / 2**DOUBLINGS
        critical = critical_strength(self.reached, n, smallest=smallest, largest=limit, tolerance=tolerance)
        if not check:
            return critical, np.zeros(n, dtype=bool)
        return critical, lost_again(self.reached, critical.strength, smallest * 2.0 ** np.arange(DOUBLINGS + 1))

    def frame(self, series: str, critical: Critical, lost: NDArray[np.bool_]) -> pd.DataFrame:
        return pd.DataFrame(
            {
                "series": series,
                "concept": [self.words[i] for i in self.concept],
                "prompt": [self.prompts[i] for i in self.prompt],
                "pair": self.concept * len(self.prompts) + self.prompt,
                "layer": self.layer,
                "strength": critical.strength,
                "alpha": critical.strength * self.alpha_of_one,
                "reachable": ~np.isnan(critical.strength),
                "lost_again": lost,
            }
        )

    def trace(self, critical: Critical) -> pd.DataFrame:
        """The trials of the first concept in its first prompt."""
        problem = critical.trace["problem"].to_numpy()
        frame = critical.trace.assign(
            concept=self.words[0],
            prompt=self.prompts[self.prompt[0]],
            layer=self.layer[problem],
            alpha=critical.trace["strength"] * self.alpha_of_one[problem],
        )
        first = (self.concept[problem] == 0) & (self.prompt[problem] == self.prompt[0])
        trials = frame[first].drop(columns="problem").sort_values(["layer", "step"], ignore_index=True)
        return trials.assign(step=trials.groupby("layer").cumcount())  # other problems' trials lay between
