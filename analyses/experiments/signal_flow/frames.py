"""Signal Flow of one prompt: the frames in which single signals can be followed.

A tracked signal is one that leads at some point. It is *born* where it leads first, leads to the end *since* the start
of its last run if that reaches the end, and has *died* behind the last point at which it leads if that is not the end;
depths in blocks, NaN for what did not happen.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from analyses.experiments.signal_flow.contributions import Reading, leading_signals, read_contributions
from analyses.measures.knockout import codebook_texts
from analyses.measures.lens import first_settled, residual_points, residual_stack
from reflowlens.errors import ReflowlensError
from reflowlens.signals import SignalView


@torch.no_grad()
def detail_frames(
    view: SignalView, prompt: str, target: str | None, position: int, signal: int | None, k: int
) -> dict[str, pd.DataFrame]:
    """The frames ``signals``, ``tracks``, ``changes`` and ``positions`` of `analyses.signal_flow`.

    Raises:
        ReflowlensError: the prompt has no such position, or the view no such signal.
    """
    model = view.model
    tokens = model.to_tokens(prompt)
    length = tokens.shape[1]
    if not -length <= position < length:
        raise ReflowlensError(f"position: the prompt has {length} tokens, 0 to {length - 1}; got {position}")
    if signal is not None and not 0 <= signal < view.n_signals:
        raise ReflowlensError(f"no signal {signal}: this view has signals 0 to {view.n_signals - 1}")
    target_id = None if target is None else model.to_single_token(target)
    reading = read_contributions(view, tokens[:, : position % length + 1], target_id)
    leading = leading_signals(reading.contributions()[:, 0], k).cpu().numpy()
    tracks = _track_frame(view, reading, leading)
    tracked = tracks["signal"].to_numpy()
    followed = int(tracked[0]) if signal is None else signal
    return {
        "tracks": tracks,
        "signals": _signal_frame(reading, leading, tracks, model.cfg.n_layers),
        "changes": _change_frame(reading, tracked),
        "positions": _position_frame(view, tokens, int(reading.targets[0]), followed),
    }


def _track_frame(view: SignalView, reading: Reading, leading: NDArray[np.bool_]) -> pd.DataFrame:
    """The signals that lead anywhere, those that contribute most at the end first; were there none, that which does."""
    final = reading.contributions()[-1, 0].cpu().numpy()
    tracked = np.flatnonzero(leading.any(axis=0)) if leading.any() else np.array([final.argmax()])
    tracked = tracked[np.argsort(-final[tracked], kind="stable")]
    leads, books = leading[:, tracked], codebook_texts(view, k=4)
    last = len(leads) - leads[::-1].argmax(axis=0)
    return pd.DataFrame(
        {
            "signal": tracked,
            "target": view.model.to_single_str_token(int(reading.targets[0])),
            "contribution": final[tracked],
            "born": np.where(leads.any(axis=0), leads.argmax(axis=0) / 2, np.nan),
            "since": np.where(leads[-1], first_settled(leads) / 2, np.nan),
            "died": np.where(leads.any(axis=0) & ~leads[-1], last / 2, np.nan),
            "codebook": [books[signal] for signal in tracked],
        }
    )


def _signal_frame(reading: Reading, leading: NDArray[np.bool_], tracks: pd.DataFrame, n_layers: int) -> pd.DataFrame:
    """The tracked signals at every point; rank 1 is the largest contribution of all signals."""
    contributions = reading.contributions()[:, 0].cpu().numpy()
    ranks = (-contributions).argsort(axis=1, kind="stable").argsort(axis=1) + 1
    readouts, tracked = reading.readouts[:, 0].cpu().numpy(), tracks["signal"].to_numpy()
    return pd.concat(
        [
            pd.DataFrame(
                {
                    "depth": point.depth,
                    "point": point.label,
                    "signal": tracked,
                    "readout": readouts[i, tracked],
                    "contribution": contributions[i, tracked],
                    "rank": ranks[i, tracked],
                    "leads": leading[i, tracked],
                    "codebook": tracks["codebook"],
                }
            )
            for i, point in enumerate(residual_points(n_layers))
        ],
        ignore_index=True,
    )


def _change_frame(reading: Reading, tracked: NDArray[np.int64]) -> pd.DataFrame:
    """What every part of the model adds to the tracked signals' contributions, the final norm's divisor frozen."""
    frames = [
        pd.DataFrame(
            {"part": part, "block": block, "signal": tracked, "contribution": values[0].cpu().numpy()[tracked]}
        )
        for part, blocks in reading.split.parts().items()
        for block, values in enumerate(blocks)
    ]
    return pd.concat(frames, ignore_index=True)


def _position_frame(view: SignalView, tokens: Int[Tensor, "1 pos"], target_id: int, signal: int) -> pd.DataFrame:
    """One signal at every point and position, and what it adds to the target's logit there."""
    texts = view.model.to_str_tokens(tokens)
    points = residual_points(view.model.cfg.n_layers)
    readouts = view.readout(residual_stack(view.model, tokens, last_only=False)[:, 0])[..., signal]
    return pd.DataFrame(
        {
            "depth": [point.depth for point in points for _ in texts],
            "point": [point.label for point in points for _ in texts],
            "position": [*range(len(texts))] * len(points),
            "token": texts * len(points),
            "signal": signal,
            "readout": readouts.flatten().cpu().numpy(),
            "contribution": (readouts * view.logit_rows[target_id, signal]).flatten().cpu().numpy(),
        }
    )
