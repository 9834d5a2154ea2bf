"""Where in a model's pass a hook point lies, and what follows from its activation without running a block.

A pass is a sequence of stages, each of which starts from the residual stream and ends with it; the last is the readout.
A sweep lets a patched run enter at the stage, and at the position, from which on it differs from the unpatched one.

How a pass divides is declared by the model (``stages`` of :class:`~reflowlens.models.architecture.Architecture`). A
decoder's L blocks have two stages each. Stage 2 l is the attention half of block l, which starts from its resid_pre;
stage 2 l + 1 is its MLP half, which starts from its resid_mid; stage 2 L is the readout. Where attention and MLP are
parallel a block is one stage (:class:`ParallelStages`). A level is one stage
(:mod:`reflowlens.sweeps.level_stages`), and so is a block of which nothing is known
(:mod:`reflowlens.sweeps.block_stages`); a pass may be one that cannot be divided
(:mod:`reflowlens.sweeps.whole_stages`). A dictionary's features belong to the stage that they are read in
(:mod:`reflowlens.sweeps.spliced_stages`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

from jaxtyping import Bool, Float
from torch import Tensor

from reflowlens.models.base import HookedModel
from reflowlens.models.components import Block
from reflowlens.models.decoder import Decoder
from reflowlens.models.parts import plus
from reflowlens.models.places import Places
from reflowlens.sweeps.block_stages import BlockStages
from reflowlens.sweeps.level_stages import LevelStages
from reflowlens.sweeps.spliced_stages import with_dictionaries
from reflowlens.sweeps.suffixes import LastQueries, Layout, PrefixKeysValues, is_anything_hooked, only
from reflowlens.sweeps.whole_stages import WholeStages

READOUT_SIGNAL = "unembed.hook_signal"
EMBEDDINGS = ("hook_embed", "hook_pos_embed", "hook_recipe")


class Stages(Protocol):
    """A family's pass, in stages.

    Attributes:
        model: whose pass it is.
        streams: the point that holds the stream in front of each stage, the readout's last.
        remembered: further points of the unpatched run that patched ones attend to.
        per_block: stages of a block; 0 where none can be started from.
        last_mixing: the last stage in which positions see each other.
        whole_rows: within a stage activations are of rows [row, pos, ...] and not of packed suffixes [1, token, ...].
        suffixes_hold: whether a patched run may enter at a later stage than the first.
    """

    model: Any
    streams: list[str]
    remembered: list[str]
    per_block: int
    last_mixing: int
    whole_rows: bool
    suffixes_hold: bool

    def stage(self, name: str) -> int | None:
        """The stage that a point fires in, embeddings in the first; None for points that belong to no stage alone."""
        ...

    def entry_stage(self, name: str) -> int | None:
        """The stage whose start a point's activation determines; None if a stage has to run from it."""
        ...

    def needed_for_entry(self, name: str) -> list[str]:
        """Points of the unpatched run that :meth:`entry` reads beside the point itself."""
        ...

    def entry(
        self, name: str, patched: Float[Tensor, "cell prompt pos *rest"], cache: Mapping[str, Tensor]
    ) -> Float[Tensor, "cell prompt pos d_model"]:
        """The residual stream at a point's :meth:`entry_stage`.

        Args:
            patched: the point's activation after each cell's intervention.
            cache: the unpatched run's activations [prompt, ...] of the point and of :meth:`needed_for_entry`.
        """
        ...

    def run(
        self,
        stage: int,
        resid: Float[Tensor, "1 token d_model"],
        layout: Layout,
        cache: Mapping[str, Tensor],
        asked: Bool[Tensor, " token"] | None = None,
        differs: Bool[Tensor, " token"] | None = None,
    ) -> Float[Tensor, "1 asked d_model"]:
        """A stage on packed suffixes (:mod:`reflowlens.sweeps.suffixes`).

        Args:
            asked: the tokens that are asked for, the others being only attended to. Default: all.
            differs: the tokens whose stream is not the unpatched run's, of which alone more than attention needs to be
                computed. Default: all.
        """
        ...


def stages_of(model: HookedModel) -> Stages:
    """The stages of a model's pass, as it declares them, and with the dictionaries that are spliced into it."""
    halves = ParallelStages if model.cfg.parallel_attn_mlp else DecoderStages
    kinds: dict[str, type] = {
        "halves": halves,
        "levels": LevelStages,
        "blocks": BlockStages,
        "whole": WholeStages,
    }
    return with_dictionaries(kinds[model.stages](model))


class DecoderStages:
    """A decoder's pass.

    >>> import reflowlens as rl
    >>> stages = DecoderStages(rl.load_model("reflow-nano"))
    >>> stages.stage("blocks.3.attn.hook_q"), stages.stage("blocks.3.mlp.hook_post"), stages.stage("hook_basis")
    (6, 7, None)
    >>> stages.entry_stage("blocks.3.mlp.hook_post"), stages.entry_stage("blocks.3.mlp.hook_pre")
    (8, None)
    """

    per_block = 2
    whole_rows = False
    suffixes_hold = True

    def __init__(self, model: Decoder) -> None:
        self.model = model
        layers = range(model.cfg.n_layers)
        self.streams = [f"blocks.{layer}.hook_resid_{half}" for layer in layers for half in ("pre", "mid")]
        self.streams.append(f"blocks.{layers[-1]}.hook_resid_post")
        turned = "rot_" if model.cfg.positional_embedding_type == "rotary" else ""
        self.queries, self.keys, self.values = (
            [f"blocks.{layer}.attn.hook_{point}" for layer in layers] for point in (f"{turned}q", f"{turned}k", "v")
        )
        self.remembered = [*self.queries, *self.keys, *self.values]
        self.last_mixing = 2 * layers[-1]

    def stage(self, name: str) -> int | None:
        if name in EMBEDDINGS:
            return 0
        if name == READOUT_SIGNAL:
            return len(self.streams) - 1
        if not name.startswith("blocks."):
            return None
        _, layer, point = name.split(".", 2)
        return 2 * int(layer) + point.startswith(_FIRES_IN_MLP_HALF)

    def entry_stage(self, name: str) -> int | None:
        if not name.startswith("blocks."):
            return self.stage(name)
        _, layer, point = name.split(".", 2)
        return None if point not in _DETERMINES else 2 * int(layer) + _DETERMINES[point]

    def needed_for_entry(self, name: str) -> list[str]:
        if name in EMBEDDINGS:
            return self.streams[:1]
        if not name.startswith("blocks."):
            return []
        _, layer, point = name.split(".", 2)
        return [f"blocks.{layer}.{needed}" for needed in _NEEDED.get(point, ())]

    def entry(
        self, name: str, patched: Float[Tensor, "cell prompt pos *rest"], cache: Mapping[str, Tensor]
    ) -> Float[Tensor, "cell prompt pos d_model"]:
        if name in EMBEDDINGS:
            change = patched - cache[name]
            factor = cast(Any, self.model.W_E).B if name == "hook_recipe" else None
            return cache[self.streams[0]] + (change if factor is None else change @ factor)
        _, layer, point = name.split(".", 2)
        if point.startswith("hook_resid"):
            return patched
        block = self._block(int(layer))
        before, *written = (cache[needed] for needed in self.needed_for_entry(name))
        if point == "attn.hook_z":
            out = block.attn.output(patched.flatten(0, 1)).unflatten(0, patched.shape[:2])
            return before + block.after_attention(out)
        if point in ("attn.hook_result", "mlp.hook_post"):
            return before + self._rewritten(block, point, patched, cache[name], written[0])
        return before + patched

    def _rewritten(
        self,
        block: Block,
        point: str,
        patched: Float[Tensor, "cell prompt pos *rest"],
        unpatched: Float[Tensor, "prompt pos *rest"],
        written: Float[Tensor, "prompt pos d_model"],
    ) -> Float[Tensor, "cell prompt pos d_model"]:
        """What attention or MLP adds of changed heads or neurons; where a norm comes behind, all of it anew."""
        of_heads = point == "attn.hook_result"
        if block.ln1_post is None or block.ln2_post is None:
            change = patched - unpatched
            return written + (change.sum(dim=-2) if of_heads else change @ block.mlp.W_out)
        if of_heads:
            return block.ln1_post(plus(patched.sum(dim=-2), block.attn.b_O))
        return block.ln2_post(plus(patched @ block.mlp.W_out, block.mlp.b_out))

    def run(
        self,
        stage: int,
        resid: Float[Tensor, "1 token d_model"],
        layout: Layout,
        cache: Mapping[str, Tensor],
        asked: Bool[Tensor, " token"] | None = None,
        differs: Bool[Tensor, " token"] | None = None,
    ) -> Float[Tensor, "1 asked d_model"]:
        block = self._block(stage // self.per_block)
        if is_anything_hooked(block):  # what is edited in a block is whole suffixes
            return only(asked, self._all(stage, resid, layout, cache, None))
        if asked is None or not self._asks_once(block, layout, asked):
            return only(asked, self._all(stage, resid, layout, cache, differs))
        _, keys, values = self._of_layer(block.attn.layer, cache)
        position = layout.position[asked]
        past = LastQueries(position, _kept(layout, differs), keys, values, only(differs, resid), block)
        return self._mixing(block)(only(asked, resid), Places(position[None]), past)

    def _all(
        self,
        stage: int,
        resid: Float[Tensor, "1 token d_model"],
        layout: Layout,
        cache: Mapping[str, Tensor],
        differs: Bool[Tensor, " token"] | None,
    ) -> Float[Tensor, "1 token d_model"]:
        block = self._block(stage // 2)
        if stage % 2 == 0:
            return self._attending(block.attend, block, resid, layout, cache, differs)
        if differs is None:
            return block.feed(resid)
        after = layout.of_prompts(cache[self.streams[stage + 1]])
        after[:, differs] = block.feed(only(differs, resid))
        return after

    def _attending(
        self,
        run: Callable[..., Float[Tensor, "1 token d_model"]],
        block: Block,
        resid: Float[Tensor, "1 token d_model"],
        layout: Layout,
        cache: Mapping[str, Tensor],
        differs: Bool[Tensor, " token"] | None,
    ) -> Float[Tensor, "1 token d_model"]:
        """``run``, which is the block or its half, on packed suffixes, or what it comes to where some tokens do not
        differ."""
        differing = _kept(layout, differs)
        past = PrefixKeysValues(layout, differing, *self._of_layer(block.attn.layer, cache))
        places = Places(differing.position[None])
        if differs is None:
            return run(resid, places, past)
        return resid + block.attention_written(only(differs, resid), places, past)

    def _asks_once(self, block: Block, layout: Layout, asked: Bool[Tensor, " token"]) -> bool:
        """Whether one position of each row asks: the last where the layer has a window, which is counted from there."""
        ends = layout.position[asked] == layout.n_positions - 1
        return layout.one_of_each_row(asked) and (block.attn.window is None or bool(ends.all()))

    def _of_layer(self, layer: int, cache: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the unpatched run."""
        return cache[self.queries[layer]], cache[self.keys[layer]], cache[self.values[layer]]

    def _mixing(self, block: Block) -> Callable[..., Float[Tensor, "1 token d_model"]]:
        """What a stage in which positions see each other runs of a block."""
        return block.attend

    def _block(self, layer: int) -> Block:
        return cast(Block, self.model.blocks[layer])


class ParallelStages(DecoderStages):
    """The pass of a decoder whose attention and MLP both read the stream in front of the block: a stage is a block."""

    per_block = 1

    def __init__(self, model: Decoder) -> None:
        super().__init__(model)
        self.streams = [name for name in self.streams if not name.endswith("hook_resid_mid")]
        self.last_mixing = model.cfg.n_layers - 1

    def stage(self, name: str) -> int | None:
        stage = super().stage(name)
        return stage if stage is None or name == READOUT_SIGNAL else stage // 2

    def entry_stage(self, name: str) -> int | None:
        if not name.startswith("blocks."):
            return self.stage(name)
        _, layer, point = name.split(".", 2)
        return None if point not in _DETERMINES else int(layer) + (_DETERMINES[point] > 0)

    def needed_for_entry(self, name: str) -> list[str]:
        if not name.startswith("blocks."):
            return super().needed_for_entry(name)
        _, layer, point = name.split(".", 2)
        half = {"hook_attn_out": "attn", "hook_mlp_out": "mlp"}.get(point, point.split(".")[0])
        if half not in ("attn", "mlp"):
            return []
        return [f"blocks.{layer}.{needed}" for needed in ("hook_resid_post", f"hook_{half}_out")]

    def entry(
        self, name: str, patched: Float[Tensor, "cell prompt pos *rest"], cache: Mapping[str, Tensor]
    ) -> Float[Tensor, "cell prompt pos d_model"]:
        if not self.needed_for_entry(name) or not name.startswith("blocks."):
            return super().entry(name, patched, cache)
        after, written = (cache[needed] for needed in self.needed_for_entry(name))
        _, layer, point = name.split(".", 2)
        block = self._block(int(layer))
        if point == "attn.hook_z":
            patched = block.after_attention(block.attn.output(patched.flatten(0, 1)).unflatten(0, patched.shape[:2]))
        elif point in ("attn.hook_result", "mlp.hook_post"):
            patched = self._rewritten(block, point, patched, cache[name], written)
        return after + (patched - written)

    def _all(
        self,
        stage: int,
        resid: Float[Tensor, "1 token d_model"],
        layout: Layout,
        cache: Mapping[str, Tensor],
        differs: Bool[Tensor, " token"] | None,
    ) -> Float[Tensor, "1 token d_model"]:
        block = self._block(stage)
        after = self._attending(block, block, resid, layout, cache, differs)
        return after if differs is None else after + block.mlp_written(resid)

    def _mixing(self, block: Block) -> Callable[..., Float[Tensor, "1 token d_model"]]:
        return block


def _kept(layout: Layout, tokens: Bool[Tensor, " token"] | None) -> Layout:
    return layout if tokens is None else layout.kept(tokens)


# Points of a block that reach the rest of the pass only through the residual stream, and the stage, counted from the
# block's first, whose start they determine.
_DETERMINES = {
    "hook_resid_pre": 0,
    "attn.hook_z": 1,
    "attn.hook_result": 1,
    "hook_attn_out": 1,
    "hook_resid_mid": 1,
    "mlp.hook_post": 2,
    "hook_mlp_out": 2,
    "hook_resid_post": 2,
}
_NEEDED = {
    "attn.hook_z": ("hook_resid_pre",),
    "attn.hook_result": ("hook_resid_pre", "hook_attn_out"),
    "hook_attn_out": ("hook_resid_pre",),
    "mlp.hook_post": ("hook_resid_mid", "hook_mlp_out"),
    "hook_mlp_out": ("hook_resid_mid",),
}
_FIRES_IN_MLP_HALF = ("ln2.", "mlp.", "hook_mlp_in", "hook_mlp_out", "hook_resid_post")
