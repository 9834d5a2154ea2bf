"""nanoGPT-style checkpoints: every tensor finds its place, and the model its logits."""

from __future__ import annotations

import contextlib
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from reflowlens.checkpoints import load_model, read_manifest
from reflowlens.conversion import import_model, import_nanogpt
from reflowlens.errors import ReflowlensError
from reflowlens.inspection import inspect_path
from reflowlens.models import build_model
from tests.reference.nanogpt import GPT, Arguments, random_gpt
from tests.reflowlens.test_checkpoints import Payload
from tests.support.tiny import assert_close

KINDS = {
    "gpt2": Arguments(),
    "gpt2_bias": Arguments(bias=True),
    "gpt2_new": Arguments(modern=True),
    "gpt2_new_unfused": Arguments(modern=True, fused=False),
    "reflow": Arguments(modern=True, n_signals=40),
    "reflow_square": Arguments(modern=True, n_signals=32),
    "reflow_lite": Arguments(modern=True, n_signals=24, n_kv_head=2),
    "reflow_lite_unfused": Arguments(modern=True, n_signals=24, n_kv_head=2, fused=False),
}
MODEL_ARGS = ("vocab_size", "block_size", "n_layer", "n_embd", "n_head")


def save(path: Path, gpt: GPT, state: dict[str, Tensor] | None = None, **changes: Any) -> Path:
    arguments = {name: getattr(gpt.a, name) for name in MODEL_ARGS} | changes
    checkpoint = {
        "model": gpt.state_dict() if state is None else state,
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]},
        "model_args": {name: value for name, value in arguments.items() if value is not None},
        "iter_num": 7,
        "best_val_loss": torch.tensor(2.5),
        "config": {"dataset": "openwebtext", "learning_rate": 6e-4},
    }
    torch.save(checkpoint, path)
    return path


def tokens(batch: int = 2, pos: int = 20) -> Tensor:
    return torch.randint(0, 256, (batch, pos), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(tokens())


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_module(tmp_path: Path, kind: str) -> None:
    gpt = random_gpt(KINDS[kind])
    model = import_nanogpt(save(tmp_path / "ckpt.pt", gpt), tokenizer="bytes")
    assert_close(logits(model), logits(gpt))
    architecture = next(name for name in ("reflow_lite", "reflow", "gpt2_new", "gpt2") if kind.startswith(name))
    assert model.cfg.architecture == architecture
    assert model.cfg.n_ctx == 24
    assert model.cfg.rotary_adjacent_pairs == gpt.a.modern
    assert not model.training


def test_names_of_a_compiled_and_distributed_model(tmp_path: Path) -> None:
    gpt = random_gpt(KINDS["reflow"])
    state = {f"module._orig_mod.{name}": tensor for name, tensor in gpt.state_dict().items()}
    assert_close(logits(import_nanogpt(save(tmp_path / "c.pt", gpt, state), tokenizer="bytes")), logits(gpt))


@pytest.mark.parametrize("kind", ["gpt2", "reflow"])
def test_tensors_alone(tmp_path: Path, kind: str) -> None:
    """A bare state dict and a safetensors file say nothing of heads: 64 wide, or as told."""
    gpt = random_gpt(KINDS[kind])
    state = {name: tensor.clone() for name, tensor in gpt.state_dict().items()}
    torch.save(state, tmp_path / "bare.pt")
    save_file(state, tmp_path / "bare.safetensors")
    for name in ("bare.pt", "bare.safetensors"):
        model = import_nanogpt(tmp_path / name, n_heads=4, tokenizer="bytes", n_ctx=24 if kind == "gpt2" else 300)
        assert_close(logits(model), logits(gpt))
        assert model.cfg.n_ctx == (24 if kind == "gpt2" else 300)
        assert import_nanogpt(tmp_path / name, tokenizer="bytes").cfg.n_heads == 1


def test_a_readout_of_its_own_with_a_bias(tmp_path: Path) -> None:
    gpt = random_gpt(KINDS["gpt2"])
    bias = torch.linspace(-1, 1, gpt.a.vocab_size)
    state = gpt.state_dict()
    expected = logits(gpt) * 2 + bias
    state |= {"lm_head.weight": state["lm_head.weight"] * 2, "lm_head.bias": bias}
    model = import_nanogpt(save(tmp_path / "c.pt", gpt, state), tokenizer="bytes")
    assert_close(logits(model), expected)
    assert torch.equal(model.b_U, bias)


def test_matrices_stored_the_other_way_round(tmp_path: Path) -> None:
    """nn.Linear(S, d) and nn.Linear(V, S) keep [d, S] and [S, V]."""
    gpt = random_gpt(KINDS["reflow"])
    state = gpt.state_dict()
    state["signal_basis.weight"] = state.pop("signal_basis").T.clone()
    state["vocab_to_signals.weight"] = state["vocab_to_signals.weight"].T.clone()
    assert_close(logits(import_nanogpt(save(tmp_path / "c.pt", gpt, state), tokenizer="bytes")), logits(gpt))


def test_other_spellings(tmp_path: Path) -> None:
    """Names of Llama's own code, keys beside values, and w3 as the way back."""
    gpt = random_gpt(KINDS["reflow_lite_unfused"])
    state = {}
    for name, tensor in gpt.state_dict().items():
        for ours, theirs in (
            (".h.", ".layers."),
            (".ln_1.", ".attention_norm."),
            (".attn.c_proj", ".attention.wo"),
            (".attn.", ".attention."),
            (".mlp.", ".feed_forward."),
        ):
            name = name.replace(ours, theirs)
        state[name] = tensor
    for layer in (0, 1):
        at = f"transformer.layers.{layer}."
        keys, values = state.pop(f"{at}attention.wk.weight"), state.pop(f"{at}attention.wv.weight")
        state[f"{at}attention.wkv.weight"] = torch.cat([keys, values])
        up, down = f"{at}feed_forward.w3.weight", f"{at}feed_forward.w2.weight"
        state[up], state[down] = state[down], state[up]
    assert_close(logits(import_nanogpt(save(tmp_path / "c.pt", gpt, state), tokenizer="bytes")), logits(gpt))


def test_pruned_recipes(tmp_path: Path) -> None:
    gpt = random_gpt(KINDS["reflow"])
    pruned = import_nanogpt(save(tmp_path / "c.pt", gpt), topk=6, tokenizer="bytes")
    assert pruned.cfg.architecture == "reflow_topk"
    assert ((pruned.W_E.A != 0).sum(dim=1) <= 6).all()
    assert torch.equal(pruned.embed.W_recipe, gpt.vocab_to_signals.weight)
    stated = import_nanogpt(save(tmp_path / "c.pt", gpt, topk=6), tokenizer="bytes")
    assert torch.equal(logits(stated), logits(pruned))
    dense = import_nanogpt(save(tmp_path / "c.pt", gpt, topk=0), tokenizer="bytes")
    assert (dense.cfg.architecture, dense.cfg.topk) == ("reflow", None)
    assert_close(logits(dense), logits(gpt))


def test_a_readout_of_its_own(tmp_path: Path) -> None:
    gpt = random_gpt(KINDS["gpt2"])
    state = gpt.state_dict() | {"lm_head.weight": torch.randn(288, 32)}
    model = import_nanogpt(save(tmp_path / "c.pt", gpt, state), tokenizer="bytes")
    assert not model.cfg.tie_word_embeddings
    assert torch.equal(model.W_U, state["lm_head.weight"].T)


def test_rotary_halves(tmp_path: Path) -> None:
    gpt = random_gpt(KINDS["gpt2_new"])
    model = import_nanogpt(save(tmp_path / "c.pt", gpt), rotary_adjacent_pairs=False, tokenizer="bytes")
    assert (logits(model) - logits(gpt)).abs().max() > 0.01


def test_gpt2s_vocabulary_has_gpt2s_tokenizer(tmp_path: Path) -> None:
    a = Arguments(vocab_size=50304, n_layer=1, n_embd=4, n_head=1, n_kv_head=1, hidden=4)
    assert import_nanogpt(save(tmp_path / "c.pt", random_gpt(a))).cfg.tokenizer_name == "gpt2"


def test_import_writes_a_checkpoint_that_says_where_it_came_from(tmp_path: Path) -> None:
    gpt = random_gpt(KINDS["reflow"])
    source = save(tmp_path / "ckpt.pt", gpt)
    out = import_model(source, tmp_path / "out", tokenizer="bytes")
    assert_close(logits(load_model(out)), logits(gpt))
    origin = read_manifest(out)["imported_from"]
    assert (origin["format"], origin["source"]) == ("nanogpt", str(source))
    assert list(origin["sha256"]) == ["ckpt.pt"]
    with pytest.raises(ReflowlensError, match="is what is imported"):
        import_model(source, source)


def test_an_import_does_not_replace_a_file_and_says_so_before_it_reads(tmp_path: Path) -> None:
    source, mine = tmp_path / "noise.pt", tmp_path / "mine.pt"
    source.write_bytes(b"not a checkpoint")
    mine.write_bytes(b"mine")
    with pytest.raises(ReflowlensError, match=r"mine\.pt is a file: choose a new folder"):
        import_model(source, mine)
    assert mine.read_bytes() == b"mine"


def test_the_published_shapes_are_the_preset(tmp_path: Path) -> None:
    """reflow_1_small's tensors, each one number repeated: the sizes come out as published."""
    sizes = {"vocab_size": 50304, "block_size": 1024, "n_layer": 6, "n_embd": 512, "n_head": 8, "n_kv_head": 8}
    with torch.device("meta"):
        gpt = GPT(Arguments(**sizes, hidden=1536, modern=True, n_signals=512))
    state = {name: torch.zeros(()).expand(tensor.shape) for name, tensor in gpt.named_parameters()}
    model = import_nanogpt(save(tmp_path / "c.pt", gpt, state))
    expected = build_model("reflow_1_small", device="meta").cfg.to_dict()
    assert model.cfg.to_dict() | {"model_name": "reflow_1_small"} == expected


# --------------------------------------------------------------------------------------------------------------- errors


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    torch.save({"model": {"w": Payload()}}, tmp_path / "evil.pt")
    (tmp_path / "noise.pt").write_bytes(b"not a checkpoint")
    for name in ("evil.pt", "noise.pt"):
        with pytest.raises(ReflowlensError, match=rf"{name} cannot be read as tensors and plain values alone"):
            import_nanogpt(tmp_path / name)
    assert not Payload.ran
    with pytest.raises(ReflowlensError, match="no file 'nowhere"):
        import_nanogpt("nowhere.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"model": {}, "step": 3}, tmp_path / "empty.pt")
    for name in ("list.pt", "empty.pt"):
        with pytest.raises(ReflowlensError, match="holds no model"):
            import_nanogpt(tmp_path / name)


def drop(name: str) -> Any:
    return lambda state: state.pop(name)


def put(name: str, tensor: Tensor) -> Any:
    return lambda state: state.update({name: tensor})


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (
            "reflow",
            put("transformer.h.0.gate_scale", torch.ones(4)),
            r"no place for 'transformer.h.0.gate_scale' \[4\]",
        ),
        ("reflow", put("transformer.h.0.attn.q_norm.weight", torch.ones(8)), "no place for .*q_norm.weight"),
        ("reflow", put("transformer.wte.weight", torch.ones(288, 32)), "one embedding, or a vocabulary-to-signals"),
        ("reflow", drop("signal_basis"), "one embedding, or a vocabulary-to-signals matrix and a signal basis"),
        ("reflow", put("signal_basis", torch.ones(39, 32)), r"signal_basis has shape \[39, 32\], expected"),
        ("reflow", put("transformer.wpe.weight", torch.ones(3)), r"no place for 'transformer.wpe.weight' \[3\]"),
        ("gpt2", drop("transformer.ln_f.weight"), "nothing like 'ln_f.weight'"),
        ("gpt2", drop("transformer.h.1.attn.c_attn.weight"), r"lacks '1\.(k|q|v)\.weight'"),
        ("gpt2", drop("transformer.h.1.ln_2.weight"), "lacks '1.norm2.weight'"),
        ("gpt2", put("transformer.h.1.ln_2.bias", torch.ones(32)), "holds 'transformer.h.1.ln_2.bias', which has no"),
        ("gpt2", put("transformer.h.0.mlp.c_fc.weight", torch.ones(48, 31)), r"c_fc.weight has shape \[48, 31\], exp"),
        ("gpt2", put("transformer.h.0.attn.bias", torch.ones(96)), r"no place for 'transformer.h.0.attn.bias' \[96\]"),
        ("gpt2", put("transformer.h.0.ln1.weight", torch.ones(32)), "want the same place"),
        ("gpt2", put("transformer.ln_f.weight", torch.full((32,), torch.nan)), "ln_f.weight holds NaN"),
        ("gpt2", put("transformer.h.0.attn.c_attn.weight", torch.ones(96, 32).char()), "is torch.int8; quantised"),
    ],
)
def test_tensors_that_cannot_be_placed_are_named(tmp_path: Path, kind: str, change: Any, message: str) -> None:
    gpt = random_gpt(KINDS[kind])
    state = gpt.state_dict()
    change(state)
    with pytest.raises(ReflowlensError, match=message):
        import_nanogpt(save(tmp_path / "c.pt", gpt, state), tokenizer="bytes")


@pytest.mark.parametrize(
    ("stated", "options", "message"),
    [
        ({"n_layer": 3}, {}, "states n_layer=3, but its tensors make it 2"),
        ({"n_embd": 16}, {}, "states n_embd=16, but its tensors make it 32"),
        ({}, {"n_heads": 5}, "5 heads do not divide 32 query and 32 key channels: choose n_heads"),
        ({}, {"n_ctx": 12}, "has 24 learned positions: n_ctx cannot be 12"),
        ({}, {"tokenizer": None}, "has 288 tokens, fewer than GPT-2's 50257: choose its tokenizer"),
        ({}, {"tokenizer": "gpt2"}, "has 288 rows for tokens, fewer than the 50257 of tokenizer 'gpt2'"),
        ({}, {"tokenizer": "gpt3"}, "no tokenizer 'gpt3'"),
    ],
)
def test_statements_that_do_not_hold(
    tmp_path: Path, stated: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    path = save(tmp_path / "c.pt", random_gpt(KINDS["gpt2"]), **stated)
    with pytest.raises(ReflowlensError, match=message):
        import_nanogpt(path, **({"tokenizer": "bytes"} | options))


@pytest.mark.parametrize("value", ["x", [], {}, float("nan"), float("inf"), 10**30, torch.tensor(3)])
@pytest.mark.parametrize("name", ["vocab_size", "block_size", "n_layer", "n_head", "rope_theta", "topk"])
def test_what_a_file_states_must_be_numbers(tmp_path: Path, name: str, value: Any) -> None:
    path = save(tmp_path / "c.pt", random_gpt(KINDS["reflow"]), **{name: value})
    with pytest.raises(ReflowlensError, match=f"states {name}=.*: a number was expected"):
        import_nanogpt(path, tokenizer="bytes")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weight: weight.long(), "is torch.int64; quantised"),
        (lambda weight: weight.bool(), "is torch.bool; quantised"),
        (lambda weight: weight.to(torch.float8_e4m3fn), "is torch.float8_e4m3fn; quantised"),
        (Tensor.to_sparse, "is sparse, nested or without numbers"),
        (lambda weight: weight.to("meta"), "is sparse, nested or without numbers"),
    ],
)
@pytest.mark.parametrize("name", ["transformer.wte.weight", "transformer.h.0.attn.c_proj.weight"])
def test_tensors_that_are_no_plain_floats(tmp_path: Path, name: str, change: Any, message: str) -> None:
    gpt = random_gpt(KINDS["gpt2"])
    state = gpt.state_dict()
    state[name] = change(state[name])
    with pytest.raises(ReflowlensError, match=f"'{name}' {message}"):
        import_nanogpt(save(tmp_path / "c.pt", gpt, state), tokenizer="bytes")


@pytest.mark.parametrize("name", [None, 3, "x" * 5000, f"h.{'9' * 5000}.ln_1.weight"])
def test_names_that_are_none_of_a_model(tmp_path: Path, name: Any) -> None:
    gpt = random_gpt(KINDS["reflow"])
    state = gpt.state_dict() | {name: torch.ones(3)}
    with pytest.raises(ReflowlensError, match=r"holds no model|no place for") as error:
        import_nanogpt(save(tmp_path / "c.pt", gpt, state), tokenizer="bytes")
    assert len(str(error.value)) < 500


def test_compressed_parts_are_not_inflated(tmp_path: Path) -> None:
    path, bomb = save(tmp_path / "c.pt", random_gpt(KINDS["reflow"])), tmp_path / "bomb.pt"
    with zipfile.ZipFile(path) as sound, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed:
        for part in sound.infolist():
            zeros = bytes(64 << 20) if part.filename.endswith("data/0") else None
            packed.writestr(part.filename, zeros or sound.read(part))
    tracemalloc.start()
    for use in (import_nanogpt, inspect_path):
        with contextlib.suppress(ReflowlensError):
            use(bomb)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    with pytest.raises(ReflowlensError, match="cannot be read as tensors and plain values alone"):
        import_nanogpt(bomb)
    assert peak < 16 << 20
