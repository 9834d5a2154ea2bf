"""An architecture declares itself: two that stand in this file alone are swept, counted, split and estimated."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformer_lens.hook_points import HookPoint

import reflowlens as rl
from analyses.experiments.signal_flow.contributions import component_outputs
from analyses.units.counts import write_norms
from analyses.units.firing import unit_statistics
from analyses.units.points import default_points
from pretraining.config import OptimizerConfig
from pretraining.optimizers import make_optimizers
from reflowlens.ablations.upstream import ablate_upstream
from reflowlens.circuits.graph import Graph
from reflowlens.config import ModelConfig, architectures
from reflowlens.errors import ReflowlensError
from reflowlens.flops import forward_flops_per_token
from reflowlens.models import MODEL_CLASSES
from reflowlens.models.base import HookedModel
from reflowlens.models.components import MLP, Block
from reflowlens.models.decoder import Decoder
from reflowlens.models.parts import Norm
from reflowlens.models.places import Places
from reflowlens.models.residual import ResidualModel
from reflowlens.sweeps.injections import Injections, steer
from reflowlens.sweeps.reading import Reader
from reflowlens.sweeps.runs import PackedRuns
from reflowlens.sweeps.setup import prepare_sweep
from tests.reflowlens.sweeps.test_sweep import whole
from tests.support.dictionaries import dictionary_of
from tests.support.tiny import assert_close, random_model, random_tokens


class Mean(nn.Module):
    """What the positions so far hold, in the mean, mapped by a matrix."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.W_O = nn.Parameter(torch.empty(cfg.d_model, cfg.d_model))

    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(dim=1) / torch.arange(1, x.shape[1] + 1)[:, None] @ self.W_O


class MixingBlock(nn.Module):
    """A mean over earlier positions, then an MLP, each added to the stream."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.ln1, self.mean, self.ln2, self.mlp = Norm(cfg), Mean(cfg), Norm(cfg), MLP(cfg)
        for name in ("resid_pre", "mean_out", "mlp_out", "resid_post"):
            self.add_module(f"hook_{name}", HookPoint())

    def forward(self, resid: Tensor, places: Places, past: Any = None) -> Tensor:
        resid = self.hook_resid_pre(resid)
        resid = resid + self.hook_mean_out(self.mean(self.ln1(resid)))
        return self.hook_resid_post(resid + self.hook_mlp_out(self.mlp(self.ln2(resid))))


class Mixer(ResidualModel):
    """Neither attention nor heads, and of its pass no more is declared than that block follows block."""

    sublayers = ("mean", "mlp")
    units: ClassVar[Mapping[str, str | None]] = {"mlp.hook_post": "blocks.{layer}.mlp.W_out"}

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__(cfg)
        self.build_embedding(cfg)
        self.hook_embed = HookPoint()
        self.blocks = nn.ModuleList([MixingBlock(cfg) for _ in range(cfg.n_layers)])
        self.ln_final = Norm(cfg)
        self.setup()

    def init_weights(self, generator: torch.Generator) -> None:
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=self.cfg.initializer_range, generator=generator)

    @classmethod
    def forward_flops(cls, cfg: ModelConfig, context: int, batch: int) -> dict[str, float]:
        blocks = {"mean": 2.0 * cfg.d_model**2, "mlp": 4.0 * cfg.d_model * cfg.d_mlp}
        return {name: cfg.n_layers * n for name, n in blocks.items()} | super().forward_flops(cfg, context, batch)


class ScaledBlock(Block):
    """Its MLP has no gate, whatever the configuration says."""

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__(cfg, layer)
        self.mlp = MLP(cfg)


class Scaled(Decoder):
    """A decoder whose embedding is multiplied, and with blocks of its own: what it declares is inherited."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__(cfg)
        self.blocks = nn.ModuleList([ScaledBlock(cfg, layer) for layer in range(cfg.n_layers)])
        self.setup()

    def embed_tokens(self, tokens: Tensor, weights: tuple[Tensor, ...], positions: Any) -> Tensor:
        return 3 * super().embed_tokens(tokens, weights, positions)


METRIC = rl.metrics.logit_diff(65, 66)


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that it takes outside its own file: a line of the classes, and one of the configuration's defaults."""
    for name, kind, like in (("mixer", Mixer, "gpt2"), ("scaled", Scaled, "gpt2_new")):
        monkeypatch.setitem(MODEL_CLASSES, name, kind)
        monkeypatch.setitem(architectures.DEFAULTS, name, architectures.DEFAULTS[like])


def toy(name: str) -> HookedModel:
    sizes = {"n_layers": 3, "d_model": 16, "n_heads": 2, "d_head": 8, "d_mlp": 24, "d_vocab": 256, "n_ctx": 24}
    return random_model(ModelConfig(architecture=name, tokenizer_name="bytes", **sizes))


@pytest.fixture(params=["mixer", "scaled"])
def model(request: pytest.FixtureRequest) -> HookedModel:
    return toy(request.param)


def test_it_is_built_saved_and_opened(model: HookedModel, tmp_path: Path) -> None:
    tokens = random_tokens(model.cfg)
    assert torch.equal(rl.load_model(rl.save_model(tmp_path / "toy", model))(tokens), model(tokens))


@pytest.mark.parametrize("grid", ["resid_pre", "resid_post", "mlp_out"])
def test_a_sweep_is_whole_passes(model: HookedModel, grid: str) -> None:
    """Blocks before the patch are not run, whatever a block is."""
    clean, corrupted = random_tokens(model.cfg, batch=4, pos=6).unflatten(0, (2, 2))
    expected = whole(model, clean, corrupted, grid, METRIC)
    assert_close(rl.sweep(model, clean, corrupted, grid, METRIC).values.flatten(0, -2), expected)
    assert float(expected.std()) > 0.01


@pytest.mark.parametrize("error", [True, False])
@pytest.mark.parametrize("kind", ["sae", "plt"])
def test_a_sweep_of_features_is_whole_passes(model: HookedModel, kind: Any, error: bool) -> None:
    clean, corrupted = random_tokens(model.cfg, batch=4, pos=6).unflatten(0, (2, 2))
    with dictionary_of(model, kind, "relu", n_features=8).spliced(model, error=error):
        expected = whole(model, clean, corrupted, "features", METRIC)
        assert_close(rl.sweep(model, clean, corrupted, "features", METRIC).values.flatten(0, -2), expected)
    assert float(expected.std()) > 1e-3


def test_several_interventions_meet_in_whole_rows() -> None:
    """The second fires within a block of which no more is known than that it is one."""
    model = toy("mixer")
    clean, corrupted = random_tokens(model.cfg, batch=4, pos=6).unflatten(0, (2, 2))
    cells = [
        [rl.Patch("resid_pre", layer=0, position=2), rl.Scale("mlp.hook_post", 0.5, layer=2, index=3, position=4)],
        [rl.Ablate("blocks.1.hook_mean_out", position=3), rl.Ablate("resid_pre", layer=2, index=[0, 5])],
        [rl.Patch("hook_embed", position=1)],
    ]
    setup = prepare_sweep(model, clean, corrupted, cells)
    runs = PackedRuns(setup.cells.cells, Reader(model, METRIC, setup.prompts))
    assert [plan is not None for plan in runs.plans] == [True, True, False]
    assert_close(rl.sweep(model, clean, corrupted, cells, METRIC).values, whole(model, clean, corrupted, cells, METRIC))


@torch.no_grad()
def test_signals_are_removed_and_directions_added_on_the_way(model: HookedModel) -> None:
    prompts, view = ["To be or", "not to"], rl.signal_view(model, "svd")
    removed = ablate_upstream(model, prompts, METRIC, 1, signals=[0, 3], view=view)
    direction = torch.nn.functional.normalize(view.basis, dim=-1)[3]

    def without(stream: Tensor, hook: Any) -> Tensor:
        return stream - (stream @ direction)[..., None] * direction

    for i, prompt in enumerate(prompts):
        logits = model.run_with_hooks(prompt, fwd_hooks=[("blocks.1.hook_resid_pre", without)])
        assert_close(removed.values[1, i], logits[0, -1, 65] - logits[0, -1, 66])
    added = Injections(model, prompts).final(1, torch.tensor([1, 0]), direction.expand(2, -1))
    for row, prompt in zip(added, reversed(prompts), strict=True):
        with rl.intervene(model, steer(model, 1, direction, 1.0, position="last")):
            _, cache = model.run_with_cache(prompt)
        assert_close(row, cache["resid_post", 2][0, -1])


def test_units_are_those_that_it_declares(model: HookedModel) -> None:
    points = [f"blocks.{layer}.mlp.hook_post" for layer in range(3)]
    assert default_points(model) == points
    assert_close(write_norms(model, points[1]), model.blocks[1].mlp.W_out.norm(dim=1))
    assert write_norms(model, "blocks.1.hook_resid_pre") is None
    result = unit_statistics(model, "To be, or not to be: that is the question. " * 9, context=24, quick=True)
    assert list(result.frames["levels"].query("model == 'model'")["kind"]) == ["mlp_post"] * 3
    assert "alike" not in result.frames, "each block has weights of its own"


def test_operations_are_those_that_are_executed() -> None:
    model = toy("mixer")
    with FlopCounterMode(display=False) as counter:
        model(random_tokens(model.cfg, batch=2, pos=7))
    assert counter.get_total_flops() == 14 * forward_flops_per_token(model.cfg, 7, batch=2)


def test_matrices_between_the_ends_are_those_of_blocks(model: HookedModel) -> None:
    _, muon = make_optimizers(model, OptimizerConfig(name="muon"))
    expected = {id(p) for name, p in model.named_parameters() if name.startswith("blocks.") and ".W_" in name}
    assert {id(p) for group in muon.param_groups for p in group["params"]} == expected


@torch.no_grad()
def test_a_decoder_of_its_own_blocks_is_split_and_has_edges() -> None:
    """What is written sums to the last stream, and every edge from the clean run makes up the clean run."""
    model = toy("scaled")
    clean, corrupted = random_tokens(model.cfg, batch=2, pos=6).split(1)
    parts = component_outputs(model, clean)
    _, cache = model.run_with_cache(clean)
    assert_close(parts.embedding + parts.attention.sum(0) + parts.mlp.sum(0), cache["resid_post", 2][:, -1])
    assert_close(parts.heads.sum(dim=1), parts.attention)
    senders, edges = Graph.of(model).senders, Graph.of(model).edges
    assert len(senders) == 1 + 3 * (2 + 1)
    assert rl.faithfulness(model, clean, corrupted, edges, METRIC, controls=0).value == pytest.approx(1)
    assert rl.faithfulness(model, clean, corrupted, edges[:9], METRIC, controls=0).value != pytest.approx(1, abs=0.01)


def test_what_it_does_not_declare_is_said_not_guessed() -> None:
    model = toy("mixer")
    with pytest.raises(ReflowlensError, match="a Mixer has no graph"):
        Graph.of(model)
    with pytest.raises(ReflowlensError, match="'mixer' is not a sum of what heads and MLPs write"):
        component_outputs(model, "To be")
