"""The examples in docstrings are run; those that open the packaged model need it to be there."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

from reflowlens.checkpoints import list_models
from tests.support import ROOT

PACKAGES = ("reflowlens", "analyses", "pretraining")
SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")) if ">>>" in path.read_text()]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: ".".join(path.relative_to(ROOT).with_suffix("").parts))
def test_examples(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # some write files
    if 'load_model("reflow-nano")' in path.read_text() and "reflow-nano" not in list_models():
        pytest.skip("the packaged model is not there")
    parts = path.relative_to(ROOT).with_suffix("").parts
    module = importlib.import_module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    results = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert results.failed == 0
