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


def test_a_cache_of_ragged_texts_knows_their_lengths(tiny):
    _, cache = tiny.run_with_cache(CLEAN)
    _, short = tiny.run_with_cache(CLEAN[1])
    patch = {"layer": 1, "position": "last", "from_position": "last"}
    n = len(tiny.to_tokens(CORRUPTED[1])[0])
    together = rl.run(tiny, CORRUPTED, rl.Patch("resid_pre", cache, **patch))[1, n - 1]
    alone = rl.run(tiny, CORRUPTED[1], rl.Patch("resid_pre", short, **patch))[0, -1]
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    with pytest.raises(rl.ReflowlensError, match="prompt 1 of the source has"):
        rl.run(tiny, CORRUPTED, rl.Patch("resid_pre", cache, layer=1, position="last", from_position=n))


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
