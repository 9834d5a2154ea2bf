"""Models built by hand, so that an experiment's answer is known before it runs, and models with nothing in them."""

from __future__ import annotations

import torch

from analyses.lexicon import FactualPrompt, Lexicon
from reflowlens.config import ModelConfig
from reflowlens.models import build_model
from reflowlens.models.base import HookedModel

CONFIG = ModelConfig(
    architecture="reflow",
    n_layers=4,
    d_model=32,
    n_heads=2,
    d_head=16,
    d_mlp=64,
    d_vocab=16768,
    n_ctx=32,
    n_signals=32,
    tokenizer_name="gpt2_16k",
)
WORDS = (
    *("red", "blue", "green", "king", "queen", "house", "river", "stone"),
    *("bread", "water", "city", "France", "light", "music", "horse", "winter"),
)
LEXICON = Lexicon(
    version="planted",
    factual=tuple(FactualPrompt(f"The {other} of the {word}", " Paris") for word in WORDS for other in WORDS[:2]),
    neutral_texts=("The river runs through the city and the house stands by the water.",),
)


def silent_blocks(model: HookedModel, *loud: int) -> HookedModel:
    """Blocks that add nothing to the residual stream, but for the ones named."""
    with torch.no_grad():
        for layer, block in enumerate(model.blocks):
            if layer not in loud:
                block.attn.W_O.zero_()
                block.mlp.W_out.zero_()
    return model


def one_signal_model(seed: int = 0) -> HookedModel:
    """Signal 0 alone carries every prediction, " Paris": B is the identity, tokens enter as signal 0 and noise."""
    model = silent_blocks(build_model(CONFIG, seed=seed))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.embed.W_basis.copy_(torch.eye(32))
        model.embed.W_recipe.normal_(0, 0.05, generator=generator)
        model.embed.W_recipe[:, 0] += 1.0
        model.embed.W_recipe[model.to_single_token(" Paris"), 0] = 3.0
    return model


def empty_model(seed: int = 0) -> HookedModel:
    """Isotropic Gaussian recipes and an orthogonal basis: no rotation of the signals is better than another."""
    model = silent_blocks(build_model(CONFIG, seed=seed))
    with torch.no_grad():
        model.embed.W_recipe.normal_(0, 0.5, generator=torch.Generator().manual_seed(seed))
    return model


def deciding_model(layer: int, seed: int = 0) -> HookedModel:
    """Every block is silent but one, whose MLP adds the direction of " Paris" to every stream: it decides."""
    model = silent_blocks(build_model(CONFIG, seed=seed))
    with torch.no_grad():
        model.embed.W_recipe.normal_(0, 0.5, generator=torch.Generator().manual_seed(seed))
        direction = model.W_U[:, model.to_single_token(" Paris")].clone()
        mlp = model.blocks[layer].mlp
        # A gated MLP has no bias to write with: both inputs read the projection on a shared direction of all tokens.
        shared = model.embed.W_basis.sum(dim=0)
        model.embed.W_recipe += 1.0
        mlp.W_gate.zero_()
        mlp.W_in.zero_()
        mlp.W_gate[:, 0] = shared
        mlp.W_in[:, 0] = shared
        mlp.W_out[0] = direction
    return model
