from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pretraining.config import OptimizerConfig, TrainConfig, load_config
from pretraining.estimate import estimate
from pretraining.optimizers import make_optimizers
from pretraining.replicas import optimizer_state
from reflowlens.cli import main
from reflowlens.config import ModelConfig
from reflowlens.errors import ReflowlensError
from reflowlens.flops import training_flops_per_token
from reflowlens.models import MODEL_CLASSES, build_model
from reflowlens.ttt_flow_config import TTTFlowConfig

SIZES: dict[str, Any] = {
    "n_layers": 3,
    "d_model": 32,
    "n_heads": 2,
    "d_head": 24,
    "d_mlp": 72,
    "n_ctx": 64,
    "tokenizer_name": "bytes",
}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt2_new": {},
    "reflow": {"n_signals": 40},
    "reflow_topk": {"n_signals": 40, "topk": 4},
    "reflow_topk, input": {"n_signals": 40, "topk": 4, "topk_ends": "input"},
    "reflow_topk, output": {"n_signals": 40, "topk": 4, "topk_ends": "output", "topk_gradient": "straight_through"},
    "reflow_lite": {"n_signals": 40, "n_key_value_heads": 1},
}


def kept_for_backward(cfg: ModelConfig, rows: int, context: int, dtype: str) -> int:
    """Bytes of the distinct storages that autograd saves in a forward pass, parameters and tables of angles apart."""
    model = build_model(cfg).train()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(0, 256, (rows, context + 1))
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"),
    ):
        model(ids[:, :-1], "loss", targets=ids[:, 1:])
    return sum(tensor.untyped_storage().nbytes() for pointer, tensor in saved.items() if pointer not in own)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("d_vocab", [256, 1024])  # the readout of a short pass is factored, that of a long one formed
def test_activations_are_those_that_autograd_keeps(architecture: str, d_vocab: int, dtype: str) -> None:
    cfg = ModelConfig(architecture=architecture.split(",")[0], d_vocab=d_vocab, **SIZES, **MODELS[architecture])
    rows, context = 6, 64
    width = 4 if dtype == "float32" else 2
    copies = 0
    if dtype == "bfloat16":  # counted with the weights; a whole embedding's copy lives in the loss alone
        names = [n for n, _ in build_model(cfg, device="meta").named_parameters() if n.rsplit(".", 1)[-1][:2] == "W_"]
        sizes = {name: p.numel() for name, p in build_model(cfg, device="meta").named_parameters()}
        copies = sum(2 * sizes[name] for name in names if name not in ("embed.W_E", "pos_embed.W_pos"))
    measured = kept_for_backward(cfg, rows, context, dtype)
    assert sum(MODEL_CLASSES[cfg.architecture].activation_bytes(cfg, rows * context, width)) + copies == pytest.approx(
        measured, rel=0.01
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("changes", "own"),
    [
        ({}, {}),
        ({"n_layers": 6}, {}),
        ({"d_model": 128, "d_mlp": 384}, {"ttt_chunk": 16}),
        ({}, {"ttt": False, "flow": False}),
    ],
)
def test_activations_of_a_model_with_refiners_are_known_to_a_tenth(changes, own, dtype: str) -> None:
    sizes = {"n_layers": 4, "d_model": 64, "n_heads": 4, "d_head": 16, "d_mlp": 192, "d_vocab": 256, "n_ctx": 64}
    parts = {"ttt_heads": 4, "ttt_chunk": 8, "flow_width": 16, "flow_hidden": 64, "bigram_width": 16, "value_width": 16}
    cfg = ModelConfig(
        architecture="ttt_flow",
        tokenizer_name="bytes",
        ttt_flow=TTTFlowConfig(**{**parts, "value_layers": 1, "exclusive_layers": 2, **own}),
        **{**sizes, **changes},
    )
    measured, width = kept_for_backward(cfg, 6, 64, dtype), 4 if dtype == "float32" else 2
    copies = 0
    if dtype == "bfloat16":
        copies = sum(2 * p.numel() for name, p in build_model(cfg, device="meta").named_parameters() if "W_" in name)
    estimated = sum(MODEL_CLASSES["ttt_flow"].activation_bytes(cfg, 6 * 64, width))
    assert estimated + copies == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dropout_keeps_what_it_multiplies_by(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attend, width = F.scaled_dot_product_attention, 4 if dtype == "float32" else 2
    # GPUs have kernels that drop entries of the pattern and keep no scores; the CPU's are such only without dropout.
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *x, dropout_p, **kwargs: attend(*x, **kwargs))
    plain = ModelConfig(architecture="gpt2_new", d_vocab=256, **SIZES)
    dropping = dataclasses.replace(plain, dropout=0.1)
    kept, estimated = (
        [measure(cfg) for cfg in (plain, dropping)]
        for measure in (
            lambda cfg: kept_for_backward(cfg, 6, 64, dtype),
            lambda cfg: sum(MODEL_CLASSES[cfg.architecture].activation_bytes(cfg, 6 * 64, width)),
        )
    )
    assert estimated[1] - estimated[0] == kept[1] - kept[0] > 0


def tiny(sharding: str = "none", **changes: Any) -> TrainConfig:
    settings = [f"run.sharding={sharding}", *(f"{key.replace('__', '.')}={value}" for key, value in changes.items())]
    return load_config("reflow_nano", settings)


@pytest.mark.parametrize(
    ("name", "average", "rest"),
    [
        ("adamw", 0.0, "adamw"),
        ("muon", 0.0, "adamw"),
        ("muon", 0.99, "adamw"),
        ("adamw", 0.0, "sgd"),
        ("muon", 0, "muon"),
    ],
)
def test_optimiser_state_is_what_the_optimisers_hold(name: str, average: float, rest: str) -> None:
    cfg = tiny(optimizer__name=name, optimizer__average=average, optimizer__rest=rest, model__n_layers=1)
    model = build_model(cfg.model)
    optimizers = make_optimizers(model, OptimizerConfig(name=name, average=average, rest=rest))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    held = sum(value.nbytes for key, value in optimizer_state(model, optimizers).items() if not key.endswith("/step"))
    assert estimate(cfg).memory.optimizer_state == held


def test_memory_by_sharding() -> None:
    none, zero1, fsdp = (estimate(tiny(sharding, run__batch_size=32), gpus=4) for sharding in ("none", "zero1", "fsdp"))
    one = estimate(tiny("fsdp"), gpus=1)  # alone, a GPU holds everything
    assert one.memory.weights == none.memory.weights == zero1.memory.weights > fsdp.memory.weights
    assert none.memory.gradients == zero1.memory.gradients == 4 * none.parameters > fsdp.memory.gradients
    assert fsdp.memory.optimizer_state == none.memory.optimizer_state / 4
    recipe = 8 * 16768 * 256  # one parameter is nearly half of this model, and has one owner
    assert zero1.memory.optimizer_state == recipe
    assert one.memory.activations == pytest.approx(4 * none.memory.activations)
    summed = estimate(tiny("fsdp", run__accumulation=2), gpus=4)
    assert summed.memory.gradients == 4 * summed.parameters


def test_a_published_run() -> None:
    found = estimate(load_config("reflow_1_big"), gpus=4, flops="A100", mfu=0.5)
    assert found.parameters == 515_056_640
    assert found.parameters_outside_embedding == 515_056_640 - 50304 * 1024 - 1024 * 1024
    assert found.tokens == 50_000 * 176 * 1024
    assert found.flops == found.tokens * training_flops_per_token(found.cfg.model, 1024, batch=4)
    assert found.seconds == pytest.approx(found.flops / (4 * 312e12 * 0.5))
    at_rate = estimate(load_config("reflow_1_big"), gpus=4, rate=1e5)
    assert at_rate.seconds == found.tokens / 1e5
    assert estimate(load_config("gpt2")).parameters_outside_embedding == 505_619_456 - (50304 + 1024) * 1024


def test_the_command_prints_it_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "reflow_1_small", "--dry-run", "--set", "run.steps=100", "--rate", "1e6"]) == 0
    text = capsys.readouterr().out
    lines = {line[:24].strip(): line[24:46].strip() for line in text.splitlines()[1:]}
    assert lines["parameters"] == "46,471,680"
    assert lines["tokens in all"] == "18,022,400"
    assert lines["time"] == "0:00:18"
    parts = [float(lines[name].split()[0]) for name in
             ("weights", "gradients", "optimizer state", "activations", "readout")]  # fmt: skip
    assert float(lines["memory per GPU"].split()[0]) == pytest.approx(sum(parts), abs=0.03)
    assert list(tmp_path.iterdir()) == []


def test_an_annealed_k_is_told_and_takes_the_memory_of_its_first_steps() -> None:
    settings = ["model.architecture=reflow_topk", "model.topk=20", "run.steps=4000"]
    usual, annealed, all_kept = (
        estimate(load_config("reflow_micro", [*settings, setting]))
        for setting in ("run.seed=0", "run.topk_anneal_fraction=0.5", "model.topk=128")
    )
    lines = [line for line in str(annealed).splitlines() if line.startswith("signals a token keeps")]
    assert [line[24:].split(maxsplit=3) for line in lines] == [
        ["128", "at", "first", "64 from step 667, 32 from step 1,334, 20 from step 2,000; evaluated and saved: 20"]
    ]
    assert "signals a token" not in str(usual)
    assert annealed.memory == all_kept.memory != usual.memory


@pytest.mark.parametrize(
    ("topk", "told"), [(32, "64 from step 40; evaluated and saved: 32"), (64, "evaluated and saved: 64")]
)
def test_a_k_that_falls_until_the_end_is_saved_as_the_model_says(topk: int, told: str) -> None:
    settings = ["model.architecture=reflow_topk", f"model.topk={topk}", "run.steps=80", "run.topk_anneal_fraction=1.0"]
    (line,) = (
        line for line in str(estimate(load_config("reflow_micro", settings))).splitlines() if "a token keeps" in line
    )
    assert line[24:].split(maxsplit=3) == ["128", "at", "first", told]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpus": 0}, "gpus must be positive, got 0"),
        ({"gpus": 3}, "run.batch_size / run.accumulation = 16 examples do not divide among 3 processes"),
        ({"flops": "fast"}, "--flops fast is neither a number of operations a second"),
        ({"flops": "T4"}, "nor a GPU whose peak in bfloat16 is known"),
        ({"flops": 1e12, "mfu": 40.0}, "--mfu must be between 0 and 1, got 40.0"),
        ({"mfu": 0.4}, "--mfu is a share of --flops"),
        ({"rate": 1.0, "flops": 1e12}, "give --rate, or --flops and --mfu, not both"),
        ({"rate": 0.0}, "--rate must be positive"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ReflowlensError, match=re.escape(message)):
        estimate(load_config("reflow_1_big"), **options)


def test_plans_are_for_dry_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "reflow_1_small", "--gpus", "2"]) == 2
    assert capsys.readouterr().err == "error: --gpus is for --dry-run, which prints what a run would cost\n"
