"""Studies: which runs, in which order, begun together, gone on with, and what the table says of them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from pretraining.config import list_configs, load_config
from pretraining.study import STUDIES, by_arm, load_study, main, table, train_study
from reflowlens.checkpoints import load_model
from reflowlens.errors import ReflowlensError
from reflowlens.models import build_model
from reflowlens.ttt_flow_config import TTTFlowConfig
from tests.support.runs import records

OWN = "ttt_heads = 2\nttt_chunk = 4\nrotary_channels = 8\nvalue_layers = 1\nexclusive_layers = 1\nflow_width = 4"


@pytest.fixture
def config(write: Callable[..., Path]) -> Path:
    path = write(model={"architecture": "ttt_flow", "n_signals": None}, run={"steps": 2})
    path.write_text(f"{path.read_text()}\n[model.ttt_flow]\n{OWN}\nflow_hidden = 6")
    return path


def study(folder: Path, text: str) -> Path:
    (folder / "study.toml").write_text(text)
    return folder / "study.toml"


def test_settings_reach_the_fields_of_ttt_flow(config: Path) -> None:
    cfg = load_config(config, ["model.ttt_flow.ttt=false", "model.ttt_flow.ttt_rate=0.5"]).model
    assert isinstance(cfg.ttt_flow, TTTFlowConfig)
    assert (cfg.ttt_flow.ttt, cfg.ttt_flow.flow, cfg.ttt_flow.ttt_rate, cfg.ttt_flow.ttt_heads) == (False, True, 0.5, 2)
    with pytest.raises(ReflowlensError, match=r"unknown field 'model.ttt_flow.tt'; did you mean 'model.ttt_flow.ttt'"):
        load_config(config, ["model.ttt_flow.tt=false"])
    with pytest.raises(ReflowlensError, match=r"ttt_flow.ttt must be True or False, got 1"):
        load_config(config, ["model.ttt_flow.ttt=1"])


def test_a_preset_keeps_what_a_setting_does_not_name(config: Path) -> None:
    text = config.read_text()
    head, data = text.index("[model]"), text.index("[data]")
    preset = '[model]\npreset = "ttt_flow_10l"\ntokenizer_name = "bytes"\n[model.ttt_flow]\nflow_width = 32\n'
    config.write_text(text[:head] + preset + text[data : text.index("[model.ttt_flow]")])
    own = load_config(config, ["model.ttt_flow.flow=false"]).model.ttt_flow
    assert own == TTTFlowConfig(flow_width=32, flow=False)


@pytest.mark.parametrize("name", [path.stem for path in sorted(STUDIES.glob("*.toml"))])
def test_shipped_studies_are_sound(name: str) -> None:
    runs = load_study(name, seeds=2)
    assert len({run.folder for run in runs}) == len(runs)
    arms = [run.arm for run in runs]
    assert arms[: len(arms) // 2] == arms[len(arms) // 2 :]
    assert [run.seed for run in runs] == [run.cfg.run.seed for run in runs] == sorted(run.seed for run in runs)


def test_runs_of_a_seed_begin_with_the_same_weights(config: Path) -> None:
    runs = load_study("refiners", config=config, seeds=2, out="study", settings=["run.steps=3"])
    assert [run.cfg.run.out for run in runs[3:5]] == [str(Path("study/seed_0_both")), str(Path("study/seed_1_none"))]
    assert {run.cfg.run.steps for run in runs} == {3}
    refiners = [(run.cfg.model.ttt_flow.ttt, run.cfg.model.ttt_flow.flow) for run in runs[:4] if run.cfg.model.ttt_flow]
    assert refiners == [(False, False), (True, False), (False, True), (True, True)]
    none, *others = (build_model(run.cfg.model, seed=run.seed).state_dict() for run in runs[:4])
    for other in others:
        assert all(torch.equal(other[name], weight) for name, weight in none.items())


def test_arms_and_a_grid(write: Callable[..., Path], tmp_path: Path) -> None:
    base = write()
    path = study(
        tmp_path,
        f"config = {str(base)!r}\nseeds = 2\n[arms.a]\n[arms.b]\n'run.batch_size' = 4\n"
        "[grid]\n'optimizer.weight_decay' = [0.0, 0.1]\n[set]\n'run.steps' = 3\n",
    )
    runs = load_study(path, out=tmp_path / "out")
    decays = ("0.0", "0.1")
    assert [run.arm for run in runs[:4]] == [f"{arm}-weight_decay_{decay}" for arm in "ab" for decay in decays]
    assert [(run.cfg.run.batch_size, run.cfg.optimizer.weight_decay) for run in runs[2:4]] == [(4, 0.0), (4, 0.1)]
    assert {run.cfg.run.steps for run in runs} == {3}
    assert runs[3].settings == {"run.batch_size": 4, "optimizer.weight_decay": 0.1}


def test_a_study_goes_on_where_it_stopped(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = load_study("refiners", config=config, seeds=1, out=tmp_path / "study")
    asked = ["refiners", "--config", str(config), "--seeds", "1", "--out", str(tmp_path / "study")]
    first = train_study(runs[:2])
    assert first.complete.all()
    begun = {path: path.stat().st_mtime_ns for path in (tmp_path / "study").glob("*/step_*/model.safetensors")}
    main([*asked, "--list"])
    assert [line.split()[2] for line in capsys.readouterr().out.splitlines()[1:5]] == ["True", "True", "False", "False"]
    main(asked)
    assert len(begun) == 2
    assert all(path.stat().st_mtime_ns == written for path, written in begun.items())
    for run in runs:
        assert len(records(run.folder)) == 2
        model: Any = load_model(run.folder / "step_0000002")
        assert {"none": (False, False), "ttt": (True, False), "flow": (False, True), "both": (True, True)}[run.arm] == (
            model.ttt is not None,
            model.flow is not None,
        )
    written = pd.read_csv(tmp_path / "study/runs.csv")
    pd.testing.assert_frame_equal(written, table(runs), check_dtype=False)
    assert written.tokens.tolist() == [2 * runs[0].cfg.tokens_per_step] * 4
    assert by_arm(written)["mean"].tolist() == pytest.approx(written.val_loss.tolist())
    other = [dataclasses.replace(runs[0], cfg=dataclasses.replace(runs[0].cfg, run=_other(runs[0].cfg.run)))]
    with pytest.raises(ReflowlensError, match=r"run\.batch_size"):
        train_study(other)

    def stopped(cfg: Any, **_: Any) -> Path:
        return Path(cfg.run.out) / "step_0000001"

    monkeypatch.setattr("pretraining.study.train", stopped)
    with pytest.raises(KeyboardInterrupt):
        train_study(runs)


def lines_of(table: Path) -> dict[tuple[str, str], str]:
    """The rows of a table as they are written, by arm and seed."""
    rows = table.read_text(encoding="utf8").splitlines()[1:]
    return {(row.split(",")[0], row.split(",")[1]): row for row in rows}


def test_a_part_of_a_study_keeps_the_rows_of_the_rest(
    write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = f"config = {str(write(run={'steps': 1}))!r}\nseeds = 2\n[arms.a]\n[arms.b]\n'optimizer.weight_decay' = 0.3\n"
    out = tmp_path / "out"
    asked = [str(study(tmp_path, text)), "--out", str(out)]
    main([*asked, "--arm", "b", "--seed", "0"])
    first = lines_of(out / "runs.csv")
    assert list(first) == [("b", "0")]
    main([*asked, "--arm", "a", "--arm", "b", "--seed", "1"])
    main([*asked, "--arm", "a", "--seed", "3", "--seed", "0"])
    found = pd.read_csv(out / "runs.csv")
    assert sorted(path.name for path in out.glob("seed_*")) == [
        "seed_0_a",
        "seed_0_b",
        "seed_1_a",
        "seed_1_b",
        "seed_3_a",
    ]
    assert list(zip(found.arm, found.seed, strict=True)) == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 3)]
    assert lines_of(out / "runs.csv")[("b", "0")] == first[("b", "0")]
    assert found.complete.all()
    assert found.val_loss.notna().all()
    assert found["optimizer.weight_decay"].fillna(0).tolist() == [0, 0.3, 0, 0.3, 0]
    capsys.readouterr()
    main([*asked, "--arm", "a", "--seed", "3", "--list"])
    assert [line.split()[:4] for line in capsys.readouterr().out.splitlines()[1:2]] == [["a", "3", "True", "1"]]
    before = lines_of(out / "runs.csv")
    main(asked)  # the whole study, seeds 0 and 1: the run of seed 3 stays
    assert lines_of(out / "runs.csv") == before


def test_a_file_that_is_no_table_of_runs_is_not_replaced(config: Path, tmp_path: Path) -> None:
    (tmp_path / "runs.csv").write_text("my own notes\n1\n")
    with pytest.raises(ReflowlensError, match=r"runs\.csv is no table of runs, and would be lost"):
        train_study(load_study("refiners", config=config, seeds=[0], out=tmp_path))
    assert (tmp_path / "runs.csv").read_text() == "my own notes\n1\n"
    assert not any(tmp_path.glob("seed_*"))


def test_a_run_that_cannot_begin_leaves_no_folder(write: Callable[..., Path], tmp_path: Path) -> None:
    """Nor those above its own, which were made for it; a folder that was there stays."""
    (tmp_path / "old").mkdir()
    path = study(tmp_path, f"config = {str(write(data={'folder': str(tmp_path / 'none')}))!r}\n[arms.a]\n")
    for out in (tmp_path / "new" / "deep", tmp_path / "old"):
        with pytest.raises(ReflowlensError, match=r"no prepared data in .* reflowlens prepare makes it of text"):
            train_study(load_study(path, out=out))
    assert sorted(each.name for each in tmp_path.iterdir() if each.is_dir()) == ["old"]
    assert not any((tmp_path / "old").iterdir())


def test_the_arms_and_seeds_of_a_part(capsys: pytest.CaptureFixture[str]) -> None:
    runs = load_study("refiners", arms=["both", "ttt"], seeds=(4, 2, 4))
    assert [(run.arm, run.seed) for run in runs] == [("ttt", 2), ("both", 2), ("ttt", 4), ("both", 4)]
    message = "refiners.toml has no arm 'tt'; it has none, ttt, flow, both; did you mean 'ttt'?"
    with pytest.raises(ReflowlensError, match=re.escape(message)):
        load_study("refiners", arms=["both", "tt"])
    for seeds, told in (([-1], "a seed must be an integer and at least 0, got -1"), ([], "seeds must be an integer")):
        with pytest.raises(ReflowlensError, match=told):
            load_study("refiners", seeds=seeds)
    with pytest.raises(SystemExit):
        main(["refiners", "--seed", "1", "--seeds", "2", "--list"])
    assert "not allowed with" in capsys.readouterr().err


def _other(run: Any) -> Any:
    return dataclasses.replace(run, batch_size=4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("config = 'reflow_nano'", r"a study has \[arms.NAME\] or a \[grid\]"),
        ("[arms.a]", "config must name a configuration, got None"),
        ("config = 'reflow_nano'\n[arm.a]", "unknown field 'arm'; did you mean 'arms'"),
        ("config = 'reflow_nano'\nseeds = 0\n[arms.a]", "seeds must be an integer and at least 1, got 0"),
        ("config = 'reflow_nano'\n[arms.'a/b']", "with a plain word for a name"),
        ("config = 'reflow_nano'\n[grid]\n'run.steps' = 3", "grid.run.steps must be a list of values, got 3"),
        ("config = 'reflow_nano'\n[arms.a]\n'run.step' = 3", "arm 'a': --set run.step=3: unknown field 'run.step'"),
        ("config = 'reflow_nano'\n[grid]\n'run.steps' = [3, 3]", "two arms are called 'steps_3'"),
        ("config = ", "is not valid TOML"),
    ],
)
def test_studies_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ReflowlensError, match=message):
        load_study(study(tmp_path, text))


def test_names_of_studies() -> None:
    with pytest.raises(ReflowlensError, match="no study 'refiner'; did you mean 'refiners'"):
        load_study("refiner")
    assert not {path.stem for path in STUDIES.glob("*.toml")} & set(list_configs())
