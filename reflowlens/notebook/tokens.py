"""A text whose tokens are coloured by numbers: activations, contributions, losses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from jaxtyping import Float

from reflowlens.arguments import real_number
from reflowlens.errors import ReflowlensError
from reflowlens.figures.style import label
from reflowlens.notebook.html import ID, HtmlView, escape, selectable, view

if TYPE_CHECKING:
    from reflowlens.models.base import HookedModel

Scale = Literal["diverging", "sequential"]
Tokens: TypeAlias = "str | Sequence[str] | Any"  # a text, its tokens, or ids [pos]

MAX_TOKENS = 2000
MAX_CELLS = 20_000  # tokens times channels: about 2 MB of HTML
_POSITIVE, _NEGATIVE = "213,94,0", "0,114,178"  # Okabe and Ito's vermillion and blue
_STRONGEST = 0.65  # opacity, at which ink of either theme can be read

COLORED_TOKENS = (
    f"#{ID} .rl-text{{white-space:pre-wrap;line-height:1.9;overflow-wrap:anywhere;padding-bottom:1.6em}}"
    f"#{ID} .rl-line{{white-space:pre-wrap;overflow-wrap:anywhere;padding:.15em 0;border-bottom:1px solid "
    "rgba(128,128,128,.28)}"
    f"#{ID} [data-value]{{position:relative;border-radius:.2em;padding:.12em 0;cursor:default}}"
    f"#{ID} [data-value]:hover{{outline:1px solid currentColor}}"
    f"#{ID} [data-value]:hover::after{{content:attr(data-value);position:absolute;left:0;top:100%;z-index:9;"
    "white-space:pre;background:#24272d;color:#f4f4f4;padding:.1em .5em;border-radius:.3em;font-size:.85em;"
    "line-height:1.5;pointer-events:none}"
)


def show_tokens(
    tokens: Tokens,
    values: Any,
    *,
    names: Sequence[str] | None = None,
    scale: Scale | None = None,
    limit: float | None = None,
    model: HookedModel | None = None,
    title: str = "",
) -> HtmlView:
    """A text with a colour behind each token, its number on hover, and buttons where there are several channels.

    Args:
        tokens: the tokens' texts; or a text or ids [pos], which ``model`` splits.
        values: a number a token: [pos], [pos, channel], or a mapping from channels' names to [pos]. NaN leaves a token
            without a colour.
        names: of the channels; default their numbers.
        scale: ``"diverging"`` (blue below 0, vermillion above) or ``"sequential"`` (from 0 up); default by whether any
            value is negative.
        limit: the value of the full colour; default the largest absolute one of each channel.
        title: a line above.

    Returns:
        A view for notebooks that saves itself as a page. No more than 2,000 tokens are shown, and 20,000 numbers; it
        says so when there were more.

    Raises:
        ReflowlensError: there is not one number a token, a value is infinite, or a text comes without a model.

    Example:
        >>> import reflowlens as rl
        >>> model = rl.load_model("reflow-nano")
        >>> logits, cache = model.run_with_cache("The capital of France is")
        >>> rl.show_tokens("The capital of France is", cache.signals()[0, :, [3, 17]], names=["3", "17"], model=model)
        TokenView(5 tokens, 2 channels)
    """
    if limit is not None and not 0 < real_number(limit, "limit") < float("inf"):
        raise ReflowlensError(f"limit must be a number above 0, got {limit!r}")
    texts = token_texts(tokens, model)
    channels = _channels(values, names, len(texts))
    n_tokens, n_channels = len(texts), len(channels)
    texts = texts[:MAX_TOKENS]
    kept = list(channels.items())[: max(1, MAX_CELLS // len(texts))]
    notes = []
    if len(texts) < n_tokens:
        notes.append(f"the first {len(texts):,} of {n_tokens:,} tokens")
    if len(kept) < n_channels:
        notes.append(f"the first {len(kept):,} of {n_channels:,} channels: choose those to see")
    diverging = _is_diverging(channels, scale)
    panels = [_panel(texts, numbers[: len(texts)], diverging, limit) for _, numbers in kept]
    content = f"<style>{COLORED_TOKENS}</style>" + selectable([name for name, _ in kept], panels)
    plural = f"{n_channels} channel{'s' if n_channels > 1 else ''}"
    return view(f"TokenView({n_tokens:,} tokens, {plural})", title, notes, content)


def token_texts(tokens: Tokens, model: HookedModel | None) -> list[str]:
    """The texts of tokens that are given as such, or as a text or ids together with a model."""
    if not hasattr(tokens, "__iter__"):
        raise ReflowlensError(f"tokens are a text, ids [pos] or the tokens' texts, got {tokens!r}")
    texts = not isinstance(tokens, str) and all(isinstance(token, str) for token in tokens)
    if not texts and model is None:
        what = "a text" if isinstance(tokens, str) else "token ids"
        raise ReflowlensError(f"{what} cannot be split into tokens without a model: give model=, or the tokens' texts")
    if texts or model is None:
        shown = list(tokens)
    else:
        from reflowlens.models.unwrapping import hooked_model

        shown = hooked_model(model).to_str_tokens(tokens)
    if not shown:
        raise ReflowlensError("there are no tokens to show")
    return shown


def as_array(values: Any) -> np.ndarray:
    """Numbers of a tensor of any type and device, or of anything that numpy reads, as float64."""
    if hasattr(values, "detach"):
        values = values.detach().double().cpu().numpy()
    try:
        return np.asarray(values, dtype=float)
    except (TypeError, ValueError) as error:
        raise ReflowlensError(f"values must be numbers, all rows of one length, got {values!r}") from error


def shown_names(names: Sequence[str] | None, n: int, what: str) -> list[str]:
    """The names of channels or heads; default their numbers.

    Raises:
        ReflowlensError: they are no list, or not as many.
    """
    if names is not None and not isinstance(names, Iterable):
        raise ReflowlensError(f"names must be a list of names, got {names!r}")
    shown = [str(name) for name in (range(n) if names is None else names)]
    if len(shown) != n:
        raise ReflowlensError(f"{len(shown)} names were given for {n} {what}")
    return shown


def token_text(token: str) -> str:
    """A token in running text: escaped, blanks that would not show made visible, lines broken where it does."""
    return label(token) + "<br>" * token.count("\n")


def _channels(values: Any, names: Sequence[str] | None, n_tokens: int) -> dict[str, Float[np.ndarray, " pos"]]:
    if isinstance(values, Mapping):
        columns = {str(name): as_array(column) for name, column in values.items()}
    else:
        array = as_array(values)
        array = array[:, None] if array.ndim == 1 else array
        if array.ndim != 2 or array.shape[1] == 0:
            raise ReflowlensError(f"values must be [pos], [pos, channel] or a mapping, got shape {list(array.shape)}")
        shown = shown_names(names, array.shape[1], "channels")
        columns = dict(zip(shown, array.T, strict=True))
        if len(columns) < len(shown):
            raise ReflowlensError("the names of channels must differ")
    if not columns:
        raise ReflowlensError("there are no values to show")
    for name, column in columns.items():
        if column.shape != (n_tokens,):
            raise ReflowlensError(
                f"{n_tokens} tokens need as many values each channel, {name!r} has shape {list(column.shape)}"
            )
        if np.isinf(column).any():
            raise ReflowlensError(f"channel {name!r} has an infinite value, which no colour stands for")
    return columns


def _is_diverging(channels: Mapping[str, np.ndarray], scale: Scale | None) -> bool:
    negative = any((column < 0).any() for column in channels.values())
    if scale not in (None, "diverging", "sequential"):
        raise ReflowlensError(f"no scale {scale!r}; there are 'diverging' and 'sequential'")
    if scale == "sequential" and negative:
        raise ReflowlensError("a sequential scale begins at 0, and some values are negative: use 'diverging'")
    return scale == "diverging" or (scale is None and negative)


def _panel(texts: Sequence[str], values: Float[np.ndarray, " pos"], diverging: bool, limit: float | None) -> str:
    full = float(limit) if limit else float(np.nanmax(np.abs(values), initial=0.0)) or 1.0
    spans = "".join(
        colored_token(i, text, float(value), full, token_text(text))
        for i, (text, value) in enumerate(zip(texts, values, strict=True))
    )
    return f'{_legend(full, diverging)}<div class="rl-text">{spans}</div>'


def colored_token(position: int, text: str, value: float, full: float, markup: str) -> str:
    """A token, shown as ``markup``: a colour as strong as its value's share of ``full``, and its number on hover."""
    told = f"{position}: {text!r}\n{'no value' if np.isnan(value) else f'{value:.4g}'}"
    strength = 0.0 if np.isnan(value) else _STRONGEST * min(1.0, abs(value) / full)
    color = f"rgba({_NEGATIVE if value < 0 else _POSITIVE},{strength:.2f})"
    return f'<span style="background:{color}" data-value="{escape(told)}">{markup}</span>'


def _legend(full: float, diverging: bool) -> str:
    ends = [f"rgba({_POSITIVE},0)", f"rgba({_POSITIVE},{_STRONGEST})"]
    if diverging:
        ends = [f"rgba({_NEGATIVE},{_STRONGEST})", *ends]
    bar = (
        f'<span style="display:inline-block;width:9em;height:.8em;margin:0 .5em;vertical-align:middle;'
        f'border:1px solid rgba(128,128,128,.4);background:linear-gradient(to right,{",".join(ends)})"></span>'
    )
    lowest = f"{-full:.4g}" if diverging else "0"
    return f'<div style="font-size:.82em;opacity:.85;margin:.2em 0">{lowest}{bar}{full:.4g}</div>'
