"""Removing signals before the readout: many at once, each run only as much of itself as differs.

=================  ====================================================================================================
site               what is removed of signal s, at every position
=================  ====================================================================================================
``"embed"``        its part of the embedding: a token with recipe r enters without ``r_s B_s``
a layer            the component along ``B_s`` of the residual stream that this block reads (``n_layers``: the readout)
``"everywhere"``   its basis row for the whole pass, at both ends: ``embed``, and ``a_s = 0`` at the readout
=================  ====================================================================================================

Of a dictionary's feature what it writes is removed from the stream that the dictionary is of, and its error stays: the
only site of such a view is that layer.

What every removal takes from the stream is known from the unablated run. So a row, one signal of one prompt, enters at
the site's layer and at the first position where something is removed (a sparse recipe leaves most positions alone), and
the rows go through the blocks together (:mod:`reflowlens.sweeps.suffixes`); where a pass cannot start from a block,
each is a whole pass. For removals at the readout alone, which need no run, see :mod:`reflowlens.ablations.readout`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeAlias, cast

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from reflowlens.arguments import integer
from reflowlens.dictionary_view import DictionaryView
from reflowlens.errors import ReflowlensError
from reflowlens.metrics import Metric
from reflowlens.models.residual import Readout, ResidualModel
from reflowlens.models.text import TextInput
from reflowlens.models.threads import changing
from reflowlens.models.unwrapping import guarded, hooked_model
from reflowlens.signals import AnyView, SignalView, view_of
from reflowlens.sweeps.batching import in_batches
from reflowlens.sweeps.injections import stream_points
from reflowlens.sweeps.packed import Packed, UnpatchedRun
from reflowlens.sweeps.patching_result import PatchingResult
from reflowlens.sweeps.reading import Reader, attached_points
from reflowlens.sweeps.run_prompts import RunPrompts
from reflowlens.sweeps.suffixes import Layout

Site: TypeAlias = "Literal['embed', 'everywhere'] | int"


@guarded(changing)
@torch.no_grad()
def ablate_upstream(
    model: Any,
    prompt: TextInput,
    metric: Metric,
    site: Site,
    *,
    signals: int | Sequence[int] | None = None,
    view: AnyView = None,
    memory: float | None = None,
    progress: bool | None = None,
) -> PatchingResult:
    """A metric after removing each signal alone at a site before the readout.

    Of a reFlow's own signals ``"embed"`` is ``rl.Ablate("hook_recipe", index=s)``, and ``"everywhere"`` a row of zeros
    in ``hook_basis``.

    Args:
        model: a hooked model.
        metric: one of :mod:`reflowlens.metrics`, of logits read through the view; ``kl`` compares with the unablated
            run.
        site: ``"embed"``, ``"everywhere"``, or a layer (module docstring).
        signals: which, one or several; default every one.
        view: whose signals; default the model's own, or the residual axes of a model without any. Of a dictionary the
            features.
        memory: bytes that the rows may take; default: a share of what is free. Halved when memory runs out.
        progress: show a bar; by default on a terminal.

    Returns:
        TransformerLens's ``PatchingResult``: ``values`` [signal, prompt], ``baseline`` [prompt].

    Raises:
        ReflowlensError: there is no such site or signal, the embedding at the input is not the one that the view is of,
            the metric compares with a clean run, or hooks are attached to the model.

    Example:
        >>> import reflowlens as rl
        >>> model = rl.load_model("reflow-nano")
        >>> rl.ablate_upstream(model, "The king", rl.metrics.kl(), "everywhere", signals=[3, 17]).values.shape
        torch.Size([2, 1])
    """
    site = site if isinstance(site, str) or (layer := integer(site)) is None else layer
    hooked = _checked(model, metric, site)
    chosen = view_of(hooked, view).final
    if isinstance(chosen, DictionaryView) and site != chosen.site:
        raise ReflowlensError(
            f"the features of {chosen.name} are in the stream that layer {chosen.site} reads: site={chosen.site}, got "
            f"{site!r}"
        )
    wanted = list(range(chosen.n_signals)) if signals is None else _numbers(signals, chosen.n_signals)
    reader = ViewReader(chosen, metric, RunPrompts.of(hooked, prompt))
    unablated = UnpatchedRun(hooked, reader.prompts.tokens, stream_points(hooked) if hooked.stages == "whole" else ())
    removals = _Removals(reader, unablated, site)
    show = sys.stderr.isatty() if progress is None else progress
    parts = []
    with tqdm(total=len(wanted), unit="signal", disable=not show) as bar:
        for some, part in in_batches(wanted, removals.values, unablated.final.device, memory):
            parts.append(part)
            bar.update(len(some))
    return PatchingResult(
        values=torch.cat(parts),
        axis_names=["signal"],
        index_df=pd.DataFrame({"signal": wanted}),
        metric_names=[metric.name],
        reduced=False,
        baseline=reader.of_final(unablated.final),
    )


class ViewReader(Reader):
    """Reads logits through a view instead of the model's own unembedding; the clean run is the unablated one."""

    def __init__(self, view: SignalView, metric: Metric, prompts: RunPrompts) -> None:
        self.view = view
        super().__init__(cast(ResidualModel, view.model), metric, prompts.as_clean())

    def _readout(self, resid: Float[Tensor, "row read d_model"]) -> Readout:
        return Readout(self.view.readout(resid), self.view.logit_rows, self.view.bias, self.view.cap)

    def without_signal(
        self, resid: Float[Tensor, "row read d_model"], prompts: Int[Tensor, " row"], signals: Int[Tensor, " row"]
    ) -> Float[Tensor, " row"]:
        """The metric of rows that end in these streams, each with one signal zeroed at the readout."""
        readout = self._readout(resid)
        readout.features[torch.arange(len(signals), device=signals.device), :, signals] = 0.0
        return self._of_readout(readout, prompts)


class _Removals:
    """The unablated run, and what a site removes from it."""

    def __init__(self, reader: ViewReader, unablated: UnpatchedRun, site: Site) -> None:
        self.reader, self.unablated, self.at_readout = reader, unablated, site == "everywhere"
        self.layer, basis = site if isinstance(site, int) else 0, reader.view.basis
        self.point = stream_points(reader.model)[self.layer] if isinstance(site, int) else "hook_embed"
        whole = reader.model.stages == "whole"
        stream = unablated.cache[stream_points(reader.model)[self.layer]] if whole else unablated.resid(self.layer)
        self.stream = stream.to(basis.dtype)
        # The stream loses ``amount[..., s] * directions[s]``.
        if isinstance(site, int):
            self.amount, self.directions = reader.view.removals(self.stream)
        else:
            self.amount, self.directions = reader.view.recipe[reader.prompts.tokens], basis

    def values(self, signals: list[int]) -> Float[Tensor, "signal prompt"]:
        """The metric after removing each of some signals."""
        n_prompts, n_positions = self.amount.shape[:2]
        final = self.unablated.final
        signal = torch.tensor(signals, device=final.device).repeat_interleave(n_prompts)
        prompt = self.reader.each.repeat(len(signals))
        removed = self.amount[prompt, :, signal]
        if self.reader.model.stages == "whole":
            return self._of_read(self._whole_passes(prompt, signal, removed), prompt, signal)
        start = torch.where((removed != 0).any(dim=1), (removed != 0).int().argmax(dim=1), n_positions)
        start = start.masked_fill(start > self.reader.last_position[prompt], n_positions)
        layout = Layout.of_suffixes(prompt, start, n_positions)
        row, position = layout.row, layout.position
        resid = self.stream[prompt[row], position] - removed[row, position, None] * self.directions[signal[row]]
        entering = Packed(layout, signal, resid.to(final.dtype)[None])
        packed = self.unablated.finish(
            {self.unablated.first_stage(self.layer): [entering]}, is_read=self.reader.is_read
        )
        return self._of_read(self.reader.read_packed(final, packed), prompt, signal)

    def _of_read(self, read: Tensor, prompt: Int[Tensor, " row"], signal: Int[Tensor, " row"]) -> Tensor:
        """The metric of rows that end in these streams at the positions that are read."""
        reader = self.reader
        values = reader.without_signal(read, prompt, signal) if self.at_readout else reader.of_residual(read, prompt)
        return values.unflatten(0, (-1, len(reader.each)))

    def _whole_passes(
        self, prompt: Int[Tensor, " row"], signal: Int[Tensor, " row"], removed: Float[Tensor, "row pos"]
    ) -> Float[Tensor, "row read d_model"]:
        model = self.reader.model
        taken = removed[..., None] * self.directions[signal][:, None]
        with model.hooks([(self.point, lambda x, hook: x - taken.to(x))]):
            return self.reader.read(model.final_stream(self.reader.prompts.tokens[prompt]), prompt)


def _numbers(signals: int | Sequence[int], n_signals: int) -> list[int]:
    """The signals that are asked for, each checked."""
    given = list(signals) if isinstance(signals, Iterable) else [signals]
    if not given:
        raise ReflowlensError("there is no signal to remove: signals is empty")
    wanted = []
    for signal in given:
        number = integer(signal)
        if number is None or not 0 <= number < n_signals:
            raise ReflowlensError(f"no signal {signal}: this view has signals 0 to {n_signals - 1}")
        wanted.append(number)
    return wanted


def _checked(model: Any, metric: Metric, site: Site) -> ResidualModel:
    hooked = cast(ResidualModel, hooked_model(model))
    if attached_points(hooked):
        raise ReflowlensError("signals are removed from the model as it is: leave rl.intervene and remove hooks first")
    if isinstance(metric, Metric) and metric.normalised:
        raise ReflowlensError("recovery compares with a clean run, and a removal has none: use the metric itself")
    if isinstance(site, str) and not hooked.cfg.has_one_embedding:
        raise ReflowlensError(
            f"site={site!r} needs one embedding at both ends, but this model's unembedding is its own"
        )
    layers = range(hooked.cfg.n_layers + 1)
    if not isinstance(site, str | int) or isinstance(site, bool) or site not in ("embed", "everywhere", *layers):
        raise ReflowlensError(f"site must be 'embed', 'everywhere' or a layer from 0 to {layers[-1]}, got {site!r}")
    return hooked
