"""Weights in about four bits each: whole multiples of one step a row, with short codes for the frequent ones.

A row w becomes integers round(w / step) in a byte each, and every byte a Huffman code (deflate without its search for
repetitions, in a gzip file). For a Gaussian row of standard deviation σ the codes average log2(√(2πe) σ / step) bits,
and the squared error is step² / 12: a step chosen by σ, and not by the largest weight, costs least for an error. 4.3
bits leave 0.4% of the squared norm as error, a bit more a quarter of that.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from reflowlens.errors import ReflowlensError
from reflowlens.storage.folders import write_tensors

LARGEST = 127  # code of a signed byte
STEP_TYPE = torch.bfloat16  # any step will do, and a row has few weights
STEP = ".step"  # after a tensor's name, its steps
GZIP = 31  # as zlib names the format: a header, deflated data, a check sum and the length


class Quantised(NamedTuple):
    """Integers, and what one of them is worth in each row."""

    codes: Int8[Tensor, "row *columns"]
    step: Float[Tensor, " row"]

    def values(self) -> Float[Tensor, "row *columns"]:
        """The weights, in float32."""
        return self.codes * self.step.float().view(-1, *[1] * (self.codes.ndim - 1))


def quantise(W: Float[Tensor, "row *columns"], bits: float) -> Quantised:
    """The nearest multiples of a step, which each row has of its own.

    Args:
        bits: that a weight of a Gaussian row takes on average, between 1 and 8. A row whose largest weight is further
            out than 126 steps of that size gets a larger one; so does every row from about 7 bits on.

    Returns:
        Codes and steps; no weight is changed by more than half a step.

    Raises:
        ReflowlensError: ``bits`` is out of range.
    """
    if isinstance(bits, bool) or not isinstance(bits, int | float) or not 1 <= bits <= 8:
        raise ReflowlensError(f"bits must be a number from 1 to 8, got {bits!r}")
    rows = W.detach().cpu().double().flatten(1)
    sigma = rows.square().mean(1).sqrt()
    step = torch.maximum(sigma * math.sqrt(2 * math.pi * math.e) / 2**bits, rows.abs().amax(1) / (LARGEST - 1))
    step = torch.where(step > 0, step, 1.0).to(STEP_TYPE)
    codes = (rows / step.double()[:, None]).round().clamp(-LARGEST, LARGEST)
    return Quantised(codes.to(torch.int8).view(W.shape), step)


def write_packed(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str], bits: float) -> None:
    """Write a gzipped safetensors file: matrices and larger tensors as :func:`quantise` makes them, others as they are.

    Equal input gives equal bytes.

    Raises:
        ReflowlensError: ``bits`` is out of range.
    """
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.ndim < 2:
            stored[name] = tensor
            continue
        quantised = quantise(tensor, bits)
        stored[name + STEP] = quantised.step
        # Of several parts of a row (the layers that a feature writes to) each lies with its like in the other rows, so
        # that small ones get codes of their own.
        stored[name] = quantised.codes.movedim(0, -2).contiguous()
    plain = path.with_name(f".{path.name}")
    write_tensors(plain, stored, metadata)
    packer = zlib.compressobj(9, zlib.DEFLATED, GZIP, 9, zlib.Z_HUFFMAN_ONLY)
    path.write_bytes(packer.compress(plain.read_bytes()) + packer.flush())
    plain.unlink()


def read_packed(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a file that :func:`write_packed` wrote.

    Raises:
        ReflowlensError: it is damaged, cut short, or something else.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        data = _unpacked(path.read_bytes())
        stored = load(data)
        (length,) = struct.unpack("<Q", data[:8])
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    except (OSError, ValueError, KeyError, zlib.error, SafetensorError) as error:
        raise ReflowlensError(f"{path} is not a readable packed file: {error}") from error
    steps = {name: stored.pop(name) for name in list(stored) if name.endswith(STEP)}
    for name, step in steps.items():
        of = name.removesuffix(STEP)
        codes = stored.get(of)
        if codes is None or codes.ndim < 2 or codes.dtype != torch.int8 or step.shape != codes.shape[-2:-1]:
            raise ReflowlensError(f"{path} is not a readable packed file: {name} is no list of the steps of {of}")
        stored[of] = Quantised(codes.movedim(-2, 0), step).values()
    return metadata, stored


def _unpacked(data: bytes) -> bytes:
    """Of gzipped data without repetitions, in which no byte takes less than a bit: a file of zeros is no such data."""
    unpacker, limit = zlib.decompressobj(GZIP), 8 * len(data)
    whole = unpacker.decompress(data, limit + 1)
    if len(whole) > limit:
        raise ValueError(f"it unpacks to more than {limit:,} bytes")
    if not unpacker.eof or unpacker.unused_data:
        raise ValueError("it is cut short, or something was added to it")
    return whole
