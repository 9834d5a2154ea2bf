"""Checkpoints of nanoGPT and of models written from it, the published reFlow family among them.

Their tensors are placed by the patterns of their names and by their shapes; one that finds no place is an error that
names it. What no tensor shows (the number of heads, k of a pruned recipe) comes from ``model_args`` or the caller.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from reflowlens.checkpoints import model_from_weights
from reflowlens.config import ModelConfig
from reflowlens.conversion.layout import (
    SAME,
    TRANSPOSED,
    VECTOR,
    Entry,
    Piece,
    Reader,
    check_type,
    entry,
    same,
    to_ours,
)
from reflowlens.conversion.nanogpt_names import place
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.storage.opening import as_path, shown
from reflowlens.tokenizers.by_name import check_tokenizer_fits, get_tokenizer
from reflowlens.tokenizers.ranks import TOKENIZER_NAMES

DEFAULT_D_HEAD = 64  # nanoGPT's habit
_STATED = ("n_layer", "n_embd", "vocab_size", "n_head", "topk", "rope_theta", "block_size")
Shapes: TypeAlias = "Mapping[str, tuple[int, ...]]"
# What every such model has, and how nanoGPT names it.
_EXAMPLES = {
    "final_norm": "ln_f.weight",
    "0.o.weight": "h.0.attn.c_proj.weight",
    "0.down.weight": "h.0.mlp.c_proj.weight",
}


def import_nanogpt(
    path: str | Path,
    *,
    n_heads: int | None = None,
    topk: int | None = None,
    n_ctx: int | None = None,
    rotary_adjacent_pairs: bool = True,
    tokenizer: str | None = None,
    dtype: torch.dtype | None = torch.float32,
) -> HookedModel:
    """A GPT-2, GPT-2-New or reFlow that a nanoGPT-style loop saved, as a hooked model.

    R is stored as a vocabulary-to-signals matrix and B as a signal basis, either way round; where the shapes do not
    tell (S = d_model) B is taken as [S, d_model]. A model without learned positions is rotary.

    Args:
        path: a ``.pt`` file, of which tensors and plain values alone are read, or a safetensors file.
        n_heads: default: ``n_head`` of ``model_args``, else heads 64 wide.
        topk: signals that each row of R keeps, 0 for all; default: that of ``model_args``, else all.
        n_ctx: longest input of a rotary model; default: ``block_size`` of ``model_args``, else 1,024.
        rotary_adjacent_pairs: as in the published files; False for a model that turns channels (i, i + d_head / 2).
        tokenizer: ``gpt2``, ``gpt2_16k``, ``gpt2_1k``, ``bytes`` or a ``tokenizer.json``; default: ``gpt2`` where the
            vocabulary is large enough for it.
        dtype: of the model; None keeps the stored type.

    Raises:
        ReflowlensError: the file cannot be read or holds more than tensors and plain values, or a tensor is missing,
            has no place or does not fit the others.

    Example: ``model = import_nanogpt("out/ckpt.pt")``
    """
    path = as_path(path)
    where = str(path)
    state, stated = _read(path)
    names = place(state, where)
    for name in names.values():
        check_type(state[name], f"{where}: {shown(name)}")
    if "head" in names and "embedding" in names and same(state[names["head"]], state[names["embedding"]]):
        del names["head"]  # tied: torch stores the shared matrix under both names
    shapes = {role: tuple(state[name].shape) for role, name in names.items()}
    stated |= {name: value for name, value in (("n_head", n_heads), ("topk", topk)) if value is not None}
    sizes = _sizes(shapes, stated, where)
    cfg = ModelConfig(
        **sizes,
        **_kinds(shapes, rotary_adjacent_pairs),
        n_ctx=_context(shapes, stated, n_ctx, where),
        rotary_base=float(stated.get("rope_theta", 10_000.0)),
        tokenizer_name=_tokenizer_name(tokenizer, sizes["d_vocab"], where),
        model_name=path.stem,
    )
    readers: dict[str, Reader] = {name: partial(state.__getitem__, name) for name in names.values()}
    weights = to_ours(_layout(cfg, names, shapes), readers, cfg, where)
    return model_from_weights(cfg, weights, dtype=dtype or state[names["final_norm"]].dtype)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The model's tensors, and what the file says of its shape."""
    if not path.is_file():
        raise ReflowlensError(f"no file {str(path)!r}: expected a nanoGPT checkpoint, such as out/ckpt.pt")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found: Any = load_file(path)
        else:
            packed = zipfile.is_zipfile(path)
            if packed and any(part.compress_type for part in zipfile.ZipFile(path).infolist()):
                raise ValueError("its parts are compressed, which torch.save does not do")  # and could fill the memory
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=packed)
    except Exception as error:  # of many types: the file may be anything
        raise ReflowlensError(
            f"{path} cannot be read as tensors and plain values alone, and nothing else is unpickled; if it is yours, "
            "save {'model': model.state_dict(), 'model_args': numbers} anew"
        ) from error
    fields = found if isinstance(found, dict) else {}
    inner = [fields[key] for key in ("model", "state_dict", "model_state_dict") if isinstance(fields.get(key), dict)]
    state = inner[0] if inner else fields
    if not state or not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()):
        raise ReflowlensError(f"{path} holds no model: expected tensors by name, or such a dictionary under 'model'")
    parts = [fields[key] for key in ("config", "model_args") if isinstance(fields.get(key), dict)]
    stated = {name: part[name] for part in parts for name in _STATED if part.get(name) is not None}
    for name, value in stated.items():
        if not isinstance(value, int | float) or not abs(value) < 2**63:
            raise ReflowlensError(f"{path} states {name}={shown(value)}: a number was expected")
    return state, stated


def _sizes(shapes: Shapes, stated: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The architecture and its sizes, from the shapes where they tell and from what was stated where they do not."""
    factored = "recipe" in shapes
    if factored == ("embedding" in shapes) or factored != ("basis" in shapes):
        raise ReflowlensError(f"{where} must hold one embedding, or a vocabulary-to-signals matrix and a signal basis")
    for role, example in _EXAMPLES.items():
        if role not in shapes:
            raise ReflowlensError(f"{where} is no GPT-2 or reFlow: it holds nothing like {example!r}")
    (d_model,), (_, width), (_, d_mlp) = (shapes[role] for role in _EXAMPLES)
    d_vocab, n_signals = _vocabulary(shapes, stated)
    n_layers = 1 + max(int(role.split(".")[0]) for role in shapes if role[0].isdigit())
    for name, size in (("n_layer", n_layers), ("n_embd", d_model), ("vocab_size", d_vocab)):
        if stated.get(name, size) != size:
            raise ReflowlensError(f"{where} states {name}={stated[name]}, but its tensors make it {size}")
    n_heads, kv_width = stated.get("n_head", max(1, width // DEFAULT_D_HEAD)), _kv_width(shapes, width)
    if not isinstance(n_heads, int) or n_heads < 1 or width < 1 or width % n_heads or kv_width % (width // n_heads):
        raise ReflowlensError(
            f"{where}: {n_heads} heads do not divide {width} query and {kv_width} key channels: choose n_heads"
        )
    topk = (stated.get("topk") or None) if factored else None
    names = {"reflow_topk": topk, "reflow_lite": factored and kv_width < width, "reflow": factored}
    names |= {"gpt2": "positions" in shapes, "gpt2_new": True}
    return {
        "architecture": next(name for name, holds in names.items() if holds),
        "n_layers": n_layers,
        "d_model": d_model,
        "n_heads": n_heads,
        "n_key_value_heads": None if kv_width == width else kv_width * n_heads // width,
        "d_head": width // n_heads,
        "d_mlp": d_mlp,
        "d_vocab": d_vocab,
        "n_signals": n_signals,
        "topk": topk,
    }


def _vocabulary(shapes: Shapes, stated: Mapping[str, Any]) -> tuple[int, int | None]:
    """d_vocab and S. Of the sides of R the vocabulary is the stated one, else the larger."""
    if "embedding" in shapes:
        return shapes["embedding"][0], None
    one, two = shapes["recipe"]
    d_vocab = stated.get("vocab_size", max(one, two))
    return (one, two) if one == d_vocab else (two, one)


def _kv_width(shapes: Shapes, width: int) -> int:
    """Channels of all keys: alone, beside the values, or beside values and queries."""
    if "0.k.weight" in shapes:
        return shapes["0.k.weight"][0]
    if "0.kv.weight" in shapes:
        return shapes["0.kv.weight"][0] // 2
    return (shapes["0.qkv.weight"][0] - width) // 2 if "0.qkv.weight" in shapes else width


def _kinds(shapes: Shapes, adjacent: bool) -> dict[str, Any]:
    """What the presence of tensors tells. LayerNorm goes with learned positions or a bias, RMSNorm with neither."""
    gated, learned, norm_bias = "0.gate.weight" in shapes, "positions" in shapes, "final_norm.bias" in shapes
    return {
        "act_fn": "silu" if gated else "gelu",
        "gated_mlp": gated,
        "normalization_type": "LN" if learned or norm_bias else "RMS",
        "eps": 1e-5 if learned or norm_bias else 1e-6,
        "positional_embedding_type": "standard" if learned else "rotary",
        "rotary_adjacent_pairs": adjacent and not learned,
        "norm_bias": norm_bias,
        "qkv_bias": "0.qkv.bias" in shapes or "0.q.bias" in shapes,
        "attn_out_bias": "0.o.bias" in shapes,
        "mlp_bias": "0.down.bias" in shapes,
        "tie_word_embeddings": "head" not in shapes,
        "unembed_bias": {"head", "head.bias"} <= set(shapes),
    }


def _context(shapes: Shapes, stated: Mapping[str, Any], chosen: int | None, where: str) -> int:
    if "positions" not in shapes:
        return chosen or stated.get("block_size", 1024)
    learned = shapes["positions"][0]
    if chosen not in (None, learned):
        raise ReflowlensError(f"{where} has {learned} learned positions: n_ctx cannot be {chosen}")
    return learned


def _tokenizer_name(chosen: str | None, d_vocab: int, where: str) -> str:
    smallest = get_tokenizer("gpt2").n_vocab
    if chosen is None and d_vocab < smallest:
        raise ReflowlensError(
            f"{where} has {d_vocab} tokens, fewer than GPT-2's {smallest}: choose its tokenizer, "
            f"{', '.join(TOKENIZER_NAMES)} or a tokenizer.json"
        )
    check_tokenizer_fits(chosen or "gpt2", d_vocab, where)
    return get_tokenizer(chosen or "gpt2").name


def _layout(cfg: ModelConfig, names: Mapping[str, str], shapes: Shapes) -> list[Entry]:
    """Where each tensor is in our model. A role that no tensor has goes by its own name, and is found missing."""

    def at(role: str) -> str:
        return names.get(role, role)

    entries = [entry(at("final_norm"), "ln_final.w", VECTOR)]
    if cfg.is_factored:
        recipe = SAME if shapes["recipe"][0] == cfg.d_vocab else TRANSPOSED
        basis = SAME if shapes["basis"] == (cfg.n_signals, cfg.d_model) else TRANSPOSED
        entries += [entry(at("recipe"), "embed.W_recipe", recipe), entry(at("basis"), "embed.W_basis", basis)]
    else:
        entries.append(entry(at("embedding"), "embed.W_E", SAME))
    if cfg.positional_embedding_type == "standard":
        entries.append(entry(at("positions"), "pos_embed.W_pos", SAME))
    if cfg.norm_bias:
        entries.append(entry(at("final_norm.bias"), "ln_final.b", VECTOR))
    if not cfg.tie_word_embeddings:
        entries.append(entry(at("head"), "unembed.W_U", TRANSPOSED))
    if cfg.unembed_bias:
        entries.append(entry(at("head.bias"), "unembed.b_U", VECTOR))
    mlp = {"gate": "gate", "up": "in", "down": "out"} if cfg.gated_mlp else {"up": "in", "down": "out"}
    for layer in range(cfg.n_layers):
        ours = f"blocks.{layer}"
        for role, norm in (("norm1", "ln1"), ("norm2", "ln2")):
            entries.append(entry(at(f"{layer}.{role}.weight"), f"{ours}.{norm}.w", VECTOR))
            if cfg.norm_bias:
                entries.append(entry(at(f"{layer}.{role}.bias"), f"{ours}.{norm}.b", VECTOR))
        for role, part in mlp.items():
            entries.append(entry(at(f"{layer}.{role}.weight"), f"{ours}.mlp.W_{part}", TRANSPOSED))
            if cfg.mlp_bias:
                entries.append(entry(at(f"{layer}.{role}.bias"), f"{ours}.mlp.b_{part}", VECTOR))
        pattern = "head d_head d_model -> d_model (head d_head)"
        entries.append(entry(at(f"{layer}.o.weight"), f"{ours}.attn.W_O", pattern, head=cfg.n_heads))
        if cfg.attn_out_bias:
            entries.append(entry(at(f"{layer}.o.bias"), f"{ours}.attn.b_O", VECTOR))
        for role, parts in _projections(names, layer).items():
            heads = {part: {"head": cfg.n_heads if part == "Q" else cfg.kv_heads} for part in parts}
            pattern = "head d_model d_head -> (head d_head) d_model"
            W = [Piece(f"{ours}.attn.W_{part}", pattern, heads[part]) for part in parts]
            b = [Piece(f"{ours}.attn.b_{part}", "head d_head -> (head d_head)", heads[part]) for part in parts]
            entries.append(Entry(at(f"{layer}.{role}.weight"), W))
            if cfg.qkv_bias:
                entries.append(Entry(at(f"{layer}.{role}.bias"), b))
    return entries


def _projections(names: Mapping[str, str], layer: int) -> dict[str, str]:
    """Which of queries, keys and values each projection makes, one below the other."""
    if f"{layer}.qkv.weight" in names:
        return {"qkv": "QKV"}
    return {"q": "Q", "kv": "KV"} if f"{layer}.kv.weight" in names else {"q": "Q", "k": "K", "v": "V"}
