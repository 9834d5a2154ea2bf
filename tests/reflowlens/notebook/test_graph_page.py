"""The page of an attribution graph: its sums are of all edges, its text stays text, and a real Chromium works it."""

from __future__ import annotations

import base64
import dataclasses
import html
import json
import re
from importlib import resources
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import reflowlens as rl
from reflowlens.errors import ReflowlensError
from reflowlens.figures.browser import browser_page, find_browser
from reflowlens.notebook.graph_page import messages

PROMPT = "The capital of France is"
GROUPS = [["names <b>", "feature:5.1033@4", "feature:5.1400@4"]]
BAD = "</script><img src=x onerror=window.hacked=1>"
WIDTHS = (1280, 390)
BIASES = [f"bias:{block}" for block in range(7)]


@pytest.fixture(scope="module")
def graph():
    return rl.attribute(rl.load_model("reflow-nano"), PROMPT, rl.load_dictionary("reflow-nano-plt"))


@pytest.fixture(scope="module")
def page(graph, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("graph")
    return graph.save(folder / "capital.html", groups=GROUPS, features="https://example.org/pages")


def content(path: Path):
    (found,) = re.findall(r'<script type="application/json" id="graph">(.*?)</script>', path.read_text("utf-8"), re.S)
    return json.loads(found)


def edges_of(held) -> pd.DataFrame:
    names = np.array([node["id"] for node in held["nodes"]])
    columns = {"source": "<u2", "target": "<u2", "weight": "<f4"}
    found = {name: np.frombuffer(base64.b64decode(held["edges"][name]), kind) for name, kind in columns.items()}
    return pd.DataFrame(found | {end: names[found[end]] for end in ("source", "target")})


@pytest.mark.parametrize("pruned", [False, True])
def test_every_sum_on_the_page_is_of_all_edges(graph, page, tmp_path, pruned):
    held = content(graph.prune(0.5).save(tmp_path / "pruned.html") if pruned else page)
    sums = dict(zip(graph.nodes["node"], graph.matrix.sum(1), strict=True))
    reached = [node for node in held["nodes"] if "left" in node]
    assert {node["kind"] for node in reached} == {"feature", "logit"}
    into = edges_of(held).groupby("target")["weight"].sum()
    for node in reached:
        left = node["left"]
        assert left["sum"] == pytest.approx(sums[node["id"]], rel=1e-5, abs=1e-5)
        assert left["sum"] == pytest.approx(node["value"], rel=1e-4, abs=1e-4)
        parts = into.get(node["id"], 0.0) + left["unseen"] + left["bias"] + left["rest"]
        assert parts == pytest.approx(node["value"], rel=1e-4, abs=1e-4)
    if pruned:
        return
    of = held["all"]
    assert (of["nodes"], of["edges"]) == (1005, graph.matrix.nnz)
    kept = graph.influence[[node["id"] for node in held["nodes"]]].sum()
    assert of["kept"] == pytest.approx(kept / graph.influence.drop(["rest", *BIASES]).sum(), rel=1e-3)


def test_every_text_of_the_page_has_its_chinese(page):
    folder = resources.files("reflowlens.notebook") / "pages"
    script = "".join((folder / f"graph{part}.js").read_text("utf-8") for part in ("", "_picture", "_panel"))
    used = set(re.findall(r'\bt\((?:[\w.]+ === 1 \? "[^"]*" : )?"((?:[^"\\]|\\.)*)"', script))
    used |= set(re.findall(r"\{\{(.*?)\}\}", (folder / "graph.html").read_text("utf-8")))
    assert used <= set(messages("zh"))
    for english, chinese in messages("zh").items():
        assert set(re.findall(r"\{\w+\}", english)) == set(re.findall(r"\{\w+\}", chinese))


def test_what_cannot_be_saved_is_one_error(graph, tmp_path):
    for name, arguments, message in (
        ("x.txt", {}, "a graph is saved as one of .html, .json, .png, .svg, .pdf"),
        ("x.html", {"lang": "de"}, "no language 'de': one of en, zh"),
        ("x.html", {"groups": [["a", "logit:263"]]}, "no node 'logit:263' for group 'a'; did you mean"),
        ("x.html", {"groups": [["a"]]}, "a group is \\[label, node, ...\\] with one node at least"),
        ("x.html", {"groups": [["a", "logit:262"], ["b", "logit:262"]]}, "is in two groups"),
        ("x.html", {"features": tmp_path}, "no feature pages in"),
    ):
        with pytest.raises(ReflowlensError, match=message):
            graph.save(tmp_path / name, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_nothing_of_a_prompt_is_markup(graph, tmp_path):
    bad = rl.attribute(graph.traced.model, f"a {BAD}", targets=" the", neurons=4, signals=False)
    text = bad.save(tmp_path / "bad.html", title=BAD).read_text("utf-8")
    shown = bad._repr_html_()
    for markup in (text, html.unescape(shown)):
        assert "<img" not in markup
        assert markup.count("</script>") == 2, "of the data and of the script"
        assert not re.search(r"<[^>]*\s(on\w+|style)=", markup.split("<body", 1)[1].split("<script", 1)[0])
    assert shown.count("<iframe") == 1
    assert "the nodes of most influence" in shown
    assert content(tmp_path / "bad.html")["tokens"] == list(bad.tokens)


def test_pages_are_bounded(graph, tmp_path):
    signals = rl.attribute(graph.traced.model, "When Mary and John went to the store")
    assert len(signals.nodes) > 3000
    held = content(signals.save(tmp_path / "long.html"))
    free = [node for node in held["nodes"] if node["kind"] not in ("embedding", "position", "logit")]
    assert 250 < len(free) <= 300
    assert len(signals._repr_html_()) < 400_000
    again = content(signals.prune(0.5).save(tmp_path / "pruned.html"))
    assert len(again["nodes"]) == len(signals.prune(0.5).nodes)
    assert again["all"]["kept"] == pytest.approx(0.5, abs=0.01)
    assert max(node["left"]["n"] for node in again["nodes"] if "left" in node) > 1000, "of what was pruned"


# -- in Chromium ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(page: Path):
    try:
        find_browser()
    except ReflowlensError as error:
        pytest.skip(str(error))
    with browser_page() as opened:
        opened.open(page.as_uri())
        yield opened
        assert opened.complaints == []


@pytest.fixture
def opened(browser):
    """The page as it is at first."""
    look(browser)
    browser.evaluate("undone.length = 0; adopt({}); remember(''); element('query').value = ''; show(); scrollTo(0, 0)")
    browser.evaluate("document.activeElement.blur()")
    return browser


def look(browser, width: int = WIDTHS[0], theme: str = "light") -> None:
    browser.call("Emulation.setDeviceMetricsOverride", width=width, height=860, deviceScaleFactor=1, mobile=False)
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])


def press(browser, key: str, **more) -> None:
    browser.call("Input.dispatchKeyEvent", type="keyDown", key=key, **more)
    browser.call("Input.dispatchKeyEvent", type="keyUp", key=key, **more)


def click(browser, selector: str, **modifiers) -> None:
    """A real click: on what lies on top there."""
    place = f"(() => {{ const box = document.querySelector({json.dumps(selector)}).getBoundingClientRect(); "
    x, y = browser.evaluate(place + "return [box.x + box.width / 2, box.y + box.height / 2]; })()")
    for kind in ("mousePressed", "mouseReleased"):
        browser.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1, **modifiers)


def node(name: str) -> str:
    return f'#stage .node[data-key="{name}"]'


def texts(browser, selector: str) -> list[str]:
    return browser.evaluate(f"[...document.querySelectorAll({json.dumps(selector)})].map((each) => each.textContent)")


def count(browser, selector: str) -> int:
    return browser.evaluate(f"document.querySelectorAll({json.dumps(selector)}).length")


def drawn(browser) -> set[str]:
    return set(browser.evaluate('[...document.querySelectorAll("#stage .node")].map((each) => each.dataset.key)'))


def numbers(shown: list[str]) -> list[float]:
    return [float(each.replace("−", "-")) for each in shown]


def weights_into(graph, name: str) -> dict[str, float]:
    edges = graph.edges[graph.edges["target"] == name]
    return dict(zip(edges["source"].astype(str), edges["weight"].astype(float), strict=True))


def test_rows_are_layers_and_columns_are_tokens(graph, opened):
    places = opened.evaluate("shownItems.map((item) => [item.key, item.kind, item.layer, item.pos, item.x, item.y])")
    assert len(places) == count(opened, "#stage .node")
    by_layer: dict[int, list[float]] = {}
    by_token: dict[int, list[float]] = {}
    for _, kind, layer, pos, x, y in places:
        by_layer.setdefault(layer, []).append(y)
        if kind != "logit":
            by_token.setdefault(pos, []).append(x)
    for layer in range(-1, 6):
        assert max(by_layer[layer + 1]) < min(by_layer[layer])
    for pos in range(4):
        assert max(by_token[pos]) < min(by_token[pos + 1])
    assert texts(opened, "#stage .word") == ["The", "capital", "of", "France", "is"]
    faithful = graph.faithfulness()
    assert texts(opened, "#facts dd") == [f"{faithful['faithfulness']:.0%}", "87%", "96%", "4.9%", "0.0%"]
    (verdict,) = texts(opened, "#verdict.yes")
    assert verdict.startswith(f"trustworthy: removals as predicted, correlation {faithful['correlation']:.2f} (")
    assert "196 of 1,005 nodes" in texts(opened, "#of")[0]
    assert texts(opened, "#title .target")[0] == "the15%"


def test_a_graph_that_is_not_to_be_trusted_says_so_first(opened):
    told = """(() => { const before = data.verdict; data.verdict = { ...before, trustworthy: false, ...%s };
        const made = verdict(); data.verdict = before; return [made.className, made.textContent]; })()"""
    for reason, words in (
        ("errors", "errors have 61% of the influence"),
        ("few nodes", "too few nodes can be removed to test it"),
        ("control", "random nodes do as well, correlation 0.20 (0.05 to 0.30) against 0.35"),
        ("correlation", "removals not as predicted, correlation 0.20 (0.05 to 0.30)"),
        ("faithfulness", "its nodes alone keep −12% of the prediction, random ones 8.0%"),
    ):
        numbers = {
            "reason": reason,
            "error_influence": 0.61,
            "correlation": 0.2,
            "low": 0.05,
            "high": 0.3,
            "control": 0.35,
            "faithfulness": -0.12,
            "faithfulness_control": 0.08,
        }
        assert opened.evaluate(told % json.dumps(numbers)) == ["verdict no", f"not trustworthy: {words}"]
    box = "document.querySelector('{}').getBoundingClientRect().top"
    assert opened.evaluate(box.format("#verdict")) <= opened.evaluate(box.format("#facts dl"))


def test_a_graph_that_cannot_be_performed_is_drawn_all_the_same(graph, tmp_path):
    alone = dataclasses.replace(graph, traced=None)
    held = content(alone.save(tmp_path / "alone.html"))
    assert "unmeasured" in held["verdict"]
    assert not any("up" in node for node in held["nodes"])
    assert len(held["nodes"]) == 196


def test_a_click_shows_in_and_outputs_that_add_up(graph, opened):
    name = "logit:262"
    click(opened, node(name))
    assert texts(opened, "#node-name") == ["“the”"]
    shown = opened.evaluate("""[...document.querySelectorAll('#panel ul[aria-label="Inputs"] button')].map((row) =>
        [row.dataset.to, row.querySelector(".weight").textContent])""")
    weights = weights_into(graph, name)
    found = numbers([weight for _, weight in shown])
    assert [abs(weight) for weight in found] == sorted(map(abs, found), reverse=True)
    assert found[:3] == pytest.approx([weights[source] for source, _ in shown[:3]], abs=1e-3)
    lines = numbers(texts(opened, ".sum td:last-child"))
    value = float(graph.nodes.set_index("node").loc[name, "value"])
    assert lines[-1] == pytest.approx(value, abs=0.06)
    assert sum(lines[:-1]) == pytest.approx(value, abs=0.1)
    assert count(opened, '.sum[data-fits="true"]') == 1
    click(opened, f'#panel [data-to="{shown[1][0]}"]')
    assert opened.evaluate("state.selected") == shown[1][0]
    outputs = opened.evaluate("""[...document.querySelectorAll('#panel ul[aria-label="Outputs"] button')].map((row) =>
        row.dataset.to)""")
    assert name in outputs
    press(opened, "Escape")
    assert opened.evaluate("state.selected") is None


def test_what_is_pointed_at_stands_out(opened):
    name = "feature:5.1220@4"
    opened.evaluate(
        f"document.querySelector({json.dumps(node(name))}).dispatchEvent(new Event('pointerover', {{bubbles: true}}))"
    )
    lit = opened.evaluate(
        f"""(() => {{ const item = itemOf.get({json.dumps(name)}), there = new Set(drawnKeys());
        return [...item.into.map((link) => link.source.key), ...item.out.map((link) => link.target.key)]
          .filter((key) => there.has(key)); }})()""".replace("drawnKeys()", "[...byKey.keys()]")
    )
    assert count(opened, "#stage .lit path") == min(80, len(lit))
    near = set(opened.evaluate('[...document.querySelectorAll(".node.near")].map((each) => each.dataset.key)'))
    assert near <= set(lit)
    assert len(near) == min(80, len(lit))
    dashes = "getComputedStyle(document.querySelector('#stage .{} path.{}')).strokeDasharray"
    for where in ("edges", "lit"):
        assert opened.evaluate(dashes.format(where, "adds")) == "none"
        assert opened.evaluate(dashes.format(where, "cuts")) != "none", "told apart without their colour"
    assert "Facebook" in texts(opened, "#tip")[0]
    opened.evaluate("element('stage').dispatchEvent(new Event('pointerleave'))")
    assert count(opened, "#stage .lit path") == 0


def test_pinned_nodes_are_a_graph_of_their_own(opened):
    for name in ("logit:262", "feature:5.1220@4"):
        click(opened, node(name))
        press(opened, "p")
    click(opened, "#view-pins")
    assert drawn(opened) == {"logit:262", "feature:5.1220@4", "group:feature:5.1033@4"}
    assert texts(opened, f"{node('logit:262')} text") == ["“the”", "15%"]
    assert count(opened, "#stage .edges path") > 0
    click(opened, "#pin")
    assert "feature:5.1220@4" not in drawn(opened)
    press(opened, "z", modifiers=2)
    assert "feature:5.1220@4" in drawn(opened)
    click(opened, "#view-all")
    assert count(opened, "#stage .node.pinned") == 2


def test_groups_are_nodes_whose_edges_are_sums(graph, opened):
    weights = weights_into(graph, "logit:262")
    assert not {"feature:5.1033@4", "feature:5.1400@4"} & drawn(opened)
    members = ["feature:5.1741@4", "feature:5.303@4", "feature:5.1122@4"]
    for name in members:
        click(opened, node(name), modifiers=8)
    assert texts(opened, "#group") == ["Group 3"]
    click(opened, "#group")
    opened.call("Input.insertText", text="a <city>")
    opened.evaluate("document.querySelector('.rename').requestSubmit()")
    key = f"group:{members[0]}"
    assert opened.evaluate("state.groups")[1] == ["a <city>", *members]
    assert not set(members) & drawn(opened)
    assert key in drawn(opened)
    found = opened.evaluate(f"itemOf.get({json.dumps(key)}).out.find((link) => link.target.key === 'logit:262').weight")
    assert found == pytest.approx(sum(weights[name] for name in members), rel=1e-5)
    assert len(texts(opened, "#members li")) == 3
    assert count(opened, '.sum[data-fits="true"]') == 1
    click(opened, "#members li:last-child button")
    assert members[2] in drawn(opened)
    click(opened, "#ungroup")
    assert set(members) <= drawn(opened)


def test_nodes_are_renamed_and_found(opened):
    click(opened, node("feature:5.1220@4"))
    click(opened, "#rename")
    opened.call("Input.insertText", text="web sites")
    opened.evaluate("document.querySelector('.rename').requestSubmit()")
    assert texts(opened, "#node-name") == ["web sites"]
    assert opened.evaluate("document.activeElement.dataset.key") == "feature:5.1220@4"

    def search(words: str) -> set[str]:
        opened.evaluate(f"element('query').value = {json.dumps(words)}; search()")
        keys = set(opened.evaluate('[...document.querySelectorAll(".node.found")].map((each) => each.dataset.key)'))
        assert texts(opened, "#count") == [f"{len(keys)} node{'' if len(keys) == 1 else 's'}"]
        return keys

    assert search("WEB") == {"feature:5.1220@4"}
    assert search("5.1741") == {"feature:5.1741@4"}
    assert "feature:5.1741@4" in search("houston"), "by what it pushes up"
    france = search("france")
    assert "embedding@3" in france
    assert all(name.endswith("@3") for name in france if name.startswith("error"))
    assert search("names") == {"group:feature:5.1033@4"}
    press(opened, "/")
    press(opened, "Enter")
    assert opened.evaluate("state.selected") == "group:feature:5.1033@4"
    press(opened, "Escape")
    assert count(opened, ".node.found") == 0


def test_sliders_and_errors_say_what_is_drawn(opened):
    def slide(name: str, share: float) -> None:
        for kind in ("input", "change"):
            opened.evaluate(
                f"element('{name}').value = {1000 * share}; element('{name}').dispatchEvent(new Event('{kind}'))"
            )

    everything = len(drawn(opened))
    assert 340 <= opened.evaluate("drawnLinks.length") <= 350, "fewer where a group has several"
    slide("edges", 1)
    assert opened.evaluate("drawnLinks.length") > 7000
    slide("edges", 0.05)
    few = opened.evaluate("drawnLinks.length")
    assert 0 < few < 100
    assert texts(opened, "#edges-shown") == [str(few)]
    slide("nodes", 0.5)
    assert len(drawn(opened)) < everything / 2
    shares = opened.evaluate(
        "shownItems.filter((item) => !isKept(item) && item.kind !== 'embedding').map((item) => item.share)"
    )
    assert max(shares) <= 0.5 * opened.evaluate("fullShare") + 1e-4
    press(opened, "z", modifiers=2)
    assert len(drawn(opened)) == everything
    before = {name for name in drawn(opened) if name.startswith("error")}
    assert before
    click(opened, "#errors")
    assert drawn(opened).isdisjoint(before)


def test_the_keyboard_moves_selects_pins_and_leaves(opened):
    opened.evaluate("document.querySelector('#skip').click()")
    press(opened, "Tab")
    opened.evaluate(f"document.querySelector({json.dumps(node('logit:262'))}).focus()")
    y = opened.evaluate("itemOf.get('logit:262').y")
    press(opened, "ArrowDown")
    here = opened.evaluate("document.activeElement.dataset.key")
    assert opened.evaluate(f"itemOf.get({json.dumps(here)}).y") > y
    assert opened.evaluate("getComputedStyle(document.activeElement.querySelector('.halo')).stroke") != "none"
    press(opened, "Enter")
    assert opened.evaluate("state.selected") == here
    assert opened.evaluate("document.activeElement.dataset.key") == here
    assert opened.evaluate("document.activeElement.getAttribute('aria-pressed')") == "true"
    press(opened, "p")
    press(opened, "m")
    assert opened.evaluate("[state.pinned, state.marked]") == [[here], [here]]
    press(opened, "Escape")
    assert opened.evaluate("[state.selected, document.activeElement.dataset.key]") == [None, here]
    press(opened, "Escape")
    assert opened.evaluate("state.marked") == []
    labels = opened.evaluate("[...document.querySelectorAll('.node')].map((each) => each.getAttribute('aria-label'))")
    assert all(labels)
    assert count(opened, '.node[tabindex="0"]') == 1, "one stop of the tab key, arrows between"


def test_links_lead_to_the_pages_of_features(opened, graph, tmp_path):
    click(opened, node("feature:5.1220@4"))
    link = opened.evaluate("element('page').getAttribute('href')")
    assert link == "https://example.org/pages/index.html#layer=5&feature=1220"
    words = [["web"] if i == 1220 else [] for i in range(2048)]
    index = {"layers": [{"key": "5", "words": words}]}
    (tmp_path / "my pages/data").mkdir(parents=True)
    (tmp_path / "my pages/data/index.js").write_text(f"reflowlens.index({json.dumps(index)});\n")
    held = content(graph.save(tmp_path / "out/x.html", features=tmp_path / "my pages"))
    (found,) = [each for each in held["nodes"] if each["id"] == "feature:5.1220@4"]
    assert found["link"] == "../my%20pages/index.html#layer=5&feature=1220"
    assert found["words"] == ["web"]
    assert {each["layer"] for each in held["nodes"] if "link" in each} == {5}, "there are pages of this layer alone"


STATE = """adopt({view: "pins", selected: "logit:262", pinned: ["logit:262", "embedding@3", "feature:5.1220@4"],
  edges: 0.3, nodes: 0.7, errors: false, marked: ["embedding@1"], names: {"feature:5.1220@4": "sites & <co>"},
  groups: [["x|y, z", "feature:5.303@4", "feature:5.1741@4"]]}); show(); address()"""


def test_a_link_and_a_file_bring_the_state_back(opened):
    told = opened.evaluate(STATE)
    shown = sorted(drawn(opened))
    state = opened.evaluate("state")
    assert "group:feature:5.303@4" in shown
    opened.evaluate("adopt({}); show()")
    opened.evaluate(f"location.hash = {json.dumps(told)}; new Promise((done) => setTimeout(done, 50))")
    assert opened.evaluate("state") == state
    assert sorted(drawn(opened)) == shown
    saved = opened.evaluate("""(async () => { let blob; const make = URL.createObjectURL;
        URL.createObjectURL = (each) => { blob = each; return make(each); };
        HTMLAnchorElement.prototype.click = () => {}; saveState(); URL.createObjectURL = make;
        delete HTMLAnchorElement.prototype.click; return await blob.text(); })()""")
    assert json.loads(saved)["state"]["groups"] == state["groups"], "as graph.save(groups=) takes them"
    load = """(async () => {{ const files = new DataTransfer(); files.items.add(new File([{}], "state.json"));
        element("file").files = files.files; element("file").dispatchEvent(new Event("change"));
        await new Promise((done) => setTimeout(done, 100)); return element("said").textContent; }})()"""
    opened.evaluate("adopt({}); show()")
    opened.evaluate(load.format(json.dumps(saved)))
    assert opened.evaluate("state") == state
    click(opened, "#undo")
    assert opened.evaluate("told()") == {}
    strange = json.dumps({"state": {"pinned": ["feature:9.9@9", "logit:262"], "nodes": "x", "groups": "y", "names": 3}})
    assert "1" in opened.evaluate(load.format(json.dumps(strange)))
    assert opened.evaluate("told()") == {"pinned": ["logit:262"]}
    assert "no state" in opened.evaluate(load.format(json.dumps("[")))
    assert opened.evaluate("state.pinned") == ["logit:262"]


# Text whose contrast with what it lies on is below 4.5 (3 where it is large), opacity left out.
CONTRAST = """(() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgb = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const linear = (x) => (x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  const light = (c) => [0.2126, 0.7152, 0.0722].reduce((sum, part, i) => sum + part * linear(c[i] / 255), 0);
  const ground = (each) => {
    for (; each; each = each.parentElement) {
      const colour = rgb(getComputedStyle(each).backgroundColor);
      if (colour[3] > 250) return colour;
    }
    return [255, 255, 255, 255];
  };
  const bad = new Set();
  for (const each of document.querySelectorAll("body *")) {
    const has_words = [...each.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
    const is_out = !each.getClientRects().length || each.closest(":disabled, script, noscript, .skip, .hidden");
    if (!has_words || is_out) continue;
    const style = getComputedStyle(each);
    const [a, b] = [light(rgb(each.closest("svg") ? style.fill : style.color)), light(ground(each))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < (parseFloat(style.fontSize) >= 24 ? 3 : 4.5)) bad.add(`${each.outerHTML.slice(0, 60)} ${ratio}`);
  }
  return [...bad];
})()"""


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_fits_its_screen_in_both_themes(opened, width, theme):
    look(opened, width, theme)
    for state in (
        "{}",
        '{selected: "feature:5.1220@4"}',
        '{view: "pins", pinned: ["logit:262"], selected: "logit:262"}',
    ):
        opened.evaluate(f"adopt({state}); show()")
        opened.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(done, 30)))")
        assert opened.evaluate("document.documentElement.scrollWidth") <= width
        assert opened.evaluate(CONTRAST) == []
        ground = opened.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 22, 26)"}[theme]
    side = opened.evaluate("element('panel').getBoundingClientRect().left")
    assert (side > 700) == (width == WIDTHS[0]), "the panel lies beside the picture, or below it"


def test_the_theme_can_be_chosen(opened):
    for ground in ("rgb(20, 22, 26)", "rgb(255, 255, 255)"):
        click(opened, "#theme")
        assert opened.evaluate("getComputedStyle(document.body).backgroundColor") == ground


def test_three_thousand_edges_are_drawn_at_once(opened):
    opened.evaluate("state.edges = upTo[2999]; show()")
    assert 2950 <= opened.evaluate("drawnLinks.length") <= 3000
    assert count(opened, "#stage .edges path") <= 10
    assert (
        opened.evaluate("(() => { const start = performance.now(); show(); return performance.now() - start; })()")
        < 500
    )


def test_it_prints_without_what_cannot_be_pressed(opened):
    opened.call("Emulation.setEmulatedMedia", media="print", features=[])
    assert opened.evaluate("getComputedStyle(document.querySelector('.bar')).display") == "none"
    assert opened.evaluate("getComputedStyle(document.querySelector('.stage')).overflowX") == "visible"
    opened.call("Emulation.setEmulatedMedia", media="", features=[])


def test_in_chinese_and_several_in_a_notebook(browser, graph, tmp_path):
    chinese = graph.prune(0.6).save(tmp_path / "zh.html", lang="zh")
    browser.open(chinese.as_uri())
    assert browser.evaluate("document.documentElement.lang") == "zh-CN"
    shown = browser.evaluate("document.body.innerText")
    for words in ("归因图", "替换得分", "影响最大", "整图", "抑制"):
        assert words in shown
    for words in ("Whole", "Pinned", "influence", "suppresses", "Undo"):
        assert words not in shown
    frames = (
        graph._repr_html_()
        + rl.attribute(graph.traced.model, BAD, targets=" the", neurons=4, signals=False)._repr_html_()
    )
    (tmp_path / "notebook.html").write_text(f"<!doctype html><meta charset=utf-8><body>{frames}", encoding="utf-8")
    browser.open((tmp_path / "notebook.html").as_uri())
    boxes = browser.evaluate(
        "[...document.querySelectorAll('iframe')].map((each) => each.getBoundingClientRect().height)"
    )
    assert len(boxes) == 2
    assert min(boxes) > 500
    (tmp_path / "frame.html").write_text(
        browser.evaluate("document.querySelectorAll('iframe')[1].srcdoc"), encoding="utf-8"
    )
    browser.open((tmp_path / "frame.html").as_uri())
    assert browser.evaluate("[document.querySelectorAll('.node').length > 20, document.body.className]") == [
        True,
        "framed",
    ]
    assert browser.evaluate("[window.hacked ?? null, document.images.length]") == [None, 0]
    assert BAD[:9] in browser.evaluate("document.getElementById('title').textContent")
