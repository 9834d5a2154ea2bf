"""Feature pages: one page that searches and shows any number of features, from files, without a network.

A browser fetches nothing for a page that lies on a disk, but runs scripts from beside it. Therefore the data are
scripts, each a call with JSON: the index, the text, and shards of `SHARD` features, loaded when one of them is looked
at. What is written is data alone: the page makes text of it, never markup.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

from reflowlens.arguments import integer
from reflowlens.errors import ReflowlensError, nearest
from reflowlens.notebook.feature import (
    FeatureLayerFacts,
    FeatureRecord,
    FeatureText,
    cantor,
    viewer_json,
)
from reflowlens.notebook.feature_files import (
    call_arguments,
    digits,
    packed,
    packed_text,
    unpacked,
    unpacked_text,
    write_call,
)
from reflowlens.notebook.html import HtmlView, escape, table, titled
from reflowlens.progress import bar
from reflowlens.storage.folders import check_replaceable, write_folder

PAGE = "index.html"
INDEX, TEXT = "data/index.js", "data/text.js"
SHARD = 64  # features of a file: a few hundred kilobytes
_ASSETS = ("features.css", "features.js")
_KEY = re.compile(r"[\w.-]+")  # of a layer: part of a file's name


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
        write_call(folder / TEXT, "text", packed_text(self.text))
        numbered = all(layer.key.isdigit() for layer in self.layers)
        columns: list[dict[str, list[Any]]] = []
        steps = bar(show=progress, total=self.n_features, desc="writing", unit="feature", leave=False)
        for number, layer in enumerate(self.layers):
            columns.append({"fired": [], "words": [], "says": [], "effect": []})
            for shard, records in enumerate(_shards(self.record, number, layer.n_features)):
                file = folder / shard_name(layer.key, shard)
                write_call(file, "shard", layer.key, shard, [packed(record) for record in records])
                for record in records:
                    columns[-1]["fired"].append(record.fired)
                    columns[-1]["words"].append(record.words(self.text))
                    columns[-1]["says"].append(record.promoted_words(self.text))
                    columns[-1]["effect"].append(record.effect and digits(record.effect.change))
                    if as_json:
                        name = f"{cantor(int(layer.key) if numbered else number, record.index)}.json"
                        content = json.dumps(viewer_json(record, layer, self.text), ensure_ascii=False)
                        (folder / "features" / name).write_text(content, encoding="utf8")
                steps.update(len(records))
        steps.close()
        write_call(folder / INDEX, "index", self._index(columns))

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

    def record(number: int, feature: int) -> FeatureRecord:
        file = folder / shard_name(layers[number].key, feature // shard)
        with _damage_told(file):
            *_, records = call_arguments(file)
            return unpacked(records[feature % shard], layers[number].key)

    with _damage_told(folder / TEXT):
        (written,) = call_arguments(folder / TEXT)
        text = unpacked_text(written)
    with _damage_told(folder / INDEX):
        (index,) = call_arguments(folder / INDEX)
        shard = index["shard"]
        if not (isinstance(shard, int) and shard > 0 and all(_KEY.fullmatch(own["key"]) for own in index["layers"])):
            raise ValueError("a layer's key, or the number of features a shard, cannot be")
        layers = [FeatureLayerFacts(own["key"], own["name"], own["n"], own["positions"]) for own in index["layers"]]
        return FeaturePages(index["title"], index["facts"], index["notes"], layers, text, record)


@contextmanager
def _damage_told(file: Path) -> Iterator[None]:
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ReflowlensError(f"{file} is damaged: {error!r}") from error


def shard_name(key: str, shard: int) -> str:
    """The file of a shard within the folder."""
    return f"data/{key}-{shard}.js"


def _shards(record: Callable[[int, int], FeatureRecord], layer: int, n: int) -> Iterator[list[FeatureRecord]]:
    indices = iter(range(n))
    while part := list(islice(indices, SHARD)):
        yield [record(layer, index) for index in part]


def _asset(name: str) -> str:
    return (resources.files("reflowlens.notebook") / "pages" / name).read_text(encoding="utf8")
