"""The dictionaries that come with the package, as they are stored."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
import torch

import reflowlens as rl
from reflowlens.dictionaries.files import ASSETS, dictionary_manifest
from tests.support import ROOT

NAMES = ("gpt2-new-nano-plt", "reflow-nano-clt", "reflow-nano-plt", "reflow-nano-sae")
TEXT = "The river is wide here, and the old town lies on its left bank. In winter the ferry does not run, and the " * 3


def test_they_are_listed() -> None:
    assert set(NAMES) <= set(rl.list_dictionaries())


@pytest.mark.parametrize("name", NAMES)
def test_a_packaged_dictionary_explains_its_model(name: str) -> None:
    """On a text of no corpus: as many features as stated, and most of the variance."""
    manifest = dictionary_manifest(name)
    model = rl.load_model(manifest["config"]["model_name"])
    dictionary = rl.load_dictionary(name, model=model)
    cfg = dictionary.cfg
    assert cfg.n_features >= 2048
    assert manifest["tokens_seen"] >= 5_000_000
    points = sorted({*cfg.reads, *cfg.writes})
    cache = model.run_with_cache(TEXT, names_filter=points, return_type=None)[1]
    with torch.no_grad():
        x, y = ([cache[point][0, 1:] for point in points] for points in (cfg.reads, cfg.writes))
        for features, target, said in zip(dictionary.encode(x), y, dictionary(x), strict=True):
            assert (features > 0).sum(1).float().mean().item() == pytest.approx(32, abs=1.5)
            assert ((target - said).square().sum() / (target - target.mean(0)).square().sum()).item() < 0.35


@pytest.mark.parametrize("name", NAMES)
def test_the_cards_say_what_packing_cost(name: str) -> None:
    packing = dictionary_manifest(name)["packing"]
    for before, after in zip(packing["fvu_before"], packing["fvu_after"], strict=True):
        assert after - before < 0.01
    card = (ASSETS / name / "README.md").read_text(encoding="utf8")
    assert f"reflowlens dictionary evaluate {name}" in card
    rows = {
        row["dictionary"]: row for row in dictionary_manifest(name)["evaluation"]["layers"] if row["layer"] == "all"
    }
    assert rows[name]["fvu"] < rows["pca"]["fvu"]
    assert f"{rows[name]['fvu']:.3f}" in card


def test_all_of_them_fit_16_mb_and_a_wheel_95() -> None:
    def size(folder: Path) -> int:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    assert sum(size(ASSETS / name) for name in NAMES) <= 16 * 2**20
    packages = [ROOT / name for name in ("reflowlens", "analyses", "pretraining")]
    files = [path for package in packages for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert sum(len(zlib.compress(path.read_bytes(), 1)) for path in files) <= 95e6
