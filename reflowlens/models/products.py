"""Matrix products in float32, by that of torch's two libraries which makes use of the processor.

On a CPU torch multiplies float32 by MKL, which leaves the AVX-512 instructions of processors that are not Intel's
unused and takes twice as long there as oneDNN, which torch carries too.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)  # other kinds of tensors have products of their own
_SCHEMA = (
    "mkldnn::_linear_pointwise(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, str? algorithm) -> Tensor Y"
)
_MANY = 2**10  # rows, from which on a product takes longer than making its kernel
_SMALL = 2**20  # multiplications, below which a call of oneDNN takes longer than one of MKL


def product(x: Float[Tensor, "*batch k"], matrix: Float[Tensor, "k n"]) -> Float[Tensor, "*batch n"]:
    """``x @ matrix``, with gradients of any order.

    Under autocast and in a compiled graph the product is torch's own, of the types and kernels that these choose.
    """
    if torch.compiler.is_compiling() or not _takes_onednn(x, matrix):
        return x @ matrix
    if torch.is_grad_enabled() and (x.requires_grad or matrix.requires_grad):
        return _Product.apply(x, matrix)
    return _by_onednn(x, matrix)


def products(
    x: Float[Tensor, "*#batch row k"], matrices: Float[Tensor, "*#batch k n"]
) -> Float[Tensor, "*batch row n"]:
    """``x @ matrices``: one product after the other where :func:`product` is faster than all of them at once."""
    if torch.compiler.is_compiling() or 0 in (*x.shape, *matrices.shape):
        return x @ matrices
    if not _takes_onednn(_first(x), _first(matrices)):
        return x @ matrices
    batch = torch.broadcast_shapes(x.shape[:-2], matrices.shape[:-2])
    pairs = zip(*(_stacked(factor, batch).unbind() for factor in (x, matrices)), strict=True)
    return torch.stack([product(own, matrix) for own, matrix in pairs]).unflatten(0, batch)


def _first(factor: Float[Tensor, "*batch row column"]) -> Float[Tensor, "row column"]:
    return factor[(0,) * (factor.ndim - 2)]


def _stacked(factor: Float[Tensor, "*#batch row column"], batch: torch.Size) -> Float[Tensor, "each row column"]:
    return factor.expand(*batch, -1, -1).flatten(0, -3)


def _takes_onednn(x: Tensor, matrix: Tensor) -> bool:
    """Not to be asked under a compiler: to it a size is a symbol, and what is asked of one a reason to compile anew."""
    if x.numel() * matrix.shape[1] < _SMALL or _is_traced() or not onednn_is_faster():
        return False
    if x.dtype != torch.float32 or matrix.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    if not (x.is_cpu and matrix.is_cpu and type(x) in _PLAIN and type(matrix) in _PLAIN):
        return False
    return matrix.is_contiguous() or matrix.mT.is_contiguous()  # oneDNN takes a thousand times as long for part of one


def _is_traced() -> bool:
    """Whether a transform (``torch.func``) or a mode such as ``FlopCounterMode`` follows what is computed, which know
    torch's own products.
    """
    return torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack() > 0


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this processor has AVX-512 and is not Intel's, and this torch has the operation that is called; the same
    for all runs, whatever else the machine does."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available() and _operation_is_known()):
        return False
    info = Path("/proc/cpuinfo")
    return info.exists() and "GenuineIntel" not in info.read_text(encoding="utf8")


def _operation_is_known() -> bool:
    """Whether it takes what is passed to it: it is torch's own affair, and another version may have another."""
    operation = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return str(getattr(getattr(operation, "default", None), "_schema", None)) == _SCHEMA


def _by_onednn(x: Float[Tensor, "*batch k"], matrix: Float[Tensor, "k n"]) -> Float[Tensor, "*batch n"]:
    """The product, of few different numbers of rows: oneDNN makes a kernel for each, and keeps it."""
    n_rows = x.numel() // x.shape[-1]
    rounded = _rounded_up(n_rows)
    if rounded == n_rows:
        return torch.ops.mkldnn._linear_pointwise(x, matrix.T, None, "none", [], "")
    rows = x.new_zeros(rounded, x.shape[-1])
    rows[:n_rows] = _rows(x)
    out = torch.ops.mkldnn._linear_pointwise(rows, matrix.T, None, "none", [], "")
    return out[:n_rows].view(*x.shape[:-1], -1)


def _rounded_up(n_rows: int) -> int:
    """A number of rows at most a sixteenth larger, of which there are sixteen between a power of two and the next; of
    many rows the number itself.

    >>> [_rounded_up(n) for n in (5, 32, 33, 1000, 1100)]
    [5, 32, 34, 1024, 1100]
    """
    step = 1 << max(n_rows.bit_length() - 5, 0)
    return n_rows if n_rows > _MANY else -(-n_rows // step) * step


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Tensor) -> Tensor:
        ctx.save_for_backward(x, matrix)
        return _by_onednn(x, matrix)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, matrix = ctx.saved_tensors
        (grad,) = grad_outputs
        needs_x, needs_matrix = ctx.needs_input_grad
        of_matrix = product(_rows(x).T, _rows(grad)) if needs_matrix else None
        return product(grad, matrix.T) if needs_x else None, of_matrix


def _rows(x: Float[Tensor, "*batch k"]) -> Float[Tensor, "row k"]:
    return x.reshape(-1, x.shape[-1])
