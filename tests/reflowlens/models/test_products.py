"""Products by oneDNN are torch's own, with gradients, whatever the layout; and only where they should be taken."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from reflowlens.models import products
from reflowlens.models.products import product
from tests.support.tiny import assert_close, random_model, random_tokens


@pytest.fixture
def by_onednn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """As on a processor where oneDNN is faster, also for small products; gives the shapes that it multiplied."""
    if not (torch.backends.mkldnn.is_available() and products._operation_is_known()):
        pytest.skip("this torch has no oneDNN, or another operation of it")
    shapes: list[tuple[int, ...]] = []

    def watched(x: Tensor, matrix: Tensor) -> Tensor:
        shapes.append((*x.shape, matrix.shape[1]))
        return original(x, matrix)

    original = products._by_onednn
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(products, "_SMALL", 0)
    monkeypatch.setattr(products, "_by_onednn", watched)
    return shapes


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda x: x,
    "columns first": lambda x: x.mT.contiguous().mT,
    "every second column": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "some columns": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "one column for all": lambda x: x[..., :1].expand_as(x),
    "last position": lambda x: torch.stack([x, x], -2)[..., -1, :],
}


@pytest.mark.parametrize("shape", [(1, 7), (16, 33), (3, 5, 64), (2, 1, 3, 9)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_products_of_every_layout(by_onednn: list[tuple[int, ...]], shape: tuple[int, ...], layout: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, matrix = torch.randn(shape, generator=generator), torch.randn(shape[-1], 29, generator=generator)
    for left, right in ((LAYOUTS[layout](x), matrix), (x, LAYOUTS[layout](matrix))):
        assert_close(product(left, right), (left.double() @ right.double()).float())
    is_dense = layout in ("as it is", "columns first")  # oneDNN is slow with part of a matrix
    assert by_onednn == [(*shape, 29)] * (1 + is_dense)


@pytest.mark.parametrize(("left", "right"), [((3, 5, 8), (3, 8, 7)), ((1, 5, 8), (3, 8, 7)), ((2, 1, 5, 8), (3, 8, 7))])
def test_products_of_stacks(by_onednn: list[tuple[int, ...]], left: tuple[int, ...], right: tuple[int, ...]) -> None:
    """A product each, of factors that one of both sides may have once for all."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=generator, requires_grad=True) for shape in (left, right)]
    actual, expected = products.products(*leaves), leaves[0] @ leaves[1]
    assert_close(actual.detach(), expected.detach())
    assert by_onednn == [(5, 8, 7)] * (expected.numel() // 35)
    of_actual, of_expected = (torch.autograd.grad(out.square().sum(), leaves) for out in (actual, expected))
    for a, b in zip(of_actual, of_expected, strict=True):
        assert_close(a, b)
    assert products.products(leaves[0][..., :0, :, :], leaves[1][:0]).shape == (*expected.shape[:-3], 0, 5, 7)


def test_first_and_second_derivatives(by_onednn: list[tuple[int, ...]]) -> None:
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(2, 9, 8, generator=generator), torch.randn(8, 20, generator=generator)]

    def derivatives(multiply: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        x, matrix = (leaf.clone().requires_grad_() for leaf in leaves)
        first = torch.autograd.grad(multiply(x, matrix).tanh().sum(), (x, matrix), create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), (x, matrix))]

    for actual, expected in zip(derivatives(product), derivatives(torch.matmul), strict=True):
        assert_close(actual, expected)
    assert by_onednn
    vector = leaves[0][0, 0].clone().requires_grad_()
    matrix = leaves[1].clone().requires_grad_()
    product(vector, matrix).sum().backward()
    assert_close(matrix.grad, vector.detach()[:, None].expand_as(matrix))
    frozen = leaves[1].clone()
    x = leaves[0].clone().requires_grad_()
    product(x, frozen).sum().backward()
    assert_close(x.grad, frozen.sum(1).expand_as(x))


def test_an_infinity_stays_in_its_row(by_onednn: list[tuple[int, ...]]) -> None:
    x = torch.ones(16, 4)
    x[3, 1] = torch.inf
    assert product(x, torch.ones(4, 5)).isfinite().all(1).nonzero().flatten().tolist() == [*range(3), *range(4, 16)]


def test_other_types_and_passes_are_torchs_own(by_onednn: list[tuple[int, ...]]) -> None:
    x, matrix = torch.ones(16, 4), torch.ones(4, 5)
    assert product(x.double(), matrix.double()).dtype == torch.float64
    assert product(x.bfloat16(), matrix.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert product(x, matrix).dtype == torch.bfloat16
    assert product(x.to("meta"), matrix.to("meta")).shape == (16, 5)
    assert torch.equal(torch.func.jvp(lambda y: product(y, matrix), (x,), (x,))[1], x @ matrix)
    with FlopCounterMode(display=False) as counter:
        product(x, matrix)
    assert counter.get_total_flops() == 2 * 16 * 4 * 5
    assert not by_onednn


KNOWN = (
    "mkldnn::_linear_pointwise(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, str? algorithm) -> Tensor Y"
)


def operations(schema: str | None) -> SimpleNamespace:
    """`torch.ops.mkldnn` of a torch whose operation has another schema, or that has none; calling it is an error."""

    class Operation:
        default = SimpleNamespace(_schema=schema)

        def __call__(self, *arguments: object) -> Tensor:
            raise AssertionError("called")

    return SimpleNamespace() if schema is None else SimpleNamespace(_linear_pointwise=Operation())


@pytest.mark.parametrize(
    ("capability", "schema", "processor", "expected"),
    [
        ("AVX512", KNOWN, "AuthenticAMD", True),
        ("AVX512", KNOWN, "GenuineIntel", False),
        ("AVX512", KNOWN.replace(", str? algorithm", ""), "AuthenticAMD", False),
        ("AVX512", None, "AuthenticAMD", False),
        ("AVX2", KNOWN, "AuthenticAMD", False),
        ("DEFAULT", KNOWN, "AuthenticAMD", False),
    ],
)
def test_another_torch_or_processor_multiplies_as_torch_does(
    capability: str, schema: str | None, processor: str, expected: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is asked once, and where the answer is no the operation is not tried, however large the product."""
    (tmp_path / "cpuinfo").write_text(f"vendor_id : {processor}")
    monkeypatch.setattr(products, "Path", lambda _: tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops, "mkldnn", operations(schema))
    monkeypatch.setattr(products, "onednn_is_faster", functools.cache(products.onednn_is_faster.__wrapped__))
    x, matrix = torch.ones(1024, 64), torch.ones(64, 64)
    assert products.onednn_is_faster() is expected
    if expected:
        with pytest.raises(AssertionError, match="called"):
            product(x, matrix)
    else:
        assert torch.equal(product(x, matrix), x @ matrix)


@pytest.mark.parametrize("name", ["gpt2", "reflow", "reflow_topk"])
def test_models_compute_the_same_with_either(
    by_onednn: list[tuple[int, ...]], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(name)
    tokens = random_tokens(model.cfg, 2, 8)

    def computed() -> list[Tensor]:
        model.zero_grad()
        logits, loss = model(tokens, "both")
        loss.backward()
        return [logits.detach(), loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    found = computed()
    assert by_onednn
    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)
    for actual, expected in zip(found, computed(), strict=True):
        assert_close(actual, expected)
