"""A model in one small file: matrices as codes of a few bits, the rest in 16, compressed; `load_model` opens it.

    magic line, length and JSON header, payload

The header has the configuration, what each tensor is stored as, and the payload's SHA-256; the payload is, compressed
as one, the steps and 16-bit tensors and then the codes, tensor after tensor. What a file unpacks to is known from its
configuration, and no more than that is unpacked.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from reflowlens.checkpoints import all_parameters, impossible_size, model_from_weights
from reflowlens.config import ModelConfig
from reflowlens.errors import ReflowlensError
from reflowlens.models import parameter_shapes
from reflowlens.models.base import HookedModel
from reflowlens.models.residual import ENDS
from reflowlens.models.unwrapping import hooked_model
from reflowlens.storage.atomic import replacing
from reflowlens.storage.compressors import compressor
from reflowlens.storage.opening import as_path
from reflowlens.storage.rounding import Method, Rounded, check_rounding, rounded

if TYPE_CHECKING:
    import pandas as pd

MAGIC = b"reflowlens packed model 1\n"
_LONGEST_HEADER = 1 << 22
_SMALL = 4_096  # numbers, up to which a tensor stays in 16 bits
_SUMMED_OVER = ("attn.W_O", "neurons.W_out")  # [head, d_head, d_model]: heads are inputs


@dataclass(frozen=True)
class Packed:
    """A model as it is stored.

    Args:
        cfg: its configuration.
        tensors: rounded, or in 16 bits.
        header: of the file.
        payload: of the file.
    """

    cfg: ModelConfig
    tensors: Mapping[str, Rounded | Tensor]
    header: Mapping[str, Any]
    payload: bytes

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(MAGIC) + 8 + len(_encoded(self.header)) + len(self.payload)

    def table(self) -> pd.DataFrame:
        """A row a tensor: ``tensor``, ``numbers``, ``bits`` of each, ``entropy`` in bits of a code, ``bytes`` by it."""
        import pandas as pd

        rows = []
        for name, tensor in self.tensors.items():
            if isinstance(tensor, Rounded):
                numbers, steps, entropy = tensor.codes.numel(), tensor.step.numel(), tensor.bits_of_entropy
            else:
                numbers, steps, entropy = tensor.numel(), 0, 16.0
            bits = self.header["tensors"][name].get("bits", 16)
            rows.append((name, numbers, bits, entropy, round((numbers * entropy + 16 * steps) / 8)))
        return pd.DataFrame(rows, columns=["tensor", "numbers", "bits", "entropy", "bytes"])

    def model(self) -> HookedModel:
        """The model that the file is opened as."""
        return model_from_weights(self.cfg, _weights(self.cfg, self.tensors))

    def save(self, path: str | Path) -> Path:
        """Write the file; an earlier one is replaced when the new one is complete."""
        path = as_path(path)
        header = _encoded(self.header)
        with replacing(path) as new:
            new.write_bytes(MAGIC + struct.pack("<Q", len(header)) + header + self.payload)
        return path


def pack_model(
    model: Any,
    bits: int = 6,
    *,
    table_bits: int | None = None,
    method: Method = "clip",
    grams: Mapping[str, Float[Tensor, "input input"]] | None = None,
    compressor_name: str = "lzma",
    calibration: str = "",
) -> Packed:
    """A model as codes of a few bits.

    Args:
        model: a hooked model, compiled or not.
        bits: of a weight of a matrix.
        table_bits: of a weight of the tables at both ends; default: 8.
        method: :func:`reflowlens.storage.rounding.rounded`'s.
        grams: for ``"gptq"``, by the names of matrices (:func:`reflowlens.calibration.input_grams`).
        compressor_name: ``lzma``, ``huffman``, or with their packages ``brotli``, ``zstd``.
        calibration: what text ``grams`` are of, for the record.

    Raises:
        ReflowlensError: an argument is not one of those allowed, or the model's weights are not finite.

    Example: ``pack_model(rl.load_model("reflow-nano"), 6).save("reflow-nano.packed")``
    """
    model = hooked_model(model)
    tool = compressor(compressor_name)
    for each in (bits, table_bits or 8):
        check_rounding(each, method)
    tensors: dict[str, Rounded | Tensor] = {}
    stored: dict[str, dict[str, Any]] = {}
    for name, W in all_parameters(model).items():
        if not bool(W.isfinite().all()):
            raise ReflowlensError(f"{name} holds values that are not finite: the model is not packed")
        if W.ndim < 2 or W.numel() <= _SMALL:
            half = W.to(torch.float16) if float(W.abs().max()) < 6e4 else W.to(torch.bfloat16)
            tensors[name], stored[name] = half, {"dtype": str(half.dtype).removeprefix("torch.")}
            continue
        is_table = name.startswith(ENDS) and not name.endswith(("W_up", "W_U"))
        own = (table_bits or 8) if is_table else bits
        tensors[name] = rounded(_as_stored(name, W), own, method, is_table=is_table, gram=(grams or {}).get(name))
        stored[name] = {"bits": own, "table": is_table}
    raw = _raw(tensors)
    payload = tool.compress(raw)
    header = {
        "config": model.cfg.to_dict(),
        "tensors": stored,
        "compressor": compressor_name,
        "method": method,
        "calibration": calibration,
        "sha256": hashlib.sha256(payload).hexdigest(),
    }
    return Packed(model.cfg, tensors, header, payload)


def is_packed(path: Path) -> bool:
    """Whether a file begins as packed models do."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_packed_model(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Configuration and weights, in float32, of a packed model.

    Raises:
        ReflowlensError: the file is damaged, cut short, or does not fit its own configuration.
    """
    try:
        header, payload = _parts(path.read_bytes())
        cfg = ModelConfig.from_dict(dict(header["config"]))
        shapes = _shapes(cfg, header["tensors"])
        sizes = {name: _bytes_of(shapes[name], entry, name) for name, entry in header["tensors"].items()}
        if hashlib.sha256(payload).hexdigest() != header["sha256"]:
            raise ValueError("its contents are not those that were written")
        raw = compressor(header["compressor"]).decompress(payload, sum(sizes.values()))
        if len(raw) != sum(sizes.values()):
            raise ValueError("it holds less than its tensors")
        weights = _weights(cfg, _tensors(raw, shapes, header["tensors"]))
    except ReflowlensError:
        raise
    except Exception as error:  # whatever a damaged file does to those who read it
        raise ReflowlensError(f"{path} is not a readable packed model: {error}") from error
    for name, W in weights.items():
        if not bool(W.isfinite().all()):
            raise ReflowlensError(f"{path}: {name} holds NaN or infinite values")
    return cfg, weights


def _parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", data[len(MAGIC) : len(MAGIC) + 8])
    if length > min(_LONGEST_HEADER, len(data)):
        raise ValueError("its header is cut short")
    start = len(MAGIC) + 8
    return json.loads(data[start : start + length]), data[start + length :]


def _shapes(cfg: ModelConfig, stored: Mapping[str, Any]) -> dict[str, torch.Size]:
    if reason := impossible_size(cfg, dict.fromkeys(stored, (1 << 30,))):
        raise ValueError(reason)
    shapes = parameter_shapes(cfg)
    if set(shapes) != set(stored):
        raise ValueError("its tensors are not those of its configuration")
    return shapes


def _as_stored(name: str, W: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    return W.flatten(0, 1) if name.endswith(_SUMMED_OVER) else W


def _n_rows(shape: torch.Size, entry: Mapping[str, Any], name: str) -> int:
    if entry["table"]:
        return shape[0]
    return shape[-1] if name.endswith(_SUMMED_OVER) else shape.numel() // shape[-2]


def _bytes_of(shape: torch.Size, entry: Mapping[str, Any], name: str) -> int:
    return shape.numel() + 2 * _n_rows(shape, entry, name) if "bits" in entry else 2 * shape.numel()


def _raw(tensors: Mapping[str, Rounded | Tensor]) -> bytes:
    """Steps and 16-bit tensors, then codes: like lies with like."""
    wide = [tensor.step if isinstance(tensor, Rounded) else tensor for tensor in tensors.values()]
    codes = [tensor.codes for tensor in tensors.values() if isinstance(tensor, Rounded)]
    return b"".join(part.contiguous().flatten().view(torch.uint8).numpy().tobytes() for part in (*wide, *codes))


def _tensors(raw: bytes, shapes: Mapping[str, torch.Size], stored: Mapping[str, Any]) -> dict[str, Rounded | Tensor]:
    data, at = torch.frombuffer(bytearray(raw), dtype=torch.uint8), 0
    wide: dict[str, Tensor] = {}
    for name, entry in stored.items():
        n = _n_rows(shapes[name], entry, name) if "bits" in entry else shapes[name].numel()
        dtype = torch.bfloat16 if entry.get("dtype") == "bfloat16" else torch.float16
        wide[name], at = data[at : at + 2 * n].clone().view(dtype), at + 2 * n
    tensors: dict[str, Rounded | Tensor] = {}
    for name, entry in stored.items():
        if "bits" not in entry:
            tensors[name] = wide[name].view(shapes[name])
            continue
        shape = _as_stored(name, torch.empty(shapes[name], device="meta")).shape
        codes, at = data[at : at + shape.numel()].view(torch.int8).view(shape), at + shape.numel()
        tensors[name] = Rounded(codes, wide[name], bool(entry["table"]))
    return tensors


def _weights(cfg: ModelConfig, tensors: Mapping[str, Rounded | Tensor]) -> dict[str, Tensor]:
    shapes = parameter_shapes(cfg)
    return {
        name: (tensor.values() if isinstance(tensor, Rounded) else tensor.float()).view(shapes[name])
        for name, tensor in tensors.items()
    }


def _encoded(header: Mapping[str, Any]) -> bytes:
    return json.dumps(header, separators=(",", ":"), sort_keys=False).encode()
