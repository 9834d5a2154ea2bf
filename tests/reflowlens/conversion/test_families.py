"""Every family of decoders against transformers, and every tool on every family."""

from __future__ import annotations

import copy
import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import AutoModelForCausalLM

import analyses
import reflowlens as rl
from analyses.experiments.signal_flow.contributions import component_outputs, read_contributions
from analyses.words.lexicon import FactualPrompt, Lexicon
from reflowlens.checkpoints import load_model, save_model
from reflowlens.conversion import export_hf, import_hf
from reflowlens.conversion.families import FAMILIES
from reflowlens.conversion.layout import to_ours
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.models.decoder import Decoder
from reflowlens.storage.model_hash import model_hash
from tests.support.exactness import measure_model
from tests.support.families import NAMES, ours, quiet, theirs
from tests.support.tiny import assert_close, random_tokens

every_family = pytest.mark.parametrize("name", NAMES)
TOKENS = random_tokens(ours("llama").cfg, batch=2, pos=12)  # longer than the windows


def logits_of(hf: Any, tokens: Tensor) -> Tensor:
    """transformers' own, without padding: it would tell a text's end by it."""
    return hf(tokens, attention_mask=torch.ones_like(tokens)).logits


# ------------------------------------------------------------------------------------------------- against transformers


@every_family
def test_logits_and_loss(name: str) -> None:
    model, hf = ours(name), theirs(name)
    with torch.no_grad():
        assert_close(model(TOKENS), logits_of(hf, TOKENS))
        assert_close(model(TOKENS, return_type="loss"), hf(TOKENS, labels=TOKENS).loss)


@every_family
def test_gradients_of_every_parameter(name: str) -> None:
    """Theirs, laid out as our parameters are: of what multiplies by 1 + w they are those of w."""
    model, hf = ours(name), theirs(name)
    family = next(each for each in FAMILIES if each.class_name == type(hf).__name__)
    found = torch.autograd.grad(model(TOKENS, return_type="loss"), list(model.parameters()))
    parameters = dict(hf.named_parameters())
    gradients = torch.autograd.grad(hf(TOKENS, labels=TOKENS).loss, list(parameters.values()))
    stored = {family.aliases.get(key, key): value for key, value in zip(parameters, gradients, strict=True)}
    layout = family.layout(model.cfg)
    expected, none = (
        dict(
            to_ours(
                layout, {key: partial(torch.mul, value.double(), x) for key, value in stored.items()}, model.cfg, ""
            )
        )
        for x in (1.0, 0.0)
    )
    for (key, _), gradient in zip(model.named_parameters(), found, strict=True):
        if key.endswith("attn.b_K") and model.cfg.positional_embedding_type == "standard":
            assert gradient.abs().max() < 1e-7  # it moves all scores of a query alike
            continue
        factor = family.factor(hf.config, key)
        assert_close(gradient.double() * factor, expected[key] - none[key], what=key)


@every_family
def test_cached_generation_and_texts_of_several_lengths(name: str) -> None:
    """Token by token and in pieces as in one pass, and a text in a batch as alone: within windows and beyond."""
    model = ours(name)
    with torch.no_grad():
        whole = model(TOKENS)
        past = model.make_cache(len(TOKENS))
        steps = [model(part, past_kv_cache=past) for part in TOKENS.split([1, 5, 1, 1, 3, 1], dim=1)]
        assert_close(torch.cat(steps, dim=1), whole)
        texts = ["The film", "A longer text than", "x"]
        logits = model(texts)
        for row, text in enumerate(texts):
            assert_close(logits[row, : len(text)], model(text)[0])
        segments = torch.tensor([[0] * 5 + [1] * 7])
        packed = model(TOKENS[:1], segments=segments)
        assert_close(packed[:, 5:], model(TOKENS[:1, 5:]))
    prompt, never = TOKENS[:, :6], list(range(256, model.cfg.d_vocab))  # no bytes
    generated = theirs(name).generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=10, do_sample=False, suppress_tokens=never
    )
    assert model.generate(prompt, 10, temperature=0, return_type="tokens").equal(generated)


@every_family
def test_back_to_the_class_that_it_came_from(name: str, tmp_path: Path) -> None:
    model, hf = ours(name), theirs(name)
    with quiet():
        again = AutoModelForCausalLM.from_pretrained(export_hf(model, tmp_path / "hf")).eval()
    assert type(again) is type(hf)
    with torch.no_grad():
        assert_close(logits_of(again, TOKENS), logits_of(hf, TOKENS))


def folder_with(name: str, fields: dict[str, Any], folder: Path) -> Path:
    """The model as transformers saves it, further fields in its configuration."""
    with quiet():
        theirs(name).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    return folder


@pytest.mark.parametrize(
    ("name", "fields", "caps"),
    [
        ("gemma2", {"attn_logit_softcapping": 0.5}, (0.5, 30.0)),
        ("gemma3", {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 2.0}, (None, 2.0)),
        ("gemma2", {"layer_types": ["full_attention"] * 3}, (50.0, 30.0)),
        ("gemma3", {"layer_types": ["full_attention"] * 3}, (None, None)),
    ],
)
def test_caps_and_windows_of_gemma(
    name: str, fields: dict[str, Any], caps: tuple[float | None, ...], tmp_path: Path
) -> None:
    """As transformers computes it, which leaves Gemma 3's cap on scores out; it exports and reads back as the same."""
    folder = folder_with(name, fields, tmp_path / "hf")
    model = import_hf(folder, tokenizer="bytes")
    assert (model.cfg.attn_scores_soft_cap, model.cfg.output_logits_soft_cap) == caps
    exported = export_hf(model, tmp_path / "exported")
    again = import_hf(exported, tokenizer="bytes")
    assert again.cfg.to_dict() == model.cfg.to_dict() | {"model_name": "exported"}
    assert again(TOKENS).equal(model(TOKENS))
    with quiet(), torch.no_grad():
        for each in (folder, exported):
            hf = AutoModelForCausalLM.from_pretrained(each, attn_implementation="eager").eval()
            assert_close(model(TOKENS), logits_of(hf, TOKENS))


def test_a_cap_on_scores_is_not_exported_as_gemma_3(tmp_path: Path) -> None:
    capped = Decoder(dataclasses.replace(ours("gemma3").cfg, attn_scores_soft_cap=0.5))
    with pytest.raises(ReflowlensError, match="transformers has no class for it"):
        export_hf(capped, tmp_path / "hf")


@every_family
def test_checkpoints(name: str, tmp_path: Path) -> None:
    model = ours(name)
    again = load_model(save_model(tmp_path / "model", model))
    assert isinstance(again, Decoder)
    assert again.cfg.to_dict() == model.cfg.to_dict()
    assert model_hash(again) == model_hash(model)
    assert again(TOKENS).equal(model(TOKENS))


@every_family
def test_points_are_those_of_transformer_lens(name: str) -> None:
    """What its bridge around their model caches under our names, norms behind and parallel blocks among it."""
    model, hf = ours(name), copy.deepcopy(theirs(name))
    _, cache = build_bridge_from_module(hf, type(hf).__name__, hf_config=hf.config).run_with_cache(TOKENS)
    _, found = model.run_with_cache(TOKENS, names_filter=lambda point: True)
    streams = [f"hook_{at}" for at in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")]
    inside = ["attn.hook_q", "attn.hook_k", "attn.hook_z", "attn.hook_pattern", "mlp.hook_pre", "mlp.hook_post"]
    points = ["hook_embed", *(f"blocks.1.{point}" for point in (*streams, *inside))]
    assert [point for point in points if point in found] == [point for point in points if point in cache]
    for point in points:
        if point in found:
            assert_close(found[point], cache[point], what=point)


# ------------------------------------------------------------------------------------------------------ tools on each

CLEAN, CORRUPTED = random_tokens(ours("llama").cfg, batch=2, pos=5, seed=1), random_tokens(ours("llama").cfg, 2, 5, 2)
METRIC = rl.metrics.logit_diff(65, 66)
POINTS = {"resid_pre": "hook_resid_pre", "attn_head_out": "attn.hook_z", "mlp_out": "hook_mlp_out"}
POINTS |= {"attn_out": "hook_attn_out", "attn_head_k": "attn.hook_k", "resid_post": "hook_resid_post"}


def difference(logits: Tensor) -> Tensor:
    return logits[:, -1, 65] - logits[:, -1, 66]


@every_family
def test_sweeps_are_whole_passes_with_plain_hooks(name: str) -> None:
    for grid in POINTS:
        check_sweep(ours(name), grid)


def check_sweep(model: HookedModel, grid: str) -> None:
    _, clean = model.run_with_cache(CLEAN, names_filter=lambda point: point.endswith(POINTS[grid]))
    found = rl.sweep(model, CLEAN, CORRUPTED, grid, METRIC)
    cells = list(zip(found.index_df.itertuples(), found.values.flatten(0, -2), strict=True))
    for cell, values in cells[::3]:
        point = f"blocks.{cell.layer}.{POINTS[grid]}"
        of_heads = hasattr(cell, "head")
        where = (slice(None), slice(None), cell.head) if of_heads else (slice(None), cell.pos)

        def patch(x: Tensor, hook: Any, where: Any = where, point: str = point) -> Tensor:
            x = x.clone()
            x[where] = clean[point][where]
            return x

        with torch.no_grad(), model.hooks([(point, patch)]):
            assert_close(values, difference(model(CORRUPTED)))


@every_family
def test_gradient_sweeps_are_first_orders(name: str) -> None:
    model, points = ours(name), [f"blocks.{layer}.attn.hook_z" for layer in range(3)]
    found = rl.sweep(model, CLEAN, CORRUPTED, "attn_head_out", METRIC, mode="gradient")
    _, clean = model.run_with_cache(CLEAN, names_filter=points)
    fired: list[Tensor] = []
    with model.hooks([(point, lambda x, hook: fired.append(x)) for point in points]):
        gradients = torch.autograd.grad(difference(model(CORRUPTED)).sum(), fired)
    for layer, (point, before, gradient) in enumerate(zip(points, fired, gradients, strict=True)):
        effect = ((clean[point] - before) * gradient).sum(dim=(1, 3)).T
        assert_close(found.effect()[layer], effect)


@every_family
def test_the_stream_is_the_sum_of_what_is_written_and_logits_of_directions(name: str) -> None:
    model = ours(name)
    with torch.no_grad():
        logits, cache = model.run_with_cache(TOKENS)
        before_cap = logits
        if model.cfg.output_logits_soft_cap is not None:
            cap = model.cfg.output_logits_soft_cap
            before_cap = cap * torch.atanh(logits.double() / cap).float()
        parts, labels = cache.decompose_resid(return_labels=True)
        assert_close(parts.sum(0), cache["resid_post", -1])
        assert len(labels) == 7 + ("pos_embed" in labels)
        found = cache.logit_attrs(parts, tokens=TOKENS[:, 0], has_batch_dim=True).sum(0)
        norm, token = model.ln_final, TOKENS[:, 0]
        constant = model.b_U[token] + (0 if norm.b is None else model.W_U[:, token].T @ norm.b)
        expected = before_cap.gather(-1, token[:, None, None].expand(-1, TOKENS.shape[1], 1))[..., 0]
        assert_close(found + constant[:, None], expected)
        if model.cfg.has_post_norms:
            with pytest.raises(ReflowlensError, match="stack_head_results is of heads and neurons that are added"):
                cache.stack_head_results(layer=-1)
        elif model.cfg.parallel_attn_mlp:
            with pytest.raises(ReflowlensError, match="here both read resid_pre: leave it out"):
                cache.decompose_resid(layer=1, mlp_input=True)
        view = rl.signal_view(model)
        assert_close(view.logits(view.readout(cache["resid_post", -1])), logits)
        contributed = view.contributions(cache["resid_post", -1][:, -1], TOKENS[:, 0]).sum(-1)
        assert_close(contributed + view.bias_of(token), expected[:, -1])
        svd = rl.signal_view(model, "svd")
        assert_close(svd.logits(svd.readout(cache["resid_post", -1])), logits)


@every_family
@pytest.mark.filterwarnings("ignore:the model does not do this task")
def test_edges(name: str) -> None:
    """Exact edges against plain hooks; with all of them the model is whole. Norms behind heads have none."""
    model = ours(name)
    if model.cfg.has_post_norms:
        with pytest.raises(ReflowlensError, match="heads of this model write passes a norm together"):
            rl.edge_attribution(model, CLEAN, CORRUPTED, METRIC)
        return
    graph = rl.Graph.of(model)
    whole = rl.faithfulness(model, CLEAN, CORRUPTED, graph.edges, METRIC, controls=0)
    assert abs(whole.value - 1) < 1e-4
    receivers = ["m1", "a1.h3<q>", "a2.h0<k>", "a2.h0<v>", "m2", "logits"]
    edges = [("a0.h1", receiver) for receiver in receivers] + [("m0", "a1.h0<k>")]
    edges += [("a1.h0", "m1")] * (not model.cfg.parallel_attn_mlp)
    assert (("a1.h0", "m1") in graph.edges) != model.cfg.parallel_attn_mlp
    exact = rl.exact_edges(model, CLEAN, CORRUPTED, METRIC, edges=edges)
    estimated = rl.edge_attribution(model, CLEAN, CORRUPTED, METRIC, mode="gradient")
    points = list(graph.sender_points)
    caches = [model.run_with_cache(tokens, names_filter=points)[1] for tokens in (CLEAN, CORRUPTED)]
    for sender, receiver in edges:
        (wrote, read), s, r = graph.places((sender, receiver)), graph.sender(sender), graph.receiver(receiver)
        change = caches[0][wrote.point] - caches[1][wrote.point]
        change = change if wrote.head is None else change[:, :, wrote.head]
        size = torch.zeros((), requires_grad=True)

        def add(
            x: Tensor, hook: Any, head: int | None = read.head, change: Tensor = change, by: Tensor = size
        ) -> Tensor:
            added = torch.zeros_like(x)
            added[(..., slice(None)) if head is None else (slice(None), slice(None), head)] = change
            return x + by * added

        with model.hooks([(read.point, add)]):
            slope = [torch.autograd.grad(each, size, retain_graph=True)[0] for each in difference(model(CORRUPTED))]
        torch.testing.assert_close(estimated.values[s, r], torch.stack(slope), rtol=1e-4, atol=3e-6)
        with torch.no_grad():
            effect = -difference(model(CORRUPTED))
            with model.hooks([(read.point, lambda x, hook, add=add: add(x, hook, by=torch.ones(())))]):
                effect = effect + difference(model(CORRUPTED))
        torch.testing.assert_close(exact.values[s, r], effect, rtol=1e-4, atol=3e-6)
    later = [node for node, place in graph.sender_places.items() if place.stage > 0]
    paths = rl.path_patch(model, CLEAN, CORRUPTED, "a0.h1", "logits", METRIC, through=later)
    whole_head = rl.sweep(model, CLEAN, CORRUPTED, [rl.Patch("z", layer=0, head=1)], METRIC)
    torch.testing.assert_close(paths.effect()[0], whole_head.effect()[0], rtol=1e-4, atol=3e-6)


@every_family
@pytest.mark.parametrize("nodes", ["neurons", "heads and neurons"])
def test_attribution_graphs(name: str, nodes: str) -> None:
    """Under held patterns and norms every edge is autograd's, and edges add up to logits in front of a cap."""
    worst = measure_model(ours(name), nodes)
    assert worst.sums < 1e-4
    assert worst.edges < 1e-5
    assert worst.values < 1e-5


@every_family
def test_why_a_head_looks_where_it_does(name: str) -> None:
    """Norms of queries and keys, turns, windows and scales: parts add up to the score in front of a cap."""
    model, tokens = ours(name), TOKENS[0, :6]
    graph = rl.attribute(model, tokens, neurons=8, progress=False)
    _, cache = model.run_with_cache(tokens, names_filter=lambda point: point.endswith("hook_attn_scores"))
    cap = model.cfg.attn_scores_soft_cap
    for layer in range(3):
        scores = cache[f"blocks.{layer}.attn.hook_attn_scores"][0, 3, 5]
        hidden = scores == -torch.inf
        scores = scores if cap is None else cap * (scores.double() / cap).atanh()
        for key in (5, 4, 0):
            if hidden[key]:
                with pytest.raises(ReflowlensError, match="key 0 lies outside of the window of query 5"):
                    graph.why_attended(layer, 3, 5, key)
                continue
            why = graph.why_attended(layer, 3, 5, key, top=7)
            for total in (why.score, why.pairs["weight"].sum(), why.queries["weight"].sum(), why.keys["weight"].sum()):
                assert abs(total - scores[key].item()) < 1e-4 * scores[~hidden].abs().max()


@every_family
def test_sizes_and_a_training_step(name: str) -> None:
    """As many parameters as theirs; a copy is trained, in which a norm that two readers share is one, too."""
    model = ours(name)
    rows = 2 * model.cfg.d_model * (name == "opt")  # of positions that no token has
    assert model.n_parameters == sum(parameter.numel() for parameter in theirs(name).parameters()) - rows
    trained = copy.deepcopy(model).train()
    optimiser = torch.optim.SGD(trained.parameters(), lr=0.05)
    losses = []
    for _ in range(3):
        loss = trained(TOKENS, return_type="loss")
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]
    with torch.no_grad():
        assert abs(model(TOKENS, return_type="loss").item() - losses[0]) < 1e-5 * losses[0]
    assert all(parameter.grad is not None for parameter in trained.parameters())


@every_family
def test_heads_add_up_to_what_attention_adds(name: str) -> None:
    """Behind norms too, whose divisors are held; biases apart."""
    parts = component_outputs(ours(name), TOKENS)
    biases = [block.attn.b_O for block in ours(name).blocks]
    reading = read_contributions(rl.signal_view(ours(name)), TOKENS)
    assert reading.sum_error() < 1e-5
    assert reading.split_error() < 1e-5
    for layer, bias in enumerate(biases):
        assert_close(parts.heads[layer].sum(0) + (0 if bias is None else bias), parts.attention[layer])


@pytest.mark.parametrize("name", ["gemma3", "gptj", "gpt_neo"])
def test_experiments_run(name: str) -> None:
    lexicon = Lexicon("test", factual=tuple(FactualPrompt(f"{letter}bcdefgh", letter.lower()) for letter in "ABCDE"))
    result = analyses.layer_evolution(ours(name), "Abcdefgh", "i", lexicon=lexicon)
    assert 0 < result.metrics["target_probability"] < 1


def test_operations_of_windows_and_tables_of_layers_that_turn() -> None:
    cfg = ours("gemma3").cfg
    seen = [sum(min(p + 1, 3 if local else 10) for p in range(10)) / 10 for local in (True, False, True)]
    assert Decoder.forward_flops(cfg, 10, 1)["attention_mixing"] == pytest.approx(4 * 4 * 8 * sum(seen))
    for name, layers in (("smollm3", 2), ("gemma3", 3)):
        tables = [attn for block in ours(name).blocks if (attn := block.attn.rotary) is not None]
        assert len(tables) == layers
        held = sum(4 * table.numel() for rotary in tables for table in (rotary.cos, rotary.sin))
        assert Decoder.table_bytes(ours(name).cfg) == held


# -------------------------------------------------------------------------------------------------- what cannot be read


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        (
            "opt",
            {"do_layer_norm_before": False},
            "do_layer_norm_before is False, and a OPTForCausalLM can be read with",
        ),
        ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim is 16, and a OPTForCausalLM can be read with 32"),
        ("phi", {"qk_layernorm": True}, "qk_layernorm is True"),
        ("cohere", {"use_qk_norm": True}, "use_qk_norm is True"),
        ("cohere", {"logit_scale": -0.5}, r"ln_final\.w is multiplied by must be a positive number, got -0\.5"),
        (
            "granite",
            {"attention_multiplier": 0.0},
            r"json: attention_multiplier must be a positive number, got 0\.0",
        ),
        ("granite", {"logits_scaling": 0.0}, r"json: logits_scaling must be a positive number, got 0\.0"),
        ("granite", {"residual_multiplier": 0.0}, r"attn\.W_O is multiplied by must be a positive number, got 0\.0"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        (
            "olmo2",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
            "scaling 'yarn' cannot",
        ),
        ("gemma3", {"layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
        ("qwen3", {"model_type": "qwen3_moe", "num_experts": 8}, r"Qwen3ForCausalLM \(a mixture of experts\): "),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(
    name: str, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ReflowlensError, match=message) as error:
        import_hf(folder_with(name, fields, tmp_path), tokenizer="bytes")
    assert "\n" not in str(error.value)
