"""What an architecture declares of itself, so that nothing outside this folder has to know which one it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from reflowlens.config import ModelConfig

FLOAT32 = 4  # bytes of a number
HEADS_AND_MLPS = ("attn", "mlp")


class Architecture:
    """The declarations, with what holds of a model that declares nothing; a model class overrides what is its own.

    ============================  =====================================================================================
    declared                      asked by
    ============================  =====================================================================================
    ``stages``                    sweeps, upstream ablation and steering, which run a pass from its middle
    ``sublayers``                 graphs and circuits, contributions, ablation at every layer, weights in slices (FSDP2)
    ``units``                     unit statistics and monosemanticity
    ``blocks_share_weights``      checkpoints, the comparison of a unit between blocks
    ``blocks_are_alike``          the check whether a model fits into memory
    ``recipe_is_stored``          edits of recipes
    ``reads_last_stream``         signal views, ablations at the readout, directions of logits
    ``table_bytes``               the check whether a model fits into memory
    ``forward_flops``             utilisation, estimates of a training run, the choice whether to compile
    ``activation_bytes``          the estimate of a training run's memory
    ============================  =====================================================================================
    """

    stages: ClassVar[Literal["halves", "levels", "blocks", "whole"]] = "blocks"
    """How a pass can be continued from its middle (:mod:`reflowlens.sweeps.stages`).

    ``"blocks"``: block by block, each on whole rows, which any model can. ``"halves"``: each block is a
    :class:`~reflowlens.models.components.Block`, run on suffixes alone, which attend to keys and values of the
    unpatched run. ``"levels"``: each block is a :class:`~reflowlens.sweeps.level_stages.Level`, which writes once and
    attends to earlier positions by a sum over them, run on suffixes alone too. ``"whole"``: not at all, for blocks read
    more than the stream: every run is a whole pass.
    """

    sublayers: ClassVar[tuple[str, ...]] = ()
    """The modules of a block whose outputs ``hook_<name>_out`` are added to the stream, in order; none where the stream
    is no such sum. `HEADS_AND_MLPS` says that each block is a :class:`~reflowlens.models.components.Block`: a head
    writes its ``attn.hook_z`` times its ``attn.W_O``."""

    units: ClassVar[Mapping[str, str | None]] = {}
    """The kinds of unit that blocks are made of: the hook point of each within its block, and the parameter whose rows
    are what its units write into the stream, ``{layer}`` standing for the block; None of units that write nothing, or
    no such rows."""

    blocks_share_weights: ClassVar[bool] = False
    """Whether every block uses the same weights, which lie outside ``blocks``: a unit is then the same in each."""

    blocks_are_alike: ClassVar[bool] = True
    """Whether every block has parameters of the same shapes, and how many there are shows in no other parameter."""

    recipe_is_stored: ClassVar[bool] = True
    """Whether the recipe (or an unfactored embedding) is a stored parameter as it is, not computed from one: a change
    of the parameter is then the same change of the recipe."""

    reads_last_stream: ClassVar[bool] = True
    """Whether a position's logits are its own last residual stream through the final norm and a linear readout, so that
    they are sums over signals, heads or directions. If not, a signal view is a logit lens and no prediction."""

    @classmethod
    def table_bytes(cls, cfg: ModelConfig) -> int:
        """Bytes of the tables that a model holds beside its parameters."""
        return 0

    @classmethod
    def forward_flops(cls, cfg: ModelConfig, context: int, batch: int) -> dict[str, float]:
        """Operations of one forward pass per token, by part: matrix products alone, two per multiplication.

        Args:
            context: tokens of an example; attention is counted causally, as its mean over them.
            batch: examples of the pass.
        """
        raise NotImplementedError

    @classmethod
    def activation_bytes(cls, cfg: ModelConfig, n: int, width: int) -> tuple[float, float]:
        """What one forward pass over ``n`` positions keeps for its backward pass: in the model, and in the readout.

        Args:
            width: bytes of a number in matrix products: 4, or 2 under autocast.
        """
        raise NotImplementedError
