"""Feature pages: one page that searches and shows any number of features, from files, without a network.

A browser fetches nothing for a page that lies on a disk, but runs scripts from beside it. Therefore the data are
scripts, each a call with JSON: the index, the text, and shards of `SHARD` features, loaded when one of them is looked
at. What is written is data alone: the page makes text of it, never markup.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from reflowlens.arguments import integer
from reflowlens.config import nearest
from reflowlens.errors import ReflowlensError
from reflowlens.notebook.feature import (
    FeatureContext,
    FeatureEffect,
    FeatureLayerFacts,
    FeatureRecord,
    FeatureText,
    cantor,
    viewer_json,
)
from reflowlens.notebook.html import HtmlView, escape, table, titled
from reflowlens.progress import bar
from reflowlens.storage.folders import check_replaceable, write_folder

PAGE = "index.html"
INDEX, TEXT = "data/index.js", "data/text.js"
SHARD = 64  # features of a file: a few hundred kilobytes
_STEPS = 1000  # in which activations are told, as shares of the feature's largest
_ASSETS = ("features.css", "features.js")


@dataclass(frozen=True, eq=False)
class FeaturePages:
    """Everything that is known of some features, layer by layer; in a notebook it tells what there is.

    Args:
        title: of the page.
        facts: what was read and of what, by name.
        notes: how the numbers are defined, by their names.
        layers: in the order of the page.
        text: that contexts are taken from.
        record: number of a layer, index of a feature -> the feature.
    """

    title: str
    facts: Mapping[str, str]
    notes: Mapping[str, str]
    layers: Sequence[FeatureLayerFacts]
    text: FeatureText
    record: Callable[[int, int], FeatureRecord]

    @property
    def n_features(self) -> int:
        return sum(layer.n_features for layer in self.layers)

    def feature(self, layer: str | int, index: int) -> tuple[FeatureRecord, FeatureLayerFacts]:
        """One feature, and the facts of its layer.

        Args:
            layer: its key, or the number of its block if no other layer has it.

        Raises:
            ReflowlensError: there is no such layer or feature.
        """
        keys = [facts.key for facts in self.layers]
        found = [i for i, key in enumerate(keys) if str(layer) in (key, key.split("-")[0])]
        exact = [i for i in found if keys[i] == str(layer)] or found
        if len(exact) != 1:
            raise ReflowlensError(f"no layer {str(layer)!r}{nearest(str(layer), keys)}; there are {', '.join(keys)}")
        facts, number = self.layers[exact[0]], integer(index)
        if number is None or not 0 <= number < facts.n_features:
            raise ReflowlensError(f"no feature {index!r}: layer {facts.key} has features 0 to {facts.n_features - 1}")
        return self.record(exact[0], number), facts

    def save(self, folder: str | Path, *, json: bool = False, progress: bool = False) -> Path:
        """Write the pages, and return their first, ``index.html``.

        Args:
            folder: new, empty, or one of earlier pages, which are replaced when the new ones are complete.
            json: write ``features/ID.json`` too, a file a feature, which the viewers of Neuronpedia and circuit-tracer
                read. ID is that of :func:`~reflowlens.notebook.feature.cantor`, of the key if all keys are numbers,
                otherwise of the layer's place.
            progress: show how far the writing is.

        Raises:
            ReflowlensError: the folder holds something else, the disk is full or it cannot be written; then nothing has
                changed.
        """
        folder = Path(folder)
        check_pages_replaceable(folder)
        write_folder(folder, lambda new: self._write(new, json, progress))
        return folder / PAGE

    def _write(self, folder: Path, as_json: bool, progress: bool) -> None:
        for name in ("data", "assets", *(["features"] * as_json)):
            (folder / name).mkdir()
        for name in _ASSETS:
            (folder / "assets" / name).write_text(_asset(name), encoding="utf8")
        (folder / PAGE).write_text(_asset("features.html").replace("$title", escape(self.title)), encoding="utf8")
        _call(folder / TEXT, "text", _packed_text(self.text))
        numbered = all(layer.key.isdigit() for layer in self.layers)
        columns: list[dict[str, list[Any]]] = []
        steps = bar(show=progress, total=self.n_features, desc="writing", unit="feature", leave=False)
        for number, layer in enumerate(self.layers):
            columns.append({"fired": [], "words": [], "says": [], "effect": []})
            for shard, records in enumerate(_shards(self.record, number, layer.n_features)):
                _call(folder / shard_name(layer.key, shard), "shard", layer.key, shard, [_packed(r) for r in records])
                for record in records:
                    columns[-1]["fired"].append(record.fired)
                    columns[-1]["words"].append(record.words(self.text))
                    columns[-1]["says"].append(record.promoted_words(self.text))
                    columns[-1]["effect"].append(record.effect and _digits(record.effect.change))
                    if as_json:
                        name = f"{cantor(int(layer.key) if numbered else number, record.index)}.json"
                        content = json.dumps(viewer_json(record, layer, self.text), ensure_ascii=False)
                        (folder / "features" / name).write_text(content, encoding="utf8")
                steps.update(len(records))
        steps.close()
        _call(folder / INDEX, "index", self._index(columns))

    def _index(self, columns: Sequence[Mapping[str, list[Any]]]) -> dict[str, Any]:
        return {
            "title": self.title,
            "facts": dict(self.facts),
            "notes": dict(self.notes),
            "shard": SHARD,
            "layers": [
                {"key": layer.key, "name": layer.name, "n": layer.n_features, "positions": layer.positions, **own}
                for layer, own in zip(self.layers, columns, strict=True)
            ],
        }

    def card(self, layer: str | int, index: int) -> HtmlView:
        """One feature, for a notebook (:func:`~reflowlens.notebook.feature_card.show_feature`)."""
        from reflowlens.notebook.feature_card import show_feature

        return show_feature(self, layer, index)

    def __repr__(self) -> str:
        return f"FeaturePages({self.title}: {self.n_features:,} features in {len(self.layers)} layers)"

    def _repr_html_(self) -> str:
        rows = [(layer.key, layer.name, layer.n_features, layer.positions) for layer in self.layers]
        return titled(self.title, "", table(["layer", "point", "features", "positions"], rows))


def check_pages_replaceable(folder: Path) -> None:
    """Raise if a folder is a file, or holds something else than earlier feature pages."""
    check_replaceable(folder, (PAGE, INDEX, TEXT), "feature pages")


def open_feature_pages(folder: str | Path) -> FeaturePages:
    """Pages that were saved; activations are to a thousandth of their feature's largest.

    Raises:
        ReflowlensError: there are none, or a file is damaged.
    """
    folder = Path(folder)
    if not (folder / INDEX).is_file():
        raise ReflowlensError(f"no feature pages in {str(folder)!r}: it has no {INDEX}")
    (index,) = _arguments(folder / INDEX)
    (text,) = _arguments(folder / TEXT)
    try:
        layers = [FeatureLayerFacts(own["key"], own["name"], own["n"], own["positions"]) for own in index["layers"]]

        def record(number: int, feature: int) -> FeatureRecord:
            *_, records = _arguments(folder / shard_name(layers[number].key, feature // index["shard"]))
            return _unpacked(records[feature % index["shard"]], layers[number].key)

        return FeaturePages(index["title"], index["facts"], index["notes"], layers, _unpacked_text(text), record)
    except (KeyError, TypeError, ValueError) as error:
        raise ReflowlensError(f"{folder / INDEX} is damaged: {error!r}") from error


def shard_name(key: str, shard: int) -> str:
    """The file of a shard within the folder."""
    return f"data/{key}-{shard}.js"


def _shards(record: Callable[[int, int], FeatureRecord], layer: int, n: int) -> Iterator[list[FeatureRecord]]:
    indices = iter(range(n))
    while part := list(islice(indices, SHARD)):
        yield [record(layer, index) for index in part]


def _call(path: Path, name: str, *arguments: Any) -> None:
    """A script that hands JSON to the page: ASCII, and no "<" that could begin markup."""
    content = ",".join(json.dumps(argument, separators=(",", ":"), allow_nan=False) for argument in arguments)
    path.write_text(f"reflowlens.{name}({content});\n".replace("<", "\\u003c"), encoding="ascii")


def _arguments(path: Path) -> list[Any]:
    """What a script of :func:`_call` hands over."""
    try:
        content = path.read_text(encoding="ascii").strip()
        found: list[Any] = json.loads(f"[{content[content.index('(') + 1 : content.rindex(')')]}]")
    except (OSError, ValueError) as error:
        raise ReflowlensError(f"{path} is missing or damaged: {error}") from error
    return found


def _packed_text(text: FeatureText) -> dict[str, Any]:
    width = "<u2" if int(text.tokens.max(initial=0)) < 2**16 else "<u4"
    return {
        "width": int(width[-1]),
        "tokens": base64.b64encode(text.tokens.astype(width).tobytes()).decode(),
        "ends": text.ends.tolist(),
        "documents": text.documents.tolist(),
        "starts": text.starts.tolist(),
        "vocabulary": {str(token): shown for token, shown in text.vocabulary.items()},
    }


def _unpacked_text(packed: Mapping[str, Any]) -> FeatureText:
    tokens = np.frombuffer(base64.b64decode(packed["tokens"]), dtype=f"<u{packed['width']}").astype(np.int64)
    columns = (np.array(packed[name]) for name in ("ends", "documents", "starts"))
    vocabulary = {int(token): shown for token, shown in packed["vocabulary"].items()}
    return FeatureText(tokens, *columns, vocabulary)


def _packed(record: FeatureRecord) -> dict[str, Any]:
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
        "min": _digits(record.smallest),
        "max": _digits(record.largest),
        "hist": list(record.histogram),
        "q": [_digits(value) for value in record.quantiles],
        "groups": groups,
        "top": [[token, _digits(value)] for token, value in record.promoted],
        "bottom": [[token, _digits(value)] for token, value in record.suppressed],
        "near": [[layer, index, _digits(cosine)] for layer, index, cosine in record.near],
        "effect": effect
        and {
            "change": _digits(effect.change),
            "error": _digits(effect.error),
            "positions": effect.positions,
            "blocks": effect.blocks,
            "control": effect.control,
            "controlChange": _digits(effect.control_change),
        },
    }


def _unpacked(packed: Mapping[str, Any], layer: str) -> FeatureRecord:
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


def _digits(value: float) -> float | None:
    """To four digits; None where there is no number, which JSON has no word for."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def _asset(name: str) -> str:
    return (resources.files("reflowlens.notebook") / "pages" / name).read_text(encoding="utf8")
