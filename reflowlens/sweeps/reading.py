"""From the last residual stream to a metric's value, forming only the logits that the metric reads."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reflowlens.errors import ReflowlensError
from reflowlens.interventions.passes import check_lengths_known
from reflowlens.metrics import Logits, Metric, Reference, WholeLogits, check_metric, read_positions
from reflowlens.models.base import HookedModel
from reflowlens.models.residual import Readout, ResidualModel
from reflowlens.sweeps.packed import Packed
from reflowlens.sweeps.run_prompts import RunPrompts

_LOGITS_AT_ONCE = 2**24  # entries of a [row, read, d_vocab] block


@dataclass(frozen=True)
class LazyLogits:
    """Logits of a readout: those of a few tokens cost a few rows of the unembedding."""

    readout: Readout

    def tokens(self, ids: Int[Tensor, "#row #pos n"]) -> Float[Tensor, "row pos n"]:
        return self.readout.logits_of(ids.expand(*self.readout.features.shape[:2], -1))

    def vocabulary(self) -> Float[Tensor, "row pos d_vocab"]:
        return self.readout.logits()


@dataclass(frozen=True)
class LogitsOnDemand:
    """Logits of a run that is made when a metric asks for them: most do not."""

    run: Callable[[], Logits]

    def tokens(self, ids: Int[Tensor, "#row #pos n"]) -> Float[Tensor, "row pos n"]:
        return self.run().tokens(ids)

    def vocabulary(self) -> Float[Tensor, "row pos d_vocab"]:
        return self.run().vocabulary()


class Reader:
    """A metric bound to a model and the prompts that are patched.

    Attributes:
        positions: read positions of each prompt, [prompt, read].
        column: where each position is among them, -1 where it is not read, [prompt, pos].
        last_position: the last that is read, [prompt]; what happens behind it cannot matter.
        each: the number of every prompt, 0, 1, ...
        ends: of a recovery the values of the corrupted and the clean run that it lies between, [prompt] each.
    """

    def __init__(self, model: ResidualModel, metric: Metric, prompts: RunPrompts) -> None:
        tokens, lengths, clean, clean_lengths = prompts.tokens, prompts.lengths, prompts.clean, prompts.clean_lengths
        check_metric(metric)
        check_lengths_known(model, lengths)
        self.model, self.metric, self.prompts = model, metric, prompts
        self.positions = read_positions(metric.position, lengths, tokens.shape[1]).to(tokens.device)
        reading = torch.arange(self.positions.shape[1], device=tokens.device).expand_as(self.positions)
        self.column = torch.full(tokens.shape, -1, device=tokens.device).scatter(1, self.positions, reading)
        self.last_position = self.positions.max(dim=1).values
        self.each = torch.arange(len(prompts), device=tokens.device)
        clean_logits: Logits | None = None
        if clean is not None:
            self._check_comparable(metric)
            clean_read = read_positions(metric.position, clean_lengths, clean.shape[1]).to(tokens.device)
            clean_logits = LogitsOnDemand(lambda: self._logits(clean, clean_read))
        self._score = metric.bind(model, Reference(tokens, lengths, clean_logits, metric.rows))
        self.ends: tuple[Tensor, Tensor] | None = None
        if metric.normalised:
            if clean is None:
                raise ReflowlensError("recovery needs the clean prompts: it is the share of the way to their value")
            self.ends = self._value(tokens, self.positions), self._value(clean, clean_read)

    @property
    def is_read(self) -> Bool[Tensor, "prompt pos"]:
        """Whether a position is read."""
        return self.column >= 0

    @functools.cached_property
    def weights(self) -> tuple[Tensor, ...]:
        return self.model.tied_weights()

    def read(
        self, stream: Float[Tensor, "row pos feature"], prompts: Int[Tensor, " row"] | None = None
    ) -> Float[Tensor, "row read feature"]:
        """Streams at the positions that are read; by default one row a prompt."""
        return _at(stream, self.positions if prompts is None else self.positions[prompts])

    def read_packed(
        self, final: Float[Tensor, "prompt pos d_model"], packed: Packed
    ) -> Float[Tensor, "row read d_model"]:
        """The last stream of each row at the positions that are read: its own, over the unpatched run's."""
        whole = self.read(final)[packed.layout.prompt]
        column = self.column[packed.token_prompt, packed.layout.position]
        is_read = column >= 0
        whole[packed.layout.row[is_read], column[is_read]] = packed.resid[0, is_read].to(whole.dtype)
        return whole

    def of_final(self, final: Float[Tensor, "prompt pos d_model"]) -> Float[Tensor, " prompt"]:
        """The metric of whole runs whose last residual stream is this."""
        return self.of_residual(self.read(final), self.each)

    def of_run(self) -> Float[Tensor, " prompt"]:
        """The metric of the prompts' own run, with what is attached to the model."""
        if attached_points(self.model):
            return self.of_logits(self.model(self.prompts.tokens))
        return self.of_final(self._final(self.prompts.tokens))

    def of_residual(
        self, resid: Float[Tensor, "row read d_model"], prompts: Int[Tensor, " row"]
    ) -> Float[Tensor, " row"]:
        """The metric of rows whose last residual stream at the read positions is this."""
        return self._of_readout(self._readout(resid), prompts)

    def of_signals(self, signals: Float[Tensor, "row pos S"], prompts: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
        """The metric of rows whose readout signals at all positions are these."""
        return self._of_readout(Readout(self.read(signals, prompts), self.weights[0], None), prompts)

    def _check_comparable(self, metric: Metric) -> None:
        everywhere = isinstance(metric.position, str) and metric.position == "all"
        if everywhere and not self.prompts.is_even and (metric.normalised or not metric.reads_tokens):
            raise ReflowlensError(
                f"the metric {metric.name} reads all positions, of which clean and corrupted prompts have different "
                "numbers: give it one position, such as 'last'"
            )

    def _value(self, tokens: Int[Tensor, "prompt pos"], read: Int[Tensor, "prompt read"]) -> Float[Tensor, " prompt"]:
        """The metric of a run, before it is normalised."""
        if attached_points(self.model):
            return self._score(self._logits(tokens, read), self.each)
        return self.of_residual(_at(self._final(tokens), read), self.each)

    def _final(self, tokens: Int[Tensor, "prompt pos"]) -> Float[Tensor, "prompt pos d_model"]:
        return self.model.final_stream(tokens)

    def _logits(self, tokens: Int[Tensor, "prompt pos"], read: Int[Tensor, "prompt read"]) -> Logits:
        """Those of a run at the positions that are read; hooks, which may be on the readout, see it whole."""
        if attached_points(self.model):
            return WholeLogits(_at(self.model(tokens), read))
        return LazyLogits(self._readout(_at(self._final(tokens), read)))

    def _readout(self, resid: Float[Tensor, "row read d_model"]) -> Readout:
        return self.model.read_final(resid, self.weights)

    def _of_readout(self, readout: Readout, prompts: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
        features = readout.features
        rows = max(1, _LOGITS_AT_ONCE // (features.shape[1] * readout.matrix.shape[0]))
        parts = [
            self._score(LazyLogits(readout._replace(features=features[i : i + rows])), prompts[i : i + rows])
            for i in range(0, len(features), rows)
        ]
        return self._normalise(torch.cat(parts), prompts)

    def _normalise(self, values: Float[Tensor, " row"], prompts: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
        if self.ends is None:
            return values
        corrupted, clean = (end[prompts] for end in self.ends)
        return (values - corrupted) / (clean - corrupted)

    def of_logits(self, logits: Float[Tensor, "prompt pos d_vocab"]) -> Float[Tensor, " prompt"]:
        """The metric of whole runs whose logits are these."""
        return self._normalise(self._score(WholeLogits(self.read(logits)), self.each), self.each)


def _at(
    stream: Float[Tensor, "row pos feature"], positions: Int[Tensor, "row read"]
) -> Float[Tensor, "row read feature"]:
    return stream[torch.arange(len(stream), device=stream.device)[:, None], positions]


def attached_points(model: HookedModel) -> list[str]:
    """Hook points that something is attached to."""
    return [name for name, point in model.hook_dict.items() if point.fwd_hooks or point.bwd_hooks]


def check_readout_is_free(model: HookedModel) -> None:
    """Raise where something is attached behind the last residual stream, from which logits are about to be read."""
    for name in attached_points(model):
        if name.startswith(("ln_final.", "unembed.")):
            raise ReflowlensError(
                f"something is attached to {name!r}, but the readout is computed here without a whole forward pass: "
                "leave rl.intervene and remove hooks first, or use an exact sweep"
            )
