"""What a TTT-Linear model with a flow refiner has beside a decoder's sizes."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from reflowlens.errors import ReflowlensError


@dataclass(frozen=True, kw_only=True)
class TTTFlowConfig:
    """The parts of a ``ttt_flow`` model; the defaults are the published ones.

    Args:
        ttt, flow: the refiners behind the final norm: the inner learner, and the flow step. Either may be left out.
        ttt_heads: heads of the inner learner, each ``d_model / ttt_heads`` wide.
        ttt_chunk: tokens of a mini-batch, whose inner gradients are all taken at its start.
        ttt_rate: the inner learning rate times the width of a head.
        flow_width, flow_hidden: of the space that the flow step is taken in, and of its hidden layer.
        bigram_slots, bigram_width: rows of the table of token pairs, the last of which is for tokens without one before
            them, and its columns.
        value_width, value_layers: columns of the table of token values, and how many of the last blocks add them.
        exclusive_layers: how many of the last blocks take what lies along a position's own value out of each head.
        rotary_channels: channels of a head, the first ones, that positions turn.
        rotary_context: a longer ``n_ctx`` slows the turns down (NTK scaling).
        logit_cap: logits are ``logit_cap * tanh(x / logit_cap)``.

    Raises:
        ReflowlensError: a field has a value that is not allowed.
    """

    ttt: bool = True
    flow: bool = True
    ttt_heads: int = 8
    ttt_chunk: int = 16
    ttt_rate: float = 1.0
    flow_width: int = 64
    flow_hidden: int = 256
    bigram_slots: int = 1536
    bigram_width: int = 128
    value_width: int = 128
    value_layers: int = 2
    exclusive_layers: int = 4
    rotary_channels: int = 16
    rotary_context: int = 1024
    logit_cap: float = 30.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            name, value, least = field.name, getattr(self, field.name), _LEAST.get(field.name, 1)
            if field.type == "bool":
                if not isinstance(value, bool):
                    raise ReflowlensError(f"ttt_flow.{name} must be True or False, got {value!r}")
            elif field.type == "int":
                if not isinstance(value, int) or isinstance(value, bool) or value < least:
                    raise ReflowlensError(f"ttt_flow.{name} must be an integer of at least {least}, got {value!r}")
            elif not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ReflowlensError(f"ttt_flow.{name} must be a positive number, got {value!r}")
        if self.rotary_channels % 2:
            raise ReflowlensError(f"ttt_flow.rotary_channels must be even, got {self.rotary_channels}")

    def check(self, *, d_model: int, d_head: int, n_layers: int) -> None:
        """Raise unless it fits a model of these sizes.

        Raises:
            ReflowlensError: heads do not divide the width, channels are more than a head has, or layers than there are.
        """
        if d_model % self.ttt_heads:
            raise ReflowlensError(f"ttt_flow.ttt_heads must divide d_model={d_model}, got {self.ttt_heads}")
        if self.rotary_channels > d_head:
            raise ReflowlensError(
                f"ttt_flow.rotary_channels must be at most d_head={d_head}, got {self.rotary_channels}"
            )
        for name in ("value_layers", "exclusive_layers"):
            if getattr(self, name) > n_layers:
                raise ReflowlensError(f"ttt_flow.{name} must be at most n_layers={n_layers}, got {getattr(self, name)}")


_LEAST = {"bigram_slots": 2, "value_layers": 0, "exclusive_layers": 0, "rotary_channels": 2}
