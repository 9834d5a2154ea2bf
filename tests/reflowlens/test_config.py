from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reflowlens.config import ARCHITECTURES, PRESETS, ModelConfig, RotaryScaling, preset
from reflowlens.errors import ReflowlensError
from reflowlens.models import build_model
from tests.support.tiny import CONFIGS, tiny_config

SCALING: dict[str, Any] = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_context": 8192,
}
# Published in millions to two decimals; the exact counts are derived from the shapes.
COUNTS = {
    "gpt2": (505_619_456, 505.62),
    "gpt2_new": (514_008_064, 514.01),
    "reflow_1": (463_668_224, 463.67),
    "reflow_1_big": (515_056_640, 515.06),
    "reflow_1_topk_big": (515_056_640, 515.06),
    "reflow_1_lite": (413_336_576, 413.34),
    "reflow_1_small": (46_471_680, 46.47),
    "bdh": (25_296_896, 25.30),
    "tiny_transcoder_gpt": (57_816_145, 57.82),
    "ttt_flow_10l": (25_749_398, 25.75),
    "ttt_flow_11l": (28_110_750, 28.11),
}


@pytest.mark.parametrize("name", COUNTS)
def test_presets_have_the_published_numbers_of_parameters(name: str) -> None:
    model = build_model(name, device="meta")
    exact, published = COUNTS[name]
    assert model.n_parameters == exact
    assert round(exact / 1e6, 2) == published
    assert model.cfg.model_name == name
    assert model.cfg.n_ctx == {"bdh": 4096, "tiny_transcoder_gpt": 64, "ttt_flow_10l": 2048, "ttt_flow_11l": 2048}.get(
        name, 1024
    )
    assert all(parameter.is_meta for parameter in model.parameters())


def test_every_preset_is_listed() -> None:
    assert set(PRESETS) == set(COUNTS)


@given(
    d_model=st.integers(1, 64),
    n_layers=st.integers(1, 4),
    heads=st.sampled_from([(1, 1), (4, 1), (4, 2), (4, 4)]),
    d_head=st.integers(1, 8).map(lambda n: 2 * n),
    d_mlp=st.integers(1, 64),
    d_vocab=st.integers(1, 64),
    n_signals=st.integers(1, 64),
)
def test_number_of_parameters(
    d_model: int, n_layers: int, heads: tuple[int, int], d_head: int, d_mlp: int, d_vocab: int, n_signals: int
) -> None:
    """V S + S d for the embedding; a layer has q, o, k and v, three MLP matrices and two norms; one norm at the end."""
    cfg = tiny_config(
        "reflow_lite",
        d_model=d_model,
        n_layers=n_layers,
        n_heads=heads[0],
        n_key_value_heads=heads[1],
        d_head=d_head,
        d_mlp=d_mlp,
        d_vocab=d_vocab,
        n_signals=n_signals,
    )
    attention = 2 * d_model * (heads[0] + heads[1]) * d_head
    layer = attention + 3 * d_model * d_mlp + 2 * d_model
    expected = d_vocab * n_signals + n_signals * d_model + n_layers * layer + d_model
    assert build_model(cfg, device="meta").n_parameters == expected


def test_what_an_architecture_fixes() -> None:
    gpt2, gpt2_new, reflow = (CONFIGS[name] for name in ("gpt2", "gpt2_new", "reflow"))
    assert (gpt2.act_fn, gpt2.gated_mlp, gpt2.normalization_type, gpt2.eps) == ("gelu", False, "LN", 1e-5)
    assert gpt2.positional_embedding_type == "standard"
    for cfg in (gpt2_new, reflow):
        assert (cfg.act_fn, cfg.gated_mlp, cfg.normalization_type, cfg.eps) == ("silu", True, "RMS", 1e-6)
        assert cfg.positional_embedding_type == "rotary"
    assert reflow.rotary_adjacent_pairs
    assert not gpt2_new.rotary_adjacent_pairs
    assert dataclasses.replace(reflow, rotary_adjacent_pairs=False).rotary_adjacent_pairs is False


@pytest.mark.parametrize("cfg", [*CONFIGS.values(), *PRESETS.values()], ids=[*CONFIGS, *PRESETS])
def test_a_configuration_survives_json(cfg: ModelConfig) -> None:
    assert ModelConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg
    assert "device" not in cfg.to_dict()


@pytest.mark.parametrize(
    ("field", "value", "also"),
    [
        ("architecture", "mamba", ARCHITECTURES),
        ("act_fn", "swish", ("'gelu'", "'silu'")),
        ("normalization_type", "BN", ("'LN'", "'RMS'")),
        ("positional_embedding_type", "alibi", ("'standard'", "'rotary'")),
        ("tokenizer_name", "llama", ("'gpt2'", "'gpt2_16k'", "'bytes'")),
        ("basis_init", "zero", ("'orthogonal'", "'gpt2'")),
        ("n_layers", 0, ("positive integer",)),
        ("d_model", 3.5, ("positive integer",)),
        ("n_ctx", "long", ("positive integer",)),
        ("d_vocab", True, ("positive integer",)),
        ("eps", "1e-6", ("positive number",)),
        ("rotary_base", -1.0, ("positive number",)),
        ("initializer_range", float("nan"), ("positive number",)),
        ("n_key_value_heads", 3, ("n_heads=4",)),
        ("n_key_value_heads", -2, ("positive integer",)),
        ("n_key_value_heads", 2.0, ("positive integer",)),
        ("d_head", 7, ("even",)),
        ("n_signals", None, ("'reflow'",)),
        ("n_signals", -5, ("positive integer",)),
        ("n_signals", "many", ("positive integer",)),
        ("topk", 4, ("reflow_topk",)),
        ("topk_ends", "input", ("'both'", "reflow_topk")),
        ("topk_ends", "middle", ("'both'", "'input'", "'output'")),
        ("topk_gradient", "straight_through", ("'kept'", "reflow_topk")),
        ("topk_gradient", "all", ("'kept'", "'straight_through'")),
        ("norm_bias", "yes", ("False", "True")),
        ("gated_mlp", "False", ("must be True or False (in TOML true or false), got 'False'",)),
        ("rotary_adjacent_pairs", "False", ("True or False",)),
        ("qkv_bias", 1, ("True or False",)),
        ("use_attn_result", "no", ("True or False",)),
        ("tie_word_embeddings", False, ("'reflow'", "both ends")),
        ("unembed_bias", True, ("tie_word_embeddings=True",)),
        ("unembed_bias", "yes", ("True or False",)),
        ("scale_residual_init", 0, ("True or False",)),
        ("dropout", 1.0, ("from 0 to below 1",)),
        ("rotary_scaling", 4.0, ("RotaryScaling",)),
        ("rotary_scaling", {"factor": 4.0}, ("low_freq_factor",)),
        ("rotary_scaling", SCALING | {"factor": 0}, ("positive number",)),
        ("rotary_scaling", SCALING | {"low_freq_factor": 8.0}, ("high_freq_factor=4.0",)),
        ("attn_scale", 0.0, ("None or a positive number",)),
        ("window_size", 0, ("positive integer",)),
        ("attn_types", ["local"], ("window_size",)),
        ("attn_types", ("near",), ("'global' and 'local'",)),
        ("rotary_dim", 3, ("even number from 2 to d_head=8",)),
        ("rotary_layers", (1,), ("True and False",)),
        ("rotary_linear_factor", 0, ("positive number",)),
        ("rotary_base_local", 10.0, ("window_size",)),
        ("parallel_shared_ln", True, ("parallel_attn_mlp=True",)),
        ("qk_norm_over_heads", True, ("use_qk_norm=True",)),
        ("embed_scale", 2.0, ("not factored",)),
        ("output_logits_soft_cap", 30.0, ("not factored",)),
    ],
)
def test_errors_name_the_field_and_what_is_allowed(field: str, value: Any, also: tuple[str, ...]) -> None:
    with pytest.raises(ReflowlensError) as error:
        tiny_config("reflow", **{field: value})
    assert str(error.value).startswith(field)
    assert all(text in str(error.value) for text in also)


def test_what_few_models_have_is_not_told_of_others() -> None:
    """A configuration from before these fields reads as it did, and its description, which is hashed, is the same."""
    of_few = {"norm_bias", "qkv_bias", "attn_out_bias", "mlp_bias", "tie_word_embeddings", "rotary_scaling"}
    of_few |= {"dropout", "unembed_bias", "scale_residual_init", "topk_ends", "topk_gradient"}
    others = ("bdh", "tiny_transcoder_gpt")
    for cfg in (*(cfg for name, cfg in PRESETS.items() if name not in others), CONFIGS["reflow"]):
        assert not of_few & set(cfg.to_dict())
    absent = of_few - set(PRESETS["tiny_transcoder_gpt"].to_dict())
    assert absent == {"qkv_bias", "rotary_scaling", "topk_ends", "topk_gradient"}
    assert "topk_ends" in CONFIGS["reflow_topk_input"].to_dict()
    assert {"qkv_bias", "tie_word_embeddings", "rotary_scaling"} < set(CONFIGS["llama_untied"].to_dict())
    cfg = tiny_config("llama_untied", rotary_scaling=SCALING)
    assert cfg.rotary_scaling == RotaryScaling(**SCALING)


@pytest.mark.parametrize("topk", [None, 0, 41, 2.5, "six"])
def test_topk_must_fit_the_signals(topk: Any) -> None:
    with pytest.raises(ReflowlensError, match="topk must be an integer between 1 and n_signals=40"):
        tiny_config("reflow_topk", topk=topk)


def test_a_model_that_is_not_factored_has_no_signals() -> None:
    with pytest.raises(ReflowlensError, match="n_signals must be None for architecture 'gpt2'"):
        tiny_config("gpt2", n_signals=4)


def test_unknown_names_come_with_the_nearest() -> None:
    fields = CONFIGS["gpt2"].to_dict()
    with pytest.raises(ReflowlensError, match="unknown model field 'n_layer'; did you mean 'n_layers'"):
        ModelConfig.from_dict(fields | {"n_layer": 2})
    with pytest.raises(ReflowlensError, match="lacks d_head, d_model"):
        ModelConfig.from_dict({name: value for name, value in fields.items() if name not in ("d_head", "d_model")})
    with pytest.raises(ReflowlensError, match=r"'reflow_small'; did you mean 'reflow_1_small'.*Presets: gpt2, "):
        preset("reflow_small")
