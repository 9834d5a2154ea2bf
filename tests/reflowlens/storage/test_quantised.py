from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from reflowlens.errors import ReflowlensError
from reflowlens.storage.quantised import Use, entropy, quantise, read_packed, write_packed


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [3, 4.3, 6])
def test_a_gaussian_row_takes_the_bits_that_it_should_at_the_least_error(bits: float, tmp_path: Path) -> None:
    """step = √(2πe) σ / 2^bits, of which the squared error is a twelfth of the square.

    Whole bits for a code, and a step a row, cost a tenth of a bit more.
    """
    W = gaussian(300, 500) * torch.logspace(-3, 3, 300)[:, None]
    quantised = quantise(W, bits)
    relative = (quantised.values() - W).square().sum(1) / W.square().sum(1)
    assert relative.mean().item() == pytest.approx(2 * math.pi * math.e / 12 / 4**bits, rel=0.02)
    write_packed(tmp_path / "w.gz", {"W": W}, {}, bits)
    assert (tmp_path / "w.gz").stat().st_size * 8 / W.numel() == pytest.approx(bits + 0.1, abs=0.05)


@pytest.mark.parametrize("bits", [1, 2.5, 4.3, 8])
def test_no_weight_is_further_than_half_a_step_away(bits: float) -> None:
    """Also of rows of zeros, with outliers, and near the ends of what a float32 holds."""
    W = gaussian(7, 3, 40)
    W[1] = 0
    W[2, 0, 0] = 1e4
    W[3] *= 1e37
    W[4] *= 1e-33
    codes, step = quantised = quantise(W, bits)
    assert codes.dtype == torch.int8
    assert codes.abs().max() <= 127
    assert ((quantised.values() - W).abs().double() <= 0.501 * step.double()[:, None, None]).all()
    assert torch.equal(quantised.values()[1], W[1])


@pytest.mark.parametrize("along", ["rows", "columns"])
def test_errors_go_where_they_matter_least(along: str) -> None:
    """Of inputs that go together, and rows of which some matter more: at equal size a fraction of the error."""
    W = gaussian(120, 80)
    n = len(W) if along == "rows" else 80
    inputs = gaussian(500, n // 4, seed=1) @ gaussian(n // 4, n, seed=2) + 0.3 * gaussian(500, n, seed=3)
    weight = torch.logspace(-3, 3, 120)
    if along == "rows":
        inputs = inputs * weight.sqrt()
        weight = inputs.square().mean(0)

    def error(values: torch.Tensor) -> float:
        delta = values - W
        acted = inputs @ delta if along == "rows" else (inputs @ delta.T) * weight.sqrt()
        return acted.square().sum().item()

    use = Use(weight, inputs.T @ inputs / 500, along)  # type: ignore[arg-type]
    plain, used = quantise(W, 4.2), quantise(W, 4.2, use)
    assert entropy(used.codes) == pytest.approx(4.2, abs=0.1)
    assert error(used.values()) < error(plain.values()) / 5
    assert torch.equal(quantise(W, 4.2, use).codes, used.codes)
    half = Use(weight, torch.eye(n), along)  # type: ignore[arg-type] # inputs that do not go together
    assert error(used.values()) < error(quantise(W, 4.2, half).values()) / 1.5


def test_what_is_used_for_nothing_is_rounded_all_the_same() -> None:
    W = gaussian(30, 2, 20)
    W[3] = 0
    for along, n in (("rows", 30), ("columns", 40)):
        values = quantise(W, 5, Use(torch.zeros(30), torch.zeros(n, n), along)).values()  # type: ignore[arg-type]
        assert (values - W).norm() < 0.06 * W.norm()
        assert (values[3] == 0).all()


def test_parts_of_a_row_share_its_step_and_small_ones_take_few_bits(tmp_path: Path) -> None:
    even, uneven = gaussian(400, 4, 100), gaussian(400, 4, 100) * 0.1 ** torch.arange(4)[:, None]
    sizes = []
    for W in (even, uneven):
        write_packed(tmp_path / "w.gz", {"W": W}, {"a": "b"}, 4.3)
        sizes.append((tmp_path / "w.gz").stat().st_size * 8 / W.numel())
        metadata, tensors = read_packed(tmp_path / "w.gz")
        assert metadata == {"a": "b"}
        assert torch.equal(tensors["W"], quantise(W, 4.3).values())
        assert (tensors["W"] - W).square().sum() / W.square().sum() < 0.004
    assert sizes[0] == pytest.approx(4.4, abs=0.1)
    assert sizes[1] < 2.6


def test_vectors_stay_as_they_are_and_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    tensors = {"b": gaussian(9), "W": gaussian(9, 5), "half": gaussian(3).half()}
    for name in ("one.gz", "two.gz"):
        write_packed(tmp_path / name, tensors, {"x": "1", "y": "2"}, 4)
    assert (tmp_path / "one.gz").read_bytes() == (tmp_path / "two.gz").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.gz", "two.gz"]
    _, read = read_packed(tmp_path / "one.gz")
    assert set(read) == set(tensors)
    assert torch.equal(read["b"], tensors["b"])
    assert torch.equal(read["half"], tensors["half"])
    assert gzip.decompress((tmp_path / "one.gz").read_bytes())  # any tool unpacks it


@pytest.mark.parametrize("bits", [0, 0.9, 8.1, math.nan, True, "4"])
def test_bits_that_are_none(bits: object) -> None:
    with pytest.raises(ReflowlensError, match="bits must be a number from 1 to 8, got"):
        quantise(gaussian(2, 2), bits)  # type: ignore[arg-type]


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "w.gz"
    write_packed(path, {"W": gaussian(50, 60)}, {}, 4.3)
    whole = path.read_bytes()
    middle = len(whole) // 2
    for damaged in (
        b"",
        whole[:-1],
        whole[:middle],
        whole + b"more",
        b"PK" + whole,
        whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :],
        gzip.compress(b"no tensors"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ReflowlensError, match="is not a readable packed file"):
            read_packed(path)


def test_what_would_unpack_to_more_than_it_can_hold_is_not_unpacked(tmp_path: Path) -> None:
    """A million zeros in a kilobyte, as deflate writes repetitions."""
    path = tmp_path / "w.gz"
    path.write_bytes(gzip.compress(save({"W": torch.zeros(1_000_000)})))
    with pytest.raises(ReflowlensError, match=r"it unpacks to more than [\d,]+ bytes"):
        read_packed(path)


def test_steps_that_belong_to_no_codes(tmp_path: Path) -> None:
    for tensors in (
        {"W.step": torch.ones(3)},
        {"W.step": torch.ones(3), "W": torch.zeros(4, 2, dtype=torch.int8)},
        {"W.step": torch.ones(3), "W": torch.zeros(3, dtype=torch.int8)},
        {"W.step": torch.ones(3), "W": torch.zeros(3, 2)},
    ):
        packer = zlib.compressobj(9, zlib.DEFLATED, 31, 9, zlib.Z_HUFFMAN_ONLY)
        (tmp_path / "w.gz").write_bytes(packer.compress(save(tensors)) + packer.flush())
        with pytest.raises(ReflowlensError, match=r"W\.step is no list of the steps of W"):
            read_packed(tmp_path / "w.gz")
