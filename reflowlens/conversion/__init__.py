"""Models in and out: transformers' folders and nanoGPT's checkpoints.

from reflowlens.conversion import export_hf, import_hf, import_nanogpt
export_hf(model, "reflow-nano-hf")          # AutoModelForCausalLM and AutoTokenizer open it
model = import_hf("SmolLM2-135M")           # one of sixteen families (reflowlens.conversion.families)
model = import_nanogpt("out/ckpt.pt")       # GPT-2, GPT-2-New, reFlow
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from reflowlens.checkpoints import WEIGHTS, save_model
from reflowlens.conversion.hf import CONFIG, export_hf, import_hf, weight_files
from reflowlens.conversion.nanogpt import import_nanogpt
from reflowlens.errors import ReflowlensError
from reflowlens.storage.folders import MANIFEST, check_replaceable
from reflowlens.storage.opening import as_path, file_hash

__all__ = ["export_hf", "import_hf", "import_model", "import_nanogpt"]


def import_model(
    source: str | Path,
    out: str | Path,
    source_format: Literal["hf", "nanogpt"] | None = None,
    *,
    overwrite: bool = True,
    **options: Any,
) -> Path:
    """Import a model and write it as a checkpoint folder, whose manifest says where it came from.

    Args:
        source_format: ``hf`` or ``nanogpt``; default: ``hf`` for a folder, ``nanogpt`` for a file.
        overwrite: False replaces a checkpoint of the same weights alone.
        options: of :func:`import_hf` or :func:`import_nanogpt`.

    Returns:
        ``out``, which :func:`reflowlens.load_model` opens.

    Raises:
        ReflowlensError: the source cannot be imported, or ``out`` holds something else, or what may not be replaced, or
            cannot be written.

    Example: ``import_model("SmolLM2-135M", "out/smollm", dtype=None)``
    """
    source, out = as_path(source), as_path(out)
    if out.resolve() == source.resolve():
        raise ReflowlensError(f"{out} is what is imported: choose a new folder")
    check_replaceable(out, (WEIGHTS, MANIFEST))
    chosen = source_format or ("nanogpt" if source.is_file() else "hf")
    if chosen == "hf" and (extra := sorted({"n_heads", "topk", "rotary_adjacent_pairs"} & set(options))):
        raise ReflowlensError(f"{extra[0]} is for nanoGPT's files: a transformers folder says everything in {CONFIG}")
    model = import_hf(source, **options) if chosen == "hf" else import_nanogpt(source, **options)
    files = [source / CONFIG, *weight_files(source)] if chosen == "hf" else [source]
    origin = {"format": chosen, "source": str(source), "sha256": {file.name: file_hash(file) for file in files}}
    return save_model(out, model, {"imported_from": origin}, overwrite=overwrite)
