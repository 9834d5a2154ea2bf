"""TransformerLens's patching result, short on a terminal and a table in a notebook; padding is left out of it."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens import patching

from reflowlens.errors import ReflowlensError

_ROWS = 10


@dataclass(repr=False)
class PatchingResult(patching.PatchingResult):
    """What a sweep returns: everything that TransformerLens's result does, and a readable summary of itself.

    A prompt may lack the position that a cell is about. ``values`` are NaN there, and means, intervals and p values are
    those of the prompts that have it.

    Args:
        missing: where a prompt has no such position, shaped like ``values``; None: nowhere. A value that is NaN for
            another reason, a recovery of two equal runs say, makes a mean NaN as ever.
        misaligned: whether a cell takes together position p from the left of prompts of several lengths, without having
            been asked to: then taking means warns.
    """

    missing: Bool[Tensor, "*cell prompt"] | None = None
    misaligned: bool = False

    def __repr__(self) -> str:
        axes = " × ".join(f"{n} {name}" for name, n in zip(self.axis_names, self.values.shape, strict=False))
        prompts = "" if self.reduced else f", {self.values.shape[-1]} prompt{'s' if self.values.shape[-1] > 1 else ''}"
        return f"PatchingResult({', '.join(self.metric_names)}: {axes or f'{len(self.index_df)} cells'}{prompts})"

    def _repr_html_(self) -> str:
        """The cells that change the metric most, or have its largest values where no baseline was run."""
        from reflowlens.notebook.html import table, titled

        known = self.baseline is not None and not self.reduced and not self.has_metric_axis
        of_effect = self.effect() if known else self.values
        change = of_effect if self.reduced else mean_over_prompts(of_effect, self.missing)
        if self.has_metric_axis or change.numel() != len(self.index_df):
            return titled(repr(self), "")
        frame = self.index_df.assign(value=change.reshape(-1).tolist())
        strongest = frame.loc[frame.value.abs().sort_values(ascending=False, kind="stable").index[:_ROWS]]
        what = "mean change of the metric" if known else "mean of the metric"
        what += " (prompts of several lengths, positions from the left)" if self.misaligned else ""
        rows = strongest.astype(object).itertuples(index=False)
        shown = table([*map(str, self.index_df.columns), what], rows)
        return titled(repr(self), f"the strongest {len(strongest)} of {len(frame):,} cells", shown)

    def mean(self) -> Float[Tensor, "*cell"]:
        """The mean over the prompts that have what a cell is about; NaN where none has."""
        if self.misaligned:
            warn_of_misaligned()
        return super().mean() if self.missing is None else mean_over_prompts(self.values, self.missing)

    def stderr(self) -> Float[Tensor, "*cell"]:
        """Standard error of :meth:`mean`; NaN for a single prompt where some cells have several."""
        return self._of_present(lambda part: patching.PatchingResult.stderr(part), least=2)

    def bootstrap_ci(self, **options: Any) -> tuple[Float[Tensor, "*cell"], Float[Tensor, "*cell"]]:
        """TransformerLens's percentile bootstrap of the mean (or median), over the prompts that each cell has."""
        low_high = self._of_present(lambda part: torch.stack(patching.PatchingResult.bootstrap_ci(part, **options)))
        low, high = low_high.unbind(0)
        return low, high

    def permutation_pvalue(self, **options: Any) -> Float[Tensor, "*cell"]:
        """TransformerLens's sign-flip permutation p value, over the prompts that each cell has."""
        return self._of_present(lambda part: patching.PatchingResult.permutation_pvalue(part, **options))

    def to_dataframe(self) -> pd.DataFrame:
        """Long form, as TransformerLens's; without the rows of prompts that lack the position."""
        frame = super().to_dataframe()
        return frame if self.missing is None else frame[~self.missing.reshape(-1).cpu().numpy()].reset_index(drop=True)

    def _of_present(self, statistic: Callable[[PatchingResult], Tensor], least: int = 1) -> Tensor:
        """A statistic of each cell's own prompts, [..., *cell]: of the cells that have the same ones together."""
        if self.misaligned:
            warn_of_misaligned()
        if self.missing is None:
            return statistic(self)
        values, baseline = self.values.flatten(0, -2), self.baseline
        found: Tensor | None = None
        for cells, prompts in groups_of_present(self.missing.flatten(0, -2)):
            if len(prompts) < least:
                continue
            part = dataclasses.replace(
                self,
                values=values[cells[:, None], prompts],
                baseline=None if baseline is None else baseline[prompts],
                axis_names=[],
                missing=None,
                misaligned=False,
            )
            of_part = statistic(part)
            if found is None:
                found = values.new_full((*of_part.shape[:-1], len(values)), torch.nan)
            found[..., cells] = of_part
        if found is None:
            raise ReflowlensError(f"no cell has {least} prompts")
        return found.unflatten(-1, self.values.shape[:-1])


def joined(parts: Sequence[PatchingResult]) -> PatchingResult:
    """The result of all prompts of results of parts of them, over the same grid but for the length of its positions."""
    whole = max(parts, key=lambda part: len(part.index_df))
    places = {row: number for number, row in enumerate(whole.index_df.itertuples(index=False, name=None))}
    columns, lacking = [], []
    for part in parts:
        here = torch.tensor([places[row] for row in part.index_df.itertuples(index=False, name=None)])
        n_prompts = part.values.shape[-1]
        values = part.values.new_full((len(places), n_prompts), torch.nan)
        missing = torch.ones(len(places), n_prompts, dtype=torch.bool, device=values.device)
        values[here] = part.values.flatten(0, -2)
        missing[here] = False if part.missing is None else part.missing.flatten(0, -2)
        columns.append(values)
        lacking.append(missing)
    missing, shape = torch.cat(lacking, dim=1), whole.values.shape[:-1]
    return dataclasses.replace(
        whole,
        values=torch.cat(columns, dim=1).unflatten(0, shape),
        baseline=torch.cat([part.baseline for part in parts if part.baseline is not None]),
        missing=missing.unflatten(0, shape) if bool(missing.any()) else None,
    )


def mean_over_prompts(
    values: Float[Tensor, "*cell prompt"], missing: Bool[Tensor, "*cell prompt"] | None
) -> Float[Tensor, "*cell"]:
    """The mean over the prompts that are not missing; NaN where all are."""
    if missing is None:
        return values.mean(dim=-1)
    missing = missing.to(values.device)
    return values.masked_fill(missing, 0.0).sum(dim=-1) / (~missing).sum(dim=-1)


def groups_of_present(missing: Bool[Tensor, "cell prompt"]) -> Iterator[tuple[Tensor, Tensor]]:
    """Cells that lack the same prompts, with the prompts that they have; cells without any are left out.

    >>> missing = torch.tensor([[False, True], [False, False], [False, True]])
    >>> [(cells.tolist(), prompts.tolist()) for cells, prompts in groups_of_present(missing)]
    [([1], [0, 1]), ([0, 2], [0])]
    """
    patterns, owner = torch.unique(missing, dim=0, return_inverse=True)
    for number, pattern in enumerate(patterns):
        if not bool(pattern.all()):
            yield (owner == number).nonzero()[:, 0], (~pattern).nonzero()[:, 0]


def warn_of_misaligned() -> None:
    """Say that a mean takes different words together."""
    warnings.warn(
        "a mean over prompts of several lengths takes position p from the left of each, different words: align by role "
        "(positions=['subject', 'last']) or from the right (positions='right'); positions='left' says that it is meant",
        stacklevel=3,
    )
