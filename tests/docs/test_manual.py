"""The documentation agrees with the code: its blocks run, its hook points are the models', its errors are raised."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from docs.generated import error_messages, messages_table, metric_definitions, verdict_rules
from reflowlens.config import ModelConfig
from reflowlens.models import build_model
from reflowlens.models.base import HookedModel
from reflowlens.tokenizers.by_name import get_tokenizer
from reflowlens.ttt_flow_config import TTTFlowConfig
from tests.support import ROOT
from tests.support.tiny import random_model, random_tokens

DOCS = ROOT / "docs"
HOW_TO = sorted(f"how-to/{path.name}" for path in (DOCS / "how-to").glob("*.md"))
PAGES = ["index.md", "tutorial.md", "speed.md", *HOW_TO]
NO_RUN = "# no-run"
LONG = {
    "how-to/compare.md": [pytest.mark.slow, pytest.mark.by_hand],
    "how-to/dictionary-views.md": [pytest.mark.slow],
    "how-to/long-runs.md": [pytest.mark.slow],
    "how-to/prompts.md": [pytest.mark.slow],
    "how-to/standard-measures.md": [pytest.mark.slow],
}


def text_of(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf8")


def code_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text_of(page), flags=re.DOTALL)


def test_every_page_that_teaches_has_code():
    assert len(PAGES) >= 11
    assert all(code_of(page) for page in PAGES)


@pytest.mark.parametrize("page", [pytest.param(page, marks=LONG.get(page, [])) for page in PAGES])
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = [block for block in code_of(page) if not block.startswith(NO_RUN)]
    exec(compile("\n".join(blocks), page, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("page", PAGES)
def test_what_does_not_run_is_code_all_the_same_and_says_why(page):
    for block in code_of(page):
        if block.startswith(NO_RUN):
            compile(block, page, "exec")
            assert re.match(rf"{NO_RUN}: \w+", block)


def test_the_experiment_of_the_page_can_come_out_either_way():
    """Enough pairs to be judged; supported where every pair has a signal of its own, in this basis alone."""
    scope: dict[str, Any] = {}
    exec("\n".join(code_of("how-to/your-own-experiment.md")[:2]), scope)
    model = random_model("reflow")
    assert scope["shared_signal"](model).verdicts["shared"] == "not supported"

    def planted(view, streams):
        return np.arange(len(streams)) if view.name == "native" else streams.sum(dim=-1).numpy()

    scope["strongest_signal"] = planted
    result = scope["shared_signal"](model)
    assert result.controls["shared"] == {"other_pairs": 0, "rotated_basis": 0}
    assert result.verdicts["shared"] == "supported"
    nouns = get_tokenizer("gpt2_16k")
    assert all(nouns.is_single_token(f" {prompt.split()[1]}") for pair in scope["PAIRS"] for prompt in pair)


# -- hook points ------------------------------------------------------------------------------------------------------


def documented_points() -> dict[str, dict[str, str]]:
    """section -> point -> its shape as the page writes it."""
    sections = re.split(r"^#{2,3} .*\{ #(.+?) \}$", text_of("hooks.md"), flags=re.MULTILINE)
    names, texts = sections[1::2], sections[2::2]
    return {
        name: dict(re.findall(r"^\| `([\w.{}]+)` \| ([^|]+?) \|", text, flags=re.MULTILINE))
        for name, text in zip(names, texts, strict=True)
    }


def sections_of(model: HookedModel) -> list[str]:
    """Which sections of the page a model's points are described in."""
    cfg = model.cfg
    ends = ["ends", "stream"] + ["reflow"] * cfg.architecture.startswith("reflow")
    if cfg.architecture == "bdh":
        return [*ends, "bdh"]
    rotary = cfg.positional_embedding_type == "rotary"
    own_keys = cfg.kv_heads == cfg.n_heads
    sections = [*ends, "final-norm", "attention", "mlp", "rotary" if rotary else "positions"]
    return sections + ["gated"] * cfg.gated_mlp + ["own-keys"] * own_keys


def test_the_page_names_the_points_of_every_architecture_and_no_others(model):
    check_points(model)


def test_the_page_names_the_points_of_bdh_and_their_shapes():
    sizes = {"n_layers": 2, "d_model": 16, "n_heads": 2, "d_head": 24, "d_mlp": 48, "d_vocab": 256, "n_ctx": 32}
    cfg = ModelConfig(architecture="bdh", tie_word_embeddings=False, tokenizer_name="bytes", **sizes)
    bdh = build_model(cfg)
    check_points(bdh)
    check_shapes(bdh, random_tokens(cfg))


def test_the_page_names_the_points_of_a_refined_model_and_their_shapes():
    own = TTTFlowConfig(ttt_heads=2, ttt_chunk=4, flow_width=6, value_layers=2, exclusive_layers=2, rotary_channels=4)
    sizes = {"n_layers": 4, "d_model": 16, "n_heads": 4, "d_head": 6, "d_mlp": 20, "d_vocab": 256, "n_ctx": 32}
    cfg = ModelConfig(architecture="ttt_flow", tokenizer_name="bytes", n_key_value_heads=2, ttt_flow=own, **sizes)
    model, tokens = build_model(cfg), random_tokens(cfg)
    names = ("ends", "stream", "final-norm", "attention", "mlp", "rotary", "ttt-flow")
    described = {point: shape for name in names for point, shape in documented_points()[name].items()}
    plain = [re.sub(r"^blocks\.\d+", "blocks.{l}", name) for name in model.hook_dict]
    assert set(described) == {re.sub(r"steps\.\d+", "steps.{m}", name) for name in plain}
    _, cache = model.run_with_cache(tokens, names_filter=lambda name: True)
    letters = {"B": len(tokens), "T": tokens.shape[1], "d": 16, "H": 4, "K": 2, "h": 6, "M": 20, "1": 1}
    letters |= {"P": 2, "f": 8, "b": 4, "w": 6, "u": 256, "V": 256}
    for point, shape in described.items():
        found = cache[point.format(l=2, m=0)].shape
        assert list(found) == [letters[axis] for axis in shape.split(", ")], point


def test_the_page_names_the_points_that_options_add_and_their_shapes():
    sizes = {"n_layers": 2, "d_model": 16, "n_heads": 4, "d_head": 6, "d_mlp": 20, "d_vocab": 256, "n_ctx": 32}
    plain = ModelConfig(architecture="decoder", tokenizer_name="bytes", n_key_value_heads=2, **sizes)
    given = {"use_qk_norm": True, "use_normalization_before_and_after": True, "output_logits_soft_cap": 5.0}
    model = build_model(dataclasses.replace(plain, **given))
    added, described = set(model.hook_dict) - set(build_model(plain).hook_dict), documented_points()["options"]
    assert {re.sub(r"^blocks\.\d+", "blocks.{l}", name) for name in added} == set(described)
    tokens = random_tokens(plain)
    _, cache = model.run_with_cache(tokens, names_filter=lambda name: True)
    letters = {"B": len(tokens), "T": tokens.shape[1], "d": 16, "H": 4, "K": 2, "h": 6, "1": 1, "V": 256}
    for point, shape in described.items():
        name = point.format(l=1)
        assert list(cache[name].shape) == [letters[axis] for axis in shape.split(", ")], point
        assert len(model.hook_axes(name)) == cache[name].ndim


def check_points(model: HookedModel) -> None:
    page = documented_points()
    described = [point for section in sections_of(model) for point in page[section]]
    actual = {re.sub(r"^blocks\.\d+", "blocks.{l}", name) for name in model.hook_dict}
    assert set(described) == actual
    assert len(described) == len(actual)


def test_the_shapes_on_the_page_are_those_of_a_pass(model, tokens):
    check_shapes(model, tokens)


def check_shapes(model: HookedModel, tokens: Tensor) -> None:
    cfg = model.cfg
    sizes = {"B": tokens.shape[0], "T": tokens.shape[1], "d": cfg.d_model, "H": cfg.n_heads, "K": cfg.kv_heads}
    sizes |= {"h": cfg.d_head, "N": cfg.d_head, "M": cfg.d_mlp, "S": cfg.n_signals, "1": 1}
    _, cache = model.run_with_cache(tokens, names_filter=lambda name: True)
    for section in sections_of(model):
        for point, shape in documented_points()[section].items():
            assert list(cache[point.format(l=1)].shape) == [sizes[axis] for axis in shape.split(", ")], point


# -- errors -----------------------------------------------------------------------------------------------------------


def quoted_messages() -> list[str]:
    """The first column of the tables of errors, as text."""
    rows = re.findall(r"^\| `(.+?)` \| .+? \| .+? \|$", text_of("errors.md"), flags=re.MULTILINE)
    return [row.replace("&#124;", "|") for row in rows]


def fixed_text() -> list[str]:
    """What is written out of each message of the code, in one piece: what it fills in is an ellipsis."""
    return [message.shown for message in error_messages()]


def test_every_quoted_message_is_raised_somewhere():
    quoted = quoted_messages()
    assert len(quoted) >= 150
    raised = fixed_text()
    missing = [text for text in quoted if not any(matches(text, message) for message in raised)]
    assert not missing


def matches(quoted: str, message: str) -> bool:
    """Whether a quotation is a message's text, or its beginning up to a final ellipsis."""
    return message == quoted or (quoted.endswith("…") and message.startswith(quoted[:-1].rstrip()))


def test_a_quotation_that_nothing_raises_is_found():
    assert not any(matches("no hook …: this model has layers", message) for message in fixed_text())


def test_most_messages_are_explained_and_all_are_listed():
    quoted, messages = quoted_messages(), error_messages()
    explained = [message for message in messages if any(matches(text, message.shown) for text in quoted)]
    assert len(explained) >= 0.5 * len(messages)
    assert messages_table().count("\n| ") == len(messages) + len({message.module for message in messages})


# -- generated parts --------------------------------------------------------------------------------------------------


def test_every_experiment_says_how_its_metrics_are_defined():
    from analyses.registry import EXPERIMENTS

    for experiment in EXPERIMENTS.values():
        definitions = metric_definitions(experiment.name)
        assert len(definitions) >= 3, experiment.name
        assert all(len(text) > 10 for text in definitions.values())


def test_rules_of_verdicts_are_those_in_the_code():
    from analyses.experiments.layer_evolution.experiment import crystallisation_verdict

    assert "`analyses.experiments.layer_evolution.experiment.crystallisation_verdict`" in verdict_rules()
    assert (crystallisation_verdict.__doc__ or "").split(".")[0] in verdict_rules()


def test_the_full_list_of_messages_shows_what_is_written_out():
    assert "no hook …: this model has blocks 0 to …" in messages_table()


def test_no_page_names_a_path_of_one_machine():
    for page in DOCS.rglob("*.md"):
        assert not re.search(r"/(home|root|work|tmp|Users)/", page.read_text(encoding="utf8")), page


def test_docstrings_become_markdown():
    pytest.importorskip("griffe", reason="the docs extra is not installed")
    from docs.roles import to_markdown

    assert to_markdown("Use :class:`~a.B`.\n\n>>> 1 + 1\n2") == "Use `a.B`.\n\n```pycon\n>>> 1 + 1\n2\n```"
    table = "=====  ====\nname   what\n=====  ====\n``R``  long\n       text\n=====  ===="
    assert to_markdown(table) == "| name | what |\n| --- | --- |\n| `R` | long text |"
