"""Directions added to the stream of many rows at once, against whole passes."""

from __future__ import annotations

import pytest
import torch

import reflowlens as rl
from reflowlens.errors import ReflowlensError
from reflowlens.sweeps.injections import Injections, steer


@pytest.mark.parametrize("where", ["last", "all", " a"])
def test_injections_equal_whole_passes(model, where):
    text = ["a cat a dog", "a b"] if where != " a" else ["xa", "yya"]
    where = "a" if where == " a" else where
    runs = Injections(model, text, where)
    changes = torch.randn(4, model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    prompt = torch.tensor([0, 1, 1, 0])
    for layer in runs.layers:
        actual = runs.final(layer, prompt, changes)
        for i, row in enumerate(prompt.tolist()):
            position = slice(int(runs.start[row]), None)
            end = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
            with rl.intervene(model, steer(model, layer, changes[i], 1.0, position)):
                _, cache = model.run_with_cache(text[row], names_filter=end)
            expected = cache[end].reshape(-1, model.cfg.d_model)[-1]
            torch.testing.assert_close(actual[i], expected, rtol=1e-5, atol=1e-5)


def test_rows_of_several_layers_are_those_of_each_layer(model):
    runs = Injections(model, ["a cat a dog", "a b"])
    generator = torch.Generator().manual_seed(0)
    changes = torch.randn(8, model.cfg.d_model, generator=generator)
    prompt, layer = torch.arange(8) % 2, torch.randint(len(runs.layers), (8,), generator=generator)
    together = runs.final(layer, prompt, changes)
    for row in range(8):
        alone = runs.final(int(layer[row]), prompt[row : row + 1], changes[row : row + 1])
        torch.testing.assert_close(together[row], alone[0], rtol=1e-5, atol=1e-5)


def test_hooks_and_prompts_without_the_token_are_errors(model):
    with pytest.raises(ReflowlensError, match="'a cat' has no token 'd' to steer from"):
        Injections(model, ["a cat"], "d")
    with rl.intervene(model, rl.Ablate("resid_pre", layer=0)):
        model("a cat")
        with pytest.raises(ReflowlensError, match="remove hooks"):
            Injections(model, ["a cat"])


def test_a_direction_from_a_role_on(tiny_models):
    model, prompts = tiny_models["gpt2"], rl.Prompts.of([{"clean": "abcd", "r": "b"}, {"clean": "xyz", "r": "z"}])
    direction = torch.linspace(-1, 1, 32)
    final = Injections(model, prompts, "r").final(1, torch.arange(2), direction.expand(2, -1))
    for row, position in enumerate([slice(1, None), slice(2, None)]):
        with rl.intervene(model, steer(model, 1, direction, 1.0, position)):
            _, cache = model.run_with_cache(prompts.clean[row])
        torch.testing.assert_close(final[row], cache["resid_post", 1][0, -1], rtol=1e-5, atol=1e-5)
