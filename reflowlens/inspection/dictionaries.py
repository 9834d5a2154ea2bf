"""What `inspect` says of a dictionary: what it is, what its manifest records, and each layer's weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from reflowlens.dictionaries.files import dictionary_manifest, load_dictionary
from reflowlens.errors import ReflowlensError
from reflowlens.inspection.folders import Read

_RECORDED = ("step", "tokens_seen", "bits", "weights_sha256")


def read_dictionary(folder: Path) -> Read:
    """The configuration and what is recorded, and a row a layer: where it reads and writes, the norms of its features'
    encoders and decoders (means), and what was measured of it. Damage is told."""
    try:
        dictionary, manifest = load_dictionary(folder), dictionary_manifest(folder)
    except ReflowlensError as error:
        return Read({}, None, [str(error)])
    parameters = sum(parameter.numel() for parameter in dictionary.parameters())
    config = {name: value for name, value in dictionary.cfg.to_dict().items() if name not in ("reads", "writes")}
    facts = {"is": repr(dictionary), "parameters": parameters, "config": config}
    facts |= {name: manifest[name] for name in _RECORDED if manifest.get(name) is not None}
    rows = [
        {
            "reads": reads,
            "writes": writes,
            "encoder_norm": float(layer.W_enc.detach().norm(dim=1).mean()),
            "decoder_norm": float(layer.W_dec.detach().flatten(1).norm(dim=1).mean()),
            **_measured(manifest, number, dictionary.cfg.n_layers),
        }
        for number, (layer, reads, writes) in enumerate(
            zip(dictionary.each_layer(), dictionary.cfg.reads, dictionary.cfg.writes, strict=True)
        )
    ]
    return Read(facts, pd.DataFrame(rows), [])


def _measured(manifest: Mapping[str, Any], layer: int, n_layers: int) -> dict[str, float]:
    """Numbers a layer that the manifest has under ``metrics``."""
    metrics = manifest.get("metrics")
    found = metrics.items() if isinstance(metrics, dict) else ()
    return {
        name: values[layer]
        for name, values in found
        if isinstance(values, list) and len(values) == n_layers and isinstance(values[layer], int | float)
    }
