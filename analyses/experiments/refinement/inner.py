"""What the inner learner learns of a text: its own loss on the mini-batch it learns from, and on the next one.

A step that lowers the loss of the mini-batch it was made from may have fitted that alone; that it lowers the loss of
the next one too is learning. Controls: a rate of 0, a step the wrong way, the tokens of the text in random order, and
the state of another text to begin with.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from analyses.experiments.refinement.gates import final_norm, gated, losses
from analyses.experiments.refinement.texts import Losses, Texts
from analyses.statistics.draws import derive_generator
from reflowlens.models.base import HookedModel
from reflowlens.models.ttt_flow import TTTFlow
from reflowlens.models.ttt_linear import InnerState, TTTLinear

AS_IS, NO_LEARNING, WRONG_WAY, SHUFFLED, PREVIOUS = "model", "eta_zero", "sign_flipped", "shuffled", "previous_state"
CONTROLS = (NO_LEARNING, WRONG_WAY, SHUFFLED, PREVIOUS)
_RATES = {NO_LEARNING: 0.0, WRONG_WAY: -1.0}
_CURVES = (
    "at_start",
    "own_before",
    "own_after",
    "next_before",
    "next_after",
    "moved",
    "rank",
    "cosine",
    "cosine_other",
)

Curves = dict[str, Float[np.ndarray, "text head chunk"]]


@torch.no_grad()
def inner_curves(model: HookedModel, texts: Texts, seed: int) -> dict[str, Curves]:
    """Every curve of the model and of its controls, by mini-batch; NaN beyond a text's last whole one.

    `own_before`, `own_after`: inner loss of a mini-batch, a mean over its tokens, under the state before and after the
    step it makes. `next_before`, `next_after`: of the mini-batch behind it, under the same two. `at_start`: of the
    mini-batch under W₁. `moved`: ‖W − W₁‖_F after the step. Of the model and of shuffled tokens only: `rank`, effective
    rank of W − W₁, the exponential of the entropy of its singular values as shares; `cosine` of the step and the one
    before it; `cosine_other`, of the step and the one before it in another text, by which steps are alike anyway.
    """
    ttt = cast(TTTLinear, cast(TTTFlow, model).ttt)
    n_chunks = texts.tokens.shape[1] // ttt.chunk
    shape = (len(texts.tokens), ttt.n_heads, n_chunks)
    out = {name: {curve: np.full(shape, np.nan) for curve in _CURVES} for name in (AS_IS, *CONTROLS)}
    generator = derive_generator(seed, "shuffled_tokens")
    for rows, tokens, _ in texts.batches():
        whole = torch.as_tensor(texts.lengths[rows] // ttt.chunk, device=tokens.device)
        k, v = _keys_values(ttt, final_norm(model, tokens))
        start = ttt.first_state(len(rows))
        previous = _of_text_before(ttt, k, v, whole)
        shuffled = _keys_values(ttt, final_norm(model, _shuffled(tokens, texts.lengths[rows], generator)))
        runs = {
            AS_IS: (k, v, start, 1.0),
            NO_LEARNING: (k, v, start, _RATES[NO_LEARNING]),
            WRONG_WAY: (k, v, start, _RATES[WRONG_WAY]),
            SHUFFLED: (*shuffled, start, 1.0),
            PREVIOUS: (k, v, previous, 1.0),
        }
        other = torch.minimum(whole, whole.roll(1) + 1)
        ends = {"next_before": whole - 1, "next_after": whole - 1, "cosine_other": other}
        for name, (keys, values, state, rate) in runs.items():
            curves = _curves(ttt, keys, values, state, rate, geometry=name in (AS_IS, SHUFFLED))
            for curve, own in curves.items():
                until = ends.get(curve, whole)[:, None, None]
                own = own.masked_fill(torch.arange(own.shape[-1], device=own.device) >= until, torch.nan)
                out[name][curve][rows, :, : own.shape[-1]] = own.cpu().numpy()
    return out


@torch.no_grad()
def learning_losses(model: HookedModel, texts: Texts) -> dict[str, Losses]:
    """The language model's loss of every token with the inner learner as it is, and in three of its controls."""
    ttt = cast(TTTLinear, cast(TTTFlow, model).ttt)
    out = {name: np.zeros(texts.tokens.shape) for name in (AS_IS, NO_LEARNING, WRONG_WAY, PREVIOUS)}
    for rows, tokens, targets in texts.batches():
        x = final_norm(model, tokens)
        whole = torch.as_tensor(texts.lengths[rows] // ttt.chunk, device=tokens.device)
        streams = {
            AS_IS: gated(model, x),
            NO_LEARNING: gated(model, x, rate=_RATES[NO_LEARNING]),
            WRONG_WAY: gated(model, x, rate=_RATES[WRONG_WAY]),
            PREVIOUS: gated(model, x, state=_of_text_before(ttt, *_keys_values(ttt, x), whole)),
        }
        for name, stream in streams.items():
            out[name][rows, : tokens.shape[1]] = losses(model, stream, targets)
    return out


def learned(curves: Curves) -> dict[str, NDArray[np.float64]]:
    """What is known of a text's inner learning, means [text] over heads and mini-batches.

    "fit", "generalisation": how much a step lowers the loss of its own mini-batch, and of the next. "cosine",
    "cosine_other": of successive steps. "rank": of W − W₁ behind the last whole mini-batch.

    The first step is left out: it leads from W₁ to where all texts lead, and is often larger than all others together.
    Texts without three whole mini-batches are left out too.
    """
    enough = ~np.isnan(curves["next_before"][:, :, 1:]).all(axis=(1, 2))
    own = {name: values[enough] for name, values in curves.items()}
    found = {
        name: _means((own[f"{which}_before"] - own[f"{which}_after"])[:, :, 1:])
        for name, which in (("fit", "own"), ("generalisation", "next"))
    }
    found |= {name: _means(own[name][:, :, 2:]) for name in ("cosine", "cosine_other")}
    last = np.isfinite(own["own_after"]).sum(axis=2, keepdims=True) - 1
    return found | {"rank": np.take_along_axis(own["rank"], last, axis=2).mean(axis=(1, 2))}


def _means(values: Float[np.ndarray, "text head chunk"]) -> NDArray[np.float64]:
    """Over what there is of each text; NaN where there is nothing."""
    known = ~np.isnan(values)
    count = known.sum(axis=(1, 2))
    sums = np.where(known, values, 0).sum(axis=(1, 2))
    return np.divide(sums, count, out=np.full(len(values), np.nan), where=count > 0)


def inner_frame(curves: dict[str, Curves]) -> pd.DataFrame:
    """A row a control, head and mini-batch: means over texts, and how many these are."""
    rows = []
    for control, own in curves.items():
        for head in range(own["own_before"].shape[1]):
            for chunk in range(own["own_before"].shape[2]):
                here = {name: values[:, head, chunk] for name, values in own.items()}
                texts = int(np.count_nonzero(~np.isnan(here["own_before"])))
                if texts:
                    means = {name: _mean(values) for name, values in here.items()}
                    rows.append({"control": control, "head": head, "mini_batch": chunk, "texts": texts, **means})
    return pd.DataFrame(rows)


def _mean(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else np.nan


def _keys_values(
    ttt: TTTLinear, x: Float[Tensor, "batch pos d_model"]
) -> tuple[Float[Tensor, "batch head pos f"], Float[Tensor, "batch head pos f"]]:
    k, v = ((x @ W).unflatten(-1, (ttt.n_heads, -1)).transpose(1, 2) for W in (ttt.W_K, ttt.W_V))
    return k, v


def _shuffled(
    tokens: Int[Tensor, "batch pos"], lengths: NDArray[np.int64], generator: torch.Generator
) -> Int[Tensor, "batch pos"]:
    """Each text's tokens in random order, padding left behind them."""
    out = tokens.clone()
    for row, n in enumerate(lengths.tolist()):
        out[row, :n] = tokens[row, torch.randperm(n, generator=generator).to(tokens.device)]
    return out


def _steps(
    ttt: TTTLinear, k: Tensor, v: Tensor, state: InnerState, rate: float = 1.0
) -> Iterator[tuple[InnerState, InnerState]]:
    """The states before and after each whole mini-batch."""
    W, c = state.W, state.c
    for m in range(k.shape[2] // ttt.chunk):
        keys, values = (part[:, :, _chunk(ttt, m)] for part in (k, v))
        G = ttt.inner_gradient(keys, values, W, c)
        new_W, new_c = W - rate * ttt.rate * keys.mT @ G, c - rate * ttt.rate * G.sum(-2)
        yield _state(W, c), _state(new_W, new_c)
        W, c = new_W, new_c


def _state(W: Tensor, c: Tensor) -> InnerState:
    return InnerState(W, c, torch.zeros_like(W), torch.zeros_like(c))


def _chunk(ttt: TTTLinear, m: int) -> slice:
    return slice(m * ttt.chunk, (m + 1) * ttt.chunk)


def _of_text_before(ttt: TTTLinear, k: Tensor, v: Tensor, whole: Int[Tensor, " batch"]) -> InnerState:
    """For each text what the one before it in the batch has left behind its last whole mini-batch."""
    first = ttt.first_state(len(k))
    W, c = first.W.clone(), first.c.clone()
    for m, (_, after) in enumerate(_steps(ttt, k, v, first)):
        W[whole == m + 1], c[whole == m + 1] = after.W[whole == m + 1], after.c[whole == m + 1]
    return _state(W.roll(1, dims=0), c.roll(1, dims=0))


def _curves(
    ttt: TTTLinear, k: Tensor, v: Tensor, state: InnerState, rate: float, geometry: bool
) -> dict[str, Float[Tensor, "batch head chunk"]]:
    W_start, n_chunks = ttt.first_state(len(k)), k.shape[2] // ttt.chunk
    out = {name: torch.full((len(k), ttt.n_heads, n_chunks), torch.nan, device=k.device) for name in _CURVES}
    step_before: Tensor | None = None

    def loss(m: int, at: InnerState) -> Tensor:
        return ttt.inner_loss(k[:, :, _chunk(ttt, m)], v[:, :, _chunk(ttt, m)], at.W, at.c).mean(-1)

    for m, (before, after) in enumerate(_steps(ttt, k, v, state, rate)):
        found = {"at_start": loss(m, W_start), "own_before": loss(m, before), "own_after": loss(m, after)}
        if m + 1 < n_chunks:
            found |= {"next_before": loss(m + 1, before), "next_after": loss(m + 1, after)}
        moved, step = after.W - W_start.W, (after.W - before.W).flatten(2)
        found["moved"] = moved.flatten(2).norm(dim=-1)
        if geometry:
            found["rank"] = effective_rank(moved)
        if geometry and step_before is not None:
            found["cosine"] = torch.cosine_similarity(step, step_before, dim=-1)
            found["cosine_other"] = torch.cosine_similarity(step, step_before.roll(1, dims=0), dim=-1)
        step_before = step
        for name, values in found.items():
            out[name][:, :, m] = values
    return out


def effective_rank(matrix: Float[Tensor, "*batch rows columns"]) -> Float[Tensor, "*batch"]:
    """The exponential of the entropy of the singular values as shares of their sum (Roy and Vetterli, 2007).

    >>> effective_rank(torch.eye(4)).round().item()
    4.0
    """
    return entropy_of_shares(torch.linalg.svdvals(matrix.float())).exp()


def entropy_of_shares(values: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch"]:
    """Of values from 0 on as shares of their sum, in nats; 0 where all are 0."""
    shares = values / values.sum(-1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
    return torch.special.entr(shares).sum(-1)
