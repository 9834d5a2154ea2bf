"""What stands for the MLPs of a model on a prompt: features or neurons that are nodes, an error, a bias, a skip.

The output of block m's MLP is, exactly, the sum of what its units write, its bias, its skip and its error, which is
whatever is missing. Where heads are nodes, what attention adds is the sum of what they write, and its bias. The
replacement is of this prompt alone: activations are numbers here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reflowlens.dictionaries.dictionary import Dictionary
from reflowlens.errors import ReflowlensError
from reflowlens.models.components import Block, GatedMLP
from reflowlens.models.decoder import Decoder
from reflowlens.models.parts import Norm
from reflowlens.models.refined_block import RefinedBlock
from reflowlens.models.ttt_flow import TTTFlow

TOKEN_VALUES = "token_value"  # inputs that are no part of the stream
_ROUNDING = 1e-6  # of the largest head of a block


@dataclass(frozen=True)
class FeatureAt:
    """A feature or neuron of a block at a position, as a target.

    Args:
        layer: its block.
        index: its number there.
        position: of the prompt; negative counts from the end.
    """

    layer: int
    index: int
    position: int = -1

    @property
    def passed(self) -> tuple[int, bool]:
        """How many blocks lie before it, and whether it reads the next one in its middle, behind attention."""
        return self.layer, True


@dataclass(frozen=True)
class Units:
    """The features, neurons or heads of a block that are nodes, position after position.

    Args:
        index: its number in its block.
        activation: what it writes with.
        value: what is attributed: of features and neurons the pre-activation, of gated neurons, whose gate is held, the
            activation. It is ``rows · x + constant``, x the stream that the MLP reads, at ``ln2.hook_normalized``. Of
            heads the norm of what they write, and x that.
    """

    index: Int[Tensor, " unit"]
    position: Int[Tensor, " unit"]
    activation: Float[Tensor, " unit"]
    value: Float[Tensor, " unit"]
    rows: Float[Tensor, "unit d_model"]
    constant: Float[Tensor, " unit"]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, part: slice | Tensor) -> Units:
        return Units(*(getattr(self, name)[part] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Written:
    """What adds up to the output of a block's MLP, or of its attention.

    Args:
        by_units: by the block that they belong to, what each of its units writes here.
        error: what is missing; None of attention, of which nothing is.
        bias: what is written whatever the prompt.
        skip: the matrix that passes on ``ln2.hook_normalized``.
    """

    by_units: Mapping[int, Float[Tensor, "_unit d_model"]]
    error: Float[Tensor, "pos d_model"] | None
    bias: Float[Tensor, " d_model"] | None
    skip: Float[Tensor, "d_model d_model"] | None = None


@dataclass(frozen=True)
class Stage:
    """What is read and written in one part of the pass: by the units of a block, or by its heads.

    Args:
        kind: of the units.
        written: its ``by_units`` are by the number of their stage.
    """

    kind: str
    block: int
    units: Units
    written: Written


@dataclass(frozen=True)
class Heads:
    """The attention heads of a block as nodes, and the bias of its attention's output."""

    units: Units
    bias: Float[Tensor, " d_model"] | None


@dataclass(frozen=True)
class Replacement:
    """Of every block its units, and what is written.

    Args:
        kind: of the units, ``"feature"`` or ``"neuron"``.
        heads: of every block; empty where heads are no nodes.
    """

    kind: str
    units: Sequence[Units]
    written: Sequence[Written]
    heads: Sequence[Heads] = ()

    @property
    def stages(self) -> list[Stage]:
        """In the order of the pass: a block's heads, where they are nodes, come before its other units."""
        if not self.heads:
            parts = enumerate(zip(self.units, self.written, strict=True))
            return [Stage(self.kind, block, units, written) for block, (units, written) in parts]
        stages = []
        for block, (heads, units, written) in enumerate(zip(self.heads, self.units, self.written, strict=True)):
            by_heads = {2 * block: heads.units.activation[:, None] * heads.units.rows}
            stages.append(Stage("head", block, heads.units, Written(by_heads, None, heads.bias)))
            by_units = {2 * source + 1: vectors for source, vectors in written.by_units.items()}
            stages.append(Stage(self.kind, block, units, replace(written, by_units=by_units)))
        return stages


def points_of(model: Decoder | TTTFlow, dictionary: Dictionary | None, heads: bool) -> list[str]:
    """The hook points whose activations a replacement is made of."""
    parts = ["hook_mlp_out", "ln2.hook_normalized", *(["attn.hook_z"] if heads else [])]
    parts += ["ln1_post.hook_scale", "ln2_post.hook_scale"] if model.cfg.has_post_norms else []
    if dictionary is None:
        parts += ["mlp.hook_pre", "mlp.hook_post"]
    return [f"blocks.{layer}.{part}" for layer in range(model.cfg.n_layers) for part in parts]


def blocks_of(dictionary: Dictionary) -> list[int]:
    """The block of each layer of a transcoder.

    Raises:
        ReflowlensError: it is none of MLPs.
    """
    cfg, blocks = dictionary.cfg, []
    for read, write in zip(cfg.reads, cfg.writes, strict=True):
        block = read.split(".")[1] if read.startswith("blocks.") else ""
        if (read, write) != (f"blocks.{block}.ln2.hook_normalized", f"blocks.{block}.hook_mlp_out"):
            raise ReflowlensError(
                "an attribution graph needs transcoders of MLPs, which read ln2.hook_normalized of a block and write "
                f"its hook_mlp_out; this dictionary reads {read!r} and writes {write!r}"
            )
        blocks.append(int(block))
    if blocks != sorted(blocks):
        raise ReflowlensError(f"the layers of a transcoder must be in the order of their blocks, got {blocks}")
    return blocks


def of_dictionary(
    model: Decoder | TTTFlow, dictionary: Dictionary, cache: Mapping[str, Tensor], asked: Sequence[FeatureAt]
) -> Replacement:
    """The active features of a transcoder, and those that are asked for; a block without a layer is all error.

    Raises:
        ReflowlensError: no feature is active, what they write is not finite, or one is asked for of a block without a
            layer.
    """
    blocks, layers = blocks_of(dictionary), dictionary.each_layer()
    if missing := [target for target in asked if target.layer not in blocks]:
        there = ", ".join(map(str, blocks))
        raise ReflowlensError(f"no feature in block {missing[0].layer}: this dictionary has layers for {there}")
    none = cache["blocks.0.hook_mlp_out"][0]
    units = [no_units(none)] * model.cfg.n_layers
    written = [Written({}, cache[f"blocks.{block}.hook_mlp_out"][0], None) for block in range(model.cfg.n_layers)]
    encoded: list[Tensor] = []
    for i, (block, layer) in enumerate(zip(blocks, layers, strict=True)):
        x = cache[f"blocks.{block}.ln2.hook_normalized"][0]
        before, features = layer.preactivations(x), layer.encode(x)
        encoded.append(features)
        chosen = features > 0
        for target in asked:
            if target.layer == block:
                chosen[target.position, target.index] = True
        position, index = chosen.nonzero().unbind(1)
        found = features[position, index], before[position, index], layer.W_enc[index], layer.b_enc[index]
        units[block] = Units(index, position, *found)
        by_units = {
            source: units[source].activation[:, None] * layers[m].W_dec[units[source].index, i - m]
            for m, source in enumerate(blocks[: i + 1])
            if dictionary.cfg.cross_layer or m == i
        }
        error = cache[f"blocks.{block}.hook_mlp_out"][0] - dictionary.reconstruct(i, encoded, x)
        if not bool(error.isfinite().all()):
            raise ReflowlensError(f"what the dictionary writes in block {block} holds NaN or infinite values")
        written[block] = Written(by_units, error, layer.b_dec, layer.W_skip)
    if not any(bool((each.activation > 0).any()) for each in units):
        raise ReflowlensError("no feature of the dictionary is active on this prompt: there is nothing to draw")
    return Replacement("feature", units, written)


def of_neurons(
    model: Decoder | TTTFlow, cache: Mapping[str, Tensor], n: int, asked: Sequence[FeatureAt]
) -> Replacement:
    """The ``n`` neurons of each block and position that write the most, and those that are asked for; all others are
    the error."""
    units, written = [], []
    for layer, block in enumerate(cast("list[Block | RefinedBlock]", list(model.blocks))):
        mlp, norm, name = block.mlp, block.ln2, f"blocks.{layer}"
        before, after = cache[f"{name}.mlp.hook_pre"][0], cache[f"{name}.mlp.hook_post"][0]
        writes = neuron_writes(block)
        chosen = chosen_units(after.abs() * writes.norm(dim=1), n, layer, asked)
        position, index = chosen.nonzero().unbind(1)
        activation, value = after[position, index], before[position, index]
        rows, constant = mlp.W_in.T[index], 0.0 if mlp.b_in is None else mlp.b_in[index]
        if norm.b is not None:
            constant = constant + rows @ norm.b
        rows = rows * norm.w
        if isinstance(mlp, GatedMLP):
            gate, value = mlp.act(value), activation
            rows, constant = gate[:, None] * rows, gate * constant
        constant = torch.as_tensor(constant).expand(len(index)).to(rows)
        units.append(Units(index, position, activation, value, rows, constant))
        vectors, rest = activation[:, None] * writes[index], after.masked_fill(chosen, 0.0) @ writes
        if (scale := divisor_behind(cache, f"{name}.ln2_post")) is not None:
            vectors, rest = vectors / scale[position], rest / scale
        written.append(Written({layer: vectors}, rest, constant_behind(getattr(block, "ln2_post", None), mlp.b_out)))
    return Replacement("neuron", units, written)


def chosen_units(
    size: Float[Tensor, "pos unit"], n: int, block: int, asked: Sequence[FeatureAt]
) -> Bool[Tensor, "pos unit"]:
    """Of each position of a block the ``n`` that write the most, if anything, and those that are asked for."""
    largest = size.topk(min(n, size.shape[1]), dim=1).indices
    chosen = torch.zeros_like(size, dtype=torch.bool).scatter(1, largest, size.gather(1, largest) > 0)
    for target in asked:
        if target.layer == block:
            chosen[target.position, target.index] = True
    return chosen


def heads_of(model: Decoder | TTTFlow, cache: Mapping[str, Tensor]) -> list[Heads]:
    """Of every block the heads that write something: what a head writes is o = z W_O, its activation |o|.

    A head that loses what lies along the position's own value writes nothing at the first, but for rounding.
    """
    found = []
    for layer, block in enumerate(cast("list[Block | RefinedBlock]", list(model.blocks))):
        written = torch.einsum("phe,hed->phd", cache[f"blocks.{layer}.attn.hook_z"][0], head_writes(block))
        if (scale := divisor_behind(cache, f"blocks.{layer}.ln1_post")) is not None:
            written = written / scale[:, None]
        size = written.norm(dim=-1)
        position, index = (size > _ROUNDING * size.max()).nonzero().unbind(1)
        norm = size[position, index]
        rows = written[position, index] / norm[:, None]
        bias = constant_behind(getattr(block, "ln1_post", None), block.attn.b_O)
        found.append(Heads(Units(index, position, norm, norm, rows, torch.zeros_like(norm)), bias))
    return found


def neuron_writes(block: Block | RefinedBlock) -> Float[Tensor, "d_mlp d_model"]:
    """What each neuron of a block's MLP adds to the stream at an activation of 1."""
    W_out = block.mlp.W_out.detach()
    return W_out * block.w_mlp.detach() if isinstance(block, RefinedBlock) else _behind(block.ln2_post, W_out)


def head_writes(block: Block | RefinedBlock) -> Float[Tensor, "head d_head d_model"]:
    """What each channel of a head of a block adds to the stream at 1."""
    W_O = block.attn.W_O.detach()
    return W_O * block.w_attn.detach() if isinstance(block, RefinedBlock) else _behind(block.ln1_post, W_O)


def _behind(norm: Norm | None, written: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
    """What a norm makes of it before it is added to the stream, but for its divisor (:func:`divisor_behind`)."""
    if norm is None:
        return written
    centred = written - written.mean(-1, keepdim=True) if norm.centered else written
    return centred * norm.w.detach()


def divisor_behind(cache: Mapping[str, Tensor], norm: str) -> Float[Tensor, "pos 1"] | None:
    """By what a norm behind attention or MLP divides at each position; None where there is none."""
    return cache[f"{norm}.hook_scale"][0] if f"{norm}.hook_scale" in cache else None


def constant_behind(norm: Norm | None, bias: Tensor | None) -> Float[Tensor, " d_model"] | None:
    """What is added whatever the prompt: the bias, or that of the norm behind."""
    return detached(bias) if norm is None else detached(norm.b)


def no_units(like: Float[Tensor, "pos d_model"]) -> Units:
    none = torch.zeros(0, dtype=torch.long, device=like.device)
    empty = like.new_zeros(0)
    return Units(none, none, empty, empty, like.new_zeros(0, like.shape[1]), empty)


def detached(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.detach()
