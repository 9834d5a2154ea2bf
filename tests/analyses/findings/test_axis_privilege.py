"""Whether axes are privileged: planted models, the same rotated, and tables with a known answer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from analyses.findings.axis_privilege import DECIDING, answer, axis_privilege, families, privilege
from analyses.measures.axis_privilege import PRIVILEGED, axis_measures, kurtosis_unprivileged
from analyses.measures.knockout import real_tokens
from reflowlens.checkpoints import save_model
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.rotations import rotate_signals
from reflowlens.signals import random_rotation, signal_view
from tests.support.planted import sparse_model


def planted(seed: int = 0) -> HookedModel:
    """Three signals a token, and B the identity."""
    return sparse_model(3, seed)


def rotated(model: HookedModel) -> HookedModel:
    return rotate_signals(model, random_rotation(model.cfg.n_signals or 0, seed=77))


@torch.no_grad()
def streams(model: HookedModel, n: int = 30) -> torch.Tensor:
    """Those that are about to say some token: its embedding."""
    view = signal_view(model)
    return view.write(view.recipe[:n])


def test_measures_are_what_they_say() -> None:
    """Written out for one token and one prompt at a time."""
    view = real_tokens(signal_view(planted()))
    x = streams(view.model, 3) + 0.1 * torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    found = axis_measures(view, x)
    recipe = view.recipe[5].detach().double().numpy()
    assert found["recipe_kurtosis"][5] == pytest.approx(32 * (recipe**4).sum() / (recipe**2).sum() ** 2)
    assert found["recipe_kurtosis"][5] == pytest.approx(32 / 3)
    readout = view.readout(x).detach()
    a = readout[1].double().numpy()
    assert found["readout_kurtosis"][1] == pytest.approx(32 * (a**4).sum() / (a**2).sum() ** 2, rel=1e-5)
    p = view.logits(readout)[1].softmax(-1)
    target = int(p.argmax())
    parts = np.sort((readout[1] * view.recipe[target]).detach().double().numpy())[::-1]
    assert found["ten_signal_share"][1] == pytest.approx(parts[:10].sum() / parts[parts > 0].sum(), rel=1e-5)
    left = []
    for signal in range(32):
        without = readout[1].clone()
        without[signal] = 0
        left.append(float(view.logits(without).softmax(-1)[target] / p[target]))
    assert found["remaining_after_one"][1] == pytest.approx(min(left), rel=1e-4)


def test_privileged_signals_and_the_same_rotated() -> None:
    model = planted()
    own = privilege(signal_view(model), streams(model)).set_index("measure")
    turned = rotated(model)
    gone = privilege(signal_view(turned), streams(turned)).set_index("measure")
    assert list(own.index) == list(PRIVILEGED)
    assert (own.low > 0).all()
    assert (own.p < 1e-3).all()
    assert own.gap["readout_kurtosis"] == pytest.approx(32 / 3 - kurtosis_unprivileged(32), abs=0.1)
    assert own.rotated["readout_kurtosis"] == pytest.approx(kurtosis_unprivileged(32), abs=0.1)
    assert own.gap["remaining_after_one"] == pytest.approx(
        own.rotated["remaining_after_one"] - own.native["remaining_after_one"]
    )
    assert (gone.gap.abs() < 0.1 * own.gap).all()
    assert (gone.p > 0.01).all()
    with pytest.raises(ReflowlensError, match="rotations must be at least 2"):
        privilege(signal_view(model), streams(model), rotations=1)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Signals are privileged in the arm `adamw` and rotated away in `equivariant`."""
    rows = []
    for arm in ("adamw", "equivariant"):
        model = planted(3)
        folder = tmp_path / f"seed_0_{arm}"
        save_model(folder / "step_0000001", model if arm == "adamw" else rotated(model))
        rows.append({"arm": arm, "seed": 0, "complete": True, "step": 1, "tokens": 8, "val_loss": 4.0, "seconds": 1.0})
    pd.DataFrame(rows).to_csv(tmp_path / "runs.csv", index=False)
    return tmp_path


def test_a_study_is_measured_and_one_seed_decides_nothing(study: Path) -> None:
    result = axis_privilege(study, experiments=False, progress=False)
    runs = result.frames["runs"].set_index("arm")
    for measure, smallest in DECIDING.items():
        assert runs.loc["adamw", f"signals_{measure}"] > smallest
        assert abs(runs.loc["equivariant", f"signals_{measure}"]) < smallest
        lost = result.metrics[f"lost_equivariant_{measure}"]
        assert lost == pytest.approx(np.subtract(*runs[f"signals_{measure}"]))
    assert set(result.verdicts.values()) == {"underpowered"}
    assert set(result.figures) == {"gaps"}


def table(**means: float) -> pd.DataFrame:
    """Three seeds of arms with the given gap in every measure, in smallest effects, give or take a few twentieths."""
    rows = [
        {"arm": arm, "seed": seed, "loss": 4.0}
        | {
            f"axes_{measure}": (mean + 0.05 * (seed - 1) * (1 + place)) * smallest
            for measure, smallest in DECIDING.items()
        }
        for seed in range(3)
        for place, (arm, mean) in enumerate(means.items())
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("means", "verdict"),
    [
        ({"adamw": 3.0, "equivariant": 0.0}, "supported"),
        ({"adamw": 3.0, "equivariant": 2.0}, "not supported"),
        ({"adamw": 0.2, "equivariant": 0.0}, "not supported"),
        ({"adamw": 3.0, "sgd": 0.0}, "underpowered"),  # not equivariant as a whole
        ({"adamw": 1.1, "equivariant": 0.9}, "underpowered"),
        ({"adamw": 0.2, "equivariant": 0.0, "gpt2_adamw": 3.0, "gpt2_equivariant": 0.0}, "supported"),
    ],
)
def test_the_rule(means: dict[str, float], verdict: str) -> None:
    result = answer(table(**means), {})
    assert result.verdicts["optimiser_decides"] == verdict
    assert result.controls["optimiser_decides"]["families"] == len([arm for arm in means if arm.endswith("adamw")])
    found = result.frames["contrasts"]
    assert (found.p_adjusted >= found.p).all()
    assert (found.p_adjusted[found.verdict == "supported"] < 0.05).all()


def test_families() -> None:
    runs = table(adamw=1, gpt2_adamw=1, sgd=1, adamw_tables=1, gpt2_sgd=1)
    found = families(runs)
    assert {name: family.arms for name, family in found.items()} == {
        "reflow": ["adamw", "sgd", "adamw_tables"],
        "gpt2": ["gpt2_adamw", "gpt2_sgd"],
    }
    assert {family.coordinates for family in found.values()} == {"axes"}
    with pytest.raises(ReflowlensError, match="the study has no arm 'adamw', 'stream', 'signals', which the others"):
        answer(table(sgd=1.0), {})


@pytest.mark.parametrize(
    ("made", "equivariant", "verdict"),
    [(3.0, 0.0, "supported"), (3.0, 3.0, "not supported"), (0.1, 0.0, "not supported")],
)
def test_axes_that_come_back_in_what_was_rotated(made: float, equivariant: float, verdict: str) -> None:
    """Gaps are read in the coordinates that were rotated: signals say nothing of runs whose stream was."""
    axes = table(as_it_was=3.0, stream=made, stream_equivariant=equivariant, signals=3.0, signals_equivariant=3.0)
    signals = table(as_it_was=3.0, stream=3.0, stream_equivariant=3.0, signals=made, signals_equivariant=equivariant)
    runs = axes.assign(**{f"signals_{measure}": signals[f"axes_{measure}"] for measure in DECIDING})
    result = answer(runs, {})
    assert result.verdicts["optimiser_decides"] == verdict
    assert result.notes == [f"{place}: {verdict}" for place in ("stream", "signals")]
    assert result.metrics["lost_stream_equivariant_readout_kurtosis"] == pytest.approx(
        (made - equivariant) * DECIDING["readout_kurtosis"]
    )


def test_an_arm_is_of_one_family_and_of_no_place_whose_name_it_only_begins_with() -> None:
    arms = ["adamw", "equivariant", "stream", "stream_equivariant", "streamlined"]
    found = families(pd.DataFrame({"arm": arms, "seed": 0}))
    assert {name: family.arms for name, family in found.items()} == {
        "reflow": ["adamw", "equivariant", "streamlined"],
        "stream": ["stream", "stream_equivariant"],
    }
