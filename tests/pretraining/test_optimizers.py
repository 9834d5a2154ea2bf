from __future__ import annotations

import dataclasses
import re
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pretraining.adam_rows import AdamRows
from pretraining.config import OptimizerConfig
from pretraining.optimizers import (
    Muon,
    freeze_norms,
    make_optimizers,
    momentum,
    orthogonalize,
    schedule,
    set_rates,
)
from reflowlens.config import PRESETS
from reflowlens.models import build_model
from tests.support.tiny import CONFIGS, assert_close


def rates(steps: int, **fields: Any) -> list[float]:
    cfg = OptimizerConfig(warmup_steps=10, final_fraction=0.1, **fields)
    return [schedule(step, cfg, steps) for step in range(steps)]


@given(total=st.integers(20, 300), name=st.sampled_from(["constant", "cosine", "wsd"]))
def test_every_schedule_warms_up_and_never_rises_again(total: int, name: str) -> None:
    shares = rates(total, schedule=name)
    assert shares[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert all(one >= two for one, two in pairwise(shares[9:]))
    assert max(shares) == pytest.approx(1)
    assert min(shares[9:]) >= 0.1 - 1e-12


def test_schedules() -> None:
    assert set(rates(100, schedule="constant")[9:]) == {1.0}
    cosine = rates(110, schedule="cosine")
    assert cosine[60] == pytest.approx(0.1 + 0.9 * 0.5)  # half of the way down
    assert cosine[-1] == pytest.approx(0.1, abs=1e-3)
    wsd = rates(100, schedule="wsd", decay_fraction=0.2)
    assert set(wsd[9:81]) == {1.0}
    assert wsd[90] == pytest.approx(0.1 + 0.9 * 0.5)
    assert wsd[-1] == pytest.approx(0.1 + 0.9 / 20)
    falls = [one - two for one, two in pairwise(wsd[80:])]
    assert falls == pytest.approx([0.9 / 20] * 19)


def test_a_cosine_without_room_to_fall_ends_at_its_last_value() -> None:
    """As a run that is resumed with no more steps than its warm-up, but beyond them, asks for it."""
    cfg = OptimizerConfig(warmup_steps=10, final_fraction=0.1, schedule="cosine")
    assert schedule(9, cfg, 10) == 1.0
    assert schedule(10, cfg, 10) == pytest.approx(0.1)
    assert schedule(12, cfg, 5) == pytest.approx(0.1)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_what_decays(name: str) -> None:
    """The blocks' matrices and the basis; not norms, recipe, embedding or positions. Each is in one group."""
    for architecture in ("gpt2", "gpt2_biased", "reflow"):
        model = build_model(CONFIGS[architecture])
        optimizers = make_optimizers(model, OptimizerConfig(name=name))
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        names = {parameter: key for key, parameter in model.named_parameters()}
        listed = [names[parameter] for group in groups for parameter in group["params"]]
        assert sorted(listed) == sorted(names.values())
        decayed = {names[p] for group in groups if group["weight_decay"] > 0 for p in group["params"]}
        expected = {key for key in names.values() if re.fullmatch(r"blocks\.\d\.(attn|mlp)\.W_\w+", key)}
        assert decayed == expected | ({"embed.W_basis"} if architecture == "reflow" else set())


def test_tables_refiners_and_momentum_have_their_own() -> None:
    cfg = OptimizerConfig(name="muon", embedding_learning_rate=0.1, matrix_momentum=0.99, matrix_momentum_start=0.92,
                          matrix_momentum_steps=100)  # fmt: skip
    model = build_model(dataclasses.replace(PRESETS["ttt_flow_10l"], n_layers=4, d_mlp=32, n_ctx=32))
    adamw, muon = make_optimizers(model, cfg)
    names = {parameter: name for name, parameter in model.named_parameters()}
    rate = {names[p]: group["lr"] for group in adamw.param_groups for p in group["params"]}
    quick = {name for name, lr in rate.items() if lr == 0.1}
    assert quick == {name for name in names.values() if name.startswith(("embed.", "bigram.", "values."))}
    assert {name for name in rate if name.startswith(("ttt.", "flow."))} >= {"ttt.W_Q", "ttt.W_start", "flow.W_down"}
    assert {names[p] for group in muon.param_groups for p in group["params"]} == {
        name for name in names.values() if name.startswith("blocks.") and ".W_" in name
    }
    set_rates([adamw, muon], 0.5, momentum(50, cfg))
    assert muon.param_groups[0]["momentum"] == pytest.approx(0.955)
    assert [group["lr"] for group in adamw.param_groups] == [3e-4, 3e-4, 0.05]


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16), (3, 20, 12)])
def test_orthogonalize_keeps_singular_vectors_and_levels_singular_values(shape: tuple[int, ...]) -> None:
    """Against U Vᵀ of the singular value decomposition."""
    rank = min(shape[-2:])
    generator = torch.Generator().manual_seed(0)
    U, _, Vh = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    matrix = U * torch.logspace(-1, 1, rank) @ Vh
    result = orthogonalize(matrix)
    assert result.dtype == matrix.dtype
    core = U.mT @ result @ Vh.mT  # diagonal where singular vectors are kept
    diagonal = core.diagonal(dim1=-2, dim2=-1)
    assert diagonal.min() > 0.6
    assert diagonal.max() < 1.3
    assert (core - torch.diag_embed(diagonal)).abs().max() < 0.05
    assert (result - U @ core @ Vh).abs().max() < 0.05
    polar = U @ Vh
    assert (result * polar).sum() / (result.norm() * polar.norm()) > 0.95


@pytest.mark.parametrize(("scale", "factor"), [("narrowing", 2.0), ("widening", 1.0)])
def test_muon_takes_every_head_for_itself(scale: str, factor: float) -> None:
    """A step on [head, rows, columns] is that on each slice, of spectral norm lr * factor; here rows / columns is 4."""
    generator = torch.Generator().manual_seed(0)
    start, gradients = torch.randn(3, 20, 5, generator=generator), torch.randn(4, 3, 20, 5, generator=generator)

    def run(value: Tensor, grads: Tensor) -> Tensor:
        parameter = torch.nn.Parameter(value.clone())
        optimizer = Muon([parameter], lr=0.1, scale=scale, weight_decay=0.01)
        for grad in grads:
            parameter.grad = grad.clone()
            optimizer.step()
        return parameter.detach()

    together = run(start, gradients)
    for head in range(3):
        assert_close(run(start[head], gradients[:, head]), together[head], 1e-3)
    step = start - run(start, gradients[:1]) - start * 0.1 * 0.01
    norms = torch.linalg.matrix_norm(step, ord=2)
    assert (norms / (0.1 * factor) - 1).abs().max() < 0.3


def test_the_published_scale_is_that_of_torch() -> None:
    """torch's Muon takes matrices as outputs x inputs: the transposes of ours."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    generator = torch.Generator().manual_seed(0)
    for shape in ((12, 40), (40, 12)):
        start, gradient = torch.randn(2, *shape, generator=generator)
        ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.mT.clone())
        ours.grad, theirs.grad = gradient, gradient.mT.contiguous()
        Muon([ours], lr=0.1, scale="widening", weight_decay=0.01).step()
        torch.optim.Muon([theirs], lr=0.1, weight_decay=0.01, momentum=0.95).step()
        step, expected = ours.detach() - start, theirs.detach().mT - start
        # Both iterate in bfloat16, along the other side's Gram matrix: the directions agree roughly, the size well.
        assert (step - expected).norm() < 0.1 * expected.norm()
        assert (step * expected).sum() / expected.square().sum() == pytest.approx(1, abs=0.02)


def stepped(optimizer: torch.optim.Optimizer, parameter: Tensor, gradients: Tensor) -> Tensor:
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("axis", [-1, 0, None])
def test_adam_whose_scale_is_shared(axis: int | None) -> None:
    """Adam written out, with one second moment a row, a column, or for all; of a single coordinate it is torch's."""
    generator = torch.Generator().manual_seed(0)
    start, gradients = torch.randn(6, 4, generator=generator), torch.randn(5, 6, 4, generator=generator)
    parameter = torch.nn.Parameter(start.clone())
    ours = stepped(AdamRows([parameter], lr=0.1, weight_decay=0.2, shared_axis=axis), parameter, gradients)
    w, m, v = start.clone(), torch.zeros(6, 4), 0.0
    for t, g in enumerate(gradients, start=1):
        m = 0.9 * m + 0.1 * g
        v = 0.95 * v + 0.05 * (g**2).mean(dim=[0, 1] if axis is None else axis, keepdim=True)
        w = w - 0.1 * 0.2 * w - 0.1 * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)) ** 0.5 + 1e-8)
    assert_close(ours, w, 1e-5)
    one, same = (torch.nn.Parameter(start[:, :1].clone()) for _ in range(2))
    alone = stepped(AdamRows([one], lr=0.1, weight_decay=0.2, shared_axis=-1), one, gradients[..., :1])
    theirs = torch.optim.AdamW([same], lr=0.1, betas=(0.9, 0.95), weight_decay=0.2)
    assert_close(alone, stepped(theirs, same, gradients[..., :1]), 1e-5)


KINDS = {torch.optim.AdamW: "adamw", torch.optim.SGD: "sgd", AdamRows: "adam_rows", Muon: "muon"}


@pytest.mark.parametrize("rest", ["adamw", "sgd", "adam_rows", "muon"])
@pytest.mark.parametrize("architecture", ["reflow", "llama_untied", "gpt2_biased"])
def test_what_updates_the_rest(architecture: str, rest: str) -> None:
    model = build_model(CONFIGS[architecture])
    names = {parameter: name for name, parameter in model.named_parameters()}
    cfg = OptimizerConfig(name="muon", rest=rest, embedding_learning_rate=0.5, learning_rate=0.1)
    found = {
        names[p]: (KINDS[type(optimizer)], group)
        for optimizer in make_optimizers(model, cfg)
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert found.keys() == set(names.values())
    for name, (kind, group) in found.items():
        table = name in ("embed.W_E", "embed.W_recipe", "pos_embed.W_pos", "unembed.W_U")
        matrix = name.startswith("blocks.") and ".W_" in name
        vector = not (table or matrix or name == "embed.W_basis")
        assert kind == ("muon" if matrix else "adamw" if rest == "muon" and vector else rest), name
        assert group["weight_decay"] == (0.1 if matrix or (name == "embed.W_basis" and rest != "sgd") else 0), name
        assert group["lr"] == (0.5 if table else 0.01 if kind == "muon" else 0.1), name
        if kind == "adam_rows":  # a scale a token, or one for all
            assert group["shared_axis"] == ((0 if name == "unembed.W_U" else -1) if table else None), name
        if kind == "sgd":
            assert group["momentum"] == 0.9
    freeze_norms(model)
    learning = {
        p for optimizer in make_optimizers(model, cfg) for group in optimizer.param_groups for p in group["params"]
    }
    assert {name for p, name in names.items() if p not in learning} == {
        name for name in names.values() if re.search(r"ln(1|2|_final)\.[wb]$", name)
    }


def test_steps_orthogonalised_in_float32_differ_by_rounding() -> None:
    matrix = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    coarse, fine = orthogonalize(matrix), orthogonalize(matrix, torch.float32)
    wide = orthogonalize(matrix.double(), torch.float32)
    assert wide.dtype == torch.float64
    assert_close(fine.double(), wide, 1e-4)
    assert 1e-3 < (coarse - fine).abs().max() < 0.05
