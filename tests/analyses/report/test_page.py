from __future__ import annotations

import json
import re
from html import unescape
from html.parser import HTMLParser

import pandas as pd
import plotly.graph_objects as go
import pytest

import reflowlens as rl
from analyses.experiments.crystallisation_boundary import BOUNDARY, crystallisation_boundary
from analyses.registry import EXPERIMENTS
from analyses.report.explanations import glossed
from analyses.report.figure_code import figure_code
from analyses.report.messages import in_language, translate, translate_figure
from analyses.report.metric_table import number
from analyses.report.page import template_text, write_report
from analyses.result.result import Result
from reflowlens.checkpoints import model_hash
from reflowlens.figures.builders import line_with_band
from reflowlens.figures.heatmap import heatmap

NASTY = "</script><script>alert(1)</script><!-- & \" '"
VOID = {"meta", "br", "link", "img", "path", "circle"}


class Page(HTMLParser):
    """Checks that every tag is closed in order and collects what the tests ask about."""

    def __init__(self, html):
        super().__init__()
        self.open, self.ids, self.links, self.sources, self.data, self.text = [], [], [], [], [], []
        self.scripts = 0
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes["href"]] if "href" in attributes else []
        self.sources += [attributes["src"]] if "src" in attributes else []
        self.scripts += tag == "script"
        if tag not in VOID:
            self.open.append((tag, attributes.get("type")))

    def handle_startendtag(self, tag, attributes):
        assert tag in VOID

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == ("script", "application/json"):
            self.data.append(json.loads(data))
        elif self.open and self.open[-1][0] not in ("script", "style"):
            self.text.append(data)


def result(**changes):
    frame = pd.DataFrame({"layer": range(12), "p": [i / 12 for i in range(12)], "token": [NASTY, *["a"] * 11]})
    fields = {
        "name": "layer_evolution",
        "title": "Layer Evolution",
        "params": {"prompt": NASTY, "seed": 0},
        "metrics": {"share": 0.62, "layer": 3.0, "unjudged": 1.0},
        "controls": {"share": {"untrained": 0.08, "shuffled_norm": 0.74}},
        "intervals": {"share": (0.55, 0.69)},
        "published": {"share": 0.5},
        "verdicts": {"share": "not supported", "layer": "supported"},
        "frames": {"layers": frame},
        "figures": {"probability": line_with_band(frame, "layer", "p", color="token", title="p < 1")},
        "notes": [NASTY],
        "definitions": {"share": NASTY, "entropy": "in nats"},
        "seconds": 12.0,
    }
    return Result(**fields | changes)


@pytest.fixture
def written(tmp_path):
    def write(results, errors=None, card=None):
        path = write_report(results, errors or {}, card or {"name": "nano"}, tmp_path / "new" / "report.html")
        assert [file.name for file in path.parent.iterdir() if file.is_file()] == ["report.html"]
        return path.read_text(encoding="utf-8")

    return write


def visible(page):
    return " ".join(" ".join(page.text).split())


def test_the_page_is_whole_well_formed_and_needs_no_network(written):
    html = written([result()], {"causal_ablation": NASTY}, {"name": NASTY, "hash": "ab" * 32})
    page = Page(html)
    assert page.sources == []
    assert all(link.startswith("#") for link in page.links)
    assert "url(" not in re.search(r"<style>(.*?)</style>", html, re.S).group(1)
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links} <= set(page.ids), "every entry of the contents leads somewhere"
    assert page.scripts == 4, "theme, plotly, one figure, the page's own: none of them from the data"
    assert visible(page).count("alert(1)") == html.count("alert(1)") - json.dumps(page.data).count("alert(1)") >= 5


IMAGE = '"><img src=x onerror="alert(1)">'


def test_names_that_are_markup_stay_text_wherever_they_stand(written):
    odd = result(metrics={IMAGE: 1.0}, controls={}, intervals={}, verdicts={}, definitions={IMAGE: IMAGE})
    odd.name = odd.title = IMAGE  # no saved result has such a name, an object in memory may
    odd.frames, odd.figures = {IMAGE: odd.frames["layers"]}, {IMAGE: odd.figures["probability"]}
    page = Page(html := written([odd], {IMAGE + "2": IMAGE}, {"name": IMAGE, IMAGE: IMAGE}))
    assert "<img" not in html
    assert page.scripts == 4
    assert {link[1:] for link in page.links} <= set(page.ids)


def test_figures_are_data_that_the_page_draws_later(written):
    html = written([result()])
    (figure,) = Page(html).data
    assert figure["data"][0]["type"] == "scatter"
    assert not figure["layout"].get("title"), "it is the caption"
    assert "<figcaption>p &lt; 1<small>" in html
    assert "IntersectionObserver" in html
    assert "showSendToCloud: false" in html


def test_a_figures_size_is_kept_free_before_it_is_drawn(written):
    figure = go.Figure(layout={"height": 777, "meta": {"min_width": 555}})
    html = written([result(figures={"a_plot": figure, "other": go.Figure(layout={"meta": "mine"})})])
    assert 'style="height:777px;min-width:555px"' in html
    assert 'style="height:420px;min-width:0px"' in html
    assert "<figcaption>A plot</figcaption>" in html, "a figure without a title has its name"


def test_the_given_result_is_not_changed(written):
    own = result()
    written([own])
    assert own.figures["probability"].layout.title.text == "p &lt; 1"


def test_headline_shows_interval_controls_published_and_verdict(written):
    html = written([result()])
    table = re.search(r'<section id="headline">(.*?)</section>', html, re.S).group(1)
    rows = [unescape(re.sub(r"<[^>]*>", " ", row)).split() for row in re.findall(r"<tr>(.*?)</tr>", table, re.S)[1:]]
    assert rows[0] == ["7.", "Layer", "Evolution"]
    assert " ".join(rows[1]) == "share 0.62 0.55 to 0.69 untrained 0.08 shuffled norm 0.74 0.5 ✗ not supported"
    assert " ".join(rows[2]) == "layer 3 ✓ supported"
    assert len(rows) == 3, "metrics neither judged nor published stand with their experiment"
    assert 'class="verdict not-supported"' in table


def test_an_experiment_without_claims_shows_all_its_metrics(written):
    html = written([result(verdicts={}, published={})])
    table = re.search(r'<section id="headline">(.*?)</section>', html, re.S).group(1)
    assert "unjudged" in table


def test_the_section_holds_question_definitions_notes_frames_and_params(written):
    html = written([result()])
    section = re.search(r'<section id="layer_evolution".*?</section>', html, re.S).group(0)
    text = visible(Page(section))
    assert "From which layer on is the prediction decided?" in text
    assert "C. Mechanistic analysis" in text
    assert "entropy not computed in nats" in text
    assert "Layers 12 rows, 3 columns" in text
    assert "The first 10 rows; all of them are in the saved result." in text
    assert section.count("<tr><td") == 10
    assert "All metrics 3" in text
    assert "unjudged 1" in text


def test_frames_are_linked_where_they_were_saved(written, tmp_path):
    result().save(tmp_path / "new" / "layer_evolution")
    html = written([result()])
    link = re.search(r'<a href="(layer_evolution/frames/layers.csv)">', html).group(1)
    assert (tmp_path / "new" / link).is_file()


def test_the_top_counts_experiments_errors_and_verdicts(written):
    card = {"name": "nano", "parameters": 9123456, "tokens seen": 61_440_000, "validation loss": 3.7421, "none": "–"}
    text = visible(Page(written([result()], {"causal_ablation": "boom"}, card)))
    assert "1 experiment · 1 without a result · 12 s" in text
    assert "✓ 1 supported ✗ 1 not supported" in text
    assert "parameters 9,123,456" in text
    assert "validation loss 3.742" in text
    assert "No result: boom" in text


def test_an_experiment_of_ones_own_and_nothing_at_all(written):
    own = Result("my_probe", "My Probe", metrics={"x": 1.0})
    text = visible(Page(written([own])))
    assert "Other experiments" in text
    assert "My Probe" in text
    assert "No experiment returned a metric." in visible(Page(written([])))


def test_a_report_in_chinese_has_no_english_left_but_data_and_names(tmp_path):
    own = result(
        params={},
        metrics={"crystallisation_share": 0.62, "target_accuracy": 1.0},
        controls={"crystallisation_share": {"untrained": 0.08, "shuffled_norm": 0.74}},
        intervals={"crystallisation_share": (0.55, 0.69)},
        published={"crystallisation_share": 0.5},
        verdicts={"crystallisation_share": "not supported"},
        frames={"x": pd.DataFrame({"y": range(11)})},
        figures={"depth": go.Figure(layout_title_text="Where predictions crystallise")},
        notes=["target_probability against untrained: sign-flip p = 0.3, 20 prompts"],
        definitions={"target_probability": "probability of the expected continuation, mean over prompts"},
    )
    card = {"name": "N", "parameters": 9, "layers": 2, "signals kept (top-k)": 3, "validation loss": 3.5}
    errors = {"causal_ablation": "interrupted before it was done"}
    path = write_report([own], errors, card, tmp_path / "report.html", lang="zh")
    html = path.read_text(encoding="utf-8")
    (figure,) = Page(html).data
    read = re.sub(r"<pre.*?</pre>", "", html, flags=re.S)  # code is data too
    shown = re.sub(
        r"reflowlens[\d. ]*|torch [\d.+a-z]*|plotly|Python|KL|MLP|logits?|norm|varimax|R_ts|top-k",
        "",
        visible(Page(read)),
    )
    assert re.findall(r"[A-Za-z]{2,}", shown) == []
    assert "1 项实验 · 1 项无结果 · 12 秒" in shown
    assert '<html lang="zh">' in html
    assert not figure["layout"].get("title")
    assert "预测在何处结晶" in shown
    english = write_report([own], errors, card, path).read_text(encoding="utf-8")
    assert not re.search("[\u4e00-\u9fff]", re.sub(r"<script>.*?</script>", "", english, flags=re.S))


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (9123456, "9,123,456"),
        (1.0, "1"),
        (0.00012345678, "0.0001235"),
        (float("nan"), "–"),
        (-0.5, "-0.5"),
        (True, "yes"),
    ],
)
def test_number(value, shown):
    assert number(value) == shown


# -- the code that made a figure --------------------------------------------------------------------------------------


def executed(code):
    """The names a snippet leaves, without showing its figure."""
    names = {}
    exec(code.removesuffix(".show()"), names)
    return names


def made(**params):
    """A result of the packaged model."""
    return result(params={"lexicon": "1.0.0", "model_hash": model_hash(rl.load_model("reflow-nano"))} | params)


def test_the_code_calls_the_experiment_with_what_is_not_default():
    own = made(prompt="The 'sea'\n", target=" is", view="rotated", seed=3, quick=False)
    assert figure_code(own, "probability", "reflow-nano").splitlines() == [
        "import reflowlens as rl",
        "from analyses import layer_evolution",
        "",
        "model = rl.load_model('reflow-nano')",
        "result = layer_evolution(model, prompt=\"The 'sea'\\n\", target=' is', view='rotated', seed=3)",
        "result.figures['probability'].show()",
    ]


def test_the_code_says_what_it_does_not_know():
    own = result(name="sparsity_profile", params={"texts": 11, "view": "mine", "lexicon": "0.9", "seed": 0})
    code = figure_code(own, "counts", "my\nrun")
    assert 'rl.load_model("…")  # put in the path of this model: my run' in code
    assert "# not held by the result, so left at the default: rule, threshold, view, lexicon, texts, rotations" in code
    edited = result(params={"model_hash": "ab" * 32, "seed": 0})
    assert 'rl.load_model("…")  # put in the path of this model: reflow-nano, abababababab' in figure_code(
        edited, "probability", "reflow-nano"
    ), "the packaged model has other weights"


def test_the_code_of_an_experiment_of_ones_own_loads_what_was_saved(tmp_path, monkeypatch):
    own = Result("my_probe", "My Probe", figures={"a": go.Figure(layout_title_text="mine")})
    own.save(tmp_path / "my_probe")
    monkeypatch.chdir(tmp_path)
    loaded = executed(figure_code(own, "a", "nano"))["result"]
    assert loaded.figures["a"].layout.title.text == "mine"


def test_the_code_of_the_boundary_runs_its_experiments():
    names = ["layer_evolution", "concept_inception"]
    results = {name: Result(name, name, params={"seed": 0, "quick": name[0] == "l"}) for name in names}
    across = crystallisation_boundary(results)
    code = figure_code(across, "boundary", "nano")
    assert (
        f"run = run_suite(model, experiments={names}, seed=0)\nresult = crystallisation_boundary(run.results)" in code
    )


def test_a_figures_code_stands_below_it_and_is_text(written):
    html = written([result(params={"prompt": NASTY, "seed": 0})])
    (code,) = re.findall(r"<pre[^>]*><code>(.*?)</code></pre>", html, re.S)
    assert unescape(code) == figure_code(result(params={"prompt": NASTY, "seed": 0}), "probability", "nano")
    compile(unescape(code), "code", "exec")


@pytest.mark.slow
@pytest.mark.by_hand
@pytest.mark.parametrize("name", ["semantic_galaxy", "signal_flow"])
def test_the_code_makes_the_same_result_again(name):
    experiment = next(known for known in EXPERIMENTS.values() if known.name == name)
    own = experiment.load()(rl.load_model("reflow-nano"), quick=True, seed=1)
    again = executed(figure_code(own, next(iter(own.figures)), "reflow-nano"))["result"]
    assert again.metrics == pytest.approx(own.metrics, rel=1e-5)
    assert again.params == own.params


# -- the contents and the count ---------------------------------------------------------------------------------------


def test_the_boundary_is_no_experiment_and_stands_across_them(written):
    across = Result(BOUNDARY, "Crystallisation Boundary")
    text = visible(Page(written([result(), across])))
    assert "1 experiment ·" in text
    assert "Across the experiments" in text
    assert "Other experiments" not in text


def test_a_metric_leads_to_its_definition(written):
    html = written([result()])
    links = set(re.findall(r'<th scope="row"><a href="#([^"]*)">', html))
    assert len(links) == 3
    assert links <= set(re.findall(r'<dt id="([^"]*)">', html))


# -- it explains itself -----------------------------------------------------------------------------------------------


def algebra(**changes):
    fields = {
        "name": "semantic_algebra",
        "title": "Semantic Algebra",
        "metrics": {"accuracy_at_1": 0.41, "own": 1.0},
        "controls": {"accuracy_at_1": {"c_alone": 0.2, "untrained": 0.0, "rotated_basis": 0.41}},
        "intervals": {"accuracy_at_1": (0.38, 0.44)},
        "verdicts": {"accuracy_at_1": "supported"},
        "definitions": {"accuracy_at_1": "share of questions whose expected word has rank 1"},
    }
    return Result(**fields | changes)


def test_a_metric_says_what_it_would_mean_and_which_controls_decide(written):
    html = written([algebra()])
    text = visible(Page(re.sub(r"</?abbr[^>]*>", "", html)))
    assert "the rotated basis cannot decide, for turning the signals changes no cosine" in text
    assert "The controls that decide: c alone, untrained." in text
    assert "The whole interval must lie beyond each of them by 0.05, the smallest effect that matters." in text
    assert text.count("by 0.05 at least") == 2, "at a glance and in all metrics"
    assert "Shown beside it, without a part in the verdict: rotated basis." in text
    assert "The interval covers rotated basis; that takes nothing from “supported”" in text
    assert len(re.findall(r"<li class=decides>", html)) == 4, "two of them, at a glance and in all metrics"
    assert visible(Page(written([algebra(intervals={})]))).count("The interval covers") == 0
    assert "cannot decide" not in visible(Page(written([algebra(name="my_experiment")])))


def test_of_a_model_without_signals_the_report_speaks_of_axes(written, tmp_path):
    found = {
        "title": "Sparsity Profile",
        "metrics": {"active_signals": 28.0},
        "controls": {"active_signals": {"shuffled_recipe": 30.0}},
        "definitions": {"active_signals": "active signals of a token, mean over the vocabulary; active where |x| > 2"},
        "figures": {"signals": go.Figure(layout_title="How many signals are active for a token")},
    }
    results = [Result("sparsity_profile", params={"view": "identity"}, **found)]
    for lang, said in (("en", "axes of the residual stream"), ("zh", "残差流的轴")):
        page = write_report(results, {}, {"name": "m"}, tmp_path / f"{lang}.html", lang=lang).read_text("utf-8")
        text = visible(Page(re.sub(r"</?abbr[^>]*>", "", page)))
        text = re.sub(r"\w+\.figures\S+", "", text)  # an identifier
        assert text.count(said) > 3
        assert not re.findall(r"\b(?:[Ss]ignals?|[Rr]ecipes?)\b(?!_)|信号|配方", text)
    native = [Result("sparsity_profile", params={"view": "native"}, **found)]
    for some in (native, [*native, *results]):
        assert "How many signals does a token use?" in visible(Page(written(some)))


def test_each_control_of_a_metric_has_a_mark_of_its_own(written):
    html = written([algebra()])
    row = re.search(r'<tr><th scope="row"><a href="#semantic_algebra-is-accuracy_at_1">.*?</tr>', html, re.S).group(0)
    drawn, listed = row.split('<td class="controls">')
    marks = [re.findall(r'class="control (c\d)" d="M[\d. ]*([^"]*)"', part) for part in (drawn, listed)]
    assert marks[0] == marks[1], "the same beside the name and on the axis"
    assert len(set(marks[0])) == 3


def test_the_glossary_is_there_and_its_terms_tell_themselves_on_hover(written):
    html = written([algebra()])
    assert 'href="#glossary"' in html
    assert "<dt>varimax</dt>" in html
    (told,) = set(re.findall(r'title="([^"]*)">c alone</abbr>', html))
    assert "nearest word to c" in told


@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=lambda experiment: experiment.name)
def test_every_explanation_is_translated(experiment):
    texts = json.loads(template_text("explanations.json"))["experiments"][experiment.name]
    english = [*(entry["says"] for entry in texts["metrics"].values()), *texts["figures"].values()]
    assert len(english) > 5
    with in_language("zh"):
        assert [text for text in english if translate(text) == text] == []


def test_a_control_that_is_named_by_a_sign_tells_what_it_is():
    assert 'title="E = R B, a token' in glossed("E")
    assert glossed("Every E") == "Every E"


def test_ticks_of_a_heatmap_are_translated():
    frame = pd.DataFrame({"category": ["kinship", "my own"], "other": ["kinship"] * 2, "cosine": [0.1, 0.2]})
    with in_language("zh"):
        figure = translate_figure(heatmap(frame, "category", "other", "cosine"))
    assert list(figure.layout.xaxis.ticktext) == ["亲属", "my own"]
