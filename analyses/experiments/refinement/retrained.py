"""The design of two refiners retrained: four models a seed, on the same documents, before and after quantisation."""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy import stats
from tqdm import tqdm

from analyses.experiments.refinement.gates import CELLS, cells_of, effects, final_norm, gated, losses
from analyses.experiments.refinement.texts import Texts, mean_by_document, read_texts
from analyses.statistics.intervals import t_interval
from reflowlens import load_model
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.packing import pack_model
from reflowlens.storage.folders import MANIFEST

PUBLISHED = {"none": 1.12440473, "ttt": 1.12414225, "flow": 1.12531495, "both": 1.12344104}
"""Bits per byte of the published models, one run each, after quantisation (parameter-golf, pull request 1166)."""
RERUNS, SEEDS = 0.00077, 0.0019
"""Standard error of their interaction, from runs of one configuration again and from the spread over seeds."""
PUBLISHED_INTERACTION = effects(PUBLISHED)["interaction"]
READING = (
    f"The published interaction is {PUBLISHED_INTERACTION:.8f} bits per byte, of one run a cell. Its standard error is "
    f"at least {RERUNS} (runs of one configuration again; z = {PUBLISHED_INTERACTION / RERUNS:.1f}), and {SEEDS} from "
    f"the spread over seeds (z = {PUBLISHED_INTERACTION / SEEDS:.1f}): these four numbers allow to say that the "
    "refiners may help each other, not that they do."
)
AS_TRAINED = "as trained"
MINIMUM_SEEDS = 5

Grid = dict[int, dict[str, Path]]


def read_grid(folder: str | Path) -> tuple[Grid, list[str]]:
    """The checkpoints of a grid of runs, by seed and cell, and notes of what is left out.

    `folder`: holds `seed_0_none`, `seed_0_ttt`, `seed_0_flow`, `seed_0_both` and so on, each a folder of a training run
    (`reflowlens study refiners`). Of a run the last checkpoint counts, its averaged weights where there are any. A
    seed counts if all four of its runs have ended.

    Raises ReflowlensError if there are fewer than two such seeds.
    """
    folder, found, notes = Path(folder), dict[int, dict[str, Path]](), list[str]()
    for run in sorted(folder.glob("seed_*_*")):
        if (match := re.fullmatch(rf"seed_(\d+)_({'|'.join(CELLS)})", run.name)) and (last := _ended(run)):
            found.setdefault(int(match[1]), {})[match[2]] = last
    whole = {
        seed: {cell: found[seed][cell] for cell in CELLS} for seed in sorted(found) if len(found[seed]) == len(CELLS)
    }
    if left_out := sorted(set(found) - set(whole)):
        notes.append(f"seeds left out, of which not all four runs have ended: {', '.join(map(str, left_out))}")
    if len(whole) < 2:
        raise ReflowlensError(
            f"{folder}: at least two seeds with four ended runs each (seed_0_none, seed_0_ttt, seed_0_flow, "
            f"seed_0_both, …) were expected, got {len(whole)}"
        )
    return whole, notes


def _ended(run: Path) -> Path | None:
    """The last checkpoint of a run that took all its steps."""
    checkpoints = sorted(run.glob("step_*"))
    if not checkpoints:
        return None
    manifest = json.loads((checkpoints[-1] / MANIFEST).read_text(encoding="utf8"))
    if manifest["step"] != manifest["training"]["run"]["steps"]:
        return None
    average = checkpoints[-1] / "average"
    return average if average.is_dir() else checkpoints[-1]


def design_losses(
    grid: Grid, documents: Sequence[str | Sequence[int]], bits: int, progress: bool
) -> tuple[Texts, dict[str, Float[np.ndarray, "seed cell text"]]]:
    """The texts, and the loss of every model summed over each one's tokens, as trained and packed to `bits`.

    Raises ReflowlensError for a model that is not what its folder says it is, or reads other texts than the first.
    """
    first = load_model(next(iter(grid.values()))[CELLS[0]])
    texts = read_texts(first, documents)
    shape = (len(grid), len(CELLS), len(texts.tokens))
    sums = {weights: np.zeros(shape) for weights in (AS_TRAINED, packed_name(bits))}
    runs = [(row, cell, path) for row, cells in enumerate(grid.values()) for cell, path in cells.items()]
    for row, cell, path in tqdm(runs, desc="retrained models", disable=not progress):
        model = load_model(path)
        if (own := cells_of(model)[-1]) != cell:
            raise ReflowlensError(f"{path}: a model with refiners {cell!r} was expected, got {own!r}")
        if (model.cfg.tokenizer_name, model.cfg.n_ctx) != (first.cfg.tokenizer_name, first.cfg.n_ctx):
            raise ReflowlensError(f"{path}: the same tokenizer and n_ctx as of the first run were expected")
        for weights, of_model in weighted(model, bits).items():
            sums[weights][row, CELLS.index(cell)] = summed(of_model, texts)
    return texts, sums


def weighted(model: HookedModel, bits: int) -> dict[str, HookedModel]:
    """The model as trained, and as it is opened from a file of so many bits a weight."""
    return {AS_TRAINED: model, packed_name(bits): pack_model(model, bits).model()}


def packed_name(bits: int) -> str:
    return f"{bits} bits"


@torch.no_grad()
def summed(model: HookedModel, texts: Texts) -> Float[np.ndarray, " text"]:
    """A model's loss, summed over the tokens of each text."""
    out = np.zeros(len(texts.tokens))
    for rows, tokens, targets in texts.batches():
        out[rows] = losses(model, gated(model, final_norm(model, tokens)), targets).sum(axis=1)
    return out


def run_frame(grid: Grid, sums: Mapping[str, Float[np.ndarray, "seed cell text"]], texts: Texts) -> pd.DataFrame:
    """A row a weights, seed and cell: loss in nats a token, and bits per byte."""
    rows = [
        {"weights": weights, "seed": seed, "cell": cell, "loss": of_texts.sum() / texts.lengths.sum()}
        for weights, of_seeds in sums.items()
        for seed, of_cells in zip(grid, of_seeds, strict=True)
        for cell, of_texts in zip(CELLS, of_cells, strict=True)
    ]
    frame = pd.DataFrame(rows)
    return frame.assign(bits_per_byte=frame["loss"] * texts.bits_per_nat)


def effect_frame(sums: Mapping[str, Float[np.ndarray, "seed cell text"]], texts: Texts, seed: int) -> pd.DataFrame:
    """A row a weights and effect in bits per byte: `value`, a mean over seeds, with two 95% intervals.

    `low`, `high`: Student's t over seeds, each seed's four models being paired: what other seeds would give.
    `low_texts`, `high_texts`: of these very models on other documents. `p`: of t, two-sided; `sd`: over seeds.
    `seeds_to_tell`: how many seeds it takes, at this spread, to tell the published effect from 0 four times in five.
    """
    rows, published = [], effects(PUBLISHED)
    for weights, own in sums.items():
        counts = texts.lengths
        by_seed = effects(dict(zip(CELLS, np.moveaxis(own.sum(axis=2), 1, 0) / counts.sum(), strict=True)))
        by_text = effects(dict(zip(CELLS, own.mean(axis=0), strict=True)))
        over_texts = mean_by_document(by_text, counts, seed)
        for effect, values in by_seed.items():
            values = values * texts.bits_per_nat
            interval, p = t_interval(values)
            low, high = (end * texts.bits_per_nat for end in over_texts[effect][1])
            rows.append(
                {
                    "weights": weights,
                    "effect": effect,
                    "value": float(values.mean()),
                    "low": interval.low,
                    "high": interval.high,
                    "p": p,
                    "sd": float(values.std(ddof=1)),
                    "seeds": len(values),
                    "seeds_to_tell": seeds_to_tell(published[effect], float(values.std(ddof=1))),
                    "low_texts": low,
                    "high_texts": high,
                }
            )
    return pd.DataFrame(rows)


def seeds_to_tell(effect: float, sd: float, power: float = 0.8) -> int:
    """How many seeds it takes for a two-sided t test at 5% to tell a mean effect from 0 with so much power.

    `sd`: of the effect between seeds. A thousand stands for a thousand or more.

    >>> seeds_to_tell(effect=1.0, sd=1.0)
    10
    """
    if sd == 0:
        return 2

    def is_told(n: int) -> bool:
        limit, shift = stats.t(n - 1).ppf(0.975), min(30.0, abs(effect) / sd * n**0.5)  # beyond 30 it is certain
        return bool(stats.ncf(1, n - 1, shift**2).sf(limit**2) >= power)

    several_seeds = range(2, 1000)
    return several_seeds.start + bisect_left(several_seeds, True, key=is_told)


def in_words(interaction: Mapping[str, Any]) -> str:
    """What a design says of whether the refiners help each other; `interaction`: its row of `effect_frame`."""
    value, low, high, n = (interaction[name] for name in ("value", "low", "high", "seeds"))
    found = f"an interaction of {value:+.5f} bits a byte ({low:+.5f} to {high:+.5f} over {n} seeds)"
    spread = f"The spread between seeds is {interaction['sd']:.5f}"
    if n < MINIMUM_SEEDS:
        return f"Undecided whether the refiners help each other: {found}, of which a verdict needs {MINIMUM_SEEDS}."
    if high < 0:
        return f"The refiners help each other in these models: {found}."
    if low > 0:
        return f"The refiners stand in each other's way in these models: {found}."
    if low > PUBLISHED_INTERACTION:
        return f"The refiners do not help each other as much as published in these models: {found}."
    return (
        f"Undecided at this size whether the refiners help each other: {found} has room for none and for the published "
        f"{PUBLISHED_INTERACTION:+.5f}. {spread}, at which it takes about {interaction['seeds_to_tell']} seeds to tell "
        "the published one from none four times in five."
    )
