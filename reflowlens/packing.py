"""A model or dictionary in one small file: matrices as codes of a few bits, the rest in 16, compressed.

`load_model` and `load_dictionary` open the file (:mod:`reflowlens.storage.packed_file`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from reflowlens.checkpoints import all_parameters, model_from_weights
from reflowlens.config import ModelConfig
from reflowlens.dictionaries.config import DictionaryConfig
from reflowlens.dictionaries.dictionary import Dictionary
from reflowlens.dictionaries.files import dictionary_of
from reflowlens.dictionaries.packing import uses_of
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.models.residual import ENDS
from reflowlens.models.unwrapping import hooked_model
from reflowlens.storage.compressors import compressor
from reflowlens.storage.opening import as_path
from reflowlens.storage.packed_file import PackedFile, entry_of, raw_bytes, unrounded
from reflowlens.storage.quantised import quantise
from reflowlens.storage.rounding import Method, Rounded, check_rounding, rounded

if TYPE_CHECKING:
    import pandas as pd

_WHOLE = 16  # bits of a weight that is not rounded
_SMALL = 4_096  # numbers, up to which a tensor stays in 16 bits
_SUMMED_OVER = ("attn.W_O", "neurons.W_out")  # [head, d_head, d_model]: heads are inputs


@dataclass(frozen=True)
class Packed:
    """A model or dictionary as it is stored.

    Args:
        cfg: its configuration.
        tensors: rounded, or in 16 bits.
        shapes: of the tensors that they stand for.
        file: what is written.
    """

    cfg: ModelConfig | DictionaryConfig
    tensors: Mapping[str, Rounded | Tensor]
    shapes: Mapping[str, torch.Size]
    file: PackedFile

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.file.size

    def table(self) -> pd.DataFrame:
        """A row a tensor: ``tensor``, ``numbers``, ``bits`` of each, ``entropy`` in bits of a code, ``bytes`` by it."""
        import pandas as pd

        rows = []
        for name, tensor in self.tensors.items():
            if isinstance(tensor, Rounded):
                numbers, steps, entropy = tensor.codes.numel(), tensor.step.numel(), tensor.bits_of_entropy
            else:
                numbers, steps, entropy = tensor.numel(), 0, 16.0
            bits = self.file.header["tensors"][name].get("bits", 16)
            rows.append((name, numbers, bits, entropy, round((numbers * entropy + 16 * steps) / 8)))
        return pd.DataFrame(rows, columns=["tensor", "numbers", "bits", "entropy", "bytes"])

    def model(self) -> HookedModel:
        """The model that the file is opened as; of a dictionary there is :meth:`dictionary`."""
        if not isinstance(self.cfg, ModelConfig):
            raise ReflowlensError("a dictionary was packed: .dictionary() is what its file is opened as")
        return model_from_weights(self.cfg, unrounded(self.tensors, self.shapes).items())

    def dictionary(self) -> Dictionary:
        """The dictionary that the file is opened as; of a model there is :meth:`model`."""
        if not isinstance(self.cfg, DictionaryConfig):
            raise ReflowlensError("a model was packed: .model() is what its file is opened as")
        return dictionary_of(Path("packed"), self.cfg, unrounded(self.tensors, self.shapes))

    def save(self, path: str | Path) -> Path:
        """Write the file; an earlier one is replaced when the new one is complete."""
        path = as_path(path)
        self.file.save(path)
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
    manifest: Mapping[str, Any] | None = None,
) -> Packed:
    """A model as codes of a few bits.

    Args:
        model: a hooked model, compiled or not.
        bits: of a weight of a matrix; 16: all weights in float16, none rounded further.
        table_bits: of a weight of the tables at both ends; default: 8, or 16 with ``bits=16``.
        method: :func:`reflowlens.storage.rounding.rounded`'s.
        grams: for ``"gptq"``, by the names of matrices (:func:`reflowlens.calibration.input_grams`).
        compressor_name: ``lzma``, ``huffman``, or with their packages ``brotli``, ``zstd``.
        calibration: what text ``grams`` are of, for the record.
        manifest: what else is recorded of the model (:func:`reflowlens.checkpoints.read_manifest`).

    Raises:
        ReflowlensError: an argument is not one of those allowed, or the model's weights are not finite.

    Example: ``pack_model(rl.load_model("reflow-nano"), 6).save("reflow-nano.packed")``
    """
    model = hooked_model(model)
    table_bits = table_bits or (_WHOLE if bits == _WHOLE else 8)
    for each in (bits, table_bits):
        if each != _WHOLE:
            check_rounding(each, method)
    compressor(compressor_name)  # told before the work is done
    tensors: dict[str, Rounded | Tensor] = {}
    stored: dict[str, dict[str, Any]] = {}
    weights = all_parameters(model)
    for name, W in weights.items():
        _check_finite(name, W, "model")
        is_table = name.startswith(ENDS) and not name.endswith(("W_up", "W_U"))
        own, merged = table_bits if is_table else bits, name.endswith(_SUMMED_OVER)
        if W.ndim < 2 or W.numel() <= _SMALL or own == _WHOLE:
            tensors[name] = _in_16_bits(W)
            stored[name] = entry_of(tensors[name])
            continue
        matrix = W.flatten(0, 1) if merged else W
        tensors[name] = rounded(matrix, own, method, is_table=is_table, gram=(grams or {}).get(name))
        stored[name] = entry_of(tensors[name], own, merged)
    header = {"kind": "model", "config": model.cfg.to_dict(), "manifest": _recorded(manifest), "tensors": stored}
    return _packed(model.cfg, weights, tensors, header, method, calibration, compressor_name)


def pack_dictionary(
    dictionary: Dictionary,
    bits: float = 4,
    *,
    method: Method = "clip",
    reads: Sequence[Float[Tensor, "token d_in"]] | None = None,
    compressor_name: str = "lzma",
    calibration: str = "",
    manifest: Mapping[str, Any] | None = None,
) -> Packed:
    """A dictionary as codes of a few bits, with a step for each feature's encoder and for its decoders together.

    Args:
        dictionary: of any kind; what its configuration records of its model is kept.
        bits: of a weight of a matrix. Of ``"gptq"``: on average, fractions allowed; rows that matter more get more
            (:func:`reflowlens.storage.quantised.quantise`), as :func:`reflowlens.save_dictionary` has it.
        method: ``"rtn"``, ``"clip"`` or ``"gptq"``.
        reads: for ``"gptq"``, activations that each layer reads, 10,000 positions or so.
        compressor_name: ``lzma``, ``huffman``, or with their packages ``brotli``, ``zstd``.
        calibration: what text ``reads`` are of, for the record.
        manifest: what else is recorded of the dictionary.

    Raises:
        ReflowlensError: an argument is not one of those allowed, or the dictionary's weights are not finite.

    Example: ``pack_dictionary(dictionary, 4, method="gptq", reads=activations.reads).save("plt.packed")``
    """
    compressor(compressor_name)
    if method == "gptq" and reads is None:
        raise ReflowlensError('method "gptq" packs a dictionary by what its layers read: give reads=')
    check_rounding(8 if method == "gptq" else cast(int, bits), method)
    uses = uses_of(dictionary, reads) if reads is not None and method == "gptq" else {}
    tensors: dict[str, Rounded | Tensor] = {}
    weights = {name: tensor.detach().cpu() for name, tensor in dictionary.state_dict().items()}
    for name, W in weights.items():
        _check_finite(name, W, "dictionary")
        if W.ndim < 2:
            tensors[name] = _in_16_bits(W)
        elif method == "gptq":
            tensors[name] = Rounded(*quantise(W, bits, uses.get(name)), is_table=True)
        else:
            tensors[name] = rounded(W, int(bits), method, is_table=True)
    stored = {name: entry_of(tensor, bits) for name, tensor in tensors.items()}
    cfg = dictionary.cfg
    header = {"kind": "dictionary", "config": cfg.to_dict(), "manifest": _recorded(manifest), "tensors": stored}
    return _packed(cfg, weights, tensors, header, method, calibration, compressor_name)


def _packed(
    cfg: ModelConfig | DictionaryConfig,
    weights: Mapping[str, Tensor],
    tensors: Mapping[str, Rounded | Tensor],
    header: Mapping[str, Any],
    method: Method,
    calibration: str,
    compressor_name: str,
) -> Packed:
    how = {"compressor": compressor_name, "method": method, "calibration": calibration}
    file = PackedFile({**header, **how}, compressor(compressor_name).compress(raw_bytes(tensors)))
    return Packed(cfg, tensors, {name: W.shape for name, W in weights.items()}, file)


def _recorded(manifest: Mapping[str, Any] | None) -> dict[str, Any]:
    """A manifest without what is said of the file that it lay beside."""
    left_out = ("format", "config", "weights_sha256", "bits", "packing")
    return {name: value for name, value in (manifest or {}).items() if name not in left_out}


def _check_finite(name: str, W: Float[Tensor, "*shape"], kind: str) -> None:
    if not bool(W.isfinite().all()):
        raise ReflowlensError(f"{name} holds values that are not finite: the {kind} is not packed")


def _in_16_bits(W: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    return W.to(torch.float16) if float(W.abs().max()) < 6e4 else W.to(torch.bfloat16)
