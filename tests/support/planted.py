"""Models built by hand, so that an experiment's answer is known before it runs, and models with nothing in them."""

from __future__ import annotations

import dataclasses
from itertools import permutations
from typing import Any

import torch

from analyses.words.lexicon import Analogy, FactualPrompt, Lexicon, load_lexicon
from reflowlens.config import ModelConfig
from reflowlens.models import build_model
from reflowlens.models.base import HookedModel
from reflowlens.signals import random_rotation
from reflowlens.tokenizers.by_name import get_tokenizer

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


def typo_lexicon(pairs: int = 24) -> Lexicon:
    """Misspellings of different words whose last tokens differ from each other and from every word."""
    tokenizer, chosen, taken = get_tokenizer(CONFIG.tokenizer_name), [], set()
    for typo in load_lexicon().typos:
        ends = {tokenizer.encode(f" {word}")[-1] for word in (typo.clean, typo.misspelt)}
        if not ends & taken:
            chosen.append(typo)
            taken |= ends
    return Lexicon(version="planted", typos=tuple(chosen[:pairs]))


def correcting_model(layer: int, strength: float = 10.0) -> HookedModel:
    """The MLP of one block adds, to the last token of a misspelling, ``strength`` times the direction of its word.

    Words and last tokens of `typo_lexicon` are orthonormal directions and nothing else is written, so that a
    misspelling has cosine 0 to its word up to that block and strength / √(1 + strength²) behind it.
    """
    cfg = dataclasses.replace(CONFIG, d_model=64, n_signals=64, d_head=32)
    model = silent_blocks(build_model(cfg, seed=0))
    with torch.no_grad():
        model.embed.W_basis.copy_(torch.eye(64))
        mlp = model.blocks[layer].mlp
        for weight in (mlp.W_gate, mlp.W_in, mlp.W_out):
            weight.zero_()
        for i, typo in enumerate(typo_lexicon().typos):
            end = model.tokenizer.encode(f" {typo.misspelt}")[-1]
            word = model.to_single_token(f" {typo.clean}")
            model.embed.W_recipe[[end, word]] = torch.eye(64)[[2 * i, 2 * i + 1]]
            mlp.W_gate[2 * i, i] = mlp.W_in[2 * i, i] = 1.0
            seen = torch.tensor(8.0)  # what a unit vector of 64 dimensions measures behind the norm
            mlp.W_out[i, 2 * i + 1] = strength / (torch.nn.functional.silu(seen) * seen)
    return model


RELAYED = (3, 9, 14, 20, 27)


def relaying_model(layer: int, writer: str, seed: int = 0) -> HookedModel:
    """One block writes the signals `RELAYED`, of which " Paris" is made, by its MLP or its second head (``writer``).

    Every token carries signal 0, by which it is done everywhere alike, and none of `RELAYED`; earlier blocks are
    silent, and later ones write what a fresh model's do.
    """
    model = _made_of_relayed(silent_blocks(build_model(CONFIG, seed=seed), *range(layer, CONFIG.n_layers)), 0.0)
    block = model.blocks[layer]
    with torch.no_grad():
        for weight in (block.attn.W_O, block.mlp.W_gate, block.mlp.W_in, block.mlp.W_out):
            weight.zero_()
        if writer == "mlp":
            block.mlp.W_gate[0, 0] = block.mlp.W_in[0, 0] = 1.0
            block.mlp.W_out[0, list(RELAYED)] = 0.1
        else:
            block.attn.W_V[1].zero_()
            block.attn.W_V[1, 0, 0] = 1.0
            block.attn.W_O[1, 0, list(RELAYED)] = 0.5
    return model


def keeping_model(seed: int = 0) -> HookedModel:
    """Every token carries the signals `RELAYED`, of which " Paris" is made; the blocks write much, and only noise."""
    model = _made_of_relayed(build_model(CONFIG, seed=seed), 2.0)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.W_O.mul_(225)
            block.mlp.W_out.mul_(225)
    return model


def _made_of_relayed(model: HookedModel, elsewhere: float) -> HookedModel:
    """B is the identity; " Paris" has `RELAYED` in its recipe, other tokens ``elsewhere`` times as much, and noise."""
    with torch.no_grad():
        model.embed.W_basis.copy_(torch.eye(32))
        model.embed.W_recipe.normal_(0, 0.05, generator=torch.Generator().manual_seed(0))
        model.embed.W_recipe[:, 0] = 1.0
        model.embed.W_recipe[:, list(RELAYED)] = elsewhere
        model.embed.W_recipe[model.to_single_token(" Paris"), list(RELAYED)] = 1.0 + elsewhere
    return model


def turning_model(seed: int = 0) -> HookedModel:
    """Blocks that write much, and a Gaussian recipe, an orthogonal basis and Gaussian weights: no basis is special."""
    model = build_model(CONFIG, seed=seed)
    with torch.no_grad():
        model.embed.W_recipe.normal_(0, 0.5, generator=torch.Generator().manual_seed(seed))
        for block in model.blocks:
            block.attn.W_O.mul_(200)
            block.mlp.W_out.mul_(2000)
    return model


def of_architecture(architecture: str, **changes: Any) -> ModelConfig:
    """The sizes of `CONFIG` in another architecture, everything else as that has it by default."""
    fields = {name: getattr(CONFIG, name) for name in ("n_layers", "d_model", "n_heads", "d_head", "d_mlp", "d_vocab")}
    own: dict[str, dict[str, int]] = {
        "reflow": {"n_signals": 32},
        "reflow_topk": {"n_signals": 32, "topk": 4},
        "reflow_lite": {"n_signals": 32, "n_key_value_heads": 1},
    }
    fields |= {"n_ctx": CONFIG.n_ctx, "tokenizer_name": CONFIG.tokenizer_name, **own.get(architecture, {}), **changes}
    return ModelConfig(architecture=architecture, **fields)


def sparse_model(active: int, seed: int = 0) -> HookedModel:
    """Every recipe has ``active`` signals of size 1 and random sign, and no other; B is the identity."""
    model = silent_blocks(build_model(CONFIG, seed=seed))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.embed.W_basis.copy_(torch.eye(32))
        recipe = model.embed.W_recipe
        chosen = torch.rand(recipe.shape, generator=generator).argsort(dim=1)[:, :active]
        signs = torch.randint(2, chosen.shape, generator=generator) * 2.0 - 1
        recipe.copy_(torch.zeros_like(recipe).scatter_(1, chosen, signs))
    return model


CATEGORY_NOISE = 0.1


def category_lexicon(categories: int) -> Lexicon:
    """So many categories of the packaged lexicon, twelve words of each, no word twice."""
    tokenizer, chosen, taken = get_tokenizer(CONFIG.tokenizer_name), {}, set()
    for name, words in load_lexicon().categories.items():
        own = [word for word in words if tokenizer.is_single_token(f" {word}") and word not in taken][:12]
        if len(own) == 12 and len(chosen) < categories:
            chosen[name] = tuple(own)
            taken |= set(own)
    return Lexicon(version="planted", categories=chosen)


def category_model(lexicon: Lexicon, seed: int = 0) -> HookedModel:
    """The words of each category have one signal of size 1 of their own, and Gaussian noise of 0.1 in every signal.

    Two words of a category have cosine 1 / (1 + 32 · 0.1²) = 0.76, and of different ones 0. All other tokens are
    Gaussian.
    """
    model = empty_model(seed)
    with torch.no_grad():
        for signal, words in enumerate(lexicon.categories.values()):
            ids = [model.to_single_token(f" {word}") for word in words]
            model.embed.W_recipe[ids] = CATEGORY_NOISE / 0.5 * model.embed.W_recipe[ids]
            model.embed.W_recipe[ids, signal] += 1.0
    return model


ANALOGY_PAIRS = {
    "gender": [("man", "woman"), ("king", "queen"), ("boy", "girl"), ("father", "mother"), ("son", "daughter")],
    "past": [("walking", "walked"), ("running", "ran"), ("going", "went"), ("taking", "took"), ("making", "made")],
    "capital": [("France", "Paris"), ("China", "Beijing"), ("Russia", "Moscow"), ("Japan", "Tokyo")],
}


def planted_analogies() -> list[Analogy]:
    """Every two pairs of a relation, in both orders."""
    return [
        Analogy(relation, a=second, b=first, c=other, expected=answer)
        for relation, pairs in ANALOGY_PAIRS.items()
        for (first, second), (other, answer) in permutations(pairs, 2)
    ]


def analogy_model() -> HookedModel:
    """Each word of `ANALOGY_PAIRS` is what the pair means, minus or plus twice as much of what the relation means.

    The offset makes the words of a pair dissimilar, so that neither c nor a + c finds the answer.
    """
    model = empty_model()
    attributes = random_rotation(32, 1)
    stems = iter(attributes[len(ANALOGY_PAIRS) :])
    with torch.no_grad():
        for offset, pairs in zip(attributes, ANALOGY_PAIRS.values(), strict=False):
            for pair in pairs:
                stem = next(stems)
                for word, sign in zip(pair, (-1, 1), strict=True):
                    model.embed.W_recipe[model.to_single_token(f" {word}")] = stem + sign * 2 * offset
    return model


def low_rank_model(rank: int, weak: float = 0.01, seed: int = 0) -> HookedModel:
    """A basis with ``rank`` singular values of 1, the others ``weak``, and random singular vectors; R is Gaussian."""
    model = empty_model(seed)
    sizes = torch.tensor([1.0] * rank + [weak] * (32 - rank))
    with torch.no_grad():
        model.embed.W_basis.copy_(random_rotation(32, seed + 1) * sizes @ random_rotation(32, seed + 2))
    return model


def gaussian_basis_model(seed: int = 0) -> HookedModel:
    """An `empty_model` whose basis is Gaussian too."""
    model = empty_model(seed)
    with torch.no_grad():
        model.embed.W_basis.normal_(0, 0.2, generator=torch.Generator().manual_seed(seed + 1))
    return model


FEELING, VERDICT = 5, 6


def feeling_model(layer: int, lean: float = 0.1, seed: int = 0) -> HookedModel:
    """The adjectives of `feeling_lexicon` carry `FEELING`, ±1; what follows a carrier is decided by `VERDICT`, ±1 in
    the held-out words, which the MLP of one block writes in proportion to the feeling that it reads.

    Steering along the feeling therefore works up to that block and not behind it. All other words carry
    ``lean`` of it, so that carriers lean to that pole, and a head of block 0 lets the last position feel the mean.
    """
    model = silent_blocks(build_model(CONFIG, seed=seed))
    lexicon, generator = feeling_lexicon(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.embed.W_basis.copy_(torch.eye(32))
        recipe, mlp, attention = model.embed.W_recipe, model.blocks[layer].mlp, model.blocks[0].attn
        recipe.normal_(0, 0.05, generator=generator)
        recipe[:, :7] = torch.tensor([1.0, 0, 0, 0, 0, lean, 0])
        for sign, pole in ((1.0, "positive"), (-1.0, "negative")):
            for word in lexicon.categories[f"{pole}_adjectives"]:
                own = recipe[model.to_single_token(f" {word}")]
                own[FEELING] = sign
                own[7:].normal_(0, 1, generator=generator)
            for word in getattr(lexicon.sentiment, pole):
                own = recipe[model.to_single_token(f" {word}")]
                own[FEELING], own[VERDICT] = 0.0, sign
                own[7:] = 0.0
        for weight in (mlp.W_gate, mlp.W_in, attention.W_Q, attention.W_K, attention.W_V):
            weight.zero_()
        mlp.W_gate[0, 0] = mlp.W_in[FEELING, 0] = 1.0
        mlp.W_out[0, VERDICT] = 1.0
        attention.W_V[0, FEELING, 0] = 1.0
        attention.W_O[0, 0, FEELING] = 0.1
    return model


def feeling_lexicon() -> Lexicon:
    """Carriers, adjectives and held-out words that are one token each, and short neutral texts."""
    lexicon, tokenizer = load_lexicon(), get_tokenizer(CONFIG.tokenizer_name)
    poles = ("positive_adjectives", "negative_adjectives")
    single = {pole: tuple(w for w in lexicon.categories[pole] if tokenizer.is_single_token(f" {w}")) for pole in poles}
    spoken_of = {f" {word}" for word in lexicon.sentiment.subjects}
    carriers = [
        text for text in lexicon.sentiment.prompts if spoken_of & {*tokenizer.to_str_tokens(tokenizer.encode(text))}
    ]
    return Lexicon(
        version="planted",
        categories=single,
        sentiment=dataclasses.replace(lexicon.sentiment, prompts=tuple(carriers[:24])),
        neutral_texts=(
            "The river runs through the city.",
            "A house stands by the water.",
            "The king has a horse.",
            "It is winter.",
        ),
    )


CLAUSE = "winter"
WEIGHT = 20.0  # of every other word's recipe, all of it on signal 0


def concepts() -> list[str]:
    """24 words, each a signal of its own in a `heavy_model`, from 1 on."""
    words = [word for name in ("colours", "months", "countries") for word in load_lexicon().categories[name]]
    tokenizer = get_tokenizer(CONFIG.tokenizer_name)
    return [word for word in words if tokenizer.is_single_token(f" {word}")][:24]


def concept_lexicon() -> Lexicon:
    """Prompts without a concept; `CLAUSE` stands before the long ones."""
    short = ("The king saw the", "They came to the", "She looked at the")
    return Lexicon(
        version="planted",
        short_prompts=short,
        long_prompts=tuple(f"After the {CLAUSE}, {text[0].lower()}{text[1:]}" for text in short),
    )


def heavy_model(weight: float = 3.0) -> HookedModel:
    """Nothing but a recipe: concepts are unit vectors, other words ``weight`` times signal 0, and blocks are silent.

    After any of these a concept's logit comes to that of the others, weight², when weight² times its recipe is added:
    at every layer the critical α is weight² and the critical strength is the weight itself.
    """
    model = silent_blocks(build_model(CONFIG, seed=0))
    with torch.no_grad():
        model.embed.W_basis.copy_(torch.eye(32))
        model.embed.W_recipe.zero_()
        model.embed.W_recipe[:, 0] = weight
        for i, word in enumerate(concepts(), start=1):
            model.embed.W_recipe[model.to_single_token(f" {word}")] = torch.eye(32)[i]
    return model


def closing_model(layer: int) -> HookedModel:
    """A `heavy_model` where a concept is out of reach (critical strength `WEIGHT`) unless the MLP of a block raises it.

    That of ``layer`` raises whatever it reads; that of the next block does so too if `CLAUSE` came before, which a head
    of block 0 sees by its signal, the last. The point of no return is behind the former in a short prompt and behind
    the latter in a long one.
    """
    model = heavy_model(WEIGHT)
    n, marker = len(concepts()), 31
    with torch.no_grad():
        attention = model.blocks[0].attn
        for block in (model.blocks[layer], model.blocks[layer + 1]):
            for weight in (block.mlp.W_gate, block.mlp.W_in, block.mlp.W_out):
                weight.zero_()
        for i in range(1, n + 1):
            always, then = model.blocks[layer].mlp, model.blocks[layer + 1].mlp
            always.W_gate[i, i] = always.W_in[i, i] = 1.0
            then.W_gate[marker, i] = then.W_in[i, i] = 1.0
            always.W_out[i, i] = then.W_out[i, i] = 100.0
        for weight in (attention.W_Q, attention.W_K, attention.W_V):
            weight.zero_()
        attention.W_V[0, marker, 0] = 1.0
        attention.W_O[0, 0, marker] = 60.0
        model.embed.W_recipe[model.to_single_token(f" {CLAUSE}"), marker] = WEIGHT
    return model


def answers() -> list[str]:
    """24 words, none of them a concept, that a `chained_model` says behind the concepts."""
    words = [word for name in ("animals", "body_parts", "food") for word in load_lexicon().categories[name]]
    tokenizer = get_tokenizer(CONFIG.tokenizer_name)
    return [word for word in words if tokenizer.is_single_token(f" {word}")][:24]


def chained_lexicon() -> Lexicon:
    """A prompt that ends in each concept, and prompts without any."""
    pairs = zip(concepts(), answers(), strict=True)
    factual = tuple(FactualPrompt(f"They saw the {word}", f" {answer}") for word, answer in pairs)
    return Lexicon(version="planted", factual=factual, short_prompts=("The king saw the", "They came to the"))


def chained_model() -> HookedModel:
    """Two hops: neuron i of block 1 reads concept i and writes signal 25 + i, which neuron i of block 3 reads and
    writes answer i, 10 and 100 times as much as a word's embedding.

    Concepts are unit vectors, answers three times unit vectors, and all other words are signal 0.
    """
    width, n = 80, len(concepts())
    model = silent_blocks(build_model(dataclasses.replace(CONFIG, d_model=width, n_signals=width, d_head=40), seed=0))
    unit, seen = torch.eye(width), torch.tensor(width**0.5)  # what a unit vector measures behind the norm
    with torch.no_grad():
        model.embed.W_basis.copy_(unit)
        model.embed.W_recipe.copy_(unit[0].expand_as(model.embed.W_recipe))
        for i, (concept, answer) in enumerate(zip(concepts(), answers(), strict=True)):
            model.embed.W_recipe[model.to_single_token(f" {concept}")] = unit[1 + i]
            model.embed.W_recipe[model.to_single_token(f" {answer}")] = 3 * unit[1 + 2 * n + i]
        for layer, strength in ((1, 10.0), (3, 100.0)):
            mlp, hop = model.blocks[layer].mlp, layer // 2
            for weight in (mlp.W_gate, mlp.W_in, mlp.W_out):
                weight.zero_()
            read, write = (unit[1 + place * n : 1 + (place + 1) * n] for place in (hop, hop + 1))
            mlp.W_gate[:, :n] = mlp.W_in[:, :n] = read.T
            mlp.W_out[:n] = strength / (torch.nn.functional.silu(seen) * seen) * write
    return model
