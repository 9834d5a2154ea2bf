"""Where heads attend: to the token before, to earlier copies of the token, to what followed these, to the first token.

Of a query at position q, a kind of head attends to the keys k ≤ q

``previous``   k = q − 1
``duplicate``  k < q with the same token
``induction``  those whose token before is the query's: what came next the last time (Olsson et al., 2022)
``current``    k = q
``first``      k = 0

A head's *score* is the share of its attention that lies there, as TransformerLens's ``detect_head`` defines it; where
no such key exists it counts as 0, so that ``where_possible``, the mean over all queries that have one, stands beside.

Two controls. ``uniform`` is the score of attending to every key alike: texts differ in how many keys there are.
``shuffled`` is the attention to the same places when the tokens there are shuffled: what a head that goes by positions
alone has too. The *excess* of ``duplicate`` and ``induction``, which tokens tell, is that over ``shuffled``; of the
others it is that over ``uniform``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from analyses.claims import bound_of
from analyses.result.finding import Finding
from analyses.result.model_identity import hash_of
from analyses.result.result import Result
from analyses.statistics.draws import derive_rng
from analyses.statistics.intervals import bootstrap_band, bootstrap_interval
from analyses.statistics.pvalues import paired_permutation_pvalue
from analyses.statistics.verdicts import verdict
from analyses.tasks.answered import shown
from analyses.tasks.attention_shares import BY_TOKENS, KINDS, Shares, measured_shares, pattern_points
from analyses.tasks.by_group import group_figures, group_frames
from reflowlens.arguments import number_of_runs, whole_number
from reflowlens.errors import ReflowlensError
from reflowlens.figures.heatmap import heatmap
from reflowlens.models.base import HookedModel
from reflowlens.models.unwrapping import hooked_model
from reflowlens.prompts import Prompts

_MINIMUM = 10  # sequences in a half, below which no verdict is given
_LONGEST = 128  # tokens of a text: attention is a square of them


def head_patterns(
    model: HookedModel,
    texts: str | Sequence[str] | Prompts | None = None,
    *,
    sequences: int = 40,
    length: int = 25,
    longest: int = _LONGEST,
    seed: int = 0,
    quick: bool = False,
    progress: bool | None = None,
) -> Result:
    """Score every head as previous-token, duplicate-token, induction, current-token and first-token head.

    On random tokens that are repeated once, where only attention by tokens finds the first copy, and on texts. What a
    head does on random tokens it need not do on text, and the other way round.

    Args:
        model: with attention that sums to 1; what is attached to it acts.
        texts: some, or prompts, whose clean texts are read; None: random tokens alone.
        sequences: of random tokens.
        length: of their first half, whose tokens are all different; no more than the context holds twice, as
            ``params["length"]`` then says.
        longest: tokens of a text that are read, from its beginning.
        seed: of the random tokens, the shuffling and the resamples.
        quick: a quarter of the sequences and texts.

    Returns:
        A Result. Frame ``heads``: a row a source (``"random"``, ``"text"``), kind, layer and head, with ``score``,
        ``where_possible``, ``uniform``, ``shuffled`` and ``excess``, means over sequences, and ``score_low``,
        ``score_high``, ``excess_low``, ``excess_high``. Metrics such as ``induction_random``: the excess of the head
        that is strongest on one half of the sequences, measured on the other half; verdicts ask for 0.05 at least.
        Figures: a source and kind each, layer × head. Of prompts with groups the frame and figure ``groups``: the same
        excess, of the texts that it is measured on, which are half of each group.

    Raises:
        ReflowlensError: the attention of this model is no distribution over keys, or there are fewer than four
            sequences or texts.

    Example: ``head_patterns(model).frames["heads"].query("kind == 'induction'").nlargest(5, "score")``
    """
    hooked = hooked_model(model)
    if not all(name in hooked.hook_dict for name in pattern_points(hooked)):
        raise ReflowlensError(
            f"the attention of a {type(hooked).__name__} is no distribution over keys: shares of it say nothing of "
            "where heads attend"
        )
    longest = min(whole_number(longest, "longest", 2), hooked.cfg.n_ctx)
    length = _length_read(hooked, length)
    rows = {"random": _repeated(hooked, number_of_runs(sequences, "sequences", 4), length, seed)}
    if texts is not None:
        listed = texts.clean if isinstance(texts, Prompts) else [texts] if isinstance(texts, str) else list(texts)
        begin = hooked.text_start()
        read = [(begin + hooked.tokenizer.encode(text))[:longest] for text in listed]
        prompt = [number for number in _by_group(texts, len(listed)) if len(read[number]) > 1]
        rows["text"] = [read[number] for number in prompt]
    frames: list[pd.DataFrame] = []
    groups: dict[str, pd.DataFrame] = {}
    findings: dict[str, Finding] = {}
    figures: dict[str, Any] = {}
    for source, some in rows.items():
        every = 4 if quick and len(some) >= 16 else 1
        some = some[::every]
        if len(some) < 4:
            raise ReflowlensError(f"scores have intervals over sequences, and need four at least, got {len(some)}")
        measured = measured_shares(hooked, some, _shuffled(hooked, some, source, seed), shown(progress), source)
        frame = _frame(measured, source, seed)
        frames.append(frame)
        findings |= {f"{kind}_{source}": _finding(measured, kind, seed) for kind in KINDS}
        figures |= {f"{kind}_{source}": _figure(frame, kind, source) for kind in KINDS}
        if source == "text" and isinstance(texts, Prompts):
            values = {f"{kind}_text": _judged(measured, kind)[1] for kind in KINDS}
            groups = group_frames(texts, values, seed, rows=prompt[::every][1::2])
    return Result(
        "head_patterns",
        "Patterns of heads",
        {
            "sequences": {source: len(some) for source, some in rows.items()},
            "length": length,
            "longest": longest,
            "seed": seed,
            "quick": quick,
            "model_hash": hash_of(hooked),
        },
        findings=findings,
        frames={"heads": pd.concat(frames, ignore_index=True), **groups},
        figures=figures | group_figures(groups, "Excess of the strongest head of each kind"),
        notes=[] if texts is not None else ["random tokens alone: give texts to see what heads do there"],
    )


def _frame(measured: Shares, source: str, seed: int) -> pd.DataFrame:
    parts = []
    for kind in KINDS:
        score, excess = measured.score[kind], measured.excess(kind)
        layer, head = np.indices(score.shape[1:])
        columns: dict[str, Any] = {"source": source, "kind": kind, "layer": layer, "head": head}
        for name, values in {"score": score, "excess": excess}.items():
            low, high = bootstrap_band(values, seed=seed)
            columns |= {name: values.mean(axis=0), f"{name}_low": low, f"{name}_high": high}
        columns |= {
            "where_possible": measured.where_possible[kind],
            "uniform": np.full(layer.shape, measured.uniform[kind].mean()),
            "shuffled": measured.shuffled[kind].mean(axis=0),
        }
        parts.append(pd.DataFrame({name: np.ravel(x) if np.ndim(x) else x for name, x in columns.items()}))
    return pd.concat(parts, ignore_index=True)


def _finding(measured: Shares, kind: str, seed: int) -> Finding:
    """The head that is strongest on every other sequence, measured on those between."""
    (layer, head), values = _judged(measured, kind)
    interval = bootstrap_interval(values, seed=seed)
    smallest = bound_of("head_patterns", kind, {})
    p = paired_permutation_pvalue(values - smallest, seed=seed)
    beside = "the same places in shuffled tokens" if kind in BY_TOKENS else "uniform attention"
    return Finding(
        values.mean(),
        interval,
        {
            "uniform": float(measured.uniform[kind][1::2].mean()),
            "shuffled": float(measured.shuffled[kind][1::2, layer, head].mean()),
            "mean_head": float(measured.excess(kind)[1::2].mean()),
        },
        verdict(interval, smallest, p, minimum_units=_MINIMUM, units=len(values)),
        f"share of attention at the places of the kind, less that of {beside}, of the head that is strongest on half "
        f"of the sequences (layer {layer}, head {head}), on the other half. uniform, shuffled: shares; mean_head: the "
        "excess of all heads",
    )


def _judged(measured: Shares, kind: str) -> tuple[tuple[int, int], Float[np.ndarray, " sequence"]]:
    """Layer and head that are strongest on every other sequence, and its excess in those between."""
    excess = measured.excess(kind)
    layer, head = map(int, np.unravel_index(excess[::2].mean(axis=0).argmax(), excess.shape[1:]))
    return (layer, head), excess[1::2, layer, head]


def _figure(frame: pd.DataFrame, kind: str, source: str) -> Any:
    rows = frame[frame["kind"] == kind]
    return heatmap(
        rows,
        "head",
        "layer",
        "score",
        z_range=(0, 1),
        hover=["score_low", "score_high", "where_possible", "uniform", "shuffled"],
        title=f"Attention to the {kind} token, {'random tokens, repeated' if source == 'random' else 'text'}",
    )


def _by_group(texts: str | Sequence[str] | Prompts, n: int) -> list[int]:
    """Numbers of n texts, those of a group together, so that every other one is half of each group."""
    groups = texts.groups if isinstance(texts, Prompts) and "group" in texts.frame else [0] * n
    first = {group: number for number, group in reversed(list(enumerate(groups)))}
    return sorted(range(n), key=lambda number: first[groups[number]])


def _length_read(model: HookedModel, length: int) -> int:
    most = (model.cfg.n_ctx - len(model.text_start())) // 2
    return min(whole_number(length, "length", 2), most, model.tokenizer.n_vocab)


def _repeated(model: HookedModel, sequences: int, length: int, seed: int) -> list[list[int]]:
    """Random tokens, all different, twice in a row; behind the model's beginning token, if it reads texts so."""
    begin = model.text_start()
    rng = derive_rng(seed, "repeated_tokens")
    halves = [rng.choice(model.tokenizer.n_vocab, length, replace=False).tolist() for _ in range(sequences)]
    return [begin + half + half for half in halves]


def _shuffled(model: HookedModel, rows: Sequence[Sequence[int]], source: str, seed: int) -> list[list[int]]:
    """The same tokens in another order: of a text all but its beginning, of repeated tokens the second half."""
    rng, begin = derive_rng(seed, "shuffled_tokens", source), len(model.text_start())
    starts = [begin + (len(row) - begin) // 2 if source == "random" else begin for row in rows]
    return [[*row[:start], *rng.permutation(row[start:]).tolist()] for row, start in zip(rows, starts, strict=True)]
