"""Packed models: what rounding does to a weight, what a file holds, and that nothing damaged is opened."""

from __future__ import annotations

import json
import struct
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reflowlens as rl
from reflowlens.calibration import input_grams
from reflowlens.errors import ReflowlensError
from reflowlens.packing import MAGIC, pack_model
from reflowlens.storage.compressors import compressor
from reflowlens.storage.rounding import rounded
from tests.reflowlens.models.test_bdh import random_bdh
from tests.support.tiny import NAMES, random_model, random_tokens


def matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(2, 8), st.sampled_from([(7, 5), (3, 6, 4)]), st.booleans(), st.integers(0, 5))
def test_no_weight_that_is_not_cut_off_moves_by_more_than_half_a_step(bits, shape, is_table, seed):
    W = matrix(*shape, seed=seed)
    found = rounded(W, bits, "rtn", is_table=is_table)
    largest = 2 ** (bits - 1) - 1
    assert found.codes.shape == W.shape
    assert int(found.codes.abs().max()) <= largest
    rows = W.flatten(1) if is_table else W.mT.flatten(0, -2)
    values = found.values().flatten(1) if is_table else found.values().mT.flatten(0, -2)
    step = found.step.float()[:, None]
    assert bool(((values - rows).abs() <= step * 0.5 + largest * step * 1e-3).all())  # steps have 11 bits


def test_a_search_over_clips_is_never_worse_and_compensation_is_better_where_inputs_go_together():
    W = matrix(48, 32) * torch.exp(matrix(48, 1, seed=1))
    x = matrix(4000, 48, seed=2) @ matrix(48, 48, seed=3)
    gram = (x.T @ x / len(x)).double()
    error = {}
    for method in ("rtn", "clip", "gptq"):
        delta = (rounded(W, 4, method, gram=gram).values() - W).double()
        error[method] = (float(delta.square().sum()), float(torch.trace(delta.T @ gram @ delta)))
    assert error["clip"][0] <= error["rtn"][0]
    assert error["gptq"][1] < 0.7 * error["clip"][1]


@pytest.mark.parametrize("compressor_name", ["lzma", "huffman"])
@pytest.mark.parametrize("name", [*NAMES, "bdh"])
def test_a_packed_model_is_opened_as_what_was_packed(name, compressor_name, tmp_path):
    model = random_bdh() if name == "bdh" else random_model(name)
    packed = pack_model(model, 6, compressor_name=compressor_name)
    opened = rl.load_model(packed.save(tmp_path / "model.packed"))
    assert opened.cfg == model.cfg
    assert (tmp_path / "model.packed").stat().st_size == packed.size
    tokens = random_tokens(model.cfg)
    torch.testing.assert_close(opened(tokens), packed.model()(tokens), rtol=0, atol=0)
    for (key, ours), theirs in zip(model.named_parameters(), opened.parameters(), strict=True):
        error = (ours - theirs).norm() / ours.norm()
        assert error < (0.05 if ours.numel() > 4096 else 1e-3), key


def test_another_process_opens_the_same_function(tmp_path):
    model = random_model("reflow")
    path = pack_model(model, 5).save(tmp_path / "m.packed")
    program = "import sys, reflowlens as rl; print(repr(rl.load_model(sys.argv[1])('to be or not', 'loss').item()))"
    printed = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    assert float(printed.stdout) == rl.load_model(path)("to be or not", "loss").item()


def test_bytes_are_told_by_tensor_and_near_what_is_stored():
    model = rl.load_model("relu-nano")
    packed = pack_model(model, 6, table_bits=8)
    table = packed.table()
    assert set(table["tensor"]) == {name for name, _ in model.named_parameters()}
    assert table["numbers"].sum() == model.n_parameters
    assert (table["entropy"] <= table["bits"] + 1e-9).all()
    assert 0.97 * table["bytes"].sum() < packed.size < 1.05 * table["bytes"].sum() + 10_000
    bits = table.set_index("tensor")["bits"]
    assert bits["blocks.0.mlp.W_in"] == 6
    assert bits["embed.W_E"] == 8


def test_what_matrices_read_is_what_they_are_multiplied_with():
    model = random_model("gpt2_biased")
    tokens = random_tokens(model.cfg)
    grams = input_grams(model, [tokens, tokens.flip(0)])
    _, cache = model.run_with_cache(tokens)
    block = model.blocks[1]
    x = block.ln2(cache["blocks.1.hook_resid_mid"]).flatten(0, 1).double()
    torch.testing.assert_close(grams["blocks.1.mlp.W_in"], x.T @ x / len(x), rtol=1e-4, atol=1e-6)
    z = cache["blocks.0.attn.hook_z"].flatten(0, 1).flatten(1).double()
    torch.testing.assert_close(grams["blocks.0.attn.W_O"], z.T @ z / len(z), rtol=1e-4, atol=1e-6)
    assert pack_model(model, 4, method="gptq", grams=grams).header["method"] == "gptq"
    with pytest.raises(ReflowlensError, match="no blocks of attention heads and MLPs"):
        input_grams(random_bdh(), [tokens])


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> bytes:
    path = pack_model(random_model("gpt2"), 4).save(tmp_path_factory.mktemp("packed") / "m.packed")
    return path.read_bytes()


def header_of(data: bytes) -> tuple[dict, int]:
    (length,) = struct.unpack("<Q", data[len(MAGIC) : len(MAGIC) + 8])
    start = len(MAGIC) + 8
    return json.loads(data[start : start + length]), start + length


def with_header(data: bytes, change) -> bytes:
    header, end = header_of(data)
    change(header)
    new = json.dumps(header).encode()
    return MAGIC + struct.pack("<Q", len(new)) + new + data[end:]


@pytest.mark.parametrize("damage", [
    lambda data: data[:-7],
    lambda data: data[: len(MAGIC) + 3],
    lambda data: data[:40],
    lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
    lambda data: MAGIC + struct.pack("<Q", 1 << 60) + data[len(MAGIC) + 8 :],
    lambda data: with_header(data, lambda header: header["config"].update(d_model=1 << 20)),
    lambda data: with_header(data, lambda header: header["config"].update(n_layers=3)),
    lambda data: with_header(data, lambda header: header["tensors"].popitem()),
    lambda data: with_header(data, lambda header: header.update(compressor="pickle")),
    lambda data: with_header(data, lambda header: header["tensors"]["embed.W_E"].pop("bits")),
])  # fmt: skip
def test_a_damaged_file_is_one_error(damage, file, tmp_path):
    path = tmp_path / "m.packed"
    path.write_bytes(damage(file))
    with pytest.raises(ReflowlensError):
        rl.load_model(path)


def test_a_bomb_is_not_unpacked(file, tmp_path):
    """A payload that unpacks to more than its configuration has is not unpacked further."""
    import hashlib

    header, _ = header_of(file)
    payload = compressor("lzma").compress(bytes(1 << 26))
    header["sha256"] = hashlib.sha256(payload).hexdigest()
    new = json.dumps(header).encode()
    path = tmp_path / "m.packed"
    path.write_bytes(MAGIC + struct.pack("<Q", len(new)) + new + payload)
    with pytest.raises(ReflowlensError, match="it unpacks to more than"):
        rl.load_model(path)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"bits": 9}, "bits must be 2 to 8"),
        ({"bits": 1}, "bits"),
        ({"method": "magic"}, "method must be one of rtn, clip, gptq"),
        ({"compressor_name": "rar"}, "compressor must be one of lzma, huffman, brotli, zstd"),
    ],
)
def test_bad_arguments(how, message):
    with pytest.raises(ReflowlensError, match=message):
        pack_model(random_model("gpt2"), **how)


def test_weights_that_are_not_finite_are_not_packed():
    model = random_model("gpt2")
    with torch.no_grad():
        model.blocks[0].mlp.W_in[0, 0] = torch.nan
    with pytest.raises(ReflowlensError, match="not finite"):
        pack_model(model)
