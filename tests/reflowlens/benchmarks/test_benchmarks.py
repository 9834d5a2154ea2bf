"""Benchmarks compare like with like: every variant computes the same loss, and ratios are what they say."""

from __future__ import annotations

import dataclasses
import json
import math
from functools import partial

import pandas as pd
import pytest
import torch

from reflowlens.benchmarks import (
    BENCHMARKS,
    TrainBench,
    bench_collection,
    bench_generate,
    bench_hooks,
    bench_score,
    bench_sweep,
    bench_train,
    machine,
)
from reflowlens.benchmarks import sweep as sweep_module
from reflowlens.benchmarks import train as train_module
from reflowlens.benchmarks.load import print_costs
from reflowlens.benchmarks.peak_memory import peak_memory
from reflowlens.benchmarks.steps import VARIANTS, model_and_loss, training_step
from reflowlens.benchmarks.sweep import make_case
from reflowlens.benchmarks.sweep_floor import suffixes_flops
from reflowlens.benchmarks.table import lines
from reflowlens.benchmarks.timing import alternate, comparison, ratio
from reflowlens.benchmarks.train import measured_peak
from reflowlens.benchmarks.variants import NANO, forming, without_hook_points
from reflowlens.checkpoints import load_model
from reflowlens.cli import main
from reflowlens.errors import ReflowlensError
from reflowlens.flops import forward_flops_by_part, training_flops_per_token
from reflowlens.models import build_model
from tests.reference import hugging_face
from tests.support.exactness import BDH
from tests.support.tiny import assert_close, random_model, random_tokens, tiny_config


def tiny_bench(name="reflow", **changes):
    return TrainBench(**{"model": tiny_config(name), "batch": 2, "context": 12, "dtype": "float32"} | changes)


@pytest.mark.parametrize("name", ["gpt2_new", "reflow", "reflow_topk", "reflow_lite"])
def test_every_variant_has_the_same_loss(name):
    bench = tiny_bench(name)
    x = random_tokens(bench.model, 2, 12)
    y = random_tokens(bench.model, 2, 12, seed=1)
    model = random_model(name)
    weights = {key: parameter.detach() for key, parameter in model.named_parameters()}
    merged = {"embed.W_E": model.W_U.detach().T}
    losses = {}
    for variant in bench.variants:
        model, loss = model_and_loss(bench, variant)
        if variant == "transformers":
            hugging_face.load(model, hugging_face.llama(bench.model)[1], weights | merged)
        else:
            model.load_state_dict(weights)
        losses[variant] = loss(x, y)
    assert list(losses) == list(VARIANTS)
    for variant, value in losses.items():
        assert_close(value, losses["reflowlens"], what=variant)


def test_gpt2_has_no_llama_of_its_shape():
    assert "transformers" not in tiny_bench("gpt2").variants


@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_learn(variant, monkeypatch):
    """Every parameter of the step's own model moves, and the loss on its batch falls each time."""
    bench, made, losses = tiny_bench(), [], []

    def watched(*arguments):
        model, loss = model_and_loss(*arguments)
        made.append(model)

        def recorded(x, y):
            value = loss(x, y)
            losses.append(value.item())
            return value

        return model, recorded

    monkeypatch.setattr("reflowlens.benchmarks.steps.model_and_loss", watched)
    torch.manual_seed(0)  # Llama's own initialisation
    step = training_step(bench, variant)
    (model,) = made
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for _ in range(5):
        step()
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def test_forming_and_hookless_models_are_the_same_function(model, tokens):
    expected = model(tokens)
    assert_close(forming(model)(tokens), expected)
    bare = without_hook_points(build_model(dataclasses.replace(model.cfg)))
    bare.load_state_dict(model.state_dict())
    assert_close(bare(tokens), expected)
    assert not [module for module in bare.modules() if type(module).__name__ == "HookPoint"]


def test_calls_take_turns_and_ratios_are_medians_over_rounds():
    order = []
    times = alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, warm_up=2)
    assert order == ["a", "b"] * 5
    assert [len(seconds) for seconds in times.values()] == [3, 3]
    assert ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == 2.0
    row = comparison("x", lambda: None, lambda: sum(range(200000)), rounds=3, difference=0.5)
    assert row["ratio"] > 1
    assert (row["difference"], row["of"]) == (0.5, "x")


def test_the_comparison_of_training_steps(monkeypatch):
    """Given times and sizes, so that the figures are known."""
    seconds = {"reflowlens": 2.0, "forming E": 4.0, "no hooks": 2.0, "transformers": 3.0}
    sizes = {"reflowlens": 100, "forming E": 300, "no hooks": 100, "transformers": None}
    monkeypatch.setattr("reflowlens.benchmarks.train.peak_memory", lambda bench, variant: sizes[variant])
    monkeypatch.setattr(train_module, "measured_peak", lambda dtype: 1e9)
    monkeypatch.setattr(train_module, "alternate", lambda calls, n, **_: {name: [seconds[name]] * n for name in calls})
    bench = tiny_bench()
    found = bench_train(bench, steps=3)
    rows = found.frame.set_index("variant")
    assert rows["tokens_per_s"].to_dict() == pytest.approx(
        {"reflowlens": 12.0, "forming E": 6.0, "no hooks": 12.0, "transformers": float("nan")}, nan_ok=True
    )
    assert rows["ratio"]["forming E"] == 2.0
    assert rows["memory_ratio"]["forming E"] == 3.0
    assert rows["what"]["transformers"].startswith("out of memory")
    flops = training_flops_per_token(bench.model, 12, batch=2)
    assert rows["mfu"]["reflowlens"] == pytest.approx(12.0 * flops / 1e9)
    assert "batch 2 × 12" in str(found)


@pytest.mark.slow
@pytest.mark.by_hand
def test_memory_is_that_of_a_process_of_its_own():
    """Seven more layers need weights, gradients and two moments more, 16 bytes a parameter, and some activations."""
    model = dataclasses.replace(tiny_config("gpt2_new"), d_model=256, d_mlp=1024, d_head=64, d_vocab=512)
    small, large = (tiny_bench(model=dataclasses.replace(model, n_layers=layers)) for layers in (1, 8))
    parameters = [build_model(bench.model, device="meta").n_parameters for bench in (small, large)]
    peaks = [peak_memory(bench, "reflowlens") for bench in (small, large)]
    assert None not in peaks
    assert 0.8 <= (peaks[1] - peaks[0]) / (16 * (parameters[1] - parameters[0])) <= 2.0


def test_a_cpu_does_some_operations():
    assert measured_peak(torch.float32, (64,), seconds=0.01) > 1e6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"batch": 0}, "batch and context must be positive"),
        ({"context": 25}, "context 25 exceeds the model's n_ctx=24"),
        ({"device": "tpu"}, "device must be 'cpu' or 'cuda'"),
    ],
)
def test_what_cannot_be_run(changes, message):
    with pytest.raises(ReflowlensError, match=message):
        tiny_bench(**changes)


def test_presets_by_name():
    assert TrainBench.named().model == NANO
    assert TrainBench.named(batch=None, dtype="float32").batch == 16
    assert TrainBench.named("reflow_1_small").context == 1024
    with pytest.raises(ReflowlensError, match="unknown preset 'reflow_1_smal'"):
        TrainBench.named("reflow_1_smal")


def test_the_command(monkeypatch, capsys):
    called = []

    def rows_of(name, quick, **given):
        called.append((name, quick, given))
        yield {"ratio": 2.5, "of": name}

    monkeypatch.setattr("reflowlens.benchmarks.bench_train", lambda bench, steps: called.append((bench, steps)))
    for name, benchmark in BENCHMARKS.items():
        full, quick = (partial(rows_of, name, quick) for quick in (False, True))
        monkeypatch.setitem(BENCHMARKS, name, dataclasses.replace(benchmark, rows=full, quick=quick, texts=("of",)))
    assert main(["bench", "train", "--preset", "reflow_1_small", "--batch", "2", "--steps", "3", "--compile"]) == 0
    ((bench, steps),) = called
    assert (bench.model.model_name, bench.batch, bench.compiled, steps) == ("reflow_1_small", 2, True, 3)
    called.clear()
    assert main(["bench", "sweep", "--quick"]) == 0
    assert called == [("sweep", True, {})]
    header, columns, row = capsys.readouterr().out.splitlines()[-3:]
    assert header == machine()
    assert columns.split()[-1] == "of"
    assert row.split()[-1] == "sweep"
    assert main(["bench", "graph", "--tokens", "8"]) == 0
    assert called[1:] == [("graph", False, {"n_tokens": [8]})]
    called.clear()
    assert main(["bench"]) == 0
    assert len(called) == len(BENCHMARKS)


def test_a_row_is_printed_as_soon_as_it_is_measured():
    measured = []

    def rows():
        for i in range(3):
            measured.append(i)
            yield {"ratio": float(i), "of": "x" * 30 * i}

    printed = BENCHMARKS["decode"].lines(rows())
    header, _, _ = (next(printed) for _ in range(3))
    assert header == machine()
    assert measured == [0]
    assert [len(measured) for _ in printed] == [2, 3]


def test_lines_of_a_table():
    rows = [{"ratio": 11.626, "n": 4096, "case": "a"}, {"ratio": math.nan, "gap": 5.2e-7, "case": "b", "grid": "heads"}]
    header, *found = map(str.split, lines(rows, ["ratio", "n", "gap"], ["case", "grid"]))
    assert header == ["ratio", "n", "gap", "case,", "grid"]
    assert found == [["11.63", "4,096", "-", "a"], ["-", "-", "5.2e-07", "b,", "heads"]]


def test_sweeps_are_compared_with_equal_results(monkeypatch):
    case = make_case("tiny", random_model("reflow"), batch=2, pos=5)
    monkeypatch.setattr(sweep_module, "has_nnsight", lambda: False)
    *rows, left_out = bench_sweep([case], patches=7, rounds=1)
    assert left_out == {"of": "resid_pre against nnsight", "case": "left out: pip install reflowlens[bench]"}
    frame = pd.DataFrame(rows).set_index("of")
    assert frame["cells"].to_dict() == {
        "resid_pre": 2 * 5,
        "attn_head_out_by_pos": 2 * 5 * 4,
        "7 signals of the recipe": 7,
        "every signal of the readout": 32,
    }
    assert (frame["difference"] < 1e-5).all()
    assert (frame[["ours_ms", "other_ms", "ratio"]] > 0).all(axis=None)
    # What 5 suffixes of 1 to 5 positions leave out at least: all but 3 tokens of 5 in the mean.
    assert frame.loc["resid_pre", "flops"] > 5 / 3
    assert (frame.loc[["resid_pre", "attn_head_out_by_pos"], "floor"] > 0).all()


def test_a_band_of_positions_is_compared_with_equal_results():
    case = make_case("tiny", random_model("reflow"), batch=1, pos=6, positions=[1, 4])
    first, *_ = bench_sweep([case], patches=1, rounds=1)
    assert (first["cells"], first["case"]) == (2 * 2, "tiny, T 6, batch 1, 2 positions")
    assert first["difference"] < 1e-5


@pytest.mark.parametrize("name", ["reflow", "gpt2", "reflow_lite", "bdh"])
def test_the_floor_of_one_token_is_its_blocks(name):
    """And a later cell needs less."""
    model = random_model(BDH if name == "bdh" else name)
    n_layers, parts = model.cfg.n_layers, forward_flops_by_part(model.cfg, 1)
    blocks = sum(flops for part, flops in parts.items() if part not in ("embedding", "forming", "readout"))
    for layer in range(n_layers):
        needed = suffixes_flops(model, "resid_pre", [(layer, 0)], 1)
        assert needed == pytest.approx(blocks * (n_layers - layer) / n_layers)
    needed_at = lambda *cell: suffixes_flops(model, "resid_pre", [cell], 6)  # noqa: E731
    of_six = torch.tensor([[needed_at(layer, p) for p in range(6)] for layer in range(n_layers)])
    assert (of_six.diff(dim=0) < 0).all()
    assert (of_six[:-1].diff(dim=1) < 0).all()  # in the last layer a cell needs one position, whichever it changes


@pytest.mark.parametrize("position", [0, 5])
def test_the_floor_of_a_head_is_the_mlp_at_its_position_and_what_the_next_block_reads(position: int) -> None:
    """In the last block it is needed where logits are read alone."""
    model = random_model("gpt2")
    n_layers, mlp = model.cfg.n_layers, forward_flops_by_part(model.cfg, 6)["mlp"] / model.cfg.n_layers
    for layer in range(n_layers):
        behind = suffixes_flops(model, "resid_pre", [(layer + 1, position)], 6) if layer + 1 < n_layers else 0.0
        needed = behind + mlp * (layer + 1 < n_layers or position == 5)
        assert suffixes_flops(model, "attn_head_out_by_pos", [(layer, position)], 6) == pytest.approx(needed)


def test_nnsight_finds_the_same():
    pytest.importorskip("nnsight")
    case = make_case("tiny", random_model("reflow"), batch=2, pos=4)
    *_, row = bench_sweep([case], patches=1, rounds=1)
    assert row["of"] == "resid_pre against nnsight"
    assert row["difference"] < 1e-5


def test_scores_are_those_of_each_sentence_by_itself():
    (row,) = bench_score(tiny_config("reflow", n_ctx=48), sentences=24, rounds=1)
    assert row["difference"] < 1e-5
    assert row["ours_tokens_per_s"] > 0
    assert row["ratio"] > 0


def test_hook_points_are_compared_with_equal_results():
    rows = list(bench_hooks(tiny_config("reflow"), [(2, 8)], compiled=False, rounds=1))
    assert [row["of"].split(",")[0] for row in rows] == [
        "forward pass with HookPoints against none",
        "training step with HookPoints against none",
        "run_with_cache against the forward pass",
    ]
    assert all(row["difference"] < 1e-6 for row in rows)
    assert all(row["ratio"] > 0 for row in rows)


def test_both_libraries_generate_the_same_tokens(monkeypatch):
    model = random_model("reflow")
    first, second = bench_generate((2,), new_tokens=3, rounds=1, model=model)
    assert first["of"].startswith("transformers' generate, 3 tokens, batch 2")
    assert min(first["ratio"], second["ratio"]) > 0
    monkeypatch.setattr("reflowlens.benchmarks.generate._theirs", lambda model, prompts, n: prompts[:, :1])
    with pytest.raises(ReflowlensError, match="other tokens in 2 of 2 rows"):
        next(bench_generate((2,), new_tokens=3, rounds=1, model=model))


def test_what_is_collected_and_evaluated_is_that_of_bare_passes():
    rows = list(bench_collection(tiny_config("reflow", n_ctx=12), batch=2, batches=2, rounds=1))
    assert [row["of"].split(",")[0] for row in rows] == ["collect"] * 3 + ["evaluate", "units"]
    assert max(rows[i]["difference"] for i in (0, 3, 4)) < 1e-5


def test_the_cost_of_opening_a_model_is_printed(capsys):
    print_costs("reflow-nano")
    costs = json.loads(capsys.readouterr().out)
    assert costs["weights_mb"] == pytest.approx(4 * load_model("reflow-nano").n_parameters / 1e6)
    assert costs["seconds"] > 0
