"""A packed model, with what is used here of the interface of an open safetensors file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from reflowlens.checkpoints import FORMAT, read_packed_model


class Unpacked:
    """Held whole, for its tensors are compressed as one.

    Raises:
        ReflowlensError: the file is damaged, of another version, or no model.
    """

    def __init__(self, path: Path) -> None:
        cfg, self._tensors = read_packed_model(path)
        self._config = json.dumps(cfg.to_dict())

    def metadata(self) -> dict[str, str]:
        return {"format": FORMAT, "config": self._config}

    def keys(self) -> Iterable[str]:
        return self._tensors.keys()

    def get_tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def get_slice(self, name: str) -> Rows:
        return Rows(self._tensors[name])


class Rows:
    """Rows of a tensor, by their numbers."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def __getitem__(self, rows: Any) -> Tensor:
        return self._tensor[rows]
