"""Two refiners: switched off as by plain hooks, the inner learner by its own states, planted texts, the design."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from analyses.experiments.refinement import read_grid, refinement
from analyses.experiments.refinement import retrained as design
from analyses.experiments.refinement.gains import gain_frame
from analyses.experiments.refinement.gates import CELLS, effects, final_norm, gate_losses
from analyses.experiments.refinement.inner import effective_rank, inner_curves, learned, learning_losses
from analyses.experiments.refinement.logits import euler, logit_frame, parts_of_stream, step_losses
from analyses.experiments.refinement.planted import pair_learner, pair_texts
from analyses.experiments.refinement.texts import IGNORED, mean_by_document, read_texts
from analyses.experiments.refinement.untying import untied, untying_frame, untying_losses
from analyses.experiments.refinement.velocity import jacobian, velocity_frames, visited
from reflowlens.checkpoints import save_model
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from tests.reflowlens.models.test_ttt_flow import filled
from tests.support.tiny import CONFIGS, build_model

DOCUMENTS = [torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (23, 14, 3, 40)]


def every_point(name: str) -> bool:
    return True


def plain_losses(model: HookedModel, document: list[int], hooks: list[tuple[str, Any]]) -> Tensor:
    """Of one text alone, through TransformerLens's hooks."""
    ids = torch.tensor(document[: model.cfg.n_ctx + 1])
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        return F.cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction="none").double()


def zero(value: Tensor, hook: Any) -> Tensor:
    return torch.zeros_like(value)


@pytest.fixture(scope="module")
def model() -> HookedModel:
    return filled()


def test_texts_begin_their_documents(model):
    texts = read_texts(model, DOCUMENTS)
    assert texts.lengths.tolist() == [22, 13, 2, 32]  # n_ctx is 32
    assert texts.targets[1, :13].tolist() == DOCUMENTS[1][1:]
    assert set(texts.targets[1, 13:].tolist()) == {IGNORED}
    assert texts.bits_per_nat == pytest.approx(1 / math.log(2))  # a byte a token
    repeated = read_texts(model, [[5, 6, 5, 5, 7], [1, 1]])
    assert repeated.seen().tolist() == [[False, True, True, False], [True, False, False, False]]
    of_text = read_texts(model, ["né", "abc"])
    assert of_text.tokens[0, 0] == b"n"[0]
    assert of_text.lengths.tolist() == [2, 2]


@pytest.mark.parametrize(
    ("cell", "off"),
    [
        ("both", ()),
        ("ttt", ("flow.hook_delta",)),
        ("flow", ("ttt.hook_delta",)),
        ("none", ("ttt.hook_delta", "flow.hook_delta")),
    ],
)
def test_gates_shut_as_hooks_shut_them(model, cell, off):
    found = gate_losses(model, read_texts(model, DOCUMENTS))[cell]
    for row, document in enumerate(DOCUMENTS):
        expected = plain_losses(model, document, [(name, zero) for name in off])
        torch.testing.assert_close(torch.tensor(found[row, : len(expected)]), expected, rtol=1e-5, atol=1e-5)
        assert not found[row, len(expected) :].any()


def test_learning_switched_off_turned_round_and_begun_elsewhere(model):
    found = learning_losses(model, read_texts(model, DOCUMENTS))
    changes = {"model": lambda G, hook: G, "eta_zero": zero, "sign_flipped": lambda G, hook: -G}
    for name, change in changes.items():
        for row, document in enumerate(DOCUMENTS):
            chunks = range(-(-min(len(document) - 1, 32) // 4))
            expected = plain_losses(model, document, [(f"ttt.steps.{m}.hook_grad", change) for m in chunks])
            torch.testing.assert_close(torch.tensor(found[name][row, : len(expected)]), expected, rtol=1e-5, atol=1e-5)
    of_six = torch.tensor(
        [DOCUMENTS[0][:21]]
    )  # its sixth mini-batch begins behind 20 of its 22 tokens, which are whole
    _, cache = model.run_with_cache(of_six, names_filter=every_point)
    left = {part: cache[f"ttt.steps.5.hook_{part}"] for part in "Wc"}
    begun = [(f"ttt.steps.0.hook_{part}", lambda value, hook, part=part: left[part]) for part in "Wc"]
    expected = plain_losses(model, DOCUMENTS[1], begun)
    torch.testing.assert_close(
        torch.tensor(found["previous_state"][1, : len(expected)]), expected, rtol=1e-5, atol=1e-5
    )


def test_inner_curves_are_of_the_states_that_the_model_passes_through(model):
    curves = inner_curves(model, read_texts(model, DOCUMENTS), seed=0)["model"]
    ids = torch.tensor([DOCUMENTS[0][:-1]])
    _, cache = model.run_with_cache(ids, names_filter=every_point)
    k, v = (cache[f"ttt.hook_{name}"].transpose(1, 2) for name in "kv")
    chunked = [part[:, :, :20].split(4, dim=2) for part in (k, v)]
    W, c = ([cache[f"ttt.steps.{m}.hook_{part}"] for m in range(6)] for part in "Wc")
    _, of_other = model.run_with_cache(torch.tensor([DOCUMENTS[3][:32]]), names_filter=every_point)
    of_last = [of_other[f"ttt.steps.{m}.hook_W"] for m in range(6)]  # the first text stands behind the last
    with torch.no_grad():
        losses = [
            [model.ttt.inner_loss(keys, values, W[m], c[m]).mean(-1)[0] for keys, values in zip(*chunked, strict=True)]
            for m in range(6)
        ]
    for m in range(5):
        expected = {
            "at_start": losses[0][m], "own_before": losses[m][m], "own_after": losses[m + 1][m],
            "moved": (W[m + 1] - W[0])[0].flatten(1).norm(dim=1),
        }  # fmt: skip
        if m < 4:
            expected |= {"next_before": losses[m][m + 1], "next_after": losses[m + 1][m + 1]}
        if m > 0:
            steps = [(W[n + 1] - W[n])[0].flatten(1) for n in (m - 1, m)]
            expected["cosine"] = torch.cosine_similarity(*steps, dim=1)
            if m < 4:
                others = [(of_last[n + 1] - of_last[n])[0].flatten(1) for n in (m - 1, m)]
                expected["cosine_other"] = torch.cosine_similarity(steps[1], others[0], dim=1)
        for name, value in expected.items():
            np.testing.assert_allclose(curves[name][0, :, m], value.numpy(), rtol=1e-4, atol=1e-5)
    assert np.isnan(curves["own_before"][0, :, 5:]).all()
    assert np.isnan(curves["next_before"][0, :, 4:]).all()
    assert np.isnan(curves["own_before"][2]).all()  # a text shorter than a mini-batch
    assert effective_rank(torch.diag(torch.tensor([3.0, 3.0, 0.0]))).item() == pytest.approx(2)


def test_controls_of_inner_learning(model):
    found = {name: learned(own) for name, own in inner_curves(model, read_texts(model, DOCUMENTS), seed=0).items()}
    assert found["eta_zero"]["fit"] == pytest.approx(0)
    assert len(found["eta_zero"]["fit"]) == 3
    assert (found["model"]["fit"] > 0).all()
    assert (found["sign_flipped"]["fit"] < 0).all()


def test_the_stream_is_the_sum_of_its_parts(model):
    tokens = torch.tensor([DOCUMENTS[0]])
    with torch.no_grad():
        parts = parts_of_stream(model, final_norm(model, tokens))
        logits, cache = model.run_with_cache(tokens)
        before_cap = sum(part @ model.embed.W_E.T for part in parts.values())
    torch.testing.assert_close(30 * (before_cap / 30).tanh(), logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(parts["ttt"], cache["ttt.hook_delta"], rtol=1e-5, atol=1e-5)
    of_flow = parts["flow_linear"] + parts["flow_velocity"]
    torch.testing.assert_close(of_flow, cache["flow.hook_delta"], rtol=1e-5, atol=1e-5)


def test_margins_are_of_the_target_over_the_best_other_token(model):
    texts = read_texts(model, DOCUMENTS[:2])
    frame, margins = logit_frame(model, texts).set_index("part"), []
    for document in DOCUMENTS[:2]:
        ids = torch.tensor(document)
        with torch.no_grad():
            logits = model.final_stream(ids[None, :-1])[0] @ model.embed.W_E.T
        own = logits.gather(1, ids[1:, None])[:, 0]
        margins.append(own - logits.scatter(1, ids[1:, None], -torch.inf).amax(1))
    assert frame["margin"].sum() == pytest.approx(torch.cat(margins).mean().item(), rel=1e-4)
    assert frame["share"].sum() == pytest.approx(1)
    assert frame.loc["stream", "cosine"] == pytest.approx(1)
    assert frame.loc["stream", "relative_norm"] == 1


def test_steps_of_the_flow(model):
    texts = read_texts(model, DOCUMENTS)
    steps, gates = step_losses(model, texts), gate_losses(model, texts)
    np.testing.assert_allclose(steps["step 1"], gates["both"], rtol=1e-5, atol=1e-5)
    linear = plain_losses(model, DOCUMENTS[0], [("flow.hook_velocity", zero)])
    np.testing.assert_allclose(steps["step 0"][0, :22], linear, rtol=1e-5, atol=1e-5)
    double = plain_losses(model, DOCUMENTS[0], [("flow.hook_velocity", lambda v, hook: 2 * v)])
    np.testing.assert_allclose(steps["step 2"][0, :22], double, rtol=1e-5, atol=1e-5)
    z = torch.randn(3, 6)
    with torch.no_grad():
        middle = z + model.flow.velocity(z) / 2
        torch.testing.assert_close(euler(model.flow, z, 2), middle + model.flow.velocity(middle) / 2)


def linear_flow(rank: int) -> tuple[HookedModel, Tensor]:
    """A model whose velocity is z B exactly, since GELU(a) − GELU(−a) = a, and B, which writes to so many channels."""
    model = filled(flow_hidden=12)
    B = torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
    B[:, rank:] = 0
    with torch.no_grad():
        model.flow.W_in.copy_(torch.cat([torch.eye(6), -torch.eye(6)], dim=1))
        model.flow.W_out.copy_(torch.cat([B, -B]))
        model.flow.b_in.zero_()
        model.flow.b_out.zero_()
    return model, B


def test_a_velocity_that_is_linear_is_found_to_be():
    model, B = linear_flow(2)
    texts = read_texts(model, DOCUMENTS)
    frames = velocity_frames(model, texts, seed=0)
    for at, rows in frames["velocity"].groupby("input"):
        found = rows.set_index("measure")["value"]
        assert found["affine"] == pytest.approx(1, abs=1e-5)
        assert 1 < found["directions"] <= 2 < found["input_directions"]
        assert found["stretch"] == pytest.approx(torch.linalg.svdvals(B)[0].item(), rel=1e-5)
        shares = frames["directions"].query(f"input == {at!r} and of == 'velocity' and component < 3")["share"]
        assert shares.sum() == pytest.approx(1)
        jacobian = frames["jacobian"].query(f"input == {at!r}")
        np.testing.assert_allclose(jacobian["singular_value"], torch.linalg.svdvals(B), rtol=1e-4, atol=1e-5)
        real = torch.linalg.eigvals(B).real.sort(descending=True).values
        np.testing.assert_allclose(jacobian["real_part"], real, rtol=1e-4, atol=1e-5)
    _, cache = model.run_with_cache(torch.tensor([DOCUMENTS[0][:-1]]), names_filter=every_point)
    z, v = cache["flow.hook_latent"][0], cache["flow.hook_velocity"][0]
    points = visited(model, texts)
    torch.testing.assert_close(points.z[points.text == 0], z, rtol=1e-5, atol=1e-5)
    ratio = frames["velocity"].query("input == 'model' and measure == 'ratio'")["value"].item()
    of_all = [model.flow.velocity(own).norm(dim=1) / own.norm(dim=1) for own in points.z.split(texts.lengths.tolist())]
    torch.testing.assert_close(of_all[0], v.norm(dim=1) / z.norm(dim=1), rtol=1e-5, atol=1e-5)
    assert ratio == pytest.approx(torch.cat(of_all).mean().item(), rel=1e-5)


def test_jacobians_are_autograds(model):
    z = 3 * torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    with torch.enable_grad():
        expected = torch.stack([torch.autograd.functional.jacobian(model.flow.velocity, own).T for own in z])
    torch.testing.assert_close(jacobian(model.flow, z), expected, rtol=1e-5, atol=1e-5)


def test_the_linear_part_folds_into_an_output_matrix(model):
    texts = read_texts(model, DOCUMENTS)
    found = untying_losses(model, texts, visited(model, texts), seed=0)
    shut, whole = (gate_losses(model, texts)[cell] for cell in ("ttt", "both"))
    np.testing.assert_allclose(found["none"], shut, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found["flow"], whole, rtol=1e-5, atol=1e-5)
    _, cache = model.run_with_cache(torch.tensor([DOCUMENTS[0][:-1]]), names_filter=every_point)
    v_alone = cache["flow.hook_velocity"] @ model.flow.W_up / 2  # its gate is half open
    changes = {"linear": ("flow.hook_velocity", zero), "velocity": ("flow.hook_delta", lambda delta, hook: v_alone)}
    for part, change in changes.items():
        expected = plain_losses(model, DOCUMENTS[0], [change])
        np.testing.assert_allclose(found[part][0, : len(expected)], expected, rtol=1e-5, atol=1e-5)
    difference = untied(model) - model.embed.W_E
    assert torch.linalg.matrix_rank(difference.detach(), rtol=1e-4) == 6
    frame = untying_frame(found, texts, seed=0).set_index("part")
    gain = (found["none"] - found["linear"]).sum() / texts.lengths.sum()
    assert frame.loc["linear", "value"] == pytest.approx(gain)
    linear, _ = linear_flow(3)
    loss = untying_losses(linear, texts, visited(linear, texts), seed=0)
    np.testing.assert_allclose(loss["affine"], loss["flow"], rtol=1e-4, atol=1e-4)
    assert np.abs(loss["rotated_linear"] - loss["linear"]).max() > 0.01


def test_gains_stand_beside_those_of_the_same_tokens(model):
    texts = read_texts(model, [[0, 1, 0, 2, 0, 1, 0, 0], [2, 0, 2, 1, 0, 0, 0, 0], [0, 2, 2, 1, 0, 0, 0, 0]])
    of_token = np.array([4.0, 1.0, 2.0])[texts.targets.numpy().clip(min=0)]
    same_token = gain_frame({"x": of_token}, of_token, texts, 4, 0).query("by != 'frequency'")
    assert len(same_token) == 4
    for row in same_token.itertuples():  # what depends on the token alone is the same outside of the bin
        assert row.matched == pytest.approx(row.control)
    frame = gain_frame({"x": of_token}, of_token, texts, 4, 0).query("by == 'frequency'").set_index("bin")
    assert frame["tokens"].to_dict() == {"commonest": 13, "rare": 4, "rarest": 4}
    assert frame.loc["commonest", "value"] == 4
    assert frame["control"].between(frame["control_low"], frame["control_high"]).all()
    is_seen = texts.seen() * 1.0
    seen = gain_frame({"x": is_seen}, is_seen, texts, 4, 0).query("by == 'seen'").set_index("bin")
    assert seen["value"].to_dict() == {"seen before": 1, "not seen": 0}
    assert seen["control"].to_dict() == {"seen before": 0, "not seen": 1}


@pytest.mark.parametrize(("effect", "sd", "seeds"), [(1.0, 1.0, 10), (-0.5, 1.0, 34), (1.0, 1e-9, 2), (1.0, 0.0, 2)])
def test_seeds_that_it_takes(effect, sd, seeds):
    assert design.seeds_to_tell(effect, sd) == seeds  # of a paired t test at 5% with power 0.8


@pytest.mark.parametrize(
    ("low", "high", "seeds", "begins"),
    [
        (-0.003, -0.001, 5, "The refiners help each other"),
        (0.001, 0.003, 5, "The refiners stand in each other's way"),
        (-0.001, 0.003, 5, "The refiners do not help each other as much as published"),
        (-0.004, 0.001, 5, "Undecided at this size"),
        (-0.003, -0.001, 4, "Undecided whether"),
    ],
)
def test_a_verdict_in_words(low, high, seeds, begins):
    row = {"value": (low + high) / 2, "low": low, "high": high, "seeds": seeds, "sd": 0.0025, "seeds_to_tell": 22}
    words = design.in_words(row)
    assert words.startswith(begins)
    assert f"{low:+.5f} to {high:+.5f} over {seeds} seeds" in words


def test_effects_and_their_intervals():
    assert effects(design.PUBLISHED)["interaction"] == pytest.approx(-0.00161143, abs=1e-10)
    one = effects({"none": 4.0, "ttt": 3.0, "flow": 3.5, "both": 2.0})
    assert (one["ttt"], one["flow"], one["ttt_alone"], one["flow_with_ttt"]) == (-1.25, -0.75, -1.0, -1.0)
    interval, p = design.t_interval(np.array([1.0, 2.0, 3.0]))
    assert interval.low == pytest.approx(2 - 4.302653 / 3**0.5, rel=1e-5)
    assert p == pytest.approx(0.07418, abs=1e-4)
    mean, (low, high) = mean_by_document({"x": np.array([2.0, 6.0])}, np.array([1, 2]), seed=0)["x"]
    assert mean == pytest.approx(8 / 3)
    assert (low, high) == pytest.approx((2, 3))


@pytest.mark.parametrize(("mapped", "expected"), [(True, "supported"), (False, "not supported")])
def test_planted_mappings_are_learned_and_noise_is_not(mapped, expected):
    result = refinement(pair_learner(64), pair_texts(24, 32, mapped=mapped))
    assert result.verdicts["learning_gain"] == result.verdicts["inner_generalisation"] == expected
    assert result.verdicts["own_text_gain"] == expected  # another text's mapping is another one, its noise no better
    gains = result.frames["gains"].query("refiner == 'learning'").set_index("bin")["value"]
    if mapped:
        assert gains["32 to 63"] > 0.3 > 0.1 > gains["4 to 7"]
        assert gains["seen before"] > 0.3 > 0 > gains["not seen"]
        assert result.metrics["learning_gain"] > 0.2 > 0 > result.controls["learning_gain"]["sign_flipped"]
        assert result.metrics["planted_gain"] > 0.3 > 0 > result.controls["planted_gain"]["random"]
    else:
        assert (gains < 0).all()


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    """Two seeds of four models, and a third of which one run has not ended."""
    for seed in range(3):
        for cell, (ttt, flow) in zip(CELLS, ((False, False), (True, False), (False, True), (True, True)), strict=True):
            ended = 4 if (seed, cell) != (2, "flow") else 3
            manifest = {"step": ended, "training": {"run": {"steps": 4}}}
            run = tmp_path / f"seed_{seed}_{cell}"
            run.mkdir()
            save_model(run / "step_0000004", filled(seed=seed, ttt=ttt, flow=flow), manifest)
    return tmp_path


def test_the_design_retrained(grid, model):
    result = refinement(model, DOCUMENTS, grid=grid)
    frame, counts = result.frames["retrained"], sum(min(len(document), 33) - 1 for document in DOCUMENTS)
    for seed in range(2):
        own = filled(seed=seed, ttt=True, flow=False)
        expected = sum(float(plain_losses(own, document, []).sum()) for document in DOCUMENTS) / counts
        row = frame.query(f"weights == 'as trained' and seed == {seed} and cell == 'ttt'").iloc[0]
        assert row["loss"] == pytest.approx(expected, rel=1e-5)
        assert row["bits_per_byte"] == pytest.approx(expected / math.log(2), rel=1e-5)
    by_cell = frame.query("weights == 'as trained'").pivot(index="seed", columns="cell", values="bits_per_byte")
    interactions = by_cell["both"] - by_cell["ttt"] - by_cell["flow"] + by_cell["none"]
    assert result.metrics["retrained_interaction"] == pytest.approx(interactions.mean())
    low = design.t_interval(interactions.to_numpy())[0].low
    assert result.intervals["retrained_interaction"].low == pytest.approx(low)
    assert result.verdicts["retrained_interaction"] == "underpowered"  # of two seeds
    assert "6 bits" in result.controls["retrained_interaction"]
    assert any("seeds left out" in note and note.endswith("2") for note in result.notes)
    assert any("−0.0016" in note or "-0.0016" in note for note in result.notes)


def test_what_a_design_must_be(grid, model):
    for cell in ("none", "flow"):
        (grid / f"seed_1_{cell}").rename(grid / f"gone_1_{cell}")
    with pytest.raises(ReflowlensError, match="at least two seeds with four ended runs"):
        read_grid(grid)
    for cell in ("none", "flow"):  # the one's runs under the other's name
        (grid / f"gone_1_{cell}").rename(grid / f"seed_1_{'flow' if cell == 'none' else 'none'}")
    with pytest.raises(ReflowlensError, match="a model with refiners 'none' was expected, got 'flow'"):
        refinement(model, DOCUMENTS, grid=grid)


def test_models_with_one_refiner_or_none():
    result = refinement(filled(flow=False), DOCUMENTS)
    assert set(result.frames["gates"]["cell"]) == {"none", "ttt"}
    assert "gate_interaction" not in result.metrics
    assert any("one refiner" in note for note in result.notes)
    assert "steps" not in result.frames
    short = refinement(filled(ttt=False), [[1, 2, 3], [4, 5]])
    assert set(short.frames["gates"]["cell"]) == {"none", "flow"}
    assert "inner" not in short.frames
    (note,) = refinement(filled(), [[1, 2, 3], [4, 5]]).notes
    assert note == "no text has three mini-batches of 4 tokens: inner learning is not shown"
    with pytest.raises(ReflowlensError, match="has no refiners"):
        refinement(build_model(CONFIGS["gpt2"]), DOCUMENTS)
    with pytest.raises(ReflowlensError, match="needs at least two, got 1"):
        refinement(filled(), DOCUMENTS[:1])


def test_a_result_is_kept_whole_and_repeats(tmp_path, model):
    result = refinement(model, DOCUMENTS)
    saved = type(result).load(result.save(tmp_path))
    assert saved.metrics == result.metrics == refinement(model, DOCUMENTS).metrics
    of_inner, of_flow = {"learning", "inner", "planted"}, {"steps", "untying", "velocity", "directions", "jacobian"}
    assert {"gates", "effects", "gains", "logits"} | of_inner | of_flow == set(result.frames)
