"""What a caller may get wrong: every argument of another type, or out of range, is one clear error."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import reflowlens as rl
from reflowlens import metrics
from reflowlens.errors import ReflowlensError
from reflowlens.metrics import kl
from reflowlens.signals import rotate
from tests.support.tiny import random_model

MODEL = random_model("reflow")
VIEW = rl.signal_view(MODEL)
LOGITS = MODEL("abcd")
PAIR = ("the king", "the kind")
STREAM = torch.randn(1, 4, MODEL.cfg.d_model)
IDS = [np.array([1, 2]), torch.tensor([1, 2])]
NO_NUMBERS = ["a", "2", None, [], [1], {}, object(), b"x", float("nan"), *IDS]
NO_INTEGERS = [*NO_NUMBERS, 1.0, 2.5, True, torch.tensor(2.0), torch.tensor(True)]
NO_COUNTS = [*NO_INTEGERS, -1, np.float32(2.5)]
NO_NAMES = [1.5, None, True, [1], {1: 2}, IDS[1], b"x"]
NO_LISTS = [1.5, "a", True, float("nan")]
NO_PATHS = [1.5, 0, True, [1], {}, IDS[1], b"x"]
NO_TENSORS = ["a", 1, 2.5, [1.0], {}, object(), np.zeros(4)]


def but(values: list[Any], *allowed: Any) -> list[Any]:
    return [value for value in values if repr(value) not in map(repr, allowed)]


def generate(name: str) -> Callable[[Any], Any]:
    return lambda value: MODEL.generate("ab", **{"max_new_tokens": 2, name: value})


def forward(name: str, **kwargs: Any) -> Callable[[Any], Any]:
    return lambda value: MODEL("abcd", **kwargs, **{name: value})


def collect(batches: Any = ("ab",), names: Any = "hook_embed", **arguments: Any) -> rl.Collected:
    return rl.collect(MODEL, batches, names, **arguments)


def growth(scores: Any = None, **arguments: Any) -> Any:
    found = rl.edge_attribution(MODEL, *PAIR, kl(), mode="gradient") if scores is None else scores
    return rl.grow_circuit(MODEL, *PAIR, found, kl(), **arguments)


def enter(block: Any) -> None:
    with block:
        pass


def with_lengths(lengths: Any) -> None:
    with rl.intervene(MODEL, rl.Ablate("z", layer=0), lengths=lengths):
        MODEL(torch.tensor([[1, 2, 3]]))


# A call with the argument, what the argument may not be, and how the message begins where others are near.
CALLS: dict[str, tuple[Any, ...]] = {
    "generate input": (lambda value: MODEL.generate(value, 2), but(NO_INTEGERS, "a", "2")[:4]),
    "generate max_new_tokens": (generate("max_new_tokens"), [*NO_INTEGERS, 0, -1, 1000]),
    "generate temperature": (generate("temperature"), [*NO_NUMBERS, True, -1, -0.5, 2**2000]),
    "generate top_k": (generate("top_k"), [*but(NO_INTEGERS, None), 0, -1]),
    "generate top_p": (generate("top_p"), [*but(NO_NUMBERS, None), True, 0, 1.5]),
    "generate seed": (generate("seed"), [*NO_INTEGERS, 2**70, -(2**70)]),
    "generate stop_token": (generate("stop_token"), [*but(NO_INTEGERS, "a", "2", None), "ab", -1, 288]),
    "generate return_type": (generate("return_type"), NO_INTEGERS),
    "forward return_type": (forward("return_type"), but(NO_INTEGERS, None)),
    "forward targets": (forward("targets"), [*NO_TENSORS, LOGITS[..., 0], torch.zeros(4).long()]),
    "forward targets beyond": (forward("targets", return_type="loss"), [torch.full((1, 4), 288)]),
    "forward segments": (forward("segments"), [*NO_TENSORS, LOGITS[..., 0], torch.zeros(4).long()]),
    "forward stop_at_layer": (forward("stop_at_layer"), [*but(NO_INTEGERS, None), 3, -3]),
    "forward start_at_layer": (lambda value: MODEL(STREAM, start_at_layer=value), [*but(NO_INTEGERS, None), 3, -3]),
    "forward stream": (
        lambda value: MODEL(value, start_at_layer=1),
        [*NO_TENSORS, STREAM[0], STREAM[..., :3], STREAM[:, :0], STREAM.double(), STREAM.half(), STREAM.long()],
    ),
    "forward past_kv_cache": (forward("past_kv_cache"), but(NO_INTEGERS, None)),
    "run past_kv_cache": (
        lambda value: rl.run(MODEL, "abcd", rl.Ablate("z", layer=0), past_kv_cache=value),
        but(NO_INTEGERS, None),
    ),
    "run stream": (lambda value: rl.run(MODEL, value, rl.Ablate("z", layer=0), start_at_layer=0), NO_TENSORS),
    "run_with_cache past_kv_cache": (
        lambda value: MODEL.run_with_cache("abcd", past_kv_cache=value),
        but(NO_INTEGERS, None),
    ),
    "make_cache batch": (MODEL.make_cache, [*NO_INTEGERS, 0, -1]),
    "make_cache dtype": (lambda value: MODEL.make_cache(1, value), ["float32", 1, None, torch.int64]),
    "to_single_token": (MODEL.to_single_token, [*but(NO_INTEGERS, "a", "2"), 5, "", "ab"]),
    "to_single_str_token": (MODEL.to_single_str_token, [*NO_INTEGERS, -1, 256]),
    "to_string": (MODEL.to_string, [*but(NO_INTEGERS, [], [1], *IDS), [1.5], [-1], [2**70]]),
    "to_str_tokens": (MODEL.to_str_tokens, [*but(NO_INTEGERS, "a", "2", [], [1], *IDS), ["a", 2], [-1]]),
    "tokens_to_residual_directions": (
        MODEL.tokens_to_residual_directions,
        [*but(NO_INTEGERS, "a", "2", [], [1], *IDS), "ab", -1, 288, torch.tensor([1.0])],
    ),
    "accumulated_bias": (MODEL.accumulated_bias, [*NO_INTEGERS, -1, 3]),
    "build_model seed": (lambda value: rl.build_model(MODEL.cfg, seed=value), [*NO_INTEGERS, 2**70]),
    "signal_view name": (lambda value: rl.signal_view(MODEL, value), but(NO_INTEGERS, None)),
    "signal_view seed": (lambda value: rl.signal_view(MODEL, "rotated", seed=value), [*NO_INTEGERS, 2**70]),
    "signal_view seed of varimax": (lambda value: rl.signal_view(MODEL, "varimax", seed=value), NO_INTEGERS),
    "rotate": (lambda value: rotate(VIEW, value), [*NO_TENSORS, torch.eye(3), torch.zeros(32)]),
    "readout": (VIEW.readout, [*NO_TENSORS, STREAM[..., :3], torch.tensor(1.0)]),
    "logits": (VIEW.logits, [*NO_TENSORS, STREAM[..., :3], torch.tensor(1.0)]),
    "write": (VIEW.write, [*NO_TENSORS, STREAM[..., :3], torch.tensor(1.0)]),
    "contributions stream": (lambda value: VIEW.contributions(value, "a"), [*NO_TENSORS, STREAM[..., :3]]),
    "contributions target": (
        lambda value: VIEW.contributions(STREAM, value),
        [1.0, 2.5, True, None, {}, "ab", -1, 288, torch.zeros(3).long(), torch.zeros(0).long(), torch.ones(4)],
    ),
    "rows": (VIEW.rows, ["a", 1, None, object(), torch.tensor(2), ["ab"], [1]]),
    "codebook": (VIEW.codebook, [*NO_INTEGERS, -1, 32]),
    "codebook k": (lambda value: VIEW.codebook(0, k=value), [*NO_INTEGERS, 0, -1]),
    "recovery": (metrics.recovery, [*NO_INTEGERS, metrics.kl]),
    "of_logits model": (lambda value: metrics.target_prob("a").of_logits(value, LOGITS), NO_INTEGERS),
    "of_logits logits": (
        lambda value: metrics.target_prob("a").of_logits(MODEL, value),
        [*NO_TENSORS, LOGITS[0], LOGITS[..., :5], LOGITS[:, :0], LOGITS[:0]],
    ),
    "of_logits prompts": (
        lambda value: metrics.target_prob("a").of_logits(MODEL, LOGITS, value),
        [*but(NO_INTEGERS, None), "abcde", ["abcd", "ab"]],
    ),
    **{
        f"{name} target": (
            lambda value, metric=metric: metric(value).of_logits(MODEL, LOGITS),
            [*but(NO_INTEGERS, "a", "2", [1]), "ab", -1, 288],
        )
        for name, metric in {
            "target_prob": metrics.target_prob,
            "target_rank": metrics.target_rank,
            "logit_diff": lambda value: metrics.logit_diff("a", value),
        }.items()
    },
    "metric position": (
        lambda value: metrics.target_prob("a", position=value).of_logits(MODEL, LOGITS),
        [*NO_INTEGERS, 4, -5],
    ),
    "sweep steps": (
        lambda x: rl.sweep(MODEL, *PAIR, "tokens", kl(), mode="integrated", steps=x),
        [0, *NO_COUNTS],
        "steps of integrated gradients must be an integer and at least 1, got",
    ),
    "edge steps": (
        lambda x: rl.edge_attribution(MODEL, *PAIR, kl(), steps=x),
        [0, *NO_COUNTS],
        "steps of integrated gradients must be an integer and at least 1, got",
    ),
    "memory": (
        lambda x: rl.sweep(MODEL, *PAIR, "tokens", kl(), memory=x),
        [0, -1, math.inf, True, *but(NO_NUMBERS, None)],
        "memory must be",
    ),
    "cells": (lambda x: rl.sweep(MODEL, *PAIR, x, kl()), [1.5, None, True, [1]], "cells must be"),
    "results": (lambda x: rl.sweep(MODEL, *PAIR, "tokens", kl(), results=x), NO_PATHS, "results must be a path, got"),
    "top": (
        lambda x: rl.screen(MODEL, *PAIR, "tokens", kl(), top=x),
        NO_COUNTS,
        "top must be an integer and at least 0",
    ),
    "agreement top": (lambda x: rl.agreement([1.0], [1.0], top=x), NO_COUNTS, "top must be an integer and at least 0"),
    "agreement": (lambda x: rl.agreement([1.0], x), ["a", {}, b"x"], "effects must be numbers"),
    "controls": (
        lambda x: rl.faithfulness(MODEL, *PAIR, ["m0"], kl(), controls=x),
        NO_COUNTS,
        "controls must be an integer and at least 0",
    ),
    "circuit seed": (
        lambda x: rl.completeness(MODEL, *PAIR, ["m0"], kl(), controls=1, seed=x),
        NO_COUNTS,
        "seed must be an integer and at least 0",
    ),
    "circuit": (
        lambda x: rl.faithfulness(MODEL, *PAIR, x, kl(), controls=0),
        [*NO_LISTS, [], [1], b"x", [("m0", "m1"), "m0"]],
        "a circuit is a list of nodes, or of edges",
    ),
    "circuit metric": (
        lambda x: rl.faithfulness(MODEL, *PAIR, ["m0"], x, controls=0),
        [None, "kl", 1],
        "the metric must be one of reflowlens.metrics",
    ),
    "sizes": (lambda x: growth(sizes=[x]), NO_COUNTS, "a circuit's size must be an integer and at least 0"),
    "scores": (lambda x: growth(scores=x), [1.5, "a", [1]], "scores must be those of rl.edge_attribution"),
    "smallest": (
        lambda x: growth(sizes=[1]).smallest(x),
        ["a", None, math.nan, [1], {}],
        "faithfulness must be a number, got",
    ),
    "strongest edges": (
        lambda x: rl.edge_attribution(MODEL, *PAIR, kl(), mode="gradient").top(x),
        NO_COUNTS,
        "n must be an integer and at least 0, got",
    ),
    "sender": (lambda x: rl.path_patch(MODEL, *PAIR, x, "m1", kl()), NO_NAMES, "sender must be a name or a list of"),
    "receiver": (
        lambda x: rl.path_patch(MODEL, *PAIR, "m0", x, kl()),
        NO_NAMES,
        "receiver must be a name or a list of",
    ),
    "through": (
        lambda x: rl.path_patch(MODEL, *PAIR, "embed", "m1", kl(), through=x),
        NO_NAMES,
        "through must be a name or a list of names",
    ),
    "edges": (lambda x: rl.exact_edges(MODEL, *PAIR, kl(), edges=x), [1.5, True], "edges must be a list of pairs"),
    "edge": (lambda x: rl.exact_edges(MODEL, *PAIR, kl(), edges=[x]), [1.5, None, "ab", [1]], "an edge is a pair"),
    "edge of": (lambda x: rl.Graph.of(MODEL).edge((x, "m1")), [1.5, None, "m9"], "no sender"),
    "reads of": (lambda x: rl.Graph.of(MODEL).reads_of(x), [1.5, None, "m9"], "no sender"),
    "counts": (
        lambda x: rl.ablate_progressively(MODEL, "ab", "a", counts=[x]),
        [*NO_COUNTS, 33],
        "counts must be between 0 and 32",
    ),
    "no counts": (lambda x: rl.ablate_progressively(MODEL, "ab", "a", counts=x), [1.5, True], "counts must be a list"),
    "ablation seed": (
        lambda x: rl.ablate_readout(MODEL, "ab", by="resample", reference="cd", seed=x),
        [2**70, *NO_INTEGERS],
        "seed must be an integer from",
    ),
    "site": (
        lambda x: rl.ablate_upstream(MODEL, "ab", kl(), x, signals=[1]),
        [1.5, "a", -1, None, True, torch.tensor([1, 2])],
        "site must be",
    ),
    "k": (lambda x: collect(k=x), [0, *NO_COUNTS], "k must be an integer and at least 1"),
    "threshold": (
        lambda x: collect(threshold=x),
        ["a", math.nan, True, [1], {}, 10**400],
        "threshold must be a number",
    ),
    "positions": (
        lambda x: collect(positions=slice(x, None)),
        [1.5, "a", [1], math.inf],
        "positions must be a slice of integers",
    ),
    "step": (lambda x: collect(positions=slice(None, None, x)), [0, 1.5], "positions must be a slice of integ"),
    "statistics": (lambda x: collect(statistics=x), NO_NAMES, "statistics must be a name or a list of names"),
    "names": (lambda x: collect(names=x), NO_NAMES, "names must be a name or a list of names"),
    "batches": (collect, [1.5, None, True], "batches must be a list of texts or of batches, or"),
    "results folder": (lambda x: collect(results=x), NO_PATHS, "results must be a path, got"),
    "feature": (
        lambda x: collect()["hook_embed"].examples(x),
        [*NO_COUNTS, 32],
        "no feature .*: this point has features 0 to 31",
    ),
    "point": (lambda x: collect()[x], NO_NAMES, "was not collected"),
    "merge": (lambda x: collect().merge(x), [1.5, None, "a"], "statistics merge with others of rl.collect"),
    "parameter": (lambda x: enter(rl.edit(MODEL, rl.ScaleWeights(x, 1.0))), NO_NAMES, "no parameter"),
    "lengths": (with_lengths, [*NO_LISTS, [1.5], ["a"]], "lengths must be a list of numbers of tokens"),
    "config": (rl.build_model, NO_NAMES, "config must be a ModelConfig or the name of a preset"),
    "device": (
        lambda x: rl.build_model(MODEL.cfg, device=x),
        [1.5, math.nan, True, [1], {}, 2**70],
        "cannot compute on device",
    ),
    "many steps": (
        lambda x: rl.sweep(MODEL, *PAIR, "tokens", kl(), mode="integrated", steps=x),
        [2**70],
        "at most 1,0",
    ),
    "many controls": (lambda x: rl.faithfulness(MODEL, *PAIR, ["m0"], kl(), controls=x), [2**70], "at most 1,000,000"),
    "many rows": (MODEL.make_cache, [2**70], "batch must be at most 1,000,000"),
    "tokenizer": (rl.get_tokenizer, NO_NAMES, "no tokenizer"),
    "ragged targets": (lambda x: rl.ablate_readout(MODEL, "ab").probability(x), [[[1, 2], [3]]], "target"),
    "factor": (lambda x: rl.Scale("z", x, layer=0), [10**400, "a", None, [1.0], True], "factor must be a number"),
    "shown tokens": (
        lambda x: rl.show_tokens(x, [1.0], model=MODEL),
        [None, 1, 1.5, True, object()],
        "tokens are a text",
    ),
    "shown values": (
        lambda x: rl.show_tokens("no", x, model=MODEL),
        ["a", object(), [[1, 2], [3]]],
        "values must be num",
    ),
    "shown limit": (
        lambda x: rl.show_tokens("no", [1.0, 2.0], limit=x, model=MODEL),
        [0, -1, "a", []],
        "limit must be",
    ),
    "shown names": (
        lambda x: rl.show_tokens("no", [1.0, 2.0], names=x, model=MODEL),
        [1, 1.5, True],
        "names must be a l",
    ),
    "shown heads": (
        lambda x: rl.show_attention("no", torch.ones(1, 2, 2) / 2, names=x, model=MODEL),
        [1, 1.5, True, object()],
        "names must be a list",
    ),
    "shown pattern": (lambda x: rl.show_attention("no", x, model=MODEL), ["a", object(), {}], "values must be numbers"),
    "names_filter": (
        lambda x: MODEL.run_with_cache("ab", names_filter=x),
        but(NO_NAMES, None),
        "named by its text",
    ),
    "cached device": (lambda x: MODEL.run_with_cache("ab", device=x), [[], {}, "x", object()], "no device"),
    "cached dtype": (lambda x: MODEL.run_with_cache("ab", dtype=x), [1, "float32", [], torch.int64], "dtype must be"),
    "fwd_hooks": (
        lambda x: MODEL.run_with_hooks("ab", fwd_hooks=x),
        [1, None, "x", [1], [("hook_embed", 1)]],
        "fwd_hooks",
    ),
    "hook": (lambda x: MODEL.add_hook(x, print), [None, 1, [], object()], "a hook goes with"),
    "cache": (lambda x: rl.ActivationCache(x, MODEL), [None, 1, "x", []], "a cache is made of a dict"),
    "edge's places": (lambda x: rl.Graph.of(MODEL).places(x), [None, 1, "x", ("a", "b")], "sender"),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_argument_of_another_type_or_out_of_range_is_an_error(name: str) -> None:
    call, wrong, *message = CALLS[name]
    for value in wrong:
        with pytest.raises(ReflowlensError, match=message[0] if message else None):
            raise AssertionError(f"{name}: {value!r} was accepted, and gave {call(value)!r}")


@pytest.mark.parametrize("number", [np.int64(1), np.int32(1), torch.tensor(1), np.array(1)])
def test_integers_of_numpy_and_torch_are_integers(number: Any) -> None:
    options = {"top_k": number, "seed": number, "return_type": "tokens"}
    assert MODEL.generate("ab", number, **options).equal(MODEL.generate("ab", 1, top_k=1, seed=1, return_type="tokens"))
    assert MODEL("abcd", stop_at_layer=number).equal(MODEL("abcd", stop_at_layer=1))
    assert VIEW.codebook(number, k=number).equals(VIEW.codebook(1, k=1))
    assert MODEL.to_single_str_token(number) == MODEL.to_single_str_token(1)
    position, last = (metrics.target_prob(number, position=at).of_logits(MODEL, LOGITS[:, :2]) for at in (number, -1))
    assert position.equal(last)
    rl.sweep(MODEL, *PAIR, "tokens", kl(), mode="integrated", steps=number, memory=np.float32(1e6))
    assert collect(k=number, positions=slice(number, None), threshold=torch.tensor(0.5)).choices.positions[0] == 1
    assert growth(sizes=[number]).frame["size"].tolist() == [1]


@pytest.mark.parametrize(
    ("name", "argument", "message"),
    [
        ("forward start_at_layer", 1.0, "start_at_layer must be a block's number, 0 to 1, got 1.0"),
        ("forward stop_at_layer", "2", "stop_at_layer must be a block's number, 0 to 1, got '2'"),
        ("forward past_kv_cache", 5, r"past_kv_cache must be what model.make_cache\(batch\) gives, got 5"),
        ("codebook", 1.0, "no signal 1.0: this view has signals 0 to 31"),
        ("codebook k", -1, "k must be an integer and at least 1, got -1"),
        ("to_single_token", 5, "the text of a token was expected, got 5"),
    ],
)
def test_the_message_names_the_argument_and_what_it_may_be(name: str, argument: Any, message: str) -> None:
    with pytest.raises(ReflowlensError, match=message):
        CALLS[name][0](argument)
