from __future__ import annotations

import threading

import pytest
import torch

from pretraining.prefetch import prefetched

CPU = torch.device("cpu")


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([step]), torch.tensor([step + 1])


def test_batches_come_in_order_and_the_next_is_loading_meanwhile() -> None:
    loaded: list[int] = []
    ready = {step: threading.Event() for step in range(3, 8)}

    def load(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        loaded.append(step)
        ready[step].set()
        return batch(step)

    with prefetched(load, range(3, 7), CPU) as batches:
        assert int(next(batches)[0]) == 3
        assert ready[4].wait(5)  # nobody has asked for it yet
        assert [int(x) for x, _ in batches] == [4, 5, 6]
    assert loaded == [3, 4, 5, 6]
    with prefetched(load, range(7, 7), CPU) as batches:
        assert list(batches) == []


def test_an_error_is_raised_when_its_batch_is_due() -> None:
    def load(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        if step == 2:
            raise OSError("the disk is gone")
        return batch(step)

    with prefetched(load, range(5), CPU) as batches:
        assert [int(next(batches)[0]) for _ in range(2)] == [0, 1]
        with pytest.raises(OSError, match="the disk is gone"):
            next(batches)
