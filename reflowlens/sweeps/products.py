"""Products of matrices in float32 on a CPU by oneDNN, which knows more processors' vector units than MKL.

torch multiplies float32 by MKL. On a processor that is not Intel's, MKL keeps to AVX2: a core of an AMD EPYC with
AVX-512 reaches 105 GFLOP/s with it, and 230 by oneDNN, which torch has, too, and takes for 16 bits. Where the two are
level nothing is lost. Results differ by the order of their sums.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode

_MATMUL = (torch.Tensor.matmul, torch.matmul)  # `@` is the former


class OneDNNProducts(TorchFunctionMode):
    """While it is active, a matrix product is oneDNN's where that is possible: a float32 batch times one matrix.

    Every other call of torch is left as it is: in other types, on other devices, of tensors that need a gradient, of
    several matrices each.

    >>> x, weight = torch.randn(5, 3, 16), torch.randn(16, 8)
    >>> with torch.no_grad(), OneDNNProducts():
    ...     y = x @ weight
    >>> torch.allclose(y, x @ weight, atol=1e-5)
    True
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _MATMUL and not kwargs and _is_possible(*args):
            return _product(*args)
        return func(*args, **(kwargs or {}))


def _is_possible(x: Tensor, matrix: Tensor) -> bool:
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False  # not in this build of torch, or switched off
    plain = all(each.dtype == torch.float32 and each.device.type == "cpu" and each.numel() for each in (x, matrix))
    if not plain or matrix.ndim != 2 or x.ndim < 2 or x.shape[-1] != matrix.shape[0]:
        return False
    of_gradients = torch.is_grad_enabled() and (x.requires_grad or matrix.requires_grad)
    return not of_gradients and not torch.is_autocast_enabled("cpu")


def _product(x: Float[Tensor, "*batch a"], matrix: Float[Tensor, "a b"]) -> Float[Tensor, "*batch b"]:
    # oneDNN's inner product takes the matrix as torch's linear layers have it, [b, a]; a view of the transpose will do.
    return torch.ops.mkldnn._linear_pointwise(x, matrix.mT, None, "none", [], "")
