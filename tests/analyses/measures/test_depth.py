from __future__ import annotations

import itertools

import pytest

from analyses.measures.depth import chosen_layers, layer_grid, left_out
from analyses.measures.lens import lens_points, residual_points, unread
from reflowlens.errors import ReflowlensError


@pytest.mark.parametrize("n_layers", [1, 6, 12])
def test_nothing_is_left_out_of_a_model_of_ordinary_depth(n_layers: int) -> None:
    for quick in (False, True):
        assert layer_grid(n_layers, quick=quick) == list(range(n_layers + 1))
    assert lens_points(n_layers) == residual_points(n_layers)
    assert left_out(layer_grid(n_layers), n_layers) == unread(n_layers) == []


@pytest.mark.parametrize("n_layers", [13, 30, 61])
def test_a_grid_of_a_deep_model_has_its_ends_and_its_half_and_grows_no_further(n_layers: int) -> None:
    for quick, size in ((False, 13), (True, 7)):
        grid = layer_grid(n_layers, quick=quick)
        assert len(grid) == len(set(grid)) == size
        assert {0, n_layers // 2, n_layers} <= set(grid)
        steps = [after - before for before, after in itertools.pairwise(grid)]
        assert max(steps) - min(steps) <= 1
    depths = [point.depth for point in lens_points(n_layers)]
    assert len(depths) == min(n_layers, 24) + 1
    assert {0, n_layers // 2, n_layers} <= set(depths)


def test_layers_can_be_chosen() -> None:
    assert chosen_layers(None, 3) == [0, 1, 2, 3]
    assert chosen_layers([7, 3, 7], 20) == [0, 3, 7, 10, 20]
    assert left_out([0, 10, 20], 20) == ["measured at 3 of 21 layers: 0, 10, 20"]
    for wrong in ([21], [-1], ["a"], 2.5):
        with pytest.raises(ReflowlensError, match="layers"):
            chosen_layers(wrong, 20)  # type: ignore[arg-type]
