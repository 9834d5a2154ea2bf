"""Export to and import from transformers' format, held against transformers itself."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file, save_file
from torch.nn.utils import prune
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from reflowlens.checkpoints import load_model, read_manifest, save_model
from reflowlens.cli import main
from reflowlens.config import RotaryScaling
from reflowlens.conversion import export_hf, import_hf, import_model
from reflowlens.conversion.hf_tokenizer import packaged_json
from reflowlens.errors import ReflowlensError
from reflowlens.inspection import inspect_path
from reflowlens.models import build_model
from reflowlens.models.attention import scaled
from reflowlens.models.base import HookedModel
from reflowlens.tokenizers.by_name import get_tokenizer
from tests.reflowlens.tokenizers.test_ranks import TEXT
from tests.support.tiny import assert_close, random_model, random_tokens, tiny_config

# ------------------------------------------------------------------------------------------------ transformers' models

_LLAMA: dict[str, Any] = {
    "vocab_size": 288,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}
_LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_GPT2: dict[str, Any] = {
    "vocab_size": 288,
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "bos_token_id": None,
    "eos_token_id": None,
}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_LLAMA)),
    "llama_tied": lambda: LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **_LLAMA)),
    "llama_grouped": lambda: LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, rms_norm_eps=1e-3, **_LLAMA)),
    "llama_wide_heads": lambda: LlamaForCausalLM(LlamaConfig(head_dim=12, num_key_value_heads=1, **_LLAMA)),
    "llama_biased": lambda: LlamaForCausalLM(LlamaConfig(attention_bias=True, mlp_bias=True, **_LLAMA)),
    "llama_3": lambda: LlamaForCausalLM(LlamaConfig(rope_parameters=_LLAMA_3, **_LLAMA)),
    "llama_base": lambda: LlamaForCausalLM(
        LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 77.0}, **_LLAMA)
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(num_key_value_heads=2, **_LLAMA)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=2, **_LLAMA)),
    "qwen2_tied": lambda: Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=4, tie_word_embeddings=True, **_LLAMA)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**_GPT2)),
    "gpt2_exact_gelu": lambda: GPT2LMHeadModel(GPT2Config(activation_function="gelu", n_inner=40, **_GPT2)),
    "gpt2_untied": lambda: GPT2LMHeadModel(GPT2Config(tie_word_embeddings=False, **_GPT2)),
}


def theirs(name: str) -> Any:
    """Every parameter random, norms and biases included."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5
            is_norm = ("norm" in parameter_name or "ln_" in parameter_name) and parameter_name.endswith("weight")
            parameter.copy_(1 + noise if is_norm else noise)
    return model


def same_function(ours: HookedModel, hf: Any) -> None:
    tokens = random_tokens(ours.cfg, batch=3, pos=min(ours.cfg.n_ctx, 40))
    with torch.no_grad():
        assert_close(ours(tokens), hf(tokens).logits)
    prompt = tokens[:, :5]
    generated = hf.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    with torch.no_grad():
        logits = ours(generated[:, :-1])[:, 4:]
    chosen = logits.gather(-1, generated[:, 5:, None])
    assert (logits.max(dim=-1, keepdim=True).values - chosen).max() <= 1e-5 * logits.abs().max()


# --------------------------------------------------------------------------------------------------------------- export


@pytest.fixture
def model(model: HookedModel) -> HookedModel:
    """Every architecture that transformers has a class for."""
    if model.cfg.unembed_bias:
        pytest.skip("no class there has a bias of the readout: see test_models_that_transformers_has_no_class_for")
    return model


def test_transformers_opens_what_is_exported(model: HookedModel, tmp_path: Path) -> None:
    folder = export_hf(model, tmp_path / "hf")
    hf = AutoModelForCausalLM.from_pretrained(folder)
    learned = model.cfg.positional_embedding_type == "standard"
    assert type(hf) is (GPT2LMHeadModel if learned else LlamaForCausalLM)
    assert hf.dtype == torch.float32
    same_function(model, hf)
    text = "Grüße, 世界"
    assert AutoTokenizer.from_pretrained(folder)(text)["input_ids"] == model.tokenizer.encode(text)


def test_what_comes_back_is_the_same_function(model: HookedModel, tmp_path: Path) -> None:
    back = import_hf(export_hf(model, tmp_path / "hf"))
    tokens = random_tokens(model.cfg, pos=24)
    assert_close(back(tokens), model(tokens))
    assert (back.cfg.n_ctx, back.cfg.tokenizer_name) == (24, "bytes")
    assert back.cfg.tie_word_embeddings == model.cfg.has_one_embedding
    again = export_hf(back, tmp_path / "again")
    ours, theirs = load_file(again / "model.safetensors"), load_file(tmp_path / "hf" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_another_process_without_the_library(tmp_path: Path) -> None:
    """The folder stands alone: a program that knows transformers only, without a network."""
    model = random_model("reflow_lite")
    folder, tokens = export_hf(model, tmp_path / "hf"), random_tokens(model.cfg, pos=24)
    save_file({"tokens": tokens}, tmp_path / "tokens.safetensors")
    program = """
import sys
import time
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, given, found = sys.argv[1:]
model, tokens = AutoModelForCausalLM.from_pretrained(folder), load_file(given)["tokens"]
ids = AutoTokenizer.from_pretrained(folder)("Ada", return_tensors="pt")["input_ids"]
save_file({"logits": model(tokens).logits.detach().contiguous(), "ids": ids}, found)
assert not [name for name in sys.modules if name.startswith("reflowlens")]
"""
    arguments = [folder, tmp_path / "tokens.safetensors", tmp_path / "found.safetensors"]
    subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        check=True,
        capture_output=True,
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    found = load_file(tmp_path / "found.safetensors")
    assert_close(found["logits"], model(tokens).detach())
    assert found["ids"].tolist() == [[65, 100, 97]]


def test_the_configuration_says_the_same_to_old_and_new_readers(tmp_path: Path) -> None:
    folder = export_hf(random_model("llama_untied"), tmp_path / "hf", dtype=torch.bfloat16)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert (config["num_key_value_heads"], config["head_dim"], config["vocab_size"]) == (2, 8, 288)
    # transformers 4 and llama.cpp: the base beside the scaling; transformers 5: one object.
    assert config["rope_parameters"] == config["rope_scaling"] | {"rope_theta": config["rope_theta"]}
    assert config["rope_theta"] == 500.0
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    old = {name: value for name, value in config.items() if name not in ("rope_parameters", "dtype")}
    (folder / "config.json").write_text(json.dumps(old))
    same_function(import_hf(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_sixteen_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    model = random_model("gpt2_new")
    folder = export_hf(model, tmp_path / "hf", dtype=dtype)
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {dtype}
    assert import_hf(folder, dtype=None).embed.W_E.dtype == dtype
    assert torch.equal(import_hf(folder).embed.W_E, model.embed.W_E.to(dtype).float())


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("reflow", {"normalization_type": "LN"}),
        ("reflow", {"norm_bias": True}),
        ("gpt2_new", {"gated_mlp": False, "act_fn": "gelu"}),
        ("gpt2_new", {"d_model": 30}),
        ("gpt2", {"n_key_value_heads": 2}),
        ("gpt2", {"d_head": 6}),
        ("gpt2", {"tie_word_embeddings": False, "unembed_bias": True}),
        ("llama_untied", {"unembed_bias": True}),
        ("gpt2", {"positional_embedding_type": "rotary", "normalization_type": "RMS", "gated_mlp": True}),
    ],
)
def test_models_that_transformers_has_no_class_for(tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ReflowlensError, match=r"is neither a LlamaForCausalLM .* nor a GPT2LMHeadModel"):
        export_hf(build_model(tiny_config(name, **changes)), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_exports_replace_exports_alone(tmp_path: Path) -> None:
    model = random_model("reflow")
    folder = export_hf(random_model("gpt2"), tmp_path / "hf")
    assert json.loads((export_hf(model, folder) / "config.json").read_text())["model_type"] == "llama"
    with pytest.raises(ReflowlensError, match="holds other files and no checkpoint to replace"):
        save_model(folder, model)
    checkpoint = save_model(tmp_path / "checkpoint", model)
    with pytest.raises(ReflowlensError, match="holds other files and no checkpoint to replace"):
        export_hf(model, checkpoint)
    weights = checkpoint / "model.safetensors"
    before = weights.read_bytes()
    with pytest.raises(ReflowlensError, match=r"model\.safetensors is a file: choose a new folder"):
        export_hf(model, weights)
    assert weights.read_bytes() == before
    with torch.no_grad():
        model.ln_final.w[0] = 1e6
    with pytest.raises(
        ReflowlensError, match=r"model\.norm\.weight holds values that are not finite in torch\.float16"
    ):
        export_hf(model, tmp_path / "new", dtype=torch.float16)


# --------------------------------------------------------------------------------------------------------------- import


def test_a_tokenizer_with_more_tokens_than_rows_is_refused(tmp_path: Path) -> None:
    theirs("llama").save_pretrained(tmp_path / "hf")
    with pytest.raises(ReflowlensError, match=r"hf has \d+ rows for tokens, fewer than the 50257 of tokenizer 'gpt2'"):
        import_hf(tmp_path / "hf", tokenizer="gpt2")


@pytest.mark.parametrize("name", MODELS)
def test_imported_models_are_the_same_function(tmp_path: Path, name: str) -> None:
    hf = theirs(name)
    hf.save_pretrained(tmp_path / "hf")
    model = import_hf(tmp_path / "hf", tokenizer="bytes")
    same_function(model, hf)
    assert model.cfg.n_ctx == 64
    assert model.cfg.model_name == "hf"
    assert model.cfg.architecture == ("gpt2" if name.startswith("gpt2") else "llama")
    exported = AutoModelForCausalLM.from_pretrained(export_hf(model, tmp_path / "again"))
    tokens = random_tokens(model.cfg, pos=40)
    assert_close(exported(tokens).logits.detach(), hf(tokens).logits.detach())


def test_a_checkpoint_of_an_imported_model(tmp_path: Path) -> None:
    hf = theirs("gpt2")
    hf.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    shards = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert len(shards) > 2
    cached = tmp_path / "models--openai-community--gpt2" / "snapshots" / "607a30d783dfa663caf39e06633721c8d4cfcd7e"
    cached.parent.mkdir(parents=True)
    (tmp_path / "hf").rename(cached)  # as the hub's client keeps it
    out = import_model(cached, tmp_path / "out", tokenizer="bytes")
    same_function(load_model(out), hf)
    assert load_model(out).cfg.model_name == "gpt2"
    origin = read_manifest(out)["imported_from"]
    assert (origin["format"], origin["source"]) == ("hf", str(cached))
    assert sorted(origin["sha256"]) == ["config.json", *shards]


def test_names_without_the_prefix_and_with_buffers(tmp_path: Path) -> None:
    """As OpenAI's own GPT-2 and early Llamas were saved."""
    for name, prefix, buffer in (
        ("gpt2", "transformer.", "h.0.attn.bias"),
        ("llama_tied", "model.", "layers.0.self_attn.rotary_emb.inv_freq"),
    ):
        hf = theirs(name)
        hf.save_pretrained(tmp_path / name)
        path = tmp_path / name / "model.safetensors"
        tensors = {key.removeprefix(prefix): tensor for key, tensor in load_file(path).items()}
        embedding = next(tensor for key, tensor in tensors.items() if key in ("wte.weight", "embed_tokens.weight"))
        save_file(tensors | {buffer: torch.ones(1, 1, 8, 8), "lm_head.weight": embedding.clone()}, path)
        same_function(import_hf(tmp_path / name, tokenizer="bytes"), hf)


def test_a_shorter_context(tmp_path: Path) -> None:
    """Learned positions are cut, a sliding window is one, and by default a very long context is not kept."""
    hf = theirs("gpt2")
    hf.save_pretrained(tmp_path / "gpt2")
    short = import_hf(tmp_path / "gpt2", n_ctx=16, tokenizer="bytes")
    assert short.pos_embed.W_pos.shape == (16, 32)
    same_function(short, hf)
    config = MistralConfig(**_LLAMA | {"num_key_value_heads": 2, "sliding_window": 20})
    mistral = MistralForCausalLM(config).eval()
    mistral.save_pretrained(tmp_path / "mistral")
    windowed = import_hf(tmp_path / "mistral", tokenizer="bytes")
    assert (windowed.cfg.n_ctx, windowed.cfg.window_size) == (64, 20)
    same_function(windowed, mistral)
    LlamaForCausalLM(LlamaConfig(**_LLAMA | {"max_position_embeddings": 100_000})).save_pretrained(tmp_path / "long")
    with pytest.warns(UserWarning, match=r"was made for 100,000 tokens, of which 4,096 are kept: n_ctx=100000"):
        cut = import_hf(tmp_path / "long", tokenizer="bytes")
    assert (cut.cfg.n_ctx, cut.cfg.original_n_ctx) == (4096, 100_000)
    export_hf(cut, tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())["max_position_embeddings"] == 100_000
    assert import_hf(tmp_path / "long", tokenizer="bytes", n_ctx=5000).cfg.n_ctx == 5000
    with pytest.raises(ReflowlensError, match=r"n_ctx must be between 1 and 64, .* got 65"):
        import_hf(tmp_path / "mistral", tokenizer="bytes", n_ctx=65)


def test_llama_3_turns_slow_pairs_slower() -> None:
    """Pairs by wavelength: short ones as before, long ones by the factor, those between in order."""
    frequency = 500.0 ** (-torch.arange(16).double() / 16)
    scaling = RotaryScaling(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=100)
    slower, wavelength = frequency / scaled(frequency, scaling), 2 * torch.pi / frequency
    assert_close(slower[wavelength < 25], torch.ones(4).double(), 1e-12)
    assert_close(slower[wavelength > 100], torch.full((8,), 4.0).double(), 1e-12)
    between = slower[(wavelength > 25) & (wavelength < 100)]
    assert ((between > 1) & (between < 4)).all()
    assert (between.diff() > 0).all()


# ----------------------------------------------------------------------------------------------------------- tokenizers


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """transformers' tokenizers of exported models."""
    folder = tmp_path_factory.mktemp("tokenizers")
    found = {}
    for name in ("gpt2", "gpt2_16k"):
        cfg = tiny_config("reflow", tokenizer_name=name, d_vocab=get_tokenizer(name).n_vocab, n_signals=2)
        found[name] = AutoTokenizer.from_pretrained(export_hf(random_model(cfg), folder / name))
    return found


@pytest.mark.parametrize("name", ["gpt2", "gpt2_16k"])
@settings(max_examples=60)
@given(text=TEXT)
def test_token_ids_are_the_same(opened: dict[str, Any], name: str, text: str) -> None:
    tokenizer = get_tokenizer(name)
    ids = opened[name](text)["input_ids"]
    assert ids == tokenizer.encode(text)
    assert opened[name].decode(ids) == text
    assert opened[name].eos_token_id == tokenizer.eot_token
    assert opened[name].model_max_length == 24


def test_known_tokenizers_are_recognised_and_others_kept(tmp_path: Path) -> None:
    hf = theirs("llama_tied")
    for name in ("gpt2_16k", "bytes"):
        hf.resize_token_embeddings(max(288, get_tokenizer(name).n_vocab))
        hf.save_pretrained(tmp_path / "hf")
        (tmp_path / "hf" / "tokenizer.json").write_text(packaged_json(name), encoding="utf8")
        assert import_hf(tmp_path / "hf").cfg.tokenizer_name == name
    fields = json.loads(packaged_json("bytes"))
    fields["added_tokens"] = [{"id": 256, "content": "<|end|>", "special": True, "single_word": False}]
    fields["added_tokens"][0] |= dict.fromkeys(("lstrip", "rstrip", "normalized"), False)
    (tmp_path / "hf" / "tokenizer.json").write_text(json.dumps(fields), encoding="utf8")
    out = import_model(tmp_path / "hf", tmp_path / "out")
    model = load_model(out)
    assert model.cfg.tokenizer_name.startswith("tokenizer.json:")
    assert model.tokenizer.n_vocab == 257
    assert model("Hi").shape == (1, 2, 288)
    folder = export_hf(model, tmp_path / "again")
    assert (folder / "tokenizer.json").read_text() == (out / "tokenizer.json").read_text()
    assert AutoTokenizer.from_pretrained(folder)("Hi")["input_ids"] == [72, 105]


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    theirs("llama").save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def refuse(folder: Path, message: str) -> None:
    with pytest.raises(ReflowlensError, match=message) as error:
        import_hf(folder, tokenizer="bytes")
    assert "\n" not in str(error.value)


def change_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "mamba"}, "an architecture that cannot be read, LlamaForCausalLM: LlamaForCausalLM, Mistral"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "cannot be read, LlamaForSequenceClassification"),
        ({"architectures": None, "model_type": "bert"}, "cannot be read, model_type 'bert'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "rotary scaling 'yarn'"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "part of a head",
        ),
        ({"hidden_act": "xielu"}, "activation 'xielu' is not known: silu"),
        ({"quantization_config": {"quant_method": "awq"}}, "holds quantised weights"),
        ({"num_attention_heads": 5}, "config.json: .*multiple of the number of attention"),
        ({"num_attention_heads": "four"}, "config.json: .*num_attention_heads"),
        ({"num_hidden_layers": 3}, r"lacks 'model.layers.2.input_layernorm.weight' \(9 tensors missing\)"),
        ({"num_hidden_layers": 1}, "holds 'model.layers.1.input_layernorm.weight', which has no place"),
        ({"intermediate_size": 47}, r"gate_proj.weight has shape \[48, 32\], expected \[47, 32\]"),
        ({"num_key_value_heads": 2}, r"k_proj.weight has shape \[32, 32\], expected \[16, 32\]"),
        ({"tie_word_embeddings": True}, r"lm_head.weight differs from model.embed_tokens.weight"),
    ],
)
def test_folders_that_cannot_be_read(saved: Path, fields: dict[str, Any], message: str) -> None:
    change_config(saved, **fields)
    refuse(saved, message)


def test_gpt2s_with_other_attention(tmp_path: Path) -> None:
    theirs("gpt2").save_pretrained(tmp_path)
    change_config(tmp_path, scale_attn_by_inverse_layer_idx=True)
    refuse(tmp_path, "scale_attn_by_inverse_layer_idx is True, and a GPT2LMHeadModel can be read with False")


def test_architectures_that_only_look_alike(tmp_path: Path) -> None:
    OlmoForCausalLM(OlmoConfig(**_LLAMA)).save_pretrained(tmp_path / "olmo")
    refuse(tmp_path / "olmo", "cannot be read, OlmoForCausalLM")
    change_config(tmp_path / "olmo", model_type="mixtral", architectures=["MixtralForCausalLM"], num_local_experts=8)
    refuse(tmp_path / "olmo", r"cannot be read, MixtralForCausalLM \(a mixture of experts\)")
    LlamaForSequenceClassification(LlamaConfig(**_LLAMA)).save_pretrained(tmp_path / "classifier")
    refuse(tmp_path / "classifier", "cannot be read, LlamaForSequenceClassification")


def test_tensors_that_are_missing_or_odd(saved: Path) -> None:
    path = saved / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "model.layers.0.self_attn.q_norm.weight": torch.ones(8)}, path)
    refuse(saved, "holds 'model.layers.0.self_attn.q_norm.weight', which has no place .*; did you mean")
    save_file({**tensors, "model.norm.weight": torch.ones(31)}, path)
    refuse(saved, r"model.norm.weight has shape \[31\], expected \[32\]")
    save_file({**tensors, "model.norm.weight": torch.full((32,), torch.inf)}, path)
    refuse(saved, "model.norm.weight holds NaN or infinite values")
    save_file({**tensors, "model.norm.weight": torch.ones(32, dtype=torch.int8)}, path)
    refuse(saved, "model.norm.weight is torch.int8; quantised weights cannot be read")
    del tensors["lm_head.weight"]
    save_file(tensors, path)
    refuse(saved, r"lacks 'lm_head.weight' \(1 tensors missing\)")
    path.write_bytes(path.read_bytes()[:1000])
    refuse(saved, r"model\.safetensors is not a readable safetensors file")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 10**9}, "config.json: num_hidden_layers must be at most 16,384"),
        ({"num_hidden_layers": 16_000}, "config.json has 16,000 layers, its files 21 tensors"),
        ({"num_labels": 10**9}, "config.json: num_labels must be at most"),
        ({"vocab_size": 10**12}, "config.json: d_vocab must be at most"),
        ({"vocab_size": 2**24, "hidden_size": 2**20, "head_dim": 2**18}, "this model takes .* and this machine has"),
        ({"max_position_embeddings": 2**70}, "config.json: n_ctx must be at most"),
        ({"model_type": {}}, "an architecture that cannot be read"),
        ({"model_type": ["llama"], "architectures": None}, r"that cannot be read, model_type \['llama'\]"),
        ({"rms_norm_eps": float("inf")}, "config.json: eps must be a positive number"),
        ({"rope_theta": "x", "rope_parameters": None}, "config.json: could not convert"),
    ],
)
def test_absurd_configurations_build_nothing(saved: Path, fields: dict[str, Any], message: str) -> None:
    change_config(saved, **fields)
    began = time.process_time()
    refuse(saved, message)
    assert time.process_time() - began < 2


@pytest.mark.parametrize("index", [None, [], [1], 3, "x", {}])
def test_an_index_that_names_no_files(saved: Path, index: Any) -> None:
    (saved / "model.safetensors").unlink()
    (saved / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    refuse(saved, "names no files")
    inspect_path(saved)


@pytest.mark.parametrize("name", [3, None, {}, [], True, "", "..", "a\0b", "x" * 5000, "../hf/a.safetensors"])
def test_an_index_that_names_what_is_no_file_of_the_folder(saved: Path, name: Any) -> None:
    (saved / "model.safetensors").rename(saved / "a.safetensors")
    named = {"lm_head.weight": "a.safetensors", "model.norm.weight": name}
    (saved / "model.safetensors.index.json").write_text(json.dumps({"weight_map": named}))
    refuse(saved, "names .*, which is not there")
    assert inspect_path(saved).problems


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64])
@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.0.self_attn.q_proj.weight"])
def test_weights_that_are_no_floats(saved: Path, name: str, dtype: torch.dtype) -> None:
    path = saved / "model.safetensors"
    save_file(load_file(path) | {name: load_file(path)[name].to(dtype)}, path)
    refuse(saved, f"{name} is {dtype}; quantised weights cannot be read")


@pytest.mark.parametrize("stored", ["lm_head.weight", "model.embed_tokens.weight", "both"])
def test_a_tied_readout_under_either_name(tmp_path: Path, stored: str) -> None:
    """As transformers opens it."""
    hf = LlamaForCausalLM(LlamaConfig(**_LLAMA | {"tie_word_embeddings": True}))
    hf.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    matrix = tensors.pop("lm_head.weight", None)
    matrix = tensors.pop("model.embed_tokens.weight", matrix)
    names = ("lm_head.weight", "model.embed_tokens.weight") if stored == "both" else (stored,)
    save_file(tensors | {name: matrix.clone() for name in names}, path, metadata={"format": "pt"})
    model = import_hf(tmp_path, tokenizer="bytes")
    same_function(model, hf)
    assert model.cfg.tie_word_embeddings


def test_folders_without_what_is_needed(saved: Path) -> None:
    refuse(saved / "nowhere", "no folder '.*nowhere'")
    with pytest.raises(ReflowlensError, match=r"holds no tokenizer\.json: have transformers save one there"):
        import_hf(saved)
    with pytest.raises(ReflowlensError, match="no tokenizer file 'gpt3'"):
        import_hf(saved, tokenizer="gpt3")
    weights = saved / "model.safetensors"
    torch.save({}, saved / "pytorch_model.bin")
    weights.unlink()
    refuse(saved, r"holds pickled weights \(pytorch_model\.bin\), which could run code")
    (saved / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../hf/pytorch_model.bin"}}')
    refuse(saved, r"index.json names '../hf/pytorch_model.bin', which is not there")
    (saved / "model.safetensors.index.json").write_text("{}")
    refuse(saved, r"index.json names no files")
    (saved / "model.safetensors.index.json").unlink()
    (saved / "pytorch_model.bin").unlink()
    refuse(saved, r"holds no model\.safetensors and no model\.safetensors\.index\.json")
    (saved / "config.json").write_text("[1]")
    refuse(saved, r"config\.json is not a configuration")
    (saved / "config.json").write_text("{")
    refuse(saved, r"config\.json is damaged")
    (saved / "config.json").unlink()
    refuse(saved, r"holds no config\.json")


# --------------------------------------------------------------------------------------------------------- command line


def test_export_and_import_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = random_model("reflow_topk")
    checkpoint, hf, back = (str(tmp_path / name) for name in ("checkpoint", "hf", "back"))
    save_model(checkpoint, model)
    assert main(["export", checkpoint, hf, "--format", "hf", "--dtype", "float16"]) == 0
    assert main(["import", hf, back, "--n-ctx", "20"]) == 0
    assert capsys.readouterr().out.split() == [hf, back]
    assert load_file(Path(back) / "model.safetensors")["embed.W_E"].dtype == torch.float16
    assert load_model(back).cfg.n_ctx == 20
    for arguments, message in (
        (["import", hf, hf], "is what is imported"),
        (["import", hf, str(tmp_path / "x"), "--n-heads", "2"], "n_heads is for nanoGPT's files"),
        (["import", hf, str(tmp_path / "x"), "--from", "nanogpt"], "no file"),
        (["import", str(tmp_path / "none"), str(tmp_path / "x")], "no folder"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


@pytest.mark.parametrize("format", ["reflowlens", "hf"])
def test_the_command_line_replaces_an_export_of_the_same_model_alone(
    format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In whatever type it was stored; another seed's or another shape's takes ``--overwrite``."""
    cfg = tiny_config("reflow_lite")
    one, seed, shape = (str(tmp_path / name) for name in ("one", "seed", "shape"))
    for path, model in ((one, build_model(cfg, seed=1)), (seed, build_model(cfg, seed=2))):
        save_model(path, model)
    save_model(shape, build_model(dataclasses.replace(cfg, n_layers=1)))
    asked, out = ["--format", format], str(tmp_path / "out")
    for dtype in ("float32", "bfloat16", "float16", "float32"):
        assert main(["export", one, out, *asked, "--dtype", dtype]) == 0
    held = {path.name: path.read_bytes() for path in Path(out).iterdir()}
    for other in (seed, shape):
        capsys.readouterr()
        assert main(["export", other, out, *asked]) == 2
        said = capsys.readouterr().err
        assert re.search(r"out holds another model \([\d,]+ weights; \S+ differs\): choose another folder, or", said)
        assert {path.name: path.read_bytes() for path in Path(out).iterdir()} == held
    assert main(["export", shape, out, *asked, "--overwrite"]) == 0
    if format == "hf":
        assert main(["import", out, one]) == 2
        assert main(["import", out, one, "--overwrite"]) == 0


def test_a_compiled_model_is_exported_with_its_own_weights(tmp_path: Path) -> None:
    model = random_model("gpt2_new")
    wrapped = torch.compile(model)
    for name, exported in (("plain", model), ("compiled", wrapped)):
        export_hf(exported, tmp_path / name)
    plain, compiled = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "compiled"))
    assert plain.keys() == compiled.keys()
    assert all(torch.equal(plain[name], compiled[name]) for name in plain)
    save_model(tmp_path / "saved", wrapped)
    assert_close(load_model(tmp_path / "saved")("The"), model("The"))


@pytest.mark.parametrize("name", ["gpt2_new", "reflow"])
def test_one_head_of_keys_for_each_of_queries_may_be_spelled_out(name: str, tmp_path: Path) -> None:
    cfg = tiny_config(name, n_key_value_heads=tiny_config(name).n_heads)
    model, tokens = random_model(cfg), random_tokens(cfg)
    exported = AutoModelForCausalLM.from_pretrained(export_hf(model, tmp_path / "exported")).eval()
    assert_close(exported(tokens).logits, model(tokens))


def test_a_pruned_model_is_not_exported_with_zeros(tmp_path: Path) -> None:
    model = random_model("gpt2_new")
    prune.custom_from_mask(model.blocks[0].attn, "W_Q", torch.ones_like(model.blocks[0].attn.W_Q))
    with pytest.raises(ReflowlensError, match=r"no parameter 'blocks.0.attn.W_Q'.*prune.remove"):
        export_hf(model, tmp_path / "pruned")
    assert not (tmp_path / "pruned").exists()


@pytest.mark.parametrize("name", ["W_Q", "b_Q", "b_O"])
def test_what_is_pruned_is_neither_saved_nor_exported_until_it_is_a_parameter_again(tmp_path: Path, name: str) -> None:
    """A bias that the model has is no bias that it does without."""
    model = random_model("gpt2_biased")
    attn = model.blocks[1].attn
    prune.custom_from_mask(attn, name, (torch.arange(getattr(attn, name).numel()) % 3 > 0).view_as(getattr(attn, name)))
    for write in (save_model, lambda folder, model: export_hf(model, folder)):
        with pytest.raises(ReflowlensError, match=rf"no parameter 'blocks.1.attn.{name}' \(1 missing\).* prune.remove"):
            write(tmp_path / "pruned", model)
        assert not (tmp_path / "pruned").exists()
    pruned = model("The")
    prune.remove(attn, name)
    assert_close(load_model(save_model(tmp_path / "saved", model))("The"), pruned)
    assert_close(import_hf(export_hf(model, tmp_path / "exported"))("The"), pruned)
