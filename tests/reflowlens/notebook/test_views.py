from __future__ import annotations

import base64
import re
import rlcompleter
import zlib
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformer_lens import patching

import reflowlens as rl
from analyses.result.result import Result
from reflowlens.config import PRESETS, ModelConfig, RotaryScaling
from reflowlens.errors import ReflowlensError
from reflowlens.figures.browser import browser_page, find_browser
from reflowlens.models.base import HookedModel
from reflowlens.notebook.html import table
from reflowlens.notebook.tokens import MAX_CELLS, MAX_TOKENS
from reflowlens.ttt_flow_config import TTTFlowConfig
from tests.support.tiny import CONFIGS, random_model

VOID = {"input", "meta", "br", "link"}


class Page(HTMLParser):
    """What a browser makes of a page: elements by tag, and whether every one that opens is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def check_offline(html: str) -> Page:
    """Well-formed, and nothing is loaded from anywhere."""
    page = Page(html)
    for _, attributes in page.elements:
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert "url(" not in html
    assert "@import" not in html
    assert "fetch(" not in html
    return page


def hovers(html: str) -> list[str]:
    return [unescape(a["data-value"] or "") for a in Page(html).all("span") if "data-value" in a]


# -- tables -----------------------------------------------------------------------------------------------------------


def test_a_table_escapes_and_rounds() -> None:
    page = Page(table(["<a>", "b"], [["<script>", 1 / 3], [True, 1234567]]))
    assert "<script>" in page.texts
    assert {"<a>", "0.3333", "True", "1,234,567"} <= set(page.texts)


# -- tokens -----------------------------------------------------------------------------------------------------------


def test_each_token_shows_its_value_and_a_colour_of_its_sign_and_size() -> None:
    html = rl.show_tokens(["<b>", " no", "\n", "x"], [2.0, -1.0, float("nan"), 0.0])._repr_html_()
    page = check_offline(html)
    assert [text.partition("\n")[2] for text in hovers(html)] == ["2", "-1", "no value", "0"]
    assert hovers(html)[0].startswith("0: '<b>'")
    colors = [a["style"] for a in page.all("span") if "data-value" in a]
    assert colors == [
        f"background:rgba({c})" for c in ("213,94,0,0.65", "0,114,178,0.33", "213,94,0,0.00", "213,94,0,0.00")
    ]
    assert "<b>" in page.texts
    assert {"-2", "2"} <= set(page.texts), "the legend's ends"


def test_channels_are_chosen_by_radio_buttons_of_this_view_alone() -> None:
    view = rl.show_tokens(["a", "b"], torch.tensor([[1.0, 5.0], [2.0, 6.0]]).half(), names=["first", "<second>"])
    first, second = view._repr_html_(), view._repr_html_()
    assert repr(view) == "TokenView(2 tokens, 2 channels)"
    buttons = check_offline(first).all("input")
    assert len(buttons) == 2
    assert len({b["name"] for b in buttons} | {b["name"] for b in check_offline(second).all("input")}) == 2
    assert [b.get("checked", "no") for b in buttons] == [None, "no"]
    assert len(hovers(first)) == 4
    ids = [a["id"] for _, a in Page(first + second).elements if "id" in a]
    assert len(ids) == len(set(ids)) == 6
    assert Page(first).texts.count("<second>") == 2, "on its button and, where there are no styles, over its panel"
    by_name = rl.show_tokens(["a", "b"], {"first": [1.0, 2.0], "<second>": [5.0, 6.0]})
    assert hovers(by_name._repr_html_()) == hovers(first)


def test_scale_and_limit() -> None:
    html = rl.show_tokens(["a"], [1.0], limit=4.0)._repr_html_()
    assert "213,94,0,0.16" in html
    assert "0,114,178" not in html, "sequential where nothing is negative"
    assert "0,114,178" in rl.show_tokens(["a"], [1.0], scale="diverging")._repr_html_()
    with pytest.raises(ReflowlensError, match="some values are negative"):
        rl.show_tokens(["a"], [-1.0], scale="sequential")


def test_a_long_text_is_cut_and_says_so() -> None:
    view = rl.show_tokens(["a"] * 3000, np.ones((3000, 30)))
    html = view._repr_html_()
    assert repr(view) == "TokenView(3,000 tokens, 30 channels)"
    assert "the first 2,000 of 3,000 tokens" in html
    assert "the first 10 of 30 channels" in html
    assert len(hovers(html)) == MAX_CELLS == 10 * MAX_TOKENS
    assert len(html) < 4_000_000


def test_a_text_is_split_by_the_model() -> None:
    model = random_model("reflow")
    assert repr(rl.show_tokens("Hi", [0.0, 1.0], model=model)) == "TokenView(2 tokens, 1 channel)"
    html = rl.show_tokens(torch.tensor([72, 105]), [0.0, 1.0], model=model)._repr_html_()
    assert hovers(html) == ["0: 'H'\n0", "1: 'i'\n1"]
    for tokens, what in (("Hi", "a text"), ([72, 105], "token ids")):
        with pytest.raises(ReflowlensError, match=f"{what} cannot be split into tokens without a model"):
            rl.show_tokens(tokens, [0.0, 1.0])


@pytest.mark.parametrize(
    ("values", "names", "message"),
    [
        ([1.0], None, r"2 tokens need as many values"),
        ([1.0, float("inf")], None, "an infinite value"),
        (np.ones((2, 2)), ["a"], "1 names were given for 2 channels"),
        (np.ones((2, 2)), ["a", "a"], "must differ"),
        (np.ones((2, 1, 1)), None, r"got shape \[2, 1, 1\]"),
        ({}, None, "no values"),
    ],
)
def test_values_that_do_not_fit(values: Any, names: Any, message: str) -> None:
    with pytest.raises(ReflowlensError, match=message):
        rl.show_tokens(["a", "b"], values, names=names)


def test_a_view_saves_itself_as_a_page(tmp_path: Path) -> None:
    path = rl.show_tokens(["ü"], [1.0], title="A < B").save(tmp_path / "new" / "view.html")
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    page = check_offline(text.partition("\n")[2])
    assert page.all("meta")[0] == {"charset": "utf-8"}
    assert {"ü", "A < B"} <= set(page.texts)


# -- attention --------------------------------------------------------------------------------------------------------


def png_alpha(html: str) -> np.ndarray:
    """The opacities of the first image, read from its bytes."""
    png = base64.b64decode(re.search(r"data:image/png;base64,([^\"]+)", html)[1])
    width, height = (int.from_bytes(png[i : i + 4], "big") for i in (16, 20))
    start = png.index(b"IDAT") + 4
    rows = np.frombuffer(zlib.decompressobj().decompress(png[start:]), dtype=np.uint8).reshape(height, 1 + 4 * width)
    return rows[:, 1:].reshape(height, width, 4)[..., 3]


def test_attention_shows_weights_as_an_image_a_table_and_numbers() -> None:
    pattern = torch.tensor([[[1.0, 0.0, 0.0], [0.75, 0.25, 0.0], [0.1, 0.2, 0.7]]])
    view = rl.show_attention(["a", "</script>", "\n"], pattern)
    html = view._repr_html_()
    page = check_offline(html)
    assert repr(view) == "AttentionView(3 tokens, 1 head)"
    np.testing.assert_allclose(png_alpha(html) / 255, pattern[0], atol=0.5 / 255)
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", html)
    assert [unescape(cell) for cell in cells[:6]] == [
        "'</script>' (1)",
        "'a' (0)",
        "0.750",
        "'\\n' (2)",
        "'\\n' (2)",
        "0.700",
    ]
    data = next(a["data-weights"] for a in page.all("div") if "data-weights" in a)
    numbers = np.frombuffer(base64.b64decode(data or ""), dtype="<u2").reshape(3, 3)
    np.testing.assert_allclose(numbers / 65535, pattern[0], atol=1e-5)
    assert html.count("</script>") == 1, "no token ends the script"


def test_attention_of_a_cache() -> None:
    model = random_model("reflow")
    _, cache = model.run_with_cache(["abc", "xyz"], names_filter=lambda name: True)
    one = rl.show_attention(cache, layer=1, prompt=1)
    assert repr(one) == "AttentionView(3 tokens, 4 heads)"
    html = one._repr_html_()
    np.testing.assert_allclose(png_alpha(html) / 255, cache["pattern", 1][1, 0].detach(), atol=0.51 / 255)
    assert '["x", "y", "z"]' in html
    assert rl.show_attention(["x", "y", "z"], cache, layer=1, prompt=1).markup == one.markup
    every = rl.show_attention(cache)
    assert repr(every) == "AttentionView(3 tokens, 8 heads)"
    assert "L1.H3" in every.markup
    with pytest.raises(ReflowlensError, match="no prompt 2: this cache has prompts 0 to 1"):
        rl.show_attention(cache, prompt=2)
    _, without = model.run_with_cache("abc")
    with pytest.raises(ReflowlensError, match="no attention patterns: run_with_cache"):
        rl.show_attention(without)


@pytest.mark.parametrize("tokens", [None, ["x", "y", "z"]], ids=["a cache", "tokens and a cache"])
def test_attention_of_a_shorter_prompt_is_shown_without_padding(tokens: list[str] | None) -> None:
    model = random_model("reflow")
    pattern = "blocks.1.attn.hook_pattern"
    _, cache = model.run_with_cache(["abcdef", "xyz"], names_filter=pattern)
    _, alone = model.run_with_cache("xyz", names_filter=pattern)
    for part in (cache, cache.apply_slice_to_batch_dim([1, 0])):
        view = rl.show_attention(tokens or part, tokens and part, prompt=int(part is cache))
        assert repr(view) == "AttentionView(3 tokens, 4 heads)"
        assert '["x", "y", "z"]' in view._repr_html_()
        np.testing.assert_allclose(png_alpha(view._repr_html_()) / 255, alone[pattern][0, 0].detach(), atol=0.51 / 255)


def test_large_patterns_are_cut_and_say_so() -> None:
    view = rl.show_attention(["a"] * 200, np.tile(np.eye(200), (40, 1, 1)))
    assert repr(view) == "AttentionView(200 tokens, 40 heads)"
    assert "the first 160 of 200 positions" in view.markup
    assert "the first 32 of 40 heads" in view.markup
    assert len(view.markup) < 5_000_000


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (None, "needs a pattern"),
        (np.eye(3), r"\[head, 2, 2\], got shape \[1, 3, 3\]"),
        (np.array([[0.5, -3.0], [0.1, 0.2]]), "scores are no pattern"),
        (np.full((2, 2), np.nan), "between 0 and 1"),
    ],
)
def test_patterns_that_do_not_fit(pattern: Any, message: str) -> None:
    with pytest.raises(ReflowlensError, match=message):
        rl.show_attention(["a", "b"], pattern)


# -- what a notebook shows of our things ------------------------------------------------------------------------------


def test_everything_has_one_line_on_a_terminal_and_html_that_needs_no_network() -> None:
    model = random_model("reflow")
    _, cache = model.run_with_cache("abc")
    swept = rl.sweep(model, "abc", "xbc", "resid_pre", rl.metrics.kl())
    shown = {
        "ReFlow(reflow: ": model,
        "ModelConfig(architecture='reflow'": model.cfg,
        "ActivationCache(": cache,
        "SignalView(native of reflow: 32 signals": rl.signal_view(model),
        "PatchingResult(kl: 2 layer × 3 pos, 1 prompt)": swept,
        "EdgeScores(": rl.edge_attribution(model, "abc", "xbc", rl.metrics.kl()),
        "Collected(": rl.collect(model, ["abc"], "hook_embed"),
        "Result('a', no metrics": Result("a", "A <b>", notes=["<i>"]),
    }
    for begin, thing in shown.items():
        assert repr(thing).startswith(begin)
        assert "\n" not in repr(thing)
        assert len(repr(thing)) < 300
        check_offline(thing._repr_html_())
    assert isinstance(swept, patching.PatchingResult)


def test_a_result_of_a_sweep_shows_the_strongest_cells_first() -> None:
    model = random_model("reflow")
    swept = rl.sweep(model, "abc", "xbc", "resid_pre", rl.metrics.kl())
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", swept._repr_html_())
    change = swept.effect().mean(dim=-1)
    strongest = int(change.abs().argmax())
    assert [int(cells[0]), int(cells[1])] == [strongest // 3, strongest % 3]
    assert float(cells[2]) == pytest.approx(float(change.flatten()[strongest]), rel=1e-3)


@pytest.mark.parametrize("cfg", [*CONFIGS.values(), *PRESETS.values()], ids=[*CONFIGS, *PRESETS])
def test_a_configuration_is_what_its_repr_says(cfg: ModelConfig) -> None:
    names = {kind.__name__: kind for kind in (ModelConfig, RotaryScaling, TTTFlowConfig)}
    assert eval(repr(cfg), names) == cfg


# -- names of hook points ---------------------------------------------------------------------------------------------


def test_every_hook_point_is_reached_by_attributes(model: HookedModel) -> None:
    for name in model.hook_dict:
        found: Any = model.hooks
        for part in name.split("."):
            found = found[int(part)] if part.isdigit() else getattr(found, part)
        assert found == name
    assert model.hooks.blocks[-1].hook_resid_post == "blocks.1.hook_resid_post"
    assert [block.hook_resid_pre for block in model.hooks.blocks] == [
        "blocks.0.hook_resid_pre",
        "blocks.1.hook_resid_pre",
    ]


def test_completion_offers_the_points() -> None:
    complete = rlcompleter.Completer({"model": random_model("reflow")}).complete
    offered = [complete("model.hooks.hook_", i) for i in range(3)]
    assert offered == ["model.hooks.hook_basis", "model.hooks.hook_embed", "model.hooks.hook_recipe"]
    names = random_model("reflow").hooks
    assert "hook_z" in dir(names.blocks[0].attn)
    with pytest.raises(AttributeError, match="did you mean 'hook_embed'"):
        _ = names.hook_embd
    with pytest.raises(ReflowlensError, match=r"no hook point blocks\[2\]: there are 0, 1"):
        names.blocks[2]


def test_hooks_still_attaches_for_us_and_for_transformer_lens() -> None:
    model = random_model("reflow")
    seen: list[str] = []

    def see(x: torch.Tensor, hook: Any) -> None:
        seen.append(hook.name)

    with model.hooks(fwd_hooks=[(model.hooks.blocks[1].attn.hook_z, see)]) as same:
        model("abc")
    assert same is model
    model("abc")
    model.run_with_hooks("abc", fwd_hooks=[("hook_embed", see)])  # TransformerLens's own, which calls self.hooks(...)
    assert seen == ["blocks.1.attn.hook_z", "hook_embed"]
    tokens = model.to_tokens(["abc", "xbc"])
    clean = model.run_with_cache(tokens[:1])[1]
    patched = patching.get_act_patch_resid_pre(model, tokens[1:], clean, lambda logits: logits[0, -1, 0])
    assert patched.shape == (2, 3)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def _has_browser() -> bool:
    try:
        find_browser()
    except ReflowlensError:
        return False
    return True


@pytest.mark.skipif(not _has_browser(), reason="looking at a page needs Chrome or Chromium")
def test_two_views_on_one_page_answer_to_the_pointer_each_for_itself(tmp_path: Path) -> None:
    pattern = np.stack([np.tril(np.full((3, 3), 0.25)), np.tril(np.full((3, 3), 0.5))])
    views = [rl.show_attention(["a", "b", "c"], pattern), rl.show_attention(["a", "b", "c"], pattern)]
    page_file = tmp_path / "page.html"
    errors = "<script>window.failures=[];addEventListener('error',e=>failures.push(e.message))</script>"
    page_file.write_text("<!doctype html><meta charset=utf-8>" + errors + "".join(v._repr_html_() for v in views))
    point = """(view, head, q, k) => {
        let root = document.querySelectorAll('[id^=rl-view]:not(input)')[view];
        root.querySelectorAll('input')[head].click();
        let part = root.querySelectorAll('.rl-head')[head], square = part.querySelector('.rl-square');
        let box = square.getBoundingClientRect(), x = box.left + box.width * (k + 0.5) / 3;
        square.dispatchEvent(new MouseEvent('mousemove', {clientX: x, clientY: box.top + box.height * (q + 0.5) / 3}));
        let heads = [...document.querySelectorAll('.rl-head')];
        return heads.map(h => [h.offsetHeight > 0, h.querySelector('.rl-told').textContent]);
    }"""
    with browser_page() as page:
        page.open(page_file.as_uri())
        nothing = "queries down, keys across"
        assert page.evaluate(f"({point})(0, 1, 2, 1)") == [
            [False, nothing],
            [True, '"c" (2) → "b" (1): 0.500'],
            [True, nothing],
            [False, nothing],
        ]
        shown = page.evaluate(f"({point})(1, 0, 0, 0)")
        assert [text for _, text in shown][1:] == ['"c" (2) → "b" (1): 0.500', '"a" (0) → "a" (0): 0.250', nothing]
        assert page.evaluate("failures") == []
