"""Runs with noise on some tokens' embeddings, and with activations of the clean run put back, for causal tracing.

Runs of many noises go together, a row each. A run in which something is restored from a layer on begins there, with the
stream of the noisy run: nothing below has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from analyses.statistics.draws import derive_generator
from analyses.tasks.answered import Answered

Measured: TypeAlias = "Literal['probability', 'logit_diff']"
STATES = "state"


@dataclass(frozen=True, eq=False)
class Traced:
    """A batch of prompts, clean and under several noises.

    Args:
        answered: the prompts.
        samples: noises of each prompt, whose rows lie together.
        clean: activations of the clean run by hook point, [prompt, pos, d_model].
        noisy: the streams that blocks read in the noisy runs, by layer, [row, pos, d_model].
        measured: what is read off a run.
    """

    answered: Answered
    samples: int
    clean: dict[str, Tensor]
    noisy: list[Float[Tensor, "row pos d_model"]]
    measured: Measured

    @classmethod
    def of(
        cls,
        answered: Answered,
        noised: Bool[Tensor, "prompt pos"],
        sublayers: Sequence[str],
        scale: float,
        samples: int,
        measured: Measured,
        seed: int,
    ) -> Traced:
        """Run prompts clean, and with normal noise of a standard deviation on the embeddings of the marked tokens."""
        model = answered.model
        streams = [f"blocks.{layer}.hook_resid_pre" for layer in range(model.cfg.n_layers)]
        outputs = [f"blocks.{layer}.hook_{part}_out" for layer in range(model.cfg.n_layers) for part in sublayers]
        options: dict[str, Any] = {"return_type": None, "return_cache_object": False}
        _, clean = model.run_with_cache(answered.tokens, names_filter=[*streams, *outputs], **options)
        noise = noise_of(answered, noised, samples, seed) * scale
        tokens = answered.tokens.repeat_interleave(samples, dim=0)
        with model.hooks([("hook_embed", partial(_added, noise))]):
            _, noisy = model.run_with_cache(tokens, names_filter=streams, **options)
        return cls(answered, samples, clean, [noisy[name] for name in streams], measured)

    def restored(self, kind: str, layers: Sequence[int], at: Bool[Tensor, "prompt pos"]) -> Float[Tensor, " prompt"]:
        """The answer in the noisy runs, mean over noises, where marked tokens have their clean activations back.

        Args:
            kind: ``"state"``, the stream that a layer reads, or a sublayer, of which several layers can be restored.
        """
        start, marked = layers[0], at.repeat_interleave(self.samples, dim=0)
        stream = self.noisy[start]
        hooks: list[tuple[str, Callable[..., Tensor]]] = []
        if kind == STATES:
            stream = torch.where(marked[..., None], self._rows(f"blocks.{start}.hook_resid_pre"), stream)
        else:
            names = [f"blocks.{layer}.hook_{kind}_out" for layer in layers]
            hooks = [(name, partial(_put_back, marked, self._rows(name))) for name in names]
        return self._read(stream, start, hooks)

    def corrupted(self) -> Float[Tensor, " prompt"]:
        """The answer in the noisy runs, mean over noises."""
        return self._read(self.noisy[-1], len(self.noisy) - 1, [])

    def _rows(self, name: str) -> Float[Tensor, "row pos d_model"]:
        return self.clean[name].repeat_interleave(self.samples, dim=0)

    def _read(self, stream: Tensor, start: int, hooks: Sequence[tuple[str, Callable[..., Tensor]]]) -> Tensor:
        model = self.answered.model
        with model.hooks(hooks):
            final = model(stream, start_at_layer=start, stop_at_layer=model.cfg.n_layers)
        prompt = self.answered.each.repeat_interleave(self.samples)
        rows = torch.arange(len(final), device=final.device)
        values = value_of(self.answered, final[rows, self.answered.last[prompt]], self.measured, prompt)
        return values.view(-1, self.samples).mean(dim=1)


def value_of(
    answered: Answered,
    stream: Float[Tensor, "row d_model"],
    measured: Measured,
    prompt: Int[Tensor, " row"] | None = None,
) -> Float[Tensor, " row"]:
    """What is read off the streams that runs end in: the probability of the answer, or its logit difference."""
    scores = answered.scores(stream, prompt)
    return scores.logit_diff if measured == "logit_diff" else (-scores.loss).exp()


def noise_of(
    answered: Answered, noised: Bool[Tensor, "prompt pos"], samples: int, seed: int
) -> Float[Tensor, "row pos d_model"]:
    """Standard normal noise on marked tokens and none elsewhere; of a prompt the same whatever else is in its batch."""
    n_prompts, n_positions = noised.shape
    noise = torch.zeros(n_prompts, samples, n_positions, answered.model.cfg.d_model)
    for i, text in enumerate(answered.texts):
        generator, places = derive_generator(seed, "causal_tracing", text), noised[i].nonzero()[:, 0].cpu()
        noise[i, :, places] = torch.randn(samples, len(places), noise.shape[-1], generator=generator)
    return noise.flatten(0, 1).to(noised.device)


def _added(noise: Tensor, embeddings: Tensor, hook: HookPoint) -> Tensor:
    return embeddings + noise.to(embeddings)


def _put_back(marked: Tensor, clean: Tensor, output: Tensor, hook: HookPoint) -> Tensor:
    return torch.where(marked[..., None], clean, output)
