from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

import reflowlens as rl
from analyses.experiments.circuit_tracing import experiment, forcing, tracing
from analyses.experiments.circuit_tracing.additions import ends_with, log_probabilities
from analyses.experiments.circuit_tracing.experiment import circuit_tracing
from analyses.experiments.circuit_tracing.writers import Writers
from analyses.words.lexicon import FactualPrompt, Lexicon
from reflowlens.config import ModelConfig
from reflowlens.errors import ReflowlensError
from reflowlens.models import build_model
from tests.planted_results import TRACING, missed
from tests.support.dictionaries import dictionary_of
from tests.support.exactness import MODELS
from tests.support.planted import CONFIG, chained_model, concepts, turning_model
from tests.support.tiny import assert_close, random_model, random_tokens

TOKENS = random_tokens(None, 1, 6)[0]  # type: ignore[arg-type] # of the models' bytes
FEW = Lexicon(
    version="few",
    factual=tuple(FactualPrompt(text, " x") for text in ("The king of France", "She saw the house", "A stone in the")),
    short_prompts=("We saw a", "He went to the"),
    neutral_texts=("The river runs through the city and the house stands by the water.",),
)


@pytest.fixture(scope="module")
def planted():
    return TRACING.run()


def test_the_planted_chain_is_found(planted):
    assert not missed(planted, TRACING.expected)
    assert planted.params["target"] == " dog"
    assert planted.params["dictionary"] == "neurons"


def test_the_planted_units_beat_every_control(planted):
    units = planted.frames["units"].query("chosen == 'influence'")
    assert sorted(zip(units["layer"], units["feature"], strict=True)) == [(1, 0), (3, 0)]
    assert units.loc[units["layer"] == 3, "promotes"].iloc[0].startswith("' dog'")
    assert planted.controls["strongest_path_share"]["shuffled_weights"] < 0.9
    assert planted.controls["strongest_path_share"]["untrained"] < 0.1
    assert planted.controls["forced_probability"]["matched_unit"] < 1e-6, "another unit writes another answer"
    assert planted.controls["lifting_share_1"]["random_direction"] < 0.3


def test_lengths_of_paths_share_out_the_influence(planted):
    lengths = planted.frames["lengths"]
    assert lengths.query("series == 'model'").set_index("edges")["share"][3] == pytest.approx(1, abs=1e-3)
    np.testing.assert_allclose(lengths.groupby("series")["share"].sum(), 1, rtol=1e-4)


def test_doses_are_multiples_of_the_largest_activation_and_their_answer_rises(planted):
    forced = planted.frames["forced"]
    assert forced.groupby("unit")["dose"].apply(list).iloc[0] == list(forcing.DOSES)
    model = chained_model()
    cache = model.run_with_cache(f"They saw the {concepts()[0]}")[1]
    largest = forced.query("unit == '3.0'")["largest"].iloc[0]
    assert largest == pytest.approx(float(cache["blocks.3.mlp.hook_post"][0, -1, 0]), rel=1e-5)
    answer = forced.query("unit == '3.0'").set_index("dose")["probability"]
    assert answer[0.0] < 1e-3
    assert answer[1.0] > 0.999


def test_nothing_is_lifted_by_design_where_nothing_is():
    result = circuit_tracing(turning_model(), lexicon=FEW, quick=True)
    assert set(result.verdicts.values()) == {"not supported"}


# -- against interventions --------------------------------------------------------------------------------------------


def test_bdh_is_traced_to_its_gated_neurons():
    sizes = {"n_layers": 2, "d_model": 32, "n_heads": 2, "d_head": 32, "d_mlp": 64, "d_vocab": 16768, "n_ctx": 32}
    cfg = ModelConfig(architecture="bdh", tie_word_embeddings=False, tokenizer_name="gpt2_16k", **sizes)
    model = build_model(cfg, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10)
    result = circuit_tracing(model, lexicon=FEW, quick=True, units=4)
    unit = result.frames["units"].iloc[0]
    activation = model.run_with_cache(FEW.factual[0].prompt)[1][f"blocks.{unit['layer']}.hook_xy_sparse"][0]
    assert unit["activation"] == pytest.approx(float(activation[unit["pos"]].flatten()[unit["feature"]]), rel=1e-4)
    writers = Writers.of(model, None)
    sample = forcing.Sample(torch.tensor([0, 1]), torch.tensor([3, 40]), torch.tensor([2.0, 0.5]))
    tokens = model.to_tokens("We saw a")[0]
    pushes = forcing.pushes_of(writers, sample, [tokens])
    forced = forcing.Forced.of(writers, pushes, [tokens])
    logits = rl.run(model, tokens, rl.Replace("xy_sparse", 2.5, layer=1, head=1, index=8, position=-1))[0, -1]
    p = logits[: model.tokenizer.n_vocab].softmax(-1)[pushes.tokens[1, 0]]
    assert forced.probability[1, forcing.DOSES.index(5.0)] == pytest.approx(p.item(), rel=1e-3)


@pytest.mark.parametrize("kind", ["plt", "clt", "skip", "neurons"])
@pytest.mark.parametrize("name", ["gpt2_own_readout", "reflow"])
def test_forcing_is_what_an_intervention_does(kind, name, tiny_models):
    model = tiny_models[name]
    dictionary = None if kind == "neurons" else dictionary_of(model, kind)
    writers = Writers.of(model, dictionary)
    sample = forcing.Sample(torch.tensor([0, 1]), torch.tensor([3, 7]), torch.tensor([2.0, -1.5]))
    pushes = forcing.pushes_of(writers, sample, [TOKENS])
    forced = forcing.Forced.of(writers, pushes, [TOKENS])
    for i, (block, index, largest) in enumerate(zip((0, 1), (3, 7), (2.0, -1.5), strict=True)):
        for dose in (0.0, 5.0):
            value = torch.tensor([dose * largest])
            with dictionary.spliced(model) if dictionary else torch.no_grad():
                point = "features" if dictionary else "mlp_post"
                logits = rl.run(model, TOKENS, rl.Replace(point, value, layer=block, index=index, position=-1))
            p = logits[0, -1, :256].softmax(-1)[pushes.tokens[i, 0]]
            assert forced.probability[i, forcing.DOSES.index(dose)] == pytest.approx(p.item(), rel=1e-4)
    before = model(TOKENS)[0, -1, :256].softmax(-1)[pushes.tokens[:, 0]]
    np.testing.assert_allclose(forced.before, before.detach(), rtol=1e-4)


@pytest.mark.parametrize("kind", ["plt", "clt", "neurons"])
def test_removal_is_what_an_ablation_does(kind, tiny_models):
    model = tiny_models["gpt2_biased"]
    dictionary = None if kind == "neurons" else dictionary_of(model, kind)
    prompt = "abcdef"
    graph = tracing.graph_of(model, dictionary, prompt)
    writers = Writers.of(model, dictionary)
    units = tracing.unit_frame(graph, writers)
    assert units["influence"].is_monotonic_decreasing
    effects = tracing.removal_effects(graph, writers, prompt, {"two": units.head(2), "one": units.iloc[1:2]})
    target = int(graph.nodes["feature"].iloc[-1])
    assert target == int(model(prompt)[0, -1, :256].argmax())
    expected = []
    for unit in units.head(2).itertuples():
        point = "features" if dictionary else "mlp_post"
        ablate = rl.Ablate(point, layer=unit.layer, index=unit.feature, position=unit.pos)
        with dictionary.spliced(model) if dictionary else torch.no_grad():
            runs = [run[0, -1, :256] for run in (model(prompt), rl.run(model, prompt, ablate))]
        log_p = [float(logits.detach().log_softmax(-1)[target]) for logits in runs]
        expected.append(abs(log_p[0] - log_p[1]))
    assert effects["two"] == pytest.approx(np.mean(expected), rel=1e-3, abs=1e-6)
    assert effects["one"] == pytest.approx(expected[1], rel=1e-3, abs=1e-6)


def test_what_is_written_adds_up_to_the_reconstruction(tiny_models):
    model = tiny_models["gpt2"]
    dictionary = dictionary_of(model, "clt")
    writers, cache = Writers.of(model, dictionary), model.run_with_cache(TOKENS)[1]
    reads = [cache[point][0, -1] for point in writers.points]
    features = [writers.activations(block, read[None])[0] for block, read in enumerate(reads)]
    written = 0
    for block, own in enumerate(features):
        index = torch.arange(len(own))
        written = written + writers.written(torch.full_like(index, block), index, own).sum(0)
    for block, expected in enumerate(dictionary(reads)):
        assert_close(written[block] + dictionary.each_layer()[block].b_dec, expected)


# -- controls ---------------------------------------------------------------------------------------------------------


def test_controls_write_as_much_where_the_units_write(tiny_models):
    model = tiny_models["gpt2"]
    writers = Writers.of(model, dictionary_of(model, "clt"))
    sample = forcing.drawn_units(writers, ["The quick brown fox jumps"], 12, seed=3)
    own = forcing.pushes_of(writers, sample, [TOKENS])
    other = forcing.matched_units(writers, sample, seed=3)
    assert (other.block == sample.block).all()
    assert (other.index != sample.index).all()
    matched = forcing.pushes_of(writers, other, [TOKENS], own.tokens)
    random = forcing.random_directions(writers, own, seed=3)
    assert_close(matched.written.flatten(1).norm(dim=1), own.written.flatten(1).norm(dim=1))
    assert_close(random.written.norm(dim=2), own.written.norm(dim=2))
    assert not (random.tokens == own.tokens).all()


def test_matched_units_of_a_graph_are_of_the_same_block_and_near_in_size(tiny_models):
    model = tiny_models["gpt2"]
    graph = tracing.graph_of(model, None, "abcdef")
    units = tracing.unit_frame(graph, Writers.of(model, None))
    chosen = tracing.chosen_units(units, np.random.default_rng(0))
    strongest, matched = chosen["influence"], chosen["matched_unit"]
    assert matched["layer"].tolist() == strongest["layer"].tolist()
    assert not set(matched["node"]) & set(strongest["node"])
    assert (np.log(matched["size"].to_numpy() / strongest["size"].to_numpy()).__abs__() < 1).all()
    norms = model.blocks[0].mlp.W_out.norm(dim=1)
    first = units.query("layer == 0").iloc[0]
    assert first["size"] == pytest.approx(abs(first["activation"]) * norms[first["feature"]].item(), rel=1e-5)


def test_shuffled_weights_are_the_same_weights_in_each_row(tiny_models):
    graph = tracing.graph_of(tiny_models["gpt2"], None, "abcdef")
    own, shuffled = tracing.paths_of(graph), tracing.shuffled_paths(graph, 0, "a")
    assert shuffled.by_length.sum() == pytest.approx(own.by_length.sum(), rel=1e-4)
    assert shuffled.strongest != own.strongest
    assert tracing.shuffled_paths(graph, 0, "a").strongest == shuffled.strongest


# -- models, dictionaries, errors -------------------------------------------------------------------------------------


def test_the_packaged_dictionary_is_that_of_the_model():
    assert experiment.packaged_dictionary(rl.load_model("reflow-nano")) == "reflow-nano-plt"
    assert experiment.packaged_dictionary(rl.load_model("relu-nano")) is None


@pytest.mark.parametrize("architecture", ["gpt2", "gpt2_new", "reflow_topk", "reflow_lite"])
def test_every_decoder_runs(architecture):
    fields = CONFIG.to_dict() | {"architecture": architecture, "act_fn": "", "gated_mlp": None, "eps": 0.0}
    fields |= {"normalization_type": "", "positional_embedding_type": "", "rotary_adjacent_pairs": None, "n_layers": 2}
    fields |= {"n_signals": 32 if architecture.startswith("reflow") else None}
    fields |= {"topk": 4} if architecture == "reflow_topk" else {}
    fields |= {"n_key_value_heads": 1} if architecture == "reflow_lite" else {}
    model = build_model(ModelConfig.from_dict(fields))
    result = circuit_tracing(model, dictionary_of(model, "clt"), lexicon=FEW, quick=True, units=4)
    assert {"neurons", "untrained", "shuffled_weights"} == set(result.controls["strongest_path_share"])
    assert 0 < result.metrics["strongest_path_share"] <= 1
    assert set(result.figures) == {"units", "paths", "lengths", "doses", "lifting"}


def test_the_same_seed_gives_the_same_frames_and_leaves_the_weights():
    model = turning_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    first, second = (circuit_tracing(model, lexicon=FEW, quick=True, units=4, seed=2) for _ in range(2))
    for name, frame in first.frames.items():
        pd.testing.assert_frame_equal(frame, second.frames[name], check_exact=True)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("n_places", [1, 4])
@pytest.mark.parametrize("name", ["gpt2", "reflow_lite", "llama_untied", "parallel_shared", "norms_behind", "bdh"])
def test_rows_are_whole_passes_of_their_own(name, n_places):
    model = random_model(MODELS[name])
    n_layers, width = model.cfg.n_layers, model.cfg.d_model
    added = torch.randn(7, n_layers, n_places, width, generator=torch.Generator().manual_seed(0))
    for row in range(5):  # none, one block alone, from a block on
        added[row, : row % n_layers] = 0.0
        added[row, row % n_layers + 1 :] *= row > 2
    added[0], added[1:, :, -2:-1] = 0.0, 0.0
    found = ends_with(model, TOKENS, added)
    for row in range(len(added)):

        def add(y, hook, row=row):
            return torch.cat([y[:, :-n_places], y[:, -n_places:] + added[row, hook.layer()]], dim=1)

        with model.hooks([(f"blocks.{block}.hook_mlp_out", add) for block in range(n_layers)]):
            assert_close(found[row], model.final_stream(TOKENS[None])[0, -1], 1e-5)
            logits = model(TOKENS[None])[0, -1, : model.tokenizer.n_vocab]
        assert_close(log_probabilities(model, found)[row], logits.log_softmax(-1), 1e-5)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_bad_input_is_one_clear_error():
    model = turning_model()
    with pytest.raises(ReflowlensError, match="factual prompts"):
        circuit_tracing(model, lexicon=Lexicon(version="x"))
    with pytest.raises(ReflowlensError, match="no dictionary 'nothing'"):
        circuit_tracing(model, "nothing", lexicon=FEW)
    with pytest.raises(ReflowlensError, match="there are 0"):
        forcing.drawn_units(Writers.of(model, None), ["a"], 4, seed=0)
