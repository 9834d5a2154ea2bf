"""A patch's source position is counted from the end of each prompt of the source, never from its padding."""

import pytest
import torch

import reflowlens as rl

CLEAN, CORRUPTED = ["The king of France", "A cat sat"], ["The king of Norway", "A dog ran"]


@pytest.fixture
def tiny(tiny_models):
    return tiny_models["reflow"]


@pytest.mark.parametrize("mode", ["exact", "gradient", "integrated"])
@pytest.mark.parametrize("from_position", ["last", -2, 1])
def test_a_swept_patch_takes_each_prompts_own_position(tiny, mode, from_position):
    cells = [rl.Patch("resid_pre", layer=1, position="last", from_position=from_position)]
    metric = rl.metrics.logit_diff(5, 9)
    together = rl.sweep(tiny, CLEAN, CORRUPTED, cells, metric, mode=mode).values[0]
    alone = [rl.sweep(tiny, a, b, cells, metric, mode=mode).values[0] for a, b in zip(CLEAN, CORRUPTED, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


@pytest.fixture(params=["texts", "cache", "disk", "rows"])
def sources(request, tiny, tmp_path):
    """The clean prompts as what a patch or a reference takes."""
    if request.param == "texts":
        return CLEAN
    if request.param == "rows":  # a part of a larger cache
        _, cache = tiny.run_with_cache(["A much longer prompt", *CLEAN], names_filter=lambda name: True)
        return cache.apply_slice_to_batch_dim(slice(1, None))
    _, cache = tiny.run_with_cache(CLEAN, names_filter=lambda name: True)
    if request.param == "disk":
        cache.save(tmp_path / "cache")
        return rl.ActivationCache.load(tmp_path / "cache", tiny)
    return cache


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        (rl.Patch, {"hook": "resid_pre", "position": "last", "from_position": "last"}),
        (rl.Patch, {"hook": "z", "position": slice(1, -1), "from_position": -3}),
        (rl.Patch, {"hook": "pattern", "position": -2, "from_position": -2}),
        (rl.Patch, {"hook": "resid_pre", "position": slice(2, None)}),
        (rl.Patch, {"hook": "attn_scores", "position": "last", "index": slice(1, -2)}),
    ],
)
def test_a_patch_takes_each_prompts_own_tokens(tiny, sources, kind, part):
    together = rl.run(tiny, CORRUPTED, kind(prompt=sources, layer=1, **part))
    for row, prompt, source in zip(together, CORRUPTED, CLEAN, strict=True):
        alone = rl.run(tiny, prompt, kind(prompt=source, layer=1, **part))[0]
        torch.testing.assert_close(row[: len(alone)], alone, rtol=1e-5, atol=1e-5)


def test_a_source_has_no_tokens_behind_its_end(tiny, sources):
    with pytest.raises(rl.ReflowlensError, match="prompt 1 of the source has 9 tokens, but position 12 is asked of it"):
        rl.run(tiny, ["A" * 18, "B" * 18], rl.Patch("resid_pre", sources, layer=1, position=12))
    last = rl.Patch("resid_pre", sources, layer=1, position="last")
    with pytest.raises(rl.ReflowlensError, match="prompt 1 of the source has 9 tokens, but position 17 is asked of it"):
        rl.sweep(tiny, None, ["A" * 18, "B" * 18], last, rl.metrics.logit_diff(5, 9))
    with pytest.raises(
        rl.ReflowlensError, match="from_position=9 is out of range: prompt 1 of the source has 9 tokens"
    ):
        rl.run(tiny, CORRUPTED, rl.Patch("resid_pre", sources, layer=1, position="last", from_position=9))


def test_padding_of_a_reference_does_not_count(tiny, sources):
    places = torch.cat([tiny.run_with_cache(text)[1]["resid_pre", 1][0] for text in CLEAN])
    ablation = rl.Ablate("resid_pre", layer=1, by="mean", reference=sources)
    with rl.intervene(tiny, ablation):
        _, cache = tiny.run_with_cache("A dog", names_filter="blocks.1.hook_resid_pre")
    torch.testing.assert_close(cache["resid_pre", 1][0], places.mean(dim=0).expand(5, -1), rtol=1e-5, atol=1e-5)
    with rl.intervene(tiny, rl.Ablate("resid_pre", layer=1, by="resample", reference=sources)):
        _, cache = tiny.run_with_cache(["A" * 24] * 10, names_filter="blocks.1.hook_resid_pre")
    distances = (cache["resid_pre", 1].flatten(0, 1)[:, None] - places).norm(dim=-1)
    assert distances.min(dim=1).values.max() < 1e-4  # every drawn place is a token of one of the texts
    with pytest.raises(rl.ReflowlensError, match="needs source texts of equal length"):
        rl.run(tiny, "A dog", rl.Ablate("pattern", layer=1, by="mean", reference=sources))


def test_a_part_of_a_cache_keeps_its_lengths(tiny):
    _, cache = tiny.run_with_cache(CLEAN)
    assert cache.lengths == [18, 9]
    assert cache.apply_slice_to_batch_dim([1, 0]).lengths == [9, 18]
    one = cache.apply_slice_to_batch_dim(1)
    patch = {"layer": 1, "position": "last", "from_position": "last"}
    actual = rl.run(tiny, CORRUPTED[1], rl.Patch("resid_pre", one, **patch))
    torch.testing.assert_close(
        actual, rl.run(tiny, CORRUPTED[1], rl.Patch("resid_pre", CLEAN[1], **patch)), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("layer", [None, 1])
def test_a_cache_made_under_given_lengths_knows_them(tiny, tmp_path, layer):
    tokens, lengths = tiny.tokens_and_lengths(CLEAN)
    inputs = tokens if layer is None else tiny(tokens, stop_at_layer=layer)
    with rl.intervene(tiny, rl.Scale("resid_pre", 1.0, layer=1), lengths=lengths):
        _, cache = tiny.run_with_cache(inputs, start_at_layer=layer)
    assert cache.lengths == lengths
    cache.save(tmp_path / "cache")
    assert rl.ActivationCache.load(tmp_path / "cache", tiny).lengths == lengths
    patch = {"layer": 1, "position": "last", "from_position": "last"}
    actual, expected = (rl.run(tiny, CORRUPTED, rl.Patch("resid_pre", source, **patch)) for source in (cache, CLEAN))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_blocks_that_give_different_lengths_are_refused(tiny):
    tokens, change = tiny.to_tokens(CLEAN), rl.Scale("resid_pre", 1.0, layer=1)
    with rl.intervene(tiny, change, lengths=[18, 9]), rl.intervene(tiny, change, lengths=[18, 8]):
        with pytest.raises(rl.ReflowlensError, match=r"blocks give different lengths: \(18, 8\) and \(18, 9\)"):
            tiny.run_with_cache(tokens)
        tiny(tokens)


KEYS = [slice(-2, None), slice(1, -1), -1, [0, -2], slice(3, None), slice(None, None, -2), None]
SQUARES = {
    **{f"replace{i}": rl.Replace("pattern", 0.2, layer=1, index=index) for i, index in enumerate(KEYS)},
    "ablate": rl.Ablate("pattern", layer=1, index=slice(-2, None), position="last"),
    "scale": rl.Scale("attn_scores", 0.5, layer=0, index=slice(1, -1), position=slice(-3, None), head=[1, 3]),
    "steer": rl.Steer("attn_scores", [[0.3], [-0.4]], layer=1, index=slice(2, -1), position=[-2, -1]),
    "positions": rl.Ablate("z", layer=1, position=slice(1, -1)),
}


@pytest.mark.parametrize("change", SQUARES.values(), ids=SQUARES)
@pytest.mark.parametrize("name", ["reflow", "llama_untied"])
def test_keys_and_positions_are_each_prompts_own(tiny_models, name, change):
    model = tiny_models[name]
    tokens, lengths = model.tokens_and_lengths(CORRUPTED)
    together = rl.run(model, CORRUPTED, change)
    alone = [rl.run(model, prompt, change)[0] for prompt in CORRUPTED]
    with rl.intervene(model, change, lengths=lengths):
        padded = model(tokens)
    for row, other, single in zip(together, padded, alone, strict=True):
        torch.testing.assert_close(row[: len(single)], single, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(other[: len(single)], single, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["exact", "gradient", "integrated"])
@pytest.mark.parametrize("metric", [rl.metrics.logit_diff(5, 9), rl.metrics.logit_diff(5, 9, position="all")])
def test_swept_keys_and_positions_are_each_prompts_own(tiny, mode, metric):
    cells = [*SQUARES.values(), rl.Patch("pattern", layer=1, index=slice(1, -1)), rl.Patch("attn_scores", layer=0)]
    together = rl.sweep(tiny, CLEAN, CORRUPTED, cells, metric, mode=mode).values
    alone = [rl.sweep(tiny, a, b, cells, metric, mode=mode).values for a, b in zip(CLEAN, CORRUPTED, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone, dim=1), rtol=1e-5, atol=1e-5)


def test_one_length_shorter_than_the_padded_tokens(tiny):
    """As of a part of a ragged batch: the rows agree, and yet they end in padding."""
    tokens = tiny.to_tokens(CORRUPTED)[1:]
    n = len(tiny.to_tokens(CORRUPTED[1])[0])
    for change in (rl.Ablate("resid_pre", layer=1, position=-2), SQUARES["replace1"]):
        with rl.intervene(tiny, change, lengths=[n]):
            padded = tiny(tokens)[:, :n]
        torch.testing.assert_close(padded, rl.run(tiny, CORRUPTED[1], change), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("index", [12, [12, -1], [-1, 12], slice(12, None)])
def test_a_key_behind_the_end_of_a_shorter_prompt_is_not_read(tiny, index):
    together = rl.run(tiny, CORRUPTED, rl.Replace("pattern", 0.2, layer=1, index=index))
    own = [rl.Replace("pattern", 0.2, layer=1, index=-1)] if isinstance(index, list) else []
    n = len(tiny.to_tokens(CORRUPTED[1])[0])
    torch.testing.assert_close(together[1, :n], rl.run(tiny, CORRUPTED[1], own)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rl.Replace("pattern", torch.rand(7), layer=1, index=slice(1, -1)), "selects different numbers of keys"),
        (rl.Steer("z", torch.rand(7, 1, 1), layer=1, position=slice(1, -1)), "selects different numbers of positions"),
        (rl.Ablate("pattern", layer=1, index=slice(-2, -10)), "selects nothing: prompt 0"),
        (rl.Ablate("pattern", layer=1, index=-10), "index=-10 is out of range: a prompt has 9 tokens"),
        (rl.Patch("pattern", "The king of France", layer=1), "the source has 18 key positions, prompt 1 has 9"),
    ],
)
def test_what_one_of_the_prompts_alone_would_refuse(tiny, change, message):
    with pytest.raises(rl.ReflowlensError, match=message):
        rl.run(tiny, CORRUPTED, change)
    with pytest.raises(rl.ReflowlensError, match=message):
        rl.sweep(tiny, None, CORRUPTED, [change], rl.metrics.logit_diff(5, 9))
