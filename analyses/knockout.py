"""Removing signals: what a prediction owes to each.

At the readout the logits are linear in the signals, ``logits = R a``, so replacing one signal is a closed form and
needs no forward pass. Upstream of it the edited residual streams of many signals are one batch that starts at the
edited layer.

Every removal is a *replacement*: by zero, by the signal's mean over reference text, or by its value elsewhere
(resample).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from reflowlens.models.base import HookedModel
from reflowlens.signals import SignalView


class SingleEffects(NamedTuple):
    """What replacing each signal at the readout does; arrays are [prompt] and [prompt, S]."""

    before: Float[Tensor, " prompt"]  # probability of the target
    after: Float[Tensor, "prompt S"]
    kl: Float[Tensor, "prompt S"]  # KL(before ‖ after) in nats


@torch.no_grad()
def single_effects(
    view: SignalView,
    signals: Float[Tensor, "prompt S"],
    targets: Int[Tensor, " prompt"],
    replacement: Float[Tensor, "prompt S"] | float = 0.0,
) -> SingleEffects:
    """The target's probability after replacing each signal alone, in closed form.

    With d = replacement - a, replacing signal s moves the logits by d_s R_:s, and with p the distribution before, the
    normaliser grows by g_s = log Σ_v p_v exp(d_s R_vs). Then p_after = p exp(d_s R_:s - g_s) and
    KL(p ‖ p_after) = g_s - d_s (Rᵀ p)_s.
    """
    columns = view.recipe[: view.n_tokens].float().T.contiguous()
    lowest, highest = columns.aminmax(dim=-1)
    delta = replacement - signals
    before, after, kl = [], [], []
    for a, d, target in zip(signals, delta, targets.tolist(), strict=True):
        p = (a @ columns).softmax(dim=-1)
        largest = torch.maximum(d * lowest, d * highest)  # keeps every exponent at or below zero
        growth = torch.cat(
            [((d[s, None] * columns[s] - largest[s, None]).exp_() @ p).log() for s in torch.arange(len(a)).split(32)]
        )
        growth += largest
        before.append(p[target])
        after.append(p[target] * (d * columns[:, target] - growth).exp())
        kl.append(growth - d * (columns @ p))
    return SingleEffects(torch.stack(before), torch.stack(after), torch.stack(kl))


@torch.no_grad()
def knockout_curve(
    view: SignalView,
    signals: Float[Tensor, "prompt S"],
    targets: Int[Tensor, " prompt"],
    order: Int[Tensor, "prompt S"],
    counts: list[int],
    *,
    keep: bool = False,
) -> Float[Tensor, "prompt count"]:
    """The target's probability after zeroing the first k signals of each prompt's order at the readout, for each k.

    With ``keep`` the first k are kept and all others zeroed: sufficiency instead of necessity.
    """
    R = view.recipe[: view.n_tokens].float()
    place = order.argsort(dim=-1)
    cuts = torch.tensor(counts, device=signals.device)[:, None]
    curves = []
    for a, places, target in zip(signals, place, targets.tolist(), strict=True):
        kept = places < cuts if keep else places >= cuts
        logits = (kept * a) @ R.T
        curves.append((logits[:, target] - logits.logsumexp(dim=-1)).exp())
    return torch.stack(curves)


def write_norms(view: SignalView, signals: Float[Tensor, "prompt S"]) -> Float[Tensor, "prompt S"]:
    """How much a signal moves all logits together, |a_s| ‖R_:s‖₂: what a matched control signal is matched on."""
    return signals.abs() * view.recipe[: view.n_tokens].float().norm(dim=0)


def random_order(shape: tuple[int, ...], seed: int) -> Int[Tensor, "prompt S"]:
    """A random order of the signals for each prompt."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).argsort(dim=-1)


def matched_order(order: Int[Tensor, "prompt S"], norms: Float[Tensor, "prompt S"]) -> Int[Tensor, "prompt S"]:
    """For each signal in turn the unused *other* signal whose write norm is nearest: an order that removes as much.

    >>> matched_order(torch.tensor([[0, 1, 2]]), torch.tensor([[3.0, 1.0, 2.9]]))
    tensor([[2, 0, 1]])
    """
    matched = np.empty(order.shape, dtype=np.int64)
    for row, (wanted, size) in enumerate(zip(order.cpu().numpy(), norms.cpu().numpy(), strict=True)):
        free = np.ones(len(size), dtype=bool)
        for k, signal in enumerate(wanted):
            distance = np.where(free, np.abs(size - size[signal]), np.inf)
            if free.sum() > 1:
                distance[signal] = np.inf
            matched[row, k] = distance.argmin()
            free[matched[row, k]] = False
    return torch.from_numpy(matched)


def curve_counts(n_signals: int, points: int = 14) -> list[int]:
    """Numbers of signals to remove: every one up to 8, then geometrically to all.

    >>> curve_counts(16, points=4)
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 13, 16]
    """
    tail = np.geomspace(8, max(8, n_signals), points).round().astype(int).tolist() if n_signals > 8 else []
    return sorted({*range(min(8, n_signals) + 1), *tail})


def curve_area(curve: NDArray[np.float64], counts: list[int]) -> NDArray[np.float64]:
    """Area under [prompt, count] curves over the share of signals removed, by the trapezoidal rule."""
    shares = np.asarray(counts) / counts[-1]
    return ((curve[:, 1:] + curve[:, :-1]) / 2 * np.diff(shares)).sum(axis=1)


Site = Literal["embed", "everywhere"] | int


@torch.no_grad()
def upstream_effects(
    model: HookedModel,
    view: SignalView,
    tokens: Int[Tensor, "one pos"],
    target: int,
    signals: Int[Tensor, " k"],
    site: Site,
) -> Float[Tensor, " k"]:
    """The target's probability at the last position after zeroing each signal at a site before the readout.

    Sites: ``"embed"``, each token enters without r_s B_s; a layer, the component along B_s is projected out of the
    residual stream that this block reads, at every position; ``"everywhere"``, the basis row is zero for the whole
    pass: ``embed`` and readout together.
    """
    layer = site if isinstance(site, int) else 0
    resid = model(tokens, stop_at_layer=layer)
    rows = view.basis[signals]
    if isinstance(site, int):
        directions = rows / rows.norm(dim=-1, keepdim=True)
        removed = torch.einsum("pd,kd,ke->kpe", resid[0].to(rows), directions, directions)
    else:
        removed = torch.einsum("pk,kd->kpd", view.recipe[tokens[0]][:, signals], rows)
    last = model((resid - removed).to(resid), start_at_layer=layer, stop_at_layer=model.cfg.n_layers)[:, -1]
    a = view.readout(last)
    if site == "everywhere":
        a[torch.arange(len(signals)), signals] = 0.0
    return view.logits(a)[:, : view.n_tokens].float().softmax(dim=-1)[:, target]


def codebook_texts(view: SignalView, k: int = 6) -> list[str]:
    """For each signal its k largest positive tokens, as one readable line."""
    top = view.recipe[: view.n_tokens].topk(k, dim=0).indices.T.tolist()
    return [" ".join(repr(text) for text in view.model.tokenizer.to_str_tokens(tokens)) for tokens in top]
