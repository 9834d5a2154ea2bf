"""An attribution graph to look at: one page that needs no network, and the same picture in a notebook.

The page holds its data, its script and its style, and nothing else can run in it: its content security policy names
both by their hash. What the graph is called, prompts included, becomes text there, never markup.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from reflowlens.errors import ReflowlensError
from reflowlens.notebook.feature_files import call_arguments, digits
from reflowlens.notebook.feature_pages import INDEX, PAGE
from reflowlens.notebook.graph_parts import Groups, page_parts
from reflowlens.notebook.html import escape, folded, table
from reflowlens.storage.atomic import replacing
from reflowlens.storage.opening import as_path

if TYPE_CHECKING:
    from reflowlens.circuits.attribution.graph import AttributionGraph

LANGUAGES = ("en", "zh")
MAX_NODES, MAX_EDGES = 300, 8000  # of a page, beside inputs and targets: about 300 kB
_MAX_IN_NOTEBOOK = 150, 2500
_SCRIPTS = ("graph.js", "graph_picture.js", "graph_panel.js")
_MESSAGE = re.compile(r"\{\{(.*?)\}\}")
_PAGES = {  # by kind of node the keys that feature pages may have of its layer
    "feature": ("{}",),
    "neuron": ("{}-mlp_post", "{}-xy_sparse"),
    "signal": ("recipe",),
    "readout": ("unembed_signal",),
}
_SCORES = {
    "replacement": "of what comes in at the ends of all paths, the share that is the prompt's and no error",
    "completeness": "the share of what goes into nodes that is no error, nodes weighted by their influence",
    "error influence": "the share of errors in the influence of all nodes",
    "rest": "the share that goes through edges that were not kept",
}


def write_graph_page(
    graph: AttributionGraph,
    path: str | Path,
    groups: Groups | None = None,
    features: str | Path | None = None,
    lang: str = "en",
    title: str | None = None,
) -> Path:
    """Write a graph as one page that opens offline (``graph.save("x.html")``).

    The page holds what ``graph.prune()`` keeps, at most 300 nodes beside inputs and targets and about 8,000 edges, and
    says how many there were; sums in it are of all edges.

    Args:
        groups: nodes that are drawn as one, ``[[label, node, ...], ...]``; a reader can change them.
        features: the folder of feature pages (``reflowlens features``), or their address, that nodes are linked with.
        lang: ``"en"`` or ``"zh"``.
        title: before the prompt.

    Raises:
        ReflowlensError: a group's node does not exist, there are no feature pages, or there is no such language.
    """
    path = as_path(path)
    if lang not in LANGUAGES:
        raise ReflowlensError(f"no language {lang!r}: one of {', '.join(LANGUAGES)} was expected")
    content = _content(graph, groups or [], lang, title, (MAX_NODES, MAX_EDGES))
    if features is not None:
        _link(content["nodes"], features, path)
    with replacing(path) as temporary:
        temporary.write_text(_page(content, lang), encoding="utf-8")
    return path


def graph_html(graph: AttributionGraph) -> str:
    """The page in a frame of its own, which no style or script of a notebook reaches, and beside it what is there
    without scripts: the scores and the nodes of most influence."""
    page = _page(_content(graph, [], "en", None, _MAX_IN_NOTEBOOK), "en", framed=True)
    strongest = graph.nodes.sort_values("influence", ascending=False, kind="stable").head(10)
    shown = strongest[["node", "kind", "label", "activation", "value", "influence"]]
    rows = table(list(shown.columns), shown.astype(object).itertuples(index=False))
    return (
        f"<div><div>{escape(repr(graph))}</div>"
        f'<iframe srcdoc="{escape(page)}" title="attribution graph" '
        'sandbox="allow-scripts allow-downloads allow-popups" style="width:100%;height:660px;'
        'border:1px solid rgba(128,128,128,.35);border-radius:6px"></iframe>'
        f"{folded('the nodes of most influence', rows)}</div>"
    )


def _content(
    graph: AttributionGraph, groups: Groups, lang: str, title: str | None, bounds: tuple[int, int]
) -> dict[str, Any]:
    """All that the page's script reads."""
    scores = graph.scores()
    return page_parts(graph, groups, *bounds) | {
        "title": title or "",
        "of": graph.of,
        "prompt": graph.prompt,
        "blocks": _n_blocks(graph),
        "groups": [list(group) for group in groups],
        "scores": [
            [name, digits(scores[name.replace(" ", "_") if name != "rest" else "rest_influence"]), meaning]
            for name, meaning in _SCORES.items()
        ],
        "verdict": _verdict(graph),
        "messages": messages(lang),
    }


def _verdict(graph: AttributionGraph) -> dict[str, Any]:
    """What interventions say of the graph, or why none could be made: a picture there is all the same."""
    try:
        found = graph.faithfulness()
    except ReflowlensError as error:
        return {"unmeasured": str(error)}
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in found.items()}


def _n_blocks(graph: AttributionGraph) -> int:
    """Behind which layer the output begins."""
    if graph.traced is not None:
        return graph.traced.engine.layout.n_blocks
    ends = graph.nodes.loc[graph.nodes["kind"].isin(["readout", "logit"]), "layer"]
    return int(ends.min()) if len(ends) else int(graph.nodes["layer"].max()) + 1


def messages(lang: str) -> Mapping[str, str]:
    """From the English texts of the page to those of a language; of English none."""
    found: dict[str, str] = {} if lang == "en" else json.loads(_asset(f"graph_{lang}.json"))
    return found


def _page(content: Mapping[str, Any], lang: str, framed: bool = False) -> str:
    translated = messages(lang)
    text = _MESSAGE.sub(lambda match: escape(translated.get(match[1], match[1])), _asset("graph.html"))
    style, script = _asset("graph.css"), "".join(map(_asset, _SCRIPTS))
    heading = content["title"] or content["prompt"]
    return Template(text).substitute(
        language={"en": "en", "zh": "zh-CN"}[lang],
        title=escape(heading),
        body="framed" if framed else "",
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        data=json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
    )


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _asset(name: str) -> str:
    return (resources.files("reflowlens.notebook") / "pages" / name).read_text(encoding="utf-8")


def _link(nodes: Sequence[dict[str, Any]], features: str | Path, path: Path) -> None:
    """Give each feature the address of its page and, from a folder, the words on which it is active."""
    words: Mapping[tuple[str, int], list[str]] | None = None
    if isinstance(features, str) and re.match(r"(https?|file)://", features):
        base = features if features.endswith(".html") else f"{features.rstrip('/')}/{PAGE}"
    else:
        folder = as_path(features)
        if not (folder / INDEX).is_file():
            raise ReflowlensError(
                f"no feature pages in {str(folder)!r}: it has no {INDEX}; reflowlens features writes them, and an "
                "address that begins with https:// is taken as it is"
            )
        base, words = quote(Path(os.path.relpath(folder / PAGE, path.parent)).as_posix()), _active_on(folder)
    for node in nodes:
        for key in (own.format(node["layer"]) for own in _PAGES.get(node["kind"], ())):
            if words is None or (key, node["feature"]) in words:
                node["link"] = f"{base}#layer={key}&feature={node['feature']}"
                node["words"] = [] if words is None else words[key, node["feature"]]
                break


def _active_on(folder: Path) -> Mapping[tuple[str, int], list[str]]:
    """By key of the layer and number, the label words of the features that there are pages of."""
    (index,) = call_arguments(folder / INDEX)
    try:
        return {(layer["key"], i): words for layer in index["layers"] for i, words in enumerate(layer["words"])}
    except (KeyError, TypeError) as error:
        raise ReflowlensError(f"{folder / INDEX} is damaged: {error!r}") from error
