"""Feature dashboards against brute force: each block alone, every activation held, losses of plain hooked passes."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import reflowlens as rl
from analyses.features import survey as survey_module
from analyses.features.corpus import corpus_of
from analyses.features.dashboards import feature_dashboards
from analyses.features.layers import dictionary_layers, unit_layers
from analyses.features.records import shown_places
from analyses.features.removal import rate_matched_pairs, removal_effects
from analyses.features.survey import random_keys, survey
from reflowlens.errors import ReflowlensError
from reflowlens.notebook.feature import BOTTOM, TOP
from tests.reflowlens.dictionaries.test_files import KINDS, random_dictionary
from tests.reflowlens.models.test_bdh import random_bdh
from tests.support.tiny import assert_close, random_model

DOCUMENTS = [
    "The cat sat on the mat, and the dog did not.",
    "Short.",
    "a",
    "0123456789 jumps over lazy",
    "A third text <b>of</b> words.",
]
CASES = ["plt", "clt", "skip", "sae", "gpt2", "reflow", "bdh"]


@pytest.fixture(scope="module")
def models():
    return {"gpt2": random_model("gpt2_biased"), "reflow": random_model("reflow"), "bdh": random_bdh()}


def layers_of(models, case):
    if case in models:
        return models[case], unit_layers(models[case])
    return models["gpt2"], dictionary_layers(models["gpt2"], random_dictionary(KINDS[case]))


@torch.no_grad()
def every_activation(model, layer, corpus):
    """[row, pos, feature], each block run alone; NaN at position 0, which does not count, and behind its end."""
    rows = []
    for tokens, length in zip(corpus.tokens, corpus.lengths.tolist(), strict=True):
        _, cache = model.run_with_cache(tokens[None, :length], names_filter=layer.point, return_type=None)
        found = torch.full((corpus.tokens.shape[1], layer.n_features), torch.nan)
        found[1:length] = layer.encode(cache[layer.point].flatten(0, 1))[1:]
        rows.append(found)
    return torch.stack(rows)


def test_blocks_hold_the_documents_and_no_two_of_them(models):
    model = models["gpt2"]
    corpus = corpus_of(model, DOCUMENTS)
    assert corpus.lengths.tolist() == sorted(corpus.lengths.tolist(), reverse=True)
    parts: dict[int, dict[int, str]] = {}
    for row, length, document, start in zip(
        corpus.tokens, corpus.lengths.tolist(), corpus.documents.tolist(), corpus.starts.tolist(), strict=True
    ):
        parts.setdefault(document, {})[start] = model.to_string(row[:length])
    texts = {document: "".join(text for _, text in sorted(found.items())) for document, found in parts.items()}
    assert texts == {i: text for i, text in enumerate(DOCUMENTS) if len(text) > 1}
    assert corpus_of(model, DOCUMENTS, n_tokens=30).n_tokens == 30
    assert corpus_of(model, [[1, 2, 3], np.array([4, 5])]).tokens.tolist() == [[1, 2, 3], [4, 5, 0]]


@pytest.mark.parametrize("case", CASES)
def test_counts_ranges_and_places_are_those_of_each_block_alone(models, case):
    model, layers = layers_of(models, case)
    corpus = corpus_of(model, DOCUMENTS)
    found = survey(model, corpus, layers, n_top=4, n_sample=9, seed=3, progress=False)
    for layer, part in zip(layers, found, strict=True):
        every = every_activation(model, layer, corpus).flatten(0, 1)
        counted = ~every[:, 0].isnan()
        assert part.n == int(counted.sum()) == int((corpus.lengths - 1).sum())
        values = every[counted]
        assert_close(part.smallest, values.amin(0), what=layer.name)
        assert_close(part.largest, values.amax(0), what=layer.name)
        assert (part.fired - (values > 0).sum(0)).abs().max() <= 1  # rounding decides of what is all but 0
        top = values.clamp(min=0).topk(4, dim=0).values.T
        assert_close(part.top.activation, top, what=layer.name)
        if layer.signed:
            bottom = (-values).clamp(min=0).topk(4, dim=0).values.T
            assert torch.allclose(-part.bottom.activation, bottom, atol=1e-5)
        keys = random_keys(3, torch.arange(len(every))[:, None], torch.arange(layer.n_features)[None])
        keys = keys.masked_fill((every == 0) | ~counted[:, None], -1)
        drawn = keys.topk(9, dim=0)
        assert torch.equal(part.sample.place.T, drawn.indices.masked_fill(drawn.values < 0, -1))


def test_the_batch_does_not_matter(models, monkeypatch):
    arguments = {"dictionary": random_dictionary(KINDS["plt"]), "n_removed": 6, "n_top": 3}
    together = feature_dashboards(models["gpt2"], DOCUMENTS, **arguments)
    monkeypatch.setattr(survey_module, "_MOST_TOKENS", 1)
    alone = feature_dashboards(models["gpt2"], DOCUMENTS, **arguments)
    for layer in range(2):
        for index in range(48):
            a, b = together.record(layer, index), alone.record(layer, index)
            assert a.fired == b.fired
            assert a.largest == pytest.approx(b.largest, rel=1e-5)
            for name, contexts in a.contexts.items():
                for one, other in zip(contexts, b.contexts[name], strict=True):
                    assert (one.block, one.start, one.middle) == (other.block, other.start, other.middle)
                    assert one.values == pytest.approx(other.values, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("case", ["plt", "reflow", "bdh"])
def test_contexts_and_histograms_hold_the_activations_of_the_block(models, case):
    model = models.get(case, models["gpt2"])
    dictionary = random_dictionary(KINDS[case]) if case in KINDS else None
    layers = layers_of(models, case)[1]
    pages = feature_dashboards(model, DOCUMENTS, dictionary, n_top=3, n_interval=2, around=(3, 2), n_removed=0)
    corpus = corpus_of(model, DOCUMENTS)
    for number, layer in enumerate(layers[:3]):
        every = every_activation(model, layer, corpus)
        for index in range(0, layer.n_features, 5):
            record, own = pages.record(number, index), every[..., index]
            values = own[~own.isnan()]
            shown = values[values != 0]
            ends = min(0.0, record.smallest), record.largest or 1.0
            bins = np.histogram(shown.clip(*ends), bins=40, range=ends)[0]
            assert sum(record.histogram) == len(shown)
            assert np.abs(np.cumsum(record.histogram) - np.cumsum(bins)).max() <= 1  # a value on an edge
            for name, contexts in record.contexts.items():
                for context in contexts:
                    stop = context.start + len(context.values)
                    expected = own[context.block, context.start : stop]
                    at = slice(1, None) if context.start == 0 else slice(None)  # the oracle has no position 0
                    assert context.values[at] == pytest.approx(expected[at].tolist(), rel=1e-4, abs=1e-6)
                    assert stop == min(context.middle + 3, int(corpus.lengths[context.block]))
                    assert context.start == max(0, context.middle - 3)
                    if name.startswith("Quantiles"):
                        low, high = (int(part) for part in name.removeprefix("Quantiles ").rstrip("%").split("–"))
                        bounds = record.quantiles[low // 20], record.quantiles[high // 20]
                        assert bounds[0] - 1e-5 <= context.values[context.middle - context.start] <= bounds[1] + 1e-5
            tops = [c.values[c.middle - c.start] for c in record.contexts.get(TOP, [])]
            assert tops == sorted(tops, reverse=True)
            assert all(value > 0 for value in tops)
            assert all(c.values[c.middle - c.start] < 0 for c in record.contexts.get(BOTTOM, []))


def test_the_sample_is_another_with_another_seed_and_quantiles_are_exact_where_it_holds_everything(models):
    model, layers = layers_of(models, "plt")
    corpus = corpus_of(model, DOCUMENTS)
    one, other = (survey(model, corpus, layers, n_top=1, n_sample=2, seed=seed, progress=False)[0] for seed in (0, 1))
    assert not torch.equal(one.sample.place, other.sample.place)
    whole = survey(model, corpus, layers[:1], n_top=1, n_sample=200, seed=0, progress=False)[0]
    every = every_activation(model, layers[0], corpus)
    for feature, quantiles in enumerate(shown_places(whole, 1).quantiles):
        values = every[..., feature][every[..., feature] > 0]  # not NaN
        if len(values):
            assert quantiles == pytest.approx(np.quantile(values, np.linspace(0, 1, 6)), rel=1e-5)


def test_keys_are_uniform_and_do_not_depend_on_each_other():
    place, feature = torch.arange(200)[:, None], torch.arange(100)[None]
    keys = random_keys(7, place, feature)
    assert keys.min() >= 0
    assert keys.max() < 1
    deciles = torch.histc(keys, 10, 0, 1) / keys.numel()
    assert (deciles - 0.1).abs().max() < 0.01
    assert keys.T.corrcoef().fill_diagonal_(0).abs().max() < 0.4
    assert keys.corrcoef().fill_diagonal_(0).abs().max() < 0.55


@torch.no_grad()
def token_losses(model, tokens):
    return F.cross_entropy(model(tokens[None])[0, :-1], tokens[1:], reduction="none")


@pytest.mark.parametrize("case", CASES)
def test_removal_is_what_an_ablation_of_the_unit_or_of_the_spliced_feature_costs(models, case):
    model, layers = layers_of(models, case)
    layers = [*layers[:1], *layers[-2:]] if case in models else layers
    corpus = corpus_of(model, DOCUMENTS)
    parts = survey(model, corpus, layers, n_top=1, n_sample=100, seed=0, progress=False)
    effects = removal_effects(model, corpus, layers, parts, 2, 0, progress=False)
    width, measured = corpus.tokens.shape[1], 0
    for number, (layer, part, found) in enumerate(zip(layers, parts, effects, strict=True)):
        for feature, effect in found.items():
            blocks = dict.fromkeys((part.sample.place[feature][part.sample.place[feature] >= 0] // width).tolist())
            total, positions = 0.0, 0
            for block in list(blocks)[:8]:
                tokens = corpus.tokens[block, : int(corpus.lengths[block])]
                if case in KINDS:
                    with random_dictionary(KINDS[case]).spliced(model):
                        _, cache = model.run_with_cache(tokens[None], names_filter=f"blocks.{number}.hook_features")
                        with rl.intervene(model, rl.Ablate("features", layer=number, index=feature)):
                            removed = token_losses(model, tokens)
                    active = cache[f"blocks.{number}.hook_features"][0, :, feature] != 0
                else:
                    _, cache = model.run_with_cache(tokens[None], names_filter=layer.point)

                    def silence(x, hook, feature=feature):
                        x[(..., *np.unravel_index(feature, x.shape[2:]))] = 0
                        return x

                    with model.hooks([(layer.point, silence)]):
                        removed = token_losses(model, tokens)
                    active = cache[layer.point].flatten(2)[0, :, feature] != 0
                change = (removed - token_losses(model, tokens))[active[:-1]]
                change = change[1:] if active[0] else change
                total, positions = total + float(change.sum()), positions + len(change)
            assert (effect.positions, effect.blocks) == (positions, min(len(blocks), 8))
            assert effect.change == pytest.approx(total / positions, rel=1e-3, abs=2e-6)
            assert effect.control_change == found[effect.control].change
            assert math.isnan(effect.error) == (effect.blocks == 1)
            measured += 1
    assert measured >= 4


def test_controls_fire_about_as_often():
    fired = np.random.default_rng(0).integers(0, 5000, 200)
    fired[:20] = 0
    pairs = dict(rate_matched_pairs(fired, 1000, np.random.default_rng(1)))
    assert len(pairs) == (fired > 0).sum() // 2 * 2
    rank = {feature: i for i, feature in enumerate(np.argsort(fired, kind="stable"))}
    assert all(abs(rank[a] - rank[b]) < 8 and pairs[b] == a and fired[a] > 0 for a, b in pairs.items())
    assert len(rate_matched_pairs(fired, 5, np.random.default_rng(1))) == 4
    assert rate_matched_pairs(np.zeros(9, dtype=int), 5, np.random.default_rng(1)) == []


@pytest.mark.parametrize("case", ["plt", "clt", "gpt2", "reflow", "bdh"])
def test_promoted_tokens_and_neighbours_follow_from_the_weights(models, case):
    """A direction is added to a stream whose scale is held: the logits move by what is promoted."""
    model, layers = layers_of(models, case)
    dictionary = random_dictionary(KINDS[case]) if case in KINDS else None
    pages = feature_dashboards(model, DOCUMENTS, dictionary, n_removed=0)
    n_vocab = model.tokenizer.n_vocab
    stream = torch.randn(1, 1, model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    end = model.cfg.n_layers
    for number, layer in enumerate(layers):
        record = pages.record(number, 5)
        if layer.directions is None:
            assert (record.promoted, record.suppressed, record.near) == ([], [], [])
            continue
        if layer.point == "unembed.hook_signal":
            expected = rl.signal_view(model).recipe[:n_vocab, 5].detach()
        else:
            direction = layer.directions[5]
            if case == "clt":
                assert_close(direction, dictionary.layers[number].W_dec[5].sum(0))
            with torch.no_grad():
                _, cache = model.run_with_cache(stream, start_at_layer=end)
                scale = cache["ln_final.hook_scale"] if "ln_final.hook_scale" in model.hook_dict else torch.ones(1)
                hold = [("ln_final.hook_scale", lambda x, hook, scale=scale: scale)] * (case != "bdh")
                with model.hooks(hold):
                    moved = model(stream + direction, start_at_layer=end) - model(stream, start_at_layer=end)
            expected = (moved * scale)[0, 0, :n_vocab]
        ranked = expected.sort(descending=True)
        assert [value for _, value in record.promoted] == pytest.approx(ranked.values[:10].tolist(), rel=1e-3, abs=1e-5)
        assert [value for _, value in record.suppressed] == pytest.approx(
            ranked.values.flip(0)[:10].tolist(), rel=1e-3, abs=1e-5
        )
        assert record.promoted[0][0] == int(ranked.indices[0])
        own = F.cosine_similarity(layer.directions[5], layer.directions, dim=-1)
        own[5] = -2
        near = [(key, index) for key, index, _ in record.near if key == layer.key]
        assert near == [(layer.key, i) for i in own.topk(6).indices.tolist()]
        others = [(key, index, cosine) for key, index, cosine in record.near if key != layer.key]
        best = [
            F.cosine_similarity(layer.directions[5], o.directions, dim=-1).max()
            for o in layers
            if o.directions is not None and o is not layer
        ]
        assert others[0][2] == pytest.approx(float(max(best)), rel=1e-4)


def test_the_first_features_of_some_layers(models):
    pages = feature_dashboards(models["gpt2"], DOCUMENTS, random_dictionary(), layers=["1"], n_features=3, n_removed=3)
    assert [(layer.key, layer.n_features) for layer in pages.layers] == [("1", 3)]
    assert {index for i in range(3) for key, index, _ in pages.record(0, i).near} <= {0, 1, 2}
    units = feature_dashboards(models["bdh"], DOCUMENTS, layers=["1"], n_features=2, n_removed=0)
    assert [layer.key for layer in units.layers] == ["1-x_sparse", "1-y_sparse", "1-xy_sparse"]


def test_a_model_that_begins_its_texts_itself_does_so_in_every_block(models, monkeypatch):
    monkeypatch.setattr(type(models["gpt2"]), "text_start", lambda self, prepend_bos=None: [7])
    corpus = corpus_of(models["gpt2"], ["x" * 30])
    assert corpus.tokens[:, 0].tolist() == [7, 7]
    assert corpus.lengths.tolist() == [24, 8]


def test_a_dead_dictionary_has_pages_that_say_so(models, tmp_path):
    dictionary = random_dictionary(KINDS["skip"])
    with torch.no_grad():
        for layer in dictionary.each_layer():
            layer.b_enc.fill_(-100)
    pages = feature_dashboards(models["gpt2"], DOCUMENTS, dictionary)
    record = pages.record(1, 4)
    assert (record.fired, record.smallest, record.largest, record.contexts, record.effect) == (0, 0, 0, {}, None)
    assert len(record.promoted) == 10
    pages.save(tmp_path / "pages")
    assert "0 at every position" in rl.show_feature(tmp_path / "pages", 1, 4)._repr_html_()


def test_what_cannot_be_shown_is_one_error(models):
    model, dictionary = models["gpt2"], random_dictionary()
    for documents in ([], "", ["a", "b"]):
        with pytest.raises(ReflowlensError, match="no document has two tokens"):
            feature_dashboards(model, documents, dictionary)
    with pytest.raises(ReflowlensError, match=r"no layer '7'; there are 0, 1"):
        feature_dashboards(model, DOCUMENTS, dictionary, layers=["7"])
    with pytest.raises(ReflowlensError, match="leave one of them out"):
        feature_dashboards(model, DOCUMENTS, dictionary, points="mlp_post")
    with pytest.raises(ReflowlensError, match="n_top must be an integer and at least 1"):
        feature_dashboards(model, DOCUMENTS, dictionary, n_top=0)
    with pytest.raises(ReflowlensError, match="context must be from 2 to n_ctx=24, got 25"):
        feature_dashboards(model, DOCUMENTS, dictionary, context=25)
    foreign = random_dictionary(dataclasses.replace(KINDS["plt"], model_name="other", model_hash="0" * 64))
    with pytest.raises(ReflowlensError, match="other"):
        feature_dashboards(model, DOCUMENTS, foreign)
    with torch.no_grad():
        dictionary.layers[1].b_enc[3] = torch.nan
    with pytest.raises(ReflowlensError, match=r"blocks.1.ln2.hook_normalized' hold NaN"):
        feature_dashboards(model, DOCUMENTS, dictionary)
