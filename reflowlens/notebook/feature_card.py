"""One feature in a notebook: what its page shows, as a card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from reflowlens.errors import ReflowlensError
from reflowlens.figures.style import label
from reflowlens.notebook.feature import FeatureContext, FeatureLayerFacts, FeatureRecord, FeatureText
from reflowlens.notebook.feature_pages import FeaturePages, open_feature_pages
from reflowlens.notebook.html import HtmlView, escape, folded, table, view
from reflowlens.notebook.tokens import COLORED_TOKENS, colored_token

_SHOWN = 8  # contexts that are not folded away


def show_feature(pages: FeaturePages | str | Path, layer: str | int, index: int) -> HtmlView:
    """A feature's card: how often it is active and where, the tokens that it promotes, its neighbours, its worth.

    Args:
        pages: what ``analyses.feature_dashboards`` returned, or the folder that it (or ``reflowlens features``) was
            saved to.
        layer: key of the layer, or the number of its block.
        index: of the feature within it.

    Returns:
        A view for notebooks that saves itself as a page.

    Raises:
        ReflowlensError: there are no pages in the folder, or there is no such layer or feature.

    Example: ``rl.show_feature("out/features", layer=3, index=17)``
    """
    if isinstance(pages, str | Path):
        pages = open_feature_pages(pages)
    if not isinstance(pages, FeaturePages):
        raise ReflowlensError(f"pages must be feature pages or their folder, got {pages!r}")
    record, facts = pages.feature(layer, index)
    text = pages.text
    parts = [f"<style>{COLORED_TOKENS}</style>", table(["", ""], _facts(record, facts)), _histogram(record)]
    for name, contexts in record.contexts.items():
        lines = [_line(record, context, text) for context in contexts]
        parts.append(f'<div style="margin-top:.6em"><b>{escape(name)}</b></div>{"".join(lines[:_SHOWN])}')
        if lines[_SHOWN:]:
            parts.append(folded(f"{len(lines) - _SHOWN} more", "".join(lines[_SHOWN:])))
    parts.append(_beside(_tokens("promoted", record.promoted, text), _tokens("suppressed", record.suppressed, text)))
    if record.near:
        rows = [(f"{key}/{other}", f"{cosine:.3f}") for key, other, cosine in record.near]
        parts.append(folded("nearest features", table(["feature", "cosine"], rows)))
    notes = ["promoted and suppressed: logits at activation 1 on the direct path alone; label words are automatic"]
    name = f"{facts.key}/{record.index}"
    title = " · ".join([f"Feature {name}", *record.words(text)])
    return view(f"FeatureCard({name} of {pages.title})", title, notes, "".join(parts))


def _facts(record: FeatureRecord, facts: FeatureLayerFacts) -> list[tuple[str, str]]:
    found = [
        ("read at", facts.name),
        ("active", f"{record.fired / facts.positions:.3%} ({record.fired:,} of {facts.positions:,} positions)"),
        ("activations", f"{record.smallest:.4g} to {record.largest:.4g}"),
    ]
    if (effect := record.effect) is not None:
        change = f"{effect.change:+.4f} ± {effect.error:.4f} nats at {effect.positions:,} positions where it is active"
        control = f"{effect.control_change:+.4f} nats ({facts.key}/{effect.control})"
        found += [("loss without it", change), ("a rate-matched feature", control)]
    return found


def _line(record: FeatureRecord, context: FeatureContext, text: FeatureText) -> str:
    full = max(abs(record.smallest), abs(record.largest)) or 1.0
    spans = []
    for position, (token, value) in enumerate(zip(text.of(context), context.values, strict=True), start=context.start):
        markup = f"<b>{label(token)}</b>" if position == context.middle else label(token)
        spans.append(colored_token(position, token, value, full, markup))
    document = int(text.documents[context.block])
    return f'<div class="rl-line" title="document {document}">{"".join(spans)}</div>'


def _histogram(record: FeatureRecord) -> str:
    """Bars of counts, as inline SVG; the largest bar is the most frequent activation."""
    most, n = max(record.histogram, default=0), len(record.histogram)
    if not most:
        return "<div>it is 0 at every position of this text</div>"
    bars = "".join(
        f'<rect x="{i}" y="{40 * (1 - count / most):.2f}" width=".9" height="{40 * count / most:.2f}"/>'
        for i, count in enumerate(record.histogram)
        if count
    )
    return (
        f'<svg viewBox="0 0 {n} 40" preserveAspectRatio="none" width="320" height="60" fill="rgb(0,114,178)" '
        'role="img" aria-label="histogram of activations that are not 0" style="display:block;border-bottom:1px solid '
        f'rgba(128,128,128,.5)">{bars}</svg><div style="display:flex;justify-content:space-between;width:320px;'
        f'font-size:.82em">{"".join(f"<span>{value:.4g}</span>" for value in (record.low, record.largest))}</div>'
    )


def _tokens(name: str, tokens: Sequence[tuple[int, float]], text: FeatureText) -> str:
    return table([name, "logit"], [(repr(text.vocabulary[token]), f"{value:+.4g}") for token, value in tokens])


def _beside(*parts: str) -> str:
    return f'<div style="display:flex;flex-wrap:wrap;gap:0 3em;margin-top:.6em">{"".join(parts)}</div>'
