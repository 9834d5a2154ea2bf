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


@pytest.mark.parametrize("part", [{"index": slice(-2, None)}, {"index": -1}, {"position": "last"}, {}])
def test_keys_of_a_square_are_each_prompts_own(tiny, part):
    change = rl.Replace("pattern", 0.2, layer=1, **part)
    together = rl.run(tiny, CORRUPTED, change)
    for row, prompt in zip(together, CORRUPTED, strict=True):
        alone = rl.run(tiny, prompt, change)[0]
        torch.testing.assert_close(row[: len(alone)], alone, rtol=1e-5, atol=1e-5)
    cells, metric = [change], rl.metrics.logit_diff(5, 9)
    swept = rl.sweep(tiny, None, CORRUPTED, cells, metric).values[0]
    each = [rl.sweep(tiny, None, prompt, cells, metric).values[0] for prompt in CORRUPTED]
    torch.testing.assert_close(swept, torch.cat(each), rtol=1e-5, atol=1e-5)
