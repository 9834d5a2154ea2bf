"""Statistics of the tensors in safetensors files, read a few million numbers at a time: a file is never held whole.

A packed model is held whole: its tensors are compressed as one.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from reflowlens.errors import ReflowlensError
from reflowlens.inspection.unpacked import Unpacked
from reflowlens.storage.opening import open_safetensors
from reflowlens.storage.packed_file import is_packed

LARGEST_HEADER = 100_000_000  # bytes of a safetensors header, by the format
CHUNK = 1 << 22  # numbers held at a time, as float64: 32 MiB
# The first name that fits decides: a norm inside an attention layer is a norm.
_PARTS = (
    ("norms", re.compile(r"norm|(^|[._])ln(_?\w*)?\.|layer_?scale", re.IGNORECASE)),
    ("readout", re.compile(r"lm_head|unembed|embed_out|output\.weight", re.IGNORECASE)),
    ("recipe", re.compile(r"W_recipe", re.IGNORECASE)),
    ("signal basis", re.compile(r"W_basis", re.IGNORECASE)),
    ("embedding", re.compile(r"embed|wte|wpe|W_pos", re.IGNORECASE)),
    ("attention", re.compile(r"att(e)?n", re.IGNORECASE)),
    ("mlp", re.compile(r"mlp|feed_?forward|ffn|expert", re.IGNORECASE)),
)


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies and its shape."""

    file: Path
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def shape_text(self) -> str:
        return " × ".join(map(str, self.shape))


@dataclass
class Weights:
    """The tensors of one or several safetensors files under their names; a context, open while it lasts.

    Attributes:
        tensors: name -> where it is.
        metadata: the text that the headers carry.
        problems: files that could not be read, and why.
    """

    files: Iterable[Path]
    tensors: dict[str, Stored] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    _open: dict[Path, Any] = field(default_factory=dict)
    _stack: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Weights:
        for path in self.files:
            try:
                file = Unpacked(path) if is_packed(path) else self._stack.enter_context(open_safetensors(path))
            except ReflowlensError as error:
                reason = error if is_packed(path) else _diagnosis(path) or error.__cause__
                self.problems.append(f"{path.name} cannot be read: {reason}")
                continue
            self._open[path] = file
            self.metadata |= file.metadata() or {}
            for name in file.keys():  # noqa: SIM118 (it is no dictionary)
                self.tensors[name] = Stored(path, tuple(file.get_slice(name).get_shape()))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def chunks(self, name: str) -> Iterator[Tensor]:
        """A tensor in order, whole rows at a time."""
        stored = self.tensors[name]
        file = self._open[stored.file]
        if stored.size <= CHUNK:
            yield file.get_tensor(name)
            return
        rows = max(1, CHUNK // math.prod(stored.shape[1:]))
        tensor = file.get_slice(name)
        for start in range(0, stored.shape[0], rows):
            yield tensor[start : start + rows]

    def whole(self, name: str) -> Tensor:
        """A tensor in float32, for those known to be small."""
        return torch.cat(list(self.chunks(name))).float()


def _diagnosis(path: Path) -> str:
    """What is wrong with a safetensors file, where its size says it."""
    if not path.is_file():
        return ""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= size - 8:
            return "it does not begin with a safetensors header (is it another format, or cut short?)"
        if length > LARGEST_HEADER:
            return f"its header of {length:,} bytes is beyond the {LARGEST_HEADER:,} that the format allows"
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            expected = 8 + length + max(ends, default=0)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return ""
    if size == expected:
        return ""
    return f"its header promises {expected:,} bytes and it has {size:,}{' (cut short)' if size < expected else ''}"


def part_of(name: str) -> str:
    """The part of a model that a parameter's name says it belongs to, in the names of any usual library.

    >>> part_of("model.layers.3.self_attn.q_proj.weight"), part_of("blocks.0.ln1.w"), part_of("h.0.adapter")
    ('attention', 'norms', 'other')
    """
    return next((part for part, pattern in _PARTS if pattern.search(name)), "other")


def tensor_statistics(weights: Weights, name: str) -> dict[str, Any]:
    """One tensor's row: mean, standard deviation (of the population), norm (Frobenius), extremes, and counts.

    Statistics are of the finite values, in float64; ``zeros`` is the share of exact zeros.
    """
    stored = weights.tensors[name]
    count = stored.size
    total = squares = 0.0
    low, high = math.inf, -math.inf
    zeros = nan = infinite = 0
    dtype = ""
    for chunk in weights.chunks(name):
        dtype = str(chunk.dtype).removeprefix("torch.")
        if not count:  # a file may hold hundreds of thousands of them
            break
        values = _wide(chunk)
        nan += int(values.isnan().sum())
        infinite += int(values.isinf().sum())
        finite = values if values.isfinite().all() else values[values.isfinite()]
        if finite.numel():
            total, squares = total + float(finite.sum()), squares + float(finite.square().sum())
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
            zeros += int((finite == 0).sum())
    n = count - nan - infinite
    mean = total / n if n else math.nan
    return {
        "name": name,
        "part": part_of(name),
        "shape": stored.shape_text,
        "dtype": dtype,
        "parameters": count,
        "mean": mean,
        "std": max(squares / n - mean**2, 0.0) ** 0.5 if n else math.nan,
        "norm": squares**0.5,
        "min": low if n else math.nan,
        "max": high if n else math.nan,
        "zeros": zeros / count if count else 0.0,
        "nan": nan,
        "infinite": infinite,
    }


def _wide(tensor: Tensor) -> Tensor:
    """Flat and in float64; of complex numbers both components."""
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).flatten().double()


def difference(ours: Weights, theirs: Weights, name: str) -> dict[str, Any]:
    """How far two tensors of one name are apart.

    ``relative`` is ‖ours − theirs‖ / ‖theirs‖ (Frobenius; not finite where a value of either is not) and ``max_abs``
    the largest single difference of two finite values (NaN where there are none).
    """
    shapes = [side.tensors[name].shape_text if name in side.tensors else "" for side in (ours, theirs)]
    row: dict[str, Any] = {"name": name, "shape": shapes[0], "other_shape": shapes[1]}
    held = (name in ours.tensors, name in theirs.tensors)
    if not all(held) or shapes[0] != shapes[1]:
        where = {(True, False): "only here", (False, True): "only there"}.get(held, "shape")
        return row | {"state": where, "relative": math.nan, "max_abs": math.nan}
    apart = size = 0.0
    largest: list[float] = []
    same = True
    for a, b in zip(map(_wide, ours.chunks(name)), map(_wide, theirs.chunks(name)), strict=True):
        same = same and torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan())
        gap = (a - b).abs()
        apart, size = apart + float(gap.square().sum()), size + float(b.square().sum())
        finite = gap[gap.isfinite()]
        largest += [float(finite.max())] if finite.numel() else []
    relative = (apart / size) ** 0.5 if size else (math.inf if apart else 0.0)
    state = "same" if same else "differs"
    return row | {"state": state, "relative": relative, "max_abs": max(largest, default=math.nan)}


def parts_frame(tensors: pd.DataFrame) -> pd.DataFrame:
    """Parameters by part of the model: ``part``, ``tensors``, ``parameters``, ``share``."""
    groups = tensors.groupby("part", sort=False)["parameters"].agg(tensors="size", parameters="sum").reset_index()
    groups["share"] = groups["parameters"] / groups["parameters"].sum()
    return groups
