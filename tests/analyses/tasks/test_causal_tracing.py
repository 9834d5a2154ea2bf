"""Causal tracing: as plain hooks on each prompt alone have it, and a fact that one MLP of a planted model stores."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from analyses.statistics.draws import derive_generator
from analyses.tasks.causal_tracing import ROLES, causal_tracing
from reflowlens.config import ModelConfig
from reflowlens.errors import ReflowlensError
from reflowlens.models import build_model
from reflowlens.prompts import Prompts
from reflowlens.ttt_flow_config import TTTFlowConfig
from tests.support.planted_tasks import remembering_model, subject_prompts
from tests.support.tiny import random_model

ROWS = (("the king said", "king"), ("a kind of it", "kind"), ("no", "n"), ("on the road", "the road"))
PROMPTS = Prompts.of([{"clean": text, "subject": subject, "answer": "a"} for text, subject in ROWS])
SAMPLES = 3


def roles_by_hand(text, subject):
    start = text.index(subject)
    end, last = start + len(subject) - 1, len(text) - 1
    places = [[start], range(start + 1, end), [end], range(end + 1, last), [last]]
    taken = set()
    found = {}
    for role in ("last token", "last subject token", "first subject token", *ROLES):
        found.setdefault(role, [p for p in places[ROLES.index(role)] if p not in taken])
        taken |= set(found[role])
    return found


@pytest.mark.parametrize("name", ["reflow", "gpt2_biased", "llama_untied"])
@torch.no_grad()
def test_effects_are_those_of_plain_hooks_on_each_prompt_alone(name):
    model = random_model(name).eval()
    result = causal_tracing(model, PROMPTS, samples=SAMPLES, window=2, noise=1.5, progress=False)
    effects, measured = result.frames["effects"], result.frames["prompts"]
    caches = [model.run_with_cache(text)[1] for text, _ in ROWS]
    subject_places = [range(text.index(s), text.index(s) + len(s)) for text, s in ROWS]
    embedded = [cache["hook_embed"][0, list(places)] for cache, places in zip(caches, subject_places, strict=True)]
    spread = 1.5 * torch.cat(embedded).std()
    answer = model.to_single_token("a")

    for row, ((text, subject), cache) in enumerate(zip(ROWS, caches, strict=True)):
        places = list(subject_places[row])
        noise = spread * torch.randn(SAMPLES, len(places), 32, generator=derive_generator(0, "causal_tracing", text))

        def probability(restored, sample, noise=noise, places=places, text=text, cache=cache):
            def add(x, hook):
                x = x.clone()
                x[0, places] += noise[sample]
                return x

            def put(x, hook):
                x = x.clone()
                x[0, restored[1]] = cache[hook.name][0, restored[1]]
                return x

            hooks = [("hook_embed", add), *((point, put) for point in restored[0])]
            logits = model.run_with_hooks(text, fwd_hooks=hooks)[0, -1, : model.tokenizer.n_vocab]
            return float(logits.softmax(0)[answer])

        def mean(points, at, probability=probability):
            return np.mean([probability((points, at), sample) for sample in range(SAMPLES)])

        corrupted = mean([], [])
        assert measured["corrupted"][row] == pytest.approx(corrupted, rel=1e-4)
        for role, at in roles_by_hand(text, subject).items():
            found = effects.query("prompt == @row and role == @role").set_index(["kind", "layer"])["effect"]
            if not at:
                assert found.empty
                continue
            for kind, layer, points in (
                ("state", 1, ["blocks.1.hook_resid_pre"]),
                ("mlp", 1, ["blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out"]),
                ("attn", 0, ["blocks.0.hook_attn_out"]),
            ):
                expected = mean(points, at) - corrupted
                assert found[kind, layer] == pytest.approx(expected, rel=1e-3, abs=1e-6), (text, role, kind)


def test_the_mlp_that_stores_the_fact_is_found_at_the_subject_and_the_head_at_the_last_token():
    result = causal_tracing(remembering_model(), subject_prompts(48), samples=5, window=1, progress=False)
    total = result.metrics["total_effect"]
    assert result.notes[0].startswith("total effect")
    assert "mlp_peak is at layer 1, last subject token" in "; ".join(result.notes)
    assert "attn_peak is at layer 2, last token" in "; ".join(result.notes)
    assert dict(result.verdicts) == dict.fromkeys(("total_effect", "state_peak", "mlp_peak", "attn_peak"), "supported")
    assert total > 10 * result.controls["total_effect"]["other_tokens"]
    effect = result.frames["trace"].set_index(["kind", "layer", "role"])["effect"]
    for layer in range(4):  # the fact moves from the subject to the end in layer 2
        subject, last = effect["state", layer, "last subject token"], effect["state", layer, "last token"]
        assert (subject, last) == pytest.approx((total, 0) if layer < 3 else (0, total), abs=0.05)
    assert effect["attn", 2, "last token"] == pytest.approx(total)
    assert effect["mlp", 1, "last subject token"] > 0.5 * total
    rest = effect["mlp"].drop((1, "last subject token"))
    assert rest.abs().max() < 0.1 * total


def test_where_the_subject_does_not_matter_there_is_nothing_to_trace():
    result = causal_tracing(remembering_model(works=False), subject_prompts(24), samples=2, progress=False)
    assert result.notes[0].endswith("There is no total effect to trace: indirect effects below are of nothing")
    assert set(result.verdicts.values()) == {"not supported"}
    assert result.metrics["total_effect"] == pytest.approx(0, abs=1e-6)


def test_levels_have_states_alone_and_what_starts_from_tokens_is_refused():
    sizes = {"n_layers": 2, "d_model": 16, "n_heads": 2, "d_mlp": 48, "d_vocab": 256, "n_ctx": 32}
    bdh = build_model(
        ModelConfig(architecture="bdh", d_head=24, tie_word_embeddings=False, tokenizer_name="bytes", **sizes)
    )
    result = causal_tracing(bdh.eval(), PROMPTS, samples=2, measured="logit_diff", progress=False)
    assert [*result.figures] == ["state"]
    own = TTTFlowConfig(ttt_heads=2, ttt_chunk=4, flow_width=6, value_layers=2, exclusive_layers=2, rotary_channels=4)
    refined = build_model(ModelConfig(architecture="ttt_flow", d_head=8, ttt_flow=own, tokenizer_name="bytes", **sizes))
    with pytest.raises(ReflowlensError, match="starts from tokens"):
        causal_tracing(refined, PROMPTS)
