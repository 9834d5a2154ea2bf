"""What each experiment costs, stated before it runs: how much it asks of a model, and of the machine beside it.

A function an experiment, named in its line of the registry: sizes -> `Work`. Its numbers are those of the experiment's
own loops, over the lexicon's texts; `Work.seconds` makes a time of them with the `Speed` that was measured on the model
at hand. They are estimates: how many trials a search needs, or how many iterations a rotation, depends on the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from analyses.claims import QUICK_UNTRAINED, UNTRAINED

if TYPE_CHECKING:
    from analyses.words.lexicon import Lexicon
    from reflowlens.models.base import HookedModel


class Speed(NamedTuple):
    """Seconds of a token through all blocks; of a prediction read out over the vocabulary, its softmax taken; of a
    product of the whole recipe with a square matrix; and of an exponential of as many numbers as the vocabulary has."""

    token: float
    read: float
    product: float
    row: float


class Sizes(NamedTuple):
    """Of a model and of what is asked of it: `layers` as many as `analyses.measures.depth.layer_grid` has, `points` as
    many as `analyses.measures.lens.lens_points`, `signals` the width of the view."""

    n_layers: int
    layers: int
    points: int
    signals: int
    tied: bool
    quick: bool

    @classmethod
    def of(cls, model: HookedModel, quick: bool) -> Sizes:
        from analyses.measures.depth import layer_grid
        from analyses.measures.lens import lens_points

        cfg = model.cfg
        layers, points = layer_grid(cfg.n_layers, quick=quick), lens_points(cfg.n_layers)
        signals = cfg.n_signals or cfg.d_model
        return cls(cfg.n_layers, len(layers), len(points), signals, cfg.has_one_embedding, quick)


@dataclass(frozen=True)
class Work:
    """What an experiment asks for.

    `tokens`, `reads`, `products`, `rows`: how many of what `Speed` times; a token that enters halfway is half a token.
    `beside`: seconds of statistics and figures, whatever the model. `told`: where most of it comes from.
    """

    told: str
    tokens: float = 0.0
    reads: float = 0.0
    products: float = 0.0
    rows: float = 0.0
    beside: float = 1.0

    def seconds(self, speed: Speed) -> float:
        """How long it takes at this speed."""
        asked = (self.tokens, self.reads, self.products, self.rows)
        return self.beside + sum(n * seconds for n, seconds in zip(asked, speed, strict=True))


def recipe_atlas(sizes: Sizes) -> Work:
    bases = _bases(sizes)
    return Work(f"{bases} bases of {sizes.signals} signals, and varimax", reads=1700, products=bases + 50, beside=2)


def sparsity_profile(sizes: Sizes) -> Work:
    bases = _bases(sizes)
    return Work(f"{bases} bases of {sizes.signals} signals", products=bases + 8, rows=8 * bases * sizes.signals)


def basis_geometry(sizes: Sizes) -> Work:
    texts = len(_lexicon().neutral_texts) + len(_lexicon().long_prompts)
    return Work(f"{texts} texts, {_bases(sizes)} bases", tokens=2 * texts * _TEXT, products=8)


def semantic_galaxy(sizes: Sizes) -> Work:
    return Work("999 permutations of the words' categories", rows=4 * sizes.signals, beside=1.5)


def semantic_algebra(sizes: Sizes) -> Work:
    questions, spaces = len(_lexicon().analogies), 5 + 2 * _draws(sizes)
    return Work(
        f"{questions} analogies × {spaces} spaces", reads=questions * spaces, rows=10 * questions * spaces, products=4
    )


def typo_resilience(sizes: Sizes) -> Work:
    pairs = len(_lexicon().typos) // (3 if sizes.quick else 1)
    prompts = 10 * pairs  # three lists of words and the untrained model's two, in two carriers
    told = f"{prompts} prompts × {sizes.points} points of the lens"
    return Work(told, tokens=10 * prompts, reads=1.3 * prompts * sizes.points)


def layer_evolution(sizes: Sizes) -> Work:
    draws, prompts = _draws(sizes), _prompts(sizes)
    clauses = 6 * (2 + draws) * len(_lexicon().long_prompts)
    told = f"{(2 + draws) * prompts} prompts × {sizes.points} points of the lens, {clauses} behind clauses"
    reads = ((4 + 2 * draws) * prompts + 0.6 * clauses) * sizes.points
    return Work(told, tokens=8 * (1 + draws) * prompts + 14 * clauses, reads=reads)


def signal_flow(sizes: Sizes) -> Work:
    prompts, models = _prompts(sizes), 1 + _draws(sizes)
    told = f"{prompts} prompts × {2 * sizes.n_layers + 1} points × {11 + models} bases"
    return Work(told, tokens=20 * models * prompts, reads=models * prompts * (2 * sizes.n_layers + 1))


def causal_ablation(sizes: Sizes) -> Work:
    prompts, bases, signals = _prompts(sizes), 12 + _draws(sizes), sizes.signals
    removals = (2 * signals if sizes.tied else 0) + 8 * sizes.n_layers
    return Work(
        f"{prompts} prompts × {bases} bases × {signals} signals, {removals:.0f} removals upstream",
        tokens=6 * removals + 14 * prompts,
        reads=100 * bases * prompts,
        rows=2 * bases * prompts * signals,
        products=bases,
    )


def emotion_surgery(sizes: Sizes) -> Work:
    layers, carriers = sizes.layers, len(_lexicon().sentiment.prompts) // (3 if sizes.quick else 1)
    directions, texts = 25 * layers + 28, len(_lexicon().neutral_texts) // (3 if sizes.quick else 1)
    damages = 7 * layers + 28
    return Work(
        f"{carriers} carriers × {layers} layers × {directions} directions and strengths, {damages} × {texts} texts",
        tokens=0.5 * (carriers * layers * directions + damages * texts * _TEXT),
        reads=1.5 * damages * texts * _TEXT,
        beside=3,
    )


def concept_inception(sizes: Sizes) -> Work:
    problems = len(_lexicon().categories) * (1 if sizes.quick else 3) * sizes.layers
    # Behind short prompts and long ones, of random recipes, and of untrained models behind one long prompt a concept.
    searches = (3 + (1 + (1 if sizes.quick else 1 / 3)) * _draws(sizes)) * problems
    told = f"{searches:.0f} searches for a strength, {_TRIALS} trials each"
    return Work(told, tokens=0.5 * _TRIALS * searches, reads=_TRIALS * searches)


def genetic_hijack(sizes: Sizes) -> Work:
    carriers = len(_lexicon().sentiment.prompts) // (2 if sizes.quick else 1)
    is_thrifty = sizes.quick and sizes.n_layers > sizes.layers
    written = 7 + (5 if is_thrifty else 10) + 4 * (1 if sizes.quick else 3)
    texts = len(_lexicon().neutral_texts) // (3 if is_thrifty else 1)
    told = f"{written} edits × {carriers} texts written, 56 edits × {carriers} carriers"
    return Work(
        told,
        tokens=written * (carriers * 40 + texts * _TEXT) + 56 * carriers * 6,
        reads=written * (carriers * 24 + 1.5 * texts * _TEXT),
        products=14,
        beside=3,
    )


def circuit_tracing(sizes: Sizes) -> Work:
    prompts, units, ends = (6, 24, 2) if sizes.quick else (20, 60, 4)
    runs = 3 * units * 9 * ends + 50 * prompts
    told = f"graphs of {prompts} prompts, {runs} runs with units forced or removed"
    return Work(told, tokens=runs * 4 + 6000 * prompts, reads=2 * runs, beside=3)


_TEXT = 40  # tokens of a neutral text
_TRIALS = 17  # of a critical strength: by doubling and bisection, and a few larger ones


def _bases(sizes: Sizes) -> int:
    """A view's own, its random rotations, varimax, and those of its nulls."""
    return 9 if sizes.quick else 16


def _draws(sizes: Sizes) -> int:
    """Untrained models, where a verdict asks for them."""
    return QUICK_UNTRAINED if sizes.quick else len(UNTRAINED)


def _prompts(sizes: Sizes) -> int:
    """Factual prompts."""
    return len(_lexicon().factual) // (3 if sizes.quick else 1)


@cache
def _lexicon() -> Lexicon:
    from analyses.words.lexicon import load_lexicon

    return load_lexicon()
