"""Removing signals at the readout, in closed form.

Logits are affine in the readout signals, ``logits = R a + b``, so replacing signal s moves them by ``d_s R_:s`` with
``d = a' - a``. What that does to a prediction needs no further run of the model, whichever signals are removed: each
alone, or the first k of an order for each k (:mod:`reflowlens.ablations.closed_form`).

    alone = rl.ablate_readout(model, "The capital of France is")
    alone.probability(" Paris"), alone.kl(), alone.frame(" Paris", against=" Rome")      [prompt, S], [prompt, S], table
    curve = rl.ablate_progressively(model, "The capital of France is", order=" Paris")   by |a_s R_s|, largest first
    curve.probability(" Paris")                                                          [prompt, S + 1]

A removal is a *replacement*: by zero, by the mean over reference text, or by a value found elsewhere in it. For signals
removed before the readout see :mod:`reflowlens.ablations.upstream`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reflowlens.ablations.closed_form import ProgressiveAblations, SingleAblations, contribution_order
from reflowlens.errors import ReflowlensError
from reflowlens.interventions.apply import bind
from reflowlens.interventions.values import Ablate, Source
from reflowlens.metrics import read_positions
from reflowlens.models.text import TextInput, read_once
from reflowlens.models.threads import changing
from reflowlens.models.unwrapping import guarded, hooked_model
from reflowlens.signals import AnyView, SignalView, view_of
from reflowlens.sweeps.reading import check_readout_is_free
from reflowlens.sweeps.stages import READOUT_SIGNAL
from reflowlens.tokenizers.targets import Target

By: TypeAlias = Literal["zero", "mean", "resample"]


@guarded(changing)
@torch.no_grad()
def ablate_readout(
    model: Any,
    prompt: TextInput,
    *,
    position: int | Literal["last"] = "last",
    view: AnyView = None,
    by: By = "zero",
    reference: Source = None,
    seed: int = 0,
) -> SingleAblations:
    """Every signal removed alone from what the readout sees at one position.

    For each signal s the numbers of ``rl.run(model, prompt, rl.Ablate("unembed.hook_signal", index=s, by=...))``, for
    one run of the model; and for the signals of any view, which no hook point holds.

    Args:
        model: a hooked model.
        position: of each prompt; ``"last"`` is its own last token.
        view: whose signals; default the model's own, or the residual axes of a model without any.
        by, reference, seed: what replaces a signal, as in :class:`reflowlens.interventions.values.Ablate`.

    Raises:
        ReflowlensError: the prompt or its position, the view or the reference does not fit the model, or hooks are
            attached to its final norm or unembedding.

    Example:
        >>> import reflowlens as rl
        >>> model = rl.load_model("reflow-nano")
        >>> alone = rl.ablate_readout(model, "The capital of France is")
        >>> alone.probability(" Paris").shape, bool((alone.kl() >= 0).all())
        (torch.Size([1, 256]), True)
    """
    chosen, signals, replacement = _read(
        model, prompt, position, view, Ablate(READOUT_SIGNAL, by=by, reference=reference, seed=seed)
    )
    return SingleAblations(chosen, signals, replacement)


@guarded(changing)
@torch.no_grad()
def ablate_progressively(
    model: Any,
    prompt: TextInput,
    order: Int[Tensor, "prompt k"] | Target,
    *,
    counts: Sequence[int] | None = None,
    keep: bool = False,
    position: int | Literal["last"] = "last",
    view: AnyView = None,
    by: By = "zero",
    reference: Source = None,
    seed: int = 0,
    memory: float | None = None,
) -> ProgressiveAblations:
    """The first k signals of an order removed from what the readout sees at one position, for each k.

    Args:
        order: the signals of each prompt, [prompt, k]; or a token, or one a prompt: by the absolute contribution to its
            logit, ``|a_s R_token,s|``, largest first.
        counts: how many signals to remove; default every number from 0 to the length of the order.
        keep: remove all *but* the first k: sufficiency instead of necessity.
        position, view, by, reference, seed: as in :func:`ablate_readout`.
        memory: bytes that logits may take at once; default: a share of what is free.

    Raises:
        ReflowlensError: as :func:`ablate_readout`; or the order names no such signal or one twice, or a count is beyond
            its length.

    Example:
        >>> import reflowlens as rl
        >>> model = rl.load_model("reflow-nano")
        >>> kept = rl.ablate_progressively(model, "The capital of France is", " Paris", counts=[8, 256], keep=True)
        >>> kept.kl().shape
        torch.Size([1, 2])
    """
    chosen, signals, replacement = _read(
        model, prompt, position, view, Ablate(READOUT_SIGNAL, by=by, reference=reference, seed=seed)
    )
    if isinstance(order, Tensor) and order.ndim == 1 and len(order) == chosen.n_signals != len(signals):
        raise ReflowlensError(f"an order of signals is [prompt, k], got {list(order.shape)}: add the axis of prompts")
    if not isinstance(order, Tensor) or order.ndim != 2:
        order = contribution_order(chosen, signals, order)
    if counts is not None and not isinstance(counts, Iterable):
        raise ReflowlensError(f"counts must be a list of numbers of signals, got {counts!r}")
    counts = tuple(range(order.shape[1] + 1)) if counts is None else tuple(counts)
    return ProgressiveAblations(chosen, signals, replacement, order, counts, keep, memory)


def _read(
    model: Any,
    prompt: TextInput,
    position: int | Literal["last"],
    view: AnyView,
    ablation: Ablate,
) -> tuple[SignalView, Float[Tensor, "prompt S"], Float[Tensor, "prompt S"]]:
    """A view, each prompt's signals at a position, and what the ablation puts in their place there."""
    hooked = hooked_model(model)
    check_readout_is_free(hooked)
    chosen = view_of(hooked, view).final
    prompt = read_once(prompt)
    tokens, lengths = hooked.tokens_and_lengths(prompt)
    signals = chosen.readout(hooked.final_stream(prompt))
    last = f"blocks.{hooked.cfg.n_layers - 1}.hook_resid_post" if hooked.reads_last_stream else "hook_refined"
    (elsewhere,) = bind(hooked, [dataclasses.replace(ablation, hook=last)])
    source = None if elsewhere.source is None else chosen.readout(elsewhere.source)
    replacement = ablation.new_value(signals, source)
    rows = torch.arange(len(tokens), device=signals.device)
    read = read_positions(position, lengths, tokens.shape[1])[:, 0].to(signals.device)
    return chosen, signals[rows, read], replacement[rows, read]
