"""Folders that transformers opens, and all that reads its format: ``config.json``, safetensors, ``tokenizer.json``.

Nothing of the folder is executed, and weights that are pickled are refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import FactoredMatrix

from reflowlens.checkpoints import WEIGHTS, all_parameters, model_from_weights
from reflowlens.config import LARGEST, ModelConfig
from reflowlens.conversion.families import FAMILIES, GPT2, LLAMA, Family
from reflowlens.conversion.hf_tokenizer import read_tokenizer, write_tokenizer
from reflowlens.conversion.layout import Reader, check_type, same, times, to_ours, to_theirs
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.models.numerics import only_finite
from reflowlens.models.unwrapping import hooked_model
from reflowlens.storage.folders import check_replaceable, check_same_model, write_folder, write_tensors
from reflowlens.storage.opening import (
    as_path,
    holds_file,
    open_safetensors,
    read_json,
    read_tensor,
    shown,
    unchanged,
)
from reflowlens.tokenizers.by_name import check_tokenizer_fits

CONFIG, GENERATION_CONFIG, INDEX = "config.json", "generation_config.json", "model.safetensors.index.json"
HEAD = "lm_head.weight"
DEFAULT_CONTEXT = 4096
_BY_TYPE = {family.model_type: family for family in FAMILIES}
# Fields of a configuration that say why an architecture is none of these.
_OF_OTHERS = {
    "a mixture of experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "layers that share keys and values": ("num_kv_shared_layers", "cla_share_factor"),
}


def export_hf(
    model: HookedModel, folder: str | Path, dtype: torch.dtype | None = None, *, overwrite: bool = True
) -> Path:
    """Write a model as a folder that ``transformers.AutoModelForCausalLM`` and ``AutoTokenizer`` open, with its logits.

    An imported model goes back to its class. Others with rotary positions become a ``LlamaForCausalLM`` (a reFlow with
    E = R B formed in float64, and a readout of its own where R is pruned at one end alone), those with learned ones a
    ``GPT2LMHeadModel``, or what else computes the same. vLLM, llama.cpp, nnsight and TransformerLens's bridge read such
    folders.

    Args:
        folder: where to write; an earlier export there is replaced when the new one is complete.
        dtype: of the stored weights; default: the model's own.
        overwrite: False replaces an export of the same weights alone.

    Raises:
        ReflowlensError: transformers has no architecture that computes what this model computes, a weight is not finite
            in ``dtype`` or is pruned, the folder holds something else, or what may not be replaced, or it cannot be
            written.

    Example: ``export_hf(load_model("reflow-nano"), "reflow-nano-hf")``
    """
    folder = as_path(folder)
    model = hooked_model(model)
    check_replaceable(folder, (WEIGHTS, CONFIG))
    family = _family_of(model.cfg)
    cfg = family.as_family(dataclasses.replace(model.cfg, n_ctx=model.cfg.original_n_ctx or model.cfg.n_ctx))
    dtype = dtype or next(model.parameters()).dtype
    exact = to_theirs(family.layout(cfg), _merged(model), cfg)
    if not overwrite:
        check_same_model(folder, WEIGHTS, exact)
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in exact.items()}
    for name, tensor in tensors.items():
        if not only_finite(tensor):
            raise ReflowlensError(f"{name} holds values that are not finite in {dtype}: the model is not exported")
    tokenizer = model.tokenizer
    begin = next((i for i in (tokenizer.bos_token, tokenizer.named_bos) if i is not None), tokenizer.eot_token)
    ends = {"bos_token_id": begin, "eos_token_id": tokenizer.eot_token}
    several = {"eos_token_id": list(tokenizer.end_tokens)} if len(tokenizer.end_tokens) > 1 else {}
    # transformers 5 says dtype, transformers 4 and llama.cpp torch_dtype.
    types = dict.fromkeys(("dtype", "torch_dtype"), str(dtype).removeprefix("torch."))

    def write(folder: Path) -> None:
        write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
        _write_json(folder / CONFIG, {**family.hf_config(cfg), **ends, "pad_token_id": None, **types})
        _write_json(folder / GENERATION_CONFIG, {"_from_model_config": True, **ends, **several})
        write_tokenizer(folder, tokenizer, cfg.n_ctx)

    return write_folder(folder, write)


def import_hf(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = torch.float32,
    n_ctx: int | None = None,
    tokenizer: str | None = None,
) -> HookedModel:
    """A decoder that transformers saved, as a hooked model with the same logits.

    Families: GPT-2, GPT-Neo, GPT-J, GPT-NeoX (Pythia), OPT, Llama, Mistral, Qwen2, Qwen3, SmolLM3, OLMo 2, Gemma 1 to 3
    (text), Phi, Phi-3, Granite and Cohere. What the last two multiply logits and what blocks write by goes into
    weights, each rounded once.

    Args:
        folder: holds ``config.json``, ``model.safetensors`` (or shards and their index) and ``tokenizer.json``.
        dtype: of the model; None keeps the stored type.
        n_ctx: longest input to keep; default: the model's own, of a rotary model at most 4,096, since every layer holds
            angles and the key-value cache room for every position. A warning tells if that is less; an export says what
            the model was made for.
        tokenizer: ``gpt2``, ``gpt2_16k``, ``gpt2_1k``, ``bytes``, or the path of a ``tokenizer.json``; default: the
            folder's.

    Raises:
        ReflowlensError: the folder or a file is missing, the architecture or its rotary scaling is not known, the
            weights are pickled or quantised, or a tensor is missing, has no place or has another shape.

    Example: ``model = import_hf("SmolLM2-135M")``
    """
    folder = as_path(folder)
    fields = _read_config(folder)
    family, hf = _parse_config(folder, fields)
    with _reading(folder / CONFIG):
        cfg = family.model_config(hf)
    learned = cfg.positional_embedding_type == "standard"
    limit = (cfg.n_ctx if learned else min(cfg.n_ctx, DEFAULT_CONTEXT)) if n_ctx is None else n_ctx
    if not isinstance(limit, int) or not 1 <= limit <= cfg.n_ctx:
        raise ReflowlensError(f"n_ctx must be between 1 and {cfg.n_ctx}, which {folder} was made for, got {n_ctx}")
    if n_ctx is None and limit < cfg.n_ctx:
        warnings.warn(
            f"{folder} was made for {cfg.n_ctx:,} tokens, of which {limit:,} are kept: n_ctx={cfg.n_ctx} keeps all",
            stacklevel=2,
        )
    if not learned:
        cfg = dataclasses.replace(cfg, n_ctx=limit, original_n_ctx=cfg.n_ctx if limit < cfg.n_ctx else None)
    files = weight_files(folder)
    with unchanged(files):
        readers = _readers(files, family)
        if cfg.n_layers > len(readers):  # told before there is a list of what each layer needs
            raise ReflowlensError(f"{folder / CONFIG} has {cfg.n_layers:,} layers, its files {len(readers):,} tensors")
        if cfg.tie_word_embeddings:
            _take_tied_head(readers, family.embedding, folder)
        layout = family.layout(cfg)
        weights = to_ours(layout, readers, cfg, str(folder))
        with _reading(folder / CONFIG):
            factors = {piece.ours: family.factor(hf, piece.ours) for item in layout for piece in item.pieces}
        name = read_tokenizer(folder, fields, tokenizer)
        check_tokenizer_fits(name, cfg.d_vocab, str(folder))
        cfg = dataclasses.replace(cfg, n_ctx=limit, tokenizer_name=name, model_name=_model_name(folder.resolve()))
        if family not in (LLAMA, GPT2):  # others than the two that an export falls back on
            cfg = dataclasses.replace(cfg, original_architecture=family.class_name)

        def kept(name: str, weight: Tensor) -> Tensor:
            return weight[:limit] if name == "pos_embed.W_pos" else times(weight, factors[name])

        each = ((name, kept(name, weight)) for name, weight in weights)
        return model_from_weights(cfg, each, dtype=dtype or readers[family.embedding]().dtype)


def _family_of(cfg: ModelConfig) -> Family:
    """The class that a model came from, or else the first that computes what it computes."""
    first = [family for family in FAMILIES if family.class_name == cfg.original_architecture]
    family = next((family for family in (*first, *FAMILIES) if family.fits(cfg)), None)
    if family is None:
        others = [family.class_name for family in FAMILIES if family not in (LLAMA, GPT2)]
        raise ReflowlensError(
            f"this {cfg.architecture!r} model is neither a LlamaForCausalLM (RMSNorm, rotary positions, gated "
            "MLP, d_model a multiple of n_heads) nor a GPT2LMHeadModel (LayerNorm, learned positions, plain MLP, heads "
            "that make up d_model), both with a readout without bias, nor one of "
            f"{', '.join(others)}: transformers has no class for it"
        )
    return family


def _model_name(folder: Path) -> str:
    """The folder's name; in the hub's cache, models--ORG--NAME/snapshots/HASH, the model's."""
    return folder.parents[1].name.split("--")[-1] if folder.parent.name == "snapshots" else folder.name


def _merged(model: HookedModel) -> dict[str, Tensor]:
    """The parameters on the CPU, a factored embedding as the one matrix that it stands for, or the two."""
    weights = {name: parameter.cpu() for name, parameter in all_parameters(model).items()}
    if isinstance(model.W_E, FactoredMatrix):
        weights["embed.W_E"] = _product(model.W_E)
        if not model.cfg.has_one_embedding:
            weights["unembed.W_U"] = _product(cast(FactoredMatrix, model.unembedding)).T
    return weights


def _product(factors: FactoredMatrix) -> Float[Tensor, "d_vocab d_model"]:
    return (factors.A.detach().cpu().double() @ factors.B.detach().cpu().double()).float()


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ReflowlensError(f"no folder {str(folder)!r}: expected one that transformers saved, with {CONFIG}")
    if not (folder / CONFIG).is_file():
        raise ReflowlensError(f"{folder} holds no {CONFIG}: expected a folder that transformers saved")
    fields = read_json(folder / CONFIG)
    if not isinstance(fields, dict):
        raise ReflowlensError(f"{folder / CONFIG} is not a configuration: an object was expected")
    return fields


def _parse_config(folder: Path, fields: dict[str, Any]) -> tuple[Family, Any]:
    """Who knows the format, and transformers' own configuration object, which fills in what the file leaves out."""
    from transformers import AutoConfig

    kind, classes = fields.get("model_type"), fields.get("architectures")
    known = ", ".join(family.class_name for family in FAMILIES)
    if not isinstance(kind, str) or kind not in _BY_TYPE or classes not in (None, [_BY_TYPE[kind].class_name]):
        named = ", ".join(map(str, classes)) if isinstance(classes, list) else f"model_type {shown(kind)}"
        why = [reason for reason, names in _OF_OTHERS.items() if any(fields.get(name) for name in names)]
        named += f" ({', '.join(why)})" if why else ""
        raise ReflowlensError(f"{folder} holds an architecture that cannot be read, {named}: {known} can")
    if fields.get("quantization_config"):
        raise ReflowlensError(f"{folder} holds quantised weights: give float32, float16 or bfloat16")
    for name in ("num_hidden_layers", "n_layer", "num_labels"):  # transformers makes a list of this length
        layers = fields.get(name)
        if isinstance(layers, int) and layers > LARGEST["n_layers"]:
            raise ReflowlensError(f"{folder / CONFIG}: {name} must be at most {LARGEST['n_layers']:,}, got {layers:,}")
    with _reading(folder / CONFIG):
        return _BY_TYPE[kind], AutoConfig.for_model(**fields)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Anything wrong with a configuration, whoever finds it, is an error that names the file."""
    try:
        yield
    except Exception as error:  # transformers' checks raise errors of several libraries
        raise ReflowlensError(f"{path}: {' '.join(str(error).split())}") from error


def _readers(files: Sequence[Path], family: Family) -> dict[str, Reader]:
    """How to read each tensor of a folder, under the names of the whole model and without its buffers."""
    return {
        _full_name(name, family): partial(read_tensor, path, name)
        for path in files
        for name in open_safetensors(path).keys()  # noqa: SIM118 (it is not a mapping)
        if not re.fullmatch(family.buffers, name)
    }


def _take_tied_head(readers: dict[str, Reader], tied: str, folder: Path) -> None:
    """A tied model's one matrix is stored as the embedding, by some savers as the readout, or as both: equal then."""
    if HEAD not in readers:
        return
    if tied not in readers:
        readers[tied] = readers.pop(HEAD)
        return
    head, embedding = readers[HEAD](), readers[tied]()
    check_type(head, f"{folder}: {HEAD}")
    check_type(embedding, f"{folder}: {tied}")
    if not same(head, embedding):
        raise ReflowlensError(
            f"{folder}: {HEAD} differs from {tied}, but {CONFIG} ties them (tie_word_embeddings is the "
            "default of some models): set it to false if the readout is a matrix of its own"
        )
    del readers[HEAD]


def _full_name(name: str, family: Family) -> str:
    """OpenAI's GPT-2, like any model saved without its head, leaves out the prefix."""
    name = family.aliases.get(name, name)
    return name if name.startswith((family.stem, family.ends["unembed"])) else family.stem + name


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold a folder's weights.

    Raises:
        ReflowlensError: there are none, only pickled ones, or a shard is missing.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        shards = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(shards, dict) or not shards:
            raise ReflowlensError(f"{folder / INDEX} names no files")
        for name in shards.values():
            if not holds_file(folder, name):  # nor does an index have files read that lie elsewhere
                raise ReflowlensError(f"{folder / INDEX} names {shown(name)}, which is not there")
        return [folder / name for name in sorted(set(shards.values()))]
    pickled = sorted(path.name for suffix in ("bin", "pt", "pth") for path in folder.glob(f"*.{suffix}"))
    if pickled:
        raise ReflowlensError(
            f"{folder} holds pickled weights ({pickled[0]}), which could run code: have transformers save them as "
            "safetensors first"
        )
    raise ReflowlensError(f"{folder} holds no {WEIGHTS} and no {INDEX}")


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf8")
