"""Weights in about four bits each: whole multiples of one step a row, with short codes for the frequent ones.

A row w becomes integers round(w / step) in a byte each, and every byte a Huffman code (deflate without its search for
repetitions, in a gzip file). For a Gaussian row of standard deviation σ the codes average log2(√(2πe) σ / step) bits,
and the squared error is step² / 12: a step chosen by σ, and not by the largest weight, costs least for an error. 4.3
bits leave 0.4% of the squared norm as error, a bit more a quarter of that.

Where it is known what a matrix is multiplied with, errors are put where they matter least: rows that matter more get
smaller steps, and what rounding does to one weight the next ones make up for, as far as their inputs go together
(Frantar et al., 2022, "GPTQ").
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from reflowlens.errors import ReflowlensError
from reflowlens.storage.folders import write_tensors

LARGEST = 127  # code of a signed byte
STEP_TYPE = torch.bfloat16  # any step will do, and a row has few weights
FINEST_TO_COARSEST = (1 / 4, 1.5)  # step of a row by what it is used for, against its step in proportion to σ
STEP = ".step"  # after a tensor's name, its steps
GZIP = 31  # as zlib names the format: a header, deflated data, a check sum and the length


class Quantised(NamedTuple):
    """Integers, and what one of them is worth in each row."""

    codes: Int8[Tensor, "row *columns"]
    step: Float[Tensor, " row"]

    def values(self) -> Float[Tensor, "row *columns"]:
        """The weights, in float32."""
        return self.codes * self.step.float().view(-1, *[1] * (self.codes.ndim - 1))


class Use(NamedTuple):
    """How much errors of a matrix matter: Σ_i weight_i ‖δ_i‖² over rows, and δ along one axis by the second moments of
    what that axis is multiplied with.

    Where inputs x come to the columns, x Wᵀ, that axis is the columns and ``gram`` E[xᵀx]; where the rows are summed
    with weights a, a W, it is the rows and ``gram`` E[aᵀa].
    """

    weight: Float[Tensor, " row"]
    gram: Float[Tensor, "n n"]
    along: Literal["rows", "columns"]


def quantise(W: Float[Tensor, "row *columns"], bits: float, use: Use | None = None) -> Quantised:
    """Multiples of a step, which each row has of its own.

    Args:
        bits: that a weight of a Gaussian row takes on average, between 1 and 8. A row whose largest weight is further
            out than 126 steps of that size gets a larger one; so does every row from about 7 bits on. With ``use``,
            that a weight takes on average over the matrix.
        use: what the errors are to be small for. Its cost grows with the third power of the size of ``use.gram``.

    Returns:
        Codes and steps. Without ``use`` no weight is changed by more than half a step.

    Raises:
        ReflowlensError: ``bits`` is out of range.
    """
    if isinstance(bits, bool) or not isinstance(bits, int | float) or not 1 <= bits <= 8:
        raise ReflowlensError(f"bits must be a number from 1 to 8, got {bits!r}")
    rows = W.detach().cpu().double().flatten(1)
    step = _steps(rows, 2.0**-bits)
    if use is None:
        return Quantised(_codes(rows / step.double()[:, None]).view(W.shape), step)
    share = use.weight.cpu().double() * rows.square().mean(1)  # of the error, at steps in proportion to σ
    finer = (share + 1e-6 * share.mean() + 1e-300).rsqrt()
    finer = (finer / finer.log().mean().exp()).clamp(*FINEST_TO_COARSEST)
    codes = _codes(rows / _steps(rows, finer * 2.0**-bits).double()[:, None]).view(W.shape)
    step = _steps(rows, finer * 2.0 ** (entropy(codes) - 2 * bits))  # a bit is a factor of two
    if use.along == "rows":
        codes = compensated(rows, step.double()[:, None], use.gram)
    else:
        codes = compensated(rows.T, step.double()[None], use.gram).T
    return Quantised(codes.contiguous().view(W.shape), step)


def _steps(rows: Float[Tensor, "row column"], relative: Float[Tensor, " row"] | float) -> Float[Tensor, " row"]:
    """√(2πe) σ times ``relative``, but no less than the largest weight of a row needs."""
    sigma = rows.square().mean(1).sqrt()
    step = torch.maximum(sigma * math.sqrt(2 * math.pi * math.e) * relative, rows.abs().amax(1) / (LARGEST - 1))
    step = torch.where(step > 0, step, 1.0).to(STEP_TYPE)
    if not bool((step.isfinite() & (step > 0)).all()):
        raise ReflowlensError(f"weights as small or large as {float(rows.abs().max()):.1e} cannot be packed")
    return step


def _codes(weights: Float[Tensor, "*shape"], largest: int = LARGEST) -> Int8[Tensor, "*shape"]:
    return weights.round().clamp(-largest, largest).to(torch.int8)


def entropy(codes: Int8[Tensor, "row *columns"]) -> float:
    """Bits a code, of the frequencies in each part that is stored together."""
    parts = codes.movedim(0, -2).flatten(0, -3) if codes.ndim > 2 else codes[None]
    frequencies = torch.stack([(part.flatten().int() + 128).bincount(minlength=256) for part in parts]).double()
    p = frequencies / frequencies.sum(1, keepdim=True)
    return float(-torch.xlogy(p, p).sum(1).mean() / math.log(2))


def compensated(
    W: Float[Tensor, "n m"],
    step: Float[Tensor, "#n #m"],
    gram: Float[Tensor, "n n"],
    block: int = 64,
    largest: int = LARGEST,
) -> Int8[Tensor, "n m"]:
    """Codes up to ``largest`` with a small tr(δᵀ G δ): one n after the other, the error of each spread over those to
    come.

    With G⁻¹ = UᵀU, the best answer to an error e at j is -e U[j, k] / U[j, j] at each later k.
    """
    order = gram.diagonal().argsort(descending=True)  # those that matter most while there is most to answer with
    W, G = W[order].clone(), gram.cpu().double()[order][:, order]
    step = step.expand(len(W), -1)[order]
    G = G + 0.03 * (G.diagonal().mean() + 1e-300) * torch.eye(len(G), dtype=G.dtype)
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(G)), upper=True)
    codes = torch.empty(W.shape, dtype=torch.int8)
    for start in range(0, len(W), block):
        stop = min(start + block, len(W))
        errors = torch.empty(stop - start, W.shape[1], dtype=W.dtype)
        for j in range(start, stop):
            codes[j] = _codes(W[j] / step[j], largest)
            errors[j - start] = (W[j] - codes[j] * step[j]) / U[j, j]
            W[j + 1 : stop] -= U[j, j + 1 : stop, None] * errors[j - start]
        W[stop:] -= U[start:stop, stop:].T @ errors
    return codes[order.argsort()]


def write_packed(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: dict[str, str],
    bits: float,
    uses: Mapping[str, Use] | None = None,
) -> None:
    """Write a gzipped safetensors file: matrices and larger tensors as :func:`quantise` makes them, others as they are.

    Equal input gives equal bytes.

    Args:
        uses: what tensors are used for, by name.

    Raises:
        ReflowlensError: ``bits`` is out of range.
    """
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.ndim < 2:
            stored[name] = tensor
            continue
        quantised = quantise(tensor, bits, (uses or {}).get(name))
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
