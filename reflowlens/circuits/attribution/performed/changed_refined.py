"""Changes performed in a TTTFlow: those of a decoder, and of its refiners at the last position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from jaxtyping import Float, Int
from torch import Tensor

from reflowlens.circuits.attribution.edges.ends import ADDED
from reflowlens.circuits.attribution.linear.refined import FrozenRefined
from reflowlens.circuits.attribution.performed.changed_decoder import DecoderPass
from reflowlens.circuits.attribution.performed.changed_pass import Change, Hooks, Level, held
from reflowlens.circuits.attribution.traced import Traced
from reflowlens.models.refined_block import RefinedBlock
from reflowlens.models.ttt_flow import TTTFlow
from reflowlens.models.ttt_linear import OUT_EPS

if TYPE_CHECKING:
    from reflowlens.circuits.attribution.graph import AttributionGraph


class RefinedPass(DecoderPass):
    """Of pairs and token values too, of the inner learner's heads and of the flow step's neurons.

    Where norm scales are held, the inner learner is held at what it has become at the last position.
    """

    def __init__(self, graph: AttributionGraph, traced: Traced, changes: Sequence[Change], level: Level) -> None:
        super().__init__(graph, traced, changes, level)
        self.model = cast(TTTFlow, traced.model)
        self.learner = cast(FrozenRefined, traced.engine.frozen).learner
        self.seen: dict[str, Tensor] = {}

    def hooks(self, n_blocks: int) -> Hooks:
        n = self.model.cfg.n_layers
        hooks = [(point, self.set_vectors(kind)) for kind, point in ADDED.items() if (kind, -1) in self.set]
        hooks += super().hooks(min(n, n_blocks))
        if self.is_frozen:
            hooks.append(("ln_embed.hook_scale", held))
            for layer, block in enumerate(cast("list[RefinedBlock]", list(self.model.blocks[:n_blocks]))):
                if block.attn.is_exclusive:
                    hooks.append((f"blocks.{layer}.attn.hook_excluded", held))
        return hooks

    def streams(self, tokens: Int[Tensor, "row pos"], hooks: Hooks, n_blocks: int) -> Float[Tensor, "row pos d_model"]:
        """Of tokens as targets the refined stream."""
        if not self.end.targets.name:
            return super().streams(tokens, hooks, n_blocks)
        points = ("ln_final.hook_normalized", "ttt.hook_out", "hook_refined")
        hooks = hooks + [(point, self._see) for point in points if point in self.model.hook_dict]
        hooks += [("ln_final.hook_scale", held)] if self.is_frozen else []
        block = self.model.cfg.n_layers
        if self.model.ttt is not None:
            hooks.append(("ttt.hook_delta", self._set_learner))
            block += 1
        if self.model.flow is not None:
            hooks.append(("flow.hook_flow_pre", self._read_neurons(block)))
            hooks.append(("flow.hook_flow_post", self._set_neurons(block, gated=False)))
            hooks.append(("flow.hook_delta", lambda y, hook: self.with_errors(block, y)))
        self.model.run_with_hooks(tokens, fwd_hooks=hooks, return_type=None)
        return self.seen["hook_refined"]

    def logits(self, stream: Float[Tensor, "row 1 d_model"]) -> Float[Tensor, "row d_vocab"]:
        """In front of the cap."""
        return self.model.read_final(stream)._replace(cap=None).logits()[:, 0]

    def _see(self, x: Tensor, hook: Any) -> None:
        self.seen[hook.name] = x

    def _set_learner(self, delta: Float[Tensor, "row pos d_model"], hook: Any) -> Tensor:
        """What its heads write at the last position: by the held map of the stream, or as they do of themselves."""
        learner, block = self.learner, self.model.cfg.n_layers
        assert learner is not None
        delta, out = delta.clone(), self.seen["ttt.hook_out"][:, -1]
        if self.is_frozen:
            x = self.seen["ln_final.hook_normalized"][:, -1]
            written = learner.written(out[:1]) + learner.ahead(x - x[:1])
            delta[:, -1] = delta[:1, -1] + (written - written[:1]).sum(1)
        else:
            written = learner.written(out, (out.flatten(1).var(1, correction=0) + OUT_EPS).sqrt())
        if self.replacement.heads:
            delta[:, -1] += self._heads_set(block, written).sum(1) - written.sum(1)
        return delta

    def _heads_set(self, block: int, written: Float[Tensor, "row head d_model"]) -> Float[Tensor, "row head d_model"]:
        """A head writes its activation times a unit vector, along which it is read off, too."""
        units = self.replacement.heads[block].units
        read = written.new_zeros(len(written), len(self.traced.tokens), written.shape[1])
        read[:, units.position, units.index] = (written[:, units.index] * units.rows).sum(-1)
        self.note("head", block, read)
        answer = written[:1].repeat(len(written), 1, 1) if self.level == "direct" else written.clone()
        if ("head", block) in self.set:
            row, position, head, by = self.set["head", block]
            answer[row, head] = written[0, head] * (1 + by / read[0, position, head])[:, None]
        return answer
