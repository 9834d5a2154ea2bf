"""Feature pages as files: what is known of a feature in short, and back.

Scripts, each a call with JSON: a page that lies on a disk may run scripts from beside it, but fetch nothing.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from reflowlens.errors import ReflowlensError
from reflowlens.notebook.feature import FeatureContext, FeatureEffect, FeatureRecord, FeatureText

_STEPS = 1000  # in which activations of contexts are told, as shares of the feature's largest


def write_call(path: Path, name: str, *arguments: Any) -> None:
    """A script that hands JSON to the page: ASCII, and no "<" that could begin markup."""
    content = ",".join(json.dumps(argument, separators=(",", ":"), allow_nan=False) for argument in arguments)
    path.write_text(f"reflowlens.{name}({content});\n".replace("<", "\\u003c"), encoding="ascii")


def call_arguments(path: Path) -> list[Any]:
    """What a script of :func:`write_call` hands over."""
    try:
        content = path.read_text(encoding="ascii").strip()
        found: list[Any] = json.loads(f"[{content[content.index('(') + 1 : content.rindex(')')]}]")
    except (OSError, ValueError) as error:
        raise ReflowlensError(f"{path} is missing or damaged: {error}") from error
    return found


def packed_text(text: FeatureText) -> dict[str, Any]:
    width = "<u2" if int(text.tokens.max(initial=0)) < 2**16 else "<u4"
    return {
        "width": int(width[-1]),
        "tokens": base64.b64encode(text.tokens.astype(width).tobytes()).decode(),
        "ends": text.ends.tolist(),
        "documents": text.documents.tolist(),
        "starts": text.starts.tolist(),
        "vocabulary": {str(token): shown for token, shown in text.vocabulary.items()},
    }


def unpacked_text(packed: Mapping[str, Any]) -> FeatureText:
    tokens = np.frombuffer(base64.b64decode(packed["tokens"]), dtype=f"<u{packed['width']}").astype(np.int64)
    ends, documents, starts = (np.array(packed[name]) for name in ("ends", "documents", "starts"))
    vocabulary = {int(token): shown for token, shown in packed["vocabulary"].items()}
    return FeatureText(tokens, ends, documents, starts, vocabulary)


def packed(record: FeatureRecord) -> dict[str, Any]:
    """Short, for there are thousands: activations of contexts are thousandths of the largest absolute one."""
    scale = _STEPS / _peak(record.smallest, record.largest)
    groups = [
        [name, [[c.block, c.start, c.middle, [round(value * scale) for value in c.values]] for c in contexts]]
        for name, contexts in record.contexts.items()
    ]
    effect = record.effect
    return {
        "i": record.index,
        "fired": record.fired,
        "min": digits(record.smallest),
        "max": digits(record.largest),
        "hist": list(record.histogram),
        "q": [digits(value) for value in record.quantiles],
        "groups": groups,
        "top": [[token, digits(value)] for token, value in record.promoted],
        "bottom": [[token, digits(value)] for token, value in record.suppressed],
        "near": [[layer, index, digits(cosine)] for layer, index, cosine in record.near],
        "effect": effect
        and {
            "change": digits(effect.change),
            "error": digits(effect.error),
            "positions": effect.positions,
            "blocks": effect.blocks,
            "control": effect.control,
            "controlChange": digits(effect.control_change),
        },
    }


def unpacked(packed: Mapping[str, Any], layer: str) -> FeatureRecord:
    scale = _peak(packed["min"], packed["max"]) / _STEPS
    contexts = {
        name: [
            FeatureContext(block, start, middle, [value * scale for value in values])
            for block, start, middle, values in own
        ]
        for name, own in packed["groups"]
    }
    effect = packed["effect"]
    return FeatureRecord(
        layer=layer,
        index=packed["i"],
        fired=packed["fired"],
        smallest=packed["min"],
        largest=packed["max"],
        histogram=packed["hist"],
        quantiles=[math.nan if value is None else value for value in packed["q"]],
        contexts=contexts,
        promoted=[(token, value) for token, value in packed["top"]],
        suppressed=[(token, value) for token, value in packed["bottom"]],
        near=[(key, index, cosine) for key, index, cosine in packed["near"]],
        effect=effect
        and FeatureEffect(
            effect["change"],
            math.nan if effect["error"] is None else effect["error"],
            effect["positions"],
            effect["blocks"],
            effect["control"],
            effect["controlChange"],
        ),
    )


def _peak(smallest: float, largest: float) -> float:
    return max(abs(smallest), abs(largest)) or 1.0


def digits(value: float) -> float | None:
    """To four digits; None where there is no number, which JSON has no word for."""
    return float(f"{value:.4g}") if math.isfinite(value) else None
