"""The page of open questions says what its stored tables hold."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

import reflowlens as rl
from analyses.findings.axis_privilege import DECIDING, axis_privilege
from analyses.findings.claims_over_seeds import claims_over_seeds
from analyses.findings.distillation import distillation
from analyses.findings.runs import runs_table
from analyses.findings.scale import scale
from analyses.findings.signal_stability import signal_stability
from analyses.findings.sparsity import sparsity
from analyses.result.result import Result
from pretraining.study import Run
from reflowlens.cli import build_parser
from tests.support import ROOT

FOLDER = ROOT / "docs" / "findings"
PAGE = (ROOT / "docs" / "findings.md").read_text(encoding="utf8").replace("−", "-")
ARMS = {
    "unfactored": "not factored",
    "dense": "dense",
    "top_128": "ReLU alone",
    "top_32": "k = 32",
    "top_8": "k = 8",
    "straight_through": "all entries learn",
}


def rows(name: str) -> str:
    """The page's rows of an arm."""
    return "\n".join(line for line in PAGE.splitlines() if line.startswith("|") and name in line.split("|")[1])


def with_interval(result: Result, metric: str, digits: int) -> str:
    """As the page writes a value; -0 is 0."""
    value, low, high = (round(x, digits) + 0.0 for x in (result.metrics[metric], *result.intervals[metric]))
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def named_by(command: str, monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """The runs that a command `reflowlens study` would train."""
    options = build_parser().parse_args(shlex.split(command, comments=True)[1:])
    asked: list[Run] = []

    def keep(runs: list[Run], **_: object) -> None:
        asked.extend(runs)
        raise KeyboardInterrupt

    monkeypatch.setattr("pretraining.study.train_study", keep)
    with pytest.raises(KeyboardInterrupt):
        options.command(options)
    return asked


def test_the_commands_train_the_runs_of_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = [line for line in PAGE.replace("\\\n", "").splitlines() if line.startswith("reflowlens study ")]
    runs = [run for command in commands for run in named_by(command, monkeypatch)]
    asked: dict[str, set[tuple[str, int, int, int]]] = {run.folder.parent.name: set() for run in runs}
    for run in runs:
        steps = run.cfg.run.steps
        asked[run.folder.parent.name].add((run.arm, run.seed, steps, steps * run.cfg.tokens_per_step))
    trained = {path.name: set(table_of(path)) for path in FOLDER.iterdir()}
    assert trained.pop("stability") == {
        run for run in trained["sparsity"] if run[1] < 3 and run[0] != "straight_through"
    }
    assert trained == asked


def table_of(study: Path) -> list[tuple[str, int, int, int]]:
    """Arm, seed, steps and tokens of each run."""
    return list(runs_table(study)[["arm", "seed", "step", "tokens"]].itertuples(index=False, name=None))


def test_losses_are_those_of_the_runs() -> None:
    for arm, own in runs_table(FOLDER / "sparsity").groupby("arm"):
        assert ", ".join(f"{loss:.3f}" for loss in own.sort_values("seed").val_loss) in rows(ARMS[str(arm)])


def test_what_is_said_of_sparsity() -> None:
    result = sparsity(FOLDER / "sparsity")
    assert f"it costs {result.metrics['cost_top_128']:.2f} nats of the {result.metrics['cost_top_8']:.2f}" in PAGE
    assert result.verdicts["arms_with_both"] == result.verdicts["spared_straight_through"] == "supported"
    spared = with_interval(result, "spared_straight_through", 2)
    assert f"a share of {spared.replace(')', ' over seeds)')} is spared" in PAGE.replace("\n", " ")
    assert result.metrics["arms_with_both"] == 1
    runs = result.frames["runs"].sort_values("seed")
    for arm, name in ARMS.items():
        assert ", ".join(f"{value:.3f}" for value in runs[runs["arm"] == arm]["purity"]) in rows(name)
        if arm != "dense":
            assert with_interval(result, f"kept_{arm}", 2) in rows(name)
            assert with_interval(result, f"purity_{arm}", 3) in rows(name)
            assert f"{result.verdicts[f'kept_{arm}']}, {result.verdicts[f'purity_{arm}']}" in rows(name)


def test_what_is_said_of_another_seed() -> None:
    result = signal_stability(FOLDER / "stability")
    for arm in sorted(set(ARMS) - {"straight_through"}):
        assert with_interval(result, f"words_{arm}", 3) in rows(ARMS[arm])
        pruned = arm.startswith("top")
        assert result.verdicts[f"words_{arm}"] == ("not supported" if pruned else "underpowered")


def test_what_is_said_of_verdicts() -> None:
    result = claims_over_seeds(str(FOLDER / "sparsity"), arm="dense")
    assert len(result.frames["claims"]) == 42
    assert result.verdicts["stable_share"] == "supported"
    for metric in ("stable_share", "supported_on_all", "supported_on_some"):
        dealt = result.controls[metric]["shuffled_claims"]
        assert f"{with_interval(result, metric, 2)} | {dealt:.2f} |" in PAGE


@pytest.mark.parametrize(("prefix", "family"), [("", "reFlow"), ("gpt2_", "GPT-2-New")])
def test_what_is_said_of_axes(prefix: str, family: str) -> None:
    result = axis_privilege(FOLDER / "optimisers")
    runs = result.frames["runs"].sort_values("seed")
    for arm in ("adamw", "equivariant", "adamw_tables"):
        own = runs[runs["arm"] == prefix + arm]["axes_remaining_after_one"]
        assert ", ".join(f"{value:.3f}" for value in own) in rows(f"{family}, `{arm}`")
    left = runs.set_index("arm")["axes_remaining_after_one"]
    assert left[[prefix + "adamw_tables"]].between(0.1, 0.32).all()
    assert left[[prefix + "equivariant"]].abs().max() < 0.05
    for measure, digits in (("readout_kurtosis", 2), ("ten_signal_share", 3), ("remaining_after_one", 3)):
        assert result.verdicts[f"privileged_{prefix}equivariant_{measure}"] == "not supported"
        assert with_interval(result, f"privileged_{prefix}adamw_{measure}", digits) in PAGE


def test_what_is_said_of_axes_that_come_back() -> None:
    result = axis_privilege(FOLDER / "rerandomised")
    runs = result.frames["runs"].sort_values("seed")
    for arm in ("as_it_was", "stream", "stream_equivariant"):
        own = runs[runs["arm"] == arm]["axes_remaining_after_one"]
        assert ", ".join(f"{value:.3f}" for value in own) in rows(f"`{arm}`")
    assert {result.verdicts[f"privileged_stream_equivariant_{m}"] for m in DECIDING} == {"not supported"}


def test_what_is_said_of_distillation() -> None:
    result = distillation(FOLDER / "distillation", rl.load_model("reflow-nano"))
    for claim, digits in (("logits_gain", 3), ("signals_gain", 3), ("codebook", 3), ("causal", 2), ("steering", 2)):
        assert f"{with_interval(result, claim, digits)} |" in PAGE
    assert result.verdicts["logits_gain"] == result.verdicts["signals_gain"] == "supported"
    assert result.verdicts["codebook"] == "not supported"


def test_what_is_said_of_size() -> None:
    result = scale(FOLDER / "scale")
    for size, own in result.frames["gaps"].sort_values("seed").groupby("size"):
        assert f"{', '.join(f'{gap:.3f}' for gap in own['gap'])} |" in rows(f"{size:,.0f}")
    assert result.verdicts["gap_slope"] == "underpowered"
    low, high = result.intervals["gap_slope"]
    assert f"shrink by {-result.metrics['gap_slope']:.2f} ({-high:.2f} to {-low:.2f}) nats" in PAGE.replace("\n", " ")
