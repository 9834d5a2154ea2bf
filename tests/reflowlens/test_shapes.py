"""The checks of shapes that ``REFLOWLENS_SHAPES=1`` turns on see what is wrong, and nothing else."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from tests.support.shapes import checked


@checked
def product(a: Float[Tensor, "row k"], b: Float[Tensor, "k column"], scale: int = 1) -> Float[Tensor, "row column"]:
    return scale * a @ b.reshape(a.shape[-1], -1)


def test_what_is_as_annotated_passes():
    assert product(torch.ones(2, 3), torch.ones(3, 4), scale=True).shape == (2, 4)


@pytest.mark.parametrize(
    ("a", "b", "part"),
    [((2, 3), (4, 3), "b"), ((2, 3), (12,), "b"), ((2, 2, 3), (3, 4), "a")],
    ids=["other length", "other number of axes", "of the first"],
)
def test_what_is_not_is_named(a: tuple[int, ...], b: tuple[int, ...], part: str):
    with pytest.raises(AssertionError, match=f"product: {part} is no"):
        product(torch.ones(a), torch.ones(b))


def test_an_error_of_the_function_s_own_comes_first():
    with pytest.raises(RuntimeError):
        product(torch.ones(2, 3), torch.ones(4))
