"""Every architecture and every kind of node: incoming edges add up, and every edge is that of autograd."""

from __future__ import annotations

import pytest

from tests.support.exactness import TESTED, measure


@pytest.mark.parametrize(("model", "nodes"), TESTED)
def test_every_edge_is_that_of_autograd_and_they_add_up(model, nodes):
    worst = measure(model, nodes)
    assert worst.sums < 1e-4
    assert worst.edges < 1e-5
    assert worst.values < 1e-5
    assert worst.n_targets >= (7 if "directions" in nodes else 30)
