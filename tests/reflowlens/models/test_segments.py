"""Several texts in one row: each must be read as if it stood alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reflowlens.errors import ReflowlensError
from reflowlens.models.attention import KeyValueCache
from reflowlens.models.base import HookedModel
from tests.support.tiny import assert_close, random_tokens

# Lengths of a row's texts and the id of each; 24 positions in all. An id may come again: a text is a run of equal ids.
ROWS = [
    ([5, 1, 7, 11], [0, 1, 2, 3]),
    ([24], [9]),
    ([3, 3, 3, 15], [4, 7, 4, -1]),
    ([24], [-1]),
]
SEGMENTS = torch.stack(
    [torch.repeat_interleave(torch.tensor(ids), torch.tensor(lengths)) for lengths, ids in ROWS],
)


def texts() -> list[tuple[int, slice]]:
    """Row and columns of every text, padding included."""
    found = []
    for row, (lengths, _) in enumerate(ROWS):
        start = 0
        for length in lengths:
            found.append((row, slice(start, start + length)))
            start += length
    return found


@pytest.fixture
def packed(model: HookedModel) -> Tensor:
    return random_tokens(model.cfg, batch=len(ROWS), pos=24, seed=5)


def test_packed_texts_have_the_logits_of_texts_alone(model: HookedModel, packed: Tensor) -> None:
    logits = model(packed, segments=SEGMENTS)
    for row, columns in texts():
        assert_close(logits[row, columns], model(packed[row, columns])[0], what=f"row {row}, {columns}")


def test_so_has_every_activation_on_either_attention_path(model: HookedModel, packed: Tensor) -> None:
    """With everything cached attention goes through explicit scores; the texts alone go through SDPA."""
    logits, cache = model.run_with_cache(packed, segments=SEGMENTS, names_filter=lambda name: True)
    assert_close(logits, model(packed, segments=SEGMENTS))
    for row, columns in texts():
        _, alone = model.run_with_cache(packed[row, columns])
        for name, expected in alone.items():
            if name != "hook_basis":
                assert_close(cache[name][row, columns], expected[0], 2e-5, what=name)


def test_attention_stays_within_a_text_and_is_causal(model: HookedModel, packed: Tensor) -> None:
    _, cache = model.run_with_cache(packed, segments=SEGMENTS, names_filter="blocks.1.attn.hook_pattern")
    pattern = cache["blocks.1.attn.hook_pattern"]
    allowed = torch.zeros(len(ROWS), 24, 24, dtype=torch.bool)
    for row, columns in texts():
        for query in range(columns.start, columns.stop):
            allowed[row, query, columns.start : query + 1] = True
    assert ((pattern > 0) == allowed[:, None]).all()
    torch.testing.assert_close(pattern.sum(-1), torch.ones_like(pattern[..., 0]))


def test_a_text_does_not_depend_on_its_neighbours(model: HookedModel, packed: Tensor) -> None:
    logits = model(packed, segments=SEGMENTS)
    for row, columns in texts():
        changed = (packed + 1) % 256
        changed[row, columns] = packed[row, columns]
        # To the bit: products of the same shapes, in which what a text does not see has weight 0.
        assert torch.equal(model(changed, segments=SEGMENTS)[row, columns], logits[row, columns])


def test_one_text_a_row_changes_nothing(model: HookedModel, packed: Tensor) -> None:
    assert_close(model(packed, segments=torch.zeros_like(packed)), model(packed))


def test_loss_and_gradients_are_those_of_the_texts_alone(model: HookedModel, packed: Tensor) -> None:
    """By default a text's last token, and padding, predicts nothing; the mean is over all predictions."""
    parameters = dict(model.named_parameters())
    losses = []
    for row, columns in texts():
        text = packed[row, columns]
        if SEGMENTS[row, columns.start] >= 0 and len(text) > 1:
            losses.append(F.cross_entropy(model(text)[0, :-1], text[1:], reduction="none"))
    expected = torch.cat(losses).mean()
    loss = model(packed, "loss", segments=SEGMENTS)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    ours = torch.autograd.grad(loss, list(parameters.values()))
    theirs = torch.autograd.grad(expected, list(parameters.values()))
    for name, a, b in zip(parameters, ours, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-5 * max(b.abs().max().item(), 1e-2), name


def test_padding_rows_do_not_count(model: HookedModel, packed: Tensor) -> None:
    with_padding = model(packed, "loss", segments=SEGMENTS)
    assert_close(with_padding, model(packed[:3], "loss", segments=SEGMENTS[:3]))
    assert torch.isfinite(model(packed[3:], segments=SEGMENTS[3:])).all()


def test_layers_can_be_run_in_two_halves(model: HookedModel, packed: Tensor) -> None:
    half = model(packed, stop_at_layer=1, segments=SEGMENTS)
    assert_close(model(half, start_at_layer=1, segments=SEGMENTS), model(packed, segments=SEGMENTS))


def test_what_segments_cannot_be(model: HookedModel, packed: Tensor) -> None:
    for wrong in (SEGMENTS[:, :7], SEGMENTS[0]):
        for return_type in ("logits", "loss"):
            with pytest.raises(ReflowlensError, match=r"segments must be \[batch, pos\] = \[4, 24\]"):
                model(packed, return_type, segments=wrong)
    with pytest.raises(ReflowlensError, match="key-value cache"):
        model(packed, segments=SEGMENTS, past_kv_cache=KeyValueCache(model.cfg, len(ROWS)))
