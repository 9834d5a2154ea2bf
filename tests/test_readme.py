"""The README's code runs as it stands, block after block, on the packaged model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from reflowlens.config import PRESETS
from reflowlens.models import build_model

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf8")


def test_the_first_ten_minutes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 5
    exec(compile("\n".join(blocks), "README.md", "exec"), {})
    assert "->" in capsys.readouterr().out
    assert (tmp_path / "out" / "ablation" / "result.json").is_file()


@pytest.mark.parametrize("name", PRESETS)
def test_the_table_of_counts(name):
    row = next(line for line in README.splitlines() if f"| `{name}` |" in line and line.rstrip(" |")[-1].isdigit())
    assert int(row.split("|")[-2].replace(",", "")) == build_model(name, device="meta").n_parameters
