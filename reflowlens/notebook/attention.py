"""Attention patterns to look at: a square a head, what a query reads from, and the strongest pairs."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from reflowlens.errors import ReflowlensError
from reflowlens.figures.provenance import png_chunk
from reflowlens.figures.style import label
from reflowlens.notebook.html import ID, HtmlView, selectable, table, view
from reflowlens.notebook.tokens import as_array, shown_names, token_text, token_texts

if TYPE_CHECKING:
    from reflowlens.activations.cache import ActivationCache
    from reflowlens.models.base import HookedModel

MAX_POSITIONS = 160
MAX_HEADS = 32
_COLOR = (46, 143, 217)  # Okabe and Ito's blue, lighter: weak weights show on a dark page too
_SIDE = 420  # pixels of a square, about
_LEAST_LABELLED = 11  # pixels of a cell that a label fits beside
_TOP = 8

# One listener a view. Weights are 16-bit numbers; what is pointed at is told below the square, and the text beneath it
# takes the colours of that query's row. Without scripts the square, the labels and the table are there all the same.
_SCRIPT = """(function(){
var root=document.getElementById("%(id)s"),tokens=%(tokens)s,n=tokens.length;
if(!root)return;
root.querySelectorAll(".rl-head").forEach(function(head){
var bytes=Uint8Array.from(atob(head.dataset.weights),function(c){return c.charCodeAt(0)}),
w=function(q,k){var i=2*(q*n+k);return(bytes[i]+256*bytes[i+1])/65535},
square=head.querySelector(".rl-square"),told=head.querySelector(".rl-told"),mark=head.querySelector(".rl-mark"),
words=head.querySelectorAll(".rl-words span");
function show(q,k){
told.textContent=JSON.stringify(tokens[q])+" ("+q+") \\u2192 "+JSON.stringify(tokens[k])+" ("+k+"): "+w(q,k).toFixed(3);
mark.setAttribute("x",k);mark.setAttribute("y",q);mark.setAttribute("visibility","visible");
words.forEach(function(word,i){word.style.background="rgba(%(color)s,"+(0.7*w(q,i)).toFixed(3)+")";
word.style.outline=i===q?"1px solid currentColor":"none"});}
square.addEventListener("mousemove",function(event){
var box=square.getBoundingClientRect(),at=function(x,size){return Math.max(0,Math.min(n-1,Math.floor(n*x/size)))};
show(at(event.clientY-box.top,box.height),at(event.clientX-box.left,box.width));});
words.forEach(function(word,q){word.addEventListener("mouseenter",function(){
var best=0;for(var k=1;k<=q;k++)if(w(q,k)>w(q,best))best=k;show(q,best);});});
});})();"""


def show_attention(
    tokens: Any,
    pattern: Any = None,
    *,
    layer: int | None = None,
    prompt: int = 0,
    names: Sequence[str] | None = None,
    model: HookedModel | None = None,
    title: str = "",
) -> HtmlView:
    """Attention weights, one head at a time: queries down, keys across; point at a cell, or at a token of the text.

    Args:
        tokens: the tokens' texts; or a text or ids [pos], which ``model`` splits; or a cache, which knows its own.
        pattern: weights [head, query, key] (or [query, key]), or a cache with ``hook_pattern``.
        layer: of the cache; default every layer that it has, heads then named ``L1.H0``.
        prompt: the row of the cache; of texts of several lengths its padding is not shown.
        names: of the heads; default their numbers.
        title: a line above.

    Returns:
        A view for notebooks that saves itself as a page: a button a head, its strongest pairs (without those of the
        first query, which has one key) and, with scripts, the weights of what is pointed at. No more than 32 heads and
        160 positions are shown; it says so when there were more.

    Raises:
        ReflowlensError: shapes do not fit, a weight is negative or not finite, or the cache has no patterns.

    Example:
        >>> import reflowlens as rl
        >>> model = rl.load_model("reflow-nano")
        >>> _, cache = model.run_with_cache("When Mary and John went", names_filter="blocks.3.attn.hook_pattern")
        >>> rl.show_attention(cache, layer=3)
        AttentionView(5 tokens, 4 heads)
    """
    from reflowlens.activations.cache import ActivationCache

    if isinstance(tokens, ActivationCache):
        tokens, pattern = None, tokens
    if isinstance(pattern, ActivationCache):
        model = model or pattern.model
        if tokens is None:
            tokens = _tokens_of(pattern, prompt)
        pattern, names = _patterns_of(pattern, layer, prompt, names)
    elif pattern is None:
        raise ReflowlensError("show_attention needs a pattern [head, query, key], or a cache that has one")
    texts = token_texts(tokens, model)
    weights = _checked(pattern, len(texts))
    shown = shown_names(names, len(weights), "heads")
    summary = f"AttentionView({len(texts)} tokens, {len(weights)} head{'s' if len(weights) > 1 else ''})"
    notes = []
    if len(texts) > MAX_POSITIONS:
        notes.append(f"the first {MAX_POSITIONS} of {len(texts):,} positions")
    if len(weights) > MAX_HEADS:
        notes.append(f"the first {MAX_HEADS} of {len(weights)} heads: choose those to see")
    texts = texts[:MAX_POSITIONS]
    weights = weights[:MAX_HEADS, :MAX_POSITIONS, :MAX_POSITIONS]
    panels = [_panel(texts, head) for head in weights]
    names_of_tokens = json.dumps(texts).replace("<", "\\u003c")  # no "</script>" can begin inside
    script = _SCRIPT % {"id": ID, "tokens": names_of_tokens, "color": ",".join(map(str, _COLOR))}
    content = f"{selectable(shown[:MAX_HEADS], panels)}<script>{script}</script>"
    return view(summary, title, notes, content)


def _tokens_of(cache: ActivationCache, prompt: int) -> Any:
    if cache.tokens is None or cache.model is None:
        raise ReflowlensError("this cache does not know its tokens, or its model: give show_attention the tokens too")
    row = _row(cache, prompt)
    return cache.tokens[row, : _own_length(cache, row)]


def _patterns_of(
    cache: ActivationCache, layer: int | None, prompt: int, names: Sequence[str] | None
) -> tuple[Float[np.ndarray, "head query key"], Sequence[str] | None]:
    """The weights of one layer, or of all that were cached, and the heads' names."""
    row = _row(cache, prompt)
    if layer is not None:
        found = {layer: as_array(cache["pattern", layer])}
    else:
        points = [name for name in cache if name.endswith("attn.hook_pattern")]
        if not points:
            raise ReflowlensError(
                "this cache has no attention patterns: run_with_cache(..., names_filter=lambda name: "
                "name.endswith('hook_pattern')) keeps them"
            )
        found = {int(name.split(".")[1]): as_array(cache[name]) for name in points}
    n = _own_length(cache, row)
    squares = {number: (x[row] if cache.has_batch_dim else x)[:, :n, :n] for number, x in found.items()}
    if names is None and layer is None:
        names = [f"L{number}.H{head}" for number, x in squares.items() for head in range(len(x))]
    return np.concatenate(list(squares.values())), names


def _row(cache: ActivationCache, prompt: int) -> int:
    rows = 1 if cache.tokens is None else len(cache.tokens)
    if not 0 <= prompt < rows:
        raise ReflowlensError(f"no prompt {prompt}: this cache has prompts 0 to {rows - 1}")
    return prompt


def _own_length(cache: ActivationCache, row: int) -> int | None:
    """How many of a prompt's tokens are no padding; None for all."""
    return None if cache.lengths is None else cache.lengths[row]


def _checked(pattern: Any, n_tokens: int) -> Float[np.ndarray, "head query key"]:
    weights = as_array(pattern)
    weights = weights[None] if weights.ndim == 2 else weights
    if weights.ndim != 3 or weights.shape[1:] != (n_tokens, n_tokens):
        raise ReflowlensError(
            f"{n_tokens} tokens need a pattern [head, {n_tokens}, {n_tokens}], got shape {list(weights.shape)}"
        )
    if not np.isfinite(weights).all() or weights.min() < 0 or weights.max() > 1.0001:
        raise ReflowlensError(
            "attention weights are between 0 and 1, and some of these are not; scores are no pattern: "
            "softmax them first, or draw them with reflowlens.figures.builders.heatmap"
        )
    return weights.clip(0, 1)


def _panel(texts: Sequence[str], weights: Float[np.ndarray, "query key"]) -> str:
    data = base64.b64encode(np.round(weights * 65535).astype("<u2").tobytes()).decode()
    words = "".join(f'<span style="border-radius:.2em">{token_text(text)}</span>' for text in texts)
    return (
        f'<div class="rl-head" data-weights="{data}">'
        '<div style="display:flex;flex-wrap:wrap;gap:0 2.5em;align-items:flex-start">'
        f"<div>{_square(texts, weights)}"
        '<div class="rl-told" style="font-size:.85em;min-height:1.6em">queries down, keys across</div></div>'
        f"<div>{_strongest(texts, weights)}</div></div>"
        f'<div class="rl-words" style="white-space:pre-wrap;overflow-wrap:anywhere;max-width:60em">{words}</div></div>'
    )


def _square(texts: Sequence[str], weights: Float[np.ndarray, "query key"]) -> str:
    """An image of the weights in an SVG whose unit is a cell, and labels where there is room."""
    n = len(texts)
    cell = max(2.0, min(24.0, _SIDE / n))
    labelled = cell >= _LEAST_LABELLED
    font = min(0.62, 12 / cell)
    edge = (0.62 * font * max(min(len(label(text)), 14) for text in texts) + 0.5) if labelled else 0.0
    labels = ""
    if labelled:
        shown = [label(text).strip() if len(text) <= 14 else label(text[:13]) + "…" for text in texts]
        down = (
            f'<text x="-.3" y="{i + 0.5}" text-anchor="end" dominant-baseline="central">{t}</text>'
            for i, t in enumerate(shown)
        )
        across = (
            f'<text transform="translate({i + 0.5} -.3) rotate(-90)" dominant-baseline="central">{t}</text>'
            for i, t in enumerate(shown)
        )
        labels = f'<g font-size="{font:.3f}" fill="currentColor">{"".join((*down, *across))}</g>'
    side = (n + edge) * cell
    return (
        f'<svg width="{side:.0f}" height="{side:.0f}" viewBox="{-edge:.2f} {-edge:.2f} {n + edge:.2f} {n + edge:.2f}" '
        f'role="img" aria-label="attention weights" style="max-width:100%;height:auto;overflow:visible">{labels}'
        f'<g class="rl-square"><image width="{n}" height="{n}" preserveAspectRatio="none" '
        f'style="image-rendering:pixelated" href="data:image/png;base64,{_png(weights)}"/>'
        f'<rect width="{n}" height="{n}" fill="transparent" stroke="rgba(128,128,128,.6)" '
        'stroke-width="1" vector-effect="non-scaling-stroke"/></g>'
        '<rect class="rl-mark" width="1" height="1" fill="none" stroke="rgb(213,94,0)" stroke-width="2" '
        'vector-effect="non-scaling-stroke" visibility="hidden" pointer-events="none"/></svg>'
    )


def _strongest(texts: Sequence[str], weights: Float[np.ndarray, "query key"]) -> str:
    """The largest weights as a table; the first query can only read itself and is left out."""
    rest = weights[1:] if len(weights) > 1 else weights
    skipped = len(weights) - len(rest)
    order = np.argsort(-rest, axis=None, kind="stable")[:_TOP]
    pairs = [(int(i) // rest.shape[1] + skipped, int(i) % rest.shape[1]) for i in order]
    rows = [(f"{texts[q]!r} ({q})", f"{texts[k]!r} ({k})", f"{weights[q, k]:.3f}") for q, k in pairs]
    return table(["query", "key", "weight"], rows)


def _png(weights: Float[np.ndarray, "query key"]) -> str:
    """A pixel a cell: one colour, as opaque as the weight, so that it reads on any page. Base64."""
    height, width = weights.shape
    pixels = np.zeros((height, width, 4), dtype=np.uint8)
    pixels[..., :3], pixels[..., 3] = _COLOR, np.round(255 * weights)
    lines = b"".join(b"\0" + line.tobytes() for line in pixels)
    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)).decode()
