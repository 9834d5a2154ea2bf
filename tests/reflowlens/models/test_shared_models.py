"""Blocks that change one model: overlapping in one thread, and beside other threads."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import reflowlens as rl
from reflowlens.errors import ReflowlensError
from reflowlens.metrics import logit_diff
from reflowlens.models.base import HookedModel
from tests.support.tiny import random_model, random_tokens

TOKENS = random_tokens(random_model("reflow").cfg)
ABLATE, SCALE = rl.Ablate("z", layer=0, position="last"), rl.Scale("mlp_out", 3.0, layer=1)
DOUBLE, SILENCE = rl.ScaleWeights("embed.W_recipe", 2.0, rows="a"), rl.ScaleWeights("embed.W_recipe", 0.0, columns=3)


@pytest.fixture
def reflow() -> HookedModel:
    return random_model("reflow")


def hooked(model: HookedModel, factor: float) -> Any:
    return model.hooks([("hook_embed", lambda x, hook: factor * x)])


BLOCKS: list[Callable[[HookedModel], tuple[Any, Any]]] = [
    lambda model: (rl.intervene(model, ABLATE), rl.intervene(model, SCALE)),
    lambda model: (hooked(model, 2.0), hooked(model, -1.0)),
    lambda model: (hooked(model, 2.0), rl.intervene(model, SCALE)),
    lambda model: (rl.intervene(model, ABLATE), hooked(model, -1.0)),
]


@pytest.mark.parametrize("blocks", BLOCKS)
@torch.no_grad()
def test_blocks_closed_in_the_order_of_opening_undo_their_own(reflow: HookedModel, blocks: Callable) -> None:
    plain = reflow(TOKENS)
    with blocks(reflow)[1]:
        second_alone = reflow(TOKENS)
    first, second = blocks(reflow)
    first.__enter__()
    second.__enter__()
    reflow(TOKENS)
    first.__exit__(None, None, None)
    assert torch.equal(reflow(TOKENS), second_alone)
    second.__exit__(None, None, None)
    assert torch.equal(reflow(TOKENS), plain)
    assert not any(point.fwd_hooks for point in reflow.hook_dict.values())
    assert "forward" not in reflow.__dict__


@torch.no_grad()
def test_compiled_models_run_uncompiled_until_the_last_block_closes(reflow: HookedModel) -> None:
    compiled_passes = 0

    def backend(graph: Any, example_inputs: Any) -> Any:
        def call(*args: Any) -> Any:
            nonlocal compiled_passes
            compiled_passes += 1
            return graph.forward(*args)

        return call

    compiled, scaled = torch.compile(reflow, backend=backend), rl.run(reflow, TOKENS, SCALE)
    first, second = rl.intervene(compiled, ABLATE), rl.intervene(compiled, SCALE)
    first.__enter__()
    second.__enter__()
    compiled(TOKENS)
    first.__exit__(None, None, None)
    assert torch.equal(compiled(TOKENS), scaled)
    second.__exit__(None, None, None)
    assert compiled_passes == 0
    compiled(TOKENS)
    assert compiled_passes > 0
    torch.compiler.reset()


def test_edits_closed_in_the_order_of_opening_are_undone_and_told(reflow: HookedModel) -> None:
    """The two overlap in one entry: undone one by one in this order, it would be left changed."""
    before = rl.model_hash(reflow)
    first, second = rl.edit(reflow, DOUBLE), rl.edit(reflow, SILENCE)
    first.__enter__()
    second.__enter__()
    with pytest.raises(ReflowlensError, match="closed before one that was opened later"):
        first.__exit__(None, None, None)
    assert rl.model_hash(reflow) == before
    with rl.edit(reflow, SILENCE):
        silenced = rl.model_hash(reflow)
        second.__exit__(None, None, None)  # it has been undone, and undoes nothing of others
        assert rl.model_hash(reflow) == silenced
    assert rl.model_hash(reflow) == before


def test_nested_edits_are_undone_one_by_one(reflow: HookedModel) -> None:
    before = rl.model_hash(reflow)
    with rl.edit(reflow, DOUBLE):
        doubled = rl.model_hash(reflow)
        with pytest.raises(RuntimeError, match="mine"), rl.edit(reflow, SILENCE):
            raise RuntimeError("mine")
        assert rl.model_hash(reflow) == doubled != before
    assert rl.model_hash(reflow) == before


# ------------------------------------------------------------------------------------------------------------- threads


@pytest.fixture
def elsewhere() -> Iterator[Callable[..., Any]]:
    """Calls a function in another thread and gives its result, or its error."""
    with ThreadPoolExecutor(1) as pool:
        yield lambda function, *args: pool.submit(function, *args).result()


def edited(model: HookedModel) -> None:
    with rl.edit(model, DOUBLE):
        pass


USES: dict[str, Callable[[HookedModel], Any]] = {
    "pass": lambda model: model(TOKENS),
    "generate": lambda model: model.generate(TOKENS, 2, return_type="tokens"),
    "run_with_cache": lambda model: model.run_with_cache(TOKENS),
    "run": lambda model: rl.run(model, TOKENS, ABLATE),
    "edit": edited,
    "collect": lambda model: rl.collect(model, TOKENS, "hook_embed"),
    "sweep": lambda model: rl.sweep(model, None, TOKENS, ABLATE, logit_diff(1, 2)),
    "ablate_readout": lambda model: rl.ablate_readout(model, TOKENS),
}
READERS = ("pass", "generate")
CHANGES: dict[str, Callable[[HookedModel], Any]] = {
    "intervene": lambda model: rl.intervene(model, rl.Ablate("z", layer=0)),
    "hooks": lambda model: hooked(model, 2.0),
    "edit": lambda model: rl.edit(model, DOUBLE),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("change", CHANGES)
def test_what_one_thread_changes_no_other_uses(
    reflow: HookedModel, elsewhere: Callable[..., Any], change: str, use: str
) -> None:
    with CHANGES[change](reflow):
        with pytest.raises(ReflowlensError, match="another thread is using this model"):
            elsewhere(USES[use], reflow)
        elsewhere(USES["pass"], random_model("reflow"))  # which is another model
        reflow(TOKENS)
    elsewhere(USES[use], reflow)


@contextlib.contextmanager
def running_elsewhere(model: HookedModel) -> Iterator[None]:
    """A pass of another thread that stands still in the middle."""
    arrived, go_on = threading.Event(), threading.Event()

    def wait(x: Tensor, hook: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            arrived.set()
            assert go_on.wait(10)

    model.add_hook("blocks.1.hook_resid_pre", wait)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(model, TOKENS)
        assert arrived.wait(10)
        try:
            yield
        finally:
            go_on.set()
            running.result()
            model.reset_hooks()


@pytest.mark.parametrize("use", USES)
def test_a_model_that_runs_in_another_thread_is_not_changed(reflow: HookedModel, use: str) -> None:
    before = rl.model_hash(reflow)
    with running_elsewhere(reflow):
        if use in READERS:
            USES[use](reflow)
        else:
            with pytest.raises(ReflowlensError, match="another thread is using this model"):
                USES[use](reflow)
        USES[use](copy.deepcopy(reflow))
    assert rl.model_hash(reflow) == before
    USES[use](reflow)


def test_many_threads_get_right_numbers_or_none(reflow: HookedModel) -> None:
    with torch.no_grad():
        expected = {"plain": reflow(TOKENS), "ablated": rl.run(reflow, TOKENS, ABLATE)}

    @torch.no_grad()
    def attempt(i: int) -> bool:
        name = ("plain", "ablated")[i % 2]
        try:
            found = reflow(TOKENS) if name == "plain" else rl.run(reflow, TOKENS, ABLATE)
        except ReflowlensError:
            return True
        return torch.equal(found, expected[name])

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(attempt, range(60)))
    assert torch.equal(reflow(TOKENS), expected["plain"])
