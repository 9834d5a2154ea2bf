"""What each signal, block and head adds to one token's logit, and which signals lead from layer to layer.

A signal's *contribution* to the logit of a token t is a_s R_ts, with a = B norm_final(x) the readout of the residual
stream x: over signals it sums to the logit that the lens reads there, at the end to the model's own. The final norm
divides by the length of its input, so what a block adds to the logit depends on what the others add. To split the logit
among them that divisor is frozen at its value for the last residual, as is usual in direct logit attribution; the rest
of the norm is linear, and the parts sum to the model's logit.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import stats
from torch import Tensor

from analyses.measures.lens import lens_log_probabilities, residual_stack
from analyses.tasks.writers import divisor_behind, written_by_heads
from reflowlens.errors import ReflowlensError
from reflowlens.models.architecture import HEADS_AND_MLPS
from reflowlens.models.base import HookedModel
from reflowlens.models.components import Block
from reflowlens.models.text import TextInput
from reflowlens.signals import SignalView


def leading_signals(contributions: Float[Tensor, "*batch S"], k: int) -> Bool[Tensor, "*batch S"]:
    """Which signals are among the k with the largest contribution; one that contributes nothing, or less, never is.

    >>> leading_signals(torch.tensor([0.5, 2.0, -3.0, 1.0]), k=2)
    tensor([False,  True, False,  True])
    """
    top = contributions.topk(k, dim=-1)
    return torch.zeros_like(contributions, dtype=torch.bool).scatter(-1, top.indices, top.values > 0)


def neighbour_overlap(leading: Bool[Tensor, "layer *batch S"]) -> Float[Tensor, "step *batch"]:
    """Jaccard index |A ∩ B| / |A ∪ B| of each layer's leading signals with the next layer's; 1 where both have none.

    >>> neighbour_overlap(torch.tensor([[True, True, False], [False, True, True]]))
    tensor([0.3333])
    """
    both, either = leading[:-1] & leading[1:], leading[:-1] | leading[1:]
    return torch.where(either.any(dim=-1), both.sum(dim=-1) / either.sum(dim=-1).clamp(min=1), 1.0)


def random_overlap(n_signals: int, k: int) -> float:
    """The Jaccard index to be expected of two random sets of k signals.

    >>> random_overlap(4, 2)  # 1/6 share both, 2/3 share one
    0.38888888888888884
    """
    shared = np.arange(k + 1)
    return float((stats.hypergeom(n_signals, k, k).pmf(shared) * shared / (2 * k - shared)).sum())


def mean_lead_since(leading: Bool[Tensor, "layer prompt S"]) -> Float[Tensor, " prompt"]:
    """The layer from which each final leading signal has led, as a share of the last; mean over them, 1 if none leads.

    >>> mean_lead_since(torch.tensor([[[True, False]], [[True, True]], [[True, True]]]))
    tensor([0.2500])
    """
    led_on = leading.flip(0).cumprod(dim=0).sum(dim=0)  # layers of the last run: 0 unless it reaches the end
    since = (len(leading) - led_on) / (len(leading) - 1)
    final = leading[-1]
    return torch.where(final.any(dim=-1), (since * final).sum(dim=-1) / final.sum(dim=-1).clamp(min=1), 1.0)


class Components(NamedTuple):
    """What is added up to the last residual of each prompt's last token, and the final norm's divisor there.

    `embedding` is what the first block reads, learned positions included.
    """

    embedding: Float[Tensor, "prompt d_model"]
    heads: Float[Tensor, "layer head prompt d_model"]
    attention: Float[Tensor, "layer prompt d_model"]
    mlp: Float[Tensor, "layer prompt d_model"]
    scale: Float[Tensor, "prompt 1"]

    def final(self) -> Float[Tensor, "prompt d_model"]:
        """The last residual: what these add up to."""
        return self.embedding + self.attention.sum(dim=0) + self.mlp.sum(dim=0)


@torch.no_grad()
def component_outputs(model: HookedModel, input: TextInput) -> Components:
    """The outputs of embedding, heads, attention (its heads and its bias) and MLPs, in one pass.

    Raises:
        ReflowlensError: the stream is no sum of such outputs: some architectures normalise it in every block.
    """
    if model.sublayers != HEADS_AND_MLPS:
        raise ReflowlensError(
            f"the residual stream of {model.cfg.architecture!r} is not a sum of what heads and MLPs write: "
            "a prediction cannot be split among them"
        )
    tokens, lengths = model.tokens_and_lengths(input)
    layers = range(model.cfg.n_layers)
    heads = [f"blocks.{layer}.attn.hook_z" for layer in layers]
    outputs = {part: [f"blocks.{layer}.hook_{part}_out" for layer in layers] for part in ("attn", "mlp")}
    embedding, scale = "blocks.0.hook_resid_pre", "ln_final.hook_scale"
    blocks = cast("list[Block]", list(model.blocks))
    divisors = [next(iter(divisor_behind(block, layer)), None) for layer, block in enumerate(blocks)]
    _, cache = model.run_with_cache(
        tokens,
        return_type=None,
        names_filter=[embedding, scale, *heads, *outputs["attn"], *outputs["mlp"], *filter(None, divisors)],
        return_cache_object=False,
    )
    rows, last = torch.arange(len(lengths), device=tokens.device), torch.tensor(lengths, device=tokens.device) - 1
    results = [
        written_by_heads(block, cache[name][rows, last], None if at is None else cache[at][rows, last]).transpose(0, 1)
        for name, block, at in zip(heads, blocks, divisors, strict=True)
    ]
    return Components(
        cache[embedding][rows, last],
        torch.stack(results),
        torch.stack([cache[name][rows, last] for name in outputs["attn"]]),
        torch.stack([cache[name][rows, last] for name in outputs["mlp"]]),
        cache[scale][rows, last],
    )


class Split(NamedTuple):
    """What each part of the model contributes to a token's logit under the frozen norm.

    `attention` holds its bias, `heads` do not; `embedding`, `attention`, `mlp` and `norm_bias` sum to the logit, less
    the readout's bias, which no part of the model writes.
    """

    embedding: Float[Tensor, "prompt S"]
    attention: Float[Tensor, "layer prompt S"]
    mlp: Float[Tensor, "layer prompt S"]
    norm_bias: Float[Tensor, "prompt S"]
    heads: Float[Tensor, "layer head prompt"]

    def logit(self) -> Float[Tensor, " prompt"]:
        """The sum over parts and signals: the logit less the readout's bias."""
        return torch.stack([part.sum(dim=(0, -1)) for part in self.parts().values()]).sum(dim=0)

    def parts(self) -> dict[str, Float[Tensor, "_block prompt S"]]:
        """What sums to the logit, by name; of embedding and bias there is one."""
        return {
            "embedding": self.embedding[None],
            "attention": self.attention,
            "mlp": self.mlp,
            "norm_bias": self.norm_bias[None],
        }


@torch.no_grad()
def split_contributions(view: SignalView, components: Components, targets: Int[Tensor, " prompt"]) -> Split:
    """Contributions to the targets' logits by the part of the model that wrote them, and by signal; heads in all.

    Which features of a dictionary are active is held at what it is in the last residual, as the norm is.

    Example: ``split_contributions(view, component_outputs(model, prompts), targets).mlp.sum(-1)`` [layer, prompt]
    """
    rows, scale, final = view.logit_rows[targets], components.scale, components.final()

    def contributions(x: Tensor) -> Tensor:
        return view.readout_of_part(x, scale, final) * rows

    return Split(
        contributions(components.embedding),
        contributions(components.attention),
        contributions(components.mlp),
        view.readout_of_bias(scale, final) * rows,
        torch.stack([contributions(heads).sum(dim=-1) for heads in components.heads]),
    )


class Reading(NamedTuple):
    """What a view reads of every prompt at every residual point.

    `readouts` are of the whole stream, `rows` what the targets' logits are read off with. `logits` are the model's own
    of these, computed by its last norm and unembedding without the view, less the readout's bias: what the signals make
    up, with what is `carried` beside them (a dictionary's constant and error).
    """

    readouts: Float[Tensor, "point prompt S"]
    rows: Float[Tensor, "prompt S"]
    logits: Float[Tensor, "point prompt"]
    targets: Int[Tensor, " prompt"]
    split: Split
    carried: Float[Tensor, "point prompt part"]

    def contributions(self) -> Float[Tensor, "point prompt S"]:
        """a_s R_target,s."""
        return self.readouts * self.rows

    def rotated(self, rotation: Float[Tensor, "S S"]) -> Reading:
        """The same in a rotated signal basis, but for the split, which stays that of the basis it was made in."""
        A = rotation.to(self.rows)
        return self._replace(readouts=self.readouts @ A, rows=self.rows @ A)

    def sum_error(self) -> float:
        """Largest |Σ_s contribution - logit| over points and prompts, as a share of Σ_s |contribution|."""
        contributions = torch.cat([self.contributions(), self.carried], dim=-1)
        return _largest_error(contributions.sum(dim=-1), self.logits, contributions)

    def split_error(self) -> float:
        """The same of the sum over the parts of the split, at the end."""
        return _largest_error(self.split.logit(), self.logits[-1], self.contributions()[-1])


@torch.no_grad()
def read_contributions(view: SignalView, input: TextInput, target: int | None = None) -> Reading:
    """Read every point of every prompt's last token towards one target, or towards each prompt's top-1 token.

    Example: ``read_contributions(view, ["The capital of France is"]).contributions()[-1, 0].topk(5)``
    """
    model = view.model
    if not model.reads_last_stream:
        raise ReflowlensError(
            "contributions of heads and MLPs need a stream that is the sum of what they write, and blocks of a "
            f"{type(model).__name__} scale it and go back to earlier ones: rl.attribute(..., heads=True) follows these"
        )
    stack = residual_stack(model, input)
    own = view.n_signals
    targets = lens_log_probabilities(view, stack[-1]).argmax(dim=-1)
    if target is not None:
        targets = torch.full_like(targets, target)
    readouts, rows = view.readout(stack), view.logit_rows[targets]
    return Reading(
        readouts[..., :own],
        rows[:, :own],
        model_logits(model, stack, targets) - view.bias_of(targets),
        targets,
        split_contributions(view, component_outputs(model, input), targets),
        view.contributions(stack, targets)[..., own:] if view.n_carried else readouts[..., own:],
    )


@torch.no_grad()
def model_logits(
    model: HookedModel, stack: Float[Tensor, "point prompt d_model"], targets: Int[Tensor, " prompt"]
) -> Float[Tensor, "point prompt"]:
    """The targets' logits, in front of a cap, when the model's own last norm and unembedding read each point."""
    logits = [model.read_final(resid[:, None])._replace(cap=None).logits()[:, 0] for resid in stack]
    return torch.stack([each.gather(1, targets[:, None])[:, 0] for each in logits])


def _largest_error(sums: Tensor, logits: Tensor, contributions: Tensor) -> float:
    scale = contributions.abs().sum(dim=-1).clamp(min=torch.finfo(contributions.dtype).tiny)
    return float(((sums - logits).abs() / scale).max())
