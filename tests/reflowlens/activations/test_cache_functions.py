"""TransformerLens's functions of a cache: what they cannot compute with is one clear error, never a number."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from reflowlens.errors import ReflowlensError
from tests.support.tiny import random_model

CACHE = random_model("reflow").run_with_cache("abcd", names_filter=lambda name: True)[1]
STACK = CACHE.accumulated_resid()
NO_LAYERS = ["a", "2", [], [1], {}, object(), b"x", float("nan"), 1.0, 2.5, True, torch.tensor([1, 2]), -2, 3, 2**70]
NO_STACKS = ["a", 1, 2.5, [1.0], {}, object()]


@pytest.mark.parametrize(
    ("function", "argument", "others", "wrong", "message"),
    [
        (
            "accumulated_resid",
            "layer",
            {},
            NO_LAYERS,
            "layer must be an integer from 0 to 2",
        ),
        ("accumulated_resid", "pos_slice", {}, [1.5, "a", object(), {}, 99], r"cache.accumulated_resid\(pos_slice="),
        ("decompose_resid", "layer", {}, NO_LAYERS, "layer must be an integer from 0 to 2"),
        ("decompose_resid", "mode", {}, ["mlps", 1, None], "mode must be 'all', 'mlp' or 'attn'"),
        ("stack_activation", "layer", {"activation_name": "z"}, NO_LAYERS, "layer must be an int"),
        ("stack_head_results", "pos_slice", {}, [1.5, "a", 99], r"cache.stack_head_results\(pos_slice="),
        ("stack_neuron_results", "layer", {}, [2**70, 1.5, "a"], "layer must be an integer from 0 to 2"),
        (
            "get_neuron_results",
            "neuron_slice",
            {"layer": 0},
            [1.5, "a", 2**70],
            r"cache.get_neuron_results\(layer=0, neu",
        ),
        ("apply_ln_to_stack", "residual_stack", {}, NO_STACKS, "cannot be computed"),
        ("logit_attrs", "tokens", {"residual_stack": STACK}, [2**70, "ab", {}, -1, 288], "token"),
        ("logit_attrs", "residual_stack", {"tokens": "a"}, NO_STACKS, "cannot be computed"),
        ("apply_slice_to_batch_dim", "batch_slice", {}, [1.5, "a", object(), 7, 2**70], "cannot be computed"),
    ],
)
def test_what_cannot_be_computed_with_is_named(
    function: str, argument: str, others: dict[str, Any], wrong: list[Any], message: str
) -> None:
    for value in wrong:
        with pytest.raises(ReflowlensError, match=message):
            raise AssertionError(f"{value!r} gave {getattr(CACHE, function)(**others, **{argument: value})}")


@pytest.mark.parametrize("number", [np.int64(1), torch.tensor(1), np.array(1)])
def test_a_layer_of_numpy_or_torch_is_a_layer(number: Any) -> None:
    assert CACHE.accumulated_resid(layer=number).equal(STACK[:2])
    assert CACHE.decompose_resid(number).equal(CACHE.decompose_resid(1))
    assert CACHE.stack_head_results(number, pos_slice=number).equal(CACHE.stack_head_results(1, pos_slice=1))
