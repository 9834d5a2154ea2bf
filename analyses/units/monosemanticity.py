"""Whether single units predict a predefined concept, chosen on one half of a text and scored on the other.

    result = monosemanticity(rl.load_model("out/nano"), text, matched=rl.load_model("out/relu_nano"))
    result.metrics, result.frames["concepts"], result.frames["units"]

Every unit of the chosen points is scored for every concept of `analyses.units.concepts`. On the first half of the text,
S1, a unit gets its best concept (by AUROC) and the threshold with the largest F1; on the second, S2, both are scored.
Whether a unit predicts its concept at all is tested against labels shifted along the text, with Benjamini and
Hochberg's correction over all units and concepts.

The controls go through the same procedure: ``untrained``, the architecture with fresh weights; ``shuffled_text``, the
model on the same tokens in a random order; ``permuted_units``, the model's units with their values exchanged at every
position, which keeps the sparsity of a position and loses the identity of units; and ``matched``, another model on the
same text. What a unit predicts need not be what it does: the units of a concept are silenced, and so are equally many
others that fire as often.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from analyses.controls.nulls import untrained_model
from analyses.result.finding import Finding
from analyses.result.result import Result
from analyses.statistics.draws import derive_generator, derive_seed
from analyses.statistics.intervals import bootstrap_interval, rate_interval
from analyses.units.concepts import CONCEPTS, label_tokens
from analyses.units.held_out import Stream, as_stream, shuffled, tiles
from analyses.units.points import default_points, kind_of, level_of, points_named, written_by
from analyses.units.scores import (
    auroc,
    benjamini_hochberg,
    best_thresholds,
    f1_at,
    mean_ranks,
    shifted_auroc,
    token_entropy,
)
from analyses.units.silencing import ablate_concepts
from reflowlens.activations.stream import measured
from reflowlens.checkpoints import model_hash
from reflowlens.errors import ReflowlensError
from reflowlens.figures.builders import bars, histogram_with_control
from reflowlens.models.base import HookedModel

MINIMUM_EVENTS = 20  # of a unit on each split, and of a concept and of its absence
TELLS = 0.8  # the F1 on S2 from which on a unit is said to tell a concept
FALSE_DISCOVERIES = 0.05
SHIFTS, QUICK_SHIFTS = 20, 8
_AT_ONCE = 512  # units that are ranked together
_BYTES = 2**30  # of activations that are held together
NAMES = tuple(CONCEPTS)
DEFINITIONS = {
    "telling_share": f"units with F1 ≥ {TELLS} on S2 for the concept and threshold chosen on S1, among those with "
    f"{MINIMUM_EVENTS} events on both",
    "best_auroc": "AUROC on S2 of a unit for the concept chosen on S1, median over units",
    "best_f1": "F1 on S2 at the threshold chosen on S1, median over units",
    "significant_share": "units whose chosen concept is told on S2 beyond shifted text, at a false discovery rate of "
    f"{FALSE_DISCOVERIES}",
    "mass_share": "share of a unit's activation on S2 that lies on its chosen concept, median over units",
    "token_entropy": f"entropy in bits of the tokens at {MINIMUM_EVENTS} random events of a unit on S2, at most "
    f"{np.log2(MINIMUM_EVENTS):.2f}; median over units",
}


@dataclass(frozen=True)
class Text:
    """A text in rows, its labels, and the number of rows that are S1; the others are S2."""

    tokens: Int[Tensor, "row pos"]
    labels: Bool[Tensor, "row pos concept"]
    n_first: int

    @classmethod
    def of(cls, model: HookedModel, stream: Int[Tensor, " token"], context: int, rows: int | None) -> Text:
        tokens = tiles(stream, context)[:rows]
        if len(tokens) < 2:
            raise ReflowlensError(f"monosemanticity needs two rows of {context} tokens at least, one for each split")
        return cls(tokens, label_tokens(model, tokens), len(tokens) // 2)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[row, pos, ...] as [position, ...] of S1 and of S2."""
        return x[: self.n_first].flatten(0, 1), x[self.n_first :].flatten(0, 1)

    @property
    def usable(self) -> Bool[Tensor, " concept"]:
        """Whether a concept is both present and absent at enough positions of both halves."""
        enough = [
            (half.sum(0) >= MINIMUM_EVENTS) & ((~half).sum(0) >= MINIMUM_EVENTS) for half in self.split(self.labels)
        ]
        return enough[0] & enough[1]


@torch.no_grad()
def monosemanticity(
    model: HookedModel,
    text: Stream,
    points: str | Sequence[str] | None = None,
    *,
    matched: HookedModel | None = None,
    context: int = 256,
    rows: int | None = 80,
    causal: int = 3,
    seed: int = 0,
    quick: bool = False,
    progress: bool = False,
) -> Result:
    """Which units predict a predefined concept on text that did not choose it, and whether they are used for it.

    Args:
        text: held-out text, or its token ids [token].
        points: hook points [batch, pos, ...], or kinds as ``"mlp_post"`` (`analyses.units.points.points_named`), one or
            several; default the neurons of every block that write into the stream.
        matched: a model to compare with, such as a ReLU transformer of as many parameters on the same tokenizer.
        context: tokens of a row.
        rows: number of rows that are read from the start of the text, the first half of them S1; None reads all.
        causal: number of concepts whose units are silenced, those with the best units first; 0 skips it.
        seed: of the controls, shifts, draws and resamples.
        quick: at most 24 rows, and fewer shifts of the text.
        progress: show how far the models are.

    Returns:
        A Result with frames ``units`` (a row per unit with enough events: its concept, scores on both splits and
        adjusted p), ``concepts`` (a row per concept: its best unit and the number of units that tell it, F1 ≥ 0.8) and
        ``ablation`` (`analyses.units.silencing`), figures ``f1`` and ``concepts``, and the metrics of ``DEFINITIONS``
        with those of the controls.

    Raises:
        ReflowlensError: a point does not exist or has no positions, the text is too short, no concept or no unit occurs
            often enough, or ``matched`` reads other tokens.

    Example: ``monosemanticity(model, text).frames["units"].nlargest(10, "f1")``
    """
    points = _points(model) if points is None else points_named(model, points)
    stream = as_stream(model, text)
    rows = min(rows or 24, 24) if quick else rows
    shifts = QUICK_SHIFTS if quick else SHIFTS
    read = Text.of(model, stream, context, rows)
    mixed = Text.of(model, shuffled(stream, derive_seed(seed, "monosemanticity")), context, rows)
    untrained = untrained_model(model, seed)
    runs: dict[str, Callable[..., pd.DataFrame]] = {
        "model": partial(score_units, model, read, points),
        "untrained": partial(score_units, untrained, read, points),
        "shuffled_text": partial(score_units, model, mixed, points),
        "permuted_units": partial(score_units, model, read, points, permute=seed),
    }
    if matched is not None:
        if matched.cfg.tokenizer_name != model.cfg.tokenizer_name:
            raise ReflowlensError(
                f"matched reads {matched.cfg.tokenizer_name!r} tokens and the model {model.cfg.tokenizer_name!r}"
            )
        runs["matched"] = partial(score_units, matched, read, _points(matched))
    bar = tqdm(runs.items(), desc="monosemanticity", unit="model", disable=not progress)
    frames = {name: score(shifts=shifts, seed=seed) for name, score in bar}
    units = frames["model"]
    if units.empty:
        raise ReflowlensError(f"no unit fires at {MINIMUM_EVENTS} positions of both halves of the text")
    intervals = {
        "telling_share": rate_interval((units["f1"] >= TELLS).astype(float)),
        "best_f1": bootstrap_interval(units["f1"], np.median, seed=seed),
    }
    beside = {name: _headline(frame) for name, frame in frames.items() if name != "model" and not frame.empty}
    tables = {"units": units, "concepts": concepts_frame(units)}
    notes: list[str] = []
    if causal:
        tables["ablation"], notes = ablate_concepts(model, read.tokens, read.labels, units, read.n_first, causal, seed)
    if absent := [name for name, used in zip(NAMES, read.usable, strict=True) if not used]:
        notes.append(f"left out, for they are too rare or too common in this text: {', '.join(absent)}")
    return Result(
        name="monosemanticity",
        title="Monosemanticity",
        params={
            "points": points,
            "rows": len(read.tokens),
            "context": context,
            "shifts": shifts,
            "causal": causal,
            "concepts": [name for name, used in zip(NAMES, read.usable, strict=True) if used],
            "seed": seed,
            "quick": quick,
            "model_hash": model_hash(model),
            "matched_hash": None if matched is None else model_hash(matched),
        },
        findings={
            metric: Finding(value, intervals.get(metric), {name: values[metric] for name, values in beside.items()})
            for metric, value in _headline(units).items()
        },
        frames=tables,
        figures=_figures(frames),
        definitions=DEFINITIONS,
        notes=[*notes, "intervals take units as units of replication: they say nothing of other texts or seeds"],
    )


def score_units(
    model: HookedModel, text: Text, points: Sequence[str], *, shifts: int, seed: int, permute: int | None = None
) -> pd.DataFrame:
    """A row per unit with enough events on both splits, largest F1 on S2 first.

    Columns: ``point``, ``kind``, ``level``, ``index`` (in the point's flattened axes), ``concept``, ``auroc_s1``,
    ``auroc``, ``f1_s1``, ``f1``, ``threshold``, ``firing_rate``, ``mass_share``, ``token_entropy``, ``p`` and ``q``
    (adjusted over units and concepts).

    Args:
        shifts: number of shifts of the null.
        permute: exchange the units' values at each position, by this seed; None does not.

    Raises:
        ReflowlensError: no concept occurs often enough.
    """
    usable = text.usable
    if not usable.any():
        raise ReflowlensError("no concept occurs often enough in this text: give more of it")
    first, second = text.split(text.labels[..., usable])
    tokens = text.split(text.tokens.cpu())[1]
    names = np.array(NAMES)[usable.numpy()]
    parts, pvalues = [], []
    for point in points:
        for start, values in activations(model, text.tokens, point):
            if permute is not None:
                values = _exchanged(values, derive_seed(permute, point, start))
            for low in range(0, values.shape[-1], _AT_ONCE):
                some = values[..., low : low + _AT_ONCE]
                frame, p = _score(*text.split(some), first, second, names, tokens, shifts, seed)
                frame["index"] += start + low
                places: dict[str, str | int] = {"point": point, "kind": kind_of(point), "level": level_of(point)}
                parts.append(frame.assign(**places)[[*places, *frame.columns]])
                pvalues.append(p)
    table, p = pd.concat(parts, ignore_index=True), np.concatenate(pvalues)
    if len(table):
        table["q"] = benjamini_hochberg(p)[np.arange(len(p)), table.pop("column")]
    return table.sort_values("f1", ascending=False, ignore_index=True, kind="stable")


def _exchanged(values: Float[Tensor, "row pos unit"], seed: int) -> Float[Tensor, "row pos unit"]:
    """At each position every unit takes the value of the unit a random number of indices further on."""
    n_units, generator = values.shape[-1], derive_generator(seed, "permuted_units")
    offset = torch.randint(n_units, (*values.shape[:-1], 1), generator=generator)
    return values.gather(-1, (torch.arange(n_units) + offset) % n_units)


def _score(
    a: Float[Tensor, "n unit"],
    b: Float[Tensor, "m unit"],
    labels_a: Bool[Tensor, "n concept"],
    labels_b: Bool[Tensor, "m concept"],
    names: np.ndarray,
    tokens: Int[Tensor, " m"],
    shifts: int,
    seed: int,
) -> tuple[pd.DataFrame, np.ndarray]:
    """The rows of some units, and their p-values [unit, concept] on S2."""
    eligible = (((a > 0).sum(0) >= MINIMUM_EVENTS) & ((b > 0).sum(0) >= MINIMUM_EVENTS)).nonzero()[:, 0]
    a, b = a[:, eligible], b[:, eligible]
    ranks = mean_ranks(b)
    on_a, on_b = auroc(mean_ranks(a), labels_a), auroc(ranks, labels_b)
    column = on_a.argmax(dim=1)
    own_a, own_b = labels_a[:, column], labels_b[:, column]
    threshold, f1_a = best_thresholds(a, own_a)
    p = shifted_auroc(ranks, labels_b, shifts, seed).pvalues(on_b)
    row = torch.arange(len(eligible))
    frame = pd.DataFrame(
        {
            "index": eligible.numpy(),
            "concept": names[column.numpy()],
            "auroc_s1": on_a[row, column].numpy(),
            "auroc": on_b[row, column].numpy(),
            "f1_s1": f1_a.numpy(),
            "f1": f1_at(b, own_b, threshold).numpy(),
            "threshold": threshold.numpy(),
            "firing_rate": (b > 0).float().mean(0).numpy(),
            "mass_share": ((b * own_b).sum(0) / b.sum(0)).numpy(),
            "token_entropy": token_entropy(b > 0, tokens, MINIMUM_EVENTS, seed).numpy(),
            "p": p[row.numpy(), column.numpy()],
            "column": column.numpy(),
        }
    )
    return frame, p


def activations(
    model: HookedModel, tokens: Int[Tensor, "row pos"], point: str, batch_size: int = 2
) -> Iterator[tuple[int, Float[Tensor, "row pos unit"]]]:
    """The positive part of a point's activations over a text, some units at a time: the first unit's index, and values.

    The text is read once for each group of units, so large that their activations fill at most a gigabyte.
    """
    n_units: int | None = None
    start, size = 0, max(1, _BYTES // (4 * tokens.numel()))
    while n_units is None or start < n_units:
        held: Tensor | None = None  # filled row by row: joining parts would hold them twice
        n_read = 0
        for parts, n_rows, _ in measured(
            model, tokens.split(batch_size), [point], lambda _, x, occurrences: x.flatten(1)
        ):
            n_units = parts[point].shape[-1]
            some = parts[point][:, start : start + size].float().clamp(min=0).cpu()
            held = some.new_empty(*tokens.shape, some.shape[-1]) if held is None else held
            held[n_read : n_read + n_rows] = some.unflatten(0, (n_rows, -1))
            n_read += n_rows
        assert held is not None  # a text has one row at least
        yield start, held
        start += size


def concepts_frame(units: pd.DataFrame) -> pd.DataFrame:
    """A row per concept that is some unit's best: its units, how many of them tell it, and the best of them."""
    rows = []
    for concept, group in units.groupby("concept", sort=True):
        best = group.iloc[0]
        rows.append(
            {
                "concept": concept,
                "meaning": CONCEPTS[str(concept)],
                "units": len(group),
                "telling": int((group["f1"] >= TELLS).sum()),
                "significant": int((group["q"] < FALSE_DISCOVERIES).sum()),
                "best_point": best["point"],
                "best_index": int(best["index"]),
                "best_f1": float(best["f1"]),
                "best_auroc": float(best["auroc"]),
            }
        )
    return pd.DataFrame(rows).sort_values("best_f1", ascending=False, ignore_index=True)


def _points(model: HookedModel) -> list[str]:
    """Those of the default points whose units write into the stream."""
    return [point for point in default_points(model) if written_by(model, point) is not None]


def _headline(units: pd.DataFrame) -> dict[str, float]:
    return {
        "telling_share": float((units["f1"] >= TELLS).mean()),
        "best_auroc": float(units["auroc"].median()),
        "best_f1": float(units["f1"].median()),
        "significant_share": float((units["q"] < FALSE_DISCOVERIES).mean()),
        "mass_share": float(units["mass_share"].median()),
        "token_entropy": float(units["token_entropy"].median()),
    }


def _figures(frames: dict[str, pd.DataFrame]) -> dict[str, go.Figure]:
    scored = pd.concat([frame.assign(model=name) for name, frame in frames.items()], ignore_index=True)
    controls = [name for name in frames if name != "model"]
    best = scored.groupby(["concept", "model"], sort=False)["f1"].max().reset_index()
    return {
        "f1": histogram_with_control(
            scored, "f1", "model", controls=controls, log_y=True, x_title="F1 on the second half of the text"
        ),
        "concepts": bars(best, "concept", "f1", color="model", controls=controls, y_title="F1 of the best unit"),
    }
