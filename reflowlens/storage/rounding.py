"""Matrices as small integers: codes of a few bits, and a step for each row.

A row is what shares a step: of a table the vector of a token, of any other matrix [.., input, output] the weights of
one output. Its codes are round(w / step) between ±(2^(bits-1) - 1), ±31 for 6 bits. The step is the largest weight's
share (round to nearest), or what leaves the row the least squared error when a few large weights are cut off (a search
over clips), or that with each weight's error made up for by those behind it, as far as inputs go together (Frantar et
al., 2022, "GPTQ").
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int8, Num
from torch import Tensor

from reflowlens.arguments import is_one_of, whole_number
from reflowlens.errors import ReflowlensError
from reflowlens.storage.quantised import compensated, entropy

Method = Literal["rtn", "clip", "gptq"]
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6)  # of a row's largest weight
STEP_TYPE = torch.float16


class Rounded(NamedTuple):
    """Codes in the order of the tensor, and the step of each row."""

    codes: Int8[Tensor, "*shape"]
    step: Float[Tensor, " row"]
    is_table: bool

    def values(self) -> Float[Tensor, "*shape"]:
        """The weights, in float32."""
        rows = as_rows(self.codes, self.is_table).float() * self.step.float()[:, None]
        return from_rows(rows, self.codes.shape, self.is_table)

    @property
    def bits_of_entropy(self) -> float:
        """Bits a code of the best code for how often each occurs."""
        return entropy(self.codes.flatten()[None])


def as_rows(W: Num[Tensor, "*shape"], is_table: bool) -> Num[Tensor, "row column"]:
    """A tensor as the matrix whose rows share a step."""
    return W.flatten(1) if is_table else W.mT.flatten(0, -2)


def from_rows(rows: Num[Tensor, "row column"], shape: torch.Size, is_table: bool) -> Num[Tensor, "*shape"]:
    """The inverse of :func:`as_rows`."""
    return rows.view(shape) if is_table else rows.view(*shape[:-2], shape[-1], shape[-2]).mT.contiguous()


def rounded(
    W: Float[Tensor, "*shape"],
    bits: int,
    method: Method = "clip",
    *,
    is_table: bool = False,
    gram: Float[Tensor, "input input"] | None = None,
) -> Rounded:
    """A matrix as codes and steps.

    Args:
        W: [.., input, output], or a table [row, column].
        bits: of a code, 2 to 8.
        method: how steps and codes are chosen; without ``gram``, ``"gptq"`` is ``"clip"``.
        gram: E[xᵀx] of what the inputs are.

    Raises:
        ReflowlensError: ``bits`` or ``method`` is none of these, or a weight is not finite.

    Example: ``rounded(torch.randn(64, 32), 6).values()``
    """
    check_rounding(bits, method)
    rows = as_rows(W.detach().cpu().double(), is_table)
    if not bool(rows.isfinite().all()):
        raise ReflowlensError("a matrix with NaN or infinite weights cannot be packed")
    largest = 2 ** (bits - 1) - 1
    step = _clipped_steps(rows, largest, (1.0,) if method == "rtn" else CLIPS)
    if method == "gptq" and gram is not None and not is_table:
        if gram.shape != (rows.shape[1],) * 2:
            raise ReflowlensError(f"gram is {list(gram.shape)}, and this matrix has {rows.shape[1]} inputs")
        codes = compensated(rows.T, step.double()[None], gram, largest=largest).T
    else:
        codes = (rows / step.double()[:, None]).round().clamp(-largest, largest).to(torch.int8)
    return Rounded(from_rows(codes, W.shape, is_table), step, is_table)


def check_rounding(bits: float, method: Method) -> None:
    """Raise unless they are what :func:`rounded` takes.

    Raises:
        ReflowlensError: they are not.
    """
    if not is_one_of(method, get_args(Method)):
        raise ReflowlensError(f"method must be one of {', '.join(get_args(Method))}, got {method!r}")
    if not 2 <= whole_number(bits, "bits", 2) <= 8:
        raise ReflowlensError(f"bits must be 2 to 8, got {bits!r}")


def _clipped_steps(rows: Float[Tensor, "row column"], largest: int, clips: tuple[float, ...]) -> Float[Tensor, " row"]:
    """Of each row the step, among those that let its largest weight be cut off so far, of the least squared error."""
    widest = rows.abs().amax(1).clamp(min=1e-7)
    best_step, best_error = widest / largest, torch.full_like(widest, torch.inf)
    for clip in clips:
        step = (widest * clip / largest).to(STEP_TYPE).double().clamp(min=6e-8)
        codes = (rows / step[:, None]).round().clamp(-largest, largest)
        error = (codes * step[:, None] - rows).square().sum(1)
        best_step = torch.where(error < best_error, step, best_step)
        best_error = torch.minimum(error, best_error)
    return best_step.to(STEP_TYPE)
