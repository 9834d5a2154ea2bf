"""Weight edits: what they change, and that nothing of them stays."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import reflowlens as rl
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from tests.support.tiny import random_model


@pytest.fixture
def reflow() -> HookedModel:
    return random_model("reflow")


@pytest.mark.parametrize("stop", [None, KeyboardInterrupt, ValueError])
def test_weights_come_back_to_the_bit(reflow: HookedModel, stop: type[BaseException] | None) -> None:
    before = {name: parameter.detach().clone() for name, parameter in reflow.named_parameters()}
    edits = [
        rl.ScaleWeights("embed.W_recipe", 0.1, columns=[3, 5]),
        rl.SwapWeights("embed.W_recipe", rows=("a", "b")),
        rl.AddWeights("embed.W_basis", 0.3, rows=3),
        rl.SetWeights("embed.W_recipe", torch.arange(32.0), rows=("a", "c")),
        rl.SwapWeights("embed.W_recipe", columns=(3, 4)),
    ]
    if stop is None:
        with rl.edit(reflow, edits):
            changed = [n for n, p in reflow.named_parameters() if not torch.equal(p, before[n])]
            assert changed == ["embed.W_recipe", "embed.W_basis"]
    else:
        with pytest.raises(stop), rl.edit(reflow, edits):
            raise stop
    for name, parameter in reflow.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_each_kind(reflow: HookedModel) -> None:
    R, B = reflow.embed.W_recipe, reflow.embed.W_basis
    r, b = R.detach().clone(), B.detach().clone()
    king, queen = ord("a"), ord("b")
    with rl.edit(reflow, rl.SwapWeights("embed.W_recipe", rows=("a", "b"))):
        assert torch.equal(R[king], r[queen])
        assert torch.equal(R[queen], r[king])
        assert torch.equal(R[queen + 1 :], r[queen + 1 :])
    with rl.edit(reflow, rl.ScaleWeights("embed.W_recipe", 0.0, columns=7)):
        assert (R[:, 7] == 0).all()
        assert torch.equal(R[:, 8:], r[:, 8:])
    with rl.edit(reflow, rl.AddWeights("embed.W_recipe", 1.0, rows=[1, 2], columns=[3, 4, 5])):
        assert torch.equal((R - r).nonzero(), torch.tensor([[i, j] for i in (1, 2) for j in (3, 4, 5)]))
    with rl.edit(reflow, rl.SetWeights("embed.W_basis", torch.ones(32), rows=-1)):
        assert (B[31] == 1).all()
        assert torch.equal(B[:31], b[:31])
    with rl.edit(reflow, rl.ScaleWeights("ln_final.w", 2.0, rows=0)):
        assert torch.equal(reflow.ln_final.w.detach()[0], 2 * random_model("reflow").ln_final.w.detach()[0])


def test_silencing_a_signal_is_ablating_it_at_both_ends(reflow: HookedModel) -> None:
    text = "abcd"
    with rl.edit(reflow, rl.ScaleWeights("embed.W_recipe", 0.0, columns=7)):
        edited = reflow(text)
    ablated = rl.run(reflow, text, [rl.Ablate("hook_recipe", index=7), rl.Ablate("unembed.hook_signal", index=7)])
    torch.testing.assert_close(edited, ablated, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rl.SetWeights("embed.W_recip", 0.0), "did you mean 'embed.W_recipe'"),
        (rl.SetWeights("embed.W_recipe", 0.0, rows="ab"), "token"),
        (rl.SetWeights("embed.W_basis", 0.0, rows="a"), "rows of 'embed.W_basis' are not tokens"),
        (rl.SetWeights("embed.W_recipe", 0.0, columns=32), "column 32 of 'embed.W_recipe' is out of range: 0 to 31"),
        (rl.SetWeights("embed.W_recipe", 0.0, rows=[1, 1]), "must be different"),
        (rl.SetWeights("embed.W_recipe", torch.ones(5), rows=1), r"has shape \[5\], the selected part \[1, "),
        (rl.SetWeights("ln_final.w", 0.0, columns=1), "is a vector"),
        (rl.SetWeights("embed.W_basis", "zero", rows=0), "SetWeights.value must be numbers, got 'zero'"),  # type: ignore[arg-type]
        (rl.SetWeights("embed.W_basis", 0.0, rows=1.5), "chosen by index, a slice or indices, got 1.5"),  # type: ignore[arg-type]
    ],
)
def test_impossible_edits_change_nothing(reflow: HookedModel, change: Any, message: str) -> None:
    before = rl.model_hash(reflow)
    with (
        pytest.raises(ReflowlensError, match=message),
        rl.edit(reflow, [rl.ScaleWeights("embed.W_recipe", 2.0, columns=0), change]),
    ):
        pass
    assert rl.model_hash(reflow) == before


def test_a_swap_is_of_two_rows_or_columns() -> None:
    for chosen in ({}, {"rows": ("a", "b", "c")}, {"columns": (1,)}, {"rows": "ab"}):
        with pytest.raises(ReflowlensError, match="two rows or two columns"):
            rl.SwapWeights("embed.W_recipe", **chosen)  # type: ignore[arg-type]


def test_a_slice_chooses_its_rows(reflow: HookedModel) -> None:
    with rl.edit(reflow, rl.ScaleWeights("embed.W_basis", 0.0, rows=slice(1, 6, 2))):
        sliced = reflow("abcd")
    with rl.edit(reflow, rl.ScaleWeights("embed.W_basis", 0.0, rows=torch.tensor([1, 3, 5]))):
        assert torch.equal(sliced, reflow("abcd"))


def test_only_edits_of_weights_are_edits(reflow: HookedModel) -> None:
    for change in (rl.Ablate("z", layer=0), [rl.Ablate("z", layer=0)]):
        with pytest.raises(ReflowlensError, match="is no edit of weights"), rl.edit(reflow, change):  # type: ignore[arg-type]
            pass


def test_a_parameter_may_be_set_to_a_view_of_itself(reflow: HookedModel) -> None:
    before = reflow.embed.W_basis.detach().clone()
    with rl.edit(reflow, rl.SetWeights("embed.W_basis", reflow.embed.W_basis.detach().T)):
        assert torch.equal(reflow.embed.W_basis, before.T)
    assert torch.equal(reflow.embed.W_basis, before)


def test_a_copy_made_inside_intervene_does_not_answer_for_the_original(reflow: HookedModel) -> None:
    with rl.intervene(reflow, rl.Ablate("z", layer=0)):
        copied = copy.deepcopy(reflow)
        reflow("ab")
    with pytest.raises(ReflowlensError, match="copied inside"):
        copied("ab")
    reflow("ab")
