"""What programs written for TransformerLens ask of a model by its names: the values that they mean there."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import Tensor
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache
from transformer_lens.head_detector import detect_head

import reflowlens as rl
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from tests.support.tiny import assert_close, random_tokens

TEXTS = ["The king and", "A cat", "Hello, you"]


# -------------------------------------------------------------------------------------------------------------- padding


def test_texts_padded_on_the_left_are_read_as_alone(model: HookedModel) -> None:
    logits = model(TEXTS, padding_side="left")
    tokens = model.to_tokens(TEXTS, padding_side="left")
    _, lengths = model.tokens_and_lengths(TEXTS)
    for row, text, n in zip(logits, TEXTS, lengths, strict=True):
        assert_close(row[-n:], model(text)[0])
    mask = torch.tensor([[0] * (max(lengths) - n) + [1] * n for n in lengths])
    assert_close(model(tokens, attention_mask=mask), logits)
    assert_close(model(tokens, "loss", attention_mask=mask), model(TEXTS, "loss"))
    _, cache = model.run_with_cache(tokens, attention_mask=mask, names_filter="ln_final.hook_normalized")
    alone = model.run_with_cache(TEXTS[1], names_filter="ln_final.hook_normalized")[1]
    assert_close(cache["ln_final.hook_normalized"][1, -lengths[1] :], alone["ln_final.hook_normalized"][0])


def test_masks_of_padding_on_the_right(model: HookedModel) -> None:
    tokens, lengths = model.tokens_and_lengths(TEXTS)
    mask = torch.arange(tokens.shape[1])[None] < torch.tensor(lengths)[:, None]
    logits = model(tokens, attention_mask=mask)
    for row, text, n in zip(logits, TEXTS, lengths, strict=True):
        assert_close(row[:n], model(text)[0])
    assert_close(model(tokens, attention_mask=torch.ones_like(tokens)), model(tokens))


def test_padded_rows_continue_their_own_tokens(model: HookedModel) -> None:
    tokens = model.to_tokens(TEXTS, padding_side="left")
    _, lengths = model.tokens_and_lengths(TEXTS)
    mask = torch.tensor([[0] * (max(lengths) - n) + [1] * n for n in lengths])
    settings = {"max_new_tokens": 3, "do_sample": False, "stop_at_eos": False, "return_type": "tokens"}
    assert (
        model.generate(tokens, attention_mask=mask, **settings).tolist() == model.generate(TEXTS, **settings).tolist()
    )


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.tensor([[1, 0, 1]]), "must leave every text in one piece"),
        (torch.tensor([[0, 0, 0]]), "must leave every text in one piece"),
        (torch.tensor([[1, 2, 1]]), "must be 1 at a text's own tokens and 0 at padding"),
        (torch.tensor([[1, 1]]), r"must be a tensor \[batch, pos\] = \[1, 3\], got \[1, 2\]"),
        ([[1, 1, 1]], r"must be a tensor \[batch, pos\]"),
    ],
)
def test_masks_that_are_none(mask: Tensor, message: str) -> None:
    model = rl.build_model(rl.PRESETS["reflow_1_small"], device="meta")
    with pytest.raises(ReflowlensError, match=message):
        model(torch.zeros(1, 3, dtype=torch.long), attention_mask=mask)


def test_masks_with_what_they_cannot_go_with(model: HookedModel) -> None:
    tokens = random_tokens(model.cfg, batch=1, pos=4)
    mask = torch.tensor([[0, 1, 1, 1]])
    with pytest.raises(ReflowlensError, match="padding cannot be read with a key-value cache"):
        model(tokens, attention_mask=mask, past_kv_cache=model.make_cache(1))
    with pytest.raises(ReflowlensError, match="segments say what is padding"):
        model(tokens, attention_mask=mask, segments=torch.zeros_like(tokens))
    with pytest.raises(ReflowlensError, match="padding_side must be 'left' or 'right'"):
        model("a", padding_side="middle")
    with pytest.raises(ReflowlensError, match="past_kv_cache must be what"):
        model(tokens, past_kv_cache=TransformerLensKeyValueCache([], torch.zeros(1, 0)))


# --------------------------------------------------------------------------------------------------- losses, sampling


def test_losses_per_token(model: HookedModel) -> None:
    tokens = random_tokens(model.cfg, batch=2, pos=6)
    losses = model(tokens, "loss", loss_per_token=True)
    logits = model(tokens)[:, :-1]
    assert_close(losses, torch.nn.functional.cross_entropy(logits.mT, tokens[:, 1:], reduction="none"))
    assert_close(model(tokens, "both", loss_per_token=True)[1], losses)
    ragged = model(TEXTS, "loss", loss_per_token=True)
    _, lengths = model.tokens_and_lengths(TEXTS)
    assert (ragged != 0).sum(1).tolist() == [n - 1 for n in lengths]


def test_settings_of_generation(model: HookedModel) -> None:
    greedy = model.generate("The king", 5, temperature=0, stop_at_eos=False, return_type="tokens")
    settings = {"do_sample": False, "return_type": "tokens", "verbose": False}
    assert model.generate("The king", 5, stop_at_eos=False, **settings).tolist() == greedy.tolist()
    n = model.to_tokens("The king").shape[1]
    end = int(greedy[0, n + 1])
    expected = greedy[0, : n + 1 + (int(greedy[0, n]) != end)].tolist()
    assert model.generate("The king", 5, eos_token_id=end, **settings)[0].tolist() == expected
    assert model.generate("The king", 5, eos_token_id=[end], **settings)[0].tolist() == expected
    with pytest.raises(ReflowlensError, match="eos_token_id must be a token's text or its id"):
        model.generate("The king", 5, eos_token_id=-1)


# --------------------------------------------------------------------------------------------------- tokens and sizes


def test_tokens_of_several_texts(model: HookedModel) -> None:
    assert model.to_str_tokens(TEXTS) == [model.to_str_tokens(text) for text in TEXTS]
    text = "a king, a king"
    pieces = model.to_str_tokens(text)
    for mode, expected in (("first", pieces.index(pieces[-1])), ("last", len(pieces) - 1)):
        assert model.get_token_position(pieces[-1], text, mode) == expected
        assert model.get_token_position(model.to_single_token(pieces[-1]), model.to_tokens(text), mode) == expected
    with pytest.raises(ReflowlensError, match="does not occur"):
        model.get_token_position("Z", text)
    with pytest.raises(ReflowlensError, match="in one text, got 3"):
        model.get_token_position("Z", TEXTS)


def test_sizes_and_switches(model: HookedModel) -> None:
    assert model.n_params_total == sum(parameter.numel() for parameter in model.parameters())
    grouped = model.cfg.kv_heads != model.cfg.n_heads
    with pytest.raises(ReflowlensError, match="share keys and values") if grouped else contextlib.nullcontext():
        model.set_use_attn_in(True)
    assert model.cfg.use_attn_in is not grouped
    model.set_use_attn_in(False)


# ---------------------------------------------------------------------------------------------------------- patterns


def test_patterns_follow_from_what_is_cached(model: HookedModel) -> None:
    tokens = random_tokens(model.cfg, batch=2, pos=6)
    _, cache = model.run_with_cache(tokens)
    _, full = model.run_with_cache(tokens, names_filter=lambda name: name.endswith("pattern"))
    for layer in range(model.cfg.n_layers):
        assert "blocks.0.attn.hook_pattern" not in cache
        assert_close(cache["pattern", layer], full["pattern", layer])
        assert_close(cache["pattern", layer, "attn"], full["pattern", layer])
    _, alone = model.run_with_cache(tokens[:1], remove_batch_dim=True)
    assert_close(alone["pattern", 0], full["pattern", 0][0])


def test_patterns_that_do_not_follow(model: HookedModel) -> None:
    tokens = random_tokens(model.cfg, batch=1, pos=6)
    segments = torch.tensor([[0, 0, 0, 1, 1, 1]])
    passes = [{"segments": segments}, {"pos_slice": 2}, {"names_filter": "hook_embed"}, {"dtype": torch.bfloat16}]
    for settings in passes:
        _, cache = model.run_with_cache(tokens, **settings)
        with pytest.raises(ReflowlensError, match="hook_pattern' is not in this cache"):
            cache["pattern", 0]
    with model.hooks([("blocks.0.attn.hook_pattern", lambda pattern, hook: torch.zeros_like(pattern))]):
        _, cache = model.run_with_cache(tokens)
    with pytest.raises(ReflowlensError, match="hook_pattern' is not in this cache"):
        cache["pattern", 0]


@pytest.mark.parametrize("kind", ["previous_token_head", "duplicate_token_head", "induction_head"])
def test_head_detector(model: HookedModel, kind: str) -> None:
    text = "a king, a king"
    scores = detect_head(model, text, kind)
    _, full = model.run_with_cache(text, names_filter=lambda name: name.endswith("pattern"))
    assert scores.shape == (model.cfg.n_layers, model.cfg.n_heads)
    if kind == "previous_token_head":
        pattern = torch.stack([full["pattern", layer][0] for layer in range(model.cfg.n_layers)])
        previous = torch.diagonal(pattern, offset=-1, dim1=-2, dim2=-1).sum(-1)
        assert_close(scores, previous / pattern.sum((-2, -1)))


def test_what_a_configuration_tells(model: HookedModel) -> None:
    assert model.cfg.dtype == torch.float32
    assert copy.deepcopy(model).bfloat16().cfg.dtype == torch.bfloat16
    assert model.cfg.default_prepend_bos is False
    assert_close(model.unembed.b_U, model.b_U)
    assert ("unembed.b_U" in model.state_dict()) is model.cfg.unembed_bias


@pytest.mark.parametrize("position", ["last", -1, 0])
def test_padding_and_interventions(model: HookedModel, position: int | str) -> None:
    """Positions count in each row's own tokens, or it is an error that they would not."""
    tokens, lengths = model.tokens_and_lengths(TEXTS)
    mask = torch.arange(tokens.shape[1])[None] < torch.tensor(lengths)[:, None]
    zeroed = rl.Ablate("resid_pre", layer=0, position=position)
    with rl.intervene(model, [zeroed]):
        logits = model(tokens, attention_mask=mask)
        with pytest.raises(ReflowlensError, match="positions count from the beginning of a row"):
            model(TEXTS, padding_side="left")
        with pytest.raises(ReflowlensError, match="positions count from the beginning of a row"):
            model(model.to_tokens(TEXTS, padding_side="left"), attention_mask=mask.flip(1))
    for row, text, n in zip(logits, TEXTS, lengths, strict=True):
        assert_close(row[:n], rl.run(model, text, zeroed)[0])


def test_patterns_are_those_of_the_pass_whatever_is_attached_since(model: HookedModel) -> None:
    tokens = random_tokens(model.cfg, batch=1, pos=6)
    _, clean = model.run_with_cache(tokens)
    _, full = model.run_with_cache(tokens, names_filter=lambda name: name.endswith("pattern"))
    name = "blocks.0.attn.hook_pattern"
    with model.hooks([(name, lambda pattern, hook: pattern * 0.5)]):
        assert_close(clean["pattern", 0], full["pattern", 0])
        model(tokens)
    with model.hooks([(name, lambda pattern, hook: clean[hook.name])]):
        assert_close(model(tokens), model(tokens))


def test_one_row_has_a_mask_of_one_axis(model: HookedModel) -> None:
    tokens = random_tokens(model.cfg, batch=1, pos=6)[0]
    assert_close(model(tokens, attention_mask=torch.ones(6, dtype=torch.long)), model(tokens))
    with pytest.raises(ReflowlensError, match="padding_side must be"):
        model.to_tokens("a", padding_side="middle")


def test_ends_as_text_are_one_token(model: HookedModel) -> None:
    end = int(model.generate("The king", 1, temperature=0, stop_at_eos=False, return_type="tokens")[0, -1])
    if end < 128:  # a byte that is a text
        row = model.generate("The king", 5, temperature=0, eos_token_id=chr(end), return_type="tokens")[0]
        assert row.tolist()[8:] == [end]
    with pytest.raises(ReflowlensError, match="not a single token"):
        model.generate("The king", 5, eos_token_id="ab")
