"""The page of open questions says what its stored tables hold."""

from __future__ import annotations

from analyses.findings.axis_privilege import axis_privilege
from analyses.findings.runs import runs_table
from analyses.findings.sparsity import sparsity
from tests.support import ROOT

FOLDER = ROOT / "docs" / "findings"
PAGE = (ROOT / "docs" / "findings.md").read_text(encoding="utf8").replace("−", "-")


def in_row(name: str) -> str:
    """The page's row of an arm."""
    return next(line for line in PAGE.splitlines() if line.startswith("|") and name in line.split("|")[1])


def test_losses_are_those_of_the_runs() -> None:
    names = {
        "unfactored": "not factored",
        "dense": "dense",
        "top_128": "ReLU alone",
        "top_32": "k = 32",
        "top_8": "k = 8",
    }
    for arm, own in runs_table(FOLDER / "sparsity").groupby("arm"):
        assert ", ".join(f"{loss:.3f}" for loss in own.sort_values("seed").val_loss) in in_row(names[str(arm)])


def test_what_is_said_of_sparsity() -> None:
    result = sparsity(FOLDER / "sparsity")
    assert f"{result.metrics['cost_top_128']:.2f} nats of the {result.metrics['cost_top_8']:.2f} that" in PAGE
    assert f"keeps is {result.metrics['kept_top_128']:.2f} of" in PAGE
    assert set(result.verdicts.values()) == {"underpowered"}
    runs = result.frames["runs"].sort_values("seed")
    purity = ", ".join(f"{value:.3f}" for value in runs[runs["arm"] == "top_32"]["purity"])
    assert purity in in_row("k = 32")


def test_what_is_said_of_axes() -> None:
    result = axis_privilege(FOLDER / "optimisers")
    runs = result.frames["runs"].sort_values("seed")
    for prefix, family in (("", "reFlow"), ("gpt2_", "GPT-2-New")):
        for arm in ("adamw", "equivariant", "adamw_tables"):
            own = runs[runs["arm"] == prefix + arm]["axes_remaining_after_one"]
            assert ", ".join(f"{value:.3f}" for value in own) in in_row(f"{family}, `{arm}`")
    tables = runs[runs["arm"].str.endswith("adamw_tables")]["axes_remaining_after_one"]
    assert tables.between(0.1, 0.32).all()
    assert runs[runs["arm"].str.endswith("equivariant")]["axes_remaining_after_one"].abs().max() < 0.05
