"""Packed models and dictionaries: what rounding does to a weight, what a file holds, and that no damage passes."""

from __future__ import annotations

import hashlib
import json
import struct
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reflowlens as rl
from reflowlens.calibration import input_grams
from reflowlens.checkpoints import read_manifest
from reflowlens.dictionaries.files import dictionary_manifest, holds_dictionary
from reflowlens.dictionaries.packing import uses_of
from reflowlens.errors import ReflowlensError
from reflowlens.packing import pack_dictionary, pack_model
from reflowlens.storage.compressors import compressor
from reflowlens.storage.packed_file import MAGIC
from reflowlens.storage.quantised import entropy, quantise
from reflowlens.storage.rounding import rounded
from tests.reflowlens.dictionaries.test_files import KINDS, inputs, random_dictionary
from tests.reflowlens.models.test_bdh import random_bdh
from tests.support.processes import in_a_process
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


@pytest.mark.parametrize("compressor_name", ["lzma", "huffman"])
def test_16_bits_keep_what_float16_holds_in_less(compressor_name, tmp_path):
    model = rl.load_model("relu-nano")
    packed = pack_model(model, 16, compressor_name=compressor_name)
    opened = rl.load_model(packed.save(tmp_path / "m.packed"))
    assert rl.model_hash(opened) == rl.model_hash(model)
    assert packed.size < 0.87 * 2 * model.n_parameters
    assert (packed.table()["bits"] == 16).all()


def write_loss(packed, written):
    written.write_text(repr(rl.load_model(packed)("to be or not", "loss").item()))


def test_another_process_opens_the_same_function(tmp_path):
    path = pack_model(random_model("reflow"), 5).save(tmp_path / "m.packed")
    in_a_process(write_loss, path, tmp_path / "loss")
    assert float((tmp_path / "loss").read_text()) == rl.load_model(path)("to be or not", "loss").item()


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
    assert pack_model(model, 4, method="gptq", grams=grams).file.header["method"] == "gptq"
    with pytest.raises(ReflowlensError, match="no blocks of attention heads and MLPs"):
        input_grams(random_bdh(), [tokens])


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> bytes:
    path = pack_model(random_model("gpt2"), 4, manifest={"val_loss": 3.5}).save(
        tmp_path_factory.mktemp("packed") / "m.packed"
    )
    return path.read_bytes()


START = len(MAGIC) + 32  # magic line, digest; then the header's length


def signed(rest: bytes) -> bytes:
    return MAGIC + hashlib.sha256(rest).digest() + rest


def header_of(data: bytes) -> tuple[dict, int]:
    (length,) = struct.unpack_from("<Q", data, START)
    return json.loads(data[START + 8 : START + 8 + length]), START + 8 + length


def with_header(data: bytes, change, payload: bytes | None = None) -> bytes:
    """A file as somebody would write it who means to mislead: its digest fits."""
    header, end = header_of(data)
    change(header)
    new = json.dumps(header).encode()
    return signed(struct.pack("<Q", len(new)) + new + (data[end:] if payload is None else payload))


def refused(path, data: bytes, match: str | None = None) -> None:
    path.write_bytes(data)
    with pytest.raises(ReflowlensError, match=match) as caught:
        rl.load_model(path)
    assert "\n" not in str(caught.value)


def test_a_change_of_any_byte_is_noticed(file, tmp_path):
    """In the magic line, the digest, the header and the payload: a word of the configuration alters nothing else."""
    _, end = header_of(file)
    places = [*range(START + 40), *range(START + 40, end, 97), *range(end, len(file), len(file) // 40), len(file) - 1]
    for place in places:
        refused(tmp_path / "m.packed", file[:place] + bytes([file[place] ^ 1]) + file[place + 1 :])


def test_a_file_that_is_cut_short_or_longer_is_refused(file, tmp_path):
    _, end = header_of(file)
    for length in (0, 10, len(MAGIC) - 1, len(MAGIC), START, START + 5, START + 100, end, end + 9, len(file) - 1):
        refused(tmp_path / "m.packed", file[:length])
    refused(tmp_path / "m.packed", file + b"\0", "it was changed or cut short")


@pytest.mark.parametrize("version", [1, 3, 12])
def test_another_version_is_told(file, tmp_path, version):
    line = MAGIC.replace(b" 2\n", b" %d\n" % version)
    assert line != MAGIC
    expected = f"is a packed file of version {version}, and this reflowlens reads version 2: pack the original again"
    refused(tmp_path / "m.packed", line + file[len(MAGIC) :], expected)


@pytest.mark.parametrize(("damage", "message"), [
    (lambda data: signed(struct.pack("<Q", 1 << 60) + data[START + 8 :]), "not a readable packed file"),
    (lambda data: signed(struct.pack("<Q", 2) + b"[]"), "its header is no JSON object"),
    (lambda data: with_header(data, lambda header: header["config"].update(d_model=1 << 20)), "it holds less than its"),
    (lambda data: with_header(data, lambda header: header["config"].update(n_layers=3)), "its tensors are not"),
    (lambda data: with_header(data, lambda header: header["tensors"].popitem()), "its tensors are not"),
    (lambda data: with_header(data, lambda header: header.update(compressor="pickle")), "compressor must be one of"),
    (lambda data: with_header(data, lambda header: header["tensors"]["embed.W_E"].pop("bits")), "not a readable"),
    (lambda data: with_header(data, lambda header: header.update(kind="dictionary")), "load_dictionary opens it"),
    (lambda data: with_header(data, lambda header: None, payload=b""), "it is cut short"),
    (lambda data: with_header(data, lambda header: None, payload=compressor("lzma").compress(bytes(9))), "holds less"),
])  # fmt: skip
def test_a_file_that_means_to_mislead_is_one_error(damage, message, file, tmp_path):
    refused(tmp_path / "m.packed", damage(file), message)


@pytest.mark.parametrize("name", ["lzma", "huffman", "brotli", "zstd"])
def test_a_bomb_is_not_unpacked(name, file, tmp_path):
    """A payload that unpacks to more than its configuration has is not unpacked further."""
    needs(name)
    payload = compressor(name).compress(bytes(1 << 26))
    bomb = with_header(file, lambda header: header.update(compressor=name), payload)
    refused(tmp_path / "m.packed", bomb, "it unpacks to more than")


def needs(name: str) -> None:
    """brotli and zstd are no part of the standard library."""
    if name in ("brotli", "zstd"):
        pytest.importorskip({"zstd": "zstandard"}.get(name, name))


@pytest.mark.parametrize("name", ["lzma", "huffman", "brotli", "zstd"])
def test_compressors_lose_nothing_and_take_about_the_entropy(name):
    needs(name)
    codes = (matrix(1 << 17) * 4).round().clamp(-31, 31).to(torch.int8)
    data, tool = codes.numpy().tobytes(), compressor(name)
    packed = tool.compress(data)
    assert tool.decompress(packed, len(data)) == data
    assert tool.compress(data) == packed
    bits = entropy(codes[None])
    assert bits * 0.99 < 8 * len(packed) / len(data) < bits * 1.08
    for damaged in (packed[: len(packed) // 2], packed[:-1], b""):
        with pytest.raises(Exception):  # noqa: B017, PT011 (each library has errors of its own)
            tool.decompress(damaged, len(data))


@pytest.mark.parametrize(("name", "package"), [("brotli", "brotli"), ("zstd", "zstandard")])
def test_a_missing_package_is_told_before_anything_is_packed(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"compressor '{name}' needs the package {package}, .*pip install 'reflowlens\[pack\]', or take lzma"
    with pytest.raises(ReflowlensError, match=message):
        pack_model(random_model("gpt2"), compressor_name=name)


def test_the_manifest_travels_in_the_file(file, tmp_path):
    path = tmp_path / "m.packed"
    path.write_bytes(file)
    assert read_manifest(path) == {"config": random_model("gpt2").cfg.to_dict(), "val_loss": 3.5}


# -- dictionaries -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["rtn", "clip", "gptq"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_dictionary_is_opened_as_what_was_packed(kind, method, tmp_path):
    dictionary = random_dictionary(KINDS[kind])
    reads = [x.flatten(0, 1) for x in inputs(dictionary)]
    packed = pack_dictionary(dictionary, 6, method=method, reads=reads, manifest={"tokens_seen": 7, "bits": 4})
    opened = rl.load_dictionary(packed.save(tmp_path / "d.packed"))
    assert opened.cfg == dictionary.cfg
    assert (tmp_path / "d.packed").stat().st_size == packed.size
    assert dictionary_manifest(tmp_path / "d.packed") == {"config": dictionary.cfg.to_dict(), "tokens_seen": 7}
    for (name, ours), (_, theirs) in zip(dictionary.state_dict().items(), opened.state_dict().items(), strict=True):
        assert (ours - theirs).norm() / ours.norm() < (0.08 if ours.ndim > 1 else 1e-3), name
    for ours, theirs in zip(packed.dictionary()(inputs(opened)), opened(inputs(opened)), strict=True):
        assert torch.equal(ours, theirs)


def test_a_packed_dictionary_is_no_model_and_the_other_way_round(file, tmp_path):
    (tmp_path / "m.packed").write_bytes(file)
    pack_dictionary(random_dictionary(), 4).save(tmp_path / "d.packed")
    assert holds_dictionary(tmp_path / "d.packed")
    assert not holds_dictionary(tmp_path / "m.packed")
    with pytest.raises(ReflowlensError, match="holds a packed dictionary, and a model was asked for: load_dictionary"):
        rl.load_model(tmp_path / "d.packed")
    with pytest.raises(ReflowlensError, match="holds a packed model, and a dictionary was asked for: load_model"):
        rl.load_dictionary(tmp_path / "m.packed")
    with pytest.raises(ReflowlensError, match="a dictionary was packed"):
        pack_dictionary(random_dictionary(), 4).model()


def test_what_a_dictionary_reads_decides_where_packing_errs():
    """As the folder of ``save_dictionary(bits=, reads=)``, number for number."""
    dictionary = random_dictionary()
    generator = torch.Generator().manual_seed(3)
    reads = [torch.randn(500, 8, generator=generator) @ torch.randn(8, 32, generator=generator) for _ in range(2)]
    packed = pack_dictionary(dictionary, 4.2, method="gptq", reads=reads).dictionary()
    W = dictionary.layers[1].W_enc.detach()
    expected = quantise(W, 4.2, uses_of(dictionary, reads)["layers.1.W_enc"]).values()
    assert torch.equal(packed.layers[1].W_enc, expected)
    with pytest.raises(ReflowlensError, match="give reads="):
        pack_dictionary(dictionary, 4.2, method="gptq")
    with pytest.raises(ReflowlensError, match="bits must be"):
        pack_dictionary(dictionary, 4.2)


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
