"""Feature pages: what is written is read again, holds no markup of the text, and is one page in a real Chromium."""

from __future__ import annotations

import errno
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import reflowlens as rl
from reflowlens.errors import ReflowlensError
from reflowlens.figures.browser import browser_page, find_browser
from reflowlens.notebook import feature_pages
from reflowlens.notebook.feature import (
    TOP,
    FeatureContext,
    FeatureEffect,
    FeatureLayerFacts,
    FeatureRecord,
    FeatureText,
)
from reflowlens.notebook.feature_pages import FeaturePages, open_feature_pages

BAD = "<script>window.hacked = 1</script>"
VOCABULARY = {0: BAD, 1: " the", 2: "\n", 3: " ", 4: " köln", 5: "<img src=x onerror='hacked=1'>", 6: " stone", 7: '"&'}
N, LAYERS = 300, ("0", "1", "2")
WIDTHS = (1280, 390)


def record(layer: int, index: int) -> FeatureRecord:
    rng = np.random.default_rng(1000 * layer + index)
    if index == 7:  # never active
        return FeatureRecord(LAYERS[layer], 7, 0, 0.0, 0.0, [0] * 40, [math.nan] * 6, {}, [], [], [], None)
    block = int(rng.integers(2))
    values = [0.0, float(index + 1), 0.5 * (index + 1), 0.0]
    contexts = [FeatureContext(block, 2, 3, values), FeatureContext(1 - block, 4, 5, values)]
    return FeatureRecord(
        layer=LAYERS[layer],
        index=index,
        fired=int(rng.integers(1, 400)),
        smallest=0.0,
        largest=float(index + 1),
        histogram=rng.integers(0, 50, 40).tolist(),
        quantiles=np.linspace(0.1, index + 1, 6).tolist(),
        contexts={TOP: contexts, "Quantiles 80–100%": contexts[:1]},
        promoted=[(5, 1.25), (4, 0.5)],
        suppressed=[(7, -2.5), (6, -0.125)],
        near=[(LAYERS[layer], (index + 1) % N, 0.75), (LAYERS[layer - 1], index, 0.5)],
        effect=FeatureEffect(0.01 * rng.normal(), 0.002, 40, 8, (index + 2) % N, 0.001) if index % 10 == 0 else None,
    )


@pytest.fixture(scope="module")
def pages() -> FeaturePages:
    tokens = np.array([1, 4, 6, 0, 2, 5, 3, 7, 1, 6] * 2)
    text = FeatureText(tokens, np.array([10, 20]), np.array([0, 3]), np.array([0, 256]), VOCABULARY)
    layers = [FeatureLayerFacts(key, f"blocks.{key}.hook_mlp_out", N, 5000) for key in LAYERS]
    return FeaturePages(f"Units {BAD}", {"text": BAD}, {"Active": f"share {BAD}"}, layers, text, record)


@pytest.fixture(scope="module")
def folder(pages: FeaturePages, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pages.save(tmp_path_factory.mktemp("pages") / "new", json=True).parent


def test_what_is_saved_is_read_again(pages: FeaturePages, folder: Path):
    again = open_feature_pages(folder)
    assert again.layers == pages.layers
    assert again.text.vocabulary == VOCABULARY
    for layer, index in ((0, 0), (1, 63), (2, 64), (2, N - 1), (0, 7)):
        (one, facts), (other, _) = pages.feature(str(layer), index), again.feature(layer, index)
        assert facts.n_features == N
        for context, back in zip(one.contexts.get(TOP, []), other.contexts.get(TOP, []), strict=True):
            assert (context.block, context.start, context.middle) == (back.block, back.start, back.middle)
            assert list(back.values) == pytest.approx(context.values, abs=one.largest / 1000)
            assert again.text.of(back) == pages.text.of(context)
        assert other.words(again.text) == one.words(pages.text)
        assert other.quantiles == pytest.approx(one.quantiles, rel=1e-3, nan_ok=True)
        assert (other.effect is None) == (one.effect is None)
        for name in ("layer", "index", "fired", "histogram", "promoted", "suppressed", "near"):
            assert getattr(other, name) == getattr(one, name), name


def test_nothing_of_a_text_is_markup(folder: Path):
    for path in folder.rglob("*"):
        if path.suffix == ".js" and path.parent.name == "data":
            assert "<" not in path.read_text(encoding="ascii")
    page = (folder / "index.html").read_text(encoding="utf8")
    assert "&lt;script&gt;" in page
    assert BAD not in page
    assert re.findall(r"\son\w+=|style=|<script>", page) == [], "a strict content security policy allows it"
    card = rl.show_feature(folder, 1, 0)._repr_html_()
    assert "<script" not in card
    assert "<img" not in card
    assert "&lt;script&gt;" in card


def test_the_json_is_that_of_the_viewers(pages: FeaturePages, folder: Path):
    assert len(list((folder / "features").iterdir())) == 3 * N
    found = json.loads((folder / "features" / f"{(2 + 5) * (2 + 6) // 2 + 5}.json").read_text(encoding="utf8"))
    one = record(2, 5)
    assert found["index"] == 5
    assert found["activation_frequency"] == one.fired / 5000
    assert (found["act_min"], found["act_max"]) == (0.0, 6.0)
    assert found["top_logits"] == [VOCABULARY[5], VOCABULARY[4]]
    assert found["bottom_logits"] == [VOCABULARY[7], VOCABULARY[6]]
    assert found["histogram"] == one.histogram
    assert [group["quantile_name"] for group in found["examples_quantiles"]] == [TOP, "Quantiles 80–100%"]
    example = found["examples_quantiles"][0]["examples"][0]
    assert example == {
        "tokens": [" stone", BAD, "\n", VOCABULARY[5]],
        "tokens_acts_list": [0.0, 6.0, 3.0, 0.0],
        "train_token_ind": 1,
        "is_repeated_datapoint": False,
    }
    assert found["examples_quantiles"][1]["examples"][0]["is_repeated_datapoint"]


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_earlier_pages_as_they_were(pages, tmp_path, monkeypatch, failure):
    target = tmp_path / "pages"
    first = FeaturePages("first", {}, {}, pages.layers[:1], pages.text, record)
    first.save(target)
    before = {path: path.read_bytes() for path in target.rglob("*") if path.is_file()}
    write, calls = feature_pages.write_call, []

    def full(path, *arguments):
        calls.append(path)
        if len(calls) > 3:
            raise failure
        write(path, *arguments)

    monkeypatch.setattr(feature_pages, "write_call", full)
    with pytest.raises((ReflowlensError, KeyboardInterrupt)) as error:
        pages.save(target)
    assert isinstance(failure, KeyboardInterrupt) or "the disk is full; nothing was changed" in str(error.value)
    assert {path: path.read_bytes() for path in target.rglob("*") if path.is_file()} == before
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_of_something_else_is_left_alone(pages, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ReflowlensError, match="holds other files and no feature pages to replace"):
        pages.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_what_is_not_there_is_one_error(pages, folder, tmp_path):
    with pytest.raises(ReflowlensError, match=r"no feature pages in .*: it has no data/index.js"):
        rl.show_feature(tmp_path, 0, 0)
    with pytest.raises(ReflowlensError, match=r"no layer '3'; there are 0, 1, 2"):
        rl.show_feature(pages, 3, 0)
    with pytest.raises(ReflowlensError, match=r"no feature 300: layer 1 has features 0 to 299"):
        rl.show_feature(folder, 1, N)
    with pytest.raises(ReflowlensError, match="pages must be feature pages or their folder"):
        rl.show_feature(3, 1, N)
    broken = open_feature_pages(shutil.copytree(folder, tmp_path / "broken"))
    (tmp_path / "broken/data/0-0.js").write_text('reflowlens.shard("0",0,[]);')
    with pytest.raises(ReflowlensError, match=r"0-0.js is damaged: IndexError"):
        broken.feature(0, 0)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/index.js").write_text("nothing")
    with pytest.raises(ReflowlensError, match="is missing or damaged"):
        rl.show_feature(tmp_path, 0, 0)


# -- in Chromium ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(folder: Path):
    try:
        find_browser()
    except ReflowlensError as error:
        pytest.skip(str(error))
    with browser_page() as page:
        page.open((folder / "index.html").as_uri())
        yield page
        assert page.complaints == []


def go(page, link: str, width: int = WIDTHS[0], theme: str = "light") -> None:
    page.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
    page.evaluate("document.getElementById('query').value = ''; document.getElementById('query').blur()")
    page.evaluate(f"location.hash = {json.dumps(link)}")
    shown(page, link)


def shown(page, link: str) -> None:
    script = f"""(async () => {{
      for (let i = 0; i < 1000 && document.querySelector("main").dataset.shown !== {json.dumps(link)}; i++)
        await new Promise((resolve) => setTimeout(resolve, 5));
      return document.querySelector("main").dataset.shown;
    }})()"""
    assert page.evaluate(script) == link


def press(page, key: str) -> None:
    page.call("Input.dispatchKeyEvent", type="keyDown", key=key)
    page.call("Input.dispatchKeyEvent", type="keyUp", key=key)


def listed(page) -> list[str]:
    return page.evaluate('[...document.querySelectorAll("#list a")].map((link) => link.textContent)')


def search(page, words: str) -> list[str]:
    page.evaluate(f"""(() => {{ const query = document.getElementById("query"); query.value = {json.dumps(words)};
        query.dispatchEvent(new Event("input")); }})()""")
    return listed(page)


def test_the_index_lists_searches_and_sorts(pages, browser):
    go(browser, "#about")
    assert search(browser, "")[:9] == [f"0/{i}" for i in (*range(7), 8, 9)], "without what is never active"
    assert browser.evaluate('document.getElementById("count").textContent') == "897 of 900 features"
    assert search(browser, "2/17")[:1] == ["2/17"]
    assert search(browser, "KÖLN 5")[:1] == ["0/5"]
    assert search(browser, "nothing of that name") == []
    search(browser, "")
    browser.evaluate('document.querySelector("aside th[data-sort=density] button").click()')
    order = sorted(((layer, i) for layer in range(3) for i in range(N)), key=lambda at: -record(*at).fired)
    found = [tuple(map(int, name.split("/"))) for name in listed(browser)[:20]]
    assert [record(*at).fired for at in found] == [record(*at).fired for at in order[:20]]
    assert browser.evaluate('document.querySelector("aside th[data-sort=density]").ariaSort') == "descending"
    browser.evaluate('document.querySelector("aside th[data-sort=effect] button").click()')
    best = max(record(layer, i).effect.change for layer in range(3) for i in range(0, N, 10))
    assert record(*map(int, listed(browser)[0].split("/"))).effect.change == best
    browser.evaluate('document.querySelector("aside th[data-sort=place] button").click()')


def test_rows_that_nobody_sees_are_not_drawn(browser):
    go(browser, "#about")
    search(browser, "")
    end = """(async () => { const rows = document.getElementById("rows"), full = rows.scrollHeight;
        rows.scrollTop = full;
        for (let i = 0; i < 500 && document.querySelector("#list tr:last-child a").textContent !== "2/299"; i++)
            await new Promise((resolve) => setTimeout(resolve, 10));
        return [full, rows.scrollHeight, document.querySelectorAll("#list tr").length]; })()"""
    before, after, drawn = browser.evaluate(end)
    assert before == after
    assert drawn < 200
    assert listed(browser)[-1] == "2/299"


def test_a_link_shows_its_feature_and_text_stays_text(browser):
    go(browser, "#layer=1&feature=20")
    main = browser.evaluate('document.querySelector("main").innerText')
    assert "Feature 1/20" in main
    assert BAD in main
    assert browser.evaluate("window.hacked") is None
    assert browser.evaluate('document.querySelectorAll("main script, main img").length') == 0
    contexts = browser.evaluate("""[...document.querySelectorAll(".group li")].map((line) => [
        line.querySelector(".number").textContent, line.querySelector(".middle").textContent,
        line.querySelector(".middle i").style.getPropertyValue("--share")])""")
    assert contexts[0] == ["21.0", BAD, "0.650"]
    assert browser.evaluate('document.querySelector("#list tr.here a").textContent') == "1/20"
    assert "+1.25" in main
    assert "−2.50" in main
    point = 'document.querySelectorAll(".line .after i")[0].dispatchEvent(new Event("pointerover", {bubbles: true}))'
    browser.evaluate(point)
    assert browser.evaluate('document.getElementById("tip").textContent').startswith("10.5\ndocument ")


def test_a_feature_that_is_never_active_and_one_that_does_not_exist_say_so(browser):
    go(browser, "#layer=0&feature=7")
    assert "0 at every position" in browser.evaluate('document.querySelector("main").innerText')
    go(browser, "#layer=0&feature=300")
    assert "layer 0 has features 0 to 299" in browser.evaluate('document.querySelector("main").innerText')
    go(browser, "#layer=9&feature=0")
    assert "No layer 9: there are 0, 1, 2." in browser.evaluate('document.querySelector("main").innerText')


def test_the_keyboard_does_everything(browser):
    go(browser, "#layer=0&feature=5")
    press(browser, "ArrowRight")
    shown(browser, "#layer=0&feature=6")
    press(browser, "ArrowRight")
    shown(browser, "#layer=0&feature=8")
    press(browser, "ArrowLeft")
    shown(browser, "#layer=0&feature=6")
    press(browser, "/")
    assert browser.evaluate("document.activeElement.id") == "query"
    press(browser, "ArrowDown")
    press(browser, "ArrowDown")
    assert browser.evaluate("document.activeElement.textContent") == "0/1"
    key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13}
    browser.call("Input.dispatchKeyEvent", type="keyDown", text="\r", **key)
    browser.call("Input.dispatchKeyEvent", type="keyUp", **key)
    shown(browser, "#layer=0&feature=1")
    press(browser, "Escape")
    assert browser.evaluate("document.activeElement.id") == "query"


OUTSIDE = """[...document.querySelectorAll("main *, aside *")]
  .filter((element) => !element.parentElement.closest(".scroll, .line, .words, .hidden, td") && element.offsetParent)
  .filter((element) => !element.matches(".hidden, option") && element.getBoundingClientRect().right > innerWidth + 1)
  .map((element) => element.outerHTML.slice(0, 90))"""


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_fits_its_screen_in_both_themes(browser, width, theme):
    for link in ("#layer=1&feature=20", "#about", ""):
        go(browser, link, width, theme)
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        assert browser.evaluate(OUTSIDE) == []
        ground = browser.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 22, 26)"}[theme]
    if width == WIDTHS[1]:
        assert browser.evaluate('getComputedStyle(document.querySelector("main")).display') == "none"
        go(browser, "#layer=1&feature=20", width, theme)
        assert browser.evaluate('getComputedStyle(document.querySelector("aside")).display') == "none"


def test_the_theme_can_be_chosen(browser):
    go(browser, "#about")
    browser.evaluate('document.getElementById("theme").click()')
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 22, 26)"
    browser.evaluate('document.getElementById("theme").click()')
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
