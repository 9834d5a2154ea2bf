"""What the statistics of a stream are shown of each batch: against each prompt alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reflowlens.activations.stream import Occurrences, measured
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from tests.support.tiny import random_model

TEXTS = ["The king of France", "A stone", "Water runs down", "x", "Of all the days"]
POINTS = ["blocks.1.hook_resid_post", "blocks.0.attn.hook_z"]


def seen(name: str, x: Tensor, occurrences: Occurrences) -> tuple[Tensor, Occurrences]:
    return x.clone(), occurrences


@pytest.mark.parametrize("positions", [slice(None), slice(1, None), slice(-1, None)])
@pytest.mark.parametrize("batches", [TEXTS, [TEXTS[:2], TEXTS[2:]], [[text] * 2 for text in TEXTS]])
def test_what_is_seen_of_each_prompt_is_what_it_gives_alone(
    model: HookedModel, batches: list, positions: slice
) -> None:
    stream = measured(model, batches, POINTS, seen, positions=positions)
    for (parts, n_rows, n_positions), texts in zip(stream, batches, strict=True):
        texts = [texts] if isinstance(texts, str) else texts
        alone = [model.run_with_cache(text, names_filter=POINTS)[1] for text in texts]
        own = [torch.arange(cache.tokens.shape[1])[positions] for cache in alone]
        assert n_rows == len(texts)
        assert n_positions == sum(cache.tokens.shape[1] for cache in alone)
        assert list(parts) == ([] if not sum(map(len, own)) else POINTS)
        for name, (x, occurrences) in parts.items():
            expected = torch.cat([cache[name][0, at] for cache, at in zip(alone, own, strict=True)])
            torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)
            assert occurrences.row.tolist() == [row for row, at in enumerate(own) for _ in at]
            assert torch.equal(occurrences.position, torch.cat(own))
            assert torch.equal(
                occurrences.token, torch.cat([c.tokens[0, at] for c, at in zip(alone, own, strict=True)])
            )


def test_prompts_that_are_skipped_are_not_run() -> None:
    model, ran = random_model("reflow"), []
    with model.hooks([("hook_embed", lambda x, hook: ran.append(len(x)))]):
        batches = list(measured(model, [TEXTS[:2], TEXTS[2:4], TEXTS[4]], ["hook_embed"], seen, skip=3))
    assert ran == [1, 1]
    assert [(len(parts), n_rows) for parts, n_rows, _ in batches] == [(0, 0), (1, 1), (1, 1)]
    assert [n_positions for *_, n_positions in batches] == [sum(map(len, TEXTS[:2])), sum(map(len, TEXTS[2:4])), 15]
    assert batches[1][0]["hook_embed"][1].row.tolist() == [0]  # the text "x", counted from the first that is run


def test_a_batch_is_measured_at_every_point_or_not_at_all() -> None:
    """An error at the second point: what was made of earlier batches is all that the reader has."""
    model, made = random_model("reflow"), []

    def refuse(name: str, x: Tensor, occurrences: Occurrences) -> int:
        if name == POINTS[0] and len(x) == len(TEXTS[1]):
            raise ReflowlensError("a fault")
        return len(x)

    with pytest.raises(ReflowlensError, match="a fault"):
        made.extend(parts for parts, *_ in measured(model, TEXTS, POINTS, refuse))
    assert made == [dict.fromkeys(POINTS, len(TEXTS[0]))]
    assert not any(point.fwd_hooks for point in model.hook_dict.values())
