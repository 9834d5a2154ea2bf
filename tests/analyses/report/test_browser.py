"""The report as Chromium shows it: nothing fails, every figure is drawn, and it fits the screen, in both languages."""

from __future__ import annotations

import json

import pytest

import reflowlens as rl
from analyses.report.page import write_report
from analyses.result.result import Result
from analyses.runner.suite import model_card, run_suite
from reflowlens.errors import ReflowlensError
from reflowlens.figures.browser import browser_page, find_browser

LANGUAGES = ("en", "zh")
WIDTHS = (1280, 390)
READ = """(async () => {
  const wait = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
  const figures = [...document.querySelectorAll("figure")];
  const table = document.querySelector("#headline .scroll");
  const early = figures.filter((figure) => figure.querySelector(".main-svg")).length;
  for (const figure of figures) {
    figure.scrollIntoView();
    for (let i = 0; i < 500 && !figure.querySelector(".main-svg"); i++) await wait(10);
  }
  scrollTo(0, 0);
  await wait(50);
  return {
    figures: figures.length,
    early,
    drawn: figures.filter((figure) => figure.querySelector(".main-svg")).length,
    points: figures.map((figure) => figure.querySelector(".canvas").calcdata.map((trace) => trace.length)),
    page: document.documentElement.scrollWidth,
    outside: [...document.querySelectorAll("main *")]
      .filter((element) => !element.parentElement.closest(".scroll, pre"))
      .filter((element) => element.getBoundingClientRect().right > innerWidth + 1)
      .map((element) => element.outerHTML.slice(0, 80)),
    clipped: table.scrollWidth - table.clientWidth,
  };
})()"""
METRICS = """[...document.querySelectorAll("#headline tbody tr:has(td)")].map((row) => [
  row.querySelector("th a").textContent, row.querySelector("td.value b")?.textContent ?? "",
  Number(row.querySelector("td.value").dataset.order), row.querySelector(".verdict")?.textContent ?? ""])"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A quick run, its report in both languages; that in Chinese is made from the saved results."""
    try:
        find_browser()
    except ReflowlensError as error:
        pytest.skip(str(error))
    model = rl.load_model("reflow-nano")
    run = run_suite(model, [5, 8], quick=True, out=tmp_path_factory.mktemp("run"), model_name="reflow-nano")
    assert run.errors == {}
    saved = [Result.load(run.folder / name) for name in run.results]
    write_report(saved, {}, model_card(model, "reflow-nano", {}), run.folder / "zh.html", lang="zh")
    return run


@pytest.fixture(scope="module")
def browser(run):
    with browser_page() as page:
        yield page


@pytest.fixture(scope="module")
def seen(run, browser):
    """What a reader has seen after scrolling through: (language, width) -> facts, and the console's complaints."""
    facts = {}
    for language, file in (("zh", run.folder / "zh.html"), ("en", run.report)):
        browser.open(file.as_uri())
        for width in WIDTHS:
            screen(browser, width)
            facts[language, width] = browser.evaluate(READ)
        facts[language, "complaints"] = [*browser.complaints]
        browser.complaints.clear()
    return facts


def screen(page, width):
    page.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_console_has_no_errors(seen, language):
    assert seen[language, "complaints"] == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_figure_is_drawn_when_it_is_scrolled_to(run, seen, language):
    count = sum(len(result.figures) for result in run.results.values())
    facts = seen[language, WIDTHS[0]]
    assert facts["figures"] == facts["drawn"] == count >= 9
    assert facts["early"] < count, "none is drawn before it is near"


def test_figures_of_saved_results_show_the_same_points_in_chinese(seen):
    assert seen["zh", WIDTHS[0]]["points"] == seen["en", WIDTHS[0]]["points"]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("language", LANGUAGES)
def test_the_page_fits_its_screen(seen, language, width):
    facts = seen[language, width]
    assert facts["page"] <= width
    assert facts["outside"] == []
    assert facts["clipped"] <= 0, "verdicts are not cut off"


@pytest.fixture
def page(browser, seen):
    """The report in English, on a wide screen."""
    screen(browser, WIDTHS[0])
    return browser


def press(page, selector):
    """Enter on an element that has the focus."""
    page.evaluate(f"document.querySelector({json.dumps(selector)}).focus()")
    key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13}
    page.call("Input.dispatchKeyEvent", type="keyDown", text="\r", **key)
    page.call("Input.dispatchKeyEvent", type="keyUp", **key)


def test_the_headline_is_sorted_by_keyboard_and_comes_back(page):
    column = "#headline th[data-sort].{} button"
    before = page.evaluate(METRICS)
    assert len(before) > 5

    press(page, column.format("value"))
    values = [value for _, _, value, _ in page.evaluate(METRICS)]
    assert values == sorted(value for _, _, value, _ in before)
    press(page, column.format("value"))
    assert [value for _, _, value, _ in page.evaluate(METRICS)] == values[::-1]
    assert page.evaluate('document.querySelector("#headline [aria-sort]").ariaSort') == "descending"

    press(page, column.format("metric"))
    names = [name for name, *_ in page.evaluate(METRICS)]
    assert names == page.evaluate(f'{json.dumps(names)}.sort((a, b) => a.localeCompare(b, "en", {{ numeric: true }}))')
    experiment = page.evaluate('document.querySelector("#headline tbody tr:has(td) small").innerText')
    assert experiment in ("5. Semantic Algebra", "8. Signal Flow"), "a row without its group tells it itself"

    press(page, column.format("judged"))
    judged = [chip[2:] for *_, chip in page.evaluate(METRICS)]
    order = ["supported", "underpowered", "not supported", ""]
    assert judged == sorted(judged, key=order.index)

    press(page, "#headline .back")
    assert page.evaluate(METRICS) == before
    assert page.evaluate('document.querySelector("#headline [aria-sort]")') is None
    assert page.evaluate('document.querySelector("#headline .back").hidden')
    assert page.complaints == []


def test_the_code_of_a_figure_is_copied(page):
    page.evaluate("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    page.evaluate('document.querySelector("#signal_flow-tracks .code").open = true')
    press(page, "#signal_flow-tracks .code button")
    copied = page.evaluate("window.copied")
    assert copied.startswith("import reflowlens as rl\nfrom analyses import signal_flow\n")
    assert copied.endswith("result.figures['tracks'].show()")


def test_a_term_tells_its_meaning_to_the_keyboard_inside_the_window(page):
    """A title alone shows at the pointer only."""
    script = """(() => {
      const term = document.querySelector("#headline .controls abbr");
      const told = () => getComputedStyle(term, "::after");
      const before = told().content;
      term.focus();
      const { content, position, bottom } = told();
      return { before, told: JSON.parse(content), title: term.title, place: [position, bottom] };
    })()"""
    seen = page.evaluate(script)
    assert seen["before"] == "none"
    assert seen["told"] == seen["title"] != ""
    assert seen["place"] == ["fixed", "16px"]


def test_on_paper_figures_fit_and_details_close_again(page):
    closed = page.evaluate('document.querySelectorAll("details:not([open])").length')
    page.evaluate('dispatchEvent(new Event("beforeprint"))')
    widths = page.evaluate('[...document.querySelectorAll(".main-svg")].map((svg) => svg.getAttribute("width"))')
    assert widths
    assert set(widths) == {"680"}
    assert page.evaluate('document.querySelectorAll("details:not(.code, [open])").length') == 0
    page.evaluate('dispatchEvent(new Event("afterprint"))')
    assert page.evaluate('document.querySelectorAll("details:not([open])").length') == closed
