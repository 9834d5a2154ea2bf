"""TransformerLens's own tools, on every architecture as it is: that they run, and that their numbers are right."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens import SVDInterpreter, patching
from transformer_lens.tools.analysis import attribution_patch, direct_logit_attribution, faithfulness
from transformer_lens.tools.analysis import logit_lens as logit_lens_tool
from transformer_lens.tools.analysis.attribution_patching import EdgeAttributionConfig, FaithfulnessConfig
from transformer_lens.tools.analysis.logit_lens import logit_readout

from reflowlens.activations.cache import ActivationCache
from reflowlens.models.base import HookedModel
from tests.support.tiny import assert_close, bias, in_turn, random_tokens

POS = 4
TARGET, WRONG = 65, 66


def difference(logits: Tensor) -> Tensor:
    """Mean logit difference at the last position."""
    return (logits[:, -1, TARGET] - logits[:, -1, WRONG]).mean()


def assert_same_effect(actual: Tensor, expected: Tensor) -> None:
    """Differences of logits, which are of size 1, may be small themselves."""
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def of_final_bias(model: HookedModel) -> Tensor:
    """[d_vocab], what the biases of the final norm and of the readout add to each logit: no part of the stream does."""
    return bias(model.ln_final.b).expand(model.cfg.d_model) @ model.W_U + model.b_U


@pytest.fixture
def clean(model: HookedModel) -> Tensor:
    return random_tokens(model.cfg, pos=POS, seed=1)


@pytest.fixture
def corrupted(clean: Tensor) -> Tensor:
    """Another token at position 1."""
    changed = clean.clone()
    changed[:, 1] = (changed[:, 1] + 7) % 256
    return changed


@pytest.fixture
def clean_cache(model: HookedModel, clean: Tensor) -> ActivationCache:
    """Everything, attention patterns included: the pattern sweeps read them."""
    with torch.no_grad():
        return model.run_with_cache(clean, names_filter=lambda name: True)[1]


@pytest.fixture(autouse=True)
def _no_gradients_unless_asked() -> Any:
    with torch.no_grad():
        yield


# ------------------------------------------------------------------------------------------------------------- patching

AXES = {
    "get_act_patch_resid_pre": "layer pos",
    "get_act_patch_resid_mid": "layer pos",
    "get_act_patch_attn_out": "layer pos",
    "get_act_patch_mlp_out": "layer pos",
    "get_act_patch_attn_head_out_by_pos": "layer pos head",
    "get_act_patch_attn_head_q_by_pos": "layer pos head",
    "get_act_patch_attn_head_k_by_pos": "layer pos kv",
    "get_act_patch_attn_head_v_by_pos": "layer pos kv",
    "get_act_patch_attn_head_pattern_by_pos": "layer head pos",
    "get_act_patch_attn_head_pattern_dest_src_pos": "layer head pos pos",
    "get_act_patch_attn_head_out_all_pos": "layer head",
    "get_act_patch_attn_head_q_all_pos": "layer head",
    "get_act_patch_attn_head_k_all_pos": "layer kv",
    "get_act_patch_attn_head_v_all_pos": "layer kv",
    "get_act_patch_attn_head_pattern_all_pos": "layer head",
    "get_act_patch_attn_head_all_pos_every": "5 layer head",
    "get_act_patch_attn_head_by_pos_every": "5 layer pos head",
    "get_act_patch_block_every": "3 layer pos",
}


def test_no_sweep_is_left_out() -> None:
    sweeps = {name for name in dir(patching) if name.startswith("get_act_patch_")}
    direct = {"get_act_patch_direct_path", "get_act_patch_direct_path_all_sources"}
    assert sweeps == set(AXES) | direct


@pytest.mark.parametrize(("model", "name"), in_turn(AXES, always=("reflow_lite", "gpt2_biased")), indirect=["model"])
def test_patching_sweeps(
    model: HookedModel, clean: Tensor, corrupted: Tensor, clean_cache: ActivationCache, name: str
) -> None:
    """Patching a run with itself changes nothing; patching the other run changes something."""
    cfg, sweep = model.cfg, getattr(patching, name)
    size = {"layer": cfg.n_layers, "pos": POS, "head": cfg.n_heads, "kv": cfg.kv_heads, "5": 5, "3": 3}
    effects = sweep(model, corrupted, clean_cache, difference)
    assert effects.shape == tuple(size[axis] for axis in AXES[name].split())
    before, after = difference(model(corrupted)), difference(model(clean))
    changed = (effects - before).abs() > 1e-5
    assert changed.any()
    itself = sweep(model, clean, clean_cache, difference)
    if not name.endswith("head_all_pos_every") and not name.endswith("by_pos_every"):
        assert_same_effect(itself, after.expand_as(itself))
    else:  # TransformerLens pads keys and values of grouped heads with zeros
        real = itself != 0
        assert_same_effect(itself[real], after.expand_as(itself[real]))
        assert (~real).sum() == 2 * itself[0].numel() * (1 - cfg.kv_heads / cfg.n_heads)


def test_patching_the_residual_stream(
    model: HookedModel, clean: Tensor, corrupted: Tensor, clean_cache: ActivationCache
) -> None:
    """Each cell is the rest of the model on the patched stream, and a whole clean stream is the clean run."""
    effects = patching.get_act_patch_resid_pre(model, corrupted, clean_cache, difference)
    for layer in range(model.cfg.n_layers):
        stream = model(corrupted, stop_at_layer=layer)
        for p in range(POS):
            patched = stream.clone()
            patched[:, p] = clean_cache["resid_pre", layer][:, p]
            assert_same_effect(effects[layer, p], difference(model(patched, start_at_layer=layer)))
    assert_same_effect(effects[0, 0], difference(model(corrupted)))  # the runs are the same up to there
    assert_same_effect(effects[0, 1], difference(model(clean)))  # the one token in which they differ

    whole = patching.generic_activation_patch(
        model,
        corrupted,
        clean_cache,
        difference,
        lambda _, index, cache: cache,
        "resid_pre",
        index_axis_names=["layer"],
    )
    assert_same_effect(whole, difference(model(clean)).expand_as(whole))


def test_patching_a_head_is_adding_what_it_writes(
    model: HookedModel, corrupted: Tensor, clean_cache: ActivationCache
) -> None:
    effects = patching.get_act_patch_attn_head_out_all_pos(model, corrupted, clean_cache, difference)
    _, cache = model.run_with_cache(corrupted)
    for layer, block in enumerate(model.blocks):
        change = torch.einsum("bphe,hed->bphd", clean_cache["z", layer] - cache["z", layer], block.attn.W_O)
        for head in range(model.cfg.n_heads):
            middle = cache["resid_mid", layer] + change[:, :, head]
            stream = middle + block.mlp(block.ln2(middle))
            patched = model(stream, start_at_layer=layer + 1)
            assert_same_effect(effects[layer, head], difference(patched))


def test_patching_result_with_statistics(
    model: HookedModel, clean: Tensor, corrupted: Tensor, clean_cache: ActivationCache
) -> None:
    def each(logits: Tensor) -> Tensor:
        return logits[:, -1, TARGET] - logits[:, -1, WRONG]

    result = patching.get_act_patch_resid_pre(model, corrupted, clean_cache, each, reduce="none", baseline=True)
    recovered = result.normalized(each(model(clean)))
    assert_close(recovered[0, 1], torch.ones(2), 1e-4)
    assert result.effect()[0, 0].abs().max() < 1e-4
    assert len(result.to_dataframe()) == model.cfg.n_layers * POS * 2


def test_direct_paths(model: HookedModel, clean: Tensor, corrupted: Tensor, clean_cache: ActivationCache) -> None:
    """Source head -> one head's query input, against changing that query by hand."""
    _, cache = model.run_with_cache(corrupted)
    arguments = (model, corrupted, clean_cache, cache, difference)
    effects = patching.get_act_patch_direct_path(*arguments, src_layer=0, src_head=1, component="q", verbose=False)
    assert (effects[0] == 0).all()
    delta = (clean_cache["z", 0][:, :, 1] - cache["z", 0][:, :, 1]) @ model.blocks[0].attn.W_O[1]
    block = model.blocks[1]
    for head in range(model.cfg.n_heads):
        b_Q = bias(block.attn.b_Q)
        query = block.ln1(cache["resid_pre", 1] + delta) @ block.attn.W_Q[head] + b_Q[head % len(b_Q)]

        def replace(q: Tensor, hook: Any, head: int = head, query: Tensor = query) -> Tensor:
            return torch.cat([q[:, :, :head], query[:, :, None], q[:, :, head + 1 :]], dim=2)

        by_hand = model.run_with_hooks(corrupted, fwd_hooks=[("blocks.1.attn.hook_q", replace)])
        assert_same_effect(effects[1, head], difference(by_hand))
    every = patching.get_act_patch_direct_path_all_sources(*arguments, verbose=False)
    assert_same_effect(every[0, 1], effects)
    grouped = model.cfg.kv_heads != model.cfg.n_heads
    for component in ("k", "v"):
        with pytest.raises(ValueError, match="GQA") if grouped else contextlib.nullcontext():
            patching.get_act_patch_direct_path(*arguments, src_layer=0, src_head=0, component=component, verbose=False)
    assert not model.cfg.use_split_qkv_input


# ------------------------------------------------------------------------------------------------------ ActivationCache


def test_residual_stream_is_the_sum_of_its_parts(model: HookedModel, clean: Tensor) -> None:
    _, cache = model.run_with_cache(clean)
    n_layers, final = model.cfg.n_layers, cache["resid_post", -1]
    accumulated, labels = cache.accumulated_resid(incl_mid=True, return_labels=True)
    assert labels == ["0_pre", "0_mid", "1_pre", "1_mid", "final_post"]
    assert torch.equal(accumulated[-1], final)  # stacked, nothing is computed
    components, labels = cache.decompose_resid(return_labels=True)
    learned = ["pos_embed"] if model.cfg.positional_embedding_type == "standard" else []
    assert labels == ["embed", *learned, "0_attn_out", "0_mlp_out", "1_attn_out", "1_mlp_out"]
    assert_close(components.sum(0), final)
    assert_close(cache.decompose_resid(1, mlp_input=True).sum(0), cache["resid_mid", 1])
    for layer in range(n_layers):
        block = model.blocks[layer]
        heads = cache.stack_head_results(layer + 1)[-model.cfg.n_heads :]
        assert_close(heads.sum(0) + bias(block.attn.b_O), cache["attn_out", layer])
        neurons = cache.stack_neuron_results(layer + 1)[-model.cfg.d_mlp :]
        assert_close(neurons.sum(0) + bias(block.mlp.b_out), cache["mlp_out", layer])
    for expand in (True, False):
        assert_close(cache.get_full_resid_decomposition(expand_neurons=expand).sum(0), final)
        whole = cache.get_full_resid_decomposition(1, mlp_input=True, expand_neurons=expand)
        assert_close(whole.sum(0), cache["resid_mid", 1])


def test_parts_of_the_normalised_stream(model: HookedModel, clean: Tensor, clean_cache: ActivationCache) -> None:
    """With the cached scale, parts sum to what ln1, ln2 and the final norm put out before their weights."""
    inputs: list[tuple[int, bool, str]] = [
        (1, False, "blocks.1.ln1"),
        (1, True, "blocks.1.ln2"),
        (-1, False, "ln_final"),
    ]
    for layer, mlp_input, norm in inputs:
        parts = clean_cache.decompose_resid(layer, mlp_input=mlp_input, apply_ln=True)
        assert_close(parts.sum(0), clean_cache[f"{norm}.hook_normalized"], what=norm)
    heads = clean_cache.stack_head_results(apply_ln=True, incl_remainder=True, pos_slice=-1)
    assert_close(heads.sum(0), clean_cache["ln_final.hook_normalized"][:, -1])
    direction = model.tokens_to_residual_directions(TARGET)
    projected = clean_cache.stack_neuron_results(
        -1, apply_ln=True, incl_remainder=True, project_output_onto=direction, pos_slice=-1
    )
    assert_close(projected.sum(0), model(clean)[:, -1, TARGET] - of_final_bias(model)[TARGET])


def test_logit_attributions_sum_to_the_logit(model: HookedModel, clean: Tensor) -> None:
    logits, cache = model.run_with_cache(clean)
    stack = cache.decompose_resid()
    logits = logits - of_final_bias(model)
    targets = torch.tensor([70, 80])
    assert_close(cache.logit_attrs(stack, TARGET).sum(0), logits[..., TARGET])
    assert_close(cache.logit_attrs(stack, "A").sum(0), logits[..., TARGET])
    assert_close(
        cache.logit_attrs(stack, targets).sum(0), torch.stack([logits[i, :, t] for i, t in enumerate(targets)])
    )
    assert_close(
        cache.logit_attrs(stack, TARGET, incorrect_tokens=WRONG).sum(0), logits[..., TARGET] - logits[..., WRONG]
    )


@pytest.mark.parametrize("unit", ["component", "head"])
def test_direct_logit_attribution(model: HookedModel, clean: Tensor, unit: str) -> None:
    logits = model(clean) - of_final_bias(model)
    result = direct_logit_attribution(model, clean, TARGET, unit=unit)
    assert_close(result.attribution.sum(0), logits[:, -1, TARGET])
    assert len(result.labels) == len(result.attribution)
    against = direct_logit_attribution(model, clean, "A", "B", unit=unit, pos=None)
    assert_close(against.attribution.sum(0), logits[..., TARGET] - logits[..., WRONG])


def test_direct_logit_attribution_by_layer_ends_at_the_logit(model: HookedModel, clean: Tensor) -> None:
    result = direct_logit_attribution(model, clean, TARGET, unit="layer")
    assert_close(result.attribution[-1], model(clean)[:, -1, TARGET] - of_final_bias(model)[TARGET])


def test_lenses(model: HookedModel, clean: Tensor) -> None:
    """The last entry is the model's own prediction, an earlier one the model with the blocks after it left out."""
    logits, cache = model.run_with_cache(clean)
    early = model(model(clean, stop_at_layer=1), start_at_layer=model.cfg.n_layers)
    lenses = [
        cache.logit_lens(positions=None),
        logit_lens_tool(model, clean, positions=None),
        logit_lens_tool(cache, positions=None, incl_mid=True),
    ]
    for lens in lenses:
        values = lens.readout.values
        assert_close(values[-1], logits)
        assert_close(values[lens.labels.index("1_pre")], early)
    readout = logit_readout(model, cache["resid_post", -1], targets=["A"], return_type="log_probs")
    assert_close(readout.values[..., 0], logits.log_softmax(-1)[..., TARGET])
    gaps = logits - logits[..., TARGET, None]
    near_ties = (gaps.abs() < 1e-5).sum(-1) - 1
    assert ((readout.target_ranks[..., 0] - (gaps > 0).sum(-1)).abs() <= near_ties).all()


# ---------------------------------------------------------------------------------------------------------- attribution


def node_gradients(model: HookedModel, tokens: Tensor) -> Callable[[str], Tensor]:
    """Of the metric with respect to what each point adds, by adding zeros and differentiating there."""
    added: dict[str, Tensor] = {}

    def add_zeros(x: Tensor, hook: Any) -> Tensor:
        added[hook.name] = torch.zeros_like(x, requires_grad=True)
        return x + added[hook.name]

    names = ["hook_embed", *(f"blocks.{i}.{n}" for i in range(2) for n in ("attn.hook_z", "hook_mlp_out"))]
    with torch.enable_grad():
        logits = model.run_with_hooks(tokens, fwd_hooks=[(name, add_zeros) for name in names])
        grads = torch.autograd.grad(difference(logits), [added[name] for name in names])
    return dict(zip(names, grads, strict=True)).__getitem__


def test_attribution_of_nodes(model: HookedModel, clean: Tensor, corrupted: Tensor) -> None:
    """(clean - corrupted) · gradient at the corrupted run, averaged over the pairs."""
    with torch.enable_grad():
        scores = attribution_patch(model, clean, corrupted, difference).node_scores
    assert len(scores) == POS * (1 + model.cfg.n_layers * (model.cfg.n_heads + 1))
    _, clean_cache = model.run_with_cache(clean)
    _, cache = model.run_with_cache(corrupted)
    gradients = [node_gradients(model, corrupted[i : i + 1]) for i in range(len(corrupted))]
    for node, score in scores.items():
        change = (clean_cache[node.hook_name] - cache[node.hook_name])[:, node.position]
        slopes = torch.cat([gradient(node.hook_name) for gradient in gradients])[:, node.position]
        if node.head is not None:
            change, slopes = change[:, node.head], slopes[:, node.head]
        assert score == pytest.approx((change * slopes).sum(-1).mean().item(), rel=1e-3, abs=1e-5), node
    assert all(abs(score) < 1e-6 for node, score in scores.items() if node.position == 0)


def test_attribution_of_edges(model: HookedModel, clean: Tensor, corrupted: Tensor) -> None:
    """A writer's edges sum to its node score; with grouped keys and values TransformerLens refuses."""
    if model.cfg.kv_heads != model.cfg.n_heads:
        with torch.enable_grad(), pytest.raises(ValueError, match="n_key_value_heads=2 for n_heads=4"):
            attribution_patch(model, clean, corrupted, difference, EdgeAttributionConfig(granularity="edge"))
        return
    with torch.enable_grad():
        nodes = attribution_patch(model, clean[:1], corrupted[:1], difference).node_scores
        edges = attribution_patch(
            model, clean[:1], corrupted[:1], difference, EdgeAttributionConfig(granularity="edge")
        )
    assert edges.node_scores.keys() == nodes.keys()
    for node, score in edges.node_scores.items():
        assert score == pytest.approx(nodes[node], rel=1e-3, abs=1e-5), node
    cfg = model.cfg
    assert (cfg.use_attn_result, cfg.use_split_qkv_input, cfg.use_hook_mlp_in) == (False, False, False)


def test_faithfulness(model: HookedModel, clean: Tensor, corrupted: Tensor) -> None:
    """The whole graph recovers the clean metric and the empty one the corrupted metric, exactly."""
    if model.cfg.kv_heads != model.cfg.n_heads:
        with pytest.raises(ValueError, match="n_key_value_heads=2 for n_heads=4"):
            faithfulness(model, clean[:1], corrupted[:1], difference, [])
        return
    with torch.enable_grad():
        edges = attribution_patch(
            model, clean[:1], corrupted[:1], difference, EdgeAttributionConfig(granularity="edge")
        ).edge_scores
    whole = faithfulness(model, clean[:1], corrupted[:1], difference, list(edges))
    assert whole.recovered == pytest.approx(1, abs=1e-4)
    empty = faithfulness(model, clean[:1], corrupted[:1], difference, [], FaithfulnessConfig())
    assert empty.recovered == pytest.approx(0, abs=1e-4)
    assert empty.total_edges == len(edges)


# ------------------------------------------------------------------------------------------------------- SVDInterpreter


def test_singular_vectors(model: HookedModel) -> None:
    """Of OV for every query head (with its group's value head), of W_in with the norm's weight, and of W_out."""
    svd, W_U = SVDInterpreter(model), model.W_U
    for layer, block in enumerate(model.blocks):
        group = model.cfg.n_heads // model.cfg.kv_heads
        for head in range(model.cfg.n_heads):
            OV = block.attn.W_V[head // group] @ block.attn.W_O[head]
            vectors = svd.get_singular_vectors("OV", layer, num_vectors=3, head_index=head)
            assert_right_singular_vectors(vectors, OV, W_U)
        assert_right_singular_vectors(svd.get_singular_vectors("w_out", layer, 3), block.mlp.W_out, W_U)
        w_in = block.mlp.W_in.T * block.ln2.w
        assert_right_singular_vectors(svd.get_singular_vectors("w_in", layer, 3), w_in, W_U)


def assert_right_singular_vectors(vectors: Tensor, matrix: Tensor, W_U: Tensor) -> None:
    """[d_vocab, 1, k] against the eigenvectors of MᵀM, up to the sign of each."""
    gram_values, gram_vectors = torch.linalg.eigh((matrix.T @ matrix).double())
    expected = W_U.T @ gram_vectors.flip(-1)[:, :3].float()
    assert (gram_values.diff()[-3:] > 1e-3).all(), "singular values too close to tell the vectors apart"
    assert_close(vectors[:, 0].abs(), expected.abs(), 1e-3)
