"""TransformerLens's patching result, short on a terminal and a table in a notebook."""

from __future__ import annotations

from transformer_lens import patching

_ROWS = 10


class PatchingResult(patching.PatchingResult):
    """What a sweep returns: everything that TransformerLens's result does, and a readable summary of itself."""

    def __repr__(self) -> str:
        axes = " × ".join(f"{n} {name}" for name, n in zip(self.axis_names, self.values.shape, strict=False))
        prompts = "" if self.reduced else f", {self.values.shape[-1]} prompt{'s' if self.values.shape[-1] > 1 else ''}"
        return f"PatchingResult({', '.join(self.metric_names)}: {axes or f'{len(self.index_df)} cells'}{prompts})"

    def _repr_html_(self) -> str:
        """The cells that change the metric most, or have its largest values where no baseline was run."""
        from reflowlens.notebook.html import table, titled

        known = self.baseline is not None and not self.reduced and not self.has_metric_axis
        change = (self.effect() if known else self.values).mean(dim=-1) if not self.reduced else self.values
        if self.has_metric_axis or change.numel() != len(self.index_df):
            return titled(repr(self), "")
        frame = self.index_df.assign(value=change.reshape(-1).tolist())
        strongest = frame.loc[frame.value.abs().sort_values(ascending=False, kind="stable").index[:_ROWS]]
        what = "mean change of the metric" if known else "mean of the metric"
        rows = strongest.astype(object).itertuples(index=False)
        shown = table([*map(str, self.index_df.columns), what], rows)
        return titled(repr(self), f"the strongest {len(strongest)} of {len(frame):,} cells", shown)
