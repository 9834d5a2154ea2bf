"""Changes performed in a BDH: its gated neurons, whose first reading is held as a gate where gates are held."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor

from reflowlens.circuits.attribution.performed.changed_pass import Hooks, Pass, held
from reflowlens.models.numerics import wide


class LevelPass(Pass):
    """Of gated neurons, errors and embeddings, which are taken behind their norm.

    A level has no hook points at the divisors of its norms: where these are held, what the norms make is computed from
    what they read.
    """

    def hooks(self, n_blocks: int) -> Hooks:
        self.seen: dict[str, Tensor] = {}
        hooks: Hooks = []
        if ("embedding", -1) in self.set:
            hooks.append(("blocks.0.hook_resid_pre", self.set_vectors("embedding")))
        for level in range(n_blocks):
            name = f"blocks.{level}"
            if self.is_frozen:
                hooks += [(f"{name}.{point}", held) for point in ("hook_x_sparse", "hook_attn_scores")]
                hooks += [(f"{name}.{point}", self._see) for point in ("hook_resid_pre", "hook_attn_out")]
                hooks.append((f"{name}.hook_attn_norm", self._held_norm))
            if level < self.n_units:
                hooks.append((f"{name}.hook_x_sparse", self._see))
                hooks.append((f"{name}.hook_y_pre", self._read(level)))
                hooks.append((f"{name}.hook_xy_sparse", self._set(level)))
                hooks.append((f"{name}.hook_mlp_out", lambda y, hook, level=level: self.with_errors(level, y)))
            if self.is_frozen:
                hooks.append((f"{name}.hook_mlp_out", self._see))
                hooks.append((f"{name}.hook_resid_post", self._held_write))
        return hooks

    def logits(self, stream: Float[Tensor, "row 1 d_model"]) -> Float[Tensor, "row d_vocab"]:
        model = self.traced.model
        return model.unembed.readout(model.ln_final(stream), model.tied_weights())._replace(cap=None).logits()[:, 0]

    def _see(self, x: Tensor, hook: Any) -> None:
        self.seen[hook.name] = x

    def _read(self, level: int) -> Callable[..., None]:
        def hook(before: Float[Tensor, "row pos head neuron"], hook: Any) -> None:
            self.note("neuron", level, (self.seen[f"blocks.{level}.hook_x_sparse"] * before).flatten(2))

        return hook

    def _set(self, level: int) -> Callable[..., Tensor]:
        def hook(x: Float[Tensor, "row pos head neuron"], hook: Any) -> Tensor:
            return self.neurons(level, x.flatten(2)).view_as(x)

        return hook

    def _held_norm(self, x: Tensor, hook: Any) -> Tensor:
        return self._divided(self.seen[hook.name.replace("attn_norm", "attn_out")])

    def _held_write(self, x: Tensor, hook: Any) -> Tensor:
        read, out = (self.seen[hook.name.replace("resid_post", point)] for point in ("resid_pre", "mlp_out"))
        return self._divided(read + self._divided(out))

    def _divided(self, x: Float[Tensor, "row *place d_model"]) -> Float[Tensor, "row *place d_model"]:
        """LayerNorm with the divisors of the first row."""
        variance = wide(x[:1]).var(-1, keepdim=True, correction=0)
        return (x - x.mean(-1, keepdim=True)) / (variance + self.traced.model.cfg.eps).sqrt()
