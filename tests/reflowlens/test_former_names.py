"""Imports that the manual had before modules moved."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

FORMER = {
    "analyses.comparison": "analyses.runner.comparison",
    "analyses.draws": "analyses.statistics.draws",
    "analyses.lens": "analyses.measures.lens",
    "analyses.lexicon": "analyses.words.lexicon",
    "analyses.sentiment": "analyses.measures.sentiment",
    "analyses.unit_comparison": "analyses.units.comparison",
    "analyses.unit_report": "analyses.units.terminal",
    "reflowlens.figure_export": "reflowlens.figures.export",
}


@pytest.mark.parametrize("former", FORMER)
def test_a_module_that_moved_is_imported_by_its_former_name(former):
    sys.modules.pop(former, None)
    with pytest.warns(DeprecationWarning, match=f"{former} has moved: import {FORMER[former]}"):
        assert importlib.import_module(former) is importlib.import_module(FORMER[former])


DOCUMENTED = """
from analyses.result import Result
from analyses.statistics import bootstrap_interval, paired_permutation_pvalue, predictive_pvalue, verdict
from analyses.unit_report import unit_report
from analyses.lexicon import FactualPrompt, load_lexicon
from reflowlens.figures import bars, dots, heatmap, histogram_with_control, line_with_band, save_figure
from reflowlens.figure_export import provenance, read_figure
from reflowlens.interventions.values import from_json, to_json
from reflowlens.tokenizers import get_tokenizer
"""


def test_documented_imports_work_in_a_fresh_interpreter():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", DOCUMENTED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
