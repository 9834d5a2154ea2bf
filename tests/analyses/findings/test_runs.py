"""What is measured of a study's runs: by experiments and by measures of one's own, kept, and asked again."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from analyses.experiments.sparsity_profile import sparsity_profile
from analyses.findings.runs import TrainedRun, measured, measured_by, runs_table, trained_runs
from reflowlens.checkpoints import save_model
from reflowlens.cli import main
from reflowlens.config import ModelConfig
from reflowlens.errors import ReflowlensError
from reflowlens.models import build_model
from reflowlens.models.base import HookedModel

ARMS = {"own": "reflow", "plain": "gpt2_new"}


def small(architecture: str, seed: int) -> HookedModel:
    signals = {"n_signals": 8} if architecture == "reflow" else {}
    cfg = ModelConfig(
        architecture=architecture,
        n_layers=1,
        d_model=8,
        n_heads=1,
        d_head=8,
        d_mlp=8,
        d_vocab=256,
        n_ctx=16,
        tokenizer_name="bytes",
        **signals,
    )
    return build_model(cfg, seed=seed)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    rows = []
    for seed in range(2):
        for arm, architecture in ARMS.items():
            folder = tmp_path / f"seed_{seed}_{arm}"
            save_model(folder / "step_0000005", small(architecture, seed))
            rows.append(_row(arm, seed, folder, complete=True, architecture=architecture))
    rows.append(_row("late", 0, tmp_path / "seed_0_late", complete=False))
    pd.DataFrame(rows).to_csv(tmp_path / "runs.csv", index=False)
    return tmp_path


def _row(arm: str, seed: int, folder: Path, *, complete: bool, architecture: str = "") -> dict[str, object]:
    facts = {"arm": arm, "seed": seed, "complete": complete, "step": 5, "tokens": 80, "val_loss": 4.0 + seed}
    return {**facts, "seconds": 1.0, "model.architecture": architecture or None, "folder": str(folder)}


def norm(model: HookedModel, run: TrainedRun) -> dict[str, float]:
    return {"norm": sum(p.detach().square().sum().item() for p in model.parameters())}


def test_complete_runs_with_their_settings(study: Path) -> None:
    runs = trained_runs(study)
    assert [(run.arm, run.seed) for run in runs] == [("own", 0), ("plain", 0), ("own", 1), ("plain", 1)]
    assert runs[1].settings == {"model.architecture": "gpt2_new"}
    assert runs[2].val_loss == 5.0
    assert runs[0].load().cfg.architecture == "reflow"


def test_an_experiment_on_every_run_is_the_experiment(study: Path) -> None:
    table = measured(study, ["sparsity_profile"])
    expected = sparsity_profile(small("reflow", 1), quick=True)
    own = table[(table.arm == "own") & (table.seed == 1)].set_index("metric")
    assert own["value"].to_dict() == pytest.approx(dict(expected.metrics))
    assert own["control_rotated_basis"]["hoyer"] == pytest.approx(expected.controls["hoyer"]["rotated_basis"])
    assert own["verdict"]["hoyer"] == expected.verdicts["hoyer"]


def test_nothing_is_measured_twice_and_changed_weights_are(study: Path) -> None:
    calls: list[str] = []

    def counted(model: HookedModel, run: TrainedRun) -> dict[str, float]:
        calls.append(f"{run.arm}{run.seed}")
        return norm(model, run)

    first = measured_by(study, "norm", counted)
    assert calls == ["own0", "plain0", "own1", "plain1"]
    pd.testing.assert_frame_equal(measured_by(study, "norm", counted), first)
    assert len(calls) == 4
    save_model(study / "seed_0_own" / "step_0000005", small("reflow", 7))
    again = measured_by(study, "norm", counted)
    assert calls[4:] == ["own0"]
    assert again.norm[0] == pytest.approx(norm(small("reflow", 7), trained_runs(study)[0])["norm"])
    measured_by(study, "norm", counted, again=True)
    assert len(calls) == 9


def test_tables_alone_are_enough_for_what_was_measured(study: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    before = measured(study, [2])
    bare = tmp_path_factory.mktemp("bare")
    (bare / "measured").mkdir()
    for name in ("runs.csv", "measured/sparsity_profile_quick_0.csv"):
        (bare / name).write_bytes((study / name).read_bytes())
    pd.testing.assert_frame_equal(measured(bare, [2]), before)
    with pytest.raises(ReflowlensError, match="arm 'own', seed 0: the checkpoint is not there, and what is asked"):
        measured_by(bare, "norm", norm)


def test_an_arm_that_is_called_like_a_missing_value(tmp_path: Path) -> None:
    save_model(tmp_path / "seed_0_None" / "step_0000005", small("reflow", 0))
    pd.DataFrame([_row("None", 0, tmp_path, complete=True)]).to_csv(tmp_path / "runs.csv", index=False)
    for _ in range(2):  # measured, and kept
        assert measured_by(tmp_path, "norm", norm).arm.tolist() == ["None"]


def test_an_interrupted_measurement_goes_on(study: Path) -> None:
    def stopped(model: HookedModel, run: TrainedRun) -> dict[str, float]:
        if run.arm == "plain":
            raise KeyboardInterrupt
        return norm(model, run)

    with pytest.raises(KeyboardInterrupt):
        measured_by(study, "norm", stopped)
    kept = pd.read_csv(study / "measured" / "norm.csv")
    assert kept.arm.tolist() == ["own"]
    assert len(measured_by(study, "norm", norm)) == 4


def test_a_refusal_is_said_and_has_no_rows(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = measured(study, ["sparsity_profile", "emotion_surgery"])
    assert set(table.experiment) == {"sparsity_profile"}
    assert "emotion_surgery refuses arm 'own'" in capsys.readouterr().err
    measured(study, ["emotion_surgery"])
    assert "refuses" not in capsys.readouterr().err  # that too is kept


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is not a study's folder: runs.csv cannot be read"),
        ("arm,seed\na,0\n", "it lacks complete, tokens, val_loss"),
        ("", "is not a table of runs"),
    ],
)
def test_what_is_no_study(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "runs.csv").write_text(text)
    with pytest.raises(ReflowlensError, match=message):
        runs_table(tmp_path)


def test_a_study_that_has_not_begun(tmp_path: Path) -> None:
    pd.DataFrame([_row("own", 0, tmp_path, complete=False)]).to_csv(tmp_path / "runs.csv", index=False)
    with pytest.raises(ReflowlensError, match=r"no run of .* is complete"):
        trained_runs(tmp_path)


def test_unknown_questions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["findings", "sparcity"]) == 2
    assert "no question 'sparcity'" in capsys.readouterr().err


def test_a_run_without_a_value_keeps_its_row(study: Path) -> None:
    def unknown(model: HookedModel, run: TrainedRun) -> dict[str, float]:
        return {"share": float("nan") if run.arm == "plain" else 0.5}

    first = measured_by(study, "share", unknown)
    assert first.share.isna().tolist() == [False, True, False, True]
    pd.testing.assert_frame_equal(measured_by(study, "share", unknown), first)
